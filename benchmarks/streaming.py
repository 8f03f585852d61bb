"""Peak memory of `vtok encode` and `vtok decode` on 60 seconds and on 10 minutes of video, and what they give back.

    python benchmarks/streaming.py EXPORT --videos DIR [--budgets 1,4,16,64,256] [--long-seconds 600]

The clips of DIR (sorted by name) are centre-cropped to the model's size, brought to one rate and joined to 60 seconds,
which are looped to the longer file; both are lossless, so that every command sees the same pixels. For every budget of
tokens a time block: peak resident memory of each command in a process of its own, whether the decoded frames of the
short file are those of the model's streaming output (bit for bit), and the PSNR of the file beside that of the
evaluator on the same windows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtok
from vtok.coding import codec
from vtok.data.decode import VideoReader
from vtok.data.encode import write_video
from vtok.data.inputs import collect
from vtok.evaluation.evaluator import Evaluator
from vtok.metrics.distortion import clip_psnr
from vtok.types import Clip


def frames_of(paths: list[Path], size: tuple[int, int], fps: float) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of all clips, one after the other, over and over."""
    for path in chain.from_iterable(repeat(paths)):
        with VideoReader(path) as reader:
            for frame in reader.at_rate(fps):
                yield codec.resize_crop(frame, size)


# ru_maxrss of a child counts what its parent held when it was forked; VmHWM is the command's own.
MEASURED = """
import sys
from vtok.cli import main
code = main(sys.argv[2:])
with open(sys.argv[1], "w") as out, open("/proc/self/status") as status:
    out.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


def run(folder: str, *arguments: str) -> float:
    """Peak resident memory in MB of one `vtok` command in a process of its own (Linux)."""
    peak = Path(folder) / "peak"
    subprocess.run(
        [sys.executable, "-c", MEASURED, str(peak), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return int(peak.read_text()) / 1024


def windows(frames: np.ndarray, length: int) -> list[Clip]:
    """uint8 [T, H, W, 3] cut into clips [1, 3, length, H, W] (a rest that is shorter is left out)."""
    count = len(frames) // length
    cut = torch.from_numpy(frames[: count * length]).unflatten(0, (count, length)).permute(0, 4, 1, 2, 3)
    return [Clip(keys=[str(i)], video=video[None]) for i, video in enumerate(cut)]


def window_budget(model: Any, budget: int, *, length: int) -> int:
    """Tokens of a window of `length` frames at `budget` tokens a time block."""
    return budget * len(model.group_lengths(length, begins=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="export folder of a trained tokenizer")
    parser.add_argument("--videos", required=True, help="folder of clips to join")
    parser.add_argument("--budgets", default="1,4,16,64,256", help="tokens a time block")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--long-seconds", type=float, default=600)
    parser.add_argument("--fps", type=float, default=8)
    args = parser.parse_args()
    model = vtok.load(args.model).eval()
    size = (int(model.config.size[0]), int(model.config.size[1]))
    length = int(model.config.num_frames)
    paths = [row.path for row in collect([args.videos]).rows]
    with tempfile.TemporaryDirectory() as folder:
        short, long = Path(folder) / "short.mkv", Path(folder) / "long.mkv"
        frames = list(islice(frames_of(paths, size, args.fps), round(args.seconds * args.fps)))
        write_video(short, frames, fps=args.fps, codec="ffv1")
        looped = islice(chain.from_iterable(repeat(frames)), round(args.long_seconds * args.fps))
        write_video(long, looped, fps=args.fps, codec="ffv1")
        original = np.stack(frames)
        print(
            f"{args.model}: {args.seconds:g} s and {args.long_seconds:g} s of {size[0]}x{size[1]} at {args.fps:g} fps"
        )
        print("budget | encode MB | long | ratio | decode MB | long | ratio | frames equal | file dB | evaluator dB")
        for budget in [int(text) for text in args.budgets.split(",")]:
            peaks = {}
            for name, path in (("short", short), ("long", long)):
                coded, back = str(Path(folder) / f"{name}.vtok"), str(Path(folder) / f"{name}-back.mkv")
                encoding = run(folder, "encode", args.model, str(path), "--out", coded, "--budget", str(budget))
                decoding = run(folder, "decode", args.model, coded, "--out", back)
                peaks[name] = encoding, decoding
            with VideoReader(Path(folder) / "short-back.mkv") as reader:
                decoded = np.stack([frame for frame, _ in reader.frames()])
            tokens = codec.stream_tokens(model, iter(frames), budget=budget, fps=args.fps)
            streamed = np.stack(list(codec.stream_frames(model, tokens, size=size)))
            clips, recon = windows(original, length), windows(decoded, length)
            psnr = torch.cat([clip_psnr(b.video, a.video) for a, b in zip(clips, recon)]).mean()  # type: ignore[arg-type]
            whole = window_budget(model, budget, length=length)
            found = Evaluator(model, val=clips, budgets=[whole], controls=[], fps=args.fps, progress=False)
            measured = found.run()["rows"][0]["psnr_db"]
            (e1, d1), (e2, d2) = peaks["short"], peaks["long"]
            print(
                f"{budget} | {e1:.0f} | {e2:.0f} | {e2 / e1:.3f} | {d1:.0f} | {d2:.0f} | {d2 / d1:.3f} | "
                f"{np.array_equal(decoded, streamed)} | {psnr:.4f} | {measured:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
