"""Inputs that are changed, each with what must come of it, decided from what the format promises before it is read.

REJECT  the format says that such a change is noticed: an error, in words, is the only right outcome
EQUAL   the change touches nothing that is said to matter: reading gives what it gave before
DIFFER  a legal change of meaning: reading gives something else, or an error; what it gave before would be a lie

Here: bytes, videos and configurations; `damage_folders.py` has shards, exports, checkpoints and token files.
"""

from __future__ import annotations

import io
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import yaml

from soak.corpus import FPS, Corpus, moving
from vtok.data.encode import write_video

REJECT, EQUAL, DIFFER = "must be refused", "must read the same", "must differ visibly"
Span = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One changed input. kind: what it is, a key of `readers.READERS`. make: (empty folder) -> the path to read."""

    kind: str
    change: str
    rule: str
    make: Callable[[Path], Path]


@dataclass(frozen=True)
class Change:
    """A way to change bytes. apply: (bytes, draw) -> other bytes."""

    name: str
    rule: str
    apply: Callable[[bytes, random.Random], bytes]


def flip(data: bytes, draw: random.Random, spans: Sequence[Span] | None = None, *, count: int = 1) -> bytes:
    """`count` different bits flipped, all in one of the spans (first byte, byte after the last)."""
    first, end = draw.choice([s for s in spans or [(0, len(data))] if s[1] > s[0]])
    out = bytearray(data)
    for bit in draw.sample(range(8 * first, 8 * end), min(count, 8 * (end - first))):
        out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The beginning, at least a byte short, at most 97 % of it."""
    return data[: draw.randrange(0, max(1, round(0.97 * len(data))))]


def overwrite(data: bytes, draw: random.Random) -> bytes:
    """A stretch of an eighth of the file, replaced by other bytes of the same number."""
    size = max(8, len(data) // 8)
    at = draw.randrange(0, max(1, len(data) - size))
    return data[:at] + bytes(b ^ 0xA5 for b in data[at : at + size]) + data[at + size :]


def remove(data: bytes, draw: random.Random) -> bytes:
    """A few bytes taken out of the middle."""
    at = draw.randrange(1, len(data) - 8)
    return data[:at] + data[at + draw.randrange(1, 8) :]


def insert(data: bytes, draw: random.Random) -> bytes:
    """A few bytes put into the middle."""
    at = draw.randrange(1, len(data) - 1)
    return data[:at] + draw.randbytes(draw.randrange(1, 8)) + data[at:]


def noise(data: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(max(16, min(len(data), 4096)))


FOREIGN = {
    "empty": b"",
    "text": b"hello\n" * 50,
    "json": b'{"a": 1}\n',
    "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    "zeros": b"\0" * 4096,
}


def foreign(_: bytes, draw: random.Random) -> bytes:
    return FOREIGN[draw.choice(sorted(FOREIGN))]


def changed(data: bytes, change: Change, draw: random.Random) -> bytes:
    """As `change.apply`, but never the same bytes where the rule says that they are others."""
    for _ in range(100):
        out = change.apply(data, draw)
        if out != data or change.rule == EQUAL:
            return out
    raise AssertionError(f"{change.name} changes nothing")


def in_a_file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    return make


def in_turn(
    kind: str, originals: dict[str, bytes], changes: Callable[[str], list[Change]], seed: int
) -> Iterator[Case]:
    """Endless cases: every change of every original in turn, each time at another place."""
    draw = random.Random(f"{kind} {seed}")
    while True:
        for name, data in originals.items():
            for change in changes(name):
                yield Case(kind, f"{name}: {change.name}", change.rule, in_a_file(name, changed(data, change, draw)))


# videos


def packets(data: bytes) -> list[Span]:
    """Where the second half of each coded frame lies: behind all headers."""
    spans = []
    with av.open(io.BytesIO(data), "r") as container:
        for packet in container.demux(container.streams.video[0]):
            if packet.pos is not None and packet.size > 16:
                at = data.find(bytes(packet))
                spans += [(at + packet.size // 2, at + packet.size)] if at >= 0 else []
    return spans


def remuxed(data: bytes, container: str, *, drop: int = 0) -> bytes:
    """The same coded frames in another container, without the last `drop` of them."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data), "r") as source, av.open(file, "w", format=container) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        coded = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
        for packet in coded[: len(coded) - drop]:
            packet.stream = stream
            target.mux(packet)
    return file.getvalue()


def video_files(corpus: Corpus) -> dict[str, bytes]:
    """One file of each kind, by name."""

    def coded(codec: str, container: str, frames: int, **options: str) -> bytes:
        file = io.BytesIO()
        write_video(file, moving(3, frames), fps=FPS, codec=codec, container=container, options=options)
        return file.getvalue()

    return {
        "clip.mp4": (corpus.videos / "clip00.mp4").read_bytes(),
        "clip.mkv": coded("ffv1", "matroska", 24, level="3", slicecrc="1"),
        "still.png": coded("png", "image2pipe", 1),
    }


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def video_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """H.264 promises that a badly damaged file is noticed, and one that ends over half a second before it says; FFV1
    and PNG, which carry checksums, that any bit is."""
    originals = video_files(corpus)
    mkv, png = originals["clip.mkv"], originals["still.png"]
    checked = {"clip.mkv": packets(mkv), "still.png": [(41, len(png) - 12)]}

    def behind_the_first(data: bytes, draw: random.Random) -> bytes:
        first = packets(data)[0][1]
        return data[:first] + overwrite(data[first:], draw)

    text = png_chunk(b"tEXt", b"Comment\0a word")
    common = [
        Change("a quarter or more cut off", REJECT, lambda d, r: d[: r.randrange(0, round(0.75 * len(d)))]),
        Change("noise", REJECT, noise),
        Change("foreign", REJECT, foreign),
    ]
    own = {
        "clip.mp4": [
            # The first frame begins with a note of the encoder's, which may say anything.
            Change("an eighth of what is behind the first frame overwritten", REJECT, behind_the_first),
            Change("in another container", EQUAL, lambda d, _: remuxed(d, "matroska")),
            Change("a frame dropped", DIFFER, lambda d, r: remuxed(d, "mp4", drop=r.randint(1, 5))),
        ],
        "clip.mkv": [
            Change("a bit of a frame", REJECT, lambda d, r: flip(d, r, checked["clip.mkv"])),
            Change("bits of a frame", REJECT, lambda d, r: flip(d, r, checked["clip.mkv"], count=5)),
            Change("in another container", EQUAL, lambda d, _: remuxed(d, "nut")),
            Change("a frame dropped", DIFFER, lambda d, r: remuxed(d, "matroska", drop=r.randint(1, 5))),
        ],
        "still.png": [
            Change("a bit of its pixels", REJECT, lambda d, r: flip(d, r, checked["still.png"])),
            Change("a comment", EQUAL, lambda d, _: d[:33] + text + d[33:]),
        ],
    }
    return in_turn("video", originals, lambda name: [*common, *own[name]], seed)


# configurations


def config_cases(corpus: Corpus, seed: int) -> Iterator[Case]:
    """Every key and value is checked: a wrong one is refused by name, a right one shows in the resolved settings."""
    text = corpus.config.read_text()
    leaf = re.compile(r"^( *)([a-z_]+): (?!.*\n\1 )(.+)$", re.MULTILINE)
    lines = [match for match in leaf.finditer(text)]
    numbers = [match for match in lines if re.fullmatch(r"\d+|\d+\.\d+", match[3]) and "ledger" not in match[2]]
    outside = [m for m in numbers if m[2] in ("lr", "warmup_steps", "ema_decay", "max_steps", "log_every", "val_every")]

    def put(match: re.Match[str], line: str) -> bytes:
        return (text[: match.start()] + line + text[match.end() :]).encode()

    def misspelt(_: bytes, draw: random.Random) -> bytes:
        match = draw.choice(lines)
        letters = list(match[2])
        letters.insert(draw.randrange(len(letters) + 1), draw.choice("qxzj"))
        return put(match, f"{match[1]}{''.join(letters)}: {match[3]}")

    def wrong_type(_: bytes, draw: random.Random) -> bytes:
        match = draw.choice(numbers)
        value = draw.choice(["many", "[1, 2]", "{a: 1}", "'0x'", "1.5.2"])
        return put(match, f"{match[1]}{match[2]}: {value}")

    def other_value(_: bytes, draw: random.Random) -> bytes:
        match = draw.choice(outside)
        number = float(match[3]) * draw.choice([0.5, 2.0, 3.0])
        return put(match, f"{match[1]}{match[2]}: {number if '.' in match[3] else round(number) + 1}")

    def shuffled(_: bytes, draw: random.Random) -> bytes:
        values: dict[str, Any] = yaml.safe_load(text)
        order = list(values)
        draw.shuffle(order)
        if draw.random() < 0.5:
            return json.dumps({key: values[key] for key in order}).encode()  # json is yaml
        return yaml.safe_dump({key: values[key] for key in order}, sort_keys=False).encode()

    def broken(_: bytes, draw: random.Random) -> bytes:
        bad = ["\t- {", "a: [1, 2", "key: 'open", "? : :\n- x", "&a [*b]", "!!python/object:os.system {}", "- 1"]
        return text.encode() + b"\n" + draw.choice(bad).encode() + b"\n"

    def commented(_: bytes, draw: random.Random) -> bytes:
        match = draw.choice(lines)
        return put(match, f"{match[0]}  # {draw.randbytes(6).hex()}")

    def family(_: bytes, draw: random.Random) -> bytes:
        name = draw.choice(["flexibel", "nope", "os.path", "''", "null", "../flexible", "vtok.types"])
        return text.replace("name: flexible", f"name: {name}").encode()

    def nested(_: bytes, draw: random.Random) -> bytes:
        kind = draw.choice(["deep", "aliases", "large"])
        if kind == "deep":
            return text.encode() + b"eval: " + b"[" * 3000
        if kind == "large":
            return text.encode() + b"# " + b"x" * (2 << 20)
        levels = ["l0: &a0 [1, 2]"] + [f"l{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
        return text.encode() + "\n".join(levels).encode()

    changes = [
        Change("a key misspelt", REJECT, misspelt),
        Change("a value of another type", REJECT, wrong_type),
        Change("not yaml", REJECT, broken),
        Change("another family", REJECT, family),
        Change("nested, aliased or long without end", REJECT, nested),
        Change("foreign", REJECT, lambda d, r: FOREIGN[r.choice(["empty", "pickle", "png", "text", "zeros"])]),
        Change("another order or notation", EQUAL, shuffled),
        Change("a comment", EQUAL, commented),
        Change("another value", DIFFER, other_value),
    ]
    return in_turn("config", {"config.yaml": text.encode()}, lambda _: changes, seed)
