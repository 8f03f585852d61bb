"""Frozen towers: what they see and give is what their own library sees and gives, whatever the batch and the chunks.

The towers are real classes of timm and transformers with small random weights, saved as their libraries save them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle

import pytest
import torch
from torch import nn

from vtok.types import Clip
from vtok.vision import Preprocess, TowerConfig, load_tower

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
SQUARE = dict(size={"height": 64, "width": 64})
CROPPED = dict(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64})


def hub_towers():
    """By name: (model, processor), made when asked."""
    t, image = transformers, dict(image_size=64, patch_size=16)
    jepa = dict(pred_hidden_size=48, pred_num_attention_heads=2, pred_num_hidden_layers=1, num_pooler_layers=1)
    dinov3 = dict(image, num_register_tokens=2)
    tubelets = dict(SMALL, image_size=64, num_frames=4, tubelet_size=[2, 16, 16])
    dino = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16)
    jepa |= dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=2, crop_size=64, frames_per_clip=4)
    return {
        "siglip": lambda: (
            t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL, **image)),
            t.SiglipImageProcessor(**SQUARE),
        ),
        "clip": lambda: (t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, **image)), t.CLIPImageProcessor(**CROPPED)),
        "dinov2": lambda: (t.Dinov2Model(t.Dinov2Config(**dino)), t.BitImageProcessor(**CROPPED)),
        "dinov3": lambda: (t.DINOv3ViTModel(t.DINOv3ViTConfig(**SMALL, **dinov3)), t.DINOv3ViTImageProcessor(**SQUARE)),
        "vit": lambda: (t.ViTModel(t.ViTConfig(**SMALL, **image)), t.ViTImageProcessor(**SQUARE)),
        "convnext": lambda: (
            t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 2, 1])),
            t.ConvNextImageProcessor(size={"shortest_edge": 64}),
        ),
        "videomae": lambda: (
            t.VideoMAEModel(t.VideoMAEConfig(**SMALL, **image, num_frames=4)),
            t.VideoMAEVideoProcessor(**CROPPED),
        ),
        "vivit": lambda: (t.VivitModel(t.VivitConfig(**tubelets)), t.VivitVideoProcessor(**CROPPED)),
        "vjepa2": lambda: (t.VJEPA2Model(t.VJEPA2Config(**jepa)), t.VJEPA2VideoProcessor(crop_size=64)),
    }


IMAGE, VIDEO = ["siglip", "clip", "dinov2", "dinov3", "vit", "convnext"], ["videomae", "vivit", "vjepa2"]
TIMM = {
    "timm_vit": (
        "vit_tiny_patch16_224",
        dict(img_size=64, embed_dim=32, depth=3, num_heads=2),
        dict(crop_pct=0.9, input_size=(3, 64, 64)),
    ),
    "timm_avg": (
        "vit_tiny_patch16_224",
        dict(img_size=64, embed_dim=32, depth=3, num_heads=2, reg_tokens=4, global_pool="avg"),
        dict(crop_mode="squash", crop_pct=0.9, interpolation="bilinear", input_size=(3, 64, 64)),
    ),
    "timm_border": (
        "vit_tiny_patch16_224",
        dict(img_size=(64, 96), embed_dim=32, depth=3, num_heads=2),
        dict(crop_mode="border", crop_pct=1.0, input_size=(3, 64, 96)),
    ),
    "timm_eva": (
        "eva02_tiny_patch14_224",
        dict(img_size=56, embed_dim=48, depth=3, num_heads=2),
        dict(input_size=(3, 56, 56)),
    ),
    "timm_convnext": ("convnext_atto", dict(dims=(8, 16, 16, 32), depths=(1, 1, 2, 1)), dict(crop_pct=0.875)),
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folder and in-memory original of a tower by name: (folder, model, processor)."""
    made: dict[str, tuple] = {}
    root = tmp_path_factory.mktemp("towers")

    def get(name: str):
        if name in made:
            return made[name]
        torch.manual_seed(0)
        folder = root / name
        if name in TIMM:
            kind, args, cfg = TIMM[name]
            model = timm.create_model(kind, pretrained=False, pretrained_cfg_overlay=cfg, **args).eval()
            bigger_weights(model)
            timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=args)
            made[name] = folder, model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        else:
            model, processor = hub_towers()[name]()
            bigger_weights(model.eval())
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            made[name] = folder, model, processor
        return made[name]

    return get


def bigger_weights(model: nn.Module) -> None:
    """Small random networks barely look at their input; with larger matrices an error in the pixels shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name or "gamma" in name:
                parameter.fill_(1.0)
            elif parameter.ndim > 1:
                parameter.mul_(3)


LOADED: dict[str, object] = {}


def tower_of(towers, name, **settings):
    """A tower, loaded once: nothing changes a frozen one."""
    config = TowerConfig(str(towers(name)[0]), **settings)
    if str(config) not in LOADED:
        LOADED[str(config)] = load_tower(config)
    return LOADED[str(config)]


def film(frames: int = 5, height: int = 90, width: int = 121, clips: int = 1):
    """uint8 [B, 3, T, H, W], smooth like photographs, with every level in it."""
    small = torch.rand(clips * frames, 3, 9, 12)
    big = nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)
    return big.mul(255).round().byte().unflatten(0, (clips, frames)).transpose(1, 2).contiguous()


def pictures(video):
    """The frames of one clip as PIL images."""
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video.transpose(0, 1)]


def pil_to_tensor(picture):
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3).permute(2, 0, 1)
    )


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", IMAGE)
def test_transformers_image_tower_equals_its_library(towers, name):
    folder, model, processor = towers(name)
    video = film()
    tower = tower_of(towers, name)
    seen = tower(video)
    with torch.no_grad():
        own = model(**processor(pictures(video[0]), return_tensors="pt"))
    tokens = own.last_hidden_state
    tokens = tokens.flatten(2).mT if tokens.ndim == 4 else tokens[:, -16:]
    assert seen.patches.shape[-1] == tower.embedding_dim and seen.grid[0] * seen.grid[1] == tokens.shape[1]
    assert relative(seen.patches[0], tokens) < 1e-5
    assert relative(seen.frame[0], own.pooler_output.flatten(1)) < 1e-5


@pytest.mark.parametrize("name", VIDEO)
def test_transformers_video_tower_equals_its_library(towers, name):
    folder, model, processor = towers(name)
    video = film(frames=8)
    tower = tower_of(towers, name)
    seen = tower(video, times=torch.arange(8.0)[None] / 10)
    assert (tower.window, tower.stride) == (4, 2) and seen.frame is None
    for window in range(2):  # each window by itself, as a clip of its own
        frames = processor([pictures(video[0, :, 4 * window : 4 * window + 4])], return_tensors="pt")
        extra = {"skip_predictor": True} if name == "vjepa2" else {}
        with torch.no_grad():
            tokens = model(**frames, **extra).last_hidden_state[0, -32:].unflatten(0, (2, 16))
        assert relative(seen.patches[0, 2 * window : 2 * window + 2], tokens) < 1e-5
    assert torch.allclose(seen.times, torch.tensor([[0.05, 0.25, 0.45, 0.65]]))


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("shape", [(90, 121), (61, 40)])
def test_timm_tower_equals_its_library(towers, name, shape):
    folder, model, transform = towers(name)
    video = film(3, *shape)
    seen = tower_of(towers, name)(video)
    pixels = torch.stack([transform(picture) for picture in pictures(video[0])])
    with torch.no_grad():
        final = model.forward_features(pixels)
        pooled = model.forward_head(final, pre_logits=True)
    tokens = final.flatten(2).mT if final.ndim == 4 else final[:, model.num_prefix_tokens :]
    # Pillow chooses which direction of a tall frame is resized first: a tenth of its pixels may differ by a level
    bound = 1e-2 if shape[0] > shape[1] else 1e-3
    assert relative(seen.patches[0], tokens) < bound
    assert relative(seen.frame[0], pooled) < bound


@pytest.mark.parametrize("size", [(240, 320), (90, 121), (64, 64), (50, 200), (33, 40)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_pillows(size, interpolation):
    video = film(2, *size)
    ours = Preprocess((64, 64), interpolation=interpolation, std=(1 / 255,) * 3)(video[0].transpose(0, 1))
    number = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    theirs = torch.stack([pil_to_tensor(picture.resize((64, 64), number)) for picture in pictures(video[0])])
    difference = (ours - theirs).abs()
    assert difference.max() <= 1 and difference.mean() < 0.005


def test_the_layer_is_a_block_counted_from_either_end(towers):
    video = film(2)
    _, model, processor = towers("clip")
    with torch.no_grad():
        hidden = model(**processor(pictures(video[0]), return_tensors="pt"), output_hidden_states=True).hidden_states
    for layer, same in ((-2, 1), (-3, 0)):
        found = tower_of(towers, "clip", layer=layer)(video)
        assert relative(found.patches[0], hidden[layer - (len(hidden) - 4)][:, 1:]) < 1e-5
        assert torch.equal(found.patches, tower_of(towers, "clip", layer=same)(video).patches)
        assert found.frame is not None
    _, model, transform = towers("timm_vit")
    kept = []
    hook = model.blocks[1].register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model(torch.stack([transform(p) for p in pictures(video[0])]))
    hook.remove()
    assert relative(tower_of(towers, "timm_vit", layer=-2)(video).patches[0], kept[0][:, 1:]) < 1e-3
    stage = tower_of(towers, "timm_convnext", layer=1, size=[64, 64])
    assert stage.embedding_dim == 16 and stage(video).grid == (8, 8)
    with pytest.raises(ValueError, match="layer=3 is out of range.* has 3"):
        tower_of(towers, "clip", layer=3)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov3", "vjepa2"])
def test_attention_and_keys_are_those_of_the_eager_model(towers, name):
    video = film(4)
    tower = tower_of(towers, name, layer=1)
    _, model, processor = towers(name)
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    kept = []
    keys = [m for n, m in model.named_modules() if n.rpartition(".")[2] in ("k_proj", "key")][1]
    keys.register_forward_hook(lambda module, args, out: kept.append(out))
    extra = {"skip_predictor": True} if name == "vjepa2" else {}
    with torch.no_grad():
        frames = [pictures(video[0])] if name == "vjepa2" else pictures(video[0])
        own = model(**processor(frames, return_tensors="pt"), output_attentions=True, **extra)
    tokens = 32 if name == "vjepa2" else 16
    seen = tower(video, attention=(0, -1), keys=True)
    plain = tower(video)
    assert torch.equal(plain.patches, seen.patches) and plain.attention is None and plain.keys is None
    for layer in (0, -1):
        expected = own.attentions[layer].mean((1, 2))[:, -tokens:]
        assert relative(seen.attention[tower.block(layer)].flatten(1, 2).flatten(), expected.flatten()) < 1e-4
    if name in ("siglip", "clip"):  # the others turn them by their position first
        assert relative(seen.keys[0], kept[0][:, -tokens:]) < 1e-5
    if name in ("clip", "dinov3"):
        chosen = tower(video, attention=(1,), attention_from="cls").attention[1][0]
        assert relative(chosen, own.attentions[1].mean(1)[:, 0, -tokens:]) < 1e-4
    else:
        with pytest.raises(ValueError, match="no class token"):
            tower(video, attention=(1,), attention_from="cls")


def test_timm_attention_sums_to_one_with_its_prefix(towers):
    seen = tower_of(towers, "timm_vit")(film(2), attention=(0, 1, 2))
    for received in seen.attention.values():
        assert ((received.sum(-1) > 0.5) & (received.sum(-1) < 1)).all() and received.std() > 1e-4
    assert tower_of(towers, "timm_eva")(film(2), attention=(2,), keys=True).keys.shape == (1, 2, 16, 48)
    with pytest.raises(ValueError, match="no attention over all patches"):
        tower_of(towers, "timm_convnext")(film(1), attention=(0,))


@pytest.mark.parametrize("name", ["clip", "timm_avg", "videomae", "vjepa2"])
def test_chunks_batches_padding_and_pixels_types_change_nothing(towers, name):
    lengths = torch.tensor([7, 2, 1, 5])
    video = film(7, 64, 80, clips=4)
    for row, length in enumerate(lengths):
        video[row, :, length:] = torch.randint(256, video[row, :, length:].shape, dtype=torch.uint8)
    times = torch.arange(7.0).expand(4, 7)
    last = tower_of(towers, name).depth - 1
    whole = tower_of(towers, name)(video, lengths, times=times, attention=(last,), keys=True)
    chunked = tower_of(towers, name, frames_per_call=2)(video, lengths, attention=(last,), keys=True)
    floats = tower_of(towers, name)(video / 127.5 - 1, lengths)
    assert torch.equal(floats.patches, whole.patches)
    for pair in ((chunked.patches, whole.patches), (chunked.keys, whole.keys)):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chunked.attention[last], whole.attention[last], rtol=1e-4, atol=1e-5)
    tower = tower_of(towers, name)
    for row, length in enumerate(lengths.tolist()):
        steps = int(tower.feature_frames(torch.tensor(length)))
        alone = tower(video[row : row + 1, :, :length], times=times[row : row + 1, :length])
        assert alone.patches.shape[1] == steps == -(-length // tower.stride)
        torch.testing.assert_close(whole.patches[row : row + 1, :steps], alone.patches, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.times[row, :steps], alone.times[0])
        assert whole.patches[row, :steps].abs().sum((1, 2)).min() > 0
        assert not whole.patches[row, steps:].any() and not whole.attention[last][row, steps:].any()


def test_a_tower_is_frozen_and_held_by_reference(towers):
    folder = towers("clip")[0]
    tower = load_tower(TowerConfig(str(folder), dtype="bfloat16"))

    class Projector(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.map = tower, nn.Linear(32, 4)

    projector = Projector()
    assert set(projector.state_dict()) == {"map.weight", "map.bias"} and len(list(projector.parameters())) == 2
    assert copy.deepcopy(projector).tower is tower
    assert not tower.model.training and not any(p.requires_grad for p in tower.model.parameters())
    before = {name: value.clone() for name, value in tower.model.state_dict().items()}
    video = (film(3) / 127.5 - 1).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        seen = tower(video)
    assert seen.patches.dtype == torch.bfloat16 and not seen.patches.requires_grad
    projector.map(seen.patches.float()).square().mean().backward()  # features enter a graph, though none made them
    assert projector.map.weight.grad is not None and video.grad is None
    assert all(torch.equal(before[name], value) for name, value in tower.model.state_dict().items())
    assert relative(seen.patches.float(), load_tower(TowerConfig(str(folder)))(video).patches) < 0.05
    written = pickle.dumps(tower)
    again = pickle.loads(written)
    assert len(written) < 2000 and again.identity() == tower.identity()
    assert torch.equal(again(video).patches, seen.patches)


def test_the_identity_names_weights_layer_and_preprocessing(towers):
    folder = towers("siglip")[0]
    tower = load_tower(TowerConfig(str(folder)))
    assert tower.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_tower(TowerConfig(str(folder), sha256=tower.sha256)).sha256 == tower.sha256
    others = [TowerConfig(str(folder), layer=1), TowerConfig(str(folder), size=[96, 96])]
    identities = [json.dumps(load_tower(config).identity(), sort_keys=True) for config in others]
    assert len({*identities, json.dumps(tower.identity(), sort_keys=True)}) == 3
    with pytest.raises(ValueError, match="tower.sha256=0+ is expected, but .* has [0-9a-f]{64}: other weights"):
        load_tower(TowerConfig(str(folder), sha256="0" * 64))


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2", "vjepa2", "timm_vit", "timm_convnext"])
def test_a_size_shows_the_tower_whole_frames(towers, name):
    size = [96, 96] if name == "vjepa2" else [96, 128]
    tower = tower_of(towers, name, size=size)
    assert tower.preprocess.keeps(90, 121) and tower.preprocess.size(90, 121) == tuple(size)
    video = film(4)
    seen = tower(video)
    patch = 32 if name == "timm_convnext" else 16
    assert seen.grid == (size[0] // patch, size[1] // patch)
    video[..., -6:, -6:] = 255 - video[..., -6:, -6:]  # a corner that the tower's own crop would drop
    changed = (tower(video).patches - seen.patches).abs().sum(-1)
    assert (changed[..., -1] > 0).all()
    if name in ("siglip", "clip"):
        model = towers(name)[1]
        pixels = tower.preprocess(video[0].transpose(0, 1))
        with torch.no_grad():
            own = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert relative(tower(video).patches[0], own[:, -seen.patches.shape[2] :]) < 1e-5


def test_without_a_size_a_crop_may_hide_the_border(towers):
    preprocess = tower_of(towers, "clip").preprocess
    assert not preprocess.keeps(90, 121) and preprocess.size(90, 121) == (64, 64)
    assert tower_of(towers, "siglip").preprocess.keeps(90, 121)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["siglip", "timm_vit", "vjepa2"])
def test_features_of_a_gpu_are_those_of_the_cpu(towers, name):
    folder, video, lengths = towers(name)[0], film(5, clips=2), torch.tensor([5, 2])
    here = tower_of(towers, name)(video, lengths)
    there = load_tower(TowerConfig(str(folder)))(video.cuda(), lengths.cuda())
    assert there.patches.is_cuda and relative(there.patches.cpu(), here.patches) < 2e-2
    half = load_tower(TowerConfig(str(folder), dtype="bfloat16"))(
        video.cuda(), lengths.cuda(), attention=(0,), keys=True
    )
    assert half.patches.dtype == torch.bfloat16 and relative(half.patches.float().cpu(), here.patches) < 0.1


def test_a_clips_cached_features_spare_the_tower(towers):
    tower = tower_of(towers, "clip")
    video = film(3, clips=2)
    clip = Clip(["a", "b"], video, lengths=torch.tensor([3, 1]), times=torch.arange(3.0).expand(2, 3))
    live = tower.features(clip)
    assert torch.equal(live.patches, tower(video, clip.lengths).patches) and torch.equal(live.times, clip.times)
    assert tower.features(Clip(["a", "b"], features={tower.name: live})) is live
    with pytest.raises(ValueError, match=r"neither a video nor features of .*only of \['other'\]"):
        tower.features(Clip(["a", "b"], features={"other": live}))
