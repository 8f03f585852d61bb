"""Shards in, batches out: every sample once, in an order that a resume continues, whatever is broken on the way.

Videos are 24 frames at 12 fps whose grey level says the clip and the frame, so that a wrong window shows.
"""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vtok.config import DataConfig
from vtok.data import pipeline, sources
from vtok.data.decode import write_video
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import (
    Health,
    TooManyBroken,
    TrainingStream,
    ValidationSet,
    View,
    decode_view,
    fit,
    make_loader,
    num_val_clips,
    seeded,
    training_batches,
    validation_batches,
)
from vtok.data.sources import Shard, ShardReader, expand_braces, open_sources, scan

torch.set_num_threads(1)
SMALL = View(num_frames=4, size=(16, 16), fps=6.0, scale=(0.5, 1.0), hflip=0.5)


@functools.cache
def movie(level: int = 0, frames: int = 24, height: int = 18, width: int = 24) -> bytes:
    """Frame k: left half grey 4 k, right half grey `level`, a gradient below, so crops and flips show."""
    file = io.BytesIO()
    picture = np.zeros((frames, height, width, 3), np.uint8)
    picture[:, :, : width // 2] = 4 * np.arange(frames, dtype=np.uint8)[:, None, None, None]
    picture[:, :, width // 2 :] = level
    picture[:, height // 2 :] += np.arange(width, dtype=np.uint8)[None, None, :, None]
    write_video(file, torch.from_numpy(picture), fps=12, codec="png", container="mov")  # exact ticks: 1/12 s
    return file.getvalue()


@functools.cache
def photo(level: int = 0) -> bytes:
    file = io.BytesIO()
    picture = np.full((1, 20, 30, 3), level, np.uint8)
    write_video(file, torch.from_numpy(picture), fps=1, codec="png", container="image2pipe")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def clip(key: str, media: bytes | None = None, suffix: str = "mov", **facts) -> list[tuple[str, bytes]]:
    level = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 200
    return [(f"{key}.{suffix}", media or movie(level % 8 * 20)), (f"{key}.json", json.dumps(facts).encode())]


def write_index(folder: Path, counts: dict[str, int]) -> None:
    shards = [
        {"name": name, "samples": n, "bytes": (folder / name).stat().st_size, "sha256": ""}
        for name, n in counts.items()
    ]
    (folder / "index.json").write_text(json.dumps({"shards": shards}))


def make_shards(folder: Path, shards: int, samples: int, *, prefix: str = "c") -> Path:
    counts = {}
    for s in range(shards):
        members = [m for i in range(samples) for m in clip(f"{prefix}{s}_{i:02d}", caption=f"clip {s} {i}")]
        counts[write_tar(folder / f"{prefix}-{s:03d}.tar", members).name] = samples
    write_index(folder, counts)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """5 shards x 6 clips, with an index."""
    return make_shards(tmp_path_factory.mktemp("corpus"), 5, 6)


def stream(where, **keywords) -> TrainingStream:
    settings = {"view": SMALL, "batch_size": 3, "seed": 7, "shuffle_buffer": 4}
    weights = keywords.get("weights")
    return TrainingStream(open_sources(str(where), weights=weights), **(settings | keywords))


def take(loader, count: int) -> list:
    return list(itertools.islice(iter(loader), count))


def fingerprint(batches) -> list[tuple[tuple[str, ...], str]]:
    return [(tuple(b.keys), hashlib.sha256(b.video.numpy().tobytes()).hexdigest()) for b in batches]


def first_epochs(where, *, world: int, workers: int, epochs: int = 2, **keywords) -> Counter:
    """How often each "epoch:key" with epoch < `epochs` comes over all streams."""
    found: Counter = Counter()
    readers = stream(where, **keywords).readers
    for number in range(world * workers):
        for epoch in range(epochs):
            pass_ = pipeline.one_pass(
                readers[0], seed=7, epoch=epoch, stream=number, streams=world * workers, shuffle_buffer=4
            )
            found.update(f"{epoch}:{sample.key}" for sample in pass_)
    return found


# ---- the shard list


def test_brace_expansion_keeps_padding_and_multiplies():
    assert expand_braces("a-{08..10}.{x,y}") == ["a-08.x", "a-08.y", "a-09.x", "a-09.y", "a-10.x", "a-10.y"]
    with pytest.raises(ValueError, match="counts downwards"):
        expand_braces("{3..1}")


def test_sources_by_folder_pattern_list_and_root(corpus):
    names = [f"c-{i:03d}.tar" for i in range(5)]
    for given in (str(corpus), f"{corpus}/c-{{000..004}}.tar", f"{corpus}/c-*.tar", [f"{corpus}/{n}" for n in names]):
        assert [shard.name for shard in open_sources(given)[0]] == names
    assert [shard.samples for shard in open_sources(str(corpus))[0]] == [6] * 5
    assert len(open_sources("c-{000..001}.tar", root=corpus)[0]) == 2
    two = open_sources(f"{corpus}/c-000.tar::{corpus}/c-001.tar", weights=[1, 3])
    assert [[shard.name for shard in part] for part in two] == [["c-000.tar"], ["c-001.tar"]]


@pytest.mark.parametrize(
    ("shards", "keywords", "message"),
    [
        ("x-{0..9}.tar", {}, r"data\.shards='x-\{0\.\.9\}\.tar' matched 0 files under .*check data\.root or run"),
        ("c-{000..009}.tar", {}, r"5 of 10 shards are missing, e\.g\. .*c-005\.tar"),
        ("", {}, "names no shards"),
        ("c-000.tar::", {}, "names no shards"),
        ("c-000.tar::c-000.tar", {}, r"more than once; use data\.weights"),
        ("c-000.tar", {"weights": [1.0, 2.0]}, "2 entries for 1 sources"),
        ("c-000.tar::c-001.tar", {"weights": [1.0, 0.0]}, "must all be above 0"),
        ("https://127.0.0.1:1/{0..3}.tar", {}, "set data.cache_dir"),
    ],
)
def test_bad_sources_are_named(corpus, shards, keywords, message):
    with pytest.raises(ValueError, match=message):
        open_sources(shards, root=corpus, **keywords)


def test_folder_above_the_shards_gets_a_hint(tmp_path):
    make_shards(tmp_path / "train", 1, 1)
    with pytest.raises(ValueError, match="did you mean '.*train'"):
        open_sources(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": [{"name": "../x.tar", "samples": 1, "bytes": 1}]}'])
def test_bad_index_is_an_error(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        open_sources(str(tmp_path))


def test_pipe_and_http_go_through_the_cache(corpus, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(corpus))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        expected = [b.keys for b in take(stream(corpus), 4)]
        for number, given in enumerate(
            (address, f"{address}/c-{{000..004}}.tar", f"pipe:cat {corpus}/c-{{000..004}}.tar")
        ):
            cache = tmp_path / str(number)
            batches = training_batches(given, view=SMALL, batch_size=3, seed=7, shuffle_buffer=4, cache_dir=cache)
            assert [b.keys for b in take(batches, 4)] == expected
            assert not list(cache.glob("*.part")) and list(cache.glob("*.tar"))
    finally:
        server.shutdown()
        server.server_close()
    # From the cache, with the server gone:
    assert [
        b.keys
        for b in take(
            training_batches(
                f"{address}/c-{{000..004}}.tar",
                view=SMALL,
                batch_size=3,
                seed=7,
                shuffle_buffer=4,
                cache_dir=tmp_path / "1",
            ),
            4,
        )
    ] == expected


def test_failed_pipe_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(OSError, match="status 3"):
        sources.fetch("pipe:printf half; exit 3", tmp_path, tries=1)
    with pytest.raises(OSError, match="gave 4 bytes, index.json says 9"):
        sources.fetch("pipe:printf half", tmp_path, tries=1, num_bytes=9)
    assert [p.suffix for p in tmp_path.iterdir()] == [".lock", ".lock"]


# ---- tar members


def test_scan_groups_members_and_finds_their_bytes(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*clip("d/one.two"[:5], caption="x"), *clip("zwei-ü" * 30)])
    found = scan(path)
    assert [s.key for s in found] == ["d/one", "zwei-ü" * 30] and all(s.problem is None for s in found)
    reader = sources.ShardReader([sources.Shard(str(path), "a.tar")])
    assert json.loads(reader.read(found[0], "json")) == {"caption": "x"}


def _cut(keep: float | int):
    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])

    return change


def _offset_of(path: Path, key: str, suffix: str) -> int:
    return next(s.members[suffix][0] for s in scan(path) if s.key == key)


@pytest.mark.parametrize("where", ["data", "inside a header", "between members", "between samples"])
@pytest.mark.parametrize("index", [True, False])
def test_truncated_tar_gives_its_whole_samples_and_counts_the_rest(tmp_path, where, index):
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in clip(f"k{i}")])
    video, facts = _offset_of(path, "k2", "mov"), _offset_of(path, "k2", "json")
    at = {
        "data": video + 99,
        "inside a header": facts - 300,
        "between members": facts - 512,
        "between samples": video - 512,
    }
    _cut(at[where])(path)
    found = scan(path, expected=4 if index else None)
    whole = [s.key for s in found if s.problem is None]
    # Between samples nothing tells that k1 is complete, so it goes too.
    assert whole == (["k0", "k1"] if where in ("data", "inside a header", "between members") else ["k0"])
    assert found[-1].key == "" and found[-1].lost == (4 - len(whole) if index else 1)
    assert "cut short" in found[-1].problem or "unexpected end" in found[-1].problem


def test_missing_samples_show_against_the_index(tmp_path):
    path = write_tar(tmp_path / "a.tar", clip("k0"))
    assert [s.problem for s in scan(path, expected=3)] == [None, "holds 1 samples, index.json says 3"]
    assert scan(path, expected=3)[-1].lost == 2


def test_empty_zero_byte_and_missing_tars(tmp_path):
    assert scan(write_tar(tmp_path / "empty.tar", [])) == []
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "junk.tar").write_bytes(os.urandom(4096))
    for name in ("zero.tar", "junk.tar"):
        (entry,) = scan(tmp_path / name)
        assert entry.problem and entry.key == "" and not entry.passing
    (entry,) = ShardReader([Shard(str(tmp_path / "none.tar"), "none.tar", samples=3)]).samples(0)
    assert entry.passing and entry.lost == 3 and "No such file" in entry.problem


def test_hostile_members_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("ok/a.mov", None),
            ("/abs.mov", None),
            ("x/../../up.mov", None),
            ("link.mov", tarfile.SYMTYPE),
            ("hard.mov", tarfile.LNKTYPE),
            ("dev.mov", tarfile.CHRTYPE),
            ("pipe.mov", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            data = movie() if kind is None else b""
            info.size = len(data)
            if kind is not None:
                info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("folder"))
    found = scan(path)
    assert [s.key for s in found if s.problem is None] == ["ok/a"]
    assert sum("not a plain file" in (s.problem or "") for s in found) == 4
    assert sum("absolute or parent path" in (s.problem or "") for s in found) == 2


def test_duplicate_keys_and_missing_media(tmp_path):
    found = scan(
        write_tar(
            tmp_path / "a.tar",
            [*clip("a"), *clip("b"), *clip("a"), ("c.json", b"{}"), ("d.mov", movie()), ("d.MOV", b"")],
        )
    )
    assert {s.key: s.problem for s in found} == {
        "a": "the key comes twice in the shard",
        "b": None,
        "c": "no video or image among its members ['json']",
        "d": "two members .MOV",
    }


def test_a_cut_shard_never_merges_with_the_next(tmp_path):
    """WebDataset gives shard A's json with shard B's video as one sample here."""
    cut = write_tar(tmp_path / "a.tar", [*clip("x"), ("same.json", b'{"caption": "A"}'), ("same.mov", movie())])
    _cut(_offset_of(cut, "same", "mov") + 100)(cut)
    write_tar(tmp_path / "b.tar", [("same.mov", movie(40)), ("same.txt", b"B")])
    view = View(num_frames=1, size=(8, 8), crop="center")
    batches = take(training_batches(str(tmp_path), view=view, batch_size=1, max_bad_fraction=1.0, shuffle_buffer=0), 8)
    assert {(b.keys[0].split(":")[1], (b.text or [""])[0]) for b in batches} == {("x", ""), ("same", "B")}


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


# ---- broken samples


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
    assert len(pipeline.read_quarantine(tmp_path / "q", seed=0)) == 200
    assert pipeline.read_quarantine(tmp_path / "q", seed=1) == {}


# ---- what a batch holds


def test_random_window_starts_and_frame_rates(corpus):
    """Source: 12 fps, frame k has grey 4 k. At 6 fps every second frame is shown, from any start."""
    starts = set()
    for draw in range(40):
        frames, times = decode_view(movie(), View(num_frames=4, fps=6.0), seeded(draw))
        numbers = (frames[:, 0, 0, 0] // 4).tolist()
        starts.add(numbers[0])
        assert np.diff(numbers).tolist() == [2, 2, 2] and np.allclose(np.diff(times), 1 / 6)
        assert numbers[0] == int(float(times[0]) * 12 + 5e-4)
    assert len(starts) > 8 and max(starts) <= 17
    assert (decode_view(movie(), View(num_frames=4, fps=6.0), None)[0][:, 0, 0, 0] // 4).tolist() == [8, 10, 12, 14]
    assert (decode_view(movie(), View(num_frames=4, fps=None), None)[0][:, 0, 0, 0] // 4).tolist() == [10, 11, 12, 13]


def test_short_clips_and_images_come_whole_with_lengths(tmp_path):
    write_tar(tmp_path / "a.tar", [*clip("long"), *clip("short", movie(0, 5)), *clip("still", photo(77), "png")])
    (batch,) = take(stream(tmp_path, view=View(num_frames=8, size=(16, 16), fps=12.0, crop="center")), 1)
    length = dict(zip([k[2:] for k in batch.keys], batch.lengths.tolist()))
    assert length == {"long": 8, "short": 5, "still": 1} and batch.video.shape == (3, 3, 8, 16, 16)
    for row, count in enumerate(batch.lengths.tolist()):
        assert (batch.video[row, :, count:] == batch.video[row, :, count - 1 : count]).all()
        assert (batch.times[row, count:] == batch.times[row, count - 1]).all()
    assert (batch.video[batch.keys.index("0:still")] == 77).all() and batch.video.dtype == torch.uint8


def test_captions_and_questions_reach_the_clip(tmp_path):
    qa = [{"id": "1", "type": "count", "question": "how many?", "answer": "2"}]
    write_tar(tmp_path / "a.tar", [*clip("a", caption="one", qa=qa), ("b.mov", movie()), ("b.txt", b"two"), *clip("c")])
    (batch,) = take(stream(tmp_path, shuffle_buffer=0), 1)
    assert batch.text == ["one", "two", ""] and batch.qa == [qa, [], []]
    write_tar(tmp_path / "b" / "a.tar", clip("c"))
    (batch,) = validation_batches(str(tmp_path / "b"), view=SMALL, batch_size=1)
    assert batch.text is None and batch.qa is None and batch.lengths is None


@pytest.mark.parametrize("crop", ["random", "center", "none"])
def test_resize_is_antialiased(crop):
    """A fine checkerboard becomes flat grey; without antialiasing it would alias. Equal to the float kernel."""
    board = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)
    frames = torch.from_numpy(np.repeat(np.repeat(board[None, :, :, None], 3, 3), 2, 0))
    out = fit(frames, View(size=(16, 16), crop=crop), seeded(1))
    assert out.shape == (3, 2, 16, 16) and out.dtype == torch.uint8
    assert (out.int() - 127).abs().max() <= 12
    noise = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = fit(noise, View(size=(16, 24), crop="center"), None).permute(1, 0, 2, 3)
    want = F.interpolate(noise.permute(0, 3, 1, 2).float(), size=(16, 24), mode="bilinear", antialias=True)
    assert (got.float() - want).abs().max() <= 1.0


def test_crops_lie_in_the_frame_and_keep_the_aspect():
    ramp = torch.arange(96, dtype=torch.uint8)[None, None, :, None].expand(1, 64, 96, 3)
    assert torch.equal(
        fit(ramp, View(size=(64, 64), crop="center"), None)[0, 0, 0], torch.arange(16, 80, dtype=torch.uint8)
    )
    lefts, flips = set(), 0
    for draw in range(60):
        row = fit(ramp, View(size=(64, 64), crop="random", hflip=0.5), seeded(draw))[0, 0, 0].int()
        flips += int(row[0] > row[-1])
        lefts.add(int(row.min()))
        assert (row.diff().abs() == 1).all()
    assert len(lefts) > 15 and min(lefts) >= 0 and max(lefts) <= 32 and 15 < flips < 45
    spans = [
        float(fit(ramp, View(size=(32, 32), scale=(0.25, 1.0)), seeded(d))[0, 0, 0].float().diff().mean())
        for d in range(60)
    ]
    assert min(spans) < 0.8 and 1.6 < max(spans) <= 2.05 and np.isclose(np.mean(spans), 1.25, atol=0.25)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"size": (0, 4)}, "data.size"),
        ({"fps": 0.0}, "data.fps=0.0"),
        ({"crop": "middle"}, "crop='middle' is not one of random, center, none"),
        ({"scale": (0.5, 1.5)}, "data.scale"),
        ({"hflip": 2.0}, "data.hflip=2.0"),
    ],
)
def test_bad_views_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        View(**bad)


# ---- validation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 4), (3, 7), (4, 2)])
def test_validation_gives_every_clip_once_in_equal_numbers_of_batches(corpus, world, batch, workers):
    if workers and world > 2:
        pytest.skip("two worlds with workers are enough")
    shards = open_sources(str(corpus))[0]
    ranks = [
        list(make_loader(ValidationSet(shards, view=SMALL, batch_size=batch, rank=r, world=world), num_workers=workers))
        for r in range(world)
    ]
    keys = [key for batches in ranks for b in batches for key in b.keys]
    assert sorted(keys) == sorted(f"c{s}_{i:02d}" for s in range(5) for i in range(6))
    assert len({len(batches) for batches in ranks}) == 1


def test_validation_is_deterministic_and_takes_the_middle(corpus):
    view = View(num_frames=4, size=(18, 24), fps=6.0, crop="random", hflip=1.0)
    once, again = (list(validation_batches(str(corpus), view=view, batch_size=8)) for _ in range(2))
    assert fingerprint(once) == fingerprint(again)
    assert (once[0].video[0, 0, :, 0, 0] // 4).tolist() == [8, 10, 12, 14]  # not flipped, not cropped at random


def test_val_clips_samples_all_shards(corpus):
    (batch,) = validation_batches(str(corpus), view=SMALL, batch_size=16, val_clips=15)
    assert len(set(batch.keys)) == 15 == num_val_clips(str(corpus), val_clips=15)
    assert len({key.split("_")[0] for key in batch.keys}) >= 4 and num_val_clips(str(corpus)) == 30
    fewer = {k for b in validation_batches(str(corpus), view=SMALL, batch_size=8, val_clips=5) for k in b.keys}
    assert fewer < set(batch.keys)  # a smaller limit is a subset


def test_validation_leaves_broken_clips_out(tmp_path):
    write_tar(tmp_path / "a.tar", [*clip("a"), *clip("b", b"no"), *clip("c"), ("d.json", b"{}")])
    batches = list(validation_batches(str(tmp_path), view=SMALL, batch_size=2, quarantine=tmp_path / "q"))
    assert [k for b in batches for k in b.keys] == ["a", "c"]
    assert {json.loads(line)["key"] for line in (tmp_path / "q").read_text().splitlines()} == {"b", "d"}


# ---- the data module


def config(corpus: Path, **changes) -> DataConfig:
    settings = dict(shards=str(corpus), val_shards=str(corpus), num_frames=4, size=[16, 16], fps=6.0, batch_size=3)
    return DataConfig(**(settings | dict(num_workers=0, shuffle_buffer=4, seed=7) | changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_module_resumes_from_its_state(corpus, workers):
    module = ClipDataModule(config(corpus, num_workers=workers))
    loader = iter(module.train_dataloader())
    whole = []
    for step in range(10):
        whole.append(next(loader))
        module.advance(whole[-1])
        if step == 4:
            state = json.loads(json.dumps(module.state_dict()))
    other = ClipDataModule(config(corpus, num_workers=workers))
    other.load_state_dict(state)
    assert other.batches_consumed == 5
    assert fingerprint(take(other.train_dataloader(), 5)) == fingerprint(whole[5:])
    assert fingerprint(whole) == fingerprint(take(stream(corpus, view=module.view), 10)) or workers


def test_data_module_refuses_another_stream(corpus, tmp_path):
    state = ClipDataModule(config(corpus, num_workers=2)).state_dict()
    with pytest.raises(ValueError, match="data.num_workers was 2 and is 0; .*batch_size was 3 and is 5"):
        ClipDataModule(config(corpus, batch_size=5)).load_state_dict(state)
    with pytest.raises(ValueError, match="trainer.devices x trainer.num_nodes was 4 and is 1"):
        ClipDataModule(config(corpus, num_workers=2)).load_state_dict({**state, "world": 4})
    with pytest.raises(ValueError, match="the shards under data.shards"):
        ClipDataModule(config(make_shards(tmp_path, 2, 2), num_workers=2)).load_state_dict(state)


def test_a_checkpoint_tells_of_the_shards_that_are_read_whatever_comes_later(tmp_path):
    shards = make_shards(tmp_path, 2, 3)
    module = ClipDataModule(config(shards))
    next(iter(module.train_dataloader()))
    before = module.state_dict()
    entries = json.loads((shards / "index.json").read_text())["shards"]
    (shards / "index.json").write_text(json.dumps({"shards": entries[:1]}))
    assert module.state_dict() == before  # the stream still reads two shards
    with pytest.raises(ValueError, match="the shards under data.shards"):
        ClipDataModule(config(shards)).load_state_dict(before)


def test_data_module_validation_and_bad_settings(corpus):
    module = ClipDataModule(config(corpus, val_clips=7, val_batch_size=4))
    assert module.num_val_clips == 7 and [len(b) for b in module.val_dataloader()] == [4, 3]
    assert ClipDataModule(config(corpus, val_shards="")).val_dataloader() == []
    for change, message in (
        ({"crop": "x"}, "data.crop"),
        ({"size": [4]}, "data.size"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"shuffle_buffer": -1}, "shuffle_buffer=-1"),
        ({"max_bad_fraction": 5}, "max_bad_fraction=5"),
        ({"max_pixels": 0}, "max_pixels=0"),
        ({"crop": "center", "scale": [0.5, 1.0]}, r"data.scale=\[0.5, 1.0\] is for data.crop=random"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipDataModule(config(corpus, **change))


def _worker(ready) -> None:
    pipeline.quiet_worker(0)
    ready.set()
    time.sleep(60)


def test_workers_heed_their_parent_only():
    """SIGUSR1, SIGINT and SIGTERM to the whole step leave a worker alone; its parent can still end it."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    for name in ("USR1", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # from a process that is not the parent
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
