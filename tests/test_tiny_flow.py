"""The tiny twins of the flow-decoded presets learn: a tokenizer for the latents, then a flow on them, on a small
procedural corpus. The tower that patches are aligned with has random weights here. Scored is the error of the velocity
on held-out clips, with the same noise before and after: a draw's PSNR says little of a network this young."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from test_tiny import CONFIGS, Lab
from test_tiny import lab as lab  # a fixture

import vtok
from vtok import config as configuration
from vtok.budget import NestedConfig
from vtok.data.module import ClipDataModule
from vtok.export import main_export
from vtok.train import build, train

pytestmark = pytest.mark.slow
QUIET = "data.num_workers=0 data.val_clips=12 trainer.progress=false trainer.tensorboard=false trainer.log_every=5"


@pytest.fixture(scope="module")
def tower(lab) -> Path:
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8)
    transformers.ViTModel(transformers.ViTConfig(**shape, image_size=32)).save_pretrained(lab.root / "tower")
    transformers.ViTImageProcessor(size=dict(height=32, width=32)).save_pretrained(lab.root / "tower")
    return lab.root / "tower"


def settings(lab: Lab, *more: str) -> list[str]:
    where = f"out={lab.root / 'runs'} data.shards={lab.shards / 'train'} data.val_shards={lab.shards / 'val'}"
    return [*where.split(), *QUIET.split(), *more]


@pytest.fixture(scope="module")
def latents(lab) -> Path:
    """Continuous tokenizer of the twins, learned for a few steps: what matters here is that a flow runs on it."""
    given = settings(lab, f"objective.perceptual_weights={lab.lpips}", "trainer.max_steps=30", "name=latents")
    run = train(configuration.load(CONFIGS.parent / "discrete" / "vidtok_kl_488_tiny.yaml", given))
    main_export([str(run), "--out", str(lab.root / "latents"), "--which", "last", "--no-entropy"])
    return lab.root / "latents"


@torch.no_grad()
def velocity_error(lit, clips, *, tokens: bool | None = None) -> float:
    """Mean over clips; tokens: all of them are told, or none; as the objective draws them where it is not said."""
    lit.eval()
    if tokens is not None:
        lit.objective.config.nested = NestedConfig("full")
        lit.objective.config.unconditional = 0.0 if tokens else 1.0
    seen = []
    for index, clip in enumerate(clips):
        torch.manual_seed(index)
        loss = lit.objective(lit.model, clip.as_float(), 0)
        assert torch.isfinite(loss.total) and {"flow", "align", "quantizer"} <= loss.report.keys()
        assert loss.report["flow"] > 0 and loss.report["align"] > 0
        seen.append(float(loss.report["flow"]))
    return sum(seen) / len(seen)


@pytest.mark.long
@pytest.mark.parametrize("name", ["flextok_pixel", "flextok", "videoflextok"])
def test_twins_learn(lab, tower, latents, name):
    given = settings(lab, f"objective.align.tower.name={tower}")
    given += [] if "pixel" in name else [f"model.latents={latents}"]
    config = configuration.load(CONFIGS / f"{name}_tiny.yaml", given)
    clips = list(ClipDataModule(config.data).val_dataloader())
    fresh = build(configuration.load(CONFIGS / f"{name}_tiny.yaml", given))
    fresh.model.fit_statistics([clip.as_float().video for clip in clips])
    before = velocity_error(fresh, clips)
    config.data.val_shards = ""
    run = train(config)
    export = lab.root / f"export-{name}"
    main_export([str(run), "--out", str(export), "--which", "last", "--no-entropy"])
    fresh.model = vtok.load(str(export))
    after = velocity_error(fresh, clips)
    print(f"| {name}_tiny | {config.trainer.max_steps} | {before:.3f} | {after:.3f} |")
    assert after < 0.8 * before
    told, untold = (velocity_error(fresh, clips, tokens=tokens) for tokens in (True, False))
    print(f"  told all tokens {told:.3f}, none {untold:.3f}")
    assert told < 0.98 * untold, "the decoder reads its tokens"
    video = vtok.load(str(export)).decode(fresh.model.encode(clips[0], budget=len(clips[0].video[0, 0])), size=(32, 32))
    assert video.shape == clips[0].video.shape and video.isfinite().all()
