"""Every sample once an epoch, in an order that a resume continues with the very next batch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from miniature import clip, fingerprint, make_shards, movie, photo, stream, take, write_tar

from vtok.data import pipeline
from vtok.data.order import one_pass
from vtok.data.pipeline import make_loader
from vtok.data.view import View


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """5 shards x 6 clips, with an index."""
    return make_shards(tmp_path_factory.mktemp("corpus"), 5, 6)


def first_epochs(where, *, world: int, workers: int, epochs: int = 2, **keywords) -> Counter:
    """How often each "epoch:key" with epoch < `epochs` comes over all streams."""
    found: Counter = Counter()
    readers = stream(where, **keywords).readers
    for number in range(world * workers):
        for epoch in range(epochs):
            pass_ = one_pass(readers[0], seed=7, epoch=epoch, stream=number, streams=world * workers, shuffle_buffer=4)
            found.update(f"{epoch}:{sample.key}" for sample in pass_)
    return found


# ---- the order


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 2), (4, 1), (3, 3), (8, 2), (1, 40)])
def test_every_sample_once_an_epoch_over_all_streams(corpus, world, workers):
    """5 shards: fewer, as many and more streams than shards, and than samples (30)."""
    found = first_epochs(corpus, world=world, workers=workers)
    assert len(found) == 2 * 30 and set(found.values()) == {1}


def test_no_stream_stays_idle_with_one_tiny_shard(tmp_path):
    make_shards(tmp_path, 1, 2)
    for rank in range(5):
        assert len(take(stream(tmp_path, rank=rank, world=5, batch_size=1), 3)) == 3


def test_order_depends_on_seed_and_epoch_and_nothing_else(corpus):
    def keys(**keywords):
        return [key for batch in take(stream(corpus, **keywords), 20) for key in batch.keys]

    first = keys()
    assert first == keys() and first != keys(seed=8)
    epochs = [[k.split(":")[1] for k in first if k.startswith(f"{e}:")] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


def test_shuffle_buffer_mixes_and_zero_keeps_the_order_of_a_shard(corpus):
    def runs(buffer):
        keys = [k.split(":")[1] for b in take(stream(corpus, shuffle_buffer=buffer), 10) for k in b.keys]
        return sum(
            a.split("_")[0] == b.split("_")[0] and int(a[-2:]) + 1 == int(b[-2:]) for a, b in zip(keys, keys[1:])
        )

    assert runs(0) == 25 and runs(64) < 10


def test_window_crop_and_flip_are_functions_of_seed_epoch_and_key(corpus):
    """Another split gives another order, but each "epoch:key" shows the same pixels."""

    def pixels(**keywords):
        return {k: v.numpy().tobytes() for b in take(stream(corpus, **keywords), 10) for k, v in zip(b.keys, b.video)}

    whole = pixels(batch_size=3)
    half = pixels(rank=1, world=2, batch_size=1)
    both = set(whole) & set(half)
    assert len(both) >= 8 and all(whole[k] == half[k] for k in both)
    assert len({whole[k] for k in whole}) > 20


def test_weights_set_the_mixture(tmp_path):
    make_shards(tmp_path / "a", 2, 4, prefix="a")
    make_shards(tmp_path / "b", 1, 4, prefix="b")
    view = View(num_frames=1, size=(8, 8))
    keys = [
        k
        for b in take(stream(f"{tmp_path}/a::{tmp_path}/b", weights=[1.0, 3.0], view=view, batch_size=10), 40)
        for k in b.keys
    ]
    share = sum(":b" in k for k in keys) / len(keys)
    assert abs(share - 0.75) < 0.07  # 400 draws: three standard deviations
    by_size = [k for b in take(stream(f"{tmp_path}/a::{tmp_path}/b", view=view, batch_size=4), 6) for k in b.keys]
    assert Counter(k.split(":")[1][0] for k in by_size) == {"a": 16, "b": 8}


# ---- resume


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 3), (2, 2)])
def test_resume_continues_with_the_very_next_batch(corpus, tmp_path, world, workers):
    for rank in range(world):
        settings = {"rank": rank, "world": world, "quarantine": tmp_path / "q.jsonl"}
        whole = fingerprint(take(make_loader(stream(corpus, **settings), num_workers=workers), 14))
        for done in (1, 4) if workers else (1, 2, 3, 7, 11):
            rest = take(make_loader(stream(corpus, start=done, **settings), num_workers=workers), 14 - done)
            assert fingerprint(rest) == whole[done:], f"after {done} batches"


def test_resume_with_broken_samples_and_mixed_sources(tmp_path):
    """A broken sample leaves the order of the others alone, before and after a resume."""
    for s in range(3):
        members = [m for i in range(6) for m in clip(f"s{s}_{i}", media=movie()[:700] if i == s else None)]
        write_tar(tmp_path / "v" / f"{s}.tar", members)
    write_tar(tmp_path / "p" / "p.tar", [m for i in range(5) for m in clip(f"p{i}", photo(i * 9), "png")])
    where = f"{tmp_path}/v::{tmp_path}/p"
    for weights in (None, [1.0, 1.0]):
        settings = {"weights": weights, "max_bad_fraction": 0.5, "quarantine": tmp_path / f"{weights is None}.jsonl"}
        whole = fingerprint(take(stream(where, **settings), 16))
        assert not any(f":s{s}_{s}" in key for keys, _ in whole for key in keys for s in range(3))
        lines = (tmp_path / f"{weights is None}.jsonl").read_text().splitlines()
        assert len(lines) == len(set(lines)) >= 3 and {"seed", "epoch", "shard", "key", "reason"} <= set(
            json.loads(lines[0])
        )
        for done in (1, 5, 9, 15):
            assert fingerprint(take(stream(where, start=done, **settings), 16 - done)) == whole[done:]
        assert (tmp_path / f"{weights is None}.jsonl").read_text().splitlines()[: len(lines)] == lines


def test_skipping_decodes_nothing(corpus, monkeypatch):
    calls = []
    real = pipeline.load_sample
    monkeypatch.setattr(pipeline, "load_sample", lambda *a, **k: calls.append(1) or real(*a, **k))
    take(stream(corpus, start=1000), 1)
    assert len(calls) == 3
