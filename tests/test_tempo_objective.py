"""What teaches scores and prefixes: questions that say when their answer is on show, lengths drawn for each segment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_language_family import config, folders, objective, videos  # noqa: F401

from vtok.budget import AtaConfig
from vtok.families.language import build
from vtok.layers.judge import Scored
from vtok.layers.segment_tokens import segment_ends
from vtok.llm import TaskConfig
from vtok.llm.objective import BudgetConfig
from vtok.llm.relevance import answering, asked_spans, known_spans, random_prefixes, ranking_loss
from vtok.training.loop import Conductor
from vtok.types import Clip

torch.set_num_threads(1)


def asked(start: Any, end: Any, question: str = "what moves?") -> dict[str, Any]:
    return {"id": "0", "type": "needle", "question": question, "answer": "ring", "start_s": start, "end_s": end}


def test_segments_that_show_an_answer():
    begin = torch.tensor([0.0, 1.0, 2.0, 3.0])
    times = torch.stack([begin, begin + 0.75], -1).expand(5, -1, -1)
    there = torch.tensor([[True] * 4] * 4 + [[True, True, False, False]])
    spans = torch.tensor([[1.0, 1.25], [1.8, 2.1], [3.9, 4.0], [float("nan")] * 2, [1.5, 1.6]], dtype=torch.float64)
    found = answering(times, spans, there)
    assert found.long().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert not answering(times, torch.full((5, 2), 9.0), there).any()


def test_every_moment_of_a_clip_lies_in_a_segment():
    """Moments without a length, on a boundary too, the time of the last frame, clips of one segment or one frame."""
    begin = torch.tensor([0.0, 1.0, 2.0, 3.0])
    times = torch.stack([begin, begin + 0.75], -1)
    times[3, 1] = 3.25  # two frames alone
    there = torch.tensor([[True] * 4])
    wanted = {0.0: 0, 0.9: 0, 1.0: 1, 1.999: 2, 2.0: 2, 3.0: 3, 3.3: 3, 3.49: 3, 3.5: None, -0.1: None, 9.0: None}
    for moment, segment in wanted.items():
        found = answering(times[None], torch.tensor([[moment, moment]], dtype=torch.float64), there)[0].tolist()
        assert found == [at == segment for at in range(4)], moment
    late = torch.tensor([[3.3, 3.45], [3.6, 3.9], [2.9, 3.0], [3.0, 2.9]], dtype=torch.float64)
    found = answering(times.expand(4, -1, -1), late, there.expand(4, -1))
    assert found.long().tolist() == [[0, 0, 0, 1], [0] * 4, [0, 0, 1, 0], [0] * 4]
    one = torch.tensor([[[0.0, 0.0]], [[0.0, 0.5]]])  # an image, two frames
    there = torch.ones(2, 1, dtype=torch.bool)
    for span in ([0.0, 0.0], [0.0, 0.2], [0.6, 0.9]):
        assert answering(one, torch.tensor([span] * 2, dtype=torch.float64), there).all(), span
    assert torch.equal(segment_ends(one, there), torch.tensor([[torch.inf], [1.0]], dtype=torch.float64))
    exact = segment_ends(one, there, frames=torch.tensor([[1], [3]]))
    assert torch.equal(exact, torch.tensor([[torch.inf], [0.75]], dtype=torch.float64))


def test_spans_are_those_of_the_question_that_is_asked():
    qa = [[asked(0, 1, "where?"), asked(2.0, 3.0)], [asked(2.0, 3.0)], [asked(None, 1)], None, ["what moves?"]]
    prompts = ["Question: what moves?\nAnswer:"] * 5
    prompts[1] = "Question: what rests?\nAnswer:"
    found = asked_spans(Clip(list("abcde"), qa=qa, prompt=prompts), TaskConfig().qa_prompts)
    assert found[0].tolist() == [2, 3] and bool(found[1:].isnan().all())
    assert bool(asked_spans(Clip(["a"]), TaskConfig().qa_prompts).isnan().all())


def test_ranking_is_the_likelihood_of_a_right_segment():
    scores = torch.tensor([[0.0, 2.0, -torch.inf], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    right = torch.tensor([[False, True, True], [True, True, False], [False] * 3])
    loss, hit = ranking_loss(scores, right)
    chances = scores.detach()[:2].softmax(1)
    wanted = -(chances[0, 1].log() + (chances[1, 0] + chances[1, 1]).log()) / 2
    assert float(loss.detach()) == pytest.approx(float(wanted), abs=1e-6) and hit.tolist() == [True, False]
    loss.backward()
    assert bool(scores.grad.isfinite().all()) and not scores.grad[2].any()
    loss, hit = ranking_loss(scores, torch.zeros_like(right))
    assert float(loss.detach()) == 0 and loss.requires_grad and not len(hit)


def test_ranks_whose_clips_show_no_answer_report_without_one(monkeypatch):
    """A line is the mean over the ranks that have a number, step by step, whatever each of them could measure."""
    ranks = [
        [{"nll": 1.0, "tokens": 4.0}, {"nll": 3.0, "relevant_first": 0.0, "tokens": 4.0}],
        [{"nll": 2.0, "relevant_first": 1.0, "tokens": 8.0}, {"nll": 5.0, "relevant_first": 1.0, "tokens": 4.0}],
    ]

    def gather(parts, own):
        assert own == ranks[0]
        parts[:] = ranks

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: None)
    pending = [{name: torch.tensor(value) for name, value in step.items()} for step in ranks[0]]
    conductor: Any = SimpleNamespace(pending=pending, window={}, counts=[None, None])
    Conductor._fold(conductor, SimpleNamespace(world_size=2), SimpleNamespace(device=torch.device("cpu")))
    assert conductor.window == {"nll": [1.5, 4.0], "tokens": [6.0, 4.0], "relevant_first": [1.0, 0.5]}


def test_prefixes_are_drawn_for_each_segment():
    found = torch.cat([random_prefixes(list("ab"), torch.tensor([6, 2]), most=8, step=s, seed=0) for s in range(300)])
    assert found.shape == (600, 6) and int(found.max()) == 8 and not found[1::2, 2:].any()
    counts = found[::2].flatten().bincount(minlength=9)[1:].double()
    assert bool((counts > 0).all()) and 1.5 < float(counts[0] / counts[2]) < 4  # log-uniform: 0.315 and 0.131
    alone = random_prefixes(["b"], torch.tensor([2]), most=8, step=7, seed=0)
    assert torch.equal(alone[0], found[15, :2])


def test_drawn_prefixes_stay_within_a_clips_total():
    """Some segments keep what was drawn for them, the others have one; what fits is as without a total."""
    many, draws = torch.tensor([64, 3]), dict(most=128, seed=0)
    long = 0
    for step in range(50):
        free = random_prefixes(list("ab"), many, step=step, **draws)
        found = random_prefixes(list("ab"), many, step=step, total=512, **draws)
        assert int(found[0].sum()) == min(512, int(free[0].sum())) and bool((found <= free).all())
        assert int(found[0].min()) == 1 and torch.equal(found[1], free[1])
        long += int((found[0] > 32).sum())
    assert long > 150, "lengths still differ"
    few = random_prefixes(["a"], torch.tensor([9]), step=0, total=4, **draws)
    assert int(few.sum()) == 4 and int(few.max()) == 1


@pytest.mark.parametrize("score", ["learned", "yes_no", "similarity"])
def test_scores_learn_where_answers_are(folders, score):  # noqa: F811
    """Segments differ by their frames; the question's answer is where they are of one kind."""
    torch.manual_seed(0)
    ata = AtaConfig(score=score, minimum=1, maximum=4)
    settings = config(folders["llama"], source="video", window=2, ata=ata, question=True)
    reads = objective(folders["llama"], settings, tasks=TaskConfig(caption=0.0), relevance=1.0, prefixes=0.5)
    model = build(settings).train()
    clip = videos([8, 6, 8, 8])
    seen = clip.features["tower"]
    seen.patches = seen.patches.float()
    for row, place in enumerate((1, 2, 0, 3)):
        seen.patches[row, 2 * place : 2 * place + 2] += 3
    clip.qa = [[asked(float(place), place + 0.5)] for place in (1, 2, 0, 3)]
    optimizer, losses, first = torch.optim.AdamW(model.parameters(), 1e-2), [], []
    for step in range(18):
        loss = reads(model, clip, step)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith(("judge", "match")))
        optimizer.step()
        losses.append(float(loss.report["relevance"]))
    assert losses[-1] < 0.5 * losses[0]
    tokens = model.eval().encode(Clip(clip.keys, features=clip.features, prompt=["Question: what moves?\nAnswer:"] * 4))
    assert isinstance(tokens, Scored) and tokens.scores.argmax(1).tolist() == [1, 2, 0, 3]
    assert tokens.scores.isfinite().sum(1).tolist() == [4, 3, 4, 4]
    first = model.encode(
        Clip(clip.keys, features=clip.features, prompt=["Question: what moves?\nAnswer:"] * 4), budget=7
    )
    most = torch.zeros(4, 4).scatter_add(1, first.group, first.mask.float()).argmax(1)
    assert most.tolist() == [1, 2, 0, 3], "and get the tokens"


def test_similarity_learns_from_all_questions_of_a_clip(folders, monkeypatch):  # noqa: F811
    """One is asked, the others say when their answers are on show too, and cost no pass of the small model; a batch
    without any still calls the network, as other ranks do."""
    settings = config(folders["llama"], source="video", window=2, ata=AtaConfig(score="similarity"), question=True)
    reads = objective(folders["llama"], settings, tasks=TaskConfig(caption=0.0), relevance=1.0)
    model, clip, called = build(settings).train(), videos([8, 6]), []
    model.match.register_forward_hook(lambda module, given, out: called.append(len(out)))
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    clip.qa = [[asked(0.0, 0.5), asked(2.0, 2.5), {"question": "what?", "answer": "x"}], [asked(1.0, 1.5)]]
    rows, prompts, spans = known_spans(clip, ["<video>\nQ: {question}", "<video> {question}"], step=0, seed=0)
    assert rows == [0, 0, 1] and spans.tolist() == [[0.0, 0.5], [2.0, 2.5], [1.0, 1.5]]
    assert all("what moves?" in prompt and "<video>" not in prompt for prompt in prompts)
    report = reads(model, clip, 0).report
    assert called == [2 * 4, 3 * 4] and "relevant_first" in report
    scores = model.similarity(clip, prompts, rows).detach()
    assert scores.shape == (3, 4) and float(scores[2, 3]) == 0 and bool((scores[:2] != 0).all())
    clip.qa = [[{"question": "what?", "answer": "x"}]] * 2
    called.clear()
    loss = reads(model, clip, 0)
    assert called == [2 * 4, 4] and "relevant_first" not in loss.report and float(loss.report["relevance"]) == 0
    loss.total.backward()
    assert model.match.look.weight.grad is not None


def test_settings_that_cannot_be(folders):  # noqa: F811
    video = dict(source="video", window=2, question=True)
    for message, settings, more in (
        ("teaches scores that learn: model.ata.score='novelty' is none", dict(ata=AtaConfig(score="novelty")),
         dict(relevance=1.0)),
        ("model.ata.score=learned learns by objective.relevance", dict(ata=AtaConfig(score="learned")), {}),
        ("model.ata.score=similarity learns by objective.relevance", dict(ata=AtaConfig(score="similarity")), {}),
        ("objective.ratios=.5.0. is for texts, and model.source='video'", {}, dict(ratios=[5.0])),
        ("objective.continuation=0.5 is for texts", {}, dict(continuation=0.5)),
        ("objective.teacher='text' is for texts", {}, dict(teacher="text", logits=1.0)),
        ("objective.relevance=-1", {}, dict(relevance=-1.0)),
        ("objective.prefixes=2", {}, dict(prefixes=2.0)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            objective(folders["llama"], config(folders["llama"], **video, **settings), **more)
    texts = config(folders["llama"])
    with pytest.raises(ValueError, match="objective.prefixes=0.5 is for segments of videos"):
        objective(folders["llama"], texts, prefixes=0.5)
    for budgets in (BudgetConfig(values=[4]), BudgetConfig(law="uniform")):
        with pytest.raises(ValueError, match="both say how many tokens a text is given"):
            objective(folders["llama"], texts, ratios=[5.0], budgets=budgets)
