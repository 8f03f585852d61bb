"""Quantizers of several ids a token: step by step on what is left over, or side by side on parts of the code.

    residual   z -> id 0, z - e0 -> id 1, ...        embeddings = e0 + e1 + ...
    product    z = [part 0 | part 1 | ...]           embeddings = [e0 | e1 | ...]

Letters: D width of a token's code, L levels of one dimension, Q ids of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vtok.quantize.config import QuantizerConfig
from vtok.quantize.gradients import as_float32, straight_through
from vtok.quantize.scalar import BSQ, FSQ, LFQ, check_ids
from vtok.quantize.vector import IBQ, VQ, GradientVQ, SimVQ
from vtok.types import Quantized


class ResidualVQ(nn.Module):
    """Residual vector quantization: each codebook quantizes what the ones before left over.

    Zeghidour et al. 2021, https://arxiv.org/abs/2107.03312, algorithm 1. Euclidean; every step is a VQ (ema_decay > 0)
    or a GradientVQ, its loss summed. Ids equal vector-quantize-pytorch's ResidualVQ. The gradient passes straight
    through once: the library passes it through at every step, which multiplies it by the number of steps.

    Steps are greedy: the vector of some ids may be encoded as others, whose first code lies nearer to it.

    forward: z [..., D] -> embeddings [..., D], indices [..., num_quantizers] each in [0, V).
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        step = replace(config, cosine=False)
        make = VQ if config.ema_decay else GradientVQ
        self.layers = nn.ModuleList(make(step) for _ in range(config.num_quantizers))
        self.dim = self.latent_dim = config.dim
        self.codebook_sizes = (config.codebook_size,) * config.num_quantizers
        self.index_factors = tuple((size,) for size in self.codebook_sizes)

    @property
    def codebooks(self) -> list[Tensor]:
        """Q of [V, D] float32."""
        return [layer.codebook for layer in self.layers]  # type: ignore[union-attr]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = as_float32(z)
            rest, total, loss, ids, report = z, torch.zeros_like(z), z.new_zeros(()), [], {}
            for number, layer in enumerate(self.layers):
                got: Quantized = layer(rest, mask)
                assert got.indices is not None
                codes = got.embeddings.detach()
                rest, total = rest - codes, total + codes
                loss = loss + got.loss
                ids.append(got.indices)
                report |= {f"{key}_{number}": value for key, value in got.report.items()}
            indices = torch.cat(ids, -1)
            return Quantized(straight_through(z, total), indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., Q'] -> embeddings [..., D]; fewer ids than Q give the coarser embedding of the first ones."""
        total = self.layers[0].lookup(indices[..., :1])  # type: ignore[operator]
        for q in range(1, indices.shape[-1]):
            total = total + self.layers[q].lookup(indices[..., q : q + 1])  # type: ignore[operator]
        return total

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., V] for each step."""
        parts = [layer.expect([p]) for layer, p in zip(self.layers, probabilities)]  # type: ignore[operator]
        return torch.stack(parts).sum(0)


class ResidualFSQ(nn.Module):
    """Residual finite scalar quantization: grids of L levels in [-1, 1], each step's L times finer than the last.

    Ids equal vector-quantize-pytorch's ResidualFSQ, whose formula this is: latents squashed softly into the reach of
    the first grid, then rounded on a grid symmetric about 0 (Parker et al. 2024, https://arxiv.org/abs/2411.19842), so
    two levels are allowed. The gradient is that of the squashing, once; the library's is the sum over the steps.

    forward: z [..., D] -> embeddings [..., D], indices [..., num_quantizers] each in [0, prod(levels)), dimension 0
    least significant.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        levels, self.config = list(config.levels), config
        if not levels or min(levels) < 2 or math.prod(levels) >= 1 << 31:
            raise ValueError(
                f"model.quantizer.levels={levels}: every level must be 2 or more, their product below 2^31"
            )
        self.dim = self.latent_dim = len(levels)
        self.codebook_sizes = (math.prod(levels),) * config.num_quantizers
        self.index_factors = (tuple(levels),) * config.num_quantizers
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    @property
    def scales(self) -> Tensor:
        """[num_quantizers, D] float32: of integers, as a float buffer would follow the model into bfloat16."""
        return torch.stack([self.levels.float() ** -step for step in range(self.config.num_quantizers)])

    def bound(self, z: Tensor) -> Tensor:
        """z squashed into the reach of the first grid: half a step beyond its ends."""
        reach = 1 + 1 / (self.levels - 1)
        return (z / reach).tanh() * reach

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(as_float32(z))
            rest, ids = bounded.detach(), []
            for scale in self.scales:
                place = (self.levels - 1) * ((rest / scale).clamp(-1.0, 1.0) + 1) / 2.0 + 0.5
                digits = place.floor()
                ids.append((digits.long() * self.basis).sum(-1, keepdim=True))
                rest = rest - (2.0 / (self.levels - 1) * digits - 1.0) * scale
            indices = torch.cat(ids, -1)
            codes = self.lookup(indices).to(bounded.dtype)
            return Quantized(straight_through(bounded, codes), indices, bounded.new_zeros(()), {})

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., Q'] -> float32 embeddings [..., D]; fewer ids than Q give the coarser embedding. Raises: see
        `check_ids`."""
        check_ids(indices, self.codebook_sizes[0])
        digits = indices[..., None] // self.basis % self.levels  # [..., Q', D]
        values = digits.float() * (2.0 / (self.levels - 1)) - 1.0
        return (values * self.scales[: indices.shape[-1]]).sum(-2)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., L] for each dimension of each step."""
        means, sizes = [], [size for factors in self.index_factors for size in factors]
        for p, size in zip(probabilities, sizes):
            means.append((p * (torch.arange(size, device=p.device) * (2.0 / (size - 1)) - 1.0)).sum(-1))
        steps = torch.stack(means, -1).unflatten(-1, (-1, self.dim))
        return (steps * self.scales).sum(-2)


Part = FSQ | LFQ | BSQ | VQ | GradientVQ | SimVQ | IBQ | ResidualVQ | ResidualFSQ


class Product(nn.Module):
    """Quantizers side by side, each on its own part of a token's code: product quantization (Jegou et al. 2011,
    Product quantization for nearest neighbor search, IEEE Trans. PAMI 33(1)) for codebooks, several FSQ ids a token as
    OneVAE for grids.

    Every part has weights of its own. Ids equal vector-quantize-pytorch's FSQ with `num_codebooks` and its
    VectorQuantize with separate codebooks for heads. Loss and report are means over the parts, as of one error
    over the whole width.

    forward: z [..., D] -> embeddings [..., D], indices [..., Q], parts in order.
    """

    def __init__(self, parts: Sequence[Part]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.dim = sum(part.dim for part in parts)
        self.latent_dim = sum(part.latent_dim for part in parts)
        self.codebook_sizes = tuple(size for part in parts for size in part.codebook_sizes)
        self.index_factors = tuple(factors for part in parts for factors in part.index_factors)
        self._factors = [sum(len(factors) for factors in part.index_factors) for part in parts]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        got: list[Quantized] = [part(each, mask) for part, each in zip(self.parts, z.chunk(len(self.parts), -1))]
        report = {key: torch.stack([each.report[key] for each in got]).mean() for key in got[0].report}
        indices = torch.cat([each.indices for each in got if each.indices is not None], -1)
        loss = torch.stack([each.loss for each in got]).mean()
        return Quantized(torch.cat([each.embeddings for each in got], -1), indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., Q] -> embeddings [..., D]."""
        chunks = indices.chunk(len(self.parts), -1)
        return torch.cat([part.lookup(each) for part, each in zip(self.parts, chunks)], -1)  # type: ignore[operator]

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution for each factor of each id, in that order."""
        out, at = [], 0
        for part, count in zip(self.parts, self._factors):
            out.append(part.expect(probabilities[at : at + count]))  # type: ignore[operator]
            at += count
        return torch.cat(out, -1)
