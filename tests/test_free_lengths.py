"""Lengths that a model chooses: what they follow, what is imposed in their place, what is said of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_caption_lm import config, speaking
from test_language_family import videos
from test_llm import small_model, small_tokenizer

from vtok.evaluation.answer_report import write_answer_report
from vtok.evaluation.answering import AnsweringEvaluator
from vtok.evaluation.free_lengths import (
    FIXED,
    SHUFFLED,
    Imposed,
    Observed,
    controlled,
    follow,
    judged,
    rank_correlation,
    read_facts,
    sentences,
)
from vtok.families.language import build
from vtok.layers.base_tokens import BaseConfig
from vtok.llm import LLMConfig, load_llm
from vtok.types import Clip

torch.set_num_threads(1)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 25, 99]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # by hand: ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4; deviations' product 3.75, both squared norms 4.5
    assert rank_correlation([5, 7, 7, 9], [1, 1, 2, 3]) == pytest.approx(3.75 / 4.5)
    assert math.isnan(rank_correlation([1, 2, 3], [2, 2, 2])) and math.isnan(rank_correlation([1], [2]))


def test_imposed_lengths_have_the_same_total():
    torch.manual_seed(0)
    free = {f"c{i}": torch.randint(1, 40, (1 + i % 3,)).tolist() for i in range(50)}
    every = [n for row in free.values() for n in row]
    made = controlled(free, seed=1)
    for name, lengths in made.items():
        values = [n for row in lengths.values() for n in row]
        assert sum(values) == sum(every) and min(values) >= 1, name
        assert {key: len(row) for key, row in lengths.items()} == {key: len(row) for key, row in free.items()}
    fixed, shuffled = ([n for row in made[name].values() for n in row] for name in (FIXED, SHUFFLED))
    assert max(fixed) - min(fixed) <= 1
    assert sorted(shuffled) == sorted(every) and shuffled != every
    assert made[SHUFFLED] == controlled(free, seed=1)[SHUFFLED] != controlled(free, seed=2)[SHUFFLED]


def corpus(count: int = 60) -> tuple[dict[str, list[int]], dict[str, dict[str, float]]]:
    """Captions of 10 words a level and a few at random; durations that have nothing to do with it."""
    torch.manual_seed(0)
    lengths, facts = {}, {}
    for i in range(count):
        level, seconds = i % 4, float(torch.rand(()) * 6 + 2)
        facts[f"val-{i}"] = {"complexity": float(level), "duration": seconds}
        lengths[f"val-{i}" + "__0001" * (i % 2)] = [10 + 10 * level + int(torch.randint(8, ()))] * (
            1 + int(seconds // 4)
        )
    return lengths, facts


def test_what_lengths_follow():
    lengths, facts = corpus()
    found = follow(lengths, facts, seed=0)
    assert found["videos"] == 60 and found["spearman"] > 0.9
    assert found["spearman_ci"][0] < found["spearman"] < found["spearman_ci"][1]
    assert found["spearman_clip"] < found["spearman"]  # longer clips have more captions
    bins = found["by_duration"]
    assert [b["videos"] for b in bins] == [20, 20, 20] and all(b["spearman"] > 0.8 for b in bins)
    assert all(a["to_s"] < b["from_s"] for a, b in zip(bins, bins[1:]))
    levels = found["by_level"]
    assert [each["level"] for each in levels] == [0, 1, 2, 3] and sum(each["videos"] for each in levels) == 60
    means = [each["words_mean"] for each in levels]
    assert means == sorted(means) and all(each["spearman"] > 0.7 for each in levels)
    same = {key: {**told, "duration": 4.0} for key, told in facts.items()}
    assert [b["videos"] for b in follow(lengths, same, seed=0)["by_duration"]] == [60]
    lost = {key: row for key, row in lengths.items() if facts[key.partition("__")[0]]["complexity"] == 1}
    assert math.isnan(follow(lost, facts, seed=0)["spearman"])
    with pytest.raises(ValueError, match="--facts: none of the clips"):
        follow({"train-1": [3]}, facts, seed=0)


def test_facts_are_read_by_the_names_of_clips(tmp_path):
    path = tmp_path / "captions.jsonl"
    rows = [{"file": "val/0011_000001.mp4", "complexity": 2, "duration": 4.0, "caption": "x"}, {"file": "val/b.mp4"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_facts(path) == {"val-0011_000001": {"complexity": 2.0, "duration": 4.0}}
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="no line has a file and its `complexity`"):
        read_facts(path)


def test_verdicts_are_those_of_the_intervals():
    lengths, facts = corpus()

    def told(fixed: list[float] | None, shuffled: list[float] | None) -> str:
        found = {FIXED: fixed, SHUFFLED: shuffled}
        rows = {
            k: {"difference": sum(v) / 2 if v else 0.0, "difference_ci": v, "questions": 9} for k, v in found.items()
        }
        return " ".join(sentences(judged(lengths, rows, facts, seed=0)))

    said = told([-0.01, 0.03], [0.01, 0.05])
    assert "Spearman 0.9" in said and "at equal duration" in said
    assert "are no worse than the fixed length" in said and "between videos lose:" in said
    said = told([-0.03, 0.03], [-0.01, 0.05])
    assert "not shown to be as good as" in said and "are not shown to lose" in said
    assert "not shown to be as good" in told(None, None) and sentences(None) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("llm"))
    torch.manual_seed(3)
    tokenizer = small_tokenizer("llama")
    small_model("llama", len(tokenizer)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_the_table_of_a_model_whose_lengths_are_free(folder, tmp_path):
    torch.manual_seed(0)
    llm = load_llm(LLMConfig(name=folder))
    settings = config(folder, embedding_dim=llm.embedding_dim, embedding_rms=llm.embedding_rms)
    lengths = [7, 1, 6, 4]
    clip = videos(lengths)
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    model = speaking(build(settings).eval(), clip)
    asked = [{"question": "What?", "answer": "ring", "choices": ["ring", "star"], "type": "shape"}]
    clip = Clip([f"val-{i}" for i in range(4)], features=clip.features, qa=[asked] * 4)
    batches = [clip.rows(slice(0, 2)), clip.rows(slice(2, 4))]
    facts = {f"val-{i}": {"complexity": float(i), "duration": float(n)} for i, n in enumerate(lengths)}
    how = dict(val=batches, template="<video> Question: {question} Answer:", budgets=[4], facts=facts, progress=False)
    result = AnsweringEvaluator(model, llm, **how).run(model="m")
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    assert set(rows) == {("blind", 0), ("language", 4), ("language", None), (FIXED, None), (SHUFFLED, None)}
    means = [rows[name, None]["tokens_mean"] for name in ("language", FIXED, SHUFFLED)]
    assert means[0] == means[1] == means[2] > rows["language", 4]["tokens_mean"]
    found = result["lengths"]
    assert found["words_mean"] * found["segments_mean"] == pytest.approx(means[0])
    assert found["fixed"]["questions"] == found["shuffled"]["questions"] == 4 and found["complexity"]["videos"] == 4
    page = write_answer_report(result, [], tmp_path / "report.html").read_text()
    assert "A caption has" in page and SHUFFLED in page
    with torch.no_grad():
        seen = Observed(model)
        own = seen.encode(clip)
        again = Imposed(model, seen.lengths).encode(clip)
    assert torch.equal(own.lengths, again.lengths)
    assert (own.embeddings - again.embeddings).abs().max() < 1e-5  # what a model chose itself is nothing to impose


@torch.no_grad()
def test_lengths_that_are_cut_again_are_said(folder):
    """Base tokens are no words; where the most tokens of a clip cut imposed lengths, that row has fewer."""
    torch.manual_seed(0)
    llm = load_llm(LLMConfig(name=folder))
    sizes = dict(embedding_dim=llm.embedding_dim, embedding_rms=llm.embedding_rms, base=BaseConfig("pool", patches=2))
    clip = videos([7, 1, 6, 4])
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    model = build(config(folder, **sizes)).eval()
    asked = [{"question": "What?", "answer": "ring", "choices": ["ring", "star"]}]
    clip = Clip([f"val-{i}" for i in range(4)], features=clip.features, qa=[asked] * 4)
    model.max_tokens = 20
    free = Observed(model)
    free.encode(clip)
    assert min(n for row in free.lengths.values() for n in row) >= 1 and sum(free.lengths["val-0"]) == 20 - 3 * 2
    how = dict(val=[clip], template="<video> Question: {question} Answer:", budgets=[4], progress=False)
    result = AnsweringEvaluator(model, llm, **how).run(model="m")
    total = sum(map(sum, free.lengths.values()))
    for name, key in ((FIXED, "fixed"), (SHUFFLED, "shuffled")):
        given = Imposed(model, controlled(free.lengths, seed=0)[name])
        given.encode(clip)
        lost = total - sum(map(sum, given.lengths.values()))
        assert result["lengths"][key]["words_lost"] == lost
        row = next(row for row in result["rows"] if row["method"] == name)
        assert (f"max_tokens cut {lost} words" in (row["note"] or "")) == bool(lost)
    assert result["lengths"]["fixed"]["words_lost"] > 0
    assert "Not of the same total: model.max_tokens cut" in " ".join(sentences(result["lengths"]))


def test_models_without_free_lengths_have_no_such_rows(folder):
    llm = load_llm(LLMConfig(name=folder))
    settings = config(folder, mode="latent_lm", embedding_dim=llm.embedding_dim, embedding_rms=llm.embedding_rms)
    clip = videos([2])
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    clip.qa = [[{"question": "What?", "answer": "ring", "choices": ["ring", "star"]}]]
    how = dict(val=[clip], template="<video> Question: {question} Answer:", budgets=[4], progress=False)
    result = AnsweringEvaluator(build(settings).eval(), llm, **how).run(model="m")
    assert result["lengths"] is None and len(result["rows"]) == 2
