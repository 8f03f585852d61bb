"""What training soft captions takes is told before it starts, and is what a step of the small presets then takes."""

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
CONFIGS = ROOT / "configs" / "language"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A small tower and a small language model, which writes few words."""
    folder = tmp_path_factory.mktemp("frozen")
    write_tower(folder / "tower", size=32, patch=8, width=32)
    tokenizer = small_tokenizer("llama")
    torch.manual_seed(3)
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    names = [f"model.tower.name={folder / 'tower'}", f"model.lm.name={folder / 'llm'}",
             f"objective.llm.name={folder / 'llm'}"]  # fmt: skip
    return [*SMALL, *names, "model.num_tokens=12", "model.lm.layer=1", "objective.tasks.caption=1.0"]


@pytest.mark.long
@pytest.mark.parametrize("stage", ["langdc_stage1", "langdc_stage2", "langdc"])
def test_the_estimate_is_what_a_step_takes(settings, stage):
    pytest.importorskip("peft")
    config = load(CONFIGS / f"{stage}_tiny.yaml", settings)
    said, taken = estimate(config), take_step(config)
    for name in ("parameters", "parameters_trained", "parameters_tower"):
        assert getattr(said, name) == taken[name], name
    for name in ("forward_flops", "backward_flops", "activation_bytes", "tokens_per_clip"):
        assert getattr(said, name) == pytest.approx(taken[name], rel=TOLERANCE), name
    assert said.tokens_per_clip <= 2 * (12 + 4)  # two segments of words and base tokens


@pytest.mark.long
@pytest.mark.parametrize("stage", ["langdc_stage1", "langdc_stage2", "langdc"])
def test_full_presets_are_judged_without_their_weights(stage):
    path = CONFIGS / f"{stage}.yaml"
    found = estimate(load(path))
    stated = re.search(r"Parameters: ([\d.]+) M", path.read_text())
    assert stated and found.parameters / 1e6 == pytest.approx(float(stated[1]), abs=0.051)
    assert found.tokens_per_clip == 4 * (128 + 64)
    assert any("shapes as published" in note for note in found.notes)
