"""`vtok eval`: a tokenizer at every budget, beside its controls and real codecs, on the same windows in the same run.

    1. the model over the validation clips at each budget: distortion, nominal bits, use of its codebooks
    2. a static entropy model fitted on the training clips' ids prices the validation ids
    3. controls, fitted on training clips, and codecs, searched per clip, at the mean nominal bits of each budget
    4. eval.json and report.html

Every number is a mean over clips of one number per clip. What is undefined is null, and the row's `note` says why.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from vtok.config import DataConfig, EvalConfig, from_dict
from vtok.entropy import StaticModel, factors_of
from vtok.layers.perceptual import LPIPS, load_lpips
from vtok.metrics.codecs import CODECS, CodecCrash, Point, encoder_versions, sweep_clips
from vtok.metrics.codecs import describe as describe_codec
from vtok.metrics.controls import CONTROLS, Downsample, fit_control, repeat_last
from vtok.metrics.distortion import clip_lpips, clip_psnr, clip_ssim, clip_tdiff_psnr
from vtok.metrics.rate import CodebookUsage
from vtok.types import Clip, Tokens, to_uint8

log = logging.getLogger(__name__)
SCHEMA = 1
RESAMPLES = 1000  # of the bootstrap
DISTORTIONS = ("psnr_db", "ssim", "tdiff_psnr_db", "lpips")


def default_budgets(max_tokens: int) -> list[int]:
    """1, 4, 16, ... and the maximum."""
    out = []
    while (budget := 4 ** len(out)) < max_tokens:
        out.append(budget)
    return [*out, max_tokens]


def bootstrap(values: Tensor, *, seed: int) -> list[float] | None:
    """95 % percentile interval of the mean over clips, from 1000 resamples of the clips; None below two clips."""
    values = values[~values.isnan()]
    if len(values) < 2:
        return None
    draw = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values[draw].mean(1)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


@dataclass
class _Row:
    """Per-clip numbers of one (method, budget), in the order of the windows; `notes` explains what is not there."""

    method: str
    budget: int | None
    values: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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


def _select(clip: Clip, row: int) -> Clip:
    """A batch of one: row `row` of a batch."""

    def take(value: Any) -> Any:
        return value[row : row + 1] if isinstance(value, (Tensor, list)) else None

    return Clip(**{f.name: take(getattr(clip, f.name)) for f in fields(clip) if f.name != "features"})


def _durations(clip: Clip, fps: float | None) -> Tensor:
    """[B] seconds of video each clip shows; NaN where neither its times nor a rate say."""
    frames = clip.frames().double()
    if clip.times is not None:
        last = clip.times.double().gather(1, (clip.frames() - 1)[:, None])[:, 0]
        span = (last - clip.times[:, 0].double()).clamp(min=0)
        known = span * frames / (frames - 1).clamp(min=1)  # the last frame is shown as long as the others
        if fps is None:
            return torch.where(span > 0, known, torch.nan)
        return torch.where(span > 0, known, frames / fps)
    return frames / fps if fps else torch.full_like(frames, torch.nan)


class Evaluator:
    """Measures one tokenizer; `run()` gives the content of eval.json, `reconstruct()` what a report shows.

    Args:
        model: a `Tokenizer` with `config.name`, in eval mode.
        val: batches of uint8 clips, read twice: a list, or a loader with a fixed order.
        train: batches of uint8 clips for everything that is fitted; None leaves those methods out, and says so.
        budgets: tokens per clip. controls, codecs: names, see vtok.metrics.
        lpips: network from `load_lpips`, or None. fps: frames per second of the clips where they do not say.
        profile, processes: of the codecs. codec_clips: at most this many of the first clips go through the codecs.
        progress: show bars.
    """

    def __init__(
        self,
        model: Any,
        *,
        val: Iterable[Clip],
        train: Iterable[Clip] | None = None,
        budgets: Sequence[int] = (),
        controls: Sequence[str] = CONTROLS,
        codecs: Sequence[str] = (),
        lpips: LPIPS | None = None,
        fps: float | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        profile: str = "offline",
        processes: int = 1,
        codec_clips: int | None = None,
        progress: bool = True,
    ) -> None:
        if not hasattr(model, "decode"):
            raise ValueError(f"{type(model).__name__} has no decode: pixel metrics measure tokenizers only")
        self.budgets = sorted({int(budget) for budget in budgets}) or default_budgets(model.max_tokens)
        for name, given, choices in (("controls", controls, CONTROLS), ("codecs", codecs, tuple(CODECS))):
            unknown = [each for each in given if each not in choices]
            if unknown:
                raise ValueError(f"eval.{name}={unknown} unknown; choose from {', '.join(choices)}")
        if self.budgets[0] < 1:
            raise ValueError(f"eval.budgets={self.budgets}: a budget is at least one token")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.family = str(model.config.name).rpartition(".")[2]
        self.val = val if hasattr(val, "__len__") else list(val)
        self.train = train
        self.control_names, self.codec_names = list(controls), list(codecs)
        self.lpips = lpips.to(self.device) if lpips is not None else None
        self.fps, self.seed, self.profile = fps, seed, profile
        self.processes, self.codec_clips = processes, codec_clips
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not progress,
        )
        self.keys: list[str] = []
        self.rates: dict[int, float] = {}
        self.controls: dict[str, Any] = {}

    def _track(self, what: str, total: int | None) -> Any:
        task = self.bar.add_task(what, total=total)

        def update(done: int, count: int) -> None:
            self.bar.update(task, completed=done, total=count)

        return update

    def _batches(self, what: str) -> Iterator[Clip]:
        total = len(self.val)  # type: ignore[arg-type]
        update = self._track(what, total)
        for done, clip in enumerate(self.val):
            if clip.video is None or clip.video.dtype != torch.uint8:
                raise ValueError("evaluate reads uint8 clips, as the loader gives them")
            yield clip
            update(done + 1, total)

    # the model

    def _sync(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @torch.inference_mode()
    def code(self, clip: Clip, budget: int | None) -> tuple[Tokens, Tensor, float, float]:
        """Tokens, uint8 reconstruction [B, C, T, H, W] on the CPU, and the seconds encode and decode took."""
        assert clip.video is not None
        moved = clip.to(self.device).as_float()
        start = self._sync()
        tokens = self.model.encode(moved, budget=budget)
        middle = self._sync()
        video = self.model.decode(tokens, size=tuple(clip.video.shape[3:]))
        end = self._sync()
        out = to_uint8(video).cpu()
        if out.shape[2] < clip.video.shape[2]:  # padding frames, which no metric reads
            rest = out[:, :, -1:].expand(-1, -1, clip.video.shape[2] - out.shape[2], -1, -1)
            out = torch.cat([out, rest], 2)
        return tokens.to("cpu"), out[:, :, : clip.video.shape[2]], middle - start, end - middle

    def _coded(self, clip: Clip, budget: int, row: _Row) -> Iterator[tuple[Clip, Tokens, Tensor, float, float]]:
        """The batch at a budget; clip by clip where some are too short to hold that many tokens."""
        try:
            yield clip, *self.code(clip, budget)
            return
        except ValueError:
            if len(clip) == 1:
                whole = self.code(clip, None)
                if int(whole[0].lengths[0]) >= budget:
                    raise
                note = f"clips too short for {budget} tokens are coded with all of theirs"
                row.notes += [note] if note not in row.notes else []
                yield clip, *whole
                return
        for index in range(len(clip)):
            yield from self._coded(_select(clip, index), budget, row)

    def _score(self, row: _Row, clip: Clip, recon: Tensor) -> None:
        assert clip.video is not None
        video, lengths = clip.video, clip.frames()
        row.add(
            psnr_db=clip_psnr(recon, video, lengths),
            ssim=clip_ssim(recon, video, lengths),
            tdiff_psnr_db=clip_tdiff_psnr(recon, video, lengths),
        )
        if self.lpips is not None and video.shape[1] == 3:
            there = recon.to(self.device), video.to(self.device), lengths.to(self.device)
            row.add(lpips=clip_lpips(self.lpips, *there))

    def _rate(self, row: _Row, clip: Clip, bits: Tensor, tokens: Tensor | None = None) -> None:
        assert clip.video is not None
        pixels = clip.frames() * clip.video.shape[3] * clip.video.shape[4]
        seconds = _durations(clip, self.fps)
        row.add(bits=bits, bits_per_pixel=bits / pixels, bits_per_second=bits / seconds)
        if tokens is not None:
            row.add(tokens=tokens, tokens_per_second=tokens / seconds)

    def _model_rows(self) -> list[_Row]:
        rows = [_Row(self.family, budget) for budget in self.budgets]
        sizes = tuple(self.model.codebook_sizes)
        usage = [CodebookUsage(sizes) for _ in rows] if sizes else None
        entropy, reason = self._entropy_model()
        for clip in self._batches(self.family):
            self.keys += clip.keys
            for at, (row, budget) in enumerate(zip(rows, self.budgets)):
                for part, tokens, recon, encoding, decoding in self._coded(clip, budget, row):
                    self._score(row, part, recon)
                    self._rate(row, part, tokens.bits, tokens.lengths.double())
                    each = [1.0 / len(part)] * len(part)
                    row.add(encode_s=[encoding * e for e in each], decode_s=[decoding * e for e in each])
                    if usage:
                        usage[at].update(tokens)
                    if entropy is not None:
                        row.add(entropy_bits=entropy.bits(tokens))
        for at, row in enumerate(rows):
            row.extra = usage[at].compute() if usage else {}
            if entropy is None:
                row.notes.append(f"entropy-coded bits: {reason}")
            if not sizes:
                row.notes.append("bits and usage: continuous tokens have no rate without quantization")
            if at:
                worse = row.tensor("psnr_db") < rows[at - 1].tensor("psnr_db")
                row.extra["worse_share"] = float(worse.double().mean())
            else:
                row.notes.append("worse_share: the first budget has none before it")
        return rows

    @torch.inference_mode()
    def _entropy_model(self) -> tuple[StaticModel | None, str]:
        """A static model of the training clips' ids at the largest budget, or why there is none."""
        if not self.model.codebook_sizes:
            return None, "continuous tokens have no ids"
        if self.train is None:
            return None, "no training clips to fit the static model on"
        factors = factors_of(self.model)
        ranks = StaticModel.affordable_ranks(factors, self.model.max_tokens)
        if not ranks:
            return None, f"codebooks of {self.model.codebook_sizes} without index_factors are too large for a histogram"
        self.train = self.train if hasattr(self.train, "__len__") else list(self.train)
        total, seen = len(self.train), []  # type: ignore[arg-type]
        update = self._track("ids of training clips", total)
        for done, clip in enumerate(self.train):
            seen.append(self.model.encode(clip.to(self.device).as_float()).to("cpu"))
            update(done + 1, total)
        return StaticModel.fit(seen, index_factors=factors, max_rank=ranks), ""

    # controls and codecs

    def _training_videos(self) -> Tensor | None:
        """Training clips as one uint8 [n, C, T, H, W], short ones continued with their last frame."""
        if self.train is None:
            return None
        videos = [repeat_last(clip.video, clip.lengths) for clip in self.train if clip.video is not None]
        if not videos:
            return None
        most = max(video.shape[2] for video in videos)
        return torch.cat([_to_frames(video, most) for video in videos])

    def fit_controls(self) -> None:
        """Fit every control at the rates of the budgets; a string in `controls` says why one is not there."""
        train = self._training_videos() if {"dct", "downsample"} & set(self.control_names) else None
        for name in self.control_names:
            try:
                update = self._track(f"fit {name}", None)
                self.controls[name] = fit_control(name, train, rates=self.rates.values(), progress=update)
                update(1, 1)
            except ValueError as error:
                self.controls[name] = str(error)

    def _control(self, name: str, clip: Clip, bits: float) -> tuple[Tensor, Tensor] | str:
        control = self.controls[name]
        assert clip.video is not None
        if isinstance(control, str):
            return control
        try:
            video, lengths = clip.video, clip.frames()
            shape = getattr(control, "shape", None)
            if shape is not None and video.shape[2] < shape[0]:
                video = _to_frames(repeat_last(video, lengths), shape[0])
            found = control.reconstruct(video, bits, lengths)
            return found if isinstance(found, str) else (found[0][:, :, : clip.video.shape[2]], found[1])
        except ValueError as error:
            return str(error)

    def _control_rows(self) -> list[_Row]:
        rows = []
        for name in self.control_names:
            own = getattr(self.controls[name], "own_rate", False)
            rows += [_Row(name, budget) for budget in ([None] if own else self.budgets)]
        for clip in self._batches("controls"):
            for row in rows:
                bits = math.nan if row.budget is None else self.rates[row.budget]
                found = self._control(row.method, clip, bits)
                if isinstance(found, str):
                    row.notes += [found] if found not in row.notes else []
                    row.add(psnr_db=[math.nan] * len(clip))
                    continue
                self._score(row, clip, found[0])
                self._rate(row, clip, found[1])
        for row in rows:
            control = self.controls[row.method]
            if row.budget is None:
                row.notes.append("one rate of its own" + ("" if row.method != "mean_frame" else ": the frame as a PNG"))
            elif isinstance(control, Downsample) and int(self.rates[row.budget]) in control.choice:
                row.notes.append(control.describe(self.rates[row.budget]))
        return rows

    def _codec_rows(self) -> list[_Row]:
        if not self.codec_names:
            return []
        rows = [_Row(name, budget) for name in self.codec_names for budget in self.budgets]
        if not all(math.isfinite(rate) for rate in self.rates.values()):
            for row in rows:
                row.notes.append("the tokens have no rate in bits, so there is nothing to be equal to")
            return rows
        clips: list[Clip] = []
        for batch in self.val:
            clips += [_select(batch, index) for index in range(len(batch))]
        if self.codec_clips is not None:
            clips = clips[: self.codec_clips]
        videos = []
        for clip in clips:
            assert clip.video is not None
            videos.append(clip.video[0, :, : int(clip.frames()[0])])
        if any(video.shape[0] != 3 for video in videos):
            for row in rows:
                row.notes.append("codecs encode RGB video only")
            return rows
        seconds = sum(float(_durations(clip, self.fps)[0]) for clip in clips[:1])
        fps = videos[0].shape[1] / seconds if videos and math.isfinite(seconds) else self.fps or 8.0
        rates = [self.rates[budget] for budget in self.budgets]
        for name in self.codec_names:
            try:
                points = sweep_clips(
                    videos,
                    rates,
                    codec=name,
                    fps=fps,
                    profile=self.profile,
                    processes=self.processes,
                    progress=self._track(name, len(videos)),
                )
            except CodecCrash as error:
                log.warning("%s", error)
                for row in rows:
                    row.notes += [str(error)] if row.method == name else []
                continue
            for at, row in enumerate(row for row in rows if row.method == name):
                chosen: list[Point] = [each[at] for each in points]
                for clip, point in zip(clips, chosen):
                    video = _to_frames(point.video[None], clip.video.shape[2]) if clip.video is not None else None
                    assert video is not None
                    self._score(row, clip, video)
                    self._rate(row, clip, torch.tensor([float(point.bits)], dtype=torch.float64))
                row.notes.append(describe_codec(chosen, rates[at], codec=name, profile=self.profile))
                if len(clips) < len(self.keys):
                    row.notes.append(f"the first {len(clips)} of {len(self.keys)} clips only")
        return rows

    # results

    def run(self, *, model: str = "", shards: str = "") -> dict[str, Any]:
        """Everything, as eval.json holds it: strict JSON, schema 1."""
        with self.bar:
            rows = self._model_rows()
            self.rates = {row.budget: row.mean("bits") for row in rows if row.budget is not None}
            self.fit_controls()
            rows += self._control_rows()
            rows += self._codec_rows()
        per_clip: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            # a row without budget (a rate of its own) is filed under "-"
            column = row.values.get("psnr_db", [])
            padded = [*column, *[math.nan] * (len(self.keys) - len(column))]
            per_clip.setdefault(row.method, {})["-" if row.budget is None else str(row.budget)] = padded
        result = {
            "schema": SCHEMA,
            "model": model or self.family,
            "family": self.family,
            "shards": shards,
            "clips": len(self.keys),
            "environment": environment(self.device, seed=self.seed),
            "rows": [self._finish(row) for row in rows],
            "per_clip": {"keys": self.keys, "psnr_db": per_clip},
        }
        return without_nan(result)

    def _finish(self, row: _Row) -> dict[str, Any]:
        ours = row.method == self.family
        out: dict[str, Any] = {
            "method": row.method,
            "budget": row.budget,
            "clips": int((~row.tensor("psnr_db").isnan()).sum()),
            "tokens_mean": row.mean("tokens"),
            "tokens_per_second": row.mean("tokens_per_second"),
            "bits_mean": row.mean("bits"),
            "entropy_bits_mean": row.mean("entropy_bits"),
            "bits_per_pixel": row.mean("bits_per_pixel"),
            "bits_per_second": row.mean("bits_per_second"),
            **{name: row.mean(name) for name in DISTORTIONS},
            "psnr_db_ci": bootstrap(row.tensor("psnr_db"), seed=self.seed),
            "worse_share": None,
            "encode_seconds_per_clip": row.mean("encode_s"),
            "decode_seconds_per_clip": row.mean("decode_s"),
        }
        out |= row.extra
        notes = list(row.notes)
        if not ours:
            notes.append("tokens, ids and seconds are measured for tokenizers only")
        if out["clips"]:
            if self.lpips is None:
                notes.append("lpips: no weights were given (eval.lpips_weights)")
            elif math.isnan(out["lpips"]):
                notes.append("lpips: compares RGB only")
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

    def reconstruct(self, clip: Clip) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Of a batch of one: {label: uint8 [T, H, W, C]} and {label: PSNR}, after `run`.

        Labels are token counts for the model and names for the controls, which are shown at the largest budget.
        """
        assert clip.video is not None
        frames = int(clip.frames()[0])
        videos = {}
        for budget in self.budgets:
            for _, tokens, recon, _, _ in self._coded(clip, budget, _Row("", None)):
                videos[str(int(tokens.lengths[0]))] = recon
        for name in self.controls:
            found = self._control(name, clip, self.rates[self.budgets[-1]])
            if not isinstance(found, str):
                videos[name] = found[0]
        psnr = {label: float(clip_psnr(video, clip.video, clip.frames())) for label, video in videos.items()}
        shown = {label: video[0, :, :frames].permute(1, 2, 3, 0).contiguous() for label, video in videos.items()}
        return shown, psnr


def _to_frames(video: Tensor, frames: int) -> Tensor:
    missing = frames - video.shape[2]
    return video if missing <= 0 else torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2)


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


def evaluate(model: Any, *, name: str = "", shards: str = "", **settings: Any) -> dict[str, Any]:
    """eval.json's content for one tokenizer; `settings` are those of `Evaluator`."""
    return Evaluator(model, **settings).run(model=name, shards=shards)


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows that matter, for a terminal."""
    table = Table(title=f"{result['model']}: {result['clips']} clips of {result['shards'] or 'the given set'}")
    columns = ["method", "budget", "bits_mean", "entropy_bits_mean", "bits_per_pixel", *DISTORTIONS, "worse_share"]
    columns = [name for name in columns if any(row.get(name) is not None for row in result["rows"])]
    for name in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    digits = {"bits_mean": 1, "entropy_bits_mean": 1, "bits_per_pixel": 5, "ssim": 4, "lpips": 4}
    for row in result["rows"]:
        cells = []
        for name in columns:
            value = row.get(name)
            cells.append(f"{value:.{digits.get(name, 2)}f}" if isinstance(value, float) else str(value or "-"))
        table.add_row(*cells)
    (console or Console()).print(table)


def showcase(evaluator: Evaluator, result: dict[str, Any], *, fps: float | None, each: int = 2) -> list[dict[str, Any]]:
    """The clips of a report: the worst, the best and some drawn at random, by PSNR at the largest budget."""
    scores = result["per_clip"]["psnr_db"][evaluator.family][str(evaluator.budgets[-1])]
    order = sorted(range(len(scores)), key=lambda at: scores[at])
    tags: dict[int, str] = dict.fromkeys(order[:each], "worst")
    tags |= {at: "best" for at in order[-each:] if at not in tags}
    rest = [at for at in order if at not in tags]
    draw = torch.randperm(len(rest), generator=torch.Generator().manual_seed(evaluator.seed))[:each].tolist()
    tags |= {rest[at]: "random" for at in draw}
    out, first = {}, 0
    for batch in evaluator.val:
        for index in range(len(batch)):
            at = first + index
            if at not in tags:
                continue
            clip = _select(batch, index)
            assert clip.video is not None
            videos, psnr = evaluator.reconstruct(clip)
            seconds, frames = float(_durations(clip, fps)[0]), int(clip.frames()[0])
            out[at] = {
                "key": clip.keys[0],
                "caption": (clip.text or [""])[0],
                "tags": [tags[at]],
                "fps": frames / seconds if math.isfinite(seconds) and seconds > 0 else fps or 8.0,
                "original": clip.video[0, :, :frames].permute(1, 2, 3, 0).contiguous(),
                "reconstructions": videos,
                "psnr_db": psnr,
            }
        first += len(batch)
    return [out[at] for at in tags if at in out]


def _names(text: str) -> list[str]:
    return [] if text in ("", "none") else [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtok eval", description="Measure a run or an export; writes eval.json, report.html."
    )
    parser.add_argument("model", help="run directory, export folder or Hub repository")
    parser.add_argument(
        "--shards", help="validation shards, or a folder with train/ and val/; default: those of the run"
    )
    parser.add_argument("--train-shards", help="training shards for controls and the entropy model; default: the run's")
    parser.add_argument("--budgets", help="tokens, e.g. 1,4,16; default: the run's, else 1, 4, 16 ... the maximum")
    parser.add_argument("--out", type=Path, help="where to write; default: RUN/eval, or ./eval for an export")
    parser.add_argument("--clips", type=int, help="at most this many validation clips")
    parser.add_argument("--train-clips", type=int, default=512, help="at most this many training clips (default 512)")
    parser.add_argument("--controls", help=f"comma-separated from {','.join(CONTROLS)}, or none")
    parser.add_argument("--codecs", help=f"comma-separated from {','.join(CODECS)}, or none")
    parser.add_argument("--codec-clips", type=int, help="at most this many clips through the codecs")
    parser.add_argument("--profile", default="offline", choices=("offline", "low-delay"), help="how codecs are driven")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that run codecs")
    parser.add_argument("--lpips", help="LPIPS weights; default: the run's eval.lpips_weights")
    parser.add_argument("--lpips-sha256", help="their hash")
    parser.add_argument("--batch-size", type=int, help="clips per batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--no-report", action="store_true", help="eval.json only")
    return parser


def load_model(path: str) -> tuple[Any, DataConfig, EvalConfig]:
    """A model from a run, an export or a Hub repository, and the data and eval settings it was trained with.

    An export says where its training shards were; they need not be there any more.
    """
    from vtok.loading import is_run, load, load_run

    if is_run(Path(path)):
        model, config = load_run(path)
        return model, config.data, config.eval
    model, data, settings = load(path), DataConfig(), EvalConfig()
    trained = Path(path) / "training.yaml"
    if trained.is_file():
        from omegaconf import OmegaConf

        node: Any = OmegaConf.to_container(OmegaConf.load(trained))
        data = from_dict(DataConfig, node.get("data") or {}, where=f"{trained}: data")
        settings = from_dict(EvalConfig, node.get("eval") or {}, where=f"{trained}: eval")
    return model, data, settings


def _loader(data: DataConfig, shards: str, *, clips: int | None, setting: str) -> Any:
    """Batches of the middle window and centre crop of each clip, the same for training and validation clips."""
    from vtok.data.module import view_of
    from vtok.data.pipeline import ValidationSet, make_loader
    from vtok.data.sources import open_sources

    held = ValidationSet(
        open_sources(shards, root=data.root, cache_dir=data.cache_dir, setting=setting)[0],
        view=view_of(data),
        batch_size=data.val_batch_size,
        val_clips=clips,
        cache_dir=data.cache_dir,
        max_bad_fraction=data.max_bad_fraction,
        setting=setting,
    )
    return make_loader(held, num_workers=data.num_workers)


def _resolve_shards(data: DataConfig, options: argparse.Namespace) -> tuple[str, str]:
    """(validation, training) shards; training is "" where there is none."""
    val, train = data.val_shards, data.shards
    if options.shards:
        folder = Path(options.shards)
        split = (folder / "val").is_dir() and not (folder / "index.json").is_file()
        val = str((folder / "val" if split else folder).absolute())
        if split and (folder / "train").is_dir():
            train = str((folder / "train").absolute())
    if options.train_shards:
        train = str(Path(options.train_shards).absolute())
    if not val:
        raise ValueError("there are no validation shards to measure on; name them: --shards DIR")
    return val, train


def main(argv: list[str] | None = None) -> int:
    """`vtok eval RUN_OR_EXPORT [options]`: writes eval.json and report.html, prints the table."""
    options = _parser().parse_args(argv)
    model, data, settings = load_model(options.model)
    val_shards, train_shards = _resolve_shards(data, options)
    if options.batch_size:
        data = replace(data, val_batch_size=options.batch_size)
    val = _loader(data, val_shards, clips=options.clips or data.val_clips, setting="--shards")
    train = None
    if train_shards:
        try:
            train = list(_loader(data, train_shards, clips=options.train_clips, setting="--train-shards"))
        except ValueError as error:
            if options.train_shards:
                raise
            log.warning("no training clips, so no dct, downsample and entropy coding: %s", error)
    weights = settings.lpips_weights if options.lpips is None else options.lpips
    sha256 = settings.lpips_sha256 if options.lpips_sha256 is None else options.lpips_sha256
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    budgets = [int(part) for part in _names(options.budgets)] if options.budgets else settings.budgets
    evaluator = Evaluator(
        model,
        val=val,
        train=train,
        budgets=budgets,
        controls=settings.controls if options.controls is None else _names(options.controls),
        codecs=settings.codecs if options.codecs is None else _names(options.codecs),
        lpips=load_lpips(weights, sha256) if weights else None,
        fps=data.fps,
        device=device,
        seed=options.seed,
        profile=options.profile,
        processes=options.processes,
        codec_clips=options.codec_clips,
        progress=not options.no_progress,
    )
    from vtok.loading import is_run

    source = Path(options.model)
    result = evaluator.run(model=source.name, shards=val_shards)
    out = options.out or (source / "eval" if is_run(source) else Path("eval"))
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    (out / "eval.json").write_text(text + "\n", encoding="utf-8")
    print_table(result)
    print(f"table   {out / 'eval.json'}")
    if not options.no_report:
        from vtok.report import write_report

        lines = source / "metrics.jsonl"
        history = [json.loads(line) for line in lines.read_text().splitlines() if line] if lines.is_file() else None
        clips = showcase(evaluator, result, fps=data.fps)
        print(f"report  {write_report(result, clips, out / 'report.html', history=history)}")
    return 0
