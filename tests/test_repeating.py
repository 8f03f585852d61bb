"""Texts said again: the measures, the table by ratio, and a run of the text mode from texts to an export."""

from __future__ import annotations

import hashlib
import html
import json
import sys
from pathlib import Path

import pytest
import torch
from test_llm import small_model

import vtok
from vtok.config import loads
from vtok.data.text_shards import pack_texts
from vtok.evaluate import main as evaluate
from vtok.evaluation.repeat_report import told, write_repeat_report
from vtok.evaluation.repeating import RepeatingEvaluator, print_repeats
from vtok.export import main_export
from vtok.families.language import Config, SmallLM, build
from vtok.llm import LLMConfig, load_llm
from vtok.llm.words import words_as_tokens
from vtok.loading import load_run
from vtok.metrics.text import by_place, correct_prefix, sequence_f1
from vtok.train import train
from vtok.training import strategy
from vtok.types import Clip

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import tiny_lm
from demo_texts import story, write_stories

torch.set_num_threads(1)


def test_measures_of_a_repeated_text():
    assert sequence_f1("a b c".split(), "c b a".split()) == 1.0
    assert sequence_f1("a a a".split(), "a b".split()) == pytest.approx(2 * 1 / 5)
    assert sequence_f1([], []) == 1.0 and sequence_f1(["a"], []) == 0.0 == sequence_f1(["a"], ["b"])
    assert correct_prefix("a b x d".split(), "a b c d".split()) == 0.5
    assert correct_prefix("a b c d e".split(), "a b c d".split()) == 1.0 == correct_prefix([], [])
    assert correct_prefix([], ["a"]) == 0.0
    hits = torch.tensor([1.0, 1, 0, 0, 1, 0])
    rows = torch.tensor([0, 0, 0, 0, 1, 1])
    sums, counts = by_place(hits, rows, parts=2)
    assert sums.tolist() == [3, 0] and counts.tolist() == [3, 3]
    assert by_place(torch.ones(3), torch.tensor([0, 0, 2]), parts=10)[1].tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """Stories as shards, and a small language model with their tokenizer."""
    root = tmp_path_factory.mktemp("lab")
    stories = write_stories(root / "texts.jsonl", stories=24, sentences=(2, 3), val_fraction=0.3)
    pack_texts([stories], root / "shards", progress=False)
    settings = tiny_lm.TinyConfig(vocabulary=420)
    tokenizer = tiny_lm.make_tokenizer([story(0, i)["text"] for i in range(24)], settings)
    torch.manual_seed(3)
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 512
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    return root


class Words(torch.nn.Module):
    """A compressor that keeps the first words: truncation by another name."""

    config, max_tokens = Config(), 1000

    def __init__(self, llm):
        super().__init__()
        self.llm = llm

    def encode(self, clip, *, budget):
        assert clip.qa is None and clip.target is None
        return words_as_tokens(self.llm, clip.text).truncate(budget[:, None])


def test_the_table_measures_every_method_at_as_many_tokens(lab, tmp_path):
    llm = load_llm(LLMConfig(name=str(lab / "llm")))
    rows = [story(0, i) for i in range(5)]
    clip = Clip([row["key"] for row in rows], text=[row["text"] for row in rows], qa=[row["qa"] for row in rows])
    prompts = dict(repeat="<video>\nRepeat the text:", question="<video>\nQuestion: {question}\nAnswer:")
    evaluator = RepeatingEvaluator(
        Words(llm), llm, val=[clip.rows(slice(0, 3)), clip.rows(slice(3, 5))], ratios=[4, 8], most_words=6,
        progress=False, **prompts,
    )  # fmt: skip
    found = evaluator.run(model="words")
    table = {(row["method"], row["ratio"]): row for row in found["rows"]}
    assert set(table) == {("blind", None), ("words", 1.0)} | {
        (method, ratio) for method in ("language", "truncation", "mean_pool") for ratio in (4.0, 8.0)
    }
    assert found["clips"] == 5 and table["words", 1.0]["tokens_mean"] == found["words_mean"]
    same = {k: v for k, v in table["language", 4.0].items() if k != "method"}
    assert same == {k: v for k, v in table["truncation", 4.0].items() if k != "method"}
    assert table["mean_pool", 4.0]["loss"] != same["loss"] != table["truncation", 8.0]["loss"]
    for (_, ratio), row in table.items():
        assert row["texts"] == 5 and row["questions"] == sum(len(own) for own in clip.qa)
        assert len(row["accuracy_by_place"]) == 10 and all(0 <= x <= 1 for x in row["accuracy_by_place"])
        assert 0 <= row["token_f1"] <= 1 and row["token_f1_ci"][0] <= row["token_f1"] <= row["token_f1_ci"][1]
        if ratio and ratio > 1:
            assert found["words_mean"] / row["tokens_mean"] == pytest.approx(ratio, rel=0.1)
            assert row["words_per_token"] == pytest.approx(found["words_mean"] / row["tokens_mean"])
            assert "were asked" not in (row["note"] or "")
    assert table["blind", None]["tokens_mean"] == 0 and table["blind", None]["words_per_token"] is None
    for each in found["versus"]:  # against itself by another name, and against sums of runs of words
        ours, other = table["language", each["ratio"]], table[each["against"], each["ratio"]]
        assert each["difference"] == pytest.approx(ours["token_f1"] - other["token_f1"]) and each["texts"] == 5
        assert each["against"] == "mean_pool" or (each["difference_ci"] == [0, 0] and each["winner"] is None)
    assert [(x["ratio"], x["against"]) for x in found["versus"]] == [
        (ratio, method) for ratio in (4.0, 8.0) for method in ("truncation", "mean_pool")
    ]
    assert [x["key"] for x in evaluator.examples] == list(clip.keys) and len(told(found)) == 2
    assert all(len(x["said"]) == len(table) for x in evaluator.examples)
    page = write_repeat_report(found, evaluator.examples, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(html.escape(sentence) in page for sentence in told(found)) and page.count('<svg class="chart') == 4 + 2
    assert all(html.escape(text) in page for text in clip.text)
    print_repeats(found)
    with pytest.raises(ValueError, match="words a token, 1 or more"):
        RepeatingEvaluator(Words(llm), llm, val=[], repeat="", ratios=[0.5])
    with pytest.raises(ValueError, match="have no texts"):
        RepeatingEvaluator(Words(llm), llm, val=[Clip(["a"])], progress=False, **prompts).run()


def test_ratios_that_texts_do_not_reach_are_said(lab, tmp_path, capsys):
    """A text has one token at least: asked for more words a token than it has, it has as many as there are."""
    llm = load_llm(LLMConfig(name=str(lab / "llm")))
    texts = ["a red ring", "a blue star moves"]
    clip, count = Clip(["a", "b"], text=texts), sum(len(llm.tokenizer(text).input_ids) for text in texts)
    evaluator = RepeatingEvaluator(
        Words(llm), llm, val=[clip], repeat="<video>\nRepeat:", ratios=[1, 40], progress=False
    )
    found = evaluator.run(model="words")
    table = {(row["method"], row["ratio"]): row for row in found["rows"]}
    for method in ("language", "truncation", "mean_pool"):
        row = table[method, 40.0]
        assert row["words_per_token"] == count / 2 < 36
        assert f"40 words a token were asked, these texts came to {count / 2:.1f}" in row["note"]
        assert table[method, 1.0]["words_per_token"] == 1 and "asked" not in (table[method, 1.0]["note"] or "")
    assert [f"(these texts came to {count / 2:.1f})" in line for line in told(found)] == [False, True]
    print_repeats(found)
    assert "note: 40 words a token were asked" in " ".join(capsys.readouterr().out.split())
    page = write_repeat_report(found, evaluator.examples, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "were asked, these texts came to" in page and "reached" in page


def test_what_a_text_scores_does_not_depend_on_the_texts_beside_it(lab):
    llm = load_llm(LLMConfig(name=str(lab / "llm")))
    long = story(0, 1)["text"]
    clip = Clip(["short", "long"], text=[" ".join(long.split()[:3]), long])
    tables = []
    for val in ([clip], [clip.rows(slice(0, 1)), clip.rows(slice(1, 2))]):
        evaluator = RepeatingEvaluator(Words(llm), llm, val=val, repeat="<video>\nRepeat:", ratios=[4], progress=False)
        tables.append(
            [[row[key] for key in ("token_f1", "exact_match", "correct_prefix")] for row in evaluator.run()["rows"]]
        )
        said = [each["text"] for each in evaluator.examples[0]["said"]]
        assert all(len(llm.tokenizer(text).input_ids) < 40 for text in said), "as many words as it has, and a few"
    assert tables[0] == tables[1]


def settings(lab: Path, name: str, **more: str) -> str:
    return f"""
name: {name}
out: {lab / "runs"}
model: {{name: language, num_tokens: 16, lm: {{name: {lab / "llm"}, {more.get("lm", "learn: all")}}}}}
objective: {{llm: {{name: {lab / "llm"}}}, tasks: {{caption: 0, qa: 1, reconstruction: 1}}, continuation: 0.3,
            ratios: [4, 8], teacher: text, logits: 0.5}}
data: {{shards: {lab / "shards" / "train"}, val_shards: {lab / "shards" / "val"}, texts: true, batch_size: 4,
       val_batch_size: 4, num_workers: 0}}
optim: {{lr: 1.0e-3, warmup_steps: 1, schedule: constant}}
trainer: {{max_steps: {more.get("steps", "4")}, devices: 1, accelerator: cpu, log_every: 1, val_every: 2,
          sample_every: 4, progress: false, tensorboard: false, ledger: true}}
eval: {{budgets: [2, 8]}}
"""


@pytest.mark.slow
def test_a_run_of_texts_validates_resumes_ships_and_is_measured(lab, tmp_path, capsys):
    before = hashlib.sha256((lab / "llm" / "model.safetensors").read_bytes()).hexdigest()
    run = train(loads(settings(lab, "whole")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (val, *_) = [line for line in lines if "val/loss" in line]
    assert {
        "val/repeated_accuracy_2",
        "val/repeated_accuracy_8",
        "val/accuracy_8",
        "val/repeated_accuracy",
    } <= val.keys()
    assert any("train/logit_kl" in line for line in lines)
    assert "story-" in (run / "samples" / "step-00000004.md").read_text()
    train(loads(settings(lab, "cut", steps="2")))
    cut = train(loads(settings(lab, "cut", steps="4")))
    assert (cut / "ledger-0.txt").read_text() == (run / "ledger-0.txt").read_text()
    kept = strategy.consolidate(run / "checkpoints" / "last.ckpt")
    assert {".".join(name.split(".")[:2]) for name in kept} == {"model.lm", "model.queries", "model.head"}
    main_export([str(run), "--out", str(lab / "export")])
    one, two = load_run(run)[0], vtok.load(str(lab / "export"))
    clip = Clip(["a", "b"], text=[story(0, 1)["text"], "short"])
    assert torch.equal(one.encode(clip, budget=5).embeddings, two.encode(clip, budget=5).embeddings)
    for source in (run, lab / "export"):
        evaluate([str(source), "--ratios", "4,8", "--answers", "4", "--out", str(tmp_path / source.name),
                  "--shards", str(lab / "shards" / "val"), "--no-progress"])  # fmt: skip
        found = json.loads((tmp_path / source.name / "eval.json").read_text())
        assert {(row["method"], row["ratio"]) for row in found["rows"]} >= {("language", 4.0), ("mean_pool", 8.0)}
        assert found["llm"]["sha256"] == before
        assert (tmp_path / source.name / "report.html").is_file()
    assert "begin..end" in capsys.readouterr().out
    assert hashlib.sha256((lab / "llm" / "model.safetensors").read_bytes()).hexdigest() == before


@pytest.mark.slow
def test_a_run_of_adapters_ships_adapters_alone(lab):
    pytest.importorskip("peft")
    run = train(loads(settings(lab, "lora", lm="learn: lora, lora: {rank: 2}", steps="2")))
    kept = strategy.consolidate(run / "checkpoints" / "last.ckpt")
    assert {".".join(name.split(".")[:2]) for name in kept} == {"model.adapters", "model.queries", "model.head"}
    main_export([str(run), "--out", str(lab / "export-lora")])
    clip = Clip(["a"], text=[story(0, 1)["text"]])
    one, two = load_run(run)[0], vtok.load(str(lab / "export-lora"))
    assert torch.equal(one.encode(clip).embeddings, two.encode(clip).embeddings)
    plain = build(Config(lm=SmallLM(name=str(lab / "llm"), learn="none"), embedding_dim=32, embedding_rms=0.1))
    assert {name.split(".")[0] for name in plain.state_dict()} == {"queries", "head"}
