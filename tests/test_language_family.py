"""Small language models as compressors: tokens of texts and of videos, what learns, what ships, what is asked. Both
language models are real classes of transformers with small random weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_llm import small_model, small_tokenizer

from vtok.config import load
from vtok.families import language
from vtok.families.language import Config, Model, ObjectiveConfig, SmallLM, build
from vtok.layers.latent_queries import WordHead, run_sums
from vtok.layers.projector import ProjectorModel
from vtok.llm import LLMConfig, LoraConfig, TaskConfig, load_llm
from vtok.llm.text_objective import tokens_at_ratio
from vtok.llm.words import count_words, first_words, mean_words, words_as_tokens
from vtok.train import build as build_run
from vtok.types import Clip, Features

torch.set_num_threads(1)
TEXT = "A red ring moves left over the blue ground. Then a green star stays still."
TEXTS = [TEXT, "hello", "Where is the ring? " * 3]
TOWER = language.TowerConfig(name="tower")
LEARNS = ("all", "lora", "none")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    out = {}
    for kind in ("llama", "gpt2"):
        out[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(3)
        tokenizer = small_tokenizer(kind)
        model = small_model(kind, len(tokenizer))
        if kind == "llama":
            model.config.max_position_embeddings = 256
        model.save_pretrained(out[kind])
        tokenizer.save_pretrained(out[kind])
    return out


def config(folder: str, *, learn: str = "all", lm: dict[str, Any] | None = None, **more: Any) -> Config:
    small = SmallLM(name=folder, learn=learn, lora=LoraConfig(rank=2 if learn == "lora" else 0), **lm or {})
    sizes = dict(embedding_dim=24, embedding_rms=0.05, num_tokens=6, max_tokens=40, in_dim=5, tower=TOWER)
    return Config(**sizes | dict(lm=small) | more)


def texts(rows: list[str]) -> Clip:
    return Clip([str(i) for i in range(len(rows))], text=rows)


def videos(lengths: list[int], *, prompt: str = "what moves?") -> Clip:
    patches = torch.randn(len(lengths), max(lengths), 12, 5, dtype=torch.float64)
    for row, length in enumerate(lengths):
        patches[row, length:] = 0
    times = torch.arange(max(lengths)).expand(len(lengths), -1) / 2.0
    seen = Features(patches, (3, 4), times=times, lengths=torch.tensor(lengths))
    keys = [str(i) for i in range(len(lengths))]
    return Clip(keys, features={"tower": seen}, prompt=[prompt] * len(lengths))


def alone(clip: Clip, row: int) -> Clip:
    one = clip.rows(slice(row, row + 1))
    if one.features is None:
        return one
    seen = one.features["tower"]
    length = int(seen.count()[0])
    cut = Features(seen.patches[:, :length], seen.grid, times=seen.times[:, :length], lengths=seen.lengths)
    return Clip(one.keys, features={"tower": cut}, prompt=one.prompt)


FORMS = {
    "text": (dict(), texts(TEXTS)),
    "segments": (dict(segment_words=7, head="mlp", opening="Keep this:"), texts(TEXTS)),
    "video": (dict(source="video", window=3), videos([7, 1, 6])),
    "pooled text": (dict(queries="pooled", segment_words=7, opening="Keep this:"), texts(TEXTS)),
    "pooled video": (dict(queries="pooled", source="video", window=3, question=True), videos([7, 1, 6])),
    "question": (dict(source="video", window=3, patches=4, question=True, lm=dict(layer=1)), videos([7, 1, 6])),
}
each_form = pytest.mark.parametrize("form", FORMS)


def made(folder: str, form: str, *, learn: str = "all", dtype: torch.dtype = torch.float64) -> tuple[Model, Clip]:
    changes, clip = FORMS[form]
    torch.manual_seed(0)
    lm = dict(changes.get("lm", {})) | ({"dtype": "float32"} if learn != "all" else {})
    model = build(config(folder, learn=learn, **{**changes, "lm": lm})).eval().to(dtype)
    return model, clip


@each_form
@torch.no_grad()
def test_batched_equals_one_by_one_with_learned_positions_too(folders, form):
    """Rotary ones are asked in test_contract_projectors."""
    model, clip = made(folders["gpt2"], form)
    for budget in (None, 1, 5):
        both = model.encode(clip, budget=budget)
        for row in range(len(clip)):
            single, mask = model.encode(alone(clip, row), budget=budget), both.mask[row]
            assert int(mask.sum()) == int(single.lengths[0])
            assert (both.embeddings[row][mask] - single.embeddings[0]).abs().max() < 1e-10
            assert torch.equal(both.group[row][mask], single.group[0])
            assert torch.equal(both.positions[row][mask].isnan(), single.positions[0].isnan())


@each_form
@torch.no_grad()
def test_budgets_are_met_and_nested(folders, form):
    model, clip = made(folders["llama"], form)
    everything = model.encode(clip)
    groups = everything.num_groups
    assert everything.lengths.tolist() == [min(40, 6 * g) for g in groups.tolist()]
    for budget in (1, 4, 6, 13):
        tokens = model.encode(clip, budget=budget)
        assert tokens.lengths.tolist() == torch.minimum(everything.lengths, torch.tensor(budget)).tolist()
        assert model.nested == (not form.startswith("pooled"))
        for row in range(len(clip)) if model.nested else ():
            own = everything.select(everything.mask & (torch.arange(len(clip)) == row)[:, None])
            kept = [
                torch.cat([own.group[row, :n, None], own.rank[row, :n, None]], 1).tolist() for n in [own.lengths[row]]
            ]
            for at in range(int(tokens.lengths[row])):
                where = kept[0].index([int(tokens.group[row, at]), int(tokens.rank[row, at])])
                assert torch.allclose(tokens.embeddings[row, at], own.embeddings[row, where], atol=1e-12, rtol=0)
    per_clip = model.encode(clip, budget=torch.tensor([3, 1, 2]))
    assert per_clip.lengths.tolist() == [3, 1, 2]
    per_segment = torch.zeros(3, int(groups.max()), dtype=torch.int64)
    per_segment[:, 0] = torch.tensor([6, 2, 1])
    tokens = model.encode(clip, budget=per_segment)
    assert tokens.lengths.tolist() == [6, 2, 1] and not tokens.group[tokens.mask].any()
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=f"budget={wrong} is out of range"):
            model.encode(clip, budget=wrong)


@torch.no_grad()
def test_pooled_queries_begin_from_runs_of_the_input(folders):
    """Runs by hand; in the model a run's words reach its own query, and the first one's alone where there is one."""
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    sums = run_sums(x, torch.tensor([7, 2]), torch.tensor([3, 0]))
    by_hand = [x[0, :3].sum(0) / 3**0.5, x[0, 3:5].sum(0) / 2**0.5, x[0, 5:].sum(0) / 2**0.5]
    assert torch.allclose(sums[0], torch.stack(by_hand), atol=1e-12) and not sums[1].any()
    few = run_sums(x[:, :2], torch.tensor([2, 2]), torch.tensor([4, 1]))
    assert torch.equal(few[0, [0, 2]], x[0, :2]) and not few[0, [1, 3]].any() and not few[1, 1:].any()
    long = run_sums(torch.ones(1, 3000, 2, dtype=torch.bfloat16), torch.tensor([3000]), torch.tensor([1]))
    assert torch.allclose(long.float(), torch.tensor(3000.0).sqrt(), rtol=1e-2)
    model, clip = made(folders["llama"], "pooled text")
    plain = copy.copy(model)
    plain.config = replace(model.config, queries="learned")
    for budget in (1, 6):
        pooled, learned = model.encode(clip, budget=budget), plain.encode(clip, budget=budget)
        assert torch.equal(pooled.lengths, learned.lengths) and torch.equal(pooled.group, learned.group)
        assert ((pooled.embeddings - learned.embeddings).abs().amax(-1) > 1e-3)[pooled.mask].all()


@pytest.mark.parametrize("head", ["linear", "mlp"])
@torch.no_grad()
def test_pooled_queries_begin_as_sums_of_the_large_models_words(folders, head):
    """What the head hands on at first: of the same model, its own words; of a smaller one, words mapped onto them."""
    llm = load_llm(LLMConfig(name=folders["llama"]))
    sizes = dict(embedding_dim=llm.embedding_dim, embedding_rms=llm.embedding_rms)
    model = build(config(folders["llama"], queries="pooled", head=head, **sizes)).eval()
    drawn = model.encode(texts(TEXTS), budget=3).embeddings
    told = model.begin_at_words(llm)
    shared = len(llm.tokenizer.get_vocab())
    assert told == f"model.head begins as the map of {shared} shared words, which explains 100.0% of them"
    tokens = model.encode(texts(TEXTS), budget=3)
    pooled = mean_words(words_as_tokens(llm, TEXTS), torch.tensor([3, 3, 3]))
    assert torch.equal(tokens.lengths, pooled.lengths)
    wanted = (
        torch.nn.functional.layer_norm(pooled.embeddings / llm.embedding_rms, [llm.embedding_dim]) * llm.embedding_rms
    )
    assert torch.allclose(tokens.embeddings[tokens.mask], wanted[pooled.mask], atol=1e-4 * llm.embedding_rms)
    assert (drawn - tokens.embeddings).abs().max() > 0.1 * llm.embedding_rms
    assert build(config(folders["llama"])).begin_at_words(llm) == "", "learned queries hand nothing on"
    few = build(config(folders["gpt2"], queries="pooled", head=head))
    kept = copy.deepcopy(few.head.state_dict())
    few.small_width = 10**6
    assert "begins at random" in few.begin_at_words(llm)
    assert all(torch.equal(value, few.head.state_dict()[name]) for name, value in kept.items())


@torch.no_grad()
def test_the_map_of_words_is_that_of_least_squares():
    """Over more words than are squared at once, onto another width, with what no map explains."""
    small = torch.randn(40000, 24, dtype=torch.float64)
    large = small @ torch.randn(24, 16, dtype=torch.float64) + torch.randn(40000, 16, dtype=torch.float64)
    head = WordHead(24, 16, kind="linear", rms=0.1, skip=True).double()
    explained = head.begin_at_words(small, large)
    wanted = torch.linalg.lstsq(small, large).solution
    left = (large - small @ wanted).square().sum() / large.square().sum()
    assert abs(explained - (1 - float(left))) < 1e-9 and 0.5 < explained < 0.99
    assert torch.allclose(head.skip.weight.mT * large.square().mean().sqrt(), wanted, atol=1e-6)


def test_a_run_begins_at_the_words_of_its_llm(folders, tmp_path, capsys):
    """The preset's own run, when it begins; one that goes on has its head in the checkpoint."""
    names = [f"{key}={folders['llama']}" for key in ("model.lm.name", "objective.llm.name")]
    run = load("configs/language/c3_tiny.yaml", [*names, f"out={tmp_path}", "data.shards=none"])
    begun = build_run(run).model.head
    assert "model.head begins as the map of" in capsys.readouterr().out
    assert not begun.out.weight.any() and torch.allclose(
        begun.skip.weight * run.model.embedding_rms, torch.eye(32), atol=1e-4
    )
    going_on = build_run(run, fresh=False).model.head
    assert "model.head" not in capsys.readouterr().out and going_on.out.weight.any()


def test_a_head_that_was_taken_over_is_left_as_it_is(folders):
    """Beginning with another model of the family, its head is what it was; with a projector, or where the LLM's width
    is another, the head is new and begins at words."""
    llm = load_llm(LLMConfig(name=folders["llama"]))
    sizes = dict(embedding_dim=llm.embedding_dim, embedding_rms=llm.embedding_rms, source="video", queries="pooled")
    source, model = (build(config(folders["llama"], **sizes)) for _ in range(2))
    model.warm_start(source)
    assert model.begin_at_words(llm) == "" and torch.equal(model.head.skip.weight, source.head.skip.weight)
    wider = build(config(folders["llama"], **{**sizes, "embedding_dim": 40}))
    wider.warm_start(build(config(folders["llama"], **{**sizes, "embedding_dim": 40})))
    other = build(config(folders["llama"], **sizes))
    other.go_on_as(wider)
    assert "begins as the map" in other.begin_at_words(llm)
    other.go_on_as(model)
    assert other.begin_at_words(llm) == ""
    eye = dict(in_dim=5, embedding_dim=model.small_width, embedding_rms=model.small_rms, tower=TOWER)
    stage0 = ProjectorModel(language._EyeConfig(**eye))
    begun = build(config(folders["llama"], **sizes))
    begun.warm_start(stage0)
    assert "begins as the map" in begun.begin_at_words(llm)


def test_pooled_queries_are_of_the_mode_that_has_queries(folders):
    with pytest.raises(ValueError, match="model.queries=pooled is for mode=latent_lm, .* not model.mode=caption_lm"):
        config(folders["llama"], source="video", mode="caption_lm", queries="pooled")
    with pytest.raises(ValueError, match="model.queries='avg' is unknown; choose one of learned, pooled"):
        config(folders["llama"], queries="avg")


@torch.no_grad()
def test_budget_is_truncation(folders):
    model, _ = made(folders["llama"], "segments")
    clip = texts([TEXT, TEXT])
    everything = model.encode(clip)
    for budget in (1, 2, 7, 20):
        tokens, cut = model.encode(clip, budget=budget), everything.truncate(budget)
        assert tokens.lengths.tolist() == cut.lengths.tolist()
        assert torch.equal(tokens.group, cut.group) and torch.equal(tokens.rank, cut.rank)
        assert (tokens.embeddings - cut.embeddings).abs().max() < 1e-12


@torch.no_grad()
def test_segments_know_themselves_alone(folders):
    """What comes later in a text or a video never changes the tokens of earlier segments."""
    model, _ = made(folders["llama"], "segments")
    words = model.tokenizer(TEXT).input_ids
    start = model.tokenizer.decode(words[:14])
    assert model.tokenizer(start).input_ids == words[:14]
    model.max_tokens = 400
    long, short = model.encode(texts([TEXT])), model.encode(texts([start]))
    assert (long.embeddings[0, :12] - short.embeddings[0]).abs().max() < 1e-12
    model, clip = made(folders["llama"], "video")
    tokens = model.encode(clip)
    assert tokens.num_groups.tolist() == [3, 1, 2]
    assert tokens.times[0].tolist() == [[0, 1], [1.5, 2.5], [3, 3]] and tokens.times[2, 1].tolist() == [1.5, 2.5]


@torch.no_grad()
def test_a_question_changes_tokens_where_it_is_asked_for(folders):
    asked, _ = made(folders["llama"], "question")
    plain, _ = made(folders["llama"], "video")
    clip = videos([4])
    other = Clip(clip.keys, features=clip.features, prompt=["how many?"])
    assert asked.reads_prompt and not plain.reads_prompt
    assert not torch.equal(asked.encode(clip).embeddings, asked.encode(other).embeddings)
    assert torch.equal(plain.encode(clip).embeddings, plain.encode(other).embeddings)


def objective(folder: str, model: Config, **settings: Any) -> language.Objective:
    settings = dict(llm=LLMConfig(name=folder), tasks=TaskConfig(caption=0.0, reconstruction=1.0)) | settings
    model.embedding_dim = 0
    out = language.Objective(ObjectiveConfig(**settings), model)
    model.embedding_dim, model.embedding_rms = out.llm.embedding_dim, out.llm.embedding_rms
    return out


@pytest.mark.parametrize("learn", LEARNS)
def test_gradients_reach_what_learns_and_the_decoder_stays(folders, learn):
    pytest.importorskip("peft")
    settings = config(folders["llama"], learn=learn)
    reads = objective(folders["llama"], settings)
    model = build(settings).train()
    decoder = {name: value.clone() for name, value in reads.llm.model.state_dict().items()}
    small = {k: v.clone() for k, v in (model.lm or model.reference.model).state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    clip, seen = texts(TEXTS), []
    for step in range(8):
        loss = reads(model, clip, 0)
        optimizer.zero_grad()
        loss.total.backward()
        if not step:
            learned = {
                name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()
            }
            assert learned == {"queries", "head"} | ({"all": {"lm"}, "lora": {"adapters"}, "none": set()}[learn])
        optimizer.step()
        seen.append(float(loss.report["nll"]))
    assert seen[-1] < seen[0]
    assert all(torch.equal(v, decoder[k]) for k, v in reads.llm.model.state_dict().items())
    after = (model.lm or model.reference.model).state_dict()
    moved = {k for k in small if not torch.equal(after[k], small[k])}
    assert bool(moved) == (learn != "none") and (learn != "lora" or all("lora" in k for k in moved))
    assert not [p for p in reads.parameters() if p.requires_grad]


@pytest.mark.parametrize("learn", LEARNS)
@torch.no_grad()
def test_what_learns_ships_and_loads(folders, learn):
    pytest.importorskip("peft")
    model = build(config(folders["llama"], learn=learn)).eval()
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"queries", "head"} | (
        {"all": {"lm"}, "lora": {"adapters"}, "none": set()}[learn]
    )
    other = Model(copy.deepcopy(model.config)).eval()
    clip = texts(TEXTS)
    assert not torch.equal(model.encode(clip).embeddings, other.encode(clip).embeddings)
    other.load_state_dict(state, strict=True)
    assert torch.equal(model.encode(clip).embeddings, other.encode(clip).embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(clip, budget=4).embeddings.isfinite().all()
    if learn == "all":
        assert model.bfloat16().encode(clip).embeddings.isfinite().all()


def test_it_begins_as_the_small_language_model_it_names(folders):
    model = build(config(folders["llama"])).eval()
    given = load_llm(LLMConfig(name=folders["llama"]))
    assert model.config.lm.sha256 == given.sha256 and model.config.lm.embedding_rms == given.embedding_rms
    ids = torch.tensor([model.tokenizer(TEXT).input_ids])
    with torch.no_grad():
        ours = model.lm(input_ids=ids).last_hidden_state
        assert torch.equal(ours, given.model.base_model(input_ids=ids).last_hidden_state)
        words = given.embed(torch.arange(len(given.tokenizer)))
    assert 0.5 < float(model.queries.vectors.detach().std() / words.std()) < 2


def test_checkpointed_layers_give_the_same_gradients(folders):
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = build(config(folders["llama"], lm=dict(checkpoint=checkpoint))).train()
        torch.nn.init.normal_(model.head.out.weight, generator=torch.Generator().manual_seed(1))
        model.encode(texts(TEXTS)).embeddings.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


def test_settings_that_cannot_be(folders):
    wrong = {
        "model.mode='c3' is unknown; choose one of latent_lm": dict(mode="c3"),
        "model.source='audio' is unknown": dict(source="audio"),
        "model.num_tokens=0 must be at least 1": dict(num_tokens=0),
        "model.question=true is for videos": dict(question=True),
    }
    for message, settings in wrong.items():
        with pytest.raises(ValueError, match=message):
            Config(**settings)
    with pytest.raises(ValueError, match="adapters need a rank, and learn=lora"):
        SmallLM(learn="lora")
    with pytest.raises(ValueError, match="model.lm.name='nowhere' is no folder here"):
        build(config("nowhere"))
    with pytest.raises(ValueError, match="model.lm.architecture is open"):
        Model(config(folders["llama"]))
    model = build(config(folders["llama"])).eval()
    with pytest.raises(ValueError, match="have no text, and model.source=text: set data.texts=true"):
        model.encode(videos([2]))
    with pytest.raises(ValueError, match="positions"):
        model.encode(texts([TEXT * 30]))
    model.config.lm.vocabulary, model._tokenizer = "0" * 64, None
    with pytest.raises(ValueError, match="is not the one this model was trained with"):
        model.encode(texts([TEXT]))


@torch.no_grad()
def test_tokens_of_videos_are_counted_before_they_are_seen(folders):
    model = build(config(folders["llama"], source="video", window=3, max_frames=5)).eval()
    clip = videos([7, 1, 6, 4])
    for budget in (None, 1, 5, 8, 40):
        counted = [model.config.token_count(n, 3, 4, budget=budget) for n in (7, 1, 6, 4)]
        assert model.encode(clip, budget=budget).lengths.tolist() == counted
    assert model.config.length_policy == "metadata"
    assert Config(max_tokens=40).token_bounds(1, 1, 1, budget=7) == (0, 7)


# what the objective of texts asks


def test_words_as_tokens_are_what_the_language_model_reads(folders):
    """All words as tokens: the loss of a prompt with the text written in it, and no distance to the teacher."""
    settings = config(folders["llama"])
    reads = objective(folders["llama"], settings, teacher="text", logits=1.0, hidden=1.0)

    class AllWords(torch.nn.Module):
        config, max_tokens = settings, 40

        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def encode(self, clip, *, budget=None):
            assert clip.target is None
            return words_as_tokens(reads.llm, clip.text)

    report = reads(AllWords(), texts(TEXTS), 0).report
    assert float(report["logit_kl"]) < 1e-5 and float(report["hidden_distance"]) < 1e-9
    model = build(settings)
    report = reads(model, texts(TEXTS), 0).report
    assert float(report["logit_kl"]) > 1e-3 and float(report["hidden_distance"]) > 1e-3


def test_controls_keep_the_beginning_or_a_little_of_everything(folders):
    llm = load_llm(LLMConfig(name=folders["llama"]))
    words = words_as_tokens(llm, TEXTS)
    lengths = torch.tensor(count_words(llm, TEXTS))
    assert words.lengths.tolist() == lengths.tolist()
    counts = tokens_at_ratio(lengths.tolist(), 4, most=1000)
    assert counts.tolist() == [max(int(n / 4), 1) for n in lengths.tolist()]
    first = first_words(words, counts)
    assert torch.equal(first.lengths, counts)
    assert torch.equal(first.embeddings[0], words.embeddings[0, : int(counts[0])])
    pooled = mean_words(words, counts)
    assert torch.equal(pooled.lengths, counts)
    for row in range(3):
        runs = torch.arange(int(lengths[row])) * int(counts[row]) // int(lengths[row])
        for run in range(int(counts[row])):
            members = words.embeddings[row, : int(lengths[row])][runs == run]
            expected = members.sum(0) / len(members) ** 0.5
            torch.testing.assert_close(pooled.embeddings[row, run], expected)
    assert torch.equal(mean_words(words, lengths).embeddings, words.embeddings * words.mask[..., None])
    empty = words_as_tokens(llm, ["", "hello"])
    assert empty.lengths[0] == 0 and mean_words(empty, torch.tensor([3, 1])).lengths.tolist() == [0, 1]


def test_texts_are_cut_and_gone_on_with(folders):
    settings = config(folders["llama"])
    reads = objective(folders["llama"], settings, continuation=0.5)
    clip = texts([" ".join(f"w{i}{j}" for j in range(12)) for i in range(40)])
    cut, told = reads.tell(clip, 3)
    again, same = reads.tell(clip, 3)
    assert (cut.text, told) == (again.text, same) and told != reads.tell(clip, 4)[1]
    shares = [task == "continuation" for task in told.tasks]
    assert 8 < sum(shares) < 32
    for row, text in enumerate(clip.text):
        if shares[row]:
            assert f"{cut.text[row]} {told.answers[row]}" == text and "Continue" in told.prompts[row]
            assert 3 <= len(cut.text[row].split()) <= 9
        else:
            assert cut.text[row] == text == told.answers[row] and "Repeat" in told.prompts[row]


def test_tokens_follow_the_length_of_texts(folders):
    settings = config(folders["llama"])
    reads = objective(folders["llama"], settings, ratios=[5.0])
    model = build(settings)
    words = count_words(reads.llm, TEXTS)
    seen = []
    inner = model.encode
    model.encode = lambda clip, budget=None: seen.append(inner(clip, budget=budget)) or seen[-1]
    reads(model, texts(TEXTS), 0)
    assert seen[0].lengths.tolist() == [min(max(int(n / 5), 1), 6) for n in words]
    for wrong in (dict(ratios=[0.5]), dict(continuation=1.0), dict(continuation_prompts=["Go on:"])):
        with pytest.raises(ValueError, match=f"objective.{next(iter(wrong))}"):
            ObjectiveConfig(**wrong)


def test_repeating_is_measured_word_after_word(folders):
    settings = config(folders["llama"])
    reads, model = objective(folders["llama"], settings), build(settings).eval()
    few, many = (reads.measure(model, texts(TEXTS), budget=budget) for budget in (1, 6))
    assert few.keys() == {"repeated_nll", "repeated_accuracy"} and len(few["repeated_nll"]) == 3
    assert few["repeated_nll"] != many["repeated_nll"] and all(0 <= x <= 1 for x in many["repeated_accuracy"])
    said = reads.generate(model, texts(TEXTS), budget=2, max_new_tokens=5)
    assert len(said) == 3
    reads.config.max_answer = 10 * reads.llm.max_length  # as many as are to be said are asked for, not all that may be
    assert len(reads.generate(model, texts(TEXTS), budget=2)) == 3
    assert reads.measure(build(config(folders["llama"], source="video")), texts(TEXTS)) == {}
