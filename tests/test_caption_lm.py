"""Soft captions: the same states in training and inference, lengths that follow the stop, budgets, what is learned.

Both language models are real classes of transformers with small random weights.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_language_family import TOWER, alone, videos
from test_llm import small_model, small_tokenizer
from torch.nn.functional import cross_entropy

from vtok.data.sample import Item, collate
from vtok.export import modeling_source
from vtok.families import language
from vtok.families.language import Config, Model, ObjectiveConfig, SmallLM, build
from vtok.layers.base_tokens import BaseConfig
from vtok.layers.segment_tokens import fair_shares
from vtok.llm import LLMConfig, LoraConfig, TaskConfig
from vtok.llm.caption_objective import UNTOLD
from vtok.llm.soft_captions import (
    CaptionConfig,
    LengthHead,
    Prompt,
    caption_ids,
    learn,
    segment_captions,
    sketch,
    teach,
    write,
)
from vtok.types import Clip, ShapeError

torch.set_num_threads(1)
LENGTHS = [7, 1, 6]  # frames: 3, 1 and 2 segments of 3
MOST = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    out = {}
    for kind in ("llama", "gpt2"):
        out[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(3)
        tokenizer = small_tokenizer(kind)
        small_model(kind, len(tokenizer)).save_pretrained(out[kind])
        tokenizer.save_pretrained(out[kind])
    return out


def config(folder: str, *, learn: str = "all", lm: dict[str, Any] | None = None, **more: Any) -> Config:
    small = SmallLM(name=folder, learn=learn, lora=LoraConfig(rank=2 if learn == "lora" else 0), **lm or {})
    sizes: dict[str, Any] = dict(embedding_dim=24, embedding_rms=0.05, num_tokens=MOST, max_tokens=60, in_dim=5)
    sizes |= dict(mode="caption_lm", source="video", window=3, tower=TOWER)
    return Config(**sizes | dict(lm=small) | more)


def clips(lengths: list[int] = LENGTHS) -> Clip:
    torch.manual_seed(5)
    clip = videos(lengths)
    clip.captions = [
        [{"start_s": 0, "end_s": 1.5, "text": "A ring"}, {"start_s": 1.5, "end_s": 4, "text": "two stars move"}],
        [],
        [{"text": "a red ring"}],
    ][: len(lengths)]
    return clip


def speaking(model: Model, clip: Clip) -> Model:
    """The model with a stop word that it writes itself, at different places."""
    assert model.captioner is not None
    tokenizer = model._tokenizer = copy.deepcopy(model.tokenizer)
    found: list[Any] = []
    inner = model.captioner.write
    model.captioner.write = lambda *a: found.append(inner(*a)) or found[-1]
    with torch.no_grad():
        model.encode(clip)
    model.captioner.write = inner
    firsts: dict[int, set[int]] = {}
    for row in found[0].ids.tolist():
        for at, word in enumerate(row):
            if at and word not in row[:at]:
                firsts.setdefault(word, set()).add(at)
    best = max(firsts, key=lambda word: len(firsts[word]))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(best)
    return model


FORMS: dict[str, dict[str, Any]] = {
    "stop": dict(),
    "head": dict(captions=CaptionConfig(length="head"), head="mlp"),
    "parallel": dict(captions=CaptionConfig(how="parallel")),
    "pool": dict(base=BaseConfig("pool", frames=2, patches=2), lm=dict(layer=1)),
    "former": dict(base=BaseConfig("former", patches=4, width=16, depth=1, num_heads=2), question=True, patches=4),
}
each_form = pytest.mark.parametrize("form", FORMS)


def made(folder: str, form: str, *, speaks: bool = True) -> tuple[Model, Clip]:
    torch.manual_seed(0)
    model, clip = build(config(folder, **FORMS[form])).double().eval(), clips()
    if model.captioner is not None and model.captioner.length is not None:  # of different lengths
        torch.nn.init.normal_(model.captioner.length.out.weight, std=0.4)
    return (speaking(model, clip) if speaks else model), clip


def prompts(model: Model, clip: Clip) -> Prompt:
    """What the captioner gives the small model to read."""
    seen: list[Prompt] = []
    inner = model.captioner.prompt
    model.captioner.prompt = lambda *a: seen.append(inner(*a)) or seen[-1]
    with torch.no_grad():
        model.encode(clip)
    model.captioner.prompt = inner
    return seen[0]


# states and words


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [-1, 1])
@torch.no_grad()
def test_training_and_inference_hand_on_the_same_states(folders, kind, layer):
    model = build(config(folders[kind], lm=dict(layer=layer))).double().eval()
    speaking(model, clips())
    prompt, stop = prompts(model, clips()), model.tokenizer.eos_token_id
    free = write(model, prompt, stop=stop, most=MOST)
    assert len(set(free.lengths.tolist())) > 1 and 1 <= int(free.lengths.min()) <= int(free.lengths.max()) <= MOST
    words = [row[:count] for row, count in zip(free.ids.tolist(), free.lengths.tolist())]
    assert all(stop not in row for row in words)
    read = teach(model, prompt, words, logits=True)
    for row, count in enumerate(free.lengths.tolist()):
        assert (free.states[row, :count] - read.states[row, :count]).abs().max() < 1e-10
        said = read.logits[row].argmax(-1)
        assert said[1:count].tolist() == words[row][1:] and (count == MOST or said[count] == stop)
    assert (free.before - read.before).abs().max() < 1e-10


@torch.no_grad()
def test_states_are_those_of_the_layer(folders):
    """What the words' positions hold in the language model itself, fed one segment without padding."""
    for layer in (-1, 0, 1):
        model = build(config(folders["llama"], lm=dict(layer=layer))).double().eval()
        prompt = prompts(model, clips())
        read = teach(model, prompt, [[5, 6, 7]] * len(prompt.mask), logits=False)
        for row, mask in enumerate(prompt.mask):
            words = model.embed_words(torch.tensor([[5, 6, 7]]))
            embeds = torch.cat([prompt.embeds[row][mask][None], words], 1)
            out = model.lm.model(inputs_embeds=embeds, output_hidden_states=True)
            wanted = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
            assert (read.states[row] - wanted[0, -3:]).abs().max() < 1e-10


@each_form
@torch.no_grad()
def test_batched_equals_one_by_one(folders, form):
    model, clip = made(folders["llama"], form)
    for budget in (None, 1, 11):
        both = model.encode(clip, budget=budget)
        for row in range(len(clip)):
            single, mask = model.encode(alone(clip, row), budget=budget), both.mask[row]
            assert int(mask.sum()) == int(single.lengths[0])
            assert (both.embeddings[row][mask] - single.embeddings[0]).abs().max() < 1e-10
            assert torch.equal(both.group[row][mask], single.group[0])
            assert torch.equal(both.rank[row][mask], single.rank[0])


@each_form
@torch.no_grad()
def test_budgets_are_never_exceeded_and_nested(folders, form):
    model, clip = made(folders["llama"], form)
    everything, base = model.encode(clip), model.config.base.tokens
    has = torch.zeros(3, 3, dtype=torch.int64).scatter_add(1, everything.group, everything.mask.long())
    words = has - base * (has > 0)
    assert len(set(words[has > 0].tolist())) > 1 and int(words.max()) <= MOST and int(words[has > 0].min()) >= 1
    for budget in (1, 2, 5, 12, 20, 60):
        tokens = model.encode(clip, budget=budget)
        assert tokens.lengths.tolist() == everything.lengths.clamp(max=budget).tolist()
        for row in range(3):
            real = range(int(everything.lengths[row]))
            names = {(int(everything.group[row, i]), int(everything.rank[row, i])): i for i in real}
            for at in range(int(tokens.lengths[row])):
                where = names[int(tokens.group[row, at]), int(tokens.rank[row, at])]
                assert (tokens.embeddings[row, at] - everything.embeddings[row, where]).abs().max() < 1e-10
        least, most = zip(*[model.config.token_bounds(n, 3, 4, budget=budget) for n in LENGTHS])
        assert all(a <= b <= c for a, b, c in zip(least, tokens.lengths.tolist(), most))
    assert model.encode(clip, budget=torch.tensor([3, 1, 2])).lengths.tolist() == [3, 1, 2]
    each = torch.tensor([[2, 0, 1], [1, 0, 0], [60, 60, 60]])
    assert model.encode(clip, budget=each).lengths.tolist() == torch.minimum(each, has).sum(1).tolist()
    for wrong in (0, 61):
        with pytest.raises(ValueError, match=f"budget={wrong} is out of range"):
            model.encode(clip, budget=wrong)
    with pytest.raises(ShapeError, match="budget is torch.int64"):
        model.encode(clip, budget=torch.ones(3, 5, dtype=torch.int64))
    assert model.config.length_policy == "content"


def test_fair_shares_cut_the_longest_first():
    torch.manual_seed(0)
    lengths = torch.randint(0, 9, (40, 6))
    before = torch.zeros_like(lengths)
    for total in range(60):
        kept = fair_shares(lengths, torch.full((40,), total))
        assert torch.equal(kept.sum(1), lengths.sum(1).clamp(max=total))
        assert bool((kept <= lengths).all()) and bool((kept >= before).all())
        cut = kept.masked_fill(kept == lengths, 99).amin(1)
        assert bool((kept.amax(1) <= cut + 1).all())  # none that was cut has less than another, but for the remainder
        before = kept


@pytest.mark.parametrize("form", ["stop", "head", "parallel", "pool"])
@torch.no_grad()
def test_lengths_can_be_imposed(folders, form):
    model, clip = made(folders["llama"], form)
    features, base = clip.features["tower"], model.config.base.tokens
    own = model.compress(features)
    exact = torch.tensor([[1, 9, 4], [2, 0, 0], [7, 3, 0]])
    tokens = model.compress(features, exact=exact)
    has = torch.zeros(3, 3, dtype=torch.int64).scatter_add(1, tokens.group, tokens.mask.long())
    assert torch.equal(has, exact + base * (exact > 0))
    first = own.embeddings[0, base], tokens.embeddings[0, base]
    assert (first[0] - first[1]).abs().max() < 1e-10  # the words they share are the same
    with pytest.raises(ShapeError, match="lengths or one below 1"):
        model.compress(features, exact=exact[:, :2])
    with pytest.raises(ValueError, match=f"exact asks for {MOST + 1} words of a segment: ask for 1 to {MOST}"):
        model.compress(features, exact=exact + MOST - 8)


@torch.no_grad()
def test_every_segment_keeps_its_base_tokens_and_a_word(folders):
    """At the largest number of tokens that is: without a budget no segment is left without what it looks like."""
    model, clip = made(folders["llama"], "pool")
    base = model.config.base.tokens
    assert base == 4
    free = model.encode(clip)
    assert torch.equal(free.lengths, (model.captioner.kept + base * (model.captioner.kept > 0)).sum(1))
    model.max_tokens = 3 * (base + 1)
    tokens = model.encode(clip)
    has = torch.zeros(3, 3, dtype=torch.int64).scatter_add(1, tokens.group, tokens.mask.long())
    assert has[0].tolist() == [5, 5, 5] and model.captioner.kept[0].tolist() == [1, 1, 1]
    model.max_tokens -= 1
    assert model.encode(clip, budget=2).lengths.tolist() == [2, 2, 2]  # what is asked for is given
    with pytest.raises(ValueError, match="max_tokens=14 cannot hold a clip of 3 segments, each with 4 base tokens"):
        model.encode(clip)


@torch.no_grad()
def test_a_question_changes_captions_where_it_is_asked_for(folders):
    asked, clip = made(folders["llama"], "former", speaks=False)
    plain, _ = made(folders["llama"], "stop", speaks=False)
    other = Clip(clip.keys, features=clip.features, prompt=["how many?"] * 3)
    assert asked.reads_prompt and not plain.reads_prompt
    assert not torch.equal(asked.encode(clip).embeddings, asked.encode(other).embeddings)
    assert torch.equal(plain.encode(clip).embeddings, plain.encode(other).embeddings)


# what is learned


def test_captions_of_segments_are_those_on_show():
    told = [
        {"start_s": 0, "end_s": 2, "text": "one"},
        {"start_s": 2, "end_s": 6.0, "text": "two "},
        {"start_s": 3.2, "end_s": 3.4, "text": "flash"},
    ]
    assert segment_captions(told, [0, 2, 4], [2, 4, 6]) == ["one", "two flash", "two"]
    assert segment_captions(told, [0, 3], [3, 6]) == ["one", "two flash"]  # a third of `two` is in the first
    assert segment_captions(["all", {"text": "more"}], [0, 1], [1, 2]) == ["all more"] * 2
    assert segment_captions([], [0.0], [1.0]) == [""]


def test_captions_reach_the_model_from_the_shards():
    timed = [{"start_s": 0.0, "end_s": 1.0, "text": "a ring"}]
    video = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    items = [Item("a", video, torch.tensor([0.0, 0.5]), "ring", None, captions=timed)]
    items.append(Item("b", video, torch.tensor([0.0, 0.5]), "ring", None))
    clip = collate(items)
    assert clip.captions == [timed, []] and clip.rows(slice(1, 2)).captions == [[]]
    assert collate(items[1:]).captions is None


def test_the_loss_is_the_language_models_own(folders):
    """Of each caption, the next-token loss of the language model read alone, its stop included."""
    model = build(config(folders["llama"])).double()
    prompt, stop = prompts(model.eval(), clips()), model.tokenizer.eos_token_id
    rows = [[5, 6, 7, 8], [], [9], list(range(5, 5 + MOST + 3)), [6, 6], [7]]
    read = teach(model, prompt, [row[:MOST] or [stop] for row in rows], logits=True)
    found = learn(read, rows, stop=stop, most=MOST)
    total, count = 0.0, 0
    for row, words in enumerate(rows):
        if not words:
            continue
        labels = words[:MOST] + [stop] * (len(words) <= MOST)
        mask = prompt.mask[row]
        embeds = torch.cat([prompt.embeds[row][mask], model.embed_words(torch.tensor(words[:MOST]))])
        logits = model.lm(inputs_embeds=embeds[None]).logits[0, int(mask.sum()) - 1 :][: len(labels)]
        total += float(cross_entropy(logits, torch.tensor(labels), reduction="sum").detach())
        count += len(labels)
    assert float(found.nll) == pytest.approx(total / count, rel=1e-6)
    assert float(found.cut) == pytest.approx(1 / 5) and float(found.words) == pytest.approx((4 + 1 + MOST + 3 + 3) / 5)


def test_heads_learn_lengths_and_are_followed(folders):
    torch.manual_seed(0)
    head, states = LengthHead(8, most=40), torch.randn(6, 8)
    wanted = [1, 40, 7, 20, 3, 12]
    before = head.words(head(states), most=40)
    assert bool((before == before[0]).all()) and 1 < int(before[0]) < 40
    model, clip = made(folders["llama"], "head", speaks=False)
    read = teach(model, prompts(model, clip), [[5]] * 6, logits=True)._replace(before=states)
    optimizer = torch.optim.Adam(head.parameters(), 0.1)
    for _ in range(200):
        found = learn(read, [[5] * n for n in wanted], stop=0, most=40, head=head)
        optimizer.zero_grad()
        found.length.backward()
        optimizer.step()
    assert head.words(head(states), most=40).tolist() == wanted
    assert head.words(torch.tensor([-5.0, 50.0]), most=40).tolist() == [1, 40]
    counts = torch.tensor([4, 1, 9, 2, 2, 3])
    free = write(model, prompts(model, clip), stop=0, most=MOST, counts=lambda before: counts)
    assert free.lengths.tolist() == counts.tolist() and free.states.shape[1] == 9


def test_parallel_words_end_where_one_means_stop(folders):
    model, clip = made(folders["llama"], "parallel", speaks=False)
    prompt, queries = prompts(model, clip), model.captioner.queries(MOST)
    logits = sketch(model, prompt, queries, stop=0).logits[0, 1:].argmax(-1).tolist()
    stop = logits[-1]
    ended = sketch(model, prompt, queries, stop=stop)
    assert int(ended.lengths[0]) == (logits.index(stop) + 1)


def objective(folder: str, model: Config, **settings: Any) -> language.Objective:
    settings = dict(llm=LLMConfig(name=folder), tasks=TaskConfig(caption=1.0), density=1.0) | settings
    model.embedding_dim = 0
    out = language.Objective(ObjectiveConfig(**settings), model)
    model.embedding_dim, model.embedding_rms = out.llm.embedding_dim, out.llm.embedding_rms
    return out


@pytest.mark.parametrize("learn", ["all", "lora", "none"])
@pytest.mark.parametrize("how", ["teacher_forced", "generate", "parallel"])
def test_gradients_reach_what_learns_and_the_decoder_stays(folders, learn, how):
    pytest.importorskip("peft")
    settings = config(folders["llama"], learn=learn, captions=CaptionConfig(how=how), base=BaseConfig("pool"))
    reads = objective(folders["llama"], settings)
    model, clip = build(settings).train(), clips()
    clip.text = ["a ring", "a star", "nothing"]
    decoder = {name: value.clone() for name, value in reads.llm.model.state_dict().items()}
    loss = reads(model, clip, 0)
    loss.total.backward()
    learned = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"captioner", "eye", "head"} | ({"all": {"lm"}, "lora": {"adapters"}, "none": set()}[learn])
    assert {"caption_nll", "caption_accuracy", "caption_words", "cut_captions"} < loss.report.keys()
    assert float(loss.total.detach()) == pytest.approx(float(loss.report["nll"] + loss.report["caption_nll"]))
    assert all(torch.equal(v, decoder[k]) for k, v in reads.llm.model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert model.encode(clip).embeddings.isfinite().all()


def test_a_corpus_without_captions_is_refused(folders):
    """Questions alone teach the small model to describe nothing; a few clips without captions come by chance."""
    settings = config(folders["llama"])
    reads = objective(folders["llama"], settings, tasks=TaskConfig(caption=0.0))
    model, clip = build(settings).train(), clips()
    clip = Clip(clip.keys, features=clip.features, qa=[[{"question": "what?", "answer": "ring"}]] * 3)
    assert float(reads(model, clip, 0).report["without_caption"]) == 1
    reads._clips_seen = UNTOLD - 3
    with pytest.raises(ValueError, match=f"none of the first {UNTOLD} clips.* has a caption that model.captions.learn"):
        reads(model, clip, 1)
    reads._clips_seen = 0
    clip.captions = [[], [{"text": "a ring"}], []]
    assert 0 < float(reads(model, clip, 2).report["without_caption"]) < 1
    reads._clips_seen, clip.captions = UNTOLD, None
    reads(model, clip, 3)  # once there was one, there are captions


@torch.no_grad()
def test_the_last_segment_is_told_to_the_end_of_its_last_frame(folders):
    """Frames come every half second: the second segment's only frame, at 1.5, is on show until 2."""
    model = build(config(folders["llama"])).eval()
    clip = videos([4, 2])
    told = [{"start_s": 1.6, "end_s": 2.0, "text": "ring"}, {"start_s": 2.1, "end_s": 2.4, "text": "star"}]
    seen: list[Any] = []
    inner = model.captioner.prompt
    model.captioner.prompt = lambda reader, segments: seen.append(segments) or inner(reader, segments)
    model.encode(clip)
    found = model.captioner.targets(model, [told, [{"start_s": 0.7, "end_s": 1.0, "text": "ring"}]], seen[0])
    ring = caption_ids(model.word_ids, model.captioner.config.request, "ring")
    assert found == [[], ring, ring]


def test_adapters_whose_parameters_are_split_are_refused(folders):
    """Under ZeRO-3, whose mark on a parameter this is; those of the small model as those of the large one."""
    pytest.importorskip("peft")
    settings = config(folders["llama"], learn="lora")
    reads = objective(folders["llama"], settings)
    model, clip = build(settings).train(), clips()
    clip.text = ["a ring", "a star", "nothing"]
    next(model.adapters.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="model.lm.learn=lora does not work with trainer.strategy=deepspeed_3"):
        reads(model, clip, 0)


def test_it_learns_to_write_as_much_as_there_is_to_tell(folders):
    torch.manual_seed(0)
    model = build(config(folders["llama"], window=2)).train()
    clip = videos([2, 2])
    clip.features["tower"].patches.copy_(torch.randn(2, 1, 1, 5).expand(-1, 2, 12, -1))
    clip = Clip(
        clip.keys, features={"tower": clip.features["tower"]}, captions=[[{"text": "a"}], [{"text": "a red ring"}]]
    )
    clip.features["tower"].patches = clip.features["tower"].patches.float()
    targets = [caption_ids(model.word_ids, "\nDescription:", text) for text in ("a", "a red ring")]
    assert len(targets[0]) < len(targets[1]) <= MOST
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        model.encode(clip)
        optimizer.zero_grad()
        model.captioner.learned.nll.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = model.eval().encode(clip)
    assert tokens.lengths.tolist() == [len(row) for row in targets]
    assert model.captioner.learned is None


@pytest.mark.parametrize("learn", ["all", "none"])
def test_checkpointed_layers_write_too_and_give_the_same_gradients(folders, learn):
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        settings = config(folders["llama"], learn=learn, lm=dict(checkpoint=checkpoint))
        settings.captions = CaptionConfig(how="generate")
        model = build(settings).train()
        torch.nn.init.normal_(model.head.out.weight, generator=torch.Generator().manual_seed(1))
        modes = [m.training for m in (model.lm or model.reference.model).modules()]
        model.encode(clips()).embeddings.square().sum().backward()
        assert [m.training for m in (model.lm or model.reference.model).modules()] == modes
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-4)


# what ships


@pytest.mark.parametrize("learn", ["all", "lora", "none"])
@torch.no_grad()
def test_what_learns_ships_and_loads(folders, learn):
    pytest.importorskip("peft")
    model = build(config(folders["llama"], learn=learn, captions=CaptionConfig(length="head"))).eval()
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"captioner", "eye", "head"} | (
        {"all": {"lm"}, "lora": {"adapters"}, "none": set()}[learn]
    )
    other, clip = Model(copy.deepcopy(model.config)).eval(), clips()
    other.load_state_dict(state, strict=True)
    assert torch.equal(model.encode(clip).embeddings, other.encode(clip).embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(clip, budget=4).embeddings.isfinite().all()


def test_stages_begin_where_the_last_one_ended(folders):
    first = build(config(folders["llama"], learn="none"))
    second = build(config(folders["llama"]))
    own = {name: value.clone() for name, value in second.lm.state_dict().items()}
    assert "model.lm new" in second.warm_start(first)
    assert all(torch.equal(v, own[k]) for k, v in second.lm.state_dict().items())
    assert torch.equal(second.eye.projector.out.weight, first.eye.projector.out.weight)
    with torch.no_grad():
        second.lm.get_output_embeddings().weight.add_(1.0)
    third = build(config(folders["llama"], captions=CaptionConfig(how="generate", learn=False)))
    assert third.warm_start(second) == "all weights"
    assert torch.equal(third.lm.get_output_embeddings().weight, second.lm.get_output_embeddings().weight)
    with pytest.raises(ValueError, match="captioner"):
        third.warm_start(build(config(folders["llama"], base=BaseConfig("pool"))))


@pytest.mark.parametrize("form", ["stop", "former"])
@torch.no_grad()
def test_an_export_writes_the_same_captions(folders, form, monkeypatch):
    """The one file that ships does what the family does, without vtok's own modules."""
    model, clip = made(folders["llama"], form, speaks=False)
    module = ModuleType("exported_caption_lm")
    space = module.__dict__
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look their annotations up
    source = modeling_source(language, "caption_lm")
    assert "import vtok" not in source and "from vtok" not in source
    exec(compile(source, "modeling_vtok.py", "exec"), space)  # noqa: S102
    settings = model.config
    names = {f: getattr(settings, f) for f in ("captions", "base", "lm", "tower")}
    kinds = {"captions": "CaptionConfig", "base": "BaseConfig", "lm": "SmallLM", "tower": "TowerConfig"}
    plain = {name: value for name, value in vars(settings).items() if name not in (*names, "ata", "judge")}
    lm = {k: v for k, v in vars(settings.lm).items() if k != "lora"}
    parts = {k: space[kinds[k]](**(lm if k == "lm" else vars(v))) for k, v in names.items()}
    other = space["Model"](space["Config"](**plain, **parts)).double().eval()
    other.load_state_dict(model.state_dict(), strict=True)
    seen = clip.features["tower"]
    ours, theirs = (m.compress(seen, prompt=clip.prompt) for m in (model, other))
    assert torch.equal(ours.embeddings, theirs.embeddings) and torch.equal(ours.lengths, theirs.lengths)


def test_settings_that_cannot_be(folders):
    wrong = {
        "model.mode=caption_lm tells of videos": lambda: Config(mode="caption_lm"),
        "model.base.kind='pool' stands beside captions": lambda: Config(source="video", base=BaseConfig("pool")),
        "model.captions.how='free' is unknown": lambda: CaptionConfig(how="free"),
        "model.captions.length='4' is unknown": lambda: CaptionConfig(length="4"),
        "how=teacher_forced reads the targets": lambda: CaptionConfig(learn=False),
        "model.captions.how='generate' is .* model.mode=caption_lm": lambda: Config(
            source="video", captions=CaptionConfig("generate")
        ),
        "model.segment_words=4 is .* model.source=text": lambda: Config(source="video", segment_words=4),
        "model.window=4 is read by nothing here: it is of model.source=video": lambda: Config(window=4),
        "model.base.patches=4 is .* model.base.kind=pool or former": lambda: Config(base=BaseConfig(patches=4)),
        "model.base.width=4 is .* model.base.kind=former": lambda: Config(
            mode="caption_lm", source="video", base=BaseConfig("pool", width=4)
        ),
        "model.base.kind='grid' is unknown": lambda: BaseConfig("grid"),
        "model.base.patches=0 must be at least 1": lambda: BaseConfig("pool", patches=0),
        "objective.density=1.0 needs model.mode=caption_lm": lambda: objective(folders["llama"], Config()),
        "objective.lengths=1.0 needs model.captions.length=head": lambda: objective(
            folders["llama"], config(folders["llama"]), lengths=1.0
        ),
        "model.captions.length=head learns by objective.lengths, which is 0": lambda: objective(
            folders["llama"], config(folders["llama"], captions=CaptionConfig(length="head"))
        ),
        "model.captions.learn=true teaches nothing, objective.density is 0": lambda: objective(
            folders["llama"], config(folders["llama"]), density=0.0
        ),
        "objective.density=-1 must be 0 or above": lambda: objective(
            folders["llama"], config(folders["llama"]), density=-1
        ),
    }
    for message, make in wrong.items():
        with pytest.raises(ValueError, match=message):
            make()
    model = build(config(folders["llama"], num_tokens=70)).eval()
    with pytest.raises(ValueError, match="the language model has"):
        model.encode(clips())
