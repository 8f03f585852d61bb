"""The fewest tokens of each time block that reach a wanted quality: searched by decoding, or said by a halting head.

Both are policies of `vtok.coding.rate_control`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from vtok.budget import Found, search_length, spread_lengths
from vtok.coding.trial import Distance, Group, Step, Trial, drawn_together, groups_of, most_tokens
from vtok.layers.halting import next_level
from vtok.types import StreamState


class Searched:
    """The fewest tokens of each block whose distortion is within the target (`vtok.budget.search_length`).

    A block is tried as if the video ended with it. Where frames of a chunk are drawn together, later blocks of the
    chunk change it: there a whole chunk is decoded again once its lengths are found, and blocks that fall short get
    more tokens until none does, or they have all.
    """

    def __init__(self, model: Any, size: tuple[int, int], *, target: float, distance: Distance) -> None:
        self.model, self.target = model, target
        self.trial = Trial(model, size, distance)
        self.together = drawn_together(model)
        self.blocks = self.missed = self.scanned = self.probes = self.mended = self.fell = 0

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        for chunk in self._chunks(steps):
            start, groups = self.trial.mark(), [group for step in chunk for group in step]
            found = [self._search(group) for group in groups]
            lengths = [each.length for each in found]
            if self.together and len(groups) > 1:
                self._mend(groups, lengths, start, [each.met for each in found])
            for step in chunk:
                yield lengths[: len(step)]
                del lengths[: len(step)]

    def _chunks(self, steps: Iterator[Step]) -> Iterator[list[list[Group]]]:
        """The groups of each step; steps that share a chunk, as a stream's last two can, come together."""
        held: list[list[Group]] = []
        for step in steps:
            held.append(groups_of(self.model, step))
            have = sum(map(len, held))
            if not self.together or have >= self.together + (self.blocks == 0):
                yield held
                held = []
        if held:
            yield held

    def _search(self, group: Group) -> Found:
        found = search_length(
            lambda lengths: self.trial.measure(group, lengths), most=most_tokens(group.tokens), target=self.target
        )
        self.trial.accept(group, found.length)
        self.blocks, self.missed = self.blocks + 1, self.missed + (not found.met)
        self.scanned, self.probes = self.scanned + (not found.monotone), self.probes + found.probes
        return found

    def _mend(self, groups: list[Group], lengths: list[int], start: StreamState, met: list[bool]) -> None:
        """Lengthen, in place, the blocks that miss the target once their chunk is decoded whole after `start`."""
        before = list(lengths)
        while True:
            distortion = self.trial.measure_together(groups, lengths, start)
            self.probes += len(groups)
            short = [g for g, value in enumerate(distortion) if met[g] and value > self.target]
            grown = False
            for g in short:
                longer = [k for k in spread_lengths(most_tokens(groups[g].tokens)) if k > lengths[g]]
                lengths[g], grown = (longer[0], True) if longer else (lengths[g], grown)
            if not grown:
                break
        self.mended, self.fell = self.mended + sum(a != b for a, b in zip(lengths, before)), self.fell + len(short)
        self.trial.state = start
        for group, length in zip(groups, lengths):
            self.trial.accept(group, length)

    def report(self) -> str:
        if not self.blocks:
            return ""
        words = f"{self.probes / self.blocks:.1f} decodes a block"
        words += f"; {self.scanned} of {self.blocks} blocks scanned: more tokens were worse" if self.scanned else ""
        words += f"; {self.mended} got more tokens once their chunk was decoded whole" if self.mended else ""
        words += f"; {self.fell} fall below it for what comes after them in their chunk" if self.fell else ""
        return words + (f"; {self.missed} of {self.blocks} blocks do not reach it at any length" if self.missed else "")


class Predicted:
    """What the model's halting head predicts for a wanted PSNR from the tokens alone: nothing is decoded."""

    def __init__(self, model: Any, *, psnr_db: float) -> None:
        if not hasattr(model, "halting"):
            fix = (
                "set model.halting_depth and train it" if hasattr(model.config, "halting_depth") else "ask for psnr_db"
            )
            raise ValueError(
                f"predicted_psnr_db needs a model with a halting head, which only family flexible can have: {fix} "
                "(configs/flexible/halting.yaml)"
            )
        self.model, self.psnr_db = model, psnr_db

    def lengths(self, steps: Iterator[Step]) -> Iterator[list[int]]:
        for step in steps:
            groups = int(step.tokens.num_groups[0])
            codes = step.tokens.embeddings.unflatten(1, (groups, -1))
            yield self.model.halting.predict(codes[0], self.psnr_db).tolist()

    def report(self) -> str:
        head = self.model.halting
        if not head.calibrated:
            return "the halting head is not calibrated, about half of the blocks miss it: run `vtok calibrate`"
        if math.isinf(head.threshold(next_level(self.psnr_db))):
            return "too few calibration videos reach it: every token is kept"
        return f"{head.coverage:.0%} of the blocks that can are to reach it"
