"""The models of timm and transformers behind one call: frames in, patches, grid and frame vectors out.

Letters: M windows in one call, w frames of a window, h height, w width, N patches of a frame, D width, L tokens of one
call's sequence, S feature frames.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vtok.vision.preprocess import Preprocess, from_processor, from_timm

# transformers' video towers: what holds the frames of their windows, and whether shorter windows will do
VIDEO = {"videomae": ("num_frames", True), "vivit": ("num_frames", True), "vjepa2": ("frames_per_clip", False)}
# of transformers, whose outputs are no plain sequence or map of one width, or whose frames are packed
_UNREAD = {"sam_vision_model", "sam_hq_vision_model", "sam2_vision_model", "hiera", "mobilenet_v1", "mobilenet_v2"}
_UNREAD |= {"efficientnet", "pixtral"}
_ANY_SIZE = {"dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "convnext", "convnextv2", "resnet"}


class Seen(NamedTuple):
    """What one call of a tower makes of M windows."""

    patches: Tensor  # [M, S, N, D]
    grid: tuple[int, int]
    frame: Tensor | None  # [M, S, D']
    prefix: int  # tokens before the patches, such as a class token


class Received(TorchFunctionMode):
    """While active, notes what the self-attention of some blocks does: keys, and the weight each token receives.

    Both libraries' blocks call torch's scaled_dot_product_attention, with queries and keys as they are after norms and
    rotary positions; pooling heads have fewer queries than keys and are no block.
    """

    def __init__(self, layers: Sequence[int], *, keys: int | None, source: str):
        super().__init__()
        self._layers, self._keys, self._source = set(layers), keys, source
        self.calls = 0
        self.received: dict[int, Tensor] = {}  # layer -> [M, L] float32
        self.keys: Tensor | None = None  # [M, L, heads * width of a head]
        self.lengths: set[int] = set()  # L of every call; one alone where all blocks see the whole sequence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            self._note(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
        return func(*args, **kwargs)

    def _note(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> None:
        if q.ndim != 4 or q.shape[-2] != k.shape[-2]:
            return
        layer, self.calls = self.calls, self.calls + 1
        self.lengths.add(q.shape[-2])
        if layer == self._keys:
            self.keys = rearrange(k, "M heads L d -> M L (heads d)")
        if layer not in self._layers:
            return
        rows = q[:, :, :1] if self._source == "cls" else q
        total = torch.zeros(k.shape[0], k.shape[2], device=k.device)
        bias = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])[:, :, : rows.shape[2]]
        for head in range(q.shape[1]):  # one at a time: all of a long sequence's matrices at once would not fit
            scores = rows[:, head].float() @ k[:, head].float().mT * (scale or q.shape[-1] ** -0.5)
            if bias is not None:
                own = bias[:, head]
                scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own.float()
            total += scores.softmax(-1).mean(1)
        self.received[layer] = total / q.shape[1]


class Body:
    """A library's model behind one call."""

    model: torch.nn.Module
    preprocess: Preprocess
    depth: int  # blocks, or stages
    embedding_dim: int
    window: int = 1  # frames the tower sees at once, at most; 1: an image tower
    fixed: bool = False  # whether it takes windows of exactly so many frames
    stride: int = 1  # frames behind one feature frame
    layer: int | None = None  # block whose output it gives, where that is its own choice
    any_size: bool = True  # whether it sees frames of other sizes than its own

    def run(self, pixels: Tensor, layer: int) -> Seen:
        """pixels: [M, w, 3, h, w] normalised, in the tower's dtype."""
        raise NotImplementedError


class TimmBody(Body):
    def __init__(self, model: Any, layer: int, size: tuple[int, int] | None, where: str):
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{where}: {type(model).__name__} gives no intermediate features in this timm")
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if size and patch and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(
                f"tower.size={list(size)} is not a multiple of the {patch[0]}x{patch[1]} patches of {where}"
            )
        self.model, self.preprocess = model, from_timm(model, size)
        self.depth = len(model.feature_info)
        self.embedding_dim = model.feature_info[block_index(layer, self.depth, where)]["num_chs"]

    def run(self, pixels: Tensor, layer: int) -> Seen:
        model = cast(Any, self.model)
        final, maps = model.forward_intermediates(pixels[:, 0], indices=[layer], norm=layer == self.depth - 1)
        grid = (maps[0].shape[2], maps[0].shape[3])
        pooled = model.forward_head(final, pre_logits=True)
        frame = pooled[:, None] if pooled.ndim == 2 else None
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        if frame is None and prefix and final.ndim == 3:
            frame = final[:, :1]
        return Seen(rearrange(maps[0], "M D h w -> M 1 (h w) D"), grid, frame, prefix)


class HubBody(Body):
    def __init__(self, model: Any, processor: Any, layer: int, size: tuple[int, int] | None, pooled: bool, where: str):
        config = model.config
        if config.model_type in _UNREAD or not (
            hasattr(config, "hidden_sizes") or hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers")
        ):
            raise ValueError(
                f"{where} is a {config.model_type}, whose outputs are not read here: towers of transformers are ViTs "
                "(CLIP, SigLIP, DINOv2 and 3, BEiT ...), ConvNeXts and ResNets, or VideoMAE, ViViT and V-JEPA 2 for "
                "videos; timm's model of it may do (timm:NAME)"
            )
        self.model, self.preprocess = model, from_processor(processor, size, where)
        self._pooled, self._where = pooled, where
        self._accepts = set(inspect.signature(model.forward).parameters)
        if "spatial_shapes" in self._accepts:
            raise ValueError(
                f"{where} takes packed patches of any size; use a checkpoint of one size, such as siglip's"
            )
        if config.model_type in VIDEO:
            key, self.fixed = VIDEO[config.model_type]
            tubelet = config.tubelet_size
            self.window, self.stride = getattr(config, key), tubelet if isinstance(tubelet, int) else tubelet[0]
            self._patch = _pair(config.patch_size if isinstance(tubelet, int) else tubelet[1:])
        elif getattr(config, "num_frames", None) or "video" in str(getattr(model, "input_modalities", "image")):
            raise ValueError(f"{where} is a {config.model_type}; the video towers read here are {', '.join(VIDEO)}")
        else:
            self._patch = _pair(getattr(config, "patch_size", None) or 1)
        native = getattr(config, "crop_size", None) or getattr(config, "image_size", None)
        self._native = None if native is None or config.model_type in _ANY_SIZE else _pair(native)
        self._resizable = self.window == 1 and "interpolate_pos_encoding" in self._accepts
        self.any_size = self._native is None or self._resizable
        if size:
            self._check_size(size)
        if size and (size[0] % self._patch[0] or size[1] % self._patch[1]):
            raise ValueError(f"tower.size={list(size)} is not a multiple of the {self._patch} patches of {where}")
        widths = getattr(config, "hidden_sizes", None)
        self.depth = len(widths) if widths else config.num_hidden_layers
        block = block_index(layer, self.depth, where)
        self.embedding_dim = widths[block] if widths else config.hidden_size

    def _check_size(self, size: tuple[int, int]) -> None:
        if self._native not in (None, size) and not self._resizable:
            raise ValueError(
                f"{self._where} cannot resample its positions to {size[0]}x{size[1]}: set tower.size to "
                f"{list(self._native)}"
            )

    def run(self, pixels: Tensor, layer: int) -> Seen:
        model = cast(Any, self.model)
        height, width = pixels.shape[-2:]
        call: dict[str, Any] = {model.main_input_name: pixels if self.window > 1 else pixels[:, 0]}
        self._check_size((height, width))
        if self._native not in (None, (height, width)):
            call["interpolate_pos_encoding"] = True
        if "skip_predictor" in self._accepts:
            call["skip_predictor"] = True
        last = layer == self.depth - 1
        out = model(**call, output_hidden_states=not last, return_dict=True)
        # counted from the end: whether the embeddings come first in hidden_states depends on the model
        tokens = out.last_hidden_state if last else out.hidden_states[layer - self.depth]
        pooled = out.get("pooler_output") if self._pooled and self.window == 1 else None
        if tokens.ndim == 4:  # a convolutional net's map
            frame = None if pooled is None else pooled.flatten(1)[:, None]
            return Seen(rearrange(tokens, "M D h w -> M 1 (h w) D"), (tokens.shape[2], tokens.shape[3]), frame, 0)
        grid = (height // self._patch[0], width // self._patch[1])
        frames = pixels.shape[1] // self.stride
        prefix = tokens.shape[1] - frames * grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(
                f"{self._where} gives {tokens.shape[1]} tokens for a grid of {grid}: try timm's model of it"
            )
        if pooled is None and prefix and self.window == 1:
            pooled = out.last_hidden_state[:, 0]
        patches = rearrange(tokens[:, prefix:], "M (s n) D -> M s n D", s=frames)
        return Seen(patches, grid, None if pooled is None else pooled[:, None], prefix)


def block_index(layer: int, depth: int, where: str) -> int:
    if not -depth <= layer < depth:
        raise ValueError(f"layer={layer} is out of range: {where} has {depth}, counted from 0, or from the last as -1")
    return layer % depth


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
