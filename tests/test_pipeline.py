"""Validation, and the data module with its cursor."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
from pathlib import Path

import pytest
from miniature import SMALL, clip, config, fingerprint, make_shards, stream, take, write_tar
from waiting import PATIENCE_S

from vtok.data import pipeline
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import ValidationSet, make_loader, num_val_clips, validation_batches
from vtok.data.sources import open_sources
from vtok.data.view import View


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """5 shards x 6 clips, with an index."""
    return make_shards(tmp_path_factory.mktemp("corpus"), 5, 6)


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
    time.sleep(PATIENCE_S)


def test_workers_heed_their_parent_only():
    """SIGUSR1, SIGINT and SIGTERM to the whole step leave a worker alone; its parent can still end it."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(PATIENCE_S)
    for name in ("USR1", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # from a process that is not the parent
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(PATIENCE_S)
    assert worker.exitcode == 0
