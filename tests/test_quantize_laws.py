"""What holds for every quantizer: shapes, float32, padding, resume, gradients, exports without the training library."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from vtok.coding.entropy import factors_of, to_symbols
from vtok.quantize import QuantizerConfig, build_quantizer, vector
from vtok.quantize.config import KEYS
from vtok.shipping.bundle import bundle

CASES = {
    "fsq": dict(levels=[8, 5, 4]),
    "fsq multi-token": dict(name="fsq", levels=[5, 4, 3], num_codebooks=2),
    "fsq entropy": dict(levels=[5, 4, 3], entropy=0.1, commitment=0.25, entropy_warmup_steps=4),
    "lfq": dict(codebook_size=256, entropy_temperature=0.5),
    "lfq product": dict(name="lfq", codebook_size=16, num_codebooks=2, entropy_warmup_steps=4),
    "bsq": dict(codebook_size=256, entropy_temperature=0.1, commitment=0.1),
    "vq": dict(codebook_size=32, dim=6, dead_code_threshold=1),
    "vq euclidean": dict(name="vq", codebook_size=32, dim=6, cosine=False),
    "vq gradient": dict(name="vq", codebook_size=32, dim=6, cosine=False, ema_decay=0.0, kmeans_init=False),
    "vq product": dict(name="vq", codebook_size=16, dim=6, num_codebooks=2, cosine=False),
    "simvq": dict(codebook_size=32, dim=6),
    "ibq": dict(codebook_size=32, dim=6, entropy_temperature=0.5),
    "rvq": dict(codebook_size=16, dim=6, num_quantizers=3, dead_code_threshold=1),
    "rvq gradient": dict(name="rvq", codebook_size=16, dim=6, num_quantizers=3, ema_decay=0.0, kmeans_init=False),
    "rvq product": dict(name="rvq", codebook_size=16, dim=6, num_quantizers=2, num_codebooks=2),
    "rfsq": dict(levels=[5, 4, 2], num_quantizers=3),
    "rfsq product": dict(name="rfsq", levels=[5, 4, 2], num_quantizers=2, num_codebooks=2),
    "dimwise": dict(dim=6, bins=9),
    "dimwise kl": dict(name="dimwise", dim=6, bins=9, kl=1e-6),
    "identity": dict(dim=6),
    "identity kl": dict(name="identity", dim=6, kl=1e-3),
}
DISCRETE = [case for case in CASES if not case.startswith("identity")]


def config_of(case: str) -> QuantizerConfig:
    return QuantizerConfig(**({"name": case.split()[0]} | CASES[case]))


def latents(quantizer, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, quantizer.latent_dim, generator=torch.Generator().manual_seed(seed))


def make(case: str):
    """A quantizer that has seen one batch, so that its codebook is filled; in evaluation mode."""
    torch.manual_seed(0)
    quantizer = build_quantizer(config_of(case)).train()
    quantizer(latents(quantizer, 4, 50))
    return quantizer.eval()


def test_every_name_is_a_case_and_every_key_is_read():
    assert {config_of(case).name for case in CASES} == set(KEYS)
    assert {key for keys in KEYS.values() for key in keys} == {f.name for f in fields(QuantizerConfig)} - {"name"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_types(case, training):
    quantizer = make(case).train(training)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        z = latents(quantizer, 2, 3, 7).to(dtype)
        got = quantizer(z)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert got.embeddings.shape == (2, 3, 7, quantizer.dim) and got.embeddings.dtype == kept
        assert got.loss.ndim == 0 and got.loss.dtype == kept and bool(got.loss.isfinite())
        assert all(value.ndim == 0 and not value.requires_grad for value in got.report.values())
        if case in DISCRETE:
            sizes = torch.tensor(quantizer.codebook_sizes)
            assert got.indices.shape == (2, 3, 7, len(sizes)) and got.indices.dtype == torch.int64
            assert bool(((got.indices >= 0) & (got.indices < sizes)).all())
            assert len(got.indices.unique()) > 1
        else:
            assert got.indices is None and quantizer.codebook_sizes == ()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_nothing(case, training):
    plain, cast = make(case).train(training), make(case).train(training)
    z = latents(plain, 2, 100, seed=1)
    torch.manual_seed(1)
    want = plain(z)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = cast(z)
    assert torch.equal(got.embeddings, want.embeddings) and torch.equal(got.loss, want.loss)
    assert want.indices is None or torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("case", DISCRETE)
def test_lookup_gives_the_embeddings(case):
    quantizer = make(case)
    got = quantizer(latents(quantizer, 3, 200, seed=2))
    assert torch.equal(quantizer.lookup(got.indices), got.embeddings)


@pytest.mark.parametrize("case", DISCRETE)
def test_factors_are_the_digits_of_the_ids(case):
    """One certain distribution for each digit, as an entropy model counts them, expects the code itself."""
    quantizer = make(case)
    indices = quantizer(latents(quantizer, 100, seed=3)).indices
    factors = factors_of(quantizer)
    symbols = torch.from_numpy(to_symbols(indices.numpy(), factors))
    sizes = [size for each in factors for size in each]
    certain = [F.one_hot(symbols[:, i], size).float() for i, size in enumerate(sizes)]
    assert torch.allclose(quantizer.expect(certain), quantizer.lookup(indices), atol=1e-6)
    assert all(math.prod(each) == size for each, size in zip(factors, quantizer.codebook_sizes))


@pytest.mark.parametrize("case", CASES)
def test_padding_moves_nothing(case):
    """Junk where the mask is off: the same losses and states, and no gradient into it."""
    outcomes = []
    for junk in (0.0, 50.0):
        quantizer = make(case).train()
        z = latents(quantizer, 2, 40, seed=4)
        z[:, 30:] = junk + torch.rand(2, 10, quantizer.latent_dim)
        z.requires_grad_()
        mask = (torch.arange(40) < 30).expand(2, 40)
        torch.manual_seed(2)
        got = quantizer(z, mask)
        if got.loss.requires_grad:
            got.loss.backward()
            assert z.grad is None or not z.grad[:, 30:].any()
        ids = None if got.indices is None else got.indices[:, :30]
        outcomes.append((got.loss, ids, got.embeddings[:, :30], got.report, quantizer.state_dict()))
    (loss, ids, embeddings, report, state), (loss2, ids2, embeddings2, report2, state2) = outcomes
    assert torch.equal(loss, loss2) and report == report2 and (ids is None or torch.equal(ids, ids2))
    if case != "identity kl":  # its noise is drawn for all positions
        assert torch.equal(embeddings, embeddings2)
    assert all(torch.equal(state[key], state2[key]) for key in state)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_padding_alone_is_harmless(case):
    quantizer = make(case).train()
    before = copy.deepcopy(quantizer.state_dict())
    z = latents(quantizer, 2, 5).requires_grad_()
    got = quantizer(z, torch.zeros(2, 5, dtype=torch.bool))
    assert float(got.loss.detach()) == 0 and bool(got.embeddings.isfinite().all())
    after = quantizer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before if not key.endswith("step"))


@pytest.mark.parametrize("case", CASES)
def test_resume_goes_on_as_if_nothing_had_happened(case):
    """Saved after the first batch and loaded into a fresh one: the second batch does not seed the codebook again."""
    quantizer = make(case).train()
    saved = copy.deepcopy(quantizer.state_dict())
    torch.manual_seed(99)
    again = build_quantizer(config_of(case)).train()
    again.load_state_dict(saved, strict=True)
    outcomes = []
    for each in (quantizer, again):
        torch.manual_seed(5)
        got = each.train()(latents(each, 4, 50, seed=5) * 3)
        outcomes.append((got.embeddings, got.loss, *each.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


@pytest.mark.parametrize("case", CASES)
def test_twin_without_the_training_library(case, monkeypatch):
    quantizer = make(case)
    monkeypatch.setattr(vector, "library", None)
    twin = build_quantizer(config_of(case)).eval()
    twin.load_state_dict(quantizer.state_dict(), strict=True)
    z = latents(quantizer, 3, 100, seed=6)
    want, got = quantizer(z), twin(z)
    assert torch.equal(got.embeddings, want.embeddings)
    assert want.indices is None or torch.equal(got.indices, want.indices)
    config = config_of(case)
    if config.name in ("vq", "rvq") and config.ema_decay:
        with pytest.raises(RuntimeError, match="needs vector-quantize-pytorch"):
            twin.train()(z)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """All quantizers as an export carries them: one file, without this package and the training library."""
    source = bundle([("vtok.quantize", ["QuantizerConfig", "build_quantizer", "convert_ids"])])
    path = tmp_path_factory.mktemp("bundle") / "quantizers_alone.py"
    path.write_text("from __future__ import annotations\n\n" + source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@pytest.mark.parametrize("case", CASES)
def test_bundled_into_one_file(case, bundled):
    assert bundled.library is None
    quantizer, alone = make(case), bundled.build_quantizer(bundled.QuantizerConfig(**vars(config_of(case)))).eval()
    alone.load_state_dict(quantizer.state_dict(), strict=True)
    z = latents(quantizer, 3, 50, seed=10)
    want, got = quantizer(z), alone(z)
    assert torch.equal(got.embeddings, want.embeddings)
    assert want.indices is None or torch.equal(got.indices, want.indices)
    assert want.indices is None or torch.equal(alone.lookup(got.indices), want.embeddings)


STRAIGHT = ["lfq", "lfq product", "vq euclidean", "vq gradient", "vq product", "simvq", "rvq", "rvq gradient"]


@pytest.mark.parametrize("case", [*STRAIGHT, "rvq product", "dimwise", "identity"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_pass_straight_through(case, training):
    quantizer = make(case).train(training)
    z = latents(quantizer, 3, 20, seed=7).requires_grad_()
    wanted = torch.randn(3, 20, quantizer.dim)
    (quantizer(z).embeddings * wanted).sum().backward()
    assert torch.equal(z.grad, wanted)


@pytest.mark.parametrize("case", ["fsq", "fsq multi-token", "bsq", "vq", "rfsq", "rfsq product"])
def test_gradients_are_those_of_what_comes_before_the_rounding(case):
    quantizer = make(case).train()
    z = latents(quantizer, 3, 20, seed=8).requires_grad_()
    wanted = torch.randn(3, 20, quantizer.dim)
    (quantizer(z).embeddings * wanted).sum().backward()
    free = z.detach().requires_grad_()
    parts = list(quantizer.parts) if hasattr(quantizer, "parts") else [quantizer]

    def smooth(part, x):
        if case in ("bsq", "vq"):
            return F.normalize(x, dim=-1)
        return part.bound(x) / (part.levels // 2 if case.startswith("fsq") else 1)

    smoothed = [smooth(part, x) for part, x in zip(parts, free.chunk(len(parts), -1))]
    (torch.cat(smoothed, -1) * wanted).sum().backward()
    assert torch.allclose(z.grad, free.grad, atol=1e-6) and bool((z.grad != 0).any())


@pytest.mark.parametrize("case", ["fsq entropy", "lfq", "bsq", "vq", "vq gradient", "simvq", "ibq", "rvq"])
def test_losses_reach_the_latents(case):
    quantizer = make(case).train()
    z = latents(quantizer, 3, 20, seed=9).requires_grad_()
    quantizer(z).loss.backward()
    assert bool((z.grad != 0).any()) and bool(z.grad.isfinite().all())
    for parameter in quantizer.parameters():
        assert bool((parameter.grad != 0).any())


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(name="fqs"), "choose fsq, vq, lfq, bsq"),
        (dict(name="lfq", codebook_size=1000), "power of two"),
        (dict(name="bsq", codebook_size=12), "power of two"),
        (dict(levels=[8, 1]), "every level must be 3 or more"),
        (dict(name="rfsq", levels=[4, 1]), "every level must be 2 or more"),
        (dict(name="vq", dim=10, num_codebooks=4), "dim=10 cannot be cut into num_codebooks=4"),
        (dict(name="vq", ema_decay=0.0), "kmeans_init=false"),
        (dict(name="rvq", ema_decay=0.0), "kmeans_init=false"),
        (dict(name="vq", ema_decay=1.0), r"ema_decay=1.0 must be in \[0, 1\)"),
        (dict(name="lfq", entropy_temperature=0.0), "entropy_temperature=0.0 must be above 0"),
        (dict(entropy_warmup_steps=10), "warms up an entropy term that is off"),
        (dict(commitment=-1.0), "commitment=-1.0 must be 0 or more"),
        (dict(name="rvq", num_quantizers=0), "num_quantizers=0 must be 1 or more"),
        (dict(name="dimwise", bins=1), "bins=1 must be 2 or more"),
        (dict(codebook_size=1024), "codebook_size=1024 does not apply to model.quantizer.name=fsq: leave it out"),
        (dict(name="vq", levels=[5, 5]), "levels=.* does not apply to model.quantizer.name=vq"),
        (dict(name="vq", num_quantizers=2), "belongs to rvq, rfsq"),
        (dict(name="rvq", cosine=False), "cosine=False does not apply to model.quantizer.name=rvq"),
        (dict(name="rvq", rotation_trick=True), "rotation_trick=True does not apply"),
        (dict(name="identity", commitment=0.25), "commitment=0.25 does not apply"),
        (dict(name="dimwise", num_codebooks=2), "num_codebooks=2 does not apply"),
    ],
)
def test_settings_that_do_not_fit(settings, match):
    with pytest.raises(ValueError, match=match):
        build_quantizer(QuantizerConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        dict(levels=[5, 4, 3]),
        dict(name="lfq", codebook_size=16),
        dict(name="bsq", codebook_size=16),
        dict(name="rfsq", levels=[5, 4]),
        dict(levels=[5, 4], num_codebooks=2),
    ],
)
def test_ids_past_the_codebook_are_refused_rather_than_wrapped(settings):
    quantizer = build_quantizer(QuantizerConfig(**settings))
    size = quantizer.codebook_sizes[0]
    ids = torch.zeros(2, 3, len(quantizer.codebook_sizes), dtype=torch.int64)
    assert quantizer.lookup(ids).shape == (2, 3, quantizer.dim) and quantizer.lookup(ids[:0]).shape[0] == 0
    for wrong in (size, -1):
        ids[1, 2, -1] = wrong
        with pytest.raises(ValueError, match=rf"ids lie in .*, the codebook has {size} entries"):
            quantizer.lookup(ids)
