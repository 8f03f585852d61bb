"""Which clips were cut from one video: by what their json says, from packing to the intervals, features included."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packing import moving, video

from vtok.config import DataConfig
from vtok.data import shards
from vtok.data.stems import numbered, stem_of, stems
from vtok.evaluate import window_loader
from vtok.evaluation.answer_rows import AnswerRow, Costs, finish, interval, paired, per_question
from vtok.evaluation.free_lengths import follow, read_facts
from vtok.features import record_features
from vtok.llm import Answered
from vtok.vision import TowerConfig, load_tower

sys.path.append(str(Path(__file__).parents[1] / "data"))
from tiny_tower import write_tower  # noqa: E402

LONG = "cooking_show_season_1_episode_with_a_very_long_descriptive_title_part"
NAMES = ["\u89c6\u9891\u4e00.mp4", "\u89c6\u9891\u4e8c.mp4", f"{LONG}_1.mp4", f"{LONG}_2.mp4", "A b.mp4", "a_b.mp4"]


def test_the_stem_of_a_key_is_what_was_written():
    made = stems(dict(enumerate(NAMES)))
    assert len(set(made.values())) == len(NAMES)
    for stem in made.values():
        assert stem_of(stem) == stem and stem_of(numbered(stem, 3)) == stem_of(numbered(stem, 12345)) == stem
    assert stem_of("tv_news__0003") == stem_of("tv_news__0117") == "tv_news" != stem_of("tv_news2")


def said(key: str, source: str, right: bool) -> Answered:
    return Answered(key, "", "x", "?", "red", ["red", "blue"], [0.0, -1.0] if right else [-1.0, 0.0], None,
                    tokens=1, positions=9, source=source)  # fmt: skip


def test_intervals_are_over_the_videos_that_clips_name():
    keys = list(stems(dict(enumerate(NAMES))).values())
    apart = AnswerRow("x", 1, [said(key, name, i % 2 == 0) for i, (key, name) in enumerate(zip(keys, NAMES))])
    costs = Costs(None, "", {})
    row = finish(apart, full=float("nan"), costs=costs, seed=0)
    assert row["accuracy_ci"] == interval([1.0, 0.0] * 3, NAMES, seed=0) is not None
    other = AnswerRow("y", 1, [said(key, name, True) for key, name in zip(keys, NAMES)])
    assert paired(apart, other, seed=0)["videos"] == 6
    assert per_question([apart])["videos"] == NAMES
    one = AnswerRow("x", 1, [said(key, "one file in parts", i % 2 == 0) for i, key in enumerate(keys)])
    assert paired(one, one, seed=0)["videos"] == 1
    unnamed = AnswerRow("x", 1, [said(numbered("tape", i), "", True) for i in range(3)])
    assert paired(unnamed, unnamed, seed=0)["videos"] == 1


def test_clips_bring_the_video_they_were_cut_from(tmp_path):
    pytest.importorskip("timm")
    for number, name in enumerate(NAMES[:3]):
        video(tmp_path / "in" / name, frames=moving(20, height=32, width=32, seed=number))
    arguments = ["--clip-seconds", "1", "--val-fraction", "1", "--workers", "1"]
    shards.main([str(tmp_path / "in"), "--out", str(tmp_path / "shards"), *arguments])
    write_tower(tmp_path / "tower", size=32, patch=16, width=16, depth=2)
    tower = TowerConfig(name=str(tmp_path / "tower"), dtype="bfloat16")
    how = dict(tower=tower, size=(32, 32), workers=0, progress=False)
    record_features(tmp_path / "shards", tmp_path / "features", **how)
    data = DataConfig(num_frames=4, fps=8.0, size=[32, 32], val_batch_size=4, num_workers=0)
    for folder in ("shards", "features"):
        where = str(tmp_path / folder / "val")
        batches = list(window_loader(data, where, clips=None, setting="--shards", tower=lambda: load_tower(tower)))
        found = [source for batch in batches for source in batch.sources]
        assert sorted(found) == sorted(f"in/{name}" for name in NAMES[:3] * 2), folder
        assert batches[0].rows(slice(1, 2)).sources == batches[0].sources[1:2]


def test_facts_are_found_under_the_keys_that_packing_writes(tmp_path):
    lines = [f'{{"file": "val/{name}", "complexity": {i}, "duration": 1.0}}' for i, name in enumerate(NAMES)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    keys = stems({name: f"val/{name}" for name in NAMES})
    facts = read_facts(tmp_path / "captions.jsonl")
    assert [facts[keys[name]]["complexity"] for name in NAMES] == [0, 1, 2, 3, 4, 5]
    assert follow({numbered(key, 0): [3, 4] for key in keys.values()}, facts, seed=0)["videos"] == 6
