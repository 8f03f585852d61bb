"""The tiny twins of the presets learn: every chain of a paper's stages, from training to export to the next stage, on a
small procedural corpus. Scores are PSNR on held-out clips. Perceptual networks have random weights here: their terms
are there and have a gradient, their values mean nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vtok
from vtok import config as configuration
from vtok.data import shards, synthetic
from vtok.data.module import ClipDataModule
from vtok.export import main_export
from vtok.layers.begin import begin_head
from vtok.layers.convnext import ConvNeXt
from vtok.layers.perceptual import LPIPS
from vtok.layers.teacher import id_cross_entropy
from vtok.metrics.controls import MeanColour
from vtok.metrics.distortion import clip_psnr
from vtok.train import build, train
from vtok.types import Clip, to_uint8

CONFIGS = Path(__file__).parent.parent / "configs" / "flexible"
pytestmark = pytest.mark.slow


@dataclass
class Lab:
    root: Path
    shards: Path
    lpips: Path
    convnext: Path


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    root = tmp_path_factory.mktemp("tiny")
    synthetic.write_corpus(
        root / "corpus", clips=240, seconds=2, size=(32, 32), fps=8, complexity=(0, 1), workers=1, progress=False
    )
    # the manifest says which clips are held out; without it that would follow from the bytes of the files
    shards.main([str(root / "corpus" / "captions.jsonl"), "--out", str(root / "shards")])
    torch.manual_seed(0)
    torch.save(LPIPS("alex").state_dict(), root / "lpips.pt")
    torch.save(ConvNeXt().state_dict(), root / "convnext.pt")
    return Lab(root, root / "shards", root / "lpips.pt", root / "convnext.pt")


@dataclass
class Result:
    run: Path
    export: Path
    before: float  # dB, at step 0 (of this stage)
    after: float
    colour: float  # of mean_colour
    lines: list[dict[str, float]]
    clips: Clip

    def seen(self, term: str) -> bool:
        return any(line.get(f"train/{term}") for line in self.lines)


@torch.no_grad()
def quality(model, clip: Clip, budget: int | Tensor | None = None) -> float:
    model.eval()
    video = clip.video
    assert video is not None
    recon = []
    for i in range(0, len(clip), 4):
        some = Clip(clip.keys[i : i + 4], video[i : i + 4]).as_float()
        share = budget[i : i + 4] if isinstance(budget, Tensor) else budget
        recon.append(to_uint8(model.decode(model.encode(some, budget=share), size=(32, 32))))
    return float(clip_psnr(torch.cat(recon), video).mean())


def learn(lab: Lab, name: str, *overrides: str) -> Result:
    """Trains a twin, exports it, and scores it before and after."""
    settings = f"out={lab.root / 'runs'} data.shards={lab.shards / 'train'} data.val_shards={lab.shards / 'val'} "
    settings += (
        "data.num_workers=0 data.val_clips=12 trainer.progress=false trainer.tensorboard=false trainer.log_every=1"
    )
    settings = [*settings.split(), *overrides]
    config = configuration.load(CONFIGS / f"{name}.yaml", settings)
    data = ClipDataModule(config.data)
    held_out = list(data.val_dataloader())
    clip = Clip([k for c in held_out for k in c.keys], torch.cat([c.video for c in held_out]))
    before = quality(build(configuration.load(CONFIGS / f"{name}.yaml", settings)).model, clip)
    config.data.val_shards = ""  # scored below, where the step-0 model is
    run = train(config)
    export = lab.root / f"export-{config.name}"
    main_export([str(run), "--out", str(export), "--which", "last", "--no-entropy"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    flat, _ = MeanColour().reconstruct(clip.video)
    after, colour = quality(vtok.load(str(export)), clip), float(clip_psnr(flat, clip.video).mean())
    result = Result(run, export, before, after, colour, lines, clip)
    last = [line["time_s"] for line in lines if "time_s" in line][-1]
    print(f"| {name} | {config.trainer.max_steps} | {last:.0f} s | {result.before:.2f} | {result.after:.2f} "
          f"| {result.colour:.2f} |")  # fmt: skip
    return result


def check(result: Result, *terms: str) -> None:
    assert result.after > result.before + 0.1 and result.after > result.colour, result
    assert not [term for term in terms if not result.seen(term)]


@pytest.fixture(scope="module")
def teacher(lab) -> Result:
    return learn(lab, "titok_teacher_tiny")


@pytest.mark.long
def test_titok_teacher(teacher):
    check(teacher, "l2", "quantizer")


@pytest.mark.long
@pytest.mark.parametrize("family", ["titok", "one_d_piece"])
def test_both_stages(lab, teacher, family):
    """The first stage learns the teacher's ids, the second begins with its weights and learns pixels."""
    given = [f"model.teacher={teacher.export}"]
    first = learn(lab, f"{family}_tiny", *given)
    check(first, "teacher", "quantizer")
    given += [f"init_from={first.export}", f"objective.perceptual_weights={lab.convnext}"]
    second = learn(lab, f"{family}_stage2_tiny", *given)
    assert abs(second.before - first.after) < 1e-6
    check(second, "l2", "perceptual", "adversarial", "discriminator", "lecam")
    one, two = vtok.load(str(first.export)), vtok.load(str(second.export))
    with torch.no_grad():  # the encoder and its codebook rest, the decoders learn
        clip = Clip(first.clips.keys[:4], first.clips.video[:4])
        assert torch.equal(one.encode(clip).indices, two.encode(clip).indices)
    assert not torch.equal(one.teacher.out.weight, two.teacher.out.weight)
    assert quality(two, first.clips, 8) > 0


@pytest.mark.parametrize("sizes", [[40], [2, 4, 5]])
def test_a_head_begins_with_how_often_ids_come_and_which_are_alike(sizes):
    torch.manual_seed(0)
    head = torch.nn.Linear(96, sum(sizes))
    digits = [torch.randint(size, (4000,)).minimum(torch.randint(size, (4000,))) for size in sizes]
    rest = [torch.randn(size, 3) for size in sizes]
    codes = torch.stack([table[d] for table, d in zip(rest, digits)]).sum(0)
    found = begin_head(head, sizes, digits, codes)
    with torch.no_grad():  # what is the same in every token tells how often ids come
        logits = head(torch.zeros(1, 96)).split(sizes, -1)
    scored = id_cross_entropy(
        [x.expand(4000, 1, -1) for x in logits], [d[:, None] for d in digits], torch.ones(4000, 1)
    )
    assert abs(float(scored) - found["id_entropy"]) < 0.01
    for scores, rows, digit, table in zip(logits, head.weight.split(sizes), digits, rest):
        often = torch.bincount(digit, minlength=len(table)) / len(digit)
        assert torch.allclose(scores[0].softmax(-1), often, atol=1e-3)
        if len(table) > 10:  # what lies close in the codebook lies close in the head (few entries are whitened apart)
            assert correlation(torch.cdist(rows, rows).detach(), torch.cdist(table, table)) > 0.9


@pytest.mark.long
def test_base(lab):
    check(learn(lab, "base_tiny"), "l2")


VIDEO_TERMS = ("l1", "perceptual", "quantizer", "prior", "adversarial", "discriminator", "lecam")


@pytest.mark.long
def test_larp(lab):
    result = learn(lab, "larp_tiny", f"objective.perceptual_weights={lab.lpips}")
    check(result, *VIDEO_TERMS)


@pytest.mark.long
def test_adaptok_and_its_scorer(lab):
    result = learn(lab, "adaptok_tiny", f"objective.perceptual_weights={lab.lpips}")
    check(result, *VIDEO_TERMS)
    model = vtok.load(str(result.export))
    short = [quality(model, result.clips, budget) for budget in (4 * 32, 4 * 128)]
    assert short[0] > 0.8 * result.after and short[1] > result.colour
    scored = learn(lab, "adaptok_scorer_tiny", f"init_from={result.export}",
                   f"objective.perceptual_weights={lab.lpips}")  # fmt: skip
    assert abs(scored.before - result.after) < 0.01 and abs(scored.after - result.after) < 0.01  # the tokenizer rests
    assert scored.seen("scorer")
    model = vtok.load(str(scored.export))
    clip = scored.clips
    some = Clip(clip.keys[:8], clip.video[:8]).as_float()
    for total in (256, 900, 1500):
        share = model.allocate(some, total)
        assert share.shape == (8, 4) and int(share.sum(1).max()) <= total and int(share.min()) >= 64
        assert quality(model, Clip(clip.keys[:8], clip.video[:8]), share) > 0
    predicted, measured = distortions(model, some, lab)
    found = correlation(predicted, measured)
    print(f"correlation of predicted and measured distortion: {found:.3f}")
    assert found > 0.5


@torch.no_grad()
def distortions(model, clip: Clip, lab: Lab) -> tuple[Tensor, Tensor]:
    """[B, 4, levels] logarithms of LPIPS, predicted and measured with one time block cut at a time."""
    from vtok.layers.perceptual import load_lpips

    net, shape = load_lpips(lab.lpips), model.config
    chunks = model.chunks(clip.video, clip.frames())
    latents = model.latents(chunks)
    codes = model.quantize(latents, chunks).embeddings
    predicted = model.scorer.distortion(latents.z, codes, chunks.block_valid).log()
    measured = torch.zeros_like(predicted)
    rank, frames = torch.arange(shape.num_tokens), shape.block_frames
    for block in range(shape.blocks):
        inside = slice(block * frames, (block + 1) * frames)
        for level in range(shape.scorer_levels):
            keep = torch.ones(codes.shape[:3], dtype=torch.bool)
            keep[:, block] &= rank < (level + 1) * shape.num_tokens // shape.scorer_levels
            recon = model.decode_chunks(codes, keep, clip.frames(), frames=16, size=(32, 32))[:, :, inside]
            pair = (v.transpose(1, 2).flatten(0, 1) for v in (recon.clamp(-1, 1), clip.video[:, :, inside]))
            measured[:, block, level] = net(*pair).reshape(len(clip), -1).mean(1).log()
    return predicted, measured


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
