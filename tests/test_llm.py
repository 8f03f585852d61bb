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
from vtok.llm import BudgetConfig, LLMConfig, ObjectiveConfig, ProjectorObjective, TaskConfig
from vtok.llm.reading import answer_ids
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


def dropping_model(kind: str, vocabulary: int):
    """Layers that drop by functions, not by modules: as they do in train mode."""
    shape = dict(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(initializer_range=0.3, init_std=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    if kind == "opt":
        more = dict(ffn_dim=48, max_position_embeddings=96, word_embed_proj_dim=32, dropout=0.5)
        return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **more))
    return transformers.FalconForCausalLM(transformers.FalconConfig(**shape, alibi=False, hidden_dropout=0.5))


@pytest.mark.parametrize("kind", ("opt", "falcon"))
def test_checkpointed_layers_drop_nothing(kind, tmp_path):
    torch.manual_seed(3)
    tokenizer = small_tokenizer("llama")
    dropping_model(kind, len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, calls = [], []
    for checkpoint in (False, True):
        _, model = objective(str(tmp_path))
        words = LLMConfig(name=str(tmp_path), checkpoint=checkpoint)
        loss_of = ProjectorObjective(ObjectiveConfig(llm=words), model.config)
        norms = [part for name, part in loss_of.llm.model.named_modules() if ".0." in name and "norm" in name]
        norms[0].register_forward_hook(lambda *_: calls.append(1))
        loss = loss_of(model, clips(), 1).total
        loss.backward()
        found.append([loss.detach(), len(calls), *(p.grad for p in model.parameters())])
        assert not any(part.training for part in loss_of.llm.model.modules())
    (kept, seen, *gradients), (recomputed, again, *others) = found
    torch.testing.assert_close(kept, recomputed)
    assert again - seen == 2 * seen, "the layers compute once more in the backward pass"
    for own, other in zip(gradients, others):
        torch.testing.assert_close(own, other)


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


def test_two_videos_and_permuted_tokens_give_other_likelihoods(folders):
    words = room.load_llm(LLMConfig(name=folders["llama"]))
    _, model = objective(folders["llama"])
    tokens = model.encode(clips())
    scores = room.score(words, ["<video>?"] * 3, [["red"]] * 3, tokens)
    assert len({round(score[0], 4) for score in scores}) == 3
    turned = replace(tokens, embeddings=tokens.embeddings.flip(1))
    assert room.score(words, ["<video>?"], [["red"]], room.tokens_at(turned, [0]))[0] != scores[0]
