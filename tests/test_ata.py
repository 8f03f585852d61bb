"""Scores into tokens: exact totals, bounds, order, ties, padding, prefixes, streams. And the scores themselves."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.budget import AtaConfig, StreamAllocator, allocate_scores, feasible_total
from vtok.layers.relevance import novelty, yes_no
from vtok.types import Features, Tokens

KINDS = ("minmax", "softmax", "linear")
FAST = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw, most: int = 9):
    """A config, the scores of one clip (ties are likely), and a total within its bounds."""
    low = draw(st.integers(0, 4))
    config = AtaConfig(
        minimum=low,
        maximum=draw(st.integers(max(low, 1), low + 9)),
        weights=draw(st.sampled_from(KINDS)),
        temperature=draw(st.sampled_from([0.05, 1.0, 30.0])),
        expected=[0.0, 1.0],
    )
    value = st.one_of(st.integers(0, 3).map(float), st.floats(0, 100, allow_subnormal=False))
    scores = draw(st.lists(value, min_size=1, max_size=most))
    total = draw(st.integers(len(scores) * config.minimum, len(scores) * config.maximum))
    return config, torch.tensor(scores, dtype=torch.float64), total


def allocate(config, scores, total, **keywords):
    return allocate_scores(scores[None], total=total, config=config, **keywords)[0]


@FAST
@given(cases())
def test_total_bounds_order_and_repetition(case):
    config, scores, total = case
    tokens = allocate(config, scores, total)
    assert tokens.dtype == torch.int64 and int(tokens.sum()) == total
    assert config.minimum <= int(tokens.min()) and int(tokens.max()) <= config.maximum
    higher = scores[:, None] > scores
    assert not bool((higher & (tokens[:, None] < tokens)).any()), "a higher score has fewer tokens"
    equal = scores[:, None] == scores
    assert int((tokens[:, None] - tokens)[equal].abs().max()) <= 1
    earlier = torch.arange(len(scores))[:, None] < torch.arange(len(scores))
    assert not bool((equal & earlier & (tokens[:, None] < tokens)).any()), "ties go to the earlier segment"
    assert torch.equal(tokens, allocate(config, scores.clone(), total))


@FAST
@given(cases(), st.data())
def test_a_raised_score_costs_no_tokens(case, data):
    config, scores, total = case
    at = data.draw(st.integers(0, len(scores) - 1))
    raised = scores.clone()
    raised[at] += data.draw(st.floats(0, 50))
    assert int(allocate(config, raised, total)[at]) >= int(allocate(config, scores, total)[at])


@FAST
@given(cases())
def test_a_larger_total_takes_nothing_away(case):
    config, scores, total = case
    if total < len(scores) * config.maximum:
        more = allocate(config, scores, total + 1) - allocate(config, scores, total)
        assert int(more.min()) >= 0 and int(more.sum()) == 1


@FAST
@given(cases(), st.randoms(use_true_random=False))
def test_order_of_segments(case, rng):
    """Permuted scores give permuted tokens, but for equal scores, which keep their tokens between them."""
    config, scores, total = case
    order = list(range(len(scores)))
    rng.shuffle(order)
    tokens, other = allocate(config, scores, total), allocate(config, scores[order], total)
    for value in scores.unique():
        assert sorted(tokens[scores == value].tolist()) == sorted(other[scores[order] == value].tolist())


@FAST
@given(st.lists(cases(), min_size=2, max_size=4), st.integers(0, 3))
def test_padding_and_company_change_nothing(rows, extra):
    config, totals = rows[0][0], []
    width = max(len(scores) for _, scores, _ in rows) + extra
    padded = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    for row, (_, scores, total) in enumerate(rows):
        padded[row, : len(scores)] = scores
        totals.append(min(max(total, len(scores) * config.minimum), len(scores) * config.maximum))
    valid = ~padded.isnan()
    batch = allocate_scores(padded, total=torch.tensor(totals), config=config, valid=valid)
    assert not bool(batch[~valid].any())
    for row, (_, scores, _) in enumerate(rows):
        assert batch[row, : len(scores)].tolist() == allocate(config, scores, totals[row]).tolist()


def proportional(weights: list[float], caps: list[int], total: float) -> list[float]:
    """Real-valued shares in proportion to the weights, none above its cap: by filling up and capping."""
    out, open_ = [0.0] * len(caps), {i for i, w in enumerate(weights) if w > 0}
    while open_:
        share = (total - sum(out)) / sum(weights[i] for i in open_)
        full = {i for i in open_ if weights[i] * share >= caps[i]}
        if not full:
            return [weights[i] * share if i in open_ else out[i] for i in range(len(caps))]
        for i in full:
            out[i] = float(caps[i])
        open_ -= full
    return out


@FAST
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=8), st.integers(1, 40), st.data())
def test_within_one_token_of_the_exact_share(weights, cap, data):
    total = data.draw(st.integers(0, cap * len(weights)))
    config = AtaConfig(minimum=0, maximum=cap, weights="linear")
    tokens = allocate(config, torch.tensor(weights, dtype=torch.float64), total)
    exact = proportional(weights, [cap] * len(weights), total)
    # a divisor method stays within the quota but for rare, lopsided weights; those stay within two
    assert max(abs(int(t) - x) for t, x in zip(tokens, exact)) < 2 + 1e-9


def test_the_papers_numbers():
    """Tempo's released rule: S=128 segments, budgets 8192 and 4096 of 4 to 128 tokens; equal scores share evenly."""
    scores = torch.rand(1, 128, generator=torch.Generator().manual_seed(0))
    for total, most in ((8192, 128), (4096, 64)):
        tokens = allocate_scores(scores, total=total)
        assert int(tokens.sum()) == total and int(tokens.min()) == 4
        assert abs(int(tokens.max()) - most) <= 2
    assert allocate_scores(torch.full((1, 10), 0.3), total=400).tolist() == [[40] * 10]
    assert allocate_scores(torch.zeros(1, 3), total=14).tolist() == [[5, 5, 4]]


def test_bounds_of_single_segments():
    scores, most = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[128, 128, 3]])
    tokens = allocate_scores(scores, total=100, maximum=most)
    assert tokens.tolist() == [[4, 93, 3]], "a segment that holds fewer than the minimum gives all it has"
    assert feasible_total(500, torch.ones(1, 3, dtype=torch.bool), maximum=most).tolist() == [259]
    with pytest.raises(ValueError, match="segment 2 of clip 0 has a minimum of 4 and a maximum of 3"):
        allocate_scores(scores, total=100, minimum=torch.full((1, 3), 4), maximum=most)


def test_a_budget_of_tokens():
    """What is allocated is what `truncate` keeps, and less is a part of more."""
    group, rank = torch.arange(3).repeat_interleave(8)[None], torch.arange(8).repeat(3)[None]
    places = torch.full((1, 24, 3), torch.nan)
    tokens = Tokens(torch.randn(1, 24, 2), torch.tensor([24]), places, group, rank)
    config, scores = AtaConfig(minimum=1, maximum=8), torch.tensor([[0.1, 0.9, 0.4]])
    kept = {t: tokens.truncate(allocate_scores(scores, total=t, config=config)) for t in (6, 12)}
    assert {t: int(k.lengths[0]) for t, k in kept.items()} == {6: 6, 12: 12}
    pairs = {t: set(zip(k.group[0].tolist(), k.rank[0].tolist())) for t, k in kept.items()}
    assert pairs[6] < pairs[12]


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (11, "budget=11 is too small: the 3 segments of clip 0 take at least 12 tokens (ata.minimum); ask for so many, "
             "or set ata.minimum to 3 or less"),
        (-1, "set ata.minimum to 0 or less"),
        (385, "budget=385 is too large: the 3 segments of clip 0 hold at most 384 tokens (ata.maximum); ask for so "
              "many, or raise ata.maximum to 129"),
    ],
)  # fmt: skip
def test_impossible_totals(total, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate_scores(torch.zeros(1, 3), total=total)
    if total > 0:
        with pytest.raises(ValueError, match=re.escape(message)):
            StreamAllocator(total=total, segments=3, config=AtaConfig(expected=[0, 1]))


def test_what_is_refused():
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="score of segment 1 of clip 0 is"):
            allocate_scores(torch.tensor([[0.0, bad]]), total=20)
    with pytest.raises(ValueError, match="ata.weights=linear needs"):
        allocate_scores(torch.tensor([[0.0, -1.0]]), total=20, config=AtaConfig(weights="linear"))
    with pytest.raises(ValueError, match="clip 1 has no segment"):
        allocate_scores(torch.zeros(2, 2), total=8, valid=torch.tensor([[True, True], [False, False]]))
    for keys, name in (({"weights": "rank"}, "ata.weights"), ({"minimum": 9, "maximum": 8}, "ata.minimum=9"),
                       ({"score": "clip"}, "ata.score"), ({"temperature": 0.0}, "ata.temperature"),
                       ({"expected": [1.0]}, "ata.expected")):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(name)):
            AtaConfig(**keys)
    with pytest.raises(ValueError, match="ata.expected"):
        StreamAllocator(total=20, segments=4)


def stream(config, scores, total, segments):
    allocator = StreamAllocator(total=total, segments=segments, config=config)
    return [int(allocator.step(score[None])[0]) for score in scores]


@FAST
@given(cases(), st.integers(0, 5), st.data())
def test_streams(case, absent, data):
    """The total is never exceeded, nor a bound broken; what is given does not depend on what comes; all is spent where
    all stated segments come; a higher score never gets fewer."""
    config, scores, total = case
    stated = len(scores) + absent
    total = min(max(total, stated * config.minimum), stated * config.maximum)
    given_ = stream(config, scores, total, stated)
    assert sum(given_) <= total and (absent or sum(given_) == total)
    assert all(config.minimum <= tokens <= config.maximum for tokens in given_)
    cut = data.draw(st.integers(0, len(scores)))
    assert stream(config, torch.cat([scores[:cut], 100 - scores[cut:]]), total, stated)[:cut] == given_[:cut]
    at, raised = data.draw(st.integers(0, len(scores) - 1)), scores.clone()
    raised[at] += data.draw(st.floats(0, 50))
    assert stream(config, raised, total, stated)[at] >= given_[at]


def test_streams_side_by_side():
    """Clips of a batch whose segments end at other times are what each is alone."""
    config = AtaConfig(minimum=2, maximum=40, expected=[0.0, 1.0])
    scores = torch.rand(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts, totals = torch.tensor([12, 5, 9]), torch.tensor([120, 80, 18])
    allocator = StreamAllocator(total=totals, segments=counts, config=config, batch=3)
    steps = [allocator.step(scores[:, t], real=t < counts) for t in range(12)]
    together = torch.stack(steps, 1)
    for row, (count, total) in enumerate(zip(counts.tolist(), totals.tolist())):
        assert together[row, :count].tolist() == stream(config, scores[row, :count], total, count)
        assert not bool(together[row, count:].any())
    with pytest.raises(ValueError, match="more segments than were stated"):
        allocator.step(scores[:, 0])


def test_a_stream_follows_its_scores():
    """Not only allowed but good: tokens go where scores are high, nearly as in the allocation of the whole clip."""
    scores = torch.rand(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    config = AtaConfig(minimum=4, maximum=128, weights="linear", expected=[0.0, 1.0])
    streamed = torch.tensor(stream(config, scores, 2048, 64)).double()
    whole = allocate(config, scores, 2048).double()
    assert float(torch.corrcoef(torch.stack([streamed, whole]))[0, 1]) > 0.95


# the scores


def clip(frames: int = 6, batch: int = 1) -> Features:
    return Features(torch.randn(batch, frames, 4, 8), (2, 2), lengths=torch.full((batch,), frames))


def test_novelty_is_low_where_frames_come_back():
    features = clip()
    features.patches[:, 4:] = features.patches[:, :2]
    segments = torch.tensor([[0, 0, 1, 1, 2, 2]])
    score = novelty(features, segments)
    assert float(score[0, 2]) == pytest.approx(0, abs=1e-6) and float(score[0, :2].min()) > 0.2
    assert float(novelty(features, segments, memory=2)[0, 2]) > 0.2, "four frames back is out of its memory"
    still = Features(torch.ones(1, 6, 4, 8), (2, 2))
    assert novelty(still, segments, of="max").tolist() == [[1, pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6)]]


def test_scores_do_not_see_later_frames_nor_padding():
    features, segments = clip(8), torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    short = Features(features.patches.clone(), (2, 2), lengths=torch.tensor([4]))
    short.patches[:, 4:] = 7
    assert torch.equal(novelty(features, segments)[:, :2], novelty(short, segments.clamp(max=1)))


def test_yes_no_is_the_log_odds_of_the_words():
    states, head = torch.randn(2, 3, 8), torch.randn(20, 8)
    chances = (states @ head.T).softmax(-1)
    odds = chances[..., [1, 4]].sum(-1) / chances[..., [2]].sum(-1)
    torch.testing.assert_close(yes_no(states, head, yes=[1, 4], no=[2]), odds.log())
    with pytest.raises(ValueError, match="ids of its own"):
        yes_no(states, head, yes=[1], no=[1])
