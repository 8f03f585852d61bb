"""What a compressor with a small language model begins from: another model's weights, the words of the large one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vtok.layers.taking import take_all


def warm_start(model: Any, source: nn.Module) -> str:
    """Begin with another model's weights, all of them: of this family, where one of texts leaves the eye of one of
    videos as it is; or, for videos, of a stage-0 projector that was trained for the small language model. Returns
    what was done, for the log.

    Raises: ValueError naming the tensors that do not fit.
    """
    given = source.state_dict()
    if type(source) is type(model):
        parts = ["eye", "judge", "match", *["lm"] * (model.config.mode == source.config.mode)]
        new = [part for part in parts if getattr(model, part) is not None and getattr(source, part) is None]
        begun = take_all(model, given, new=[f"{part}." for part in new])
        model.head_taken = True
        told = ", ".join(f"model.{part}" for part in new)
        return "all weights" + (f"; {told} new, {len(begun)} tensors" if begun else "")
    given = {f"eye.{name}": value for name, value in given.items()}
    rest = {name.partition(".")[0] for name in model.state_dict()} - {"eye"}
    begun = take_all(model, given, new=rest)
    told = ", ".join(f"model.{name}" for name in sorted(rest))
    return f"the projector, {len(given)} tensors; {told} new, {len(begun)} tensors"


@torch.no_grad()
def begin_at_words(model: Any, llm: Any) -> str:
    """With pooled queries: the head begins by handing on what each query began from, mapped as the words that the
    small model and `llm` (`vtok.llm.FrozenLLM`) share are (least squares); not where it is another model's. Returns
    what was done, for the log."""
    if model.head.skip is None or model.head_taken:
        return ""
    own, other = model.tokenizer.get_vocab(), llm.tokenizer.get_vocab()
    shared, width = sorted(own.keys() & other.keys()), model.small_width
    if len(shared) <= width:
        return f"model.head.skip begins at random: of words, the two language models share {len(shared)} alone"
    small, large = (torch.tensor([words[word] for word in shared]) for words in (own, other))
    share = model.head.begin_at_words(model.embed_words(small), llm.embed(large.to(llm.device)).cpu())
    return f"model.head begins as the map of {len(shared)} shared words, which explains {share:.1%} of them"
