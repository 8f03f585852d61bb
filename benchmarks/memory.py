"""Training clips from memory, for measurements in which loading them is to cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from vtok.config import RunConfig
from vtok.types import Clip


def smooth_batches(config: RunConfig, *, count: int = 4) -> list[Tensor]:
    """`count` uint8 batches [B, 3, T, H, W] of colours that run into each other, of the size that a run asks for."""
    size, frames, batch = config.data.size, config.data.num_frames, config.data.batch_size
    coarse = torch.rand(count * batch, 3, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(coarse, (frames, *size), mode="trilinear").mul(255).to(torch.uint8)
    return list(video.split(batch))


class Endless(IterableDataset):
    """The same batches for ever."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 1 << 40

    def __iter__(self) -> Iterator[Clip]:
        for i in range(1 << 40):
            video = self.batches[i % len(self.batches)]
            yield Clip(keys=[f"{i}/{j}" for j in range(len(video))], video=video.clone())


class Memory(pl.LightningDataModule):
    """What a run takes in place of `ClipDataModule`: every rank gets the same few clips."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.stream = Endless(smooth_batches(config))

    def advance(self, clip: Clip) -> None:
        pass

    def train_dataloader(self) -> Any:
        return DataLoader(self.stream, batch_size=None)
