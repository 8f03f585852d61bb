"""How many tokens a clip gets, said before anything has seen it, is what every projector family then makes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import test_reducer_family
import test_temporal
import test_vqtoken
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_contract import PROJECTORS

from vtok.config import load_family
from vtok.families import reducer
from vtok.layers.dynamic_context import StaticConfig
from vtok.layers.memory_bridge import BridgeConfig
from vtok.layers.projector import ProjectorConfig
from vtok.layers.segment_counts import segments_between, windows_between
from vtok.layers.segments import SEGMENTERS, SegmentConfig, windows
from vtok.reducers import REDUCERS
from vtok.types import Clip, Features
from vtok.vision import TowerConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from tiny_tower import write_tower

torch.set_num_threads(1)
few = settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
grids = st.tuples(st.integers(2, 5), st.integers(3, 5))
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=3)
CONTENT = {"tdc", "tdc_plain", "tdc_paper", "tdc_windows", "tdc_audio", "bridge"}  # of test_temporal.FORMS


def features(
    lengths: list[int], grid: tuple[int, int], *, seed: int = 0, still: bool = False, dim: int = 6
) -> Features:
    """Scenes of three frames; still: every patch of a clip is the same."""
    generator = torch.Generator().manual_seed(seed)
    draw = dict(generator=generator, dtype=torch.float64)
    batch, steps, patches = len(lengths), max(lengths), grid[0] * grid[1]
    x = torch.randn(batch, 1 + steps // 3, patches, dim, **draw).repeat_interleave(3, 1)[:, :steps]
    x = x[:, :1, :1].expand_as(x) if still else x + 0.2 * torch.randn(batch, steps, patches, dim, **draw)
    real = torch.arange(steps) < torch.tensor(lengths)[:, None]
    return Features(x * real[..., None, None], grid, lengths=torch.tensor(lengths))


def holds(model: Any, seen: Features, budget: int | None, **beside: Any) -> None:
    """What is said of every clip of a batch is so."""
    config = model.config
    with torch.no_grad():
        made = model.compress(seen, budget=budget, **beside).lengths.tolist()
    for frames, tokens in zip(seen.count().tolist(), made):
        least, most = config.token_bounds(frames, *seen.grid, budget=budget)
        assert least <= tokens <= most
        if config.length_policy == "metadata" or least == most:
            assert config.token_count(frames, *seen.grid, budget=budget) == tokens
        else:
            with pytest.raises(ValueError, match=f"has {least} to {most} tokens.*ask for {least} or fewer"):
                config.token_count(frames, *seen.grid, budget=budget)


@pytest.mark.parametrize("form", test_temporal.FORMS)
@few
@given(lengths=lengths, grid=grids, budget=st.none() | st.integers(1, 40), still=st.booleans())
def test_compressors_along_time(form, lengths, grid, budget, still):
    model = made_once(form)
    audio = features([2 * n for n in lengths], (1, 2), dim=5) if model.config.audio.name else None
    holds(model, features(lengths, grid, still=still), budget, **({"audio": audio} if audio else {}))
    assert model.config.length_policy == ("content" if form in CONTENT else "metadata")


KEPT: dict[str, Any] = {}


def made_once(form: str) -> Any:
    return KEPT.setdefault(form, test_temporal.make(form))


OWN = {
    "threshold": dict(threshold=st.floats(-0.5, 1.0)), "scene_tilling": dict(alpha=st.floats(0.0, 1.0)),
    "fixed": dict(length=st.integers(1, 5)),
}  # fmt: skip
cuts = st.sampled_from(SEGMENTERS).flatmap(
    lambda name: st.builds(SegmentConfig, name=st.just(name), most=st.integers(1, 14), **OWN.get(name, {}))
)


@settings(few, max_examples=25)
@given(
    cuts=cuts, lengths=lengths, grid=grids, window=st.integers(1, 4), budget=st.none() | st.integers(1, 400),
    keep=st.sampled_from(["all", "pool", "none"]), emit=st.sampled_from(["", "memory", "last", "all"]),
    thinned=st.sampled_from([4, 12]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_cuts(cuts, lengths, grid, window, budget, keep, emit, thinned, seed):
    """emit: of the memory bridge; "" is tdc."""
    own: dict[str, Any] = {"segments": cuts, "max_tokens": 400, "max_frames": thinned}
    if emit:
        own["bridge"] = BridgeConfig(3, 2, 4, emit=emit, **test_temporal.TINY)
    else:
        own |= {"window": window, "static": StaticConfig(keep, **({"tokens": 6} if keep == "pool" else {}))}
    model = test_temporal.make("bridge" if emit else "tdc_plain", **own)
    holds(model, features(lengths, grid, seed=seed), budget)


@pytest.mark.parametrize("most", [1, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_ends_of_what_cuts_can_be_are_reached(most, length):
    """Over all ways to cut 1 to 7 frames: no bound is wider than what some clip has."""
    for name, frames in itertools.product(("topk", "threshold"), range(1, 8)):
        config = SegmentConfig(name=name, most=most)
        ways = [[True, *way] for way in itertools.product([False, True], repeat=frames - 1)]
        ways = [w for w in ways if sum(w) <= most and (name != "topk" or sum(w) == min(most, frames))]
        starts = torch.tensor(ways)
        found = windows(starts, torch.full((len(ways),), frames), length=length).first.sum(1)
        assert windows_between(frames, config, length=length) == (int(found.min()), int(found.max()))
        assert segments_between(frames, config) == (int(starts.sum(1).min()), int(starts.sum(1).max()))


@pytest.mark.parametrize("form", test_vqtoken.FORMS)
@few
@given(lengths=lengths, grid=grids, budget=st.none() | st.integers(1, 6), still=st.booleans(), seed=st.integers(0, 99))
def test_clusters(form, lengths, grid, budget, still, seed):
    model = KEPT.setdefault(f"vq_{form}", test_vqtoken.build(form, num_tokens=6))
    seen = features(lengths, grid, seed=seed, still=still)
    holds(model, Features(seen.patches.float(), grid, lengths=seen.lengths), budget)
    assert model.config.length_policy == ("content" if form in test_vqtoken.ADAPTIVE else "metadata")


@settings(few, max_examples=8)
@given(lengths=lengths, budget=st.integers(1, 40), block=st.integers(1, 4), scope=st.sampled_from(["blocks", "stream"]))
def test_clusters_of_blocks(lengths, budget, block, scope):
    """More tokens than some blocks have patches, and fewer than there are blocks."""
    model = test_vqtoken.build(scope=scope, block_frames=block, num_tokens=40)
    seen = features(lengths, (2, 2))
    holds(model, Features(seen.patches.float(), (2, 2), lengths=seen.lengths), budget)


@pytest.mark.parametrize("method", ["none", *REDUCERS])
@settings(few, max_examples=2)
@given(lengths=lengths, budget=st.none() | st.integers(1, 60), seed=st.integers(0, 99))
def test_training_free_reducers(method, lengths, budget, seed):
    config = test_reducer_family.config(method, max_tokens=200 if method == "none" else 60)
    torch.manual_seed(seed)
    model, seen = reducer.Model(config).eval(), test_reducer_family.features(lengths)
    assert config.length_policy == "metadata"
    if method == "none" and budget is not None and budget < 12 * max(lengths):
        for refuse in (model.compress, lambda *_, **asked: config.token_count(max(lengths), 3, 4, **asked)):
            with pytest.raises(ValueError, match="keeps all patches"):
                refuse(seen, budget=budget)
    else:
        holds(model, seen, budget)


def test_videos_made_smaller_before_the_tower(tmp_path):
    write_tower(tmp_path / "tower", size=32, patch=8, width=16, depth=1)
    own = dict(in_dim=16, embedding_dim=8, embedding_rms=0.05, tower=TowerConfig(name=str(tmp_path / "tower")))
    config = reducer.Config(method="downsample", max_tokens=64, **own)
    model = reducer.Model(config).eval()
    for frames, budget in itertools.product((1, 3, 5), (1, 2, 7, 30, 64)):
        clip = Clip(["a"], video=torch.zeros(1, 3, frames, 32, 32, dtype=torch.uint8)).as_float()
        made = model.encode(clip, budget=budget)
        assert made.lengths.tolist() == [config.token_count(frames, 4, 4, budget=budget)]


@pytest.mark.parametrize("family", sorted(PROJECTORS))
def test_every_family_says_its_policy(family):
    config = load_family(family).Config()
    assert isinstance(config, ProjectorConfig) and config.length_policy in ("metadata", "content")
    for wrong in ((0, 3, 4), (2, 0, 4), (2, 3, -1)):
        with pytest.raises(ValueError, match="=(0|-1) must be at least 1: features have frames, rows and columns"):
            config.token_count(*wrong)
    most = config.largest_budget
    for budget in (0, most + 1):
        with pytest.raises(ValueError, match=f"budget={budget} is out of range: this model gives 1 to {most} tokens"):
            config.token_bounds(2, 24, 24, budget=budget)


def test_a_family_that_says_nothing_promises_nothing():
    config = ProjectorConfig()
    assert config.length_policy == "content" and config.token_bounds(2, 3, 4, budget=9) == (0, 9)
    with pytest.raises(ValueError, match="has 0 to 9 tokens"):
        config.token_count(2, 3, 4, budget=9)


def test_a_budget_that_every_cut_affords_is_known_ahead():
    model = test_temporal.make("tdc_plain", max_frames=9, max_tokens=200)
    least, most = model.config.token_bounds(9, 3, 4)
    assert model.config.length_policy == "content"
    assert (least, most) == (6 * 4 + 3 * 6, 4 * 4 + 5 * 6), (
        "3 to 5 windows, their first frames as 6 tokens, others as 4"
    )
    assert model.config.token_count(9, 3, 4, budget=least) == least
    holds(model, features([9], (3, 4)), least)
    holds(model, features([9], (3, 4)), least + 1)
