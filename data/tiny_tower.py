"""A small image tower with random weights, as timm saves one: python data/tiny_tower.py OUT [--size 32].

Its features mean nothing. It stands in where a command needs a frozen tower and no weights are at hand: tests, and the
tiny twins of presets that align with one (`objective.align.tower.name=OUT`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer


def write_tower(out: Path, *, size: int = 32, patch: int = 8, width: int = 32, depth: int = 1, seed: int = 0) -> Path:
    """A vision transformer for frames of `size` x `size` pixels in the folder `out`; its path."""
    torch.manual_seed(seed)
    shape = dict(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    assert isinstance(model, VisionTransformer)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size), "num_classes": 0}
    timm.models.save_for_hf(model, out, safe_serialization=True, model_args=shape)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=32, help="pixels a side (default: 32)")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=1)
    args = parser.parse_args()
    out = write_tower(args.out, size=args.size, patch=args.patch, width=args.width, depth=args.depth)
    print(f"{out}: a tower with random weights")


if __name__ == "__main__":
    main()
