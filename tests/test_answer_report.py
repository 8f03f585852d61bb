"""Answers become rows, comparisons and report.html of a projector: paired intervals, honest sentences, safe text."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from test_report import NASTY, PIXELS, Page, browser, moving_square  # noqa: F401  (browser is a fixture)

from vtok.evaluation.answer_report import _lede, write_answer_report
from vtok.evaluation.answer_rows import AnswerRow, Costs, benchmark, finish, per_question, sentences, versus
from vtok.evaluation.page import tokens_text
from vtok.evaluation.rows import without_nan
from vtok.llm import Answered
from vtok.metrics.cost import LMShape

KINDS = {"colour": ["red", "blue"], "order": ["first", "last", "both", "none"]}
SHAPE = LMShape(linear=1000, head=100, layers=2, heads=4, kv_heads=2, head_dim=8)


def answered(clip: int, kind: str, right: bool, tokens: int, **more) -> Answered:
    choices = KINDS[kind]
    likelihoods = [-0.1 if (choice == choices[0]) == right else -3.0 for choice in choices]
    return Answered(
        key=f"tape{clip // 2}__{clip % 2:04d}", id=kind, type=kind, question=f"Which {kind}?", answer=choices[0],
        choices=choices, likelihoods=likelihoods, text=more.pop("text", None), tokens=tokens, positions=20 + tokens,
        **more,
    )  # fmt: skip


def row(method: str, budget: int | None, accuracy: float, *, clips: int = 80, tokens: int = 0, seed: int = 0):
    """A row whose answers are right with a probability, the same clips and questions in every row."""
    rng = np.random.default_rng([seed, len(method), budget or 0])
    out = AnswerRow(method, budget, compress_s=[0.002] * clips, compress_flops=1e6)
    for clip in range(clips):
        out.answers += [answered(clip, kind, bool(rng.random() < accuracy), tokens) for kind in KINDS]
    return out


def table(ours: float = 0.8, rival: float = 0.5, full: float = 0.9, blind: float = 0.375) -> list[AnswerRow]:
    return [
        row("blind", 0, blind),
        row("full", None, full, tokens=64),
        *(row("temporal", k, ours, tokens=k) for k in (1, 16)),
        *(row(name, k, rival - 0.1 * at, tokens=k) for at, name in enumerate(("tome", "random")) for k in (1, 16)),
    ]


def evaluation(rows: list[AnswerRow], **more) -> dict:
    costs = Costs(SHAPE, "", {20 + k: 0.001 * (20 + k) for k in (0, 1, 16, 64)})
    full = next((each.accuracy for each in rows if each.method == "full"), math.nan)
    return without_nan(
        {
            "schema": 1, "model": "runs/tdc", "family": "temporal", "shards": "s", "clips": 80,
            "llm": {"name": "tiny"}, "parts": None, "environment": {"device": "cpu", "cpu": "a processor"},
            "benchmark": benchmark(rows, seed=0), "versus": versus(rows, "temporal", seed=0),
            "rows": [finish(each, full=full, costs=costs, seed=0) for each in rows],
            "per_question": per_question(rows), **more,
        }
    )  # fmt: skip


def shown(caption: str = "a square moves right", *, frames: bool = True) -> dict:
    readers = [("blind", 0), ("temporal", 1), ("temporal", 16), ("tome", 1), ("tome", 16), ("full", None)]
    said = [
        {"chosen": "red" if right else "blue", "right": right, "text": "a red one" if right else None, "parts": []}
        for right in (False, True, True, False, True, True)
    ]
    out = {
        "key": "tape0__0000", "caption": caption, "tags": ["the model is ahead"],
        "readers": [{"method": method, "budget": budget} for method, budget in readers],
        "questions": [{"type": "colour", "question": "Which colour?", "answer": "red", "choices": ["red", "blue"],
                       "said": said}],
    }  # fmt: skip
    return out | ({"original": moving_square(), "fps": 8.0} if frames else {})


def test_a_difference_is_paired_and_its_interval_follows_the_videos():
    # both rows are right on the same half of the videos; the model also on one more question of every fifth clip
    ours, theirs = AnswerRow("temporal", 4), AnswerRow("tome", 4)
    for clip in range(60):
        easy = clip % 4 < 2
        theirs.answers += [answered(clip, "colour", easy, 4), answered(clip, "order", easy, 4)]
        ours.answers += [answered(clip, "colour", easy, 4), answered(clip, "order", easy or clip % 5 == 0, 4)]
    (found,) = versus([ours, theirs], "temporal", seed=0)
    gained = sum(1 for clip in range(60) if clip % 4 >= 2 and clip % 5 == 0)
    assert found["difference"] == pytest.approx(gained / 120) == ours.accuracy - theirs.accuracy
    assert (found["questions"], found["videos"]) == (120, 30)
    low, high = found["difference_ci"]
    assert 0 < low < found["difference"] < high and high - low < 0.1, "not paired, it would be as wide as one row's"
    assert found["winner"] == "model"
    alone = finish(theirs, full=math.nan, costs=Costs(None, "", {}), seed=0)["accuracy_ci"]
    assert alone[1] - alone[0] > 2 * (high - low)


def test_seeds_of_a_row_are_one_answer_to_each_question():
    ours, drawn = row("temporal", 4, 0.9), row("random", 4, 0.5)
    again = row("random", 4, 0.5, seed=1)
    drawn.answers += again.answers
    (found,) = versus([ours, drawn], "temporal", seed=0)
    assert found["questions"] == len(ours.answers) and found["reducer_accuracy"] == drawn.accuracy
    shares = set(drawn.right().values())
    assert shares == {0.0, 0.5, 1.0}


def test_the_best_reducer_is_met_at_each_budget_and_ends_are_none():
    found = versus(table(), "temporal", seed=0)
    assert [(each["budget"], each["reducer"]) for each in found] == [(1, "tome"), (16, "tome")]
    assert versus([*table()[:4]], "temporal", seed=0) == [], "blind and all tokens are no reducers"


def test_sentences_say_who_leads_and_when_nobody_can():
    told = sentences(evaluation(table(ours=0.8, rival=0.5)))
    assert re.match(r"All tokens are \d\d\.\d points above blind \(95 %: .*\)\.$", told[0])
    assert any(re.match(r"At 1 token temporal leads: \d+\.\d points \(95 %", each) for each in told)
    told = sentences(evaluation(table(ours=0.4, rival=0.8)))
    assert any(re.match(r"At 16 tokens a reducer wins: tome is \d+\.\d points \(95 %: \d", each) for each in told)
    told = sentences(evaluation(table(ours=0.5, rival=0.5)))
    assert any("neither leads" in each for each in told)
    asked = "Tokens of temporal are made for each question"
    for reads, count in ((True, 1), (False, 0)):
        assert sum(asked in each for each in sentences(evaluation(table()) | {"reads_prompt": reads})) == count
    told = sentences(evaluation(table(full=0.5)))
    assert "less than the 30.0 points needed: this benchmark cannot tell compressors apart." in told[0]
    told = sentences(evaluation(table(blind=0.7, full=1.0)))
    assert any("chance is 37.5 %: the questions tell something" in each for each in told)


def test_rows_hold_costs_and_kinds_with_their_intervals():
    before = row("temporal", 16, 0.8, tokens=16)
    found = finish(before, full=0.9, costs=Costs(SHAPE, "", {36: 0.02}), seed=0)
    assert found["prefill_flops"] == SHAPE.prefill_flops(36) and found["kv_bytes"] == SHAPE.kv_bytes(36)
    assert found["ttft_ms"] == 20.0 and found["note"] is None
    assert found["chance_by_type"] == {"colour": 0.5, "order": 0.25} and found["chance"] == 0.375
    for kind in KINDS:
        low, high = found["by_type_ci"][kind]
        assert low < found["by_type"][kind] < high
    experts = finish(before, full=0.9, costs=Costs(None, "prefill_flops, kv_bytes: routing", {}), seed=0)
    assert math.isnan(experts["prefill_flops"]) and "routing" in experts["note"] and "ttft_ms" in experts["note"]


def test_parts_are_paid_for():
    plain = row("temporal", 16, 0.8, tokens=16)
    parts = AnswerRow("temporal", 16)
    for clip in range(10):
        parts.answers.append(
            answered(
                clip, "colour", True, 16, parts=["From ...", "From ..."], part_positions=[30, 31], part_seconds=0.5
            )
        )
    costs = Costs(SHAPE, "", {36: 0.02})
    one, two = (finish(each, full=0.9, costs=costs, seed=0) for each in (plain, parts))
    more = SHAPE.prefill_flops(30) + SHAPE.prefill_flops(31)
    assert two["prefill_flops"] == one["prefill_flops"] + more
    assert two["parts_positions_mean"] == 61 and two["parts_seconds_per_question"] == 0.5
    assert "of the last prompt" in two["note"] and "parts_positions_mean" not in one


def test_every_answer_is_kept_for_other_tests():
    rows = table()
    found = json.loads(json.dumps(per_question(rows)))
    assert len(found["keys"]) == len(found["ids"]) == len(found["types"]) == 160
    mine = found["right"]["temporal"]["16"]
    assert sum(mine) / len(mine) == pytest.approx(rows[3].accuracy)
    assert set(found["right"]) == {"blind", "full", "temporal", "tome", "random"} and "-" in found["right"]["full"]


def test_the_page_has_everything_and_needs_no_network(tmp_path):
    found = evaluation(table())
    lines = [
        {"step": s, "val/loss": 2.0 - s, "val/accuracy_1": 0.1 * s, "val/colour_accuracy_4": 0.2} for s in (0, 1, 2)
    ]
    path = write_answer_report(found, [shown()], tmp_path / "deep" / "report.html", history=lines)
    text = path.read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    for words in sentences(found):
        assert words in text
    for heading in ("accuracy %", "kept %", "colour %", "order %", "prefill FLOPs", "KV cache", "first token ms"):
        assert f">{heading}</button>" in text, heading
    captions = re.findall("<figcaption>([^<]*)</figcaption>", text)
    assert captions[:3] == ["all questions", "colour", "order"]
    plot = text[text.index("<figcaption>all questions") :].split("</svg>")[0]
    assert plot.count('class="whisker"') == 6 and plot.count('class="band"') == 2
    assert "all tokens: " in plot and "blind: " in plot and "on a processor" in text
    (cell,) = set(re.findall(r">(\d\d\.\d<small>[^<]*)</small>", text[text.index('<td data-value="temporal"') :])[:1])
    assert re.fullmatch(r"\d\d\.\d<small>\d\d\.\d to \d\d\.\d", cell)
    table_of = text[text.index('id="answers-title"') :]
    assert "says: a red one" in table_of and table_of.count("\N{BALLOT X}") == 2
    order = re.findall(r"<td>(blind|temporal, [^<]*|tome, [^<]*|all tokens)</td>", table_of)
    assert order == [
        "blind",
        "temporal, 1 token",
        "tome, 1 token",
        "temporal, 16 tokens",
        "tome, 16 tokens",
        "all tokens",
    ]
    assert "per_question" not in text and "tape13" not in text, "eval.json holds them"
    assert json.loads(page.scripts[0])[0]["key"] == "tape0__0000"


def test_methods_of_one_budget_stand_beside_one_another(tmp_path):
    text = write_answer_report(evaluation(table()), [], tmp_path / "r.html").read_text()
    plot = text[text.index("<figcaption>all questions") :].split("</svg>")[0]
    places = sorted({float(x) for x in re.findall(r'class="whisker" x1="([\d.]+)"', plot)})
    assert len(places) == 6 and min(b - a for a, b in zip(places, places[1:])) > 3


def test_a_benchmark_that_cannot_tell_says_so_at_the_top(tmp_path):
    weak = write_answer_report(evaluation(table(full=0.5)), [], tmp_path / "w.html").read_text()
    strong = write_answer_report(evaluation(table()), [], tmp_path / "s.html").read_text()
    assert "<li class=warn>" in weak and "cannot tell compressors apart" in weak
    assert "<li class=warn>" not in strong


@pytest.mark.parametrize("rows", [[], [row("blind", 0, 0.4)], [row("blind", 0, 0.4), row("temporal", None, 0.6)]])
def test_tables_without_ends_budgets_or_rows(tmp_path, rows):
    text = write_answer_report(evaluation(rows), [], tmp_path / "r.html").read_text()
    assert ("Every row" in text) == bool(rows)
    assert "nan" not in text[text.index("<body>") : text.index("<script")].lower()
    bare = write_answer_report({"rows": []}, [shown(frames=False)], tmp_path / "b.html").read_text()
    assert "there are no frames to show" in bare and "<canvas" not in bare


def test_untrusted_text_stays_text(tmp_path):
    found = evaluation(table(), llm={"name": NASTY}, shards=NASTY, environment={NASTY: NASTY, "device": NASTY})
    for each in found["rows"]:
        each["note"] = NASTY
        each["method"] = NASTY if each["method"] == "tome" else each["method"]
        each["by_type"] = {NASTY: 0.5, "order": 0.5}
        each["by_type_ci"] = {NASTY: [0.4, 0.6], "order": None}
        each["chance_by_type"] = {NASTY: 0.5}
    for each in found["versus"]:
        each["reducer"] = NASTY
    clip = shown(NASTY)
    clip["tags"] = [NASTY]
    clip["questions"][0] |= {"type": NASTY, "question": NASTY, "answer": NASTY}
    clip["questions"][0]["said"] = [{"chosen": NASTY, "right": False, "text": NASTY + "!", "parts": [NASTY]}] * 6
    clip["readers"][3]["method"] = NASTY
    text = write_answer_report(found, [clip], tmp_path / "r.html", title=NASTY).read_text()
    page = Page(text)
    assert len(page.scripts) == 2 and not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert text.count('"use strict";') == 1


@pytest.mark.slow
def test_the_page_plays_sorts_and_fits(tmp_path, browser):  # noqa: F811
    path = write_answer_report(evaluation(table()), [shown(), shown(frames=False)], tmp_path / "report.html")
    browser.events.clear()
    browser.open(path)
    canvas = "document.querySelector('.asked canvas')"
    browser.js(f"{canvas}.scrollIntoView(); {canvas}.id = 'shown'; 1")
    browser.wait(f"{canvas}.dataset.frame !== undefined")
    browser.js("document.getElementById('play').click()")
    drawn = browser.js(PIXELS.format("shown"))
    assert drawn["rgb"] == moving_square()[drawn["frame"]].ravel().tolist()
    headings = browser.js("[...document.querySelectorAll('#table thead th')].map((h) => h.textContent)")
    place = headings.index("accuracy %") + 1
    browser.js(f"document.querySelector('#table thead th:nth-child({place}) button').click()")
    cells = f"[...document.querySelectorAll('#table tbody td:nth-child({place})')].map((c) => Number(c.dataset.value))"
    values = browser.js(cells)
    assert values == sorted(values)
    browser.js("document.querySelector('#accuracy .legend button[data-series=tome]').click()")
    hidden = "[...document.querySelectorAll('#accuracy svg.chart .series[data-series=tome]')]"
    assert set(browser.js(f"{hidden}.map((g) => getComputedStyle(g).display)")) == {"none"}
    for width in (1200, 390):
        browser.open(path, width=width)
        assert browser.js("document.documentElement.scrollWidth - innerWidth") <= 0, f"{width}: scrolls sideways"
    assert browser.problems() == []


@pytest.mark.parametrize(
    "count, text", [(1, "1 token"), (91.4641, "91.5 tokens"), (2.0, "2 tokens"), (1e6, "1000000 tokens")]
)
def test_numbers_of_tokens_are_told_to_a_tenth(count, text):
    assert tokens_text(count) == text


def test_answers_that_are_none_of_the_choices_are_counted_and_told():
    plain = table()[2]
    strange = [replace(each, answer="a colour of its own") for each in plain.answers[:3]]
    costs = Costs(SHAPE, "", {})
    found = finish(AnswerRow("temporal", 1, [*strange, *plain.answers[3:]]), full=0.9, costs=costs, seed=0)
    count = len(plain.answers)
    assert found["without_right_choice"] == 3
    assert f"the answer of 3 of {count} questions is none of their choices" in found["note"]
    whole = finish(plain, full=0.9, costs=costs, seed=0)
    assert whole["without_right_choice"] == 0 and "none of their choices" not in (whole["note"] or "")


def test_what_reducers_stand_on_is_told():
    rows, projector = [{"method": name, "questions": 4} for name in ("blind", "temporal", "tome")], "the projector of "
    plain = {"clips": 2, "llm": {"name": "tiny"}}
    assert f"{projector}all tokens: tome" in _lede(plain, rows, "temporal")
    assert f"{projector}pooling-tiny, trained as long: tome" in _lede(
        plain | {"tuned": "pooling-tiny"}, rows, "temporal"
    )
    assert "which is frozen" in _lede(plain, rows, "temporal")
    adapted = {"llm": {"name": "tiny", "adapters_sha256": "ab"}}
    assert "with the adapters that it learned" in _lede(plain | adapted, rows, "temporal")
