"""The discrete family beyond the laws (test_contract.py): warm starts, two levels, images and videos, its objective."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_contract import CONV, DISCRETE, TRANSFORMER, clip, video

from vtok.families.discrete import Config, Model, Objective, ObjectiveConfig
from vtok.layers.conv_plan import ConvConfig
from vtok.layers.spacetime import SpaceTimeConfig
from vtok.quantize import QuantizerConfig
from vtok.training import init_from
from vtok.types import Clip, ShapeError


def moving(batch: int, frames: int, cells: int = 4) -> torch.Tensor:
    """[B, 3, T, 16, 16] of cells x cells smooth colours that change steadily from the first frame to the last."""
    coarse = torch.rand(batch, 3, min(frames, 2), cells, cells, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(frames, 16, 16), mode="trilinear", align_corners=True)


def make(**changes) -> Model:
    torch.manual_seed(0)
    return Model(Config(**DISCRETE | changes)).eval()


def learn(model: Model, pixels: torch.Tensor, *, steps: int, lr: float = 5e-3, **objective) -> list[float]:
    """Losses of `steps` steps on one batch."""
    model.fit_statistics([pixels])
    goal = Objective(ObjectiveConfig(l1=0.0, l2=1.0, **objective), model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99))
    model.train()
    seen = []
    for step in range(steps):
        loss = goal(model, clip(pixels), step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        seen.append(float(loss.report["l2"]))
    model.eval()
    return seen


@torch.no_grad()
def error(model: Model, pixels: torch.Tensor, **budget) -> float:
    recon = model.decode(model.encode(clip(pixels), **budget), size=tuple(pixels.shape[3:]))
    return float((recon - pixels).square().mean())


def test_tokens_stand_on_the_grid_in_time_order():
    model = make(num_frames=5, stride=[2, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2])))
    tokens = model.encode(clip(video(1, 6, (13, 22)).float()))
    assert model.token_counts(6, (13, 22)) == [4 * 4 * 6] and tokens.lengths.tolist() == [96]  # 1 + ceil(5 / 2) frames
    assert tokens.group[0].tolist() == [g for g in range(4) for _ in range(24)]
    assert tokens.rank[0].tolist() == list(range(24)) * 4
    assert tokens.positions[0, 0].tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 12])
    assert tokens.positions[0, -1].tolist() == pytest.approx([7 / 8, 7 / 8, 11 / 12])
    assert model.max_tokens == 3 * 4 * 4
    image = model.encode(clip(video(1, 1, (13, 22)).float()))
    assert image.lengths.tolist() == [24] and model.decode(image, size=(13, 22)).shape == (1, 3, 1, 13, 22)


def test_groups_know_their_seconds():
    model = make(num_frames=5, stride=[2, 2, 2])
    pixels, times = video(2, 6).float(), torch.arange(6).expand(2, 6) / 8.0
    tokens = model.encode(Clip(["a", "b"], pixels, torch.tensor([6, 2]), times))
    assert tokens.times is not None
    assert tokens.times[0].tolist() == [[0, 0], [0.125, 0.25], [0.375, 0.5], [0.625, 0.625]]
    assert tokens.times[1].tolist()[:2] == [[0, 0], [0.125, 0.125]]


def test_two_levels_coarse_first():
    model = make(coarse=[2, 2, 2])
    tokens = model.encode(clip(video(1, 5).float()))
    # groups of one frame and of stride x coarse = 4; 4 x 4 coarse tokens, then one or two frames of 8 x 8 fine ones
    assert model.token_counts(5, (16, 16)) == [32, 32 + 3 * 64]
    assert torch.bincount(tokens.group[0]).tolist() == [16 + 64, 16 + 128]
    coarse = model.encode(clip(video(1, 5).float()), budget=32)
    assert coarse.lengths.tolist() == [32] and int(coarse.rank.max()) == 15
    assert model.decode(coarse, size=(16, 16)).shape == (1, 3, 5, 16, 16)
    with pytest.raises(ShapeError, match="tokens are missing"):
        model.decode(tokens.select(tokens.mask & (tokens.rank < 10)), size=(16, 16))
    with pytest.raises(ValueError, match="budget=100.*32, 224"):
        model.encode(clip(video(1, 5).float()), budget=100)


def test_two_levels_learn_both():
    pixels, found = moving(2, 5, cells=10), {}
    for share in (0.0, 0.5):
        model = make(coarse=[2, 2, 2])
        learn(model, pixels, steps=50, coarse_only=share)
        found[share] = error(model, pixels, budget=32), error(model, pixels)
    grey = float(pixels.square().mean())
    assert found[0.0][1] < 0.8 * grey and found[0.0][1] < 0.9 * found[0.0][0], (
        "nothing asked for the coarse level alone"
    )
    assert found[0.5][0] < 0.9 * found[0.0][0], "half of the clips did"


FINE = dict(stride=[2, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2]), first_fine=True))


@torch.no_grad()
def test_the_first_frame_has_a_finer_grid():
    model = make(**FINE)
    pixels = video(1, 5, (13, 16)).float()
    tokens = model.encode(clip(pixels))
    assert model.token_counts(5, (13, 16)) == [8 * 8 + 2 * 4 * 4] and model.max_tokens == 64 + 2 * 16
    assert torch.bincount(tokens.group[0]).tolist() == [64, 16, 16]
    assert tokens.positions[0, 0].tolist() == pytest.approx([1 / 6, 1 / 16, 1 / 16])
    assert tokens.positions[0, 64].tolist() == pytest.approx([3 / 6, 1 / 8, 1 / 8])
    assert tokens.positions[0, -1].tolist() == pytest.approx([5 / 6, 7 / 8, 7 / 8])
    image = model.encode(clip(pixels[:, :, :1]))
    assert image.lengths.tolist() == [64] and torch.equal(image.indices, tokens.indices[:, :64])
    assert model.decode(image, size=(13, 16)).shape == (1, 3, 1, 13, 16)
    for missing in (tokens.rank > 3, tokens.group < 2):
        with pytest.raises(ShapeError, match="tokens are missing"):
            model.decode(tokens.select(missing), size=(13, 16))


@torch.no_grad()
def test_later_frames_lean_on_the_finer_first_one():
    model, pixels = make(**FINE), video(1, 5).float()
    for parameter in model.decoder.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    first, later = model.latents(clip(pixels))
    assert first.shape == (1, 6, 1, 8, 8) and later.shape == (1, 6, 2, 4, 4)
    changed = first.clone()
    changed[..., 0, 0] += 1
    one, two = (model.decode_latents((z, later), frames=5, size=(16, 16)) for z in (first, changed))
    assert (one - two).abs().amax((0, 1, 3, 4)).min() > 1e-4, "in every frame"
    with pytest.raises(ValueError, match="different lengths"):
        model.latents(clip(pixels, [3]))


def test_images_alone_and_videos_teach_a_finer_first_frame():
    """A batch of images has no later frames; every parameter has a gradient all the same: other ranks wait for it."""
    for quantizer in (
        QuantizerConfig(name="vq", codebook_size=32, dim=4),
        QuantizerConfig(name="identity", dim=4, kl=1e-6),
    ):
        model = make(**FINE, quantizer=quantizer).train()
        goal = Objective(ObjectiveConfig(), model.config)
        for frames in (5, 1):
            model.zero_grad()
            loss = goal(model, clip(video(2, frames).float()), 0)
            loss.total.backward()
            assert torch.isfinite(loss.total)
            without = [n for n, p in model.named_parameters() if p.grad is None and p.requires_grad]
            assert not without, without


@pytest.mark.parametrize("form", [{}, FINE], ids=["one_grid", "first_fine"])
def test_one_network_of_ids_and_of_latents(form):
    """Clips that are drawn pass by the quantizer and its maps; the others do not notice."""
    model, pixels, lengths = make(**form), video(2, 5).float(), torch.tensor([5, 5])
    for parameter in model.decoder.parameters():
        parameter.data += 0.05 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
        )
    recon = model(pixels, lengths, continuous=torch.tensor([True, False])).recon
    direct = model._pixels(model.latents(clip(pixels)), None)
    torch.testing.assert_close(recon[0], direct[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(recon[1], model(pixels, lengths).recon[1], rtol=0, atol=1e-5)
    assert (recon - direct)[1].abs().max() > 1e-2
    recon[0].square().sum().backward()
    assert not model.from_code.weight.grad.any() and model.encoder.conv_out[-1].weight.grad.abs().sum() > 0
    goal = Objective(ObjectiveConfig(continuous=0.5), model.config)
    seen = [float(goal(model, clip(pixels), 0).report["l1_continuous"]) for _ in range(8)]
    assert max(seen) > 0 and len(set(seen)) > 1, "which clips these are is drawn"


@pytest.mark.parametrize("backbone", ["conv", "transformer"])
@torch.no_grad()
def test_a_continuous_source_goes_on_in_front_of_the_quantizer(backbone):
    """After a warm start the encoder gives what the source's decoder read: its video, but for the ids."""
    conv = dict(conv=ConvConfig(**CONV | dict(mult=[1, 2, 2])))
    changes: dict[str, Any] = dict(stride=[2, 4, 4]) | (conv if backbone == "conv" else TRANSFORMER)
    source = make(**changes, quantizer=QuantizerConfig(name="identity", dim=6, kl=1e-6))
    for parameter in source.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    model, pixels = make(**changes), moving(2, 5)
    model.warm_start(source)
    want = source.decode(source.encode(clip(pixels)), size=(16, 16))
    got = model.decode_latents(model.latents(clip(pixels)), frames=5, size=(16, 16))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    model.fit_statistics([pixels])
    torch.testing.assert_close(model.decode_latents(model.latents(clip(pixels)), frames=5, size=(16, 16)), got)


def test_tokens_of_another_size_are_refused():
    model = make()
    tokens = model.encode(clip(video(1, 5, (16, 16)).float()))
    with pytest.raises(ShapeError, match="decode at the size"):
        model.decode(tokens, size=(8, 8))
    with pytest.raises(ShapeError, match="tokens are missing"):
        model.decode(tokens, size=(32, 32))


def test_ids_begin_where_the_continuous_latents_were():
    """A trained continuous model, FSQ inserted: far better than the same steps from nothing, before any step."""
    pixels = moving(2, 5)
    source = make(quantizer=QuantizerConfig(name="identity", dim=6, kl=1e-6))
    learn(source, pixels, steps=60)
    levels = QuantizerConfig(levels=[8, 8, 8, 8, 8, 8])
    fresh, warm = make(quantizer=levels), make(quantizer=levels)
    assert "continuous" in warm.warm_start(source)
    told = warm.fit_statistics([pixels])["explained"]
    assert 0.9 < told <= 1
    assert error(source, pixels) < error(warm, pixels) < 0.5 * error(fresh, pixels)
    assert error(warm, pixels) < 3 * error(source, pixels)
    assert not warm.fit_statistics([pixels])  # once
    assert warm.state_dict().keys() == fresh.state_dict().keys()


def test_warm_start_of_every_kind_of_ids():
    pixels = moving(2, 5)
    source = make(latent_channels=8, quantizer=QuantizerConfig(name="identity", dim=8))
    learn(source, pixels, steps=40)
    for quantizer in (
        QuantizerConfig(levels=[8, 8, 5, 5], num_codebooks=2),
        QuantizerConfig(name="lfq", codebook_size=256),
        QuantizerConfig(name="vq", codebook_size=64, dim=4),
    ):
        model = make(latent_channels=8, quantizer=quantizer)
        model.warm_start(source)
        assert model.fit_statistics([pixels])["explained"] > 0.4, quantizer.name
        assert error(model, pixels) < error(make(latent_channels=8, quantizer=quantizer), pixels)


def test_warm_start_refuses_what_does_not_fit():
    source = make(quantizer=QuantizerConfig(name="identity", dim=4))
    with pytest.raises(ValueError, match="init_from does not fit"):
        make(latent_channels=8).warm_start(source)
    model = make()
    model.warm_start(source)
    with pytest.raises(ValueError, match="trainer.statistics_clips"):
        model(video(1, 5).float(), torch.tensor([5]))
    assert model.fit_statistics([video(2, 5).float()])["explained"] > 0.9  # 6 numbers of 4, two of them mixtures
    with pytest.raises(ValueError, match="torch.nn.modules.linear"):
        make().warm_start(torch.nn.Linear(2, 2))
    same = make()
    assert same.warm_start(make(num_frames=9)) == "all weights of the source"
    assert not same.fit_statistics([])  # its weights came with maps


@pytest.mark.parametrize("changes", [dict(), dict(coarse=[1, 2, 2])], ids=["one", "two_levels"])
def test_another_quantizer_begins_where_the_sources_decoder_reads(changes, monkeypatch):
    pixels = moving(2, 5)
    source: Any = make(**changes, quantizer=QuantizerConfig(levels=[8, 8, 8, 8]))
    learn(source, pixels, steps=40)
    source.shipped = SimpleNamespace(model_id="source")
    monkeypatch.setattr(init_from, "load", lambda path: source)
    for quantizer in (
        QuantizerConfig(levels=[8] * 8),
        QuantizerConfig(levels=[8] * 6, entropy=0.1, entropy_warmup_steps=4),
        QuantizerConfig(name="vq", codebook_size=64, dim=4, cosine=False),  # as wide, and its codes lie elsewhere
    ):
        model = make(**changes, quantizer=quantizer)
        begun = init_from.begin_from(model, "source", allow=["quantizer"])
        assert "fitted to training clips: model.to_" in begun.done and begun.done.endswith("model.from_code")
        without = error(model, pixels)
        with pytest.raises(ValueError, match="trainer.statistics_clips"):
            model(pixels, torch.tensor([5, 5]))
        dropped = model.dropped.clone() if changes else None
        assert model.fit_statistics([pixels])["explained"] > 0.7, quantizer
        assert dropped is None or torch.equal(model.dropped, dropped), "learned: the decoder reads it still"
        assert error(model, pixels) < 1.3 * error(source, pixels) < 0.6 * without, quantizer
        steps = [value for name, value in model.state_dict().items() if name.endswith("entropy_weight.step")]
        assert not any(steps), "the warm-up of the entropy term begins with the first step"
        model(pixels, torch.tensor([5, 5]))
        assert not model.fit_statistics([pixels])  # once
    finer = make(**changes, quantizer=QuantizerConfig(levels=[16] * 4))
    begun = init_from.begin_from(finer, "source", allow=["quantizer"])
    assert "fitted" not in begun.done and not finer.fit_statistics([pixels]), "a finer grid is read as it was"
    assert error(finer, pixels) < 1.1 * error(source, pixels)


def test_an_image_model_is_inflated_to_video():
    """On images, and on every frame of a still video, the video model begins as the image model was."""
    image = make(num_frames=1, stride=[1, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2]), temporal_kernel=1))
    learn(image, video(4, 1).float(), steps=5)
    model = make(num_frames=5, stride=[1, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2])))
    assert "inflated" in model.warm_start(image)
    still = video(2, 1).float()
    one, two = image.encode(clip(still)), model.encode(clip(still))
    assert torch.equal(one.indices, two.indices)
    assert torch.allclose(image.decode(one, size=(16, 16)), model.decode(two, size=(16, 16)), atol=1e-5)
    repeated = model.encode(clip(still.expand(-1, -1, 4, -1, -1)))
    assert torch.equal(repeated.indices.unflatten(1, (4, -1)), one.indices[:, None].expand(-1, 4, -1, -1))


def test_images_and_videos_in_one_batch_and_alone():
    model = make().train()
    goal = Objective(ObjectiveConfig(), model.config)
    for frames, lengths in ((1, None), (5, None), (5, [1, 5]), (6, [6, 3])):
        loss = goal(model, clip(video(2, frames).float(), lengths), 0)
        loss.total.backward()
        assert torch.isfinite(loss.total)
    short = clip(torch.cat([video(1, 5), 99 * torch.ones(1, 3, 5, 16, 16)]).float(), [5, 1])
    short.video[1, :, 0] = 0.5  # everything else of the second clip is padding, which no loss may see
    assert float(goal(model, short, 0).report["l1"]) < 3


def test_padding_moves_no_codebook():
    quantizer = QuantizerConfig(name="vq", codebook_size=16, dim=4)
    pixels, states = video(2, 5).float(), []
    for noise in (0.0, 1.0):
        model = make(quantizer=quantizer).train()
        padded = pixels.clone()
        padded[1, :, 1:] = noise * torch.randn(3, 4, 16, 16)
        torch.manual_seed(1)
        model(padded, torch.tensor([5, 1]))
        states.append({k: v.clone() for k, v in model.quantizer.state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_bad_settings_name_key_value_and_fix():
    for changes, told in (
        (dict(num_frames=16), "model.num_frames=16 must be 1 \\+ a multiple of 2.*: (15|17) is near"),
        (dict(backbone="unet"), "model.backbone='unet'"),
        (dict(coarse=[3, 1, 1]), "model.coarse=\\[3, 1, 1\\]"),
        (dict(coarse=[1, 1, 1]), "no coarser"),
        (dict(FINE, coarse=[1, 2, 2]), "first_fine=true is for whole frames and one level: .*coarse=\\[1, 2, 2\\]"),
        (dict(FINE, tile=8), "model.tile=8"),
        (
            dict(backbone="transformer", conv=ConvConfig(first_fine=True)),
            "model.conv.first_fine=True does not apply to model.backbone=transformer: leave it out",
        ),
        (dict(transformer=SpaceTimeConfig(width=64)), "model.transformer.width=64 does not apply to .*backbone=conv"),
        (dict(tile_overlap=2), "model.tile_overlap=2 does not apply to whole frames"),
        (dict(tile=-3), "model.tile=-3 must be 0"),
        (dict(stride=[4, 8]), "model.stride=\\[4, 8\\]"),
    ):
        with pytest.raises(ValueError, match=told):
            Config(**DISCRETE | changes)
    with pytest.raises(ValueError, match="objective.coarse_only=0.5 needs two levels"):
        Objective(ObjectiveConfig(coarse_only=0.5), Config(**DISCRETE))
    with pytest.raises(ValueError, match="objective.continuous=0.5 is the share of clips that pass by the quantizer"):
        Objective(
            ObjectiveConfig(continuous=0.5), Config(**DISCRETE | dict(quantizer=QuantizerConfig(name="identity")))
        )
    with pytest.raises(ValueError, match=r"objective.continuous=1.0 is a share"):
        Objective(ObjectiveConfig(continuous=1.0), Config(**DISCRETE))
    with pytest.raises(ValueError, match="perceptual_weights"):
        Objective(ObjectiveConfig(perceptual=1.0), Config(**DISCRETE))


def test_ids_are_the_same_under_autocast_given_the_same_latents():
    model = make()
    latents = torch.randn(2, 6, 3, 8, 8)
    valid = torch.ones(2, 3, dtype=torch.bool)
    plain = model._quantize(model.to_latent, latents, valid)
    projected = model.to_latent(latents.movedim(1, -1))
    with torch.autocast("cpu", torch.bfloat16):
        same = model.quantizer(projected, None)
    assert torch.equal(plain.indices, same.indices)


def test_a_video_learns_down_to_its_reconstruction():
    pixels, model = moving(2, 5), make()
    seen = learn(model, pixels, steps=60)
    assert seen[-1] < 0.4 * seen[0]
