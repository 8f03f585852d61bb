"""Frechet distance between the features of reconstructions and of originals: what rFVD and rFID share.

    clips --FeatureNet.features()--> [n, D] --sums in float64--> means, covariances --frechet_distance()--> one number

Letters: B clips, T frames, H height, W width, n samples (clips for rFVD, frames for rFID), D features.
Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium,
https://arxiv.org/abs/1706.08500 (FID); Unterthiner et al. 2018, Towards Accurate Generative Models of Video: A New
Metric & Challenges, https://arxiv.org/abs/1812.01717 (FVD). The networks are in `vtok.metrics.i3d` and
`vtok.metrics.inception`; their weights come by path and sha256.

Lower is better, 0 is equal. The number is a property of a set, not a mean over clips: it depends on how many samples
there are and is biased upward for few (a covariance of D features has rank n - 1 at most), so it is reported with n.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from vtok.layers.perceptual import file_sha256
from vtok.metrics.distortion import check_pair

CACHE_BYTES = 2**29  # features of originals that are kept: 4096 clips of 16 frames for rFID


class FeatureNet(nn.Module):
    """A frozen network whose features are compared. Subclasses: `I3D`, `Inception`.

    Attributes:
        dim: D. unit: what a sample is, "clips" or "frames". min_frames: shorter clips give no sample.
        about: the convention in words, for tables. sha256: of the file its weights came from; "" for none.
        weightless: there are none.
    """

    dim: int
    unit: str
    min_frames: int
    about: str
    sha256: str = ""
    weightless: bool = False

    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        """Per clip float32 [n, D] (n 0 where the clip is too short). video: uint8 [B, 3, T, H, W], lengths: [B]."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureNet:
        return super().train(False)


Net = TypeVar("Net", bound=FeatureNet)


# --- weights ----------------------------------------------------------------------------------------------------------


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(("/constants.pkl", "/model.json")) for name in archive.namelist())


def read_state(path: str | Path, sha256: str = "", *, key: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and its sha256. No code of the file is run: safetensors, or torch.load(weights_only=True).

    Args:
        path: safetensors, or a torch.save'd state dict.
        sha256: expected hash; "" accepts any, and the caller records the one found.
        key: the setting the path came from, named in errors.
    Raises: FileNotFoundError; ValueError on another hash, a TorchScript archive, or anything but a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{key}: no weights at {path}; give the path of a file, or leave it empty to go without"
        )
    found = file_sha256(path)
    if sha256 and found != sha256.lower():
        raise ValueError(
            f"{key}: {path} has sha256 {found}, expected {sha256}: these are other weights, so the numbers would not "
            "compare"
        )
    if _is_torchscript(path):
        raise ValueError(
            f"{key}: {path} is a TorchScript archive, which cannot be read without running its code; convert it once "
            "to a state dict as docs/formats.md shows (Weights of metrics)"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path), found
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{key}: {path} is not a plain state dict of tensors, and nothing else is unpickled: {error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{key}: {path} holds a {type(state).__name__}, expected a state dict of tensors")
    return dict(state), found


def load_net(kind: type[Net], path: str | Path, sha256: str, *, key: str, passed_over: str = "") -> Net:
    """A network with the weights of a file, name by name, and the file's hash.

    Args:
        kind: its class. path, sha256, key: as for `read_state`.
        passed_over: names in the file with this prefix are not read (a classifier behind the features).
    Raises: as `read_state`; ValueError naming what is missing, superfluous, or of another shape.
    """
    state, found = read_state(path, sha256, key=key)
    net = kind()
    # counters that files older than PyTorch 0.4.1 lack, and that a frozen network never reads
    wanted = {name for name in net.state_dict() if not name.endswith(".num_batches_tracked")}
    given = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
    if passed_over:
        given = {name: value for name, value in given.items() if not name.startswith(passed_over)}
    for what, names in (("lacks", wanted - set(given)), ("holds what is not in it:", set(given) - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:6]) + (" ..." if len(names) > 6 else "")
            raise ValueError(f"{key}: {path} does not fit {type(net).__name__}: it {what} {shown} ({len(names)} names)")
    try:
        net.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{key}: {path} does not fit {type(net).__name__}: {error}") from error
    net.sha256 = found
    return net


# --- the distance -----------------------------------------------------------------------------------------------------


def _square_root(covariance: Tensor) -> Tensor:
    # [D, r] with root @ root.T == covariance; directions that hold rounding errors only are left out
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians, float64 scalar, at least 0.

        |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2))

    The last trace is the sum of square roots of the eigenvalues of root.T cov_b root, which is symmetric, where
    root root.T = cov_a: no matrix square root of an unsymmetric product, no complex numbers, no added epsilon.
    Means are [D], covariances symmetric [D, D].
    """
    cov_a, cov_b = cov_a.double(), cov_b.double()
    root = _square_root(cov_a)
    inner = root.T @ cov_b @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a.double() - mean_b.double()).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.clamp(min=0)


class FeatureCache:
    """Features of clips that are seen once per row of a table, by content; beyond `limit` bytes they are recomputed."""

    def __init__(self, net: FeatureNet, *, limit: int = CACHE_BYTES) -> None:
        self.net, self.limit, self.size = net, limit, 0
        self.stored: dict[bytes, Tensor] = {}

    def features(self, video: Tensor, lengths: Tensor) -> list[Tensor]:
        """As `FeatureNet.features`, on the CPU."""
        keys = [_digest(clip[:, : int(length)]) for clip, length in zip(video, lengths)]
        new = [at for at, key in enumerate(keys) if key not in self.stored]
        found = [self.stored.get(key) for key in keys]
        if new:
            for at, value in zip(new, self.net.features(video[new], lengths[new])):
                found[at] = value = value.cpu()
                if self.size + value.nbytes <= self.limit:
                    self.stored[keys[at]] = value
                    self.size += value.nbytes
        return [value for value in found if value is not None]


def _digest(clip: Tensor) -> bytes:
    body = clip.cpu().contiguous().numpy()
    return hashlib.blake2b(repr(body.shape).encode() + body.tobytes(), digest_size=20).digest()


class FrechetDistance(Metric):
    """`rfvd` or `rfid`, as the network says: Frechet distance of reconstructions from originals, on the same windows.

    update(recon, target, lengths=None) takes uint8 [B, 3, T, H, W]; compute() is a float64 scalar, NaN below two
    samples; `samples` counts them. Covariances divide by n - 1. Only sums are kept, in float64 (67 MB for 2048
    features), so batches and ranks add up.

    Args:
        net: `I3D` or `Inception`. cache: features of originals, shared by the metrics of several methods.
    Raises: ValueError for videos that are not RGB.
    """

    full_state_update = False
    higher_is_better = False
    samples: Tensor
    recon_sum: Tensor
    recon_outer: Tensor
    target_sum: Tensor
    target_outer: Tensor

    def __init__(self, net: FeatureNet, *, cache: FeatureCache | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net, self.cache = net, cache
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        zero = torch.zeros((), dtype=torch.float64)  # expanded: defaults cost no memory before the first update
        for side in ("recon", "target"):
            self.add_state(f"{side}_sum", zero.expand(net.dim), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", zero.expand(net.dim, net.dim), dist_reduce_fx="sum")

    def update(self, recon: Tensor, target: Tensor, lengths: Tensor | None = None) -> None:
        lengths = check_pair(recon, target, lengths)
        if target.shape[1] != 3:
            raise ValueError(f"{type(self.net).__name__} sees RGB frames, the video has {target.shape[1]} channels")
        sides = {"recon": self.net.features(recon, lengths)}
        sides["target"] = (self.cache or self.net).features(target, lengths)
        for side, found in sides.items():
            x = torch.cat([each.to(self.samples.device, torch.float64) for each in found])  # [n, D]
            setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + x.sum(0))
            setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + x.T @ x)
        self.samples = self.samples + len(x)

    def compute(self) -> Tensor:
        n = int(self.samples)
        if n < 2:
            return torch.tensor(torch.nan, dtype=torch.float64)
        moments = []
        for total, outer in ((self.recon_sum, self.recon_outer), (self.target_sum, self.target_outer)):
            mean = total / n
            moments += [mean, (outer - n * torch.outer(mean, mean)) / (n - 1)]
        return frechet_distance(*moments)

    def remark(self) -> str | None:
        """What a reader of the number must know about its sample, or None."""
        n, enough = int(self.samples), 2 * self.net.dim
        if n < 2:
            return f"needs two {self.net.unit}, of clips of {self.net.min_frames} frames or more; there are {n}"
        if n < enough:
            return f"of {n} {self.net.unit}, biased upward below about {enough} (twice its {self.net.dim} features)"
        return None
