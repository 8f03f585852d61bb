"""Frozen towers: what they see and give is what their own library sees and gives, whatever the batch and the chunks.

The towers are real classes of timm and transformers with small random weights, saved as their libraries save them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import sys

import pytest
import torch
from torch import nn

from vtok.types import Clip, Features
from vtok.vision import Preprocess, TowerConfig, load_tower, resample_features

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
        assert relative(seen.attention[layer].flatten(1, 2).flatten(), expected.flatten()) < 1e-4
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


def test_shards_are_hashed_together(towers, tmp_path):
    model, processor = towers("vit")[1:]
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    processor.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    hashes = "\n".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    tower = load_tower(TowerConfig(str(tmp_path)))
    assert tower.sha256 == hashlib.sha256(hashes.encode()).hexdigest()
    video = film(1)
    assert torch.equal(tower(video).patches, tower_of(towers, "vit")(video).patches)


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


def test_the_vision_half_of_a_two_tower_checkpoint(towers, tmp_path):
    text = dict(SMALL, vocab_size=50, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=dict(SMALL, image_size=64, patch_size=16), projection_dim=16
    )
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(**CROPPED)
    processor.save_pretrained(tmp_path)
    tower, video = load_tower(TowerConfig(str(tmp_path))), film(2)
    with torch.no_grad():
        own = whole.vision_model(processor(pictures(video[0]), return_tensors="pt")["pixel_values"])
    assert relative(tower(video).patches[0], own.last_hidden_state[:, 1:]) < 1e-5
    assert not any("text" in name for name, _ in tower.model.named_parameters())


def test_a_pooler_without_weights_is_not_believed(tmp_path):
    config = transformers.ViTConfig(**SMALL, image_size=64, patch_size=16)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)  # comes without a pooler
    transformers.ViTImageProcessor(**SQUARE).save_pretrained(tmp_path)
    video = film(2)
    tower = load_tower(TowerConfig(str(tmp_path)))
    with torch.no_grad():
        tokens = tower.model(tower.preprocess(video[0].transpose(0, 1))).last_hidden_state
    torch.testing.assert_close(tower(video).frame[0], tokens[:, 0])


def test_weights_that_are_missing_are_an_error(towers, tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = towers("siglip")[1:]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if "layers.1" in name)
    save_file({k: v for k, v in state.items() if k != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights of SiglipVisionModel are not in its files.*layers\.1"):
        load_tower(TowerConfig(str(tmp_path)))
    (tmp_path / "preprocessor_config.json").unlink()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no usable preprocessor_config.json"):
        load_tower(TowerConfig(str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights: expected one of model.safetensors"):
        load_tower(TowerConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no tower is there"):
        load_tower(TowerConfig(str(tmp_path)))


def test_names_that_are_no_tower(monkeypatch):
    for name in ("", "siglip", "nothing/here/at/all", "timm:"):
        with pytest.raises(ValueError, match="names no tower; give timm:MODEL"):
            load_tower(TowerConfig(name))
    with pytest.raises(ValueError, match="timm has no such model; close: .*vit_base_patch14_dinov2"):
        load_tower(TowerConfig("timm:vit_base_patch14_dinov"))
    with pytest.raises(ValueError, match=r"timm has vit_base_patch14_dinov2\.lvd142m"):
        load_tower(TowerConfig("timm:vit_base_patch14_dinov2.nope"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'vtok\[towers\]'"):
        load_tower(TowerConfig("timm:vit_base_patch14_dinov2"))


def test_no_transformers_names_the_extra(towers, monkeypatch):
    folder = towers("clip")[0]
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'vtok\[towers\]'"):
        load_tower(TowerConfig(str(folder)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(dtype="bf16"), "dtype='bf16' is unknown; choose one of float32, bfloat16"),
        (dict(frames_per_call=0), "frames_per_call=0 must be at least 1"),
        (dict(size=[64]), r"size=\[64\] is not \(height, width\)"),
        (dict(size=[60, 64]), r"size=\[60, 64\] is not a multiple"),
    ],
)
def test_settings_out_of_range(towers, settings, message):
    for name in ("clip", "timm_vit"):
        with pytest.raises(ValueError, match=message):
            tower_of(towers, name, **settings)


def test_towers_that_cannot_see_what_is_asked(towers, tmp_path):
    with pytest.raises(ValueError, match=r"cannot resample its positions to 96x96: set tower.size to \[64, 64\]"):
        tower_of(towers, "videomae", size=[96, 96])
    with pytest.raises(ValueError, match="RGB videos"):
        tower_of(towers, "clip")(torch.zeros(1, 1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"lengths lie in \[2, 9\]"):
        tower_of(towers, "clip")(film(3, clips=2), torch.tensor([2, 9]))
    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=16)
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(**SQUARE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="packed patches"):
        load_tower(TowerConfig(str(tmp_path)))
    config = transformers.TimesformerConfig(**SMALL, image_size=64, patch_size=16, num_frames=4)
    transformers.TimesformerModel(config).save_pretrained(tmp_path)
    transformers.VideoMAEImageProcessor(**CROPPED).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a timesformer; the video towers read here are videomae, vivit, vjepa2"):
        load_tower(TowerConfig(str(tmp_path)))


def test_names_are_found_in_the_hubs_cache(towers, tmp_path, monkeypatch):
    """What a download leaves behind, read by the real clients without a network."""
    from huggingface_hub import constants

    def cached(repo: str, folder, commit: str, branch: str = "main"):
        base = tmp_path / f"models--{repo.replace('/', '--')}"
        (base / "refs").mkdir(parents=True, exist_ok=True)
        (base / "refs" / branch).write_text(commit)
        (base / "snapshots").mkdir(exist_ok=True)
        (base / "snapshots" / commit).symlink_to(folder)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    video = film(2)
    cached("someone/clip", towers("clip")[0], "a" * 40)
    cached("someone/clip", towers("clip")[0], "b" * 40, "later")
    cached("someone/vit", towers("timm_vit")[0], "c" * 40)
    for name, here, commit in (("hf:someone/clip", "clip", "a" * 40), ("timm:someone/vit", "timm_vit", "c" * 40)):
        tower = load_tower(TowerConfig(name))
        assert tower.revision == commit and tower.sha256 == tower_of(towers, here).sha256
        assert torch.equal(tower(video).patches, tower_of(towers, here)(video).patches)
    assert load_tower(TowerConfig("hf:someone/clip", revision="later")).revision == "b" * 40
    assert tower_of(towers, "clip").revision == ""
    model = timm.create_model("test_vit.r160_in1k", pretrained=False).eval()
    timm.models.save_for_hf(model, tmp_path / "tiny", safe_serialization=True)
    cached("timm/test_vit.r160_in1k", tmp_path / "tiny", "d" * 40)
    tower = load_tower(TowerConfig("timm:test_vit.r160_in1k", size=[160, 160]))
    assert tower.revision == "d" * 40
    with torch.no_grad():
        own = model.forward_features(tower.preprocess(video[0].transpose(0, 1)))
    assert relative(tower(video).patches[0], own[:, model.num_prefix_tokens :]) < 1e-5
    kind = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with pytest.raises(ValueError, match="'timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k' could not be had"):
        load_tower(TowerConfig(f"timm:{kind}"))
    with pytest.raises(ValueError, match="'someone/nothing' could not be had from the Hub"):
        load_tower(TowerConfig("hf:someone/nothing"))


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


def features(frames: int = 8, grid: tuple[int, int] = (4, 6), clips: int = 2) -> Features:
    patches = torch.randn(clips, frames, grid[0] * grid[1], 3, dtype=torch.float64)
    times = torch.arange(frames, dtype=torch.float64).expand(clips, frames)
    return Features(patches, grid, times=times, frame=patches.mean(2))


def test_resampling_onto_the_same_grid_changes_nothing():
    given = features()
    same = resample_features(given, (4, 6), 8)
    torch.testing.assert_close(same.patches, given.patches)
    torch.testing.assert_close(same.times, given.times)


@pytest.mark.parametrize("grid", [(2, 3), (8, 12), (3, 5), (4, 6)])
@pytest.mark.parametrize("frames", [1, 3, 4, 8, 11, [1, 4, 3]])
def test_resampling_keeps_what_does_not_change(grid, frames):
    given = features()
    flat = Features(given.patches[:, :1, :1].expand_as(given.patches), given.grid)
    out = resample_features(flat, grid, frames)
    assert out.grid == grid and out.patches.shape[:3] == (
        2,
        len(frames) if isinstance(frames, list) else frames,
        grid[0] * grid[1],
    )
    torch.testing.assert_close(out.patches, flat.patches[:, :1, :1].expand_as(out.patches), rtol=1e-6, atol=1e-6)


def test_resampling_averages_windows_and_neighbours():
    given = features()
    windows = [1, 4, 3]
    out = resample_features(given, given.grid, windows)
    for index, part in enumerate(given.patches.split(windows, dim=1)):
        torch.testing.assert_close(out.patches[:, index], part.mean(1), rtol=1e-6, atol=1e-6)
    assert torch.allclose(out.times[0], torch.tensor([0, 2.5, 6], dtype=torch.float64))
    third = resample_features(given, given.grid, 3).patches[:, 0]  # the first 8/3 frames
    expected = (given.patches[:, 0] + given.patches[:, 1] + given.patches[:, 2] * 2 / 3) / (8 / 3)
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-6)
    maps = given.patches.unflatten(2, given.grid)
    ramp = Features(torch.arange(6.0).repeat(4)[None, None, :, None].double(), (4, 6))
    assert torch.allclose(
        resample_features(ramp, (4, 12), 1).patches[0, 0, 2:10, 0], torch.arange(0.75, 4.3, 0.5).double()
    )
    halved = resample_features(given, (2, 3), 8).patches.unflatten(2, (2, 3))
    inner = maps[:, :, :, :].unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    assert relative(halved, inner) < 0.7  # the antialiased average reaches a little further than the block


def test_resampling_counts_real_frames_alone():
    given = features()
    lengths = torch.tensor([8, 3])
    padded = given.patches.clone()
    padded[1, 3:] = 1e6
    out = resample_features(Features(padded, given.grid), (2, 3), [1, 4, 3], lengths=lengths)
    torch.testing.assert_close(out.patches[0], resample_features(given, (2, 3), [1, 4, 3]).patches[0])
    short = Features(given.patches[1:, :3], given.grid)
    torch.testing.assert_close(out.patches[1, :2], resample_features(short, (2, 3), [1, 2]).patches[0])
    assert not out.patches[1, 2].any()


def test_resampling_refuses_windows_that_do_not_fit():
    for frames in ([1, 4], [0, 8], [], 0):
        with pytest.raises(ValueError, match="frames="):
            resample_features(features(), (2, 2), frames)
    with pytest.raises(ValueError, match="has no patches"):
        resample_features(features(), (0, 2), 4)
