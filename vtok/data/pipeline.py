"""Shards in, uint8 `Clip` batches out. The stages, in order:

1. shard list     a folder with index.json, a brace or glob pattern of tars, a list, https: or pipe: (through a local
                  cache); several sources joined by "::", concatenated, mixed by weight inside a batch, or in batches
                  of one source each (`vtok.data.buckets`)                              -> `vtok.data.sources`
2. split          by (rank, worker): every stream gets its share of each epoch          -> `vtok.data.order`
3. shuffle        seeded: the shards of an epoch, then the samples in a buffer. Stages 1 to 3 handle references
                  (shard, key, byte ranges) only: after a resume the last epoch is replayed from tar headers
4. decode         a window of `num_frames` at `fps` with a random start; a clip that is shorter than the window comes
                  whole, with its length; an image is a 1-frame clip                    -> `vtok.data.view`
                  With data.map it is a window of the dense map in <key>.npy        -> `vtok.data.maps`
                  In shards of a tower's features it is the same window of those, and there is no stage 5;
                  for a model that hears, the sound of the window comes too       -> `vtok.data.audio`
                                                                                    -> `vtok.data.feature_shards`
5. resize, crop   crop of the target's aspect, antialiased resize, both on uint8; horizontal flip. With
                  data.size_scales the target of a batch is one of several sizes, drawn by the batch's number
6. batch          uint8 [B, 3, T, H, W] padded with repeats of the last frame to the longest clip, `lengths`, `times`

Laws. The order of samples is a pure function of (seed, epoch, rank, world, workers) and the shards; every random choice
about one sample (start, crop, flip) of (seed, epoch, key); part and size of a batch of (seed, its number). So a
position is a number of batches, and a resume needs no generator state. Passes over all streams with the same epoch
number hold every sample exactly once. Another number of ranks or workers gives another order (the same samples a pass,
each seen in the same window and crop).

A broken sample is logged, appended to the quarantine file, counted and left out, and so is a shard that cannot be read
for the moment; a resume reads that file to count the same ones in and out. Damaged shards give their whole samples and
count the lost ones. Past `max_bad_fraction` the stream raises `TooManyBroken`.

Legend: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vtok.data.buckets import Bucket, Schedule, Sizes, make_buckets
from vtok.data.feature_index import feature_view, open_features
from vtok.data.health import Health
from vtok.data.order import WHOLE_SHARD, endless, passes, seeded, whole_epochs
from vtok.data.sample import Item, collate, load_sample
from vtok.data.sources import BrokenSample, Shard, ShardReader, open_sources
from vtok.data.strict import DecodeError
from vtok.data.view import View
from vtok.types import Clip, share

log = logging.getLogger(__name__)

ENDLESS = 1 << 40  # length of the training stream: a loader without one makes Lightning read a batch ahead


class TrainingStream(IterableDataset):
    """Endless `Clip` batches of one rank, made for `make_loader`. Keys are "epoch:key".

    start: batches of this rank already consumed; the stream goes on with the next one. A fresh loader asks worker 0
    first, so worker i takes the stream whose turn it is, (i + start) mod workers.
    part_frames, part_batch_sizes: with one of them every batch comes from one source (`vtok.data.buckets`).
    size_scales: a batch is of view.size times one of them.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Shard]],
        *,
        view: View,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        weights: Sequence[float] | None = None,
        part_frames: Sequence[int] | None = None,
        part_batch_sizes: Sequence[int] | None = None,
        size_scales: Sequence[float] | None = None,
        shuffle_buffer: int = 256,
        cache_dir: str | Path = "",
        max_bad_fraction: float = 0.01,
        quarantine: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be 1 or more")
        self.readers = [ShardReader(shards, cache_dir=cache_dir, media=view.media) for shards in sources]
        parts = {"part_frames": part_frames, "part_batch_sizes": part_batch_sizes}
        self.buckets = make_buckets(sources, view=view, batch_size=batch_size, weights=weights, **parts)
        self.schedule = Schedule([bucket.weight for bucket in self.buckets], seed=seed)
        self.sizes = Sizes(view.size, size_scales, seed=seed)
        self.seed, self.weights, self.shuffle_buffer = seed, weights, shuffle_buffer
        self.rank, self.world, self.start = rank, world, start
        self.max_bad_fraction, self.quarantine = max_bad_fraction, quarantine

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Clip]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn = (worker + self.start) % workers  # this stream gives the batches turn, turn + workers, ...
        stream, streams = self.rank * workers + turn, self.world * workers
        where = f"stream {stream} of {streams}"
        health = Health(max_bad_fraction=self.max_bad_fraction, quarantine=self.quarantine, seed=self.seed, where=where)
        given = self.schedule.counts(self.start, turn=turn, step=workers)
        sources = [
            self._items(bucket, health, skip=done * bucket.batch_size, stream=stream, streams=streams)
            for bucket, done in zip(self.buckets, given)
        ]
        health.judging = False  # broken samples are a share of all that was seen, not of the first part's
        for items in sources:
            next(items)
        health.judging = True
        for number in count(turn + sum(given) * workers, workers):
            part = self.schedule.part(number)
            bucket, items = self.buckets[part], sources[part]
            view = replace(bucket.view, size=self.sizes.at(number))
            yield collate([items.send(view) for _ in range(bucket.batch_size)], frames=bucket.frames)

    def _label(self, source: int, shard: int) -> str:
        """How the quarantine calls a shard. Parts may hold the same shard, and see other windows of its clips."""
        name = self.readers[source].shards[shard].name
        return f"{source}:{name}" if len(self.buckets) > 1 else name

    def _items(
        self, bucket: Bucket, health: Health, *, skip: int, stream: int, streams: int
    ) -> Generator[Any, View, None]:
        """None once `skip` good samples are passed over, then good samples without end: each seen in the view sent."""
        view = bucket.view
        keywords: dict[str, Any] = {
            "seed": self.seed,
            "stream": stream,
            "streams": streams,
            "shuffle_buffer": self.shuffle_buffer,
        }

        def whole(source: int, shard: int) -> str:  # in place of a key: names may be equal, and other streams luckier
            return f"{WHOLE_SHARD} {shard} of source {source}, for {health.where})"

        keywords["unread"] = lambda epoch, source, shard: health.is_known(
            epoch, self._label(source, shard), whole(source, shard)
        )
        first = 0
        if len(bucket.sources) == 1:
            (source,) = bucket.sources
            keywords["source"] = source
            if self.quarantine is not None:
                here = {"seed": self.seed, "stream": stream, "streams": streams, "source": source}
                shards, label = self.readers[source].shards, functools.partial(self._label, source)
                first, passed, broken = whole_epochs(shards, health.known, samples=skip, label=label, **here)
                skip, health.seen, health.broken = skip - passed, health.seen + passed + broken, health.broken + broken
            references = passes(self.readers[source], first_epoch=first, **keywords)
        else:
            references = endless(self.readers, weights=self.weights, **keywords)
        if not skip:
            view = yield None
        for source, epoch, sample in references:
            reader, shard = self.readers[source], self._label(source, sample.shard)
            if sample.passing:
                key = whole(source, sample.shard)
                again = health.is_known(epoch, shard, key)
                health.bad(epoch, shard, key, sample.problem or "", lost=sample.lost, again=again)
                continue
            if sample.problem is not None:
                health.bad_reference(epoch, shard, sample)
                continue
            if health.is_known(epoch, shard, sample.key):
                health.bad(epoch, shard, sample.key, health.known[epoch, shard, sample.key], again=True)
                continue
            if skip:
                skip -= 1
                health.good()
                if not skip:
                    view = yield None
                continue
            rng = seeded(self.seed, epoch, sample.key)
            try:
                item = load_sample(reader, sample, view, rng=rng, key=f"{epoch}:{sample.key}")
            except (DecodeError, BrokenSample, OSError) as error:
                health.bad(epoch, shard, sample.key, str(error))
                continue
            health.good()
            view = yield item


class ValidationSet(IterableDataset):
    """Finite `Clip` batches of one rank: every clip once over all ranks, in a fixed order; keys as in the shards.

    The middle window and the centre crop of each clip. val_clips takes that many clips by the order of a hash of their
    keys: a fixed sample of all shards. Every rank gets the same number of batches where there are enough clips for it
    (their sizes then differ by one), since a forward pass may hold collectives.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        view: View,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        val_clips: int | None = None,
        cache_dir: str | Path = "",
        max_bad_fraction: float = 0.01,
        quarantine: str | Path | None = None,
        setting: str = "data.val_shards",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.val_batch_size={batch_size} must be 1 or more")
        if val_clips is not None and val_clips < 1:
            raise ValueError(f"data.val_clips={val_clips} must be 1 or more, or null for all")
        self.reader = ShardReader(shards, cache_dir=cache_dir, media=view.media)
        self.view, self.max_bad_fraction, self.quarantine = view, max_bad_fraction, quarantine
        every = [sample for index in range(len(shards)) for sample in self.reader.samples(index)]
        self.broken = [sample for sample in every if sample.problem is not None]
        good = [sample for sample in every if sample.problem is None]
        if not good:
            raise ValueError(f"{setting} holds no usable clip in {len(shards)} shards, e.g. {shards[0].url}")
        shard_of: dict[str, int] = {}
        for sample in good:
            if shard_of.setdefault(sample.key, sample.shard) != sample.shard:
                names = [shards[shard_of[sample.key]].name, shards[sample.shard].name]
                raise ValueError(f"{setting}: the key {sample.key!r} is in two shards, {names}; keys must be unique")
        if val_clips is not None and val_clips < len(good):
            chosen = sorted(good, key=lambda sample: blake2b(sample.key.encode(), digest_size=8).digest())[:val_clips]
            good = sorted(chosen, key=lambda sample: (sample.shard, sample.key))
        self.num_clips = len(good)
        mine = good[rank::world]
        sizes = share(len(mine), math.ceil(math.ceil(len(good) / world) / batch_size))
        bounds = list(accumulate(sizes, initial=0))
        self.batches = [mine[a:b] for a, b in zip(bounds, bounds[1:]) if b > a]
        if len(self.batches) < len(sizes):
            log.warning("rank %d has %d validation batches, others %d", rank, len(self.batches), len(sizes))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Clip]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        health = Health(max_bad_fraction=self.max_bad_fraction, quarantine=self.quarantine, seed=-1, where="validation")
        names = [shard.name for shard in self.reader.shards]
        for sample in self.broken if worker == 0 else []:
            health.bad_reference(None, names[sample.shard], sample)
        for batch in self.batches[worker::workers]:
            items: list[Item] = []
            for sample in batch:
                try:
                    items.append(load_sample(self.reader, sample, self.view, rng=None, key=sample.key))
                    health.good()
                except (DecodeError, BrokenSample, OSError) as error:
                    again = health.is_known(None, names[sample.shard], sample.key)
                    health.bad(None, names[sample.shard], sample.key, str(error), again=again)
            if items:
                yield collate(items)


def make_loader(dataset: TrainingStream | ValidationSet, *, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """A DataLoader over ready batches: persistent workers of one thread each that leave signals to the main process."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        worker_init_fn=quiet_worker,
        persistent_workers=num_workers > 0,
        prefetch_factor=2 if num_workers else None,
    )


def _as_is(batch: Any) -> Any:
    return batch


def quiet_worker(_: int) -> None:
    """For `worker_init_fn`: one thread, and deaf to the signals that SLURM and Ctrl-C send to every process of a step.

    Only the main process may act on those. SIGTERM from the parent itself still ends the worker: the parent waits for
    it at exit, and would wait for ever.
    """
    torch.set_num_threads(1)
    for name in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def training_batches(
    shards: str | Sequence[str],
    *,
    view: View,
    batch_size: int,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    root: str | Path = "",
    cache_dir: str | Path = "",
    num_workers: int = 0,
    **keywords: Any,
) -> Iterator[Clip]:
    """The training stream without Lightning: endless uint8 batches. keywords: those of `TrainingStream`."""
    view = feature_view(view, shards, training=True, root=root, cache_dir=cache_dir)
    apart = keywords.get("part_frames") is not None or keywords.get("part_batch_sizes") is not None
    sources = open_sources(shards, weights=weights, apart=apart, root=root, cache_dir=cache_dir)
    stream = TrainingStream(
        sources, view=view, batch_size=batch_size, seed=seed, weights=weights, cache_dir=cache_dir, **keywords
    )
    yield from make_loader(stream, num_workers=num_workers)


def validation_batches(
    shards: str | Sequence[str],
    *,
    view: View,
    batch_size: int,
    root: str | Path = "",
    cache_dir: str | Path = "",
    num_workers: int = 0,
    setting: str = "data.val_shards",
    **keywords: Any,
) -> Iterator[Clip]:
    """Validation clips without Lightning: uint8 batches, each clip once. keywords: those of `ValidationSet`."""
    view = feature_view(view, shards, training=False, root=root, cache_dir=cache_dir, setting=setting)
    source = open_sources(shards, root=root, cache_dir=cache_dir, setting=setting)[0]
    held = ValidationSet(source, view=view, batch_size=batch_size, cache_dir=cache_dir, setting=setting, **keywords)
    yield from make_loader(held, num_workers=num_workers)


def num_val_clips(
    shards: str | Sequence[str],
    *,
    view: View | None = None,
    root: str | Path = "",
    cache_dir: str | Path = "",
    val_clips: int | None = None,
) -> int:
    """How many clips `validation_batches` gives over all ranks, unless some turn out to be broken."""
    setting = "data.val_shards"
    index = open_features(shards, root=root, cache_dir=cache_dir, setting=setting)
    seen = index.view(view or View()) if index is not None else view or View()
    source = open_sources(shards, root=root, cache_dir=cache_dir, setting=setting)[0]
    return ValidationSet(source, view=seen, batch_size=1, cache_dir=cache_dir, val_clips=val_clips).num_clips
