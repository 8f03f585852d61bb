"""The flow-decoded family beyond the laws every family keeps: latents, chunks, draws, alignment, first values."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
import transformers
from test_contract import CONV, FLOW, LATENTS, build_model, clip, video

from vtok.budget import NestedConfig
from vtok.coding import codec
from vtok.coding.rate_control import Asked
from vtok.config import RunConfig
from vtok.data.encode import write_video
from vtok.families import discrete, flow
from vtok.layers.begin import patch_of_token
from vtok.layers.conv3d import ConvConfig
from vtok.layers.flow import SamplerConfig
from vtok.quantize import QuantizerConfig
from vtok.train import check_unchanged
from vtok.types import Clip, to_uint8
from vtok.vision import TowerConfig


def smooth(batch: int, frames: int, size: int = 16) -> torch.Tensor:
    """Clips whose content moves and is not noise, in [-1, 1]."""
    return video(batch, frames, (size, size), seed=5).float()


def tokenizer() -> discrete.Model:
    torch.manual_seed(0)
    shape = dict(stride=[4, 4, 4], latent_channels=6, num_frames=9, size=[16, 16])
    conv = ConvConfig(**CONV | dict(mult=[1, 1, 2]))
    model = discrete.Model(discrete.Config(**shape, conv=conv, quantizer=QuantizerConfig("identity", dim=4, kl=1e-3)))
    model.fit_statistics([smooth(32, 9)])
    return model.eval()


@torch.no_grad()
def test_a_tokenizer_read_by_path_becomes_part_of_the_model():
    source = tokenizer()
    config = flow.Config(**FLOW, latents="somewhere")
    model = flow.build(config, load=lambda path: source).eval()
    assert model.config.latents_config == asdict(source.config) and model.group_frames == 4
    pixels = smooth(2, 9)
    own = source.encode(clip(pixels)).embeddings.reshape(2, 3, 4, 4, 4).movedim(-1, 1)
    assert torch.allclose(model.space.encode(pixels), own, atol=1e-5)
    back = source.decode(source.encode(clip(pixels)), size=(16, 16))
    assert torch.allclose(model.space.decode(model.space.encode(pixels)).clamp(-1, 1), back, atol=1e-4)
    found = model.fit_statistics([pixels])
    latents = model.space.encode(pixels)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-4 and (latents.std((0, 2, 3, 4)) - 1).abs().max() < 0.02
    assert torch.allclose(model.space.decode(latents).clamp(-1, 1), back, atol=1e-4), "decoding undoes the scale"
    assert found and model.fit_statistics([pixels * 0.1]) == {}, "statistics that came with weights stay"
    assert not any(p.requires_grad for p in model.space.parameters()) and not model.train().space.training


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(quantizer=dict(name="fsq")), "quantizer.name='fsq'.*continuous latents"),
        (dict(channels=1), "model.latents codes 1 channels"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        flow.Model(flow.Config(**FLOW, latents_config=LATENTS | changed))


def test_a_chunk_is_one_frame_and_whole_latents():
    with pytest.raises(ValueError, match="model.num_frames=8 must be 1 \\+ a multiple of 4"):
        flow.Model(flow.Config(**FLOW | dict(num_frames=8), latents_config=LATENTS))


def test_another_family_or_another_tokenizer_is_refused():
    other = flow.Model(flow.Config(**FLOW | dict(num_frames=1), patch=4))
    with pytest.raises(ValueError, match="must be a discrete one"):
        flow.build(flow.Config(**FLOW, latents="there"), load=lambda path: other)
    with pytest.raises(ValueError, match="not what model.latents_config says.*latent_channels"):
        flow.build(
            flow.Config(**FLOW, latents="there", latents_config=dict(latent_channels=7)), load=lambda path: tokenizer()
        )


@torch.no_grad()
def test_a_transform_code_is_a_tokenizer_before_any_step():
    torch.manual_seed(0)
    config = flow.Config(
        **FLOW | dict(num_frames=5, num_tokens=32, sampler=SamplerConfig(steps=20)),
        registers="dct",
        dct_frequencies=[16, 16],
        patch=4,
    )
    model = flow.Model(config).eval()
    train, held_out = smooth(300, 5).flip(0)[:256], smooth(300, 5)[:44]
    found = model.fit_statistics([train])
    opened = [found[f"open_{k}"] for k in (1, 2, 4, 8, 16, 32)]
    assert opened == sorted(opened, reverse=True) and opened[-1] < 0.1
    tokens = model.encode(Clip([str(i) for i in range(44)], held_out))
    quality = []
    for k in (1, 4, 16, 32):
        some = tokens.truncate(torch.full((44, 5), k))
        quality.append(psnr(model.decode(some, size=(16, 16)), held_out))
    assert quality == sorted(quality) and quality[-1] > quality[0] + 6
    assert quality[1] > psnr(held_out.mean((2, 3, 4), keepdim=True).expand_as(held_out), held_out)
    model.config.sampler.temperature = 0.0
    some = tokens.truncate(torch.full((44, 5), 4))
    assert psnr(model.decode(some, size=(16, 16)), held_out) > quality[1] + 1, "the mean errs less than a draw"


def psnr(recon: torch.Tensor, wanted: torch.Tensor) -> float:
    error = ((to_uint8(recon).float() - to_uint8(wanted).float()) / 255).square().mean((1, 2, 3, 4))
    return float(-10 * error.log10().mean())


@torch.no_grad()
def test_chunks_share_one_frame_and_a_chunk_knows_where_it_begins():
    model, _ = build_model("flow", "latents")
    pixels = video(1, 25)  # 9 frames, then twice 8 more
    tokens = model.encode(clip(pixels))
    assert int(tokens.num_groups[0]) == 7 and int(tokens.lengths[0]) == 28
    late = model.encode(clip(pixels[:, :, 8:17]))  # the second chunk alone: its first frame has tokens of its own here
    assert torch.equal(tokens.embeddings[:, 12:20], late.embeddings[:, 4:])
    whole = model.decode(tokens, size=(16, 16))
    first = model.decode(tokens.truncate(torch.tensor([[4, 4, 4, 0, 0, 0, 0]])), size=(16, 16))
    assert torch.equal(whole[:, :, :9], first[:, :, :9]), "a chunk does not look ahead"
    seen = []
    model.decode_chunk, inner = lambda *args, **kw: (seen.append(kw), inner(*args, **kw))[1], model.decode_chunk
    model.decode(tokens, size=(16, 16))
    assert [each["number"] for each in seen] == [0, 1, 2] and seen[0]["past"] is None
    for number in (1, 2):
        assert torch.equal(seen[number]["past"], whole[:, :, 8 * number : 8 * number + 1])


@torch.no_grad()
def test_the_same_tokens_give_the_same_video_and_another_seed_another_one():
    model, _ = build_model("flow", "latents")
    tokens = model.encode(clip(video(1, 9)))
    torch.manual_seed(1)
    one = model.decode(tokens, size=(16, 16))
    torch.manual_seed(2)
    assert torch.equal(one, model.decode(tokens, size=(16, 16)))
    model.config.sampler.seed = 1
    assert not torch.equal(one, model.decode(tokens, size=(16, 16)))


def objective(config: flow.Config, **changed) -> flow.Objective:
    return flow.Objective(flow.ObjectiveConfig(**changed), config)


def test_draws_follow_their_laws():
    torch.manual_seed(0)
    config = flow.Config(**FLOW | dict(num_tokens=16), latents_config=LATENTS)
    model = flow.Model(config)
    laws = dict(nested=NestedConfig("pow2", per="block"), nested_first=NestedConfig("full"))
    lab = objective(config, **laws, prefix=[0.5, 0.25, 0.25], unconditional=0.3, prefix_level=0.1)
    keep = lab.draw_keep(model, 4000)
    assert keep.shape == (4000, 3) and bool((keep[:, 0] == 16).all())
    for k in (1, 2, 4, 8, 16):
        assert abs(float((keep[:, 1:] == k).float().mean()) - 0.2) < 0.02
    assert abs(float((keep[:, 1] == keep[:, 2]).float().mean()) - 0.2) < 0.03, "latent frames are drawn apart"
    draw = lab.draw(model, torch.full((4000,), 9))
    shares = [float((draw.prefix == n).float().mean()) for n in range(3)]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, (0.5, 0.25, 0.25)))
    assert abs(float(draw.null.float().mean()) - 0.3) < 0.03
    noisy = draw.prefix_level[draw.prefix_level > 0]
    assert abs(len(noisy) / 4000 - 0.5) < 0.03 and 0.09 < float(noisy.max()) <= 0.1
    short = lab.draw(model, torch.tensor([1, 5] * 100))
    assert bool((short.prefix[::2] == 0).all()) and int(short.prefix[1::2].max()) == 1, "never a whole clip"


def test_known_and_padded_frames_are_not_learned():
    torch.manual_seed(0)
    config = flow.Config(**FLOW, latents_config=LATENTS)
    model = flow.Model(config)
    pixels, lengths = smooth(2, 9), torch.tensor([9, 5])
    keep = torch.full((2, 3), 4)
    draw = flow.Draw(torch.tensor([0.3, 0.6]), torch.tensor([1, 0]), torch.tensor([0.01, 0.0]), torch.zeros(2).bool())
    torch.nn.init.normal_(model.out.weight, std=0.1)
    out = model(pixels, lengths, keep, draw)
    assert out.learned.tolist() == [[False, True, True], [True, True, False]]
    torch.manual_seed(3)
    one = model(pixels, lengths, keep, draw).error
    garbage = pixels.clone()
    garbage[1, :, 5:] = 9.0
    torch.manual_seed(3)
    other = model(garbage, lengths, keep, draw).error
    assert torch.equal(one[out.learned], other[out.learned])
    with pytest.raises(ValueError, match="training clips have 13 frames, a chunk 9: set data.num_frames"):
        model(smooth(2, 13), torch.tensor([13, 13]), keep, draw)


def test_patches_are_aligned_with_a_frozen_tower(tmp_path):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=4)
    transformers.ViTModel(transformers.ViTConfig(**shape, image_size=16)).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=dict(height=16, width=16)).save_pretrained(tmp_path)
    config = flow.Config(**FLOW, latents_config=LATENTS)
    model = flow.Model(config)
    align = flow.AlignConfig(weight=0.5, tower=TowerConfig(str(tmp_path), size=[16, 16]), width=24)
    lab = objective(config, align=align)
    assert not [name for name in lab.state_dict() if "tower" in name], "a tower is held by reference"
    optimizer = torch.optim.AdamW([*model.parameters(), *lab.parameters()], 3e-3)
    pixels, seen = clip(smooth(4, 9)), []
    for step in range(40):
        torch.manual_seed(0)
        loss = lab(model, pixels, step)
        optimizer.zero_grad()
        loss.total.backward()
        if not step:
            assert model.decoder.blocks[0].mlp.down.weight.grad is not None
            total = loss.report["flow"] + loss.report["quantizer"] + 0.5 * loss.report["align"]
            assert torch.allclose(loss.total, total)
        optimizer.step()
        seen.append(float(loss.report["align"]))
    assert 0 < seen[-1] < 0.7 * seen[0]
    with pytest.raises(ValueError, match="needs objective.align.tower.name"):
        objective(config, align=flow.AlignConfig(weight=1.0))
    with pytest.raises(ValueError, match="objective.align.depth=3 is outside 1 to model.decoder_depth=2"):
        objective(config, align=flow.AlignConfig(weight=1.0, depth=3, tower=TowerConfig(str(tmp_path))))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(mask="full"), "model.mask='full' is unknown"),
        (dict(registers="pyramid"), "model.registers='pyramid' is unknown"),
        (dict(registers="dct", quantizer=QuantizerConfig("lfq", codebook_size=64)), "registers='dct' codes with FSQ"),
        (dict(width=40), "model.width=40 must be even, a multiple of model.head_size=16"),
        (dict(width=15, head_size=15), "model.width=15 must be even"),
        (dict(encoder_depth=-1), "model.encoder_depth=-1 must be 0 or more"),
        (dict(dct_frequencies=[4]), r"model.dct_frequencies=\[4\] must be \(y, x\)"),
        (dict(decoder_width=40), "model.decoder_width=40 must be even, a multiple"),
        (dict(latents="there"), "model.latents is not read yet"),
    ],
)
def test_bad_settings_name_the_key(changed, message):
    with pytest.raises(ValueError, match=message):
        flow.Model(flow.Config(**FLOW | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(prefix=[0.0, 1.0]), "objective.prefix=.*that of 0 above 0"),
        (dict(unconditional=1.5), "objective.unconditional=1.5"),
        (dict(level_std=-1.0), "objective.level_std=-1.0 must be 0 or above"),
        (dict(align=flow.AlignConfig(1.0, TowerConfig("there"))), "objective.align.tower.size is open"),
        (dict(flow=-1.0), "objective.flow=-1.0 must be 0 or above"),
        (dict(nested=NestedConfig("pow2", min_tokens=9)), "min_tokens=9"),
    ],
)
def test_bad_objectives_name_the_key(changed, message):
    with pytest.raises(ValueError, match=message):
        objective(flow.Config(**FLOW, latents_config=LATENTS), **changed)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(guidance=float("nan")), "guidance=nan must be a number of 0 or more"),
        (dict(eta=-3.0), "eta=-3.0 is a share"),
        (dict(momentum=float("nan")), "momentum=nan must lie between -1 and 1"),
        (dict(projected=False, threshold=2.5), "threshold=2.5 is read with model.sampler.projected=true alone"),
    ],
)
def test_samplers_that_cannot_draw_as_told_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changed)


def test_a_fresh_run_on_the_latents_of_an_untrained_autoencoder_is_refused():
    config = flow.Config(**FLOW, latents_config=LATENTS)
    model = flow.build(config, load=lambda path: pytest.fail("nothing is named"))
    with pytest.raises(ValueError, match="model.latents is empty, .* random weights: set model.latents to the export"):
        objective(config).begin_model(model)
    model.fit_statistics([smooth(4, 9)])
    assert objective(config).begin_model(model) == "", "weights of another model of this family were fitted with it"
    read = flow.Config(**FLOW, latents="somewhere")
    assert objective(read).begin_model(flow.build(read, load=lambda path: tokenizer())) == ""
    pixels = flow.Config(**FLOW | dict(num_frames=1))
    assert objective(pixels).begin_model(flow.build(pixels, load=lambda path: pytest.fail("no latents"))) == ""


def test_a_run_whose_latents_config_was_filled_in_goes_on(tmp_path):
    """Every preset names some settings of the autoencoder; the run's own config.yaml then holds all of them."""
    given = dict(
        FLOW, name="flow", latents="somewhere", latents_config=dict(latent_channels=6, conv=dict(CONV, mult=[1, 1, 2]))
    )

    def run_of(**changed):
        return RunConfig(name="r", out=str(tmp_path), model=flow.Config(**given | changed))

    before, now = run_of(), run_of()
    flow.build(before.model, load=lambda path: tokenizer())
    assert before.model.latents_config != now.model.latents_config
    assert check_unchanged(before, now) == {}
    other = run_of(latents_config=dict(latent_channels=7))
    with pytest.raises(ValueError, match="cannot go on with another model.*latents_config"):
        check_unchanged(before, other)


@pytest.mark.parametrize("frames", [1, 9, 30])
def test_files_of_drawn_videos_are_never_larger_than_asked(tmp_path, frames):
    """Latent frames stand for 1 and then 4 frames each, and a decoder that draws chunks holds frames back."""
    model, _ = build_model("flow", "latents")
    model.float()
    path, out = tmp_path / "video.mp4", tmp_path / "video.vtok"
    write_video(path, to_uint8(smooth(1, frames)[0]).permute(1, 2, 3, 0), fps=8)
    groups = 1 + -(-(frames - 1) // 4)
    whole = codec.encode_file(model, path, out)
    assert (whole.frames, whole.groups, whole.tokens) == (frames, groups, 4 * groups)

    def coded(**asked) -> codec.Encoded:
        return codec.encode_file(model, path, out, asked=Asked(**asked))

    for asked in (dict(tokens=2 * groups), dict(tokens=2 * groups, look_ahead=1)):
        assert groups <= coded(**asked).tokens <= 2 * groups
    least = coded(budget=1)
    assert least.tokens == groups
    for share in (0.6, 0.8):  # of the room between the fewest tokens and all of them
        room = int(least.bytes + share * (whole.bytes - least.bytes))
        done = coded(bytes=room)
        assert least.tokens <= done.tokens < whole.tokens and done.bytes <= room
    with pytest.raises(ValueError, match="bytes=60 is too small"):
        coded(bytes=60)
    assert coded(tokens_per_second=4).tokens <= max(4 * frames / 8, 1)
    with pytest.raises(ValueError, match="budget=5 tokens a time block: this model has 1 to 4"):
        coded(budget=5)
    out_of_reach = f"{groups} of {groups} blocks do not reach it at any length"
    assert coded(psnr_db=60.0).note.endswith(out_of_reach)
    assert np.stack(list(codec.decode_frames(model, out))).shape == (frames, 16, 16, 3)


@torch.no_grad()
def test_patches_begin_by_reading_the_token_that_lies_where_they_are():
    torch.manual_seed(0)
    config = flow.Config(
        num_frames=1, size=[16, 16], patch=4, num_tokens=16, width=64, head_size=32, encoder_depth=1, decoder_depth=2
    )
    model = flow.Model(config).eval()
    spots = patch_of_token(16, (1, 4, 4), 1).tolist()
    noised, level = torch.randn(1, 3, 1, 16, 16), torch.full((1, 1), 0.9)
    codes, yes = torch.rand(1, 1, 16, model.quantizer.dim) * 2 - 1, torch.ones(1, 1, dtype=torch.bool)

    def after_first_block(codes: torch.Tensor, kept: int = 16) -> torch.Tensor:
        keep = (torch.arange(16) < kept)[None, None]
        known = null = torch.zeros(1, 1, dtype=torch.bool)
        tapped = model.velocity(noised, level, codes, keep, valid=yes, known=known, null=null[0], tap=1)[1]
        assert tapped is not None
        return tapped[0]

    whole = after_first_block(codes)
    for token, place in enumerate(spots):
        other = codes.clone()
        other[0, 0, token] *= -1
        moved = (after_first_block(other) - whole).square().sum(-1)
        assert int(moved.argmax()) == place and moved[place] > 0.25 * moved.sum()
    assert sorted(spots) == list(range(16)), "every patch has a token"


def test_the_first_steps_tell_every_token(monkeypatch):
    config = flow.Config(**FLOW)
    model, seen = flow.Model(config), []
    whole = flow.Model.forward
    monkeypatch.setattr(
        flow.Model,
        "forward",
        lambda self, video, lengths, keep, draw, **given: (
            seen.append((keep, draw.null)) or whole(self, video, lengths, keep, draw, **given)
        ),
    )
    law = NestedConfig("uniform", per="block")
    lab = flow.Objective(flow.ObjectiveConfig(nested=law, unconditional=0.5, full_steps=3), config)
    for step, training in ((2, True), (3, True), (2, False)):
        torch.manual_seed(0)
        lab.train(training)(model, clip(smooth(16, 9)), step)
    (early, told), (later, untold), (measured, measured_null) = seen
    assert bool((early == model.num_tokens).all()) and not told.any()
    assert later.unique().numel() > 2 and untold.any(), "then the law"
    assert torch.equal(measured, later) and torch.equal(measured_null, untold), "which validation always follows"
    with pytest.raises(ValueError, match="objective.full_steps=-1 must be 0 or more"):
        flow.Objective(flow.ObjectiveConfig(full_steps=-1), config)
