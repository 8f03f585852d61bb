"""What lengths cost: tokens of a whole video, or bytes of its `.vtok` file.

A purse prices every length of a time block and knows what may still be spent. Prices in bytes are upper bounds: header,
footer, records, checksums and the signalling of lengths are in them, and what the writer has written is put in their
place as soon as it is there; so a file whose blocks stay within the purse is never larger than what was asked.

Letters: K tokens of a time block, Q ids a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vtok.coding.bitstream import DIGEST_BYTES, END_BYTES, Writer
from vtok.coding.entropy import BLOCK, PRECISION, StaticModel, to_symbols, varint
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.records import MAX_RECORD, RECORD_TOKENS, Chunk


class Purse(Protocol):
    """What may be spent on a video. `total` and prices are in one unit, tokens or bits."""

    total: int  # of the setting
    firm: bool  # whether prices of blocks not yet chosen hold whatever the blocks before them become
    least: float  # what a block costs at most at one token
    unit: int  # price units in one unit of the setting: 8 bits a byte, 1 token a token

    def prices(self, ids: np.ndarray, *, chosen: bool) -> Tensor:
        """[K] float64: prices of 1, 2 ... K tokens of the next block, ids [K, Q]. chosen=False: of a block that comes
        after blocks not yet decided, which are taken to be whole."""
        ...

    def left(self) -> float:
        """What may be spent on the blocks that were not yet paid."""
        ...

    def pay(self, ids: np.ndarray, length: int, price: float) -> None:
        """The next block is decided."""
        ...

    def handed_on(self) -> None:
        """The blocks paid so far have been given to the writer."""
        ...

    def size(self, chunks: Sequence[Chunk], *, frames: int) -> int:
        """What the setting counts, exactly, if these chunks came next and nothing after them."""
        ...

    def most(self, steps: Iterable[tuple[Sequence[int], int | None]], *, frames: int) -> int:
        """What it counts at most, whatever the ids, if steps of (tokens of each group, frames) came after those that
        were handed on, and nothing after them."""
        ...

    def short_of(self, missing: float) -> ValueError:
        """The error of a setting that is `missing` too small."""
        ...


class TokenPurse:
    """Tokens of the whole video."""

    least, unit, firm = 1.0, 1, True

    def __init__(self, total: int) -> None:
        self.total, self.paid, self.given = total, 0.0, 0

    def prices(self, ids: np.ndarray, *, chosen: bool) -> Tensor:
        return torch.arange(1, len(ids) + 1, dtype=torch.float64)

    def left(self) -> float:
        return self.total - self.paid

    def pay(self, ids: np.ndarray, length: int, price: float) -> None:
        self.paid += price

    def handed_on(self) -> None:
        self.given = round(self.paid)

    def size(self, chunks: Sequence[Chunk], *, frames: int) -> int:
        return self.given + sum(sum(chunk.counts) for chunk in chunks)

    def most(self, steps: Iterable[tuple[Sequence[int], int | None]], *, frames: int) -> int:
        return self.given + sum(sum(counts) for counts, _ in steps)

    def short_of(self, missing: float) -> ValueError:
        return ValueError(
            f"tokens={self.total} is too small: every time block takes one token at least, ask for "
            f"{self.total + math.ceil(missing)} or more"
        )


class BytePurse:
    """Bytes of the file, header and footer included.

    Args:
        writer, entropy: of the file, header written. chunk_tokens, group_tokens: most tokens of one step of the stream,
            and of a block. runs: of steps alike that a stream has at most. frames: most that the video can have.
    """

    unit = 8

    def __init__(
        self,
        total: int,
        writer: Writer,
        entropy: StaticModel | PriorModel | None,
        *,
        chunk_tokens: int,
        group_tokens: int,
        runs: int,
        frames: int,
    ) -> None:
        self.total, self.writer, header = total, writer, writer.header
        self.paid = self.pending = 0.0  # bits: since the writer was last given something, and of its open record
        self.seen = writer.bytes
        if entropy is None:
            self.coder: Coder = PackedCoder(header.codebook_sizes)
        else:
            self.coder = StaticCoder(entropy) if isinstance(entropy, StaticModel) else PriorCoder(entropy)
        self.firm = not isinstance(entropy, PriorModel)
        record_tokens = RECORD_TOKENS + chunk_tokens
        most = min(MAX_RECORD, math.ceil(record_tokens * self.coder.worst / 8) + 3 * record_tokens + 64)
        numbers = (most, RECORD_TOKENS, chunk_tokens, frames + 1, group_tokens, group_tokens)
        # tag, checksum, the 0 of lengths that differ, and the rounding of the packed lengths: 1 + 4 + 1 + 1
        record = 8 * (7 + sum(len(varint(n)) for n in numbers)) + self.coder.per_record
        self.count_bits = math.log2(max(group_tokens, 2))
        # A run of steps alike can end in a record of fewer tokens; longer records are paid for by their tokens.
        self.record, self.tail = record, runs * record
        self.open_tokens = self.fresh_tokens = 0  # of the writer's open record, and not handed on yet
        self.per_token = record / RECORD_TOKENS + self.coder.per_token
        totals = (max(frames, 1), max(frames, 1), max(frames, 1) * group_tokens, max(frames, 1))
        self.foot = 1 + sum(len(varint(n)) for n in totals) + DIGEST_BYTES + END_BYTES
        self.least = self.coder.worst + self.per_token + self.count_bits

    def prices(self, ids: np.ndarray, *, chosen: bool) -> Tensor:
        bits = torch.from_numpy(self.coder.bits(ids, chosen=chosen)).cumsum(0)
        return bits + self.count_bits + self.per_token * torch.arange(1, len(ids) + 1)

    def left(self) -> float:
        return 8.0 * (self.total - self.writer.bytes - self.foot) - self.pending - self.paid - self.tail

    def pay(self, ids: np.ndarray, length: int, price: float) -> None:
        self.paid += price
        self.fresh_tokens += length
        self.coder.advance(ids[:length])

    def handed_on(self) -> None:
        written = self.writer.bytes
        # the writer closes its open record before it takes new tokens, never after
        if written > self.seen:
            if self.open_tokens < RECORD_TOKENS:
                self.tail = max(self.tail - self.record, self.record)
            self.pending, self.open_tokens, self.seen = 0.0, 0, written
        self.pending, self.open_tokens = self.pending + self.paid, self.open_tokens + self.fresh_tokens
        self.paid, self.fresh_tokens = 0.0, 0

    def size(self, chunks: Sequence[Chunk], *, frames: int) -> int:
        return self.writer.size_with(chunks, frames=frames)

    def most(self, steps: Iterable[tuple[Sequence[int], int | None]], *, frames: int) -> int:
        return self.writer.most_with(steps, frames=frames)

    def short_of(self, missing: float) -> ValueError:
        least = self.total + math.ceil(missing / 8)
        least += len(varint(least)) - len(varint(self.total))  # the header says what was asked
        return ValueError(
            f"bytes={self.total} is too small: header, footer and one token of every time block take up to {least} "
            "bytes, ask for that or more"
        )


class Coder(Protocol):
    """What ids cost under a coding. worst: most bits of a block's first token. per_record, per_token: bits that the
    coding adds to the sum of ids."""

    worst: float
    per_record: float
    per_token: float

    def bits(self, ids: np.ndarray, *, chosen: bool) -> np.ndarray:
        """[K] float64: bits of each token of the next block."""
        ...

    def advance(self, ids: np.ndarray) -> None:
        """The next block holds these tokens."""
        ...


class PackedCoder:
    def __init__(self, sizes: Sequence[int]) -> None:
        self.worst = math.log2(math.prod(sizes))
        self.per_record, self.per_token = 8.0, 8 / max(1, BLOCK // len(sizes))

    def bits(self, ids: np.ndarray, *, chosen: bool) -> np.ndarray:
        return np.full(len(ids), self.worst)

    def advance(self, ids: np.ndarray) -> None:
        pass


class StaticCoder:
    def __init__(self, model: StaticModel) -> None:
        self.model, table = model, PRECISION - model.frequencies.double().log2()  # [R, sum of radices]
        self.table, self.edges = table.numpy(), np.concatenate([[0], np.cumsum(model.radices)])[:-1]
        self.worst = float(np.maximum.reduceat(self.table[0], self.edges).sum())
        # the rounding to a byte; the range coder's cuts are below 2**-30 bits a digit
        self.per_record, self.per_token = 8.0, len(model.radices) * 2.0**-30

    def bits(self, ids: np.ndarray, *, chosen: bool) -> np.ndarray:
        rank = np.minimum(np.arange(len(ids)), self.model.max_rank - 1)
        return self.table[rank[:, None], to_symbols(ids, self.model.index_factors) + self.edges].sum(1)

    def advance(self, ids: np.ndarray) -> None:
        pass


class PriorCoder:
    """An autoregressive prior: a block's price depends on the blocks before it."""

    def __init__(self, model: PriorModel) -> None:
        digits = len(model.config.radices)
        self.worst = 24.0 * digits  # the range coder rounds probabilities to multiples of 2^-24
        self.per_record, self.per_token = 64.0, 0.05 * digits
        self.decided, self.scout = PriorStream(model), PriorStream(model)

    def bits(self, ids: np.ndarray, *, chosen: bool) -> np.ndarray:
        stream = self.decided.fork() if chosen else self.scout
        return np.minimum(stream.bits(ids, [len(ids)]), self.worst)

    def advance(self, ids: np.ndarray) -> None:
        self.decided.bits(ids, [len(ids)])
