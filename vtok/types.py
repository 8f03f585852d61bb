"""What passes between the rooms. Imports torch only.

Letters, everywhere in vtok: B batch, C channels, T frames, H height, W width, N patches per frame, K tokens per clip
(padded), G groups, Q ids per token, D width, V codebook size.

    Clip --encoder--> Features --bottleneck--> Tokens --decoder--> video   (tokenizers)
                                               Tokens --frozen LLM--> text (projectors)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

Budget = int | Tensor  # int: total over the clip, shared evenly over its groups; Tensor [B, G] int64: per group


class ShapeError(ValueError):
    """A tensor entered a room with a shape or dtype its contract does not allow."""


def _check(name: str, value: Tensor | None, shape: tuple[int | None, ...], dtype: str | None = None) -> None:
    if value is None:
        return
    fits = value.ndim == len(shape) and all(want is None or want == got for want, got in zip(shape, value.shape))
    if not fits:
        want = ", ".join("*" if s is None else str(s) for s in shape)
        raise ShapeError(f"{name} has shape {list(value.shape)}, expected [{want}]")
    if dtype == "int" and (value.is_floating_point() or value.dtype == torch.bool):
        raise ShapeError(f"{name} has dtype {value.dtype}, expected an integer type")
    if dtype == "float" and not value.is_floating_point():
        raise ShapeError(f"{name} has dtype {value.dtype}, expected a floating type")


@dataclass
class Features:
    """What a frozen tower saw.

    patches: [B, T, N, D]. grid: (h, w) with h * w = N. times: [B, T] seconds. frame: [B, T, D], one vector a frame.
    attention: by block of the tower, counted from 0, [B, T, N], attention received per patch, from the queries that
    attention_from names (all | cls). keys: [B, T, N, Dk], attention keys.
    lengths: [B] int64, real frames of each clip (the rest is padding, zeros); None when all T are real.
    """

    patches: Tensor
    grid: tuple[int, int]
    times: Tensor | None = None
    frame: Tensor | None = None
    attention: dict[int, Tensor] | None = None
    keys: Tensor | None = None
    lengths: Tensor | None = None
    attention_from: str = "all"

    def __post_init__(self) -> None:
        _check("Features.patches", self.patches, (None, None, None, None), "float")
        batch, frames, patches, _ = self.patches.shape
        if self.grid[0] * self.grid[1] != patches:
            raise ShapeError(f"Features.grid={self.grid} does not tile the {patches} patches of a frame")
        _check("Features.times", self.times, (batch, frames))
        _check("Features.frame", self.frame, (batch, frames, None))
        _check("Features.keys", self.keys, (batch, frames, patches, None))
        _check("Features.lengths", self.lengths, (batch,), "int")
        if self.lengths is not None and batch and not 1 <= int(self.lengths.min()) <= int(self.lengths.max()) <= frames:
            low, high = int(self.lengths.min()), int(self.lengths.max())
            raise ShapeError(f"Features.lengths lies in [{low}, {high}], the features have {frames} frames")
        for layer, received in (self.attention or {}).items():
            _check(f"Features.attention[{layer}]", received, (batch, frames, patches))

    def count(self) -> Tensor:
        """[B] int64: real frames of each clip."""
        if self.lengths is not None:
            return self.lengths
        batch, frames = self.patches.shape[:2]
        return torch.full((batch,), frames, device=self.patches.device)

    @property
    def mask(self) -> Tensor:
        """[B, T] bool: True on real frames."""
        return torch.arange(self.patches.shape[1], device=self.patches.device) < self.count()[:, None]


@dataclass
class Sound:
    """What is heard of each clip, mono, from a moment in or before its first frame on.

    samples: [B, S] int16 at `rate` Hz, zeros past a clip's own. lengths: [B] int64 samples of each clip, 0 for one
    without a sound track. spans: [B, T, 2] int64, samples between which each frame is on show; empty for padding.
    """

    samples: Tensor
    lengths: Tensor
    spans: Tensor
    rate: int

    def __post_init__(self) -> None:
        _check("Sound.samples", self.samples, (None, None), "int")
        _check("Sound.lengths", self.lengths, (self.samples.shape[0],), "int")
        _check("Sound.spans", self.spans, (self.samples.shape[0], None, 2), "int")


def _changed(value: Any, change: Callable[[Any], Any], *, lists: bool = False) -> Any:
    """A Clip with `change` made to every tensor in it (and every list), those of its features and sound included."""
    if isinstance(value, Tensor) or (lists and isinstance(value, list)):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(item, change, lists=lists) for key, item in value.items()}
    if isinstance(value, (Clip, Features, Sound)):
        kept = {f.name: _changed(getattr(value, f.name), change, lists=lists) for f in fields(value)}
        return type(value)(**kept)
    return value


@dataclass
class Clip:
    """A batch of clips; not frozen, since Lightning must move it to a device.

    keys: B unique sample keys.
    video: [B, C, T, H, W], uint8 from the loader's workers, float in [-1, 1] once on the device (`as_float`).
        C = 3 for RGB, or the channels of a dense map. An image is a clip with T = 1.
    lengths: [B] int64, real frames of each clip (the rest is padding); None when all T are real.
    times: [B, T] seconds from the start of the clip.
    text, prompt, target, qa, features: what text compressors, projectors and their metrics read (`design`).
    captions: of each clip, [{start_s, end_s, text}] in its seconds, what is on show when.
    sound: what is heard meanwhile, for those who hear.
    sources: the video that each was cut from; clips of one video are no independent samples.
    """

    keys: list[str]
    video: Tensor | None = None
    lengths: Tensor | None = None
    times: Tensor | None = None
    text: list[str] | None = None
    prompt: list[str] | None = None
    target: list[str] | None = None
    qa: list[Any] | None = None
    features: dict[str, Features] | None = None
    captions: list[Any] | None = None
    sound: Sound | None = None
    sources: list[str] | None = None

    def __post_init__(self) -> None:
        batch = len(self.keys)
        _check("Clip.video", self.video, (batch, None, None, None, None))
        _check("Clip.lengths", self.lengths, (batch,), "int")
        if self.video is not None:
            frames = self.video.shape[2]
            _check("Clip.times", self.times, (batch, frames))
            if self.lengths is not None and batch:
                low, high = int(self.lengths.min()), int(self.lengths.max())
                if low < 1 or high > frames:
                    raise ShapeError(f"Clip.lengths lies in [{low}, {high}], but the video has {frames} frames")
        for name in ("text", "prompt", "target", "qa", "captions", "sources"):
            value = getattr(self, name)
            if value is not None and len(value) != batch:
                raise ShapeError(f"Clip.{name} has {len(value)} entries for {batch} keys")
        if self.sound is not None and len(self.sound.samples) != batch:
            raise ShapeError(f"Clip.sound has {len(self.sound.samples)} entries for {batch} keys")

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Clip:
        """The same clip with every tensor on `device`."""
        return _changed(self, lambda x: x.to(device, non_blocking=non_blocking))

    def rows(self, which: slice) -> Clip:
        """The clips at `which`, as a batch of their own: views, nothing is copied."""
        return _changed(self, lambda x: x[which], lists=True)

    def pin_memory(self) -> Clip:
        """The same clip with every tensor in pinned memory (the DataLoader's hook)."""
        return _changed(self, lambda x: x.pin_memory())

    def as_float(self) -> Clip:
        """The clip with its video in [-1, 1]: uint8 is mapped linearly (0 -> -1, 255 -> 1), floats pass unchanged."""
        if self.video is None or self.video.is_floating_point():
            return self
        return replace(self, video=self.video.float().div_(127.5).sub_(1.0))

    def frames(self) -> Tensor:
        """[B] int64: real frames of each clip."""
        if self.video is None:
            raise ShapeError("this Clip has no video")
        if self.lengths is not None:
            return self.lengths.long()
        return torch.full((len(self.keys),), self.video.shape[2], dtype=torch.int64, device=self.video.device)


def to_uint8(video: Tensor) -> Tensor:
    """[-1, 1] floats as uint8 levels, rounded half to even and clipped: the one place where pixels are made."""
    return video.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def means_over(steps: Tensor, spans: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Means of a step function over stretches of time, each cut into `parts`: what is heard, or cached, meanwhile.

    Args:
        steps: [S, D], entry i holds from i to i + 1. spans: [T, 2], from where to where, in the same unit.
    Returns: [T, parts, D], zeros where a part has no step in it; [T] float32, the share of each stretch that has.
    """
    begin, end = spans.double().unbind(-1)
    at = torch.arange(parts + 1, device=spans.device, dtype=torch.float64) / parts
    edges = (begin[:, None] + (end - begin)[:, None] * at).clamp(0, len(steps))  # [T, parts + 1]
    total = torch.cat([steps.new_zeros(1, steps.shape[1]), steps, steps[-1:]]).double().cumsum(0)
    whole = edges.floor().long()
    sums = total[whole] + (total[(whole + 1).clamp(max=len(total) - 1)] - total[whole]) * (edges - whole)[..., None]
    inside = edges.diff(dim=1)  # [T, parts]
    means = sums.diff(dim=1) / inside.clamp(min=1e-9)[..., None]
    share = (edges[:, -1] - edges[:, 0]) / (end - begin).clamp(min=1e-9)
    return means.masked_fill(inside[..., None] <= 1e-9, 0).to(steps.dtype), share.float()


def share(total: int, groups: int) -> list[int]:
    """`total` split evenly over `groups`, the remainder to the earliest: share(7, 3) == [3, 2, 2]."""
    base, extra = divmod(total, groups)
    return [base + (g < extra) for g in range(groups)]


def resolve_budget(budget: Budget | None, *, groups: Tensor, max_per_group: int) -> Tensor | None:
    """A budget as tokens per group.

    Args:
        budget: int total per clip, or [B, G] int64 per group; None keeps everything.
        groups: [B] int64, number of groups of each clip.
        max_per_group: largest number of tokens a group holds.
    Returns: [B, G] int64 with G = groups.max(), zero past a clip's own groups; or None.
    Raises: ValueError when the budget asks for fewer than one token a clip or for more than a group holds.
    """
    if budget is None:
        return None
    batch, most = groups.shape[0], int(groups.max())
    if isinstance(budget, Tensor):
        if budget.shape != (batch, most) or budget.is_floating_point():
            raise ShapeError(
                f"budget has shape {list(budget.shape)} ({budget.dtype}), expected int64 [{batch}, {most}]"
            )
        if int(budget.min()) < 0 or int(budget.max()) > max_per_group:
            raise ValueError(
                f"budget lies in [{int(budget.min())}, {int(budget.max())}], a group holds 0 to {max_per_group} tokens"
            )
        return budget.to(groups.device, torch.int64)
    out = torch.zeros(batch, most, dtype=torch.int64)
    for row, count in enumerate(groups.tolist()):
        if not 1 <= budget <= count * max_per_group:
            raise ValueError(
                f"budget={budget} is out of range: this clip has {count} group(s) of at most {max_per_group} tokens, "
                f"ask for 1 to {count * max_per_group}"
            )
        out[row, :count] = torch.tensor(share(budget, count))
    return out.to(groups.device)


@dataclass(frozen=True)
class Tokens:
    """What a compressor makes of a clip: a ragged list of tokens in time order, nested inside their groups.

    embeddings: [B, K, D]. lengths: [B] int64, real tokens of each clip (padding comes last).
    positions: [B, K, 3] = (t, y, x) in [0, 1]; NaN where a token has no place.
    group: [B, K] int64, time block, segment or level; contiguous and in time order.
    rank: [B, K] int64, nesting order inside the group: keeping rank < k keeps the k most important tokens.
    indices: [B, K, Q] int64 ids, or None for continuous tokens. codebook_sizes: Q sizes, or ().
    mass: [B, K], inputs each token stands for. source: [B, T*N] int64, token that took each patch, -1 = dropped.
    times: [B, G, 2] seconds, start and end of each group. frames: [B] int64, what decode must return.
    """

    embeddings: Tensor
    lengths: Tensor
    positions: Tensor
    group: Tensor
    rank: Tensor
    indices: Tensor | None = None
    codebook_sizes: tuple[int, ...] = ()
    mass: Tensor | None = None
    source: Tensor | None = None
    times: Tensor | None = None
    frames: Tensor | None = None

    def __post_init__(self) -> None:
        _check("Tokens.embeddings", self.embeddings, (None, None, None), "float")
        batch, count, _ = self.embeddings.shape
        _check("Tokens.lengths", self.lengths, (batch,), "int")
        _check("Tokens.positions", self.positions, (batch, count, 3), "float")
        _check("Tokens.group", self.group, (batch, count), "int")
        _check("Tokens.rank", self.rank, (batch, count), "int")
        _check("Tokens.indices", self.indices, (batch, count, len(self.codebook_sizes)), "int")
        _check("Tokens.mass", self.mass, (batch, count))
        _check("Tokens.source", self.source, (batch, None), "int")
        _check("Tokens.times", self.times, (batch, None, 2))
        _check("Tokens.frames", self.frames, (batch,), "int")

    @property
    def mask(self) -> Tensor:
        """[B, K] bool: True on real tokens."""
        return torch.arange(self.group.shape[1], device=self.group.device) < self.lengths[:, None]

    @property
    def num_groups(self) -> Tensor:
        """[B] int64: groups of each clip (1 at least)."""
        return (
            self.group.masked_fill(~self.mask, 0).amax(1) + 1 if self.group.shape[1] else torch.ones_like(self.lengths)
        )

    @property
    def group_sizes(self) -> Tensor:
        """[B, G] int64: real tokens of each group; 0 for one that has none, and past a clip's own groups."""
        groups = self.num_groups
        sizes = self.group.new_zeros(len(groups), int(groups.max()) if len(groups) else 0)
        return sizes.scatter_add(1, self.group.masked_fill(~self.mask, 0), self.mask.to(sizes.dtype))

    @property
    def bits(self) -> Tensor:
        """[B] float64: nominal bits, sum of log2(codebook size) over real tokens; NaN for continuous tokens."""
        per_token = sum(math.log2(size) for size in self.codebook_sizes) if self.codebook_sizes else math.nan
        return self.lengths.double() * per_token

    def truncate(self, budget: Budget) -> Tokens:
        """Keep the tokens whose rank is below their group's share of the budget; order is kept, padding is trimmed."""
        most = int(self.rank.max()) + 1 if self.rank.numel() else 0
        groups = self.num_groups
        if isinstance(budget, Tensor) and budget.shape[1] > int(groups.max()):
            groups = torch.full_like(groups, budget.shape[1])
        share_BG = resolve_budget(budget, groups=groups, max_per_group=most)
        assert share_BG is not None
        keep = self.mask & (self.rank < share_BG.gather(1, self.group.clamp(max=share_BG.shape[1] - 1)))
        return self.select(keep)

    def select(self, keep: Tensor) -> Tokens:
        """The tokens where `keep` [B, K] is True, in order, padded again to the longest clip."""
        lengths = keep.sum(1)
        count = max(int(lengths.max()), 1) if keep.shape[0] else 0
        order = torch.argsort(keep.logical_not().to(torch.int8), dim=1, stable=True)[:, :count]

        def take(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            index = order.reshape(*order.shape, *[1] * (value.ndim - 2)).expand(*order.shape, *value.shape[2:])
            return value.gather(1, index)

        source = self.source
        if source is not None:  # the patches of a dropped token are dropped with it
            where = torch.where(keep, keep.cumsum(1) - 1, -1)
            where = torch.cat([where, torch.full_like(where[:, :1], -1)], 1)
            source = where.gather(1, torch.where(source < 0, keep.shape[1], source))
        taken = {
            name: take(getattr(self, name)) for name in ("embeddings", "positions", "group", "rank", "indices", "mass")
        }
        return replace(self, **taken, lengths=lengths, source=source)

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(device) for name, v in moved.items() if isinstance(v, Tensor)})


class Loss(NamedTuple):
    """A scalar to minimise, and detached numbers for logging only: the mean of each is logged.

    One entry is not a number: "codebook_counts", int64 counts of the ids of a step (`vtok.losses.codebook_report`),
    which are summed over steps and ranks and logged as usage and perplexity.
    """

    total: Tensor
    report: dict[str, Tensor]


class Quantized(NamedTuple):
    """What every quantizer returns: embeddings [..., D], indices [..., Q] int64 or None, a scalar loss, a report."""

    embeddings: Tensor
    indices: Tensor | None
    loss: Tensor
    report: dict[str, Tensor]


@dataclass
class StreamState:
    """State of a stream: frames or tokens not yet used, and whatever a family caches. Bounded in the video's length."""

    batch: int
    size: tuple[int, int]
    done: int = 0
    buffer: Any = None
    cache: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Compressor(Protocol):
    embedding_dim: int
    max_tokens: int

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens: ...


@runtime_checkable
class Tokenizer(Compressor, Protocol):
    codebook_sizes: tuple[int, ...]

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor: ...

    def lookup(self, indices: Tensor) -> Tensor: ...


@runtime_checkable
class Projector(Compressor, Protocol):
    def compress(
        self, features: Features, *, budget: Budget | None = None, prompt: list[str] | None = None
    ) -> Tokens: ...


@runtime_checkable
class Streaming(Protocol):
    """Encode and decode in pieces of any length with bounded memory; equal to the offline result."""

    def init_state(self, batch: int, size: tuple[int, int]) -> StreamState: ...

    def step(self, clip: Clip, state: StreamState) -> tuple[Tokens | None, StreamState]: ...

    def flush(self, state: StreamState) -> Tokens | None: ...

    def init_decode_state(self, batch: int, size: tuple[int, int]) -> StreamState: ...

    def decode_step(self, tokens: Tokens, state: StreamState) -> tuple[Tensor | None, StreamState]: ...

    def decode_flush(self, state: StreamState) -> Tensor | None: ...


class Reducer(Protocol):
    def __call__(
        self,
        features: Features,
        *,
        budget: Budget,
        prompt: list[str] | None = None,
        generator: Generator | None = None,
    ) -> Tokens: ...


class Objective(Protocol):
    def __call__(self, model: Any, clip: Clip, step: int) -> Loss: ...


LoadTokenizer = Callable[[str], Any]  # path or Hub id -> a frozen tokenizer of ours: teachers come in this way
