"""A frozen language model reads tokens: nothing of it changes, everything of the projector learns, batches are sums of
their clips. The models are real classes of transformers with small random weights, saved and loaded as theirs are.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field, replace

import pytest
import torch

from vtok import llm as room
from vtok.layers.projector import ProjectorConfig, ProjectorModel
from vtok.llm import BudgetConfig, LLMConfig, LoraConfig, ObjectiveConfig, ProjectorObjective, TaskConfig
from vtok.llm.reading import answer_ids, prompt_ids, with_times
from vtok.types import Clip, Features, Tokens
from vtok.vision import TowerConfig

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

KINDS = ("gpt2", "llama", "qwen2")  # absolute positions; rotary; rotary with grouped heads and a chat template
TEXTS = ["What colour is the circle?", "red", "blue", "A red circle moves left.", "Description: Question: Answer:"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


def small_model(kind: str, vocabulary: int):
    t, torch_size = transformers, dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=vocabulary)
    rotary = dict(torch_size, num_attention_heads=4, max_position_embeddings=96, initializer_range=0.3)
    if kind == "gpt2":
        shape = dict(n_embd=32, n_layer=2, n_head=4, n_positions=96, vocab_size=vocabulary, initializer_range=0.3)
        return t.GPT2LMHeadModel(t.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**rotary, num_key_value_heads=4, bos_token_id=0, eos_token_id=0))
    return t.Qwen2ForCausalLM(t.Qwen2Config(**rotary, num_key_value_heads=2, bos_token_id=0, eos_token_id=0))


def small_tokenizer(kind: str):
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS * 3, vocab_size=320, special_tokens=["<end>"], show_progress=False)
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<end>", bos_token="<end>")
    out.chat_template = TEMPLATE if kind == "qwen2" else None
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = {}
    for kind in KINDS:
        out[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(3)
        tokenizer = small_tokenizer(kind)
        model = small_model(kind, len(tokenizer))
        # what repositories ask for; answers here must not follow it
        model.generation_config.do_sample, model.generation_config.repetition_penalty = True, 5.0
        model.save_pretrained(out[kind])
        tokenizer.save_pretrained(out[kind])
    return out


@dataclass
class PooledConfig(ProjectorConfig):
    tower: TowerConfig = field(default_factory=lambda: TowerConfig(name="cached"))


class Pooled(ProjectorModel):
    """A small real family: the projected patches of a clip, averaged into `budget` runs of time."""

    max_tokens = 12

    def __init__(self, config):
        super().__init__(config, load=lambda tower: pytest.fail("the clips bring features: no tower is needed"))
        self.seen_prompts: list[list[str] | None] = []

    def compress(self, features, *, budget=None, prompt=None) -> Tokens:
        self.seen_prompts.append(prompt)
        projected = self.project(features).patches
        rows = []
        for row, frames in enumerate(features.count().tolist()):
            flat = projected[row, :frames].flatten(0, 1)
            count = len(flat) if budget is None else budget
            rows.append(torch.nn.functional.adaptive_avg_pool1d(flat.T[None], count)[0].T)
        lengths = torch.tensor([len(row) for row in rows])
        embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        shape = embeddings.shape[:2]
        rank = torch.arange(shape[1]).expand(shape)
        positions = torch.full((*shape, 3), torch.nan)
        times = None if features.times is None else features.times[:, :1, None].expand(-1, -1, 2)
        return Tokens(embeddings, lengths, positions, torch.zeros_like(rank), rank, times=times)


def question(number: int, **more):
    asked = dict(id=f"q{number}", type="colour", question="What colour is the circle?", choices=["red", "blue"])
    return {**asked, "answer": "red", **more}


def clips(count: int = 3, frames: int = 3, width: int = 5) -> Clip:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([frames - row % frames for row in range(count)])
    patches = torch.randn(count, frames, 4, width, generator=generator)
    patches *= (torch.arange(frames) < lengths[:, None])[..., None, None]
    features = Features(patches, (2, 2), lengths=lengths, times=torch.arange(frames).expand(count, -1) / 8 + 0.5)
    words = ["A red circle moves left.", "", "A blue circle"]
    asked = [[question(0)], [question(1), question(2, answer="blue")], []]
    return Clip(
        keys=[f"0:clip{row}" for row in range(count)],
        text=[words[row % 3] for row in range(count)],
        qa=[asked[row % 3] for row in range(count)],
        features={"cached": features},
    )


def one(clip: Clip, row: int) -> Clip:
    """One clip of a batch, without the padding that the others made necessary."""
    features = clip.features["cached"]
    frames, at = int(features.lengths[row]), slice(row, row + 1)
    own = Features(features.patches[at, :frames], features.grid, times=features.times[at, :frames])
    own = replace(own, lengths=features.lengths[at])
    assert clip.text and clip.qa
    return Clip(keys=[clip.keys[row]], text=[clip.text[row]], qa=[clip.qa[row]], features={"cached": own})


def objective(folder: str, load=None, **config) -> tuple[ProjectorObjective, Pooled]:
    own = ObjectiveConfig(llm=LLMConfig(name=folder, chat=config.pop("chat", None)), **config)
    words = room.load_llm(own.llm)
    torch.manual_seed(0)
    model = Pooled(PooledConfig(in_dim=5, embedding_dim=words.embedding_dim, embedding_rms=words.embedding_rms))
    return ProjectorObjective(own, model.config, load=load), model


# the frozen model


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_the_projector_alone(folders, kind):
    loss_of, model = objective(folders[kind], budgets=BudgetConfig(values=[4]))
    words = loss_of.llm
    before = {name: value.clone() for name, value in words.model.state_dict().items()}
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_of.parameters()], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(3):
        loss = loss_of(model, clips(), 0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert losses[2] < losses[0]
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in model.parameters())
    assert all(p.grad is None for p in words.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in words.model.state_dict().items())
    assert not list(loss_of.parameters()) and not loss_of.state_dict()
    assert float(loss.report["tokens"]) == 4 and float(loss.report["without_answer"]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["clip", "token"])
def test_a_batch_is_the_mean_of_its_clips(folders, kind, per):
    loss_of, model = objective(folders[kind], per=per)
    batch = clips()
    together = loss_of(model, batch, 5)
    told = room.choose(batch, loss_of.config.tasks, step=5)
    apart = [loss_of(model, one(batch, row), 5).total for row in range(3)]
    sizes = [len(answer_ids(loss_of.llm, p, a)[0]) for p, a in zip(told.prompts, told.answers)]
    weights = torch.tensor(sizes, dtype=torch.float32) if per == "token" else torch.ones(3)
    torch.testing.assert_close(together.total, (torch.stack(apart) * weights).sum() / weights.sum(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_likelihoods_and_answers_do_not_depend_on_the_batch(folders, kind):
    words = room.load_llm(LLMConfig(name=folders[kind]))
    _, model = objective(folders[kind])
    batch = clips()
    tokens = model.encode(batch)
    assert len(set(tokens.lengths.tolist())) == 3  # ragged
    prompts = ["<video>\nDescription:", "Look: <video> What colour is the circle?", "<video>"]
    answers = ["A red circle moves left.", "red", "blue circle"]
    choices = [["red", "blue", "A red circle"], ["blue"], ["left", "red"]]
    seen = room.read(words, prompts, answers, tokens, hidden=[-1])
    scores = room.score(words, prompts, choices, tokens, texts_per_call=4)
    texts = room.generate(words, prompts, tokens, max_new_tokens=6)
    assert len(set(texts)) == 3
    for row in range(3):
        alone = model.encode(one(batch, row))
        single = room.read(words, [prompts[row]], [answers[row]], alone, hidden=[-1])
        torch.testing.assert_close(seen.logits[seen.row == row], single.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(seen.hidden[0][seen.row == row], single.hidden[0], atol=1e-5, rtol=1e-5)
        assert seen.labels[seen.row == row].tolist() == single.labels.tolist()
        assert scores[row] == pytest.approx(room.score(words, [prompts[row]], [choices[row]], alone)[0], abs=1e-4)
        assert texts[row] == room.generate(words, [prompts[row]], alone, max_new_tokens=6)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts_per_call", [2, 64])
@pytest.mark.parametrize("template", ["See <video>. {}", "{} <video> Now:", "{} <video>"])
def test_choices_continue_what_their_prompts_share(folders, kind, texts_per_call, template, monkeypatch):
    """The same likelihoods, to rounding, as of texts that are read from their beginnings."""
    words = room.load_llm(LLMConfig(name=folders[kind]))
    _, model = objective(folders[kind])
    clip_of = [0, 0, 1, 2, 2, 2]
    tokens = room.tokens_at(model.encode(clips()), clip_of)
    asked = ["What colour?", "What shape is the red one?", "What?", "What moves?", "", "What colour is it then?"]
    prompts = [template.format(question) for question in asked]
    choices = [["red", "blue"], ["circle", "a red circle"], ["left"], [], ["red", "left", "blue"], ["blue circle"]]
    read = []
    forward = type(words).forward
    monkeypatch.setattr(
        type(words), "forward", lambda self, *a, **k: read.append(k.get("past")) or forward(self, *a, **k)
    )
    found = room.score(words, prompts, choices, tokens, clips=clip_of, texts_per_call=texts_per_call)
    assert [len(row) for row in found] == [len(row) for row in choices]
    assert all((cache is None) == (template.endswith("<video>") and not words.chat) for cache in read)
    assert found == [
        pytest.approx(row, abs=1e-4)
        for row in room.score(words, prompts, choices, tokens, texts_per_call=texts_per_call)
    ]
    for row, offered in enumerate(choices):
        for choice, value in zip(offered, found[row]):
            seen = room.read(words, [prompts[row]], [choice], room.tokens_at(tokens, [row]))
            assert value == pytest.approx(-float(seen.nll().detach().sum()), abs=1e-4)
    blind = room.score(words, prompts, choices, None, clips=clip_of)
    assert blind[0][0] == pytest.approx(-float(room.read(words, prompts[:1], ["red"], None).nll().sum()), abs=1e-4)


def test_choices_that_do_not_fit_say_so(folders):
    words = room.load_llm(LLMConfig(name=folders["llama"], max_length=12))
    _, model = objective(folders["llama"])
    tokens = room.tokens_at(model.encode(clips()), [1])
    with pytest.raises(ValueError, match=r"text 0 takes \d+ positions .* the language model has 12"):
        room.score(words, ["<video> What colour?"], [["red", "a red circle that moves to the left side"]], tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_words_as_tokens_read_like_words(folders, kind):
    """Tokens that are word embeddings give what the model gives for the words' ids, by its own forward and generate."""
    words = room.load_llm(LLMConfig(name=folders[kind], chat=False))
    ids = words.tokenizer("A red circle moves left.").input_ids
    embeddings = words.embed(torch.tensor([ids]))
    rank = torch.arange(len(ids))[None]
    tokens = Tokens(embeddings, torch.tensor([len(ids)]), torch.full((1, len(ids), 3), torch.nan), rank * 0, rank)
    ask, answer = words.tokenizer("\nAnswer:").input_ids, words.tokenizer(" red").input_ids + [0]
    seen = room.read(words, ["<video>\nAnswer:"], ["red"], tokens)
    assert seen.labels.tolist() == answer
    whole = words.model(torch.tensor([[*ids, *ask, *answer]])).logits[0, len(ids) + len(ask) - 1 : -1]
    torch.testing.assert_close(seen.logits, whole, atol=1e-5, rtol=1e-5)
    greedy = whole[0].argmax()
    made = words.tokenizer(room.generate(words, ["<video>\nAnswer:"], tokens, max_new_tokens=1)[0]).input_ids
    assert greedy == 0 or words.tokenizer.decode(made).strip() == words.tokenizer.decode([int(greedy)]).strip()


def test_greedy_is_what_one_step_at_a_time_gives(folders):
    words = room.load_llm(LLMConfig(name=folders["llama"]))
    ids = words.tokenizer("red circle").input_ids
    for _ in range(8):
        ids.append(int(words.model(torch.tensor([ids])).logits[0, -1].argmax()))
    made = words.generate(words.embed(torch.tensor([ids[:-8]])), torch.ones(1, len(ids) - 8), max_new_tokens=8)[0]
    new = ids[-8:]
    assert made == new[: new.index(0)] if 0 in new else made == new


def test_checkpointed_layers_give_the_same_gradients(folders):
    gradients = []
    for checkpoint in (False, True):
        words = LLMConfig(name=folders["llama"], checkpoint=checkpoint)
        _, model = objective(folders["llama"])
        loss_of = ProjectorObjective(ObjectiveConfig(llm=words), model.config)
        loss_of(model, clips(), 1).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients):
        torch.testing.assert_close(kept, recomputed)


def test_a_reference_is_shared_and_a_pickle_finds_the_same_weights(folders):
    words = room.load_llm(LLMConfig(name=folders["gpt2"]))
    assert copy.deepcopy(words) is words and room.load_llm(LLMConfig(name=folders["gpt2"])) is words
    pickled = pickle.dumps(words)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)
    assert again.config.sha256 == words.sha256 and again.end_ids == words.end_ids
    for one_, other in zip(words.model.parameters(), again.model.parameters()):
        assert torch.equal(one_, other)
    table = words.model.get_input_embeddings().weight
    assert words.embedding_rms == pytest.approx(float(table.square().mean().sqrt()), rel=1e-5)
    assert words.embedding_dim == 32 and words.max_length == 96


def test_half_precision_is_kept_whatever_the_trainer_runs_in(folders):
    words = room.load_llm(LLMConfig(name=folders["llama"], dtype="bfloat16"))
    _, model = objective(folders["llama"])
    with torch.autocast("cpu", torch.float16):
        tokens = model.encode(clips())
        seen = room.read(words, ["<video>"] * 3, ["red"] * 3, tokens)
    assert {p.dtype for p in words.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        plain = room.read(words, ["<video>"] * 3, ["red"] * 3, tokens)
    assert torch.equal(seen.logits, plain.logits) and torch.isfinite(seen.logits).all()
    seen.nll().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(name="nowhere"), "llm.name='nowhere' is no folder here and names no repository"),
        (dict(name=""), "llm.name='' is no folder here"),
        (dict(sha256="0" * 64), "llm.sha256=0+ is expected, but .* has [0-9a-f]{64}: other weights"),
        (dict(chat=True), "llm.chat=true: the tokenizer of .* has no chat template"),
        (dict(max_length=200), "llm.max_length=200: .* was made for 96 positions"),
    ],
)
def test_what_cannot_be_loaded_says_why(folders, config, message):
    with pytest.raises(ValueError, match=message):
        room.load_llm(LLMConfig(**{"name": folders["gpt2"], **config}))


def test_missing_weights_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes(open(f"{folders['llama']}/{file}", "rb").read())
    state = load_file(f"{folders['llama']}/model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of LlamaForCausalLM are not in its files, such as .*up_proj"):
        room.load_llm(LLMConfig(name=str(tmp_path)))


def test_texts_that_are_too_long_are_refused_or_counted(folders):
    loss_of, model = objective(folders["gpt2"], max_answer=2, tasks=TaskConfig(qa=0))
    report = loss_of(model, clips(), 0).report
    assert float(report["cut_answers"]) == pytest.approx(2 / 3)  # both captions; the clip without one has no answer
    assert float(report["without_answer"]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"text 0 takes \d+ positions .* the language model has 96"):
        room.read(loss_of.llm, ["<video>"], ["red " * 200], model.encode(one(clips(), 0)))
    with pytest.raises(ValueError, match="leave room for 8[0-9] of 96, and max_new_tokens=95"):
        loss_of.generate(model, one(clips(), 0), max_new_tokens=95)


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


def test_two_videos_and_permuted_tokens_give_other_likelihoods(folders):
    words = room.load_llm(LLMConfig(name=folders["llama"]))
    _, model = objective(folders["llama"])
    tokens = model.encode(clips())
    scores = room.score(words, ["<video>?"] * 3, [["red"]] * 3, tokens)
    assert len({round(score[0], 4) for score in scores}) == 3
    turned = replace(tokens, embeddings=tokens.embeddings.flip(1))
    assert room.score(words, ["<video>?"], [["red"]], room.tokens_at(turned, [0]))[0] != scores[0]
