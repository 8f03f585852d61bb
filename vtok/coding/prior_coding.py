"""Arithmetic coding of token ids under a prior, and what an id costs under it.

    ids --digits--> TokenPrior in exact arithmetic --whole-number frequencies--> range coder (constriction) --> bytes

Encoding reads many tokens at once, decoding one at a time; `vtok.layers.exact` makes both see the same frequencies.
The state is the keys and values of the last groups, so memory does not grow with the video. constriction: Bamler 2022,
https://arxiv.org/abs/2201.01741. Range coding of network probabilities breaks wherever two machines disagree in the
last bit of one of them: `PriorModel.fingerprint` is what this machine makes of a fixed probe, and goes into every file.

Letters: B clips, K tokens of a clip, N tokens, Q ids a token, S digits, V values of a digit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok.coding.entropy import check_ids, from_symbols, packed_bytes, to_symbols, varint
from vtok.layers.exact import ExactPrior, State, cost, frequencies
from vtok.layers.token_prior import NULL, TokenPrior, TokenPriorConfig
from vtok.types import Tokens

PIECE = 256  # tokens that encoding reads at once: scores are [heads, PIECE, keys]
CHECK_BYTES = 1  # of a CRC-32 over a record's ids: wrong probabilities give wrong ids, not an error
CHECK_TOKENS = 64  # of a record that has a check; the file's own at the end, which covers the ids, serves shorter ones


class PriorModel:
    """A trained prior as an entropy model of `.vtok` files, and as a sampler's probabilities. On the CPU, in float64.

    Args:
        tensors: `TokenPrior.state_dict()`; exactly its names and shapes.
    Raises: ValueError for tensors that are not those of `config`, or hold numbers that are not finite.
    """

    def __init__(self, config: TokenPriorConfig, tensors: dict[str, Tensor]) -> None:
        self.config = config
        with torch.device("meta"):
            expected = TokenPrior(config).state_dict()
        if set(expected) != set(tensors):
            odd = sorted(set(expected) ^ set(tensors))
            raise ValueError(f"not the tensors of this prior: {', '.join(odd[:3])} are missing or too many")
        for name, value in tensors.items():
            if value.shape != expected[name].shape or not bool(value.isfinite().all()):
                raise ValueError(
                    f"prior: {name} is {list(value.shape)} (or not finite), expected {list(expected[name].shape)}"
                )
        self.state_dict = {name: value.detach().cpu().float() for name, value in tensors.items()}
        self.exact = ExactPrior(config, {name: value.numpy() for name, value in self.state_dict.items()})

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return tuple(self.config.codebook_sizes)

    @cached_property
    def sha256(self) -> bytes:
        """32 bytes that name this prior: of its configuration and tensors."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name in sorted(self.state_dict):
            value = self.state_dict[name]
            digest.update(f"{name}\n{list(value.shape)}\n".encode() + value.numpy().astype("<f4").tobytes())
        return digest.digest()

    @cached_property
    def fingerprint(self) -> bytes:
        """8 bytes: of the frequencies and coded bytes this machine makes of a fixed probe of this prior."""
        count = min(self.config.max_rank, 8)
        stream = hashlib.shake_256(b"vtok prior probe").digest(8 * 3 * count * len(self.codebook_sizes))
        numbers = np.frombuffer(stream, "<u8").reshape(3 * count, -1)
        ids = (numbers % np.array(self.codebook_sizes, np.uint64)).astype(np.int64)
        digest = hashlib.sha256()
        one_by_one = PriorStream(self)
        for at, row in enumerate(ids):
            for each in one_by_one.frequencies(row[None], [1] if at % count == 0 else [], more=at % count > 0):
                digest.update(each.astype("<i8").tobytes())
        digest.update(PriorStream(self).encode(ids, [count] * 3))
        return digest.digest()[:8]

    @property
    def build(self) -> str:
        """What this machine is, for the message of a file that it cannot read."""
        return f"numpy {np.__version__} {platform.machine()}"

    def token_bits(self, tokens: Tokens) -> Tensor:
        """[B, K] float64: ideal code length of each token; 0 on padding. Groups count from 0 for each clip.

        Raises: ValueError for continuous tokens, or ids outside the codebooks.
        """
        if tokens.indices is None:
            raise ValueError("these tokens have no indices: continuous tokens have no entropy-coded size")
        out = torch.zeros(tokens.group.shape, dtype=torch.float64)
        mask, group = tokens.mask.cpu(), tokens.group.cpu()
        for row in range(len(out)):
            ids, here = tokens.indices[row].cpu()[mask[row]].numpy().astype(np.int64), group[row][mask[row]].numpy()
            check_ids(ids, self.codebook_sizes)
            counts = np.bincount(here).tolist() if len(here) else []
            out[row, mask[row]] = torch.from_numpy(PriorStream(self).bits(ids, counts))
        return out

    def bits(self, tokens: Tokens) -> Tensor:
        """[B] float64: ideal code length of each clip's ids, as `StaticModel.bits`."""
        return self.token_bits(tokens).sum(1)


class PriorStream:
    """Where a stream of tokens is: encode or decode its records in order. Groups count from 0.

    words: the condition, as numbers of the vocabulary; None: nothing is said, as in files.
    """

    def __init__(self, model: PriorModel, *, words: list[int] | None = None, batch: int = 1) -> None:
        self.model, self.exact = model, model.exact
        if words is None and model.config.condition != "none":
            words = [NULL]
        self.state: State = model.exact.start(words, batch=batch)
        self.factors = [tuple(each) for each in model.config.index_factors]
        digits = len(model.config.radices)
        self.group = -1
        self.last = np.full((batch, digits), -1, np.int64)  # digits of the token before
        self.before = np.zeros((batch, 0, digits), np.int64)  # of the group before, by rank
        self.current = np.zeros((batch, 0, digits), np.int64)  # of this group

    def fork(self) -> PriorStream:
        """A stream that goes on from here on its own."""
        return copy.deepcopy(self, {id(self.model): self.model, id(self.exact): self.exact})

    def begin_group(self) -> None:
        self.group += 1
        self.before, self.current = self.current, np.zeros_like(self.current[:, :0])

    def hidden(self, digits: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the digits' heads read before each of some tokens of this group, [B, n, S, M], and their ranks [n].

        digits: [B, n, S] of these tokens, to read them at once; None: of the next token, which `accept` tells after.
        """
        batch, first = self.last.shape[0], self.current.shape[1]
        count = 1 if digits is None else digits.shape[1]
        rank = np.arange(first, first + count)
        previous = self.last[:, None]
        if digits is not None:
            previous = np.concatenate([previous, digits[:, :-1]], 1)
        above = np.full((batch, count, self.last.shape[1]), -1, np.int64)
        there = self.before[:, first : first + count]
        above[:, : there.shape[1]] = there
        group = np.full(count, self.group)
        x = self.exact.hidden(self.state, previous=previous, above=above, group=group, rank=rank)
        return self.exact.head(x), rank

    def accept(self, digits: np.ndarray) -> None:
        """[B, n, S]: these tokens are read."""
        self.last = digits[:, -1]
        self.current = np.concatenate([self.current, digits], 1)

    def frequencies(self, ids: np.ndarray, counts: Sequence[int], *, more: bool = False) -> list[np.ndarray]:
        """By digit, frequencies [N, V] of the tokens of the next groups (`more`: of this group) at each place."""
        symbols = to_symbols(ids, self.factors)
        out: list[list[np.ndarray]] = [[] for _ in range(symbols.shape[1])]
        at = 0
        for number, count in enumerate([len(ids)] if more else counts):
            if not more or number:
                self.begin_group()
            for first in range(at, at + count, PIECE):
                digits = symbols[None, first : min(first + PIECE, at + count)]
                inner, rank = self.hidden(digits)
                for s, column in enumerate(out):
                    column.append(frequencies(self.exact.logits(inner, digits, rank, s))[0])
                self.accept(digits)
            at += count
        assert at == len(ids), (at, len(ids))
        radices = self.model.config.radices
        return [np.concatenate(each) if each else np.zeros((0, v)) for each, v in zip(out, radices)]

    def bits(self, ids: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """[N] float64: ideal bits of the tokens of the next groups."""
        symbols = to_symbols(ids, self.factors)
        tables = self.frequencies(ids, counts)
        return sum((cost(f, symbols[:, s]) for s, f in enumerate(tables)), np.zeros(len(ids)))

    def advance(self, ids: np.ndarray, counts: Sequence[int]) -> None:
        """These ids [N, Q] are the next groups, known already."""
        self.frequencies(ids, counts)

    def encode(self, ids: np.ndarray, counts: Sequence[int]) -> bytes:
        """The ids [N, Q] of the next groups, of so many tokens each, as bytes that end with their check."""
        coder = _constriction().stream
        check_ids(ids, self.model.codebook_sizes)
        tables, symbols = self.frequencies(ids, counts), to_symbols(ids, self.factors)
        encoder = coder.queue.RangeEncoder()
        for n, row in enumerate(symbols.tolist()):
            for s, digit in enumerate(row):
                encoder.encode(digit, coder.model.Categorical(tables[s][n], perfect=False, lazy=True))
        return _shortest(encoder) + _check(ids)

    def decode(self, data: bytes, counts: Sequence[int]) -> np.ndarray:
        """The inverse of `encode`: ids [N, Q] int64. Raises: ValueError for bytes that these ids would not make."""
        coder = _constriction().stream
        checked = CHECK_BYTES if sum(counts) >= CHECK_TOKENS else 0
        body, check = data[: len(data) - checked], data[len(data) - checked :]
        words = np.frombuffer(body + bytes(8 + -len(body) % 4), ">u4").astype(np.uint32)  # the rest of x is zeros
        decoder = coder.queue.RangeDecoder(words)
        rows = []
        for count in counts:
            self.begin_group()
            for _ in range(count):
                inner, rank = self.hidden()
                digits = np.zeros((1, 1, self.last.shape[1]), np.int64)
                for s in range(digits.shape[2]):
                    table = frequencies(self.exact.logits(inner, digits, rank, s))[0, 0]
                    try:
                        digits[..., s] = decoder.decode(coder.model.Categorical(table, perfect=False, lazy=True))
                    except AssertionError as error:  # constriction's word for data that no encoder makes
                        raise ValueError(f"coded ids cannot be: {error}") from error
                self.accept(digits)
                rows.append(digits[0, 0])
        symbols = np.stack(rows) if rows else np.zeros((0, self.last.shape[1]), np.int64)
        ids = from_symbols(symbols, self.factors)
        if _check(ids) != check:
            raise ValueError("coded ids do not have the check they were written with")
        check_ids(ids, self.model.codebook_sizes)
        return ids


def _constriction() -> Any:
    try:
        import constriction
    except ModuleNotFoundError as error:
        raise ValueError("coding='ar' needs the package constriction: pip install constriction") from error
    return constriction


def _shortest(encoder: Any) -> bytes:
    """The fewest bytes that, continued by zeros, lie in the encoder's interval."""
    words = encoder.get_compressed()
    whole = words.astype(">u4").tobytes()
    position, (lower, size) = encoder.pos()
    if lower + size > 1 << 64 or 4 * position > len(whole):  # a carry is open: the coder's own ending settles it
        return whole
    head = whole[: 4 * position]
    for count in range(9):
        step = 1 << (64 - 8 * count)
        value = -(-lower // step) * step
        if value < min(lower + size, 1 << 64):
            return (head + value.to_bytes(8, "big")[:count]) if count else head
    return whole


def _check(ids: np.ndarray) -> bytes:
    """What a record of these ids ends with."""
    count = CHECK_BYTES if len(ids) >= CHECK_TOKENS else 0
    return zlib.crc32(ids.astype("<i4").tobytes()).to_bytes(4, "little")[:count]


def signalling_bits(tokens: Tokens) -> Tensor:
    """[B] float64: what a record of a `.vtok` file spends on how many tokens each group holds (format 2 or later)."""
    batch = tokens.group.shape[0]
    out = torch.zeros(batch, dtype=torch.float64)
    mask, group = tokens.mask.cpu(), tokens.group.cpu()
    for row in range(batch):
        counts = torch.bincount(group[row][mask[row]]).tolist() or [0]
        least, span = min(counts), max(counts) - min(counts)
        if span == 0:
            out[row] = 8 * len(varint(1 + least))
        else:
            start = varint(0) + varint(least) + varint(span)
            out[row] = 8 * (len(start) + packed_bytes((span + 1,), len(counts)))
    return out
