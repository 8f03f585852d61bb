"""The tower and the language model of a VLM in training: what is learned on is what `attach` feeds, for every seam."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from small_vlms import (
    BLIND,
    GREEDY,
    GRIDS,
    MODELS,
    ONE,
    SEEN,
    VIDEO,
    WIDTH,
    compressor_of,
    texts,
    vlm_of,
    write_processor,
)

from vtok.families import reducer
from vtok.llm import LLMConfig, load_llm
from vtok.llm.framewise import swap
from vtok.llm.joined import attach
from vtok.types import Clip, Features
from vtok.vision import TowerConfig, load_tower

torch.set_num_threads(1)
every_model = pytest.mark.parametrize("name", MODELS)
SIZE = {"height": 32, "width": 32}
CROP = {"size": {"shortest_edge": 32}, "crop_size": SIZE}
QWEN = dict(patch_size=8, temporal_patch_size=2, merge_size=2)


@cache
def processor_of(name: str) -> Any:
    t: Any = transformers
    made = {
        "llava": lambda: t.CLIPImageProcessor(**CROP),
        "llava_onevision": lambda: t.LlavaOnevisionVideoProcessor(size=SIZE, do_sample_frames=False),
        "llava_next_video": lambda: t.LlavaNextVideoVideoProcessor(**CROP, do_sample_frames=False),
        "video_llava": lambda: t.VideoLlavaVideoProcessor(**CROP, do_sample_frames=False),
        "internvl": lambda: t.InternVLVideoProcessor(size=SIZE, do_sample_frames=False),
        "qwen2_5_vl": lambda: t.Qwen2VLVideoProcessor(**QWEN, do_sample_frames=False),
        "qwen3_vl": lambda: t.Qwen3VLVideoProcessor(**QWEN, do_sample_frames=False),
    }
    return made[name]()


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    root = tmp_path_factory.mktemp("vlms")
    write_processor(root / "words")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "words")

    @cache
    def home(name: str) -> Path:
        vlm_of(name).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        processor_of(name).save_pretrained(root / name)
        return root / name

    return home


def pixels_as_its_processor(name: str, frames: torch.Tensor) -> dict[str, Any]:
    """[T, 3, H, W] uint8, as the VLM's own processor gives them."""
    processor = processor_of(name)
    if name == "llava":
        return {"pixel_values_videos": [processor(list(frames), return_tensors="pt").pixel_values]}
    resize = {"do_resize": False} if name in GRIDS else {}
    given = processor([frames], return_tensors="pt", **resize)
    pixels = given["pixel_values_videos"]
    return {"pixel_values_videos": pixels if name in GRIDS else list(pixels)} | (
        {"video_grid_thw": given["video_grid_thw"]} if name in GRIDS else {}
    )


@every_model
@torch.no_grad()
def test_the_tower_gives_what_attach_feeds(name, homes):
    tower = load_tower(TowerConfig(name=f"vlm:{homes(name)}", size=[32, 32] if name in GRIDS else None))
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (2, 3, 5, 32, 32), dtype=torch.uint8, generator=generator)
    lengths = torch.tensor([4, 2])
    found = tower(video, lengths)
    assert tower.embedding_dim == found.patches.shape[-1] and tower.identity()["layer"] == tower.layer
    joined = attach(compressor_of(method="none"), vlm_of(name))
    for row, frames in enumerate(lengths.tolist()):
        pixels = pixels_as_its_processor(name, video[row, :, :frames].transpose(0, 1))
        (item,) = joined.features(**pixels)
        steps = len(item.patches)
        assert steps == frames // tower.stride and found.grid == item.grid
        largest = float(item.patches.abs().max())
        assert float((found.patches[row, :steps] - item.patches).abs().max()) < 1e-4 * largest
        assert (found.frame is None) == (item.frame is None)
        if item.frame is not None:
            torch.testing.assert_close(found.frame[row, :steps], item.frame, rtol=1e-3, atol=1e-4 * largest)


@every_model
@torch.no_grad()
def test_the_language_model_reads_tokens_as_the_whole_vlm_does(name, homes):
    vlm, llm = vlm_of(name), load_llm(LLMConfig(name=f"vlm:{homes(name)}"))
    assert not any("vision" in n or "visual" in n for n, _ in llm.model.named_parameters())
    assert llm.embedding_dim == WIDTH and len(llm.sha256) == 64
    joined = attach(compressor_of(method="none"), vlm)
    tokens = joined.compressor.compress(Features(torch.randn(1, 2, 16, SEEN), (4, 4)))
    ids, mask = texts(name, ONE)
    want = joined(ids, mask, features=tokens).logits[0]
    row = [llm.embed(torch.tensor([i])) if i != VIDEO else tokens.embeddings[0] for i in ONE]
    embeds = torch.cat(row)[None]
    seen, positions = torch.ones(embeds.shape[:2], dtype=torch.bool), torch.arange(embeds.shape[1])[None]
    logits, (state,) = llm.forward(embeds, seen, positions, hidden=[-1])
    largest = float(want.abs().max())
    assert float((logits[0] - want).abs().max()) < 1e-5 * largest and state.shape[-1] == WIDTH
    said = llm.generate(embeds, seen, max_new_tokens=5)[0]
    theirs = joined.generate(ids, mask, features=tokens, **GREEDY)[0].tolist()
    assert said == theirs[: len(said)]
    blind = torch.tensor([BLIND])
    plain, _ = llm.forward(llm.embed(blind), blind > 0, torch.arange(len(BLIND))[None])
    assert torch.allclose(plain, vlm(input_ids=blind).logits, atol=1e-5 * largest)


def compressor(name: str, layer: int = -1) -> Any:
    shape: Any = dict(in_dim=SEEN, embedding_dim=WIDTH, embedding_rms=1.0, max_tokens=64)
    return reducer.Model(reducer.Config(tower=TowerConfig(name=name, layer=layer), **shape)).eval()


def test_a_compressor_of_other_features_is_refused():
    for layer, name in ((-1, "llava_onevision"), (-2, "llava_onevision"), (-1, "llava"), (-1, "qwen3_vl")):
        for join in (attach, swap) if name not in GRIDS else (attach,):
            with pytest.raises(ValueError, match="train it with model.tower.name=vlm:"):
                join(compressor("hf:google/siglip", layer), vlm_of(name))
    hears = compressor("vlm:any")
    hears.config.audio = SimpleNamespace(name="hf:openai/whisper-base")
    with pytest.raises(ValueError, match="hears with 'hf:openai/whisper-base', and a VLM here brings no sound"):
        attach(hears, vlm_of("llava"))
    attach(compressor("hf:openai/clip", -2), vlm_of("llava"))
    attach(compressor("hf:openai/clip", 0), vlm_of("llava"))
    attach(compressor("vlm:llava-hf/some"), vlm_of("llava_onevision"))


def test_what_is_no_vlm_or_cannot_be_seen_says_so(homes, tmp_path):
    whole = homes("llava")
    with pytest.raises(ValueError, match=f"is a whole VLM .llava.: .* give vlm:{whole}"):
        load_tower(TowerConfig(name=str(whole)))
    with pytest.raises(ValueError, match="read where the VLM reads it"):
        load_tower(TowerConfig(name=f"vlm:{whole}", layer=0))
    with pytest.raises(ValueError, match=r"sees frames of \[32, 32\]"):
        load_tower(TowerConfig(name=f"vlm:{whole}", size=[16, 16]))
    with pytest.raises(ValueError, match="set tower.size"):
        load_tower(TowerConfig(name=f"vlm:{homes('qwen3_vl')}"))
    with pytest.raises(ValueError, match=r"multiples of \(16, 16\)"):
        load_tower(TowerConfig(name=f"vlm:{homes('qwen3_vl')}", size=[32, 40]))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for load in (lambda n: load_tower(TowerConfig(name=n)), lambda n: load_llm(LLMConfig(name=n))):
        with pytest.raises(ValueError, match="is of type 'qwen2'; VLMs are opened of the types llava"):
            load(f"vlm:{tmp_path}")


@torch.no_grad()
def test_a_compressor_learned_on_a_vlms_tower_joins_it(homes):
    """The whole way: the tokens of a video are those that the VLM is given."""
    name = "llava_onevision"
    model = compressor(f"vlm:{homes(name)}")
    video = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8)
    tokens = model.encode(Clip(["a"], video=video))
    joined = attach(model, vlm_of(name))
    ids, mask = texts(name, ONE)
    given = joined.prepare(ids, mask, **pixels_as_its_processor(name, video[0].transpose(0, 1)))
    (made,) = given["mm_encoder_outputs"]["video"].pooler_output[:, 0].split(48)
    torch.testing.assert_close(made, tokens.embeddings[0], rtol=1e-3, atol=1e-4)
