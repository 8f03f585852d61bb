"""Batches of one part each: the same part on every rank, drawn by weight, continued exactly, images from videos too."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import SMALL, clip, config, fingerprint, make_shards, movie, photo, stream, take, write_index, write_tar

from vtok.data.buckets import DRAWS, Schedule, Sizes, scaled_sizes
from vtok.data.health import TooManyBroken
from vtok.data.module import ClipDataModule
from vtok.data.pipeline import TrainingStream, make_loader, training_batches
from vtok.data.sources import every_shard, open_sources
from vtok.data.view import View


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """v: 3 shards x 6 videos. p: 2 shards x 7 photos, png and jpg."""
    root = tmp_path_factory.mktemp("parts")
    make_shards(root / "v", 3, 6, prefix="v")
    counts = {}
    for s in range(2):
        members = []
        for i in range(7):
            kind = ("png", "jpg")[i % 2]
            members += clip(f"p{s}_{i}", photo(20 * i + s, kind), kind, caption=f"photo {s} {i}")
        counts[write_tar(root / "p" / f"p-{s}.tar", members).name] = 7
    write_index(root / "p", counts)
    return root


def bucketed(root: Path, what: str = "v::p", **keywords) -> TrainingStream:
    settings = {"view": SMALL, "batch_size": 3, "seed": 7, "shuffle_buffer": 4, "weights": [1.0, 1.0]}
    settings |= {"part_frames": [4, 1], "part_batch_sizes": [2, 5]}
    return TrainingStream(open_sources(what, apart=True, root=root), **(settings | keywords))


def part(batch) -> int:
    """0 for a batch of videos, 1 for one of photos; no batch is of both."""
    (letter,) = {key.split(":")[1][0] for key in batch.keys}
    return "vp".index(letter)


# ---- the schedule


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [0.2, 5.0, 1.8]])
def test_parts_come_by_weight(weights):
    share = np.asarray(weights) / sum(weights)
    for seed in range(3):
        counts = np.asarray(Schedule(weights, seed=seed).counts(4000))
        deviation = np.sqrt(4000 * share * (1 - share))
        assert counts.sum() == 4000 and (np.abs(counts - 4000 * share) < 4 * deviation).all()
    # Not only in total: neighbours are independent draws, in a block and over its end.
    drawn = [Schedule(weights, seed=0).part(n) for n in range(DRAWS - 2000, DRAWS + 2000)]
    same = np.mean([a == b for a, b in itertools.pairwise(drawn)])
    assert abs(same - (share**2).sum()) < 0.04


@pytest.mark.parametrize("step", [1, 2, 3])
def test_counting_equals_drawing(step):
    schedule = Schedule([1.0, 2.0, 0.5], seed=3)
    drawn = [schedule.part(n) for n in range(2 * DRAWS + 50)]
    assert drawn[:8] == [0, 2, 0, 1, 1, 0, 1, 0], "the draw of a seed must not change from version to version"
    for stop in (0, 1, 2, 7, DRAWS, DRAWS + 1, 2 * DRAWS + 50):
        for turn in range(step):
            want = np.bincount(np.asarray(drawn[:stop][turn::step], int), minlength=3).tolist()
            assert schedule.counts(stop, turn=turn, step=step) == want
    assert drawn[:64] != [Schedule([1.0, 2.0, 0.5], seed=4).part(n) for n in range(64)]


# ---- the batches


def test_a_batch_is_of_one_part_one_length_and_its_own_size(parts):
    seen = set()
    for batch in take(bucketed(parts), 24):
        which = part(batch)
        seen.add(which)
        assert batch.video.shape == ((2, 3, 4, 16, 16), (5, 3, 1, 16, 16))[which]
        assert batch.lengths is None and batch.video.dtype == torch.uint8
    assert seen == {0, 1}


def test_photos_and_their_captions_are_the_shards_own(parts):
    view = View(num_frames=4, size=(20, 30), fps=6.0, crop="none")
    batches = [b for b in take(bucketed(parts, view=view), 24) if part(b)]
    for batch in batches:
        for key, text, video in zip(batch.keys, batch.text, batch.video):
            shard, number = key.split(":")[1][1:].split("_")
            assert text == f"photo {shard} {number}"
            assert (video.int() - (20 * int(number) + int(shard))).abs().max() <= (2 if int(number) % 2 else 0)
    pngs, jpgs = ({k for b in batches for k in b.keys if int(k[-1]) % 2 == odd} for odd in (0, 1))
    assert pngs and jpgs


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_takes_the_same_part_at_the_same_step(parts, world, workers):
    ranks = [
        [part(b) for b in take(make_loader(bucketed(parts, rank=r, world=world), num_workers=workers), 16)]
        for r in range(world)
    ]
    assert all(rank == [bucketed(parts).schedule.part(n) for n in range(16)] for rank in ranks)


def test_ranks_share_the_samples_of_each_part(parts):
    keys = [[key for b in take(bucketed(parts, rank=r, world=2), 20) for key in b.keys] for r in (0, 1)]
    assert not set(keys[0]) & set(keys[1])
    videos = {f"0:v{s}_{i:02d}" for s in range(3) for i in range(6)}
    photos = {f"0:p{s}_{i}" for s in range(2) for i in range(7)}
    first = [k for k in keys[0] + keys[1] if k.startswith("0:")]
    assert len(first) == len(set(first)) and set(first) == videos | photos


def test_images_are_single_frames_of_the_videos_too(parts):
    """The same shards twice: windows of four frames, and frames from anywhere in the clip."""
    view = View(num_frames=4, size=(18, 24), fps=6.0, crop="none")
    settings = {"part_frames": [4, 1], "part_batch_sizes": [2, 6], "view": view}
    batches = take(bucketed(parts, "v::v", **settings), 30)
    frames = [int(row[0, 0, 0, 0]) // 4 for b in batches if b.video.shape[2] == 1 for row in b.video]
    assert {b.video.shape[:3] for b in batches} == {(2, 3, 4), (6, 3, 1)}
    assert len(set(frames)) > 12 and min(frames) <= 3 and max(frames) >= 18, "of the 24 frames of a clip"
    keys = [k for b in batches if b.video.shape[2] == 1 for k in b.keys]
    assert len(keys) == len(set(keys)), "every video gives one frame an epoch"


def test_clips_shorter_than_their_part_are_padded_to_its_length_on_every_rank(tmp_path):
    """A rank whose batch holds short clips alone still runs the shape of the others."""
    write_tar(tmp_path / "s" / "a.tar", [m for i in range(8) for m in clip(f"s{i}", movie(0, 3))])
    batch = take(bucketed(tmp_path, "s", weights=None, part_frames=[8], part_batch_sizes=None), 1)[0]
    assert batch.video.shape == (3, 3, 8, 16, 16) and batch.lengths.tolist() == [2, 2, 2]  # 3 at 12 fps are 2 at 6
    assert (batch.video[:, :, 2:] == batch.video[:, :, 1:2]).all() and (batch.times[:, 2:] == batch.times[:, 1:2]).all()


def test_without_weights_every_clip_comes_equally_often(parts):
    made = bucketed(parts, weights=None)
    assert [b.weight for b in made.buckets] == [18 / 2, 14 / 5]
    alone = [bucketed(parts, weights=None, part_batch_sizes=None).buckets, bucketed(parts, part_frames=None).buckets]
    assert [[b.batch_size for b in bs] for bs in alone] == [[3, 3], [2, 5]]
    assert [[b.frames for b in bs] for bs in alone] == [[4, 1], [4, 4]]


# ---- sizes

SCALES = [0.5, 1.0, 1.25]


def test_a_batch_is_of_one_size_drawn_evenly_and_apart_from_its_part():
    sizes, schedule = Sizes((16, 24), SCALES, seed=7), Schedule([1.0, 1.0], seed=7)
    assert sizes.sizes == [(8, 12), (16, 24), (20, 30)]
    drawn = [(schedule.part(n), sizes.sizes.index(sizes.at(n))) for n in range(6000)]
    counts = np.zeros((2, 3))
    np.add.at(counts, tuple(np.transpose(drawn)), 1)
    assert (np.abs(counts - 1000) < 4 * np.sqrt(1000 * 5 / 6)).all(), "every part comes in every size as often"
    assert Sizes((16, 24), None, seed=7).at(3) == (16, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_takes_the_same_size_at_the_same_step_and_the_same_crop(parts, workers):
    """Parts, samples, windows and crops are those of one size; only how many pixels they become changes."""
    settings = {"view": View(num_frames=4, size=(16, 16), fps=6.0), "size_scales": SCALES}
    sizes = Sizes((16, 16), SCALES, seed=7)
    for rank in range(2):
        mixed = bucketed(parts, rank=rank, world=2, **settings)
        plain = bucketed(parts, rank=rank, world=2, view=settings["view"])
        batches = [take(make_loader(each, num_workers=workers), 12) for each in (mixed, plain)]
        assert [tuple(b.video.shape[3:]) for b in batches[0]] == [sizes.at(n) for n in range(12)]
        for one, two in zip(*batches):
            assert one.keys == two.keys and one.video.shape[:3] == two.video.shape[:3]
            assert torch.equal(one.times, two.times)
            assert (one.video.float().mean((1, 3, 4)) - two.video.float().mean((1, 3, 4))).abs().max() < 2


def test_sizes_that_are_no_pixels_are_refused(parts):
    for scales, message in (
        ([0.3], r"data.size_scales=\[0.3\]: 0.3 times data.size=\[16, 16\] is 4.8 x 4.8, no whole pixels"),
        ([1.0, 0.0], "0.0 times"),
        ([], r"data.size_scales=\[\] is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipDataModule(settings_of(parts, size_scales=scales))
    assert scaled_sizes((16, 16), [0.75]) == [(12, 12)]


# ---- resume


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2)])
def test_resume_continues_with_the_very_next_batch(parts, tmp_path, world, workers):
    for rank in range(world):
        settings = {"rank": rank, "world": world, "quarantine": tmp_path / "q.jsonl", "size_scales": SCALES}
        whole = fingerprint(take(make_loader(bucketed(parts, **settings), num_workers=workers), 18))
        for done in (5,) if workers else (1, 2, 5, 9, 13, 17):
            rest = take(make_loader(bucketed(parts, start=done, **settings), num_workers=workers), 18 - done)
            assert fingerprint(rest) == whole[done:], f"after {done} batches"


def test_resume_with_broken_samples_that_only_one_part_sees(tmp_path):
    """Damage late in a video breaks its windows, but few of its single frames: the parts keep books of their own."""
    members = []
    for i in range(8):
        media = movie(i, container="matroska")
        members += clip(f"v{i}", media[: len(media) * 3 // 4] if i % 4 == 3 else media, "mkv")
    write_tar(tmp_path / "v" / "a.tar", members)
    members = [m for i in range(6) for m in clip(f"v{i}", b"no" if i == 2 else photo(i * 9), "png")]
    write_tar(tmp_path / "p" / "a.tar", members)  # the same names of shard and samples, other contents
    settings = {"max_bad_fraction": 0.6, "quarantine": tmp_path / "q"}
    settings |= {"weights": [1.0, 1.0, 1.0], "part_frames": [6, 1, 1], "part_batch_sizes": [2, 2, 3]}
    whole = fingerprint(take(bucketed(tmp_path, "v::v::p", **settings), 40))
    broken = [json.loads(line) for line in (tmp_path / "q").read_text().splitlines()]
    assert {"0:a.tar", "2:a.tar"} <= {entry["shard"] for entry in broken}
    spoilt = {f"{entry['epoch']}:{entry['key']}" for entry in broken if entry["shard"] == "0:a.tar"}
    assert spoilt & {key for keys, _ in whole for key in keys}, "a sample that one part lost and another one gave"
    for done in (1, 6, 17, 25, 39):
        assert fingerprint(take(bucketed(tmp_path, "v::v::p", start=done, **settings), 40 - done)) == whole[done:]


def test_a_resume_judges_broken_samples_against_all_parts(tmp_path):
    """One part alone is over the limit, the run is not: neither before nor after a resume does it stop."""
    write_tar(tmp_path / "a" / "a.tar", [m for i in range(10) for m in clip(f"a{i}", b"no" if i < 4 else None)])
    make_shards(tmp_path / "b", 3, 20, prefix="b")
    settings = {"max_bad_fraction": 0.2, "quarantine": tmp_path / "q", "weights": [1.0, 3.0], "shuffle_buffer": 0}
    settings |= {"part_frames": [1, 1], "part_batch_sizes": [3, 12], "view": View(num_frames=1, size=(8, 8))}
    whole = fingerprint(take(bucketed(tmp_path, "a::b", **settings), 60))
    assert fingerprint(take(bucketed(tmp_path, "a::b", start=50, **settings), 10)) == whole[50:]
    with pytest.raises(TooManyBroken, match="data.max_bad_fraction=0.2"):
        take(bucketed(tmp_path, "a::b", **(settings | {"weights": [9.0, 1.0], "quarantine": None})), 60)


def test_a_long_run_resumes_without_decoding_or_drawing_it_all_again(parts, monkeypatch):
    from vtok.data import pipeline

    calls = []
    real = pipeline.load_sample
    monkeypatch.setattr(pipeline, "load_sample", lambda *a, **k: calls.append(1) or real(*a, **k))
    take(bucketed(parts, start=100_000, quarantine="/nonexistent/q"), 1)
    assert len(calls) in (2, 5)


# ---- the data module and its settings


def settings_of(parts: Path, **changes):
    base = {"shards": f"{parts}/v::{parts}/p", "val_shards": f"{parts}/v", "weights": [1.0, 1.0]}
    return config(parts, **(base | {"part_frames": [4, 1], "part_batch_sizes": [2, 5]} | changes))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_module_resumes_and_validates_with_num_frames(parts, workers):
    module = ClipDataModule(settings_of(parts, num_workers=workers, num_frames=3, size_scales=[1.0, 1.5]))
    loader, whole = iter(module.train_dataloader()), []
    for step in range(10):
        whole.append(next(loader))
        module.advance(whole[-1])
        if step == 4:
            state = json.loads(json.dumps(module.state_dict()))
    other = ClipDataModule(settings_of(parts, num_workers=workers, num_frames=3, size_scales=[1.0, 1.5]))
    other.load_state_dict(state)
    assert fingerprint(take(other.train_dataloader(), 5)) == fingerprint(whole[5:])
    assert {b.video.shape[2] for b in whole} == {4, 1}
    sizes = {tuple(b.video.shape[3:]) for b in whole}
    assert {b.video.shape[2] for b in module.val_dataloader()} == {3} and len(sizes) == 2
    assert {tuple(b.video.shape[3:]) for b in module.val_dataloader()} == {min(sizes)}, "validation sees data.size"


def test_data_module_refuses_other_buckets(parts):
    state = ClipDataModule(settings_of(parts)).state_dict()
    with pytest.raises(ValueError, match=r"data.part_batch_sizes.* was \[2, 5\] and is \[2, 4\]"):
        ClipDataModule(settings_of(parts, part_batch_sizes=[2, 4])).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data.part_batch_sizes.* was \[2, 5\] and is None"):
        ClipDataModule(settings_of(parts, part_batch_sizes=None, part_frames=None)).load_state_dict(state)
    again = ClipDataModule(settings_of(parts, part_batch_sizes=[4, 10], reorder=True))
    again.load_state_dict({**state, "world": 2})
    assert again._order == 1, "half the processes, batches twice as large: a pass in another order"
    # A checkpoint from before there were buckets is one without them.
    plain = settings_of(parts, part_batch_sizes=None, part_frames=None)
    old = {k: v for k, v in ClipDataModule(plain).state_dict().items() if k != "part_batch_sizes"}
    ClipDataModule(plain).load_state_dict(old)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part_frames": [4]}, r"data.part_frames=\[4\] has 1 entries, but data.shards .* has 2 part\(s\)"),
        ({"part_frames": [4, 0]}, r"data.part_frames=\[4, 0\]: every entry must be 1 or more \(frames a clip, 1 for"),
        ({"part_batch_sizes": [4, 4, 4]}, r"data.part_batch_sizes=\[4, 4, 4\] has 3 entries.*clips per rank and step"),
        ({"part_batch_sizes": [-1, 4]}, r"data.part_batch_sizes=\[-1, 4\]: every entry must be 1 or more"),
        ({"part_frames": []}, r"data.part_frames=\[\] has 0 entries"),
        ({"num_frames": 0}, "data.num_frames=0 must be 1 or more"),
    ],
)
def test_bad_settings_are_named_at_once(parts, changes, message):
    with pytest.raises(ValueError, match=message):
        ClipDataModule(settings_of(parts, **changes))


def test_bad_parts_are_named_when_they_are_opened(parts):
    with pytest.raises(ValueError, match=r"data.weights=\[1.0\] has 1 entries for 2 sources"):
        ClipDataModule(settings_of(parts, weights=[1.0])).train_dataloader()
    with pytest.raises(ValueError, match="no index.json states it for part 1 .*set data.weights"):
        bare = settings_of(parts, weights=None, shards=f"{parts}/v::{parts}/p/*.tar")
        ClipDataModule(bare).train_dataloader()
    with pytest.raises(ValueError, match="more than once"):
        next(training_batches("v/*.tar::v", view=SMALL, batch_size=2, root=parts))
    same = training_batches("v::v", view=SMALL, batch_size=2, root=parts, part_frames=[4, 1], shuffle_buffer=4)
    assert {b.video.shape[2] for b in take(same, 12)} == {4, 1}
    assert len(every_shard("v::p::v", root=parts)) == 5


def test_without_part_settings_the_order_of_a_mixture_stays(parts):
    """As it was before there were buckets: runs from then go on."""
    where = f"{parts}/v::{parts}/p"
    assert [b.keys for b in take(stream(where, weights=[1.0, 1.0]), 3)] == [
        ["0:v1_00", "0:v1_03", "0:v1_05"],
        ["0:p1_0", "0:v1_04", "0:p1_1"],
        ["0:p1_5", "0:v1_02", "0:p1_2"],
    ]
    assert [b.keys for b in take(stream(where), 2)] == [["0:p1_0", "0:p1_3", "0:p1_5"], ["0:p1_4", "0:p1_2", "0:v2_00"]]
