"""Nested dropout's laws: range, distribution, independence, agreement."""

from __future__ import annotations

import pytest
import torch

from vtok.budget import MODES, NestedConfig, nested_keep


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per", ["sample", "batch", "block"])
def test_range_shape_and_seed(mode, per):
    config = NestedConfig(mode=mode, per=per, mean=8, std=5)
    draw = [nested_keep(16, 64, groups=3, config=config, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    keep = draw[0]
    assert torch.equal(*draw) and keep.shape == (64, 3) and keep.dtype == torch.int64
    assert int(keep.min()) >= 1 and int(keep.max()) <= 16
    if per != "block":
        assert bool((keep == keep[:, :1]).all())
    if per == "batch":
        assert bool((keep == keep[0, 0]).all())
    elif mode != "full":
        assert len(keep[:, 0].unique()) > 1
        if per == "block":
            assert bool((keep[:, 0] != keep[:, 1]).any())


def test_distributions():
    generator = torch.Generator().manual_seed(0)

    def draw(mode, **kwargs):
        config = NestedConfig(mode=mode, **kwargs)
        return nested_keep(256, 20000, config=config, generator=generator)[:, 0].double()

    assert abs(draw("uniform").mean() - 128.5) < 2
    pow2 = draw("pow2")
    assert (
        set(pow2.unique().tolist()) == {2.0**i for i in range(9)} and abs((pow2 == 256).double().mean() - 1 / 9) < 0.01
    )
    rounded = draw("uniform_pow2")
    assert abs((rounded == 256).double().mean() - 0.5) < 0.02 and abs(rounded.mean() - 170) < 3
    normal = draw("truncnormal", mean=100, std=20)
    assert abs(normal.mean() - 100) < 1 and abs(normal.std() - 20) < 1
    assert float(draw("truncnormal", mean=256, std=128, min_tokens=32).min()) >= 32


@pytest.mark.parametrize(
    "tokens, config, message",
    [
        (12, NestedConfig(mode="pow2"), "power of two, got 12"),
        (16, NestedConfig(mode="zipf"), "choose one of"),
        (16, NestedConfig(min_tokens=17), "outside 1 to 16"),
        (16, NestedConfig(per="clip"), "sample, batch or block"),
        (16, NestedConfig(mode="truncnormal", mean=1e6, std=1), "leave nothing"),
    ],
)
def test_laws_that_do_not_fit(tokens, config, message):
    with pytest.raises(ValueError, match=message):
        nested_keep(tokens, 4, config=config)
