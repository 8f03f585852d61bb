"""Nested dropout's laws: range, distribution, independence, agreement. Allocators and search against the optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.budget import (
    MODES,
    NestedConfig,
    allocate_ahead,
    allocate_lagrange,
    allocate_levels,
    interpolate_lengths,
    nested_keep,
    search_length,
    spread_lengths,
)


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


# --- allocators ---


def total_of(table, choice):
    return float(table.gather(1, choice[:, None]).sum())


def exact(distortion, rate, total):
    """The least summed distortion within `total`, solved as an integer program by HiGHS."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups, levels = distortion.shape
    rows = np.zeros((groups + 1, groups * levels))
    for g in range(groups):
        rows[g, g * levels : (g + 1) * levels] = 1
    rows[groups] = rate.flatten()
    limits = LinearConstraint(rows, np.r_[np.ones(groups), -np.inf], np.r_[np.ones(groups), total])
    ones = np.ones(groups * levels)
    found = milp(distortion.flatten().numpy(), constraints=limits, integrality=ones, bounds=Bounds(0, 1))
    assert found.success
    return found.fun


def problem(kind, groups, levels, generator):
    """Tables of distortion and rate [groups, levels], and a total between the least and the most that is useful."""

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rate = (rand(groups, levels) * 20 + 4).cumsum(1)
    if kind == "convex":
        distortion = torch.exp(-rand(groups, 1) * rate / 30) * rand(groups, 1) * 100 + rand(groups, 1)
    elif kind == "decreasing":
        distortion = (rand(groups, levels) ** 3 * 10).flip(1).cumsum(1).flip(1)
    else:  # neither table is even monotone
        distortion, rate = rand(groups, levels) * 100, rand(groups, levels) * 100
    least, most = float(rate.amin(1).sum()), total_of(rate, distortion.argmin(1))
    return distortion, rate, least + max(most - least, 0) * float(rand(()))


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_lagrange_is_within_a_percent_of_the_integer_optimum(count):
    generator, gaps = torch.Generator().manual_seed(0), []
    for i in range(count):
        kind, groups = ("convex", "decreasing", "any")[i % 3], (1, 2, 3, 5, 8, 13)[i % 6 if i % 4 else i // 4 % 6]
        distortion, rate, total = problem(kind, groups, (4, 8, 12)[i // 3 % 3], generator)
        choice = allocate_lagrange(distortion, rate, total=total)
        assert total_of(rate, choice) <= total
        gaps.append(total_of(distortion, choice) / exact(distortion, rate, total) - 1)
    assert len(gaps) == count and max(gaps) < 0.01 and min(gaps) > -1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["convex", "decreasing", "any"]), st.integers(1, 9), st.integers(1, 7))
def test_lagrange_never_exceeds(seed, kind, groups, levels):
    distortion, rate, total = problem(kind, groups, levels, torch.Generator().manual_seed(seed))
    choice = allocate_lagrange(distortion, rate, total=total)
    assert total_of(rate, choice) <= total
    with pytest.raises(ValueError, match="too small"):
        allocate_lagrange(distortion, rate, total=float(rate.amin(1).sum()) - 1e-3)


def test_lagrange_equals_the_dynamic_program_on_uniform_rates():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        distortion = torch.rand(1, 6, 8, generator=generator, dtype=torch.float64)
        best = allocate_levels(distortion, torch.ones(1, 6, dtype=torch.bool), total=40, unit=2)[0] // 2 - 1
        rate = torch.arange(1, 9).double().mul(2).expand(6, 8)
        choice = allocate_lagrange(distortion[0], rate, total=40)
        assert total_of(distortion[0], choice) <= total_of(distortion[0], best) * 1.001


def stream(distortion, rate, *, total, ahead):
    """The choices of a stream that sees `ahead` groups beyond the one it decides."""
    groups, reserve, levels, left = len(rate), rate.amin(1), [], total
    for t in range(groups):
        end = min(t + 1 + ahead, groups)
        level = allocate_ahead(
            distortion[t:end],
            rate[t:end],
            past_distortion=distortion[:t],
            past_rate=rate[:t],
            unknown=groups - end,
            total=left,
            reserve=float(reserve[end:].sum()),
        )
        levels.append(level)
        left -= float(rate[t, level])
    return torch.tensor(levels)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["convex", "decreasing", "any"]), st.integers(1, 7), st.integers(0, 7))
def test_a_stream_never_exceeds(seed, kind, groups, ahead):
    distortion, rate, total = problem(kind, groups, 5, torch.Generator().manual_seed(seed))
    assert total_of(rate, stream(distortion, rate, total=total, ahead=ahead)) <= total + 1e-9


def test_a_stream_comes_near_the_whole_and_a_longer_view_comes_nearer():
    generator, share = torch.Generator().manual_seed(3), []
    for _ in range(6):
        distortion, rate, _ = problem("convex", 16, 8, generator)
        total = float(rate[:, 3].sum())
        whole = total_of(distortion, allocate_lagrange(distortion, rate, total=total))
        fixed = float(distortion[:, 3].sum())
        streamed = [total_of(distortion, stream(distortion, rate, total=total, ahead=n)) for n in (0, 4, 15)]
        assert streamed[2] == pytest.approx(whole, rel=2e-3)
        share.append([(fixed - s) / (fixed - whole) for s in streamed])
    none, some, all_ = np.mean(share, 0)  # of what the whole view gains over equal levels
    assert 0.5 < none < some < all_ + 1e-3


# --- search ---


def test_curves_between_measured_lengths():
    lengths = spread_lengths(48)
    assert lengths == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48] and spread_lengths(1) == [1]
    assert spread_lengths(50)[-2:] == [48, 50]
    k = torch.arange(1, 49).double()
    law = 7 * k**-0.6  # straight in logarithms: nothing is lost
    full = interpolate_lengths(law[[n - 1 for n in lengths]][None], lengths, 48)
    assert torch.allclose(full[0], law, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 70))
def test_search_on_falling_curves_is_exact_with_few_probes(seed, most):
    curve = torch.rand(most, generator=torch.Generator().manual_seed(seed)).sort(descending=True)[0].tolist()
    target = curve[seed % most]
    calls = []

    def measure(lengths):
        calls.extend(lengths)
        return [curve[k - 1] for k in lengths]

    found = search_length(measure, most=most, target=target)
    assert found.length == min(k for k in range(1, most + 1) if curve[k - 1] <= target)
    assert found.met and found.monotone and found.probes == len(calls) == len(set(calls)) <= 2 + most.bit_length()
    out_of_reach = search_length(measure, most=most, target=-1.0)
    assert not out_of_reach.met and out_of_reach.distortion == min(curve)


def test_search_scans_where_more_tokens_are_worse():
    curve = [9, 8, 7, 6, 1, 6, 5, 10, 9, 3, 3, 2, 2, 2, 5, 2]  # a bump at 8, in the way of the bisection
    found = search_length(lambda ks: [curve[k - 1] for k in ks], most=16, target=4)
    assert not found.monotone and found.met and found.length == 12  # on the menu
    rising = search_length(lambda ks: [float(k) for k in ks], most=16, target=0.5)
    assert not rising.monotone and not rising.met and rising.length == 1
    late = search_length(lambda ks: [[9, 8, 1, 2, 5][k - 1] for k in ks], most=5, target=3)  # the longest misses it
    assert late.met and not late.monotone and (late.length, late.distortion) == (3, 1)
