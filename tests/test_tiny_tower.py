"""data/tiny_tower.py: what a tower learns to say of a patch is what is seen there, and it is made once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_synthetic import mask

from vtok.data.synthetic import LEVELS, render, scene, scene_of, write_corpus
from vtok.data.synthetic_scenes import COLOURS
from vtok.types import Clip
from vtok.vision import TowerConfig, load_tower

pytest.importorskip("timm")
torch.set_num_threads(1)
sys.path.append(str(Path(__file__).parents[1] / "data"))
import tiny_tower  # noqa: E402

SAID = tiny_tower.SAID


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_patch_is_said_to_show_what_it_shows(level):
    made = scene(5, level, level=level, size=(64, 96), fps=8, needles=1)
    frames = list(render(made))
    said = tiny_tower.truth(made, list(range(made.frames)), (4, 6))
    assert said.shape == (32, len(SAID), 4, 6)
    hidden = range(made.needles[0].frame, made.needles[0].frame + made.needles[0].frames)
    for t, frame in enumerate(frames):
        names = {SAID[i] for i in said[t].flatten(1).any(1).nonzero()[:, 0].tolist()}
        seen = [thing for thing in made.shots[0].things if t >= thing.appears]
        if t in hidden:
            needle = made.needles[0]
            assert names == {(needle.colour, needle.shape), f"plain {needle.ground}"}
            assert bool(said[t, SAID.index(f"plain {needle.ground}")].all())
        else:
            assert names == {made.shots[0].palette, made.shots[0].background}.union(
                *({(th.colour, th.shape), (th.colour, th.texture)} for th in seen)
            )
        of_colour = {c: [i for i, name in enumerate(SAID[: tiny_tower.NAMES]) if name[0] == c] for c in COLOURS}
        for colour, rows in of_colour.items():
            for y, x in said[t, rows].any(0).nonzero().tolist():
                # half a patch around it: rings have nothing in their middle
                around = frame[max(0, 16 * y - 8) : 16 * y + 24, max(0, 16 * x - 8) : 16 * x + 24]
                assert mask(np.ascontiguousarray(around), colour).sum() > 40, (t, colour, y, x)


def test_a_scene_is_made_again_of_its_row():
    for index in range(12):
        made = scene(3, index, seconds=2.5 + index, size=(48, 64), fps=12.5, shots=2 if index % 2 else None)
        assert scene_of(made.row("x.mp4")) == made
    row = scene(3, 1).row("x.mp4")
    with pytest.raises(
        ValueError, match=r"x\.mp4 shows .*which clip 2 of seed 3 no longer does: write the corpus again"
    ):
        scene_of({**row, "index": 2})


def test_scores_are_of_the_patches_that_hold_a_thing():
    true = torch.zeros(1, len(SAID), 1, 3, dtype=torch.bool)
    first, second = SAID.index(("red", "star")), SAID.index(("blue", "ring"))
    true[0, first, 0, 0] = true[0, second, 0, 1] = True
    said = torch.zeros(true.shape)
    said[0, first, 0, 0] = said[0, SAID.index(("blue", "star")), 0, 1] = said[0, first, 0, 2] = 1.0
    assert tiny_tower.scores(said, true) == {"name": 0.5, "colour": 1.0, "shape": 0.5}


@pytest.mark.slow
def test_a_tower_learns_names_is_made_once_and_loads(tmp_path):
    corpus = tmp_path / "corpus"
    write_corpus(
        corpus, clips=24, size=(64, 64), fps=8, complexity=(0, 1), val_fraction=0.25, workers=1, progress=False
    )
    settings = dict(width=64, steps=120, batch=32, per_video=6)
    scores = tiny_tower.train_tower(corpus, tmp_path / "tower", **settings)
    assert scores["colour"] > 0.5  # one of six
    before = (tmp_path / "tower" / "model.safetensors").stat().st_mtime_ns
    assert tiny_tower.train_tower(corpus, tmp_path / "tower", **settings) == scores
    assert (tmp_path / "tower" / "model.safetensors").stat().st_mtime_ns == before
    tower = load_tower(TowerConfig(name=str(tmp_path / "tower"), dtype="float32"))
    video = torch.randint(0, 256, (1, 3, 2, 64, 64), dtype=torch.uint8)
    seen = tower.features(Clip(keys=["a"], video=video))
    assert seen.patches.shape == (1, 2, 16, 64) and seen.grid == (4, 4)
    with pytest.raises(ValueError, match="size=40"):
        tiny_tower.train_tower(corpus, tmp_path / "other", size=40)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds files of something else"):
        tiny_tower.train_tower(corpus, tmp_path / "thesis", **settings)
    rows = [json.loads(line) for line in (corpus / "captions.jsonl").read_text().splitlines()]
    (corpus / "captions.jsonl").write_text("".join(json.dumps({**r, "split": "val"}) + "\n" for r in rows))
    with pytest.raises(ValueError, match="no videos of the split 'train'"):
        tiny_tower.train_tower(corpus, tmp_path / "other", **settings)


def test_every_level_has_its_ground_among_the_names():
    assert {ground for level in LEVELS for ground in level.backgrounds} <= set(SAID)


def test_a_trained_tower_sees_whole_frames(tmp_path):
    import timm

    net, shape = tiny_tower.make_net(size=64, width=16, seed=0)
    timm.models.save_for_hf(net, tmp_path / "net", safe_serialization=True, model_args=shape)
    tower = load_tower(TowerConfig(name=str(tmp_path / "net"), dtype="float32"))
    assert tower.preprocess.resize == tower.preprocess.crop == (64, 64)
