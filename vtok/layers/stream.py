"""What tokenizers that code a stream piece by piece share: the buffer of frames, ids read back, pieces joined.

Letters: B clips, C channels, T frames, H height, W width, K tokens, Q ids a token.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.types import Clip, ShapeError, StreamState, Tokens


class StreamedTokenizer(nn.Module):
    """The half of `Streaming` that does not depend on the model. A subclass gives `channels`, `codebook_sizes`,
    `lookup` and `_drain(state, *, final)`: the tokens of every group that the buffered frames complete (`final`: all).
    """

    channels: int
    codebook_sizes: tuple[int, ...]
    num_frames: int  # of a chunk
    num_tokens: int  # of a group, where tokens are nested
    extra_frames = 0  # a stream's first chunk brings so many frames more than later ones

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        raise NotImplementedError

    def _drain(self, state: StreamState, *, final: bool) -> Tokens | None:
        raise NotImplementedError

    def group_lengths(self, frames: int, *, begins: bool) -> list[int]:
        """Frames of each group among so many frames of a stream, from its beginning or later on."""
        raise NotImplementedError

    def init_state(self, batch: int, size: tuple[int, int]) -> StreamState:
        """State of an encoding stream of `batch` videos of (H, W) = size, all of one length."""
        return StreamState(batch, size)

    def step(self, clip: Clip, state: StreamState) -> tuple[Tokens | None, StreamState]:
        """Take any number of frames; return the tokens of every group completed by them, or None."""
        pixels = pixels_of(self, clip, min_frames=0)
        if tuple(pixels.shape[3:]) != state.size or pixels.shape[0] != state.batch:
            raise ShapeError(
                f"stream of {state.batch} videos of size {state.size} got a clip of shape {list(pixels.shape)}"
            )
        if clip.lengths is not None and bool((clip.lengths != pixels.shape[2]).any()):
            raise ShapeError("a stream takes clips without padding: every video of the batch advances together")
        self._note_times(clip, state)
        state.buffer = pixels if state.buffer is None else torch.cat([state.buffer, pixels], 2)
        return self._with_times(self._drain(state, final=False), state), state

    def flush(self, state: StreamState) -> Tokens | None:
        """Tokens of the frames left over, as the end of the video; None when there are none."""
        return self._with_times(self._drain(state, final=True), state)

    @staticmethod
    def _note_times(clip: Clip, state: StreamState) -> None:
        """Keep the seconds of frames until their tokens are given out. Raises: ShapeError where some have none."""
        assert clip.video is not None
        if not clip.video.shape[2]:
            return
        if state.cache.setdefault("timed", clip.times is not None) != (clip.times is not None):
            raise ShapeError(
                "Clip.times are given for some frames of a stream and not for others: give them in every step or none"
            )
        if clip.times is not None:
            waiting = state.cache.get("times")
            state.cache["times"] = clip.times if waiting is None else torch.cat([waiting, clip.times], 1)

    def _with_times(self, tokens: Tokens | None, state: StreamState) -> Tokens | None:
        """`tokens` with the seconds of their groups, where the stream's clips had times."""
        waiting = state.cache.get("times")
        if tokens is None or waiting is None:
            return tokens
        assert tokens.frames is not None
        begins, state.cache["begun"] = "begun" not in state.cache, True
        state.cache["times"] = waiting[:, int(tokens.frames[0]) :]
        return replace(tokens, times=self._group_times(waiting, tokens.frames, begins=begins))

    def _slots(self, tokens: Tokens, groups: int) -> tuple[Tensor, Tensor]:
        """Ragged nested tokens back in their places: codes [B, G, K, D] (zero where absent), keep [B, G, K] bool."""
        batch, _, dim = tokens.embeddings.shape
        count, mask = self.num_tokens, tokens.mask
        if mask.any() and (int(tokens.group[mask].max()) >= groups or int(tokens.rank[mask].max()) >= count):
            raise ShapeError(
                f"tokens reach past the {groups} groups of {count} tokens that {tokens.frames} frames have"
            )
        where = torch.where(mask, tokens.group * count + tokens.rank, groups * count)
        codes = tokens.embeddings.new_zeros(batch, groups * count + 1, dim)
        codes = codes.scatter(1, where[..., None].expand(-1, -1, dim), tokens.embeddings)
        keep = torch.zeros(batch, groups * count + 1, dtype=torch.bool, device=where.device).scatter(1, where, True)
        return codes[:, :-1].reshape(batch, groups, count, dim), keep[:, :-1].reshape(batch, groups, count)

    def _group_times(self, times: Tensor, lengths: Tensor, *, begins: bool = True) -> Tensor:
        """[B, G, 2] seconds of the first and last frame of every group of clips, which are whole or (`begins=False`) go
        on from others."""
        parts = torch.tensor(self.group_lengths(int(lengths.max()), begins=begins), device=times.device)
        last = parts.cumsum(0) - 1
        edges = torch.minimum(torch.stack([last - parts + 1, last], -1).flatten(), lengths[:, None] - 1)
        return times.gather(1, edges).unflatten(1, (-1, 2))

    @staticmethod
    def _frames_of_step(tokens: Tokens, state: StreamState) -> int:
        """How many frames the tokens of a decoding step hold. Raises: ShapeError where they differ over the batch."""
        if tokens.frames is None or tokens.frames.shape[0] != state.batch:
            raise ShapeError(f"a decoding stream of {state.batch} videos needs Tokens.frames of that many")
        frames = int(tokens.frames[0])
        if bool((tokens.frames != frames).any()):
            raise ShapeError("a stream decodes videos of one length: Tokens.frames differ over the batch")
        return frames

    def init_decode_state(self, batch: int, size: tuple[int, int]) -> StreamState:
        """State of a decoding stream that makes frames of (H, W) = size."""
        return StreamState(batch, size)

    def tokens_from_indices(
        self, indices: Tensor, *, lengths: Tensor, group: Tensor, rank: Tensor, frames: Tensor
    ) -> Tokens:
        """Tokens read back from a file: ids [B, K, Q] with their groups and ranks (places follow from a size)."""
        embeddings = self.lookup(indices)
        return Tokens(
            embeddings=embeddings,
            lengths=lengths,
            positions=embeddings.new_full((*indices.shape[:2], 3), torch.nan),
            group=group,
            rank=rank,
            indices=indices,
            codebook_sizes=self.codebook_sizes,
            frames=frames,
        )


def cut_evenly(frames: int, each: int, *, first: int = 0) -> list[int]:
    """`frames` as one part of `first`, where that is not 0, and parts of `each`; the last may be smaller."""
    ends = [min(end, frames) for end in range(first or each, frames + each, each)]
    return [end - start for start, end in zip([0, *ends], ends) if end > start]


def check_pixels(video: Tensor, channels: int, *, min_frames: int = 1) -> None:
    """Raises: ShapeError for a video [B, C, T, H, W] of other channels, fewer frames, or no pixel in them."""
    shape = list(video.shape)
    if shape[1] != channels:
        raise ShapeError(
            f"Clip.video has {shape[1]} channels, the model takes {channels}: give it clips of as many "
            f"(3 of a video, or those of data.map), or train one with model.channels={shape[1]}"
        )
    if shape[2] < min_frames or min(shape[3:]) < 1:
        raise ShapeError(
            f"Clip.video {shape} ([B, C, T, H, W]) has no pixel: frames, height and width must be 1 or more each"
        )


def pixels_of(model: Any, clip: Clip, *, min_frames: int = 1) -> Tensor:
    """The clip's video [B, C, T, H, W] in [-1, 1], in the precision of the weights (levels become float32).

    Raises: ShapeError for a clip without video, of other channels than `model.channels`, fewer frames, or no pixel
        in them.
    """
    video = clip.as_float().video
    if video is None:
        raise ShapeError("this model reads Clip.video, and the clip has none")
    check_pixels(video, model.channels, min_frames=min_frames)
    return video.to(next(iter(model.parameters())).dtype)


def join(pieces: list[Tokens]) -> Tokens | None:
    """Consecutive tokens of one stream as one Tokens, groups counted through; `source` counts patches through as well.

    Raises: ShapeError for pieces with padding, and for what some of them have and others lack.
    """
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    for name in ("indices", "mass", "source", "times", "frames"):
        having = [getattr(piece, name) is not None for piece in pieces]
        if any(having) and not all(having):
            raise ShapeError(f"piece {having.index(False)} of a stream has no Tokens.{name}, others have")
    if not all(bool(piece.mask.all()) for piece in pieces):
        raise ShapeError("pieces of a stream have no padding: its videos advance together")
    groups = [0, *itertools.accumulate(int(piece.num_groups.max()) for piece in pieces)]
    tokens = [0, *itertools.accumulate(piece.embeddings.shape[1] for piece in pieces)]

    def cat(name: str, offsets: list[int] | None = None) -> Tensor | None:
        if getattr(pieces[0], name) is None:
            return None
        parts = [getattr(piece, name) for piece in pieces]
        if offsets is not None:
            parts = [torch.where(part < 0, part, part + more) for part, more in zip(parts, offsets)]
        return torch.cat(parts, 1)

    every = [piece.frames for piece in pieces if piece.frames is not None]
    one: dict[str, Any] = {name: cat(name) for name in ("embeddings", "positions", "rank", "indices", "mass", "times")}
    return replace(
        pieces[0],
        **one,
        lengths=torch.stack([piece.lengths for piece in pieces]).sum(0),
        group=cat("group", groups),
        source=cat("source", tokens),
        frames=torch.stack(every).sum(0) if every else None,
    )
