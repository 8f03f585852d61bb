"""What the keys of docs/performance.md need of machine and strategy, and what they do to weights and moments."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import torch
from torch import Tensor, nn

from vtok.config import RunConfig
from vtok.training.tracking import check_installed

ONE_FILE = ("auto", "ddp")  # strategies under which a rank holds whole weights, in their own shapes


def check_keys(config: RunConfig) -> None:
    """Raises ValueError, naming key and fix, for keys that this machine or strategy cannot keep."""
    trainer, data = config.trainer, config.data
    on_gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    for key, value in (("data.pin_memory", data.pin_memory), ("data.prefetch", data.prefetch)):
        if value and not on_gpu:
            raise ValueError(f"{key}=true copies to a CUDA device, and this run has none; set {key}=false")
    if data.prefetch and data.pin_memory is False:
        raise ValueError("data.prefetch=true copies beside the step from pinned memory alone; set data.pin_memory=null")
    for key, why in (
        ("async_checkpoint", "every rank writes files of its own"),
        ("channels_last", "the engine keeps weights in flat buffers"),
    ):
        if getattr(trainer, key) and trainer.strategy not in ONE_FILE:
            raise ValueError(
                f"trainer.{key}=true: under trainer.strategy={trainer.strategy} {why}; choose ddp, or {key}=false"
            )
    if trainer.compile:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if not on_gpu and shutil.which(compiler) is None:
            raise ValueError(f"trainer.compile=true needs a C++ compiler on the CPU, and {compiler!r} is not there")
        if on_gpu and importlib.util.find_spec("triton") is None:
            raise ValueError("trainer.compile=true needs triton on CUDA: pip install triton, or choose compile=false")
    check_installed(trainer.wandb)


def channels_last(module: nn.Module) -> int:
    """Lays the weights of 3D convolutions out with channels last in memory, in place; how many there are."""
    weights = [p for p in module.parameters() if p.ndim == 5]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)
    return len(weights)


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lays moments out as their parameters are: fused AdamW on the CPU reads both in the order of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
