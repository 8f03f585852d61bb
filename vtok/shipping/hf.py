"""The transformers face of an export: its classes are copied into `modeling_vtok.py`, after the family they wrap.

    AutoModel.from_pretrained(folder, trust_remote_code=True) -> VtokModel around the family's Model:
        CompressorModel of a tokenizer, video in and out; FeatureCompressorModel of a projector, features in, which
        `attach` joins to a VLM

vtok itself never imports this module: the text is what counts (`vtok.shipping.bundle`). It may use torch, transformers,
`vtok.types` and what joins tokens to a VLM (`vtok.llm.joined`) only.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from vtok.layers.seams import square_grid
from vtok.llm.framewise import swap as swap_projector
from vtok.llm.joined import Joined
from vtok.llm.joined import attach as join
from vtok.types import Budget, Clip, Features, Tokens


def build_config(cls: type, values: dict[str, Any], where: str = "model") -> Any:
    """A configuration dataclass, nested ones too, from plain values. Raises: ValueError for an unknown key."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"config.json: {where} has unknown keys {unknown}; was modeling_vtok.py made with it?")
    made = dict(values)
    for name, value in values.items():
        nodes = [kind for kind in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(kind)]
        if nodes and isinstance(value, dict):  # None where a node is left out
            made[name] = build_config(typing.cast(type, nodes[0]), value, f"{where}.{name}")
    return cls(**made)


class VtokConfig(PretrainedConfig):
    """config.json of an export: which family, its configuration (`model`), `model_id` and `weights_sha256`."""

    model_type = "vtok"

    def __init__(self, family: str = "", model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.family, self.model = family, model or {}


class WrappedModel(PreTrainedModel):
    """A vtok model inside transformers: `.model` is the family's, built from config.json."""

    config_class = VtokConfig
    base_model_prefix = "model"
    make_config: Any = None  # the family's Config
    make_model: Any = None  # the family's Model

    def __init__(self, config: VtokConfig) -> None:
        super().__init__(config)
        # from_pretrained builds on the meta device, where values computed by a constructor are lost.
        with torch.device("cpu"):
            self.model: Any = type(self).make_model(build_config(type(self).make_config, config.model))
        persistent = set(self.model.state_dict())
        self._constants = {n: b.clone() for n, b in self.model.named_buffers() if n not in persistent}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: an export is complete, and the family initialises itself."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As PreTrainedModel.from_pretrained, but strict. Raises: ValueError when weights are missing or too many."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        wrong = {key: sorted(map(str, value)) for key, value in info.items() if value and key.endswith("_keys")}
        if wrong:
            raise ValueError(f"the weights do not fit config.json: {wrong}")
        with torch.no_grad():  # transformers leaves buffers that are not in the file uninitialised
            for name, value in model._constants.items():
                model.model.get_buffer(name).copy_(value)
        model.eval()
        return (model, info) if output_loading_info else model

    def encode(self, clip: Clip | Tensor, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a Clip, or of video [B, 3, T, H, W], uint8 or float in [-1, 1]."""
        if isinstance(clip, Tensor):
            clip = Clip(keys=[str(i) for i in range(clip.shape[0])], video=clip)
        return self.model.encode(clip.as_float(), budget=budget)


class CompressorModel(WrappedModel):
    """A tokenizer: `encode`, `decode` and `lookup` are those of `.model`.

    model(video) is encode: video [B, 3, T, H, W], uint8 or float in [-1, 1] -> Tokens.
    """

    main_input_name = "video"

    @torch.no_grad()
    def encode(self, clip: Clip | Tensor, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a Clip, or of video [B, 3, T, H, W], uint8 or float in [-1, 1]."""
        return super().encode(clip, budget=budget)

    def forward(self, video: Tensor, budget: Budget | None = None) -> Tokens:
        return self.encode(video, budget=budget)

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] from tokens."""
        with torch.no_grad():
            return self.model.decode(tokens, size=size)

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        return self.model.lookup(indices)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        return self.model.codebook_sizes


class FeatureCompressorModel(WrappedModel):
    """A projector for a frozen LLM: features of a tower in, tokens as wide as the LLM's words out, with gradients.

    model(patches [B, T, N, D]) is compress. `encode` sees frames itself, which needs the tower: vtok, or
    `attach(vlm)`, where the VLM's own tower sees them.
    """

    main_input_name = "features"

    def compress(
        self,
        features: Features | Tensor,
        *,
        grid: tuple[int, int] | None = None,
        times: Tensor | None = None,
        lengths: Tensor | None = None,
        budget: Budget | None = None,
        prompt: list[str] | None = None,
        **beside: Any,
    ) -> Tokens:
        """Tokens of Features, or of patches [B, T, N, D].

        Args:
            grid: (h, w) with h * w = N, of patches; None: they are a square. times: [B, T] seconds. lengths: [B] int64,
                real frames. These three are said by Features themselves.
            budget: tokens of each clip. prompt: questions, where the compressor reads them. beside: `audio`.
        Raises: ValueError for patches of no square without a grid, and what the family's own `compress` raises.
        """
        if isinstance(features, Features):
            if grid is not None or times is not None or lengths is not None:
                raise ValueError("Features say their grid, times and lengths themselves")
        else:
            features = Features(features, grid or square_grid(features), times=times, lengths=lengths)
        return self.model.compress(features, budget=budget, prompt=prompt, **beside)

    def forward(self, features: Features | Tensor, **options: Any) -> Tokens:
        return self.compress(features, **options)

    def attach(self, vlm: Any, **options: Any) -> Joined:
        """A VLM of transformers that reads these tokens: `generate` and forward with this compressor in the place of
        its projector. options: positions, freeze, frames_per_call, as `attach` tells."""
        return join(self, vlm, **options)

    def swap(self, vlm: Any, *, budget: int | None = None) -> nn.Module:
        """Take the place of the VLM's projector, frame by frame; returns that projector. Where the model allows it."""
        return swap_projector(self, vlm, budget=budget)

    @property
    def embedding_dim(self) -> int:
        """Width of the words that the tokens stand beside."""
        return self.model.embedding_dim

    @property
    def max_tokens(self) -> int:
        """The largest budget of a clip."""
        return self.model.max_tokens
