"""Projectors that train an MLP and nothing else: all patches for a frozen LLM, or what a training-free reducer leaves.

    clip --tower--> patches --MLP--> patches in the LLM's space --reducer (vtok/reducers), or none--> Tokens
      '--fewer frames, smaller--> tower ...                        method=downsample

method=none is stage 0: the projector of all tokens, the full-token row of every table, the teacher of distillation and
the start of every compressor. With another method the same projector is trained, or fine-tuned from stage 0, on what
that method leaves: the controls that a learned compressor is held against, at exactly the same number of tokens.

downsample makes the video smaller before the tower sees it: fewer frames, evenly spaced, at a size at which the tower
has fewer patches. It is as cheap as it looks and hard to beat, needs pixels (a cache of features cannot be undone), and
comes as close to a budget from below as grids allow.

Letters: B clips, C channels, T frames, H height, W width, N patches of a frame, h, w its grid, K tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Generator, Tensor

from vtok.layers.projector import ProjectorConfig, ProjectorModel
from vtok.llm import ObjectiveConfig, ProjectorObjective
from vtok.reducers import REDUCERS, everything
from vtok.reducers import build as bind  # a family's own `build` is asked for a fresh model
from vtok.types import Budget, Clip, Features, Tokens
from vtok.vision import TowerConfig

Objective = ProjectorObjective
__all__ = ["Config", "Model", "Objective", "ObjectiveConfig"]

OWN = ("none", "downsample")  # beside the reducers


@dataclass
class Config(ProjectorConfig):
    name: str = "reducer"
    tower: TowerConfig = field(default_factory=TowerConfig)
    method: str = "none"  # none (all patches) | downsample | a name of vtok.reducers.REDUCERS
    options: dict[str, Any] = field(default_factory=dict)  # of the reducer, such as {iterations: 20}
    max_tokens: int = (
        8192  # of a clip: the largest budget, and what a reducer makes without one; none: the most allowed
    )
    # blocks of the tower whose attention a method follows, in the order its docstring names them (hiprune: the object
    # layer first), and whose queries count: all | cls
    attention_layers: list[int] = field(default_factory=list)
    attention_from: str = "all"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"model.max_tokens={self.max_tokens} must be at least 1")
        if self.attention_from not in ("all", "cls"):
            raise ValueError(f"model.attention_from={self.attention_from!r} is unknown; choose all or cls")
        if self.method in OWN:
            if self.options:
                raise ValueError(f"model.options={dict(self.options)}: method={self.method} has none")
            return
        if self.method not in REDUCERS:
            raise ValueError(f"model.method={self.method!r} is unknown; choose one of {', '.join((*OWN, *REDUCERS))}")
        bind(self.method, **self.options)
        needed = REDUCERS[self.method].layers
        if len(self.attention_layers) < needed:
            raise ValueError(
                f"model.attention_layers={list(self.attention_layers)}: {self.method} follows the attention of "
                f"{needed} block(s) of the tower; name them, such as {[-2] if needed == 1 else [8, -1]}"
            )

    @property
    def length_policy(self) -> str:
        return "metadata"

    def _bounds(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """downsample: of a clip by itself; a shorter one in a batch is made smaller as the longest of them is."""
        patches = frames * grid[0] * grid[1]
        count = math.prod(small_grid(frames, *grid, budget)) if self.method == "downsample" else min(budget, patches)
        if self.method == "none" and count < patches:
            raise ValueError(f"model.method=none keeps all patches: a clip has {patches}, the budget is {budget}")
        return count, count


class Model(ProjectorModel):
    """max_tokens: the largest budget. nested: a smaller budget is made anew, no part of a larger one's tokens."""

    nested = False

    def __init__(self, config: Config):
        super().__init__(config)
        self.max_tokens, self.any_budget = config.max_tokens, config.method != "none"
        self._small: dict[tuple[int, int], Any] = {}  # downsample: the tower by the size of frames it sees

    def features(self, clip: Clip, **asked: Any) -> Features:
        """The clip's features, with the attention and the keys that the method follows where they are made here."""
        return super().features(clip, **(reads_of(self.config) | asked))

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        c = self.config
        if c.method in REDUCERS and REDUCERS[c.method].random:  # not one mask for all clips: an accident of few places
            seeds = torch.tensor([seed_of(key, c.options.get("seed", 0)) for key in clip.keys])
            return self.compress(self.features(clip), budget=budget, prompt=clip.prompt, seeds=seeds)
        if c.method != "downsample":
            return super().encode(clip, budget=budget)
        return everything(self.project(self._downsampled(clip, budget)))

    def compress(
        self,
        features: Features,
        *,
        budget: Budget | None = None,
        prompt: list[str] | None = None,
        seeds: Tensor | None = None,
    ) -> Tokens:
        """Tokens of a batch of clips, in time order.

        Args:
            budget: tokens of each clip, 1 to `max_tokens`, or int64 [B, 1], met exactly by clips that have as many
                patches; others give all they have. None: `max_tokens` of them; method none: all, up to `max_tokens`.
            seeds: [B] int64 of methods that draw, which `encode` makes of the clips' keys and the method's own `seed`;
                None: all clips have that one.
        Raises: ValueError for budgets out of range, a budget below all patches without a method, clips of more than
            `max_tokens` patches without a method, and features that lack what the method follows.
        """
        c = self.config
        available = features.count() * features.patches.shape[2]
        asked = self._asked(budget, available)
        keep = torch.minimum(asked, available)
        if c.method == "downsample":
            raise ValueError("model.method=downsample makes the video smaller, features come too late: give it clips")
        projected = self.project(features)
        if c.method in REDUCERS:
            reduce = bind(c.method, **(dict(c.options) | ({} if seeds is None else {"seed": seeds})))
            return reduce(projected, budget=keep[:, None], prompt=prompt, generator=self._chance())
        if bool((keep < available).any()):
            short = int((keep < available).nonzero()[0])
            raise ValueError(
                f"model.method=none keeps all patches: a clip has {int(available[short])}, the budget is "
                f"{int(keep[short])} (max_tokens={c.max_tokens}); choose a method, or raise max_tokens"
            )
        return everything(projected)

    def _asked(self, budget: Budget | None, like: Tensor) -> Tensor:
        """[B] int64: the tokens asked of each clip."""
        if budget is None:
            return torch.full_like(like, self.max_tokens)
        total = budget.reshape(len(like), -1).sum(1) if isinstance(budget, Tensor) else torch.full_like(like, budget)
        for value in total[(total < 1) | (total > self.max_tokens)].tolist():
            raise ValueError(
                f"budget={value} is out of range: ask for 1 to {self.max_tokens} tokens (model.max_tokens)"
            )
        return total.to(like)

    def _chance(self) -> Generator | None:
        """Training draws anew for every clip and step; otherwise seeds decide."""
        if not (self.training and REDUCERS[self.config.method].random):
            return None
        return Generator().manual_seed(int(torch.randint(1 << 62, ())))

    # Pixels downsampled before the tower.

    def _downsampled(self, clip: Clip, budget: Budget | None) -> Features:
        c = self.config
        if clip.video is None or (clip.features or {}).get(c.tower.name) is not None:
            raise ValueError(
                f"model.method=downsample makes the video smaller before the tower {c.tower.name!r} sees it, but the "
                "clips bring its features: read shards of videos instead of the feature cache"
            )
        frames = clip.frames()
        asked = self._asked(budget, frames)
        if int(asked.min()) != int(asked.max()):
            raise ValueError("model.method=downsample: all clips of a batch have one size, give one budget for them")
        if why := self.cannot_downsample():
            raise ValueError(f"model.method=downsample: {why}")
        (h, w), patch = self._grid(clip.video)
        spans, rows, columns = small_grid(int(frames.max()), h, w, int(asked[0]))
        taken = frames.clamp(max=spans)
        nth = torch.arange(int(taken.max()), device=frames.device)
        index = ((2 * nth + 1) * frames[:, None]) // (2 * taken[:, None])  # the middles of even spans
        index = index.minimum(frames[:, None] - 1)
        at = index.to(clip.video.device)
        video = clip.video.gather(2, at[:, None, :, None, None].expand(-1, 3, -1, *clip.video.shape[3:]))
        times = None if clip.times is None else clip.times.gather(1, index.to(clip.times.device))
        tower = self._at_size((rows * patch[0], columns * patch[1]))
        return tower.forward(video, taken, times=times)

    def cannot_downsample(self) -> str:
        """Why the tower cannot see a smaller video; "" where it can."""
        if self.tower.window > 1:
            return f"it needs an image tower, {self.config.tower.name!r} sees several frames at once"
        if not self.tower.any_size:
            return f"the tower {self.config.tower.name!r} sees frames of one size only"
        return ""

    def _grid(self, video: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """The tower's own grid for such frames, and (height, width) of a patch in pixels of what it sees."""
        grid = self.tower.forward(video[:1, :, :1]).grid
        seen = self.tower.preprocess.size(*video.shape[-2:])
        return grid, (seen[0] // grid[0], seen[1] // grid[1])

    def _at_size(self, size: tuple[int, int]) -> Any:
        """The same weights for whole frames resized to that many pixels; loaded once for each size."""
        if size not in self._small:
            self._small[size] = self._load(replace(self.config.tower, size=list(size)))
        return self._small[size]


def seed_of(key: str, seed: int) -> int:
    """The seed of one clip: a hash of its key and a seed."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=7).digest(), "big")


def reads_of(config: Config) -> dict[str, Any]:
    """The attention and the keys of the tower that the method follows, as `vtok.vision.Tower` is asked for them."""
    asked: dict[str, Any] = {}
    if config.method in REDUCERS:
        method = REDUCERS[config.method]
        if method.layers:
            asked |= dict(attention=list(config.attention_layers), attention_from=config.attention_from)
        if (method.keys and config.options.get("match") != "patches") or config.options.get("keys"):
            asked |= dict(keys=True)
    return asked


@lru_cache(maxsize=256)
def small_grid(frames: int, h: int, w: int, budget: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of a smaller video with `budget` patches at most.

    Of all that fit, the one with the least distortion (the log of its most over its least kept side) plus 4 times the
    log of the share of the budget that it leaves unused.
    """

    def cost(t: int, y: int, x: int) -> float:
        kept = (t / frames, y / h, x / w)
        return math.log(max(kept) / min(kept)) + 4 * math.log(budget / (t * y * x))

    fit = [(t, y) for t in range(1, frames + 1) for y in range(1, h + 1) if t * y <= budget]
    return min(((t, y, min(w, budget // (t * y))) for t, y in fit), key=lambda shape: cost(*shape))
