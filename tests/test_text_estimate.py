"""What training a compressor of texts takes is told before it starts, for texts as long as the preset means them."""

from __future__ import annotations

import pytest
import torch
from test_estimate import ROOT, SMALL, TOLERANCE, take_step
from test_llm import small_model, small_tokenizer

from vtok import train
from vtok.config import load
from vtok.info.estimate import estimate

torch.set_num_threads(1)
CONFIGS = ROOT / "configs" / "language"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A small language model that reads and one that compresses."""
    folder = str(tmp_path_factory.mktemp("llm"))
    tokenizer = small_tokenizer("llama")
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [*SMALL, f"model.lm.name={folder}", f"objective.llm.name={folder}"]


def test_the_estimate_is_what_a_step_takes(settings):
    """At the most tokens that a step draws, the whole text repeated."""
    config = load(CONFIGS / "c3_tiny.yaml", [*settings, "data.text_words=20"])
    said = estimate(config)
    assert any("ratios: counted at 5 words a token" in note for note in said.notes)
    config.objective.ratios, config.objective.continuation = [5.0], 0.0
    taken = take_step(config)
    for name in ("parameters", "parameters_trained", "parameters_tower", "parameters_llm"):
        assert getattr(said, name) == taken[name], name
    for name in ("forward_flops", "backward_flops", "activation_bytes", "tokens_per_clip"):
        assert getattr(said, name) == pytest.approx(taken[name], rel=TOLERANCE), name


def test_texts_are_counted_as_long_as_they_are_said_to_be(settings):
    given = load(CONFIGS / "c3_tiny.yaml", [*settings, "data.text_words=24"])
    open_ = load(CONFIGS / "c3_tiny.yaml", [*settings, "data.text_words=0"])
    few, none = estimate(given), estimate(open_)
    assert few.llm_flops < none.llm_flops and not any("data.text_words" in note for note in few.notes)
    assert any("texts of 32 words are counted: set data.text_words" in note for note in none.notes)
    with pytest.raises(ValueError, match="data.text_words=9 is of texts: set data.texts=true"):
        train.check(load(ROOT / "configs" / "flexible" / "debug.yaml", ["data.text_words=9"]))
    with pytest.raises(ValueError, match="data.text_words=-1 must be 0 or above"):
        train.check(load(ROOT / "configs" / "flexible" / "debug.yaml", ["data.text_words=-1"]))


def test_the_preset_counts_the_words_that_its_header_names():
    path = CONFIGS / "c3.yaml"
    config = load(path)
    assert config.data.text_words == 1000 and "some 1000 words each" in path.read_text()
    assert config.data.batch_size * config.trainer.accumulate * config.trainer.devices == 256
