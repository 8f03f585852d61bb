"""Peak memory and time of every quantizer's training step at 2^18 codes, next to the plain entropy formula.

    python benchmarks/quantizers.py [--tokens 5120] [--bits 18] [--repeats 3] [--only NAME ...]

One step = forward and backward of 5 x 1024 latents (17 frames of 256 x 256 at 4 x 8 x 8), one thread, in CPU time,
which other work on the machine disturbs least. Each row runs in a process of its own; memory is its highest resident
size less what it held before the first step (the codebook and the latents). The second column is what 2^18 codes are
where a quantizer has several ids a token. The rows named `plain` build the softmax over all codes for every token, as
entropy terms of LFQ and FSQ are commonly written, at 2^12 codes: memory and time both grow in proportion to the codes,
and the last column says to what at 2^18.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor

from vtok.quantize import QuantizerConfig, build_quantizer

PLAIN_BITS = 12


def settings(bits: int) -> dict[str, dict]:
    """Every quantizer with 2^bits codes, as far as its kind allows."""
    size, half, levels = 1 << bits, 1 << bits // 2, [8] * (bits // 3)
    vector = dict(codebook_size=size, dim=16, kmeans_init=False)
    return {
        "fsq": dict(name="fsq", levels=levels),
        "fsq, entropy": dict(name="fsq", levels=levels, entropy=0.1, commitment=0.25),
        "fsq, 2 ids a token": dict(name="fsq", levels=levels[: len(levels) // 2], num_codebooks=2, entropy=0.1),
        "rfsq, 2 steps": dict(name="rfsq", levels=levels[: len(levels) // 2], num_quantizers=2),
        "lfq": dict(name="lfq", codebook_size=size),
        "lfq, groups of 9 bits": dict(name="lfq", codebook_size=size, entropy_group_bits=9),
        "bsq": dict(name="bsq", codebook_size=size),
        "vq": dict(name="vq", **vector),
        "vq by gradient": dict(name="vq", ema_decay=0.0, **vector),
        "vq, 2 parts": dict(name="vq", **{**vector, "codebook_size": half}, num_codebooks=2),
        "simvq": dict(name="simvq", codebook_size=size, dim=16),
        "ibq": dict(name="ibq", codebook_size=size, dim=16),
        "rvq, 2 steps": dict(name="rvq", **{**vector, "codebook_size": half}, num_quantizers=2),
        "dimwise": dict(name="dimwise", dim=16),
        "identity, kl": dict(name="identity", dim=16, kl=1e-6),
    }


def plain_entropy_loss(z: Tensor, codes: Tensor) -> Tensor:
    """Per-sample minus batch entropy with the softmax over all codes held for every token."""
    p = (-(z.square().sum(-1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(-1)) / 0.01).softmax(-1)
    mean = p.mean(0)
    sample = -(p * p.clamp_min(1e-12).log()).sum(-1).mean()
    return sample + (mean * mean.clamp_min(1e-12).log()).sum()


def measure(config: QuantizerConfig, *, plain: bool, tokens: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantizer = build_quantizer(config).train()
    z = torch.randn(tokens, quantizer.latent_dim)
    codes = quantizer.lookup(torch.arange(quantizer.codebook_sizes[0])[:, None]) if plain else z
    z[:1].requires_grad_().sum().backward()  # starts what a first backward pass starts
    held, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        latents = z.clone().requires_grad_()
        began = time.process_time()
        if plain:
            plain_entropy_loss(latents, codes).backward()
        else:
            got = quantizer(latents)
            (got.loss + got.embeddings.square().mean()).backward()
        times.append(time.process_time() - began)
        assert latents.grad is not None and bool(latents.grad.isfinite().all())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    ids = len(quantizer.codebook_sizes)
    codes_per_id = quantizer.codebook_sizes[0] if ids else 0
    return dict(mib=peak / 1024, ms=1e3 * statistics.median(times), ids=ids, codes=codes_per_id)


def in_a_process(job: dict) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{job}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5 * 1024)
    parser.add_argument("--bits", type=int, default=18, help="log2 of the codes, a multiple of 6")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose name begins with one of these")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        job = json.loads(asked.job)
        config = QuantizerConfig(**job["config"])
        print(json.dumps(measure(config, plain=job["plain"], tokens=job["tokens"], repeats=job["repeats"])))
        return
    if asked.bits % 6 or asked.bits < 6 or asked.tokens < 1 or asked.repeats < 1:
        raise SystemExit(
            f"error: --bits {asked.bits} must be a multiple of 6 (FSQ's levels are 8, halved for two ids), --tokens "
            f"{asked.tokens} and --repeats {asked.repeats} 1 or more"
        )
    wanted = tuple(asked.only or [""])
    rest = dict(tokens=asked.tokens, repeats=asked.repeats)
    print(f"{asked.tokens} latents, one thread, torch {torch.__version__}: forward + backward\n")
    print(f"| quantizer | ids x codes | peak MiB | CPU ms | at 2^{asked.bits} codes |\n|---|---|---|---|---|")
    for name, config in settings(asked.bits).items():
        if not name.startswith(wanted):
            continue
        got = in_a_process(dict(config=config, plain=False, **rest))
        print(f"| {name} | {got['ids']} x {got['codes']} | {got['mib']:.0f} | {got['ms']:.0f} | |", flush=True)
    for name in ("fsq, entropy", "lfq", "bsq"):
        if not f"plain {name}".startswith(wanted):
            continue
        got = in_a_process(dict(config=settings(PLAIN_BITS)[name], plain=True, **rest))
        factor = 2 ** (asked.bits - PLAIN_BITS)
        scaled = f"{got['mib'] * factor / 1024:.1f} GiB, {got['ms'] * factor / 1e3:.0f} s"
        cells = f"{got['ids']} x {got['codes']} | {got['mib']:.0f} | {got['ms']:.0f} | {scaled}"
        print(f"| plain {name.partition(',')[0]} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
