"""A nested transform code whose tokens are FSQ tokens: what a tokenizer is worth before it has learned anything.

    video --analyse--> coefficients [B, M] --encode--> z [B, K, Q] --(FSQ)--> values [B, K, Q] in [-1, 1]
      ^                     ^  unit variance, most important first                 |
      |                     '-- + a network's correction `delta`                   |
      '--synthesise-- coefficients, known [B, M] <--dequantize---------------------'   (decode = both)

Four parts, all fitted by `fit` in one pass over training clips (2 to 4 are `vtok.layers.refinement`):

1. Transform: the 3D cosine transform of the whole clip over an orthonormal opponent-colour axis, then a rotation of
   the strongest coefficients (the Karhunen-Loeve transform of their covariance, taken symmetric under mirroring and
   time reversal, which removes half of its noise). The basis is evaluated on each clip's own number of frames and
   on any frame size, and coefficients are means over pixels, so that one fit serves every size.
2. Successive refinement: a level count is split into its prime factors (8 = 2 x 2 x 2), each factor is a symbol, and
   every symbol in nesting order goes to the coefficient whose expected distortion it lowers most. A coefficient that
   was given symbols of n_1, n_2 ... values has n_1 n_2 ... cells: important ones are refined again and again. This is
   reverse water-filling for a code of fixed rate (Equitz and Cover 1991, https://doi.org/10.1109/18.75242).
3. Companding: cells are equal steps of sigmoid(x / (1.6 s)), FSQ's own tanh bound, where s is the scale of a logistic
   distribution. Measured on natural clips it fits the first coefficients better than a Laplacian or a Gaussian does.
4. Decoding: a cell's conditional mean under that distribution, in closed form for every number of cells, so any prefix
   of the tokens gives a decoder's best guess; what no token has reached is at its mean.

Finite scalar quantization: Mentzer et al. 2023, https://arxiv.org/abs/2309.15505.

Letters: B batch, C channels, T frames, H height, W width, K tokens, Q dimensions of a token, S symbols of a clip (over
all tokens), M coefficients in the code, P of them rotated, F frequencies of the cosine transform.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.refinement import (
    COMPANDER,
    LOGISTIC_STD,
    Symbols,
    allocate,
    cell_mean,
    distortion,
    fsq_level,
    fsq_preimage,
    symbols_of,
)
from vtok.types import ShapeError

_CANDIDATES = 4  # times P: cosine coefficients whose covariance is gathered, before the P strongest are known
# Worth of the prior, in clips: the parametric spectrum, and the diagonal of the covariance
_PRIOR_SPECTRUM, _PRIOR_DIAGONAL = 1.0, 20.0


def cosine_basis(num: int, lengths: Tensor, count: int) -> Tensor:
    """Cosine basis of clips with their own lengths: [B, num, count] float32, 0 past a length.

    phi_k(n) = sqrt(2) cos(pi k (n + 1/2) / length), phi_0 = 1: orthonormal under the mean over a clip's samples.
    Frequencies that a clip of this length cannot hold (k >= length) are 0 too.
    """
    k = torch.arange(num, device=lengths.device)
    n = torch.arange(count, device=lengths.device)
    angle = math.pi * k[:, None] * (n + 0.5) / lengths[:, None, None]  # [B, num, count]
    basis = torch.cos(angle) * torch.where(k == 0, 1.0, math.sqrt(2.0))[:, None]
    real = (n < lengths[:, None])[:, None, :] & (k < lengths[:, None])[:, :, None]
    return basis.float() * real


def _axis(num: int, size: int, device: torch.device) -> Tensor:
    """[num, size]: `cosine_basis` of an axis that every clip of a batch shares."""
    return cosine_basis(num, torch.tensor([size], device=device), size)[0]


def natural_spectrum(frequencies: Tensor) -> Tensor:
    """Variance [F] float64 of the coefficients of natural clips at about 8 frames a second, by frequency (c, t, h, w).

    A power law in space, steeper in time the smoother the picture is, and little colour: least squares on the
    logarithms of the strongest coefficients of some 400 short clips. What an unfitted code works with, and the prior
    of a fitted one.
    """
    c, t, h, w = frequencies.double().unbind(1)
    space = torch.log1p(h**2 + w**2)
    time = torch.log1p(5.0 * t**2)
    return torch.exp(-1.3 * space - (1.2 - 0.11 * space).clamp_min(0.3) * time) * torch.where(c == 0, 0.1, 0.1 / 30)


class Rotation(nn.Module):
    """x [B, P] times a fixed rotation plus a learned correction that starts at zero.

    A module of its own, as `Gain` is, because ZeRO-3 gathers parameters around a module's call and nowhere else.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Tensor, rotation: Tensor, *, inverse: bool = False) -> Tensor:
        matrix = rotation + self.weight.float()
        return x @ (matrix.T if inverse else matrix)


class Gain(nn.Module):
    """x [B, M] times a learned factor per coefficient, 1 at the start."""

    def __init__(self, size: int):
        super().__init__()
        self.log = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.float().exp()


class TransformCode(nn.Module):
    """A fixed-rate nested transform code in FSQ tokens, and a differentiable one: see the top of this file.

    Args:
        num_tokens: K, tokens of a clip.
        levels: FSQ levels of a token's dimensions.
        channels: C.
        max_frequencies: (t, h, w), cosine frequencies looked at.
        num_coefficients: M, coefficients that may be coded; None: enough for K tokens with room to choose.
        num_rotated: P, strongest coefficients that the rotation mixes.
        split_levels: levels are split into their prime factors. False keeps one symbol a dimension (0.1 dB worse from
            4 tokens up, 0.1 dB better at one).

    Everything that `fit` finds is in buffers, so a state_dict carries it; their sizes depend on the arguments only.
    Parameters are corrections that start at zero (weight decay then pulls towards the fit): `analysis` and
    `synthesis` [P, P] on the rotation, `gain` [M] on decoded values. `share`: coefficients that go with a token, in
    order of variance, for networks beside the code (`by_token`).
    """

    frequencies: Tensor
    mean: Tensor
    rotation: Tensor
    std: Tensor
    target: Tensor
    cells: Tensor
    fitted: Tensor
    levels: Tensor

    def __init__(
        self,
        *,
        num_tokens: int = 64,
        levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
        channels: int = 3,
        max_frequencies: tuple[int, int, int] = (16, 24, 24),
        num_coefficients: int | None = None,
        num_rotated: int = 512,
        split_levels: bool = True,
    ):
        super().__init__()
        if num_tokens < 1 or channels < 1 or len(max_frequencies) != 3 or min(max_frequencies) < 1:
            raise ValueError(
                f"num_tokens={num_tokens}, channels={channels} and max_frequencies={tuple(max_frequencies)} "
                "must be positive, with three frequencies (t, h, w)"
            )
        if not levels or min(levels) < 3:
            raise ValueError(
                f"levels={tuple(levels)} needs one dimension or more, of at least 3 levels (FSQ is lopsided at 2)"
            )
        self.num_tokens, self.channels, self.max_frequencies = num_tokens, channels, tuple(max_frequencies)
        available = channels * math.prod(max_frequencies)
        self.num_coefficients = min(available, num_coefficients or max(num_rotated, 8 * num_tokens))
        self.num_rotated = min(self.num_coefficients, num_rotated)
        self.share = -(-self.num_coefficients // num_tokens)
        symbols = symbols_of(tuple(levels), num_tokens, split=split_levels)
        for name, value in zip(Symbols._fields, symbols):
            self.register_buffer(f"symbol_{name}", value, persistent=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        count, rotated = self.num_coefficients, self.num_rotated
        self.register_buffer("frequencies", torch.zeros(count, 4, dtype=torch.int64))  # (c, t, h, w) of each
        self.register_buffer("mean", torch.zeros(count))  # before the rotation
        self.register_buffer("rotation", torch.eye(rotated))  # columns are components
        self.register_buffer("std", torch.ones(count))  # after the rotation
        self.register_buffer("target", torch.zeros(len(symbols.radix), dtype=torch.int64))  # coefficient of a symbol
        self.register_buffer("cells", torch.ones(len(symbols.radix), dtype=torch.int64))  # its cells after the symbol
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.analysis, self.synthesis, self.gain = Rotation(rotated), Rotation(rotated), Gain(count)
        if self.target.is_meta:  # built for its shapes only
            return
        candidates = self._candidates()
        spectrum = natural_spectrum(candidates)
        strongest = spectrum.argsort(descending=True, stable=True)[:count]
        self._install(candidates[strongest], torch.zeros(count), torch.eye(rotated), spectrum[strongest])

    def by_token(self, coefficients: Tensor) -> Tensor:
        """[..., M] -> [..., K, share], zero where there are no more."""
        short = self.share * self.num_tokens - coefficients.shape[-1]
        return F.pad(coefficients, (0, short)).unflatten(-1, (self.num_tokens, self.share))

    def _apply(self, fn, recurse=True):
        """As nn.Module, but fitted numbers stay float32 when the module is cast: bfloat16 would move every cell."""
        before = {name: getattr(self, name) for name in ("mean", "rotation", "std")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def _candidates(self) -> Tensor:
        """[F, 4] int64: every frequency (c, t, h, w) looked at."""
        axes = [torch.arange(n) for n in (self.channels, *self.max_frequencies)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)

    def _install(self, frequencies: Tensor, mean: Tensor, rotation: Tensor, variance: Tensor) -> None:
        target, cells = allocate(variance, self.get_buffer("symbol_radix").cpu())
        self.frequencies.copy_(frequencies)
        self.mean.copy_(mean)
        self.rotation.copy_(rotation)
        self.std.copy_(variance.sqrt())
        self.target.copy_(target)
        self.cells.copy_(cells)

    # -- transform ---------------------------------------------------------------------------------------------------

    def _colour(self) -> Tensor:
        """[C, C] orthonormal; for RGB (R+G+B, R-B, R-2G+B)."""
        return _axis(self.channels, self.channels, self.levels.device) / math.sqrt(self.channels)

    def _spectrum(self, video: Tensor, lengths: Tensor) -> Tensor:
        """[B, c, t, h, w] float32 cosine coefficients, means over each clip's real pixels."""
        _, _, frames, height, width = video.shape
        num_t, num_h, num_w = self.max_frequencies
        time = cosine_basis(num_t, lengths, frames) / lengths[:, None, None]
        # padding may hold anything, NaN too: 0 times NaN is NaN
        real = torch.arange(frames, device=video.device) < lengths[:, None]
        out = torch.where(real[:, None, :, None, None], video.float(), 0.0)
        out = torch.einsum("bcthw,kw->bcthk", out, _axis(num_w, width, video.device) / width)
        out = torch.einsum("bcthw,kh->bctkw", out, _axis(num_h, height, video.device) / height)
        out = torch.einsum("bcthw,bkt->bckhw", out, time)
        return torch.einsum("bcthw,kc->bkthw", out, self._colour())

    def _holds(self, lengths: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, M] bool: frequencies that a clip of this length and size has."""
        _, t, h, w = self.frequencies.unbind(1)
        return (t < lengths[:, None]) & (h < size[0]) & (w < size[1])

    def _flat(self) -> Tensor:
        """[M] int64: where each coefficient lies in a flattened spectrum."""
        c, t, h, w = self.frequencies.unbind(1)
        num_t, num_h, num_w = self.max_frequencies
        return ((c * num_t + t) * num_h + h) * num_w + w

    def analyse(self, video: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Coefficients [B, M] float32, about unit variance, in falling order of variance.

        Args:
            video: [B, C, T, H, W] in [-1, 1], any T, H, W.
            lengths: [B] int64 real frames; None when all T are. What padding holds never matters.
        """
        if video.ndim != 5 or video.shape[1] != self.channels:
            raise ShapeError(f"video has shape {list(video.shape)}, expected [B, {self.channels}, T, H, W]")
        batch, _, frames, height, width = video.shape
        if lengths is None:
            lengths = torch.full((batch,), frames, device=video.device)
        with torch.autocast(video.device.type, enabled=False):
            out = self._spectrum(video, lengths).flatten(1)[:, self._flat()]
            out = torch.where(self._holds(lengths, (height, width)), out - self.mean, 0.0)
            head, tail = out.split([self.num_rotated, out.shape[1] - self.num_rotated], 1)
            return torch.cat([self.analysis(head, self.rotation), tail], 1) / self.std

    def synthesise(self, coefficients: Tensor, *, frames: Tensor, num_frames: int, size: tuple[int, int]) -> Tensor:
        """Video [B, C, num_frames, H, W] float32, not clipped; 0 past a clip's own frames.

        Args:
            coefficients: [B, M] in the units of `analyse`; 0 is a coefficient's mean.
            frames: [B] int64 real frames of each clip. size: (H, W).
        """
        device, (height, width) = coefficients.device, size
        num_t, num_h, num_w = self.max_frequencies
        with torch.autocast(device.type, enabled=False):
            out = coefficients.float() * self.std
            head, tail = out.split([self.num_rotated, out.shape[1] - self.num_rotated], 1)
            out = torch.cat([self.synthesis(head, self.rotation, inverse=True), tail], 1) + self.mean
            spectrum = out.new_zeros(len(out), self.channels * num_t * num_h * num_w)
            spectrum = spectrum.index_add(1, self._flat(), out)
            spectrum = spectrum.unflatten(1, (self.channels, num_t, num_h, num_w))
            out = torch.einsum("bkthw,kc->bcthw", spectrum, self._colour())
            out = torch.einsum("bckhw,bkt->bcthw", out, cosine_basis(num_t, frames, num_frames))
            out = torch.einsum("bctkw,kh->bcthw", out, _axis(num_h, height, device))
            return torch.einsum("bcthk,kw->bcthw", out, _axis(num_w, width, device))

    # -- code --------------------------------------------------------------------------------------------------------

    def _last_cells(self) -> Tensor:
        """[M] int64: cells of each coefficient when every token is there."""
        ones = torch.ones(self.num_coefficients, dtype=torch.int64, device=self.cells.device)
        return ones.scatter_reduce(0, self.target, self.cells, "amax")

    def encode(self, coefficients: Tensor, delta: Tensor | None = None) -> Tensor:
        """What FSQ must be given, [B, K, Q] float32, so that it rounds to these coefficients' levels.

        Args:
            coefficients: [B, M] from `analyse`. delta: [B, M], a network's correction, in the same units.
        Every digit is taken from one cell index per coefficient, so a later token refines exactly what the earlier
        ones said. Not differentiable: give `decode(..., through=coefficients + delta)` the coefficients instead.
        """
        with torch.no_grad(), torch.autocast(coefficients.device.type, enabled=False):
            wanted = coefficients.float() if delta is None else coefficients.float() + delta.float()
            last = self._last_cells()
            share = torch.sigmoid(wanted.double() * (LOGISTIC_STD / COMPANDER))
            cell = (share * last).floor().long().clamp_min(0).minimum(last - 1)  # [B, M]
            step = last[self.target] // self.cells
            digit = cell[:, self.target] // step % self.get_buffer("symbol_radix")  # [B, S]
            shape = (len(cell), self.num_tokens, len(self.levels))
            where = self.get_buffer("symbol_token") * shape[2] + self.get_buffer("symbol_dim")
            level = cell.new_zeros(shape[0], shape[1] * shape[2])
            level = level.index_add(1, where, digit * self.get_buffer("symbol_place")).view(shape)
            return fsq_preimage(level, self.levels)

    def dequantize(
        self, values: Tensor, keep: Tensor | None = None, *, through: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Coefficients as far as the kept tokens tell, and how far that is.

        Args:
            values: [B, K', Q] FSQ values in [-1, 1], K' <= K. keep: [B, K'] bool; None keeps all. Tokens are nested:
                those after a clip's first dropped one count as dropped.
            through: [B, M], the coefficients that were encoded, for training: wherever a token has told something the
                gradient passes to them as if nothing had been rounded.
        Returns: (coefficients [B, M] float32, conditional means, 0 where nothing is known;
            bits [B, M] float32, what is known of each).
        """
        batch, count, dims = values.shape
        if count > self.num_tokens or dims != len(self.levels):
            raise ShapeError(
                f"values has shape {list(values.shape)}, expected [B, up to {self.num_tokens}, {len(self.levels)}]"
            )
        with torch.autocast(values.device.type, enabled=False):
            symbols = Symbols(*(self.get_buffer(f"symbol_{name}") for name in Symbols._fields))
            first = int(count * len(symbols.token) // self.num_tokens)  # symbols of the tokens that are there
            token, dim, radix, place = (part[:first] for part in symbols)
            target, cells = self.target[:first].expand(batch, -1), self.cells[:first]
            told = torch.ones_like(values[..., 0], dtype=torch.bool) if keep is None else keep.long().cumprod(1).bool()
            told = told[:, token]  # [B, S']
            digit = fsq_level(values.detach(), self.levels).flatten(1)[:, token * dims + dim] // place % radix
            last = self._last_cells()
            part = torch.where(told, digit * (last[self.target[:first]] // cells), 0)
            known = torch.ones(batch, self.num_coefficients, dtype=torch.int64, device=values.device)
            known = known.scatter_reduce(1, target, torch.where(told, cells, 1), "amax")
            cell = torch.zeros_like(known).scatter_add(1, target, part) // (last // known)
            out = self.gain((cell_mean(cell, known) / LOGISTIC_STD).float())
            if through is not None:
                out = out + torch.where(known > 1, through.float() - through.detach().float(), 0.0)
            return out, known.float().log2()

    def decode(
        self,
        values: Tensor,
        keep: Tensor | None = None,
        *,
        frames: Tensor,
        num_frames: int,
        size: tuple[int, int],
        through: Tensor | None = None,
    ) -> Tensor:
        """Video [B, C, num_frames, H, W] from FSQ values: `dequantize`, then `synthesise`; same arguments."""
        coefficients, _ = self.dequantize(values, keep, through=through)
        return self.synthesise(coefficients, frames=frames, num_frames=num_frames, size=size)

    # -- fit ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, videos: Iterable[Tensor]) -> dict[str, float]:
        """Statistics of training clips: which frequencies, their rotation, scales and the order of refinement.

        Args: videos: batches [B, C, T, H, W] float in [-1, 1], read once, without padding; a few hundred clips at
            least, several random windows of each. Memory does not grow with their number. Validation clips must not
            be among them. Deterministic; learned corrections are set back to zero.
        Returns: clips, and psnr_db_{k}: expected PSNR (from mean squared error over the training clips) by tokens.
        Raises: ValueError when there is no clip.
        """
        candidates = self._candidates()
        prior = natural_spectrum(candidates)
        gathered = min(len(candidates), _CANDIDATES * self.num_rotated)
        near = prior.argsort(descending=True, stable=True)[:gathered]
        clips, energy = 0, 0.0
        total, square = torch.zeros(len(candidates)).double(), torch.zeros(len(candidates)).double()
        product = torch.zeros(gathered, gathered).double()
        for video in videos:
            video = video.to(self.levels.device)
            with torch.autocast(video.device.type, enabled=False):
                lengths = torch.full((len(video),), video.shape[2], device=video.device)
                spectrum = self._spectrum(video, lengths).flatten(1).cpu()
            clips += len(video)
            energy += float(video.double().square().mean(dim=(1, 2, 3, 4)).sum()) * self.channels
            total += spectrum.double().sum(0)
            square += spectrum.double().square().sum(0)
            product += (spectrum[:, near].T @ spectrum[:, near]).double()
        if not clips:
            raise ValueError("TransformCode.fit was given no clip; check that the training shards hold any")
        # a mirrored or reversed clip is as likely as the clip itself: odd frequencies average to zero
        odd_t, odd_w = candidates[:, 1] % 2 == 1, candidates[:, 3] % 2 == 1
        mean = torch.where(odd_t | odd_w, 0.0, total / clips)
        variance = (square / clips - mean**2).clamp_min(0)
        level = variance.sum() / prior.sum()
        variance = (clips * variance + _PRIOR_SPECTRUM * level * prior) / (clips + _PRIOR_SPECTRUM)
        variance = variance.clamp_min(1e-12)  # clips of one flat colour only

        strongest = near[variance[near].argsort(descending=True, stable=True)][: self.num_rotated]
        rest = torch.ones(len(candidates), dtype=torch.bool)
        rest[strongest] = False
        others = rest.nonzero()[:, 0]
        others = others[variance[others].argsort(descending=True, stable=True)]
        chosen = torch.cat([strongest, others[: self.num_coefficients - self.num_rotated]])

        at = torch.searchsorted(near.sort().values, strongest)
        at = near.argsort()[at]  # rows of `product` that hold the strongest
        covariance = product[at][:, at] / clips - torch.outer(mean[strongest], mean[strongest])
        same = (odd_t[strongest][:, None] == odd_t[strongest]) & (odd_w[strongest][:, None] == odd_w[strongest])
        covariance = torch.where(same, covariance, 0.0) * clips / (clips + _PRIOR_DIAGONAL)
        covariance.diagonal().copy_(variance[strongest])
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
        sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # eigh leaves it open
        spread = torch.cat([values, variance[chosen[self.num_rotated :]]]).clamp_min(1e-12)
        self._install(candidates[chosen], mean[chosen].float(), (vectors * sign).float(), spread)
        for parameter in self.parameters():
            parameter.zero_()
        self.fitted.fill_(True)
        outside = max(energy / clips - float(mean.square().sum()) - float(spread.sum()), 0.0)
        return {"clips": float(clips), **self._expected(spread, outside)}

    def _expected(self, variance: Tensor, outside: float) -> dict[str, float]:
        """psnr_db_{k} by the model itself; `outside`: mean squared error of what is never coded."""
        report, tokens = {}, self.get_buffer("symbol_token").cpu()
        for count in sorted({1, *(4**e for e in range(1, 8) if 4**e <= self.num_tokens), self.num_tokens}):
            there = tokens < count
            cells = torch.ones_like(variance, dtype=torch.int64).scatter_reduce(
                0, self.target.cpu()[there], self.cells.cpu()[there], "amax"
            )
            left = {int(n): distortion(int(n)) for n in cells.unique()}
            error = outside + sum(v * left[n] for v, n in zip(variance.tolist(), cells.tolist()))
            report[f"psnr_db_{count}"] = 10 * math.log10(4.0 * self.channels / max(error, 1e-12))
        return report
