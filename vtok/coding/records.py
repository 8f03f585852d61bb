"""What a record of a `.vtok` file holds: the lengths of its groups, then ids, packed or coded.

How ids become bytes is the business of `vtok.coding.entropy` and `vtok.coding.prior_coding`; the file around the
records is that of `vtok.coding.bitstream`, and docs/formats.md describes every byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtok.coding.entropy import (
    StaticModel,
    decode_static,
    encode_static,
    pack,
    packed_bytes,
    real_ids,
    take_varint,
    unpack,
    varint,
)
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.stream_header import KINDS, Header
from vtok.types import Tokens

RECORD_TOKENS = 1024  # a record is closed once it holds this many tokens: about 2 kB, 10 bytes of it overhead
MAX_RECORD = 1 << 24  # bytes; a longer record is damage, and is refused before memory is asked for
MAX_GROUPS = 1 << 16  # groups of one record
EntropyModel = StaticModel | PriorModel
MODELS = {"static": StaticModel, "ar": PriorModel}


@dataclass(frozen=True)
class Chunk:
    """The tokens of one step of a stream, one clip, as a file holds them.

    indices: [K, Q] int64 ids, group by group and inside a group by rank. counts: tokens of each group, zeros included.
    frames: frames that these tokens stand for; None where the model does not say.
    """

    indices: np.ndarray
    counts: tuple[int, ...]
    frames: int | None

    @classmethod
    def from_tokens(cls, tokens: Tokens, *, first_group: int = 0) -> Chunk:
        """The ids of one clip's tokens, whose groups are numbered from `first_group`.

        Raises: ValueError for more than one clip, for continuous tokens, for ranks that are not 0, 1, 2 ... in
        each group: such tokens would need their ranks in the file, and no nested model makes them.
        """
        if tokens.group.shape[0] != 1:
            raise ValueError(
                f"a .vtok file holds one clip, got a batch of {tokens.group.shape[0]}: write one file each"
            )
        indices, rank = real_ids(tokens)
        group = tokens.group[0, : len(rank)].cpu().numpy().astype(np.int64)
        group = group - first_group
        if len(group) and ((np.diff(group) < 0).any() or group[0] < 0):
            raise ValueError(f"tokens are not in time order: their groups decrease, or begin before {first_group}")
        counts = np.bincount(group, minlength=tokens.times.shape[1] if tokens.times is not None else 1)
        if (rank != np.concatenate([np.arange(n) for n in counts] or [[]])).any():
            raise ValueError("the ranks inside a group must be 0, 1, 2 ... in order to be written to a .vtok file")
        return cls(indices, tuple(counts.tolist()), int(tokens.frames[0]) if tokens.frames is not None else None)

    def to_tokens(
        self,
        lookup: Callable[[Tensor], Tensor],
        codebook_sizes: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        first_group: int = 0,
    ) -> Tokens:
        """The same as Tokens of one clip, its embeddings looked up; positions are NaN (the file holds none)."""
        indices = torch.from_numpy(self.indices).to(device)[None]  # [1, K, Q]
        counts = np.array(self.counts, np.int64)
        group = torch.from_numpy(np.repeat(np.arange(len(counts)), counts) + first_group).to(device)[None]
        rank = torch.from_numpy(np.concatenate([np.arange(n) for n in counts])).to(device, torch.int64)[None]
        return Tokens(
            embeddings=lookup(indices),
            lengths=torch.tensor([indices.shape[1]], device=device),
            positions=torch.full((1, indices.shape[1], 3), math.nan, device=device),
            group=group,
            rank=rank,
            indices=indices,
            codebook_sizes=codebook_sizes,
            frames=torch.tensor([self.frames], device=device) if self.frames is not None else None,
        )

    def truncate(self, lengths: Sequence[int]) -> Chunk:
        """The first tokens of each group, as many as `lengths` says and there are."""
        keep = self.ranks < np.repeat(lengths, self.counts)
        return Chunk(self.indices[keep], tuple(min(k, n) for k, n in zip(lengths, self.counts)), self.frames)

    @property
    def ranks(self) -> np.ndarray:
        return np.concatenate([np.arange(n) for n in self.counts]).astype(np.int64)


class Record:
    """What a record says before its ids: its steps, each (tokens of each group, frames)."""

    def __init__(self, steps: Iterable[tuple[Sequence[int], int | None]] = ()) -> None:
        self.steps = self.tokens = self.groups = 0  # groups: of one step
        self.counts: list[int] = []
        self.frames: int | None = None
        for counts, frames in steps:
            self.add(counts, frames)

    def takes(self, counts: Sequence[int], frames: int | None) -> bool:
        """Whether it stays open for this step: while it has room, and its steps are alike."""
        alike = (self.groups, self.frames) == (len(counts), frames)
        room = self.tokens < RECORD_TOKENS and (self.steps + 1) * len(counts) <= MAX_GROUPS // 16
        return not self.steps or (alike and room)

    def add(self, counts: Sequence[int], frames: int | None) -> None:
        self.steps, self.groups, self.frames = self.steps + 1, len(counts), frames
        self.tokens += sum(counts)
        self.counts += counts

    def head(self) -> bytes:
        out = b"".join(map(varint, (self.steps, self.groups, 0 if self.frames is None else self.frames + 1)))
        alike = len(set(self.counts)) == 1
        return out + (varint(self.counts[0] + 1) if alike else packed_counts(self.counts))


class _Packed:
    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes

    def encode(self, ids: np.ndarray, counts: list[int]) -> bytes:
        return pack(ids, self.sizes)

    def decode(self, data: bytes, counts: list[int]) -> np.ndarray:
        return unpack(data, sum(counts), self.sizes)


class _Static:
    def __init__(self, model: StaticModel) -> None:
        self.model = model

    def encode(self, ids: np.ndarray, counts: list[int]) -> bytes:
        return encode_static(ids, _ranks(counts), self.model)

    def decode(self, data: bytes, counts: list[int]) -> np.ndarray:
        return decode_static(data, _ranks(counts), self.model)


def _ranks(counts: list[int]) -> np.ndarray:
    return np.concatenate([np.arange(n) for n in counts]).astype(np.int64)


Coder = _Packed | _Static | PriorStream


def coder_of(header: Header, entropy: EntropyModel | None) -> Coder:
    """How the ids of a file's records become bytes and back, record after record."""
    if isinstance(entropy, PriorModel):
        return PriorStream(entropy)
    return _Packed(header.codebook_sizes) if entropy is None else _Static(entropy)


def check_entropy(header: Header, entropy: EntropyModel | None) -> None:
    coding = header.coding
    if not isinstance(entropy, MODELS.get(coding, type(None))):
        needs = f"needs {KINDS[coding]}" if coding in KINDS else "takes no entropy model"
        raise ValueError(f"coding={coding!r} {needs}, got {type(entropy).__name__}")
    if entropy is not None and entropy.codebook_sizes != header.codebook_sizes:
        raise ValueError(
            f"{KINDS[coding]} is for codebooks {entropy.codebook_sizes}, the tokens have {header.codebook_sizes}"
        )


def bytes_of(indices: np.ndarray) -> bytes:
    return np.ascontiguousarray(indices, "<i8").tobytes()


def packed_counts(counts: list[int]) -> bytes:
    """Lengths of groups that differ: 0, the least, the largest less the least, then all above the least, packed."""
    least, span = min(counts), max(counts) - min(counts)
    above = np.array(counts, np.int64)[:, None] - least
    return varint(0) + varint(least) + varint(span) + pack(above, (span + 1,))


def take_counts(body: bytes, at: int, count: int) -> tuple[list[int], int]:
    least, at = take_varint(body, at)
    span, at = take_varint(body, at)
    if not 0 < span <= MAX_RECORD or least > MAX_RECORD:
        raise ValueError(f"lengths of groups from {least} to {least + span}")
    end = at + packed_bytes((span + 1,), count)
    return (unpack(body[at:end], count, (span + 1,))[:, 0] + least).tolist(), end
