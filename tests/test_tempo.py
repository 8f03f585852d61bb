"""Tokens of a video shared out by what matters: exact totals, bounds, scores and what they may read, and how they are
taught. The language models are real classes of transformers with small random weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_language_family import alone, config, folders, videos  # noqa: F401

from vtok.budget import AtaConfig, allocate_segments, segment_bounds
from vtok.families.language import Config, Model, build
from vtok.layers.judge import Scored, WordMatch, first_ids
from vtok.layers.relevance import novelty, word_similarity
from vtok.llm import LLMConfig, load_llm
from vtok.llm.relevance import ranking_loss
from vtok.types import Clip, Features, Tokens

torch.set_num_threads(1)
SCORES = ("novelty", "similarity", "yes_no", "learned")
each_score = pytest.mark.parametrize("score", SCORES)
LENGTHS = [14, 2, 9]  # windows of 2 frames: 7, 1 and 5 segments


def tempo(folder: str, score: str, *, seed: int = 0, ata: dict[str, Any] | None = None, **more: Any) -> Model:
    """A model whose scores differ from segment to segment."""
    torch.manual_seed(seed)
    bounds = AtaConfig(score=score, minimum=1, maximum=5, **ata or {})
    made = build(config(folder, **dict(source="video", window=2, ata=bounds, question=True) | more))
    if score == "learned" and made.judge is not None:
        torch.nn.init.normal_(made.judge.out.weight)
    return made.eval().double()


def shares(tokens: Tokens) -> torch.Tensor:
    """[B, G] tokens of each segment."""
    out = torch.zeros(len(tokens.lengths), 7, dtype=torch.int64)
    return out.scatter_add(1, tokens.group.masked_fill(~tokens.mask, 0), tokens.mask.long())


@each_score
@torch.no_grad()
def test_totals_bounds_order_and_company(folders, score):  # noqa: F811
    model, clip = tempo(folders["llama"], score), videos(LENGTHS)
    for total in (3, 7, 12, 23, 40):
        tokens = model.encode(clip, budget=total)
        assert isinstance(tokens, Scored) and tokens.scores is not None and tokens.scores.shape == (3, 7)
        found = shares(tokens)
        for row, segments in enumerate((7, 1, 5)):
            own, scores = found[row, :segments], tokens.scores[row, :segments]
            assert int(own.sum()) == min(total, 5 * segments) == int(tokens.lengths[row])
            assert int(own.min()) >= min(1, total // segments) and int(own.max()) <= 5
            higher = scores[:, None] > scores
            assert not bool((higher & (own[:, None] < own)).any())
            single = model.encode(alone(clip, row), budget=total)
            mask = tokens.mask[row]
            assert (tokens.embeddings[row][mask] - single.embeddings[0]).abs().max() < 1e-10
            assert torch.equal(tokens.group[row][mask], single.group[0])
    assert len(set(shares(model.encode(clip, budget=23))[0].tolist())) > 1, "scores are to make a difference"
    assert model.encode(clip).lengths.tolist() == [35, 5, 25] and model.nested
    counted = [model.config.token_count(length, 3, 4, budget=23) for length in LENGTHS]
    assert model.encode(clip, budget=23).lengths.tolist() == counted and model.budgets(clip.features["tower"])[-1] == 35


@each_score
@torch.no_grad()
def test_less_is_a_part_of_more_and_of_what_even_shares_give(folders, score):  # noqa: F811
    model, clip = tempo(folders["llama"], score), videos(LENGTHS)
    even = model.allocating(score="").encode(clip)
    assert not isinstance(even, Scored)
    every = {(b, int(even.group[b, k]), int(even.rank[b, k])): even.embeddings[b, k]
             for b in range(3) for k in range(int(even.lengths[b]))}  # fmt: skip
    before: set[tuple[int, ...]] = set()
    for total in range(1, 36):
        tokens = model.encode(clip, budget=total)
        now = {(b, int(tokens.group[b, k]), int(tokens.rank[b, k])): tokens.embeddings[b, k]
               for b in range(3) for k in range(int(tokens.lengths[b]))}  # fmt: skip
        assert before <= now.keys()
        before = set(now)
        for place, vector in now.items():
            assert (vector - every[place]).abs().max() < 1e-10, "how many are kept changes none"
    per_segment = torch.zeros(3, 7, dtype=torch.int64)
    per_segment[:, 0] = 2
    assert torch.equal(shares(model.encode(clip, budget=per_segment)), per_segment), "explicit shares are taken as such"


@each_score
@torch.no_grad()
def test_pooled_queries_are_shared_out_by_the_same_scores(folders, score):  # noqa: F811
    """Segments are judged first, as a model with learned queries of the same weights judges them; each query then
    begins from its run, of as many as its segment was given."""
    model, learned = (tempo(folders["llama"], score, queries=queries) for queries in ("pooled", "learned"))
    learned.load_state_dict({k: v for k, v in model.state_dict().items() if k != "head.skip.weight"}, strict=True)
    clip = videos(LENGTHS)
    for total in (3, 7, 12, 23):
        tokens, others = model.encode(clip, budget=total), learned.encode(clip, budget=total)
        assert (tokens.scores - others.scores)[tokens.scores.isfinite()].abs().max() < 1e-10
        assert torch.equal(shares(tokens), shares(others)) and torch.equal(tokens.rank, others.rank)
        as_told = model.allocating(score="").encode(clip, budget=shares(tokens))
        assert torch.allclose(tokens.embeddings, as_told.embeddings, atol=1e-12)
        for row in range(3):
            single, mask = model.encode(alone(clip, row), budget=total), tokens.mask[row]
            assert (tokens.embeddings[row][mask] - single.embeddings[0]).abs().max() < 1e-10
    assert not model.nested and learned.nested


@pytest.mark.parametrize("score", ["yes_no", "learned"])
def test_scores_of_pooled_queries_learn(folders, score):  # noqa: F811
    model = tempo(folders["llama"], score, queries="pooled").train()
    scores = model.encode(videos(LENGTHS), budget=12).scores
    scores[scores.isfinite()].sum().backward()
    assert (
        model.lm.get_input_embeddings().weight.grad.abs().sum() > 0
        and model.eye.projector.out.weight.grad.abs().sum() > 0
    )


@torch.no_grad()
def test_what_reads_the_question_says_so(folders):  # noqa: F811
    reads = {"novelty": False, "similarity": True, "learned": False}
    clip = videos(LENGTHS)
    other = Clip(clip.keys, features=clip.features, prompt=["how many rings?"] * 3)
    for score, said in reads.items():
        model = tempo(folders["llama"], score, question=False)
        assert model.reads_prompt == model.config.reads_prompt == said
        one, two = model.encode(clip, budget=20), model.encode(other, budget=20)
        assert torch.equal(one.scores, two.scores) != said
        even = [model.allocating(score="").encode(each).embeddings for each in (clip, other)]
        assert torch.equal(*even), "the small model is not told the question: what it makes of a segment can be kept"
    for score in SCORES:
        asked = tempo(folders["llama"], score)
        assert asked.reads_prompt
        assert torch.equal(asked.encode(clip).scores, asked.encode(other).scores) == (score == "novelty")
    assert not tempo(folders["llama"], "similarity", question=False).allocating(score="novelty").reads_prompt


@torch.no_grad()
def test_yes_no_is_what_the_language_model_would_say(folders):  # noqa: F811
    model, clip = tempo(folders["llama"], "yes_no"), videos([4])
    judge = model.config.judge
    assert judge.yes and judge.no and not set(judge.yes) & set(judge.no)
    whole = load_llm(LLMConfig(name=folders["llama"], chat=False), shared=False).model.double()
    seen = model.eye.project(clip.features["tower"]).patches
    words = model.tokenizer("what moves?", add_special_tokens=False).input_ids
    words += model.tokenizer(judge.ask, add_special_tokens=False).input_ids
    scores = model.encode(clip).scores[0]
    for segment in range(2):
        patches = seen[0, segment * 2 : segment * 2 + 2].flatten(0, 1)
        embeds = torch.cat([patches, whole.get_input_embeddings()(torch.tensor(words))])[None]
        chances = whole(inputs_embeds=embeds).logits[0, -1].softmax(-1)
        odds = chances[judge.yes].sum() / chances[judge.no].sum()
        assert float(scores[segment]) == pytest.approx(float(odds.log()), abs=1e-4)


def test_first_ids():
    ids = {" Yes": [1, 7], " No": [1, 8], "Yes": [7], "No": [8, 2], " yes": [], "yes": [7], "no": [3]}
    assert first_ids(lambda text: ids.get(text, [])) == ([7], [8, 3])
    with pytest.raises(ValueError, match="choose ata.score=learned"):
        first_ids(lambda text: [0])


@torch.no_grad()
def test_novelty_and_similarity_are_those_of_the_frames(folders):  # noqa: F811
    clip = videos(LENGTHS)
    seen = clip.features["tower"]
    model = tempo(folders["llama"], "novelty")
    found = model.encode(clip).scores
    there = found.isfinite()
    assert there.sum(1).tolist() == [7, 1, 5]
    torch.testing.assert_close(found[there], novelty(seen, (torch.arange(14) // 2).expand(3, -1)).to(found)[there])
    patches, words = torch.randn(1, 5, 8), torch.randn(1, 3, 8)
    patches[0, 4] = 2 * words[0, 1]
    cosine = torch.nn.functional.cosine_similarity(patches[0][:, None], words[0][None], dim=-1)
    assert float(word_similarity(patches, words)) == pytest.approx(float(cosine.amax(0).mean()))
    shorter = word_similarity(patches, words, mask=torch.arange(5)[None] < 4, real=torch.tensor([[True, True, False]]))
    assert float(shorter) == pytest.approx(float(cosine[:4, :2].amax(0).mean()))
    assert float(word_similarity(patches, words, real=torch.zeros(1, 3, dtype=torch.bool))) == 0


@torch.no_grad()
def test_words_are_matched_by_learned_weights_at_a_learned_scale():
    match, patches, words = WordMatch(8, in_dim=8), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    torch.nn.init.eye_(match.look.weight), torch.nn.init.zeros_(match.look.bias)
    mask, real = torch.arange(5)[None] < torch.tensor([[5], [3]]), torch.arange(4)[None] < torch.tensor([[4], [0]])
    found = match(patches, words, mask=mask, real=real)
    assert torch.allclose(found, word_similarity(patches, words, mask=mask, real=real) / 0.07) and float(found[1]) == 0
    real[1, :3] = True
    match.weigh.weight.copy_(100 * torch.nn.functional.layer_norm(words[0, 2], [8]))
    alone = word_similarity(patches[:1], words[:1, 2:3], mask=mask[:1])
    assert torch.allclose(match(patches, words, mask=mask, real=real)[:1], alone / 0.07, atol=1e-4)
    changed = words.clone()
    changed[1, 3], patches[1, 3:] = 9.0, 9.0  # padding
    assert torch.equal(match(patches, changed, mask=mask, real=real), match(patches, words, mask=mask, real=real))
    match.log_scale.fill_(9.0)
    assert float(match(patches, words, mask=mask, real=real)[0]) == pytest.approx(100 * float(alone), rel=1e-4)


def test_relevance_teaches_similarity_which_words_count(folders):  # noqa: F811
    """Segments show one of six things, a question names one of them among words that all questions have; scores learn
    by a map of patches of their own, and what the small model reads stays as it is."""
    model = tempo(folders["llama"], "similarity", question=False).float().train()
    torch.manual_seed(0)
    names, looks = ["red", "ring", "star", "blue", "ground", "left"], torch.randn(6, 5)
    optimizer = torch.optim.AdamW(model.match.parameters(), 2e-2)
    hits = []
    for _ in range(120):
        shown = torch.stack([torch.randperm(6)[:5] for _ in range(8)])  # [B, G]
        right = torch.nn.functional.one_hot(torch.randint(5, (8,)), 5).bool()
        patches = looks[shown].repeat_interleave(2, 1)[:, :, None] + 0.1 * torch.randn(8, 10, 12, 5)
        prompt = [f"Then the moves over {names[int(i)]} a stays" for i in shown[right]]
        clip = Clip(list("abcdefgh"), features={"tower": Features(patches, (3, 4))}, prompt=prompt)
        loss, hit = ranking_loss(model.encode(clip, budget=5).scores, right)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for p in model.eye.parameters())
        optimizer.step()
        hits.append(float(hit.float().mean()))
    assert sum(hits[:3]) / 3 < 0.6 and sum(hits[-10:]) / 10 > 0.95


@torch.no_grad()
def test_streams_give_segments_what_later_ones_cannot_change(folders):  # noqa: F811
    model = tempo(folders["llama"], "learned", ata=dict(stream=True, weights="softmax"))
    assert not model.nested
    clip = videos([14])
    changed = Clip(clip.keys, features=copy.deepcopy(clip.features), prompt=clip.prompt)
    changed.features["tower"].patches[:, 8:] = torch.randn(1, 6, 12, 5, dtype=torch.float64)
    one, two = (model.encode(each, budget=20) for each in (clip, changed))
    assert int(one.lengths[0]) == int(two.lengths[0]) == 20
    assert torch.equal(shares(one)[0, :4], shares(two)[0, :4]) and not torch.equal(one.scores, two.scores)
    whole = model.allocating(stream=False)
    assert not torch.equal(shares(whole.encode(clip, budget=20)), shares(whole.encode(changed, budget=20)))


def test_an_allocation_shares_weights_and_needs_its_judge(folders):  # noqa: F811
    model = tempo(folders["llama"], "yes_no")
    other = model.allocating(score="novelty", minimum=2)
    assert other.queries is model.queries and other.state_dict().keys() == model.state_dict().keys()
    assert model.config.ata.score == "yes_no" and other.config.ata.minimum == 2 and model.config.ata.minimum == 1
    with pytest.raises(ValueError, match="needs a model that was trained with it, not 'yes_no'"):
        model.allocating(score="learned")
    loaded = Model(copy.deepcopy(model.config)).double().eval()
    loaded.load_state_dict(model.state_dict(), strict=True)
    clip = videos(LENGTHS)
    with torch.no_grad():
        assert torch.equal(loaded.encode(clip, budget=20).embeddings, model.encode(clip, budget=20).embeddings)


def test_settings_that_cannot_be(folders):  # noqa: F811
    ata = AtaConfig(score="yes_no")
    for message, settings in {
        "is for mode=latent_lm and source=video": dict(ata=ata),
        "it needs model.question=true": dict(ata=ata, source="video"),
    }.items():
        with pytest.raises(ValueError, match=message):
            Config(**settings)
    for score in ("yes_no", "learned", "similarity"):
        linear = AtaConfig(score=score, weights="linear")
        with pytest.raises(ValueError, match=f"weights=linear takes scores of 0 or above, those of .*={score} can lie"):
            Config(source="video", question=True, ata=linear)
    for made in (dict(score="learned"), dict(score="similarity", question=False)):
        model, clip = tempo(folders["llama"], **made), videos(LENGTHS)
        with pytest.raises(ValueError, match="tokens are for one question, and none was given"):
            model.encode(Clip(clip.keys, features=clip.features))
    with pytest.raises(ValueError, match="exact imposes lengths of captions: model.mode=latent_lm writes none"):
        model.compress(clip.features["tower"], prompt=clip.prompt, exact=torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="in a stream needs ata.expected"):
        AtaConfig(stream=True)
    with pytest.raises(ValueError, match="model.judge.yes and no are open"):
        Model(Config(**vars(tempo(folders["llama"], "learned").config) | dict(ata=ata)))


def test_minima_that_cannot_be_paid_and_totals_beyond_what_there_is():
    counts, config = torch.tensor([4, 1, 2]), AtaConfig(minimum=4, maximum=9)
    for total, given, low, high in (
        (3, [3, 3, 3], [0, 3, 1], [1, 4, 2]),
        (16, [16, 9, 16], [4, 4, 4], [9, 9, 9]),
        (100, [36, 9, 18], [4, 4, 4], [9, 9, 9]),
    ):
        found = segment_bounds(torch.tensor(total).expand(3), counts, most=20, config=config)
        assert [each.tolist() for each in found] == [given, low, high]
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    before = torch.zeros(3, 4, dtype=torch.int64)
    for total in range(1, 40):
        now = allocate_segments(scores, total=torch.tensor(total).expand(3), segments=counts, most=8, config=config)
        assert now.sum(1).tolist() == [min(total, 8 * count) for count in counts.tolist()]
        assert bool((now >= before).all()), "a larger total takes nothing away"
        before = now
