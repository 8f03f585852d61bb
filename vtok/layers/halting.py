"""How many tokens a wanted quality needs, predicted in one pass: a halting head over a block's tokens.

KARL (Duggal et al. 2025, Single-pass Adaptive Image Tokenization for Minimum Program Search,
https://arxiv.org/abs/2507.07995) conditions its encoder on a wanted reconstruction loss and predicts for every token a
probability of halting. Here the tokenizer rests: the head reads the quantized register latents of a block and an
embedding of the wanted PSNR, and what is kept is a prefix, as many tokens as have a logit below a threshold.

    tokens [M, K, D] -> transformer --+
                                      |--> logits of halting, one a token --> those below the threshold --> length
    wanted PSNR -> embedding ---------+                                           ^
                      calibration clips -> thresholds by wanted PSNR -------------+

The threshold says with what certainty: with that of probability 1/2 about half of the blocks have too few tokens. It is
found by split conformal prediction (Vovk et al. 2005, Algorithmic Learning in a Random World), for each wanted PSNR on
its own: a block's score is the least threshold that gives it enough tokens, and the threshold is the quantile of the
scores of blocks that nothing was trained on. Blocks of one video are alike, so videos are what is counted, each with
the same weight (Lee, Barber and Willett 2023, Distribution-free inference with hierarchical data,
https://arxiv.org/abs/2306.06342). A block drawn from a new video, of the kind of those calibrated on, that can reach
the wanted PSNR then reaches it with a probability of `coverage` at least.

Letters: M blocks, K tokens of a block, D width, W wanted qualities.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.transformer import Transformer

FREQUENCIES = 8  # of the embedding of a PSNR
RANGE_DB = 64.0  # one slow period of it, and the last level that is calibrated
STEP_DB = 0.5  # from one calibrated level to the next
LEVELS = int(RANGE_DB / STEP_DB) + 1
WANTED = 8  # qualities that a clip is asked for at each training step


class HaltingHead(nn.Module):
    """Predicts how many of a block's K tokens a wanted PSNR needs.

    Args:
        dim: of a token. coverage: share of blocks that are to reach the wanted PSNR with what is predicted.
    Raises: ValueError for a coverage that is no share.
    """

    thresholds: Tensor
    videos: Tensor

    def __init__(self, dim: int, *, num_tokens: int, depth: int, width: int, num_heads: int, coverage: float):
        super().__init__()
        if not 0 < coverage < 1:
            raise ValueError(f"model.halting_coverage={coverage} must lie between 0 and 1")
        self.num_tokens, self.coverage = num_tokens, coverage
        self.code_in = nn.Linear(dim, width)
        self.places = nn.Parameter(torch.randn(num_tokens, width) * 0.02)
        self.transformer = Transformer(width, depth, num_heads)
        self.wanted_in = nn.Linear(2 * FREQUENCIES + 1, width)
        self.whole = nn.Linear(width, width)
        self.each = nn.Linear(width, width)
        self.middle = nn.Linear(width, 2)  # log2 of the length at even odds, and how sharply they turn there
        self.out = nn.Linear(width, 1)  # what a token adds to that
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.middle.bias.copy_(torch.tensor([math.log2(max(num_tokens, 2)) / 2, 0.0]))
        self.register_buffer("thresholds", torch.zeros(LEVELS))  # of 0, STEP_DB, 2 STEP_DB ... dB
        self.register_buffer("videos", torch.zeros(LEVELS, dtype=torch.int64))  # that each was found with

    def forward(self, codes: Tensor, wanted_db: Tensor) -> Tensor:
        """codes [M, K, D], wanted_db [M, W] -> logits [M, W, K] that the block halts before token k is read."""
        x = self.transformer(self.code_in(codes) + self.places.to(codes), None)
        block = self.whole(x.mean(1))[:, None] + self.wanted_in(embed_db(wanted_db).to(x))  # [M, W, width]
        middle, sharpness = self.middle(F.gelu(block))[..., None].unbind(-2)  # [M, W, 1]
        octaves = torch.arange(1, self.num_tokens + 1, device=x.device).log2() - middle.float()
        own = self.out(F.gelu(self.each(x)[:, None] + block[:, :, None]))[..., 0]  # [M, W, K]
        return octaves * sharpness.float().exp() + own

    @property
    def calibrated(self) -> bool:
        return bool(self.videos.any())

    def threshold(self, level: int) -> float:
        """The logit up to which tokens are kept for a wanted PSNR of level x STEP_DB. Infinite where too few
        calibration videos reach it; 0, the even odds, before calibration."""
        if not self.calibrated:
            return 0.0
        return float(self.thresholds[level]) if 0 <= level < LEVELS else math.inf

    @torch.no_grad()
    def predict(self, codes: Tensor, psnr_db: float) -> Tensor:
        """[M] int64: lengths of blocks, codes [M, K, D], for a wanted PSNR, rounded up to the next level."""
        level = next_level(psnr_db)
        wanted = torch.full((codes.shape[0], 1), level * STEP_DB, device=codes.device)
        kept = self(codes, wanted)[:, 0].float() <= self.threshold(level)
        return kept.sum(-1).clamp(1, self.num_tokens)

    @torch.no_grad()
    def calibrate(self, codes: Tensor, psnr: Tensor, video: Tensor) -> None:
        """Set the thresholds of all levels from blocks of videos that neither head nor tokenizer were trained on.

        Args: codes [M, K, D]; psnr [M, K] of 1 ... K tokens, in dB; video [M] int64: which video a block is of.
        """
        device = self.places.device
        levels = torch.arange(LEVELS) * STEP_DB
        scores = []
        for some, curve in zip(codes.split(4), psnr.split(4)):
            logits = [
                self(some.to(device), part.to(device).expand(len(some), -1)).float().sort(-1)[0].cpu()
                for part in levels.split(32)
            ]
            scores.append(least_threshold(torch.cat(logits, 1), curve, levels))
        score = torch.cat(scores)  # [M, LEVELS]
        can = psnr.amax(1, keepdim=True) >= levels
        for at in range(LEVELS):
            here = can[:, at]
            self.thresholds[at] = conformal_quantile(score[here, at], video[here], coverage=self.coverage)
            self.videos[at] = len(video[here].unique())

    def loss(self, codes: Tensor, distortion: Tensor, real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the halt, for qualities drawn between what one token and all tokens give.

        Args:
            codes: [M, K, D]. distortion: [M, K] mean squared error in [-1, 1] units of 1 ... K tokens. real: [M] bool.
        """
        self.videos.zero_()  # a head that learns is no longer the one that was calibrated
        psnr = 10 * (4 / distortion.clamp_min(1e-8)).log10()
        low, high = psnr[:, :1], psnr.amax(1, keepdim=True)
        wanted = low + (high - low) * torch.rand(len(psnr), WANTED, device=psnr.device)
        needed = shortest(psnr, wanted)  # [M, W]
        logits = self(codes, wanted).float()
        halted = torch.arange(1, self.num_tokens + 1, device=psnr.device) > needed[..., None]
        each = F.binary_cross_entropy_with_logits(logits, halted.to(logits), reduction="none").mean((1, 2))
        kept = (logits.detach() <= 0).sum(-1).clamp(1, self.num_tokens)
        octaves = (needed / kept).log2().abs()[real]
        return (each * real).sum() / real.sum().clamp_min(1), {"octaves": octaves.mean()}


def next_level(psnr_db: float) -> int:
    """The calibrated level that is not below a PSNR."""
    return math.ceil(psnr_db / STEP_DB - 1e-9)


def embed_db(value: Tensor) -> Tensor:
    """[...] dB as [..., 2 * FREQUENCIES + 1] features."""
    phase = value[..., None] / RANGE_DB * math.pi * 2.0 ** torch.arange(FREQUENCIES, device=value.device)
    return torch.cat([value[..., None] / RANGE_DB, phase.sin(), phase.cos()], -1)


def shortest(psnr: Tensor, wanted: Tensor) -> Tensor:
    """[M, W] int64: the fewest tokens of psnr [M, K] that reach wanted [M, W]; K where none does."""
    enough = psnr[:, None] >= wanted[..., None]
    return torch.where(enough.any(-1), enough.int().argmax(-1) + 1, psnr.shape[1])


def least_threshold(ascending: Tensor, psnr: Tensor, levels: Tensor) -> Tensor:
    """[M, W]: the least threshold that keeps enough tokens, now and with any higher one.

    Args: ascending [M, W, K] sorted logits; psnr [M, K]; levels [W] wanted PSNRs. Infinite where K tokens do not do.
    """
    count = psnr.shape[1]
    short = psnr[:, None] < levels[:, None]  # [M, W, K]
    last = torch.where(short, torch.arange(1, count + 1), 0).amax(-1)  # the longest that misses
    score = ascending.gather(-1, last.clamp_max(count - 1)[..., None])[..., 0]
    return score.masked_fill(last == count, torch.inf)


def conformal_quantile(scores: Tensor, video: Tensor, *, coverage: float) -> float:
    """The score that a block of a new video exceeds with a probability of at most 1 - `coverage`.

    The weighted quantile in which each video has the same weight, shared by its blocks, and the new video, taken at its
    worst, has it too: infinite where the videos are fewer than coverage / (1 - coverage).

    Args: scores [N], video [N] int64.
    """
    _, which, counts = video.unique(return_inverse=True, return_counts=True)
    weight = 1 / (counts[which].double() * (len(counts) + 1))
    ascending, order = scores.double().sort()
    enough = weight[order].cumsum(0) >= coverage - 1e-12
    return float(ascending[enough.int().argmax()]) if enough.any() else math.inf
