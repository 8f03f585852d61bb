"""A compressor in the place of `multi_modal_projector`: the second way, for VLMs that take whatever it gives.

    frame --the VLM's tower--> [M, N, D] --compressor, every frame alone--> [M, K, width of a word] --> the VLM

Letters: M frames, N patches of one (and a class token, where the VLM keeps it), D width, K tokens.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from vtok.layers.seams import check_adapters, check_tower, seam_of, square_grid
from vtok.types import Features


class FramewiseProjector(nn.Module):
    """A compressor as a VLM's projector: [M, N, D] -> [M, K, width of words].

    budget: K, tokens of a frame; None: as many as the compressor makes. keep_all: K must be N: what comes after
    counts on it.
    """

    def __init__(self, compressor: Any, budget: int | None, *, keep_all: bool):
        super().__init__()
        self.compressor, self.budget, self.keep_all = compressor, budget, keep_all

    def forward(self, image_features: Tensor) -> Tensor:
        ahead = math.isqrt(image_features.shape[1]) ** 2 != image_features.shape[1]  # a class token
        patches = image_features[:, None, int(ahead) :]
        tokens = self.compressor.compress(Features(patches, square_grid(patches)), budget=self.budget)
        counts = tokens.lengths.unique().tolist()
        if len(counts) != 1:
            raise ValueError(f"frames got {counts} tokens, a projector gives all the same number: attach takes any")
        if self.keep_all and counts[0] != image_features.shape[1]:
            raise ValueError(
                f"frames got {counts[0]} tokens of {image_features.shape[1]} patches, and this VLM rearranges what its "
                "projector gives: keep all, or use attach(compressor, vlm)"
            )
        return tokens.embeddings.to(image_features.dtype)


def swap(compressor: Any, vlm: Any, *, budget: int | None = None) -> nn.Module:
    """Put a compressor in the place of the VLM's projector; returns the VLM's own, to be put back.

    Every frame is compressed by itself, to `budget` tokens, so texts need that many placeholders for each. Models that
    rearrange what their projector gives (pooling, a newline) take one that keeps all patches. What reads across frames
    needs `attach`.

    Raises: ValueError for an architecture without such a projector.
    """
    seam = seam_of(vlm)
    check_adapters(compressor, vlm)
    check_tower(getattr(compressor, "config", None), vlm.config, seam)
    if not hasattr(vlm.base_model, "multi_modal_projector"):
        raise ValueError(f"{vlm.config.model_type!r} has no multi_modal_projector: use attach(compressor, vlm)")
    own = vlm.base_model.multi_modal_projector
    vlm.base_model.multi_modal_projector = FramewiseProjector(compressor, budget, keep_all=not seam.swap)
    return own
