"""Bad ends of a training run, seen coming in its metrics lines: a codebook that collapses, a game that is over, a loss
that leaves. Pure rules over numbers; the loop writes what they say and stops where they say so.

    metrics line --Rule: bad or not--> `lines` bad ones in a row --> Alarm(warn | stop, advice)

A rule that does not apply to a line (no discriminator yet, no codebook) forgets the row it had. What the rules remember
is in the checkpoint: a resumed run says what the uninterrupted one would have said. docs/training_curves.md shows what
each of them looks like.

Letters: V codebook size, Q ids per token, N ids counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from vtok.config import AlarmConfig
from vtok.losses.codebook import bins_of

ACTIONS = ("warn", "stop", "off")
WATCHED = ("train/l1", "train/l2", "train/loss")  # the first that a line has is what may not diverge
Line = dict[str, float]


class AlarmError(RuntimeError):
    """A run was ended because its numbers will not recover by themselves; the message says what to change."""


@dataclass(frozen=True)
class Alarm:
    """What a rule says at a line, once a run (again, for one that stops the run, after each resume)."""

    rule: str
    action: str  # warn | stop
    text: str


# what a codebook's counts say


def even_use(count: int, size: int) -> tuple[float, float]:
    """(entries used, perplexity) expected of `count` ids drawn evenly from `size`: the most that so few ids can show.

    For the perplexity, counts are Poisson: a sum up to a mean of 100 ids an entry, two terms of the expansion above.
    """
    if count < 1 or size < 1:
        return 0.0, 0.0
    mean = count / size
    used = size * -math.expm1(count * math.log1p(-1 / size)) if size > 1 else 1.0
    if mean > 100:
        per_entry = mean * math.log(mean) + 0.5  # E[c log c]
    else:
        probability, per_entry = math.exp(-mean), 0.0
        for c in range(1, int(mean + 12 * math.sqrt(mean)) + 30):
            probability *= mean / c
            per_entry += probability * c * math.log(c)
    return used, math.exp(min(math.log(count) - per_entry / mean, math.log(size)))


def codebook_line(counts: Tensor, sizes: tuple[int, ...]) -> Line:
    """The numbers of a metrics line from the id counts of its window (`vtok.losses.codebook_report`).

    codebook_usage: share of entries used, codebook_perplexity: 2 ** entropy of the ids, both the mean over codebooks,
    as in validation. codebook_usage_share and codebook_perplexity_share: the same against even use with as many ids
    (`even_use`), from 0 (one entry) to 1, of the codebook that does worst. codebook_tokens: ids counted, a codebook.
    Raises: ValueError when the counts are not of these codebooks.
    """
    bins = bins_of(sizes)
    if len(counts) != sum(bins):
        raise ValueError(
            f"Loss.report['codebook_counts'] has {len(counts)} entries, the model's codebook_sizes={sizes} make "
            f"{sum(bins)}: give codebook_report the sizes of the model"
        )
    usage, perplexity, used_share, even_share, tokens = [], [], [], [], 0
    for part in counts.cpu().split(list(bins)):
        seen = part[part > 0].double()
        tokens = int(seen.sum())
        if not tokens:
            return {}
        share = seen / tokens
        found = math.exp(-float((share * share.log()).sum()))
        used, most = even_use(tokens, len(part))
        usage.append(len(seen) / len(part))
        perplexity.append(found)
        used_share.append((len(seen) - 1) / max(used - 1, 1e-9) if len(part) > 1 else 1.0)
        even_share.append((found - 1) / max(most - 1, 1e-9) if len(part) > 1 else 1.0)
    return {
        "train/codebook_usage": sum(usage) / len(usage),
        "train/codebook_perplexity": sum(perplexity) / len(perplexity),
        "train/codebook_usage_share": min(used_share),
        "train/codebook_perplexity_share": min(even_share),
        "train/codebook_tokens": float(tokens),
    }


# rules: (thresholds, line, lowest medians so far) -> advice where the line looks bad, "" where it looks well, None
# where the rule does not apply


def codebook_collapse(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    return _codebook(line, 0.0, c.codebook_share, "the codebook has collapsed")


def codebook_low(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    return _codebook(line, c.codebook_share, c.low_share, "little of the codebook is used")  # below: the rule above


def _codebook(line: Line, low: float, high: float, words: str) -> str | None:
    shares = [line.get(f"train/codebook_{name}_share") for name in ("usage", "perplexity")]
    if shares[0] is None or shares[1] is None:
        return None
    if not low <= min(shares[0], shares[1]) < high:
        return ""
    return (
        f"{words}: {line['train/codebook_tokens']:.0f} tokens use "
        f"{100 * line['train/codebook_usage']:.2g} % of it with a perplexity of "
        f"{line['train/codebook_perplexity']:.3g}; against even use, usage is {100 * shares[0]:.2g} % and perplexity "
        f"{100 * shares[1]:.2g} % (alarm below {100 * high:g} %). Choose "
        "model.quantizer.name=fsq with entropy=0.1, which keeps its digits from one end of their range; or for vq: "
        "ema_decay=0.99, kmeans_init=true, dead_code_threshold=2, a dim of 8 to 32, a smaller codebook_size; or for "
        "lfq: a larger entropy; and a lower optim.lr with more optim.warmup_steps"
    )


def discriminator_wins(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    game = _game(line)
    if game is None:
        return None
    loss, gap = game
    if not (0 <= loss < c.discriminator_loss and gap > c.logits_gap):
        return ""
    return (
        f"the discriminator has won: its loss is {loss:.3g}, real logits lie {gap:.3g} above fake ones, so it has "
        "nothing left to teach. Slow it down (optim.lr_multipliers: {objective.adversarial: 0.1}, or "
        "objective.adversarial.every=5), hold it back (objective.adversarial.lecam=0.01 or r1=1), let it begin later "
        "(objective.adversarial.start) or make it smaller (width, depth)"
    )


def discriminator_dead(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    game = _game(line)
    if game is None:
        return None
    loss, gap = game
    constant = min(abs(loss - 1), abs(loss - math.log(2)))
    if constant >= c.dead_tolerance or abs(gap) >= 2 * c.dead_tolerance:
        return ""
    return (
        f"the discriminator answers the same whatever it sees: its loss stays at {loss:.4f}, real and fake logits are "
        f"{gap:.2g} apart. Raise its rate (optim.lr_multipliers: {{objective.adversarial: 4}}), lower "
        "objective.adversarial.lecam or r1, make it larger (width, depth), or set objective.adversarial.weight=0 to "
        "save its time"
    )


def divergence(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    name = next((n for n in WATCHED if n in line), "")
    best = lowest.get(name, 0.0)
    if best <= 0:  # none yet, or a loss that has no zero (log likelihoods, entropies)
        return None
    if line[name] <= c.divergence_factor * best:
        return ""
    return (
        f"{name} is {line[name]:.4g}, it was {best:.4g} (trainer.alarms.divergence_factor={c.divergence_factor:g}). "
        "Start again from best.ckpt (vtok export, then init_from) or from the beginning with optim.lr at a third, more "
        "optim.warmup_steps, optim.clip_grad_norm=1 or less, trainer.precision=32-true; with a discriminator, a later "
        "objective.adversarial.start or a lower weight"
    )


def gradient_growth(c: AlarmConfig, line: Line, lowest: Line) -> str | None:
    norm, best = line.get("train/grad_norm"), lowest.get("train/grad_norm", 0.0)
    if norm is None or best <= 0:
        return None
    if norm <= c.gradient_factor * best:
        return ""
    return (
        f"the norm of the gradients is {norm:.3g}, it was {best:.3g} (trainer.alarms.gradient_factor="
        f"{c.gradient_factor:g}): often the sign before a loss leaves. Lower optim.lr or optim.clip_grad_norm, or "
        "raise optim.warmup_steps; train/grad_norm_* tell which part grows"
    )


def _game(line: Line) -> tuple[float, float] | None:
    """(loss of the discriminator, distance of its logits), where it played."""
    values = [line.get(f"train/{name}") for name in ("discriminator", "logits_real", "logits_fake")]
    if values[0] is None or values[1] is None or values[2] is None:
        return None
    return values[0], values[1] - values[2]


Rule = Callable[[AlarmConfig, Line, Line], str | None]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (codebook_collapse, codebook_low, discriminator_wins, discriminator_dead, divergence, gradient_growth)
}
REMEMBERED = (*WATCHED, "train/grad_norm")


class Alarms:
    """The rules of a run and what they remember of its lines.

    Raises: ValueError for an action that is not warn, stop or off, and for thresholds that could never or always hold.
    """

    def __init__(self, config: AlarmConfig) -> None:
        self.config = config
        # yaml reads a bare `off` as false, which a text field then holds as "False"
        self.actions = {name: getattr(config, name).replace("False", "off") for name in RULES}
        for name, action in self.actions.items():
            if action not in ACTIONS:
                raise ValueError(f"trainer.alarms.{name}={action!r} is unknown; choose one of {', '.join(ACTIONS)}")
        if config.lines < 1 or config.warmup_steps < 0:
            raise ValueError(
                f"trainer.alarms: lines={config.lines} must be 1 or more, warmup_steps={config.warmup_steps} 0 or more"
            )
        above_0 = ("codebook_share", "low_share", "discriminator_loss", "logits_gap", "dead_tolerance")
        for key, low in (*((key, 0) for key in above_0), ("divergence_factor", 1), ("gradient_factor", 1)):
            if not getattr(config, key) > low:
                raise ValueError(f"trainer.alarms.{key}={getattr(config, key)} must be above {low}")
        self.rows = dict.fromkeys(RULES, 0)  # bad lines in a row
        self.told: list[str] = []
        self.recent: dict[str, list[float]] = {}  # of each remembered number, the last `lines` values
        self.lowest: dict[str, float] = {}  # and the lowest median of so many

    def look(self, step: int, line: dict[str, Any]) -> list[Alarm]:
        """What the line of training metrics at `step` gives rise to: [] nearly always."""
        c = self.config
        if not c.enabled:
            return []
        line = {k: float(v) for k, v in line.items() if isinstance(v, int | float)}
        alarms = []
        for name, rule in RULES.items():
            if self.actions[name] == "off" or step <= c.warmup_steps:
                continue
            advice = rule(c, line, self.lowest)
            self.rows[name] = self.rows[name] + 1 if advice else 0
            if not advice or self.rows[name] < c.lines or (self.actions[name] == "warn" and name in self.told):
                continue
            self.told.append(name)
            self.rows[name] = 0  # who resumes after a stop gets as many lines again
            text = f"{advice}. Seen in {c.lines} lines in a row up to step {step}"
            alarms.append(Alarm(name, self.actions[name], f"{text}; trainer.alarms.{name}={self._other(name)}"))
        self._remember(line)
        return alarms

    def _other(self, name: str) -> str:
        return "warn goes on all the same" if self.actions[name] == "stop" else "off silences this, stop ends the run"

    def _remember(self, line: Line) -> None:
        for name in REMEMBERED:
            if name in line and math.isfinite(line[name]):
                values = self.recent.setdefault(name, [])
                values.append(line[name])
                del values[: -self.config.lines]
                if len(values) == self.config.lines:  # a median: one easy batch is no record to fall back from
                    self.lowest[name] = min(median(values), self.lowest.get(name, math.inf))

    def state(self) -> dict[str, Any]:
        """What is remembered, as plain values for a checkpoint."""
        return {"rows": dict(self.rows), "told": list(self.told), "recent": dict(self.recent), "lowest": self.lowest}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave (nothing, for a checkpoint from before there were alarms)."""
        self.rows |= {name: count for name, count in state.get("rows", {}).items() if name in RULES}
        self.told = list(state.get("told", []))
        self.recent = {name: list(values) for name, values in state.get("recent", {}).items()}
        self.lowest = dict(state.get("lowest", {}))
