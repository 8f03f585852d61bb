"""Token ids as bits: exact packing, and arithmetic coding with a static model.

Letters: B batch, K tokens per clip (padded), N tokens, Q ids per token, V codebook size, R ranks, S digits.

    packed   ids [N, Q] -> one big integer per block, x <- x * V + id -> bytes     every id of V costs log2(V) bits
    static   ids [N, Q] -> digits [N, S] (mixed radix) -> range coder -> bytes     a digit of frequency f costs
                                                                                  22 - log2(f) bits
Both are integer arithmetic, so the same ids make the same bytes on every machine, and both cost the information of the
ids rounded up to whole bytes (packed: of each block).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.types import Tokens

BLOCK = 4096  # packed ids that share one integer: its arithmetic is quadratic in this
PRECISION = 22  # bits of a frequency table's total
STATE = 64  # bits of the range coder: an interval is cut up within 2**-34 of exact
FULL = (1 << STATE) - 1
MAX_ENTRIES = 1 << 22  # frequencies of a static model: 16 MiB


def factors_of(model: Any) -> tuple[tuple[int, ...], ...]:
    """The mixed-radix factors of each of a tokenizer's ids, least significant first.

    `model.index_factors` where the model has it (FSQ: its levels), else one factor per id: its codebook size.
    Raises: ValueError where the factors of an id do not multiply to its codebook size.
    """
    sizes = tuple(int(size) for size in model.codebook_sizes)
    factors = getattr(model, "index_factors", None)
    if factors is None:
        return tuple((size,) for size in sizes)
    factors = tuple(tuple(int(f) for f in each) for each in factors)
    if tuple(math.prod(each) for each in factors) != sizes:
        raise ValueError(f"index_factors={factors} do not multiply to codebook_sizes={sizes}")
    return factors


def to_symbols(indices: np.ndarray, factors: Sequence[Sequence[int]]) -> np.ndarray:
    """ids [N, Q] as digits [N, S], S = total number of factors: for each id, least significant digit first."""
    columns = []
    for q, radices in enumerate(factors):
        rest = indices[:, q]
        for radix in radices:
            columns.append(rest % radix)
            rest = rest // radix
    return np.stack(columns, 1) if columns else np.zeros((len(indices), 0), np.int64)


def from_symbols(symbols: np.ndarray, factors: Sequence[Sequence[int]]) -> np.ndarray:
    """The inverse of `to_symbols`: digits [N, S] as ids [N, Q] int64."""
    columns, at = [], 0
    for radices in factors:
        value, weight = np.zeros(len(symbols), np.int64), 1
        for radix in radices:
            value = value + symbols[:, at].astype(np.int64) * weight
            weight *= radix
            at += 1
        columns.append(value)
    return np.stack(columns, 1) if columns else np.zeros((len(symbols), 0), np.int64)


def check_ids(indices: np.ndarray, sizes: Sequence[int]) -> None:
    if indices.ndim != 2 or indices.shape[1] != len(sizes):
        raise ValueError(f"ids have shape {list(indices.shape)}, expected [tokens, {len(sizes)}]")
    for q, size in enumerate(sizes):
        column = indices[:, q]
        if column.size and (column.min() < 0 or column.max() >= size):
            raise ValueError(
                f"ids[:, {q}] lie in [{column.min()}, {column.max()}], but codebook {q} has {size} entries"
            )


class StaticModel:
    """How likely each digit of a token id is, given the token's rank in its group: histograms, fixed once fitted.

    Frequencies are integers that sum to 2**22 and are at least 1, so every id can be coded, and coding needs no float.
    Tokens whose rank is `max_rank` or more share the table of rank `max_rank - 1`.

    Args:
        frequencies: [R, S] int64, S = sum of all factors of all ids, in order; each factor's part sums to 2**22.
        index_factors: per id, its mixed-radix factors, least significant first.
    """

    def __init__(self, frequencies: Tensor, *, index_factors: Sequence[Sequence[int]]) -> None:
        self.index_factors = tuple(tuple(int(f) for f in each) for each in index_factors)
        self.radices = [radix for each in self.index_factors for radix in each]
        if not self.radices or min(self.radices) < 1:
            raise ValueError(f"index_factors={self.index_factors} must hold at least one factor, each 1 or more")
        self.frequencies = frequencies.detach().to("cpu", torch.int64)
        self._edges = np.concatenate([[0], np.cumsum(self.radices)])
        table = self.frequencies.numpy()
        if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != self._edges[-1]:
            raise ValueError(f"frequencies have shape {list(table.shape)}, expected [ranks, {self._edges[-1]}]")
        totals = np.add.reduceat(table, self._edges[:-1], axis=1)
        if table.min() < 1 or (totals != 1 << PRECISION).any():
            raise ValueError(f"frequencies must be 1 or more and sum to {1 << PRECISION} for each factor")
        self.max_rank = table.shape[0]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(each) for each in self.index_factors)

    @staticmethod
    def affordable_ranks(index_factors: Sequence[Sequence[int]], max_rank: int) -> int:
        """How many ranks may have tables of their own, `max_rank` at most; 0 where even one table is too large."""
        return min(max_rank, MAX_ENTRIES // sum(radix for each in index_factors for radix in each))

    @classmethod
    def fit(
        cls,
        tokens: Iterable[Tokens],
        *,
        index_factors: Sequence[Sequence[int]],
        max_rank: int,
        smoothing: float = 0.5,
    ) -> StaticModel:
        """Histograms of the real tokens of `tokens`, with `smoothing` added to every count.

        Deterministic: integer arithmetic only, whatever the order of the tokens.
        Raises: ValueError when the tables would exceed 2**22 entries, for tokens without ids, for smoothing <= 0.
        """
        factors = tuple(tuple(int(f) for f in each) for each in index_factors)
        radices = [radix for each in factors for radix in each]
        width = sum(radices)
        if max_rank < 1 or max_rank * width > MAX_ENTRIES:
            raise ValueError(
                f"a static model of {max_rank} ranks x {width} symbols has {max_rank * width} entries, more than "
                f"{MAX_ENTRIES}; give index_factors whose product is the codebook size, or max_rank <= "
                f"{cls.affordable_ranks(factors, max_rank)}"
            )
        pseudo = Fraction(smoothing).limit_denominator(1 << 10)
        if pseudo <= 0:
            raise ValueError(f"smoothing={smoothing} must be at least 1/1024, or an unseen id could not be coded")
        counts = np.zeros((max_rank, width), np.int64)
        offsets = np.concatenate([[0], np.cumsum(radices)])[:-1]
        for each in tokens:
            indices, rank = real_ids(each)
            check_ids(indices, [math.prod(f) for f in factors])
            symbols = to_symbols(indices, factors) + offsets
            flat = np.minimum(rank, max_rank - 1)[:, None] * width + symbols
            counts += np.bincount(flat.reshape(-1), minlength=counts.size).reshape(counts.shape)
        out = [_integer_frequencies(counts[:, at : at + radix], pseudo) for at, radix in zip(offsets.tolist(), radices)]
        return cls(torch.from_numpy(np.concatenate(out, 1)), index_factors=factors)

    @classmethod
    def uniform(cls, *, index_factors: Sequence[Sequence[int]], max_rank: int = 1) -> StaticModel:
        """Every digit equally likely: what `fit` gives without tokens."""
        return cls.fit([], index_factors=index_factors, max_rank=max_rank)

    def bits(self, tokens: Tokens) -> Tensor:
        """[B] float64: ideal code length of each clip's ids, -sum log2 p; the coded file adds the rounding to bytes."""
        table = PRECISION - torch.log2(self.frequencies.double())  # [R, S]
        batch, count = tokens.group.shape
        if tokens.indices is None:
            raise ValueError("these tokens have no indices: continuous tokens have no entropy-coded size")
        indices = tokens.indices.flatten(0, 1).cpu().numpy()
        mask = tokens.mask.cpu()
        indices = np.where(mask.reshape(-1, 1).numpy(), indices, 0)
        check_ids(indices, self.codebook_sizes)
        symbols = torch.from_numpy(to_symbols(indices, self.index_factors) + self._edges[:-1])  # [B*K, F]
        rank = tokens.rank.cpu().reshape(-1, 1).clamp(min=0, max=self.max_rank - 1)
        cost = table[rank, symbols].sum(1).reshape(batch, count)
        return torch.where(mask, cost, torch.zeros_like(cost)).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """What a safetensors file holds of it."""
        return {
            "frequencies": self.frequencies.to(torch.int32),
            "index_factors": torch.tensor(self.radices, dtype=torch.int64),
            "factors_per_id": torch.tensor([len(each) for each in self.index_factors], dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> StaticModel:
        """The inverse of `tensors`. Raises: ValueError for missing or inconsistent tensors."""
        missing = {"frequencies", "index_factors", "factors_per_id"} - set(tensors)
        if missing:
            raise ValueError(f"not a static entropy model: {sorted(missing)} missing")
        radices, counts = tensors["index_factors"].tolist(), tensors["factors_per_id"].tolist()
        if sum(counts) != len(radices):
            raise ValueError(f"factors_per_id={counts} does not add up to the {len(radices)} index_factors")
        edges = np.concatenate([[0], np.cumsum(counts)]).tolist()
        factors = [tuple(radices[a:b]) for a, b in zip(edges[:-1], edges[1:])]
        return cls(tensors["frequencies"], index_factors=factors)

    @property
    def sha256(self) -> bytes:
        """32 bytes that name this model: of its factors and frequencies, as little-endian integers."""
        digest = hashlib.sha256(repr(self.index_factors).encode())
        digest.update(self.frequencies.numpy().astype("<i4").tobytes())
        return digest.digest()

    def tables(self, rank: int) -> list[tuple[list[int], list[int]]]:
        """Per digit, (frequencies, cumulative starts) of tokens of this rank, as Python integers."""
        row = min(rank, self.max_rank - 1)
        if not hasattr(self, "_tables"):
            self._tables = lru_cache(maxsize=256)(self._row_tables)
        return self._tables(row)

    def _row_tables(self, row: int) -> list[tuple[list[int], list[int]]]:
        out = []
        for a, b in zip(self._edges[:-1], self._edges[1:]):
            f = self.frequencies[row, a:b].tolist()
            out.append((f, np.concatenate([[0], np.cumsum(f)[:-1]]).astype(int).tolist()))
        return out


def _integer_frequencies(counts: np.ndarray, pseudo: Fraction) -> np.ndarray:
    """counts [R, V] as integers that sum to 2**PRECISION a row, each 1 or more and near its smoothed share."""
    size, total = counts.shape[1], 1 << PRECISION
    weight = counts * pseudo.denominator + pseudo.numerator
    sums = weight.sum(1, keepdims=True)
    assert int(sums.max()) < 1 << (62 - PRECISION), "too many tokens for 64-bit integers"
    out = 1 + weight * (total - size) // sums
    # The division rounds down: what is left (less than `size`) goes to the most frequent entries, earliest first.
    left = total - out.sum(1)
    order = np.argsort(-weight, axis=1, kind="stable")
    extra = (np.arange(size) < left[:, None]).astype(np.int64)
    np.put_along_axis(out, order, np.take_along_axis(out, order, 1) + extra, 1)
    return out


def real_ids(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """ids [N, Q] and ranks [N] of the real tokens of a batch."""
    if tokens.indices is None:
        raise ValueError("these tokens have no indices: continuous tokens cannot be entropy-coded")
    mask = tokens.mask
    return tokens.indices[mask].cpu().numpy().astype(np.int64), tokens.rank[mask].cpu().numpy().astype(np.int64)


@lru_cache(maxsize=1024)
def _packed_bytes(sizes: tuple[int, ...], count: int) -> int:
    """Bytes of the largest integer that `count` tokens of these codebooks can make."""
    return ((math.prod(sizes) ** count - 1).bit_length() + 7) // 8


def packed_bits(codebook_sizes: Sequence[int], count: int) -> int:
    """Bits that `count` tokens packed together need, before rounding to bytes: ceil(count * log2(prod of sizes))."""
    return (math.prod(codebook_sizes) ** count - 1).bit_length()


def packed_bytes(codebook_sizes: Sequence[int], count: int) -> int:
    """Bytes that `pack` makes of `count` tokens."""
    sizes = tuple(codebook_sizes)
    step = max(1, BLOCK // max(1, len(sizes)))
    whole, rest = divmod(count, step)
    return whole * _packed_bytes(sizes, step) + (_packed_bytes(sizes, rest) if rest else 0)


def pack(indices: np.ndarray, codebook_sizes: Sequence[int]) -> bytes:
    """ids [N, Q] as bytes, at log2(V) bits an id: blocks of at most 4096 ids, each rounded up to whole bytes."""
    sizes = tuple(codebook_sizes)
    check_ids(indices, sizes)
    step, out = max(1, BLOCK // max(1, len(sizes))), []
    for at in range(0, len(indices), step):
        block = indices[at : at + step]
        x = 0
        for row in reversed(block.tolist()):
            for value, size in zip(reversed(row), reversed(sizes)):
                x = x * size + value
        out.append(x.to_bytes(_packed_bytes(sizes, len(block)), "little"))
    return b"".join(out)


def unpack(data: bytes, count: int, codebook_sizes: Sequence[int]) -> np.ndarray:
    """The inverse of `pack`: `count` tokens' ids, [count, Q] int64. Raises ValueError where `data` cannot be these."""
    sizes = tuple(codebook_sizes)
    step, rows, cursor = max(1, BLOCK // max(1, len(sizes))), [], 0
    for at in range(0, count, step):
        here = min(step, count - at)
        size = _packed_bytes(sizes, here)
        if cursor + size > len(data):
            raise ValueError(f"packed ids: {len(data)} bytes cannot hold {count} tokens")
        x = int.from_bytes(data[cursor : cursor + size], "little")
        cursor += size
        for _ in range(here):
            row = []
            for radix in sizes:
                x, value = divmod(x, radix)
                row.append(value)
            rows.append(row)
        if x:
            raise ValueError("packed ids: bits are left after the last token")
    if cursor != len(data):
        raise ValueError(f"packed ids: {len(data) - cursor} bytes too many for {count} tokens")
    return np.array(rows, np.int64).reshape(count, len(sizes))


class RangeEncoder:
    """Digits of whole-number probabilities as the fewest bytes that, continued by zeros, lie in their interval.

    A range coder (Martin 1979) with 64 bits of state; carries go back into the bytes that are out already. It spends
    the information of the digits, rounded up to a byte at most.
    """

    def __init__(self) -> None:
        self.low, self.size, self.out = 0, 1 << STATE, bytearray()

    def put(self, start: int, frequency: int) -> None:
        """A digit whose share of 2**22 begins at `start` and has length `frequency`."""
        unit = self.size >> PRECISION
        self.low, self.size = self.low + unit * start, unit * frequency
        if self.low >> STATE:
            self._carry()
        while self.size < 1 << STATE - 8:
            self.out.append(self.low >> STATE - 8)
            self.low, self.size = self.low << 8 & FULL, self.size << 8

    def finish(self) -> bytes:
        """The bytes of all digits. The encoder is used up."""
        for count in range(STATE // 8 + 1):
            step = 1 << STATE - 8 * count
            value = -(-self.low // step) * step
            if value < self.low + self.size:
                break
        if value >> STATE:
            self._carry()
        return bytes(self.out + (value & FULL).to_bytes(STATE // 8, "big")[:count]).rstrip(b"\0")

    def _carry(self) -> None:
        self.low &= FULL
        at = len(self.out) - 1
        while self.out[at] == 0xFF:
            self.out[at] = 0
            at -= 1
        self.out[at] += 1


class RangeDecoder:
    """The inverse of `RangeEncoder`: `slot` of the next digit, then `take` it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.size = data, STATE // 8, 1 << STATE
        self.code = int.from_bytes(data[: self.at].ljust(self.at, b"\0"), "big")

    def slot(self) -> int:
        """Where in 2**22 the next digit lies. Raises: ValueError for bytes that no digits make."""
        slot = self.code // (self.size >> PRECISION)
        if slot >> PRECISION:
            raise ValueError("coded ids: no digit has this code")
        return slot

    def take(self, start: int, frequency: int) -> None:
        unit = self.size >> PRECISION
        self.code, self.size = self.code - unit * start, unit * frequency
        while self.size < 1 << STATE - 8:
            following = self.data[self.at] if self.at < len(self.data) else 0
            self.code, self.size, self.at = self.code << 8 | following, self.size << 8, self.at + 1


def encode_static(indices: np.ndarray, ranks: np.ndarray, model: StaticModel) -> bytes:
    """ids [N, Q] of tokens with ranks [N] as bytes, entropy-coded."""
    check_ids(indices, model.codebook_sizes)
    coder = RangeEncoder()
    for row, rank in zip(to_symbols(indices, model.index_factors).tolist(), ranks.tolist()):
        for digit, (frequencies, starts) in zip(row, model.tables(rank)):
            coder.put(starts[digit], frequencies[digit])
    return coder.finish()


def decode_static(data: bytes, ranks: np.ndarray, model: StaticModel) -> np.ndarray:
    """The inverse of `encode_static`: ids [N, Q] int64 of tokens with ranks [N]. Raises ValueError."""
    coder, rows = RangeDecoder(data), []
    for rank in ranks.tolist():
        row = []
        for frequencies, starts in model.tables(rank):
            digit = bisect_right(starts, coder.slot()) - 1
            coder.take(starts[digit], frequencies[digit])
            row.append(digit)
        rows.append(row)
    if data.endswith(b"\0") or len(data) > coder.at:
        raise ValueError(f"coded ids: {len(data)} bytes are too many for {len(ranks)} tokens")
    symbols = np.array(rows, np.int64).reshape(len(ranks), len(model.radices))
    return from_symbols(symbols, model.index_factors)


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, least significant first, the high bit set on all but the last."""
    if value < 0:
        raise ValueError(f"{value} is negative")
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def take_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("a number runs past the end of its record")
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
