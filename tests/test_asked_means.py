"""Means of whole clips that look for what a question names."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from vtok.families.temporal import Config, Model, SummaryConfig
from vtok.layers.asked_means import AskedMeans
from vtok.layers.dynamic_context import FormerConfig, StaticConfig
from vtok.layers.frames import Frames, bin_means, halves, place_code
from vtok.layers.segments import SegmentConfig, segment, windows
from vtok.types import Features
from vtok.vision import TowerConfig

DIM, GRID, LENGTHS = 12, (2, 3), [7, 1, 4]


def frames_of(patches: torch.Tensor, lengths: list[int]) -> Frames:
    seen = Features(patches, GRID, lengths=torch.tensor(lengths))
    starts = segment(seen, SegmentConfig())
    time = (torch.arange(patches.shape[1]) + 0.5) / seen.count()[:, None]
    return Frames(patches, GRID, seen.count(), time.to(patches), windows(starts, seen.count(), length=2), starts)


def drawn(batch: int = 3, frames: int = 7) -> torch.Tensor:
    return torch.randn(batch, frames, 6, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(count: int = 7) -> AskedMeans:
    torch.manual_seed(1)
    return AskedMeans(DIM, words=8, width=18, count=count).double()


def words(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    real = torch.arange(5) < torch.tensor([5, 1, 3])[:batch, None]
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64), real


@torch.no_grad()
def test_where_nothing_is_looked_for_they_are_plain_means_of_stretches():
    asked, frames = layer(), frames_of(drawn(), LENGTHS)
    begin, end = halves(7)
    near = bin_means(frames.patches.mean(2), frames.lengths, begin, end)
    fresh = asked(frames, begin, end, *words())
    assert 0 < (fresh - near).abs().max() < 0.3 * near.abs().max()
    asked.query.weight.zero_()
    assert (asked(frames, begin, end, *words()) - near).abs().max() < 1e-12


@torch.no_grad()
def test_words_and_frames_that_are_not_there_change_nothing():
    asked, frames = layer(), frames_of(drawn(), LENGTHS)
    begin, end = halves(7)
    text, real = words()
    out = asked(frames, begin, end, text, real)
    for b, length in enumerate(LENGTHS):
        alone = frames_of(drawn()[b : b + 1, :length], [length])
        said = int(real[b].sum())
        assert (
            asked(alone, begin, end, text[b : b + 1, :said], real[b : b + 1, :said])[0] - out[b]
        ).abs().max() < 1e-12


@torch.no_grad()
def test_a_stretch_takes_patches_of_its_own_frames_alone():
    asked, begin, end = layer(), *halves(7)
    base = asked(frames_of(drawn(), [7] * 3), begin, end, *words())
    patches = drawn()
    patches[:, 6] += 1  # the last of seven frames: in the whole, the second half and the last quarter
    moved = (asked(frames_of(patches, [7] * 3), begin, end, *words()) - base).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [True, False, True, False, False, False, True]


def test_places_tell_equal_patches_apart():
    """With equal patches only their places can move the weights, and the mean is the patch whatever they are."""
    asked, begin, end = layer(1), *halves(1)
    same = drawn()[:, :1, :1].expand(-1, 7, 6, -1).clone()
    frames = frames_of(same, [7] * 3)
    assert (asked(frames, begin, end, *words())[:, 0] - same[:, 0, 0]).abs().max() < 1e-12
    code = asked.places(frames)
    assert code.shape == (3, 42, 18) and len(code[0].unique(dim=0)) == 42
    first = place_code(torch.tensor([[0.5 / 7, 0.25, 0.5 / 3]], dtype=torch.float64), 18)
    assert (code[0, 0] - first[0]).abs().max() < 1e-12


COLOURS, SHAPES = ["red", "yellow", "green"], ["circle", "square", "star"]


def test_one_token_learns_to_hold_what_was_asked_for():
    """Two things of other shapes and colours a clip: a token that does not know the question can be right about one."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    small = dict(width=24, depth=1, num_heads=2)
    model = Model(
        Config(
            in_dim=24,
            embedding_dim=24,
            embedding_rms=0.05,
            tower=TowerConfig(name="tower"),
            text=True,
            window=2,
            static=StaticConfig(keep="pool", tokens=2),
            former=FormerConfig(num_queries=2, **small),
            summary=SummaryConfig(num_tokens=1, **small),
        )
    )
    colours, shapes = torch.randn(3, 24, generator=generator), torch.randn(3, 24, generator=generator)
    optimizer, right = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(250):
        shape = torch.rand(32, 3, generator=generator).argsort(1)[:, :2]
        colour = torch.rand(32, 3, generator=generator).argsort(1)[:, :2]
        place = torch.rand(32, 6, generator=generator).argsort(1)[:, :2]
        patches = 0.3 * torch.randn(32, 2, 6, 24, generator=generator)
        at = torch.arange(32)
        for thing in range(2):
            patches[at, :, place[:, thing]] += (colours[colour[:, thing]] + shapes[shape[:, thing]])[:, None]
        tokens = model.compress(
            Features(patches, (2, 3)), budget=1, prompt=[f"What colour is the {SHAPES[i]}?" for i in shape[:, 0]]
        )
        logits = tokens.embeddings[:, 0] / model.config.embedding_rms @ colours.T / 5
        loss = cross_entropy(logits, colour[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(-1) == colour[:, 0]).float().mean()))
    assert sum(right[:20]) / 20 < 0.6
    assert sum(right[-20:]) / 20 > 0.95
