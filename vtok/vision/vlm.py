"""The vision tower of a VLM of transformers, read where the VLM itself reads it: what `attach` feeds, while training.

    frames --preprocess--> pixels --the VLM's tower, through its seam (vtok.layers.seams)--> patches, grid, frame vector

Letters: M windows in one call, w frames of a window, h height, w width, N patches of a frame, D width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtok.layers.seams import block_read, seam_of, see_frames, see_grids
from vtok.vision.bodies import Body, Seen
from vtok.vision.preprocess import from_processor


class VlmBody(Body):
    """The tower for videos; the language model is let go."""

    def __init__(self, vlm: Any, processor: Any, layer: int, size: tuple[int, int] | None, where: str):
        self.seam, config, vision = seam_of(vlm), vlm.config, vlm.config.vision_config
        if layer != -1:
            raise ValueError(f"tower.layer={layer}: the tower of a VLM is read where the VLM reads it, leave it out")
        attribute = self.seam.towers[self.seam.kind("video")]
        self.model = getattr(vlm.base_model, attribute)
        self._vlm = SimpleNamespace(config=config, base_model=SimpleNamespace(**{attribute: self.model}))
        side = vision.patch_size
        self._patch = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        self.depth = int(getattr(vision, "depth", None) or vision.num_hidden_layers)
        self.layer, several = block_read(config, self.seam, self.depth)
        self.embedding_dim = vision.hidden_size * several
        self.preprocess = from_processor(processor, size, where)
        if self.seam.grids:
            self.window = self.stride = int(vision.temporal_patch_size)
            self._merge = int(vision.spatial_merge_size)
            self._check(*(size or (0, 0)), where=where)
        else:
            native = vision.image_size
            self._native = (native, native) if isinstance(native, int) else (int(native[0]), int(native[1]))
            self.any_size = False
            seen = size or self.preprocess.crop or self.preprocess.resize
            if seen != self._native:
                raise ValueError(f"tower.size={list(size or ())}: {where} sees frames of {list(self._native)}")

    def _check(self, height: int, width: int, *, where: str = "the tower") -> None:
        sides = tuple(side * self._merge for side in self._patch)
        if height % sides[0] or width % sides[1] or not height:
            raise ValueError(
                f"tower.size={[height, width]}: {where} sees frames whose height and width are multiples of {sides}; "
                "say the size that it should see"
            )

    def run(self, pixels: Tensor, layer: int) -> Seen:
        if not self.seam.grids:
            (item,) = see_frames(self._vlm, self.seam, "video", [pixels[:, 0]], frames_per_call=len(pixels))
            frame = None if item.frame is None else item.frame[:, None]
            return Seen(item.patches[:, None], item.grid, frame, int(item.frame is not None))
        (p, q), m, pair = self._patch, self._merge, self.stride
        frames, grid = pixels.shape[1] // pair, (pixels.shape[-2] // p, pixels.shape[-1] // q)
        rows = rearrange(
            pixels, "M (s t) C (a i p) (b j q) -> (M s a b i j) (C t p q)", t=pair, i=m, j=m, p=p, q=q
        )  # as the processors of Qwen-VL cut frames: a merged token's patches lie together
        grids = torch.tensor([[frames, *grid]] * len(pixels))
        items = see_grids(self._vlm, self.seam, "video", rows, grids, None)
        return Seen(torch.stack([item.patches for item in items]), grid, None, 0)
