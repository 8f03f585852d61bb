"""What every frozen tower is, whatever it sees or hears: held by reference, known by where its weights came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any, Self

import torch


class Held:
    """A library's model, frozen. No nn.Module: whoever holds one has nothing of it in a state_dict or an engine.

    name, sha256, revision: where its weights came from, revision as the commit where it is known. layer: block whose
    output is taken.
    """

    def __init__(
        self, config: Any, model: torch.nn.Module, *, layer: int, facts: Any, sha256: str, revision: str = ""
    ) -> None:
        """facts: plain values of what is done to frames or sounds before the model."""
        self.config, self.name, self.layer = config, config.name, layer
        self.sha256, self.revision = sha256, revision
        self._model = model.requires_grad_(False).eval()
        self._facts = json.dumps(facts, sort_keys=True)

    @property
    def model(self) -> torch.nn.Module:
        """The library's own module."""
        return self._model

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        self._model.to(device)
        return self

    def identity(self) -> dict[str, Any]:
        """What features depend on, as plain values: two towers of one identity give the same features.

        name, revision, sha256 of the weights, layer, dtype, and a hash of what is done before the model.
        """
        return {
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "layer": self.layer,
            "dtype": self.config.dtype,
            "preprocess": hashlib.sha256(self._facts.encode()).hexdigest()[:16],
        }

    def pinned(self) -> Any:
        """The config that loads these very weights again."""
        return replace(self.config, sha256=self.sha256, revision=self.revision or self.config.revision)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # frozen: an averaged copy of its holder shares it
