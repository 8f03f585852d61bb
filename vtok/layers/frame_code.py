"""A transform code of latent frames, each on its own: what flow-decoded tokens are worth before anything has learned.

Letters: M chunks, n latent frames, D channels, h, w height and width, K tokens of a latent frame, Q dimensions of a
token, N coefficients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtok.layers.transform import TransformCode


class FrameCode(nn.Module):
    """`vtok.layers.transform` over [M, D, n, h, w], and how much of a latent's variance k tokens leave open.

    Args:
        frequencies: lowest (y, x) cosine frequencies kept. levels: FSQ levels of a token.
    """

    open_variance: Tensor  # [K + 1, D]

    def __init__(self, *, num_tokens: int, levels: tuple[int, ...], channels: int, frequencies: tuple[int, int]):
        super().__init__()
        self.num_tokens = num_tokens
        self.transform = TransformCode(
            num_tokens=num_tokens, levels=levels, channels=channels, max_frequencies=(1, *frequencies)
        )
        self.register_buffer("open_variance", torch.ones(num_tokens + 1, channels))

    @staticmethod
    def _frames(latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).flatten(0, 1)[:, :, None]  # [M n, D, 1, h, w]

    def analyse(self, latents: Tensor) -> Tensor:
        """[M, D, n, h, w] -> [M n, N] coefficients of unit variance, most important first."""
        return self.transform.analyse(self._frames(latents))

    def latents(self, coefficients: Tensor, correction: Tensor) -> Tensor:
        """Coefficients [M n, N] plus corrections [M, n, K, share] as latents of the quantizer [M, n, K, Q]."""
        shift = correction.flatten(0, 1).flatten(1)[:, : coefficients.shape[1]].to(coefficients)
        return self.transform.encode(coefficients + shift).unflatten(0, correction.shape[:2])

    def guess(self, codes: Tensor, keep: Tensor, *, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What kept tokens say: codes [M, n, K, Q], keep [M, n, K] bool -> latents [M, D, n, h, w] and the variance
        [M, n, D] that they leave open."""
        shape = keep.shape[:2]
        known, _ = self.transform.dequantize(codes.flatten(0, 1), keep.flatten(0, 1))
        one = torch.ones(len(known), dtype=torch.int64, device=known.device)
        frames = self.transform.synthesise(known, frames=one, num_frames=1, size=(size[0], size[1]))
        return frames[:, :, 0].unflatten(0, shape).transpose(1, 2), self.open_variance[keep.sum(-1)]

    @torch.no_grad()
    def fit(self, latents: Sequence[Tensor], quantizer: nn.Module) -> dict[str, float]:
        """Fit the transform, and the table of what tokens leave open, from standardised latents of training clips.

        Returns: `open_k`, the share of the variance that k tokens leave open.
        """
        self.transform.fit([self._frames(each) for each in latents])
        lengths = sorted({0, self.num_tokens, *(round(2 ** (i / 2)) for i in range(2 * self.num_tokens.bit_length()))})
        lengths = [k for k in lengths if k <= self.num_tokens]
        total, count = self.open_variance.new_zeros(len(lengths), self.open_variance.shape[1]).double(), 0
        rank = torch.arange(self.num_tokens, device=total.device)
        for each in latents:
            frames = self._frames(each)
            codes = quantizer(self.transform.encode(self.transform.analyse(frames))[:, None]).embeddings
            for row, k in enumerate(lengths):
                guess, _ = self.guess(codes, (rank < k).expand(len(frames), 1, -1), size=frames.shape[3:])
                total[row] += (guess - frames).square().mean((2, 3, 4)).double().sum(0)
            count += len(frames)
        left = (total / max(count, 1)).clamp_min(1e-4)
        for (low, below), (high, above) in itertools.pairwise(zip(lengths, left.log())):
            share = torch.arange(high - low + 1, device=left.device)[:, None] / (high - low)
            self.open_variance[low : high + 1] = torch.lerp(below, above, share.double()).exp()
        return {f"open_{k}": float(left[row].mean()) for row, k in enumerate(lengths) if not k & (k - 1)}
