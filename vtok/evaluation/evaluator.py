"""A tokenizer at every budget, beside its controls and real codecs, on the same windows in the same run.

    1. the model over the validation clips at each budget: distortion, nominal bits, use of its codebooks
    2. a static entropy model fitted on the training clips' ids prices the validation ids; so does the export's prior;
       lengths that a model chose for itself are added to every count (`bits_of_lengths`)
    3. controls, fitted on training clips, and codecs, searched per clip, at the mean nominal bits of each budget

Every number is a mean over clips of one number per clip, but for rFVD, its proxy and rFID, which compare sets of
features. What is undefined is null, and the row's `note` says why.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.coding.entropy import StaticModel, factors_of
from vtok.coding.prior_coding import signalling_bits
from vtok.data.stems import stem_of
from vtok.evaluation.rows import SCHEMA, Row, against_codec, environment, without_nan
from vtok.layers.perceptual import LPIPS
from vtok.loading import prior_of
from vtok.metrics.bands import Bands
from vtok.metrics.codecs import CODECS, Point, Workers, sweep_clips
from vtok.metrics.codecs import describe as describe_codec
from vtok.metrics.controls import CONTROLS, Downsample, fit_control, repeat_last
from vtok.metrics.distortion import clip_lpips, clip_psnr, clip_ssim, clip_tdiff_psnr
from vtok.metrics.frechet import FeatureCache, FeatureNet, FrechetDistance
from vtok.metrics.rate import CodebookUsage
from vtok.progress import counting_bar
from vtok.types import Clip, Tokens, share, to_uint8

log = logging.getLogger(__name__)
BETWEEN = (0.5, 0.5**0.5, 2**0.5, 2.0)  # rates of a codec's curve beside the budgets', of the largest one's
COUNTED = {"bits_mean": "bits", "entropy_bits_mean": "entropy_bits", "ar_bits_mean": "ar_bits"}


def bits_of_lengths(tokens: Tokens, *, budget: int, most: int) -> Tensor:
    """[B] float64: what must be said of how many tokens each group of a clip holds, once its budget is known.

    0 where they are the even share of the budget, or `most`, all that a group has, in each: a `.vtok` file says the
    budget once, in its header, and the lengths follow. Else what its record spends on them
    (`vtok.coding.prior_coding.signalling_bits`).
    """
    bits = signalling_bits(tokens)
    for row, (group, mask) in enumerate(zip(tokens.group.cpu(), tokens.mask.cpu())):
        counts = group[mask].bincount().tolist() or [0]
        if counts == share(min(budget, most * len(counts)), len(counts)):
            bits[row] = 0
    return bits


def default_budgets(max_tokens: int) -> list[int]:
    """1, 4, 16, ... and the maximum."""
    out = []
    while (budget := 4 ** len(out)) < max_tokens:
        out.append(budget)
    return [*out, max_tokens]


def durations(clip: Clip, fps: float | None) -> Tensor:
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
        lpips, fvd, fid: networks from `load_lpips`, `load_i3d`, `load_inception`, or None.
        fps: frames per second of the clips where they do not say.
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
        fvd: FeatureNet | None = None,
        fid: FeatureNet | None = None,
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
        self.val = val if hasattr(val, "__len__") else list(val)
        self.budgets = (
            sorted({int(budget) for budget in budgets}) or self._menu(model) or default_budgets(model.max_tokens)
        )
        for name, given, choices in (("controls", controls, CONTROLS), ("codecs", codecs, tuple(CODECS))):
            unknown = [each for each in given if each not in choices]
            if unknown:
                raise ValueError(f"eval.{name}={unknown} unknown; choose from {', '.join(choices)}")
        if self.budgets[0] < 1:
            raise ValueError(f"eval.budgets={self.budgets}: a budget is at least one token")
        menu = self._menu(model)
        if menu and (wrong := [budget for budget in self.budgets if budget not in menu]):
            raise ValueError(
                f"eval.budgets={wrong}: the tokens of this model are a grid, of {', '.join(map(str, menu))} tokens for "
                "these clips; ask for one of these numbers, or leave eval.budgets empty"
            )
        self.menu = menu
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.family = str(model.config.name).rpartition(".")[2]
        self.train = train
        self.control_names, self.codec_names = list(controls), list(codecs)
        self.lpips = lpips.to(self.device) if lpips is not None else None
        given = {"rfvd": fvd, "rfid": fid, "rfvd_proxy": Bands()}
        # features of originals are computed once for all rows
        self.frechet = {name: FeatureCache(net.to(self.device)) for name, net in given.items() if net is not None}
        nets = {name: cache.net for name, cache in self.frechet.items() if not cache.net.weightless}
        self.weights = {name: {"sha256": net.sha256, "features": net.about} for name, net in nets.items()}
        self.fps, self.seed, self.profile = fps, seed, profile
        self.processes, self.codec_clips = processes, codec_clips
        self.bar = counting_bar(show=progress)
        self.keys: list[str] = []
        self.videos: list[str] = []  # of each, the one it was cut from
        self.rates: dict[int, float] = {}
        self.controls: dict[str, Any] = {}
        self.against_codecs: list[dict[str, Any]] = []

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

    def _menu(self, model: Any) -> list[int]:
        """The budgets there are, where tokens are a grid: of the longest clip. Empty for nested tokens."""
        if not hasattr(model, "token_counts"):
            return []
        longest, size = 1, None
        for clip in self.val:
            assert clip.video is not None
            longest, size = max(longest, int(clip.frames().max())), tuple(clip.video.shape[3:])
        return model.token_counts(longest, size)

    def _on_grid(self, clip: Clip, budget: int, row: Row) -> Iterator[tuple[Clip, Tokens, Tensor, float, float]]:
        """The batch at a level of its grid; clip by clip where lengths, and with them token counts, differ."""
        assert clip.video is not None
        lengths = clip.frames()
        if int(lengths.min()) < int(lengths.max()):
            for index in range(len(clip)):
                yield from self._on_grid(clip.rows(slice(index, index + 1)), budget, row)
            return
        counts = self.model.token_counts(int(lengths[0]), tuple(clip.video.shape[3:]))
        here = counts[self.menu.index(budget)]
        note = "clips of fewer frames have fewer tokens"
        if here != budget and note not in row.notes:
            row.notes.append(note)
        yield clip, *self.code(clip, here)

    def _coded(self, clip: Clip, budget: int, row: Row) -> Iterator[tuple[Clip, Tokens, Tensor, float, float]]:
        """The batch at a budget; clip by clip where some are too short to hold that many tokens."""
        if self.menu:
            yield from self._on_grid(clip, budget, row)
            return
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
            yield from self._coded(clip.rows(slice(index, index + 1)), budget, row)

    def _score(self, row: Row, clip: Clip, recon: Tensor) -> None:
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
        for name, cache in self.frechet.items() if video.shape[1] == 3 else ():
            if name not in row.frechet:
                row.frechet[name] = FrechetDistance(cache.net, cache=cache)
            row.frechet[name].update(recon, video, lengths)

    def _rate(self, row: Row, clip: Clip, bits: Tensor, tokens: Tensor | None = None) -> None:
        assert clip.video is not None
        pixels = clip.frames() * clip.video.shape[3] * clip.video.shape[4]
        seconds = durations(clip, self.fps)
        row.add(bits=bits, bits_per_pixel=bits / pixels, bits_per_second=bits / seconds)
        if tokens is not None:
            row.add(tokens=tokens, tokens_per_second=tokens / seconds)

    def _bits_of_lengths(self, tokens: Tokens, budget: int) -> Tensor:
        if self.menu or not tokens.codebook_sizes:  # a grid's lengths are the budget's; continuous tokens have no rate
            return torch.zeros(len(tokens.lengths), dtype=torch.float64)
        most = getattr(self.model, "num_tokens", self.model.max_tokens)
        return bits_of_lengths(tokens, budget=budget, most=most)

    def _model_rows(self) -> list[Row]:
        rows = [Row(self.family, budget) for budget in self.budgets]
        sizes = tuple(self.model.codebook_sizes)
        usage = [CodebookUsage(sizes) for _ in rows] if sizes else None
        entropy, reason = self._entropy_model()
        prior = prior_of(self.model)
        for clip in self._batches(self.family):
            self.keys += clip.keys
            self.videos += clip.sources or [stem_of(key) for key in clip.keys]
            for at, (row, budget) in enumerate(zip(rows, self.budgets)):
                for part, tokens, recon, encoding, decoding in self._coded(clip, budget, row):
                    self._score(row, part, recon)
                    told = self._bits_of_lengths(tokens, budget)
                    self._rate(row, part, tokens.bits + told, tokens.lengths.double())
                    each = [1.0 / len(part)] * len(part)
                    row.add(encode_s=[encoding * e for e in each], decode_s=[decoding * e for e in each])
                    if usage:
                        usage[at].update(tokens)
                    if sizes:
                        row.add(signalling_bits=signalling_bits(tokens))
                    if entropy is not None:
                        row.add(entropy_bits=entropy.bits(tokens) + told)
                    if prior is not None:
                        row.add(ar_bits=prior.bits(tokens) + told)
        for at, row in enumerate(rows):
            row.extra = usage[at].compute() if usage else {}
            row.settle()
            if entropy is None:
                row.notes.append(f"entropy-coded bits: {reason}")
            if sizes and prior is None:
                row.notes.append("bits under a prior: the model has none (vtok prior)")
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

    def _control_rows(self) -> list[Row]:
        rows = []
        for name in self.control_names:
            own = getattr(self.controls[name], "own_rate", False)
            rows += [Row(name, budget) for budget in ([None] if own else self.budgets)]
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
            row.settle()
            control = self.controls[row.method]
            if row.budget is None:
                row.notes.append("one rate of its own" + ("" if row.method != "mean_frame" else ": the frame as a PNG"))
            elif isinstance(control, Downsample) and int(self.rates[row.budget]) in control.choice:
                row.notes.append(control.describe(self.rates[row.budget]))
        return rows

    def _codec_rows(self, models: list[Row]) -> list[Row]:
        if not self.codec_names:
            return []
        rows = [Row(name, budget) for name in self.codec_names for budget in self.budgets]
        if not all(math.isfinite(rate) for rate in self.rates.values()):
            for row in rows:
                row.notes.append("the tokens have no rate in bits, so there is nothing to be equal to")
            return rows
        clips: list[Clip] = []
        for batch in self.val:
            clips += [batch.rows(slice(index, index + 1)) for index in range(len(batch))]
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
        seconds = sum(float(durations(clip, self.fps)[0]) for clip in clips[:1])
        fps = videos[0].shape[1] / seconds if videos and math.isfinite(seconds) else self.fps or 8.0
        rates = [self.rates[budget] for budget in self.budgets]
        between = [rates[-1] * factor for factor in BETWEEN]
        with Workers(min(self.processes, len(videos))) as workers:
            for name in self.codec_names:
                points = sweep_clips(
                    videos,
                    rates,
                    codec=name,
                    workers=workers,
                    more_rates=between,
                    fps=fps,
                    profile=self.profile,
                    progress=self._track(name, len(videos)),
                )
                for at, row in enumerate(row for row in rows if row.method == name):
                    self._codec_row(row, clips, [None if each is None else each[at] for each in points], rates[at])
                self._compare(name, points, models)
        return rows

    def _compare(self, codec: str, points: list[list[Point] | None], models: list[Row]) -> None:
        """The codec's curve beside the tokenizer's, both means over the clips that the codec coded."""
        coded = [at for at, each in enumerate(points) if each is not None]
        each_rate = list(zip(*(each for each in points if each is not None)))
        curve = [
            (sum(p.bits for p in column) / len(coded), sum(p.psnr_db for p in column) / len(coded))
            for column in each_rate
        ]
        if not curve:
            return
        ours: dict[str, list[tuple[int, float, float]]] = {}
        for key, column in COUNTED.items():
            for row in models:
                if column in row.values and row.budget is not None:
                    bits, psnr = (float(row.tensor(name)[coded].mean()) for name in (column, "psnr_db"))
                    ours.setdefault(key, []).append((row.budget, bits, psnr))
        self.against_codecs += against_codec(codec, curve, ours)

    def _codec_row(self, row: Row, clips: list[Clip], points: list[Point | None], rate: float) -> None:
        """Scores of one codec at one rate; None is a clip that crashed it."""
        for clip, point in zip(clips, points):
            if point is None:
                row.add(psnr_db=[math.nan])
                continue
            assert clip.video is not None
            self._score(row, clip, _to_frames(point.video[None], clip.video.shape[2]))
            self._rate(row, clip, torch.tensor([float(point.bits)], dtype=torch.float64))
        row.settle()
        measured = [point for point in points if point is not None]
        row.extra["below_floor"] = sum(not p.fits for p in measured) / len(measured) if measured else None
        row.notes.append(describe_codec(points, rate, codec=row.method, profile=self.profile))
        if len(clips) < len(self.keys):
            row.notes.append(f"the first {len(clips)} of {len(self.keys)} clips only")

    # results

    def run(self, *, model: str = "", shards: str = "") -> dict[str, Any]:
        """Everything, as eval.json holds it: strict JSON, schema 1."""
        with self.bar:
            models = self._model_rows()
            rows = list(models)
            self.rates = {row.budget: row.mean("bits") for row in rows if row.budget is not None}
            self.fit_controls()
            rows += self._control_rows()
            rows += self._codec_rows(models)
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
            "weights": self.weights,
            "environment": environment(self.device, seed=self.seed),
            "rows": [
                row.finish(
                    ours=row.method == self.family,
                    lpips=self.lpips is not None,
                    seed=self.seed,
                    frechet=tuple(self.frechet),
                )
                for row in rows
            ],
            "against_codecs": self.against_codecs,
            "per_clip": {"keys": self.keys, "videos": self.videos, "psnr_db": per_clip},
        }
        return without_nan(result)

    def reconstruct(self, clip: Clip) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Of a batch of one: {label: uint8 [T, H, W, C]} and {label: PSNR}, after `run`.

        Labels are token counts for the model and names for the controls, which are shown at the largest budget.
        """
        assert clip.video is not None
        frames = int(clip.frames()[0])
        videos = {}
        for budget in self.budgets:
            for _, tokens, recon, _, _ in self._coded(clip, budget, Row("", None)):
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
