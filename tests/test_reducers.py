"""Training-free reducers: one contract held by all of them, and each one against a slow version of its own."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vtok.reducers import REDUCERS, build, everything
from vtok.reducers.clustering import components, peaks, plus_plus
from vtok.reducers.merging import linked, merge_down, pooling_plan, quadtree
from vtok.reducers.patches import Patches, allocate, best_member, compact, lowest_threshold, nearest, spread, uniforms
from vtok.reducers.segments import _best_windows
from vtok.reducers.selecting import spread_order
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


# Each against a slow version of its own.


def frames_of(tokens, length) -> torch.Tensor:
    """[K]: the frame of each token of the first clip."""
    return (tokens.positions[0, :, 0] * length).floor().long()


def chosen(tokens, b=0) -> set[int]:
    return set((tokens.source[b] >= 0).nonzero().flatten().tolist())


def partition(labels) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, set()).add(i)
    return {frozenset(g) for g in groups.values()}


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
    assert sorted(spread_order(3, 5).tolist()) == list(range(15)) and int(spread_order(3, 5)[0]) == 7


@pytest.mark.parametrize("keep,cells", [(64, (4, 4, 4)), (8, (2, 2, 2)), (512, (8, 8, 8)), (1, (1, 1, 1))])
def test_pooling_is_average_pooling_where_it_divides(keep, cells):
    features = clips([8], grid=(8, 8))
    video = features.patches[0].unflatten(1, (8, 8)).movedim(-1, 0)[None]
    expected = F.adaptive_avg_pool3d(video, cells)[0].flatten(1).T
    torch.testing.assert_close(build("pooling")(features, budget=keep).embeddings[0], expected)


def test_pooling_cells_are_boxes_of_nearly_one_size():
    for length, h, w, keep in itertools.product((1, 5, 8), (3, 4), (4, 7), (1, 2, 6, 11, 12)):
        plan = pooling_plan(length, h, w, keep).reshape(length, h, w)
        for cell in range(keep):
            t, y, x = (plan == cell).nonzero(as_tuple=True)
            extents = [int(v.max() - v.min()) + 1 for v in (t, y, x)]
            assert len(t) == math.prod(extents), "a box"
        sizes = torch.bincount(plan.flatten())
        assert sizes.numel() == keep and sizes.max() <= 8 * sizes.min()
    assert build("pooling", frames=2)(clips([8]), budget=8).group[0].unique().numel() == 2


def test_tome_one_pass():
    x = F.normalize(clips([3]).patches[0].flatten(0, 1), dim=-1)
    keep = 40  # 8 of 24 pairs
    pairs = []
    for i in range(0, 48, 2):
        likeness = [float(x[i] @ x[j]) for j in range(1, 48, 2)]
        pairs.append((max(likeness), i, 2 * likeness.index(max(likeness)) + 1))
    labels = list(range(48))
    for _, i, j in sorted(pairs, reverse=True)[: 48 - keep]:
        labels[i] = j
    tokens = build("tome")(clips([3]), budget=keep)
    assert partition(tokens.source[0]) == partition(torch.tensor(labels))
    other = build("tome", keys=True)(clips([3]), budget=keep)
    assert partition(other.source[0]) != partition(tokens.source[0])


def test_merging_takes_the_passes_it_needs():
    x = clips([2], grid=(4, 4)).patches.flatten(1, 2)
    labels, start = torch.arange(32)[None], torch.tensor([32])
    twice = merge_down(x, merge_down(x, labels, start, torch.tensor([16])), torch.tensor([16]), torch.tensor([8]))
    assert torch.equal(merge_down(x, labels, start, torch.tensor([8])), twice)


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


def test_kmeans_ends_where_lloyd_cannot_move():
    features = clips([4])
    x, tokens = features.patches[0].flatten(0, 1), build("kmeans", iterations=100)(clips([4]), budget=9)
    assert torch.equal(torch.cdist(x, tokens.embeddings[0]).argmin(1), tokens.source[0])
    spread_of = [(x - build(n)(features, budget=9).embeddings[0][build(n)(features, budget=9).source[0]]).square().sum()
                 for n in ("kmeans", "pooling")]  # fmt: skip
    assert spread_of[0] < 0.8 * spread_of[1]
    rounds = build("kmeans", cosine=True, iterations=100)(features, budget=9)
    direction = F.normalize(x, dim=-1)
    centres = torch.stack([F.normalize(direction[rounds.source[0] == t].mean(0), dim=0) for t in range(9)])
    assert torch.equal((direction @ centres.T).argmax(1), rounds.source[0])


def blobs(number: int, each: int) -> torch.Tensor:
    """[number * each, 8] in a random order, tight clusters far apart; and to which each belongs."""
    belongs = torch.arange(number).repeat_interleave(each)[torch.randperm(number * each)]
    centres = 5 * F.normalize(torch.randn(number, 8), dim=-1)
    return centres[belongs] + 0.05 * torch.randn(number * each, 8), belongs


@pytest.mark.parametrize("name", ["kmeans", "dpc_knn", "scissor"])
def test_clusterers_find_clusters(name):
    x, belongs = blobs(6, 8)
    tokens = build(name)(Features(x.reshape(1, 3, 16, 8), (4, 4)), budget=6)
    assert partition(tokens.source[0]) == partition(belongs)


def test_kmeans_plus_plus_draws_by_squared_distance():
    x = torch.tensor([[[0.0], [1.0], [3.0]]])
    drawn = torch.tensor([[0.0, 0.05], [0.0, 0.15]])  # second centre: 1 with chance 0.1, 2 with chance 0.9
    assert plus_plus(x.expand(2, -1, -1), torch.ones(2, 3, dtype=torch.bool), drawn).tolist() == [[0, 1], [0, 2]]
    repeated = plus_plus(torch.ones(1, 5, 2), torch.ones(1, 5, dtype=torch.bool), torch.rand(1, 5))
    assert sorted(repeated[0].tolist()) == list(range(5)), "equal vectors are drawn once each"


def test_density_peaks():
    x = torch.randn(2, 17, 3)
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[1, 12:] = False
    density, score = peaks(x, valid, 4)
    for s, size in enumerate((17, 12)):
        away = (x[s, :size, None] - x[s, None, :size]).square().sum(-1) / 3
        rho = [math.exp(-float(away[i][torch.arange(size) != i].sort().values[:4].mean())) for i in range(size)]
        torch.testing.assert_close(density[s, :size], torch.tensor(rho))
        for i in range(size):
            denser = [float(away[i, j]) ** 0.5 for j in range(size) if rho[j] > rho[i]]
            delta = min(denser) if denser else float(away[i].max()) ** 0.5
            assert math.isclose(float(score[s, i]), rho[i] * delta, rel_tol=1e-4)
    assert score[1, 12:].isinf().all()


def test_components_against_a_walk():
    linked_ = torch.rand(3, 20, 20) < 0.06
    linked_ = linked_ | linked_.transpose(1, 2)
    linked_[2] = torch.diag(torch.ones(19), 1) > 0  # one long chain
    linked_[2] |= linked_[2].T.clone()
    for graph, labels in zip(linked_, components(linked_)):
        for start in range(20):
            seen, todo = {start}, [start]
            while todo:
                for j in graph[todo.pop()].nonzero().flatten().tolist():
                    if j not in seen:
                        seen.add(j)
                        todo.append(j)
            assert int(labels[start]) == min(seen)


def test_scissor_tokens_are_representatives_with_what_is_like_them():
    x, belongs = blobs(4, 8)
    tokens = build("scissor")(Features(x.reshape(1, 2, 16, 8), (4, 4)), budget=4)
    for t in range(4):
        own = x[tokens.source[0] == t]
        torch.testing.assert_close(tokens.embeddings[0, t], (own.sum(0) + own.mean(0)) / (len(own) + 1))


def slow_quadtree(x, tau, gap):
    """Labels [T, h, w] of video x [T, h, w, D], by recursion over cells and over all pairs of leaves."""
    frames, sides = len(x), [[list(range(size + 1))] for size in x.shape[1:3]]
    while min(len(s[-1]) for s in sides) - 1 > 2:
        for bounds in sides:
            fine = bounds[-1]
            bounds.append(fine[::2] if len(fine) % 2 else [fine[0], *fine[1::2]])  # of an odd number the first is alone

    def boxes(level, a, b, c, d):
        rows, columns = ([e for e in s[level] if low <= e <= high] for s, low, high in zip(sides, (a, c), (b, d)))
        return [(*r, *k) for r in itertools.pairwise(rows) for k in itertools.pairwise(columns)]

    def mean(t, a, b, c, d):
        return x[t, a:b, c:d].mean((0, 1))

    def split(t, level, *cell):
        if level:
            children = boxes(level - 1, *cell)
            if min(F.cosine_similarity(mean(t, *cell), mean(t, *child), dim=0) for child in children) < tau:
                return [leaf for child in children for leaf in split(t, level - 1, *child)]
        return [(t, *cell)]

    top = len(sides[0]) - 1
    whole = boxes(top, 0, x.shape[1], 0, x.shape[2])
    leaves = [leaf for t in range(frames) for box in whole for leaf in split(t, top, *box)]
    joined = list(range(len(leaves)))
    for (i, (s, *one)), (j, (t, *two)) in itertools.permutations(enumerate(leaves), 2):
        overlap = one[0] < two[1] and two[0] < one[1] and one[2] < two[3] and two[2] < one[3]
        if t == s + 1 and overlap and F.cosine_similarity(mean(s, *one), mean(t, *two), dim=0) >= tau - gap:
            joined = [joined[i] if k == joined[j] else k for k in joined]
    labels = torch.zeros(x.shape[:3], dtype=torch.int64)
    for label, (t, a, b, c, d) in zip(joined, leaves):
        labels[t, a:b, c:d] = label
    return labels


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (8, 6)])
def test_quadtrees_against_recursion(grid):
    features = clips([3], grid=grid, seed=sum(grid))
    p, found = Patches.of(features, 1), []
    for tau, gap in ((0.75, 0.3), (0.8, 0.05), (0.6, 0.0)):
        wanted = slow_quadtree(features.patches[0].unflatten(1, grid), tau, gap)
        labels, number = linked(p, *quadtree(p), torch.tensor([tau]), gap)
        assert partition(labels[0]) == partition(wanted.flatten()) and int(number) == wanted.unique().numel()
        found.append(int(number))
    assert len(set(found)) > 1 and min(found) < 0.9 * len(p.index)


def test_sttm_merges_what_neither_varies_nor_moves():
    quarter = torch.eye(4)[torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])].flatten(0, 1)
    tokens = build("sttm")(Features(quarter.expand(1, 5, -1, -1), (4, 4)), budget=4)
    torch.testing.assert_close(tokens.embeddings[0], torch.eye(4))
    assert tokens.mass[0].tolist() == [20] * 4 and frames_of(tokens, 5).tolist() == [2] * 4


def test_apet_keeps_the_basis_and_what_it_explains_worst():
    features = clips([3], dim=16)
    x = features.patches[0].flatten(0, 1)
    away, basis = (x - x.mean(0)).norm(dim=-1), []
    for _ in range(4):
        basis.append(int(away.argmax()))
        new = (x - x[basis[-1]]).norm(dim=-1)
        away = new if len(basis) == 1 else torch.minimum(away, new)
    fit = torch.linalg.lstsq(x[basis].T, x.T).solution.T @ x[basis]
    error = (x - fit).norm(dim=-1)
    worst = [i for i in error.argsort(descending=True).tolist() if i not in basis][:8]
    tokens = build("apet", basis=4)(features, budget=12)
    for i in range(48):
        if i not in worst and i not in basis:
            like = F.cosine_similarity(x[i], x[worst], dim=-1)
            assert tokens.source[0, i] == tokens.source[0, worst[int(like.argmax())]]
    assert len({int(tokens.source[0, i]) for i in basis + worst}) == 12
    assert all(tokens.mass[0, tokens.source[0, i]] == 1 for i in basis)


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


def test_prunevid_makes_one_of_what_stands_still():
    """Half of each frame stands still within two scenes: it costs one token a place and scene."""
    still = 4 * torch.randn(2, 1, 8, 8).repeat_interleave(4, 0)[:, 0]  # [8, 8, 8]: two scenes of four frames
    noise = torch.randn(8, 8, 8)
    x = torch.cat([still, noise], 1)[None]
    tokens = build("prunevid", segment_ratio=0.25, threshold=0.9)(Features(x, (4, 4)), budget=16 + 64)
    source = tokens.source[0].reshape(8, 16)
    for scene in (source[:4], source[4:]):
        assert (scene[:, :8] == scene[:1, :8]).all() and scene[0, :8].unique().numel() == 8
    assert (tokens.mass == 4).sum() == 16 and (tokens.mass == 1).sum() == 64
    fewer = build("prunevid", segment_ratio=0.25, threshold=0.9)(Features(x, (4, 4)), budget=20)
    parts = {(s, 0) for s in range(2)} | {(f, 1) for f in range(8)}
    found = set()
    for t in range(20):
        own = (fewer.source[0] == t).nonzero().flatten()
        kinds = {(int(i) // 64, 0) if int(i) % 16 < 8 else (int(i) // 16, 1) for i in own}
        assert len(kinds) == 1, "no cluster reaches over parts"
        found |= kinds
    assert found == parts


def test_prunevid_weighs_a_still_place_once():
    still = torch.randn(1, 1, 16, 8).repeat(1, 4, 1, 1)
    tokens = build("prunevid")(Features(still, (4, 4)), budget=1)
    torch.testing.assert_close(tokens.embeddings[0, 0], still[0, 0].mean(0))
    half = torch.cat([still[:, :, :8], torch.randn(1, 4, 8, 8)], 2)
    tokens = build("prunevid", segment_ratio=0.25)(Features(half, (4, 4)), budget=1)
    assert int(tokens.mass.sum()) == 64
    torch.testing.assert_close(tokens.embeddings[0, 0], (still[0, 0, :8].sum(0) + half[0, :, 8:].sum((0, 1))) / 40)


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_holitom_windows_are_the_best_of_all(frames):
    alike = torch.rand(3, frames - 1, 6)
    segment, still, total = _best_windows(alike, torch.tensor([0.3, 0.5, 0.7]))
    for b, tau in enumerate((0.3, 0.5, 0.7)):
        best = 0
        for cuts in itertools.product((False, True), repeat=frames - 1):
            edges = [0, *[i + 1 for i, cut in enumerate(cuts) if cut], frames]
            inside = [(alike[b, i : j - 1] > tau).all(0).sum() * (j - i - 1) for i, j in itertools.pairwise(edges)]
            best = max(best, int(sum(inside)))
        assert int(total[b]) == best
        edges = [*segment[b].unique().tolist(), frames]
        saved = 0
        for i, j in itertools.pairwise(edges):
            static = (alike[b, i : j - 1] > tau).all(0) if j > i + 1 else torch.zeros(6, dtype=torch.bool)
            assert torch.equal(still[b, i:j], static.expand(j - i, -1))
            saved += int(static.sum()) * (j - i - 1)
        assert saved == best


def test_holitom_keeps_still_places_and_what_moves_by_attention():
    still = torch.randn(1, 1, 8, 8).repeat(1, 4, 1, 1)
    x = torch.cat([still, torch.randn(1, 4, 8, 8)], 2)
    features = replace(clips([4]), patches=x)
    tokens = build("holitom", threshold=0.99)(features, budget=8 + 16)
    # 8 static and 32 moving survivors share 24 tokens: 4.8 and 4.8 a frame
    source, moving = tokens.source[0].reshape(4, 16), features.attention[3][0, :, 8:]
    kept = [(source[t, 8:] >= 0).sum().item() for t in range(4)]
    number = 24 - sum(kept)
    assert number in (4, 5) and set(kept) <= {4, 5} and (source[:, :8] == source[:1, :8]).all()
    for t in range(4):
        assert set((source[t, 8:] >= 0).nonzero().flatten().tolist()) == set(
            moving[t].argsort(descending=True)[: kept[t]].tolist()
        )
    for t in source[0, :8].unique().tolist():
        own, token = still[0, 0, source[0, :8] == t], tokens.embeddings[0, t]
        if len(own) > 1:  # some member is the centre: 0.6 of it and 0.4 of the others' mean
            guesses = [0.6 * own[i] + 0.4 * (own.sum(0) - own[i]) / (len(own) - 1) for i in range(len(own))]
            assert min(float((g - token).abs().max()) for g in guesses) < 1e-5


def test_fastvid_keeps_the_salient_and_merges_into_anchors():
    features = clips([8], dim=16)
    tokens = build("fastvid", segments=2, threshold=-2.0)(features, budget=40)
    received, frame = features.attention[3][0], F.normalize(features.frame[0], dim=-1)
    cut = int((frame[1:] * frame[:-1]).sum(-1).argmin()) + 1
    source = tokens.source[0].reshape(8, 16)
    salient = {(t, int(i)) for t in range(8) for i in received[t].argsort(descending=True)[:3]}
    for t, i in salient:
        assert tokens.mass[0, source[t, i]] == 1 and torch.equal(
            tokens.embeddings[0, source[t, i]], features.patches[0, t, i]
        )
    assert (source >= 0).all()
    anchors = {t for t in range(8) if ((cut if t < cut else 8) - 1 - t) % 4 == 0}
    heads = []
    for token in set(range(40)) - {int(source[t, i]) for t, i in salient}:
        members = (source == token).nonzero().tolist()
        assert len({t < cut for t, _ in members}) == 1, "no token reaches over the cut"
        own = torch.stack([features.patches[0, t, i] for t, i in members])
        for head in range(len(own)):
            others = (own.sum(0) - own[head]) / max(1, len(own) - 1)
            guess = own[head] if len(own) == 1 else 0.6 * own[head] + 0.4 * others
            if (guess - tokens.embeddings[0, token]).abs().max() < 1e-5:
                heads.append(tuple(members[head]))
    assert len(heads) == 16 and {t for t, _ in heads} <= anchors
    x = F.normalize(features.patches[0], dim=-1)
    for t, i in itertools.product(range(8), range(16)):
        if (t, i) not in salient and (t, i) not in heads:
            near = [h for h in heads if (h[0] < cut) == (t < cut)]
            best = max(near, key=lambda h: float(x[t, i] @ x[h]))
            assert source[t, i] == source[best]


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
