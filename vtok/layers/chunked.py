"""Tokenizers that see a video chunk by chunk: everything between one chunk's network and whole clips, files, streams.

A clip of any length is cut into chunks of `num_frames`, a chunk into `blocks` time blocks, and every block holds
`num_tokens` nested tokens: one group of `Tokens`. Chunks are independent, so memory is bounded whatever the length.

Letters: B clips, M chunks, C channels, T frames, H height, W width, G groups, K tokens per group, D width, Q ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from vtok.layers.stream import StreamedTokenizer, cut_evenly, join, pixels_of
from vtok.types import Budget, Clip, Quantized, ShapeError, StreamState, Tokens, resolve_budget


@dataclass
class Chunks:
    """Chunks ready for a network: padded, and the padding known."""

    video: Tensor  # [M, C, T, H, W], every frame past the real ones repeats the last real one
    lengths: Tensor  # [M] real frames, 0 for a chunk that only pads a ragged batch
    grid: tuple[int, int, int]  # patches (t, h, w)
    blocks: int  # time blocks these T frames span
    patch_valid: Tensor  # [M, N] bool
    block_valid: Tensor  # [M, blocks] bool


class ChunkedTokenizer(StreamedTokenizer):
    """`encode`, `decode` and their streaming forms, on top of a subclass's one-chunk network.

    Attributes: `channels`, `num_frames` of a chunk, `blocks` of a chunk, `num_tokens` of a block, `embedding_dim`,
    `max_tokens` of a chunk, `codebook_sizes` and `index_factors` of the ids (empty for continuous tokens).
    """

    def __init__(
        self,
        *,
        channels: int,
        num_frames: int,
        blocks: int,
        num_tokens: int,
        embedding_dim: int,
        codebook_sizes: tuple[int, ...],
        index_factors: tuple[tuple[int, ...], ...],
    ):
        super().__init__()
        self.channels, self.num_frames, self.blocks, self.num_tokens = channels, num_frames, blocks, num_tokens
        self.block_frames = num_frames // blocks
        self.max_tokens = num_tokens * blocks
        self.embedding_dim = embedding_dim
        self.codebook_sizes, self.index_factors = codebook_sizes, index_factors

    def chunks(self, video: Tensor, lengths: Tensor) -> Chunks:
        """Pad [M, C, T, H, W], T <= num_frames, for the network."""
        raise NotImplementedError

    def encode_chunks(self, chunks: Chunks) -> Quantized:
        """Every token of every chunk: embeddings [M, blocks, K, D], indices [M, blocks, K, Q]."""
        raise NotImplementedError

    def decode_chunks(
        self, codes: Tensor, keep: Tensor, lengths: Tensor, *, frames: int, size: tuple[int, int]
    ) -> Tensor:
        """codes [M, blocks, K, D], keep [M, blocks, K] bool, lengths [M] -> video [M, C, frames, H, W]."""
        raise NotImplementedError

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        raise NotImplementedError

    def group_lengths(self, frames: int, *, begins: bool) -> list[int]:
        return cut_evenly(frames, self.block_frames)

    def _split(self, video: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
        """A clip as chunks: [B * n, C, num_frames or T, H, W], lengths [B * n], n chunks a clip."""
        span = self.num_frames
        count = max(-(-video.shape[2] // span), 1)
        if count == 1:
            return video, lengths, 1
        short = count * span - video.shape[2]
        if short:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, short, -1, -1)], 2)
        starts = torch.arange(count, device=lengths.device) * span
        lengths = (lengths[:, None] - starts).clamp(0, span).flatten()
        return rearrange(video, "B C (n T) H W -> (B n) C T H W", n=count), lengths, count

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a clip of any length and size; an image is a clip of one frame.

        Groups are time blocks in order; `rank` is the nesting order inside a group. 1D tokens have no place: positions
        are NaN. `budget` keeps the first tokens of every group (`vtok.types.resolve_budget`).
        """
        pixels = pixels_of(self, clip)
        lengths = clip.frames()
        video, chunk_lengths, count = self._split(pixels, lengths)
        chunks = self.chunks(video, chunk_lengths)
        quantized = self.encode_chunks(chunks)
        tokens = self._tokens(quantized, chunks.block_valid, count, lengths)
        if clip.times is not None:
            tokens = replace(tokens, times=self._group_times(clip.times, lengths))
        if budget is None:
            return tokens
        groups = tokens.num_groups
        resolved = resolve_budget(budget, groups=groups, max_per_group=self.num_tokens)
        assert resolved is not None
        return tokens.truncate(resolved)

    def _tokens(self, quantized: Quantized, block_valid: Tensor, count: int, frames: Tensor) -> Tokens:
        """[B * n, blocks, K, ...] as Tokens, groups of padding left out."""
        tokens = self.num_tokens

        def flat(value: Tensor) -> Tensor:
            return rearrange(value, "(B n) b K D -> B (n b K) D", n=count)

        embeddings = flat(quantized.embeddings)
        batch, length, _ = embeddings.shape
        at = torch.arange(length, device=embeddings.device).expand(batch, -1)
        lengths = rearrange(block_valid, "(B n) b -> B (n b)", n=count).sum(1) * tokens
        longest = int(lengths.max())
        everything = Tokens(
            embeddings=embeddings[:, :longest],
            lengths=lengths,
            positions=embeddings.new_full((batch, longest, 3), torch.nan),
            group=(at // tokens)[:, :longest],
            rank=(at % tokens)[:, :longest],
            indices=None if quantized.indices is None else flat(quantized.indices)[:, :longest],
            codebook_sizes=self.codebook_sizes if quantized.indices is not None else (),
            frames=frames,
        )
        return everything

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        """Video [B, C, T, H, W] in [-1, 1] with T = max(tokens.frames); frames past a clip's own repeat its last."""
        if tokens.frames is None:
            raise ShapeError("decode needs Tokens.frames: how many frames each clip has")
        frames = int(tokens.frames.max())
        count = max(-(-frames // self.num_frames), 1)
        if count == 1:
            blocks = -(-frames // self.block_frames) if self.blocks > 1 else 1
            span, lengths = frames, tokens.frames
        else:
            blocks, span = self.blocks, self.num_frames
            starts = torch.arange(count, device=tokens.frames.device) * span
            lengths = (tokens.frames[:, None] - starts).clamp(0, span).flatten()
        codes, keep = self._slots(tokens, count * blocks)
        codes, keep = (rearrange(v, "B (n b) ... -> (B n) b ...", b=blocks) for v in (codes, keep))
        video = self.decode_chunks(codes, keep, lengths, frames=span, size=size)
        video = rearrange(video, "(B n) C T H W -> B C (n T) H W", n=count)[:, :, :frames].clamp(-1, 1)
        last = torch.minimum(torch.arange(frames, device=video.device), tokens.frames[:, None] - 1)
        return video.gather(2, last[:, None, :, None, None].expand_as(video))

    # ---- streaming -----------------------------------------------------------------------------------------------
    # A step's Tokens count their groups from 0: `state.done` groups came before. With a time_block mask a block is
    # coded as soon as its frames are there, by re-reading the chunk's earlier frames (at most num_frames of them).

    def _drain(self, state: StreamState, *, final: bool) -> Tokens | None:
        done_blocks = state.cache.setdefault("blocks", 0)  # blocks of the buffered chunk already given out
        pieces: list[Tokens] = []
        while state.buffer is not None:
            available = min(state.buffer.shape[2], self.num_frames)
            ready = available // self.block_frames
            if final and available % self.block_frames:
                ready += 1
            if ready <= done_blocks:
                break
            part = state.buffer[:, :, : min(ready * self.block_frames, available)]
            lengths = torch.full((state.batch,), part.shape[2], dtype=torch.int64, device=part.device)
            chunks = self.chunks(part, lengths)
            quantized = self.encode_chunks(chunks)
            fresh = slice(done_blocks, ready)
            indices = None if quantized.indices is None else quantized.indices[:, fresh]
            quantized = quantized._replace(embeddings=quantized.embeddings[:, fresh], indices=indices)
            frames = lengths - done_blocks * self.block_frames
            pieces.append(self._tokens(quantized, chunks.block_valid[:, fresh], 1, frames))
            state.done += ready - done_blocks
            done_blocks = ready
            if ready == self.blocks:
                rest = state.buffer[:, :, self.num_frames :]
                state.buffer, done_blocks = (rest if rest.shape[2] else None), 0
            elif final:
                state.buffer, done_blocks = None, 0
        state.cache["blocks"] = done_blocks
        return join(pieces)

    def decode_step(self, tokens: Tokens, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """Tokens of the next whole groups (as `step` or `truncate` gave them) -> their frames [B, C, T, H, W].

        `tokens.frames` says how many frames they hold, equal over the batch.
        """
        frames = self._frames_of_step(tokens, state)
        groups = -(-frames // self.block_frames)
        codes, keep = self._slots(tokens, groups)
        past = state.buffer  # groups of the unfinished chunk: (codes, keep)
        if past is not None:
            codes, keep = torch.cat([past[0], codes], 1), torch.cat([past[1], keep], 1)
        skip = 0 if past is None else past[0].shape[1]
        total = skip * self.block_frames + frames
        out = []
        for start in range(0, codes.shape[1], self.blocks):
            part = slice(start, min(start + self.blocks, codes.shape[1]))
            length = min(total - start * self.block_frames, self.num_frames)
            lengths = torch.full((state.batch,), length, dtype=torch.int64, device=codes.device)
            video = self.decode_chunks(codes[:, part], keep[:, part], lengths, frames=length, size=state.size)
            out.append(video[:, :, (skip * self.block_frames if start == 0 else 0) :])
        left = codes.shape[1] % self.blocks
        complete = total % self.block_frames == 0
        state.buffer = (codes[:, -left:], keep[:, -left:]) if left and complete else None
        state.done += groups
        return torch.cat(out, 2).clamp(-1, 1), state

    def decode_flush(self, state: StreamState) -> Tensor | None:
        """Nothing is held back by `decode_step`: always None."""
        state.buffer = None
        return None
