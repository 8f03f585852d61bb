"""Batched k-means beside the same k-means one clip at a time, and one adaptive fit beside a fit for every K.

    python benchmarks/clustering.py [--clips 8] [--frames 32] [--patches 196] [--dim 768] [--clusters 32] [--repeats 3]

Vectors of a clip: `scenes` directions with noise, as patches of a video repeat themselves; each clip has other ones.
Median time after one warm-up: CPU time, which other work on the machine disturbs least, or on a GPU wall time of calls
that are waited for. The rows of a pair must agree on inertia within
0.1 %, or the run ends with an error. Seeds, iterations and tolerance are those of the family's defaults.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vtok.layers.cluster import kmeans
from vtok.layers.ward import adaptive_kmeans


def patches(clips: int, count: int, dim: int, *, scenes: int, device: str) -> Tensor:
    """[clips, count, dim], drawn on the CPU so that machines agree."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(clips):
        centres = torch.randn(scenes, dim, generator=generator)
        which = torch.randint(scenes, (count,), generator=generator)
        out.append(centres[which] + torch.randn(count, dim, generator=generator))
    return torch.stack(out).to(device)


def timed(run: Callable[[], float], *, repeats: int, device: str) -> tuple[float, float]:
    """Median seconds, and what the last run gave."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    run()
    times, got = [], 0.0
    for _ in range(repeats):  # a run ends with numbers on the host: the device has been waited for
        began = clock()
        got = run()
        times.append(clock() - began)
    return statistics.median(times), got


def agree(name: str, a: float, b: float) -> None:
    if abs(a - b) > 1e-3 * abs(a):
        raise SystemExit(f"{name}: the sums of squared distances differ, {a} and {b}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(clips=8, frames=32, patches=196, dim=768, clusters=32, scenes=40, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--least", type=int, default=12, help="smallest K of the adaptive rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    shape = (a.clips, a.frames * a.patches, a.dim)
    x = patches(*shape, scenes=a.scenes, device=a.device)
    where = torch.cuda.get_device_name() if a.device != "cpu" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"k-means of {list(shape)} into {a.clusters} clusters, cosine, {where}, torch {torch.__version__}")

    def batched() -> float:
        return float(kmeans(x, a.clusters).inertia.sum())

    def looped() -> float:
        return sum(float(kmeans(clip[None], a.clusters).inertia.sum()) for clip in x)

    def adaptive() -> float:
        return float(adaptive_kmeans(x, a.clusters, least=a.least, criterion="elbow").lengths.sum())

    def every() -> float:
        return sum(float(kmeans(x, k).inertia.sum()) for k in range(a.least, a.clusters + 1))

    at_once, first = timed(batched, repeats=a.repeats, device=a.device)
    one_by_one, second = timed(looped, repeats=a.repeats, device=a.device)
    agree("batched and one by one", first, second)
    print(f"{'batched':<34}{at_once:9.3f} s")
    print(f"{'one clip at a time':<34}{one_by_one:9.3f} s   {one_by_one / at_once:5.2f} x the batched")
    one, found = timed(adaptive, repeats=a.repeats, device=a.device)
    fits, _ = timed(every, repeats=1, device=a.device)
    print(f"{'adaptive, one fit and its tree':<34}{one:9.3f} s   mean K {found / a.clips:.1f}")
    print(f"{f'a fit for every K of {a.least} to {a.clusters}':<34}{fits:9.3f} s   {fits / one:5.2f} x the adaptive")


if __name__ == "__main__":
    main()
