"""Operations of whatever runs, counted op by op: torch's counter, mended."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


class Operations(FlopCounterMode):
    """`with Operations() as counter: ...; counter.get_total_flops()`. A multiply-add is two; products of matrices,
    convolutions and attention count.

    Differs from torch's: attention on the CPU counts as that of CUDA does (there not at all); operations are not told
    apart by module, which hooks into modules and fails on one that is given a parameter, or what was made of one while
    no gradients were recorded.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_attention())
        self.mod_tracker = _NoModules()  # type: ignore[assignment]


class _NoModules:
    parents = frozenset({"Global"})

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def _attention() -> dict[Any, Any]:
    def ahead(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def back(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, q, k, v)

    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
    return {getattr(aten, name): count for name, count in zip(names, (ahead, back)) if hasattr(aten, name)}
