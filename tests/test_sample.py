"""Drawing from a prior: probabilities, costs, conditions, and pictures of several lengths."""

import numpy as np
import pytest
from test_prior_coding import PRIOR, make_prior

from vtok.coding.prior_coding import PriorStream
from vtok.coding.prior_data import prefix_of
from vtok.coding.sample import budgets_of, choose, condition_words, draw_ids, kept, sheet
from vtok.layers.token_prior import NULL, START


def test_conditions_and_their_words():
    config = make_prior(condition="caption", vocabulary=["a", "cup", "red"], max_words=2).config
    assert prefix_of(["a", "red", "cup"], config) == [START, 2, 4] and prefix_of(["?"], config) == [START, NULL]
    assert condition_words(config, caption="The RED, cup!") == [4, 3] and condition_words(config) == [NULL]
    with pytest.raises(ValueError, match="knows none of it; it knows a, cup, red"):
        condition_words(config, caption="nothing")
    with pytest.raises(ValueError, match="trained with --condition caption"):
        condition_words(config, label="red")
    assert condition_words(make_prior().config) == []


def test_draws_follow_the_probabilities():
    rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    rows = np.broadcast_to(logits, (20_000, 4))
    share = np.bincount(choose(rows, rng, temperature=1.0, top_k=None, top_p=1.0), minlength=4) / 20_000
    assert np.allclose(share, np.exp(logits), atol=0.015)
    sharp = np.bincount(choose(rows, rng, temperature=0.5, top_k=None, top_p=1.0), minlength=4) / 20_000
    assert np.allclose(sharp, np.exp(2 * logits) / np.exp(2 * logits).sum(), atol=0.015)
    assert set(choose(rows, rng, temperature=1.0, top_k=2, top_p=1.0)) == {0, 1}
    assert set(choose(rows, rng, temperature=1.0, top_k=None, top_p=0.79)) == {0, 1}
    assert set(choose(rows, rng, temperature=1.0, top_k=None, top_p=0.81)) == {0, 1, 2}
    assert set(choose(rows, rng, temperature=0.0, top_k=None, top_p=1.0)) == {0}
    never = np.where(np.arange(4) == 3, -np.inf, rows)
    assert 3 not in choose(never, rng, temperature=9.0, top_k=None, top_p=1.0)


def test_samples_cost_what_the_prior_expects():
    """-log2 p of drawn tokens has the mean of the entropy of the distributions they were drawn from."""
    groups = [5, 5]
    drawn = draw_ids(PRIOR, groups=groups, count=60, seed=3)
    bits, entropy = [], []
    for ids in drawn:
        tables = PriorStream(PRIOR).frequencies(ids, groups)
        bits.append(PriorStream(PRIOR).bits(ids, groups).sum())
        shares = [t / t.sum(-1, keepdims=True) for t in tables]
        entropy.append(sum(-(p * np.log2(p)).sum() for p in shares))
    assert np.mean(bits) == pytest.approx(np.mean(entropy), rel=0.05)
    assert np.array_equal(drawn, draw_ids(PRIOR, groups=groups, count=60, seed=3))
    one, two = (draw_ids(PRIOR, groups=groups, count=2, temperature=0.0, seed=s) for s in (1, 2))
    assert np.array_equal(one, two) and np.array_equal(one[0], one[1])


def test_pictures_of_several_lengths():
    assert budgets_of(256, nested=True) == [1, 4, 16, 64, 256] and budgets_of(9, nested=False) == [9]
    ids, counts = kept(np.arange(6)[:, None], [4, 2], 3)
    assert ids[:, 0].tolist() == [0, 1, 2, 4, 5] and counts == [3, 2]
    frames = {k: np.full((3, 4, 5, 3), k, np.uint8) for k in (1, 2)}
    assert sheet([frames, frames]).shape == (10, 12, 3) and sheet([frames])[0, -1].tolist() == [2, 2, 2]
