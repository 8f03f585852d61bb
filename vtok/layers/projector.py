"""What families that read a frozen tower and speak to a frozen LLM share: features in, tokens as wide as its words out.

    Clip --tower, by reference--> Features --projector--> patches as wide as the LLM's embeddings --compress--> Tokens

Tokens are made after the projector, in the space of the LLM's words: a compressor then begins where the projector of
all tokens (families/reducer.py without a reducer, stage 0) ended, aligned with the LLM.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtok.layers.taking import take_all
from vtok.types import Budget, Clip, Features, Tokens


@dataclass
class ProjectorConfig:
    """Fields that every such family's Config has beside its `tower`; 0 is filled in when a fresh model is built."""

    in_dim: int = 0  # D of the tower's features
    embedding_dim: int = 0  # width of the LLM's word embeddings
    embedding_rms: float = 0.0  # root mean square of one number of these: the scale the projector's output begins with

    # How many tokens a clip gets, before anything has seen it. A serving engine lays out a prompt's placeholders from
    # the shape of the video alone, where no weights are at hand: hence of the configuration, not of the model.

    @property
    def length_policy(self) -> str:
        """metadata: the number of tokens follows from a clip's shape and the budget (`token_count`); content: it may
        depend on what is seen too."""
        return "content"

    def token_count(self, frames: int, height: int, width: int, *, budget: int | None = None) -> int:
        """Exactly the tokens that `compress` makes of a clip; see `token_bounds`.

        Raises: ValueError where that depends on what is seen, with the largest budget for which it does not.
        """
        least, most = self.token_bounds(frames, height, width, budget=budget)
        if least != most:
            raise ValueError(
                f"a clip of {frames} frames of {height}x{width} patches has {least} to {most} tokens, as what is seen "
                f"decides (length_policy: {self.length_policy}): ask for {least} or fewer, or compress first"
            )
        return most

    def token_bounds(self, frames: int, height: int, width: int, *, budget: int | None = None) -> tuple[int, int]:
        """The fewest and the most tokens that `compress` makes of a clip.

        Args:
            frames, height, width: of its features: feature frames, rows and columns of their patches.
            budget: as of `compress`; None: all tokens.
        Raises: ValueError for sizes below 1, and for what `compress` refuses.
        """
        for name, size in (("frames", frames), ("height", height), ("width", width)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1: features have frames, rows and columns of patches")
        if budget is not None and not 1 <= budget <= self.largest_budget:
            raise ValueError(f"budget={budget} is out of range: this model gives 1 to {self.largest_budget} tokens")
        return self._bounds(frames, (height, width), self.largest_budget if budget is None else budget)

    @property
    def largest_budget(self) -> int:
        """The model's `max_tokens`."""
        return getattr(self, "max_tokens", 1 << 30)

    def _bounds(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """`token_bounds` of sizes that are in range; a family says what it knows."""
        return 0, budget


class MLPProjector(nn.Module):
    """Two layers with GELU between, patches [..., in_dim] -> [..., dim] (LLaVA-1.5, https://arxiv.org/abs/2310.03744).

    The output is normalised over its width and scaled to the word embeddings' RMS (times a learned gain that begins
    at 1), so that a frozen LLM meets vectors of the size it knows from the first step; the papers' projectors are not.
    """

    def __init__(self, in_dim: int, dim: int, *, rms: float):
        super().__init__()
        self.rms = rms
        self.norm = nn.LayerNorm(in_dim)
        self.hidden, self.out = nn.Linear(in_dim, dim), nn.Linear(dim, dim)
        self.gain, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """beside: [..., dim], added to what the two layers make, before it is scaled."""
        x = self.out(nn.functional.gelu(self.hidden(self.norm(x.to(self.out.weight.dtype)))))
        x = x if beside is None else x + beside
        x = nn.functional.layer_norm(x, x.shape[-1:])
        return (x * self.gain + self.shift) * self.rms


class ProjectorModel(nn.Module):
    """Base of `Model`: the tower by reference, `encode`, the projector. A family gives `compress` and `max_tokens`.

    any_budget: whether every number of tokens up to `max_tokens` can be asked for. Clips that cannot be given so many
    are given all they have.

    Args:
        config: its `tower` has a name; `in_dim`, `embedding_dim`, `embedding_rms` as in `ProjectorConfig`.
        load: makes the tower of `config.tower`, once, when features are asked of a video; None: `vtok.vision`, where it
            is installed (an export alone compresses the features it is given).
    """

    any_budget = True
    max_tokens: int

    def __init__(self, config: Any, *, load: Callable[[Any], Any] | None = None):
        super().__init__()
        for name in ("in_dim", "embedding_dim", "embedding_rms"):
            if not getattr(config, name) > 0:
                raise ValueError(
                    f"model.{name}={getattr(config, name)} must be above 0: it is the tower's or the LLM's"
                )
        self.config, self.embedding_dim = config, config.embedding_dim
        self.projector = MLPProjector(config.in_dim, config.embedding_dim, rms=config.embedding_rms)
        self._load = load or _load_tower
        self._tower: Any = None  # no module: not in the state_dict, not in the engine

    @property
    def tower(self) -> Any:
        """The frozen tower (`vtok.vision.Tower`), loaded at the first use."""
        if self._tower is None:
            self._tower = self._load(self.config.tower)
        return self._tower

    def features(self, clip: Clip, **asked: Any) -> Features:
        """The clip's cached features of the tower where it brings them, else those of its video.

        asked: as of `vtok.vision.Tower`. Of cached attention, exactly the layers asked, in their order.
        Raises: ValueError for cached features without the attention or keys asked.
        """
        found = (clip.features or {}).get(self.config.tower.name)
        if found is None:
            return self.tower.features(clip, **asked)
        if asked.get("keys") and found.keys is None:
            raise ValueError(
                f"the clips bring features of {self.config.tower.name!r} without the attention keys that are "
                "asked for: record them (vtok features --keys), or read shards of videos"
            )
        if not asked.get("attention"):
            return found
        layers, source = [self.block(layer) for layer in asked["attention"]], asked.get("attention_from", "all")
        recorded = found.attention or {}
        if not recorded.keys() >= set(layers) or found.attention_from != source:
            raise ValueError(
                f"the clips bring features of {self.config.tower.name!r} with the attention of layers {list(recorded)} "
                f"from {found.attention_from}, asked for is that of {layers} from {source}: record it (vtok features "
                f"--attention {','.join(map(str, layers))} --attention-from {source}), or read shards of videos"
            )
        return replace(found, attention={layer: recorded[layer] for layer in layers})

    def block(self, layer: int) -> int:
        """A block of the tower, counted from 0. A tower that is not at hand is loaded for one counted from the last."""
        return layer if layer >= 0 else self.tower.block(layer)

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        return self.compress(self.features(clip), budget=budget, prompt=clip.prompt)

    def project(self, features: Features) -> Features:
        """The features with patches as wide as the LLM's words; everything else as it was."""
        if features.patches.shape[-1] != self.config.in_dim:
            raise ValueError(
                f"the features are {features.patches.shape[-1]} wide, model.in_dim={self.config.in_dim}: are they of "
                f"the tower {self.config.tower.name!r}?"
            )
        return replace(features, patches=self.projector(features.patches))

    def budgets(self, features: Features) -> list[int | None]:
        """Budgets to measure at, where none are asked: 1, 4, 16 ... and the most a clip of this length is given; [None]
        for a model whose number of tokens cannot be chosen."""
        if not self.any_budget:
            return [None]
        most = min(self.max_tokens, int(features.count().max()) * features.patches.shape[2])
        return [*(4**i for i in range(16) if 4**i < most), most]

    def compress(self, features: Features, *, budget: Budget | None = None, prompt: list[str] | None = None) -> Tokens:
        raise NotImplementedError

    def warm_start(self, source: nn.Module) -> str:
        """Begin with another projector model's weights: of the same family all of them; of another one, such as stage
        0, the projector, which must be all that it has. Returns what was done, for the log.

        Raises: ValueError naming the tensors that do not fit.
        """
        given = source.state_dict()
        if type(source) is type(self):
            take_all(self, given)
            return "all weights"
        rest = {name.partition(".")[0] for name in self.state_dict()} - {"projector"}
        begun = take_all(self, given, new=rest)
        what = f"; {', '.join(f'model.{name}' for name in sorted(rest))} new, {len(begun)} tensors" if begun else ""
        return f"the projector, {len(given)} tensors{what}"


def share_tower(other: Any, model: Any) -> bool:
    """Whether two models see with one tower. Where its weights lie in two places, `other` takes the model's, by the
    name under which clips bring its features."""
    one, two = getattr(other.config, "tower", None), getattr(model.config, "tower", None)
    if one is None or two is None or one == two:
        return one is not None and one == two
    if replace(one, name="", revision="", sha256="") != replace(two, name="", revision="", sha256=""):
        return False
    if other.tower.sha256 != model.tower.sha256:
        return False
    other.config, other._tower = replace(other.config, tower=two), model.tower
    return True


def with_features(model: Any, clip: Clip, features: Features) -> Clip:
    """The clip with these features of a model's tower, and those that it is given beside them: made once, for all who
    compress the clip."""
    found = {model.config.tower.name: features}
    beside = getattr(model, "beside", None)
    for part, each in (beside(clip) if beside is not None else {}).items():
        found[getattr(model.config, part).name] = each
    return replace(clip, features={**(clip.features or {}), **found})


def _load_tower(config: Any) -> Any:
    return _vision(f"frames are seen by the tower {config.name!r}").load_tower(config)


def load_ears(config: Any) -> Any:
    """The audio tower of an `AudioTowerConfig` (`vtok.vision.AudioTower`)."""
    return _vision(f"sound is heard by the tower {config.name!r}").load_audio_tower(config)


def _vision(why: str) -> Any:
    try:
        return importlib.import_module("vtok.vision")  # by name: an export's one file does without towers
    except ImportError as error:
        raise ImportError(
            f"{why}, which vtok loads: pip install 'vtok[towers]', or give features to `compress`"
        ) from error
