"""What the coefficients that a nested transform code has told say about those it has not.

Letters: B batch, M coefficients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf


class CoefficientPredictor(nn.Module):
    """What the known coefficients say about the others: a conditional mean that is not linear.

    A residual perceptron on (coefficients, bits) of `TransformCode.dequantize`, to be called before `synthesise`. It
    starts as the identity. A coefficient known to b bits moves by 2^-b of what an unknown one may: its cell shrinks so.
    The rotation leaves no linear dependence between coefficients; what is left to learn is how scenes look.

    Args:
        num_coefficients: M. width: hidden units. dropout: of hidden units; a few hundred clips ask for about 0.2.
    """

    def __init__(self, num_coefficients: int, *, width: int = 384, dropout: float = 0.2):
        super().__init__()
        if width < 1 or not 0 <= dropout < 1:
            raise ValueError(f"width={width} must be positive and dropout={dropout} in [0, 1)")
        self.enter = nn.Linear(2 * num_coefficients, width)
        self.hidden = nn.Linear(width, width)
        self.leave = nn.Linear(width, num_coefficients)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, coefficients: Tensor, bits: Tensor) -> Tensor:
        """[B, M] float32 from coefficients [B, M] and bits [B, M]."""
        with torch.autocast(coefficients.device.type, enabled=False):
            dtype = self.enter.weight.dtype
            # 3 bits are about one unit; most coefficients have none
            x = nnf.gelu(self.enter(torch.cat([coefficients, bits / 3], 1).to(dtype)))
            x = x + nnf.gelu(self.hidden(self.dropout(x)))
            return coefficients + self.leave(self.dropout(x)).float() * torch.exp2(-bits)
