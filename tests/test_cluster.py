"""k-means of many sets at once: against plain code one set at a time, and the laws that batches and padding keep."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.cluster import _seeds, absorb, first_member, kmeans, pool
from vtok.layers.ward import CRITERIA, adaptive_kmeans, ward


def blobs(count: int, each: int, dim: int = 6, *, spread: float = 0.05, seed: int = 0) -> Tensor:
    """[count * each, dim]: well separated groups, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, dim, generator=generator)
    while count > 1 and float(torch.pdist(F.normalize(centres, dim=1)).min()) < 0.7:
        centres = torch.randn(count, dim, generator=generator)
    return (centres[:, None] + spread * torch.randn(count, each, dim, generator=generator)).flatten(0, 1)


def lloyd(x: Tensor, centres: Tensor) -> float:
    """Inertia of plain Lloyd iterations of one set, from given centres."""
    while True:
        labels = ((x[:, None] - centres) ** 2).sum(-1).argmin(1)
        moved = torch.stack([x[labels == k].mean(0) if (labels == k).any() else c for k, c in enumerate(centres)])
        if torch.equal(moved, centres):
            return float((x - centres[labels]).square().sum())
        centres = moved


def same_partition(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


def brute_force(x: Tensor, count: int) -> float:
    """The lowest inertia of all partitions into `count` clusters."""
    labels = torch.cartesian_prod(*[torch.arange(count)] * len(x))
    member = F.one_hot(labels, count).to(x).transpose(1, 2)  # [partitions, count, n]
    member = member[(member.sum(2) > 0).all(1)]
    centres = member @ x / member.sum(2, keepdim=True)
    return float((x.square().sum() - (centres.square().sum(2) * member.sum(2)).sum(1)).min())


@pytest.mark.parametrize("init", ["kmeans++", "farthest"])
def test_as_good_as_lloyd_from_many_starts(init):
    x = torch.randn(1, 120, 5, dtype=torch.float64)
    got = kmeans(x, 6, metric="euclidean", init=init, tolerance=0.0, iterations=300)
    starts = [lloyd(x[0], x[0][torch.randperm(120)[:6]]) for _ in range(20)]
    assert float(got.inertia[0]) <= sorted(starts)[len(starts) * 3 // 4]  # one start of ours beats most of theirs
    # a fixed point: plain iterations from its centres gain nothing, and its own numbers are right
    assert lloyd(x[0], got.centres[0]) == pytest.approx(float(got.inertia[0]), rel=1e-9)
    parts = [x[0][got.labels[0] == k] for k in range(6)]
    assert torch.allclose(got.centres[0], torch.stack([p.mean(0) for p in parts]))
    assert got.mass[0].tolist() == [len(p) for p in parts]
    assert float(got.inertia[0]) == pytest.approx(sum(float((p - p.mean(0)).square().sum()) for p in parts))


def test_finds_the_best_partition_of_a_few():
    x = torch.randn(20, 8, 2, dtype=torch.float64)
    settings = dict(metric="euclidean", trials=1)  # one trial alone: chance decides more
    runs = [kmeans(x, 3, generator=torch.Generator().manual_seed(seed), **settings) for seed in range(20)]
    got = torch.stack([run.inertia for run in runs])
    best = torch.tensor([brute_force(one, 3) for one in x], dtype=torch.float64)
    assert bool((got >= best - 1e-9).all()) and bool((got <= 4 * best).all())
    assert int((got.amin(0) < best + 1e-9).sum()) >= 17


def test_agrees_with_scipy_from_the_same_centres():
    from scipy.cluster.vq import kmeans2

    x = torch.randn(2, 90, 4, dtype=torch.float64)
    got = kmeans(x, 5, metric="euclidean", centres=x[:, :5], tolerance=0.0, iterations=300)
    for row in range(2):
        centres, labels = kmeans2(x[row].numpy(), x[row, :5].numpy(), iter=300, minit="matrix")
        assert got.labels[row].tolist() == labels.tolist()
        assert torch.allclose(got.centres[row], torch.from_numpy(centres))


def test_cosine_compares_directions_alone():
    x = blobs(4, 20)
    scaled = x * (torch.rand(80, 1) * 9 + 0.5)
    a, b = kmeans(x[None], 4), kmeans(scaled[None], 4)
    assert same_partition(a.labels[0], b.labels[0]) and same_partition(a.labels[0], torch.arange(80) // 20)
    unit = F.normalize(x, dim=1)
    expected = torch.stack([unit[a.labels[0] == k].mean(0) for k in range(4)])
    assert torch.allclose(a.centres[0], expected, atol=1e-6)
    cosine = (unit * F.normalize(a.centres[0], dim=1)[a.labels[0]]).sum(1)
    assert float(a.inertia[0]) == pytest.approx(float((2 - 2 * cosine).sum()), rel=1e-3)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("init", ["kmeans++", "farthest"])
def test_batched_as_one_by_one_whatever_pads(metric, init):
    """Sets of other sizes and numbers of clusters, and the values in the padding, change nothing."""
    sizes, counts = [40, 25, 33, 7], torch.tensor([5, 8, 1, 7])
    x, mask = torch.full((4, 40, 6), float("nan")), torch.zeros(4, 40, dtype=torch.bool)
    for row, size in enumerate(sizes):
        x[row, :size], mask[row, :size] = torch.randn(size, 6), True
    x[0, 2] = x[0, 9]
    settings = dict(metric=metric, init=init)
    together = kmeans(x, counts, mass=mask, **settings)
    assert together.lengths.tolist() == counts.tolist()
    for row, size in enumerate(sizes):
        count = int(counts[row])
        alone = kmeans(x[row : row + 1, :size], count, **settings)
        assert same_partition(alone.labels[0], together.labels[row, :size])
        assert bool((together.labels[row, size:] == -1).all())
        assert torch.allclose(alone.mass[0].sort()[0], together.mass[row, :count].sort()[0])
        assert float(alone.inertia[0]) == pytest.approx(float(together.inertia[row]), abs=1e-4)
        assert bool((together.centres[row, count:] == 0).all()) and bool((together.mass[row, :count] > 0).all())


def test_the_same_each_time_and_chance_is_the_generators():
    x = torch.randn(3, 200, 8)
    first, again = kmeans(x, 12), kmeans(x, 12)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    torch.manual_seed(5)
    assert torch.equal(kmeans(x, 12).labels, first.labels)  # not the global generator
    other = kmeans(x, 12, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.labels, first.labels)
    one = kmeans(x, 12, init="farthest", generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.labels, kmeans(x, 12, init="farthest").labels)


def test_sets_may_have_chances_of_their_own():
    """The second seed of 0, 1, 3 is 1 with chance 0.1 and 3 with chance 0.9; seeds decide what is found here."""
    x = torch.tensor([[[0.0], [1.0], [3.0]]]).expand(2, -1, -1)
    chance = torch.tensor([[0.0, 0.05], [0.0, 0.15]], dtype=torch.float64)[..., None]
    assert _seeds(x, torch.ones(2, 3), 2, init="kmeans++", chance=chance)[..., 0].tolist() == [[0, 1], [0, 3]]
    found = kmeans(x, 2, metric="euclidean", chance=chance, iterations=1).labels
    alone = [kmeans(x[:1], 2, metric="euclidean", chance=chance[row, None], iterations=1).labels for row in (0, 1)]
    assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("init", ["kmeans++", "farthest"])
def test_as_many_clusters_as_asked_where_few_vectors_are_distinct(init):
    still = torch.randn(1, 1, 4).expand(1, 30, 4)
    two = torch.cat([still[:, :20], -still[:, :10]], 1)
    for x in (still, two):
        for metric in ("cosine", "euclidean"):
            got = kmeans(x, 7, metric=metric, init=init)
            assert got.mass.shape == (1, 7) and bool((got.mass > 0).all()) and float(got.mass.sum()) == 30
            assert got.labels.unique().tolist() == list(range(7)) and float(got.inertia) < 1e-4
    got = kmeans(two, 7, init=init).labels[0]
    assert not set(got[:20].tolist()) & set(got[20:].tolist())  # no cluster holds both


def test_every_vector_its_own_cluster():
    x = torch.randn(2, 9, 3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert kmeans(x, 9).labels.tolist() == [list(range(9))] * 2
    mask[1, 6:] = False
    got = kmeans(x, torch.tensor([4, 6]), mass=mask)
    assert got.labels[1, :6].unique().numel() == 6 and float(got.inertia[1]) < 1e-6


def test_mass_counts_as_copies():
    x = torch.randn(1, 30, 4, dtype=torch.float64)
    copies = torch.randint(1, 4, (30,))
    many = x[0].repeat_interleave(copies, 0)[None]
    centres = x[:, :4]
    a = kmeans(x, 4, mass=copies[None], metric="euclidean", centres=centres, tolerance=0.0)
    b = kmeans(many, 4, metric="euclidean", centres=centres, tolerance=0.0)
    assert torch.equal(a.labels[0].repeat_interleave(copies), b.labels[0])
    assert torch.allclose(a.centres, b.centres) and torch.allclose(a.inertia, b.inertia)


def test_autocast_and_offsets_do_not_blur_distances():
    x = blobs(5, 20, spread=0.01)[None]
    plain = kmeans(x, 5, metric="euclidean").labels
    assert same_partition(plain[0], kmeans(x + 300.0, 5, metric="euclidean").labels[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kmeans(x, 5, metric="euclidean")
    assert torch.equal(got.labels, plain) and got.centres.dtype == torch.float32


def test_pool_sums_members_in_chunks_and_has_their_gradient(monkeypatch):
    from vtok.layers import cluster

    values = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    labels, mass = torch.randint(-1, 4, (2, 11)), torch.rand(2, 11, dtype=torch.float64)
    whole = pool(values, labels, 4, mass=mass)
    expected = torch.zeros(2, 4, 3, dtype=torch.float64)
    for b, i in itertools.product(range(2), range(11)):
        if labels[b, i] >= 0:
            expected[b, labels[b, i]] += values[b, i].detach() * mass[b, i]
    assert torch.allclose(whole, expected)
    monkeypatch.setattr(cluster, "CELLS", 12)
    assert torch.allclose(pool(values, labels, 4, mass=mass), expected)
    whole.sum().backward()
    weight = torch.where(labels >= 0, mass, 0)
    assert torch.allclose(values.grad, weight[..., None].expand(-1, -1, 3))
    lowest = [[min([i for i in range(11) if labels[b, i] == k], default=11) for k in range(4)] for b in range(2)]
    assert first_member(labels, 4).tolist() == lowest


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_chunks_change_nothing(metric, monkeypatch):
    from vtok.layers import cluster

    x = torch.randn(2, 50, 4, dtype=torch.float64)
    whole = kmeans(x, 6, metric=metric)
    monkeypatch.setattr(cluster, "CELLS", 42)
    assert torch.equal(kmeans(x, 6, metric=metric).labels, whole.labels)


def test_tree_has_the_exact_sums_of_squares():
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    leaves = kmeans(x, torch.tensor([8, 5]), metric="euclidean")
    tree = ward(leaves.centres, leaves.mass, leaves.lengths, leaves.inertia)
    for row, count in enumerate((8, 5)):
        for k in range(1, count + 1):
            labels = tree.labels[row, k][leaves.labels[row]]
            assert labels.unique().numel() == k
            parts = [x[row][labels == one] for one in labels.unique()]
            assert float(tree.within[row, k]) == pytest.approx(
                sum(float((p - p.mean(0)).square().sum()) for p in parts), rel=1e-9
            )
            if k < count:  # the cheapest union of the partition before
                before = tree.labels[row, k + 1][leaves.labels[row]]
                costs = []
                for a, b in itertools.combinations(before.unique().tolist(), 2):
                    p, q = x[row][before == a], x[row][before == b]
                    costs.append(len(p) * len(q) / (len(p) + len(q)) * float((p.mean(0) - q.mean(0)).square().sum()))
                rise = float(tree.within[row, k] - tree.within[row, k + 1])
                assert rise == pytest.approx(min(costs), rel=1e-7)
    assert bool(tree.within[1, 6:].isinf().all())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_adaptive_finds_the_groups_there_are(criterion, metric):
    """Between 2 and 9 groups, in one batch, each its own K: nothing of it is a floor or a fixed offset."""
    counts = [2, 3, 5, 9]
    truth = torch.stack([torch.arange(90) * k // 90 for k in counts])
    x = torch.eye(12)[truth] + 0.04 * torch.randn(4, 90, 12)
    got = adaptive_kmeans(x, 16, least=1, criterion=criterion, share=0.95, metric=metric)
    assert got.lengths.tolist() == counts
    for row, k in enumerate(counts):
        assert same_partition(got.labels[row], truth[row])
        alone = adaptive_kmeans(x[row : row + 1], 16, criterion=criterion, share=0.95, metric=metric)
        assert int(alone.lengths) == k and same_partition(alone.labels[0], got.labels[row])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_adaptive_keeps_its_bounds(criterion):
    x = torch.stack([blobs(3, 20, dim=8), torch.randn(60, 8), torch.randn(1, 8).expand(60, 8)])
    got = adaptive_kmeans(x, 10, least=5, criterion=criterion)
    assert bool(((got.lengths >= 5) & (got.lengths <= 10)).all()) and int(got.lengths[2]) == 5
    assert bool(((got.mass > 0).sum(1) == got.lengths).all())
    few = adaptive_kmeans(x, torch.tensor([2, 10, 1]), least=5, criterion=criterion)
    assert few.lengths[[0, 2]].tolist() == [2, 1] and 5 <= int(few.lengths[1]) <= 10
    assert adaptive_kmeans(x[2:], 10, criterion=criterion).lengths.tolist() == [1]


def test_variance_criterion_keeps_its_promise():
    x = torch.randn(4, 80, 5) * torch.tensor([0.1, 1.0, 2.0, 5.0])[:, None, None] + 1
    total = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    counts = []
    for share in (0.3, 0.6, 0.8):
        got = adaptive_kmeans(x, 40, share=share, criterion="variance", metric="euclidean")
        assert bool((1 - got.inertia / total >= share - 1e-5).all())
        counts.append(got.lengths)
    assert bool((counts[0] < counts[1]).all() and (counts[1] < counts[2]).all())


def test_silhouette_is_the_real_one():
    """Against the definition, with squared distances to each member."""
    from vtok.layers import ward as module

    x = torch.randn(1, 24, 3, dtype=torch.float64)
    leaves = kmeans(x, 6, metric="euclidean")
    own = leaves.centres[0][leaves.labels[0]]
    spread = (x[0] - own).square().sum(-1)[None]
    tree = ward(leaves.centres, leaves.mass, leaves.lengths, spread.sum(1))
    got = module._silhouettes(x, leaves, spread, tree)[0]
    gap = torch.cdist(x[0], x[0]).square()
    for k in range(2, 7):
        labels, values = tree.labels[0, k][leaves.labels[0]], []
        for i in range(24):
            mates = (labels == labels[i]).sum()
            if mates == 1:
                values.append(0.0)
                continue
            inner = gap[i][labels == labels[i]].sum() / (mates - 1)
            outer = min(gap[i][labels == other].mean() for other in labels.unique() if other != labels[i])
            values.append(float((outer - inner) / max(inner, outer)))
        assert float(got[k]) == pytest.approx(sum(values) / 24, abs=1e-9)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_memory_of_a_stream(restart, metric):
    x = blobs(5, 40, spread=0.02)[torch.randperm(200)][None]
    values = torch.cat([x, torch.ones(1, 200, 1)], 2)
    memory, where = None, torch.full((1, 0), -1)
    for start in range(0, 200, 30):
        part = slice(start, min(start + 30, 200))
        held = 0 if memory is None else memory.mass.shape[1]
        mask = torch.ones(1, part.stop - start, dtype=torch.bool)
        memory, labels = absorb(
            memory, x[:, part], values[:, part], 5, mask=mask, start=start, metric=metric, restart=restart
        )
        where = torch.cat([labels[:, :held].gather(1, where) if held else where, labels[:, held:]], 1)
        assert memory.mass.shape[1] <= 5  # constant, however long
    assert float(memory.mass.sum()) == 200 and torch.allclose(memory.values[..., -1], memory.mass)
    assert torch.allclose(memory.values, pool(values, where, 5), atol=1e-4)  # sums are those of who went there
    assert memory.first.tolist() == first_member(where, 5).tolist()
    if restart:
        assert same_partition(where[0], kmeans(x, 5, metric=metric).labels[0])


def test_late_comers_find_a_cluster_where_the_memory_restarts():
    """A scene that only begins when the memory is full: new seeds separate it, old centres must take it in."""
    early, late = blobs(4, 30, spread=0.1), blobs(2, 15, spread=0.01, seed=9) * 3
    mask = torch.ones(1, 30, dtype=torch.bool)
    found = {}
    for restart in (True, False):
        memory, _ = absorb(None, early[None], early[None], 6, mask=torch.ones(1, 120, dtype=torch.bool))
        memory, labels = absorb(memory, late[None], late[None], 6, mask=mask, start=120, restart=restart)
        found[restart] = memory, labels[0, 6:]
    memory, labels = found[True]
    assert same_partition(labels, torch.arange(30) // 15) and set(memory.mass[0][labels.unique()].tolist()) == {15.0}
    still, _ = absorb(found[False][0], late[None], late[None], 6, mask=torch.zeros(1, 30, dtype=torch.bool), start=150)
    assert all(torch.equal(a, b) for a, b in zip(still, found[False][0]))  # nothing new: nothing moves


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: kmeans(x, 4, metric="manhattan"), "metric='manhattan'"),
        (lambda x: kmeans(x, 4, init="random"), "init='random'"),
        (lambda x: kmeans(x, 9), r"count=\[9, 9\] clusters are asked of sets with \[8, 8\]"),
        (lambda x: kmeans(x, torch.tensor([0, 3])), r"count=\[0, 3\]"),
        (lambda x: kmeans(x, torch.tensor([2])), "expected one number for each of 2 sets"),
        (lambda x: kmeans(x, 3, centres=x[:, :2]), r"centres are \[2, 2, 3\], expected \[2, 3, 3\]"),
        (lambda x: adaptive_kmeans(x, 3, criterion="gap"), "criterion='gap'"),
        (lambda x: adaptive_kmeans(x, 3, share=0.0), "share=0.0"),
        (lambda x: adaptive_kmeans(x, 3, least=0), "least=0"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 8, 3))
