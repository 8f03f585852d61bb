"""Optical flow by a frozen RAFT, as a loss reads it: torchvision's network, weights from a file.

Teed and Deng 2020, RAFT: Recurrent All-Pairs Field Transforms for Optical Flow, https://arxiv.org/abs/2003.12039.

Letters: N pairs of frames, H height, W width, h, w those that RAFT sees.

A file of weights is the state dict of torchvision's `raft_large` or `raft_small`, which of them is read off its names.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.weights import Beside, fill_weights, read_weights

SMALLEST = 128  # pixels a side: an eighth of it, halved three times by the correlation pyramid, leaves 2
_STEP = 8  # sides are multiples of it


class OpticalFlow(nn.Module):
    """Flow from one frame to another, in pixels of the frames, differentiable in both.

    Frames are resized (bilinear, antialiased when they shrink) to 1 / scale of their sides and to multiples of 8, but
    never to less than 128 pixels a side: smaller ones are enlarged, since RAFT sees no less. RAFT runs in float32
    whatever autocast and the precision of the run say (its coordinates are counted in pixels, of which bfloat16
    resolves 256 at most), rests in eval mode, and is in no checkpoint.

    Args:
        net: torchvision's RAFT. scale: 1 or above (Cosmos: 2, to save memory). updates: of its recurrent unit.
    """

    def __init__(self, net: nn.Module, *, scale: float = 1.0, updates: int = 12) -> None:
        super().__init__()
        if scale < 1:
            raise ValueError(f"objective.flow_scale={scale} must be 1 (frames as they are) or above")
        if updates < 1:
            raise ValueError(f"objective.flow_updates={updates} must be 1 or above")
        self._raft = Beside(net)
        self.scale, self.updates = scale, updates

    def sides(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) at which RAFT sees frames of `size`."""
        h, w = (max(SMALLEST, _STEP * round(side / self.scale / _STEP)) for side in size)
        return h, w

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[N, 2, h, w] float32: how far what is at (x, y) of `first` moves to the right and down until `second`.

        Args:
            first, second: [N, 3, H, W] in [-1, 1].
        """
        sides, size = self.sides((first.shape[2], first.shape[3])), first.shape[2:]
        with torch.autocast(first.device.type, enabled=False):
            pair = [
                x.float() if x.shape[2:] == sides else F.interpolate(x.float(), sides, mode="bilinear", antialias=True)
                for x in (first, second)
            ]
            flow = self._raft.on(first.device)(*pair, num_flow_updates=self.updates)[-1]
        return flow * flow.new_tensor([size[1] / sides[1], size[0] / sides[0]]).view(1, 2, 1, 1)


def load_flow(path: str | Path, sha256: str = "", *, scale: float = 1.0, updates: int = 12) -> OpticalFlow:
    """RAFT with the weights of a file.

    Args:
        path: safetensors, or a torch.save'd state dict. sha256: expected hash of the file; "" skips the comparison.
        scale, updates: as `OpticalFlow`.
    Raises: ImportError without torchvision; FileNotFoundError; ValueError on another hash or on names that do not fit.
    """
    try:
        from torchvision.models.optical_flow import raft_large, raft_small
    except ImportError as error:
        raise ImportError("objective.flow needs torchvision, whose RAFT it runs: pip install torchvision") from error
    state = read_weights(path, sha256, "RAFT")
    large = any(name.startswith("mask_predictor.") for name in state)
    net = raft_large() if large else raft_small()
    fill_weights(net, state, path, f"torchvision's raft_{'large' if large else 'small'}")
    return OpticalFlow(net, scale=scale, updates=updates)
