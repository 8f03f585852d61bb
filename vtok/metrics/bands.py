"""Features for a Frechet distance that needs no weights: how much of a clip lies in which frequencies of space, time.

A proxy for rFVD, and no more: it sees blur, noise, ringing, flicker and motion that is missing or made up, over a set
of clips, where PSNR sees one clip and one pixel at a time; it knows nothing of what a video shows. Ours, no paper's.

Letters: B clips, T frames, H height, W width, D features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.fft import dctn
from torch import Tensor

from vtok.metrics.frechet import FeatureNet

# upper edges of octaves, in cycles a pixel and cycles a frame; the first holds what is constant
SPACE = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, math.inf)
TIME = (0.0, 1 / 16, 1 / 8, 1 / 4, math.inf)
FLOOR = 1 / 255**2 / 12  # variance of rounding to 8 bits: less than that is nothing
# RGB in [0, 1] to luma and two colour differences (BT.601)
TO_YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class Bands(FeatureNet):
    """Logarithms of the mean squared DCT coefficients of a clip in bands of space and time, in nats.

    Luma: every pair of an octave of spatial frequency (of its length) and one of time, 6 x 5; colour: the spatial bands
    over all times. A band that a small frame does not reach counts as empty.
    """

    dim, unit, min_frames = len(SPACE) * (len(TIME) + 1), "clips", 8
    weightless = True
    about = "log energies of 6 x 5 space-time DCT bands of luma, 6 of colour; no weights"

    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        return [self._of(clip[:, : int(length)]) for clip, length in zip(video, lengths)]

    def _of(self, clip: Tensor) -> Tensor:
        """[n, D] of one uint8 clip [3, T, H, W], n 1 or, where it is too short, 0."""
        frames, height, width = clip.shape[1:]
        if frames < self.min_frames:
            return torch.zeros(0, self.dim)
        planes = np.einsum("dc,cthw->dthw", np.array(TO_YCC), clip.cpu().numpy() / 255.0)
        energy = np.square(np.asarray(dctn(planes, axes=(1, 2, 3), norm="ortho")))
        down, across = np.arange(height) / (2 * height), np.arange(width) / (2 * width)
        space = np.searchsorted(SPACE, np.hypot(down[:, None], across), side="left")
        time = np.searchsorted(TIME, np.arange(frames) / (2 * frames), side="left")
        bands = (time[:, None, None] * len(SPACE) + space).ravel()
        count = len(SPACE) * len(TIME)
        size = np.bincount(bands, minlength=count)
        luma = np.bincount(bands, weights=energy[0].ravel(), minlength=count) / np.maximum(size, 1)
        flat = np.broadcast_to(space, (frames, height, width)).ravel()
        colour = np.bincount(flat, weights=energy[1:].sum(0).ravel(), minlength=len(SPACE))
        colour = colour / np.maximum(2 * np.bincount(flat, minlength=len(SPACE)), 1)
        return torch.from_numpy(np.log(np.concatenate([luma, colour]) + FLOOR)).float()[None]
