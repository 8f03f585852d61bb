"""A projector's whole life: trained between a frozen tower and a frozen LLM, killed and gone on with, measured beside
the training-free reducers. Tower and LLM are real classes with small random weights."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_contract import PROJECTORS
from test_llm import small_model, small_tokenizer

import vtok
from vtok.config import load as load_config
from vtok.config import loads
from vtok.data import shards, synthetic
from vtok.evaluate import main as evaluate
from vtok.evaluation.answer_report import write_answer_report
from vtok.evaluation.answering import AnsweringEvaluator, print_answers
from vtok.evaluation.compare import compare
from vtok.export import main_export
from vtok.families import reducer
from vtok.features import main as record
from vtok.layers import projector
from vtok.layers.weights import file_sha256
from vtok.llm import Answered, LLMConfig, attach, load_llm
from vtok.loading import load_run
from vtok.train import build, train
from vtok.training import strategy
from vtok.training.lit_projector import LitProjector, _scores
from vtok.vision import TowerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from tiny_tower import write_tower

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("projector")
    synthetic.write_corpus(
        root / "corpus", clips=12, seconds=1, size=(32, 32), fps=8, complexity=(0, 1), val_fraction=0.5, workers=1,
        progress=False,
    )  # fmt: skip
    shards.main([str(root / "corpus" / "captions.jsonl"), "--out", str(root / "shards"), "--workers", "1"])
    torch.manual_seed(3)
    tokenizer = small_tokenizer("llama")
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    write_tower(root / "tower", size=32, patch=8, width=16, depth=3)
    return root


def settings(lab: Path, name: str, model: str, **more: str) -> str:
    return f"""
name: {name}
out: {lab / "runs"}
{more.get("top", "")}
model: {{{model}, tower: {{name: {lab / "tower"}}}}}
objective: {{llm: {{name: {lab / "llm"}}}, max_answer: 24, {more.get("objective", "")}}}
data: {{shards: {lab / "shards" / "train"}, val_shards: {lab / "shards" / "val"}, num_frames: 4, fps: 4.0,
       size: [32, 32], batch_size: 2, val_batch_size: 3, num_workers: 0}}
optim: {{lr: 1.0e-3, warmup_steps: 1, schedule: constant}}
trainer: {{max_steps: {more.get("steps", "4")}, devices: 1, accelerator: cpu, log_every: 1, val_every: 2,
          sample_every: 2, progress: false, tensorboard: false}}
eval: {{budgets: [1, 4]}}
"""


def weights(model: torch.nn.Module) -> str:
    """A hash of the tensors in memory."""
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in state)).hexdigest()


@pytest.fixture(scope="module")
def stage0(lab) -> Path:
    """The export of a run whose projector reads every token."""
    run = train(loads(settings(lab, "stage0", "name: reducer")))
    main_export([str(run), "--out", str(lab / "stage0")])
    return lab / "stage0"


def test_a_run_validates_answers_and_changes_nothing_frozen(lab, stage0, monkeypatch):
    llm, read, towers, load = load_llm(LLMConfig(name=str(lab / "llm"))), [], [], projector._load_tower
    llm.model.register_forward_hook(lambda *_: read.append(1))  # shared with the run as long as it is held
    monkeypatch.setattr(projector, "_load_tower", lambda config: towers.append(load(config)) or towers[-1])
    before = weights(llm.model)
    pooled = "name: reducer, method: pooling, max_tokens: 16"
    run = train(
        loads(settings(lab, "pooling", pooled, top=f"init_from: {stage0}", objective="budgets: {values: [1, 4]}"))
    )
    assert weights(llm.model) == before and read, "the very language model that the run read with"
    untouched = weights(load(TowerConfig(name=str(lab / "tower"))).model)
    assert towers and all(weights(tower.model) == untouched for tower in towers)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (val, *_) = [line for line in lines if "val/loss" in line]
    assert {"val/accuracy_1", "val/accuracy_4", "val/colour_accuracy_4", "val/positions_4"} <= val.keys()
    assert val["val/positions_4"] == val["val/positions_1"] + 3
    assert val["val/accuracy"] == val["val/accuracy_4"]
    assert (val["val/tokens_1"], val["val/tokens_4"]) == (1, 4)
    assert val["val/loss_4"] > 0 and val["val/compress_ms_4"] > 0 and val["val/compress_flops_4"] > 0
    text = (run / "samples" / "step-00000002.md").read_text()
    assert "| 1 tokens | 4 tokens |" in text and "What colour" in text
    kept = strategy.consolidate(run / "checkpoints" / "last.ckpt")
    assert {name.split(".")[0] for name in kept} == {"model"}, "neither the tower nor the LLM is in a checkpoint"
    written = loads((run / "config.yaml").read_text()).model
    assert (written.in_dim, written.embedding_dim) == (16, 32) and written.embedding_rms > 0


class _Counted:
    """A model whose calls are counted; asked as the model is."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, clip, **asked):
        self.calls += 1
        return self.model.encode(clip, **asked)


def _lit(lab, *, ranks: int = 1, budgets: str = "[1, 4]", **more: str) -> LitProjector:
    text = settings(lab, "x", "name: reducer, method: pooling, max_tokens: 16", **more)
    lit = build(loads(text.replace("budgets: [1, 4]}\n", f"budgets: {budgets}}}\n")))
    lit._trainer = SimpleNamespace(strategy=None, world_size=ranks, global_rank=0)
    assert isinstance(lit, LitProjector)
    return lit.eval()


@torch.no_grad()
def test_every_validation_draws_the_same_tasks_and_budgets(lab):
    lit = _lit(lab, objective="budgets: {law: log_uniform}")
    clip, found = next(iter(_val(lab))), []
    for lit.steps_done in (2, 4, 6):
        found.append(lit.val_loss(clip, 0))
    assert found[0] == found[1] == found[2], "the weights are the same"
    assert len({lit.val_loss(clip, index)["tokens"] for index in range(6)}) > 1, "another batch, another draw"


@torch.no_grad()
def test_ranks_call_the_model_as_often_whether_clips_have_questions(lab):
    lit, calls = _lit(lab), []
    clip = next(iter(_val(lab)))
    for qa in (clip.qa, None):
        counted = _Counted(lit.model)
        lit.__dict__["model"] = counted  # before the registered module
        ours = lit.measure(replace(clip, qa=qa), 1)["mean"]
        lit.answers(replace(clip, qa=qa))
        calls.append(counted.calls)
    assert calls[0] == calls[1] > 0 and "accuracy_4" not in ours and min(ours["compress_ms_4"]) > 0


@torch.no_grad()
def test_ranks_agree_on_the_budgets_of_validation(lab, monkeypatch):
    clip, other = next(iter(_val(lab))), [(1, 4, 16, 64)]

    def gather(parts, own):
        assert own == (1, 4, 16)
        parts[:] = [own, *other]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for theirs, agreed in (((1, 4, 16, 64), (1, 4, 16, 64)), ((1, 4, 8), (1, 4, 16)), ((), (1, 4, 16))):
        lit, other[:] = _lit(lab, ranks=2, budgets="[]"), [theirs]
        lit.settle(clip)
        assert lit.menu == agreed
        lit.settle(None)  # settled once


def test_validation_says_what_it_found_at_each_budget():
    open_ended = Answered("a", "0", "count", "How many?", "two", [], [], "Two.", tokens=4, positions=30)
    chosen = Answered("a", "1", "colour", "Which?", "red", ["blue", "red"], [-3.0, -0.5], None, tokens=4, positions=32)
    means = {"val/clips": 2, "val/loss": 9.0, "val/compress_ms_4": 1.5, "val/compress_flops_4": 2.5e9}
    for each in (open_ended, chosen):
        means |= {f"val/{key}_4": value for key, value in _scores(each).items()}
    means |= {key.replace("_4", "_14"): 7.0 for key in means if key.endswith("_4")}
    (line,) = LitProjector.told(SimpleNamespace(menu=(4, None)), means)
    assert line == (
        "4 tokens in prompts of 32 positions; right 100.0 % (colour 100.0); exact match 100.0 % (count 100.0); "
        "loss 0.500; compressor 1.5 ms, 2.5 GFLOP a clip"
    )


def test_a_run_goes_on_where_it_stopped(lab, stage0):
    """The widths that were read off tower and LLM are no change of the model."""
    text = settings(lab, "short", "name: reducer", steps="2")
    train(loads(text))
    run = train(loads(text.replace("max_steps: 2", "max_steps: 4")))
    runs = (run, lab / "runs" / "stage0")
    ends = [strategy.consolidate(r / "checkpoints" / "last.ckpt") for r in runs]
    same = {name for name in ends[0] if torch.equal(ends[0][name], ends[1][name])}
    assert len(same) == len(ends[0])


SIZES = {
    "language": "source: video, lm: {name: LLM}, window: 2, num_tokens: 8, max_tokens: 16",
    "reducer": "method: tome, max_tokens: 16",
    "temporal": "max_tokens: 16, window: 2, former: {num_queries: 2, width: 16, depth: 2, num_heads: 2}, "
    "summary: {num_tokens: 2, width: 16, depth: 2, num_heads: 2}",
    "vqtoken": "num_tokens: 16",
}


class Poison(list):
    """A list that may be counted and carried along, but not looked into."""

    def _refuse(self, *_):
        raise AssertionError("encode looked at the answer")

    __iter__ = __getitem__ = __contains__ = __eq__ = __reversed__ = _refuse


@pytest.mark.parametrize("family", sorted(PROJECTORS))
def test_every_family_trains_ships_and_never_sees_the_answer(lab, stage0, family):
    sizes = SIZES[family].replace("LLM", str(lab / "llm"))
    text = settings(lab, family, f"name: {family}, {sizes}", top=f"init_from: {stage0}", steps="2")
    run = train(loads(text))
    out = lab / f"export-{family}"
    main_export([str(run), "--out", str(out)])
    before, after = load_run(run)[0], vtok.load(str(out))
    clip = next(iter(_val(lab)))
    clip.target, clip.qa = Poison([""] * len(clip)), Poison([[]] * len(clip))
    for budget in (1, 5, 16):
        tokens = before.encode(clip, budget=budget)
        assert tokens.lengths.tolist() == [budget] * len(clip)
        assert torch.equal(tokens.embeddings, after.encode(clip, budget=budget).embeddings)
    assert not any("tower" in name or "llm" in name for name in after.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert before.encode(clip, budget=5).embeddings.isfinite().all()


def test_widths_that_do_not_fit_are_refused(lab):
    with pytest.raises(ValueError, match="model.embedding_dim=48, but the words"):
        build(loads(settings(lab, "x", "name: reducer, embedding_dim: 48")))


def test_eval_measures_the_run_beside_everything_training_free(lab, stage0, tmp_path, capsys):
    name = "name: reducer, method: kmeans, max_tokens: 16"
    run = train(loads(settings(lab, "kmeans", name, objective="budgets: {values: [4]}")))
    evaluate([str(run), "--full", str(stage0), "--controls", "divprune,visionzip,hiprune", "--seeds", "2",
              "--answers", "4", "--out", str(tmp_path), "--no-progress"])  # fmt: skip
    found = json.loads((tmp_path / "eval.json").read_text())
    rows = {(row["method"], row["budget"]): row for row in found["rows"]}
    controls = ("random", "uniform", "pooling", "downsample", "divprune", "visionzip", "hiprune")
    assert set(rows) == {("blind", 0), ("full", None)} | {(m, b) for m in ("reducer", *controls) for b in (1, 4)}
    asked = rows["blind", 0]["questions"]
    assert asked > 6 and rows["random", 4]["questions"] == 2 * asked
    for (method, budget), row in rows.items():
        if budget:
            assert row["tokens_mean"] == budget, method
            assert row["positions_mean"] == pytest.approx(rows["blind", 0]["positions_mean"] + budget)
        assert 0 <= row["accuracy"] <= 1 and row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1]
        assert row["loss"] > 0 and row["exact_match"] is not None
        mean = sum(row["by_type"].values()) / len(row["by_type"])
        assert 0 <= mean <= 1
    assert rows["full", None]["tokens_mean"] == 4 * 16
    assert rows["full", None]["prefill_flops"] > 2 * rows["pooling", 1]["prefill_flops"]
    assert rows["pooling", 4]["kv_bytes"] > rows["pooling", 1]["kv_bytes"] > 0
    page = (tmp_path / "report.html").read_text()
    assert "cannot tell compressors apart" in page and "<canvas data-clip" in page and "What colour" in page
    assert [each["budget"] for each in found["versus"]] == [1, 4] and all(row["ttft_ms"] > 0 for row in found["rows"])
    assert rows["reducer", 4]["compress_flops"] > 0 and found["llm"]["sha256"] == file_sha256(
        lab / "llm" / "model.safetensors"
    )
    with pytest.raises(ValueError, match="no clip has a question with an answer"):  # of what three frames show
        evaluate([str(run), "--frames", "3", "--out", str(tmp_path / "shorter"), "--no-progress"])
    assert "chance" in capsys.readouterr().out


def test_an_export_gives_the_same_tokens(lab, stage0):
    before, after = load_run(lab / "runs" / "stage0")[0], vtok.load(str(stage0))
    clip = next(iter(_val(lab)))
    assert torch.equal(before.encode(clip).embeddings, after.encode(clip).embeddings)
    assert not [name for name in after.state_dict() if not name.startswith("projector.")]


def _val(lab):
    from vtok.data.module import ClipDataModule

    return ClipDataModule(loads(settings(lab, "x", "name: reducer")).data).val_dataloader()


def test_a_table_without_stage_0_says_so(lab, stage0):
    model = vtok.load(str(stage0))
    llm = load_llm(LLMConfig(name=str(lab / "llm")))
    template = "<video>\nQuestion: {question}\nAnswer:"
    found = AnsweringEvaluator(model, llm, val=_val(lab), template=template, budgets=[64], progress=False).run()
    assert {row["method"] for row in found["rows"]} == {"blind", "reducer"}
    assert all(row["retained"] is None and "no full-token row" in row["note"] for row in found["rows"])
    with pytest.raises(ValueError, match="divprun"):
        AnsweringEvaluator(model, llm, val=[], template=template, reducers=["divprun"])


def test_what_features_cannot_give_is_left_undefined(lab, stage0, capsys):
    model, llm = vtok.load(str(stage0)), load_llm(LLMConfig(name=str(lab / "llm")))
    name = model.config.tower.name
    with torch.no_grad():
        val = [replace(c, video=None, features={name: model.features(c.as_float())}) for c in _val(lab)]
    template = "<video>\nQuestion: {question}\nAnswer:"
    found = AnsweringEvaluator(
        model, llm, full=model, val=val, template=template, budgets=[4], seeds=1, progress=False
    ).run()
    (row,) = (row for row in found["rows"] if row["method"] == "downsample")
    assert row["tokens_mean"] is row["accuracy"] is None and "shards hold features" in row["note"]
    print_answers(found)
    write_answer_report(found, [], lab / "features.html")
    assert "downsample" in capsys.readouterr().out and "downsample" in (lab / "features.html").read_text()


@pytest.mark.parametrize("name", ["reducer/tiny", "vqtoken/tiny", "reducer/tiny_pooling"])
def test_features_of_a_preset_are_what_it_trains_on(lab, stage0, tmp_path, name):
    """The two steps of docs/projectors.md, with the same preset in both."""
    preset = str(Path(__file__).parent.parent / "configs" / f"{name}.yaml")
    own = [f"model.tower.name={lab / 'tower'}", "data.num_frames=4", "data.size=[32,32]"]
    own += ["model.method=visionzip", "model.attention_layers=[-2]"] if name.endswith("pooling") else []
    where = [str(lab / "shards"), "--config", preset, *own, "--out", str(tmp_path / "seen"), "--workers", "0"]
    record([*where, "--quiet"])
    own += [f"data.shards={tmp_path / 'seen' / 'train'}", f"data.val_shards={tmp_path / 'seen' / 'val'}"]
    own += [f"objective.llm.name={lab / 'llm'}", f"out={tmp_path}", "trainer.max_steps=1", "data.batch_size=2"]
    own += ["trainer.progress=false", "trainer.tensorboard=false", "optim.warmup_steps=1", "data.num_workers=0"]
    config = load_config(preset, [*own, *([f"init_from={stage0}"] if name != "reducer/tiny" else [])])
    assert (train(config) / "checkpoints" / "last.ckpt").exists()
    for extra, message in (
        (["--dtype", "bfloat16"], "--dtype beside --config"),
        (["data.crop=random"], "a cache holds one view of each clip"),
        (["model.tower.name=''"], "names no model.tower.name"),
    ):
        with pytest.raises(ValueError, match=message):
            record([*where, *extra])
    with pytest.raises(ValueError, match="give --tower NAME and options, or --config"):
        record([str(lab / "shards"), "--out", str(tmp_path / "x")])


def test_the_same_weights_in_two_places_are_one_tower(lab, stage0, tmp_path):
    model, full = vtok.load(str(stage0)), vtok.load(str(stage0))
    shutil.copytree(lab / "tower", tmp_path / "moved")
    full.config = replace(full.config, tower=replace(full.config.tower, name=str(tmp_path / "moved")))
    with torch.no_grad():
        name = model.config.tower.name
        val = [replace(c, video=None, features={name: model.features(c.as_float())}) for c in _val(lab)]
    llm, template = load_llm(LLMConfig(name=str(lab / "llm"))), "<video>\nQuestion: {question}\nAnswer:"
    how = dict(full=full, tuned=full, val=val, template=template, budgets=[4], seeds=1, progress=False)
    rows = {row["method"]: row for row in AnsweringEvaluator(model, llm, **how).run()["rows"]}
    assert rows["full"]["accuracy"] == rows["reducer"]["accuracy"] and rows["pooling"]["questions"] > 0
    write_tower(tmp_path / "other", size=32, patch=8, width=16, depth=2)
    other = vtok.load(str(stage0))
    other.config = replace(other.config, tower=replace(other.config.tower, name=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="goes with a full-token model"):
        AnsweringEvaluator(model, llm, **(how | dict(full=model, tuned=other)))


@pytest.mark.parametrize("kind", ["VideoMAE", "Beit"])
def test_towers_that_see_no_smaller_video_leave_its_row_undefined(lab, kind, tmp_path):
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32)
    own = dict(num_frames=4, tubelet_size=2) if kind == "VideoMAE" else {}
    torch.manual_seed(0)
    part = {"VideoMAE": "VideoMAEModel", "Beit": "BeitModel"}[kind]
    getattr(transformers, part)(getattr(transformers, f"{kind}Config")(**small, patch_size=8, **own)).save_pretrained(
        tmp_path
    )
    processor = transformers.VideoMAEImageProcessor if kind == "VideoMAE" else transformers.ViTImageProcessor
    crop = dict(do_center_crop=False) if kind == "VideoMAE" else {}
    processor(size={"height": 32, "width": 32}, **crop).save_pretrained(tmp_path)
    tower = TowerConfig(name=str(tmp_path))
    model = reducer.Model(reducer.Config(tower=tower, in_dim=16, embedding_dim=32, embedding_rms=1.0)).eval()
    model.tower.any_size &= kind == "VideoMAE"
    llm, template = load_llm(LLMConfig(name=str(lab / "llm"))), "<video>\nQuestion: {question}\nAnswer:"
    how = dict(full=model, val=_val(lab), template=template, budgets=[2], seeds=1, progress=False)
    rows = {row["method"]: row for row in AnsweringEvaluator(model, llm, **how).run()["rows"]}
    why = "needs an image tower" if kind == "VideoMAE" else "sees frames of one size only"
    assert rows["downsample"]["accuracy"] is None and why in rows["downsample"]["note"]
    assert rows["pooling"]["accuracy"] is not None


def test_reducers_stand_on_the_projector_that_is_named(lab, stage0):
    full, tuned = vtok.load(str(stage0)), vtok.load(str(stage0))
    with torch.no_grad():
        tuned.projector.shift.normal_(std=3.0)
    llm = load_llm(LLMConfig(name=str(lab / "llm")))
    settings = dict(val=list(_val(lab)), template="<video>\nQuestion: {question}\nAnswer:", budgets=[4], progress=False)
    tables = []
    for base in (None, full, tuned):
        found = AnsweringEvaluator(full, llm, full=full, tuned=base, seeds=1, **settings).run()["rows"]
        tables.append({row["method"]: row["loss"] for row in found})
    assert tables[0] == tables[1]
    changed = {name for name in tables[0] if tables[0][name] != tables[2][name]}
    assert changed == {"random", "uniform", "pooling", "downsample"}
    with pytest.raises(ValueError, match="goes with a full-token model"):
        AnsweringEvaluator(full, llm, tuned=tuned, **settings)


def test_batches_without_questions_cost_nothing_and_count_nowhere(lab, stage0):
    model, llm = vtok.load(str(stage0)), load_llm(LLMConfig(name=str(lab / "llm")))
    template = "<video>\nQuestion: {question}\nAnswer:"
    asked = list(_val(lab))
    deaf = [replace(clip, keys=[f"{key}-deaf" for key in clip.keys], qa=None) for clip in asked]
    evaluator = AnsweringEvaluator(model, llm, val=[*deaf, *asked], template=template, progress=False)
    rows: dict = {}
    with torch.inference_mode():
        for clip in evaluator.val:
            evaluator._batch(clip.as_float(), rows)
    (row,) = (row for (method, _), row in rows.items() if method == "reducer")
    assert len(row.compress_s) == sum(map(len, asked)) and min(row.compress_s) > 0


def test_the_time_of_downsampling_is_without_the_loading_of_its_towers(lab, stage0, monkeypatch):
    model, llm = vtok.load(str(stage0)), load_llm(LLMConfig(name=str(lab / "llm")))
    sizes: list[tuple[int, ...]] = []
    load = projector._load_tower

    def counted(config):
        sizes.append(tuple(config.size))
        return load(config)

    monkeypatch.setattr(projector, "_load_tower", counted)
    template = "<video>\nQuestion: {question}\nAnswer:"
    how = dict(full=model, val=[*_val(lab)] * 2, template=template, budgets=[1, 4, 9], seeds=1, progress=False)
    AnsweringEvaluator(model, llm, **how).run()
    assert len(how["val"]) > 2 and len(sizes) == len(set(sizes)), "each size once, before its time is taken"


def test_the_loss_is_of_the_choice_that_counts_as_right():
    said = Answered("a", "1", "colour", "Which?", "Red.", ["blue", "red"], [-3.0, -0.5], None, tokens=4, positions=32)
    assert said.right and said.loss == 0.5 == _scores(said)["loss"]
    wrong = replace(said, answer="green")
    assert wrong.right is False and wrong.loss is None and "loss" not in _scores(wrong)
    means = {"tokens": 4, "positions": 9, "accuracy": 0.5, "colour_accuracy": 0.5, "repeated_accuracy": 0.9}
    means = {f"val/{key}_4": value for key, value in (means | {"compress_ms": 1.0}).items()}
    (line,) = LitProjector.told(SimpleNamespace(menu=(4,)), means)
    assert "right 50.0 % (colour 50.0);" in line, "a text that is repeated is no question"


def test_questions_are_told_apart_without_ids_of_their_own(lab, stage0, monkeypatch):
    clips = list(_val(lab))
    for clip in clips:
        clip.qa = [[{**each, "id": ""} for each in own] for own in clip.qa]
    monkeypatch.setattr("vtok.evaluation.compare._loader", lambda *_, **__: clips)
    asked = sum(bool(each.get("choices")) for clip in clips for own in clip.qa for each in own)
    (row,) = compare(str(stage0), str(stage0), own="here", progress=False)["corpora"][0]["rows"]
    assert row["measured"] == asked > sum(map(len, clips))


def test_models_are_compared_as_far_as_both_go(lab, stage0, monkeypatch):
    def pooled(most: int) -> str:
        made = vtok.load(str(stage0))
        made.config = replace(made.config, method="pooling", max_tokens=most)
        model = type(made)(made.config)
        model.load_state_dict(made.state_dict())
        return model.eval()

    models = {"small": pooled(4), "large": pooled(16)}
    config = loads(settings(lab, "x", "name: reducer"))
    loaded = {name: (model, config.data, replace(config.eval, budgets=[])) for name, model in models.items()}
    monkeypatch.setattr("vtok.evaluation.compare.load_model", lambda name: loaded[name])
    llm = load_llm(config.objective.llm)
    monkeypatch.setattr("vtok.evaluation.compare.reader_of", lambda _, llm="", it=llm: (config.objective, it))
    monkeypatch.setattr("vtok.evaluation.compare.identify", lambda _: SimpleNamespace(model_id=""))
    monkeypatch.setattr("vtok.evaluation.compare._loader", lambda *_, **__: list(_val(lab)))
    for pair in (("small", "large"), ("large", "small")):
        found = compare(*pair, own="here", progress=False)["corpora"][0]["rows"]
        assert [row["budget"] for row in found] == [1, 4], pair


def test_a_run_is_measured_through_the_adapters_that_its_llm_learned(lab, stage0, tmp_path, capsys):
    name, more = "name: reducer, method: pooling, max_tokens: 16", "budgets: {values: [4]}, lora: {rank: 2}"
    text = settings(lab, "adapted", name, objective=more, steps="6").replace("lr: 1.0e-3", "lr: 5.0e-2")
    run = train(loads(text.replace("val_every: 2", "val_every: 6")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (val,) = [line for line in lines if "val/loss_4" in line]
    export = tmp_path / "export"
    main_export([str(run), "--out", str(export)])

    def measured(path, *options: str) -> dict:
        evaluate([str(path), "--budgets", "1,4", "--out", str(tmp_path / "out"), "--no-progress", *options])
        return json.loads((tmp_path / "out" / "eval.json").read_text())

    losses = {}
    for path in (run, export):
        found = measured(path)
        rows = {row["budget"]: row for row in found["rows"] if row["method"] == "reducer"}
        losses[path] = [rows[budget]["loss"] for budget in (1, 4)]
        assert losses[path] == pytest.approx([val["val/loss_1"], val["val/loss_4"]], rel=1e-5)
        assert len(found["llm"]["adapters_sha256"]) == 64 and "has the adapters that it learned" in rows[4]["note"]
        (row,) = compare(str(path), str(path), budgets=[4], progress=False)["corpora"][0]["rows"]
        assert row["after"] == pytest.approx(rows[4]["accuracy"])
    plain = AnsweringEvaluator(
        vtok.load(str(export)), load_llm(LLMConfig(name=str(lab / "llm"))), val=_val(lab), budgets=[4], progress=False,
        template="<video>\nQuestion: {question}\nAnswer:",
    ).run()  # fmt: skip
    (row,) = (row for row in plain["rows"] if row["method"] == "reducer")
    assert abs(row["loss"] - losses[run][1]) > 0.01 and "adapters_sha256" not in plain["llm"]
    for options, message in (
        (("--llm", str(lab / "llm")), "belong to no other LLM"),
        (("--tuned", str(run)), "a table has one LLM"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(stage0 if "--tuned" in options else run, *options)
    with pytest.raises(ValueError, match="its tokens are read through adapters that its LLM learned"):
        build(loads(settings(lab, "taught", name, objective=f"teacher: {export}, logits: 1.0")))
    with pytest.raises(ValueError, match="put them into its language model first"):
        vlm = SimpleNamespace(config=SimpleNamespace(model_type="llava"), named_parameters=lambda: [("lm.weight", 0)])
        attach(vtok.load(str(export)), vlm)
    (export / "adapters.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not what config.json was written for"):
        measured(export)
