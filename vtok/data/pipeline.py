"""Shards in, uint8 `Clip` batches out. The stages, in order:

1. shard list     a folder with index.json, a brace or glob pattern of tars, a list, https: or pipe: (through a local
                  cache); several sources joined by "::", concatenated, or mixed by weight           -> `open_sources`
2. split          by (rank, worker): shards are dealt to streams anew every epoch; where there are fewer shards than
                  streams, the streams of a shard take every n-th of its samples, so none is idle and none is lost
3. shuffle        seeded: the shards of an epoch, then the samples in a buffer. Stages 1 to 3 handle references
                  (shard, key, byte ranges) only: after a resume the last epoch is replayed from tar headers
4. decode         a window of `num_frames` at `fps` with a random start (`vtok.data.decode`); a clip that is shorter
                  than the window comes whole, with its length; an image is a 1-frame clip
5. resize, crop   crop of the target's aspect, antialiased resize, both on uint8; horizontal flip
6. batch          uint8 [B, 3, T, H, W] padded with repeats of the last frame to the longest clip, `lengths`, `times`

Laws. The order of samples is a pure function of (seed, epoch, rank, world, workers) and the shards; every random choice
about one sample (start, crop, flip) of (seed, epoch, key). So a position is a number of batches, and a resume needs no
generator state. Passes over all streams with the same epoch number hold every sample exactly once. Another number of
ranks or workers gives another order (the same samples a pass, each seen in the same window and crop).

A broken sample is logged, appended to the quarantine file, counted and left out, and so is a shard that cannot be read
for the moment; a resume reads that file to count the same ones in and out. Damaged shards give their whole samples and
count the lost ones. Past `max_bad_fraction` the stream raises `TooManyBroken`.

Legend: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vtok.data.decode import DecodeError, PastEnd, VideoReader
from vtok.data.sources import MEDIA, BrokenSample, Sample, Shard, ShardReader, open_sources
from vtok.types import Clip, share

log = logging.getLogger(__name__)

MIN_SEEN = 20  # samples before the share of broken ones is judged
MIN_BROKEN = 3  # and broken ones: a single one in the first twenty says nothing about the corpus
MAX_IN_A_ROW = 1000  # broken samples without a good one between: nothing is left to train on
WHOLE_SHARD = "(the whole shard"  # how a quarantined shard's entry begins, where a sample's has its key
ENDLESS = 1 << 40  # length of the training stream: a loader without one makes Lightning read a batch ahead


class TooManyBroken(RuntimeError):
    """The share of samples that could not be used passed `max_bad_fraction`."""


def seeded(*parts: object) -> random.Random:
    """A generator that is a pure function of `parts`, on every machine."""
    digest = blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def one_pass(
    reader: ShardReader,
    *,
    seed: int,
    epoch: int,
    stream: int,
    streams: int,
    shuffle_buffer: int,
    source: int = 0,
    unread: Callable[[int, int, int], bool] = lambda epoch, source, shard: False,
) -> Iterator[Sample]:
    """The references one stream gets in one epoch; over all streams: every sample of every shard exactly once.

    unread: of (epoch, source, shard), whether this stream could not read it when it was there: left out again.
    """

    def samples(shard: int) -> list[Sample]:
        facts = reader.shards[shard]
        if unread(epoch, source, shard):
            return [Sample(shard, "", {}, "could not be read at this place before", facts.samples or 1, passing=True)]
        return reader.samples(shard)

    shards, turn, sharing = _dealt(len(reader.shards), seed, epoch, stream, streams, source)
    if sharing == 1:
        mine = (sample for shard in shards for sample in samples(shard))
    else:
        found = samples(shards[0])
        if found and found[0].passing:  # each of the shard's streams has to know
            found = [found[0]._replace(lost=math.ceil(found[0].lost / sharing))] * sharing
        mine = iter(found[turn::sharing])
    if shuffle_buffer < 2:
        yield from mine
        return
    rng = seeded(seed, "buffer", source, epoch, stream, streams)
    buffer: list[Sample] = []
    for sample in mine:
        if len(buffer) < shuffle_buffer:
            buffer.append(sample)
            continue
        at = rng.randrange(shuffle_buffer)
        yield buffer[at]
        buffer[at] = sample
    rng.shuffle(buffer)
    yield from buffer


def _dealt(count: int, seed: int, epoch: int, stream: int, streams: int, source: int) -> tuple[list[int], int, int]:
    """(shards of a stream in an epoch, turn, sharing): it takes every `sharing`-th sample from number `turn` on."""
    order = list(range(count))
    seeded(seed, "shards", source, epoch).shuffle(order)
    if count >= streams:
        return order[stream::streams], 0, 1
    sharing = len(range(stream % count, streams, count))
    # The turn moves with the epoch, or a stream whose turn lies past the end of a tiny shard would never get one.
    return [order[stream % count]], (stream // count + epoch) % sharing, sharing


def whole_epochs(
    shards: Sequence[Shard], known: dict[Any, str], *, samples: int, seed: int, stream: int, streams: int
) -> tuple[int, int, int]:
    """(epochs, their good samples, their broken ones) that a stream was through before `samples` good ones were given.

    From what index.json and the quarantine file say, so that a resume replays the last epoch alone. Fewer, down to 0,
    where those do not tell: shards without an index, damaged ones, some that could not be read for a while.
    """
    broken: Counter[tuple[int, str]] = Counter()
    unclear: set[int] = set()
    for epoch, name, key in known:
        if epoch is None:
            return 0, 0, 0
        broken[epoch, name] += 1
        unclear |= {epoch} if key.startswith(WHOLE_SHARD) else set()
    epoch, passed, lost = 0, 0, 0
    clear = all(shard.samples for shard in shards) and len({shard.name for shard in shards}) == len(shards)
    while clear and epoch not in unclear:
        mine, turn, sharing = _dealt(len(shards), seed, epoch, stream, streams, 0)
        spoilt = sum(broken[epoch, shards[i].name] for i in mine)
        if sharing > 1 and spoilt:  # whose turn the broken ones were is not known
            break
        given = sum(len(range(turn, shards[i].samples or 0, sharing)) for i in mine) - spoilt
        if passed + given > samples or passed == samples:
            break
        epoch, passed, lost = epoch + 1, passed + given, lost + spoilt
    return epoch, passed, lost


def endless(
    readers: Sequence[ShardReader], *, weights: Sequence[float] | None, first_epoch: int = 0, **keywords: Any
) -> Iterator[Any]:
    """(source, epoch, sample) without end: passes over one source, or draws from several by weight."""

    def passes(source: int) -> Iterator[tuple[int, int, Sample]]:
        reader = readers[source]
        epoch, idle = first_epoch, 0
        while True:
            idle += 1
            shard_of: dict[str, int] = {}
            for sample in one_pass(reader, epoch=epoch, source=source, **keywords):
                idle = 0
                if sample.key and shard_of.setdefault(sample.key, sample.shard) != sample.shard:
                    other = reader.shards[shard_of[sample.key]].name
                    sample = sample._replace(problem=f"the key is also in shard {other}")
                yield source, epoch, sample
            if idle > keywords["streams"]:
                raise ValueError(f"no samples in {len(reader.shards)} shards, e.g. {reader.shards[0].url}")
            epoch += 1

    streams = [passes(source) for source in range(len(readers))]
    if weights is None or len(readers) == 1:
        yield from streams[0]
    rng = seeded(keywords["seed"], "mix", keywords["stream"], keywords["streams"])
    while True:
        yield next(streams[rng.choices(range(len(readers)), weights or [1.0] * len(readers))[0]])


@dataclass(frozen=True)
class View:
    """What the model sees of a clip. num_frames frames at `fps` (None: the source's own), (height, width) pixels.

    crop: random | center | none (whole frame, aspect not kept). scale: (low, high), side of a random crop as a share of
    the largest box of the wanted aspect. hflip: probability. max_pixels: frames x height x width a clip may decode to.
    """

    num_frames: int = 16
    size: tuple[int, int] = (64, 64)
    fps: float | None = 8.0
    crop: str = "random"
    scale: tuple[float, float] = (1.0, 1.0)
    hflip: float = 0.0
    max_pixels: int = 1 << 31

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"data.num_frames={self.num_frames} must be 1 or more")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"data.size={list(self.size)} must be [height, width] in pixels, 1 or more each")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"data.fps={self.fps} must be above 0, or null to keep the source's")
        if self.crop not in ("random", "center", "none"):
            raise ValueError(f"data.crop={self.crop!r} is not one of random, center, none")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale={list(self.scale)} must be [low, high] with 0 < low <= high <= 1")
        if self.crop != "random" and tuple(self.scale) != (1.0, 1.0):
            raise ValueError(
                f"data.scale={list(self.scale)} is for data.crop=random; with {self.crop} it must be [1, 1]"
            )
        if self.max_pixels < 1:
            raise ValueError(f"data.max_pixels={self.max_pixels} must be 1 or more (frames x height x width of a clip)")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"data.hflip={self.hflip} is a probability, 0 to 1")


def decode_view(media: bytes, view: View, rng: random.Random | None) -> tuple[Tensor, Tensor]:
    """Frames of the window uint8 [T, H, W, 3] at their native size, and times float64 [T] in the clip.

    rng: draws the start; None takes the middle. Raises DecodeError.
    """
    with VideoReader(media) as reader:
        height, width = reader.stored_size
        frames = 1 if reader.is_image else view.num_frames
        if frames * height * width > view.max_pixels:
            raise DecodeError(f"{frames}x{height}x{width} pixels are above data.max_pixels={view.max_pixels}")
        span = frames / (view.fps or reader.fps or 1.0)
        slack = max(0.0, (reader.duration_s or 0.0) - span)
        start = slack * (0.5 if rng is None else rng.random())
        try:
            return reader.window(start_s=start, num_frames=frames, fps=None if reader.is_image else view.fps)
        except PastEnd:  # the container's duration was that of a longer sound track
            return reader.window(start_s=0.0, num_frames=frames, fps=view.fps)


def fit(frames: Tensor, view: View, rng: random.Random | None) -> Tensor:
    """Cropped, resized and flipped: uint8 [T, H, W, 3] -> uint8 [3, T, *view.size].

    Bilinear with antialiasing, as one kernel on uint8 in channels-last memory (measured 7 times faster than through
    float, and equal to it within one level). rng: draws crop and flip; None takes the centre and no flip.
    """
    height, width = frames.shape[1:3]
    out_height, out_width = view.size
    box_height, box_width, top, left = height, width, 0, 0
    if view.crop != "none":
        largest = min(height / out_height, width / out_width)
        share = 1.0
        if rng is not None and view.crop == "random":
            share = rng.uniform(*view.scale)
        box_height = min(height, max(1, round(out_height * largest * share)))
        box_width = min(width, max(1, round(out_width * largest * share)))
        top, left = (height - box_height) // 2, (width - box_width) // 2
        if rng is not None and view.crop == "random":
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
    video = frames[:, top : top + box_height, left : left + box_width].permute(0, 3, 1, 2)  # [T, 3, H, W], a view
    if (box_height, box_width) != (out_height, out_width):
        video = F.interpolate(video, size=(out_height, out_width), mode="bilinear", antialias=True)
    if rng is not None and rng.random() < view.hflip:
        video = video.flip(3)
    return video.permute(1, 0, 2, 3)


class Item(NamedTuple):
    key: str
    video: Tensor  # uint8 [3, T, H, W]
    times: Tensor  # [T]
    text: str | None
    qa: list[Any] | None


def load_sample(reader: ShardReader, sample: Sample, view: View, *, rng: random.Random | None, key: str) -> Item:
    """One decoded sample. Raises DecodeError, BrokenSample or OSError."""
    facts: Any = {}
    if "json" in sample.members:
        try:
            facts = json.loads(reader.read(sample, "json"))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, BrokenSample) else BrokenSample(f".json is not json: {error}") from error
        if not isinstance(facts, dict):
            raise BrokenSample(f".json holds a {type(facts).__name__}, not an object")
    caption, qa = facts.get("caption"), facts.get("qa")
    if "txt" in sample.members:
        caption = reader.read(sample, "txt").decode("utf-8", errors="replace")
    if caption is not None and not isinstance(caption, str):
        raise BrokenSample(f"caption is a {type(caption).__name__}, not a string")
    if qa is not None and not isinstance(qa, list):
        raise BrokenSample(f"qa is a {type(qa).__name__}, not a list")
    suffix = next(suffix for suffix in MEDIA if suffix in sample.members)
    frames, times = decode_view(reader.read(sample, suffix), view, rng)
    return Item(key, fit(frames, view, rng), times.float(), caption, qa)


def collate(items: Sequence[Item]) -> Clip:
    """Items as one batch, padded with repeats of the last frame (and its time) to the longest."""
    counts = [item.video.shape[1] for item in items]
    most = max(counts)
    first = items[0].video
    video = torch.empty((len(items), 3, most, *first.shape[2:]), dtype=torch.uint8)
    times = torch.empty((len(items), most))
    for row, item in enumerate(items):
        video[row, :, : counts[row]] = item.video
        video[row, :, counts[row] :] = item.video[:, -1:]
        times[row, : counts[row]] = item.times
        times[row, counts[row] :] = item.times[-1]
    return Clip(
        keys=[item.key for item in items],
        video=video,
        lengths=None if min(counts) == most else torch.tensor(counts),
        times=times,
        text=[item.text or "" for item in items] if any(item.text for item in items) else None,
        qa=[item.qa or [] for item in items] if any(item.qa for item in items) else None,
    )


class Health:
    """Counts broken samples, writes them to the quarantine file, and stops the run when they are too many.

    quarantine: jsonl, one line a broken sample, appended in one write (safe among workers and ranks that share the
    file), before the samples after it are handed out; None keeps no file, and then a resume is exact only where nothing
    is broken. Lines of the same seed that are there at the start are the samples to leave out again.
    """

    def __init__(self, *, max_bad_fraction: float, quarantine: str | Path | None, seed: int, where: str) -> None:
        self.limit, self.quarantine, self.seed, self.where = max_bad_fraction, quarantine, seed, where
        self.seen = self.broken = self.in_a_row = 0
        self.reported: set[tuple[str, str]] = set()
        self.known = read_quarantine(quarantine, seed=seed) if quarantine is not None else {}

    def good(self) -> None:
        self.seen += 1
        self.in_a_row = 0

    def is_known(self, epoch: int | None, shard: str, key: str) -> bool:
        return (epoch, shard, key) in self.known

    def bad(self, epoch: int | None, shard: str, key: str, reason: str, *, lost: int = 1, again: bool = False) -> None:
        """Count `lost` broken samples. again: it is in the file already. Raises TooManyBroken."""
        self.seen += lost
        self.broken += lost
        self.in_a_row += 1
        if not again:
            log.warning("broken sample %r in %s (%s): %s", key or "(shard)", shard, self.where, reason)
            self._write({"seed": self.seed, "epoch": epoch, "shard": shard, "key": key, "reason": reason, "lost": lost})
        allowed = max(self.limit * self.seen, MIN_BROKEN - 1 if self.limit > 0 else 0)
        if self.in_a_row > MAX_IN_A_ROW or self.broken > allowed and (self.seen >= MIN_SEEN or self.limit == 0):
            raise TooManyBroken(
                f"{self.broken} of {self.seen} samples seen are broken ({self.where}), above "
                f"data.max_bad_fraction={self.limit}; the last one: {key or shard!r}: {reason}. "
                f"All are listed in {self.quarantine or 'the log'}; repair the shards or raise the limit"
            )

    def bad_reference(self, epoch: int | None, shard: str, sample: Sample) -> None:
        """A sample that cannot be used already by its tar headers: reported once, counted every time."""
        again = (shard, sample.key) in self.reported or self.is_known(None, shard, sample.key)
        self.reported.add((shard, sample.key))
        self.bad(None, shard, sample.key, sample.problem or "", lost=sample.lost, again=again)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.quarantine is None:
            return
        line = json.dumps({**entry, "reason": entry["reason"][:2000]})
        file = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (line + "\n").encode())
        finally:
            os.close(file)


def read_quarantine(path: str | Path, *, seed: int) -> dict[tuple[int | None, str, str], str]:
    """{(epoch, shard, key): reason} of the lines written under `seed`; {} without a file. A half line is left out."""
    found: dict[tuple[int | None, str, str], str] = {}
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                entry = json.loads(line)
                if entry["seed"] == seed:
                    found[entry["epoch"], entry["shard"], entry["key"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                continue
    return found


class TrainingStream(IterableDataset):
    """Endless `Clip` batches of one rank, made for `make_loader`. Keys are "epoch:key".

    start: batches of this rank already consumed; the stream goes on with the next one. A fresh loader asks worker 0
    first, so worker i takes the stream whose turn it is, (i + start) mod workers.
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
        shuffle_buffer: int = 256,
        cache_dir: str | Path = "",
        max_bad_fraction: float = 0.01,
        quarantine: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size} must be 1 or more")
        self.readers = [ShardReader(shards, cache_dir=cache_dir) for shards in sources]
        self.view, self.batch_size, self.seed, self.weights = view, batch_size, seed, weights
        self.rank, self.world, self.start, self.shuffle_buffer = rank, world, start, shuffle_buffer
        self.max_bad_fraction, self.quarantine = max_bad_fraction, quarantine

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Clip]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        turn = (worker + self.start) % workers
        skip = max(
            0, math.ceil((self.start - turn) / workers)
        )  # batches this stream has given: turn, turn + workers, ...
        return self._batches(self.rank * workers + turn, self.world * workers, skip * self.batch_size)

    def _batches(self, stream: int, streams: int, skip: int) -> Iterator[Clip]:
        keywords: dict[str, Any] = {
            "seed": self.seed,
            "stream": stream,
            "streams": streams,
            "shuffle_buffer": self.shuffle_buffer,
        }
        where = f"stream {stream} of {streams}"
        health = Health(max_bad_fraction=self.max_bad_fraction, quarantine=self.quarantine, seed=self.seed, where=where)
        items: list[Item] = []

        def whole(source: int, shard: int) -> str:  # in place of a key: names may be equal, and other streams luckier
            return f"{WHOLE_SHARD} {shard} of source {source}, for {where})"

        keywords["unread"] = lambda epoch, source, shard: health.is_known(
            epoch, self.readers[source].shards[shard].name, whole(source, shard)
        )
        first = 0
        if len(self.readers) == 1 and self.quarantine is not None:
            here = {"seed": self.seed, "stream": stream, "streams": streams}
            first, passed, health.broken = whole_epochs(self.readers[0].shards, health.known, samples=skip, **here)
            skip, health.seen = skip - passed, passed + health.broken
        for source, epoch, sample in endless(self.readers, weights=self.weights, first_epoch=first, **keywords):
            reader = self.readers[source]
            shard = reader.shards[sample.shard].name
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
                continue
            rng = seeded(self.seed, epoch, sample.key)
            try:
                items.append(load_sample(reader, sample, self.view, rng=rng, key=f"{epoch}:{sample.key}"))
            except (DecodeError, BrokenSample, OSError) as error:
                health.bad(epoch, shard, sample.key, str(error))
                continue
            health.good()
            if len(items) == self.batch_size:
                yield collate(items)
                items = []


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
        self.reader = ShardReader(shards, cache_dir=cache_dir)
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
    sources = open_sources(shards, weights=weights, root=root, cache_dir=cache_dir)
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
    source = open_sources(shards, root=root, cache_dir=cache_dir, setting=setting)[0]
    held = ValidationSet(source, view=view, batch_size=batch_size, cache_dir=cache_dir, setting=setting, **keywords)
    yield from make_loader(held, num_workers=num_workers)


def num_val_clips(
    shards: str | Sequence[str], *, root: str | Path = "", cache_dir: str | Path = "", val_clips: int | None = None
) -> int:
    """How many clips `validation_batches` gives over all ranks, unless some turn out to be broken."""
    source = open_sources(shards, root=root, cache_dir=cache_dir, setting="data.val_shards")[0]
    return ValidationSet(source, view=View(), batch_size=1, cache_dir=cache_dir, val_clips=val_clips).num_clips
