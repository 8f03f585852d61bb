"""The calculation of benchmarks/scaling.py: its formulas against one another, and against a model as built."""

import sys
from pathlib import Path

import pytest

from vtok.config import load
from vtok.train import build

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from scaling import host_bytes, parameters, sent_bytes, table  # noqa: E402

RUN = {"trained": 1000, "held": 1000, "accumulate": 1, "precision": "32-true"}


def sent(strategy: str, ranks: int = 8, **changed) -> float:
    return sent_bytes(strategy, ranks=ranks, **{**RUN, **changed})


def test_volumes_follow_the_analysis_of_zero():
    """2, 2, 2 and 3 times the parameters where all learn; nothing for one rank; (N-1)/N of that for N."""
    for strategy, times in (("ddp", 2), ("deepspeed_1", 2), ("deepspeed_2", 2), ("deepspeed_3", 3), ("fsdp", 2)):
        assert sent(strategy, ranks=1) == 0
        assert sent(strategy, ranks=8) == pytest.approx(7 / 8 * times * 4 * 1000)
    assert sent("deepspeed_2_offload") == sent("deepspeed_2") and host_bytes("deepspeed_2", ranks=8, **RUN) == 0


def test_accumulation_is_free_where_gradients_stay_whole_and_frozen_parts_cost_where_they_are_sharded():
    for strategy, times in (("ddp", 1), ("deepspeed_1", 1), ("deepspeed_2", 5 / 2), ("deepspeed_3", 4), ("fsdp", 4)):
        assert sent(strategy, accumulate=4) == pytest.approx(times * sent(strategy))
    assert sent("ddp", held=3000) == sent("ddp")
    assert sent("deepspeed_3", held=3000) == pytest.approx(7 / 8 * 4 * (2 * 3000 + 1000))
    assert sent("deepspeed_2", precision="bf16-mixed") == sent("deepspeed_2") / 2
    assert sent("ddp", precision="bf16-mixed") == sent("ddp")  # whose gradients are float32 then


def test_the_table_is_of_the_model_as_it_is_built():
    config = load(ROOT / "configs" / "flexible" / "debug.yaml")
    lit = build(config)
    counted = [p.numel() for p in lit.parameters() if p.requires_grad], [p.numel() for p in lit.parameters()]
    assert parameters(config) == tuple(map(sum, counted))
    text = table(config, gbit=100)
    assert text.startswith("Calculated, not measured: ") and f"{sum(counted[0]) / 1e6:.2f} M parameters" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 8
