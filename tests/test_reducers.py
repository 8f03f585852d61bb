"""Training-free reducers: one contract held by all of them, and what they share."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch

from vtok.reducers import REDUCERS, build, everything
from vtok.reducers.patches import allocate, best_member, compact, lowest_threshold, nearest, spread
from vtok.types import Features

NAMES = sorted(REDUCERS)
MEANS = [n for n in NAMES if n not in ("scissor", "prunevid", "fastvid", "holitom")]  # tokens are plain means


def clips(lengths, *, grid=(4, 4), dim=8, seed=0, frames=None) -> Features:
    """Clips whose places drift and whose frames differ, with all that a tower can give; padding is zeros."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw)

    batch, steps, size = len(lengths), frames or max(lengths), grid[0] * grid[1]
    x = normal(batch, 1, size, dim) + normal(batch, steps, 1, dim) + 0.5 * normal(batch, steps, size, dim)
    received = {layer: normal(batch, steps, size).softmax(-1) for layer in (3, -1)}
    made = Features(
        x,
        grid,
        times=torch.arange(steps).expand(batch, -1) / 4,
        frame=x.mean(2) + 0.1 * normal(batch, steps, dim),
        attention=received,
        keys=normal(batch, steps, size, 5),
        lengths=torch.tensor(lengths),
    )
    return padded(made, 0.0)


def padded(features: Features, value: float) -> Features:
    """The same with `value` in everything that is padding."""
    hole = ~features.mask

    def fill(x):
        return x.masked_fill(hole.reshape(*hole.shape, *[1] * (x.ndim - 2)), value)

    return replace(
        features,
        patches=fill(features.patches),
        times=fill(features.times),
        frame=fill(features.frame),
        attention={layer: fill(x) for layer, x in features.attention.items()},
        keys=fill(features.keys),
    )


def alone(features: Features, b: int) -> Features:
    """Clip b without its padding, and without lengths."""
    rows, real = slice(b, b + 1), slice(0, int(features.count()[b]))
    return Features(
        features.patches[rows, real],
        features.grid,
        times=features.times[rows, real],
        frame=features.frame[rows, real],
        attention={layer: x[rows, real] for layer, x in features.attention.items()},
        keys=features.keys[rows, real],
    )


def same(one, other, b=0, *, atol=1e-5):
    """Whether the only clip of `one` is clip b of `other`."""
    count = int(one.lengths[0])
    assert int(other.lengths[b]) == count
    for name in ("embeddings", "positions", "group", "rank", "mass"):
        torch.testing.assert_close(getattr(one, name)[0], getattr(other, name)[b, :count], atol=atol, rtol=1e-4)
        assert not getattr(other, name)[b, count:].any(), name
    size = one.source.shape[1]
    assert torch.equal(one.source[0], other.source[b, :size]) and (other.source[b, size:] == -1).all()
    groups = one.times.shape[1]
    assert torch.equal(one.times[0], other.times[b, :groups]) and not other.times[b, groups:].any()


def check_contract(tokens, features, keep):
    """What Tokens of any reducer say about themselves."""
    h, w = features.grid
    size, drops = h * w, (tokens.source < 0).any()
    assert tokens.lengths.tolist() == keep and tokens.embeddings.shape[1] == max(keep)
    assert tokens.embeddings.dtype == features.patches.dtype and tokens.embeddings.isfinite().all()
    for b, k in enumerate(keep):
        length = int(features.count()[b])
        source = tokens.source[b, : length * size]
        assert (tokens.source[b, length * size :] == -1).all() and int(source.max()) == k - 1
        taken = torch.bincount(source[source >= 0], minlength=k)
        assert torch.equal(tokens.mass[b, :k], taken.float()) and (taken > 0).all()
        assert drops or int(tokens.mass[b].sum()) == length * size
        index = torch.arange(length * size)
        place = torch.stack([index // size, index % size // w, index % w], -1).double()
        here = (source == torch.arange(k)[:, None]).double()  # [k, n]
        middle = here @ place / here.sum(1, keepdim=True)
        torch.testing.assert_close(
            tokens.positions[b, :k].double(), (middle + 0.5) / torch.tensor([length, h, w]), atol=1e-6, rtol=0
        )
        order = list(zip(middle[:, 0].tolist(), here.argmax(1).tolist()))
        assert order == sorted(order), "by mean frame, then by first patch"
        group, rank = tokens.group[b, :k], tokens.rank[b, :k]
        assert torch.equal(group, middle[:, 0].floor().long().unique(return_inverse=True)[1]), "frames with tokens"
        sizes = torch.bincount(group)
        assert sorted(zip(group.tolist(), rank.tolist())) == [(g, i) for g, m in enumerate(sizes) for i in range(m)]
    assert ((tokens.positions >= 0) & (tokens.positions <= 1)).all()


def frames_of(tokens, length) -> torch.Tensor:
    """[K]: the frame of each token of the first clip."""
    return (tokens.positions[0, :, 0] * length).floor().long()


# The contract, for all of them.


@pytest.mark.parametrize("name", NAMES)
def test_exact_count_whatever_the_budget(name):
    features = clips([5], dim=6)
    for keep in (1, 2, 3, 7, 16, 17, 50, 79, 80):
        tokens = build(name)(features, budget=keep)
        check_contract(tokens, features, [keep])
        if not REDUCERS[name].drops:
            assert int(tokens.mass.sum()) == 80


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (1, 7)])
def test_odd_grids_and_single_frames(name, grid):
    for frames in (1, 3):
        features, size = clips([frames], grid=grid), grid[0] * grid[1] * frames
        for keep in sorted({1, min(2, size), max(1, size // 2), max(1, size - 1), size}):
            check_contract(build(name)(features, budget=keep), features, [keep])


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_are_the_patches_themselves(name):
    features = clips([4, 2])
    tokens = build(name)(features, budget=torch.tensor([[64], [32]]))
    check_contract(tokens, features, [64, 32])
    assert torch.equal(tokens.source[0], torch.arange(64)) and (tokens.mass[0] == 1).all()
    torch.testing.assert_close(tokens.embeddings[0], features.patches[0].flatten(0, 1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tokens.embeddings[1, :32], features.patches[1, :2].flatten(0, 1), atol=1e-6, rtol=1e-6)
    for b in range(2):
        plain = everything(alone(features, b))
        same(replace(plain, rank=tokens.rank[b : b + 1, : int(plain.lengths[0])]), tokens, b)


@pytest.mark.parametrize("name", NAMES)
def test_ragged_batches_equal_one_by_one_and_padding_is_not_read(name):
    features = clips([6, 1, 4, 6], frames=7)
    for keep in (3, 16):
        tokens = build(name)(features, budget=keep)
        for b in range(4):
            same(build(name)(alone(features, b), budget=keep), tokens, b)
        spoiled = build(name)(padded(features, math.nan), budget=keep)
        assert torch.equal(spoiled.embeddings, tokens.embeddings) and torch.equal(spoiled.source, tokens.source)
    totals = torch.tensor([40, 5, 1, 96])
    tokens = build(name)(features, budget=totals)
    check_contract(tokens, features, totals.tolist())
    for b, keep in enumerate(totals.tolist()):
        same(build(name)(alone(features, b), budget=keep), tokens, b)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_and_blind_to_the_prompt(name):
    features = clips([5])
    torch.manual_seed(1)
    one = build(name)(features, budget=9)
    torch.manual_seed(2)
    other = build(name)(features, budget=9, prompt=["what moves?"])
    assert torch.equal(one.embeddings, other.embeddings) and torch.equal(one.source, other.source)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    features = clips([4])
    half = replace(features, patches=features.patches.to(dtype), keys=features.keys.to(dtype))
    tokens = build(name)(half, budget=10)
    check_contract(tokens, half, [10])
    whole = build(name)(replace(half, patches=half.patches.float(), keys=half.keys.float()), budget=10)
    assert torch.equal(tokens.source, whole.source), "decided in float32"
    torch.testing.assert_close(tokens.embeddings, whole.embeddings.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = build(name)(replace(half, patches=half.patches.float(), keys=half.keys.float()), budget=10)
    assert torch.equal(under.embeddings, whole.embeddings), "autocast changes nothing"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_patches_with_weights_that_sum_to_one(name):
    features = clips([4, 2])
    patches = features.patches.requires_grad_()
    tokens = build(name)(replace(features, patches=patches), budget=11)
    (grad,) = torch.autograd.grad(tokens.embeddings.sum(), patches)
    torch.testing.assert_close(grad.sum((1, 2)), torch.full((2, 8), 11.0))
    assert (grad >= 0).all() and not grad[1, 2:].any()
    if name != "scissor":  # there a representative also counts patches that other tokens took
        assert torch.equal(grad[0, ..., 0].flatten() > 0, tokens.source[0] >= 0)


@pytest.mark.parametrize("name", MEANS)
def test_a_token_is_the_mean_of_its_patches(name):
    features = clips([5])
    tokens, x = build(name)(features, budget=12), features.patches.flatten(1, 2)[0]
    for t in range(12):
        torch.testing.assert_close(tokens.embeddings[0, t], x[tokens.source[0] == t].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equal_patches_are_no_trouble(name):
    features = clips([4])
    for value in (0.0, 1.0):
        flat = replace(features, patches=torch.full_like(features.patches, value), keys=torch.ones(1, 4, 16, 5))
        for keep in (1, 7, 64):
            check_contract(build(name)(flat, budget=keep), flat, [keep])


@pytest.mark.parametrize("name", NAMES)
def test_scale_of_the_patches_decides_nothing(name):
    features = clips([4])
    small = replace(features, patches=features.patches / 64)  # exact in floats
    assert torch.equal(build(name)(features, budget=13).source, build(name)(small, budget=13).source)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_out_of_range_say_so(name):
    features = clips([3, 1])
    for budget, words in ((17, "clip 1 of the batch has 16 patches"), (0, "ask for 1 to"), (-3, "ask for 1 to")):
        with pytest.raises(ValueError, match=words):
            build(name)(features, budget=budget)
    with pytest.raises(ValueError, match="a total for each"):
        build(name)(features, budget=torch.ones(2, 3, dtype=torch.int64))


def test_the_registry():
    with pytest.raises(ValueError, match="'tomme' is unknown; choose one of random, uniform"):
        build("tomme")
    with pytest.raises(ValueError, match="'tome' has no option 'key'; it has keys"):
        build("tome", key=True)
    for name, method in REDUCERS.items():
        text = inspect.getdoc(method.reduce) or ""
        assert "O(" in text, f"{name} names its complexity"
        assert name in ("random", "uniform", "pooling") or "https://arxiv.org/abs/" in text, f"{name} names its paper"
        given = list(inspect.signature(method.reduce).parameters)
        assert given[:4] == ["features", "budget", "prompt", "generator"]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_needs_is_asked_for_by_name(name):
    method, features = REDUCERS[name], clips([3])
    bare = Features(features.patches, features.grid)
    if not (method.layers or method.keys or method.frame):
        build(name)(bare, budget=5)
        return
    with pytest.raises(ValueError, match=f"reducer '{name}' needs the attention"):
        build(name)(bare, budget=5)
    given = {"keys": features.keys, "frame": features.frame}
    asked = {k: v for k, v in given.items() if getattr(method, k)}
    attention = dict(itertools.islice(features.attention.items(), method.layers))
    build(name)(replace(bare, attention=attention, **asked), budget=5)
    for lacking in asked:
        with pytest.raises(ValueError, match=f"reducer '{name}' needs Features.{lacking}"):
            build(name)(replace(bare, attention=attention, **{**asked, lacking: None}), budget=5)
    with pytest.raises(ValueError, match=r"layers? .*\[3"):
        build(name, **{"object_layer" if method.layers == 2 else "layer": 7})(features, budget=5)


def test_times_of_the_frames_that_have_tokens():
    features = clips([8, 1, 3])
    tokens = build("uniform")(features, budget=torch.tensor([32, 16, 48]))
    assert tokens.times[0].tolist() == [[0.5, 0.75], [1.5, 1.75], [0, 0]] and tokens.num_groups.tolist() == [2, 1, 3]
    assert tokens.times[1].tolist() == [[0, 0]] * 3
    assert tokens.times[2].tolist() == [[0, 0.25], [0.25, 0.5], [0.5, 0.75]]
    assert build("evs")(replace(features, times=None), budget=4).times is None


# What they share.


def test_shares():
    total, frames = torch.tensor([7, 3, 1, 12]), torch.tensor([5, 5, 4, 3])
    quota = spread(total, frames, 6)
    assert torch.equal(quota.sum(1), total)
    assert quota[1].tolist() == [1, 0, 1, 0, 1, 0] and quota[2].tolist()[4:] == [0, 0] and quota[3, 3:].sum() == 0
    for row, length in zip(quota, frames):
        assert int(row[:length].max() - row[:length].min()) <= 1
    cap = torch.tensor([[4, 0, 2, 9], [4, 0, 2, 9]])
    got = allocate(torch.tensor([10, 15]), torch.tensor([[1.0, 5.0, 3.0, 1.0], [0, 0, 0, 1]]), cap)
    assert got.tolist() == [[4, 0, 2, 4], [4, 0, 2, 9]]
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        cap = torch.randint(0, 9, (1, 11), generator=draw)
        weight = torch.rand(1, 11, generator=draw) ** 4
        want = torch.randint(0, int(cap.sum()) + 1, (1,), generator=draw)
        got = allocate(want, weight, cap)
        assert int(got.sum()) == int(want) and (got <= cap).all() and (got >= 0).all()


def test_thresholds_leave_enough():
    def count(threshold):
        return torch.stack([(torch.tensor([0.1, 0.2, 0.2, 0.2, 0.7]) <= t).sum() for t in threshold])

    found = lowest_threshold(count, torch.tensor([1, 2, 4, 5]), -1.0, 1.0, steps=20)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.2, 0.2, 0.7]), atol=1e-5, rtol=0)
    assert (count(found) >= torch.tensor([1, 2, 4, 5])).all()


def test_nearest_in_blocks(monkeypatch):
    import vtok.reducers.patches as room

    x, to = torch.randn(2, 9, 4), torch.randn(2, 5, 4)
    bias = -0.5 * to.square().sum(-1)
    value, index = nearest(x, to, bias)
    assert torch.equal(index, torch.cdist(x, to).argmin(-1))
    monkeypatch.setattr(room, "BLOCK", 20)
    torch.testing.assert_close(nearest(x, to, bias)[0], value)
    assert torch.equal(nearest(x, to, bias)[1], index)


def test_labels():
    labels, number = compact(torch.tensor([[4, 0, 4, 0, 2]]), torch.tensor([[True, True, True, True, False]]))
    assert labels.tolist() == [[1, 0, 1, 0, -1]] and number.tolist() == [2]
    best = best_member(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([[0, 0, 0, -1]]), 2)
    assert best.tolist() == [[1, 4]]
