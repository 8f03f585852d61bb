"""Compressors along time: what each one promises by itself; laws of all projectors are in test_contract_projectors.

Features stand in for a tower's: no tower is loaded where the clip brings its features.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vtok.budget import AtaConfig, allocate_scores
from vtok.config import load as load_config
from vtok.families.temporal import COMPRESSORS, NODES, AudioConfig, Config, Model, SummaryConfig
from vtok.layers.dynamic_context import DualConfig, FormerConfig, StaticConfig
from vtok.layers.memory_bridge import BridgeConfig
from vtok.layers.relevance import novelty
from vtok.layers.segments import SegmentConfig
from vtok.layers.temporal_options import (
    MatryoshkaConfig,
    PoolConfig,
    ProgressiveConfig,
    RegionConfig,
    TuringConfig,
    in_squares,
)
from vtok.types import Clip, Features, Tokens
from vtok.vision import TowerConfig

GRID, IN, DIM = (3, 4), 6, 16
LENGTHS = [9, 1, 4]
TINY = dict(width=8, depth=2, num_heads=2)
FORMER = FormerConfig(num_queries=4, **TINY)
SMALL: dict[str, Any] = dict(
    in_dim=IN,
    embedding_dim=DIM,
    embedding_rms=0.05,
    tower=TowerConfig(name="tower"),
    max_tokens=40,
)
CUTS: dict[str, Any] = dict(window=3, segments=SegmentConfig(most=3))
READS = {"tdc": dict(CUTS, former=FORMER), "bridge": dict(segments=CUTS["segments"])}  # of what is not of a form
SUMMARY = SummaryConfig(num_tokens=5, **TINY)
FORMS: dict[str, dict[str, Any]] = {
    "tdc": dict(summary=SUMMARY, text=True, separator=True),
    "tdc_plain": dict(static=StaticConfig(keep="pool", tokens=6), output_norm="unit", max_frames=5),
    "tdc_queries": dict(
        static=StaticConfig(keep="none"), former=FormerConfig(num_queries=4, queries="learned", **TINY)
    ),
    "tdc_paper": dict(former=FormerConfig(num_queries=4, residual=False, **TINY), output_norm="none", max_tokens=200),
    "tdc_windows": dict(summary=SUMMARY, groups="window", segments=SegmentConfig(name="scene_tilling")),
    "tdc_audio": dict(audio=AudioConfig(name="ears", in_dim=5, tokens=3)),
    "dual_path": dict(dual_path=DualConfig(pooled=2, former=FORMER), text=True, summary=SUMMARY),
    "attn_pool": dict(pool=PoolConfig(num_tokens=7, hidden=16)),
    "turing": dict(turing=TuringConfig(4, 2, pool=PoolConfig(num_tokens=6, hidden=8), **TINY)),
    "bridge": dict(bridge=BridgeConfig(3, 2, 4, **TINY)),
    "bridge_all": dict(
        bridge=BridgeConfig(3, 2, 4, emit="all", **TINY), segments=SegmentConfig(name="fixed", length=2, most=5)
    ),
    "bridge_memory": dict(bridge=BridgeConfig(3, 2, 4, retrieval=False, emit="memory", **TINY)),
    "region": dict(region=RegionConfig(2, 8, 2), summary=SUMMARY, groups="window"),
    "progressive": dict(progressive=ProgressiveConfig(depth=1, num_heads=2)),
    "matryoshka": dict(matryoshka=MatryoshkaConfig([1, 2, 3])),
}
NESTED = sorted(set(FORMS) - {"matryoshka"})
each_form = pytest.mark.parametrize("form", FORMS)
each_nested = pytest.mark.parametrize("form", NESTED)


def make(form: str, **changes: Any) -> Model:
    torch.manual_seed(0)
    kind = form.partition("_")[0] if "tdc" in form or "bridge" in form else form
    own = FORMS[form] | changes
    shared = READS.get(kind, CUTS if own.get("groups") == "window" else {})
    return Model(Config(**copy.deepcopy(SMALL | {"compressor": kind} | shared | own))).double().eval()


def features(lengths: list[int] = LENGTHS, *, seed: int = 0, frames: int | None = None, dim: int = IN) -> Features:
    """Scenes of three frames, frames of a scene alike."""
    generator = torch.Generator().manual_seed(seed)
    frames = frames or max(lengths)
    draw = dict(generator=generator, dtype=torch.float64)
    scenes = torch.randn(len(lengths), -(-frames // 3), 12, dim, **draw).repeat_interleave(3, 1)[:, :frames]
    patches = scenes + 0.3 * torch.randn(len(lengths), frames, 12, dim, **draw)
    real = torch.arange(frames) < torch.tensor(lengths)[:, None]
    times = torch.arange(frames, dtype=torch.float64).expand(len(lengths), -1) / 2
    return Features(patches * real[..., None, None], GRID, times=times, lengths=torch.tensor(lengths))


PROMPTS = ["What colour is it?", "", "Which of the two came first, the red or the blue one?"]


def ears(lengths: list[int] = LENGTHS, seed: int = 3) -> Features:
    found = features([2 * n for n in lengths], seed=seed, dim=5)
    return Features(found.patches[:, :, :2], (1, 2), lengths=found.lengths)


def clip(seen: Features, heard: Features | None = None, prompts: list[str] | None = None) -> Clip:
    keys = [str(i) for i in range(len(seen.patches))]
    return Clip(keys, prompt=prompts or PROMPTS[: len(keys)], features={"tower": seen, "ears": heard or ears()})


def same(a: Tokens, b: Tokens, tolerance: float = 1e-10) -> None:
    assert a.lengths.tolist() == b.lengths.tolist()
    for name in ("group", "rank"):
        assert torch.equal(getattr(a, name)[a.mask], getattr(b, name)[b.mask])
    assert (a.embeddings[a.mask] - b.embeddings[b.mask]).abs().max() < tolerance
    assert torch.allclose(a.positions[a.mask], b.positions[b.mask], atol=tolerance, equal_nan=True)


# --- laws of every form ---


@each_form
@torch.no_grad()
def test_tokens_are_what_the_contract_says(form):
    model, seen = make(form), features()
    tokens = model.encode(clip(seen))
    assert tokens.embeddings.shape[2] == model.embedding_dim == DIM
    assert 1 <= int(tokens.lengths.min()) and int(tokens.lengths.max()) <= model.max_tokens
    assert tokens.embeddings[tokens.mask].isfinite().all() and not tokens.embeddings[~tokens.mask].any()
    for b in range(3):
        count = int(tokens.lengths[b])
        group, rank, time = tokens.group[b, :count], tokens.rank[b, :count], tokens.positions[b, :count, 0]
        assert (group.diff() >= 0).all()
        for g in group.unique():
            assert sorted(rank[group == g].tolist()) == list(range(int((group == g).sum())))
        inside = tokens.positions[b, :count]
        assert (inside[~inside.isnan()] >= 0).all() and (inside[~inside.isnan()] <= 1).all()
        if form not in ("attn_pool", "turing"):
            own = time[tokens.positions[b, :count, 1].isnan().logical_not()]
            assert (own.diff() >= 0).all()  # time order
    assert tokens.times is not None and tokens.times.shape[1] >= int(tokens.num_groups.max())
    span = torch.stack([tokens.times[b, : int(tokens.num_groups[b])] for b in (0,)])[0]
    assert float(span.min()) == 0.0 and float(span.max()) == 4.0  # 9 frames, two a second


@each_nested
@torch.no_grad()
def test_a_budget_keeps_the_first_of_all_tokens(form):
    model, seen = make(form), clip(features())
    everything = model.encode(seen)
    for budget in (1, 7):
        cut = model.encode(seen, budget=budget)
        if model.config.groups == "clip" and budget <= int(everything.lengths.max()):
            same(cut, everything.truncate(budget))
        # what each group got, asked group by group
        share = nn.functional.one_hot(cut.group, int(everything.num_groups.max())) * cut.mask[..., None]
        same(cut, everything.truncate(share.sum(1)))
        same(cut, model.encode(seen, budget=share.sum(1)))


@torch.no_grad()
@pytest.mark.parametrize("form", ["tdc", "tdc_plain", "region", "dual_path", "matryoshka"])
def test_tokens_have_the_size_of_words(form):
    """A frozen LLM meets vectors of its words' size from the first step."""
    tokens = make(form, output_norm="match").encode(clip(features()))
    rms = tokens.embeddings[tokens.mask].square().mean().sqrt()
    assert 0.5 < float(rms) / 0.05 < 1.5


# --- what each one promises ---


@torch.no_grad()
def test_static_frames_are_the_projectors_own_patches_and_counts_are_those_of_the_rule():
    model, seen = make("tdc_paper"), features()
    tokens, projected = model.encode(clip(seen)), model.project(seen).patches
    # three segments a clip, windows of 3: so many static frames of 12 patches, 4 queries for each other frame
    assert tokens.lengths.tolist() == [3 * 12 + 6 * 4, 12, 3 * 12 + 4]
    first = torch.isclose(tokens.positions[0, :, 0], torch.tensor(0.5 / 9, dtype=torch.float64))
    assert (tokens.embeddings[0][first] - projected[0, 0]).abs().max() < 1e-12
    assert tokens.positions[0, 12:16].isnan()[:, 1:].all()  # a query has no place in the frame


@torch.no_grad()
def test_separators_close_frames_and_go_first():
    full = make("tdc", max_tokens=200)
    tokens = full.encode(clip(features()))
    mark = full.size(full.compressor.separator)
    is_mark = ((tokens.embeddings - mark).abs().amax(-1) < 1e-12) & tokens.mask
    assert is_mark.sum(1).tolist() == LENGTHS
    ranks = tokens.rank[0][is_mark[0]]
    assert int(ranks.min()) == int(tokens.lengths[0]) - LENGTHS[0]
    ends = torch.cat([tokens.positions[0, 1:, 0] != tokens.positions[0, :-1, 0], torch.ones(1, dtype=torch.bool)])
    assert torch.equal(is_mark[0][5:], (ends[: tokens.mask.shape[1]] & tokens.mask[0])[5:])  # 5: the summary


@torch.no_grad()
def test_a_small_budget_holds_the_whole_clip():
    """One token of a clip with a summary changes with any frame; without one, with the frame it stands for."""
    moved = {}
    for form in ("tdc", "tdc_queries"):
        model, seen = make(form), features([9])
        base = model.encode(clip(seen, prompts=["Why?"]), budget=1).embeddings
        moved[form] = []
        for t in (0, 2, 4, 8):
            other = Features(seen.patches.clone(), GRID)
            other.patches[:, t] *= -1
            change = model.encode(clip(other, prompts=["Why?"]), budget=1).embeddings - base
            moved[form].append(bool(change.abs().max() > 1e-6))
    assert all(moved["tdc"]) and not all(moved["tdc_queries"])


@torch.no_grad()
@pytest.mark.parametrize(
    "form, reads", [("tdc", True), ("dual_path", True), ("tdc_plain", False), ("attn_pool", False)]
)
def test_questions(form, reads):
    model, seen = make(form), features()
    one, two = (model.encode(clip(seen, prompts=[p] * 3)) for p in ("What colour is it?", "How many are there?"))
    assert bool((one.embeddings - two.embeddings).abs().max() > 1e-9) == reads
    assert model.reads_prompt == reads
    if reads:
        bare = model.compress(seen)
        same(bare, model.compress(seen, prompt=["", " ", ""]))


@torch.no_grad()
def test_audio_is_heard_by_frames_of_its_time():
    model, seen, heard = make("tdc_audio", max_tokens=200), features([9]), ears([9])
    base = model.encode(clip(seen, heard))
    other = Features(heard.patches.clone(), (1, 2))
    other.patches[:, 10:12] += 1  # of 18: while frame 5 is seen, which queries read
    changed = (model.encode(clip(seen, other)).embeddings - base.embeddings).abs().amax(-1)[0] > 1e-9
    assert {round(float(t) * 9 - 0.5) for t in base.positions[0, changed, 0]} == {5}
    assert base.lengths.tolist() == [3 * (12 + 3) + 6 * 4]
    with pytest.raises(ValueError, match="no features of model.audio.name='ears', only of \\['tower'\\]"):
        model.encode(Clip(["a"], features={"tower": seen}))
    with pytest.raises(ValueError, match="compress was given no audio: `beside` says"):
        model.compress(seen)
    with pytest.raises(ValueError, match="2 prompts for 1 clips"):
        make("tdc").compress(seen, prompt=["a", "b"])


@torch.no_grad()
@pytest.mark.parametrize("form, later", [("progressive", False), ("region", False), ("bridge_all", True)])
def test_frames_to_come(form, later):
    """Tokens of a frame depend on the frames before it (progressive), on it alone (region)."""
    model = make(form, max_tokens=200, groups="clip", summary=SummaryConfig())
    seen = features([9])
    base, other = model.encode(clip(seen)), Features(seen.patches.clone(), GRID)
    other.patches[:, 5] *= -1
    changed = (model.encode(clip(other)).embeddings - base.embeddings).abs().amax(-1)[0] > 1e-12
    frames = {round(float(t) * 9 - 0.5) for t in base.positions[0, changed, 0] if not t.isnan()}
    assert 5 in frames and min(frames) >= 4 and (max(frames) > 5) == (form != "region")
    assert later == bool((changed & base.positions[0, :, 0].isnan()).any())  # the memory


@torch.no_grad()
def test_progressive_sees_an_image_as_a_still_video():
    model = make("progressive", max_tokens=200)
    tokens = model.encode(clip(features([1])))
    assert tokens.lengths.tolist() == [4 * 4]
    still = Features(features([1]).patches.expand(-1, 4, -1, -1).contiguous(), GRID)
    assert (model.encode(clip(still)).embeddings - tokens.embeddings).abs().max() < 1e-12


@torch.no_grad()
def test_region_tokens_read_their_own_square():
    model = make("region", summary=SummaryConfig(), groups="clip")
    seen = features([1])
    base, changed = model.encode(clip(seen)).embeddings, Features(seen.patches.clone(), GRID)
    changed.patches[:, :, 4 * 1 + 2] *= -1  # row 1, column 2: the second square
    moved = (model.encode(clip(changed)).embeddings - base).abs().amax(-1)[0] > 1e-12
    assert moved.tolist() == [False, True, False, False]
    squares, there, shape = in_squares(seen.patches[:, 0], GRID, 2)
    assert shape == (2, 2) and there.sum(1).tolist() == [4, 4, 2, 2]
    assert torch.equal(squares[0, 3, :2], seen.patches[0, 0, [10, 11]])


@torch.no_grad()
def test_matryoshka_levels_are_means_and_follow_the_budget():
    model, seen = make("matryoshka", max_tokens=81), features([9])
    projected = model.project(seen).patches
    means = model.encode(clip(seen), budget=9)
    assert (means.embeddings[0] - projected[0].mean(1)).abs().max() < 1e-12
    assert [int(model.encode(clip(seen), budget=b).lengths[0]) for b in (4, 9, 11, 12, 36, 40, 41, 80, 81)] == [
        *(4, 9, 9, 12, 36, 36, 41, 76, 81)
    ]


@torch.no_grad()
def test_turing_machine_remembers_the_order():
    model, seen = make("turing"), features([9])
    backwards = Features(seen.patches.flip(1), GRID)
    assert (model.encode(clip(seen)).embeddings - model.encode(clip(backwards)).embeddings).abs().max() > 1e-6


@torch.no_grad()
def test_windows_share_a_total_by_what_is_new_in_them():
    """What `ata` deals out is a budget of any compressor whose groups are segments."""
    model, seen = make("region", summary=SummaryConfig(), max_tokens=200), features()
    made = model.encode(clip(seen))
    groups = torch.arange(int(made.num_groups.max()))
    held = ((made.group[..., None] == groups) & made.mask[..., None]).sum(1)
    frame_groups = (torch.arange(9) // 3).expand(3, -1)  # windows of 3 frames, as the scenes are
    scores, config = novelty(seen, frame_groups), AtaConfig(minimum=1, maximum=9)
    shares = allocate_scores(scores, total=torch.tensor([11, 4, 7]), config=config, maximum=held, valid=held > 0)
    tokens = model.encode(clip(seen), budget=shares)
    assert tokens.lengths.tolist() == [11, 4, 7]
    same(tokens, made.truncate(shares))
    assert (shares[0][scores[0].argsort()].diff() >= 0).all() and shares[0].unique().numel() > 1


def test_budgets_by_group_have_a_shape():
    model, seen = make("tdc_windows"), clip(features())
    with pytest.raises(ValueError, match="budget is torch.int64 \\[3, 1\\], expected int64 \\[3, "):
        model.encode(seen, budget=torch.ones(3, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(compressor="qformer"), "model.compressor='qformer' is unknown; choose one of tdc"),
        (dict(groups="frame"), "model.groups='frame' is unknown"),
        (dict(output_norm="layer"), "model.output_norm='layer' is unknown"),
        (dict(window=0), "model.window=0 must be at least 1"),
        (dict(compressor="turing", groups="window"), "tokens of turing belong to no window"),
        (dict(compressor="region", text=True), "reads neither questions nor audio"),
        (dict(compressor="bridge", separator=True), "model.separator=true is of tdc"),
        (dict(compressor="matryoshka", summary=SUMMARY), "its budget chooses a level"),
        (dict(audio=AudioConfig(name="ears")), "needs in_dim"),
        (
            dict(compressor="attn_pool", window=3),
            "model.window=3 is read by nothing here: it is of model.groups=window,",
        ),
        (dict(compressor="turing", segments=SegmentConfig(most=3)), "model.segments.most=3 is .* or .*=tdc or bridge;"),
        (dict(compressor="bridge", window=3), "model.window=3 is read by nothing"),
        (dict(compressor="region", former=FORMER), "model.former.num_queries=4 is .*model.compressor=tdc; leave it"),
        (
            dict(static=StaticConfig("pool"), compressor="attn_pool"),
            "model.static.keep='pool' is .*model.compressor=tdc",
        ),
        (dict(pool=PoolConfig(7)), "model.pool.num_tokens=7 is .*model.compressor=attn_pool"),
        (
            dict(compressor="matryoshka", output_norm="unit"),
            "model.output_norm='unit' is .*matryoshka averages patches",
        ),
        (dict(text_words=8), "model.text_words=8 is .*model.text=true"),
        (dict(audio=AudioConfig(tokens=7)), "model.audio.tokens=7 is .*model.audio.name"),
        (dict(static=StaticConfig(tokens=7)), "model.static.tokens=7 is .*model.static.keep=pool"),
        (dict(summary=SummaryConfig(width=8)), "model.summary.width=8 is .*model.summary.num_tokens above 0"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        Config(**SMALL | values)


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_every_setting_of_another_compressor_is_refused(kind):
    """By its name; the forms themselves set what their compressor reads."""
    for form in (form for form in FORMS if form.startswith(kind)):
        own = make(form).config
        for node in NODES:
            changed = {node: copy.deepcopy(getattr(own, node))}
            name = dataclasses.fields(changed[node])[0].name
            setattr(changed[node], name, [1, 2] if node == "matryoshka" else "none" if node == "static" else 3)
            if NODES[node] == kind:
                continue
            with pytest.raises(
                ValueError, match=f"model.{node}.{name}=.* is read by nothing here: it is of model.comp"
            ):
                dataclasses.replace(own, **changed)


def test_what_a_tower_cannot_give():
    with pytest.raises(ValueError, match="model.static.tokens=20 is more than the 12 patches"):
        make("tdc", static=StaticConfig(keep="pool", tokens=20)).encode(clip(features()))
    with pytest.raises(ValueError, match="none fits the tower's \\(3, 4\\) patches"):
        make("matryoshka", matryoshka=MatryoshkaConfig([4, 8])).encode(clip(features()))


def test_a_preset_can_be_taken_back_by_the_defaults_that_errors_name():
    preset, asked = Path(__file__).parents[1] / "configs" / "temporal" / "tdc_tiny.yaml", ["model.summary.num_tokens=0"]
    for name, value in (("width", 768), ("num_heads", 12)):
        with pytest.raises(
            ValueError, match=f"leave it out, or where a preset says it, model.summary.{name}={value}$"
        ) as e:
            load_config(preset, asked)
        asked.append(str(e.value).rpartition(" ")[2])
    assert load_config(preset, asked).model.summary == SummaryConfig()
