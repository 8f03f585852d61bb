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
    shards: Sequence[Shard],
    known: dict[Any, str],
    *,
    samples: int,
    seed: int,
    stream: int,
    streams: int,
    source: int = 0,
    label: Callable[[int], str] | None = None,
) -> tuple[int, int, int]:
    """(epochs, their good samples, their broken ones) that a stream was through before `samples` good ones were given.

    From what index.json and the quarantine file say, so that a resume replays the last epoch alone. Fewer, down to 0,
    where those do not tell: shards without an index, damaged ones, some that could not be read for a while.

    label: how the quarantine file calls a shard, given its number; None: by its name.
    """
    names = [shards[i].name if label is None else label(i) for i in range(len(shards))]
    here = set(names)
    broken: Counter[tuple[int, str]] = Counter()
    unclear: set[int] = set()
    for epoch, name, key in known:
        if name not in here:  # another source's
            continue
        if epoch is None:
            return 0, 0, 0
        broken[epoch, name] += 1
        unclear |= {epoch} if key.startswith(WHOLE_SHARD) else set()
    epoch, passed, lost = 0, 0, 0
    clear = all(shard.samples for shard in shards) and len(set(names)) == len(shards)
    while clear and epoch not in unclear:
        mine, turn, sharing = _dealt(len(shards), seed, epoch, stream, streams, source)
        spoilt = sum(broken[epoch, names[i]] for i in mine)
        if sharing > 1 and spoilt:  # whose turn the broken ones were is not known
            break
        given = sum(len(range(turn, shards[i].samples or 0, sharing)) for i in mine) - spoilt
        if passed + given > samples or passed == samples:
            break
        epoch, passed, lost = epoch + 1, passed + given, lost + spoilt
    return epoch, passed, lost


def passes(
    reader: ShardReader, *, source: int = 0, first_epoch: int = 0, **keywords: Any
) -> Iterator[tuple[int, int, Sample]]:
    """(source, epoch, sample) without end: what one stream gets of one source, epoch after epoch."""
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


def endless(
    readers: Sequence[ShardReader], *, weights: Sequence[float] | None, first_epoch: int = 0, **keywords: Any
) -> Iterator[tuple[int, int, Sample]]:
    """(source, epoch, sample) without end: passes over one source, or draws from several by weight."""
    streams = [
        passes(reader, source=source, first_epoch=first_epoch, **keywords) for source, reader in enumerate(readers)
    ]
    if weights is None or len(readers) == 1:
        yield from streams[0]
    rng = seeded(keywords["seed"], "mix", keywords["stream"], keywords["streams"])
    while True:
        yield next(streams[rng.choices(range(len(readers)), weights or [1.0] * len(readers))[0]])
