"""Broken samples and shards are left out with their reason, a resume leaves out the same, too many stop the run."""

from __future__ import annotations

import itertools
import json
import threading

import numpy as np
import pytest
from miniature import SMALL, clip, fingerprint, movie, photo, stream, take, write_index, write_tar

from vtok.data import sources
from vtok.data.health import Health, TooManyBroken, read_quarantine
from vtok.data.pipeline import make_loader, training_batches, validation_batches
from vtok.data.sources import scan
from vtok.data.view import View


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("bad.mov", b"")], "0 bytes"),
        ([("bad.mov", np.random.default_rng(0).bytes(3000))], "Invalid data"),
        ([("bad.png", photo()[:60])], "Invalid"),
        ([("bad.mov", movie()), ("bad.json", b"{")], "not json"),
        ([("bad.mov", movie()), ("bad.json", b"[" * 100_000)], "not json"),
        ([("bad.mov", movie()), ("bad.json", b"[1]")], "holds a list"),
        ([("bad.mov", movie()), ("bad.json", b'{"qa": 3}')], "qa is a int"),
        ([("bad.mov", movie()), ("bad.json", b'{"caption": 3}')], "caption is a int"),
        ([("bad.mov", movie()), ("bad.json", b" " * ((8 << 20) + 1))], "above the limit"),
        ([("bad.mov", movie(0, 2, 2000, 4000))], "above data.max_pixels"),
    ],
)
def test_broken_samples_are_left_out_with_their_reason(tmp_path, members, reason):
    write_tar(tmp_path / "a.tar", [*clip("a"), *members, *clip("z")])
    view = View(num_frames=2, size=(8, 8), max_pixels=10_000_000)
    quarantine = tmp_path / "q.jsonl"
    batches = take(
        training_batches(
            str(tmp_path), view=view, batch_size=2, max_bad_fraction=1.0, quarantine=quarantine, shuffle_buffer=0
        ),
        2,
    )
    assert [b.keys for b in batches] == [["0:a", "0:z"], ["1:a", "1:z"]]
    entry = json.loads(quarantine.read_text().splitlines()[0])
    assert entry["key"] == "bad" and entry["shard"] == "a.tar" and reason in entry["reason"]


@pytest.mark.parametrize(("shards", "streams"), [(4, 1), (2, 5)])
def test_a_shard_that_was_out_of_reach_for_a_while_does_not_shift_a_resume(tmp_path, shards, streams):
    """Where streams share a shard, each of them has to remember what it missed itself."""
    for s in range(shards):
        write_tar(tmp_path / f"s{s}.tar", [m for i in range(6) for m in clip(f"k{s}{i}")])

    def batches(start: int):
        dataset = stream(
            tmp_path, batch_size=2, max_bad_fraction=1.0, quarantine=tmp_path / "q", world=streams, start=start
        )
        return dataset, iter(dataset)

    dataset, whole = batches(0)
    shard, away = tmp_path / "s0.tar", tmp_path / "away"
    shard.rename(away)
    seen = []
    while not (tmp_path / "q").exists():
        seen.append(next(whole))
    away.rename(shard)
    at = len(seen)
    seen += itertools.islice(whole, 8)
    assert "(the whole shard" in (tmp_path / "q").read_text()
    assert any(":k0" in key for batch in seen[at:] for key in batch.keys)  # it is read again once it is there
    assert fingerprint(list(itertools.islice(batches(at)[1], 8))) == fingerprint(seen[at:])


@pytest.mark.parametrize("bad", [(), ("c1_02", "c3_00")])
@pytest.mark.parametrize(("shards", "streams"), [(5, 1), (5, 2), (2, 3)])
def test_a_resume_reads_no_headers_of_the_epochs_that_are_over(tmp_path, monkeypatch, bad, shards, streams):
    for s in range(shards):
        names = [f"c{s}_{i:02d}" for i in range(6)]
        write_tar(tmp_path / f"c-{s}.tar", [m for n in names for m in clip(n, b"no" if n in bad else None)])
    write_index(tmp_path, {f"c-{s}.tar": 6 for s in range(shards)})
    settings = {"max_bad_fraction": 1.0, "quarantine": tmp_path / "q", "world": streams, "batch_size": 2}
    scans = []
    monkeypatch.setattr(sources, "scan", lambda *a, **k: scans.append(a) or scan(*a, **k))
    for rank in range(streams):
        whole = take(stream(tmp_path, rank=rank, **settings), 40)
        for at in (1, 15, 16, 30):
            scans.clear()
            resumed = stream(tmp_path, rank=rank, start=at, **settings)
            resumed.readers[0].keep = 1  # a second look at a shard is a scan again
            ((now, *_),) = [take(resumed, 1)]
            epochs = {int(key.split(":")[0]) for key in whole[at].keys + whole[at - 1].keys}
            replayed = max(epochs) - min(epochs) + 1
            if shards >= streams or not bad:
                assert len(scans) <= replayed * -(-shards // streams), "more than the epochs at hand"
            assert fingerprint([now]) == fingerprint(whole[at : at + 1])


def test_too_many_broken_samples_stop_the_run(tmp_path):
    write_tar(
        tmp_path / "a.tar", [m for i in range(30) for m in clip(f"k{i:02d}", media=b"no" if i % 5 == 0 else None)]
    )
    with pytest.raises(TooManyBroken, match=r"of \d+ samples seen are broken .*above data.max_bad_fraction=0.1.*'k"):
        take(stream(tmp_path, max_bad_fraction=0.1), 100)
    with pytest.raises(TooManyBroken, match="above data.max_bad_fraction=0.1"):  # through a worker process
        take(make_loader(stream(tmp_path, max_bad_fraction=0.1), num_workers=1), 100)
    assert len(take(stream(tmp_path, max_bad_fraction=0.3), 20)) == 20


def test_one_early_broken_sample_does_not_stop_a_run_but_zero_tolerance_does(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(400) for m in clip(f"k{i:03d}", media=b"no" if i == 3 else None)])
    assert len(take(stream(tmp_path, shuffle_buffer=0), 30)) == 30
    with pytest.raises(TooManyBroken):
        take(stream(tmp_path, max_bad_fraction=0.0), 130)


def test_nothing_usable_is_an_error_even_with_full_tolerance(tmp_path):
    write_tar(tmp_path / "a.tar", [m for i in range(3) for m in clip(f"k{i}", media=b"no")])
    with pytest.raises(TooManyBroken):
        take(stream(tmp_path, max_bad_fraction=1.0), 1)
    write_tar(tmp_path / "b" / "empty.tar", [])
    with pytest.raises(ValueError, match="no samples in 1 shards"):
        take(stream(tmp_path / "b"), 1)


def test_key_in_two_shards_is_used_once_and_named(tmp_path, caplog):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [*clip("same"), *clip(f"own_{name}")])
    keys = [k for b in take(stream(tmp_path, max_bad_fraction=1.0, batch_size=4), 1) for k in b.keys]
    assert sorted(keys) == ["0:own_a", "0:own_b", "0:own_c", "0:same"]
    assert "the key is also in shard" in caplog.text
    with pytest.raises(ValueError, match="'same' is in two shards"):
        list(validation_batches(str(tmp_path), view=SMALL, batch_size=2))


def test_quarantine_lines_survive_concurrent_writers(tmp_path):
    health = [Health(max_bad_fraction=1.0, quarantine=tmp_path / "q", seed=0, where="x") for _ in range(4)]
    threads = [
        threading.Thread(target=lambda h=h, n=n: [h.bad(0, f"s{n}", f"k{i}", "r" * 500) for i in range(50)])
        for n, h in enumerate(health)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_quarantine(tmp_path / "q", seed=0)) == 200
    assert read_quarantine(tmp_path / "q", seed=1) == {}
