"""Cuts between frames: every segmenter against plain loops, alone or in a batch, and what may move a cut."""

from __future__ import annotations

import math

import pytest
import torch

from vtok.layers.segments import (
    SegmentConfig,
    fixed_cuts,
    neighbour_similarity,
    segment,
    threshold_cuts,
    tilling_cuts,
    topk_cuts,
    windows,
)
from vtok.types import Features

FRAMES = 12
LENGTHS = [12, 1, 7, 2, 9]
ALL = [
    SegmentConfig(name="topk", most=4),
    SegmentConfig(name="threshold", threshold=0.8, most=5),
    SegmentConfig(name="scene_tilling", alpha=0.3, most=4),
    SegmentConfig(name="scene_tilling", alpha=0.3, most=4, causal=True),
    SegmentConfig(name="fixed", length=3, most=3),
]
names = [f"{c.name}{'_causal' * c.causal}" for c in ALL]


def features(lengths=LENGTHS, frames: int = FRAMES, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(len(lengths), frames, 4, 5, generator=generator, dtype=torch.float64).cumsum(1)
    real = torch.arange(frames) < torch.tensor(lengths)[:, None]
    walk = walk * real[..., None, None]
    return Features(walk, (2, 2), frame=walk.mean(2), lengths=torch.tensor(lengths))


def similarities(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(LENGTHS), FRAMES - 1, generator=generator, dtype=torch.float64)
    return (values * 5).round() / 5, torch.tensor(LENGTHS)  # with equal neighbours among them


def depth_of(row: list[float], i: int, *, right: bool = True) -> float:
    """Rises to both sides of gap i, one step at a time."""
    total = 0.0
    for step in (-1, 1) if right else (-1,):
        at = i
        while 0 <= at + step < len(row) and row[at + step] > row[at]:
            at += step
        total += row[at] - row[i]
    return total


def starts_of(cuts: list[int], length: int) -> list[bool]:
    return [t == 0 or t - 1 in cuts for t in range(length)] + [False] * (FRAMES - length)


def test_similarity_is_the_cosine_of_neighbours():
    seen = features()
    got = neighbour_similarity(seen)
    for b, length in enumerate(LENGTHS):
        for t in range(FRAMES - 1):
            a, c = seen.patches[b, t].flatten(), seen.patches[b, t + 1].flatten()
            want = float(a @ c / (a.norm() * c.norm())) if t + 1 < length else 0.0
            assert abs(float(got[b, t]) - want) < 1e-12
    frames = neighbour_similarity(seen, of="frame")
    assert float(frames[0, 0]) == pytest.approx(
        float(torch.cosine_similarity(seen.frame[0, 0], seen.frame[0, 1], dim=0)), abs=1e-12
    )
    assert neighbour_similarity(Features(seen.patches.half(), (2, 2))).dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_topk_takes_the_least_similar(seed):
    values, lengths = similarities(seed)
    got = topk_cuts(values, lengths, most=4)
    for b, length in enumerate(LENGTHS):
        order = sorted(range(length - 1), key=lambda i: (float(values[b, i]), i))
        assert got[b].tolist() == starts_of(order[:3], length)
    assert topk_cuts(values, lengths, most=25).sum(1).tolist() == LENGTHS  # fewer frames than segments


@pytest.mark.parametrize("seed", range(5))
def test_threshold_cuts_below_it(seed):
    values, lengths = similarities(seed)
    got = threshold_cuts(values, lengths, threshold=0.5, most=3)
    for b, length in enumerate(LENGTHS):
        below = [i for i in range(length - 1) if values[b, i] < 0.5]
        assert got[b].tolist() == starts_of(below[:2], length)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [2, 25])
def test_tilling_cuts_the_deep_valleys(seed, most):
    values, lengths = similarities(seed)
    got = tilling_cuts(values, lengths, alpha=0.5, most=most)
    for b, length in enumerate(LENGTHS):
        row = values[b, : length - 1].tolist()
        depths = [depth_of(row, i) for i in range(len(row))]
        mean = sum(depths) / max(len(depths), 1)
        spread = math.sqrt(sum((d - mean) ** 2 for d in depths) / max(len(depths), 1))
        deep = [i for i, d in enumerate(depths) if d > mean + 0.5 * spread + 1e-9]
        deep = sorted(deep, key=lambda i: (-round(depths[i], 9), i))[: most - 1]
        assert got[b].tolist() == starts_of(deep, length)


@pytest.mark.parametrize("seed", range(4))
def test_causal_tilling_as_a_stream_would(seed):
    values, lengths = similarities(seed)
    got = tilling_cuts(values, lengths, alpha=0.5, most=3, causal=True)
    for b, length in enumerate(LENGTHS):
        depths, cuts = [], []
        for i in range(length - 1):  # what is known when frame i + 1 arrives
            depths.append(depth_of(values[b, : i + 1].tolist(), i, right=False))
            mean = sum(depths) / len(depths)
            spread = math.sqrt(max(sum(d * d for d in depths) / len(depths) - mean**2, 0))
            if depths[-1] > mean + 0.5 * spread + 1e-9 and len(cuts) < 2:
                cuts.append(i)
        assert got[b].tolist() == starts_of(cuts, length)


def test_fixed_cuts_count_frames():
    got = fixed_cuts(torch.tensor(LENGTHS), FRAMES, length=3, most=3)
    for b, length in enumerate(LENGTHS):
        assert got[b].tolist() == [t % 3 == 0 and t < 9 and t < length for t in range(FRAMES)]


@pytest.mark.parametrize("config", ALL, ids=names)
def test_a_clip_is_cut_alike_alone_and_whatever_its_padding_holds(config):
    seen = features()
    together = segment(seen, config)
    noisy = seen.patches + torch.randn_like(seen.patches) * ~seen.mask[..., None, None]
    assert torch.equal(segment(Features(noisy, (2, 2), lengths=seen.lengths), config), together)
    for b, length in enumerate(LENGTHS):
        alone = segment(Features(seen.patches[b : b + 1, :length], (2, 2)), config)
        assert together[b].tolist() == alone[0].tolist() + [False] * (FRAMES - length)
        assert bool(alone[0, 0]) and int(alone.sum()) <= config.most
    assert int(together.sum(1).max()) > 1


@pytest.mark.parametrize("config", [ALL[1], ALL[3], ALL[4]], ids=[names[1], names[3], names[4]])
def test_later_frames_move_no_earlier_cut(config):
    seen = features([FRAMES])
    whole = segment(seen, config)
    for length in range(1, FRAMES):
        assert torch.equal(segment(Features(seen.patches[:, :length], (2, 2)), config), whole[:, :length])


def test_cuts_lie_where_the_scene_changes():
    scenes = torch.randn(3, 1, 4, 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 1).flatten(0, 1)
    noise = 0.1 * torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(2))
    seen = Features((scenes + noise)[None], (2, 2))
    for config in (
        SegmentConfig(most=3),
        SegmentConfig(name="threshold", threshold=0.5),
        SegmentConfig(name="scene_tilling"),
        SegmentConfig(name="scene_tilling", min_depth=0.2, causal=True),
    ):
        assert segment(seen, config)[0].nonzero()[:, 0].tolist() == [0, 4, 8], config


def test_windows_end_at_cuts():
    starts = torch.zeros(2, 10, dtype=torch.bool)
    starts[0, [0, 4]] = True
    starts[1, 0] = True
    got = windows(starts, torch.tensor([10, 4]), length=3)
    assert got.first[0].nonzero()[:, 0].tolist() == [0, 3, 4, 7]
    assert got.index[0].tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert got.first[1].nonzero()[:, 0].tolist() == [0, 3] and got.index[1].tolist() == [0, 0, 0] + [1] * 7


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(name="scenes"), "segments.name='scenes' is unknown; choose one of topk"),
        (dict(of="pixels"), "segments.of='pixels'"),
        (dict(most=0), "segments.most=0 must be at least 1"),
        (dict(causal=True), "choose scene_tilling or threshold"),
        (dict(threshold=0.5), "segments.threshold=0.5 is read by nothing here: it is of segments.name=threshold"),
        (dict(name="fixed", alpha=0.3), "segments.alpha=0.3 .*segments.name=scene_tilling"),
        (dict(name="threshold", length=3), "segments.length=3 .*segments.name=fixed"),
        (dict(name="fixed", of="frame"), "segments.of='frame' .*fixed looks at none"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        SegmentConfig(**values)


def test_no_frame_vectors():
    with pytest.raises(ValueError, match="no frame vectors; choose patches"):
        neighbour_similarity(Features(torch.randn(1, 2, 4, 3), (2, 2)), of="frame")
