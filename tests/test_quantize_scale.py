"""Large codebooks and several processes: memory far below tokens x codes, one answer for all processes."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import PATIENCE_S

from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.quantize.gradients import EntropyWeight, factorised_entropy


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, backward passes included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize(
    "settings",
    [
        dict(name="fsq", levels=[8] * 6, entropy=0.1, commitment=0.25),
        dict(name="lfq", codebook_size=1 << 18),
        dict(name="bsq", codebook_size=1 << 18),
    ],
    ids=lambda settings: settings["name"],
)
def test_entropy_at_262144_codes_is_exact_in_little_memory(settings):
    quantizer = build_quantizer(QuantizerConfig(**settings)).train()
    z = torch.randn(1024, quantizer.latent_dim, requires_grad=True)
    with Largest() as largest:
        got = quantizer(z)
        got.loss.backward()
    assert largest.numel <= 2 * (1 << 19), "tokens x codes would be 2^28"
    assert bool(z.grad.isfinite().all()) and bool((z.grad != 0).any())
    assert 0 < got.report["entropy_batch"] <= math.log(1 << 18)


def plain_entropies(logs: list[Tensor]) -> tuple[Tensor, Tensor]:
    joint = logs[0]
    for each in logs[1:]:
        joint = (joint[:, :, None] + each[:, None]).flatten(1)
    mean = joint.exp().mean(0)
    return -(joint.exp() * joint).sum(-1).mean(), -(mean * mean.log()).sum()


@pytest.mark.parametrize("sizes", [[8, 5, 4], [2] * 9, [3], [64, 2, 2], [2, 2, 64]])
def test_factorised_entropy_is_the_plain_formula(sizes):
    logits = [torch.randn(50, size, dtype=torch.float64, requires_grad=True) for size in sizes]
    logs = [each.log_softmax(-1) for each in logits]
    sample, batch = factorised_entropy(logs, group_bits=20)
    wanted_sample, wanted_batch = plain_entropies(logs)
    assert torch.allclose(sample, wanted_sample) and torch.allclose(batch, wanted_batch)
    got = torch.autograd.grad(2 * sample - 3 * batch, logits, retain_graph=True)
    wanted = torch.autograd.grad(2 * wanted_sample - 3 * wanted_batch, logits)
    assert all(torch.allclose(a, b) for a, b in zip(got, wanted))
    _, bound = factorised_entropy(logs, group_bits=3)
    assert bound >= batch - 1e-12  # independent groups have at least the joint entropy
    if len(sizes) > 3:
        assert bound > batch


def test_fsq_entropy_is_that_of_the_distances_to_every_code():
    config = QuantizerConfig(levels=[5, 4, 3], entropy=0.1, entropy_temperature=0.2)
    quantizer = build_quantizer(config).train()
    z = torch.randn(70, 3)
    bounded = quantizer.bound(z) / (quantizer.levels // 2)
    codes = quantizer.lookup(torch.arange(60)[:, None])
    p = (-torch.cdist(bounded, codes).square() / 0.2).softmax(-1)
    sample, batch = -(p * p.log()).sum(-1).mean(), -(p.mean(0) * p.mean(0).log()).sum()
    got = quantizer(z)
    assert torch.allclose(got.report["entropy_sample"], sample, atol=1e-5)
    assert torch.allclose(got.report["entropy_batch"], batch, atol=1e-5)
    assert torch.allclose(got.loss, 0.1 * (sample - batch), atol=1e-6)


def test_entropy_weight_warms_up_and_resumes():
    config = QuantizerConfig(name="lfq", entropy=0.1, entropy_warmup_steps=4, entropy_warmup_factor=3.0)
    weight = EntropyWeight(config, 0.5).train()
    first = [float(weight()) for _ in range(2)]
    again = EntropyWeight(config, 0.5).train()
    again.load_state_dict(weight.state_dict(), strict=True)
    then = [float(again()) for _ in range(4)]
    assert first + then == pytest.approx([0.3, 0.25, 0.2, 0.15, 0.1, 0.1])
    assert EntropyWeight(QuantizerConfig(name="lfq"), 0.5)() == 0.5 and not list(
        EntropyWeight(config, 0.1).parameters()
    )


# ---- several processes ----------------------------------------------------------------------------------------------

SHARED = {
    "vq": dict(codebook_size=16, dim=4, kmeans_init=False, dead_code_threshold=0, ema_decay=0.8),
    "rvq": dict(codebook_size=16, dim=4, kmeans_init=False, num_quantizers=2, ema_decay=0.8),
    "lfq": dict(codebook_size=64, entropy_temperature=0.5),
    "fsq": dict(levels=[5, 4, 3], entropy=0.1, entropy_temperature=0.2),
    "ibq": dict(codebook_size=20, dim=4, entropy_temperature=0.5),
}
STEPS = 3


def batch(width: int, step: int) -> Tensor:
    return torch.randn(2, 40, width, generator=torch.Generator().manual_seed(step))


def follow(quantizer, part: slice) -> list[Tensor]:
    """Losses' gradients and states of a few steps on a part of each batch."""
    out = []
    for step in range(STEPS):
        z = batch(quantizer.latent_dim, step).requires_grad_()
        quantizer(z[part]).loss.backward()
        out.append(z.grad[part].clone())
    return [*out, *(value.float() for value in quantizer.state_dict().values())]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    built = {}
    for name, settings in SHARED.items():
        torch.manual_seed(0)
        built[name] = build_quantizer(QuantizerConfig(name=name, **settings)).train()
    torch.manual_seed(rank)
    seeded = build_quantizer(QuantizerConfig(name="vq", codebook_size=8, dim=4, dead_code_threshold=3)).train()
    # only now, as a trainer does: models exist before their processes know of one another
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: follow(each, slice(rank, rank + 1)) for name, each in built.items()}
    for step in range(STEPS):
        seeded(batch(4, step)[rank : rank + 1])
    found["seeded"] = [seeded.codebook.clone()]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one():
    """States, and gradients averaged over processes, are those of one process with the batches of both."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            worker, args=(folder,), nprocs=2, join=False, start_method="spawn"
        )
        assert context is not None
        while not context.join(timeout=PATIENCE_S):
            pass
        both = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for name, settings in SHARED.items():
        torch.manual_seed(0)
        alone = follow(build_quantizer(QuantizerConfig(name=name, **settings)).train(), slice(0, 2))
        for place, wanted in enumerate(alone):
            if place < STEPS:  # each process's own tokens; gradients are averaged over processes, so theirs are twice
                got = torch.cat([each[name][place] for each in both]) / 2
            else:
                got = both[0][name][place]
                assert torch.equal(got, both[1][name][place]), name
            assert torch.allclose(got, wanted, atol=1e-5), (name, place)
    (one,), (other,) = (each["seeded"] for each in both)
    assert torch.equal(one, other) and len(one.unique(dim=0)) == 8, "k-means and re-seeding must agree"
