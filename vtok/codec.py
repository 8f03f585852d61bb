"""A video file to a `.vtok` file and back, any length in constant memory.

    video file -> frames -> (size, fps) -> step/flush -> truncate to the block's budget -> .vtok
    .vtok -> ids -> lookup -> decode_step/decode_flush -> uint8 frames -> video file (FFV1 unless asked otherwise)

The budget is per time block (a group): `budget=K` keeps the K most important tokens of every block, and
`tokens_per_second=R` lets the tokens written by the end of each block be at most R x its end time, at least one a
block. Frames keep the video's own size and rate unless told otherwise, and the decoded video has exactly the frames
that went in.

Letters: T frames, H height, W width, K tokens, G groups, Q ids per token.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtok.bitstream import CODINGS, Chunk, DamagedFile, Footer, Header, Reader, Writer, read_footer
from vtok.data.decode import VideoReader, probe
from vtok.data.encode import write_video
from vtok.data.view import View, fit
from vtok.loading import identify, load_any
from vtok.rate_control import Lengths, as_fraction
from vtok.types import Clip, Streaming, Tokens, to_uint8

log = logging.getLogger(__name__)


def stream_tokens(
    model: Any,
    frames: Iterable[np.ndarray],
    *,
    budget: int | None = None,
    tokens_per_second: Fraction | float | None = None,
    fps: Fraction | float = 25,
) -> Iterator[Tokens]:
    """The tokens of a stream of frames uint8 [H, W, 3], a few groups at a time; each within its groups' budgets.

    Raises: ValueError for a model without `Streaming`, a bad budget, or frames that change their size.
    """
    _check_model(model)
    piece = int(getattr(model.config, "num_frames", 16))
    shares = Lengths(model, budget=budget, tokens_per_second=tokens_per_second, fps=Fraction(fps))
    device = next(iter(model.parameters())).device
    held: list[np.ndarray] = []
    state: Any = None

    def advance() -> Tokens | None:
        nonlocal state, held
        if state is None:
            state = model.init_state(1, held[0].shape[:2])
        video = torch.from_numpy(np.stack(held)).permute(3, 0, 1, 2)[None].to(device)  # [1, 3, T, H, W]
        held = []
        tokens, state = model.step(Clip(keys=["stream"], video=video), state)
        return tokens

    with torch.inference_mode():
        size = None
        for frame in frames:
            size = size or frame.shape
            if frame.shape != size:
                raise ValueError(
                    f"the frame size changes from {size[:2]} to {frame.shape[:2]}; give a size to resize to"
                )
            held.append(frame)
            if len(held) == piece and (tokens := advance()) is not None:
                yield shares.cut(tokens)
        if held and (tokens := advance()) is not None:
            yield shares.cut(tokens)
        if state is not None and (tokens := model.flush(state)) is not None:
            yield shares.cut(tokens)


def stream_frames(model: Any, tokens: Iterable[Tokens], *, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of a stream of tokens, as `stream_tokens` or a .vtok file gives them."""
    _check_model(model)
    with torch.inference_mode():
        state = model.init_decode_state(1, size)
        for each in tokens:
            video, state = model.decode_step(each, state)
            if video is not None:
                yield from to_uint8(video)[0].permute(1, 2, 3, 0).cpu().numpy()
        video = model.decode_flush(state)
        if video is not None:
            yield from to_uint8(video)[0].permute(1, 2, 3, 0).cpu().numpy()


def _check_grid(model: Any, size: tuple[int, int], *, budget: int | None, tokens_per_second: Any) -> None:
    """Raises: ValueError for a budget that tokens on a grid cannot meet."""
    if not hasattr(model, "levels") or (budget is None and tokens_per_second is None):
        return
    given = f"budget={budget}" if tokens_per_second is None else f"tokens_per_second={float(tokens_per_second):g}"
    coarse = model.token_counts(1, size)[:-1]
    if budget not in coarse:
        choice = f"ask for budget={coarse[0]} (the coarse level alone) or leave it out" if coarse else "leave it out"
        raise ValueError(f"{given}: the tokens of this model are a grid over frames of {size[0]}x{size[1]}; {choice}")


def _check_model(model: Any) -> None:
    if not isinstance(model, Streaming):
        raise ValueError(f"{type(model).__module__} cannot stream (step, flush, decode_step): .vtok files need that")
    if not getattr(model, "codebook_sizes", ()):
        raise ValueError("this model makes continuous tokens (no codebook): they have no .vtok form")


@dataclass(frozen=True)
class Encoded:
    """What `encode_file` wrote. size: (height, width). bytes: of the file."""

    frames: int
    groups: int
    tokens: int
    bytes: int
    size: tuple[int, int]
    fps: float

    @property
    def duration_s(self) -> float:
        return self.frames / self.fps

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.duration_s

    @property
    def bits_per_second(self) -> float:
        return self.bytes * 8 / self.duration_s

    @property
    def bits_per_pixel(self) -> float:
        return self.bytes * 8 / (self.frames * self.size[0] * self.size[1])


def encode_file(
    model: Any,
    video_path: str | Path,
    out: str | Path,
    *,
    budget: int | None = None,
    tokens_per_second: Fraction | float | None = None,
    coding: str = "packed",
    size: tuple[int, int] | None = None,
    fps: Fraction | float | None = None,
    progress: bool = False,
) -> Encoded:
    """Encode a video file. The result appears under `out` only once it is complete.

    Args:
        budget: tokens kept of each time block. tokens_per_second: the same as a rate, never passed. None keeps all.
        coding: "packed" (log2 of the codebook size a token) or "static" (entropy-coded with the model's static model).
        size: (height, width): the centre is cropped to this aspect and resized (antialiased), as in validation; None
            keeps the video's own.
        fps: pick frames at this rate; None keeps every frame, at the video's mean rate.
        progress: show a bar on stderr.
    Raises: ValueError for a bad setting or a model that cannot; vtok.data.decode.DecodeError for a video that does not
        decode without damage.
    """
    _check_model(model)
    out = Path(out)
    who = identify(model)
    entropy = None
    if coding == "static":
        entropy = who.entropy
        if entropy is None:
            raise ValueError(
                "coding='static' needs the static entropy model of an export (entropy.safetensors); export the run "
                "again with its training shards at hand, or use coding='packed'"
            )
    info = probe(video_path)
    own = as_fraction(info.fps) if info.fps > 0 else Fraction(1)  # a still image: one frame
    rate = own if fps is None else as_fraction(fps)
    if rate <= 0:
        raise ValueError(f"fps={fps} must be above 0")
    Lengths(model, budget=budget, tokens_per_second=tokens_per_second, fps=rate)  # a bad setting fails before any work
    shape = size or (info.height, info.width)
    _check_grid(model, shape, budget=budget, tokens_per_second=tokens_per_second)
    _warn_if_far(model, shape)
    header = Header(
        model_id=who.model_id,
        weights_sha256=who.weights_sha256,
        size=shape,
        fps=rate,
        codebook_sizes=tuple(model.codebook_sizes),
        coding=coding,
        entropy_sha256=entropy.sha256 if entropy is not None else b"",
        budget=budget or 0,
        tokens_per_second=as_fraction(tokens_per_second) if tokens_per_second is not None else Fraction(0),
    )
    total = int(info.duration_s * rate) if fps is not None else info.frames
    count = 0

    def counted(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal count
        for frame in frames:
            count += 1
            yield frame

    source = _resized(_source(video_path, None if fps is None else rate), size)
    with _aside(out) as part, _bar(f"encode {Path(video_path).name}", total, progress) as source_bar:
        with open(part, "wb") as file:
            writer = Writer(file, header, entropy=entropy)
            frames = counted(source_bar(source))
            for tokens in stream_tokens(model, frames, budget=budget, tokens_per_second=tokens_per_second, fps=rate):
                writer.write(tokens)
            footer = writer.close(frames=count)
            size_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
    return Encoded(footer.frames, footer.groups, footer.tokens, size_bytes, shape, float(rate))


def decode_frames(model: Any, vtok_path: str | Path) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of a .vtok file, in constant memory.

    Each record is checked before its frames come out, the whole file once the last one is out: keep nothing of a file
    whose iteration did not end.
    Raises: vtok.bitstream.VtokFileError: damaged, truncated, foreign or newer files, or another model's.
    """
    _check_model(model)
    name, who = str(vtok_path), identify(model)
    with open(vtok_path, "rb") as file:
        Reader(file, name=name).expect(who.model_id, who.weights_sha256, entropy=who.entropy)
        total = read_footer(file, name=name).frames
        file.seek(0)
        reader = Reader(file, name=name)
        reader.expect(who.model_id, who.weights_sha256, entropy=who.entropy)
        tokens = (_as_tokens(chunk, model) for chunk in reader)
        count = 0
        for frame in stream_frames(model, tokens, size=reader.header.size):
            count += 1
            if count <= total:
                yield frame
        if count < total:
            raise DamagedFile(f"{name} is damaged: it states {total} frames, but its tokens make {count}")


def decode_file(
    model: Any,
    vtok_path: str | Path,
    out: str | Path,
    *,
    codec: str = "ffv1",
    crf: float | None = None,
    options: dict[str, str] | None = None,
    progress: bool = False,
) -> Footer:
    """Decode a .vtok file to a video file, lossless (FFV1) by default. It appears under `out` only once complete.

    Args:
        codec, crf, options: as `vtok.data.encode.write_video`; the container follows `out`'s suffix (.mkv for ffv1).
    Raises: as `decode_frames`; ValueError where the codec does not go with the container.
    """
    out = Path(out)
    with open(vtok_path, "rb") as file:
        header = Reader(file, name=str(vtok_path)).header
        footer = read_footer(file, name=str(vtok_path))
    with _aside(out) as part, _bar(f"decode {Path(vtok_path).name}", footer.frames, progress) as bar:
        written = write_video(
            part, bar(decode_frames(model, vtok_path)), fps=header.fps, codec=codec, crf=crf, options=options
        )
    assert written == footer.frames, (written, footer)
    return footer


def _as_tokens(chunk: Chunk, model: Any) -> Tokens:
    device = next(iter(model.parameters())).device
    tokens = chunk.to_tokens(model.lookup, tuple(model.codebook_sizes), device=device)
    if not hasattr(model, "tokens_from_indices") or tokens.frames is None:
        return tokens
    assert tokens.indices is not None
    return model.tokens_from_indices(  # a family may know more of its tokens than their ids: places, times
        tokens.indices, lengths=tokens.lengths, group=tokens.group, rank=tokens.rank, frames=tokens.frames
    )


def _warn_if_far(model: Any, size: tuple[int, int]) -> None:
    trained = getattr(model.config, "size", None)
    if trained and size[0] * size[1] > 4 * trained[0] * trained[1]:
        log.warning(
            "frames of %dx%d are more than 4 times the %dx%d this model was trained at: the same tokens must say more, "
            "and quality falls; --size %dx%d encodes at its own",
            *size, *trained, *trained,
        )  # fmt: skip


def resize_crop(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] cropped around its centre to the aspect of `size` and resized to it, as validation clips are."""
    if frame.shape[:2] == size:
        return frame
    pixels = torch.from_numpy(np.ascontiguousarray(frame))[None]
    return fit(pixels, View(num_frames=1, size=size, crop="center"), None)[:, 0].permute(1, 2, 0).numpy()


def _source(path: str | Path, fps: Fraction | None) -> Iterator[np.ndarray]:
    """Every frame, or the frames on show at 0, 1/fps, 2/fps ... seconds: those the loader picks for a window."""
    with VideoReader(path) as reader:
        if fps is None:
            for frame, _ in reader.frames():
                yield frame
        else:
            yield from reader.at_rate(fps)


def _resized(frames: Iterable[np.ndarray], size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    if size is None:
        yield from frames
        return
    for frame in frames:
        yield resize_crop(frame, size)


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A path beside `out` to write to, renamed to it at the end, removed on any error."""
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    part = out.with_name(f".{out.stem}.{os.getpid()}.part{out.suffix}")
    try:
        yield part
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(title: str, total: int | None, shown: bool) -> Iterator[Any]:
    """A wrapper of an iterable that counts its items on a progress bar."""
    if not shown:
        yield lambda items: items
        return
    from rich.console import Console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)

        def count(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                yield item
                bar.advance(task)

        yield count


def main_encode(argv: list[str] | None = None) -> None:
    """`vtok encode MODEL VIDEO --out FILE.vtok [--budget K | --tokens-per-second R]`."""
    parser = argparse.ArgumentParser(prog="vtok encode", description=(main_encode.__doc__ or "").strip("`."))
    parser.add_argument("model", help="export folder, Hub repository or run directory")
    parser.add_argument("video")
    parser.add_argument("--out", required=True, help="the .vtok file to write")
    parser.add_argument("--revision", help="of a Hub repository")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--budget", type=int, help="tokens kept of each time block (default: all)")
    limit.add_argument("--tokens-per-second", type=Fraction, help="the same as a rate, never passed")
    parser.add_argument("--coding", choices=CODINGS, default="packed", help="static: entropy-coded (default: packed)")
    parser.add_argument("--size", help="HxW, or `model` for the size it was trained at (default: the video's own)")
    parser.add_argument("--fps", type=Fraction, help="frames per second to keep (default: every frame)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = load_any(args.model, revision=args.revision).to(args.device)
    done = encode_file(
        model,
        args.video,
        args.out,
        budget=args.budget,
        tokens_per_second=args.tokens_per_second,
        coding=args.coding,
        size=parse_size(args.size, model),
        fps=args.fps,
        progress=True,
    )
    print(
        f"{args.out}: {done.frames} frames ({done.duration_s:.2f} s) of {done.size[1]}x{done.size[0]} in {done.tokens} "
        f"tokens, {done.bytes} bytes: {done.tokens_per_second:.1f} tokens/s, {done.bits_per_second / 1000:.2f} kbit/s, "
        f"{done.bits_per_pixel:.5f} bits/pixel"
    )


def main_decode(argv: list[str] | None = None) -> None:
    """`vtok decode MODEL FILE.vtok --out VIDEO [--codec libx264 --crf 18]`."""
    parser = argparse.ArgumentParser(prog="vtok decode", description=(main_decode.__doc__ or "").strip("`."))
    parser.add_argument("model", help="export folder, Hub repository or run directory")
    parser.add_argument("file")
    parser.add_argument("--out", required=True, help="the video to write; .mkv holds the lossless default")
    parser.add_argument("--revision", help="of a Hub repository")
    parser.add_argument("--codec", default="ffv1", help="ffv1 (lossless, default), libx264, libx265, libsvtav1 ...")
    parser.add_argument("--crf", type=float, help="quality of a lossy codec")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model = load_any(args.model, revision=args.revision).to(args.device)
    footer = decode_file(model, args.file, args.out, codec=args.codec, crf=args.crf, progress=True)
    print(f"{args.out}: {footer.frames} frames from {footer.tokens} tokens")


def parse_size(text: str | None, model: Any) -> tuple[int, int] | None:
    """`HxW` (height first), `model`, or None. Raises: ValueError naming the value."""
    if text is None:
        return None
    if text == "model":
        return int(model.config.size[0]), int(model.config.size[1])
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--size {text!r} is not HxW in pixels (height first), nor `model`; e.g. --size 128x128")
    return int(height), int(width)
