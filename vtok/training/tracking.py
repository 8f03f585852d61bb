"""A run's lines in Weights & Biases (`trainer.wandb`): the same numbers as metrics.jsonl, pictures as files of the run.

    trainer.wandb=PROJECT          needs pip install 'vtok[wandb]'
    WANDB_MODE=offline vtok train  nothing leaves the machine; `wandb sync` sends <run>/wandb/ later

A resumed run goes on under the id in <run>/wandb/id.txt. No key is read or stored here: `wandb login` does that. What
may hold one goes nowhere: the command line, shell commands that give shards, names and queries in addresses.
"""

from __future__ import annotations

import importlib.util
import math
import uuid
from pathlib import Path
from typing import Any

from vtok.shareable import shareable


def check_installed(project: str) -> None:
    """Raises ValueError where `trainer.wandb` asks for what is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"trainer.wandb={project!r} needs Weights & Biases: pip install 'vtok[wandb]', or set trainer.wandb=''"
        )


class WandbRun:
    """Scalars and lists of numbers of a run, by step.

    Args:
        project: its name there. folder: the run directory. config: plain values, of which what is `shareable` is told.
    """

    def __init__(self, project: str, *, folder: Path, config: dict[str, Any]) -> None:
        check_installed(project)
        import wandb  # pyright: ignore[reportMissingImports]

        kept = folder / "wandb" / "id.txt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex[:12])
        # x_disable_meta: it would send the command line, and the files of the code's folder it thinks are the run's
        settings = wandb.Settings(console="off", silent=True, x_disable_meta=True, save_code=False)
        self.run = wandb.init(
            project=project, name=folder.name, id=kept.read_text().strip(), resume="allow", dir=str(folder),
            config=shareable(config), settings=settings,
        )  # fmt: skip
        # by our steps, not theirs, which may not go back: a run that was killed writes its last steps again
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        row: dict[str, Any] = {"step": step}
        for key, value in values.items():
            if isinstance(value, list) and value and all(isinstance(v, float) and math.isfinite(v) for v in value):
                row[key] = wandb.Histogram(value)
            elif isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
                row[key] = value
        self.run.log(row)

    def file(self, step: int, path: Path) -> None:
        """A picture or video of samples."""
        import wandb  # pyright: ignore[reportMissingImports]

        kind = wandb.Image if path.suffix == ".png" else wandb.Video
        self.run.log({"step": step, "samples": kind(str(path))})

    def close(self) -> None:
        self.run.finish()
