"""Broken samples: counted, listed in the quarantine file, and too many of them stop the run."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from vtok.data.sources import Sample

log = logging.getLogger(__name__)

MIN_SEEN = 20  # samples before the share of broken ones is judged
MIN_BROKEN = 3  # and broken ones: a single one in the first twenty says nothing about the corpus
MAX_IN_A_ROW = 1000  # broken samples without a good one between: nothing is left to train on


class TooManyBroken(RuntimeError):
    """The share of samples that could not be used passed `max_bad_fraction`."""


class Health:
    """Counts broken samples, writes them to the quarantine file, and stops the run when they are too many.

    quarantine: jsonl, one line a broken sample, appended in one write (safe among workers and ranks that share the
    file), before the samples after it are handed out; None keeps no file, and then a resume is exact only where nothing
    is broken. Lines of the same seed that are there at the start are the samples to leave out again.
    """

    def __init__(self, *, max_bad_fraction: float, quarantine: str | Path | None, seed: int, where: str) -> None:
        self.limit, self.quarantine, self.seed, self.where = max_bad_fraction, quarantine, seed, where
        self.seen = self.broken = self.in_a_row = 0
        self.judging = True  # False while a resume counts again what came before
        self.reported: set[tuple[str, str]] = set()
        self.known = read_quarantine(quarantine, seed=seed) if quarantine is not None else {}

    def good(self) -> None:
        self.seen += 1
        self.in_a_row = 0

    def is_known(self, epoch: int | None, shard: str, key: str) -> bool:
        return (epoch, shard, key) in self.known

    def bad(self, epoch: int | None, shard: str, key: str, reason: str, *, lost: int = 1, again: bool = False) -> None:
        """Count `lost` broken samples. again: it is in the file already. Raises TooManyBroken."""
        self.seen += lost
        self.broken += lost
        self.in_a_row += 1
        if not again:
            log.warning("broken sample %r in %s (%s): %s", key or "(shard)", shard, self.where, reason)
            self._write({"seed": self.seed, "epoch": epoch, "shard": shard, "key": key, "reason": reason, "lost": lost})
        allowed = max(self.limit * self.seen, MIN_BROKEN - 1 if self.limit > 0 else 0)
        judged = self.judging and (self.seen >= MIN_SEEN or self.limit == 0)
        if self.in_a_row > MAX_IN_A_ROW or judged and self.broken > allowed:
            raise TooManyBroken(
                f"{self.broken} of {self.seen} samples seen are broken ({self.where}), above "
                f"data.max_bad_fraction={self.limit}; the last one: {key or shard!r}: {reason}. "
                f"All are listed in {self.quarantine or 'the log'}; repair the shards or raise the limit"
            )

    def bad_reference(self, epoch: int | None, shard: str, sample: Sample) -> None:
        """A sample that cannot be used already by its tar headers: reported once, counted every time."""
        again = (shard, sample.key) in self.reported or self.is_known(None, shard, sample.key)
        self.reported.add((shard, sample.key))
        self.bad(None, shard, sample.key, sample.problem or "", lost=sample.lost, again=again)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.quarantine is None:
            return
        line = json.dumps({**entry, "reason": entry["reason"][:2000]})
        file = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (line + "\n").encode())
        finally:
            os.close(file)


def read_quarantine(path: str | Path, *, seed: int) -> dict[tuple[int | None, str, str], str]:
    """{(epoch, shard, key): reason} of the lines written under `seed`; {} without a file. A half line is left out."""
    found: dict[tuple[int | None, str, str], str] = {}
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                entry = json.loads(line)
                if entry["seed"] == seed:
                    found[entry["epoch"], entry["shard"], entry["key"]] = entry["reason"]
            except (ValueError, KeyError, TypeError):
                continue
    return found
