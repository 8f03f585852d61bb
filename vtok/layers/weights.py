"""Weights of frozen networks from files: tensors alone, never code, and never in silence another file than expected."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | Path, sha256: str, what: str) -> dict[str, Tensor]:
    """The state dict of a file, safetensors or `torch.save`d (read with weights_only=True).

    Args:
        sha256: expected hash of the file; "" skips the comparison. what: names the weights in errors.
    Raises: FileNotFoundError; ValueError on another hash, or on anything but a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no {what} weights at {path}; give the path of a file, or leave it empty to go without"
        )
    if sha256 and (found := file_sha256(path)) != sha256.lower():
        raise ValueError(
            f"{path} has sha256 {found}, expected {sha256}: these are other weights, so the numbers would not compare"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain state dict of {what} weights, and nothing else is unpickled: {error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict of tensors")
    return dict(state)


def fill_weights(
    net: nn.Module, state: dict[str, Tensor], path: str | Path, what: str, *, assign: bool = False
) -> None:
    """Loads `state` into `net`, name by name. Raises ValueError, naming the file, where they differ."""
    try:
        net.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {what}: {error}") from error


class Beside:
    """A frozen float32 network that is no part of the module that holds it.

    Checkpoints leave it out (its statistics too), half precision and ZeRO-3 leave it whole, and it follows what it is
    given from device to device: for networks that have to stay float32.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.float().requires_grad_(False).eval()
        self.device = torch.device("cpu")

    def on(self, device: torch.device) -> nn.Module:
        """The network, on `device`."""
        if device != self.device:
            self.net, self.device = self.net.to(device), device
        return self.net
