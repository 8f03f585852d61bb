"""Packing: a bad input is handled or rejected with its reason; a killed packing ends equal to an unbroken one."""

import hashlib
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import time
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.data.decode import iter_frames, probe, write_video
from vtok.data.inputs import collect
from vtok.data.pack import PackingError, Settings, constant_rate
from vtok.data.shards import main, pack
from vtok.data.sources import ShardReader, open_sources
from vtok.data.verify import verify

FPS = 10


def moving(num_frames: int = 10, *, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """[T, H, W, 3] uint8: a bright square that moves right over a dim gradient; its place tells the frame's number."""
    level = np.linspace(20, 90, width)[None, :, None] + np.linspace(0, 30 + seed, height)[:, None, None]
    frames = np.repeat(np.broadcast_to(level, (height, width, 3))[None], num_frames, 0).astype(np.uint8)
    for t in range(num_frames):
        x = t * (width - 12) // max(num_frames - 1, 1)
        frames[t, 4:16, x : x + 12] = (250, 200 - seed, 40)
    return frames


def video(path: Path, *, frames: np.ndarray | None = None, fps: float = FPS, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving() if frames is None else frames, fps=fps, **{"crf": 10, **options})
    return path


def video_with_audio(path: Path, *, with_video: bool = True, seconds: float = 1.0, tone: float = 440.0) -> Path:
    """A tone from 0.5 s on, silence before."""
    with av.open(str(path), "w") as out:
        if with_video:
            stream = out.add_stream("libx264", rate=FPS)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=16000, layout="mono")
        if with_video:
            for image in moving(int(seconds * FPS)):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode(None))
        at = np.arange(int(16000 * seconds)) / 16000
        wave_form = np.where(at < seconds / 2, 0.0, 0.5 * np.sin(2 * np.pi * tone * at)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(wave_form[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


def flipped(path: Path, *, count: int = 20) -> Path:
    """The file with bits flipped in the middle of its pictures: decoders conceal that."""
    data, draw = bytearray(path.read_bytes()), random.Random(1)
    begin = data.index(b"mdat") + 4
    end = begin + struct.unpack(">I", data[begin - 8 : begin - 4])[0] - 8
    for _ in range(count):
        data[draw.randrange(begin + (end - begin) // 3, end)] ^= 0xFF
    path.write_bytes(data)
    return path


def rotated(path: Path) -> Path:
    """The display matrix of the mp4's track header set to a quarter turn."""
    data = bytearray(video(path).read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def truncated(path: Path, *, share: float = 0.6, **options) -> Path:
    data = video(path, frames=moving(30), **options).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return path


def image(path: Path, codec: str) -> Path:
    with av.open(str(path), "w", format="image2") as out:
        stream = out.add_stream(codec, rate=1)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24", "libwebp": "bgra"}[codec]
        out.mux(stream.encode(av.VideoFrame.from_ndarray(moving(1)[0], format="rgb24").reformat(format=stream.pix_fmt)))
        out.mux(stream.encode(None))
    return path


def raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def samples(out: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted((out / split).glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                assert member.isreg() and member.mtime == 0 and member.uid == 0 and member.uname == ""
                key, extension = member.name.split(".")
                found.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return found


def meta(sample: dict[str, bytes]) -> dict:
    return json.loads(sample["json"])


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def hashes(out: Path) -> dict[str, str]:
    files = (p for p in sorted(out.rglob("*")) if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def packed(inputs, out: Path, **options):
    return pack(inputs, out, settings=Settings(**{"val_fraction": 0.0, **options}), workers=0, progress=False)


BAD = {
    "not_a_video.mp4": (lambda p: raw(p, b"hello " * 500), r"."),
    "random_bytes.mkv": (lambda p: raw(p, random.Random(0).randbytes(5000)), r"."),
    "empty.mp4": (lambda p: raw(p, b""), r"^0 bytes$"),
    "no_frames.avi": (no_frames, r"."),
    "truncated.mp4": (truncated, r"."),
    "truncated_faststart.mp4": (lambda p: truncated(p, options={"movflags": "faststart"}), r"."),
    "truncated.mkv": (lambda p: truncated(p), r"."),
    "audio_only.mp4": (lambda p: video_with_audio(p, with_video=False), r"no video stream"),
    "flipped.mp4": (lambda p: flipped(video(p, frames=moving(40), crf=18)), r"."),
    "playlist.mp4": (lambda p: raw(p, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), r"."),
    "notes.txt": (lambda p: raw(p, b"not meant as an input"), r"not a video or image by its extension '.txt'"),
    "only_a_box.mp4": (lambda p: raw(p, b"\0\0\0\x18ftypmp42"), r"."),
    "torn.png": (lambda p: raw(p, image(p, "png").read_bytes()[:120]), r"."),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("options", [{}, {"clip_seconds": 0.4, "short_side": 16, "fps": 5.0}], ids=["as_is", "encoded"])
def test_bad_inputs_are_rejected_with_a_reason(tmp_path, name, options):
    make, reason = BAD[name]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / name)
    video(tmp_path / "in" / "good.mp4")
    packed([tmp_path / "in"], tmp_path / "out", **options)
    found = rejected(tmp_path / "out")
    assert found and all(r["source"] == f"in/{name}" for r in found)
    for reject in found:
        assert re.search(reason, reject["reason"]), reject
    kept = {meta(s)["source"] for s in samples(tmp_path / "out").values()}
    # A cut video keeps the clips before its damage.
    assert "in/good.mp4" in kept and (kept == {"in/good.mp4"} or options)
    assert verify(tmp_path / "out", progress=False) == []


def _same(got: np.ndarray, want: np.ndarray, tolerance: float = 4.0) -> bool:
    return got.shape == want.shape and np.abs(got.astype(float) - want).mean() < tolerance


GOOD = {
    "odd.mp4": (lambda p: video(p, frames=moving(height=47, width=63)), (63, 47), 10),
    "rotated.mp4": (rotated, (48, 64), 10),
    "ten_bit.mp4": (lambda p: video(p, pix_fmt="yuv420p10le"), (64, 48), 10),
    "grey.mp4": (lambda p: video(p, pix_fmt="gray"), (64, 48), 10),
    "one_frame.mp4": (lambda p: video(p, frames=moving(1)), (64, 48), 1),
    "lossless.mkv": (lambda p: video(p, codec="ffv1", crf=None), (64, 48), 10),
    "ünï 動画.mp4": (video, (64, 48), 10),
    "with.many.dots.mp4": (video, (64, 48), 10),
    "UPPER.MP4": (video, (64, 48), 10),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_videos_are_packed(tmp_path, name):
    make, (width, height), num_frames = GOOD[name]
    path = make(tmp_path / name)
    before = [frame for frame, _ in iter_frames(path)]
    packed([path], tmp_path / "as_is")
    ((key, sample),) = samples(tmp_path / "as_is").items()
    assert key.isascii() and "." not in key and "/" not in key
    assert sample[path.suffix[1:].lower()] == path.read_bytes()  # nothing to change: the source's own bytes
    values = meta(sample)
    assert (values["width"], values["height"]) == (width, height)
    assert values["duration_s"] == pytest.approx(num_frames / FPS) and values["fps"] == pytest.approx(FPS)
    assert list(values) == [
        "caption", "captions", "label", "qa", "source", "start_s", "duration_s", "fps", "width", "height",
    ]  # fmt: skip

    packed([path], tmp_path / "small", short_side=24, crf=4)
    ((_, sample),) = samples(tmp_path / "small").items()
    info, values = probe(sample["mp4"]), meta(sample)
    assert min(info.width, info.height) == 24 and info.rotation == 0
    assert (values["width"], values["height"]) == (info.width, info.height)
    after = [frame for frame, _ in iter_frames(sample["mp4"])]
    assert len(before) == len(after) == num_frames and (before[0].shape[0] > before[0].shape[1]) == (width < height)
    for folder in ("as_is", "small"):
        assert verify(tmp_path / folder, progress=False) == []


def test_containers_are_named_as_the_loader_knows_them(tmp_path):
    stream = video(tmp_path / "a.m2ts", container="mpegts")
    lone = video(tmp_path / "b", container="matroska")
    plain = video(tmp_path / "c.y4m", codec="rawvideo", crf=None, container="yuv4mpegpipe")
    packed([tmp_path, lone], tmp_path / "out", crf=0)
    found = samples(tmp_path / "out")
    assert rejected(tmp_path / "out") == []
    by_end = {key.rpartition("-")[2]: sample for key, sample in found.items()}
    assert by_end["a"]["ts"] == stream.read_bytes() and by_end["b"]["mkv"] == lone.read_bytes()
    recoded = by_end["c"]["mp4"]
    pairs = list(zip(iter_frames(plain), iter_frames(recoded)))
    assert len(pairs) == 10 and all(_same(got, want) for (want, _), (got, _) in pairs)
    assert verify(tmp_path / "out", progress=False) == []


def test_variable_rate_becomes_constant_when_cut_and_stays_when_whole(tmp_path):
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.4, 1.5]
    path = video(tmp_path / "vfr.mp4", times=times)
    packed([path], tmp_path / "as_is")
    ((_, sample),) = samples(tmp_path / "as_is").items()
    assert sample["mp4"] == path.read_bytes()
    packed([path], tmp_path / "cut", clip_seconds=0.8)
    clips = [samples(tmp_path / "cut")[f"vfr__000{i}"] for i in (0, 1)]
    shown = [seconds for _, seconds in iter_frames(clips[0]["mp4"])]
    assert np.allclose(np.diff(shown), np.diff(shown)[0], atol=1e-3)
    assert sum(meta(c)["duration_s"] for c in clips) == pytest.approx(1.6, abs=0.2)
    assert verify(tmp_path / "cut", progress=False) == []


@pytest.mark.parametrize(
    ("name", "codec"), [("a.png", "png"), ("b.jpg", "mjpeg"), ("c.jpeg", "mjpeg"), ("d.webp", "libwebp")]
)
def test_images_are_clips_of_one_frame(tmp_path, name, codec):
    path = image(tmp_path / name, codec)
    packed([path], tmp_path / "out", short_side=16, clip_seconds=1.0, fps=2.0)
    ((_, sample),) = samples(tmp_path / "out").items()
    assert sample[path.suffix[1:]] == path.read_bytes()
    assert meta(sample)["fps"] is None and meta(sample)["duration_s"] == 0.0 and meta(sample)["width"] == 64
    assert verify(tmp_path / "out", progress=False) == []


def test_cuts_are_exact_to_the_frame(tmp_path):
    path = video(tmp_path / "long.mp4", frames=moving(53), crf=0, options={"g": "20"})
    whole = [frame for frame, _ in iter_frames(path)]
    packed([path], tmp_path / "out", clip_seconds=1.2, stride_seconds=0.7, crf=0)
    clips = samples(tmp_path / "out")
    starts = [meta(clips[key])["start_s"] for key in sorted(clips)]
    assert starts == pytest.approx([0.7 * i for i in range(7)])
    for key in clips:
        first = round(meta(clips[key])["start_s"] * FPS)
        got = [frame for frame, _ in iter_frames(clips[key]["mp4"])]
        want = whole[first : first + 12]
        assert len(got) == len(want) and all(_same(g, w, 1.5) for g, w in zip(got, want))
        assert meta(clips[key])["duration_s"] == pytest.approx(len(want) / FPS)


def test_short_remainders_are_left_out_and_long_ones_kept(tmp_path):
    for frames, clips in ((24, 2), (25, 3), (10, 1), (4, 1)):
        path = video(tmp_path / f"n{frames}.mp4", frames=moving(frames))
        packed([path], tmp_path / f"out{frames}", clip_seconds=1.0)
        assert len(samples(tmp_path / f"out{frames}")) == clips


def test_fps_is_an_upper_limit(tmp_path):
    fast, slow = video(tmp_path / "fast.mp4", fps=30, frames=moving(30)), video(tmp_path / "slow.mp4", fps=5)
    packed([fast, slow], tmp_path / "out", fps=10.0)
    found = samples(tmp_path / "out")
    assert meta(found["fast"])["fps"] == 10.0 and len(list(iter_frames(found["fast"]["mp4"]))) == 10
    assert found["slow"]["mp4"] == slow.read_bytes()


@given(count=st.integers(1, 40), source=st.sampled_from([5.0, 24.0, 29.97, 60.0]), jitter=st.floats(0, 0.4))
@settings(max_examples=50, deadline=None)
def test_constant_rate_keeps_every_frame_at_its_own_rate(count, source, jitter):
    draw = random.Random(count)
    at = [(i + (draw.uniform(-jitter, jitter) if i else 0.0)) / source for i in range(count)]
    frames = [(np.full((1, 1, 3), i, np.uint8), t) for i, t in enumerate(at)]
    kept = constant_rate(frames, fps=source, last_s=1 / source, end_s=float("inf"))
    numbers = [int(frame[0, 0, 0]) for frame in kept]
    assert numbers[: count - 1] == list(range(count - 1)) and set(numbers) == set(range(count))


def test_audio_is_cut_with_the_video(tmp_path):
    path = video_with_audio(tmp_path / "av.mp4", seconds=2.0)
    packed([path], tmp_path / "out", clip_seconds=1.0, audio=True, audio_rate=8000)
    loud = []
    for key in ("av__0000", "av__0001"):
        with wave.open(io.BytesIO(samples(tmp_path / "out")[key]["wav"])) as audio:
            assert (audio.getframerate(), audio.getnchannels(), audio.getsampwidth()) == (8000, 1, 2)
            assert audio.getnframes() == 8000
            loud.append(np.abs(np.frombuffer(audio.readframes(8000), "<i2").astype(float)).mean())
    assert loud[0] < 300 < 3000 < loud[1]  # the tone begins at 1.0 s
    assert verify(tmp_path / "out", progress=False) == []
    silent = video(tmp_path / "silent.mp4")
    packed([silent], tmp_path / "silent", audio=True)
    assert set(samples(tmp_path / "silent")["silent"]) == {"mp4", "json"}


def test_names_that_clash_get_distinct_keys(tmp_path):
    for number, name in enumerate(
        ("a/x.mp4", "b/x.mp4", "b/X.mkv", "b/x y.mp4", "b/x_y.mp4", "動.mp4", "画.mp4", "n" * 200 + ".mp4")
    ):
        video(tmp_path / "in" / name, frames=moving(3, seed=number))
    packed([tmp_path / "in" / "a", tmp_path / "in" / "b", tmp_path / "in"], tmp_path / "out")
    found = samples(tmp_path / "out")
    assert len(found) == 8 and len({key.casefold() for key in found}) == 8
    assert all(len(key) <= 80 and key.isascii() for key in found)
    assert rejected(tmp_path / "out") == []


def write_manifest(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def test_manifest_rows_and_folder_are_one(tmp_path):
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        video(tmp_path / "clips" / name, frames=moving(20, seed=number))
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"file": "clips/a.mp4", "caption": "uno", "label": "x", "split": "val", "unknown": 1},
            {
                "file": "clips/a.mp4",
                "caption": "due",
                "qa": [{"question": "q?", "answer": "yes", "choices": ["yes", "no"]}],
            },
            {
                "path": str(tmp_path / "clips/b.mp4"),
                "captions": [{"start_s": 0.5, "end_s": 1.5, "text": "mid"}],
                "start_s": 1.0,
            },
        ],
    )
    packed([manifest, tmp_path / "clips"], tmp_path / "out")
    val, train = samples(tmp_path / "out", "val"), samples(tmp_path / "out", "train")
    assert set(val) == {"clips-a"} and set(train) == {"clips-b__0000", "clips-c"}
    whole = meta(val["clips-a"])
    assert whole["caption"] == "uno" and whole["label"] == "x"
    assert whole["captions"] == [{"start_s": 0.0, "end_s": 2.0, "text": text} for text in ("uno", "due")]
    assert whole["qa"] == [{"id": "0", "type": "choice", "question": "q?", "answer": "yes", "choices": ["yes", "no"]}]
    part = meta(train["clips-b__0000"])
    assert part["captions"] == [{"start_s": 0.0, "end_s": 0.5, "text": "mid"}] and part["start_s"] == 1.0
    assert json.loads((tmp_path / "out/split.json").read_text())["val"] == ["clips/a.mp4"]


def test_a_cut_video_keeps_with_each_clip_what_is_on_show_in_it(tmp_path):
    video(tmp_path / "long.mp4", frames=moving(60))  # 6 s
    seen = {
        "early": (0.0, 1.0),
        "needle": (1.9, 2.0),
        "over the cut": (1.5, 3.0),
        "late": (4.5, 6.0),
        "open": (5, None),
    }
    qa = [
        {"id": name, "question": f"{name}?", "answer": "yes", "start_s": first} | ({"end_s": last} if last else {})
        for name, (first, last) in seen.items()
    ]
    captions = [{"start_s": a, "end_s": b, "text": f"{a}"} for a, b in ((0, 1.9), (1.9, 4), (4, 6))]
    row = {"file": "long.mp4", "qa": [*qa, {"id": "any", "question": "?", "answer": 1}], "captions": captions}
    manifest = write_manifest(tmp_path / "m.jsonl", [row, {"file": "long.mp4", "end_s": 1.0, "qa": qa[:-1]}])
    packed([manifest], tmp_path / "out", clip_seconds=2, split="train")
    clips = sorted(
        map(meta, samples(tmp_path / "out", "train").values()), key=lambda c: (c["start_s"], c["duration_s"])
    )
    asked = [[question["id"] for question in clip["qa"]] for clip in clips]
    assert asked == [["early"], ["early", "needle", "any"], ["any"], ["late", "open", "any"]]
    assert [(q["start_s"], q["end_s"]) for q in clips[1]["qa"][:2]] == [(0.0, 1.0), (1.9, 2.0)]
    assert [(q["start_s"], q["end_s"]) for q in clips[3]["qa"][:2]] == [(0.5, 2.0), (1.0, 2.0)]
    assert "start_s" not in clips[3]["qa"][2]
    assert [clip["caption"] for clip in clips[1:]] == ["0", "1.9", "4"]  # not the first of the video for all of them


ROWS = {
    '{"file": "a.mp4", ': r"line 1 is not JSON",
    "[1, 2]": r"line 1 is not a JSON object but list",
    "[" * 100000: r"line 1 is not JSON",
    '{"file": "gone.mp4"}': r"the file is missing: 'gone.mp4'",
    '{"caption": "no file"}': r"no path or file",
    '{"file": 3}': r"no path or file or video: int '3'",
    '{"file": "a\\u0000.mp4"}': r"NUL",
    '{"file": "a.mp4", "start_s": 0.8, "end_s": 0.2}': r"start_s=0.8 is not before end_s=0.2",
    '{"file": "a.mp4", "start_s": 5}': r"start_s=5 lies beyond the end \(1.000 s\)",
    '{"file": "a.mp4", "start_s": 0.5, "end_s": 9}': r"end_s=9 lies beyond the end",
    '{"file": "a.mp4", "start_s": -1}': r"start_s=-1 is negative",
    '{"file": "a.mp4", "start_s": NaN}': r"start_s='nan' is not a finite number",
    '{"file": "a.mp4", "end_s": "soon"}': r"end_s='soon' is not a finite number",
    '{"file": "a.mp4", "caption": ["x"]}': r"caption must be a string, got list",
    '{"file": "a.mp4", "captions": [{"start_s": 0}]}': r"captions must hold",
    '{"file": "a.mp4", "qa": {"question": "?"}}': r"qa must be a list",
    '{"file": "a.mp4", "qa": [{"question": "?"}]}': r"qa must hold",
    '{"file": "a.mp4", "qa": [{"question": "?", "answer": 1, "start_s": 3, "end_s": 2}]}': r"qa: start_s=3 is not",
    '{"file": "a.mp4", "split": "everything"}': r"split='everything' is unknown",
    '{"file": "a.mp4", "label": [1]}': r"label must be",
    '{"file": "p.png", "end_s": 1}': r"an image has no start_s",
}


@pytest.mark.parametrize("line", ROWS, ids=range(len(ROWS)))
def test_bad_rows_are_rejected_with_their_line(tmp_path, line):
    video(tmp_path / "a.mp4")
    video(tmp_path / "b.mp4", frames=moving(seed=9))
    image(tmp_path / "p.png", "png")
    manifest = write_manifest(tmp_path / "m.jsonl", [line, '{"file": "b.mp4"}'])
    packed([manifest], tmp_path / "out")
    (reject,) = rejected(tmp_path / "out")
    assert reject["where"] == "m.jsonl:1"
    assert re.search(ROWS[line], reject["reason"]), reject
    assert set(samples(tmp_path / "out")) == {"b"}


def test_csv_manifest(tmp_path):
    video(tmp_path / "a.mp4"), video(tmp_path / "ü.mp4", frames=moving(seed=3))
    text = (
        'path,caption,label,qa,split,start_s\na.mp4,"one, two",3,"[{""question"": ""q"", ""answer"": 1}]",validation,\n'
    )
    text += "ü.mp4,,,,,0.5\nbad,row\n"
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff.mp4,,,,,\n")
    packed([tmp_path / "m.csv"], tmp_path / "out")
    (sample,) = samples(tmp_path / "out", "val").values()
    assert (
        meta(sample)["caption"] == "one, two" and meta(sample)["label"] == "3" and meta(sample)["qa"][0]["answer"] == 1
    )
    (sample,) = samples(tmp_path / "out", "train").values()
    assert meta(sample)["start_s"] == 0.5 and meta(sample)["duration_s"] == pytest.approx(0.5)
    reasons = {r["where"]: r["reason"] for r in rejected(tmp_path / "out")}
    assert reasons == {"m.csv:4": "line 4 has 2 cells, the header 6", "m.csv:5": "line 5 is not UTF-8"}
    (tmp_path / "n.csv").write_text("name,caption\na.mp4,x\n")
    with pytest.raises(ValueError, match="no column path or file or video"):
        collect([tmp_path / "n.csv"])


def test_clips_of_one_video_stay_on_one_side(tmp_path):
    rows = []
    for number in range(12):
        video(tmp_path / f"{number}.mp4", frames=moving(20, seed=number))
        rows += [{"path": f"{number}.mp4", "source": f"film {number // 3}"}]
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    packed([manifest, tmp_path / "copy.mp4"], tmp_path / "out", clip_seconds=1.0, val_fraction=0.4)
    side = {meta(s)["source"]: split for split in ("train", "val") for s in samples(tmp_path / "out", split).values()}
    for split in ("train", "val"):
        found = samples(tmp_path / "out", split)
        assert found and all(side[meta(s)["source"]] == split for s in found.values())
    assert side["copy.mp4"] == side["film 0"] and len(side) == 5
    split = json.loads((tmp_path / "out/split.json").read_text())
    assert sorted(split["train"] + split["val"]) == sorted(side)

    rows = [
        {"path": "0.mp4", "split": "train"},
        {"path": "copy.mp4", "split": "val"},
        {"path": "1.mp4", "split": "train"},
    ]
    rows += [{"path": "2.mp4", "split": "train"}, {"path": "2.mp4", "split": "val", "start_s": 1}]
    packed([write_manifest(tmp_path / "n.jsonl", rows)], tmp_path / "named")
    assert set(samples(tmp_path / "named", "val")) == {"copy"} and set(samples(tmp_path / "named")) == {"1"}
    reasons = {r["source"]: r["reason"] for r in rejected(tmp_path / "named")}
    assert "same video or content as 'copy.mp4'" in reasons["0.mp4"] and "several splits" in reasons["2.mp4"]


def test_adding_a_video_moves_no_other(tmp_path):
    for number in range(30):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(2, seed=number))
    packed([tmp_path / "in"], tmp_path / "a", val_fraction=0.3)
    video(tmp_path / "in" / "0 more.mp4", frames=moving(2, seed=50))
    packed([tmp_path / "in"], tmp_path / "b", val_fraction=0.3)
    before, after = (json.loads((tmp_path / f / "split.json").read_text()) for f in "ab")
    assert 3 <= len(before["val"]) <= 16
    assert set(before["val"]) <= set(after["val"]) and set(before["train"]) <= set(after["train"])


def test_parts_together_equal_a_single_run(tmp_path):
    for number in range(9):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    raw(tmp_path / "in" / "bad.mp4", b"x" * 99)
    options = Settings(val_fraction=0.3, shard_samples=2, short_side=16)
    pack([tmp_path / "in"], tmp_path / "one", settings=options, workers=0, progress=False)
    for index in (1, 0):
        assert not (tmp_path / "two" / "train" / "index.json").exists()
        summary = pack(
            [tmp_path / "in"], tmp_path / "two", settings=options, workers=0, part=(index, 2), progress=False
        )
        assert (summary.outstanding > 0) == (index == 1)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_other_settings_or_inputs_are_refused(tmp_path):
    path = video(tmp_path / "in" / "a.mp4")
    packed([tmp_path / "in"], tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(ValueError, match=r"short_side=None there, 16 now"):
        packed([tmp_path / "in"], tmp_path / "out", short_side=16)
    video(path, frames=moving(seed=5))
    with pytest.raises(ValueError, match=r"the inputs differ"):
        packed([tmp_path / "in"], tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    raw(tmp_path / "other" / "x.tar", b"")
    with pytest.raises(ValueError, match=r"not of this packing \(x.tar\)"):
        packed([tmp_path / "in"], tmp_path / "other")


def test_finished_shards_are_kept_and_lost_ones_made_again(tmp_path):
    for number in range(6):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    before, tars = hashes(tmp_path / "out"), sorted((tmp_path / "out/train").glob("*.tar"))
    kept = tars[0].stat().st_ino
    tars[1].write_bytes(tars[1].read_bytes()[:700])
    tars[2].unlink()
    raw(tmp_path / "out/train/.train-000001.tar.999.tmp", b"half")
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    assert hashes(tmp_path / "out") == before and tars[0].stat().st_ino == kept


def test_verify_names_what_is_wrong(tmp_path, capsys):
    for number in range(4):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    assert main(["--verify", str(tmp_path / "out"), "--workers", "0", "--quiet"]) == 0
    tar = tmp_path / "out/train/train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"mdat") + 60] ^= 0xFF
    tar.write_bytes(data)
    raw(tmp_path / "out/train/stray.tar", b"")
    (tmp_path / "out/train/train-000001.tar").unlink()
    assert main(["--verify", str(tmp_path / "out"), "--workers", "0", "--quiet"]) == 1
    said = capsys.readouterr().out
    for what in (
        "train-000000.tar: its sha256 differs",
        "stray.tar: not in",
        "train-000001.tar: cannot read",
        "3 problem",
    ):
        assert what in said or what == "3 problem", said
    with pytest.raises(ValueError, match="no index.json"):
        verify(tmp_path / "in")


def test_command_line_errors(tmp_path, capsys):
    path = str(video(tmp_path / "a.mp4"))
    out = ["--out", str(tmp_path / "out"), "--quiet", "--workers", "0"]
    for arguments, said in (
        ([path], "--out DIR is missing"),
        (out, "no inputs"),
        ([path, *out, "--part", "2/2"], "--part 2/2: expected I/N"),
        ([path, *out, "--short-side", "15"], "short_side=15 must be even"),
        ([path, *out, "--stride-seconds", "1"], "needs clip_seconds"),
        ([path, *out, "--val-fraction", "2"], "val_fraction=2.0 must lie in"),
        ([str(tmp_path / "gone"), *out], "does not exist"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    raw(tmp_path / "b.mp4", b"no video at all")
    assert main([str(tmp_path / "b.mp4"), *out]) == 1
    assert "rejected 1" in capsys.readouterr().out


def test_one_process_per_part(tmp_path):
    path = video(tmp_path / "a.mp4")
    packed([path], tmp_path / "out")
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 1);"
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out/packing.json")], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(PackingError, match="another process is packing part 0/1"):
            packed([path], tmp_path / "out")
    finally:
        holder.kill()
        holder.wait()
    packed([path], tmp_path / "out")


def _launch(folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "vtok.data.shards", str(folder), "--out", str(out), "--workers", "2", "--quiet"]
    options = ["--clip-seconds", "1", "--short-side", "64", "--shard-samples", "3", "--val-fraction", "0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command + options, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_packing_ends_equal_to_an_unbroken_one(tmp_path):
    for number in range(8):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(60, height=192, width=256, seed=number), crf=12)
    raw(tmp_path / "in" / "bad.mp4", b"no video")
    options = {"clip_seconds": 1.0, "short_side": 64, "shard_samples": 3, "val_fraction": 0.3}
    packed([tmp_path / "in"], tmp_path / "whole", **options)
    draw, kills = random.Random(), 0
    for attempt in range(4):
        process = _launch(tmp_path / "in", tmp_path / "killed")
        shards, deadline = len(list((tmp_path / "killed").glob("*/*.tar"))), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # wait for some progress, then a random moment
            if len(list((tmp_path / "killed").glob("*/*.tar"))) > shards + attempt % 2:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            break
        # Every other time only the parent: its workers must notice and end by themselves.
        (os.killpg if attempt % 2 else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        for tar in (tmp_path / "killed").glob("*/*.tar"):
            with tarfile.open(tar) as archive:
                assert len(archive.getmembers()) % 2 == 0
    assert kills >= 2
    assert _launch(tmp_path / "in", tmp_path / "killed").wait(timeout=300) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert verify(tmp_path / "killed", progress=False) == []


@pytest.mark.slow
def test_a_clip_that_kills_its_worker_is_given_up_alone(tmp_path):
    from vtok.data.workers import WorkerError, Workers

    with Workers(2, progress=False) as pool:
        tasks = [(list("dxe"),), (list("abc"),), (list("fg"),)]
        ((first, reason, last), *others) = pool.run(_deadly, tasks, title="", total=8)
        assert (
            others == [["a", "b", "c"], ["f", "g"]]
            and (first, last) == ("d", "e")
            and reason == "the process that decoded it was killed by SIGSEGV, 2 times"
        )
        with pytest.raises(WorkerError, match="ValueError: no"):
            pool.run(_failing, [(1,)], title="", total=1)


def _deadly(places, lost, notify):
    out = []
    for place in places:
        notify(place)
        if place == "x" and place not in lost:
            os.kill(os.getpid(), signal.SIGSEGV)
        out.append(lost.get(place, place))
    return out


def _failing(value, lost, notify):
    raise ValueError("no")


def test_webdataset_reads_the_same_samples(tmp_path):
    """Shards are plain WebDataset: its own reader finds the very keys, members and bytes that our loader does."""
    webdataset = pytest.importorskip("webdataset")
    for number, name in enumerate(("a.b.mp4", "sub/über x.mp4", "c.mkv")):
        video(tmp_path / "in" / name, frames=moving(seed=number))
    video_with_audio(tmp_path / "in" / "tone.mp4")
    packed([tmp_path / "in"], tmp_path / "out", audio=True, shard_samples=3, split="train")
    tars = sorted(map(str, (tmp_path / "out/train").glob("*.tar")))
    assert len(tars) == 2
    theirs = {s.pop("__key__"): s for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}
    reader = ShardReader(open_sources(str(tmp_path / "out/train"))[0])
    ours = [sample for shard in range(2) for sample in reader.samples(shard)]
    assert [sample.key for sample in ours] == list(theirs) and len(ours) == 4
    for sample in ours:
        found = {name: data for name, data in theirs[sample.key].items() if not name.startswith("__")}
        assert found == {name: reader.read(sample, name) for name in sample.members}
    assert sum("wav" in sample for sample in theirs.values()) == 1


@pytest.mark.slow
def test_columns_that_are_not_read_are_named_once_and_libraries_keep_quiet(tmp_path):
    video(tmp_path / "a.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"file": "a.mp4", "licence": "x", "hash": n} for n in (1, 2)])
    command = "import logging, sys\nfrom vtok.cli import main\nstatus = main(sys.argv[1:])\n"
    command += "logging.getLogger('httpx').info('HTTP request')\nsys.exit(status)"
    arguments = ["shards", str(manifest), "--out", str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("manifest columns not read: hash, licence") == 1
    assert "HTTP" not in done.stderr
