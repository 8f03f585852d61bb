"""Rate-distortion curves compared: Bjontegaard deltas where they overlap, bits at equal quality where they do not.

    points (bits, quality) --frontier--> log10(bits) as a PCHIP of quality --mean gap over the overlap--> BD-rate
                                         quality as a PCHIP of log10(bits) --mean gap over the overlap--> BD-quality

Bjontegaard 2001, "Calculation of average PSNR differences between RD-curves" (ITU-T VCEG-M33), fitted one cubic to four
points; a piecewise cubic that keeps monotone data monotone (PCHIP, Fritsch and Butland 1984) takes any number of points
and does not swing between them. Quality may be any number of which more is better.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Points = Iterable[tuple[float, float]]  # (bits, quality)


class Pchip:
    """Piecewise cubic through (x, y), x strictly increasing, monotone wherever y is: [n] and [n], n at least 2."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if self.x.shape != self.y.shape or self.x.ndim != 1 or len(self.x) < 2 or (np.diff(self.x) <= 0).any():
            raise ValueError(f"x={self.x.tolist()} must increase strictly, at two or more points, with as many y")
        step = np.diff(self.x)
        rise = np.diff(self.y) / step
        slope = np.full(len(self.x), rise[0])
        if len(rise) > 1:
            near, far = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = (near + far) / (near / rise[:-1] + far / rise[1:])  # harmonic: no overshoot
            slope[1:-1] = np.where(rise[:-1] * rise[1:] > 0, mean, 0.0)
            slope[0] = _end_slope(step[0], step[1], rise[0], rise[1])
            slope[-1] = _end_slope(step[-1], step[-2], rise[-1], rise[-2])
        self.slope = slope

    def __call__(self, at: np.ndarray | float) -> np.ndarray:
        """y at points inside [x[0], x[-1]]."""
        at = np.asarray(at, np.float64)
        k = np.clip(np.searchsorted(self.x, at, side="right") - 1, 0, len(self.x) - 2)
        step = self.x[k + 1] - self.x[k]
        t = (at - self.x[k]) / step
        low = self.y[k] * (1 + 2 * t) + step * self.slope[k] * t
        high = self.y[k + 1] * (3 - 2 * t) + step * self.slope[k + 1] * (t - 1)
        return low * (1 - t) ** 2 + high * t**2

    def mean(self, low: float, high: float) -> float:
        """Mean of y over [low, high], exactly: two Gauss points are enough for a cubic."""
        edges = np.unique(np.concatenate([[low, high], self.x[(self.x > low) & (self.x < high)]]))
        middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
        values = self(middle - half / np.sqrt(3)) + self(middle + half / np.sqrt(3))
        return float((values * half).sum() / (high - low))


def _end_slope(step: float, following: float, rise: float, next_rise: float) -> float:
    """One-sided slope by three points, kept from turning the curve around."""
    slope = ((2 * step + following) * rise - step * next_rise) / (step + following)
    if slope * rise <= 0:
        return 0.0
    if rise * next_rise <= 0 and abs(slope) > 3 * abs(rise):
        return 3 * rise
    return float(slope)


def frontier(points: Points) -> list[tuple[float, float]]:
    """The points that no other one beats in bits and quality at once, by bits: both increase strictly.

    Points with a value that is not finite, or without bits, are left out.
    """
    out: list[tuple[float, float]] = []
    for bits, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if np.isfinite(bits) and np.isfinite(quality) and bits > 0 and (not out or quality > out[-1][1]):
            out.append((float(bits), float(quality)))
    return out


@dataclass(frozen=True)
class Delta:
    """What a curve needs beside an anchor's: bits in percent (below 0: fewer) at equal quality, averaged over `overlap`
    of qualities; quality gained at equal bits. None where the curves share no range of it."""

    rate_percent: float | None
    quality: float | None
    overlap: tuple[float, float] | None


def bjontegaard(anchor: Points, test: Points) -> Delta:
    """`test` against `anchor`, over the qualities (and over the bits) that both curves reach."""
    a, t = frontier(anchor), frontier(test)
    if min(len(a), len(t)) < 2:
        return Delta(None, None, None)
    rates = [np.log10([bits for bits, _ in each]) for each in (a, t)]
    qualities = [np.array([quality for _, quality in each]) for each in (a, t)]
    gap, overlap = _mean_gap(qualities, rates)
    gain, _ = _mean_gap(rates, qualities)
    return Delta(None if gap is None else 100 * (10**gap - 1), gain, overlap)


def _mean_gap(x: list[np.ndarray], y: list[np.ndarray]) -> tuple[float | None, tuple[float, float] | None]:
    low, high = max(each[0] for each in x), min(each[-1] for each in x)
    if not low < high:
        return None, None
    anchor, test = (Pchip(a, b).mean(low, high) for a, b in zip(x, y))
    return test - anchor, (float(low), float(high))


@dataclass(frozen=True)
class Matched:
    """Bits at which a curve reaches a quality. where: "curve"; "floor": even its smallest point is better, and `bits`
    is that one's; "beyond": it was not measured at a quality so high, and `bits` is None."""

    bits: float | None
    where: str


def matched_bits(points: Points, quality: float) -> Matched:
    """Bits that the curve needs for `quality`. Raises: ValueError without a point."""
    curve = frontier(points)
    if not curve:
        raise ValueError("no point with bits and a quality")
    if quality <= curve[0][1]:
        return Matched(curve[0][0], "curve" if quality == curve[0][1] else "floor")
    if quality > curve[-1][1]:
        return Matched(None, "beyond")
    x, y = np.array([q for _, q in curve]), np.log10([bits for bits, _ in curve])
    return Matched(float(10 ** Pchip(x, y)(quality)), "curve")
