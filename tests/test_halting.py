"""Lengths predicted in one pass: the head learns what a search finds, and what is promised of new videos holds."""

import json
import math

import numpy as np
import pytest
import torch
from test_rate_control import DCT, fitted, lengths_in, uneven, video  # noqa: F401

from vtok.cli import main as vtok_main
from vtok.coding import codec
from vtok.coding.calibrate import Video, against_search, measure, usual_levels
from vtok.coding.rate_control import Asked
from vtok.data import shards, synthetic
from vtok.families import flexible
from vtok.layers.halting import (
    LEVELS,
    STEP_DB,
    HaltingHead,
    conformal_quantile,
    least_threshold,
    next_level,
    shortest,
)
from vtok.loading import load
from vtok.types import Clip


def make_head(**changes):
    torch.manual_seed(0)
    return HaltingHead(4, **dict(num_tokens=8, depth=1, width=8, num_heads=2, coverage=0.9) | changes)


def test_shortest():
    psnr = torch.tensor([[10.0, 20, 30, 40], [10, 30, 20, 25]])
    assert shortest(psnr, torch.tensor([[5.0, 20, 41], [29, 31, 10]])).tolist() == [[1, 2, 4], [2, 4, 1]]


def test_quantile_counts_the_new_video_and_each_video_once():
    one_each = torch.arange(19.0)[torch.randperm(19, generator=torch.Generator().manual_seed(0))]
    assert conformal_quantile(one_each, torch.arange(19), coverage=0.9) == 17  # the 18th of 19: ceil(20 x 0.9)
    assert conformal_quantile(torch.arange(9.0), torch.arange(9), coverage=0.9) == 8
    assert conformal_quantile(torch.arange(8.0), torch.arange(8), coverage=0.9) == math.inf
    assert conformal_quantile(torch.zeros(0), torch.zeros(0, dtype=torch.int64), coverage=0.9) == math.inf
    # ten videos, one of them long and hard: its blocks count as one video, not as most of the data
    scores, of = torch.cat([torch.arange(9.0), torch.full((500,), 50.0)]), torch.tensor([*range(9), *[9] * 500])
    assert conformal_quantile(scores, of, coverage=0.75) == 8 and conformal_quantile(scores, of, coverage=0.9) == 50


def test_blocks_of_new_videos_stay_within_the_quantile():
    """Whatever the scores and however alike those of a video, by simulation."""
    rng = np.random.default_rng(0)

    def draw(videos):
        counts = rng.integers(1, 30, videos)
        level = rng.exponential(3, videos)  # of a video
        scores = [np.sqrt(n) + v + rng.normal(size=n) for n, v in zip(counts, level)]
        return torch.from_numpy(np.concatenate(scores)), torch.from_numpy(np.repeat(np.arange(videos), counts))

    inside = []
    for _ in range(600):
        limit = conformal_quantile(*draw(30), coverage=0.8)
        inside.append(float((draw(1)[0] <= limit).double().mean()))
    error = 3 * np.std(inside) / math.sqrt(len(inside))
    assert 0.8 - error <= np.mean(inside) <= 0.8 + 1 / 31 + error


def test_least_threshold_is_where_quality_stays_reached():
    ascending = torch.tensor([-3.0, -1, 0, 2, 5]).expand(1, 4, 5)
    psnr = torch.tensor([[10.0, 30, 20, 25, 26]])  # three tokens are worse than two
    got = least_threshold(ascending, psnr, torch.tensor([5.0, 22, 25.5, 28]))
    assert got.tolist() == [[-3, 2, 5, math.inf]]  # one token; four, as three miss; five; more tokens do not reach it


def test_calibrated_lengths_reach_the_quality_and_training_forgets():
    head, generator = make_head(coverage=0.8), torch.Generator().manual_seed(1)
    codes = torch.randn(60, 8, 4, generator=generator)
    psnr = 20 + 6 * torch.rand(60, 1, generator=generator) + torch.arange(8.0) * 1.2
    assert not head.calibrated and head.threshold(60) == 0
    head.calibrate(codes, psnr, torch.arange(60))
    assert head.calibrated and int(head.videos[0]) == 60 and head.threshold(LEVELS) == math.inf
    assert head.predict(codes, 60).tolist() == [8] * 60  # no video reached it: every token
    for wanted in (22.0, 25.0, 27.3, 30.0):
        can = psnr[:, -1] >= math.ceil(wanted / STEP_DB) * STEP_DB
        at = head.predict(codes, wanted)[:, None] - 1
        assert float((psnr.gather(1, at)[can] >= wanted).double().mean()) >= 0.8
    assert torch.equal(head.predict(codes, 27.3), head.predict(codes, 27.5)) and next_level(27.5) == 55
    twin = make_head(coverage=0.8)
    twin.load_state_dict(head.state_dict())
    assert twin.threshold(50) == head.threshold(50) != 0
    head.loss(codes, 4 / 10 ** (psnr / 10), torch.ones(60, dtype=torch.bool))
    assert not head.calibrated
    with pytest.raises(ValueError, match="halting_coverage=1"):
        make_head(coverage=1)


def videos_of(count, seed, frames=24):
    return [(f"{seed}-{i}", list(uneven(frames - i % 4, seed=1000 * seed + i))) for i in range(count)]


@pytest.mark.slow
@pytest.mark.long
def test_the_halting_head_learns_what_the_search_finds(tmp_path, fitted):  # noqa: F811
    torch.manual_seed(0)
    config = flexible.Config(**DCT, halting_depth=1, halting_width=32)
    model = flexible.Model(config)
    assert "model.halting, which is new" not in fitted.warm_start(fitted)
    assert "model.halting, which is new" in model.warm_start(fitted)
    with pytest.raises(ValueError, match="init_from does not fit.*halting"):
        fitted.warm_start(model)
    objective = flexible.Objective(flexible.ObjectiveConfig(halting=True), config)
    optimizer = torch.optim.AdamW(model.halting.parameters(), 3e-3)
    clips = torch.from_numpy(uneven(16 * 60, seed=20)).unflatten(0, (-1, 16, 4)).permute(0, 1, 5, 2, 3, 4)
    rest = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("halting")}
    for step, batch in enumerate(clips.repeat(8, 1, 1, 1, 1, 1)):
        loss = objective(model, Clip(keys=["x"] * 16, video=batch.float() / 127.5 - 1), step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest and p.grad is None)
    model.eval()
    source, out = video(tmp_path / "in.mkv", uneven(40)), tmp_path / "x.vtok"
    assert "not calibrated" in codec.encode_file(model, source, out, asked=Asked(predicted_psnr_db=24.0)).note
    measured = measure(model, [Video(name, iter(frames)) for name, frames in videos_of(40, seed=2)])
    assert measured.psnr.shape == (40 * 6, 32) and measured.codes.shape[:2] == (40 * 6, 32)
    held_out = videos_of(30, seed=3)
    wanted = [
        float(measured.psnr[:, k - 1].median()) for k in (4, 10, 20)
    ]  # what half of the blocks reach with k tokens
    before = against_search(model, held_out, wanted)
    model.halting.calibrate(measured.codes, measured.psnr, measured.video)
    after = against_search(model, held_out, wanted)
    assert len(after) == 3 and usual_levels(measured.psnr) == sorted(usual_levels(measured.psnr))
    curves = measure(model, [Video(name, iter(frames)) for name, frames in held_out]).psnr
    for row, raw in zip(after, before):
        assert row.missed <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / row.videos) and row.missed < raw.missed, (row, raw)
        reached = curves[curves.amax(1) >= row.wanted_db] >= row.wanted_db
        fixed = int((reached.float().mean(0) >= 1 - row.missed).nonzero()[0]) + 1
        assert row.searched <= row.predicted < fixed, "one length for all blocks does as well"
    done = codec.encode_file(model, source, out, asked=Asked(predicted_psnr_db=wanted[1]))
    header, lengths = lengths_in(out, model)
    assert header.asked == "predicted_psnr_db" and len(set(lengths)) > 2 and "90% of the blocks" in done.note
    note = codec.encode_file(model, source, out, asked=Asked(predicted_psnr_db=63.0)).note
    assert "too few calibration videos" in note and set(lengths_in(out, model)[1]) == {32}


@pytest.mark.slow
def test_the_chain_of_commands(tmp_path, capsys):
    """Tokenizer, head, calibration on videos of neither, and a file at a predicted length."""
    synthetic.write_corpus(
        tmp_path / "videos", clips=60, seconds=2, size=(32, 32), fps=8, complexity=(0, 1), workers=1, progress=False
    )
    where = tmp_path / "shards"
    names = [str(path) for path in sorted((tmp_path / "videos").rglob("*.mp4"))]
    shards.main([*names, "--out", str(where), "--val-fraction", "0.4"])
    common = [f"data.shards={where / 'train'}", f"out={tmp_path}", "data.num_workers=0", "trainer.progress=false"]
    common += ["trainer.tensorboard=false", "trainer.max_steps=12", "data.batch_size=4"]
    configs = str(codec.__file__).rpartition("vtok")[0] + "configs/flexible/"
    for args in (
        ["train", f"{configs}base_tiny.yaml", *common, "name=tokenizer", "trainer.statistics_clips=64"],
        ["export", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "export"), "--no-entropy"],
        ["train", f"{configs}halting_tiny.yaml", *common, "name=head", f"init_from={tmp_path / 'export'}"],
        ["calibrate", str(tmp_path / "tokenizer"), "--shards", str(where / "val"), "--out", str(tmp_path / "no")],
    ):
        code = vtok_main(args)
        assert code == (1 if args[0] == "calibrate" else 0), args
    assert "has no halting head" in capsys.readouterr().err
    out = tmp_path / "calibrated"
    args = ["--shards", str(where / "val"), "--against", str(where / "val"), "--out", str(out)]
    assert vtok_main(["calibrate", str(tmp_path / "head"), *args]) == 0
    told = capsys.readouterr().out
    facts = json.loads((out / "halting.json").read_text())
    model = load(out)
    assert "calibrated on" in told and model.halting.calibrated
    assert facts["calibration"]["videos"] == int(model.halting.videos[0]) >= 15 and facts["coverage"] == 0.9
    for row in facts["held_out"]["rows"]:  # of the very videos calibrated on, so this cannot fail by chance
        assert row["missed"] <= 0.1 and row["predicted"] >= row["searched"]
    asked = ["encode", str(out), names[0], "--out", str(tmp_path / "x.vtok"), "--predict-psnr"]
    assert vtok_main([*asked, str(facts["held_out"]["rows"][0]["wanted_db"])]) == 0
    assert "of the blocks" in capsys.readouterr().out
