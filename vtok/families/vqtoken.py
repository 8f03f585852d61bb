"""Projectors that cluster a video's patches and give a frozen LLM one token for each cluster.

    clip --tower--> patches --MLP--> patches in the LLM's space --k-means, or a learned codebook--> K clusters
                                              |                                                      |
                                              +------ mean of each cluster's members ----------------+--> content
                  where members lie (moments, histogram ... of t, y, x) --MLP--> added, or by attention --> Tokens

VQToken (Zhang et al. 2025, https://arxiv.org/abs/2503.16980). What differs here:

- K tokens come out, so fewer clusters are a shorter sequence; the released code tiles tokens to the number of frames.
- How many clusters a clip has (`adaptive`) is read off one clustering (vtok/layers/ward.py).
- The label map takes part as statistics of each cluster's members (vtok/layers/place_map.py). The paper's VQ-attention,
  softmax(B Wq (B Wk)^T) M Wv with M an MLP of the whole label map, is places.kind=label_map with
  places.mixer=attention. It is the paper's form: the released code lets frames' rows of labels query the codebook
  through a decoder layer. Clusters are numbered by mass, largest first, so its output, too, does not depend on what
  numbers k-means gave.
- A token is as long as its members are on average (root mean square): the LLM is frozen and knows words of that size.
- `weighting: learned` lets a patch count for more or less in the means of its cluster, of contents and of places: of
  few clusters, one holds what moves with the ground behind it. Not of the paper; positions stay plain means.
- Seeds of k-means are `seed`'s: the same clip gives the same tokens, alone or in a batch.

A budget is the number of clusters, made anew for it: tokens of a smaller budget are no part of those of a larger one
(no nesting is claimed; `Tokens.truncate` would keep the largest clusters and drop the others' patches). With a fixed
number it is met exactly where each group has as many patches as its share. Adaptive clusters and codes never exceed it.

scope: `clip` clusters all patches of a clip; `blocks` each block of frames by itself, as groups of tokens that share
the budget; `stream` is k-means of a stream of blocks with constant memory, the same for whole clips as for pieces
(`init_state`, `step`, `flush`).

Letters: B clips, G groups of a clip, S sets clustered (clips, or blocks of them), T frames, F frames of a set, N
patches of a frame, n = F N, K tokens, D width, P columns of a place's payload.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vtok.layers.cluster import INITS, METRICS, Memory, absorb, first_member, kmeans, pool, ranked
from vtok.layers.code_clusters import code_clusters
from vtok.layers.place_map import PlaceConfig, PlaceMap
from vtok.layers.projector import ProjectorConfig, ProjectorModel
from vtok.layers.ward import CRITERIA, adaptive_kmeans
from vtok.llm import ObjectiveConfig as LanguageConfig
from vtok.llm import ProjectorObjective
from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.types import Budget, Clip, Features, ShapeError, StreamState, Tokens, resolve_budget, share
from vtok.vision import TowerConfig

SCOPES = ("clip", "blocks", "stream")
TINY = 1e-20  # under a root, so that zeros have a gradient


@dataclass
class AdaptiveConfig:
    """How many clusters; see `vtok.layers.ward.adaptive_kmeans`."""

    criterion: str = "none"  # none (num_tokens, or the budget) | variance | elbow | silhouette
    min_tokens: int = 1  # of a group; num_tokens, or the budget, is the most
    share: float = 0.9  # variance: of the sum of squares that the clusters explain

    def __post_init__(self) -> None:
        if self.criterion not in ("none", *CRITERIA):
            raise ValueError(
                f"adaptive.criterion={self.criterion!r} is unknown; choose none or one of {', '.join(CRITERIA)}"
            )
        if self.min_tokens < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"adaptive.min_tokens={self.min_tokens} must be 1 or more, share={self.share} above 0 and at most 1"
            )


@dataclass
class Config(ProjectorConfig):
    name: str = "vqtoken"
    tower: TowerConfig = field(default_factory=TowerConfig)
    num_tokens: int = 32  # of a clip, shared by its groups: without a budget, and the largest budget
    scope: str = "clip"  # clip | blocks | stream
    block_frames: int = 8  # blocks, stream: frames of a block
    restart: bool = True  # stream: new seeds at each block; false: from the clusters so far (vtok/layers/cluster.py)
    space: str = (
        "projected"  # patches are compared as the LLM sees them, or as the `tower` gave them: clusters that rest
    )
    metric: str = "cosine"  # cosine | euclidean
    init: str = "kmeans++"  # kmeans++ | farthest
    trials: int = 4  # kmeans++: candidates of each seed
    iterations: int = 100  # at most
    tolerance: float = 1e-4  # share of the variance by which the centres of a converged clip may still move
    seed: int = 0  # of kmeans++
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    codebook: QuantizerConfig | None = None  # a learned codebook instead of k-means: patches with one id are a cluster
    places: PlaceConfig = field(default_factory=PlaceConfig)
    weighting: str = "uniform"  # of a cluster's members in its means: uniform | learned (0 to 2, by a linear map)
    order: str = "mass"  # of the tokens in a group: mass (largest first) | time (by the mean of their members' times)

    def __post_init__(self) -> None:
        for key, choices in (
            ("scope", SCOPES),
            ("space", ("projected", "tower")),
            ("metric", METRICS),
            ("init", INITS),
            ("weighting", ("uniform", "learned")),
            ("order", ("mass", "time")),
        ):
            if getattr(self, key) not in choices:
                raise ValueError(f"model.{key}={getattr(self, key)!r} is unknown; choose one of {', '.join(choices)}")
        for key in ("num_tokens", "block_frames", "trials", "iterations"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more")
        if self.tolerance < 0:
            raise ValueError(f"model.tolerance={self.tolerance} must be 0 or more")
        adaptive = self.adaptive.criterion != "none"
        if adaptive and self.adaptive.min_tokens > self.num_tokens:
            raise ValueError(
                f"model.adaptive.min_tokens={self.adaptive.min_tokens} is above model.num_tokens={self.num_tokens}"
            )
        if self.codebook is not None and adaptive:
            raise ValueError(
                "model.codebook has as many tokens as a clip uses codes: set model.adaptive.criterion=none"
            )
        if self.codebook is not None:
            usual = Config()
            for key in ("space", "metric", "init", "trials", "iterations", "tolerance", "seed"):
                if getattr(self, key) != getattr(usual, key):
                    raise ValueError(
                        f"model.{key}={getattr(self, key)!r} is of k-means, and model.codebook takes its place: "
                        "leave it out, or set model.codebook=null"
                    )
        if self.scope == "stream":
            wrong = "model.codebook" if self.codebook is not None else "model.adaptive.criterion" if adaptive else ""
            if wrong or self.places.kind not in ("none", "moments"):
                raise ValueError(
                    f"model.scope=stream keeps sums over members and nothing else: {wrong or 'model.places.kind'} "
                    "needs all patches; leave it out (places.kind=moments or none), or set scope=clip or blocks"
                )

    @property
    def length_policy(self) -> str:
        chosen = self.adaptive.criterion != "none" and self.adaptive.min_tokens < self.num_tokens
        return "content" if chosen or self.codebook is not None else "metadata"

    @property
    def largest_budget(self) -> int:
        return self.num_tokens

    def _bounds(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        cut = self.block_frames if self.scope == "blocks" else frames
        begins = range(0, frames, cut)
        sizes = [(min(begin + cut, frames) - begin) * grid[0] * grid[1] for begin in begins]  # patches of each group
        most = [min(asked, size) for asked, size in zip(share(budget, len(sizes)), sizes)]
        if self.codebook is not None:
            return sum(min(1, count) for count in most), sum(most)
        if self.adaptive.criterion == "none":
            return sum(most), sum(most)
        return sum(min(self.adaptive.min_tokens, count) for count in most), sum(most)


@dataclass
class _Sets:
    """Clusters, as sums over members, and the clips they are of.

    sums [S, K, D + 1 + P] of embeddings, their sizes, their places (with learned weights four columns more:
    `Model._values`). mass, first [S, K]. frames [S]. live [B, G]: which blocks of `cut` frames of the clips the sets
    are. count [B], frames of each clip. times [B, G, 2] or None. labels [S, n], None where patches are gone. indices
    [S, K], codes.
    """

    sums: Tensor
    mass: Tensor
    first: Tensor
    frames: Tensor
    live: Tensor
    cut: int
    count: Tensor
    grid: tuple[int, int]
    dtype: torch.dtype
    times: Tensor | None = None
    labels: Tensor | None = None
    indices: Tensor | None = None


class Model(ProjectorModel):
    """What ships: `encode`, `compress`; with scope=stream also `init_state`, `step`, `flush`."""

    nested = False  # every budget has clusters of its own

    def __init__(self, config: Config, *, load: Any = None):
        super().__init__(config, load=load)
        c = config
        self.max_tokens = c.num_tokens
        self.places = PlaceMap(c.places, dim=c.embedding_dim, num_tokens=c.num_tokens, rms=c.embedding_rms)
        self.weigh = nn.Linear(c.embedding_dim, 1) if c.weighting == "learned" else None
        if self.weigh is not None:  # it begins as the plain mean
            nn.init.zeros_(self.weigh.weight)
            nn.init.zeros_(self.weigh.bias)
        self.quantizer = self.to_code = self.from_code = None
        self._quantizer_loss: Tensor | None = None
        if c.codebook is not None:
            self.quantizer = build_quantizer(c.codebook)
            if len(self.quantizer.codebook_sizes) != 1:
                raise ValueError(
                    f"model.codebook has {len(self.quantizer.codebook_sizes)} ids a patch, a cluster has one: choose "
                    "fsq, vq, lfq, bsq, simvq or ibq with num_codebooks=1"
                )
            self.to_code = nn.Linear(c.embedding_dim, self.quantizer.latent_dim)
            self.from_code = nn.Linear(self.quantizer.dim, c.embedding_dim)

    def _shares(self, features: Features, budget: Budget | None) -> Tensor:
        """[B, G] clusters of each group at most."""
        c, count = self.config, features.count()
        groups = -(-count // c.block_frames) if c.scope == "blocks" else torch.ones_like(count)
        share = resolve_budget(c.num_tokens if budget is None else budget, groups=groups, max_per_group=c.num_tokens)
        assert share is not None
        if int(share.sum(1).max()) > c.num_tokens:
            raise ValueError(
                f"budget={int(share.sum(1).max())} is above model.num_tokens={c.num_tokens}, the largest of this model"
            )
        return share

    def compress(self, features: Features, *, budget: Budget | None = None, prompt: list[str] | None = None) -> Tokens:
        """K tokens of each clip; `prompt` is not read.

        Raises: ValueError for a budget above `max_tokens`, and as `vtok.types.resolve_budget`.
        """
        c, batch, frames = self.config, *features.patches.shape[:2]
        seen, count = self.project(features), features.count()
        share = self._shares(features, budget)
        keys = features.patches if c.space == "tower" else seen.patches
        cut = c.block_frames if c.scope == "blocks" else frames
        total = share.shape[1]
        of_clips: dict[str, Any] = {"cut": cut, "count": count, "grid": seen.grid, "dtype": seen.patches.dtype}
        if features.times is not None:
            first = cut * torch.arange(total, device=count.device).expand(batch, -1)
            edges = torch.stack([first, first + cut - 1], 2).flatten(1).minimum(count[:, None] - 1)
            of_clips["times"] = features.times.gather(1, edges).unflatten(1, (-1, 2))
        if c.scope == "stream":
            memory = labels = None
            # one call of what learns, however many blocks there are
            values = self._values(seen.patches.flatten(1, 2), torch.ones_like(count), seen.grid)
            values = values.unflatten(1, (frames, -1))
            for start in range(0, frames, c.block_frames):
                held, compared, real = (x[:, start : start + c.block_frames] for x in (values, keys, features.mask))
                where = {"start": start, "share": share[:, 0]}
                memory, labels = self._absorb(memory, labels, held, compared, real, **where)
            assert memory is not None
            live = torch.ones_like(share, dtype=torch.bool)
            sets = _Sets(memory.values, memory.mass, memory.first, count, live, labels=labels, **of_clips)
            return self._tokens(sets, frames=frames)
        own = (count[:, None] - cut * torch.arange(total, device=count.device)).clamp(0, cut)  # [B, G] frames of each
        live = (own > 0) & (share > 0)

        def blocks(x: Tensor) -> Tensor:
            """[B, T, N, D] -> [S, n, D]"""
            x = F.pad(x, (0, 0, 0, 0, 0, total * cut - frames)) if total * cut > frames else x[:, : total * cut]
            x = x.reshape(batch * total, -1, x.shape[3])
            return x if bool(live.all()) else x[live.flatten()]

        sets = self._cluster(blocks(seen.patches), blocks(keys), own[live], share[live], live=live, **of_clips)
        return self._tokens(sets, frames=frames)

    def _settings(self) -> dict[str, Any]:
        c = self.config
        generator = Generator().manual_seed(c.seed)
        keys = ("metric", "init", "trials", "iterations", "tolerance")
        return {"generator": generator} | {key: getattr(c, key) for key in keys}

    def _values(self, patches: Tensor, frames: Tensor, grid: tuple[int, int], *, start: int = 0) -> Tensor:
        """patches [S, n, D] of frames from `start` -> [S, n, D + 1 + P]: embedding, its root mean square, its place.

        Where weights are learned, these times the patch's weight, then t, y, x, and the weight: [S, n, D + P + 5].
        """
        x = patches.float()
        places = self.places.payload(frames, x.shape[1] // (grid[0] * grid[1]), grid, start=start)
        values = torch.cat([x, (x.square().mean(-1, keepdim=True) + TINY).sqrt(), places], -1)
        if self.weigh is None:
            return values
        weight = 2 * self.weigh((x / self.config.embedding_rms).to(self.weigh.weight.dtype)).float().sigmoid()
        return torch.cat([values * weight, places[..., :3], weight], -1)

    def _cluster(self, patches: Tensor, keys: Tensor, frames: Tensor, share: Tensor, **of_clips: Any) -> _Sets:
        """patches, keys [S, n, D], frames, share [S] -> their clusters, at most `share` of each."""
        c, grid = self.config, of_clips["grid"]
        real = torch.arange(patches.shape[1], device=frames.device) < (frames * grid[0] * grid[1])[:, None]
        most = torch.minimum(share, real.sum(1))
        values, indices = self._values(patches, frames, grid), None
        if self.quantizer is not None:
            assert self.to_code is not None
            # patches as large as words are too small to reach another level of FSQ than the middle one
            z = self.to_code((patches / c.embedding_rms).to(self.to_code.weight.dtype))
            out = self.quantizer(z, mask=real)
            if self.training and torch.is_grad_enabled():
                self._quantizer_loss = out.loss
            labels, indices = code_clusters(out.indices[..., 0], most, mask=real, lookup=self.quantizer.lookup)
            kept = indices.gather(1, labels.clamp_min(0))[..., None]
            # in value the code of the cluster, in gradient the quantizer's own way to the patch
            codes = out.embeddings + (self.quantizer.lookup(kept).to(out.embeddings) - out.embeddings).detach()
            codes = codes.float() if self.weigh is None else codes.float() * values[..., -1:]
            values = torch.cat([codes, values[..., patches.shape[2] :]], -1)
        elif c.adaptive.criterion == "none":
            labels = kmeans(keys, most, mass=real, **self._settings()).labels
        else:
            a = c.adaptive
            bounds = {"least": a.min_tokens, "criterion": a.criterion, "share": a.share}
            labels = adaptive_kmeans(keys, most, mass=real, **bounds, **self._settings()).labels
        count = int(labels.max()) + 1
        mass = pool(real[..., None].float(), labels, count)[..., 0]
        sums = pool(values.masked_fill(~real[..., None], 0), labels, count)
        indices = None if indices is None else indices[:, :count]
        first = first_member(labels, count)
        return _Sets(sums, mass, first, frames, labels=labels, indices=indices, **of_clips)

    def _absorb(
        self,
        memory: Memory | None,
        labels: Tensor | None,
        values: Tensor,
        keys: Tensor,
        mask: Tensor,
        *,
        start: int,
        share: Tensor,
    ) -> tuple[Memory, Tensor]:
        """The memory after a block that begins at frame `start`, and the clusters of all patches so far.

        values [B, f, N, P]: of its patches (`_values`). keys [B, f, N, D]: by which they are compared.
        mask [B, f], True on real frames; share [B]: clusters of each clip at most; labels None: of this block alone.
        """
        held, size = 0 if memory is None else memory.mass.shape[1], values.shape[2]
        memory, found = absorb(
            memory,
            keys.flatten(1, 2),
            values.flatten(1, 2),
            share,
            mask=mask.repeat_interleave(size, 1),
            start=start * size,
            restart=self.config.restart,
            **self._settings(),
        )
        if labels is None:
            return memory, found[:, held:]
        moved = found.gather(1, labels.clamp_min(0)).masked_fill(labels < 0, -1)
        return memory, torch.cat([moved, found[:, held:]], 1)

    def _tokens(self, sets: _Sets, *, frames: int) -> Tokens:
        """Clusters as tokens of clips of `frames` frames (padded), largest first or in the order of time."""
        c, columns, more = self.config, self.places.columns, 0 if self.weigh is None else 4
        dim = sets.sums.shape[2] - 1 - columns - more
        order = ranked(sets.mass, sets.first)
        mass = sets.mass.gather(1, order)
        sums = sets.sums.gather(1, order[..., None].expand_as(sets.sums))
        means = sums / (mass.clamp_min(1)[..., None] if self.weigh is None else sums[..., -1:].clamp_min(TINY))
        content, size, places = means[..., : dim + 1 + columns].split([dim, 1, columns], 2)
        where = places[..., :3] if self.weigh is None else sums[..., -4:-1] / mass.clamp_min(1)[..., None]
        labels = _renamed(sets.labels, order)
        maps = None if labels is None else labels.unflatten(1, (-1, *sets.grid))
        if self.from_code is not None:
            content = self.from_code(content.to(self.from_code.weight.dtype)).float()
        told = self.places(content, places, mass, frames=sets.frames, maps=maps).float()
        told = told * size * (told.square().mean(-1, keepdim=True) + TINY).rsqrt()
        indices = None if sets.indices is None else sets.indices.gather(1, order)
        rank = torch.arange(mass.shape[1], device=mass.device).expand_as(mass)
        if c.order == "time":
            order = where[..., 0].masked_fill(mass <= 0, torch.inf).argsort(dim=1, stable=True)
            told, where = (x.gather(1, order[..., None].expand_as(x)) for x in (told, where))
            mass, rank, labels = mass.gather(1, order), order, _renamed(labels, order)
            indices = None if indices is None else indices.gather(1, order)
        clip, block = sets.live.nonzero(as_tuple=True)
        t = (where[..., 0] + (block * sets.cut)[:, None]) / sets.count[clip][:, None]
        positions = torch.stack([t, where[..., 1], where[..., 2]], -1)
        (batch, groups), slots = sets.live.shape, mass.shape[1]

        def spread(x: Tensor) -> Tensor:
            """[S, K, ...] -> [B, G * K, ...], 0 in sets that are not live."""
            out = x.new_zeros(batch, groups, *x.shape[1:])
            return out.masked_scatter(sets.live.reshape(batch, groups, *[1] * (x.ndim - 1)), x).flatten(1, 2)

        if labels is not None:
            labels = torch.where(labels < 0, -1, labels + (block * slots)[:, None])
            labels = (spread(labels + 1) - 1)[:, : frames * sets.grid[0] * sets.grid[1]]
        mass = spread(mass)
        tokens = Tokens(
            embeddings=spread(told.to(sets.dtype)),
            lengths=(mass > 0).sum(1),
            positions=spread(positions),
            group=torch.arange(groups, device=mass.device).repeat_interleave(slots).expand(batch, -1),
            rank=spread(rank),
            indices=None if indices is None else spread(indices)[..., None],
            codebook_sizes=() if self.quantizer is None else self.quantizer.codebook_sizes,
            mass=mass,
            source=labels,
            times=sets.times,
        )
        return tokens.select(mass > 0)

    def pop_quantizer_loss(self) -> Tensor | None:
        """The codebook's own loss at the last `compress` in training, once."""
        loss, self._quantizer_loss = self._quantizer_loss, None
        return loss

    def init_state(self, batch: int, size: tuple[int, int] = (0, 0)) -> StreamState:
        """State of a stream of `batch` videos, all of one length: sums of K clusters and the frames of one block."""
        if self.config.scope != "stream":
            raise ValueError(f"model.scope={self.config.scope} clusters whole clips: set model.scope=stream")
        return StreamState(batch, size)

    def step(self, clip: Clip, state: StreamState) -> tuple[None, StreamState]:
        """Take any number of frames, as a video or as features. Tokens come from `flush`, at any time."""
        return None, self.step_features(self.features(clip), state)

    def step_features(self, features: Features, state: StreamState) -> StreamState:
        """`step` of what the tower saw. Raises: ShapeError for padding, another batch or another grid."""
        batch, frames = features.patches.shape[:2]
        grid = state.cache.setdefault("grid", features.grid)
        if batch != state.batch or grid != features.grid:
            raise ShapeError(
                f"a stream of {state.batch} videos of grid {grid} got features of {batch}, grid {features.grid}"
            )
        if features.lengths is not None and bool((features.lengths != frames).any()):
            raise ShapeError("a stream takes clips without padding: every video of the batch advances together")
        patches = self.project(features).patches
        new = patches, (features.patches if self.config.space == "tower" else patches)
        buffer = new if state.buffer is None else tuple(torch.cat(pair, 1) for pair in zip(state.buffer, new))
        if features.times is not None:
            first = state.cache["times"][:, 0] if "times" in state.cache else features.times[:, 0]
            state.cache["times"] = torch.stack([first, features.times[:, -1]], 1)
        cut = self.config.block_frames
        while buffer[0].shape[1] >= cut:
            state.cache["memory"] = self._next(state, tuple(part[:, :cut] for part in buffer))
            buffer = tuple(part[:, cut:] for part in buffer)
            state.done += cut
        state.buffer = tuple(part.clone() for part in buffer)  # not a view that keeps what has been used
        return state

    def _next(self, state: StreamState, block: tuple[Tensor, ...]) -> Memory:
        """The memory with a block of patches and keys in it."""
        mask = torch.ones(block[0].shape[:2], dtype=torch.bool, device=block[0].device)
        share = torch.full((state.batch,), self.config.num_tokens, device=mask.device)
        values = self._values(block[0].flatten(1, 2), torch.ones_like(share), state.cache["grid"], start=state.done)
        values = values.unflatten(1, block[0].shape[1:3])
        where = {"start": state.done, "share": share}
        return self._absorb(state.cache.get("memory"), None, values, block[1], mask, **where)[0]

    def flush(self, state: StreamState) -> Tokens | None:
        """Tokens of all frames so far, without `source`; None before the first. The stream may go on."""
        if state.buffer is None:
            return None
        rest = state.buffer[0].shape[1]
        memory = self._next(state, state.buffer) if rest else state.cache["memory"]
        frames, device = state.done + rest, memory.mass.device
        count, times = torch.full((state.batch,), frames, device=device), state.cache.get("times")
        live = torch.ones(state.batch, 1, dtype=torch.bool, device=device)
        of_clips = {"cut": frames, "count": count, "grid": state.cache["grid"], "dtype": state.buffer[0].dtype}
        of_clips["times"] = None if times is None else times[:, None]
        return self._tokens(_Sets(memory.values, memory.mass, memory.first, count, live, **of_clips), frames=frames)


def _renamed(labels: Tensor | None, order: Tensor) -> Tensor | None:
    """labels [S, n] of clusters that now stand in `order` [S, K]; -1 stays."""
    return None if labels is None else order.argsort(1).gather(1, labels.clamp_min(0)).masked_fill(labels < 0, -1)


@dataclass
class ObjectiveConfig(LanguageConfig):
    quantizer: float = 1.0  # weight of the codebook's own loss, where model.codebook has one


class Objective(ProjectorObjective):
    """The frozen LLM's loss, and the codebook's."""

    Config = ObjectiveConfig

    def terms(self, model: Any, clip: Clip, tokens: Tokens, seen: Any, step: int) -> dict[str, Tensor]:
        loss = model.pop_quantizer_loss() if isinstance(model, Model) else None
        return {} if loss is None else {"quantizer": self.config.quantizer * loss}
