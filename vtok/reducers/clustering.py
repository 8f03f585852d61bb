"""Reducers that group the patches of a clip wherever they lie: k-means, density peaks, connected components.

Letters: B clips, T frames, N patches of a frame, n = T * N, D width, K tokens of the clip that gets most, S sets of m
vectors.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from vtok.layers.cluster import kmeans as clusters
from vtok.reducers.merging import merge_down
from vtok.reducers.patches import (
    BLOCK,
    Patches,
    best_member,
    compact,
    deciding,
    lowest_threshold,
    means,
    nearest,
    top,
    uniforms,
    unit,
)
from vtok.types import Budget, Features, Tokens


def kmeans(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    iterations: int = 10,
    cosine: bool = False,
    seed: int | Tensor = 0,
) -> Tokens:
    """Means of K clusters over the whole clip (`vtok.layers.cluster`). O(n K D iterations).

    Cluster aggregation as in Omri et al. 2025 (Token Sequence Compression, https://arxiv.org/abs/2504.17892): Lloyd's
    iterations from k-means++ centres, at squared Euclidean distance, or of directions with `cosine` (spherical
    k-means). Chance as in `random`: from the generator, else `seed`.
    """
    if iterations < 1:
        raise ValueError(f"reducer 'kmeans': iterations={iterations} must be 1 at least")
    with deciding(features):
        p = Patches.of(features, budget)
        drawn = uniforms(generator, len(p.vectors), p.most, seed=seed, like=p.vectors)[..., None]
        labels = clusters(
            p.vectors, p.keep, mass=p.valid, metric="cosine" if cosine else "euclidean", chance=drawn,
            iterations=iterations, tolerance=0.0,
        ).labels  # fmt: skip
    return p.merged(labels)


def peaks(x: Tensor, valid: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Density of each vector, and density times distance to the nearest denser one (of equals the earlier is denser).

    density = exp(-mean squared distance to the `neighbours` nearest others / D); the densest is given the distance to
    the farthest. -inf where not valid. x [S, m, D] -> two [S, m]. O(m^2 D) time, memory in blocks.
    """
    sets, size, dim = x.shape
    itself, squares = torch.arange(size, device=x.device), x.square().sum(-1)
    blocks = itself.split(max(1, BLOCK // max(1, sets * size)))

    def squared(rows: Tensor) -> Tensor:
        out = torch.baddbmm(squares[:, rows, None] + squares[:, None], x[:, rows], x.transpose(1, 2), alpha=-2)
        return out.clamp_(min=0).div_(dim)

    density = []
    for rows in blocks:
        away = squared(rows).masked_fill(~valid[:, None], torch.inf)
        away[:, torch.arange(len(rows), device=x.device), rows] = torch.inf
        near = away.topk(min(neighbours, size), dim=-1, largest=False).values
        real = near.isfinite()
        mean = near.masked_fill(~real, 0).sum(-1) / real.sum(-1).clamp(min=1)
        density.append(torch.exp(-mean))
    dense = torch.cat(density, 1).masked_fill(~valid, -torch.inf)
    apart = []
    for rows in blocks:
        away = squared(rows).sqrt_()
        mine, others = dense[:, rows, None], dense[:, None]
        denser = (others > mine) | ((others == mine) & (itself < rows[:, None]))
        far = away.masked_fill(~valid[:, None], 0).amax(-1)
        near = away.masked_fill(~denser, torch.inf).amin(-1)
        apart.append(torch.where(near.isinf(), far, near))
    return dense, (dense * torch.cat(apart, 1)).masked_fill(~valid, -torch.inf)


def level(p: Patches) -> Tensor:
    """[B, n, D]: the vectors with a root mean square of 1 over the clip, so that densities do not depend on a scale."""
    energy = p.vectors.square().sum((1, 2)) / (p.valid.sum(1) * p.vectors.shape[-1])
    return p.vectors / energy.sqrt().clamp(min=1e-12)[:, None, None]


def dpc_knn(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    neighbours: int = 5,
) -> Tokens:
    """Means around K density peaks over the whole clip. O(n^2 D).

    Density-peaks clustering with k nearest neighbours (Du et al. 2016), for tokens as in TCFormer (Zeng et al. 2022,
    https://arxiv.org/abs/2204.08680): the centres are the patches with the largest density times distance to a denser
    one, the others join the nearest centre. Here distances are measured after scaling a clip to a root mean square of
    1, and ties go to the earlier patch, where the common implementation adds noise.
    """
    if neighbours < 1:
        raise ValueError(f"reducer 'dpc_knn': neighbours={neighbours} must be 1 at least")
    with deciding(features):
        p = Patches.of(features, budget)
        x = level(p)
        score = peaks(x, p.valid, neighbours)[1]
        centre = top(score, p.keep)
        order = p.picks(centre)
        to = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        bias = (-0.5 * to.square().sum(-1)).masked_fill(~centre.gather(1, order), -torch.inf)
        labels = torch.where(centre, centre.cumsum(1) - 1, nearest(x, to, bias)[1])
    return p.merged(labels.masked_fill(~p.valid, -1), score=score.gather(1, order))


def components(linked: Tensor) -> Tensor:
    """[S, m] int64: the smallest index of the connected component of each node; linked [S, m, m] bool, symmetric.

    Every node takes the smallest label around it until none changes; labels of labels shorten long chains.
    """
    sets, size = linked.shape[:2]
    labels = torch.arange(size, device=linked.device).expand(sets, -1)
    block = max(1, BLOCK // max(1, sets * size))
    while True:
        short = labels.int()[:, None]
        part = [torch.where(rows, short, size).amin(-1) for rows in linked.split(block, 1)]
        new = torch.minimum(labels, torch.cat(part, 1).long())
        new = new.gather(1, new)
        if torch.equal(new, labels):
            return labels
        labels = new


def scissor(
    features: Features,
    *,
    budget: Budget,
    prompt: list[str] | None = None,
    generator: Generator | None = None,
    steps: int = 6,
) -> Tokens:
    """One token for each group of patches that chains of similar patches connect. O(steps (T N^2 + M^2) D).

    Semantic connected components of LLaVA-Scissor (Sun et al. 2025, https://arxiv.org/abs/2506.21862): patches of a
    frame whose cosine is above a threshold are linked, components become their means, these M means of all frames are
    linked and joined in the same way; every patch then goes to the representative most like it, and a token is the mean
    of these patches and the representative.

    Exact components, where the paper samples nodes of large graphs. The threshold that leaves K tokens at least is
    looked for upwards, from the lowest that leaves K means, and then in `steps` bisections; pairs most alike are then
    merged (as in `tome`) down to K. A representative is the mean of all its patches, and the one most like it stays
    with it, so that no token is empty. Graphs differ from clip to clip: one clip after another.
    """
    with deciding(features):
        p = Patches.of(features, budget)
        groups = torch.full_like(p.valid, -1, dtype=torch.int64)
        for b, (length, keep) in enumerate(zip(p.frames.tolist(), p.keep.tolist())):
            x = unit(p.vectors[b, : length * p.size].unflatten(0, (length, p.size)))
            threshold = _lowest_joined(x, keep, steps)
            groups[b, : length * p.size] = _joined(x, x @ x.transpose(1, 2), threshold, keep)[0]
        groups, number = compact(groups, p.valid)
        groups = merge_down(p.vectors, groups, number, p.keep)
        x = unit(p.vectors)
        own = torch.arange(p.most, device=x.device) < p.keep[:, None]
        representative = unit(means(p.vectors, groups, p.most)[0])
        bias = torch.zeros(own.shape, device=x.device).masked_fill(~own, -torch.inf)
        likeness = (x * representative.gather(1, groups.clamp(min=0)[..., None].expand_as(x))).sum(-1)
        stays = best_member(likeness, groups, p.most)
        stays = torch.zeros_like(torch.cat([p.valid, p.valid[:, :1]], 1)).scatter(1, stays, True)[:, :-1]
        source = torch.where(stays, groups, nearest(x, representative, bias)[1])
    return p.merged(torch.where(p.valid, source, -1), extra=groups)


def _lowest_joined(x: Tensor, keep: int, steps: int) -> float:
    """The threshold for one clip: a low one has few means, so that the costly second stage is cheap on the way up."""
    alike, asked = x @ x.transpose(1, 2), torch.tensor([keep], device=x.device)

    def left(threshold: Tensor) -> Tensor:
        return _joined(x, alike, float(threshold), keep)[1]

    def means_left(threshold: Tensor) -> Tensor:
        found = components(alike > float(threshold))
        return (found == torch.arange(x.shape[1], device=x.device)).sum()[None]

    low = high = float(lowest_threshold(means_left, asked, -1.01, 1.01, steps=12))
    width = 2.0**-8
    while high < 1.01 and int(left(asked.new_tensor([high], dtype=x.dtype))) < keep:
        low, high, width = high, min(high + width, 1.01), 2 * width
    return float(lowest_threshold(left, asked, low, high, steps=steps))


def _joined(x: Tensor, alike: Tensor, threshold: float, keep: int) -> tuple[Tensor, Tensor]:
    """Both stages for one clip: the first patch of each patch's component [L * N], and how many components [1].

    x: [L, N, D] of length 1. alike: its cosines [L, N, N]. With fewer than `keep` after the first stage, the second,
    which only makes them fewer, is left out.
    """
    frames, size = x.shape[:2]
    first = components(alike > threshold) + torch.arange(frames, device=x.device)[:, None] * size
    ones = torch.ones(1, frames * size, dtype=torch.bool, device=x.device)
    labels, number = compact(first.reshape(1, -1), ones)
    if int(number) < keep:
        return first.flatten(), number
    survivors = unit(means(x.reshape(1, frames * size, -1), labels, int(number))[0])
    joined = components(survivors @ survivors.transpose(1, 2) > threshold)
    head = best_member(ones.float(), labels, int(number))  # the first patch of each component of a frame
    return head.gather(1, joined.gather(1, labels))[0], (joined == torch.arange(int(number), device=x.device)).sum(1)
