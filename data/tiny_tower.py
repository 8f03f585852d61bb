"""A small image tower to freeze, as timm saves one: python data/tiny_tower.py OUT [--corpus DIR].

With --corpus, a folder that data/demo_corpus.py wrote, it is trained on frames of that corpus' training videos, in a
few minutes on a CPU, with two objectives:

- the mean of its patches tells which words and pairs of words the caption of that moment holds (logistic loss; Joulin
  et al. 2016, https://arxiv.org/abs/1511.02251), so that features know colours, shapes and directions by their names;
- each patch gives back its own pixels through one linear map (squared error), so that they stay where they are seen.

Without it the weights are random and the features mean nothing: enough for tests, and for the tiny twins of presets
that align with a tower (`objective.align.tower.name=OUT`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtok.data.decode import VideoReader


def make_tower(*, size: int, patch: int, width: int, depth: int, heads: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """A vision transformer with random weights, and the arguments that make it again."""
    torch.manual_seed(seed)
    shape = dict(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
    assert isinstance(model, VisionTransformer)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size), "num_classes": 0}
    return model, shape


def write_tower(out: Path, *, size: int = 32, patch: int = 8, width: int = 32, depth: int = 1, seed: int = 0) -> Path:
    """A vision transformer with random weights for frames of `size` x `size` pixels in the folder `out`; its path."""
    model, shape = make_tower(size=size, patch=patch, width=width, depth=depth, heads=2, seed=seed)
    timm.models.save_for_hf(model, out, safe_serialization=True, model_args=shape)
    return out


def phrases(text: str) -> set[str]:
    """The words of a text and its pairs of neighbours: "red circle" tells what the words alone do not."""
    words = re.findall(r"\w+", text.lower())
    return {*words, *(f"{a} {b}" for a, b in zip(words, words[1:]))}


def read_frames(corpus: Path, split: str, *, size: int, per_video: int) -> Iterator[tuple[Tensor, str]]:
    """(uint8 [3, size, size], the caption of that moment) of frames evenly spread over the videos of a split."""
    rows = [json.loads(line) for line in (corpus / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in track([row for row in rows if row.get("split") == split], description=f"frames of {split}"):
        times = [(i + 0.5) * row["duration"] / per_video for i in range(per_video)]
        with VideoReader(corpus / row["file"]) as reader:
            frames, times = reader.window(times=times)
        pixels = F.interpolate(frames.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)
        for frame, at in zip(pixels, times.tolist()):
            said = [c["text"] for c in row["captions"] if c["start_s"] <= at < c["end_s"]]
            yield frame, said[0] if said else row["caption"]


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over columns of the average precision of scores [n, m] against truth [n, m] in {0, 1}."""
    order = scores.argsort(0, descending=True)
    hits = truth.gather(0, order)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return float(((precision * hits).sum(0) / hits.sum(0).clamp(min=1))[truth.any(0)].mean())


def train_tower(
    corpus: Path,
    out: Path,
    *,
    size: int = 64,
    patch: int = 8,
    width: int = 96,
    depth: int = 4,
    steps: int = 1500,
    batch: int = 64,
    per_video: int = 12,
    lr: float = 1e-3,
    seed: int = 0,
) -> dict[str, float]:
    """Train a tower on the training videos of `corpus` and save it in `out`; its scores on the held-out ones.

    A folder that holds the tower of the same corpus and settings is left as it is.
    Returns: `words_map`, mean average precision of the phrases; `words_chance`, that of a guess by their frequency;
        `psnr_db` of the pixels given back.
    """
    settings = dict(size=size, patch=patch, width=width, depth=depth, steps=steps, batch=batch, per_video=per_video)
    described = json.dumps({**settings, "lr": lr, "seed": seed, "torch": torch.__version__}, sort_keys=True).encode()
    name = hashlib.sha256(described + (corpus / "captions.jsonl").read_bytes()).hexdigest()
    done = out / "trained.json"
    if done.is_file() and (about := json.loads(done.read_text()))["made_of"] == name:
        return about["scores"]
    train, held = (list(read_frames(corpus, split, size=size, per_video=per_video)) for split in ("train", "val"))
    counts = Counter(phrase for _, text in train for phrase in phrases(text))
    known = sorted(p for p, n in counts.items() if 0.01 * len(train) <= n <= 0.8 * len(train))
    if not known or not held:
        raise ValueError(f"{corpus} has too few captions or no validation videos to train a tower on")

    def tensors(pairs: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor]:
        truth = torch.tensor([[float(p in found) for p in known] for found in (phrases(t) for _, t in pairs)])
        return torch.stack([frame for frame, _ in pairs]), truth

    (pixels, truth), (held_pixels, held_truth) = tensors(train), tensors(held)
    model, shape = make_tower(size=size, patch=patch, width=width, depth=depth, heads=width // 32, seed=seed)
    words, back = nn.Linear(width, len(known)), nn.Linear(width, 3 * patch * patch)
    parts = nn.ModuleList([model, words, back])
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))

    def run(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of the phrases; the patches' pixels as given back and as they are, in [0, 1]."""
        x = frames.float() / 255
        patches = model.forward_features((x - mean) / std)[:, model.num_prefix_tokens :]
        seen = F.unfold(x, patch, stride=patch).transpose(1, 2)
        return words(patches.mean(1)), back(patches), seen

    optimizer = torch.optim.AdamW(parts.parameters(), lr=lr, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in track(range(steps), description="tower"):
        some = torch.randint(len(pixels), (batch,), generator=generator)
        scores, given, seen = run(pixels[some])
        loss = F.binary_cross_entropy_with_logits(scores, truth[some]) + 5 * F.mse_loss(given, seen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        plan.step()
    model.eval()
    with torch.no_grad():
        scores, given, seen = (torch.cat(each) for each in zip(*(run(part) for part in held_pixels.split(256))))
    result = {
        "words_map": mean_average_precision(scores, held_truth),
        "words_chance": float(held_truth.mean(0)[held_truth.any(0)].mean()),
        "psnr_db": float(-10 * F.mse_loss(given, seen).log10()),
    }
    timm.models.save_for_hf(model, out, safe_serialization=True, model_args=shape)
    done.write_text(json.dumps({"made_of": name, "settings": settings, "scores": result}, indent=1) + "\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="folder of data/demo_corpus.py; without it, random weights")
    parser.add_argument("--size", type=int, help="pixels a side (default: 64, of random weights 32)")
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--width", type=int, help="default: 96, of random weights 32")
    parser.add_argument("--depth", type=int, help="default: 4, of random weights 1")
    parser.add_argument("--steps", type=int, help="default: 1500")
    parser.add_argument("--seed", type=int, default=0)
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out, corpus = options.pop("out"), options.pop("corpus", None)
    if corpus is None:
        if "steps" in options:
            parser.error("--steps trains a tower: name the corpus it is to see, --corpus DIR")
        print(f"{write_tower(out, **options)}: a tower with random weights")
        return
    scores = train_tower(corpus, out, **options)
    print(f"{out}: on held-out videos " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
