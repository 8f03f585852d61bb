"""Tokenizers that see a video in chunks which share one frame: everything around one chunk's network.

    frames   0 | 1 2 3 4 | 5 6 7 8 | 9 ...          group 0 is one frame, every later group `group_frames`
    chunk 0  [ 0    1         2 ]
    chunk 1                 [ 2's last frame    3         4 ]

A chunk of 1 + n groups begins with one frame. In the first chunk that is the first group; later chunks begin with the
last frame of the chunk before, which gives them no tokens of its own: while decoding it is known. A model of one-frame
chunks (`num_frames` 1) codes every frame for itself. Overlap is thus one latent frame, whatever the stride in time.

Encoding chunks is independent, decoding goes from chunk to chunk. Letters: B clips, M chunks, n groups of a chunk, C
channels, T frames, H height, W width, G groups of a clip, K tokens of a group, D width of a code, Q ids a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vtok.layers.stream import StreamedTokenizer, check_pixels, cut_evenly, join, pixels_of
from vtok.types import Budget, Clip, Quantized, ShapeError, StreamState, Tokens, resolve_budget


class OverlappedTokenizer(StreamedTokenizer):
    """`encode`, `decode` and their streaming forms, on top of a subclass's one-chunk network.

    Args:
        num_frames: of a chunk, 1 + a multiple of `group_frames`. cell: (height, width) that frames are padded to
            multiples of. num_tokens: of a group. The rest as `vtok.types.Tokenizer`.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_frames: int,
        group_frames: int,
        cell: tuple[int, int],
        num_tokens: int,
        embedding_dim: int,
        codebook_sizes: tuple[int, ...],
        index_factors: tuple[tuple[int, ...], ...],
    ):
        super().__init__()
        self.channels, self.num_frames, self.group_frames = channels, num_frames, group_frames
        self.chunk_groups = 1 + (num_frames - 1) // group_frames
        self.extra_frames = int(self.chunk_groups > 1)  # later chunks begin with a frame of the one before
        self.cell, self.num_tokens = cell, num_tokens
        self.max_tokens = num_tokens * self.chunk_groups
        self.embedding_dim = embedding_dim
        self.codebook_sizes, self.index_factors = codebook_sizes, index_factors

    # ---- what a family gives

    def encode_chunks(self, video: Tensor) -> Quantized:
        """[M, C, T, H, W], T = 1 + group_frames (n - 1) -> embeddings [M, n, K, D], indices [M, n, K, Q]. Later groups
        never change earlier ones."""
        raise NotImplementedError

    def decode_chunk(
        self, codes: Tensor, keep: Tensor, *, number: int, size: tuple[int, int], past: Tensor | None, valid: Tensor
    ) -> Tensor:
        """Chunk `number` of every clip: codes [B, n, K, D], keep [B, n, K] bool -> [B, C, T, H, W] with (H, W) = size,
        which is whole cells.

        past: [B, C, 1, H, W], the frame that the chunk begins with, where there is one; its group has no tokens.
        valid: [B, n] bool, groups that are not padding; these must not depend on the others.
        """
        raise NotImplementedError

    # ---- lengths

    def group_lengths(self, frames: int, *, begins: bool) -> list[int]:
        return cut_evenly(frames, self.group_frames, first=int(begins))

    def groups(self, frames: Tensor) -> Tensor:
        """Groups that clips of so many frames have: 1 + ceil((frames - 1) / group_frames)."""
        return 1 + (frames - 1 + self.group_frames - 1) // self.group_frames

    def count_groups(self, frames: int, *, begins: bool = True) -> int:
        """The same of a number; `begins=False`: frames after the first group."""
        return begins + -(-(frames - begins) // self.group_frames)

    def _count_chunks(self, groups: int) -> int:
        return -(-max(groups - 1, 1) // (self.chunk_groups - 1)) if self.chunk_groups > 1 else groups

    def padded(self, video: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """The video continued to `frames` frames by each clip's last real one, and to whole cells by its edges."""
        check_pixels(video, self.channels)
        if frames != video.shape[2] or bool((lengths < frames).any()):
            at = torch.arange(frames, device=video.device).expand(video.shape[0], -1)
            at = torch.minimum(at, (lengths - 1).clamp_min(0)[:, None])
            video = video.gather(2, at[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:]))
        bottom, right = -video.shape[3] % self.cell[0], -video.shape[4] % self.cell[1]
        return F.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate") if bottom or right else video

    def _frames_of(self, groups: int) -> int:
        return 1 + (groups - 1) * self.group_frames

    # ---- whole clips

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a clip of any length and size; an image is a clip of one frame.

        `rank` is the nesting order inside a group. 1D tokens have no place: positions are NaN. `budget` keeps the
        first tokens of every group (`vtok.types.resolve_budget`).
        """
        pixels, lengths = pixels_of(self, clip), clip.frames()
        groups = self.groups(lengths)
        most = int(groups.max())
        count = self._count_chunks(most)
        if count == 1:
            quantized = self.encode_chunks(self.padded(pixels, lengths, self._frames_of(most)))
            coded = [quantized]
        else:
            stride = self.num_frames - self.extra_frames
            video = self.padded(pixels, lengths, (count - 1) * stride + self.num_frames)
            chunks = video.unfold(2, self.num_frames, stride)  # [B, C, chunks, H, W, T]
            every = self.encode_chunks(rearrange(chunks, "B C m H W T -> (B m) C T H W"))
            coded = self._in_time(every, count)
        tokens = self._tokens(coded, groups, lengths)
        if clip.times is not None:
            tokens = replace(tokens, times=self._group_times(clip.times, lengths))
        if budget is None:
            return tokens
        resolved = resolve_budget(budget, groups=groups, max_per_group=self.num_tokens)
        assert resolved is not None
        return tokens.truncate(resolved)

    def _in_time(self, every: Quantized, count: int) -> list[Quantized]:
        """Chunks [B m, n, K, ...] as pieces of one video, what stands for the frame that two share left out."""

        def parts(value: Tensor | None) -> list[Tensor | None]:
            if value is None:
                return [None] * 2
            value = rearrange(value, "(B m) n K D -> B m n K D", m=count)
            if self.chunk_groups == 1:
                return [value[:, :1, 0], value[:, 1:, 0]]
            return [value[:, 0], value[:, 1:, 1:].flatten(1, 2)]

        pairs = zip(parts(every.embeddings), parts(every.indices))
        return [Quantized(codes, ids, every.loss, {}) for codes, ids in pairs if codes is not None]

    def _tokens(self, coded: list[Quantized], groups: Tensor, frames: Tensor) -> Tokens:
        """Pieces [B, n, K, ...] in time as Tokens of `groups` [B] real groups."""
        embeddings = torch.cat([each.embeddings for each in coded], 1)[:, : int(groups.max())].flatten(1, 2)
        ids = [each.indices for each in coded if each.indices is not None]
        batch, length, _ = embeddings.shape
        at = torch.arange(length, device=embeddings.device).expand(batch, -1)
        return Tokens(
            embeddings=embeddings,
            lengths=groups.to(embeddings.device) * self.num_tokens,
            positions=embeddings.new_full((batch, length, 3), torch.nan),
            group=at // self.num_tokens,
            rank=at % self.num_tokens,
            indices=torch.cat(ids, 1)[:, : int(groups.max())].flatten(1, 2) if ids else None,
            codebook_sizes=self.codebook_sizes if ids else (),
            frames=frames,
        )

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        """Video [B, C, T, H, W] in [-1, 1] with T = max(tokens.frames); frames past a clip's own repeat its last."""
        if tokens.frames is None:
            raise ShapeError("decode needs Tokens.frames: how many frames each clip has")
        frames, groups = int(tokens.frames.max()), self.groups(tokens.frames)
        codes, keep = self._slots(tokens, int(groups.max()))
        real = torch.arange(codes.shape[1], device=codes.device) < groups.to(codes.device)[:, None]
        state = self.init_decode_state(codes.shape[0], size)
        video = self._decode_groups(codes, keep, real, state, final=True)[:, :, :frames]
        last = torch.minimum(torch.arange(frames, device=video.device), tokens.frames[:, None].to(video.device) - 1)
        return video.gather(2, last[:, None, :, None, None].expand_as(video))

    def _decode_groups(self, codes: Tensor, keep: Tensor, real: Tensor, state: StreamState, *, final: bool) -> Tensor:
        """Frames [B, C, T, H, W] of the whole chunks among groups [B, G, ...] that follow what `state` has seen, and
        of the last one if `final`; the rest waits in `state.buffer`."""
        if state.buffer is not None:
            codes, keep, real = (torch.cat(pair, 1) for pair in zip(state.buffer, (codes, keep, real)))
        out, (height, width) = [], state.size
        size = (height + -height % self.cell[0], width + -width % self.cell[1])
        while codes.shape[1]:
            past = state.cache.get("frame")
            held = past is not None and self.chunk_groups > 1  # the first group is known, and has no tokens here
            count = self.chunk_groups - held
            if codes.shape[1] < count and not final:
                break
            count = min(count, codes.shape[1])
            here = [value[:, :count] for value in (codes, keep, real)]
            codes, keep, real = (value[:, count:] for value in (codes, keep, real))
            if held:
                here = [torch.cat([torch.zeros_like(value[:, :1]), value], 1) for value in here]
                here[2][:, 0] = True
            frame = self.padded(past, torch.ones(len(past)), 1) if held and past is not None else None
            video = self.decode_chunk(here[0], here[1], number=state.done, size=size, past=frame, valid=here[2])
            video = video[:, :, int(held) :, :height, :width].clamp(-1, 1)
            state.cache["frame"] = video[:, :, -1:]
            state.done += 1
            out.append(video)
        state.buffer = (codes, keep, real) if codes.shape[1] else None
        return torch.cat(out, 2) if out else codes.new_zeros(codes.shape[0], self.channels, 0, height, width)

    # ---- streaming: a step's Tokens count their groups from 0, `state.done` groups came before

    def _drain(self, state: StreamState, *, final: bool) -> Tokens | None:
        shared = self.extra_frames
        given = state.cache.setdefault("groups", 0)  # of the buffered chunk, already given out
        pieces: list[Tokens] = []
        while state.buffer is not None:
            have = min(state.buffer.shape[2], self.num_frames)
            ready = 1 + (have - 1) // self.group_frames
            if final:
                ready = self.count_groups(have)
            if ready <= given:
                break
            lengths = torch.full((state.batch,), have, dtype=torch.int64, device=state.buffer.device)
            part = self.padded(state.buffer[:, :, :have], lengths, self._frames_of(ready))
            every = self.encode_chunks(part[:, :, : self._frames_of(ready)])
            fresh = slice(given, ready)
            ids = None if every.indices is None else every.indices[:, fresh]
            before = 0 if not given else self._frames_of(given)
            frames = lengths.clamp_max(self._frames_of(ready)) - before
            fresh_groups = torch.full_like(lengths, ready - given)
            pieces.append(
                self._tokens([Quantized(every.embeddings[:, fresh], ids, every.loss, {})], fresh_groups, frames)
            )
            state.done += ready - given
            given = ready
            if ready == self.chunk_groups and (rest := state.buffer[:, :, self.num_frames - shared :]).shape[2]:
                state.buffer, given = rest, shared
            elif ready == self.chunk_groups and not shared:
                state.buffer, given = None, 0
            elif final:
                break
        if final:
            state.buffer, given = None, 0
        state.cache["groups"] = given
        return join(pieces)

    def decode_step(self, tokens: Tokens, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """Tokens of the next whole groups (as `step` gave them) -> frames [B, C, T, H, W] of every chunk they complete,
        or None.

        `tokens.frames` says how many frames they hold, equal over the batch.
        """
        frames = self._frames_of_step(tokens, state)
        seen = state.cache.get("seen", 0)
        groups = self.count_groups(frames, begins=not seen)
        state.cache["seen"] = seen + frames
        codes, keep = self._slots(tokens, groups)
        real = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
        return self._given(self._decode_groups(codes, keep, real, state, final=False), state), state

    def decode_flush(self, state: StreamState) -> Tensor | None:
        """The frames of a last chunk that is not whole; None when there are none."""
        if state.buffer is None:
            return None
        empty = [value[:, :0] for value in state.buffer]
        return self._given(self._decode_groups(empty[0], empty[1], empty[2], state, final=True), state)

    @staticmethod
    def _given(video: Tensor, state: StreamState) -> Tensor | None:
        """What the video has of these frames: a last group may hold fewer than it stands for."""
        shown = state.cache.get("shown", 0)
        video = video[:, :, : state.cache["seen"] - shown]
        state.cache["shown"] = shown + video.shape[2]
        return video if video.shape[2] else None
