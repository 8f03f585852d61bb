"""Words written one after the other: counted from two steps, to the number, as if every step was taken."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_estimate import ROOT, SMALL
from test_llm import small_model, small_tokenizer
from tiny_tower import write_tower

from vtok.config import load
from vtok.info import steps
from vtok.info.estimate import estimate
from vtok.llm.small import SmallReader

torch.set_num_threads(1)
WORDS = 6
VOCABULARY = 40_000  # so that no word is followed


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("frozen")
    write_tower(folder / "tower", size=32, patch=8, width=32)
    model = small_model("llama", VOCABULARY)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder / "llm")
    small_tokenizer("llama").save_pretrained(folder / "llm")
    names = [f"model.tower.name={folder / 'tower'}", f"model.lm.name={folder / 'llm'}",
             f"objective.llm.name={folder / 'llm'}"]  # fmt: skip
    return [*SMALL, *names, f"model.num_tokens={WORDS}", "model.lm.layer=1", "objective.tasks.caption=1.0"]


@pytest.mark.slow
def test_what_is_told_is_what_every_step_takes(settings, monkeypatch):
    pytest.importorskip("peft")
    config = load(ROOT / "configs" / "language" / "langdc_tiny.yaml", settings)
    taken, speak = [], SmallReader.speak

    def counted(self, embeds, *rest, **asked):
        taken.append(asked.get("cache") is not None)
        return speak(self, embeds, *rest, **asked)

    monkeypatch.setattr(SmallReader, "speak", counted)
    few = estimate(config)
    assert sum(taken) == 2 * 2, "two steps of a training step's captions, two of those that are counted as tokens"
    assert SmallReader.speak is counted
    taken.clear()
    monkeypatch.setattr(steps, "_keeps_all", lambda cache: False)
    all_of_them = estimate(config)
    assert sum(taken) == 2 * WORDS
    assert few.values() == all_of_them.values()


def test_caches_that_forget_are_not_told():
    kinds = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    whole = transformers.DynamicCache(config=transformers.LlamaConfig(**kinds))
    window = transformers.DynamicCache(config=transformers.MistralConfig(**kinds, sliding_window=4))
    for cache in (whole, window):
        for layer in range(2):
            cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), layer)
    assert steps._keeps_all(whole) and not steps._keeps_all(window)
    assert not steps._keeps_all(transformers.DynamicCache()) and not steps._keeps_all(object())
