"""One time block of a video at lengths that are being tried: what the decoder makes of it, and how far that is off.

Letters: S lengths, T frames, H height, W width, G groups (time blocks), K tokens of a group, Q ids a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.layers.chunked import ChunkedTokenizer
from vtok.layers.grid import GridTokenizer
from vtok.layers.overlapped import OverlappedTokenizer
from vtok.layers.perceptual import LPIPS
from vtok.layers.stream import StreamedTokenizer, cut_evenly
from vtok.metrics.distortion import clip_lpips
from vtok.types import StreamState, Tokens, to_uint8


@dataclass(frozen=True)
class Step:
    """All tokens [1, K] of one step of a stream, and the frames uint8 [T, H, W, 3] they stand for."""

    tokens: Tokens
    frames: np.ndarray
    begins: bool = False  # the first step of its stream


def most_tokens(tokens: Tokens) -> int:
    return int(tokens.rank.max()) + 1 if tokens.rank.numel() else 1


@dataclass
class Group:
    """One time block: its tokens [1, K], numbered as group 0, and its frames uint8 [3, T, H, W] (None: let go)."""

    tokens: Tokens
    frames: Tensor | None
    num_frames: int

    @property
    def ids(self) -> np.ndarray:
        """[K, Q] int64."""
        assert self.tokens.indices is not None
        return self.tokens.indices[0].cpu().numpy()


def groups_of(model: Any, step: Step) -> list[Group]:
    """The groups of a step one by one. Raises: ValueError for tokens that do not say their frames."""
    tokens = step.tokens
    if tokens.frames is None:
        raise ValueError("lengths block by block need a model that says how many frames its tokens stand for")
    video = torch.from_numpy(step.frames).permute(3, 0, 1, 2)
    out, end = [], 0
    for g, length in enumerate(frames_of_groups(model, step)):
        start, end = end, end + length
        one = tokens.select(tokens.mask & (tokens.group == g))
        one = replace(one, group=torch.zeros_like(one.group), frames=torch.full_like(tokens.frames, end - start))
        one = replace(one, times=tokens.times[:, g : g + 1]) if tokens.times is not None else one
        out.append(Group(one, video[:, start:end], end - start))
    return out


def frames_of_groups(model: Any, step: Step) -> list[int]:
    """Frames of each group of a step."""
    assert step.tokens.frames is not None
    frames, groups = int(step.tokens.frames[0]), int(step.tokens.num_groups[0])
    if isinstance(model, StreamedTokenizer):
        return model.group_lengths(frames, begins=step.begins)
    return cut_evenly(frames, -(-frames // groups))


def steps_to_come(model: Any, frames: int, *, begins: bool) -> list[list[int]]:
    """Frames of each group of every step that so many frames of a stream will make, given as `stream_steps` gives them.

    A step is a whole chunk; at the end come the whole groups of a short one, then by itself what is left of a group.
    """
    usual, out = usual_frames(model), []
    while frames > 0:
        piece = min(model.num_frames - (0 if begins else model.extra_frames), frames)
        groups = model.group_lengths(piece, begins=begins)
        whole = len(groups) - (len(groups) > 1 and groups[-1] < usual)
        out += [part for part in (groups[:whole], groups[whole:]) if part]
        frames, begins = frames - piece, False
    return out


class StepsOf:
    """Which steps the stream of a model can have, checked one after the other: nothing of a file is decoded before.

    A model that is not a `StreamedTokenizer` is only asked for its frames.
    """

    def __init__(self, model: Any, size: tuple[int, int]) -> None:
        self.model, self.size, self.begins = model, size, True

    def check(self, counts: Sequence[int], frames: int | None) -> None:
        """Raises: ValueError for a step of so many tokens a group, and frames, that this model does not make."""
        if not frames:
            raise ValueError(f"a step of {len(counts)} groups states {'no' if frames is None else 0} frames")
        model = self.model
        if not isinstance(model, StreamedTokenizer):
            return
        # first whether they can be alike at all: the frames are a number in a file, a list of their groups is memory
        near = frames <= len(counts) * usual_frames(model)
        groups = len(model.group_lengths(frames, begins=self.begins)) if near else 0
        if groups != len(counts):
            raise ValueError(f"a step of {frames} frames has {len(counts)} groups, this model makes others of them")
        nested = getattr(model, "num_tokens", None)
        if nested is not None and max(counts) > nested:
            raise ValueError(f"a group of {max(counts)} tokens, this model has {nested}")
        if isinstance(model, GridTokenizer):
            most = model.token_counts(1 + groups * model.group_frames, self.size)[-1]
            if sum(counts) > most:
                raise ValueError(f"a step of {sum(counts)} tokens in {groups} groups, this model has at most {most}")
        self.begins = False


def unlike_steps(model: Any) -> int:
    """Runs of steps alike that a stream has at most: a first step, whole ones, a short one, a last group."""
    if not isinstance(model, StreamedTokenizer):
        return 4
    lengths = range(1, 3 * model.num_frames + 1)
    return max(len(list(groupby(steps_to_come(model, frames, begins=True)))) for frames in lengths)


def usual_frames(model: Any) -> int:
    """Frames of a group that is neither the first nor the last; 0 where a model does not say."""
    return model.group_lengths(1 << 10, begins=False)[0] if isinstance(model, StreamedTokenizer) else 0


Distance = Callable[[Tensor, Tensor], Tensor]  # (recon, frames) uint8 [S, 3, T, H, W] -> [S] float64


def squared_error(recon: Tensor, frames: Tensor) -> Tensor:
    """[S] sum of squared differences of levels over all frames, pixels and channels."""
    return (recon.float() - frames.float()).square().sum((1, 3, 4), dtype=torch.float64).sum(1)


def mean_squared_error(recon: Tensor, frames: Tensor) -> Tensor:
    """[S] the same, a value."""
    return squared_error(recon, frames) / frames[0].numel()


class Trial:
    """Decodes the next block at lengths that are being tried, after the blocks accepted before it."""

    rows_at_once = 1 << 22  # pixels of all lengths that are decoded together

    def __init__(self, model: Any, size: tuple[int, int], distance: Distance) -> None:
        self.model, self.distance = model, distance
        self.state: StreamState = model.init_decode_state(1, size)

    @torch.inference_mode()
    def measure(self, group: Group, lengths: list[int]) -> list[float]:
        """The distortion of the block at each length."""
        assert group.frames is not None
        frames = group.frames[None].to(group.tokens.embeddings.device)
        step = max(1, self.rows_at_once // max(frames[0, 0].numel(), 1))
        out: list[float] = []
        for at in range(0, len(lengths), step):
            here = lengths[at : at + step]
            many = _repeat_tokens(group.tokens, len(here)).truncate(torch.tensor(here)[:, None])
            video, state = self.model.decode_step(many, _repeat_state(self.state, len(here)))
            # a decoder that waits for more is asked what it would make of a video that ended here
            parts = [part for part in (video, self.model.decode_flush(state)) if part is not None]
            video = torch.cat(parts, 2)[:, :, -group.num_frames :]
            out += self.distance(to_uint8(video), frames.expand(len(here), -1, -1, -1, -1)).tolist()
        return out

    def mark(self) -> StreamState:
        """The state after the blocks accepted so far, which later ones leave alone."""
        return _repeat_state(self.state, 1)

    @torch.inference_mode()
    def measure_together(self, groups: list[Group], lengths: list[int], start: StreamState) -> list[float]:
        """The distortion of each of the blocks after `start` once all of them are decoded at these lengths."""
        state, parts = _repeat_state(start, 1), []
        for group, length in zip(groups, lengths):
            video, state = self.model.decode_step(group.tokens.truncate(torch.tensor([[length]])), state)
            parts.append(video)
        parts.append(self.model.decode_flush(state))
        video = torch.cat([part for part in parts if part is not None], 2)
        video = to_uint8(video[:, :, -sum(group.num_frames for group in groups) :])
        out, at = [], 0
        for group in groups:
            assert group.frames is not None
            here, at = video[:, :, at : at + group.num_frames], at + group.num_frames
            out += self.distance(here, group.frames[None].to(here.device)).tolist()
        return out

    @torch.inference_mode()
    def accept(self, group: Group, length: int) -> None:
        """The block has this length."""
        _, self.state = self.model.decode_step(group.tokens.truncate(torch.tensor([[length]])), self.state)


def _repeat_tokens(tokens: Tokens, rows: int) -> Tokens:
    names = ("embeddings", "lengths", "positions", "group", "rank", "indices", "mass", "source", "times", "frames")
    return replace(tokens, **{name: _repeat(getattr(tokens, name), rows) for name in names})


def _repeat_state(state: StreamState, rows: int) -> StreamState:
    """The state of `rows` streams that have come the same way; decoding with it leaves the original alone."""
    return replace(state, batch=rows, buffer=_repeat(state.buffer, rows), cache=_repeat(state.cache, rows))


def _repeat(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return value.expand(rows, *value.shape[1:]).clone() if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, dict):
        return {key: _repeat(item, rows) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_repeat(item, rows) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def stand_alone(model: Any) -> bool:
    """Whether a block decodes to the same frames whatever the length of the blocks before it."""
    chunks = getattr(type(model), "decode_step", None) is ChunkedTokenizer.decode_step
    return chunks and model.blocks == 1


def drawn_together(model: Any) -> int:
    """Blocks that are decoded together, so that later ones can change what earlier ones become; 0 for none."""
    return model.chunk_groups - 1 if isinstance(model, OverlappedTokenizer) else 0


def mse_of(psnr_db: float) -> float:
    """Mean squared error in levels of a PSNR with peak 255."""
    return 255.0**2 / 10 ** (psnr_db / 10)


def lpips_distance(net: LPIPS) -> Distance:
    """Mean LPIPS over frames."""

    def distance(recon: Tensor, frames: Tensor) -> Tensor:
        return clip_lpips(net, recon, frames.contiguous())

    return distance
