"""Seven architectures of transformers' VLMs with small random weights, and videos as their processors give them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn

from vtok.families import reducer, temporal
from vtok.types import Features, Tokens
from vtok.vision import TowerConfig

WORDS, WIDTH, SEEN = 128, 32, 24  # vocabulary, width of a word, of a patch
IMAGE, VIDEO, PAD = 120, 121, 0
VISION = dict(hidden_size=SEEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32)
VISION |= dict(patch_size=8)
TEXT = dict(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, pad_token_id=PAD, eos_token_id=2, bos_token_id=1)
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = dict(hidden_size=SEEN, num_heads=2, intermediate_size=48, out_hidden_size=WIDTH, patch_size=8)
GREEDY = dict(max_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=None)
SIDE = 4  # patches of a frame's side


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION), text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def llava_next_video():
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE, video_token_id=VIDEO, image_grid_pinpoints=[[32, 32]],
    )  # fmt: skip
    return transformers.LlavaNextVideoForConditionalGeneration(config)


def video_llava():
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip
    return transformers.VideoLlavaForConditionalGeneration(config)


def internvl():
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision), text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration(config)


def qwen2_5_vl():
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": dict(ROPE)},
        vision_config=dict(depth=2, window_size=32, fullatt_block_indexes=[1], tokens_per_second=2, **QWEN),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=118, vision_end_token_id=119,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": dict(ROPE)},
        vision_config=dict(depth=2, deepstack_visual_indexes=[0], num_position_embeddings=16, **QWEN),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=118, vision_end_token_id=119,
    )  # fmt: skip
    return transformers.Qwen3VLForConditionalGeneration(config)


MODELS = {
    f.__name__: f for f in (llava, llava_onevision, llava_next_video, video_llava, internvl, qwen2_5_vl, qwen3_vl)
}
GRIDS = ("qwen2_5_vl", "qwen3_vl")
AS_IMAGES = ("llava", "internvl")  # one placeholder for images and videos


@cache
def vlm_of(name: str) -> Any:
    """Weights of a size at which every patch matters to the logits; transformers' own begin near zero."""
    torch.manual_seed(0)
    vlm = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in vlm.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter[0].numel() > 1 else 1.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return vlm


def token_of(name: str) -> int:
    return IMAGE if name in AS_IMAGES else VIDEO


def pixels_of(name: str, frames: list[int], *, seed: int = 0) -> dict[str, Any]:
    """Videos of so many feature frames, as the model's processor gives them."""
    generator = torch.Generator().manual_seed(seed)
    if name in GRIDS:
        rows = torch.randn(sum(frames) * SIDE**2, 3 * 2 * 8 * 8, generator=generator)
        out = {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([[t, SIDE, SIDE] for t in frames])}
        return out | ({"second_per_grid_ts": [0.5 + i for i in range(len(frames))]} if name == "qwen2_5_vl" else {})
    return {"pixel_values_videos": [torch.randn(t, 3, 32, 32, generator=generator) for t in frames]}


def video_of(pixels: dict[str, Any], name: str, index: int) -> dict[str, Any]:
    """One video of a batch."""
    if name not in GRIDS:
        return {"pixel_values_videos": pixels["pixel_values_videos"][index : index + 1]}
    grids = pixels["video_grid_thw"]
    rows = pixels["pixel_values_videos"].split(grids.prod(1).tolist())[index]
    out = {"pixel_values_videos": rows, "video_grid_thw": grids[index : index + 1]}
    if "second_per_grid_ts" in pixels:
        out["second_per_grid_ts"] = pixels["second_per_grid_ts"][index : index + 1]
    return out


def texts(name: str, *rows: list[int]) -> tuple[Tensor, Tensor]:
    """Rows with VIDEO where the model's own placeholder goes, padded on the right."""
    most = max(map(len, rows))
    ids = torch.tensor([[token_of(name) if i == VIDEO else i for i in row] + [PAD] * (most - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows])


ONE, TWO, BLIND = [5, VIDEO, 6, 7], [8, 9, VIDEO, 10, 6, 7], [11, 12, 13]


def untouched(name: str, row: list[int], video: dict[str, Any]) -> dict[str, Any]:
    """One text and one video as the VLM takes them without vtok."""
    if name in GRIDS:
        frames, each = int(video["video_grid_thw"][0, 0]), (SIDE // 2) ** 2
        run = [VIDEO] * (frames * each)
        if name == "qwen3_vl":  # the time of every frame is told between them
            run = [i for t in range(frames) for i in [*([30 + t] if t else []), *[VIDEO] * each]]
    else:
        pixels = video["pixel_values_videos"][0]
        frames, each = len(pixels), {"llava_next_video": 4, "video_llava": 17, "internvl": 4}.get(name, 16)
        run = [token_of(name)] * (frames * 4 + 1 if name == "llava_onevision" else frames * each)
        video = {"pixel_values": pixels} if name in AS_IMAGES else {"pixel_values_videos": pixels[None]}
    at = row.index(VIDEO)
    ids = torch.tensor([[*row[:at], *run, *row[at + 1 :]]])
    if name in GRIDS:
        video = {**video, "mm_token_type_ids": (ids == VIDEO).long() * 2}
        if "second_per_grid_ts" in video:
            video["second_per_grid_ts"] = torch.tensor(video["second_per_grid_ts"])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **video}


@cache
def compressor_of(family: str = "reducer", **more: Any) -> Any:
    torch.manual_seed(1)
    shape: Any = dict(
        tower=TowerConfig(name="vlm:any"), in_dim=SEEN, embedding_dim=WIDTH, embedding_rms=1.0, max_tokens=64
    )
    if family == "reducer":
        return reducer.Model(reducer.Config(**shape, **more)).eval()
    c = temporal.Config(**shape, window=2, groups=more.get("groups", "clip"))
    c.segments.name, c.static.keep = "fixed", "pool"
    c.static.tokens, c.former.num_queries, c.former.width, c.former.depth, c.former.num_heads = 4, 2, 16, 2, 2
    model = temporal.Model(c).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh one begins with gates at zero, which let no gradient pass
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_processor(folder: Path) -> None:
    """LLaVA-OneVision's processor with words w3, w4 ... for ids."""
    names = {PAD: "<pad>", 1: "<unk>", 2: "</s>", IMAGE: "<image>", VIDEO: "<video>"}
    words = Tokenizer(WordLevel({names.get(i, f"w{i}"): i for i in range(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<image>", "<video>"],
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[32, 32]]),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False),
        tokenizer=tokenizer, num_image_tokens=16, vision_feature_select_strategy="full",
    ).save_pretrained(folder)  # fmt: skip


@dataclass
class Own:
    """What a VLM does with its hidden states, as a compressor: an exact one gives the untouched VLM's answers."""

    vlm: Any
    name: str

    def compress(self, features: Features, *, budget: Any = None, prompt: Any = None) -> Tokens:
        rows = [
            self.tokens(p[:n], None if features.frame is None else features.frame[i, :n])
            for i, (p, n) in enumerate(zip(features.patches, features.count().tolist()))
        ]
        lengths = torch.tensor([len(row) for row in rows])
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        batch, most = embeddings.shape[:2]
        index = torch.arange(most).expand(batch, -1)
        positions, group, source = torch.full((batch, most, 3), torch.nan), torch.zeros_like(index), None
        if self.name in GRIDS:
            half = SIDE // 2
            cell = torch.stack([index // half**2, index % half**2 // half, index % half], -1)
            extent = torch.stack([lengths // half**2, *[torch.full_like(lengths, half)] * 2], -1)
            positions = (cell + 0.5) / extent[:, None]
            group = index // half**2 if self.name == "qwen3_vl" else group
            patch = torch.arange(features.patches.shape[1] * SIDE**2)
            t, y, x = patch // SIDE**2, patch % SIDE**2 // SIDE, patch % SIDE
            source = (t * half**2 + (y // 2) * half + x // 2).expand(batch, -1)
        return Tokens(embeddings, lengths, positions, group, torch.zeros_like(index), source=source)

    def tokens(self, patches: Tensor, frame: Tensor | None) -> Tensor:
        """[T, N, D] -> [K, width of a word]."""
        model = self.vlm.model
        if self.name in GRIDS:
            blocks = patches.reshape(len(patches), SIDE // 2, 2, SIDE // 2, 2, -1).transpose(2, 3)
            return model.visual.merger(blocks.reshape(-1, patches.shape[-1]))
        if self.name == "llava_next_video":
            patches = model.vision_resampler(patches)
        if self.name == "video_llava":
            patches = torch.cat([frame[:, None], patches], 1)
        if self.name == "internvl":
            maps = patches.unflatten(1, (SIDE, SIDE))
            patches = model.pixel_shuffle(maps, scale_factor=model.config.downsample_ratio).flatten(1, 2)
        out = model.multi_modal_projector(patches)
        if self.name == "llava_onevision":
            return torch.cat([model.apply_pooling(out).flatten(0, 1), model.image_newline[None]])
        return out.flatten(0, 1)
