"""What a start of a run leaves beside its curves: config.yaml, as resolved, and environment.json, a row a start."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

import vtok
from vtok.commit import commit_of
from vtok.config import RunConfig, to_yaml
from vtok.training import step_size, strategy
from vtok.training.lit import LitCompressor
from vtok.training.optim import untrained_at_rest


def write_run_files(config: RunConfig, lit: LitCompressor) -> None:
    """config.yaml and environment.json of a start; prints what it trains."""
    text = to_yaml(config)
    aside = config.run_dir / ".config.yaml"
    aside.write_text(text)
    os.replace(aside, config.run_dir / "config.yaml")
    path = config.run_dir / "environment.json"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError):
        starts = []
    shipped = sum(p.numel() for p in lit.model.parameters())
    trained = sum(p.numel() for p in lit.parameters() if p.requires_grad)
    counts: dict[str, Any] = {"parameters": shipped, "parameters_trained": trained}
    counts["max_tokens"] = getattr(lit.model, "max_tokens", None)
    aside = config.run_dir / ".environment.json"
    aside.write_text(json.dumps({"starts": [*starts, {**environment(config), **counts}]}, indent=1))
    os.replace(aside, path)
    print(text.rstrip())
    print(f"model: {shipped / 1e6:.2f} M parameters; trained here: {trained / 1e6:.2f} M")
    print(strategy.batch_line(config))
    if config.optim.freeze or config.optim.train_only:
        rests = [p.numel() for p in lit.model.parameters() if not p.requires_grad]
        print(f"at rest (optim.freeze, optim.train_only): {len(rests)} tensors of the model, {sum(rests) / 1e6:.2f} M")
        untrained = untrained_at_rest(lit.model)
        if untrained and not config.init_from:
            print(
                f"warning: {', '.join(untrained)} rest as they began, untrained: init_from is empty. Set it to an "
                "export, or let them learn (optim.freeze, optim.train_only)"
            )


def environment(config: RunConfig) -> dict[str, Any]:
    """What a start of a run ran on: versions, machine, processes, command and commit, as JSON-ready values."""
    import importlib.metadata
    import platform

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("vtok", "lightning", "av", "deepspeed", "vector-quantize-pytorch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [sys.executable, *sys.argv],
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {**{name: version(name) for name in packages}, "torch": torch.__version__},
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": step_size.processes(config),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "commit": commit_of(Path(vtok.__file__).resolve().parent.parent),
    }
