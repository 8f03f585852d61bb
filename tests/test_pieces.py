"""What compressors along time are made of: orders, pieces, bins, pooled grids, words."""

from __future__ import annotations

import torch
from test_temporal import features

from vtok.layers.byte_words import ByteWords, split_words
from vtok.layers.frames import bin_means, halves, pool_grid, pool_shape, thin
from vtok.layers.pieces import Piece, arrange, gather_tokens, kept, spread_grid, spread_order


def test_budget_order_is_spread_over_frames():
    for count in (5, 9, 32):
        order = spread_order(count)
        assert sorted(order.tolist()) == list(range(count))
        for first in range(2, count):
            taken = (order < first).nonzero()[:, 0]
            assert int(taken.diff().max()) <= 2 * -(-count // first) + 1  # no long stretch without a frame
    assert torch.equal(spread_order(9)[:5].argsort(), spread_order(5).argsort())
    for first in (4, 8, 16):
        quarters = (spread_grid((8, 8)).reshape(2, 4, 2, 4) < first).sum((1, 3))
        assert int(quarters.min()) >= first // 8 and int(quarters.max()) <= first // 2, quarters


def test_pieces_meet_in_time_and_rank_order():
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for lane in range(3):
        where = torch.rand(3, 6, generator=generator) < 0.5
        clips, frames = where.nonzero(as_tuple=True)
        keep = torch.rand(len(clips), lane + 1, generator=generator) < 0.7
        made = torch.randn(len(clips), lane + 1, 2, generator=generator)
        level = torch.randperm(lane + 1, generator=generator)
        pieces.append(Piece(made, clips, frames, torch.zeros(*made.shape[:2], 3), level, keep))
    everything = [
        (int(p.clip[m]), int(p.frame[m]), lane, slot, int(p.level[slot]), p.embeddings[m, slot])
        for lane, p in enumerate(pieces)
        for m in range(len(p.clip))
        for slot in range(p.embeddings.shape[1])
        if p.keep[m, slot]
    ]
    groups = torch.tensor([0, 0, 1, 1, 1, 2]).expand(3, -1)
    spread = spread_order(6).tolist()
    for own in (None, groups):
        layout = arrange(pieces, frames=6, groups=own)
        everywhere = torch.ones_like(layout.clip, dtype=torch.bool)
        tokens = gather_tokens(pieces, layout, everywhere, lengths=torch.tensor([6, 6, 6]), seconds=None)
        for b in range(3):
            line = sorted((t for t in everything if t[0] == b), key=lambda t: t[:4])
            got = tokens.embeddings[b, : len(line)]
            assert int(tokens.lengths[b]) == len(line) and torch.equal(got, torch.stack([t[5] for t in line]))
            for i, token in enumerate(line):
                group = 0 if own is None else int(groups[b, token[1]])
                key = (token[4], spread[token[1]], *token[2:4])
                rivals = [t for t in line if own is None or int(groups[b, t[1]]) == group]
                rank = sum((t[4], spread[t[1]], *t[2:4]) < key for t in rivals)
                assert (int(tokens.group[b, i]), int(tokens.rank[b, i])) == (group, rank)
    assert kept(layout, batch=3, most=2, budget=None).sum() == 6


def test_bins_and_halves():
    begin, end = halves(7)
    wanted = [(0, 1), (0, 0.5), (0.5, 1), (0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]
    assert list(zip(begin.tolist(), end.tolist())) == wanted
    values, lengths = torch.randn(2, 6, 3, dtype=torch.float64), torch.tensor([6, 3])
    got = bin_means(values, lengths, *halves(3))
    assert torch.allclose(got[0, 1], values[0, :3].mean(0)) and torch.allclose(got[1, 2], values[1, 1:3].mean(0))
    thirds = torch.arange(3, dtype=torch.float64) / 3
    assert torch.allclose(bin_means(values, lengths, thirds, thirds + 1 / 3)[1], values[1, :3])


def test_thinning_is_even():
    seen = features([9, 4], frames=9)
    got, time = thin(seen, 3)
    assert got.count().tolist() == [3, 3]
    assert torch.equal(got.patches[0], seen.patches[0, [1, 4, 7]]) and torch.equal(
        got.times[1], seen.times[1, [0, 2, 3]]
    )
    assert torch.allclose(time[0], torch.tensor([1.5, 4.5, 7.5], dtype=torch.float64) / 9)
    assert thin(seen, 9)[0] is seen


def test_pooling_keeps_the_aspect():
    assert pool_shape(16, (12, 12)) == (4, 4) and pool_shape(6, (3, 4)) == (2, 3) and pool_shape(7, (3, 4)) == (1, 7)
    patches = torch.arange(12.0)[None, :, None]
    assert pool_grid(patches, (3, 4), (1, 2))[0, :, 0].tolist() == [4.5, 6.5]


def test_words():
    assert split_words("What IS it?  ", most=9) == [b"what", b"is", b"it?"]
    assert split_words("internationalisation", most=9) == [b"internationa", b"lisation"]
    assert split_words("a b c", most=2) == [b"a", b"b"]
    net = ByteWords(8, most=4)
    words, valid = net(["red blue", "", "blue red"])
    assert words.shape == (3, 3, 8) and valid.sum(1).tolist() == [3, 1, 3]
    assert torch.equal(words[0, 0], words[1, 0]) and not torch.allclose(words[0, 1], words[2, 2])  # places count
    assert net([""])[0].shape == (1, 1, 8)
