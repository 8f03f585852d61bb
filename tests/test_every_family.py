"""The table over all families: which rows are trained, by which settings, and what a row says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vtok.config import load

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from every_family import CONFIGS, ENTRIES, HEAD, needed, overrides, row  # noqa: E402

FOLDERS = {name: f"/made/{name.lower()}" for name in ("CLIPS", "TOWER", "LLM", "TEXTS", "READER")}


def test_rows_come_after_those_they_begin_with():
    assert needed(["langdc"]) == ["langdc_stage1", "langdc_stage2", "langdc"]
    assert needed(["pooling", "tempo", "stage0"]) == ["stage0", "pooling", "tempo"]
    every = needed([])
    assert set(every) == set(ENTRIES) and len(every) == len(ENTRIES)
    for at, name in enumerate(every):
        begins = ENTRIES[name].begins
        assert not begins or begins in every[:at], name
    with pytest.raises(SystemExit, match="--only nothing: choose from .*langdc_stage1"):
        needed(["nothing", "c3"])


def test_a_row_is_trained_by_its_twin_on_what_was_made(tmp_path):
    given = overrides("langdc", FOLDERS, root=tmp_path, steps=8)
    config = load(CONFIGS / "language" / "langdc_tiny.yaml", given)
    assert config.init_from == str(tmp_path / "langdc_stage2-export") and config.out == str(tmp_path)
    assert (config.model.tower.name, config.model.lm.name) == ("/made/tower", "/made/llm")
    assert config.data.shards == "/made/clips/train" and config.data.val_shards == "/made/clips/val"
    assert (config.trainer.max_steps, config.optim.warmup_steps) == (8, 2)
    texts = overrides("c3", FOLDERS, root=tmp_path, steps=None)
    config = load(CONFIGS / "language" / "c3_tiny.yaml", texts)
    assert config.data.shards == "/made/texts/train" and config.model.lm.name == "/made/reader"
    assert config.trainer.max_steps == 3000 and config.optim.warmup_steps == 50 and not config.init_from


def test_budgets_leave_something_to_share():
    config = load(CONFIGS / "language" / "tempo_tiny.yaml")
    segments = 4 * int(config.data.fps or 0) // config.model.window  # of the clips of 4 seconds that are made
    assert int(ENTRIES["tempo"].budget) > segments * config.model.ata.minimum


def test_a_row_says_what_the_evaluation_found(tmp_path):
    (tmp_path / "pooling-export").mkdir()
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling-export" / "config.json").write_text(json.dumps({"model": {"embedding_dim": 96}}))
    lines = [{"step": step, "train/loss": 1.0} for step in range(7)]
    (tmp_path / "pooling" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"method": "blind", "tokens_mean": 0, "accuracy": 0.2}]
    rows += [{"method": "reducer", "budget": 16, "tokens_mean": 16.0, "accuracy": 0.4567}]
    said = row("pooling", {"family": "reducer", "rows": rows}, root=tmp_path, memory=812.4)
    assert said.split() == ["reducer", "pooling", "7", "16", str(16 * 16 * 96), "45.7", "%", "-", "-", "812"]
    assert len(said) == len(HEAD)
