"""Losses: plain functions and small modules. Videos are [B, C, T, H, W] in [-1, 1]; results are scalars unless stated.

pixels.py       reconstruction, perceptual distances of frames and clips, Gram matrices, optical flow, learned variance
adversarial.py  discriminators' and generators' losses, and both players in one backward
codebook.py     what a step reports of its ids
objective.py    what objectives of families that return to pixels share
"""

from vtok.losses.adversarial import (
    Adversarial,
    AdversarialConfig,
    adaptive_weight,
    discriminator_hinge,
    discriminator_nonsaturating,
    discriminator_wgan,
    feature_matching,
    generator_adversarial,
    generator_nonsaturating,
    gradient_penalty,
    lecam,
)
from vtok.losses.codebook import codebook_report
from vtok.losses.objective import PixelConfig, PixelObjective
from vtok.losses.pixels import (
    LogVariance,
    flow_distance,
    frame_mask,
    gram,
    perceptual,
    reconstruction,
    video_perceptual,
)

__all__ = [
    "Adversarial",
    "AdversarialConfig",
    "LogVariance",
    "PixelConfig",
    "PixelObjective",
    "adaptive_weight",
    "codebook_report",
    "discriminator_hinge",
    "discriminator_nonsaturating",
    "discriminator_wgan",
    "feature_matching",
    "flow_distance",
    "frame_mask",
    "generator_adversarial",
    "generator_nonsaturating",
    "gradient_penalty",
    "gram",
    "lecam",
    "perceptual",
    "reconstruction",
    "video_perceptual",
]
