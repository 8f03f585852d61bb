"""Every quantizer: ids round-trip, equal the library's, gradients pass straight through, statistics are buffers."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch as library

from vtok.quantize import FSQ, LFQ, QuantizerConfig, build_quantizer


@pytest.mark.parametrize("levels", [[8, 8, 8, 5, 5, 5], [3, 4], [7], [4, 4, 4]])
def test_fsq_equals_the_library_on_every_id(levels):
    ours, theirs = FSQ(levels), library.FSQ(levels)
    z = torch.randn(3, 200, len(levels)) * 2
    embeddings, indices = theirs(z)
    got = ours(z)
    assert torch.equal(got.embeddings, embeddings) and torch.equal(got.indices[..., 0], indices.long())
    every = torch.arange(ours.codebook_sizes[0])[:, None]
    assert torch.equal(ours.lookup(every), theirs.indices_to_codes(every[:, 0]))
    assert torch.equal(ours.lookup(got.indices), got.embeddings)


def test_fsq_ids_round_trip_through_the_encoder():
    """Feeding a code's own value back gives the code: every one of 64,000 ids is reachable."""
    quantizer = FSQ([8, 8, 8, 5, 5, 5])
    every = torch.arange(64000)[:, None]
    half = (quantizer.levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(quantizer.levels % 2 == 0, 0.5, 0.0)
    target = quantizer.lookup(every) * (quantizer.levels // 2)
    z = (((target + offset) / half).clamp(-0.9999, 0.9999)).atanh() - (offset / half).atanh()
    assert torch.equal(quantizer(z).indices, every)


def test_lfq_equals_the_library():
    ours = LFQ(QuantizerConfig(name="lfq", codebook_size=1024)).eval()
    theirs = library.LFQ(dim=10, codebook_size=1024).eval()
    z = torch.randn(2, 100, 10)
    reference = theirs(z)
    got = ours(z)
    assert torch.equal(got.indices[..., 0], reference.indices) and torch.equal(got.embeddings, reference.quantized)
    every = torch.arange(1024)[:, None]
    assert torch.equal(ours(ours.lookup(every)).indices, every)


def test_lfq_entropy_is_the_library_s_where_that_fits_in_memory():
    config = QuantizerConfig(name="lfq", codebook_size=256, entropy_temperature=0.5, entropy_group_bits=8)
    ours, z = LFQ(config), torch.randn(1, 300, 8)
    sample, batch = ours.entropy(z.reshape(-1, 8))
    codes = ours.lookup(torch.arange(256)[:, None])
    p = (2 * z[0] @ codes.T / 0.5).softmax(-1)  # exactly the softmax over all codes
    assert torch.allclose(sample, -(p * p.log()).sum(-1).mean(), atol=1e-4)
    assert torch.allclose(batch, -(p.mean(0) * p.mean(0).log()).sum(), atol=1e-4)


@pytest.mark.parametrize("cosine", [True, False])
def test_vq_inference_equals_the_library_and_resumes(cosine):
    config = QuantizerConfig(name="vq", codebook_size=32, dim=6, cosine=cosine)
    torch.manual_seed(0)
    quantizer, z = build_quantizer(config), torch.randn(4, 64, 6)
    quantizer.train()
    first = quantizer(z)
    assert bool(quantizer.layer._codebook.initted) and first.loss > 0
    quantizer.eval()
    got = quantizer(z)
    unit = torch.nn.functional.normalize(z, dim=-1) if cosine else z
    embeddings, indices, _ = quantizer.layer(unit)
    assert torch.equal(got.indices[..., 0], indices) and torch.allclose(got.embeddings, embeddings, atol=1e-6)
    again = build_quantizer(config).train()
    again.load_state_dict(quantizer.state_dict(), strict=True)
    before = again.codebook.clone()
    again(torch.randn(4, 64, 6) * 5)  # a first batch after resume must not re-seed the codebook
    assert (again.codebook - before).abs().mean() < 0.2 * before.abs().mean()


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.03])
def test_gradient_vq_learns_clusters(cosine, temperature):
    torch.manual_seed(0)
    settings = dict(codebook_size=16, dim=4, cosine=cosine, ema_decay=0.0, kmeans_init=False)
    quantizer = build_quantizer(QuantizerConfig(name="vq", **settings, stochastic_temperature=temperature)).train()
    centres = torch.nn.functional.normalize(torch.randn(4, 4), dim=-1)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    z = centres[torch.randint(4, (256,))] + 0.01 * torch.randn(256, 4)
    losses = []
    for _ in range(150):
        got = quantizer(z)
        optimizer.zero_grad()
        got.loss.backward()
        optimizer.step()
        losses.append(got.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    quantizer.eval()
    got = quantizer(z)
    assert torch.equal(quantizer.lookup(got.indices), got.embeddings)
    with pytest.raises(ValueError, match="kmeans_init=false"):
        build_quantizer(QuantizerConfig(name="vq", ema_decay=0.0))


def test_vq_padding_does_not_move_the_codebook():
    config = QuantizerConfig(name="vq", codebook_size=16, dim=4, kmeans_init=False)
    outcomes = []
    for junk in (0.0, 100.0):
        torch.manual_seed(0)
        quantizer = build_quantizer(config).train()
        z = torch.randn(2, 10, 4)
        z[:, 5:] = junk + torch.rand(2, 5, 4)
        mask = (torch.arange(10) < 5).expand(2, 10)
        quantizer(z, mask)
        outcomes.append(quantizer.codebook.clone())
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("name", ["fsq", "vq", "lfq", "identity"])
def test_gradients_reach_the_latents(name):
    quantizer = build_quantizer(QuantizerConfig(name=name, codebook_size=256, dim=8, cosine=False)).train()
    z = torch.randn(2, 8, quantizer.latent_dim, requires_grad=True)
    quantizer(z).embeddings.sum().backward()
    if name == "fsq":  # the derivative of the bound, rescaled: rounding itself passes straight through
        with torch.enable_grad():
            free = z.detach().requires_grad_()
            (quantizer.bound(free) / (quantizer.levels // 2)).sum().backward()
        assert torch.allclose(z.grad, free.grad)
    else:
        assert torch.allclose(z.grad, torch.ones_like(z))


@pytest.mark.parametrize("name", ["fsq", "vq", "lfq"])
def test_ids_do_not_depend_on_autocast(name):
    quantizer = build_quantizer(QuantizerConfig(name=name, codebook_size=256, dim=8)).eval()
    if name == "vq":
        quantizer.codebook.copy_(torch.randn(256, 8))
    z = torch.randn(2, 100, quantizer.latent_dim)
    plain = quantizer(z).indices
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).indices, plain)


def test_unknown_names_and_sizes():
    with pytest.raises(ValueError, match="choose fsq, vq, lfq, identity"):
        build_quantizer(QuantizerConfig(name="fqs"))
    with pytest.raises(ValueError, match="power of two"):
        build_quantizer(QuantizerConfig(name="lfq", codebook_size=1000))
    with pytest.raises(ValueError, match="every level must be 3 or more"):
        build_quantizer(QuantizerConfig(levels=[8, 1]))
