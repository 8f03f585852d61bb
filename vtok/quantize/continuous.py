"""Continuous tokens, and their rounding after training.

Letters: D width of a token's code, N latents, B bins of one dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtok.quantize.config import QuantizerConfig
from vtok.quantize.gradients import as_float32, straight_through
from vtok.types import Quantized

MAX_SAMPLES = 1 << 20  # latents that Dimwise.fit sorts


class Identity(nn.Module):
    """No quantization: continuous tokens, without ids. With `kl` > 0 the latents are a mean and a log-variance.

    forward: z [..., D], or [..., 2 D] with `kl` -> embeddings [..., D]; drawn in training, the mean otherwise
    (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114, eq. 10 for the KL term, summed over D, mean over tokens).
    """

    codebook_sizes: tuple[int, ...] = ()
    index_factors: tuple[tuple[int, ...], ...] = ()

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.dim, self.kl = config.dim, config.kl
        self.latent_dim = 2 * self.dim if self.kl else self.dim

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = as_float32(z)
            if not self.kl:
                return Quantized(z, None, z.new_zeros(()), {})
            mean, logvar = z.chunk(2, -1)
            logvar = logvar.clamp(-30, 20)
            if not self.training:
                return Quantized(mean, None, z.new_zeros(()), {})
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)
            kl = kl if mask is None else kl[mask]
            kl = kl.sum() / max(kl.numel(), 1)
            drawn = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            return Quantized(drawn, None, self.kl * kl, {"kl": kl.detach()})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("model.quantizer.name=identity makes continuous tokens: they have no indices to look up")

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        raise ValueError("model.quantizer.name=identity makes continuous tokens: they have no ids to expect")


def gaussian_bins(mean: Tensor, std: Tensor, *, bins: int) -> tuple[Tensor, Tensor]:
    """Bins of equal probability under N(mean, std): edges [D, B - 1], and each bin's conditional mean [D, B].

    mean, std: [D]. The mean of N(0, 1) between a and b, whose probability is 1 / B, is B (pdf(a) - pdf(b)).
    """
    probability = torch.arange(1, bins, device=mean.device, dtype=torch.float64) / bins
    edges = math.sqrt(2) * torch.erfinv(2 * probability - 1)
    density = torch.cat([edges.new_zeros(1), (-edges.square() / 2).exp() / math.sqrt(2 * math.pi), edges.new_zeros(1)])
    centres = bins * (density[:-1] - density[1:])
    mean, std = mean.double()[:, None], std.double()[:, None]
    return (mean + std * edges).float(), (mean + std * centres).float()


def lloyd_bins(latents: Tensor, *, bins: int, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Bins of least squared error on given values: edges [D, B - 1], centres [D, B] ascending.

    latents: [N, D]. Lloyd 1982, Least squares quantization in PCM, IEEE Trans. IT-28(2): centres to the means of their
    bins, edges halfway between centres. A bin that no value falls into keeps its centre. It starts from centres as
    dense as the cube root of the values' density, the best that many bins can do: from plain quantiles the tails take
    thousands of steps.
    """
    values = latents.detach().double().T.contiguous().sort(-1).values  # [D, N]
    count = values.shape[1]
    sums = torch.cat([values.new_zeros(len(values), 1), values.cumsum(-1)], -1)
    at = torch.linspace(0, count - 1, min(count, 8 * bins), device=values.device).long()
    grid = values[:, at]  # density is 1 / difference, and a grid cell's share of centres its density^(1/3) x difference
    share = (grid[:, 1:] - grid[:, :-1]).clamp_min(1e-12) ** (2 / 3)
    passed = share.cumsum(-1)
    wanted = (torch.arange(bins, device=values.device) + 0.5) / bins * passed[:, -1:]
    cell = torch.searchsorted(passed, wanted).clamp_max(share.shape[1] - 1)
    into = 1 - (passed.gather(1, cell) - wanted) / share.gather(1, cell)
    centres = torch.lerp(grid.gather(1, cell), grid.gather(1, cell + 1), into.clamp(0, 1))
    for _ in range(steps):
        edges = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        ends = torch.searchsorted(values, edges, side="left")  # [D, B - 1] values below each edge
        ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], count)], -1)
        sizes = ends[:, 1:] - ends[:, :-1]
        means = (sums.gather(1, ends[:, 1:]) - sums.gather(1, ends[:, :-1])) / sizes.clamp_min(1)
        centres = torch.where(sizes > 0, means, centres)
    return ((centres[:, 1:] + centres[:, :-1]) / 2).float(), centres.float()


class Dimwise(nn.Module):
    """Quantization of a trained continuous tokenizer: every dimension to one of B bins of its own, without training.

    TokenBridge, Wang et al. 2025, https://arxiv.org/abs/2503.16430. A token has D ids, one a dimension: a single id of
    all of them would need B^D numbers. Before `fit` the bins are those of a standard Gaussian, to which a KL term pulls
    latents. With `kl` > 0 the model's latents are a mean and a log-variance, of which the mean is quantized.

    forward: z [..., D], or [..., 2 D] with `kl` -> embeddings [..., D], indices [..., D] in [0, B), ascending in value.
    The gradient passes straight through.
    """

    edges: Tensor
    centres: Tensor
    fitted: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config, self.dim = config, config.dim
        self.latent_dim = 2 * config.dim if config.kl else config.dim
        self.codebook_sizes = (config.bins,) * config.dim
        self.index_factors = ((config.bins,),) * config.dim
        edges, centres = gaussian_bins(torch.zeros(config.dim), torch.ones(config.dim), bins=config.bins)
        self.register_buffer("edges", edges)
        self.register_buffer("centres", centres)
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, latents: Tensor, *, method: str = "lloyd") -> None:
        """Choose the bins from latents [N, D] as the continuous model gives them (its embeddings, not in training).

        Args:
            method: "lloyd" makes the squared error on these latents least, "gaussian" takes bins of equal probability
                under a Gaussian of their mean and deviation, dimension by dimension.
        Raises: ValueError for another shape or method, fewer latents than bins, or values that are not finite.
        """
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise ValueError(f"latents must be [N, {self.dim}], have {list(latents.shape)}")
        if len(latents) < self.config.bins:
            raise ValueError(
                f"{len(latents)} latents cannot fill model.quantizer.bins={self.config.bins}: give more of them"
            )
        if not bool(latents.isfinite().all()):
            raise ValueError("latents hold NaN or infinity: check the model that made them")
        if method == "lloyd":
            some = latents[:: -(-len(latents) // MAX_SAMPLES)]
            edges, centres = lloyd_bins(some, bins=self.config.bins)
        elif method == "gaussian":
            values = latents.double()
            edges, centres = gaussian_bins(values.mean(0), values.std(0), bins=self.config.bins)
        else:
            raise ValueError(f"method={method!r} is unknown; choose lloyd, gaussian")
        self.edges.copy_(edges)
        self.centres.copy_(centres)
        self.fitted.fill_(True)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = as_float32(z)
            mean = z.chunk(2, -1)[0] if self.config.kl else z
            flat = mean.detach().reshape(-1, self.dim).T.contiguous()  # [D, N]
            edges = self.edges.to(flat.dtype).contiguous()
            indices = torch.searchsorted(edges, flat, side="right").T.reshape(mean.shape)
            codes = self.lookup(indices).to(mean.dtype)
            return Quantized(straight_through(mean, codes), indices, mean.new_zeros(()), {})

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., D] -> embeddings [..., D]."""
        flat = indices.reshape(-1, self.dim).T
        return as_float32(self.centres).gather(1, flat).T.reshape(indices.shape)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., B] for each dimension."""
        rows = as_float32(self.centres).unbind(0)
        return torch.stack([(p * row).sum(-1) for p, row in zip(probabilities, rows)], -1)
