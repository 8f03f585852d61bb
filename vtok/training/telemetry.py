"""What training takes while it runs: operations of a step, the share of the device's peak they reach (MFU), memory.

    batch --FlopCount--> operations, counted in a few batches --Telemetry.line--> a few numbers a line

MFU is (operations a second) / (peak of the device at the run's precision), after Chowdhery et al. 2022 (PaLM),
https://arxiv.org/abs/2204.02311: what activation checkpointing computes again does not count. Where the peak is not
known the share is not a number, never 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vtok.metrics.operations import Operations
from vtok.types import Clip

GIB = 2**30


class Peak(NamedTuple):
    """TFLOP/s of one device, dense (no sparsity), matrix units where the type has them, sums in float32."""

    bf16: float | None
    fp16: float | None
    fp32: float | None  # not TF32: a run at 32-true whose convolutions use it can pass 100 %


# Makers' data sheets and white papers, the column without sparsity. Name of the device -> first row that fits.
# Looked up again: H100 and H200 SXM. The others were written down from memory of the sheet that is named: check yours,
# or set trainer.peak_tflops.
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
PEAKS: tuple[tuple[str, Peak, str], ...] = (
    (r"\bB200\b", Peak(2250.0, 2250.0, None), "DGX B200 data sheet (72 PFLOP/s of FP8 for 8 devices)"),
    (r"\bH200 NVL\b", Peak(835.5, 835.5, 60.0), f"{_NVIDIA}h200"),
    (r"\bG?H200\b", Peak(989.4, 989.4, 66.9), f"{_NVIDIA}h200"),
    (r"\bH100 PCIe\b", Peak(756.0, 756.0, 51.0), f"{_NVIDIA}h100"),
    (r"\bH100 NVL\b", Peak(835.5, 835.5, 60.0), f"{_NVIDIA}h100"),
    (r"\bH100\b", Peak(989.4, 989.4, 66.9), f"{_NVIDIA}h100"),
    (r"\bA100\b", Peak(312.0, 312.0, 19.5), f"{_NVIDIA}a100"),
    (r"\bA40\b", Peak(149.7, 149.7, 37.4), f"{_NVIDIA}a40"),
    (r"\bA30\b", Peak(165.0, 165.0, 10.3), f"{_NVIDIA}products/a30-gpu"),
    (r"\bA10\b", Peak(125.0, 125.0, 31.2), f"{_NVIDIA}products/a10-gpu"),
    (r"\bRTX A6000\b", Peak(154.8, 154.8, 38.7), "NVIDIA Ampere GA102 white paper"),
    (r"\bRTX 3090$", Peak(71.0, 71.0, 35.6), "NVIDIA Ampere GA102 white paper"),
    (r"\bL40S\b", Peak(362.1, 362.1, 91.6), f"{_NVIDIA}l40s"),
    (r"\bL40\b", Peak(181.1, 181.1, 90.5), f"{_NVIDIA}l40"),
    (r"\bL4\b", Peak(121.0, 121.0, 30.3), f"{_NVIDIA}l4"),
    (r"\bRTX 4090$", Peak(165.2, 165.2, 82.6), "NVIDIA Ada white paper"),
    (r"\bV100-SXM2\b", Peak(None, 125.0, 15.7), f"{_NVIDIA}v100"),
    (r"\bV100-PCIE\b", Peak(None, 112.0, 14.0), f"{_NVIDIA}v100"),
    (r"\bT4\b", Peak(None, 65.0, 8.1), f"{_NVIDIA}tesla-t4"),
    (r"\bMI300X\b", Peak(1307.4, 1307.4, 163.4), "AMD Instinct MI300X data sheet"),
)


def peak_tflops(name: str, precision: str) -> float | None:
    """Peak of a device in TFLOP/s at a `trainer.precision`; None where it is not known, and for slices (MIG)."""
    if "MIG" in name or "Laptop" in name:
        return None
    kind = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "fp16", "32-true": "fp32"}[precision]
    return next((getattr(peak, kind) for pattern, peak, _ in PEAKS if re.search(pattern, name)), None)


class _Backward(Operations):
    """Operations of a backward pass; what activation checkpointing computes again is left out.

    Only such recomputing records gradients there: the engine itself runs without.
    """

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return out
        return super()._count_flops(func_packet, out, args, kwargs)


class FlopCount:
    """Operations of forward and backward pass by kind of batch, counted while the 1st, 2nd, 4th, 8th ... batch runs.

    A counted pass runs op by op: parts that are compiled are not while it lasts, and block-sparse attention is dense
    (its operations count whole, masked or not). The mean of a kind stands for its others, so that what a step draws
    (nested dropout, merging) is not taken from one draw; that of all kinds for one that was not met when counting.

    A counted pass may round otherwise, by 1e-7 in convolutions: every rank counts at the same batches, and with `state`
    and `restore` a resumed run at those of one that was never stopped.
    """

    def __init__(self, model: nn.Module | None = None, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.model = model
        self.batches = 0
        self.known: dict[str, list[float]] = {}  # kind: [batches counted, operations of those]
        self._counter: Operations | None = None
        self._sparse: list[Any] = []
        self._kind = ""
        self._ahead = 0

    def begin(self, kind: Hashable) -> None:
        """Before the forward pass of a batch of this kind."""
        if not self.enabled:
            return
        self.close()
        self._kind = str(kind)
        self.batches += 1
        if self.batches & (self.batches - 1) == 0:
            parts = self.model.modules() if self.model is not None else ()
            self._sparse = [part for part in parts if getattr(part, "flex", None) is True]
            for part in self._sparse:
                part.flex = False
            self._counter = Operations()
            self._counter.__enter__()

    def before_backward(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._ahead = self._counter.get_total_flops()
            self._counter = _Backward()
            self._counter.__enter__()

    def after_backward(self) -> float:
        """Operations of the batch that just ended; NaN where none are counted."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            entry = self.known.setdefault(self._kind, [0, 0.0])
            entry[0] += 1
            entry[1] += self._ahead + self._counter.get_total_flops()
            self._counter = None
            self._whole()
        return self.of(self._kind)

    def of(self, kind: Hashable) -> float:
        entries = [self.known[str(kind)]] if str(kind) in self.known else self.known.values()
        counted = sum(entry[0] for entry in entries)
        return sum(entry[1] for entry in entries) / counted if counted else math.nan

    def close(self) -> None:
        """Ends a count that an error left open."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        self._whole()

    def _whole(self) -> None:
        for part in self._sparse:
            part.flex = True
        self._sparse = []

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches, "known": {kind: list(entry) for kind, entry in self.known.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self.batches = state.get("batches", 0)
        self.known = {kind: list(entry) for kind, entry in state.get("known", {}).items()}


def kind_of(clip: Clip, idle: Any = ()) -> str:
    """Batches of one kind take about the same operations: shapes, rough length of texts, parts that rest."""
    shapes: list[Any] = [tuple(clip.video.shape) if clip.video is not None else len(clip)]
    shapes += [tuple(f.patches.shape) for f in (clip.features or {}).values()]
    letters = sum(map(len, clip.text or []))
    return f"{shapes} {letters.bit_length()} {sorted(idle)}"


def host_memory_gib() -> float:
    """Resident memory of this process, without its loader workers; NaN where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / GIB
    except OSError:
        pass
    return math.nan


def device_memory_gib(device: torch.device) -> float:
    """Most memory that tensors held on a CUDA device since the last call; NaN for other devices."""
    if device.type != "cuda":
        return math.nan
    most = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return most


class Telemetry:
    """Numbers of the lines of one run and rank beside its losses.

    Args:
        peak: TFLOP/s of the device (trainer.peak_tflops); None looks its name up.
        enabled: count operations (trainer.count_flops).
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        precision: str,
        peak: float | None = None,
        enabled: bool = True,
    ) -> None:
        self.device = device
        self.flops = FlopCount(model, enabled=enabled)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak if peak is not None else peak_tflops(name, precision)
        self.done = 0.0  # operations since the last line

    def batch_ended(self) -> None:
        self.done += self.flops.after_backward()

    def line(self, spent_s: float) -> dict[str, float]:
        """{name: value} for a line of metrics over the last `spent_s` seconds; begins the next one."""
        tflops = self.done / spent_s / 1e12
        self.done = 0.0
        return {
            "train/tflops_per_s": tflops if self.flops.enabled else math.nan,
            "train/mfu": tflops / self.peak if self.peak and self.flops.enabled else math.nan,
            "train/device_memory_gib": device_memory_gib(self.device),
            "train/host_memory_gib": host_memory_gib(),
        }
