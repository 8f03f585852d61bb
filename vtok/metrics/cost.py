"""What tokens cost a language model: floating point operations of the prefill, bytes of its key-value cache.

Both are read off the architecture that is really there (grouped-query attention, gated feed-forward layers), not off
its parameter count: tables of the field assume neither, and so flatter long prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LMShape:
    """The numbers that decide the cost of a decoder-only transformer.

    linear: weights of the linear maps every position passes (attention projections, feed-forward), of all layers.
    head: weights of the output map, which the last position alone passes in a prefill.
    layers, heads, kv_heads, head_dim: of its attention.
    """

    linear: int
    head: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def prefill_flops(self, tokens: int) -> int:
        """Operations (a multiply-add is two) of a prompt of `tokens` positions: causal, so a position attends to
        itself and those before it; norms, softmax and embeddings, below a per cent, are left out."""
        pairs = tokens * (tokens + 1) // 2
        return 2 * tokens * self.linear + 4 * pairs * self.layers * self.heads * self.head_dim + 2 * self.head

    def kv_bytes(self, tokens: int, *, bytes_per_number: int = 2) -> int:
        """Bytes of the keys and values of `tokens` positions; a number has two bytes in bfloat16."""
        return 2 * tokens * self.layers * self.kv_heads * self.head_dim * bytes_per_number


def shape_of(model: nn.Module, config: Any) -> LMShape:
    """The shape of a causal language model of transformers; `config` is its text configuration.

    Raises: ValueError for a mixture of experts, of which a position passes some weights only.
    """
    if any("expert" in name for name, _ in model.named_modules()):
        raise ValueError(f"{type(model).__name__} is a mixture of experts: its cost depends on the routing")
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
    )
