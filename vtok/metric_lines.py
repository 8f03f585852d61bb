"""Reading metrics.jsonl of a run, while it is written too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """The lines, each with its `step`, but one that is being written, or was cut by a kill; [] without a file."""
    rows = []
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # also bytes that are no text
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    except OSError:
        pass
    return rows
