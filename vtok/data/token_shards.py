"""Batches of token ids for training autoregressive models, from shards that `vtok tokenize` wrote.

The order of clips is that of the training pipeline (`vtok.data.order`): a pure function of (seed, epoch, rank, world,
workers), so a position is a number of batches, and a resume loses and repeats nothing. Only tar headers are read to get
there.

Letters: B rows, L places of a row, Q ids a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vtok.data.order import _dealt, passes
from vtok.data.pipeline import ENDLESS, make_loader
from vtok.data.sources import Sample
from vtok.data.token_reader import SampleFacts, TokenReader, TokenSample, TokenShardError, open_token_shards

MODES = ("packed", "clips")


class ClipFacts(NamedTuple):
    """A clip of a batch. facts: its own json without "tokens". tokens: see `SampleFacts`."""

    key: str
    facts: dict[str, Any]
    tokens: SampleFacts


@dataclass
class TokenBatch:
    """Rows of ids for an autoregressive model.

    ids: [B, L] int64, or [B, L, Q] where they are kept apart. mask: [B, L] bool, False on padding (ids 0 there).
    segment: [B, L], number of the clip in its row; group, rank: [B, L], of the token, -1 at a clip's first id
    (`begin`). All -1 on padding. clips: of each row, those with ids in it, by segment, with key "epoch:key".
    """

    ids: Tensor
    mask: Tensor
    segment: Tensor
    group: Tensor
    rank: Tensor
    clips: list[list[ClipFacts]]

    @property
    def keys(self) -> list[list[str]]:
        return [[clip.key for clip in row] for row in self.clips]

    @property
    def captions(self) -> list[list[str]]:
        """Caption of each clip of each row, "" where it has none."""
        return [[str(clip.facts.get("caption") or "") for clip in row] for row in self.clips]

    def __len__(self) -> int:
        return len(self.clips)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """The same batch with every tensor on `device`."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TokenBatch:
        """The same batch in pinned memory (the DataLoader's hook)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        names = [f.name for f in fields(self) if f.name != "clips"]
        return replace(self, **{name: change(getattr(self, name)) for name in names})


class _Segment(NamedTuple):
    """Places [first, last) of a clip's sequence, in a row."""

    epoch: int
    sample: Sample
    first: int
    last: int


class TokenShards(IterableDataset):
    """`TokenBatch`es of one rank, endless unless `epochs` is given; iterate it through a `TokenLoader`.

    Args:
        shards: folder(s) written by `vtok tokenize`. model_id: refuse other tokenizers' ids.
        length: L. mode "packed": every row is filled with consecutive clips, which go on in the next row; a stream's
            last row of an epoch is padded. mode "clips": one clip a row, padded to `length`, or to the longest of the
            batch where it is None; longer clips are an error, or cut at `length` with cut=True.
        flatten: with Q > 1 ids a token, write them one after the other, id q raised by the sizes of codebooks before
            it: [B, L] of one vocabulary. False keeps them apart: [B, L, Q].
        begin: put an id of its own before every clip: the last of the vocabulary (of each codebook's, kept apart).
        epochs: end after so many passes (validation: 1); the last batch may then be smaller.
        rank, world: as torch.distributed says where it is set up, else 0 of 1.
        start: batches of this rank already used.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str],
        *,
        batch_size: int,
        length: int | None = None,
        mode: str = "packed",
        flatten: bool = True,
        begin: bool = True,
        cut: bool = False,
        seed: int = 0,
        shuffle_buffer: int = 1024,
        epochs: int | None = None,
        rank: int | None = None,
        world: int | None = None,
        start: int = 0,
        model_id: str | None = None,
        root: str | Path = "",
        cache_dir: str | Path = "",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if batch_size < 1 or (length is not None and length < 2) or (length is None and mode == "packed"):
            raise ValueError(f"batch_size={batch_size} must be 1 or more, and length={length} 2 or more")
        if cut and (mode == "packed" or length is None):
            raise ValueError(f"cut=True is for mode='clips' with a length (mode={mode!r}, length={length})")
        if epochs is not None and (epochs < 1 or start):
            raise ValueError(
                f"epochs={epochs} must be 1 or more, and is for streams from the beginning (start={start})"
            )
        if (rank is None) != (world is None):
            raise ValueError(f"rank={rank} and world={world}: give both, or neither")
        if rank is None or world is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
        self.index = open_token_shards(shards, model_id=model_id, root=root, cache_dir=cache_dir)
        self.reader = TokenReader(self.index, cache_dir=cache_dir)
        self.tokenizer = self.index.tokenizer
        self.batch_size, self.length, self.mode, self.flatten, self.begin = batch_size, length, mode, flatten, begin
        self.cut, self.seed, self.shuffle_buffer, self.epochs = cut, seed, shuffle_buffer, epochs
        self.rank, self.world, self.start = rank, world, start
        self._last: tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
        self.per_token = len(self.tokenizer.codebook_sizes) if flatten else 1  # places of a row a token takes
        longest = max(self.index.longest) * self.per_token + begin
        if mode == "clips" and length is not None and longest > length and not cut:
            raise ValueError(
                f"length={length}, but the longest clip takes {longest} places: ask for that length, for mode='packed' "
                "or, to lose what is beyond, for cut=True"
            )

    @property
    def vocabulary(self) -> tuple[int, ...]:
        """Number of different ids: of the one vocabulary, or of each codebook where ids are kept apart."""
        sizes = self.tokenizer.codebook_sizes
        return (sum(sizes) + self.begin,) if self.flatten else tuple(size + self.begin for size in sizes)

    def __len__(self) -> int:
        if self.epochs is not None:
            raise TypeError("the number of batches of some epochs is known at their end only")
        return ENDLESS

    def __iter__(self) -> Iterator[TokenBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn = (worker + self.start) % workers  # a fresh loader asks worker 0 first
        stream, streams = self.rank * workers + turn, self.world * workers
        done = len(range(turn, self.start, workers)) * self.batch_size
        epoch, passed = self._whole_epochs(done, stream=stream, streams=streams)
        rows = self._rows(epoch, stream=stream, streams=streams)
        for _ in range(done - passed):
            next(rows, None)
        batch: list[list[_Segment]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.batch_size:
                yield self._collate(batch)
                batch = []
        if batch:
            yield self._collate(batch)

    def _places(self, sample: Sample) -> int:
        return self.reader.count(sample) * self.per_token + self.begin

    def _whole_epochs(self, done: int, *, stream: int, streams: int) -> tuple[int, int]:
        """(epochs, their rows) that a stream was through when it had given `done` rows."""
        epoch = passed = idle = 0
        while passed < done and idle <= streams:
            rows = self._rows_in(epoch, stream=stream, streams=streams)
            if passed + rows > done:
                break
            idle = 0 if rows else idle + 1
            epoch, passed = epoch + 1, passed + rows
        return epoch, passed

    def _rows_in(self, epoch: int, *, stream: int, streams: int) -> int:
        """Rows that a stream gives in an epoch, from the index alone where no shard is shared among streams."""
        shards = self.index.shards
        mine, turn, sharing = _dealt(len(shards), self.seed, epoch, stream, streams, 0)
        if self.mode == "clips":
            return sum(len(range(turn, shards[i].samples or 0, sharing)) for i in mine)
        if sharing == 1:
            places = sum(self.index.tokens[i] * self.per_token + (shards[i].samples or 0) * self.begin for i in mine)
        else:
            places = sum(map(self._places, self.reader.samples(mine[0])[turn::sharing]))
        assert self.length is not None
        return -(-places // self.length)

    def _rows(self, first_epoch: int, *, stream: int, streams: int) -> Iterator[list[_Segment]]:
        """Rows as references: nothing is read but tar headers."""
        keywords = {"seed": self.seed, "stream": stream, "streams": streams, "shuffle_buffer": self.shuffle_buffer}
        row: list[_Segment] = []
        room, current = self.length or 0, first_epoch
        for _, epoch, sample in passes(self.reader, first_epoch=first_epoch, **keywords):
            if sample.problem is not None:
                raise TokenShardError(f"{sample.key}: {sample.problem}; keys must be unique over the token shards")
            if epoch != current and row:
                yield row
                row, room = [], self.length or 0
            current = epoch
            if self.epochs is not None and epoch >= self.epochs:
                return
            places = self._places(sample)
            if self.mode == "clips":
                yield [_Segment(epoch, sample, 0, min(places, self.length or places))]
                continue
            first = 0
            while first < places:
                last = min(places, first + room)
                row.append(_Segment(epoch, sample, first, last))
                room -= last - first
                first = last
                if not room:
                    yield row
                    row, room = [], self.length or 0

    def _sequence(self, clip: TokenSample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids [n] or [n, Q], group [n], rank [n]) of a clip with all its places."""
        if self._last is None or self._last[0] is not clip.ids:  # a long clip fills many rows
            self._last = clip.ids, self._lay_out(clip)
        return self._last[1]

    def _lay_out(self, clip: TokenSample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = np.array(self.tokenizer.codebook_sizes, np.int64)
        ids, counts = clip.ids, np.array(clip.tokens.groups)
        group = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = sizes
        if self.flatten:
            ids = (ids + np.cumsum(sizes) - sizes).reshape(-1)
            group, rank = np.repeat(group, self.per_token), np.repeat(rank, self.per_token)
            start = sizes.sum()
        if self.begin:
            ids = np.concatenate([np.asarray(start)[None], ids])
            group, rank = np.concatenate([[-1], group]), np.concatenate([[-1], rank])
        return ids, group, rank

    def _collate(self, rows: list[list[_Segment]]) -> TokenBatch:
        length = self.length or max(row[-1].last for row in rows)
        shape = (len(rows), length)
        kept = () if self.flatten else (len(self.tokenizer.codebook_sizes),)
        batch = TokenBatch(
            ids=torch.zeros(*shape, *kept, dtype=torch.int64),
            mask=torch.zeros(shape, dtype=torch.bool),
            segment=torch.full(shape, -1),
            group=torch.full(shape, -1),
            rank=torch.full(shape, -1),
            clips=[],
        )
        for number, row in enumerate(rows):
            at, clips = 0, []
            for segment, (epoch, sample, first, last) in enumerate(row):
                clip = self.reader.load(sample)
                here = slice(at, at + last - first)
                values = (torch.from_numpy(value[first:last]) for value in self._sequence(clip))
                batch.ids[number, here], batch.group[number, here], batch.rank[number, here] = values
                batch.mask[number, here], batch.segment[number, here] = True, segment
                clips.append(ClipFacts(f"{epoch}:{clip.key}", clip.facts, clip.tokens))
                at = here.stop
            batch.clips.append(clips)
        return batch


class TokenLoader:
    """A DataLoader over `TokenShards` that knows its place: put `state_dict()` into the checkpoint, and load it back.

    Batches count as used when they are handed out. Iterating again goes on where the last iteration was left. With
    `epochs` it begins anew every time, and there is nothing to resume.
    """

    FIXED = ("world", "batch_size", "length", "mode", "flatten", "begin", "cut", "seed", "shuffle_buffer", "epochs")

    def __init__(self, dataset: TokenShards, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.dataset, self.num_workers, self.pin_memory = dataset, num_workers, pin_memory
        self.batches = dataset.start

    def __iter__(self) -> Iterator[TokenBatch]:
        self.dataset.start = self.batches = 0 if self.dataset.epochs is not None else self.batches
        stream: Any = self.dataset
        for batch in make_loader(stream, num_workers=self.num_workers, pin_memory=self.pin_memory):
            self.batches += 1
            yield batch

    def _fixed(self) -> dict[str, Any]:
        facts = {name: getattr(self.dataset, name) for name in self.FIXED}
        return facts | {"num_workers": self.num_workers, "shards": self.dataset.index.fingerprint}

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the stream would not be the one of the checkpoint, naming both values."""
        now = self._fixed()
        changed = [f"{k} was {state.get(k)!r} and is {v!r}" for k, v in now.items() if state.get(k) != v]
        if changed:
            raise ValueError(f"cannot resume the token stream in the middle: {'; '.join(changed)}. Use the old values")
        if self.dataset.epochs is not None:
            raise ValueError(f"a stream of epochs={self.dataset.epochs} always begins anew: there is nothing to resume")
        self.batches = int(state["batches"])
