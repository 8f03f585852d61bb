"""Reducers that merge patches, each against a slow version of its own."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_reducers import clips, frames_of

from vtok.reducers import build
from vtok.reducers.clustering import components, peaks
from vtok.reducers.merging import linked, merge_down, pooling_plan, quadtree
from vtok.reducers.patches import Patches
from vtok.reducers.segments import _best_windows
from vtok.types import Features


def partition(labels) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for i, label in enumerate(labels.tolist()):
        groups.setdefault(label, set()).add(i)
    return {frozenset(g) for g in groups.values()}


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
