"""The pipeline as a LightningDataModule with a cursor: a killed run continues with the very next batch.

The cursor is a number of batches. `training_step` calls `advance` once a micro-batch, so the count is right at every
moment a checkpoint may be written (the module's own `on_train_batch_end` comes after ModelCheckpoint's, and a loader
without a length is read one batch ahead: both lose batches). Use it with `Trainer(use_distributed_sampler=False)`.
Other processes or workers than before go on where `vtok.data.cursor` can tell the place.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader

from vtok.config import DataConfig
from vtok.data.buckets import check_parts, scaled_sizes
from vtok.data.cursor import MOVED, another_order, carry_over
from vtok.data.feature_index import FeatureShardError, feature_view
from vtok.data.pipeline import TrainingStream, ValidationSet, make_loader
from vtok.data.prefetch import ahead_of
from vtok.data.sources import Shard, open_sources
from vtok.data.view import View, view_of
from vtok.types import Clip

log = logging.getLogger(__name__)

# What the stream of one rank is a function of: with any of them changed, the count of batches means other samples.
FIXED = {
    "world": "trainer.devices x trainer.num_nodes",
    "num_workers": "data.num_workers",
    "batch_size": "data.batch_size",
    "seed": "data.seed",
    "shuffle_buffer": "data.shuffle_buffer",
    "weights": "data.weights",
    "part_batch_sizes": "data.part_batch_sizes (data.batch_size where data.part_frames is given alone)",
    "shards": "the shards under data.shards (hash of their names and sizes)",
}


def fingerprint(sources: list[list[Shard]], view: View | None = None) -> str:
    """Equal for equal lists of shards, wherever they lie; of features also by the tower that `view` names."""
    facts: list[Any] = [[(shard.name, shard.samples, shard.num_bytes) for shard in source] for source in sources]
    if view is not None and view.cached is not None:
        facts.append(view.cached.identity)
        facts += [] if view.hearing is None else [view.hearing.identity]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


class ClipDataModule(lightning.LightningDataModule):
    """Training and validation batches of uint8 `Clip`s, or of `Clip`s with a tower's features and no video.

    Args:
        config: the `data:` node.
        tower: gives the model's frozen tower (with `name` and `identity()`); asked only where the shards hold features
            (`vtok features`), which must then be its own. None takes any tower's, under the name it was recorded with.
        audio: gives the model's audio tower, where it hears; clips then bring sound, or its features.
        quarantine: file of broken samples, read again on resume; None: quarantine.jsonl in trainer.default_root_dir.
    Raises: ValueError for bad settings, at once; for shards that are not there, when a loader is asked for.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        quarantine: str | Path | None = None,
        tower: Callable[[], Any] | None = None,
        audio: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self._tower, self._audio = tower, audio
        self._views: dict[str, View] = {}
        self.view = view_of(config)
        self._quarantine = quarantine
        self._batches = 0
        self._order = 0  # how often the order began anew (data.reorder)
        self._opened: list[list[Shard]] | None = None
        self._validation: ValidationSet | None = None
        if config.num_workers < 0:
            raise ValueError(f"data.num_workers={config.num_workers} must be 0 or more")
        if config.shuffle_buffer < 0:
            raise ValueError(f"data.shuffle_buffer={config.shuffle_buffer} must be 0 (the shards' own order) or more")
        if self.bucketed and config.shards:
            parts = {"part_frames": config.part_frames, "part_batch_sizes": config.part_batch_sizes}
            check_parts(len(config.shards.split("::")), shards=config.shards, **parts)
        scaled_sizes(self.view.size, config.size_scales)
        if not 0 <= config.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={config.max_bad_fraction} is a share of the samples, 0 to 1")

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def world(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def bucketed(self) -> bool:
        """Whether every batch comes from one part of data.shards."""
        return self.config.part_frames is not None or self.config.part_batch_sizes is not None

    @property
    def quarantine(self) -> Path | None:
        if self._quarantine is not None:
            return Path(self._quarantine)
        return Path(self.trainer.default_root_dir) / "quarantine.jsonl" if self.trainer is not None else None

    @property
    def batches_consumed(self) -> int:
        """Micro-batches of this rank that training has used; equal on every rank."""
        return self._batches

    @property
    def num_val_clips(self) -> int:
        """Clips of one validation, over all ranks."""
        return self._held_out().num_clips

    def advance(self, clip: Clip | None = None) -> None:
        """Count one micro-batch as used. Call it in `training_step`, once, whatever the step does with the batch."""
        self._batches += 1

    def train_dataloader(self) -> DataLoader:
        config = self.config
        if self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
        stream = TrainingStream(
            self._sources(),
            view=self._training_view(),
            batch_size=config.batch_size,
            seed=another_order(config.seed, self._order),
            rank=self.rank,
            world=self.world,
            start=self._batches,
            weights=config.weights,
            part_frames=config.part_frames,
            part_batch_sizes=config.part_batch_sizes,
            size_scales=config.size_scales,
            shuffle_buffer=config.shuffle_buffer,
            cache_dir=config.cache_dir,
            max_bad_fraction=config.max_bad_fraction,
            quarantine=self.quarantine,
        )
        loader = make_loader(stream, num_workers=config.num_workers, pin_memory=self._pin())
        return ahead_of(loader, self._device(), wanted=config.prefetch)

    def _training_view(self) -> View:
        config = self.config
        seen = self._view_of(config.shards, "data.shards", training=True)
        if seen.cached is not None and config.size_scales is not None:
            raise FeatureShardError(
                f"data.size_scales={config.size_scales} is for pixels, and data.shards={config.shards!r} holds features"
            )
        return seen

    def _view_of(self, shards: str, setting: str, *, training: bool) -> View:
        """What is seen of the clips of `shards`, which may be features. Looked up once, as the sources are."""
        if setting not in self._views:
            config = self.config
            self._views[setting] = feature_view(
                self.view,
                shards,
                training=training,
                tower=self._tower,
                audio=self._audio,
                most_frames=max(config.part_frames) if training and config.part_frames else None,
                root=config.root,
                cache_dir=config.cache_dir,
                setting=setting,
            )
        return self._views[setting]

    def _sources(self) -> list[list[Shard]]:
        # Looked up once: each checkpoint states what the stream reads, not what lies in the folder by then, and must
        # not fail because a remote index cannot be reached at that moment.
        if self._opened is None:
            config = self.config
            root, cache = config.root, config.cache_dir
            self._opened = open_sources(
                config.shards, weights=config.weights, apart=self.bucketed, root=root, cache_dir=cache
            )
        return self._opened

    def val_dataloader(self) -> DataLoader | list[Any]:
        if not self.config.val_shards:
            return []
        return make_loader(self._held_out(), num_workers=self.config.num_workers, pin_memory=self._pin())

    def _held_out(self) -> ValidationSet:
        if self._validation is None:
            config = self.config
            root, cache = config.root, config.cache_dir
            self._validation = ValidationSet(
                open_sources(config.val_shards, root=root, cache_dir=cache, setting="data.val_shards")[0],
                view=self._view_of(config.val_shards, "data.val_shards", training=False),
                batch_size=config.val_batch_size,
                rank=self.rank,
                world=self.world,
                val_clips=config.val_clips,
                cache_dir=cache,
                max_bad_fraction=config.max_bad_fraction,
                quarantine=self.quarantine,
            )
        return self._validation

    def _device(self) -> torch.device:
        if self.trainer is None:
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return self.trainer.strategy.root_device

    def _pin(self) -> bool:
        asked = self.config.pin_memory
        return self._device().type == "cuda" if asked is None else asked

    def _fixed(self) -> dict[str, Any]:
        config = self.config
        return {
            "world": self.world,
            "num_workers": config.num_workers,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "shuffle_buffer": config.shuffle_buffer,
            "weights": None if config.weights is None else [float(w) for w in config.weights],
            "part_batch_sizes": self._part_batch_sizes(),
            "shards": fingerprint(self._sources(), self._training_view()),
        }

    def _part_batch_sizes(self) -> list[int] | None:
        config = self.config
        if not self.bucketed:
            return None
        return [int(n) for n in config.part_batch_sizes or [config.batch_size] * len(config.shards.split("::"))]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "order": self._order, **self._fixed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Other processes, workers and batch sizes go on with the same streams where `carry_over` can, and else, with
        data.reorder, begin a pass in another order.

        Raises: ValueError where the stream would not be the one of the checkpoint, naming both values.
        """
        now = self._fixed()
        changed = {name for name in FIXED if state_dict.get(name) != now[name]}
        self._order = int(state_dict.get("order", 0))
        if changed:
            fix = "Use the checkpoint's values"
            try:
                if changed <= {*MOVED, "part_batch_sizes"}:
                    exact = not (self.bucketed or "part_batch_sizes" in changed or self.config.size_scales)
                    self._batches = carry_over(state_dict, now, exact=exact)
                    return
            except ValueError as error:
                if self.config.reorder:
                    self._batches, self._order = 0, self._order + 1
                    if self.rank == 0:
                        print("data.reorder: a pass begins in a new order; clips of the last one may come again")
                    return
                fix = str(error)
            told = [f"{FIXED[n]} was {state_dict.get(n)!r} and is {now[n]!r}" for n in FIXED if n in changed]
            raise ValueError(
                f"cannot resume the data in the middle: {'; '.join(told)}. {fix}, or start a new run from its weights "
                "(init_from)"
            )
        self._batches = int(state_dict["batches"])
        if self.rank == 0:
            log.info("data continues after batch %d of each rank", self._batches)
