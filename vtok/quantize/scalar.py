"""Quantizers without a codebook: every dimension is rounded on its own (FSQ) or to its sign (LFQ, BSQ).

Ids are mixed radix: FSQ counts dimension 0 least significant, LFQ and BSQ most significant, both as
vector-quantize-pytorch. Letters: D width of a token's code, M tokens, L levels of one dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.quantize.config import QuantizerConfig
from vtok.quantize.gradients import EntropyWeight, as_float32, factorised_entropy, straight_through
from vtok.types import Quantized


def check_ids(indices: Tensor, size: int) -> None:
    """Raises: ValueError for ids outside [0, size), which digits would wrap around; on the CPU alone, as elsewhere to
    ask is to wait for the device (`vtok.coding.token_coding.tokens_of` asks before the ids go there)."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool(((indices < 0) | (indices >= size)).any()):
        raise ValueError(
            f"ids lie in [{int(indices.min())}, {int(indices.max())}], the codebook has {size} entries: they are of "
            "another model, or damaged"
        )


class FSQ(nn.Module):
    """Finite scalar quantization: bound every dimension by tanh and round it to L levels.

    Mentzer et al. 2023, https://arxiv.org/abs/2309.15505. Ids equal vector-quantize-pytorch's. With `entropy` > 0 and
    `commitment` > 0, VidTok's (Tang et al. 2024, https://arxiv.org/abs/2412.13061) terms: the soft assignment behind
    the entropy is softmax(-squared distance of the bounded latent to every grid point / temperature), which is a
    product over dimensions; the squared norms of the points stay in, as they are no constant on a grid.

    forward: z [..., D] -> embeddings [..., D] in [-1, 1], indices [..., 1] in [0, prod(levels)). The gradient is that
    of the bound, tanh; rounding passes it straight through.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: list[int], config: QuantizerConfig | None = None):
        super().__init__()
        if not levels or min(levels) < 3 or math.prod(levels) >= 1 << 31:  # the bound of 2 levels is lopsided
            raise ValueError(
                f"model.quantizer.levels={levels}: every level must be 3 or more, their product below 2^31"
            )
        self.config = config or QuantizerConfig()
        self.commitment = self.config.commitment or 0.0
        self.entropy_weight = EntropyWeight(self.config, 0.0)
        self.dim = self.latent_dim = len(levels)
        self.codebook_sizes = (math.prod(levels),)
        self.index_factors = (tuple(levels),)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """z squashed so that rounding gives L distinct values."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return (z + (offset / half.to(z.dtype)).atanh()).tanh() * half.to(z.dtype) - offset

    def entropy(self, bounded: Tensor) -> tuple[Tensor, Tensor]:
        """(per-sample, batch) entropy in nats of the soft assignment of bounded latents [M, D]."""
        logs = []
        for d, levels in enumerate(self.index_factors[0]):
            grid = torch.arange(levels, device=bounded.device) - levels // 2
            distance = (bounded[:, d, None] - grid).square() / (levels // 2) ** 2
            logs.append((-distance / self.config.entropy_temperature).log_softmax(-1))
        return factorised_entropy(logs, group_bits=self.config.entropy_group_bits)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = as_float32(z)
            bounded = self.bound(z)
            rounded = straight_through(bounded, bounded.round())
            codes = rounded / (self.levels // 2)
            digits = rounded.detach().long() + self.levels // 2
            indices = (digits * self.basis).sum(-1, keepdim=True)
            loss, report = z.new_zeros(()), {}
            if self.training and (self.entropy_weight.weight or self.commitment):
                real = bounded.reshape(-1, self.dim) if mask is None else bounded[mask]
                if self.commitment:
                    error = (real - real.round().detach()) / (self.levels // 2)
                    loss = self.commitment * error.square().sum() / max(error.numel(), 1)
                if self.entropy_weight.weight:
                    sample, batch = self.entropy(real)
                    loss = loss + self.entropy_weight() * (sample - batch)
                    report = {"entropy_sample": sample.detach(), "entropy_batch": batch.detach()}
            return Quantized(codes, indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> the same float32 embeddings [..., D] that `forward` gave. Raises: see `check_ids`."""
        check_ids(indices, self.codebook_sizes[0])
        digits = indices // self.basis % self.levels
        return (digits - self.levels // 2).float() / (self.levels // 2)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., L] for each dimension."""
        sizes = self.index_factors[0]
        means = [
            (p * ((torch.arange(n, device=p.device) - n // 2) / (n // 2))).sum(-1) for p, n in zip(probabilities, sizes)
        ]
        return torch.stack(means, -1)


class LFQ(nn.Module):
    """Lookup-free quantization: the sign of every dimension (MAGVIT-v2, Yu et al. 2023,
    https://arxiv.org/abs/2310.05737).

    The entropy term is per-sample minus batch entropy of softmax(-distance / temperature). With codes in {-1, 1}^D that
    softmax factorises over bits, so both parts are exact without tokens x codebook (`factorised_entropy`).

    forward: z [..., D] -> embeddings [..., D] in {-1, 1}, indices [..., 1] in [0, 2^D), bit 0 most significant.
    """

    basis: Tensor
    own_commitment = 0.25

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.dim = self.latent_dim = config.codebook_size.bit_length() - 1
        if 1 << self.dim != config.codebook_size or not 1 <= self.dim <= 62:
            raise ValueError(
                f"model.quantizer.codebook_size={config.codebook_size}: name={config.name} needs a power of two of at "
                "most 2^62"
            )
        self.codebook_sizes = (config.codebook_size,)
        self.index_factors = ((2,) * self.dim,)
        self.config = config
        self.scale = 1.0
        self.commitment = self.own_commitment if config.commitment is None else config.commitment
        self.entropy_weight = EntropyWeight(config, 0.1)
        # dimension 0 of the code is the last digit of vector-quantize-pytorch's `bits`: most significant first
        self.register_buffer("basis", 1 << torch.arange(self.dim).flip(0), persistent=False)

    def place(self, z: Tensor) -> Tensor:
        """Latents where their distance to the codes is measured."""
        return z

    def entropy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(per-sample, batch) entropy in nats of the soft assignment of placed latents [M, D]."""
        # softmax over {-c, c} of -(z -+ c)^2 / temperature is a sigmoid of 4 c z / temperature
        logits = 4 * self.scale * z / self.config.entropy_temperature
        logs = torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
        return factorised_entropy(logs.unbind(1), group_bits=self.config.entropy_group_bits)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = self.place(as_float32(z))
            positive = z > 0
            codes = torch.where(positive, self.scale, -self.scale).to(z.dtype)
            indices = (positive.long() * self.basis).sum(-1, keepdim=True)
            loss, report = z.new_zeros(()), {}
            if self.training and (self.entropy_weight.weight or self.commitment):
                real = z.reshape(-1, self.dim) if mask is None else z[mask]
                if self.commitment:
                    error = real - torch.where(real > 0, self.scale, -self.scale)
                    loss = self.commitment * error.square().sum() / max(error.numel(), 1)
                if self.entropy_weight.weight:
                    sample, batch = self.entropy(real)
                    loss = loss + self.entropy_weight() * (sample - batch)
                    report = {"entropy_sample": sample.detach(), "entropy_batch": batch.detach()}
            return Quantized(straight_through(z, codes), indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> embeddings [..., D] in {-1, 1} (BSQ: that over the square root of D). Raises: see
        `check_ids`."""
        check_ids(indices, self.codebook_sizes[0])
        return ((indices // self.basis % 2).float() * 2 - 1) * self.scale

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., 2] a bit, least significant bit first."""
        return torch.stack([p[..., 1] - p[..., 0] for p in reversed(probabilities)], -1) * self.scale


class BSQ(LFQ):
    """Binary spherical quantization: latents on the unit sphere, each dimension to +-1 / sqrt(D) by its sign.

    Zhao et al. 2024, https://arxiv.org/abs/2406.07548. The error is bounded by the sphere, so `commitment` is 0 unless
    it is set. Bits are counted as LFQ's.

    forward: z [..., D] -> embeddings [..., D] of unit length, indices [..., 1] in [0, 2^D). The gradient is that of
    the projection onto the sphere.
    """

    own_commitment = 0.0

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        self.scale = self.dim**-0.5

    def place(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)
