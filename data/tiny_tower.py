"""A small image tower to freeze, as timm saves one: python data/tiny_tower.py OUT [--corpus DIR].

With --corpus, a folder that data/demo_corpus.py wrote, a convolutional net is trained on frames of that corpus'
training videos, in about ten minutes on one core. Its one objective: each patch says, through one linear map, which
things have their middle in it (colour with shape, colour with texture) and what the ground is (logistic loss). So its
features know things by their names and where they are, which is what image towers bring to a language model; as
theirs, they know nothing of motion.

Without it a vision transformer has random weights, and the features mean nothing: enough for tests, and for the tiny
twins of presets that align with a tower (`objective.align.tower.name=OUT`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtok.data.decode import VideoReader
from vtok.data.synthetic import LEVELS, Scene, render_map, scene_of
from vtok.data.synthetic_needles import PLAIN
from vtok.data.synthetic_scenes import COLOURS, PALETTES, SHAPES, TEXTURES

RECIPE = 4  # raised when the same settings would give another tower
STRIDE = 16  # pixels a side of a patch of a trained tower
GROUNDS = sorted({ground for level in LEVELS for ground in level.backgrounds})
# what a patch can say: (colour, shape) and (colour, texture) of things, the ground's palette and kind, that of needles
SAID = [
    *((colour, shape) for colour in COLOURS for shape in SHAPES),
    *((colour, texture) for colour in COLOURS for texture in TEXTURES),
    *PALETTES,
    *GROUNDS,
    *(f"plain {ground}" for ground in PLAIN),
]
NAMES = len(COLOURS) * len(SHAPES)


def write_tower(out: Path, *, size: int = 32, patch: int = 8, width: int = 32, depth: int = 1, seed: int = 0) -> Path:
    """A vision transformer with random weights for frames of `size` x `size` pixels in the folder `out`; its path."""
    torch.manual_seed(seed)
    shape = dict(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=2, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    assert isinstance(model, VisionTransformer)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size), "num_classes": 0}
    timm.models.save_for_hf(model, out, safe_serialization=True, model_args=shape)
    return out


def make_net(*, size: int, width: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A ResNet of ten layers whose last map has a stride of 16, and the arguments that make it again."""
    torch.manual_seed(seed)
    shape = dict(channels=(width // 4, width // 2, 3 * width // 4, width), output_stride=STRIDE, num_classes=0)
    model: Any = timm.create_model("resnet10t", pretrained=False, **shape)
    whole = dict(crop_pct=1.0, test_input_size=None, test_crop_pct=None)  # frames as they are, not their middle
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size), "num_classes": 0, **whole}
    return model, shape


def truth(scene: Scene, frames: list[int], grid: tuple[int, int]) -> Tensor:
    """bool [len(frames), len(SAID), h, w]: what each patch of these frames of a scene shows.

    A thing is said by the patches that hold its middle, the part within 1.2 standard deviations of its heat map.
    """
    out = torch.zeros(len(frames), len(SAID), *grid, dtype=torch.bool)
    height, width = grid
    hidden = {needle.frame + k: needle for needle in scene.needles for k in range(needle.frames)}
    heat = torch.from_numpy(render_map(scene, size=(4 * height, 4 * width))[frames]).permute(0, 3, 1, 2)
    middle = F.max_pool2d(heat.float(), 4) > 127  # [F, things, h, w]
    for i, t in enumerate(frames):
        if t in hidden:
            at = (slice(height // 2 - 1, height // 2 + 1), slice(width // 2 - 1, width // 2 + 1))
            out[i, SAID.index(hidden[t].picture(t)), *at] = True
            out[i, SAID.index(f"plain {hidden[t].ground}")] = True
            continue
        shot = next(shot for shot in scene.shots if shot.start <= t < shot.stop)
        out[i, [SAID.index(shot.palette), SAID.index(shot.background)]] = True
        for thing, seen in zip(shot.things, middle[i]):
            for said in ((thing.colour, thing.shape), (thing.colour, thing.texture)):
                out[i, SAID.index(said)] |= seen
    return out


def read_frames(corpus: Path, split: str, *, size: int, per_video: int) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, size, size] frames evenly spread over the videos of a split, and the truth of their patches.

    Raises: ValueError where the corpus has no such videos, or is of another version.
    """
    rows = [json.loads(line) for line in (corpus / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("split") == split]
    if not rows:
        raise ValueError(f"{corpus} has no videos of the split {split!r} to train a tower on; see data/demo_corpus.py")
    pixels, said = [], []
    for row in track(rows, description=f"frames of {split}"):
        scene = scene_of(row)
        at = [int((i + 0.5) * scene.frames / per_video) for i in range(per_video)]
        with VideoReader(corpus / row["file"]) as reader:
            frames, _ = reader.window(times=[(t + 0.5) / row["fps"] for t in at])
        frames = frames.permute(0, 3, 1, 2)
        pixels.append(F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True))
        said.append(truth(scene, at, (size // STRIDE, size // STRIDE)))
    return torch.cat(pixels), torch.cat(said)


def scores(said: Tensor, true: Tensor) -> dict[str, float]:
    """Share of the patches with a thing in them whose likeliest name, colour and shape are those of one.

    said: scores [n, len(SAID), h, w]; true: bool of that shape.
    """
    pairs = true[:, :NAMES].unflatten(1, (len(COLOURS), len(SHAPES))).permute(0, 3, 4, 1, 2)
    held = pairs.flatten(3).any(3)
    best, pairs = said[:, :NAMES].argmax(1)[held], pairs[held]
    colour, shape = best // len(SHAPES), best % len(SHAPES)
    each = torch.arange(len(best))
    right = {
        "name": pairs[each, colour, shape],
        "colour": pairs.any(2)[each, colour],
        "shape": pairs.any(1)[each, shape],
    }
    return {name: float(value.float().mean()) for name, value in right.items()}


def train_tower(
    corpus: Path,
    out: Path,
    *,
    size: int = 64,
    width: int = 128,
    steps: int = 1500,
    batch: int = 64,
    per_video: int = 12,
    lr: float = 3e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train a tower on the training videos of `corpus` and save it in `out`; its `scores` on the held-out ones.

    A folder that holds the tower of the same corpus and settings is left as it is.
    """
    if size % STRIDE or size < 2 * STRIDE or width % 4:
        raise ValueError(f"size={size}, width={width}: give a size of 32, 48, 64 ... and a multiple of 4")
    settings = dict(size=size, width=width, steps=steps, batch=batch, per_video=per_video, lr=lr, seed=seed)
    described = json.dumps({**settings, "recipe": RECIPE, "torch": torch.__version__}, sort_keys=True).encode()
    name = hashlib.sha256(described + (corpus / "captions.jsonl").read_bytes()).hexdigest()
    done = out / "trained.json"
    if done.is_file() and (about := json.loads(done.read_text()))["made_of"] == name:
        return about["scores"]
    if out.exists() and any(out.iterdir()) and not done.is_file():
        raise ValueError(f"{out} holds files of something else; name another folder")
    pixels, true = read_frames(corpus, "train", size=size, per_video=per_video)
    held, held_true = read_frames(corpus, "val", size=size, per_video=per_video)
    model, shape = make_net(size=size, width=width, seed=seed)
    said = nn.Conv2d(width, len(SAID), 1)
    nn.init.constant_(said.bias, -4.0)  # most of what can be said is false of a patch
    parts = nn.ModuleList([model, said])
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))

    def run(frames: Tensor) -> Tensor:
        return said(model.forward_features((frames.float() / 255 - mean) / std))

    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), description="tower"):
        some = torch.randint(len(pixels), (batch,), generator=generator)
        loss = len(SAID) * F.binary_cross_entropy_with_logits(run(pixels[some]), true[some].float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        plan.step()
    model.eval()
    with torch.no_grad():
        result = scores(torch.cat([run(part) for part in held.split(256)]), held_true)
    timm.models.save_for_hf(model, out, safe_serialization=True, model_args=shape)
    done.write_text(json.dumps({"made_of": name, "settings": settings, "scores": result}, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="folder of data/demo_corpus.py; without it, random weights")
    parser.add_argument("--size", type=int, help="pixels a side (default: 64, of random weights 32)")
    parser.add_argument("--width", type=int, help="of the features (default: 128, of random weights 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="with --corpus (default: 1500)")
    parser.add_argument("--patch", type=int, help="without --corpus: pixels a side of a patch (default: 8)")
    parser.add_argument("--depth", type=int, help="without --corpus: layers (default: 1)")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, corpus = options.pop("out"), options.pop("corpus", None)
    for name in ("steps",) if corpus is None else ("patch", "depth"):
        if name in options:
            parser.error(f"--{name} goes {'with' if corpus is None else 'without'} --corpus")
    if corpus is None:
        print(f"{write_tower(out, **options)}: a tower with random weights")
        return
    right = train_tower(corpus, out, **options)
    print(f"{out}: right on held-out videos " + ", ".join(f"{name} {value:.1%}" for name, value in right.items()))


if __name__ == "__main__":
    main()
