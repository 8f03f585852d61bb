"""The order of samples: which references a stream gets, in which epoch, as pure functions of the seed.

Shards are dealt to streams (one a loader worker of a rank) anew every epoch; where there are fewer shards than streams,
the streams of a shard take every n-th of its samples, so none is idle and none is lost. Everything here handles
references (shard, key, byte ranges): a resume replays the last epoch from tar headers, without decoding.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

from vtok.data.sources import Sample, Shard, ShardReader

WHOLE_SHARD = "(the whole shard"  # how a quarantined shard's entry begins, where a sample's has its key


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
