"""`vtok eval --allocations`: one total shared in several ways, what reaches the answer's segment, paired margins."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pytest
import torch
from test_language_family import config, folders, videos  # noqa: F401

from vtok.budget import AtaConfig
from vtok.evaluation.allocations import SCORES, Noted, allocated, answer_tokens, parse_allocations, told, true_shares
from vtok.evaluation.answer_report import write_answer_report
from vtok.evaluation.answering import AnsweringEvaluator, print_answers
from vtok.families.language import Model, build
from vtok.llm import LLMConfig, load_llm
from vtok.types import Clip

torch.set_num_threads(1)
LENGTHS, PLACES = [16, 10, 16], [[5, 0], [4, 1], [2, 7]]  # 8, 5 and 8 segments of two frames; where answers are


def needles() -> Clip:
    """Two questions a video, each about a segment of its own; frames come twice a second, so segments once."""
    clip = videos(LENGTHS)
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    clip.keys = ["one__0000", "one__0001", "two"]
    clip.qa = [
        [
            {"id": str(i), "type": "needle", "question": f"what is {i}?", "answer": "a", "choices": ["a", "b", "c"],
             "start_s": float(place), "end_s": place + 0.4}
            for i, place in enumerate(places)
        ]
        for places in PLACES
    ]  # fmt: skip
    return replace(clip, prompt=None)


def tempo(folder: str, score: str = "learned", **more) -> tuple[Model, object]:
    torch.manual_seed(0)
    llm = load_llm(LLMConfig(name=folder))
    ata = AtaConfig(score=score, minimum=1, maximum=5)
    sizes = dict(embedding_dim=llm.embedding_dim, source="video", window=2, ata=ata, question=True, max_tokens=60)
    model = build(config(folder, **sizes | more)).eval()
    if model.judge is not None and score == "learned":
        torch.nn.init.normal_(model.judge.out.weight)
    return model, llm


def test_what_is_asked_of_the_command():
    assert parse_allocations("128:1, 320:4") == {128: 1, 320: 4} and parse_allocations("") == {}
    for wrong in ("128", "x:1", "0:1", "128:-1"):
        with pytest.raises(ValueError, match="is not TOTAL:MINIMUM, such as 320:4"):
            parse_allocations(wrong)


@torch.no_grad()
def test_truth_gives_what_it_can_to_the_answer(folders):  # noqa: F811
    model, clip = tempo(folders["llama"])[0], needles()
    shares = true_shares(model, clip, total=12, minimum=1)
    for at, (row, place) in enumerate((row, place) for row, places in enumerate(PLACES) for place in places):
        segments = LENGTHS[row] // 2
        assert int(shares[at].sum()) == 12 and not shares[at, segments:].any()
        assert int(shares[at, place]) == 5 and int(shares[at, :segments].min()) == 1
    unknown = replace(clip, qa=[[{**each, "start_s": None} for each in of_clip] for of_clip in clip.qa])
    even = true_shares(model, unknown, total=12, minimum=1)
    assert even[0].tolist() == [2, 2, 2, 2, 1, 1, 1, 1], "questions that do not say when: evenly"


@pytest.mark.parametrize("question", [True, False])
@torch.no_grad()
def test_rows_of_every_way_and_their_margins(folders, question, tmp_path, capsys):  # noqa: F811
    model, llm = tempo(folders["llama"], "learned" if question else "similarity", question=question)
    clip = needles()
    clip.qa[1][1]["end_s"] = None
    template, totals = "<video>\nQuestion: {question}\nAnswer:", {8: 0, 20: 1}
    evaluator = AnsweringEvaluator(model, llm, val=[clip], template=template, allocations=totals, progress=False)
    result = evaluator.run(model="tempo", shards="needles")
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    ways = [name for name in SCORES if name != model.config.ata.score]  # its own has one row
    assert {method for method, _ in rows} == {"blind", "language", *ways} and len(ways) == 4 - (not question)
    for total in (8, 20):
        for method in ("language", *ways):
            row = rows[method, total]
            assert row["questions"] == 6 and row["tokens_mean"] == total and 0 <= row["accuracy"] <= 1
        spent = {method: rows[method, total]["answer_tokens_mean"] for method in ways}
        assert spent["truth"] > spent["even"] and spent["truth"] == 5
    assert rows["even", 8]["answer_tokens_mean"] == pytest.approx((1 + 1 + 1 + 1 + 1) / 5)
    assert not result["versus"], "ways to share are no reducers"
    assert [(each["budget"], each["minimum"], each["against"]) for each in result["allocations"]] == [
        (total, least, method) for total, least in ((8, 0), (20, 1)) for method in ways
    ]
    for each in result["allocations"]:
        ours, other = rows["language", each["budget"]], rows[each["against"], each["budget"]]
        assert each["difference"] == pytest.approx(ours["accuracy"] - other["accuracy"], abs=1e-9)
        assert each["questions"] == 6 and each["videos"] == 2
        low, high = each["difference_ci"]
        assert low <= each["difference"] <= high
    print_answers(result)
    shown = " ".join(capsys.readouterr().out.split())
    assert "20 tokens, 1 a segment at least: language against even" in shown and len(told(result)) == 2 * len(ways)
    json.dumps(result, allow_nan=False)
    write_answer_report(result, [], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(html.escape(sentence) in page for sentence in told(result))


@torch.no_grad()
def test_some_questions_and_some_ways_are_rows_of_the_whole(folders):  # noqa: F811
    """One question of each clip, the same in any batch, answered as among all; no row of ways not asked for."""
    model, llm = tempo(folders["llama"])
    clip, template = needles(), "<video>\nQuestion: {question}\nAnswer:"

    def asked(val: list[Clip], **more) -> dict:
        evaluator = AnsweringEvaluator(
            model, llm, val=val, template=template, allocations={20: 1}, progress=False, **more
        )
        return evaluator.run()

    whole, some = asked([clip]), asked([clip], questions=1, shares=["even"])
    alone = asked([clip.rows(slice(i, i + 1)) for i in range(3)], questions=1, shares=["even"])
    assert {row["method"] for row in some["rows"]} == {"blind", "language", "even"}
    assert [each["against"] for each in some["allocations"]] == ["even"]
    found, every = some["per_question"], whole["per_question"]
    assert found["keys"] == clip.keys and alone["per_question"] == found
    at = [list(zip(every["keys"], every["ids"])).index(each) for each in zip(found["keys"], found["ids"])]
    for method in ("blind", "language", "even"):
        for budget, right in found["right"][method].items():
            assert right == [every["right"][method][budget][i] for i in at]
    assert len({asked([clip], questions=1, shares=[], seed=seed)["per_question"]["ids"][0] for seed in range(8)}) == 2
    for wrong, message in ((dict(questions=0), "ask 1 or more"), (dict(shares=["odd"]), "choose ways to share")):
        with pytest.raises(ValueError, match=message):
            asked([clip], **wrong)


@torch.no_grad()
def test_clips_without_questions_stand_beside_others(folders):  # noqa: F811
    """The longest clip of a batch may have none, and so may a whole batch."""
    model, llm = tempo(folders["llama"])
    clip, short = needles(), needles()
    clip.qa[0] = clip.qa[2] = []
    short.keys, short.qa = [f"{key}-none" for key in short.keys], [[], [], []]
    shares = true_shares(model, clip, total=8, minimum=0)
    assert shares.shape == (2, 5) and shares.sum(1).tolist() == [8, 8]
    template = "<video>\nQuestion: {question}\nAnswer:"
    how = dict(template=template, allocations={8: 0}, progress=False)
    rows = AnsweringEvaluator(model, llm, val=[clip, short], **how).run()["rows"]
    assert {row["questions"] for row in rows} == {2}
    assert all(row["answer_tokens_mean"] > 0 for row in rows if row["method"] == "truth")


@torch.no_grad()
def test_tokens_of_the_answer_are_counted(folders):  # noqa: F811
    model, clip = tempo(folders["llama"])[0], needles()
    noted = Noted(allocated(model, "even", minimum=1))
    noted.encode(replace(clip, prompt=["what?"] * len(clip)), budget=8)
    noted.reads_prompt = False
    assert answer_tokens(clip, noted, model.segments(clip)) == [1, 1, 1, 2, 1, 1]
    with pytest.raises(ValueError, match="ata.score is none here"):
        plain = build(config(folders["llama"], source="video", window=2)).eval()
        AnsweringEvaluator(plain, load_llm(LLMConfig(name=folders["llama"])), val=[], template="", allocations={8: 1})
