"""Adaptive against fixed length at the same bytes: what `vtok encode --bytes` gains over `--budget`, video by video.

    python benchmarks/adaptive.py EXPORT --videos DIR [--budgets 4,16,64] [--size model] [--fps F] [--coding packed]
        [--look-ahead 0,4] [--predicted] [--halting 18,21,24]

Every video is encoded at each fixed budget K; the bytes of that file, header and all, are then what adaptive files may
have: `whole` sees the video first, `ahead n` decides while streaming with a look-ahead of n blocks. PSNR is that of the
decoded video's mean squared error over all frames; the difference is adaptive less fixed, its mean over videos with a
95 % bootstrap interval. `--halting` measures a model's halting head against the search instead, at each wanted PSNR, as
`vtok calibrate --against` does for shards.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from vtok.coding import codec
from vtok.coding.calibrate import against_search, print_rows
from vtok.coding.rate_control import Asked
from vtok.data.inputs import collect
from vtok.evaluation.rows import bootstrap
from vtok.loading import load_any


def psnr_db(model, coded: Path, originals: np.ndarray) -> float:
    decoded = codec.decode_frames(model, coded)
    error = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(decoded, originals, strict=True)]
    return float(10 * np.log10(255**2 / np.mean(error)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="export folder or run directory of a trained tokenizer")
    parser.add_argument("--videos", required=True, help="folder of videos")
    parser.add_argument("--budgets", default="4,16,64", help="fixed tokens a time block")
    parser.add_argument("--size", default="model", help="HxW, or `model` for the size it was trained at")
    parser.add_argument("--fps", type=Fraction, help="frames per second to keep (default: every frame)")
    parser.add_argument("--coding", default="packed")
    parser.add_argument("--look-ahead", default="0,4", help="blocks, several after commas")
    parser.add_argument("--predicted", action="store_true", help="also: lengths by the model's scorer")
    parser.add_argument("--halting", help="wanted PSNRs in dB, after commas: the halting head against the search")
    parser.add_argument("--limit", type=int, help="of videos, evenly spread over the sorted names")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_any(args.model)
    size = codec.parse_size(args.size, model)
    paths = sorted(row.path for row in collect([args.videos]).rows)
    if args.limit:
        paths = [paths[i * len(paths) // args.limit] for i in range(min(args.limit, len(paths)))]
    if args.halting:
        videos = [(path.name, list(codec.read_frames(path, size=size, fps=args.fps))) for path in paths]
        return print_rows(against_search(model, videos, [float(value) for value in args.halting.split(",")]))
    ways = {"whole": {}} | {f"ahead {n}": {"look_ahead": int(n)} for n in args.look_ahead.split(",") if n}
    if args.predicted:
        ways["scorer"] = {"predicted": True}
    start = time.monotonic()
    print(f"{len(paths)} videos, coding {args.coding}")
    print(f"{'K':>5} {'way':<10} {'videos':>6} {'fixed dB':>9} {'difference dB (95 %)':>28} {'bytes':>10} {'worse':>6}")
    with tempfile.TemporaryDirectory() as folder:
        coded = Path(folder) / "x.vtok"
        for budget in map(int, args.budgets.split(",")):
            base: list[float] = []
            gains: dict[str, list[float]] = {way: [] for way in ways}
            used: dict[str, list[float]] = {way: [] for way in ways}
            for path in paths:
                frames = np.stack(list(codec.read_frames(path, size=size, fps=args.fps)))
                settings = dict(size=size, fps=args.fps, coding=args.coding)
                fixed = codec.encode_file(model, path, coded, budget=budget, **settings)
                base.append(psnr_db(model, coded, frames))
                for way, how in ways.items():
                    try:
                        done = codec.encode_file(model, path, coded, asked=Asked(bytes=fixed.bytes, **how), **settings)
                    except ValueError as error:
                        print(f"{path}: {way}: {error}")
                        continue
                    assert done.bytes <= fixed.bytes
                    gains[way].append(psnr_db(model, coded, frames) - base[-1])
                    used[way].append(done.bytes / fixed.bytes)
            for way, gain in gains.items():
                if not gain:
                    continue
                low, high = bootstrap(torch.tensor(gain), seed=args.seed) or (float("nan"),) * 2
                print(
                    f"{budget:>5} {way:<10} {len(gain):>6} {np.mean(base):>9.3f} "
                    f"{np.mean(gain):>+10.3f} ({low:+.3f} to {high:+.3f}) {np.mean(used[way]):>10.1%} "
                    f"{np.mean(np.array(gain) < 0):>6.0%}",
                    flush=True,
                )
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
