"""How many tokens a wanted quality needs, predicted in one pass: a halting head over a block's tokens.

KARL (Duggal et al. 2025, Single-pass Adaptive Image Tokenization for Minimum Program Search,
https://arxiv.org/abs/2507.07995) conditions its encoder on a wanted reconstruction loss and predicts for every token a
probability of halting. Here the tokenizer rests: the head reads the quantized register latents of a block and an
embedding of the wanted PSNR, and what is kept is a prefix, the expected number of tokens before the halt.

    tokens [M, K, D] -> transformer --+
                                      |--> halting probability of every token --> expected length --> calibrated length
    wanted PSNR -> embedding ---------+

The length is then calibrated as split conformal prediction does it (Vovk et al. 2005, Algorithmic Learning in a Random
World): errors against the search on training clips, each taken before the head learned from its clip, are kept in a
buffer, and predictions are stretched by the quantile that lets `coverage` of blocks reach the wanted quality.

Letters: M blocks, K tokens of a block, D width, S levels, W wanted qualities, T frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.transformer import Transformer

KEPT = 1024  # errors that calibration remembers
FREQUENCIES = 8  # of the embedding of a PSNR
RANGE_DB = 64.0  # one slow period of it
WANTED = 8  # qualities that a clip is asked for at each training step


class HaltingHead(nn.Module):
    """Predicts how many of a block's K tokens a wanted PSNR needs.

    Args:
        dim: of a token. coverage: share of blocks that are to reach the wanted PSNR with what is predicted.
    Raises: ValueError for a coverage that is no share.
    """

    errors: Tensor
    seen: Tensor

    def __init__(self, dim: int, *, num_tokens: int, depth: int, width: int, num_heads: int, coverage: float):
        super().__init__()
        if not 0 < coverage < 1:
            raise ValueError(f"model.halting_coverage={coverage} must lie between 0 and 1")
        self.num_tokens, self.coverage = num_tokens, coverage
        self.code_in = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.transformer = Transformer(width, depth, num_heads)
        self.wanted_in = nn.Linear(2 * FREQUENCIES + 1, width)
        self.hidden = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, 1)
        self.register_buffer("errors", torch.zeros(KEPT))  # log2(needed / predicted), in octaves
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, codes: Tensor, wanted_db: Tensor) -> Tensor:
        """codes [M, K, D], wanted_db [M, W] -> logits [M, W, K] that the block halts before token k is read."""
        x = self.transformer(self.code_in(codes) + self.places.to(codes), None)
        x = torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1)
        inner = self.hidden(x)[:, None] + self.wanted_in(embed_db(wanted_db).to(x))[:, :, None]  # [M, W, K, width]
        return self.out(F.gelu(inner))[..., 0]

    def expected(self, codes: Tensor, wanted_db: Tensor) -> Tensor:
        """[M, W] expected number of tokens before the halt, 1 to K, not calibrated."""
        return (1 - self(codes, wanted_db).float().sigmoid()).sum(-1).clamp(1, self.num_tokens)

    def stretch(self) -> float:
        """The factor on predicted lengths with which `coverage` of the remembered blocks had enough tokens."""
        count = min(int(self.seen), KEPT)
        if not count:
            return 1.0
        rank = min(math.ceil((count + 1) * self.coverage), count)
        return 2.0 ** float(self.errors[:count].float().sort()[0][rank - 1])

    def stated(self) -> dict[str, float]:
        """Error against the search on the remembered training clips: `octaves`, mean |log2(predicted / needed)| of
        calibrated lengths, and `missed`, the share of blocks whose length does not reach the wanted quality."""
        error = self.errors[: min(int(self.seen), KEPT)].float() - math.log2(self.stretch())
        if not error.numel():
            return {"octaves": math.nan, "missed": math.nan}
        return {"octaves": float(error.abs().mean()), "missed": float((error > 0).double().mean())}

    @torch.no_grad()
    def predict(self, codes: Tensor, psnr_db: float) -> Tensor:
        """[M] int64: calibrated lengths of blocks, codes [M, K, D], for a wanted PSNR."""
        wanted = torch.full((codes.shape[0], 1), psnr_db, device=codes.device)
        length = self.expected(codes, wanted)[:, 0] * self.stretch()
        return length.ceil().long().clamp(1, self.num_tokens)

    @torch.no_grad()
    def remember(self, error: Tensor) -> None:
        """Keep errors in octaves, the oldest make room."""
        for at in range(0, error.numel(), KEPT):
            piece = error.flatten()[at : at + KEPT].to(self.errors)
            where = (int(self.seen) + torch.arange(len(piece), device=piece.device)) % KEPT
            self.errors[where] = piece
            self.seen += len(piece)

    def loss(self, codes: Tensor, distortion: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the halt, for qualities drawn between what one token and all tokens give.

        Args:
            codes: [M, K, D]. distortion: [M, K] mean squared error in [-1, 1] units of 1 ... K tokens. real: [M] bool.
        """
        psnr = 10 * (4 / distortion.clamp_min(1e-8)).log10()
        low, high = psnr[:, :1], psnr.amax(1, keepdim=True)
        wanted = low + (high - low) * torch.rand(len(psnr), WANTED, device=psnr.device)
        needed = shortest(psnr, wanted)  # [M, W]
        logits = self(codes, wanted).float()
        halted = torch.arange(1, self.num_tokens + 1, device=psnr.device) > needed[..., None]
        each = F.binary_cross_entropy_with_logits(logits, halted.to(logits), reduction="none").mean((1, 2))
        expected = (1 - logits.detach().sigmoid()).sum(-1).clamp(1, self.num_tokens)
        error = (needed / expected).log2()[real]
        report = {"octaves": error.abs().mean(), "miss_rate": (error > math.log2(self.stretch())).double().mean()}
        self.remember(error)
        return (each * real).sum() / real.sum().clamp_min(1), report


def embed_db(value: Tensor) -> Tensor:
    """[...] dB as [..., 2 * FREQUENCIES + 1] features."""
    phase = value[..., None] / RANGE_DB * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=value.device)
    return torch.cat([value[..., None] / RANGE_DB, phase.sin(), phase.cos()], -1)


def shortest(psnr: Tensor, wanted: Tensor) -> Tensor:
    """[M, W] int64: the fewest tokens of psnr [M, K] that reach wanted [M, W]; K where none does."""
    enough = psnr[:, None] >= wanted[..., None]
    return torch.where(enough.any(-1), enough.int().argmax(-1) + 1, psnr.shape[1])
