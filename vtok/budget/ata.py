"""Adaptive token allocation: scores of segments into tokens of segments, a total met exactly.

Letters: B clips, G segments (padded), M largest number of tokens of a segment.

    scores [B, G] --weights--> w >= 0 --each segment its minimum, the rest in proportion to w, none above its
    maximum--> tokens [B, G], a budget that `Tokens.truncate` and `compress` take

As Tempo (2026, https://arxiv.org/abs/2604.08120) does for the memory tokens of a small model's windows, for any tokens
that are nested inside segments. Differs from its released code:

- the total is always spent (there less, where scores ask for less), and a total that the bounds cannot meet is an error
  (there the minimum is lowered in silence);
- tokens are dealt out one by one to the highest w / (k - 1/2), k the token's number above the minimum (the method of
  Webster and Sainte-Lague), not by remainders: a larger total takes no token from any segment, so that the tokens of a
  smaller budget are some of those of a larger one;
- clips of a batch have budgets of their own (there they share one).

`allocate_segments` is what families call: a total that cannot pay all minima is shared evenly, what is left over goes
to the highest scores; one above what the segments hold gives all of them all they hold.

Equal claims: first the segment with fewer tokens above its minimum, then that of the higher score, then the earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

SCORES = ("", "yes_no", "similarity", "novelty", "learned")
WEIGHTS = ("minmax", "softmax", "linear")
_NO_RANGE = (
    "ata.weights=minmax in a stream needs ata.expected=[low, high], the scores' range: the lowest and the highest of a "
    "clip are not known before its end; or choose ata.weights=softmax or linear"
)


@dataclass
class AtaConfig:
    """How scores become tokens. A higher score never gives fewer, whatever is chosen here."""

    # what tells segments apart (vtok/layers/relevance.py; learned: by the family); "" = nothing, all have the same
    score: str = ""
    minimum: int = 4  # tokens that every segment is given
    maximum: int = 128
    # minmax: (score - lowest) / (highest - lowest) of the clip, as Tempo | softmax: exp(score / temperature) | linear:
    # the score itself, 0 or above
    weights: str = "minmax"
    temperature: float = 1.0
    # tokens of a segment never depend on later ones (`StreamAllocator`); minmax then needs `expected`
    stream: bool = False
    # (low, high): scores that a stream expects; they count as two segments that came before the first. [] = nothing
    expected: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, choices in (("score", SCORES), ("weights", WEIGHTS)):
            if getattr(self, name) not in choices:
                known = ", ".join(repr(c) for c in choices)
                raise ValueError(f"ata.{name}={getattr(self, name)!r} is unknown; choose one of {known}")
        if not 0 <= self.minimum <= self.maximum or self.maximum < 1:
            raise ValueError(
                f"ata.minimum={self.minimum}, ata.maximum={self.maximum}: a segment takes 0 <= minimum <= maximum "
                "tokens, and 1 at most at least"
            )
        if not self.temperature > 0:
            raise ValueError(f"ata.temperature={self.temperature} must be above 0")
        if self.expected and (len(self.expected) != 2 or not self.expected[0] < self.expected[1]):
            raise ValueError(f"ata.expected={list(self.expected)} is not (low, high), such as [0.0, 1.0]")
        if self.expected and self.weights == "linear" and self.expected[0] < 0:
            raise ValueError(f"ata.expected={list(self.expected)}: with ata.weights=linear scores are 0 or above")
        if self.stream and self.weights == "minmax" and not self.expected:
            raise ValueError(_NO_RANGE)


def allocate_scores(
    scores: Tensor,
    *,
    total: int | Tensor,
    config: AtaConfig | None = None,
    minimum: Tensor | None = None,
    maximum: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Tokens of each segment, `total` of a clip exactly.

    Args:
        scores: [B, G], higher for segments that matter more; only their order and `config.weights` count.
        total: tokens of a clip, for all clips or int64 [B].
        minimum, maximum: int64 [B, G] where segments differ (a short one holds fewer); None: those of the config.
        valid: [B, G] bool, segments that exist; None: all. A clip has one at least.
    Returns: [B, G] int64 on the scores' device, 0 for segments that do not exist.
    Raises: ValueError for a total outside what the bounds allow (`feasible_total` brings one inside), for scores that
        are no numbers, and for negative ones with weights=linear.
    """
    config = config or AtaConfig()
    real = _real(scores, valid)
    low, high = _bounds(real, config, minimum, maximum)
    asked = torch.as_tensor(total, dtype=torch.int64).cpu().expand(len(scores))
    _check_totals(asked, low, high, real)
    score = scores.detach().double().cpu().masked_fill(~real, 0)
    _check_scores(score, real, config)
    weight = _weights(score, real, config)
    order = torch.where(real, score, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    weight, room = weight.gather(1, order), (high - low).gather(1, order)
    steps = torch.arange(1, max(int(room.max()), 1) + 1)
    # claims [B, M, G]: of each further token of each segment; -1 where there is no room for it
    claims = weight[:, None] / (steps[:, None] - 0.5)
    claims = claims.masked_fill(steps[:, None] > room[:, None], -1).flatten(1)
    first = claims.sort(dim=1, descending=True, stable=True).indices
    dealt = torch.arange(claims.shape[1]) < (asked - low.sum(1))[:, None]
    taken = torch.zeros_like(claims, dtype=torch.int64).scatter(1, first, dealt.long())
    extra = taken.unflatten(1, (len(steps), -1)).sum(1)
    return (low + torch.zeros_like(low).scatter(1, order, extra)).to(scores.device)


def allocate_segments(scores: Tensor, *, total: Tensor, segments: Tensor, most: int, config: AtaConfig) -> Tensor:
    """[B, G] int64: tokens of each segment of clips that are given at most `total` tokens.

    Args:
        scores: [B, G]. total: int64 [B], 1 or more. segments: int64 [B] of each clip. most: tokens that a segment
            holds, where that is less than `config.maximum`.
    """
    totals, low, high = segment_bounds(total, segments, most=most, config=config)
    if not config.stream:
        real = torch.arange(scores.shape[1]) < segments.cpu()[:, None]
        bounds = dict(minimum=low[:, None].expand_as(real), maximum=high[:, None].expand_as(real))
        return allocate_scores(scores, total=totals, config=config, valid=real, **bounds)
    out = torch.zeros(scores.shape, dtype=torch.int64)
    for row, count in enumerate(segments.tolist()):
        own = replace(config, minimum=int(low[row]), maximum=int(high[row]))
        stream = StreamAllocator(total=totals[row], segments=count, config=own)
        out[row, :count] = torch.cat([stream.step(score[None]) for score in scores[row, :count].cpu()])
    return out.to(scores.device)


def segment_bounds(total: Tensor, segments: Tensor, *, most: int, config: AtaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What clips of so many segments are given of `total`: tokens of each clip, the fewest and the most of one of its
    segments, int64 [B] each, on the CPU."""
    segments, high = segments.cpu(), min(config.maximum, most)
    given = torch.minimum(total.cpu().long(), segments * high)
    low = (given // segments).clamp(max=min(config.minimum, high))
    # where the minima cannot be paid, one token above the lowered one at most: more tokens take none from a segment
    return given, low, torch.where(given < segments * config.minimum, low + 1, high).clamp(max=high)


def feasible_total(
    total: int | Tensor,
    valid: Tensor,
    *,
    config: AtaConfig | None = None,
    minimum: Tensor | None = None,
    maximum: Tensor | None = None,
) -> Tensor:
    """[B] int64: `total`, or the most that a clip's segments hold where that is less.

    For families whose short clips are given all they have. A total below the minima stays what it is, and an error.
    """
    _, high = _bounds(_real(valid, valid), config or AtaConfig(), minimum, maximum)
    return torch.minimum(torch.as_tensor(total, dtype=torch.int64).cpu().expand(len(valid)), high.sum(1))


class StreamAllocator:
    """Tokens of one segment after the other, decided without a look at later ones.

    Segments yet to come are taken to be like those that came: of what is left above all minima, a segment gets its
    weight's share among itself and as many average ones as are still to come. Every segment gets its minimum, the total
    is never exceeded, and it is spent exactly where as many segments come as were stated.

    Args:
        total, segments: tokens of a clip, and its segments, or as many as may come; int or int64 [B].
    Raises: ValueError as `allocate_scores`; for weights=minmax without `config.expected`, whose range a stream needs
        before it has seen one.
    """

    def __init__(self, *, total: int | Tensor, segments: int | Tensor, config: AtaConfig | None = None, batch: int = 1):
        self.config = c = config or AtaConfig()
        if c.weights == "minmax" and not c.expected:
            raise ValueError(_NO_RANGE)
        self.left = torch.as_tensor(total, dtype=torch.int64).cpu().expand(batch).clone()
        self.come = torch.as_tensor(segments, dtype=torch.int64).cpu().expand(batch).clone()
        if int(self.come.min()) < 1:
            raise ValueError(f"segments={self.come.tolist()}: a stream has one segment at least")
        real = torch.arange(int(self.come.max())) < self.come[:, None]
        _check_totals(self.left, *_bounds(real, c, None, None), real)
        before = torch.tensor(list(c.expected), dtype=torch.float64).expand(batch, -1)
        self.seen, self.known = before, torch.ones_like(before, dtype=torch.bool)

    def step(self, scores: Tensor, *, real: Tensor | None = None) -> Tensor:
        """[B] int64: tokens of the next segment of each clip, 0 for clips that have none now.

        Args:
            scores: [B]. real: [B] bool, clips whose next segment this is; None: all.
        Raises: ValueError where more segments come than were stated, and for scores as `allocate_scores`.
        """
        c = self.config
        now = torch.ones(len(scores), dtype=torch.bool) if real is None else real.cpu()
        if bool((now & (self.come < 1)).any()):
            raise ValueError("a clip has more segments than were stated: raise `segments`, the number of them at most")
        score = scores.detach().double().cpu().masked_fill(~now, 0)[:, None]
        _check_scores(score, now[:, None], c)
        self.seen, self.known = torch.cat([self.seen, score], 1), torch.cat([self.known, now[:, None]], 1)
        weights = _weights(self.seen, self.known, c)
        own, past = weights[:, -1], self.known[:, :-1]
        count = past.sum(1)
        mean = torch.where(count > 0, (weights[:, :-1] * past).sum(1) / count.clamp(min=1), own)
        later = (self.come - 1).clamp(min=0)
        parts = own + later * mean
        share = torch.where(parts > 0, own / parts, 1 / (later + 1).double())
        free = self.left - self.come * c.minimum  # above all minima
        tokens = c.minimum + (free * share + 0.5).floor().long()
        least = (self.left - later * c.maximum).clamp(min=c.minimum)  # later segments hold the rest
        most = (self.left - later * c.minimum).clamp(max=c.maximum)
        tokens = torch.where(now, tokens.maximum(least).minimum(most), 0)
        self.left, self.come = self.left - tokens, self.come - now.long()
        return tokens.to(scores.device)


def _real(scores: Tensor, valid: Tensor | None) -> Tensor:
    """[B, G] bool on the CPU."""
    if scores.ndim != 2 or (valid is not None and valid.shape != scores.shape):
        given = None if valid is None else list(valid.shape)
        raise ValueError(f"scores have shape {list(scores.shape)}, valid {given}: both are [clips, segments]")
    real = torch.ones(scores.shape, dtype=torch.bool) if valid is None else valid.bool().cpu()
    if not bool(real.any(1).all()):
        raise ValueError(f"clip {int((~real.any(1)).nonzero()[0])} has no segment: every clip has one at least")
    return real


def _bounds(real: Tensor, config: AtaConfig, minimum: Tensor | None, maximum: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, G] int64 each, 0 where there is no segment."""
    low = torch.full(real.shape, config.minimum) if minimum is None else minimum.cpu().long()
    high = torch.full(real.shape, config.maximum) if maximum is None else maximum.cpu().long()
    if minimum is None:  # a segment that holds fewer tokens than the minimum gives all it has
        low = low.minimum(high)
    if low.shape != real.shape or high.shape != real.shape:
        raise ValueError(
            f"minimum {list(low.shape)} and maximum {list(high.shape)} are of other segments than {list(real.shape)}"
        )
    low, high = low.masked_fill(~real, 0), high.masked_fill(~real, 0)
    if bool(((low < 0) | (low > high)).any()):
        row, group = ((low < 0) | (low > high)).nonzero()[0].tolist()
        raise ValueError(
            f"segment {group} of clip {row} has a minimum of {int(low[row, group])} and a maximum of "
            f"{int(high[row, group])} tokens: 0 <= minimum <= maximum is needed"
        )
    return low, high


def _check_totals(total: Tensor, low: Tensor, high: Tensor, real: Tensor) -> None:
    least, most, count = low.sum(1), high.sum(1), real.sum(1)
    for row in ((total < least) | (total > most)).nonzero()[:, 0].tolist():
        asked, segments = int(total[row]), int(count[row])
        if asked < int(least[row]):
            raise ValueError(
                f"budget={asked} is too small: the {segments} segments of clip {row} take at least {int(least[row])} "
                f"tokens (ata.minimum); ask for so many, or set ata.minimum to {max(asked, 0) // segments} or less"
            )
        raise ValueError(
            f"budget={asked} is too large: the {segments} segments of clip {row} hold at most {int(most[row])} tokens "
            f"(ata.maximum); ask for so many, or raise ata.maximum to {-(-asked // segments)} if a segment has them"
        )


def _check_scores(score: Tensor, real: Tensor, config: AtaConfig) -> None:
    bad = real & ~(score.isfinite() & ((score >= 0) | (config.weights != "linear")))
    if bool(bad.any()):
        row, group = bad.nonzero()[0].tolist()
        kind = (
            "a number of 0 or above, as ata.weights=linear needs" if config.weights == "linear" else "a finite number"
        )
        raise ValueError(f"the score of segment {group} of clip {row} is {float(score[row, group])}, not {kind}")


def _weights(score: Tensor, real: Tensor, config: AtaConfig) -> Tensor:
    """[B, G] float64, 0 or above, in the order of the scores; 0 where there is no segment. Only their ratios count."""
    high = torch.where(real, score, -torch.inf).amax(1, keepdim=True)
    if config.weights == "softmax":
        out = ((score - high) / config.temperature).exp()
    elif config.weights == "linear":
        out = score
    else:
        low = torch.where(real, score, torch.inf).amin(1, keepdim=True)
        out = torch.where(high > low, (score - low) / (high - low), 1.0)
    return out.masked_fill(~real, 0)
