"""Clip and Tokens: shapes are checked once, budgets are met exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.layers.stream import join
from vtok.types import Clip, Features, ShapeError, Tokens, resolve_budget, share, to_uint8


def tokens(groups: list[int], per_group: int = 4) -> Tokens:
    """One row per entry: that many groups of `per_group` tokens."""
    batch, longest = len(groups), max(groups) * per_group
    at = torch.arange(longest).expand(batch, -1)
    return Tokens(
        embeddings=torch.randn(batch, longest, 3),
        lengths=torch.tensor(groups) * per_group,
        positions=torch.full((batch, longest, 3), torch.nan),
        group=at // per_group,
        rank=at % per_group,
        indices=torch.randint(0, 10, (batch, longest, 1)),
        codebook_sizes=(10,),
        frames=torch.tensor(groups) * 8,
        source=torch.arange(longest).expand(batch, -1).contiguous(),
    )


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50))
def test_share_is_even_and_exact(total, groups):
    parts = share(total, groups)
    assert sum(parts) == total and max(parts) - min(parts) <= 1 and parts == sorted(parts, reverse=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_truncate_keeps_the_first_ranks_of_every_group(groups, data):
    full = tokens(groups)
    budget = data.draw(st.integers(1, 4 * min(groups)))
    short = full.truncate(budget)
    assert short.lengths.tolist() == [budget] * len(groups)
    for row, count in enumerate(groups):
        want = [(g, r) for g, k in enumerate(share(budget, count)) for r in range(k)]
        mask = short.mask[row]
        assert list(zip(short.group[row][mask].tolist(), short.rank[row][mask].tolist())) == want
        picked = [g * 4 + r for g, r in want]
        assert torch.equal(short.embeddings[row][mask], full.embeddings[row, picked])
        # a patch points to its token's new place, or nowhere
        for old, new in enumerate(short.source[row].tolist()):
            assert new == (picked.index(old) if old in picked else -1)


def test_truncate_by_group_and_its_errors():
    full = tokens([3, 3])
    budget = torch.tensor([[4, 0, 1], [1, 1, 1]])
    short = full.truncate(budget)
    assert short.lengths.tolist() == [5, 3]
    assert short.group[0].tolist() == [0, 0, 0, 0, 2]
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=f"budget={wrong} is out of range.*1 to 12"):
            full.truncate(wrong)
    with pytest.raises(ValueError, match="a group holds 0 to 4"):
        full.truncate(torch.tensor([[5, 0, 0], [1, 1, 1]]))
    assert resolve_budget(None, groups=torch.tensor([1]), max_per_group=4) is None


def test_bits_count_real_tokens_only():
    full = tokens([1, 3])
    assert torch.allclose(full.bits, torch.tensor([4.0, 12.0]).double() * torch.tensor(10.0).double().log2())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rank=torch.zeros(2, 5, dtype=torch.int64)), r"Tokens.rank has shape \[2, 5\], expected \[2, 12\]"),
        (dict(lengths=torch.zeros(2)), "Tokens.lengths has dtype torch.float32, expected an integer"),
        (dict(codebook_sizes=(10, 10)), r"Tokens.indices has shape \[2, 12, 1\], expected \[2, 12, 2\]"),
        (dict(positions=torch.zeros(2, 12, 2)), "Tokens.positions"),
    ],
)
def test_wrong_shapes_say_so(change, message):
    with pytest.raises(ShapeError, match=message):
        Tokens(**{**vars(tokens([3, 3])), **change})


def test_clip_checks_and_pixels():
    video = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16)
    assert torch.equal(to_uint8(Clip(["a"], video).as_float().video), video)
    with pytest.raises(ShapeError, match="lies in \\[0, 0\\]"):
        Clip(["a"], video, torch.tensor([0]))
    with pytest.raises(ShapeError, match="Clip.text has 2 entries for 1 keys"):
        Clip(["a"], video, text=["x", "y"])
    with pytest.raises(ShapeError, match="does not tile"):
        Features(torch.zeros(1, 1, 6, 4), grid=(2, 2))


def piece(count: int, *, patches: int = 0, groups: int = 1, **more) -> Tokens:
    group = (torch.arange(count) * groups // count).expand(2, -1)
    own = dict(mass=torch.full((2, count), 2.0), frames=torch.tensor([3, 3])) if patches else {}
    if patches:
        own["source"] = (torch.arange(patches) % (count + 1) - 1).expand(2, -1)  # -1: dropped
    shape = dict(positions=torch.zeros(2, count, 3), rank=torch.zeros(2, count, dtype=torch.int64))
    return Tokens(torch.randn(2, count, 4), torch.tensor([count, count]), group=group, **shape, **own, **more)


def test_pieces_of_a_stream_are_joined_with_what_their_tokens_stand_for():
    one, two = piece(3, patches=6, groups=2), piece(2, patches=4)
    whole = join([one, two])
    assert whole is not None and whole.lengths.tolist() == [5, 5] and whole.frames.tolist() == [6, 6]
    assert whole.group[0].tolist() == [0, 0, 1, 2, 2] and whole.mass.tolist() == [[2.0] * 5] * 2
    assert whole.source[0].tolist() == [-1, 0, 1, 2, -1, 0, -1, 3, 4, -1]
    assert torch.equal(whole.embeddings, torch.cat([one.embeddings, two.embeddings], 1))
    assert join([piece(2), piece(2)]).mass is None and join([]) is None and join([one]) is one
    with pytest.raises(ShapeError, match="piece 1 of a stream has no Tokens.mass, others have"):
        join([one, piece(2)])
    with pytest.raises(ShapeError, match="pieces of a stream have no padding"):
        join([replace(one, lengths=torch.tensor([3, 2])), two])


def test_sizes_of_groups():
    tokens = replace(piece(4), group=torch.tensor([[0, 0, 2, 3], [1, 1, 1, 0]]), lengths=torch.tensor([4, 3]))
    assert tokens.group_sizes.tolist() == [[2, 0, 1, 1], [0, 3, 0, 0]]
