"""The elements of an array of jobs, from a sweep.yaml (its format: slurm/README.md).

command, arguments, parts    what runs; `train` with the configuration of the command line if left out
grid, runs                   the settings of each element: {key} in arguments, overrides of a training
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vtok import cli

KEYS = ("command", "arguments", "parts", "grid", "runs", "name", "out", "at_once")


def read_sweep(path: Path) -> dict[str, Any]:
    """The checked content of a sweep.yaml; its format is in slurm/README.md."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        sweep = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        raise ValueError(f"{path}: not readable as yaml: {error}") from error
    if not isinstance(sweep, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(sweep).__name__}")
    unknown = sorted(str(key) for key in sweep.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(KEYS)}")
    command = sweep.setdefault("command", "train")
    if command not in cli.COMMANDS:
        raise ValueError(f"{path}: command={command!r} is not one of vtok's: {', '.join(cli.COMMANDS)}")
    if command == "train" and ("parts" in sweep or "arguments" in sweep):
        raise ValueError(f"{path}: parts and arguments are for other commands than train, which takes grid and runs")
    for key, at_least in (("parts", 1), ("at_once", 0)):
        value = sweep.get(key, at_least)
        if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
            raise ValueError(f"{path}: {key}={value!r} must be a whole number, {at_least} or more")
    if not (isinstance(sweep.get("arguments", []), list)):
        raise ValueError(f"{path}: arguments={sweep['arguments']!r} must be a list, as in [videos/, --out, shards/]")
    return {str(key): value for key, value in sweep.items()}


def combinations(sweep: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The settings of every element: each of `runs` with each combination of `grid`, in the order of the file."""
    grid, runs = sweep.get("grid") or {}, sweep.get("runs") or [{}]
    if not isinstance(grid, dict) or not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path}: grid must map keys to lists of values, and runs be a list of mappings")
    axes: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if isinstance(values, dict) and set(values) == {"glob"}:
            values = sorted(glob.glob(str(values["glob"])))
            if not values:
                raise ValueError(f"{path}: grid.{key}: nothing matches {grid[key]['glob']!r}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid.{key}={values!r} must be a list of values, or {{glob: PATTERN}}")
        axes[str(key)] = values
    product = [dict(zip(axes, chosen)) for chosen in itertools.product(*axes.values())]
    both = sorted({str(key) for run in runs for key in run} & axes.keys())
    if both:
        raise ValueError(f"{path}: {both[0]} is in grid and in runs: leave it in one of them")
    return [{**{str(k): v for k, v in run.items()}, **point} for run in runs for point in product]


def filled(text: str, values: dict[str, Any], where: str) -> str:
    """`text` with {key} replaced by the element's value. Raises ValueError for a key there is not."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{where}: {{{match[1]}}} is not one of {', '.join(values) or 'nothing'}")
        return str(values[match[1]])

    return re.sub(r"\{([\w.]+)\}", value_of, text)


def override(key: str, value: Any) -> str:
    """key=value as the command line has it; json is yaml, and keeps strings apart from numbers: "007" from 7."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
