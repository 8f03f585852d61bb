"""What all quantizers share: float32, gradients past the rounding, entropy terms that never build tokens x codebook.

Letters: M tokens, D dimensions, L levels of one dimension, V codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.quantize.config import QuantizerConfig


def as_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Exactly `codes` in value; their gradient goes to z unchanged."""
    return codes.detach() + (z - z.detach())


def rotate(z: Tensor, codes: Tensor) -> Tensor:
    """Exactly `codes` in value; their gradient reaches z turned and scaled as z was turned and scaled into its code.

    Fifty et al. 2024, https://arxiv.org/abs/2410.06424. z, codes: [..., D].
    """
    fixed, codes = z.detach(), codes.detach()
    unit, target = F.normalize(fixed, dim=-1), F.normalize(codes, dim=-1)
    middle = F.normalize(unit + target, dim=-1)
    turned = z - 2 * (z * middle).sum(-1, keepdim=True) * middle + 2 * (z * unit).sum(-1, keepdim=True) * target
    scale = codes.norm(dim=-1, keepdim=True) / fixed.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return straight_through(turned * scale, codes)


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def over_processes(total: Tensor) -> Tensor:
    """The sum of all processes' `total`, differentiable: with gradients averaged over processes afterwards, a loss of
    it has the gradient that one process would find for the whole batch."""
    if not is_distributed():
        return total
    from torch.distributed.nn.functional import all_reduce  # absent where torch is built without it

    return all_reduce(total)


def mean_over_tokens(total: Tensor, count: int) -> Tensor:
    """Sum over this process's tokens -> mean over those of all processes."""
    everywhere = over_processes(torch.tensor(float(count), device=total.device))
    return over_processes(total) / everywhere.clamp_min(1).to(total.dtype)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum()


def _joint(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Independent log distributions [M, L] each -> their joint distribution [M, product of L].

    Added as logarithms, of which autograd keeps nothing. Probabilities below e^-40 become 0, far below what a sum of
    float64 shows: as subnormal numbers and products of them they would make the matrix product many times slower.
    """
    joint = log_probabilities[0]
    for each in log_probabilities[1:]:
        joint = (joint[:, :, None] + each[:, None, :]).flatten(1)
    return F.threshold(joint, -40.0, -math.inf).exp()


def _in_groups(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive places whose sizes multiply to at most `limit` (or one place alone)."""
    groups: list[list[int]] = [[]]
    for place, size in enumerate(sizes):
        if groups[-1] and math.prod(sizes[i] for i in groups[-1]) * size > limit:
            groups.append([])
        groups[-1].append(place)
    return groups


def factorised_entropy(log_probabilities: Sequence[Tensor], *, group_bits: int) -> tuple[Tensor, Tensor]:
    """(per-sample, batch) entropy in nats of soft assignments that factorise over dimensions.

    Args:
        log_probabilities: one [M, L] for each dimension.
        group_bits: the batch entropy is exact within groups of dimensions of at most so many bits and summed over
            groups, which bounds the joint entropy from above (as BSQ, Zhao et al. 2024,
            https://arxiv.org/abs/2406.07548).

    Per sample the entropy of independent digits is the sum of theirs. The mean distribution of a group is a matrix
    product of the joint distributions of its two halves, so memory is M x sqrt(V) + V where the plain formula has M x
    V: 2^18 codes need 2 x [M, 512]. Means are over the tokens of all processes.
    """
    count = log_probabilities[0].shape[0]
    sample = -torch.stack([(each.exp() * each).sum() for each in log_probabilities]).sum() / max(count, 1)
    batch = sample.new_zeros(())
    for group in _in_groups([each.shape[1] for each in log_probabilities], 1 << group_bits):
        members = [log_probabilities[i] for i in group]
        # the first half as near to the square root of the group's size as its digits allow
        split = min(
            range(1, len(members) + 1),
            key=lambda at: sum(math.prod(each.shape[1] for each in part) for part in (members[:at], members[at:])),
        )
        left = _joint(members[:split])
        total = left.T @ _joint(members[split:]) if split < len(members) else left.sum(0)
        batch = batch + _entropy(mean_over_tokens(total, count))
    return sample, batch


class EntropyWeight(nn.Module):
    """The weight of an entropy term: `entropy`, from `entropy_warmup_factor` times it falling linearly over
    `entropy_warmup_steps` forward passes of training, those without gradients not counted (`vtok.layers.code_maps` fits
    through one before step 0). The count is a buffer: a resume goes on where it was."""

    step: Tensor

    def __init__(self, config: QuantizerConfig, default: float):
        super().__init__()
        self.weight = default if config.entropy is None else config.entropy
        self.steps, self.factor = config.entropy_warmup_steps, config.entropy_warmup_factor
        if self.steps:
            if not self.weight:
                raise ValueError(
                    f"model.quantizer.entropy_warmup_steps={self.steps} warms up an entropy term that is off: set "
                    "model.quantizer.entropy above 0, or entropy_warmup_steps=0"
                )
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor | float:
        """The weight now; in training, with gradients, this counts as one step."""
        if not self.steps:
            return self.weight
        left = (1 - self.step / self.steps).clamp_min(0)
        if self.training and torch.is_grad_enabled():
            self.step.add_(1)
        return self.weight * (1 + (self.factor - 1) * left)
