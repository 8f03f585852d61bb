"""Tokens into texts: every token where its placeholder was, labels on answers alone, padding never read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vtok.llm.splice import IGNORED, PLACEHOLDER, splice
from vtok.types import Tokens

P, WIDTH, VOCABULARY = PLACEHOLDER, 6, 20


def embedding() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)


def tokens(*groups: list[int], width: int = WIDTH) -> Tokens:
    """Of one clip for each list: so many tokens in each of its groups."""
    counts = [sum(sizes) for sizes in groups]
    most = max(counts)
    group, rank = torch.zeros(2, len(groups), most, dtype=torch.int64)
    for row, sizes in enumerate(groups):
        group[row, : counts[row]] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        rank[row, : counts[row]] = torch.cat([torch.arange(n) for n in sizes])
    embeddings = torch.randn(len(groups), most, width)
    positions = torch.full((len(groups), most, 3), torch.nan)
    return Tokens(embeddings, torch.tensor(counts), positions, group, rank)


def expected(prompt: list[int], given: Tokens, row: int, words: nn.Embedding) -> torch.Tensor:
    """What a text should read, one position at a time."""
    count, places = int(given.lengths[row]), prompt.count(P)
    groups = given.group[row, :count].tolist()
    out, place = [], 0
    for item in prompt:
        if item != P:
            out.append(words.weight[item])
            continue
        out += [given.embeddings[row, k] for k in range(count) if places == 1 or groups[k] == place]
        place += 1
    return torch.stack(out)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_token_stands_where_its_placeholder_was(data):
    words = embedding()
    sizes = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=4))
    given_tokens = tokens(*sizes)
    text = st.lists(st.integers(0, VOCABULARY - 1), max_size=3)
    prompts, answers = [], []
    for groups in sizes:
        pieces = [data.draw(text) for _ in range(data.draw(st.sampled_from([1, len(groups)])) + 1)]
        prompts.append(pieces[0] + [i for piece in pieces[1:] for i in [P, *piece]])
        answers.append(data.draw(text))
    right = splice(prompts, given_tokens, words, answers=answers)
    left = splice(prompts, given_tokens, words, answers=answers, pad="left")
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        want = torch.cat([expected(prompt, given_tokens, row, words), words.weight[answer]])
        for made, at in ((right, slice(0, len(want))), (left, slice(right.mask.shape[1] - len(want), None))):
            assert torch.equal(made.embeds[row, at], want)
            assert int(made.mask[row].sum()) == len(want) and bool(made.mask[row, at].all())
            assert made.positions[row, at].tolist() == list(range(len(want)))
            assert made.labels[row, at].tolist() == [IGNORED] * (len(want) - len(answer)) + answer
            assert int((made.labels[row] != IGNORED).sum()) == len(answer)
            assert int(made.visual[row].sum()) == int(given_tokens.lengths[row])


def test_groups_without_tokens_need_no_placeholder():
    given_tokens, words = tokens([2, 1, 3]), embedding()
    few = given_tokens.select(given_tokens.group != 1)
    made = splice([[1, P, 2, P]], few, words).embeds[0]
    want = [words.weight[1:2], few.embeddings[0, :2], words.weight[2:3], few.embeddings[0, 2:5]]
    assert torch.equal(made, torch.cat(want))
    assert torch.equal(splice([[1, P, P, 2, P]], few, words).embeds[0], made), "or one for each, and nothing goes there"


def test_gradients_reach_every_real_token_and_no_padding():
    given_tokens = tokens([2], [3])
    given_tokens.embeddings.requires_grad_(True)
    made = splice([[1, P, 2], [P]], given_tokens, embedding())
    made.embeds[made.mask].sum().backward()
    reached = given_tokens.embeddings.grad.abs().sum(-1) > 0
    assert torch.equal(reached, given_tokens.mask)


def test_a_blind_text_has_nothing_in_its_place():
    words = embedding()
    made = splice([[1, P, 2], [P, 3]], None, words, answers=[[4], [5, 6]])
    assert torch.equal(made.embeds[0, :3], words.weight[[1, 2, 4]]) and int(made.visual.sum()) == 0
    assert made.mask.sum(1).tolist() == [3, 3]


def test_tokens_take_the_words_dtype():
    made = splice([[P]], tokens([2]), embedding().bfloat16())
    assert made.embeds.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "prompts, sizes, message",
    [
        ([[1, 2]], [[2, 2]], r"text 0 has 0 placeholders, its clip 4 tokens in 2 groups: give 1 placeholder, or 2"),
        ([[P, 1, P, P]], [[2, 2]], r"text 0 has 3 placeholders, its clip 4 tokens in 2 groups"),
        ([[P], [P]], [[2]], r"2 prompts for the tokens of 1 clips"),
        ([[P, -7]], [[2]], r"text 0 has an id below 0 that is not the placeholder -1"),
        ([[1, P, 2]], [[9]], r"text 0 takes 12 positions \(9 visual tokens, 2 of the prompt, 1 of the answer\), .* 8"),
    ],
)
def test_what_does_not_fit_is_refused(prompts, sizes, message):
    with pytest.raises(ValueError, match=message):
        splice(prompts, tokens(*sizes), embedding(), answers=[[4]] * len(prompts), max_length=8)


def test_other_widths_and_empty_texts_are_refused():
    with pytest.raises(ValueError, match="4 wide, the language model's words 6: set model.embedding_dim=6"):
        splice([[P]], tokens([2], width=4), embedding())
    with pytest.raises(ValueError, match="text 1 is empty"):
        splice([[1], [P]], None, embedding())
    with pytest.raises(ValueError, match="pad='middle' is unknown"):
        splice([[1]], None, embedding(), pad="middle")
    with pytest.raises(ValueError, match="1 answers for 2 prompts"):
        splice([[1], [2]], None, embedding(), answers=[[3]])
