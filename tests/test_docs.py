"""The code in the documentation runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from vtok.config import load_family
from vtok.types import Clip

DOCS = Path(__file__).parent.parent / "docs"


def test_the_family_of_add_a_family_trains(monkeypatch):
    source = re.search(r"```python\n(.*?)```", (DOCS / "add_a_family.md").read_text(), re.S)
    assert source
    package, module = ModuleType("my_families"), ModuleType("my_families.grid")
    monkeypatch.setitem(sys.modules, "my_families", package)
    monkeypatch.setitem(sys.modules, "my_families.grid", module)
    exec(source[1], module.__dict__)
    family = load_family("my_families.grid")
    torch.manual_seed(0)
    config = family.Config(size=[32, 32])
    model, objective = family.Model(config), family.Objective(family.Objective.Config(), config)
    coarse = torch.rand(4, 3, 4, 4, 4) * 2 - 1
    clip = Clip(list("abcd"), torch.nn.functional.interpolate(coarse, size=(16, 32, 32)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    seen = []
    for step in range(30):
        loss = objective(model, clip, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(float(loss.report["loss"]))
    assert seen[-1] < 0.8 * seen[0]
    with torch.no_grad():
        tokens = model.encode(clip)
        assert model.decode(tokens, size=(32, 32)).shape == clip.video.shape
        assert torch.equal(model.lookup(tokens.indices), tokens.embeddings)
        assert model.decode(model.encode(clip, budget=8), size=(32, 32)).shape == clip.video.shape
        assert model.max_tokens == tokens.embeddings.shape[1]
