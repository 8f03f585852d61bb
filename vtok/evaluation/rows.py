"""Rows of eval.json: per-clip numbers of a method at a budget become means, intervals, and reasons for each null."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.metrics.bd import bjontegaard, frontier, matched_bits
from vtok.metrics.codecs import encoder_versions
from vtok.metrics.frechet import FrechetDistance

SCHEMA = 1
RESAMPLES = 1000  # of the bootstrap
DISTORTIONS = ("psnr_db", "ssim", "tdiff_psnr_db", "lpips")
# of whole sets, not means over clips: the metric, the key of its sample's size, the setting its weights come from
FRECHET = {
    "rfvd": ("rfvd_clips", "eval.fvd_weights"),
    "rfid": ("rfid_frames", "eval.fid_weights"),
    "rfvd_proxy": ("rfvd_proxy_clips", "no setting: it needs none"),
}


def bootstrap(values: Tensor, *, seed: int, clusters: Tensor | None = None) -> list[float] | None:
    """95 % percentile interval of the mean over clips, from 1000 resamples of the clips; None below two clips.

    clusters: [n] int64, the video each value is of: videos are drawn, each with all its values (answers to questions
    of one video are alike, and an interval over questions would be too narrow).
    """
    known = ~values.isnan()
    values = values[known]
    if clusters is None:
        sums, counts = values, torch.ones_like(values)
    else:
        names, where = clusters[known].unique(return_inverse=True)
        sums = torch.zeros(len(names), dtype=values.dtype).index_add_(0, where, values)
        counts = torch.zeros_like(sums).index_add_(0, where, torch.ones_like(values))
    if len(sums) < 2:
        return None
    draw = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(seed))
    means = sums[draw].sum(1) / counts[draw].sum(1)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def leader(bounds: Sequence[float] | None, ours: str, other: str) -> str | None:
    """Who is ahead, by an interval of ours minus the other's; None where it holds 0, or there is none."""
    if bounds is None or bounds[0] <= 0 <= bounds[1]:
        return None
    return ours if bounds[0] > 0 else other


@dataclass
class Row:
    """Per-clip numbers of one (method, budget), in the order of the windows; `notes` explains what is not there."""

    method: str
    budget: int | None
    values: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    frechet: dict[str, FrechetDistance] = field(default_factory=dict)  # by name, until `settle`

    def add(self, **columns: Tensor | Sequence[float]) -> None:
        for name, column in columns.items():
            values = column.double().cpu().tolist() if isinstance(column, Tensor) else list(column)
            self.values.setdefault(name, []).extend(values)

    def tensor(self, name: str) -> Tensor:
        return torch.tensor(self.values.get(name, []), dtype=torch.float64)

    def mean(self, name: str) -> float:
        defined = self.tensor(name)
        defined = defined[~defined.isnan()]
        return float(defined.mean()) if len(defined) else math.nan

    def settle(self) -> None:
        """Turn the sums of rFVD, its proxy and rFID, 67 MB for the last, into numbers, once every clip was added."""
        for name, metric in self.frechet.items():
            self.extra |= {name: float(metric.compute()), FRECHET[name][0]: int(metric.samples)}
            if remark := metric.remark():
                self.notes.append(f"{name}: {remark}")
        self.frechet = {}

    def finish(self, *, ours: bool, lpips: bool, seed: int, frechet: Sequence[str] = ()) -> dict[str, Any]:
        """The row of eval.json, after `settle`.

        ours: of the tokenizer, not of a control. lpips: its weights were there. frechet: those of FRECHET that had.
        """
        out: dict[str, Any] = {
            "method": self.method,
            "budget": self.budget,
            "clips": int((~self.tensor("psnr_db").isnan()).sum()),
            "tokens_mean": self.mean("tokens"),
            "tokens_per_second": self.mean("tokens_per_second"),
            "bits_mean": self.mean("bits"),
            "entropy_bits_mean": self.mean("entropy_bits"),
            "ar_bits_mean": self.mean("ar_bits"),
            "signalling_bits_mean": self.mean("signalling_bits"),
            "bits_per_pixel": self.mean("bits_per_pixel"),
            "bits_per_second": self.mean("bits_per_second"),
            **{name: self.mean(name) for name in DISTORTIONS},
            "psnr_db_ci": bootstrap(self.tensor("psnr_db"), seed=seed),
            **{key: None for name, (samples, _) in FRECHET.items() for key in (name, samples)},
            "worse_share": None,
            "encode_seconds_per_clip": self.mean("encode_s"),
            "decode_seconds_per_clip": self.mean("decode_s"),
        }
        out |= self.extra
        notes = list(self.notes)
        if not ours:
            notes.append("tokens, ids and seconds are measured for tokenizers only")
        if out["clips"]:
            if not lpips:
                notes.append("lpips: no weights were given (eval.lpips_weights)")
            elif math.isnan(out["lpips"]):
                notes.append("lpips: compares RGB only")
            for name, (_, setting) in FRECHET.items():
                if name not in frechet:
                    notes.append(f"{name}: no weights were given ({setting})")
                elif out[name] is None:
                    notes.append(f"{name}: compares RGB only")
            if math.isnan(out["ssim"]):
                notes.append("ssim: frames are smaller than its 11 x 11 window")
            if math.isnan(out["tdiff_psnr_db"]):
                notes.append("tdiff_psnr_db: no clip has two frames")
            if math.isnan(out["bits_per_second"]) and not math.isnan(out["bits_mean"]):
                notes.append("per second: neither the clips nor fps say how long they last")
            if out["psnr_db_ci"] is None:
                notes.append("psnr_db_ci: needs two clips")
        out["note"] = "; ".join(notes) or None
        return out


def against_codec(
    codec: str, curve: Sequence[tuple[float, float]], ours: Mapping[str, Sequence[tuple[int, float, float]]]
) -> list[dict[str, Any]]:
    """What the tokenizer's budgets cost beside a codec: an entry of eval.json's `against_codecs` for each way to count.

    curve: (bits, PSNR) of the codec. ours: by the key of a row that holds the bits, (budget, bits, PSNR) of budgets,
    all means over the codec's clips.
    """
    out = []
    for rate, points in ours.items():
        delta = bjontegaard(curve, [(bits, psnr) for _, bits, psnr in points])
        matched = []
        for budget, bits, psnr in points:
            there = matched_bits(curve, psnr)
            matched.append(
                {"budget": budget, "psnr_db": psnr, "bits": bits, "codec_bits": there.bits, "where": there.where}
            )
        out.append(
            {
                "codec": codec,
                "rate": rate,
                "bd_rate_percent": delta.rate_percent,
                "bd_psnr_db": delta.quality,
                "overlap_psnr_db": delta.overlap and list(delta.overlap),
                "matched": matched,
                "codec_curve": [list(point) for point in frontier(curve)],
            }
        )
    return out


def check_same_weights(*evaluations: Mapping[str, Any]) -> None:
    """Raises ValueError when two contents of eval.json hold a metric measured with different weight files."""
    seen: dict[str, tuple[str, str]] = {}
    for at, each in enumerate(evaluations):
        where = str(each.get("model") or f"table {at}")
        for name, weights in (each.get("weights") or {}).items():
            other, first = seen.setdefault(name, (weights["sha256"], where))
            if other != weights["sha256"]:
                raise ValueError(
                    f"{name} of {first} was measured with weights of sha256 {other}, of {where} with "
                    f"{weights['sha256']}: the numbers do not compare; measure one of them again"
                )


def without_nan(value: Any) -> Any:
    """The same JSON value with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment(device: torch.device, *, seed: int) -> dict[str, Any]:
    """Versions, hardware, seed and commit: what a number needs to be compared with another."""
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    here = Path(__file__).parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchmetrics": version("torchmetrics"),
        "codecs": encoder_versions(),
        "platform": platform.platform(),
        "cpu": cpu,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "seed": seed,
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
