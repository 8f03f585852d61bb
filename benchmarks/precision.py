"""What a lower precision does to ids, end to end: the share that stays what it is in float32, and the PSNR.

    python benchmarks/precision.py RUN [RUN ...] [--clips N] [--device cpu]

RUN is a run directory; its validation clips are encoded in float32, under bfloat16 autocast, and with weights that are
bfloat16 too (float buffers stay float32, as in training with `trainer.precision=bf16-true`). Quantizers compute in
float32 whatever autocast says: given the same latents ids are identical (tests/test_quantize_laws.py). What differs is
the latents, and those near a border of two codes fall to its other side.

    ids       share of equal ids; a token counts once for each of its ids
    digits    share of equal digits of ids (`model.index_factors`: levels of FSQ, halves of a large codebook); one digit
              off is another id
    PSNR      dB, decoded in that precision, and the difference to float32
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok.coding.entropy import factors_of, to_symbols
from vtok.data.module import ClipDataModule
from vtok.loading import load_run
from vtok.metrics.distortion import clip_psnr
from vtok.training import strategy
from vtok.types import Clip, to_uint8

FORMS = ("float32", "autocast", "weights too")
HEAD = f"{'run':32}{'precision':>13}{'ids':>9}{'equal':>9}{'digits':>9}{'PSNR':>8}{'':>8}"


def in_form(model: Any, form: str) -> Any:
    """The model as it computes in this precision."""
    if form != "weights too":
        return model
    low = copy.deepcopy(model)
    kept = strategy.float_buffers(low)
    low.bfloat16()
    strategy.restore_buffers(low, kept)
    return low


@torch.inference_mode()
def measure(model: Any, clips: list[Clip], *, form: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [N, Q] of all real tokens, PSNR [clips] in dB)."""
    low, ids, psnr = in_form(model, form).to(device), [], []
    for clip in clips:
        assert clip.video is not None
        moved = clip.to(device).as_float()
        assert moved.video is not None
        if form == "weights too":
            moved = replace(moved, video=moved.video.bfloat16())
        context = nullcontext() if form == "float32" else torch.autocast(device.type, torch.bfloat16)
        with context:
            tokens = low.encode(moved)
            video = low.decode(tokens, size=(clip.video.shape[3], clip.video.shape[4]))
        ids.append(tokens.indices[tokens.mask].cpu())
        psnr.append(clip_psnr(to_uint8(video.float()).cpu(), clip.video, clip.frames()))
    return torch.cat(ids), torch.cat(psnr)


def report(run: Path, *, limit: int, device: torch.device) -> None:
    model, config = load_run(run)
    if not model.codebook_sizes:
        print(f"{run.name:32}{'continuous latents: no ids':>22}")
        return
    clips = batches(config.data, limit)
    factors = factors_of(model)
    reference, plain = measure(model, clips, form=FORMS[0], device=device)
    print(f"{run.name:32}{FORMS[0]:>13}{reference.numel():9d}{'':18}{float(plain.mean()):8.2f}", flush=True)
    for form in FORMS[1:]:
        ids, psnr = measure(model, clips, form=form, device=device)
        equal = float((ids == reference).double().mean())
        same = (to_symbols(ids.numpy(), factors) == to_symbols(reference.numpy(), factors)).mean()
        loss = float((psnr - plain).mean())
        print(f"{'':32}{form:>13}{'':9}{equal:9.4f}{same:9.4f}{float(psnr.mean()):8.2f}{loss:+8.2f}", flush=True)


def batches(data: Any, limit: int) -> list[Clip]:
    """Validation batches of at least `limit` clips together, or all."""
    found: list[Clip] = []
    for clip in ClipDataModule(data).val_dataloader():
        if sum(map(len, found)) >= limit:
            break
        found.append(clip)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--clips", type=int, default=64, help="at most about this many validation clips (default 64)")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    print(HEAD)
    for run in asked.runs:
        report(run, limit=asked.clips, device=torch.device(asked.device))


if __name__ == "__main__":
    main()
