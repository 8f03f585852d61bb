"""Reducers that select patches, each against a slow version of its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_reducers import alone, clips, frames_of, same

from vtok.reducers import build
from vtok.reducers.patches import uniforms
from vtok.reducers.selecting import farthest_first
from vtok.types import Features


def chosen(tokens, b=0) -> set[int]:
    return set((tokens.source[b] >= 0).nonzero().flatten().tolist())


def test_random_is_even_and_draws_for_each_clip():
    features = clips([4, 4])
    drawn = torch.Generator().manual_seed(3)
    both = build("random")(features, budget=9, generator=drawn)
    assert chosen(both, 0) != chosen(both, 1)
    drawn = torch.Generator().manual_seed(3)
    for b in range(2):
        same(build("random")(alone(features, b), budget=9, generator=drawn), both, b)
    assert chosen(build("random", seed=1)(features, budget=9)) != chosen(build("random", seed=2)(features, budget=9))
    hits = torch.zeros(64)
    for seed in range(200):
        hits[list(chosen(build("random", seed=seed)(features, budget=16)))] += 1
    assert hits.mean() == 50 and 25 < hits.min() and hits.max() < 75  # sd 6.1
    numbers = uniforms(torch.Generator().manual_seed(0), 4, 5000, seed=0, like=torch.ones(1))
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 0.002
    assert abs(float(torch.corrcoef(numbers)[0, 1])) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([numbers[0, 1:], numbers[0, :-1]]))[0, 1])) < 0.05


def test_uniform_keeps_whole_frames_evenly():
    features = clips([8])
    frames = {16: [4], 32: [2, 6], 64: [1, 3, 5, 7], 128: list(range(8))}
    for keep, expected in frames.items():
        kept = frames_of(build("uniform")(features, budget=keep), 8)
        assert kept.unique().tolist() == expected and (torch.bincount(kept)[expected] == 16).all()
    kept = build("uniform")(features, budget=20)
    assert torch.bincount(frames_of(kept, 8), minlength=8).tolist() == [0, 0, 16, 0, 0, 0, 4, 0]
    spots = kept.positions[0, frames_of(kept, 8) == 6, 1:]
    assert torch.pdist(spots).min() > 0.5, "the rest is spread over its frame"
    assert sorted(farthest_first(3, 5).tolist()) == list(range(15)) and int(farthest_first(3, 5)[0]) == 7


def test_divprune_is_greedy_max_min():
    x = F.normalize(clips([3]).patches[0].flatten(0, 1), dim=-1)
    away = 1 - x @ x.T
    order = [int((away + 9 * torch.eye(48)).amin(1).argmax())]
    while len(order) < 20:
        rest = [i for i in range(48) if i not in order]
        order.append(max(rest, key=lambda i: float(away[i, order].min())))
    for keep in (1, 2, 7, 20):
        assert chosen(build("divprune")(clips([3]), budget=keep)) == set(order[:keep])


def test_dart_takes_what_repeats_a_pivot_least():
    features = clips([3])
    raw = features.patches[0].flatten(0, 1)
    x, norm = F.normalize(raw, dim=-1), raw.abs().sum(-1)
    kept = sorted(range(48), key=lambda i: -float(norm[i]))[:4]
    for pivot, share in zip(list(kept), (4, 4, 3, 3)):
        rest = [i for i in range(48) if i not in kept]
        kept += sorted(rest, key=lambda i: float(x[i] @ x[pivot]))[:share]
    assert chosen(build("dart", pivots=4)(features, budget=18)) == set(kept)
    assert chosen(build("dart", pivots=4, keys=True)(features, budget=18)) != set(kept)


def moved(features: Features) -> torch.Tensor:
    """[T - 1, N]: cosine distance to the frame before."""
    x = F.normalize(features.patches[0], dim=-1)
    return 1 - (x[1:] * x[:-1]).sum(-1)


def test_evs_keeps_what_changed_most():
    features = clips([5])
    best = (moved(features).flatten().argsort(descending=True)[:21] + 16).tolist()
    assert chosen(build("evs")(features, budget=37)) == {*range(16), *best}
    assert any(i >= 16 for i in chosen(build("evs")(features, budget=9))), "below N tokens frame 0 competes"


def test_dtd_keeps_a_share_of_each_frame_or_goes_by_a_threshold():
    features = clips([5])
    best = [(16 * (t + 1) + moved(features)[t].argsort(descending=True)[:6]).tolist() for t in range(4)]
    assert chosen(build("dtd")(features, budget=40)) == {*range(16), *itertools.chain(*best)}
    as_evs = build("dtd", mode="absolute")(features, budget=37)
    assert chosen(as_evs) == chosen(build("evs")(features, budget=37))
    with pytest.raises(ValueError, match="a share per frame has no threshold"):
        build("dtd", reference="last_kept")(features, budget=5)


def test_dtd_by_the_last_kept_patch_sees_slow_drift():
    """One place turns by 10 degrees a frame, another jumps by 15 degrees to and fro: only the first goes anywhere."""
    angle = torch.zeros(9, 4)
    angle[:, 1] = torch.arange(9) * 10.0
    angle[:, 2] = torch.arange(9) % 2 * 15.0
    x = torch.stack([angle.deg2rad().cos(), angle.deg2rad().sin()], -1)[None]
    features = Features(x, (2, 2))
    previous = build("dtd", mode="absolute")(features, budget=7).source[0]
    drift = build("dtd", mode="absolute", reference="last_kept")(features, budget=7).source[0]
    assert ((previous >= 0).nonzero().flatten() % 4).tolist()[4:] == [2] * 3
    assert ((drift >= 0).nonzero().flatten() % 4).tolist()[4:] == [1] * 3


def test_dycoke_compares_in_windows_of_four():
    features = clips([6])
    x = F.normalize(features.patches[0], dim=-1)
    kept = {*range(16), *range(64, 80)}
    for frame, reference in ((1, 0), (2, 0), (3, 2), (5, 4)):
        away = 1 - (x[frame] * x[reference]).sum(-1)
        kept |= {16 * frame + int(i) for i in away.argsort(descending=True)[:5]}
    assert chosen(build("dycoke")(features, budget=52)) == kept
    tokens = build("dycoke")(features, budget=20)
    assert torch.bincount(frames_of(tokens, 6), minlength=6)[0] == 16, "windows grow until their first frames fit"
    assert torch.bincount(frames_of(build("dycoke")(features, budget=6), 6)).tolist() == [1] * 6


def test_vidcom2_gives_the_odd_frame_more():
    features = clips([4])
    plain = features.patches[:, :1].repeat(1, 4, 1, 1)
    plain[:, 2] += 3 * torch.randn(1, 1, 8)
    tokens = build("vidcom2")(replace(features, patches=plain), budget=20)
    number = torch.bincount(frames_of(tokens, 4), minlength=4)
    assert number.argmax() == 2 and number[2] > 1.5 * number[0]

    x = features.patches[0]
    quiet = x.flatten(0, 1).var(0).argsort()[:4]
    x = F.normalize(x[..., quiet], dim=-1)
    centre, width = x.mean((0, 1)), [2.0**a for a in range(-3, 2)]
    to_video, to_frame = torch.zeros(4, 16), torch.zeros(4, 16)
    for t, i in itertools.product(range(4), range(16)):
        to_video[t, i] = sum(math.exp(-float((x[t, i] - centre).square().sum()) / 2 / a) for a in width)
        to_frame[t, i] = sum(math.exp(-float((x[t, i] - x[t].mean(0)).square().sum()) / 2 / a) for a in width)
    got = build("vidcom2")(features, budget=20)
    shares = (-to_video.mean(1) / 0.01).softmax(0)
    wanted = 20 * (0.75 + shares) / 4
    number = torch.bincount(frames_of(got, 4), minlength=4)
    assert (number - wanted).abs().max() < 1
    for t in range(4):
        best = (to_video + to_frame)[t].argsort()[: int(number[t])] + 16 * t
        assert set(best.tolist()) == {i for i in chosen(got) if i // 16 == t}


def test_visionzip_on_one_frame():
    features = clips([1])
    received, keys = features.attention[3][0, 0], F.normalize(features.keys[0, 0], dim=-1)
    main = set(received.argsort(descending=True)[:5].tolist())
    rest = [i for i in range(16) if i not in main]
    targets = [rest[i * 11 // 3] for i in range(3)]
    tokens = build("visionzip", dominant=0.625)(features, budget=8)
    for i in rest:
        target = i if i in targets else targets[int((keys[targets] @ keys[i]).argmax())]
        assert tokens.source[0, i] == tokens.source[0, target]
    assert len({int(tokens.source[0, i]) for i in [*main, *targets]}) == 8
    assert all(tokens.mass[0, tokens.source[0, i]] == 1 for i in main)


def test_hiprune_on_one_frame():
    features = clips([1], grid=(6, 6))
    middle, last = features.attention[3][0, 0], features.attention[-1][0, 0]
    kept: set[int] = set()
    for i in middle.argsort(descending=True)[:2].tolist():
        y, x = divmod(i, 6)
        kept |= {
            6 * a + b for a, b in ((y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)) if {a, b} <= set(range(6))
        }
    assert len(kept) < 12
    kept |= set([i for i in last.argsort(descending=True).tolist() if i not in kept][: 12 - len(kept)])
    assert chosen(build("hiprune", anchors=0.8)(features, budget=12)) == kept
    swapped = build("hiprune", anchors=0.8, object_layer=-1, last_layer=3)(features, budget=12)
    assert chosen(swapped) != kept
