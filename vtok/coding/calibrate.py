"""`vtok calibrate`: what a halting head predicts, made to hold on videos that nothing was trained on; an export of it.

    calibration shards -> whole videos -> time blocks -> PSNR of many lengths --+--> thresholds (`vtok.layers.halting`)
                                          their tokens -> the head's logits ----+
    held-out shards (--against) -> predicted lengths beside those that a search by decoding finds

Blocks are those of `vtok encode`: whole videos from their first frame, at the training's frame rate and size, the last
block as short as it is. Where a block is decoded after earlier ones, these are whole while calibrating.

Letters: K tokens of a block, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.budget import search_length, spread_lengths
from vtok.coding.codec import resize_crop, stream_steps
from vtok.coding.trial import Trial, groups_of, mean_squared_error, most_tokens, mse_of, stand_alone
from vtok.coding.wanted_quality import Predicted
from vtok.config import DataConfig
from vtok.data.decode import VideoReader
from vtok.data.order import one_pass
from vtok.data.pack import write_atomically
from vtok.data.sample import read_facts
from vtok.data.sources import BrokenSample, ShardReader, every_shard
from vtok.data.strict import DecodeError
from vtok.data.view import view_of
from vtok.export import publish
from vtok.loading import add_which, load_run, step_of

log = logging.getLogger(__name__)
PER_OCTAVE = 4  # lengths at which a calibration block is measured
FACTS = "halting.json"  # of the export: what was calibrated, and how it held


@dataclass(frozen=True)
class Video:
    """source: the original video it was cut from. frames: uint8 [H, W, 3], one by one."""

    source: str
    frames: Iterator[np.ndarray]


def whole_videos(shards: str | Sequence[str], data: DataConfig, *, limit: int | None = None) -> Iterator[Video]:
    """The videos of shards as `vtok encode --fps ... --size model` reads them, broken ones left out.

    Raises: ValueError for shards that are not there, or a model of dense maps.
    """
    if data.map:
        raise ValueError(f"data.map={data.map!r}: lengths are calibrated on RGB video, this model reads dense maps")
    found = every_shard(shards, cache_dir=data.cache_dir, setting="--shards")
    reader = ShardReader(found, cache_dir=data.cache_dir, media=view_of(data).media)
    samples = (s for s in one_pass(reader, seed=data.seed, epoch=0, stream=0, streams=1, shuffle_buffer=256))
    size, count = (data.size[0], data.size[1]), 0
    for sample in samples:
        if sample.problem:
            continue
        if count == limit:
            return
        try:
            source = str(read_facts(reader, sample).get("source") or sample.key)
            suffix = next(suffix for suffix in view_of(data).media if suffix in sample.members)
            with VideoReader(reader.read(sample, suffix)) as video:
                plain = video.is_image or data.fps is None
                shown = (frame for frame, _ in video.frames()) if plain else video.at_rate(data.fps or 0)
                frames = [resize_crop(frame, size) for frame in shown]
        except (DecodeError, BrokenSample, OSError) as error:
            log.info("left out of the calibration: %s: %s", sample.key, error)
            continue
        count += 1
        yield Video(source, iter(frames))


@dataclass(frozen=True)
class Measured:
    """Blocks of videos: tokens [M, K, D], PSNR [M, K] of 1 ... K tokens in dB, and which video each is of [M]."""

    codes: Tensor
    psnr: Tensor
    video: Tensor


def measure(model: Any, videos: Iterable[Video]) -> Measured:
    """What every length of every block gives. Raises: ValueError where there is no video."""
    codes, curves, which, names = [], [], [], {}
    for video in videos:
        trial = None
        for step in stream_steps(model, video.frames):
            trial = trial or Trial(model, step.frames.shape[1:3], mean_squared_error)
            for group in groups_of(model, step):
                most = most_tokens(group.tokens)
                menu = spread_lengths(most, per_octave=PER_OCTAVE)
                error = between(torch.tensor(trial.measure(group, menu)), menu, most)
                trial.accept(group, most)
                codes.append(group.tokens.embeddings[0].cpu())
                curves.append((10 * (255**2 / error).log10()).float())
                which.append(names.setdefault(video.source, len(names)))
    if not codes:
        raise ValueError("the calibration shards hold no usable video")
    return Measured(torch.stack(codes), torch.stack(curves), torch.tensor(which))


def between(error: Tensor, lengths: list[int], most: int) -> Tensor:
    """Error [S] measured at `lengths` (ascending, the first 1 and the last `most`) as error [most] of every length: of
    one between two measured, the larger of theirs, so that what is calibrated on it holds when it is decoded."""
    at, known = torch.arange(1, most + 1), torch.tensor(lengths)
    right = torch.searchsorted(known, at)
    left = torch.where(known[right] == at, right, right - 1)
    return torch.maximum(error[left], error[right])


@dataclass(frozen=True)
class Row:
    """Predicted lengths beside searched ones, over the blocks that can reach the wanted PSNR.

    searched, predicted: mean tokens. octaves, octaves_90: median and 90 % quantile of |log2(predicted / searched)|;
    tokens, tokens_90: of |predicted - searched|. missed: share of blocks below the wanted PSNR, mean over videos.
    short_db: mean dB that those blocks lack.
    """

    wanted_db: float
    videos: int
    blocks: int
    searched: float
    predicted: float
    octaves: float
    octaves_90: float
    tokens: float
    tokens_90: float
    missed: float
    short_db: float


def against_search(
    model: Any, videos: Sequence[tuple[str, Sequence[np.ndarray]]], wanted: Sequence[float]
) -> list[Row]:
    """The one-pass prediction's error against the search by decoding, a row for each wanted PSNR that is reached.

    videos: (source, frames uint8 [H, W, 3]).
    """
    alone = stand_alone(model)
    known: dict[tuple[int, int, int], dict[int, float]] = {}  # of blocks that do not depend on earlier ones
    rows = []
    for psnr in wanted:
        found: list[tuple[int, int, int, float]] = []  # video, searched, predicted, dB above what is wanted
        names: dict[str, int] = {}
        for v, (source, frames) in enumerate(videos):
            trial = Trial(model, frames[0].shape[:2], mean_squared_error)
            policy = Predicted(model, psnr_db=psnr)
            for s, step in enumerate(stream_steps(model, frames)):
                lengths = next(policy.lengths(iter([step])))
                for g, (group, length) in enumerate(zip(groups_of(model, step), lengths)):
                    seen = known.setdefault((v, s, g), {}) if alone else {}

                    def tried(ks: list[int], trial: Trial = trial, group: Any = group, seen: Any = seen) -> list[float]:
                        if new := [k for k in ks if k not in seen]:
                            seen.update(zip(new, trial.measure(group, new)))
                        return [seen[k] for k in ks]

                    search = search_length(tried, most=most_tokens(group.tokens), target=mse_of(psnr))
                    if search.met:
                        above = 10 * np.log10(255**2 / max(tried([length])[0], 1e-9)) - psnr
                        found.append((names.setdefault(source, len(names)), search.length, length, above))
                    trial.accept(group, length)
        if found:
            rows.append(_row(psnr, np.array(found, float)))
    return rows


def _row(psnr: float, found: np.ndarray) -> Row:
    video, searched, predicted, above = found.T
    octaves, tokens = np.abs(np.log2(predicted / searched)), np.abs(predicted - searched)
    missed = above < -1e-6
    each = [missed[video == v].mean() for v in np.unique(video)]
    return Row(
        psnr,
        len(each),
        len(found),
        searched.mean(),
        predicted.mean(),
        float(np.median(octaves)),
        float(np.quantile(octaves, 0.9)),
        float(np.median(tokens)),
        float(np.quantile(tokens, 0.9)),
        float(np.mean(each)),
        float(-above[missed].mean()) if missed.any() else 0.0,
    )


def print_rows(rows: Sequence[Row]) -> None:
    heads = ("wanted dB", "videos", "blocks", "searched", "predicted", "octaves", "90 %", "tokens", "90 %", "missed")
    print("| " + " | ".join((*heads, "by dB")) + " |\n|" + "---|" * (len(heads) + 1))
    for r in rows:
        print(
            f"| {r.wanted_db:g} | {r.videos} | {r.blocks} | {r.searched:.1f} | {r.predicted:.1f} | {r.octaves:.2f} | "
            f"{r.octaves_90:.2f} | {r.tokens:.0f} | {r.tokens_90:.0f} | {r.missed:.1%} | {r.short_db:.2f} |",
            flush=True,
        )


def usual_levels(psnr: Tensor) -> list[float]:
    """Five wanted PSNRs from what 1/32 of the tokens gives the median block to what all give it, psnr [M, K]."""
    count = psnr.shape[1]
    low, high = float(psnr[:, max(count // 32, 1) - 1].median()), float(psnr[:, -1].median())
    return sorted({round(low + (high - low) * i / 4) * 1.0 for i in range(5)})


def main(argv: list[str]) -> None:
    """`vtok calibrate RUN --shards CALIBRATION --out EXPORT [--against HELD_OUT]`."""
    parser = argparse.ArgumentParser(
        prog="vtok calibrate", description="A trained halting head made to hold on new videos: an export."
    )
    parser.add_argument("run", help="run directory of a halting head (objective.halting: true)")
    parser.add_argument("--shards", required=True, help="of videos that neither tokenizer nor head was trained on")
    parser.add_argument("--out", required=True, help="folder of the export; an earlier export there is replaced")
    parser.add_argument("--against", help="other shards: predicted lengths beside those of a search by decoding")
    parser.add_argument("--psnr", help="wanted PSNRs of --against, after commas (default: five, from the calibration)")
    parser.add_argument("--limit", type=int, help="videos read of each (default: all)")
    add_which(parser, default="last")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    model, config = load_run(args.run, which=args.which, ema=not args.no_ema)
    if not hasattr(model, "halting"):
        raise ValueError(f"{args.run} has no halting head: set model.halting_depth and train it (objective.halting)")
    model = model.to(args.device)
    measured = measure(model, whole_videos(args.shards, config.data, limit=args.limit))
    model.halting.calibrate(measured.codes, measured.psnr, measured.video)
    count = len(measured.video.unique())
    print(f"calibrated on {len(measured.codes)} blocks of {count} videos for {model.halting.coverage:.0%}")
    least = round(model.halting.coverage / (1 - model.halting.coverage), 6)
    if count < least:
        log.warning("%d videos are too few for %s: it takes %g; every token is kept", count, args.shards, least)
    facts: dict[str, Any] = {
        "schema": 1,
        "coverage": model.halting.coverage,
        "calibration": {"shards": args.shards, "videos": count, "blocks": len(measured.codes)},
    }
    if args.against:
        wanted = [float(value) for value in args.psnr.split(",")] if args.psnr else usual_levels(measured.psnr)
        held_out = [(v.source, list(v.frames)) for v in whole_videos(args.against, config.data, limit=args.limit)]
        rows = against_search(model, [pair for pair in held_out if pair[1]], wanted)
        facts["held_out"] = {"shards": args.against, "rows": [asdict(row) for row in rows]}
        print_rows(rows)
    step = step_of(args.run, which=args.which)
    out = publish(model.cpu(), config, args.out, run_dir=Path(args.run), step=step)
    write_atomically(out / FACTS, facts)
    print(f"{out}: vtok encode {out} VIDEO --out FILE.vtok --predict-psnr DB{_advice(config.data)}")


def _advice(data: DataConfig) -> str:
    return f" --size model --fps {data.fps:g}" if data.fps else " --size model"
