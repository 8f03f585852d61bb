"""The loss of soft captions: what the large language model makes of them, and dense captions for the small one.

Semantic-density supervision (LangDC, https://arxiv.org/abs/2509.00969): a segment's target tells what is in it and
nothing else, so that a caption is as long as there is to tell; plain next-token loss teaches it, the stop included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtok.llm.reading import Read
from vtok.llm.soft_captions import Learned
from vtok.llm.text_objective import TextObjective, TextObjectiveConfig
from vtok.types import Clip, Tokens

UNTOLD = 64  # clips of a process without any caption after which there are none: a few in a row may come by chance


@dataclass
class CaptionObjectiveConfig(TextObjectiveConfig):
    density: float = 0.0  # caption_lm: weight of the small model's next-token loss on the segments' captions
    lengths: float = 0.0  # caption_lm with captions.length=head: weight of the loss of the number of words


class CaptionObjective(TextObjective):
    """`TextObjective`, and the terms of a model that writes captions; of other models it is that objective.

    Raises: ValueError for weights below 0, and for weights of what the model does not make.
    """

    Config = CaptionObjectiveConfig

    def __init__(self, config: Any, model_config: Any, *, load: Callable[[str], Any] | None = None):
        captions = model_config.captions if model_config.mode == "caption_lm" else None
        learns = captions is not None and captions.learn
        measures = captions is not None and captions.learn and captions.length == "head"
        for key, can, needed in (
            ("density", learns, "model.mode=caption_lm with model.captions.learn=true"),
            ("lengths", measures, "model.captions.length=head, and learn=true"),
        ):
            weight = getattr(config, key)
            if weight < 0:
                raise ValueError(f"objective.{key}={weight} must be 0 or above")
            if weight and not can:
                raise ValueError(f"objective.{key}={weight} needs {needed}")
        if measures and not config.lengths:
            raise ValueError(
                "model.captions.length=head learns by objective.lengths, which is 0: set it above, or set "
                "model.captions.learn=false where the head has learned before (init_from)"
            )
        if learns and not (config.density or config.lengths):
            raise ValueError(
                "model.captions.learn=true teaches nothing, objective.density is 0: set it above, or set "
                "model.captions.learn=false and model.captions.how=generate or parallel"
            )
        self._targets_seen, self._clips_seen = False, 0
        super().__init__(config, model_config, load=load)

    def terms(self, model: Any, clip: Clip, tokens: Tokens, seen: Read, step: int) -> dict[str, Tensor]:
        learned = _learned(model)
        if learned is None:
            return super().terms(model, clip, tokens, seen, step)
        self._check_targets(clip, learned)
        c = self.config
        out = {"caption_nll": c.density * learned.nll} if c.density else {}
        return out | ({"caption_length": c.lengths * learned.length} if c.lengths else {})

    def told(self, model: Any) -> dict[str, Tensor]:
        learned = _learned(model)
        if learned is None:
            return super().told(model)
        return {
            "caption_accuracy": learned.accuracy,
            "caption_words": learned.words,
            "cut_captions": learned.cut,
            "without_caption": 1 - learned.described,
        }

    def _check_targets(self, clip: Clip, learned: Learned) -> None:
        """Single clips may come without a caption, whole batches of few clips too; a corpus may not."""
        if self._targets_seen:
            return
        self._targets_seen, self._clips_seen = bool(learned.described > 0), self._clips_seen + len(clip)
        if not self._targets_seen and self._clips_seen >= UNTOLD:
            raise ValueError(
                f"none of the first {self._clips_seen} clips, {clip.keys[:4]} among them, has a caption that "
                "model.captions.learn=true could learn: their json needs `captions` or `caption` (docs/formats.md); or "
                "set objective.density=0, model.captions.learn=false and model.captions.how=generate"
            )


def _learned(model: Any) -> Any:
    """What the last training step taught the part that writes captions; None where there is none."""
    return getattr(getattr(model, "captioner", None), "learned", None)
