"""The linear maps on either side of a quantizer, set from latents before the first step.

Letters: N latents, Z their channels, D channels of a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def fit_code_maps(
    latents: Sequence[Tensor],
    into: nn.Linear,
    back: nn.Linear,
    quantizer: nn.Module,
    *,
    dim: int,
    affine: tuple[Tensor, Tensor] | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Set `into` to principal components of unit variance, so that a bounded or binary quantizer uses its levels evenly
    from the start, and `back` to the least squares of what is wanted from the codes.

    Args:
        latents: each [B, Z, t, h, w]. quantizer: a module of vtok.quantize; its codebook starts from these latents.
        dim: outputs of `into` that carry the latents; those behind them are variances, small at first.
        affine: float64 matrix [Z, Z] and shift [Z] of what is wanted; None: the latents themselves.
        read: what is wanted of latents [N, Z] where no affine map tells it: [N, Z], what a decoder reads behind another
            quantizer. The components are then those of the affine map that comes nearest to it.
    Returns: the share of the variance wanted that the codes tell.
    """
    z = torch.cat([each.movedim(1, -1).flatten(0, -2) for each in latents]).double()  # [N, Z]
    if read is not None:
        wanted = read(z.to(into.weight.dtype)).double()
        matrix, shift = _least_squares(z, wanted)
    else:
        matrix, shift = affine or (torch.eye(z.shape[1], dtype=z.dtype), z.new_zeros(z.shape[1]))
        wanted = z @ matrix.T + shift
    near = z @ matrix.T + shift
    centre = near.mean(0)
    _, singular, axes = torch.linalg.svd(near - centre, full_matrices=False)
    scale = singular / len(z) ** 0.5
    rank = max(int((scale > 1e-4 * scale[0]).sum()), 1)
    project = axes[:rank] / scale[:rank, None].clamp_min(1e-8)  # [rank, Z], to unit variance
    if dim > rank:  # mixtures of all components
        mix = F.normalize(torch.randn(dim - rank, rank, dtype=z.dtype), dim=-1)
        project = torch.cat([project, mix @ project])
    project = project[:dim]
    weight, bias = torch.zeros_like(into.weight), torch.zeros_like(into.bias)
    weight[:dim], bias[:dim] = (project @ matrix).float(), (project @ (shift - centre)).float()
    bias[dim:] = -4.0  # of a variance, where there is one: latents begin with little noise
    into.weight.copy_(weight)
    into.bias.copy_(bias)
    inputs = into(z.to(weight.dtype))
    quantizer.train()(inputs, None)  # a codebook starts from its first batch
    codes = quantizer.eval()(inputs, None).embeddings.double()
    weight, bias = _least_squares(codes, wanted)
    back.weight.copy_(weight)
    back.bias.copy_(bias)
    left = wanted - codes @ weight.T - bias
    return float(1 - left.square().mean() / (wanted - wanted.mean(0)).square().mean())


def _least_squares(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix [Z, D] and shift [Z] of the affine map from `given` [N, D] that comes nearest to `wanted` [N, Z]."""
    one = torch.cat([given, given.new_ones(len(given), 1)], 1)
    solution = torch.linalg.lstsq(one, wanted, driver="gelsd").solution  # [D + 1, Z]
    return solution[:-1].T, solution[-1]
