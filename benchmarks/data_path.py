"""Frames per second of the whole data path over bare PyAV decoding of the same windows.

    python benchmarks/data_path.py --shards DIR [--processes 2] [--step-ms 50]

Both sides read the same samples from the same tars on disk with the same number of single-threaded processes. Bare
decoding: open the bytes, seek to the keyframe before the window, decode up to its last frame, convert the wanted frames
to RGB at native size, and drop them. The pipeline does the same and also picks samples, shuffles, checks for damage,
reads captions, crops, resizes, collates, and sends the batches to the main process. The sides take turns; the ratio is
the median over the repeats. CPU time is that of all processes (the main one included) and is the figure to trust where
a machine is shared.

The last line is a training loop that sleeps `step-ms` a batch instead of computing: the share of its time spent
waiting.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from itertools import islice

import av
import torch

from vtok.data.order import endless, seeded
from vtok.data.pipeline import TrainingStream, make_loader
from vtok.data.sources import MEDIA, ShardReader, open_sources
from vtok.data.view import View

Work = list[tuple[int, str, float, int]]  # (sample's place, suffix, start in seconds, frames)


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def bare_window(data: bytes, start_s: float, view: View) -> int:
    """The window of `view` by the plainest use of PyAV; returns frames converted."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if start_s > 0:
            container.seek(int(start_s / stream.time_base) + (stream.start_time or 0), stream=stream)
        rate = float(view.fps or stream.average_rate or 1)
        origin = float((stream.start_time or 0) * stream.time_base)
        wanted = [start_s + i / rate for i in range(view.num_frames)]
        shown, done = None, 0
        for frame in container.decode(stream):
            now = float(frame.time or 0.0) - origin
            while done < len(wanted) and wanted[done] + 1e-3 < now:
                (shown or frame).to_ndarray(format="rgb24")
                done += 1
            if done == len(wanted):
                return done
            shown = frame
        while shown is not None and done < len(wanted):
            shown.to_ndarray(format="rgb24")
            done += 1
        return done


def bare_worker(shards: str, view: View, seed: int, stream: int, streams: int, clips: int, buffer: int, out) -> None:
    """Decodes the very windows that the pipeline's stream would take, in the same order."""
    readers = [ShardReader(source) for source in open_sources(shards)]
    order = endless(readers, weights=None, seed=seed, stream=stream, streams=streams, shuffle_buffer=buffer)
    frames = 0
    for _, epoch, sample in islice(((s, e, x) for s, e, x in order if x.problem is None), clips):
        data = readers[0].read(sample, next(suffix for suffix in MEDIA if suffix in sample.members))
        with av.open(io.BytesIO(data)) as container:
            stream_ = container.streams.video[0]
            duration = float((stream_.duration or 0) * stream_.time_base)
            rate = view.fps or float(stream_.average_rate or 1)
        slack = max(0.0, duration - view.num_frames / rate)
        frames += bare_window(data, slack * seeded(seed, epoch, sample.key).random(), view)
    out.put(frames)


def run_bare(shards: str, view: View, seed: int, processes: int, clips: int, buffer: int) -> int:
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    arguments = [(shards, view, seed, p, processes, clips // processes, buffer, out) for p in range(processes)]
    workers = [context.Process(target=bare_worker, args=a) for a in arguments]
    for worker in workers:
        worker.start()
    frames = sum(out.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return frames


def run_pipeline(shards: str, view: View, seed: int, processes: int, clips: int, buffer: int, batch: int) -> int:
    dataset = TrainingStream(open_sources(shards), view=view, batch_size=batch, seed=seed, shuffle_buffer=buffer)
    loader = make_loader(Finite(dataset, clips // (batch * processes)), num_workers=processes)
    return sum(int(clip.frames().sum()) for clip in loader)


class Finite(torch.utils.data.IterableDataset):
    """The first `batches` batches of each worker, so that no work is done ahead that is not counted."""

    def __init__(self, dataset: TrainingStream, batches: int) -> None:
        self.dataset, self.batches = dataset, batches

    def __iter__(self):
        return islice(iter(self.dataset), self.batches)


def measure(work: Callable[[], int]) -> tuple[float, float]:
    """(frames per CPU second, frames per wall second)."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    frames = work()
    return frames / (cpu_seconds() - cpu), frames / (time.perf_counter() - wall)


def waiting(shards: str, view: View, args: argparse.Namespace) -> tuple[float, float]:
    """(share of the loop's time spent waiting for data, mean step in ms) over args.steps after a warm-up."""
    stream = TrainingStream(
        open_sources(shards), view=view, batch_size=args.batch_size, seed=0, shuffle_buffer=args.shuffle_buffer
    )
    loader = iter(make_loader(stream, num_workers=args.processes))
    for _ in range(2 * args.processes):
        next(loader)
    waited, begin = 0.0, time.perf_counter()
    for _ in range(args.steps):
        asked = time.perf_counter()
        next(loader).as_float()
        waited += time.perf_counter() - asked
        time.sleep(args.step_ms / 1000)
    total = time.perf_counter() - begin
    del loader  # ends the workers before the interpreter goes, while they still send
    return waited / total, 1000 * total / args.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True, help="folder, pattern or list joined by '::'")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clips", type=int, default=128, help="clips per repeat and side")
    parser.add_argument("--num-frames", type=int, default=16)
    parser.add_argument("--fps", type=float, default=8.0)
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shuffle-buffer", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=200.0, help="time the pretended training step takes")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    view = View(num_frames=args.num_frames, size=tuple(args.size), fps=args.fps, hflip=0.5)
    common = {"processes": args.processes, "clips": args.clips, "buffer": args.shuffle_buffer}
    rows = []
    for repeat in range(args.repeats):
        sides = {
            "bare": lambda seed=repeat: run_bare(args.shards, view, seed, **common),
            "pipeline": lambda seed=repeat: run_pipeline(args.shards, view, seed, batch=args.batch_size, **common),
        }
        order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        rows.append({name: measure(sides[name]) for name in order})
        print(
            f"repeat {repeat}: " + ", ".join(f"{n} {c:.0f}/cpu-s {w:.0f}/s" for n, (c, w) in rows[-1].items()),
            flush=True,
        )
    print(f"\n{args.clips} clips of {args.num_frames} frames at {args.fps} fps, {args.processes} processes")
    print(f"{'':24}{'frames/cpu-s':>14}{'frames/s':>12}")
    for name in ("bare", "pipeline"):
        cpu, wall = (statistics.median(row[name][i] for row in rows) for i in (0, 1))
        print(f"{name:24}{cpu:14.0f}{wall:12.0f}")
    cpu, wall = (statistics.median(row["pipeline"][i] / row["bare"][i] for row in rows) for i in (0, 1))
    print(f"{'ratio (median)':24}{cpu:14.3f}{wall:12.3f}")
    share, step = waiting(args.shards, view, args)
    print(f"\nwaiting for data: {100 * share:.1f} % of a step of {args.step_ms:.0f} ms (measured {step:.0f} ms)")


if __name__ == "__main__":
    main()
