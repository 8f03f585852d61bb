"""The evaluator on a real (tiny, untrained) flexible tokenizer: rows, nulls with reasons, strict JSON, same windows."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vtok.evaluate import READ_BY, _check_read, _parser, print_table, results_folder, showcase
from vtok.evaluation import evaluator as evaluator_room
from vtok.evaluation.evaluator import Evaluator, bits_of_lengths, default_budgets
from vtok.evaluation.rows import bootstrap, without_nan
from vtok.families.flexible import Config, Model
from vtok.metrics.distortion import clip_psnr
from vtok.types import Clip, to_uint8

BUDGETS = [1, 4, 8]


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = Config(
        num_frames=4,
        size=[16, 16],
        patch=[2, 8, 8],
        width=16,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
        num_tokens=8,
    )
    return Model(config).eval()


def batches(count: int, *, seed: int, lengths: bool = False, times: bool = True) -> list[Clip]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for first in range(0, count, 4):
        size = min(4, count - first)
        coarse = torch.rand(size, 3, 2, 4, 4, generator=generator) * 255
        video = torch.nn.functional.interpolate(coarse, size=(4, 16, 16), mode="trilinear").to(torch.uint8)
        out.append(
            Clip(
                keys=[f"{seed}-{first + i}" for i in range(size)],
                video=video,
                lengths=torch.tensor([4, 3, 2, 4][:size]) if lengths else None,
                times=(torch.arange(4) / 8.0).expand(size, 4) if times else None,
            )
        )
    return out


def printed(result) -> str:
    out = io.StringIO()
    print_table(result, Console(file=out, width=80))
    return out.getvalue()


def check_against_x264(result, rows):
    """An untrained model of 128 bits: x264's floor is above it, and nothing is in common."""
    nominal, static = result["against_codecs"]
    assert (nominal["codec"], nominal["rate"], static["rate"]) == ("x264", "bits_mean", "entropy_bits_mean")
    smallest = nominal["codec_curve"][0]
    for entry in (nominal, static):
        assert entry["bd_psnr_db"] is None
        for point in entry["matched"]:
            row = rows["flexible", point["budget"]]
            assert point["psnr_db"] == pytest.approx(row["psnr_db"])
            assert point["bits"] == pytest.approx(row[entry["rate"]])
            if point["psnr_db"] < smallest[1]:
                assert point["where"] == "floor" and point["codec_bits"] == smallest[0]
    floor = rows["x264", 1]
    assert smallest == pytest.approx([floor["bits_mean"], floor["psnr_db"]])


def test_rows_are_measured_on_the_same_windows_and_are_strict_json(model):
    val = batches(6, seed=1, lengths=True)
    evaluator = Evaluator(
        model, val=val, train=batches(12, seed=0), budgets=BUDGETS, codecs=["x264"], processes=0, progress=False
    )
    result = evaluator.run(model="tiny", shards="somewhere")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["schema"] == 1 and result["family"] == "flexible" and result["clips"] == 6
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    methods = ["flexible", "dct", "downsample", "x264"]
    assert set(rows) == {(m, b) for m in methods for b in BUDGETS} | {("mean_colour", None), ("mean_frame", None)}
    for (method, budget), row in rows.items():
        assert (
            row["clips"] == 6 and row["psnr_db"] > 0 and row["psnr_db_ci"][0] <= row["psnr_db"] <= row["psnr_db_ci"][1]
        )
        assert row["lpips"] is None and "lpips" in row["note"]
        assert row["bits_per_second"] > 0 and row["bits_per_pixel"] > 0
        if method == "flexible":
            assert row["tokens_mean"] == budget and row["bits_mean"] == pytest.approx(budget * math.log2(64000))
            assert row["entropy_bits_mean"] > 0 and row["encode_seconds_per_clip"] > 0
            assert len(row["usage_per_position"]) == budget
            assert row["ids_counted"] == 6 * budget and 0 < row["usage"] <= row["usage_possible"]
        else:
            assert row["tokens_mean"] is None and row["entropy_bits_mean"] is None and "tokenizers only" in row["note"]
        if method in ("dct", "downsample"):
            assert row["bits_mean"] <= rows["flexible", budget]["bits_mean"]
        if method == "x264":
            assert "below the codec's floor for 6 of 6 clips" in row["note"]
            assert row["bits_mean"] > rows["flexible", budget]["bits_mean"]
    assert rows["flexible", 1]["worse_share"] is None and "worse_share" in rows["flexible", 1]["note"]
    scores = result["per_clip"]["psnr_db"]["flexible"]
    worse = sum(b < a for a, b in zip(scores["1"], scores["4"])) / 6
    assert rows["flexible", 4]["worse_share"] == pytest.approx(worse)
    # the same numbers by hand, padding left out
    with torch.inference_mode():
        hand = []
        for clip in val:
            recon = to_uint8(model.decode(model.encode(clip.as_float(), budget=4), size=(16, 16)))
            hand += clip_psnr(recon[:, :, :4], clip.video, clip.lengths).tolist()
    assert scores["4"] == pytest.approx(hand) and rows["flexible", 4]["psnr_db"] == pytest.approx(sum(hand) / 6)
    assert result["per_clip"]["keys"] == [key for clip in val for key in clip.keys]
    for key in ("python", "torch", "codecs", "cpu", "seed", "device"):
        assert result["environment"][key] is not None
    check_against_x264(result, rows)
    text = printed(result)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "PSNR" in text and "x264" in text and "*" in text and f"{rows['flexible', 4]['psnr_db']:.2f}" in text
    assert rows["x264", 4]["below_floor"] == 1.0
    shown = showcase(evaluator, result, fps=8.0, each=1)
    assert sorted(clip["tags"][0] for clip in shown) == ["best", "random", "worst"]
    for clip in shown:
        at = result["per_clip"]["keys"].index(clip["key"])
        assert clip["original"].shape == (clip["original"].shape[0], 16, 16, 3) and clip["fps"] == pytest.approx(8.0)
        assert clip["psnr_db"]["4"] == pytest.approx(scores["4"][at], abs=1e-3)
        assert {"1", "4", "8", "dct", "mean_colour"} <= set(clip["reconstructions"])


def test_lengths_that_do_not_follow_from_the_budget_are_counted(model, monkeypatch):
    """Even shares are told by the header once; what a model chose costs what its record spends, in every count."""

    def rows(change):
        own = Model.encode
        with monkeypatch.context() as patch:
            patch.setattr(Model, "encode", lambda self, clip, *, budget=None: change(own(self, clip, budget=budget)))
            settings = dict(train=batches(4, seed=2), budgets=[8, 13], controls=[], progress=False)
            return Evaluator(model, val=long, **settings).run()["rows"]

    long = [replace(b, video=b.video.repeat(1, 1, 2, 1, 1), lengths=None, times=None) for b in batches(4, seed=1)]
    even = rows(lambda tokens: tokens)
    uneven = rows(lambda tokens: tokens.truncate(torch.tensor([[4, 2]] * len(tokens.lengths))))
    for row, other in zip(even, uneven):
        assert row["tokens_mean"] == row["budget"] and other["tokens_mean"] == 6
        assert row["bits_mean"] == pytest.approx(row["budget"] * math.log2(64000))
        assert other["signalling_bits_mean"] == 8 * (3 + 1)  # 0, least, span, and two lengths in a byte
        assert other["bits_mean"] == pytest.approx(6 * math.log2(64000) + 32)
        assert other["bits_per_pixel"] == pytest.approx(other["bits_mean"] / (8 * 16 * 16))
    with monkeypatch.context() as patch:
        patch.setattr(evaluator_room, "bits_of_lengths", lambda tokens, **_: torch.zeros(len(tokens.lengths)))
        free = rows(lambda tokens: tokens.truncate(torch.tensor([[4, 2]] * len(tokens.lengths))))
    assert uneven[0]["entropy_bits_mean"] == pytest.approx(free[0]["entropy_bits_mean"] + 32)
    tokens = model.encode(long[0], budget=13)
    assert bits_of_lengths(tokens, budget=13, most=8).tolist() == [0.0] * 4
    assert bits_of_lengths(tokens, budget=14, most=8).tolist() == [32.0] * 4  # its total is not the budget's
    assert bits_of_lengths(model.encode(long[0]), budget=99, most=8).tolist() == [0.0] * 4


def test_without_training_clips_or_times_the_nulls_have_reasons(model):
    evaluator = Evaluator(model, val=iter(batches(4, seed=1, times=False)), budgets=[2], progress=False)
    rows = {row["method"]: row for row in evaluator.run()["rows"]}
    assert rows["flexible"]["entropy_bits_mean"] is None and "no training clips" in rows["flexible"]["note"]
    assert rows["flexible"]["bits_per_second"] is None and "per second" in rows["flexible"]["note"]
    for name in ("dct", "downsample"):
        assert rows[name]["psnr_db"] is None and rows[name]["clips"] == 0 and "training clips" in rows[name]["note"]
    assert rows["mean_colour"]["bits_mean"] == 16


def test_settings_are_checked(model):
    assert default_budgets(64) == [1, 4, 16, 64] and default_budgets(100) == [1, 4, 16, 64, 100]
    with pytest.raises(ValueError, match="x264, x265, av1"):
        Evaluator(model, val=[], codecs=["h264"])
    with pytest.raises(ValueError, match="mean_colour"):
        Evaluator(model, val=[], controls=["mean"])
    with pytest.raises(ValueError, match="at least one token"):
        Evaluator(model, val=[], budgets=[0])
    evaluator = Evaluator(model, val=batches(2, seed=0), budgets=[9], controls=[], progress=False)
    (row,) = evaluator.run()["rows"]
    assert row["tokens_mean"] == 8 and "too short for 9 tokens" in row["note"]


def test_bootstrap_covers_the_mean_and_needs_two_clips():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(values, seed=0)
    assert low < float(values.mean()) < high and (high - low) == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap(values, seed=0) == [low, high] and bootstrap(values[:1], seed=0) is None
    assert without_nan({"a": [math.nan, 1.0, (math.inf,)]}) == {"a": [None, 1.0, [None]]}


def test_results_of_one_export_do_not_replace_those_of_another(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert results_folder(None, tmp_path / "run") == tmp_path / "run" / "eval"
    assert results_folder(None, tmp_path / "small") == Path("eval/small")
    assert results_folder(None, Path("user/large")) == Path("eval/large")
    assert results_folder(tmp_path / "here", tmp_path / "small") == tmp_path / "here"


@pytest.mark.parametrize(
    "given, kind, words",
    [
        ("--allocations 128:1", "a tokenizer", "--allocations 128:1 is for a projector, and x is a tokenizer: leave"),
        ("--codecs none", "a projector", "--codecs none is for a tokenizer"),
        ("--budgets 4", "a compressor of texts", "--budgets 4 is for a tokenizer or a projector"),
        ("--frames 9", "a tokenizer", "--frames 9 is for a projector"),
        ("--lpips-sha256 0f", "a projector", "--lpips-sha256 0f is for a tokenizer"),
    ],
)
def test_options_that_a_model_does_not_read_are_refused(given, kind, words):
    options = _parser().parse_args(["x", *given.split()])
    with pytest.raises(ValueError, match=words):
        _check_read(options, kind)
    _check_read(_parser().parse_args(["x"]), kind)


def test_every_option_is_read_by_all_kinds_of_models_or_by_some_that_are_named():
    known = set(vars(_parser().parse_args(["x"])))
    some = {name for names in READ_BY.values() for name in names.split()}
    shared = {"model", "which", "shards", "out", "clips", "batch_size", "device", "seed", "no_progress", "no_report"}
    assert some | shared == known and not some & shared


def test_processes_are_as_many_as_the_job_has_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert _parser().parse_args(["run"]).processes == 3
