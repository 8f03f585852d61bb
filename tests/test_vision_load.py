"""Where towers come from: folders, shards of weights, the Hub's cache, and what is refused."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from test_vision import CROPPED, SMALL, SQUARE, film, pictures, relative, timm, tower_of, transformers
from test_vision import towers as towers  # a fixture

from vtok.vision import TowerConfig, load_tower


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


@pytest.mark.parametrize("kind", ["SamVision", "Hiera", "MobileNetV2", "EfficientNet", "PixtralVision"])
def test_towers_whose_outputs_are_not_read_say_so(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32)
    own = {
        "SamVision": dict(vit, patch_size=8, window_size=2, global_attn_indexes=[1], output_channels=8, mlp_dim=16),
        "Hiera": dict(
            image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], masked_unit_size=[4, 4],
            num_query_pool=1,
            query_stride=[2, 2],
        ),
        "MobileNetV2": dict(image_size=32),
        "EfficientNet": dict(image_size=32, width_coefficient=0.25),
        "PixtralVision": dict(vit, patch_size=8),
    }[kind]  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**own))
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a .*, whose outputs are not read here: towers .* ViTs"):
        load_tower(TowerConfig(name=str(tmp_path)))
