"""Bjontegaard deltas and matched bits, against SciPy's PCHIP, closed forms and published numbers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.metrics.bd import Delta, Matched, Pchip, bjontegaard, frontier, matched_bits

BD_RATE, BD_PSNR = -19.129141630432034, 0.7126265294288914
RATES = [100.0, 220.0, 510.0, 900.0, 2300.0]


def curve(rates, *, scale=1.0, gain=0.0):
    """3 dB for twice the bits, of a codec that needs `scale` times the bits and is `gain` dB better."""
    return [(scale * bits, 10 + 3 * math.log2(bits) + gain) for bits in rates]


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(st.floats(0.01, 5), min_size=1, max_size=8),
    values=st.lists(st.floats(-5, 5), min_size=9, max_size=9),
)
def test_pchip_is_scipys(steps, values):
    from scipy.interpolate import PchipInterpolator

    x = np.cumsum([0.3, *steps])
    y = np.round(np.array(values[: len(x)]), 2)
    ours, theirs = Pchip(x, y), PchipInterpolator(x, y)
    at = np.linspace(x[0], x[-1], 37)
    assert np.allclose(ours(at), theirs(at), atol=1e-9)
    low, high = x[0] + 0.2 * (x[-1] - x[0]), x[0] + 0.9 * (x[-1] - x[0])
    assert ours.mean(low, high) == pytest.approx(float(theirs.integrate(low, high)) / (high - low), abs=1e-9)


def test_a_codec_that_needs_a_constant_share_of_the_bits():
    """Straight lines in log10(bits): 30 % more bits is a BD-rate of 30, and 3 log2(1.3) dB."""
    anchor, test = curve(RATES), curve(RATES, scale=1.3)
    delta = bjontegaard(anchor, test)
    assert delta.rate_percent == pytest.approx(30) and delta.quality == pytest.approx(-3 * math.log2(1.3))
    assert delta.overlap == pytest.approx((anchor[0][1], anchor[-1][1]))
    back = bjontegaard(test, anchor)
    assert back.rate_percent == pytest.approx(100 * (1 / 1.3 - 1)) and back.quality == pytest.approx(-delta.quality)
    shifted = bjontegaard(anchor, curve(RATES, gain=1.5))
    assert shifted.quality == pytest.approx(1.5) and shifted.rate_percent == pytest.approx(100 * (2**-0.5 - 1))
    assert shifted.overlap == pytest.approx((anchor[0][1] + 1.5, anchor[-1][1]))


def test_other_implementations_agree():
    """Two curves of four points; the numbers are those of the package bjontegaard 1.3.0, method "pchip"."""
    anchor = [(1000.0, 30.0), (2000.0, 33.0), (4000.0, 35.5), (8000.0, 37.0)]
    test = [(900.0, 30.4), (1700.0, 33.2), (3900.0, 36.0), (7000.0, 37.3)]
    delta = bjontegaard(anchor, test)
    assert delta.rate_percent == pytest.approx(BD_RATE, abs=1e-6)
    assert delta.quality == pytest.approx(BD_PSNR, abs=1e-6)


def test_curves_that_share_no_quality():
    low, high = curve([10.0, 20, 40]), curve([1000.0, 2000])
    delta = bjontegaard(high, low)
    assert delta == Delta(None, None, None)
    # bits in common, no quality in common: no BD-rate, but a gain at equal bits
    better = curve([15.0, 30.0], gain=30)
    apart = bjontegaard(low, better)
    assert apart.rate_percent is None and apart.overlap is None and apart.quality == pytest.approx(30)
    assert bjontegaard(low, high[:1]) == Delta(None, None, None)
    assert bjontegaard([], []) == Delta(None, None, None)


def test_bits_at_equal_quality():
    codec = curve(RATES)
    assert matched_bits(codec, 10 + 3 * math.log2(700)).bits == pytest.approx(700)
    assert matched_bits(codec, codec[0][1]) == Matched(pytest.approx(100), "curve")
    assert matched_bits(codec, codec[-1][1]).bits == pytest.approx(2300)
    assert matched_bits(codec, codec[0][1] - 1) == Matched(100.0, "floor")
    assert matched_bits(codec, codec[-1][1] + 0.01) == Matched(None, "beyond")
    assert matched_bits(codec[:1], codec[0][1] - 3) == Matched(100.0, "floor")
    with pytest.raises(ValueError, match="no point"):
        matched_bits([(float("nan"), 1.0)], 1.0)


def test_the_frontier_leaves_out_what_is_beaten():
    points = [(300.0, 22.0), (100.0, 20.0), (100.0, 20.0), (100.0, 19.0), (200.0, 19.5), (400.0, 22.0), (0.0, 5.0)]
    assert frontier([*points, (math.nan, 50.0), (50.0, math.inf)]) == [(100.0, 20.0), (300.0, 22.0)]


def test_points_in_any_order_and_repeated_ones_change_nothing():
    anchor, test = curve(RATES), curve(RATES, scale=0.7)
    there = bjontegaard(anchor, test)
    assert bjontegaard(anchor[::-1] * 2, [*test[2:], *test]) == there


def test_x_must_increase():
    with pytest.raises(ValueError, match="increase strictly"):
        Pchip(np.array([1.0, 1.0]), np.array([0.0, 1.0]))
