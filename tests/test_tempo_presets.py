"""What training Tempo takes is told before it starts, and is what a step of the small preset then takes."""

from __future__ import annotations

import re

import pytest
import torch
from test_estimate import ROOT, SMALL, TOLERANCE, take_step
from test_llm import small_model, small_tokenizer
from tiny_tower import write_tower

from vtok.config import load
from vtok.info.estimate import estimate

torch.set_num_threads(1)
TINY = ROOT / "configs" / "language" / "tempo_tiny.yaml"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A small tower and a small language model, and few short windows."""
    folder = tmp_path_factory.mktemp("frozen")
    write_tower(folder / "tower", size=32, patch=8, width=32)
    tokenizer = small_tokenizer("llama")
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    names = [f"model.tower.name={folder / 'tower'}", f"model.lm.name={folder / 'llm'}",
             f"objective.llm.name={folder / 'llm'}"]  # fmt: skip
    return [*SMALL, *names, "data.num_frames=12", "model.num_tokens=16", "model.max_tokens=40",
            "objective.tasks.caption=1.0", "objective.prefixes=0.0", "objective.budgets.max_tokens=0",
            "objective.budgets.law=full", "objective.budgets.min_tokens=1"]  # fmt: skip


@pytest.mark.long
def test_the_estimate_is_what_a_step_takes(settings):
    config = load(TINY, settings)
    assert config.model.ata.score == "similarity" and config.objective.relevance == 1
    said, taken = estimate(config), take_step(config)
    for name in ("parameters", "parameters_trained", "parameters_tower", "parameters_llm"):
        assert getattr(said, name) == taken[name], name
    for name in ("forward_flops", "backward_flops", "activation_bytes", "tokens_per_clip"):
        assert getattr(said, name) == pytest.approx(taken[name], rel=TOLERANCE), name
    assert said.tokens_per_clip == 40, "three windows would hold 48: scores decide"


@pytest.mark.long
def test_estimates_of_clips_that_are_only_asked(settings):
    changed = [*settings, "objective.tasks.caption=0.0"]
    assert estimate(load(TINY, changed)).llm_flops > 0


@pytest.mark.long
def test_the_full_preset_is_judged_without_its_weights():
    path = ROOT / "configs" / "language" / "tempo.yaml"
    found = estimate(load(path))
    stated = re.search(r"Parameters: ([\d.]+) M", path.read_text())
    assert stated and found.parameters / 1e6 == pytest.approx(float(stated[1]), abs=0.051)
    assert found.parameters_llm == 7_615_616_512 and found.tokens_per_clip == 32 * 128
    assert any("shapes as published" in note for note in found.notes)
