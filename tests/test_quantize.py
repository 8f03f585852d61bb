"""Each quantizer by itself: ids and losses equal the library's, every id round-trips, codebooks learn."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch as library

from vtok.quantize import FSQ, LFQ, QuantizerConfig, build_quantizer, convert_ids
from vtok.quantize.continuous import Dimwise


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
    torch.manual_seed(0)
    ours, z = LFQ(config), torch.randn(1, 300, 8)
    sample, batch = ours.entropy(z.reshape(-1, 8))
    codes = ours.lookup(torch.arange(256)[:, None])
    p = (2 * z[0] @ codes.T / 0.5).softmax(-1)  # exactly the softmax over all codes
    assert torch.allclose(sample, torch.special.entr(p).sum(-1).mean(), atol=1e-4)  # 0 log 0 = 0
    assert torch.allclose(batch, torch.special.entr(p.mean(0)).sum(), atol=1e-4)


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


# ---- parity with the library ----------------------------------------------------------------------------------------


def test_multi_token_fsq_equals_the_library():
    levels = [8, 5, 5]
    ours = build_quantizer(QuantizerConfig(levels=levels, num_codebooks=2))
    theirs = library.FSQ(levels, num_codebooks=2)
    z = torch.randn(2, 300, 6) * 2
    embeddings, indices = theirs(z)
    got = ours(z)
    assert got.indices.shape == (2, 300, 2) and ours.codebook_sizes == (200, 200)
    assert torch.equal(got.embeddings, embeddings) and torch.equal(got.indices, indices.long())
    assert torch.equal(theirs.indices_to_codes(got.indices), ours.lookup(got.indices))


def test_bsq_equals_the_library_in_ids_loss_and_gradient():
    config = QuantizerConfig(name="bsq", codebook_size=256, commitment=0.3, entropy_temperature=0.05)
    ours = build_quantizer(config).train()
    theirs = library.LFQ(
        dim=8, codebook_size=256, spherical=True, entropy_loss_weight=0.1, commitment_loss_weight=0.3
    ).train()
    z, same = (torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    reference, got = theirs(same, inv_temperature=20.0), ours(z)
    assert torch.equal(got.indices[..., 0], reference.indices.long())
    assert torch.allclose(got.embeddings, reference.quantized, atol=1e-6)
    assert torch.allclose(got.loss, reference.entropy_aux_loss, atol=1e-4)  # theirs cuts logarithms off at 1e-5
    (got.loss + (got.embeddings * torch.linspace(0, 1, 8)).sum()).backward()
    (reference.entropy_aux_loss + (reference.quantized * torch.linspace(0, 1, 8)).sum()).backward()
    assert torch.allclose(z.grad, same.grad, atol=1e-4)


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_simvq_equals_the_library_in_ids_loss_and_gradients(rotation_trick):
    config = QuantizerConfig(name="simvq", codebook_size=64, dim=5, rotation_trick=rotation_trick)
    ours = build_quantizer(config).train()
    theirs = library.SimVQ(5, 64, rotation_trick=rotation_trick, input_to_quantize_commit_loss_weight=0.25).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    z, same = (torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    embeddings, indices, loss = theirs(same)
    got = ours(z)
    assert torch.equal(got.indices[..., 0], indices) and torch.allclose(got.embeddings, embeddings, atol=1e-5)
    assert torch.allclose(got.loss, loss)
    weight = torch.linspace(0, 1, 5)
    (got.loss + (got.embeddings * weight).mean()).backward()
    (loss + (embeddings * weight).mean()).backward()
    assert torch.allclose(z.grad, same.grad, atol=1e-6)
    assert torch.allclose(ours.code_transform.weight.grad, theirs.code_transform.weight.grad, atol=1e-6)


def test_residual_vq_equals_the_library_for_many_steps_of_training():
    """The same seeds: k-means starts, ids, losses and moving averages agree step by step; gradients by their number."""
    config = QuantizerConfig(name="rvq", codebook_size=16, dim=4, num_quantizers=3, ema_decay=0.9)
    ours = build_quantizer(config).train()
    theirs = library.ResidualVQ(
        dim=4,
        num_quantizers=3,
        codebook_size=16,
        decay=0.9,
        kmeans_init=True,
        commitment_weight=0.25,
        rotation_trick=False,
    ).train()
    for step in range(5):
        z, same = (torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(step)) for _ in range(2))
        torch.manual_seed(step)
        got = ours(z.requires_grad_())
        torch.manual_seed(step)
        embeddings, indices, losses = theirs(same.requires_grad_())
        assert torch.equal(got.indices, indices) and torch.allclose(got.embeddings, embeddings, atol=1e-5)
        assert torch.allclose(got.loss, losses.sum(), atol=1e-6)
        got.embeddings.sum().backward()
        embeddings.sum().backward()
        assert torch.equal(z.grad, torch.ones_like(z)) and torch.allclose(same.grad, torch.full_like(z, 3.0))
    assert torch.allclose(torch.stack(ours.codebooks), theirs.codebooks, atol=1e-5)
    ours.eval(), theirs.eval()
    z = torch.randn(2, 60, 4)
    assert torch.equal(ours(z).indices, theirs(z)[1])
    fewer = ours.lookup(ours(z).indices[..., :2])
    assert torch.allclose(fewer, theirs.get_codes_from_indices(theirs(z)[1])[:2].sum(0), atol=1e-6)


@pytest.mark.parametrize("levels", [[5, 4, 3], [8, 8], [2, 2, 2]])
def test_residual_fsq_equals_the_library(levels):
    ours = build_quantizer(QuantizerConfig(name="rfsq", levels=levels, num_quantizers=3))
    theirs = library.ResidualFSQ(levels=levels, num_quantizers=3).eval()
    z = torch.randn(2, 500, len(levels)) * 2
    embeddings, indices = theirs(z)
    got = ours(z)
    assert torch.equal(got.indices, indices.long()) and torch.allclose(got.embeddings, embeddings, atol=1e-6)
    assert torch.allclose(ours.lookup(got.indices), theirs.get_output_from_indices(indices), atol=1e-6)
    assert torch.equal(ours.bfloat16()(z).indices, got.indices)  # a model cast as a whole keeps its grid


@pytest.mark.parametrize("cosine", [True, False])
def test_vq_trains_as_the_library_does(cosine):
    """Step by step with the same seeds: k-means start, ids, losses, averages, codes re-seeded when they die."""
    config = QuantizerConfig(
        name="vq", codebook_size=24, dim=4, cosine=cosine, ema_decay=0.8, dead_code_threshold=2, commitment=1.0
    )
    ours = build_quantizer(config).train()
    ours._chunks = lambda z: z.split(17)  # as a large codebook would be
    theirs = library.VectorQuantize(
        4, 24, decay=0.8, kmeans_init=True, use_cosine_sim=cosine, threshold_ema_dead_code=2, rotation_trick=False
    ).train()
    reseeded = 0
    for step in range(8):
        z = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(step)) + step  # drifts: codes die
        torch.manual_seed(step)
        got = ours(z)
        torch.manual_seed(step)
        embeddings, indices, loss = theirs(z)
        assert torch.equal(got.indices[..., 0], indices) and torch.allclose(got.embeddings, embeddings, atol=1e-5)
        assert torch.allclose(got.loss, loss, atol=1e-5)
        mine, its = (dict(each.named_buffers()) for each in (ours.layer._codebook, theirs._codebook))
        assert all(torch.allclose(mine[name].float(), its[name].float(), atol=1e-4) for name in its)
        reseeded += int((its["cluster_size"] == 2).sum())
    assert reseeded > 0


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_stochastic_codes_follow_the_similarities(ema_decay):
    settings = dict(codebook_size=8, dim=3, kmeans_init=False, ema_decay=ema_decay, stochastic_temperature=0.5)
    quantizer = build_quantizer(QuantizerConfig(name="vq", **settings))
    z = torch.nn.functional.normalize(torch.randn(1, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    wanted = (z @ quantizer.codebook.T / 0.5).softmax(-1)[0]
    torch.manual_seed(0)
    drawn = quantizer.chosen(z.expand(40_000, 3)).bincount(minlength=8) / 40_000
    assert torch.allclose(drawn, wanted, atol=0.01)
    assert len(quantizer.eval()(z.expand(100, 3)).indices.unique()) == 1


def test_product_vq_equals_the_library_s_heads():
    settings = dict(codebook_size=16, dim=6, cosine=False, num_codebooks=3)
    ours = build_quantizer(QuantizerConfig(name="vq", **settings, kmeans_init=False)).train()
    theirs = library.VectorQuantize(
        6, 16, codebook_dim=2, heads=3, separate_codebook_per_head=True, decay=0.99, rotation_trick=False
    )
    with torch.no_grad():
        for name in ("embed", "embed_avg"):
            rows = [getattr(part.layer._codebook, name)[0] for part in ours.parts]
            getattr(theirs._codebook, name).copy_(torch.stack(rows))
    theirs.train()
    for step in range(3):
        z = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(step))
        embeddings, indices, loss = theirs(z)
        got = ours(z)
        assert torch.equal(got.indices, indices) and torch.allclose(got.embeddings, embeddings, atol=1e-6)
        assert torch.allclose(got.loss, 0.25 * loss)  # theirs has a commitment weight of 1
    embed = torch.stack([part.codebook for part in ours.parts])
    assert torch.allclose(embed, theirs._codebook.embed, atol=1e-6)


def test_rotation_trick_is_the_library_s():
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    from vtok.quantize.gradients import rotate

    z, same = (torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    codes, weight = torch.randn(50, 6), torch.randn(50, 6)
    ours = rotate(z, codes)
    assert torch.equal(ours, codes)  # theirs to rounding only
    (ours * weight).sum().backward()
    (rotate_to(same, codes) * weight).sum().backward()
    assert torch.allclose(z.grad, same.grad, atol=1e-5) and not torch.allclose(z.grad, weight, atol=0.1)
    quantizer = build_quantizer(QuantizerConfig(name="vq", codebook_size=8, dim=6, cosine=False, rotation_trick=True))
    z = torch.randn(2, 30, 6, requires_grad=True)
    (quantizer.train()(z).embeddings * weight[:30]).sum().backward()
    assert not torch.allclose(z.grad[0], weight[:30], atol=0.1)


def test_ibq_trains_every_code_as_the_plain_formula():
    config = QuantizerConfig(name="ibq", codebook_size=40, dim=5, entropy=0.05, entropy_temperature=0.5)
    quantizer = build_quantizer(config).train()
    quantizer.chunk_scores = 40 * 16  # several chunks
    z, same = (torch.randn(3, 33, 5, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    got = quantizer(z)
    table = quantizer.weight.detach().clone().requires_grad_()
    logits = same.reshape(-1, 5) @ table.T
    soft = logits.softmax(-1)
    hard = torch.nn.functional.one_hot(logits.argmax(-1), 40).float()
    through = (hard + soft - soft.detach()) @ table.detach() + hard @ table - (hard @ table).detach()
    flat, row = same.reshape(-1, 5), hard @ table
    loss = (through - flat).square().mean() + (row.detach() - flat).square().mean()
    loss = loss + 0.25 * (row - flat.detach()).square().mean()
    p = (logits / 0.5).softmax(-1)
    loss = loss + 0.05 * (-(p * p.log()).sum(-1).mean() + (p.mean(0) * p.mean(0).log()).sum())
    assert torch.equal(got.indices.flatten(), logits.argmax(-1))
    assert torch.allclose(got.loss, loss, atol=1e-5)
    weight = torch.linspace(-1, 1, 5)
    (got.loss + (got.embeddings * weight).sum()).backward()
    (loss + (through * weight).sum()).backward()
    assert torch.allclose(z.grad, same.grad, atol=1e-4)
    assert torch.allclose(quantizer.weight.grad, table.grad, atol=1e-4)
    assert bool((quantizer.weight.grad.abs().sum(-1) > 0).all())


# ---- every id -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_every_binary_id_round_trips(name):
    quantizer = build_quantizer(QuantizerConfig(name=name, codebook_size=1 << 16)).eval()
    every = torch.arange(1 << 16)[:, None]
    assert torch.equal(quantizer(quantizer.lookup(every)).indices, every)
    large = build_quantizer(QuantizerConfig(name=name, codebook_size=1 << 40)).eval()
    some = torch.randint(1 << 40, (5000, 1))
    assert torch.equal(large(large.lookup(some)).indices, some)


@pytest.mark.parametrize(
    "settings",
    [
        dict(name="vq", dim=8, kmeans_init=False),
        dict(name="vq", dim=8, kmeans_init=False, cosine=False),
        dict(name="vq", dim=8, kmeans_init=False, ema_decay=0.0),
        dict(name="vq", dim=8, kmeans_init=False, ema_decay=0.0, cosine=False),
        dict(name="simvq", dim=8),
    ],
)
def test_every_codebook_id_round_trips(settings):
    quantizer = build_quantizer(QuantizerConfig(codebook_size=4096, **settings)).eval()
    every = torch.arange(4096)[:, None]
    assert torch.equal(quantizer(quantizer.lookup(every)).indices, every)


def test_every_id_of_index_backpropagation_round_trips_where_codes_are_equally_long():
    """It picks the largest inner product, so a longer code may win over a code's own: unit rows leave no such case."""
    quantizer = build_quantizer(QuantizerConfig(name="ibq", codebook_size=4096, dim=8)).eval()
    every = torch.arange(4096)[:, None]
    assert not torch.equal(quantizer(quantizer.lookup(every)).indices, every)
    with torch.no_grad():
        quantizer.weight.copy_(torch.nn.functional.normalize(quantizer.weight, dim=-1))
    assert torch.equal(quantizer(quantizer.lookup(every)).indices, every)


def test_every_pair_of_residual_fsq_ids_round_trips():
    quantizer = build_quantizer(QuantizerConfig(name="rfsq", levels=[5, 4, 3], num_quantizers=2))
    every = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    reach = 1 + 1 / (quantizer.levels - 1)
    z = (quantizer.lookup(every) / reach).atanh() * reach
    assert torch.equal(quantizer(z).indices, every)


def test_every_bin_round_trips():
    quantizer = build_quantizer(QuantizerConfig(name="dimwise", dim=3, bins=64))
    for method in (None, "lloyd", "gaussian"):
        if method:
            quantizer.fit(torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + 3, method=method)
        every = torch.arange(64)[:, None].expand(-1, 3)
        assert torch.equal(quantizer(quantizer.lookup(every)).indices, every)


# ---- the order of ids -----------------------------------------------------------------------------------------------


def test_ids_of_peers():
    config = QuantizerConfig(name="lfq", codebook_size=1 << 10)
    z = torch.randn(400, 10)
    ours = build_quantizer(config).eval()(z).indices
    positive = (z > 0).long()
    first_least = (positive * 2 ** torch.arange(10)).sum(-1, keepdim=True)  # as SEED-Voken counts
    first_most = (positive * 2 ** torch.arange(9, -1, -1)).sum(-1, keepdim=True)  # as vector-quantize-pytorch counts
    assert torch.equal(convert_ids(ours, config, to="seed_voken"), first_least) and not torch.equal(ours, first_least)
    assert torch.equal(convert_ids(ours, config, to="lucidrains"), first_most)
    assert torch.equal(convert_ids(first_least, config, source="seed_voken"), ours)
    assert torch.equal(convert_ids(first_least, config, source="seed_voken", to="seed_voken"), first_least)
    parts = QuantizerConfig(name="lfq", codebook_size=1 << 5, num_codebooks=2)
    ours = build_quantizer(parts).eval()(z).indices
    halves = (positive.reshape(400, 2, 5) * 2 ** torch.arange(5)).sum(-1)
    assert torch.equal(convert_ids(ours, parts, to="seed_voken"), halves)
    levels = QuantizerConfig(levels=[8, 5, 3])
    ids = build_quantizer(levels)(torch.randn(100, 3)).indices
    assert all(torch.equal(convert_ids(ids, levels, to=peer), ids) for peer in ("lucidrains", "vidtok", "cosmos"))
    with pytest.raises(ValueError, match="another formula"):
        convert_ids(ids, levels, to="elastictok")
    with pytest.raises(ValueError, match="stated for lfq, not model.quantizer.name='fsq'"):
        convert_ids(ids, levels, to="seed_voken")
    with pytest.raises(ValueError, match="choose vtok, lucidrains, vidtok, cosmos, seed_voken"):
        convert_ids(ids, levels, to="magvit")


# ---- rounding after training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins, error", [(4, 0.1175), (8, 0.03454)])
def test_lloyd_bins_reach_the_known_least_error_of_a_gaussian(bins, error):
    """The errors of the best quantizers of N(0, 1) (Max 1960, Quantizing for minimum distortion)."""
    quantizer = Dimwise(QuantizerConfig(name="dimwise", dim=2, bins=bins))
    scale, shift = torch.tensor([1.0, 4.0]), torch.tensor([0.0, -7.0])
    z = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)) * scale + shift
    assert not quantizer.fitted
    quantizer.fit(z)
    got = ((quantizer(z).embeddings - z) / scale).square().mean(0)
    assert quantizer.fitted and torch.allclose(got, torch.full((2,), error), rtol=0.02)
    quantizer.fit(z, method="gaussian")
    equal = ((quantizer(z).embeddings - z) / scale).square().mean(0)
    assert bool((equal > got).all())
    counts = torch.stack([quantizer(z).indices[:, d].bincount(minlength=bins) for d in range(2)]) / len(z)
    assert torch.allclose(counts, torch.full((2, bins), 1 / bins), atol=0.005)  # bins of equal probability
    with pytest.raises(ValueError, match=r"must be \[N, 2\]"):
        quantizer.fit(z[:, :1])
    with pytest.raises(ValueError, match="cannot fill model.quantizer.bins"):
        quantizer.fit(z[:2])
    with pytest.raises(ValueError, match="choose lloyd, gaussian"):
        quantizer.fit(z, method="uniform")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantizer.fit(torch.full((100, 2), float("nan")))


def test_dimwise_takes_the_place_of_a_continuous_quantizer():
    """The same latents in, almost the same embeddings out, and closer with more bins."""
    continuous = build_quantizer(QuantizerConfig(name="identity", dim=5, kl=1e-4)).eval()
    z = torch.randn(3, 500, 10)
    wanted, errors = continuous(z).embeddings, []
    for bins in (8, 64):
        quantizer = build_quantizer(QuantizerConfig(name="dimwise", dim=5, kl=1e-4, bins=bins)).eval()
        assert (quantizer.latent_dim, quantizer.dim) == (continuous.latent_dim, continuous.dim)
        quantizer.fit(wanted.flatten(0, 1))
        got = quantizer(z)
        assert got.indices.shape == (3, 500, 5)
        errors.append((got.embeddings - wanted).square().mean())
    assert errors[1] < errors[0] / 20 and errors[1] < 1e-3
