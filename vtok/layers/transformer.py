"""Pre-norm transformer over a packed sequence with an explicit attention mask.

A mask is a boolean [L, L] or [B, L, L] tensor, True where a query (row) may look at a key (column). Dense
scaled-dot-product attention is the path; FlexAttention reads the same mask on CUDA and must give the same numbers.

Letters: B batch, L sequence length, D width, H heads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, in float32, times a learned gain if `affine`."""

    def __init__(self, dim: int, *, affine: bool = True):
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), None if self.weight is None else self.weight.to(x.dtype), 1e-6)


def make_norm(kind: str, dim: int) -> nn.Module:
    """`rms` (RMSNorm) or `layer` (LayerNorm), both with a learned gain, over the last dimension."""
    if kind not in ("rms", "layer"):
        raise ValueError(f"norm={kind!r} is unknown; choose rms or layer")
    return RMSNorm(dim) if kind == "rms" else nn.LayerNorm(dim, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are RMS-normalised per head (`qk_norm`), which keeps bf16 stable."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool = True, bias: bool = True):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        head = width // num_heads
        self.q_norm = RMSNorm(head) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, *, blocks: Any = None) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD = rearrange(self.qkv(x), "B L (three H D) -> three B H L D", three=3, H=self.num_heads)
        q_BHLD, k_BHLD = self.q_norm(q_BHLD).to(v_BHLD.dtype), self.k_norm(k_BHLD).to(v_BHLD.dtype)
        if blocks is not None:
            out_BHLD = flex_attend(q_BHLD, k_BHLD, v_BHLD, blocks)
        else:
            dense = mask if mask is None or mask.ndim == 2 else mask[:, None]
            out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=dense)
        return self.out(rearrange(out_BHLD, "B H L D -> B L (H D)"))


def flex_blocks(mask: Tensor) -> Any:
    """A dense boolean mask [L, L] or [B, L, L] as FlexAttention's BlockMask: made once, read by every layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    length, device = mask.shape[-1], mask.device.type
    if mask.ndim == 2:
        return create_block_mask(lambda b, h, q, k: mask[q, k], None, None, length, length, device=device)
    return create_block_mask(lambda b, h, q, k: mask[b, q, k], mask.shape[0], None, length, length, device=device)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attend(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, blocks: Any) -> Tensor:
    """FlexAttention under `flex_blocks(mask)`: 128 x 128 blocks that are False throughout are skipped.

    An accelerator for CUDA, held equal to the dense path by a test. On the CPU FlexAttention has no backward pass.
    """
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if q_BHLD.is_cuda else flex_attention
    out = attend(q_BHLD, k_BHLD, v_BHLD, block_mask=blocks)
    assert isinstance(out, Tensor)
    return out


class MLP(nn.Module):
    """`gelu`: two matrices; `swiglu`: gated, with hidden width 2/3 as large so that the parameters stay equal
    (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, width: int, *, ratio: float = 4.0, kind: str = "gelu"):
        super().__init__()
        if kind not in ("gelu", "swiglu"):
            raise ValueError(f"mlp={kind!r} is unknown; choose gelu or swiglu")
        self.gated = kind == "swiglu"
        hidden = int(width * ratio * (2 / 3 if self.gated else 1))
        self.up = nn.Linear(width, hidden * (2 if self.gated else 1))
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        qk_norm: bool = True,
        norm: str = "rms",
    ):
        super().__init__()
        self.norm1 = make_norm(norm, width)
        self.attention = Attention(width, num_heads, qk_norm=qk_norm)
        self.norm2 = make_norm(norm, width)
        self.mlp = MLP(width, ratio=mlp_ratio, kind=mlp)

    def forward(self, x: Tensor, mask: Tensor | None, *, blocks: Any = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, blocks=blocks)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm: [B, L, D] -> [B, L, D].

    Initialised with truncated normals of standard deviation 0.02, residual outputs scaled down by sqrt(2 depth)
    (GPT-2's rule), so that the stack begins close to the identity.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        qk_norm: bool = True,
        norm: str = "rms",
        flex: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=mlp_ratio, mlp=mlp, qk_norm=qk_norm, norm=norm) for _ in range(depth)
        )
        self.norm = make_norm(norm, width)
        self.flex, self.checkpoint = flex, checkpoint
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            for out in (block.attention.out, block.mlp.down):
                out.weight.data.div_((2 * max(depth, 1)) ** 0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        blocks = flex_blocks(mask) if self.flex and mask is not None and x.is_cuda else None
        for block in self.blocks:
            if self.checkpoint and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, mask, blocks=blocks, use_reentrant=False)
            else:
                x = block(x, mask, blocks=blocks)
        return self.norm(x)
