"""A video file to a `.vtok` file and back, any length in constant memory.

    video file -> frames -> (size, fps) -> step/flush -> truncate to the block's budget -> .vtok
    .vtok -> ids -> lookup -> decode_step/decode_flush -> uint8 frames -> video file (FFV1 unless asked otherwise)

How many tokens each time block (a group) keeps is `vtok.coding.rate_control`'s business: K tokens, a rate, a
wanted quality, or a budget of tokens or bytes for the whole video. Frames keep the video's own size and rate unless
told otherwise, and the decoded video has exactly the frames that went in.

Letters: T frames, H height, W width, K tokens, G groups, Q ids per token.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vtok.coding.bitstream import CODINGS, Chunk, DamagedFile, Footer, Header, Reader, Writer, file_key, read_footer
from vtok.coding.rate_control import Asked, as_fraction, cut, shared_policy, simple_policy
from vtok.coding.trial import Step, StepsOf
from vtok.data.decode import VideoReader, probe
from vtok.data.encode import write_video
from vtok.data.view import View, fit
from vtok.layers.perceptual import LPIPS, load_lpips
from vtok.loading import identify, in_tiles, load_any
from vtok.types import Clip, ShapeError, Streaming, Tokens, to_uint8

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
    asked = Asked(budget=budget, tokens_per_second=tokens_per_second)
    policy = simple_policy(model, asked, fps=Fraction(fps))
    assert policy is not None
    for tokens, lengths in cut(policy, stream_steps(model, frames), hold=lambda tokens: tokens):
        yield tokens.truncate(lengths)


def stream_steps(model: Any, frames: Iterable[np.ndarray]) -> Iterator[Step]:
    """Every token of a stream of frames uint8 [H, W, 3], step by step, each with the frames it stands for.

    A step is a chunk of the model: all are alike but the first and the last two, so they share records of a file
    (`vtok.coding.trial.steps_to_come`).
    """
    _check_model(model)
    piece = int(getattr(model.config, "num_frames", 16))
    extra = int(getattr(model, "extra_frames", 0))
    device = next(iter(model.parameters())).device
    held: list[np.ndarray] = []
    given: list[np.ndarray] = []  # to the model, not yet coded
    state: Any = None
    begins = True

    @torch.inference_mode()
    def advance() -> Tokens | None:
        nonlocal state, held
        if state is None:
            state = model.init_state(1, held[0].shape[:2])
        video = torch.from_numpy(np.stack(held)).permute(3, 0, 1, 2)[None].to(device)  # [1, 3, T, H, W]
        given.extend(held)
        held = []
        tokens, state = model.step(Clip(keys=["stream"], video=video), state)
        return tokens

    def step(tokens: Tokens) -> Step:
        nonlocal begins
        count = len(given) if tokens.frames is None else int(tokens.frames[0])
        here = np.stack(given[:count])
        del given[:count]
        first, begins = begins, False
        return Step(tokens, here, begins=first)

    size = None
    for frame in frames:
        size = size or frame.shape
        if frame.shape != size:
            raise ValueError(f"the frame size changes from {size[:2]} to {frame.shape[:2]}; give a size to resize to")
        held.append(frame)
        if len(held) == piece - (0 if state is None else extra) and (tokens := advance()) is not None:
            yield step(tokens)
    if held and (tokens := advance()) is not None:
        yield step(tokens)
    if state is not None:
        with torch.inference_mode():  # never over a yield: whoever leaves the loop early would stay in it
            tokens = model.flush(state)
        if tokens is not None:
            yield step(tokens)


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


def _check_grid(model: Any, size: tuple[int, int], asked: Asked) -> None:
    """Raises: ValueError for a budget that tokens on a grid cannot meet."""
    if not hasattr(model, "levels") or not asked.name:
        return
    given = f"{asked.name}={float(getattr(asked, asked.name)):g}"
    coarse = model.token_counts(1, size)[:-1]
    if asked.budget not in coarse:
        choice = f"ask for budget={coarse[0]} (the coarse level alone) or leave it out" if coarse else "leave it out"
        raise ValueError(f"{given}: the tokens of this model are a grid over frames of {size[0]}x{size[1]}; {choice}")


def _check_model(model: Any) -> None:
    if not isinstance(model, Streaming):
        raise ValueError(f"{type(model).__module__} cannot stream (step, flush, decode_step): .vtok files need that")
    if not getattr(model, "codebook_sizes", ()):
        raise ValueError("this model makes continuous tokens (no codebook): they have no .vtok form")


@dataclass(frozen=True)
class Encoded:
    """What `encode_file` wrote. size: (height, width). bytes: of the file. note: what the choice of lengths says."""

    frames: int
    groups: int
    tokens: int
    bytes: int
    size: tuple[int, int]
    fps: float
    note: str = ""

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
    asked: Asked | None = None,
    lpips: LPIPS | None = None,
    coding: str = "packed",
    size: tuple[int, int] | None = None,
    fps: Fraction | float | None = None,
    progress: bool = False,
) -> Encoded:
    """Encode a video file. The result appears under `out` only once it is complete.

    Args:
        budget: tokens kept of each time block. tokens_per_second: the same as a rate, never passed. None keeps all.
        asked: other ways to choose lengths (`vtok.coding.rate_control.Asked`), instead of these two.
        lpips: the network with its weights, for `asked.lpips`.
        coding: "packed" (log2 of the codebook size a token), "static" (entropy-coded with the model's static model) or
            "ar" (with its prior).
        size: (height, width): the centre is cropped to this aspect and resized (antialiased), as in validation; None
            keeps the video's own.
        fps: pick frames at this rate; None keeps every frame, at the video's mean rate.
        progress: show a bar on stderr.
    Raises: ValueError for a bad setting, a budget that the video cannot meet, or a model that cannot;
        vtok.data.decode.DecodeError for a video that does not decode without damage.
    """
    _check_model(model)
    out = Path(out)
    who = identify(model)
    entropy = who.coder(coding)
    if coding == "static" and entropy is None:
        raise ValueError(
            "coding='static' needs the static entropy model of an export (entropy.safetensors); export the run "
            "again with its training shards at hand, or use coding='packed'"
        )
    if coding == "ar" and entropy is None:
        raise ValueError(
            "coding='ar' needs a prior in the export (prior.safetensors): train one with `vtok tokenize` and "
            "`vtok prior`, or use coding='packed'"
        )
    info = probe(video_path)
    own = as_fraction(info.fps) if info.fps > 0 else Fraction(1)  # a still image: one frame
    rate = own if fps is None else as_fraction(fps)
    if rate <= 0:
        raise ValueError(f"fps={fps} must be above 0")
    asked = asked or Asked(budget=budget, tokens_per_second=tokens_per_second)
    shape = size or (info.height, info.width)
    policy = simple_policy(model, asked, fps=rate, size=shape, lpips=lpips)  # a bad setting fails before any work
    _check_grid(model, shape, asked)
    _warn_if_far(model, shape)
    header = Header(
        model_id=who.model_id,
        key=file_key(who.weights_sha256, entropy),
        size=shape,
        fps=rate,
        codebook_sizes=tuple(model.codebook_sizes),
        coding=coding,
        budget=asked.budget or 0,
        tokens_per_second=Fraction(0) if asked.tokens_per_second is None else as_fraction(asked.tokens_per_second),
        asked=asked.name if asked.own_lengths else "",
        asked_value=as_fraction(getattr(asked, asked.name)) if asked.own_lengths else Fraction(0),
        look_ahead=asked.look_ahead if asked.name in ("tokens", "bytes") else 0,
    )
    # containers round to milliseconds: a duration that is a hair above whole frames has no frame more
    total = (fps is None and info.frames) or max(1, math.ceil((Fraction(info.duration_s) - Fraction(1, 1000)) * rate))
    count = 0

    def counted(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal count
        for frame in frames:
            count += 1
            yield frame

    def source() -> Iterator[np.ndarray]:
        return read_frames(video_path, size=size, fps=None if fps is None else rate)

    with _aside(out) as part, _bar(f"encode {Path(video_path).name}", total, progress) as source_bar:
        with open(part, "wb") as file:
            writer = Writer(file, header, entropy=entropy)
            if policy is None:
                policy = shared_policy(model, asked, writer=writer, entropy=entropy, frames=total, again=source)
            steps = stream_steps(model, counted(source_bar(source())))
            for chunk, lengths in cut(policy, steps, hold=Chunk.from_tokens):
                writer.write(chunk.truncate(lengths[0].tolist()))
            footer = writer.close(frames=count)
            size_bytes = file.tell()
            if asked.bytes is not None and size_bytes > asked.bytes:
                raise ValueError(
                    f"bytes={asked.bytes} is too small: the file takes {size_bytes} bytes. {video_path} has {count} "
                    f"frames, not {total} as it states; leave out the look-ahead, which counts on them, or ask for more"
                )
            file.flush()
            os.fsync(file.fileno())
    return Encoded(footer.frames, footer.groups, footer.tokens, size_bytes, shape, float(rate), policy.report())


def decode_frames(model: Any, vtok_path: str | Path) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of a .vtok file, in constant memory.

    Each record is checked before its frames come out, the whole file once the last one is out: keep nothing of a file
    whose iteration did not end.
    Raises: vtok.coding.bitstream.VtokFileError: damaged, truncated, foreign or newer files, or another model's.
    """
    _check_model(model)
    name, who = str(vtok_path), identify(model)
    with open(vtok_path, "rb") as file:
        first = Reader(file, name=name)
        first.expect(who.model_id, who.weights_sha256, entropy=who.coder(first.header.coding))
        if first.header.codebook_sizes != tuple(model.codebook_sizes):
            raise DamagedFile(
                f"{name} is damaged: it states codebooks {first.header.codebook_sizes}, but {who.model_id}, which it "
                f"names, has {tuple(model.codebook_sizes)}"
            )
        total = read_footer(file, name=name).frames
        file.seek(0)
        reader = Reader(file, name=name)
        check = StepsOf(model, reader.header.size)
        reader.expect(who.model_id, who.weights_sha256, entropy=who.coder(reader.header.coding), check_step=check.check)
        tokens = (_as_tokens(chunk, model) for chunk in reader)
        frames, count = stream_frames(model, tokens, size=reader.header.size), 0
        while True:
            try:
                frame = next(frames, None)
            except ShapeError as error:  # checksums and counts are right, and yet no model of this shape made it
                raise DamagedFile(f"{name} is damaged: {error}") from error
            if frame is None:
                break
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


def read_frames(
    path: str | Path, *, size: tuple[int, int] | None = None, fps: Fraction | None = None
) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of a video as `encode_file` takes them: every frame, or with `fps` the frames on show
    at 0, 1/fps, 2/fps ... seconds, those the loader picks for a window."""
    with VideoReader(path) as reader:
        for frame in reader.at_rate(fps) if fps is not None else (frame for frame, _ in reader.frames()):
            yield frame if size is None else resize_crop(frame, size)


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
    """`vtok encode MODEL VIDEO --out FILE.vtok [--budget K | --tokens-per-second R | --psnr D | --bytes N | ...]`."""
    parser = argparse.ArgumentParser(prog="vtok encode", description=(main_encode.__doc__ or "").strip("`."))
    parser.add_argument("model", help="export folder, Hub repository or run directory")
    parser.add_argument("video")
    parser.add_argument("--out", required=True, help="the .vtok file to write")
    parser.add_argument("--revision", help="of a Hub repository")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--budget", type=int, help="tokens kept of each time block (default: all)")
    limit.add_argument("--tokens-per-second", type=Fraction, help="the same as a rate, never passed")
    limit.add_argument(
        "--psnr", type=float, dest="psnr_db", metavar="DB", help="least tokens of each block that reach it"
    )
    limit.add_argument("--lpips", type=float, metavar="D", help="the same for LPIPS; needs --lpips-weights")
    limit.add_argument("--bytes", type=int, metavar="N", help="of the file, never passed, shared out for least error")
    limit.add_argument("--tokens", type=int, metavar="N", help="of the whole video, shared out for least error")
    limit.add_argument(
        "--predict-psnr",
        type=float,
        dest="predicted_psnr_db",
        metavar="DB",
        help="by the model's halting head, in one pass",
    )
    parser.add_argument(
        "--look-ahead", type=int, metavar="N", help="--bytes, --tokens: decide while streaming, N blocks ahead"
    )
    parser.add_argument(
        "--predicted", action="store_true", help="--bytes, --tokens: by the model's scorer, not by decoding"
    )
    parser.add_argument("--lpips-weights", help="file of LPIPS weights")
    parser.add_argument("--lpips-sha256", default="", help="their hash")
    parser.add_argument("--coding", choices=CODINGS, default="packed", help="static: entropy-coded (default: packed)")
    parser.add_argument("--size", help="HxW, or `model` for the size it was trained at (default: the video's own)")
    parser.add_argument("--fps", type=Fraction, help="frames per second to keep (default: every frame)")
    parser.add_argument("--device", default="cpu")
    _add_tile(parser)
    args = parser.parse_args(argv)
    asked = Asked(**{each.name: getattr(args, each.name) for each in fields(Asked)})
    lpips = load_lpips(args.lpips_weights, args.lpips_sha256).to(args.device) if args.lpips_weights else None
    model = _loaded(args)
    done = encode_file(
        model,
        args.video,
        args.out,
        asked=asked,
        lpips=lpips,
        coding=args.coding,
        size=parse_size(args.size, model),
        fps=args.fps,
        progress=True,
    )
    print(
        f"{args.out}: {done.frames} frames ({done.duration_s:.2f} s) of {done.size[1]}x{done.size[0]} in {done.tokens} "
        f"tokens, {done.bytes} bytes: {done.tokens_per_second:.1f} tokens/s, {done.bits_per_second / 1000:.2f} kbit/s, "
        f"{done.bits_per_pixel:.5f} bits/pixel" + (f"; {done.note}" if done.note else "")
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
    _add_tile(parser)
    args = parser.parse_args(argv)
    model = _loaded(args)
    footer = decode_file(model, args.file, args.out, codec=args.codec, crf=args.crf, progress=True)
    print(f"{args.out}: {footer.frames} frames from {footer.tokens} tokens")


def _add_tile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile",
        metavar="N[,SHARED]",
        help="code larger frames by tiles of N latents a side, of which neighbours share some: memory of one tile",
    )


def _loaded(args: argparse.Namespace) -> Any:
    model = load_any(args.model, revision=args.revision).to(args.device)
    if args.tile is None:
        return model
    found = re.fullmatch(r"(\d+)(?:,(\d+))?", args.tile)
    if not found:
        raise ValueError(
            f"--tile {args.tile}: write latents a side, and those that neighbours share, such as 32 or 32,4"
        )
    return in_tiles(model, int(found[1]), overlap=int(found[2]) if found[2] else None)


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
