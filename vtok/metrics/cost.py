"""What tokens cost: a language model's prefill, cache and time to the first token; a projector's operations and time.

Operations and bytes are read off the architecture that is really there (grouped-query attention, gated feed-forward
layers), not off its parameter count: tables of the field assume neither, and so flatter long prompts. Times are
measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from vtok.metrics.operations import Operations
from vtok.types import Budget, Clip, Features, Tokens


@dataclass(frozen=True)
class LMShape:
    """The numbers that decide the cost of a decoder-only transformer.

    linear: weights of the linear maps every position passes (attention projections, feed-forward), of all layers.
    head: weights of the output map, which the last position alone passes in a prefill.
    layers, heads, kv_heads, head_dim: of its attention. windows: of each layer, positions that it attends to, its own
    included; 0: all. (): all, in every layer.
    """

    linear: int
    head: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...] = ()

    def prefill_flops(self, tokens: int) -> int:
        """Operations (a multiply-add is two) of a prompt of `tokens` positions: causal, so a position attends to
        itself and those before it; norms, softmax and embeddings, below a per cent, are left out."""
        seen = [min(window or tokens, tokens) for window in self._windows()]
        pairs = sum(most * (most + 1) // 2 + (tokens - most) * most for most in seen)
        return 2 * tokens * self.linear + 4 * pairs * self.heads * self.head_dim + 2 * self.head

    def kv_bytes(self, tokens: int, *, bytes_per_number: int = 2) -> int:
        """Bytes of the keys and values that are kept of `tokens` positions: of a layer with a window those that the
        next one still sees. A number has two bytes in bfloat16."""
        kept = sum(min(window - 1 if window else tokens, tokens) for window in self._windows())
        return 2 * kept * self.kv_heads * self.head_dim * bytes_per_number

    def _windows(self) -> tuple[int, ...]:
        return self.windows or (0,) * self.layers


def shape_of(model: nn.Module, config: Any) -> LMShape:
    """The shape of a causal language model of transformers; `config` is its text configuration.

    Raises: ValueError for a mixture of experts, of which a position passes some weights only, for layers that are no
        attention over all positions or a window of them, and for a configuration that does not say its attention heads.
    """
    if any("expert" in name for name, _ in model.named_modules()):
        raise ValueError(f"{type(model).__name__} is a mixture of experts: its cost depends on the routing")
    if not getattr(config, "num_attention_heads", None):
        raise ValueError(f"{type(config).__name__} names no num_attention_heads: the cost of its layers is not known")
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):  # short convolutions, state spaces
        raise ValueError(f"{type(model).__name__} mixes attention with layers of other kinds, whose cost is not known")
    for key in ("kv_lora_rank", "num_kv_shared_layers"):
        if getattr(config, key, None):
            raise ValueError(
                f"{type(config).__name__} has {key}={getattr(config, key)}: what its cache holds is not known"
            )
    heads = int(config.num_attention_heads)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # GPT-2 keeps its linear maps in a class of its own, Conv1D of transformers
        if module is not head and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            assert weight is not None
            linear += weight.numel()
    return LMShape(
        linear=linear,
        head=head.weight.numel() if head is not None else 0,
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        windows=_windows_of(config),
    )


def _windows_of(config: Any) -> tuple[int, ...]:
    """`LMShape.windows`. Raises: ValueError for a kind of layer that is not known."""
    window = int(getattr(config, "sliding_window", None) or 0)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # one kind: windows where there is one, unless they are switched off
        return (
            (window,) * int(config.num_hidden_layers) if window and getattr(config, "use_sliding_window", True) else ()
        )
    known = {"full_attention": 0, "sliding_attention": window}
    if strange := sorted(set(kinds) - known.keys()):
        raise ValueError(f"{type(config).__name__} has layers of kind {', '.join(strange)}, whose cost is not known")
    return tuple(known[kind] for kind in kinds) if known["sliding_attention"] else ()


def clock_of(device: torch.device | str) -> Callable[[], float]:
    """Seconds of a clock that waits for what the device was given to do."""
    device = torch.device(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@torch.no_grad()
def first_token_seconds(llm: Any, lengths: Iterable[int], *, repeats: int = 5) -> dict[int, float]:
    """Median seconds from the embeddings of one prompt to the first token chosen, for prompts of so many positions.

    Measured side by side: after a round of warm-up the lengths take turns, `repeats` times, so what slows the machine
    for a while slows all of them. A prompt that leaves no room for an answer has none.

    Args:
        llm: a frozen language model (`vtok.llm.FrozenLLM`), on the device that is measured; its cache is filled as in
            any generation.
    """
    clock, device = clock_of(llm.device), llm.device
    wanted = sorted({length for length in lengths if 0 < length < llm.max_length})
    spent: dict[int, list[float]] = {length: [] for length in wanted}
    for turn in range(repeats + 1):
        for length in wanted:
            embeds = llm.embed(torch.arange(length, device=device)[None] % 2)  # which words they are costs nothing
            mask = torch.ones(1, length, dtype=torch.bool, device=device)
            began = clock()
            llm.generate(embeds, mask, max_new_tokens=1)
            if turn:
                spent[length].append(clock() - began)
    return {length: median(times) for length, times in spent.items()}


@torch.no_grad()
def compress_flops(model: Any, clip: Clip, *, budget: Budget | None = None) -> float:
    """Operations (a multiply-add is two) of making a clip's tokens, counted op by op; the mean of the batch. Of the
    tower only where the clip does not bring its features."""
    prompts = clip.prompt if clip.prompt is not None else [""] * len(clip)
    with Operations() as counter:
        model.encode(replace(clip, prompt=prompts), budget=budget)
    return counter.get_total_flops() / len(clip)


class Timed:
    """A projector whose seconds of compressing are counted; asked as the projector is."""

    def __init__(self, model: Any, clock: Callable[[], float]):
        self.model, self.clock, self.seconds = model, clock, 0.0
        self.config = model.config
        self.reads_prompt: bool = getattr(model, "reads_prompt", False)

    def features(self, clip: Clip, **asked: Any) -> Features:
        return self.model.features(clip, **asked)

    def beside(self, clip: Clip) -> dict[str, Features]:
        """What `compress` is given of a clip beside its tower's features and its prompt: audio."""
        given = getattr(self.model, "beside", None)
        return given(clip) if given is not None else {}

    def compress(self, features: Features, **asked: Any) -> Tokens:
        start = self.clock()
        tokens = self.model.compress(features, **asked)
        self.seconds += self.clock() - start
        return tokens

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        start = self.clock()
        tokens = self.model.encode(clip, budget=budget)
        self.seconds += self.clock() - start
        return tokens
