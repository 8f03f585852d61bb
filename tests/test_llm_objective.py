"""What is asked of a projector before a frozen language model: tasks, budgets, timestamps, distillation, adapters, and
the questions of an evaluation. The models are those of test_llm.py."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from test_llm import KINDS, PooledConfig, clips, objective, one, question, transformers
from test_llm import folders as folders  # a fixture

from vtok import llm as room
from vtok.llm import BudgetConfig, LLMConfig, LoraConfig, ObjectiveConfig, ProjectorObjective, TaskConfig
from vtok.llm.reading import answer_ids, prompt_ids, with_times

# prompts and tasks


def test_prompts_go_through_the_chat_template_where_there_is_one(folders):
    words = room.load_llm(LLMConfig(name=folders["qwen2"]))
    plain = room.load_llm(LLMConfig(name=folders["qwen2"], chat=False))
    assert words.chat and not plain.chat
    for written, want in ((words, "<|user|>\nWhat?<|assistant|>"), (plain, "\nWhat?")):
        ids = prompt_ids(written, "<video>\nWhat?")
        assert ids.count(-1) == 1 and written.tokenizer.decode([i for i in ids if i >= 0]) == want
    assert words.tokenizer.decode(answer_ids(words, "<video>", "red")[0]) == "red<end>"
    assert plain.tokenizer.decode(answer_ids(plain, "<video>\nAnswer:", "red")[0]) == " red<end>"


def test_tasks_are_a_function_of_key_and_step_and_follow_their_shares():
    batch = clips(300)
    config = TaskConfig(caption=1, qa=3, caption_prompts=["<video> one", "<video> two"])
    told = room.choose(batch, config, step=4, seed=2)
    assert room.choose(batch, config, step=4, seed=2) == told
    assert room.choose(batch, config, step=5, seed=2) != told and room.choose(batch, config, step=4) != told
    assert room.choose(one(batch, 42), config, step=4, seed=2).prompts[0] == told.prompts[42]
    both, asked, captioned = ([told.tasks[row] for row in range(start, 300, 3)] for start in range(3))
    assert set(asked) == {"qa"} and set(captioned) == {"caption"}  # all that these clips have
    assert 60 <= both.count("qa") <= 90  # 75 expected
    assert {"<video> one", "<video> two"} <= set(told.prompts)
    answers = {told.answers[row] for row in range(1, 300, 3)}
    assert answers == {"red", "blue"}  # either of the clip's questions
    assert told.instructions[1] == "Question: What colour is the circle?\nAnswer:"


def test_a_clip_with_its_own_prompt_and_target_is_asked_that():
    batch = replace(clips(2), prompt=["Say it.", "So <video> what?"], target=["no", "yes"])
    told = room.choose(batch, TaskConfig(), step=0)
    assert told.prompts == ["<video>\nSay it.", "So <video> what?"] and told.answers == ["no", "yes"]
    assert told.instructions == ["Say it.", "So what?"]


def test_texts_cannot_smuggle_a_place_for_a_video():
    batch = replace(clips(1), text=["<video> red"], qa=[[question(0, question="What is <video>?")]])
    for config in (TaskConfig(qa=0), TaskConfig(caption=0)):
        told = room.choose(batch, config, step=0)
        assert told.prompts[0].count("<video>") == 1 and "<video>" not in told.answers[0]


def test_a_corpus_without_texts_is_refused_and_single_clips_are_not(folders):
    loss_of, model = objective(folders["gpt2"])
    silent = replace(one(clips(), 2), text=None, qa=None)
    with pytest.raises(ValueError, match="none of the clips .'0:clip2'. has a text .* need"):
        loss_of(model, silent, 0)
    loss_of(model, clips(), 0)
    loss = loss_of(model, silent, 1)  # in the middle of a run: a batch to learn nothing from
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(qa=-1), "tasks.qa=-1 must be 0 or above"),
        (dict(caption_prompts=["Describe."]), "'Describe.' must hold '<video>' once"),
        (dict(qa_prompts=["<video> What?"]), "does not hold '{question}'"),
        (dict(qa_prompts=[]), "tasks.qa_prompts is empty"),
    ],
)
def test_bad_tasks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(**config)


def test_budgets_follow_their_law(folders):
    loss_of, model = objective(folders["gpt2"])

    def drawn(**law):
        loss_of.config.budgets = BudgetConfig(**law)
        return [loss_of.budget(model, step) for step in range(400)]

    assert set(drawn()) == {None}
    assert set(drawn(values=[1, 4, 0])) == {1, 4, None}
    assert set(drawn(law="uniform", min_tokens=3)) == set(range(3, 13))
    assert set(drawn(law="pow2", max_tokens=8)) == {1, 2, 4, 8}
    logarithmic = drawn(law="log_uniform")
    assert set(logarithmic) == set(range(1, 13)) and logarithmic.count(1) > 3 * logarithmic.count(8)
    assert drawn(law="uniform") == drawn(law="uniform")
    with pytest.raises(ValueError, match="budgets.min_tokens=20 is above the largest budget, 12"):
        drawn(law="uniform", min_tokens=20)
    with pytest.raises(ValueError, match="budgets.law='odd' is unknown"):
        BudgetConfig(law="odd")


def test_timestamps_stand_before_each_group(folders):
    loss_of, model = objective(folders["gpt2"], timestamps=True)
    loss = loss_of(model, clips(), 0)
    loss.total.backward()
    tokens = model.encode(clips())
    written = with_times(["<video>?"] * 3, tokens)
    assert written == ["0.5s: <video>?"] * 3
    times = (torch.arange(24.0).reshape(1, 12, 2) / 8).expand(3, -1, -1)
    grouped = room.tokens_at(replace(tokens, group=tokens.rank, times=times), [2])
    prompts = with_times(["<video>?"], grouped)
    assert prompts == ["0.0s: <video> 0.2s: <video> 0.5s: <video> 0.8s: <video>?"]
    assert room.read(loss_of.llm, prompts, ["red"], grouped).positions > 4 * len("0.0s:") + 4
    few = grouped.select(grouped.mask & (grouped.group % 2 == 1))  # the other groups have no token at this budget
    prompts = with_times(["<video>?"], few)
    assert prompts == ["0.2s: <video> 0.8s: <video>?"], "no time is told of nothing"
    assert room.read(loss_of.llm, prompts, ["red"], few).positions > 2 * len("0.2s:") + 2
    silent = clips()
    silent.features["cached"].times = None
    with pytest.raises(ValueError, match="timestamps=true needs Tokens.times"):
        loss_of(model, silent, 0)


# distillation and adapters


def test_distillation_is_zero_where_teacher_and_student_say_the_same(folders):
    teacher = objective(folders["llama"])[1]
    config = dict(teacher="stage0", logits=1.0, hidden=0.5, hidden_layers=[1, -1], temperature=2.0, next_token=0.0)
    loss_of, model = objective(folders["llama"], load=lambda path: teacher, **config)
    loss = loss_of(model, clips(), 0)  # the same weights, all tokens
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-6)
    loss_of.config.budgets = BudgetConfig(values=[2])
    loss = loss_of(model, clips(), 0)
    assert float(loss.report["logit_kl"]) > 1e-4 and float(loss.report["hidden_distance"]) > 1e-4
    want = float(loss.report["logit_kl"]) + 0.5 * float(loss.report["hidden_distance"])
    assert float(loss.total.detach()) == pytest.approx(want, rel=1e-5)
    loss.total.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not loss_of.state_dict()


def test_divergence_is_what_torch_says():
    student, teacher = torch.randn(2, 5, 7)
    want = torch.nn.functional.kl_div(
        (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(room.logit_divergence(student, teacher, temperature=3), 9 * want.sum(-1))
    assert float(room.hidden_distance([teacher * 1.1], [teacher])[0]) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_adapters_alone_learn_beside_the_projector(folders, kind):
    pytest.importorskip("peft")
    plain, model = objective(folders[kind])
    loss_of, _ = objective(folders[kind], lora=LoraConfig(rank=2))
    assert loss_of.llm is not plain.llm and not plain.llm.adapted
    want = plain(model, clips(), 0).total
    assert torch.equal(loss_of(model, clips(), 0).total, want)  # adapters begin as nothing
    names = {name for name, p in loss_of.llm.model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names) and len(names) == len(list(loss_of.parameters()))
    before = {n: p.clone() for n, p in loss_of.llm.model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, clips(), 0).total.backward()
        optimizer.step()
    assert all(float(p.grad.abs().sum()) > 0 for p in loss_of.parameters())
    assert all(torch.equal(p, before[n]) for n, p in loss_of.llm.model.named_parameters() if n in before)
    assert not torch.equal(loss_of(model, clips(), 0).total, want)
    with loss_of.adapters.off():
        torch.testing.assert_close(loss_of(model, clips(), 0).total, want)
    assert all(p.requires_grad for p in loss_of.parameters())
    other, _ = objective(folders[kind], lora=LoraConfig(rank=2))
    other.load_state_dict(loss_of.state_dict())
    torch.testing.assert_close(other(model, clips(), 0).total, loss_of(model, clips(), 0).total)
    with pytest.raises(ValueError, match="holds trained adapters and cannot be pickled"):
        pickle.dumps(loss_of.llm)


def test_saved_adapters_load_in_peft(folders, tmp_path):
    peft = pytest.importorskip("peft")
    loss_of, model = objective(folders["llama"], lora=LoraConfig(rank=2, targets=["q_proj", "v_proj"]))
    for p in loss_of.parameters():
        p.data.normal_(std=0.3)
    loss_of.adapters.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(theirs(ids).logits, loss_of.llm.model(ids).logits)
    with pytest.raises(ValueError, match=r"lora.targets=\['query'\]: .*It has .*q_proj"):
        objective(folders["llama"], lora=LoraConfig(rank=2, targets=["query"]))


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(logits=1.0), "distillation needs a teacher and a weight above 0"),
        (dict(teacher="x"), "distillation needs a teacher and a weight above 0"),
        (dict(next_token=-1.0), "objective.next_token=-1.0 must be 0 or above"),
        (dict(temperature=0.0), "objective.temperature=0.0 must be above 0"),
        (dict(per="frame"), "objective.per='frame' is unknown"),
    ],
)
def test_bad_objectives_are_refused(folders, config, message):
    with pytest.raises(ValueError, match=message):
        objective(folders["gpt2"], **config)


def test_another_width_is_refused(folders):
    own = ObjectiveConfig(llm=LLMConfig(name=folders["gpt2"]))
    with pytest.raises(ValueError, match="model.embedding_dim=64, but the words of .* are 32 wide"):
        ProjectorObjective(own, PooledConfig(in_dim=5, embedding_dim=64, embedding_rms=1.0))


# evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_answered_alike_in_any_batch(folders, kind):
    loss_of, model = objective(folders[kind])
    batch = clips()
    answered = loss_of.ask(model, batch, budget=3, max_new_tokens=4, texts_per_call=2)
    assert [a.id for a in answered] == ["q0", "q1", "q2"] and [a.key for a in answered][1:] == ["0:clip1"] * 2
    apart = [a for row in range(3) for a in loss_of.ask(model, one(batch, row), budget=3, max_new_tokens=4)]
    for one_, other in zip(answered, apart, strict=True):
        assert one_.likelihoods == pytest.approx(other.likelihoods, abs=1e-4)
        assert replace(one_, likelihoods=[]) == replace(other, likelihoods=[])
    first = answered[0]
    assert first.tokens == 3 and first.positions > 3 and first.right == (first.chosen == "red")
    assert first.chosen == max(zip(first.likelihoods, first.choices))[1] and isinstance(first.text, str)
    blind = loss_of.ask(None, batch)
    told = loss_of.ask(None, batch, captions=True)
    assert blind[0].tokens == 0 and blind[0].positions == first.positions - 3 and blind[0].text is None
    assert told[0].likelihoods != blind[0].likelihoods
    bare = one(batch, 1)  # without a caption there is nothing to tell: the very same texts
    assert loss_of.ask(None, bare, captions=True) == loss_of.ask(None, bare)
    assert told[1].likelihoods == pytest.approx(blind[1].likelihoods, abs=1e-4)  # beside others


def test_a_model_that_reads_prompts_sees_each_question(folders):
    loss_of, model = objective(folders["gpt2"])
    plain = loss_of.ask(model, clips(), budget=2)
    assert model.seen_prompts == [None]  # once for the batch, no question
    model.reads_prompt = True
    asked = loss_of.ask(model, clips(), budget=2)
    (seen,) = model.seen_prompts[1:]
    assert seen == ["Question: What colour is the circle?\nAnswer:"] * 3
    for one_, other in zip(plain, asked, strict=True):
        assert one_.likelihoods == pytest.approx(other.likelihoods, abs=1e-4)


def test_training_gives_the_compressor_the_question_and_never_the_answer(folders):
    loss_of, model = objective(folders["gpt2"], tasks=TaskConfig(caption=0))
    loss_of(model, replace(clips(2), target=None), 0)
    assert model.seen_prompts == [["Question: What colour is the circle?\nAnswer:"] * 2]


def test_layers_and_prompts_that_are_not_there_are_named(folders):
    for layers in ([3], [-1, -4]):
        with pytest.raises(
            ValueError, match=rf"hidden_layers=.*has 2 layers, and {layers[-1]} is none of them: 0 .* to 2"
        ):
            objective(folders["llama"], lambda _: None, teacher="x", hidden=1.0, hidden_layers=layers)
    loss_of, model = objective(
        folders["llama"], tasks=TaskConfig(qa=0.0, qa_prompts=[], caption_prompts=[], caption=0.0)
    )
    with pytest.raises(ValueError, match=r"objective.tasks.qa_prompts=\[\]: evaluation asks with the first"):
        loss_of.ask(model, clips())
    with pytest.raises(ValueError, match=r"objective.tasks.caption_prompts=\[\]"):
        loss_of.generate(model, clips())
