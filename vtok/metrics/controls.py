"""Training-free controls: what a tokenizer must beat at the same bits on the same windows to be worth its tokens.

Letters: B clips, C = 3 channels, T frames, H height, W width. Videos are uint8 RGB [B, 3, T, H, W].

    dct          3D DCT of the whole clip in YCbCr; the coefficients that vary most, each as one of 8 levels
    downsample   fewer frames, rows, columns and levels; area down, trilinear up
    mean_colour  one 5-6-5 colour for the whole clip, 16 bits
    mean_frame   the mean frame, repeated; its own bits, those of the frame as a PNG

Every statistic (orders, levels, sizes) comes from training clips, never from the clips that are scored, and is held to
be known to the decoder, as a tokenizer's weights are. Each control answers

    reconstruct(video, bits, lengths) -> (uint8 video, bits used [B]), or a string: why there is nothing at that rate

and never uses more than the bits it was given (`mean_colour` and `mean_frame` have a rate of their own: `own_rate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import torch
import torch.nn.functional as F
from torch import Tensor

# BT.601 luma and chroma of full-range RGB, written as differences so that any level maps back to itself
_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_RGB = torch.linalg.inv(_YCC)
_PLANE_GAIN = _RGB.norm(dim=0)  # RGB error that an error of 1 in Y, Cb or Cr becomes
# Step, in standard deviations, of the uniform quantizer of 2^b levels with the least error on a Gaussian
# (Max 1960, Quantizing for minimum distortion, IRE Trans. IT-6, table II)
_GAUSS_STEP = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
_BATCH = 16  # clips transformed at once: bounds memory

Reconstruction = tuple[Tensor, Tensor] | str


def repeat_last(video: Tensor, lengths: Tensor | None) -> Tensor:
    """The video with every padding frame replaced by the clip's last real one, so that padding is cheap to code."""
    if lengths is None:
        return video
    index = torch.minimum(torch.arange(video.shape[2], device=video.device), lengths[:, None].to(video.device) - 1)
    return video.gather(2, index[:, None, :, None, None].expand_as(video))


def _check(video: Tensor, shape: Sequence[int] | None, name: str) -> None:
    if video.ndim != 5 or video.shape[1] != 3 or video.dtype != torch.uint8:
        raise ValueError(f"{name} works on uint8 RGB [B, 3, T, H, W], got {video.dtype} {list(video.shape)}")
    if shape is not None and tuple(video.shape[2:]) != tuple(shape):
        raise ValueError(
            f"{name} was fitted on clips of T, H, W = {tuple(shape)}, this one has {tuple(video.shape[2:])}; "
            f"evaluate windows of one size (data.num_frames, data.size)"
        )


def _levels(video: Tensor) -> Tensor:
    return video.round().clamp_(0, 255).to(torch.uint8)


def _mix(matrix: Tensor, video: Tensor) -> Tensor:
    return torch.einsum("ij,bj...->bi...", matrix.to(video), video)


def dct_matrix(n: int) -> Tensor:
    """[n, n] float32 orthonormal DCT-II: row k is the basis function of frequency k."""
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (x + 0.5) * k / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.float()


def _along(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """`matrix` [m, n] applied to dimension `dim` of x. One axis at a time: one einsum over all three is 100x slower."""
    if dim == x.ndim - 1:
        return x @ matrix.T.to(x)
    return (matrix.to(x) @ x.flatten(dim + 1)).unflatten(-1, x.shape[dim + 1 :])


def lloyd_max(values: Tensor, levels: int, *, steps: int = 40) -> Tensor:
    """[levels, N] reconstruction levels of least squared error for each column of values [n, N].

    Lloyd 1982, Least squares quantization in PCM, IEEE Trans. IT-28(2): from the quantiles, `steps` alternations of
    nearest level and mean. A level nothing falls on stays where it is.
    """
    share = (torch.arange(levels, device=values.device) + 0.5) / levels
    table = torch.quantile(values, share.to(values), dim=0)
    for _ in range(steps):
        nearest = nearest_level(values, table)
        count = torch.zeros_like(table).scatter_add_(0, nearest, torch.ones_like(values))
        total = torch.zeros_like(table).scatter_add_(0, nearest, values)
        table = torch.where(count > 0, total / count.clamp(min=1), table)
    return table


def nearest_level(values: Tensor, table: Tensor) -> Tensor:
    """[n, N] index of the level of table [levels, N] (ascending in each column) that is nearest to each value."""
    middle = (table[1:] + table[:-1]) / 2
    out = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for boundary in middle:
        out += values > boundary
    return out


class DCT:
    """The classical transform code: 3D orthonormal DCT-II of the clip, leading coefficients in order of variance.

    Planes are Y, Cb, Cr scaled by what their errors cost in RGB, so that variance is RGB squared error. A rate buys
    n = floor(bits / 3) coefficients, each sent as one of 8 levels; the others are put at their training mean. The
    levels are each coefficient's own Lloyd-Max levels on the training clips: the strongest form of "8 levels" (on
    real clips at 340 coefficients 0.2 dB above the best uniform step, also chosen per coefficient on training clips).

    Args:
        train: uint8 [n, 3, T, H, W] training clips of one shape.
        max_bits: the largest rate that will be asked.
        progress: called with (done, total) clips.
    """

    name = "dct"
    own_rate = False
    level_bits = 3

    def __init__(self, train: Tensor, *, max_bits: float, progress: Callable[[int, int], None] | None = None) -> None:
        _check(train, None, self.name)
        if len(train) < 2:
            raise ValueError(f"dct orders coefficients by their variance over training clips, got {len(train)} clip(s)")
        self.shape = tuple(train.shape[2:])
        self.bases = [dct_matrix(n) for n in self.shape]
        size = 3 * math.prod(self.shape)
        first = torch.zeros(size, dtype=torch.float64)
        second = torch.zeros(size, dtype=torch.float64)
        parts = train.split(_BATCH)
        for done, part in enumerate(parts):
            coefficients = self._forward(part).double()
            first += coefficients.sum(0)
            second += coefficients.square().sum(0)
            if progress:
                progress(done + 1, 2 * len(parts))
        mean = first / len(train)
        self.mean = mean.float()
        count = min(int(max_bits // self.level_bits), size)
        self.order = (second / len(train) - mean.square()).argsort(descending=True, stable=True)[:count]
        chosen = []
        for done, part in enumerate(parts):
            chosen.append(self._forward(part)[:, self.order])
            if progress:
                progress(len(parts) + done + 1, 2 * len(parts))
        self.table = lloyd_max(torch.cat(chosen), 1 << self.level_bits)  # [8, count]

    def _forward(self, video: Tensor) -> Tensor:
        x = _mix(_YCC, video.float()) * _PLANE_GAIN.view(1, 3, 1, 1, 1)
        for dim, basis in enumerate(self.bases):
            x = _along(basis, x, dim + 2)
        return x.flatten(1)

    def _inverse(self, coefficients: Tensor) -> Tensor:
        x = coefficients.view(-1, 3, *self.shape)
        for dim, basis in enumerate(self.bases):
            x = _along(basis.T, x, dim + 2)
        return _mix(_RGB, x / _PLANE_GAIN.view(1, 3, 1, 1, 1))

    def reconstruct(self, video: Tensor, bits: float, lengths: Tensor | None = None) -> Reconstruction:
        """The clip from its floor(bits / 3) leading coefficients; see the head of the module."""
        _check(video, self.shape, self.name)
        count = int(bits // self.level_bits)
        if count < 1:
            return f"{bits:g} bits do not pay for one coefficient of {self.level_bits} bits"
        if count > len(self.order) and len(self.order) < 3 * math.prod(self.shape):
            raise ValueError(f"dct was fitted for max_bits={self.level_bits * len(self.order)}, asked for {bits:g}")
        count = min(count, len(self.order))
        order, table = self.order[:count], self.table[:, :count]
        out = []
        for part in repeat_last(video, lengths).split(_BATCH):
            levels = nearest_level(self._forward(part)[:, order], table)
            kept = self.mean.expand(len(part), -1).clone()
            kept[:, order] = table.gather(0, levels)
            out.append(_levels(self._inverse(kept)))
        return torch.cat(out), torch.full((len(video),), float(self.level_bits * count), dtype=torch.float64)


def area_matrix(size: int, to: int) -> Tensor:
    """[to, size] float32: row i averages the i-th of `to` equal stretches of `size` samples, split samples by share."""
    edges = torch.arange(to + 1, dtype=torch.float64) * size / to
    sample = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], sample + 1) - torch.maximum(edges[:-1, None], sample)
    return (overlap.clamp(min=0) * to / size).float()


def linear_matrix(size: int, to: int) -> Tensor:
    """[to, size] float32: linear interpolation from `size` to `to` samples, edges held (align_corners=False)."""
    eye = torch.eye(size)[:, None]  # each unit vector, interpolated, is a column
    return F.interpolate(eye, size=to, mode="linear", align_corners=False)[:, 0].T.contiguous()


@dataclass(frozen=True)
class Grid:
    """One way to spend bits by downsampling: `frames` x `rows` x `columns` samples a plane, each of `depth` bits.

    colour: "rgb", "ycbcr", or "ycbcr420" (chroma at half the rows and columns, rounded up).
    """

    frames: int
    rows: int
    columns: int
    depth: int
    colour: str

    def planes(self) -> list[tuple[int, int, int]]:
        """(frames, rows, columns) of each of the three planes."""
        luma = (self.frames, self.rows, self.columns)
        chroma = (self.frames, -(-self.rows // 2), -(-self.columns // 2)) if self.colour == "ycbcr420" else luma
        return [luma, chroma, chroma]

    @property
    def bits(self) -> int:
        return self.depth * sum(math.prod(plane) for plane in self.planes())


COLOURS = ("rgb", "ycbcr", "ycbcr420")


def grid_candidates(bits: float, shape: Sequence[int], *, stretch: float = 1.25) -> list[Grid]:
    """Every grid that fits in `bits`, has no room for one more frame and uses most of the bits.

    stretch: how much the samples' aspect ratio may differ from the pixels'. Of each colour space and depth, grids that
    leave more than a tenth of the bits unused are passed over where there are others.
    """
    frames, height, width = shape
    out: list[Grid] = []
    for colour in COLOURS:
        for depth in range(1, 9):
            fits = []
            for rows in range(1, height + 1):
                ideal = rows * width / height
                low, high = max(1, math.floor(ideal / stretch)), min(width, math.ceil(ideal * stretch))
                for columns in range(low, high + 1):
                    per_frame = Grid(1, rows, columns, depth, colour).bits
                    if per_frame > bits:
                        break
                    fits.append(Grid(min(frames, int(bits // per_frame)), rows, columns, depth, colour))
            out += [grid for grid in fits if grid.bits >= 0.9 * bits] or fits
    return out


@dataclass(frozen=True)
class _Quantizer:
    """Uniform levels over [low, high], reconstructed in the middle of their cells."""

    low: float
    high: float
    depth: int

    @classmethod
    def fit(cls, values: Tensor, depth: int) -> _Quantizer:
        """The Gaussian optimum for the values' mean and spread, kept inside their range."""
        half = _GAUSS_STEP[depth - 1] * 2 ** (depth - 1) * float(values.std(correction=0))
        mean, low, high = float(values.mean()), float(values.min()), float(values.max())
        low, high = max(low, mean - half), min(high, mean + half)
        return cls(low, max(high, low + 1e-3), depth)

    def __call__(self, values: Tensor) -> Tensor:
        step = (self.high - self.low) / (1 << self.depth)
        index = ((values - self.low) / step).floor().clamp(0, (1 << self.depth) - 1)
        return self.low + (index + 0.5) * step


class Downsample:
    """Fewer samples of fewer levels: the best grid for each rate, chosen on training clips.

    Every grid that fits in the bits (`grid_candidates`) is scored on at most 24 training clips by the squared error of
    its planes, weighted by what they cost in RGB; the best six are then run in full on at most 64 and the one with
    the highest mean PSNR is kept. Each plane's levels are uniform over the range its samples have in training.

    Args:
        train: uint8 [n, 3, T, H, W] training clips of one shape.
        rates: the bits per clip that will be asked.
        progress: called with (done, total) steps.
    """

    name = "downsample"
    own_rate = False

    def __init__(
        self, train: Tensor, *, rates: Sequence[float], progress: Callable[[int, int], None] | None = None
    ) -> None:
        _check(train, None, self.name)
        if not len(train):
            raise ValueError("downsample chooses its grid on training clips, got none")
        self.shape = tuple(train.shape[2:])

        def spread(count: int) -> Tensor:
            return train[torch.linspace(0, len(train) - 1, min(count, len(train))).round().long()]

        rgb = spread(64).float() - 127.5
        ycc = _mix(_YCC, rgb)
        self.choice: dict[int, tuple[Grid, list[_Quantizer]]] = {}
        candidates = {int(rate): grid_candidates(int(rate), self.shape) for rate in rates}
        errors = self._plane_errors(spread(24), candidates, progress)
        for rate, grids in candidates.items():
            ranked = sorted(grids, key=lambda grid: (self._predicted(grid, errors), grid.bits))[:6]
            best = None
            for grid in ranked:
                planes = rgb if grid.colour == "rgb" else ycc
                quantizers = [_Quantizer.fit(self._down(planes, grid, plane), grid.depth) for plane in range(3)]
                score = float(_mean_psnr(self._run(planes, grid, quantizers), rgb))
                if best is None or score > best[0]:
                    best = score, grid, quantizers
            if best is not None:
                self.choice[rate] = best[1:]

    def _plane_errors(
        self, clips: Tensor, candidates: dict[int, list[Grid]], progress: Callable[[int, int], None] | None
    ) -> dict[tuple[int, int, int, int], Tensor]:
        """{(frames, rows, columns, depth): [6] squared errors of the planes R, G, B, Y, Cb, Cr}.

        |x - U q|^2 = |x|^2 - 2 <U^T x, q> + <q, U^T U q> needs the upsampling U on small grids only, which makes a
        search over thousands of grids affordable.
        """
        wanted: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for grids in candidates.values():
            for grid in grids:
                for frames, rows, columns in set(grid.planes()):
                    wanted.setdefault((columns, rows), set()).add((frames, grid.depth))
        rgb = clips.float() - 127.5
        planes = torch.cat([rgb, _mix(_YCC, rgb)], 1)  # [n, 6, T, H, W]; centred: the formula subtracts large numbers
        energy = planes.double().square().sum((0, 2, 3, 4))
        frames, height, width = self.shape
        out: dict[tuple[int, int, int, int], Tensor] = {}
        last, by_column = 0, (planes, planes)
        for done, (columns, rows) in enumerate(sorted(wanted)):
            if columns != last:
                up = linear_matrix(columns, width)
                by_column = planes @ area_matrix(width, columns).T, planes @ up
                last = columns
            up_w, up_h = linear_matrix(columns, width), linear_matrix(rows, height)
            down = _along(area_matrix(height, rows), by_column[0], 3)  # [n, 6, T, rows, columns]
            back = _along(up_h.T, by_column[1], 3)
            gram_w, gram_h = up_w.T @ up_w, up_h.T @ up_h
            for count in sorted({number for number, _ in wanted[columns, rows]}):
                up_t = linear_matrix(count, frames)
                small = _along(area_matrix(frames, count), down, 2)
                target = _along(up_t.T, back, 2)
                for depth in sorted(depth for number, depth in wanted[columns, rows] if number == count):
                    sent = torch.stack([_Quantizer.fit(small[:, p], depth)(small[:, p]) for p in range(6)], 1)
                    spread = _along(up_t.T @ up_t, _along(gram_h, _along(gram_w, sent, 4), 3), 2)
                    inner = ((spread - 2 * target) * sent).double().sum((0, 2, 3, 4))
                    out[count, rows, columns, depth] = energy + inner
            if progress:
                progress(done + 1, len(wanted))
        return out

    @staticmethod
    def _predicted(grid: Grid, errors: dict[tuple[int, int, int, int], Tensor]) -> float:
        at = 0 if grid.colour == "rgb" else 3
        weight = torch.ones(3) if grid.colour == "rgb" else _PLANE_GAIN.square()
        return sum(
            float(errors[*plane, grid.depth][at + i]) * float(weight[i]) for i, plane in enumerate(grid.planes())
        )

    def _down(self, planes: Tensor, grid: Grid, plane: int) -> Tensor:
        x = planes[:, plane]
        for dim in (2, 1, 0):  # columns first: a plain matrix product leaves little for the others
            x = _along(area_matrix(self.shape[dim], grid.planes()[plane][dim]), x, dim + 1)
        return x

    def _run(self, planes: Tensor, grid: Grid, quantizers: list[_Quantizer]) -> Tensor:
        """Centred RGB [B, 3, T, H, W] from centred planes of the grid's colour space."""
        out = []
        for plane in range(3):
            x = quantizers[plane](self._down(planes, grid, plane))
            for dim in (0, 1, 2):
                x = _along(linear_matrix(grid.planes()[plane][dim], self.shape[dim]), x, dim + 1)
            out.append(x)
        x = torch.stack(out, 1)
        return (x if grid.colour == "rgb" else _mix(_RGB, x)).clamp_(-127.5, 127.5)

    def reconstruct(self, video: Tensor, bits: float, lengths: Tensor | None = None) -> Reconstruction:
        """The clip through the grid chosen for this rate; see the head of the module."""
        _check(video, self.shape, self.name)
        chosen = self.choice.get(int(bits))
        if chosen is None:
            if not grid_candidates(int(bits), self.shape):
                return f"{bits:g} bits do not pay for one sample of three planes"
            raise ValueError(f"downsample was fitted for {sorted(self.choice)} bits, asked for {bits:g}")
        parts = []
        for part in repeat_last(video, lengths).split(_BATCH):
            planes = part.float() - 127.5
            planes = planes if chosen[0].colour == "rgb" else _mix(_YCC, planes)
            parts.append(_levels(self._run(planes, *chosen) + 127.5))
        return torch.cat(parts), torch.full((len(video),), float(chosen[0].bits), dtype=torch.float64)

    def describe(self, bits: float) -> str:
        """The grid chosen for a rate, in words."""
        grid = self.choice[int(bits)][0]
        size = f"{grid.frames}x{grid.rows}x{grid.columns} samples of {grid.depth} bit(s)"
        return f"{size}, {grid.colour}{', chroma at half size' if grid.colour == 'ycbcr420' else ''}"


def _mean_psnr(recon: Tensor, target: Tensor) -> Tensor:
    mse = (recon - target).square().mean((1, 2, 3, 4)).clamp(min=1e-6)
    return (10 * torch.log10(255**2 / mse)).mean()


def _frame_mask(video: Tensor, lengths: Tensor | None) -> Tensor:
    frames = torch.arange(video.shape[2], device=video.device)
    if lengths is None:
        return torch.ones(len(video), video.shape[2], dtype=torch.float64, device=video.device)
    return (frames < lengths[:, None].to(video.device)).double()


class MeanColour:
    """The clip's mean colour over its real frames, in 5-6-5 bits: 16 bits a clip, whatever is asked."""

    name = "mean_colour"
    own_rate = True
    depths = (5, 6, 5)

    def reconstruct(self, video: Tensor, bits: float = math.nan, lengths: Tensor | None = None) -> Reconstruction:
        """One colour everywhere; `bits` is not looked at."""
        _check(video, None, self.name)
        weight = _frame_mask(video, lengths)
        per_frame = video.double().mean((3, 4))  # [B, 3, T]
        colour = (per_frame * weight[:, None]).sum(2) / weight.sum(1)[:, None]
        top = torch.tensor([(1 << depth) - 1 for depth in self.depths], dtype=torch.float64, device=video.device)
        sent = (colour * top / 255).round() * 255 / top
        used = torch.full((len(video),), float(sum(self.depths)), dtype=torch.float64)
        return _levels(sent)[:, :, None, None, None].expand_as(video).contiguous(), used


def png_bits(frame: Tensor) -> int:
    """Bits of a uint8 [3, H, W] frame as a PNG file."""
    height, width = frame.shape[1:]
    codec = av.CodecContext.create("png", "w")
    assert isinstance(codec, av.VideoCodecContext)
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "rgb24", Fraction(1)
    codec.options = {"pred": "mixed"}
    picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().cpu().numpy(), format="rgb24")
    return 8 * sum(packet.size for packet in [*codec.encode(picture), *codec.encode(None)])


class MeanFrame:
    """The mean of the clip's real frames at 8 bits a channel, repeated; its bits are those of that frame as a PNG.

    Not at the tokenizer's rate: it says how much of the clip stands still.
    """

    name = "mean_frame"
    own_rate = True

    def reconstruct(self, video: Tensor, bits: float = math.nan, lengths: Tensor | None = None) -> Reconstruction:
        """The mean frame at every time; `bits` is not looked at."""
        _check(video, None, self.name)
        weight = _frame_mask(video, lengths)
        frame = torch.einsum("bcthw,bt->bchw", video.double(), weight) / weight.sum(1).view(-1, 1, 1, 1)
        frame = _levels(frame)
        used = torch.tensor([png_bits(each) for each in frame], dtype=torch.float64)
        return frame[:, :, None].expand_as(video).contiguous(), used


CONTROLS = ("dct", "downsample", "mean_colour", "mean_frame")


def fit_control(
    name: str,
    train: Tensor | None,
    *,
    rates: Iterable[float],
    progress: Callable[[int, int], None] | None = None,
) -> DCT | Downsample | MeanColour | MeanFrame | str:
    """A control ready to reconstruct at `rates` bits per clip, or a string: why it cannot be measured here.

    Raises: ValueError naming the choices for an unknown name.
    """
    if name not in CONTROLS:
        raise ValueError(f"controls: {name!r} is unknown; choose from {', '.join(CONTROLS)}")
    if name == "mean_colour":
        return MeanColour()
    if name == "mean_frame":
        return MeanFrame()
    rates = sorted({rate for rate in rates if math.isfinite(rate) and rate > 0})
    if not rates:
        return "the tokens have no rate in bits, so there is nothing to be equal to"
    if train is None or len(train) < 2:
        return "needs training clips for its statistics, and none were given"
    if name == "dct":
        return DCT(train, max_bits=rates[-1], progress=progress)
    return Downsample(train, rates=rates, progress=progress)
