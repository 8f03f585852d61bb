"""Segments read one after the other, each with a memory of what came before: VideoLLaMB's bridge (Wang et al. 2024,
https://arxiv.org/abs/2409.01071).

    [memory, frames of segment s] --transformer--> [memory', frames']      memory' --reads all memories so far--> memory

Letters: B clips, T frames, M packed segments, w frames of a segment, p tokens of a frame, m memory tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtok.layers.frames import Frames, centres, clip_piece, pool_grid, pool_shape
from vtok.layers.pieces import Piece, spread_grid
from vtok.layers.resampler import CrossAttention
from vtok.layers.transformer import Transformer, make_norm


@dataclass
class BridgeConfig:
    """The memory bridge; its segments are the model's, of at most `segments.most` a clip."""

    memory: int = 32  # m
    frames: int = 8  # w, evenly from the segment
    pooled: int = 16  # p
    width: int = 768
    depth: int = 2
    num_heads: int = 12
    retrieval: bool = True  # a new memory reads all earlier ones
    emit: str = "last"  # memory (the last one alone) | last (and the last segment's frames) | all (and all segments')

    def __post_init__(self) -> None:
        if self.emit not in ("memory", "last", "all"):
            raise ValueError(f"bridge.emit={self.emit!r} is unknown; choose memory, last or all")
        for name in ("memory", "frames", "pooled", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"bridge.{name}={getattr(self, name)} must be at least 1")


class MemoryBridge(nn.Module):
    """Always `most` steps, a dummy row in those that no clip has a segment for: the number of calls is the same
    whatever the clips hold."""

    def __init__(self, dim: int, config: BridgeConfig, *, most: int):
        super().__init__()
        self.config, self.most = config, most
        self.into, self.out = nn.Linear(dim, config.width), nn.Linear(config.width, dim)
        self.begin = nn.Parameter(torch.randn(config.memory, config.width))
        self.transformer = Transformer(config.width, config.depth, config.num_heads)
        self.ask_norm = make_norm("rms", config.width) if config.retrieval else None
        self.ask = CrossAttention(config.width, config.width, config.num_heads) if config.retrieval else None
        nn.init.normal_(self.out.weight, std=0.1 / config.width**0.5)

    def forward(self, frames: Frames, words: object = None, audio: object = None) -> tuple[list[Piece], list[Piece]]:
        c, batch = self.config, len(frames.lengths)
        shape = pool_shape(c.pooled, frames.grid)
        counts = frames.segment.masked_fill(~frames.mask, 0).amax(1) + 1
        memories = [self.begin.expand(batch, -1, -1)]
        pieces: list[Piece] = []
        unused = frames.patches.new_zeros(())
        for s in range(self.most):
            clips = (counts > s).nonzero()[:, 0]
            real = len(clips) > 0
            clips = clips if real else counts.new_zeros(1)
            index, there = self._sample(frames, clips, s if real else 0)
            own = frames.patches[clips[:, None], index]  # [M, w, N, D]
            tokens = pool_grid(own.flatten(0, 1), frames.grid, shape).unflatten(0, index.shape)
            memory, seen = self._read(memories, clips, self.into(tokens).flatten(1, 2), there, shape)
            read = self.out(seen.unflatten(1, (index.shape[1], -1))) + tokens  # [M, w, p, D]
            if not real:
                unused = unused + (read * 0).sum() + (memory * 0).sum()
                memories.append(memories[-1])
                continue
            memories.append(memories[-1].index_put((clips,), memory.to(memories[-1])))
            if c.emit == "memory":
                unused = unused + (read * 0).sum()
                continue
            emit = there if c.emit == "all" else there & (counts[clips] == s + 1)[:, None]
            pieces.append(self._piece(frames, read, clips, index, emit, spread_grid(shape, read.device) + c.memory))
        final = self.out(memories[-1]) + unused
        return [clip_piece(final), *([_joined(pieces)] if pieces else [])], []

    def _sample(self, frames: Frames, clips: Tensor, s: int) -> tuple[Tensor, Tensor]:
        """[M, w] frames of segment s of these clips, evenly, and [M, w] bool which are there."""
        inside = (frames.segment[clips] == s) & frames.mask[clips]
        start, size = inside.long().argmax(1, keepdim=True), inside.sum(1, keepdim=True).clamp_min(1)
        taken = size.clamp(max=self.config.frames)
        at = torch.arange(self.config.frames, device=clips.device)
        index = start + torch.minimum((2 * at + 1) * size // (2 * taken), size - 1)
        return index, at < taken

    def _read(
        self, memories: list[Tensor], clips: Tensor, x: Tensor, there: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """(new memory [M, m, width], tokens [M, w p, width]) of segments with tokens x [M, w p, width]."""
        count = self.config.memory
        before = memories[-1][clips]
        valid = nn.functional.pad(there.repeat_interleave(shape[0] * shape[1], 1), (count, 0), value=True)
        mask = valid[:, None, :] | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        both = self.transformer(torch.cat([before.to(x), x], 1), mask)
        memory = both[:, :count]
        if self.ask is not None and self.ask_norm is not None:
            past = torch.cat([old[clips] for old in memories], 1).to(x)
            memory = memory + self.ask(self.ask_norm(memory), past, None)
        return memory, both[:, count:]

    def _piece(self, frames: Frames, read: Tensor, clips: Tensor, index: Tensor, emit: Tensor, level: Tensor) -> Piece:
        """Tokens [M, w, p, D] of the frames index [M, w], those where `emit` [M, w] is True."""
        where = clips[:, None].expand_as(index).flatten()
        time = frames.time[where, index.flatten()][:, None, None]
        places = centres(pool_shape(self.config.pooled, frames.grid), frames.time)
        positions = torch.cat([time.expand(-1, len(places), 1), places.expand(len(where), -1, -1)], -1)
        keep = emit.flatten()[:, None].expand(-1, len(places))
        return Piece(read.flatten(0, 1), where, index.flatten(), positions, level, keep)


def _joined(pieces: list[Piece]) -> Piece:
    """One piece of the rows of several with the same level."""
    assert all(p.keep is not None for p in pieces)
    return Piece(
        torch.cat([p.embeddings for p in pieces]),
        torch.cat([p.clip for p in pieces]),
        torch.cat([p.frame for p in pieces]),
        torch.cat([p.positions for p in pieces]),
        pieces[0].level,
        torch.cat([p.keep for p in pieces if p.keep is not None]),
    )
