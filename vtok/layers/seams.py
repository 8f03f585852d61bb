"""Where the VLMs of transformers are open: the features before their own projector, and the tokens after it.

    pixels --the VLM's own tower, frozen--> Item (patches, grid, ...)            see_frames, see_grids
    tokens --> mm_encoder_outputs={"image" | "video": ...} of forward and generate            layout

Each architecture has a Seam in SEAMS; another one like them is added there: SEAMS["its_model_type"] = Seam(...).

Letters: M frames of all videos, T frames of one, C channels, H, W pixels, h, w patches of a frame's sides, N = h * w,
D width of a patch, m patches of a side that the VLM merges into one token, K tokens, S tokens of all videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seam:
    """One architecture.

    towers: for each kind of placeholder (image, video) its tower in the base model. A model that has no placeholder for
        videos takes them as images of many frames.
    lists: kinds whose tokens are given as a list of [K, D]; others take one tensor.
    normed: layer -1 is the output after the tower's last norm. grids: pixels come as rows of patches with grid_thw, and
        positions have three axes (M-RoPE). windows: the tower works in windows, whose order is undone. deepstack: the
        first layers of the LLM are given features of earlier blocks as well.
    swap: nothing after `multi_modal_projector` counts or rearranges what it gives.
    """

    towers: dict[str, str]
    lists: tuple[str, ...] = ()
    normed: bool = False
    grids: bool = False
    windows: bool = False
    deepstack: bool = False
    swap: bool = False

    def kind(self, modality: str) -> str:
        """The placeholder that images or videos have."""
        return modality if modality in self.towers else next(iter(self.towers))


KIND = "vlm"  # before a name, as vlm:REPO: the tower, or the language model, of a whole VLM
BOTH = {"image": "vision_tower", "video": "vision_tower"}
QWEN = {"image": "visual", "video": "visual"}
SEAMS = {
    "llava": Seam({"image": "vision_tower"}, ("image",), swap=True),
    "llava_onevision": Seam(BOTH, ("image",)),
    "llava_next_video": Seam(BOTH, ("image", "video"), swap=True),
    "video_llava": Seam({"image": "image_tower", "video": "video_tower"}, swap=True),
    "internvl": Seam({"image": "vision_tower"}, normed=True, swap=True),
    "qwen2_5_vl": Seam(QWEN, ("image", "video"), grids=True, windows=True),
    "qwen3_vl": Seam(QWEN, ("image", "video"), grids=True, deepstack=True),
}


def seam_of(vlm: Any) -> Seam:
    """Raises: ValueError for an architecture that has no seam yet."""
    kind = getattr(getattr(vlm, "config", None), "model_type", type(vlm).__name__)
    if kind not in SEAMS:
        raise ValueError(
            f"the VLM is of type {kind!r}, attach knows {', '.join(SEAMS)}: say in SEAMS where it is open, or read the "
            "tokens with its language model alone (vtok.llm.splice)"
        )
    return SEAMS[kind]


def is_vlm(facts: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a whole VLM that can be opened."""
    return facts.get("model_type") in SEAMS


def load_vlm(folder: Path, *, dtype: torch.dtype, key: str, name: str) -> Any:
    """A VLM of transformers on the CPU, of an architecture that has a seam.

    key: the setting that names it. Raises: ValueError for another architecture, and for weights that are incomplete.
    """
    import transformers

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{key}={name!r} holds no VLM: config.json is missing or not json ({error})") from error
    if kind not in SEAMS:
        raise ValueError(f"{key}={name!r} is of type {kind!r}; VLMs are opened of the types {', '.join(SEAMS)}")
    try:
        auto: Any = transformers.AutoModelForImageTextToText
        model, report = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{key}={name!r}: transformers could not load it: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name}: {len(missing)} weights of {type(model).__name__} are not in its files, such as {missing[0]}: "
            "they would be random numbers; is this a whole VLM's checkpoint?"
        )
    return model


def words_of(vlm: Any) -> Any:
    """A VLM without what sees: its language model, with its head and its way to count positions."""
    for part in (*seam_of(vlm).towers.values(), "multi_modal_projector", "vision_resampler"):
        if isinstance(getattr(vlm.base_model, part, None), torch.nn.Module):
            setattr(vlm.base_model, part, None)
    return vlm


def check_adapters(compressor: Any, vlm: Any) -> None:
    """Raises ValueError for tokens that a language model reads through adapters, before one that has none."""
    needed = getattr(getattr(compressor, "shipped", None), "adapters", "")  # of vtok.load, or of AutoModel
    needed = needed or getattr(getattr(compressor, "config", None), "adapters_sha256", None)
    if needed and not any("lora_A" in name for name, _ in vlm.named_parameters()):
        raise ValueError(
            "the compressor's tokens are read through adapters that its LLM learned (objective.lora), and this VLM has "
            "none: put them into its language model first, or train with objective.lora.rank=0"
        )


@dataclass
class Item:
    """One video or image as the VLM's tower saw it.

    patches: [T, N, D], row by row. grid: (h, w). frame: [T, D], the tower's own vector of each frame, where it has one.
    times: [T] seconds. merge: m. step: units of the time axis of M-RoPE from one frame to the next. deepstack: by
    layer, [T * N / m^2, width of a word].
    """

    patches: Tensor
    grid: tuple[int, int]
    frame: Tensor | None = None
    times: Tensor | None = None
    merge: int = 1
    step: float = 1.0
    deepstack: list[Tensor] = field(default_factory=list)


def as_videos(pixels: Tensor | Sequence[Tensor], kind: str) -> list[Tensor]:
    """Each video or image as frames [T, C, H, W]. Of an image cut into views, the whole one (the first) is taken.

    Raises: ValueError for another number of axes.
    """
    out = []
    for item in pixels:
        if kind == "image" and item.ndim in (3, 4):
            item = item[None] if item.ndim == 3 else item[:1]
        if item.ndim != 4 or not len(item):
            raise ValueError(
                f"pixels of one {kind} have shape {list(item.shape)}, expected "
                + ("[C, H, W], or [views, C, H, W]" if kind == "image" else "[T, C, H, W] with a frame at least")
            )
        out.append(item)
    return out


@torch.no_grad()
def see_frames(vlm: Any, seam: Seam, modality: str, videos: list[Tensor], *, frames_per_call: int) -> list[Item]:
    """What a tower that sees single frames makes of videos [T, C, H, W]: the hidden states that the VLM reads, a class
    token apart from the patches."""
    tower = getattr(vlm.base_model, seam.towers[seam.kind(modality)])
    parameter = next(tower.parameters())
    sizes = {tuple(video.shape[1:]) for video in videos}
    if not videos:
        return []
    if len(sizes) != 1:
        raise ValueError(f"the frames have sizes {sorted(sizes)}: a VLM's processor makes all of one size")
    frames = torch.cat(videos).to(parameter.device, parameter.dtype)  # [M, C, H, W]
    states = torch.cat([_states(vlm.config, tower, seam, part) for part in frames.split(frames_per_call)])
    side = vlm.config.vision_config.patch_size
    high, wide = side if isinstance(side, (list, tuple)) else (side, side)
    grid = (frames.shape[-2] // high, frames.shape[-1] // wide)
    ahead = states.shape[1] - grid[0] * grid[1]
    if ahead not in (0, 1):
        raise ValueError(f"the VLM's tower gives {states.shape[1]} vectors for a frame, its grid is {grid}")
    lengths = [len(video) for video in videos]
    patches = states[:, ahead:].split(lengths)
    own = states[:, 0].split(lengths) if ahead else [None] * len(videos)
    return [Item(p, grid, f) for p, f in zip(patches, own)]


def _states(config: Any, tower: Any, seam: Seam, frames: Tensor) -> Tensor:
    """[M, 1 + N or N, D]: the hidden states of config.vision_feature_layer, several of them side by side."""
    seen = tower(frames, output_hidden_states=True, return_dict=True)
    layers = config.vision_feature_layer
    if seam.normed and layers == -1:
        return seen.last_hidden_state
    layers = [layers] if isinstance(layers, int) else layers
    return torch.cat([seen.hidden_states[layer] for layer in layers], -1)


def block_read(config: Any, seam: Seam, depth: int) -> tuple[int, int]:
    """The block of the tower, of `depth`, whose output a VLM reads (the last of several), and how many it reads."""
    if seam.grids:
        return depth - 1, 1
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    # hidden states begin with the embeddings: state 1, as state -depth, is the output of block 0
    return (layers[-1] - 1 if layers[-1] >= 0 else layers[-1] + depth), len(layers)


def check_tower(own: Any, config: Any, seam: Seam) -> None:
    """Raises ValueError for a compressor that was trained on other features of a tower than those this VLM reads.

    own: the compressor's configuration, or that of its export; None: of nothing that was trained. config: the VLM's,
    or what its config.json holds.

    A compressor that was trained on the VLM's own tower (model.tower.name=vlm:...) reads what the VLM reads. One that
    was trained on the tower alone does where the VLM reads one block as it is; a tower alone gives its last block
    normed, but for CLIP's.
    """
    audio = getattr(own, "audio", None) or (getattr(own, "model", None) or {}).get("audio")
    if ears := (audio["name"] if isinstance(audio, dict) else getattr(audio, "name", "")):
        raise ValueError(
            f"the compressor hears with {ears!r}, and a VLM here brings no sound: attach one that was trained without "
            "audio (model.audio.name='')"
        )
    tower = getattr(own, "tower", None) or (getattr(own, "model", None) or {}).get("tower")
    if tower is None:
        return
    name, layer = (tower["name"], tower["layer"]) if isinstance(tower, dict) else (tower.name, tower.layer)
    if name.startswith("vlm:"):
        return
    if isinstance(config, dict):
        from transformers import AutoConfig

        config = AutoConfig.for_model(**config)
    if seam.grids:
        wrong = "has a tower that is read before its merger"
    else:
        depth = config.vision_config.num_hidden_layers
        block, several = block_read(config, seam, depth)
        last = block == depth - 1
        plain = seam.normed or config.vision_config.model_type == "clip_vision_model" or not last
        if several == 1 and layer % depth == block and plain:
            return
        wrong = f"reads {several} blocks" if several > 1 else f"reads block {block}" + " before the last norm" * last
    raise ValueError(
        f"the compressor was trained on model.tower.name={name!r}, layer={layer}, and this "
        f"{config.model_type!r} {wrong}: something else; train it with model.tower.name=vlm:REPO_OR_FOLDER of this VLM"
    )


@torch.no_grad()
def see_grids(
    vlm: Any, seam: Seam, modality: str, pixels: Tensor, grids: Tensor, seconds: Sequence[float] | None
) -> list[Item]:
    """What a Qwen-VL tower makes of rows of patches before they are merged, [n, 3] grids (T, h, w), row by row again.

    seconds: from one feature frame to the next, of each video; None: 1 for positions, times unknown.
    """
    tower = getattr(vlm.base_model, seam.towers[modality])
    config = vlm.config.vision_config
    parameter = next(tower.parameters())
    grids = torch.as_tensor(grids).to(parameter.device)
    if pixels.shape[0] != int(grids.prod(1).sum()):
        raise ValueError(f"{modality}_grid_thw={grids.tolist()} is not of the {pixels.shape[0]} rows of pixels given")
    seen = tower(pixels.to(parameter.device, parameter.dtype), grid_thw=grids, return_dict=True)
    states, m = seen.last_hidden_state, config.spatial_merge_size
    if seam.windows:
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(grids, m, config.window_size, config.patch_size)
        back = torch.argsort(order.to(states.device))
        states = states.unflatten(0, (-1, m * m))[back].flatten(0, 1)
    counts = grids.prod(1).tolist()
    deep = [layer.split([n // m**2 for n in counts]) for layer in getattr(seen, "deepstack_features", None) or []]
    out = []
    for index, (part, (t, h, w)) in enumerate(zip(states.split(counts), grids.tolist())):
        blocks = part.reshape(t, h // m, w // m, m, m, -1)
        gap = float(seconds[index]) if seconds is not None else 1.0
        out.append(
            Item(
                blocks.transpose(2, 3).reshape(t, h * w, -1),
                (h, w),
                times=torch.arange(t, device=states.device) * gap if seconds is not None else None,
                merge=m,
                step=time_step(vlm, gap) if modality == "video" else 1.0,
                deepstack=[layer[index] for layer in deep],
            )
        )
    return out


def time_step(vlm: Any, seconds: float) -> float:
    """Units of M-RoPE's time axis from one feature frame to the next, seconds later; 1 where it counts frames."""
    rate = getattr(vlm.config.vision_config, "tokens_per_second", None)
    return 1.0 if rate is None else rate * seconds


def deepstack_of(item: Item, source: Tensor | None, tokens: int) -> list[Tensor]:
    """By layer, [K, width]: the mean of what the VLM's earlier blocks say of the patches that a token took.

    source: [T * N], the token that took each patch, -1 = none. A token without patches is given zeros.
    """
    if source is None or not item.deepstack:
        return []
    (h, w), m, frames = item.grid, item.merge, item.patches.shape[0]
    source = source[: frames * h * w]
    merged = torch.arange(frames * (h // m) * (w // m), device=source.device).reshape(frames, h // m, w // m)
    merged = merged.repeat_interleave(m, 1).repeat_interleave(m, 2).flatten()  # [T * N]
    taken = source >= 0
    count = torch.zeros(tokens, device=source.device).index_add(
        0, source[taken], torch.ones_like(source[taken]).float()
    )
    out = []
    for layer in item.deepstack:
        own = layer[merged[taken].to(layer.device)].float()
        total = torch.zeros(tokens, own.shape[1], device=own.device).index_add(0, source[taken].to(own.device), own)
        out.append((total / count.clamp(min=1).to(own.device)[:, None]).to(layer.dtype))
    return out


def layout(seam: Seam, kind: str, tokens: list[Tensor], deepstack: list[list[Tensor]]) -> Any:
    """The tokens [K, D] of every item as the VLM's forward takes them in `mm_encoder_outputs[kind]`.

    Where it wants a tensor, every token is an item of length 1, [S, 1, D]: flattened it is the same, and beam search,
    which repeats the items of each text, keeps them with their text however many each has. ([1, S, D] does not.)
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    packed: Any = list(tokens) if kind in seam.lists else torch.cat(tokens)[:, None]
    if not seam.deepstack:
        return BaseModelOutputWithPooling(pooler_output=packed)
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    layers = max(len(item) for item in deepstack)
    # zeros are added where there is nothing to say; an empty list would stop beam search
    every: Any = [
        [item[i] if item else torch.zeros_like(given) for item, given in zip(deepstack, tokens)]
        for i in range(max(layers, 1))
    ]
    return BaseModelOutputWithDeepstackFeatures(pooler_output=packed, deepstack_features=every)


def square_grid(patches: Tensor) -> tuple[int, int]:
    """(h, w) of patches [B, T, N, D] whose frames are squares. Raises: ValueError where they are not."""
    side = math.isqrt(patches.shape[2]) if patches.ndim == 4 else 0
    if not side or side * side != patches.shape[2]:
        raise ValueError(
            f"patches of shape {list(patches.shape)} are not [B, T, N, D] with frames of N = h * h patches: say the "
            "grid (h, w), in Features"
        )
    return side, side
