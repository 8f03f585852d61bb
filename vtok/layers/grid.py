"""Tokenizers whose tokens lie on a grid of latent frames: places of tokens, padding, and streaming of any length.

    T frames --1 + n groups--> latent frames 1 + n, h x w tokens each, in raster order

The first group is one frame (an image is a video of one frame), every later group holds `group_frames` frames. Where a
model has two levels, a group begins with its coarse tokens, followed by the finer ones of the same stretch of time, so
that dropping the end of every group leaves what the coarse level alone says. Or the first frame has a grid of its own,
finer than that of the others, which all of them lean on.

A model is causal in time and keeps what it needs of the past in a cache (`vtok.layers.causal`): a long video is coded
in pieces with the result of the whole, in constant memory.

Letters: B clips, C channels, T frames, H height, W width, G groups, K tokens a clip, D width of a code, Q ids a token,
t, h, w latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.stream import StreamedTokenizer, check_pixels, cut_evenly, join, pixels_of
from vtok.types import Budget, Clip, Quantized, ShapeError, StreamState, Tokens


@dataclass(frozen=True)
class Level:
    """Tokens of one resolution: latent frames a group, and the grid of one of them."""

    frames: int  # of every group but the first
    height: int
    width: int
    first: int = 1  # of the first group

    def count(self, groups: int, *, begins: bool) -> int:
        """Latent frames of so many groups, 1 or more."""
        return self.first + (groups - 1) * self.frames if begins else groups * self.frames


@dataclass(frozen=True)
class Layout:
    """Where the tokens of `groups` groups stand: level after level, and in the order of Tokens.

    order: [K], the place in the concatenation of all levels of the k-th token. group, rank: [K]. starts: [G + 1], the
    first token of each group. places: [K, 3] = (t, y, x) in [0, 1], centres of cells.
    """

    levels: tuple[Level, ...]
    order: Tensor
    group: Tensor
    rank: Tensor
    starts: Tensor
    places: Tensor
    shapes: tuple[tuple[int, int, int], ...]  # (t, h, w) of each level

    @classmethod
    def of(cls, levels: Sequence[Level], groups: int, *, begins: bool, device: torch.device | None = None) -> Layout:
        every, places, shapes = [], [], []
        apart = any(level.first == 0 for level in levels)  # levels then share one axis of time
        longest = max(level.frames for level in levels)
        for level in levels:
            count = level.count(groups, begins=begins)
            each = torch.full((groups,), level.frames)
            each[0] = level.first if begins else level.frames
            shapes.append((count, level.height, level.width))
            every.append(torch.arange(groups).repeat_interleave(each * level.height * level.width))
            frames = begins + (groups - begins) * longest if apart else count
            late = begins - level.first if begins else 0
            axes = [(torch.arange(late, late + count) + 0.5) / frames]
            axes += [(torch.arange(n) + 0.5) / n for n in shapes[-1][1:]]
            places.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))
        group = torch.cat(every)
        order = torch.argsort(group, stable=True)
        group = group[order]
        starts = torch.searchsorted(group, torch.arange(groups + 1))
        rank = torch.arange(len(group)) - starts[group]
        parts = (order, group, rank, starts, torch.cat(places)[order])
        return cls(tuple(levels), *(part.to(device) for part in parts), shapes=tuple(shapes))

    def tokens(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each level [B, t, h, w, D] in the order of tokens: [B, K, D]."""
        return torch.cat([value.flatten(1, 3) for value in values], 1)[:, self.order]

    def grids(self, values: Tensor) -> list[Tensor]:
        """The inverse of `tokens`: [B, K, ...] as one [B, t, h, w, ...] for each level."""
        back = torch.empty_like(values)
        back[:, self.order] = values
        sizes = [t * h * w for t, h, w in self.shapes]
        return [part.unflatten(1, shape) for part, shape in zip(back.split(sizes, 1), self.shapes)]


class GridTokenizer(StreamedTokenizer):
    """Base of tokenizers on a grid: `encode`, `decode`, `lookup` and their streaming forms.

    A family gives `code_grid` and `decode_grid`, and the attributes below.

    Args:
        stride: (t, h, w) pixels a token of the finest level stands for.
        levels: (t, h, w) of each level in units of the finest, coarse to fine; ((1, 1, 1),) for one level.
        first_apart: the first frame alone is on the first of two levels, and on no other.
        num_frames, size: of the clips it is trained at; other lengths and sizes work too.
    """

    def __init__(
        self,
        *,
        channels: int,
        stride: tuple[int, int, int],
        levels: tuple[tuple[int, int, int], ...],
        num_frames: int,
        size: tuple[int, int],
        embedding_dim: int,
        codebook_sizes: tuple[int, ...],
        index_factors: tuple[tuple[int, ...], ...],
        first_apart: bool = False,
    ):
        super().__init__()
        self.first_apart = first_apart
        self.channels, self.stride, self.level_strides = channels, stride, levels
        self.num_frames, self.trained_size = num_frames, size
        self.extra_frames = int(num_frames > 1)  # the first group is one frame
        self.group_frames = stride[0] * max(level[0] for level in levels)
        # height and width are padded to whole cells of the coarsest level
        self.cell = tuple(stride[axis] * max(level[axis] for level in levels) for axis in (1, 2))
        self.embedding_dim = embedding_dim
        self.codebook_sizes, self.index_factors = codebook_sizes, index_factors
        self.max_tokens = self.token_counts(num_frames, size)[-1]

    # ---- what a family gives

    def code_grid(self, video: Tensor, valid: Tensor, cache: dict[nn.Module, Any] | None) -> list[Quantized]:
        """Codes of each level: embeddings [B, t, h, w, D], indices [B, t, h, w, Q].

        video: [B, C, T, H, W] of whole groups. valid: [B, G] bool, groups that are not padding.
        cache: None for a whole video, else what the stream keeps (empty where it begins).
        """
        raise NotImplementedError

    def decode_grid(self, codes: list[Tensor], keep: list[Tensor], cache: dict[nn.Module, Any] | None) -> Tensor:
        """Codes [B, t, h, w, D] and keep [B, t, h, w] bool of each level -> video [B, C, T, H, W] of whole groups."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        raise NotImplementedError

    # ---- lengths and places

    def group_lengths(self, frames: int, *, begins: bool) -> list[int]:
        return cut_evenly(frames, self.group_frames, first=int(begins))

    def groups(self, frames: Tensor) -> Tensor:
        """Groups that clips of so many frames have: 1 + ceil((frames - 1) / group_frames)."""
        return 1 + (frames - 1 + self.group_frames - 1) // self.group_frames

    def levels(self, size: tuple[int, int]) -> tuple[Level, ...]:
        """The levels of frames of (H, W) = size."""
        cells = [-(-length // cell) for length, cell in zip(size, self.cell)]
        out = []
        for number, (_, h, w) in enumerate(self.level_strides):
            grid = [
                count * cell // (stride * coarse)
                for count, cell, stride, coarse in zip(cells, self.cell, self.stride[1:], (h, w))
            ]
            frames, first = self.latent_frames(number)
            out.append(Level(frames, *grid, first=first))
        return tuple(out)

    def latent_frames(self, level: int) -> tuple[int, int]:
        """Latent frames that a level has of every group but the first, and of the first."""
        if self.first_apart and level == 0:
            return 0, 1
        frames = self.group_frames // (self.stride[0] * self.level_strides[level][0])
        return frames, 0 if self.first_apart else 1

    def token_counts(self, frames: int, size: tuple[int, int]) -> list[int]:
        """Tokens of a clip with the first level, the first two, ... and all of them: the budgets that can be met.

        With the first frame apart there is no clip without either level, and one budget."""
        groups = 1 + -(-(frames - 1) // self.group_frames)
        counts, total = [], 0
        for level in self.levels(size):
            total += level.count(groups, begins=True) * level.height * level.width
            counts.append(total)
        return counts[-1:] if self.first_apart else counts

    def layout(self, groups: int, size: tuple[int, int], *, begins: bool, device: torch.device) -> Layout:
        return Layout.of(self.levels(size), groups, begins=begins, device=device)

    def whole_groups(self, video: Tensor, lengths: Tensor, *, begins: bool = True) -> Tensor:
        """The video continued to whole groups by each clip's last real frame, and to whole cells by its edges."""
        check_pixels(video, self.channels)
        frames = video.shape[2] - begins
        wanted = -(-frames // self.group_frames) * self.group_frames + begins
        if wanted != video.shape[2] or bool((lengths < wanted).any()):
            at = torch.arange(wanted, device=video.device).expand(video.shape[0], -1)
            at = torch.minimum(at, (lengths - 1).clamp_min(0)[:, None])
            video = video.gather(2, at[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:]))
        bottom, right = -video.shape[3] % self.cell[0], -video.shape[4] % self.cell[1]
        if bottom or right:
            video = F.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate")
        return video

    # ---- whole clips

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a clip of any length and size: group = group of frames, rank = level and raster order in it.

        The grid is fixed: a `budget` must be one of `token_counts` (with two levels: the coarse one alone, or both).
        Raises: ValueError naming the budgets that there are.
        """
        pixels, lengths = pixels_of(self, clip), clip.frames()
        size = (pixels.shape[3], pixels.shape[4])
        groups = self.groups(lengths)
        video = self.whole_groups(pixels, lengths)
        valid = torch.arange(int(groups.max()), device=video.device) < groups[:, None]
        tokens = self._tokens(self._code(video, valid), valid, size, lengths, begins=True)
        if clip.times is not None:
            tokens = replace(tokens, times=self._group_times(clip.times, lengths))
        return tokens if budget is None else self._within(tokens, budget, lengths, size)

    def _pieces(self, groups: int) -> list[tuple[int, int]]:
        """Groups in pieces of about the length trained at: activations of a long video need not fit in memory."""
        most = max(-(-(self.num_frames - 1) // self.group_frames), 1)
        ends = list(range(most + 1, groups, most))
        return list(zip([0, *ends], [*ends, groups]))

    @staticmethod
    def _edge(group: int, frames: int, begins: bool, first: int = 1) -> int:
        """Frames (or latent frames) before a group, where groups hold `frames` of them and the first of a video
        `first`."""
        return group * frames - (frames - first) * (begins and group > 0)

    def _code(
        self, video: Tensor, valid: Tensor, *, begins: bool = True, cache: dict[nn.Module, Any] | None = None
    ) -> list[Quantized]:
        pieces = self._pieces(valid.shape[1])
        if len(pieces) == 1:
            return self.code_grid(video, valid, cache)
        cache = {} if cache is None else cache
        found = []
        for first, last in pieces:
            start, end = (self._edge(group, self.group_frames, begins) for group in (first, last))
            found.append(self.code_grid(video[:, :, start:end], valid[:, first:last], cache))
        return [_concatenated(level) for level in zip(*found)]

    def _decode(
        self,
        codes: list[Tensor],
        keep: list[Tensor],
        groups: int,
        *,
        begins: bool = True,
        cache: dict[nn.Module, Any] | None = None,
    ) -> Tensor:
        pieces = self._pieces(groups)
        if len(pieces) == 1:
            return self.decode_grid(codes, keep, cache)
        cache = {} if cache is None else cache
        spans = [self.latent_frames(level) for level in range(len(self.level_strides))]
        out = []
        for piece in pieces:
            edges = [[self._edge(group, span, begins, first) for group in piece] for span, first in spans]
            part = [[value[:, a:b] for value, (a, b) in zip(values, edges)] for values in (codes, keep)]
            out.append(self.decode_grid(part[0], part[1], cache))
        return torch.cat(out, 2)

    def _tokens(
        self, coded: list[Quantized], valid: Tensor, size: tuple[int, int], frames: Tensor, *, begins: bool
    ) -> Tokens:
        layout = self.layout(valid.shape[1], size, begins=begins, device=valid.device)
        lengths = layout.starts[valid.sum(1)]
        embeddings = layout.tokens([level.embeddings for level in coded])
        batch = embeddings.shape[0]
        discrete = all(level.indices is not None for level in coded)
        return Tokens(
            embeddings=embeddings,
            lengths=lengths,
            positions=layout.places.to(embeddings).expand(batch, -1, -1),
            group=layout.group.expand(batch, -1),
            rank=layout.rank.expand(batch, -1),
            indices=layout.tokens([level.indices for level in coded]) if discrete else None,  # pyright: ignore
            codebook_sizes=self.codebook_sizes if discrete else (),
            frames=frames,
        )

    def _within(self, tokens: Tokens, budget: Budget, lengths: Tensor, size: tuple[int, int]) -> Tokens:
        counts = [self.token_counts(int(frames), size) for frames in lengths]
        if isinstance(budget, Tensor):
            raise ValueError("the tokens of this model are a grid: a budget is an int, one of model.token_counts")
        for level in range(len(counts[0])):
            if all(budget == each[level] for each in counts):
                per_group = [lev.height * lev.width * lev.frames for lev in self.levels(size)[: level + 1]]
                whole = level == len(counts[0]) - 1
                return tokens if whole else tokens.select(tokens.mask & (tokens.rank < sum(per_group)))
        choices = sorted({count for each in counts for count in each})
        raise ValueError(
            f"budget={budget}: the tokens of this model are a grid, of {', '.join(map(str, choices))} tokens for these "
            "clips; ask for one of these numbers (clips of one length at a time), or leave the budget out"
        )

    def _grids(
        self, tokens: Tokens, groups: int, size: tuple[int, int], *, begins: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Ragged tokens back on their grids: codes [B, t, h, w, D] (zero where absent), keep [B, t, h, w] bool."""
        layout = self.layout(groups, size, begins=begins, device=tokens.embeddings.device)
        count, mask = len(layout.order), tokens.mask
        inside = tokens.group < groups
        room = layout.starts.diff()[tokens.group.clamp(max=groups - 1)]
        if bool((mask & ~(inside & (tokens.rank < room))).any()):
            raise ShapeError(
                f"tokens reach past the grids {layout.shapes} (t, h, w) that {tokens.frames} frames of {size} have: "
                "decode at the size they were encoded at"
            )
        batch, _, dim = tokens.embeddings.shape
        where = torch.where(mask, layout.starts[tokens.group.clamp(max=groups - 1)] + tokens.rank, count)
        codes = tokens.embeddings.new_zeros(batch, count + 1, dim)
        codes = codes.scatter(1, where[..., None].expand(-1, -1, dim), tokens.embeddings)
        keep = torch.zeros(batch, count + 1, dtype=torch.bool, device=where.device).scatter(1, where, True)
        return layout.grids(codes[:, :-1]), layout.grids(keep[:, :-1])

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        """Video [B, C, T, H, W] in [-1, 1] with T = max(tokens.frames); frames past a clip's own repeat its last.

        Raises: ShapeError for tokens that do not fill the grid of their first level.
        """
        if tokens.frames is None:
            raise ShapeError("decode needs Tokens.frames: how many frames each clip has")
        frames = int(tokens.frames.max())
        groups = self.groups(tokens.frames)
        codes, keep = self._grids(tokens, int(groups.max()), size, begins=True)
        self._check_filled(keep, groups, begins=True)
        video = self._decode(codes, keep, int(groups.max()))[:, :, :frames, : size[0], : size[1]].clamp(-1, 1)
        last = torch.minimum(torch.arange(frames, device=video.device), tokens.frames[:, None] - 1)
        return video.gather(2, last[:, None, :, None, None].expand_as(video))

    def _check_filled(self, keep: list[Tensor], groups: Tensor, *, begins: bool) -> None:
        """Raises: ShapeError where tokens lack of the levels that every clip has: the first, or both of two apart."""
        for level in range(2 if self.first_apart else 1):
            frames, first = self.latent_frames(level)
            counts = first + (groups - 1) * frames if begins else groups * frames
            have = keep[level]
            real = torch.arange(have.shape[1], device=have.device) < counts.to(have.device)[:, None]
            if not bool((have | ~real[:, :, None, None]).all()):
                raise ShapeError(
                    f"tokens are missing: {int(have.sum())} of {int(real.sum()) * have.shape[2] * have.shape[3]} on "
                    "the grid are there, and this model reads all of them (of its first level)"
                )

    # ---- streaming: a step's Tokens count their groups from 0, `state.done` groups came before

    def _drain(self, state: StreamState, *, final: bool) -> Tokens | None:
        pieces: list[Tokens] = []
        while state.buffer is not None and (have := state.buffer.shape[2]):
            begins = state.done == 0
            groups = begins + (have - begins) // self.group_frames
            take = self._edge(groups, self.group_frames, begins)
            if not groups:
                if not final:
                    break
                groups, take = 1, have
            part, state.buffer = state.buffer[:, :, :take], state.buffer[:, :, take:]
            lengths = torch.full((state.batch,), take, dtype=torch.int64, device=part.device)
            valid = torch.ones(state.batch, groups, dtype=torch.bool, device=part.device)
            video = self.whole_groups(part, lengths, begins=begins)
            coded = self._code(video, valid, begins=begins, cache=state.cache.setdefault("past", {}))
            pieces.append(self._tokens(coded, valid, state.size, lengths, begins=begins))
            state.done += groups
        if state.buffer is not None and not state.buffer.shape[2]:
            state.buffer = None
        return join(pieces)

    def decode_step(self, tokens: Tokens, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """Tokens of the next whole groups (as `step` gave them) -> their frames [B, C, T, H, W].

        `tokens.frames` says how many frames they hold, equal over the batch.
        """
        frames = self._frames_of_step(tokens, state)
        begins = state.done == 0
        groups = begins + -(-(frames - begins) // self.group_frames)
        codes, keep = self._grids(tokens, groups, state.size, begins=begins)
        self._check_filled(keep, torch.full((state.batch,), groups), begins=begins)
        past = state.cache.setdefault("past", {})
        video = self._decode(codes, keep, groups, begins=begins, cache=past)
        state.done += groups
        return video[:, :, :frames, : state.size[0], : state.size[1]].clamp(-1, 1), state

    def decode_flush(self, state: StreamState) -> Tensor | None:
        """Nothing is held back by `decode_step`: always None."""
        return None


def _concatenated(parts: Sequence[Quantized]) -> Quantized:
    """Pieces of one level as one, in time."""
    indices = [part.indices for part in parts if part.indices is not None]
    embeddings = torch.cat([part.embeddings for part in parts], 1)
    return Quantized(embeddings, torch.cat(indices, 1) if indices else None, parts[0].loss, {})
