"""I3D on Kinetics-400, the network of rFVD (its architecture: `vtok.layers.i3d`).

Carreira and Zisserman 2017, Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset,
https://arxiv.org/abs/1705.07750.
The features are the 400 logits, averaged over time, of whole frames resized to 224 x 224 (bilinear, half-pixel
centres, no antialiasing), levels mapped to [-1, 1].

Letters: N clips, C channels, T frames, H height, W width.

The names of a weight file are those of `vtok.layers.i3d`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok.layers.i3d import CLASSES, I3DNet
from vtok.metrics.frechet import FeatureNet, load_net

SIDE = 224
# the time stride is 8, rounded up, and the last pooling averages two frames of what is left
MIN_FRAMES = 9
_CLIPS_AT_ONCE = 4


class I3D(I3DNet, FeatureNet):
    """[N, 400] logits of clips, frozen and always in eval mode. Its weights are random until `load_i3d`."""

    dim, unit, min_frames = CLASSES, "clips", MIN_FRAMES
    about = f"I3D Kinetics-400 logits, mean over time; whole frames to {SIDE} x {SIDE}, bilinear; clips of 9 frames up"

    def forward(self, x: Tensor) -> Tensor:
        """[N, 400]. x: [N, 3, T, 224, 224] in [-1, 1], T at least 9. Raises ValueError for another shape."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] < MIN_FRAMES or x.shape[3:] != (SIDE, SIDE):
            raise ValueError(
                f"I3D sees [N, 3, T, {SIDE}, {SIDE}] with T at least {MIN_FRAMES}, got {list(x.shape)}: clips have to "
                f"hold {MIN_FRAMES} frames (data.num_frames)"
            )
        return self.top(x).mean(dim=(2, 3, 4))

    @torch.no_grad()
    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        device = self.logits.conv3d.weight.device
        out = [torch.zeros(0, self.dim, device=device) for _ in range(len(video))]
        # float32 throughout: neither autocast nor TensorFloat-32 may change a number that tables compare
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            for frames in sorted(set(lengths.tolist())):
                if frames < MIN_FRAMES:
                    continue
                for rows in (lengths == frames).nonzero()[:, 0].split(_CLIPS_AT_ONCE):
                    x = video[rows.to(video.device), :, :frames].to(device).float().transpose(1, 2)  # [n, T, 3, H, W]
                    small = F.interpolate(x.flatten(0, 1), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
                    x = small.unflatten(0, (len(rows), frames)).transpose(1, 2) / 127.5 - 1.0
                    for row, feature in zip(rows.tolist(), self(x)):
                        out[row] = feature[None]
        return out


def load_i3d(path: str | Path, sha256: str = "") -> I3D:
    """I3D with the weights of a file (its names are in `vtok.layers.i3d`).

    Args:
        path: safetensors, or a torch.save'd state dict.
        sha256: expected hash of the file; "" skips the comparison. The hash found is `net.sha256`.
    Raises: FileNotFoundError; ValueError on another hash, a TorchScript archive, missing or superfluous names.
    """
    return load_net(I3D, path, sha256, key="eval.fvd_weights")
