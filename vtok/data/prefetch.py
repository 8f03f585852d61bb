"""The next batch on the device before it is asked for: copied by a stream of its own while the step computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dataclasses, dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


class DevicePrefetch:
    """A loader whose batches lie on `device`, one ahead. Without CUDA: one ahead, and copied at once.

    Lightning copies a batch when the step before it has been queued, on the stream that computes; copies from pinned
    memory on another stream run beside the kernels. Batches need `to(device, non_blocking=True)`.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        ahead = None
        for batch in self.loader:
            moved = self._copy(batch, stream)
            if ahead is not None:
                yield self._ready(ahead, stream)
            ahead = moved
        if ahead is not None:
            yield self._ready(ahead, stream)

    def _copy(self, batch: Any, stream: Any) -> Any:
        if stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(stream):
            return batch.to(self.device, non_blocking=True)

    def _ready(self, batch: Any, stream: Any) -> Any:
        if stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(stream)
            for tensor in tensors(batch):  # else the allocator could give its memory away while the step reads it
                tensor.record_stream(now)
        return batch


def ahead_of(loader: Iterable[Any], device: torch.device, *, wanted: bool) -> Any:
    """The loader, one batch ahead on the device where that is wanted."""
    return DevicePrefetch(loader, device) if wanted else loader
