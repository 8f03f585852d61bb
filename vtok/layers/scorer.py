"""How bad every length of a time block would be: a network that predicts it, and the measurement it learns from.

AdapTok, Li et al. 2025, https://arxiv.org/abs/2505.17011.

Letters: M chunks, C channels, T frames, H height, W width, K tokens of a time block, D width, S levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.chunked import Chunks
from vtok.layers.masks import encoder_mask, with_valid_keys
from vtok.layers.transformer import Transformer


class Scorer(nn.Module):
    """Predicts the distortion of a time block at every length, from its latents before and after quantization.

    A block-causal transformer over [z, codes]. It predicts the standardised logarithm of the distortion at `levels`
    lengths; the mean and deviation it was trained with are buffers.
    """

    mean: Tensor
    std: Tensor
    seen: Tensor

    def __init__(
        self,
        dim: int,
        *,
        width: int,
        depth: int,
        num_heads: int,
        num_tokens: int,
        blocks: int,
        levels: int,
        mlp_ratio: float = 4.0,
        mlp: str = "gelu",
        norm: str = "rms",
    ):
        super().__init__()
        self.code_in = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.randn(num_tokens * blocks, width) * 0.02)
        self.transformer = Transformer(width, depth, num_heads, mlp_ratio=mlp_ratio, mlp=mlp, norm=norm)
        self.head = nn.Linear(width, levels)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, codes: Tensor, block_valid: Tensor) -> Tensor:
        """z, codes [M, blocks, K, *] -> standardised log-distortion [M, blocks, S]."""
        x = torch.cat([z, codes], -1)
        blocks, count = x.shape[1], x.shape[2]
        x = self.code_in(x.flatten(1, 2)) + self.places[: blocks * count].to(x)
        mask = encoder_mask("time_block_causal", patches=0, registers=blocks * count, blocks=blocks)
        assert mask is not None
        mask = with_valid_keys(mask.to(x.device), block_valid.repeat_interleave(count, 1))
        x = rearrange(self.transformer(x, mask), "M (b K) D -> M b K D", b=blocks)
        return self.head(x.mean(2))

    def standardise(self, target: Tensor, *, decay: float = 0.99) -> None:
        """Move mean and deviation towards those of `target`; the first batches count in full."""
        if not target.numel():
            return
        self.seen.add_(1)
        weight = max(1 - decay, 1 / int(self.seen))
        self.mean.lerp_(target.mean(), weight)
        # around the running mean: a batch of one clip hardly varies around its own
        self.std.copy_(self.std.square().lerp((target - self.mean).square().mean(), weight).sqrt().clamp_min(1e-3))

    def error(self, z: Tensor, codes: Tensor, block_valid: Tensor, target: Tensor, *, block: int) -> Tensor:
        """Scalar: mean squared error of the prediction for one block, target [M, S] in logarithms, in the units of the
        running deviation, which follows the target first."""
        real = block_valid[:, block]
        with torch.no_grad():
            self.standardise(target[real])
        wanted = (target - self.mean) / self.std
        predicted = self(z, codes, block_valid)[:, block].float()
        return ((predicted - wanted).square().mean(-1) * real).sum() / real.sum().clamp_min(1)

    def distortion(self, z: Tensor, codes: Tensor, block_valid: Tensor) -> Tensor:
        """Predicted distortion [M, blocks, S] in the units it was trained on."""
        return (self(z, codes, block_valid).float() * self.std + self.mean).exp()


def measure_lengths(
    decode: Callable[..., Tensor],
    distortion: Callable[[Tensor, Tensor], Tensor],
    codes: Tensor,
    chunks: Chunks,
    video: Tensor,
    *,
    block: int,
    block_frames: int,
    counts: Sequence[int],
) -> Tensor:
    """Log-distortion [M, S] of one time block cut to each of S lengths (`counts`, in tokens) while the blocks before it
    stay whole.

    Args:
        decode: a model's `decode_chunks`, under a mask that lets no later block change an earlier one.
        distortion: (recon, video), both [M, C, T', H, W], -> [M].
        codes: [M, blocks, K, D]; chunks: of `video` [M, C, T, H, W], which is not padded.
    """
    rank = torch.arange(codes.shape[2], device=codes.device)
    end = min((block + 1) * block_frames, video.shape[2])
    frames, size = slice(block * block_frames, end), (video.shape[3], video.shape[4])
    costs = []
    for count in counts:
        keep = chunks.block_valid[..., None].expand(codes.shape[:3]).clone()
        keep[:, block] &= rank < count
        # no later block changes this one, so none is decoded
        recon = decode(codes[:, : block + 1], keep[:, : block + 1], chunks.lengths, frames=end, size=size)
        costs.append(distortion(recon[:, :, frames].float(), video[:, :, frames]))
    return torch.stack(costs, -1).clamp_min(1e-8).log()
