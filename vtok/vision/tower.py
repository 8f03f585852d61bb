"""A frozen tower: clips in, Features out, a bounded number of frames at a time.

Letters: B clips, T frames, M windows in one call, w frames of a window, H height, W width, N patches of a frame, D
width, S feature frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.types import Clip, Features, to_uint8
from vtok.vision.bodies import Body, Received, Seen, block_index
from vtok.vision.held import Held

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TowerConfig:
    """Which tower, and what is taken from it."""

    name: str = ""  # timm:MODEL[.TAG], timm:USER/REPO, hf:USER/REPO, or a folder that timm or transformers wrote
    layer: int = -1  # block (stage of a convolutional net) whose output is taken; -1 = the tower's own last output
    dtype: str = "float32"  # float32 | bfloat16 | float16: of the weights and of the features
    frames_per_call: int = 64  # frames that go through the tower at once; bounds the memory
    revision: str = ""  # branch, tag or commit of a repository; "" = its default branch
    sha256: str = ""  # expected hash of the weights; "" = any, what was loaded is in Tower.sha256
    # (height, width) that whole frames are resized to, nothing cropped; None = the tower's own size, resizing and crop.
    # Features that must lie where the pixels lie (representation alignment, position maps) need a size here.
    size: list[int] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"tower.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.frames_per_call < 1:
            raise ValueError(f"tower.frames_per_call={self.frames_per_call} must be at least 1")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"tower.size={self.size} is not (height, width) in pixels, such as [224, 224]")


class Tower(Held):
    """A frozen tower. `load_tower` makes one.

    stride: frames behind one feature frame (1 for image towers). window: frames it sees at once. embedding_dim: D.
    preprocess: what it does to frames. any_size: whether it sees other sizes of them.
    """

    def __init__(self, config: TowerConfig, body: Body, *, sha256: str, revision: str = ""):
        facts, layer = asdict(body.preprocess), body.layer
        layer = block_index(config.layer, body.depth, config.name) if layer is None else layer
        super().__init__(config, body.model, layer=layer, facts=facts, sha256=sha256, revision=revision)
        self._body = body
        self.preprocess, self.embedding_dim = body.preprocess, body.embedding_dim
        self.window, self.stride, self.depth = body.window, body.stride, body.depth
        self.any_size = body.any_size

    def __reduce__(self) -> tuple[Any, ...]:
        from vtok.vision.load import load_tower

        return load_tower, (self.pinned(),)

    def feature_frames(self, frames: Tensor) -> Tensor:
        """Feature frames of clips with so many frames (the last one may be partly filled)."""
        return -(-frames // self.stride)

    def features(self, clip: Clip, **asked: Any) -> Features:
        """The clip's cached features of this tower where it brings them, else those of its video; see `forward`.

        Raises: ValueError for a clip with neither.
        """
        if clip.features and self.name in clip.features:
            return clip.features[self.name]
        if clip.video is None:
            raise ValueError(
                f"the clip has neither a video nor features of {self.name!r}, only of {list(clip.features or {})}"
            )
        return self.forward(clip.video, clip.lengths, times=clip.times, **asked)

    def __call__(self, video: Tensor, lengths: Tensor | None = None, **asked: Any) -> Features:
        return self.forward(video, lengths, **asked)

    def block(self, layer: int) -> int:
        """The block of a number, from 0, or from the last as -1. Raises: ValueError where there is none."""
        return block_index(layer, self.depth, self.name)

    @torch.no_grad()
    def forward(
        self,
        video: Tensor,
        lengths: Tensor | None = None,
        *,
        times: Tensor | None = None,
        attention: Sequence[int] = (),
        attention_from: str = "all",
        keys: bool = False,
    ) -> Features:
        """Features of a batch of clips, on the video's device, where the tower is moved to; padding is zeros.

        A video tower sees windows of `window` frames, independently of one another; the last one is filled up with the
        clip's last real frame, to the next multiple of `stride`, or wholly where it takes full windows only.

        Args:
            video: [B, 3, T, H, W], uint8 or float in [-1, 1] (rounded to 8 bits, as the tower was trained).
            lengths: [B] real frames; None: all.
            times: [B, T] seconds. Those of the features: the mean over the real frames behind each feature frame.
            attention: blocks whose attention is asked: the weight a patch receives, averaged over heads and queries.
            attention_from: which queries count: "all" tokens of the call, or "cls", the first one.
            keys: give the keys of the layer that features are taken from as well, heads side by side.
        Returns: Features of S = ceil(T / stride) frames, in the tower's dtype (attention: float32).
        Raises: ValueError for another number of channels, for lengths out of range, and where attention is asked of a
            tower that has none over all patches.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"towers see RGB videos [B, 3, T, H, W], this one is {list(video.shape)}")
        batch, _, frames = video.shape[:3]
        real = torch.full((batch,), frames) if lengths is None else lengths.to("cpu", torch.int64)
        if batch and (int(real.min()) < 1 or int(real.max()) > frames):
            raise ValueError(f"lengths lie in [{int(real.min())}, {int(real.max())}], the video has {frames} frames")
        layers = list(dict.fromkeys(self.block(asked) for asked in attention))
        if attention_from not in ("all", "cls"):
            raise ValueError(f"attention_from={attention_from!r} is unknown; choose all or cls")
        if self.device != video.device:
            self.to(video.device)
        steps = -(-frames // self.stride)
        grids: set[tuple[int, int]] = set()
        out: dict[str | int, Tensor] = {}

        def put(name: str | int, values: Tensor | None, rows: Tensor, first: Tensor, filled: Tensor) -> None:
            """values [M, s, ...] to where their windows lie."""
            if values is None:
                return
            if name not in out:
                out[name] = values.new_zeros(batch, steps, *values.shape[2:])
            inside = torch.arange(values.shape[1]) < filled[:, None]
            window, step = (x.to(values.device) for x in inside.nonzero(as_tuple=True))
            out[name][rows.to(values.device)[window], first.to(values.device)[window] + step] = values[window, step]

        for rows, index in _windows(real, self.window, self.stride, fixed=self._body.fixed):
            first = index[:, 0] // self.stride
            filled = self.feature_frames((real[rows] - index[:, 0]).clamp(max=self.window))
            size = max(1, self.config.frames_per_call // index.shape[1])
            for part in torch.arange(len(rows)).split(size):
                where = rows[part].to(video.device), index[part].to(video.device)
                chosen = video[where[0][:, None], :, where[1]]  # [M, w, 3, H, W]
                seen, noted = self._see(chosen, layers, attention_from, keys)
                place = rows[part], first[part], filled[part]
                grids.add(seen.grid)
                put("patches", seen.patches, *place)
                put("frame", seen.frame, *place)
                for name, values in noted.items():
                    put(name, values, *place)
        (grid,) = grids
        return Features(
            out["patches"],
            grid,
            times=None if times is None else _feature_times(times, real.to(times.device), self.stride),
            frame=out.get("frame"),
            attention={layer: out[layer] for layer in layers} or None,
            keys=out.get("keys"),
            lengths=None if lengths is None else self.feature_frames(lengths.to(out["patches"].device)),
            attention_from=attention_from,
        )

    def _see(self, frames: Tensor, layers: list[int], source: str, keys: bool) -> tuple[Seen, dict[str | int, Tensor]]:
        """One call: frames [M, w, 3, H, W]; with the attention by layer, and the "keys"."""
        levels = frames if frames.dtype == torch.uint8 else to_uint8(frames)
        pixels = self.preprocess(levels.flatten(0, 1)).to(DTYPES[self.config.dtype])
        pixels = pixels.unflatten(0, frames.shape[:2])
        # what is cached must be what is seen live: the tower's dtype, whatever the trainer's precision
        with torch.autocast(pixels.device.type, enabled=False):
            if not layers and not keys:
                return self._body.run(pixels, self.layer), {}
            with Received(layers, keys=self.layer if keys else None, source=source) as noted:
                seen = self._body.run(pixels, self.layer)
        by_frame = seen.patches.shape[1:3]
        tokens = seen.prefix + by_frame.numel()
        if noted.calls != self.depth or noted.lengths != {tokens}:
            raise ValueError(
                f"{self.name} has no attention over all patches in each of its {self.depth} layers "
                f"({noted.calls} calls over {sorted(noted.lengths)} tokens, of {tokens}): ask for features alone"
            )
        if source == "cls" and layers and not seen.prefix:
            raise ValueError(f"{self.name} has no class token: attention_from='all'")
        found: dict[str | int, Tensor] = {layer: noted.received[layer] for layer in layers}
        if noted.keys is not None:
            found["keys"] = noted.keys
        return seen, {name: values[:, seen.prefix :].unflatten(1, by_frame) for name, values in found.items()}


def _windows(lengths: Tensor, window: int, stride: int, *, fixed: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of windows of one size: their clips [M] and the frames [M, w] they see, the last real one repeated."""
    starts = torch.arange(0, int(lengths.max()), window) if len(lengths) else torch.zeros(0, dtype=torch.int64)
    counts = (lengths[:, None] - starts).clamp(max=window)
    rows, which = (counts > 0).nonzero(as_tuple=True)
    wanted = torch.full_like(rows, window) if fixed else -(-counts[rows, which] // stride) * stride
    for size in wanted.unique().tolist():
        chosen = wanted == size
        index = starts[which[chosen]][:, None] + torch.arange(size)
        yield rows[chosen], index.minimum(lengths[rows[chosen]][:, None] - 1)


def _feature_times(times: Tensor, lengths: Tensor, stride: int) -> Tensor:
    """[B, T] -> [B, S]: mean over the real frames behind each feature frame (over all of them where none is real)."""
    index = torch.arange(-(-times.shape[1] // stride) * stride, device=times.device)
    counted = (index < lengths[:, None]).float()
    past = (index < times.shape[1]).float().expand_as(counted)
    values = times[:, index.clamp(max=times.shape[1] - 1)]
    values, counted, past = (x.unflatten(1, (-1, stride)) for x in (values, counted, past))
    weights = torch.where(counted.sum(-1, keepdim=True) > 0, counted, past)
    return (values * weights).sum(-1) / weights.sum(-1)
