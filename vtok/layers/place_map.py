"""Where in the video a cluster's members lie, told to its token.

    members' places (t, y, x) --payload, averaged per cluster--> statistics --MLP--> vectors --mixer--> tokens

Statistics of members do not know in which order clusters or members come. The label map, which VQToken reads, does;
here its ids are ranks by mass, so it reads the same map whatever numbers the clustering gave.

Letters: S sets (a clip, or a block of one), F frames of a set (padded), N patches of a frame, K tokens, D width, P
columns of the payload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("none", "moments", "fourier", "histogram", "label_map")
MIXERS = ("add", "attention", "attention_residual")


@dataclass
class PlaceConfig:
    """What tokens know of where their patches lie.

    kind: moments (mean and standard deviation of t, y and x, share of the patches), fourier (sines and cosines of the
        members' t, y and x, averaged), histogram (of t, y and x), label_map (cluster of every patch of the video, as a
        grid of `map_size`: VQToken's), none.
    mixer: add (content + its vector), attention (VQToken's VQ-attention: queries and keys are the contents, values
        the vectors, and nothing of the contents is passed on), attention_residual (content + that).
    """

    kind: str = "moments"  # none | moments | fourier | histogram | label_map
    mixer: str = "add"  # add | attention | attention_residual
    hidden: int = 256  # units of the MLP
    num_heads: int = 8  # of the attention
    bands: int = 6  # fourier: frequencies of each of t, y, x: 1/2, 1, 2 ... periods
    bins: list[int] = field(default_factory=lambda: [8, 8, 8])  # histogram: of t, y, x
    map_size: list[int] = field(default_factory=lambda: [32, 27, 27])  # label_map: frames, rows, columns it is read at

    def __post_init__(self) -> None:
        self.bins, self.map_size = list(self.bins), list(self.map_size)
        for key, choices in (("kind", KINDS), ("mixer", MIXERS)):
            if getattr(self, key) not in choices:
                raise ValueError(f"places.{key}={getattr(self, key)!r} is unknown; choose one of {', '.join(choices)}")
        if self.kind == "none" and self.mixer != "add":
            raise ValueError(f"places.mixer={self.mixer} mixes in what places.kind=none does not have: choose a kind")
        for key in ("bins", "map_size"):
            if len(getattr(self, key)) != 3 or min(getattr(self, key)) < 1:
                raise ValueError(f"places.{key}={getattr(self, key)} must be three numbers, of t, y and x, 1 or more")
        for key in ("hidden", "num_heads", "bands"):
            if getattr(self, key) < 1:
                raise ValueError(f"places.{key}={getattr(self, key)} must be 1 or more")


class PlaceMap(nn.Module):
    """Args: dim: D. num_tokens: most tokens of a set. rms: scale of the vectors added, that of the LLM's words.

    With `add` and `attention_residual` the last layer begins at 0: the tokens begin as their contents.
    """

    def __init__(self, config: PlaceConfig, *, dim: int, num_tokens: int, rms: float):
        super().__init__()
        self.config, self.num_tokens, self.rms = config, num_tokens, rms
        c = config
        width = {"none": 0, "moments": 7, "fourier": 6 * c.bands, "histogram": sum(c.bins)}.get(c.kind)
        self.columns = 6 if c.kind == "moments" else 3 + (width or 0)  # P
        out = dim if width is not None else num_tokens * dim
        width = math.prod(c.map_size) if width is None else width
        self.enter = nn.Linear(width, c.hidden) if width else None
        self.leave = nn.Linear(c.hidden, out) if width else None
        self.attention = self.norm = None
        if c.mixer != "add":
            if dim % c.num_heads:
                raise ValueError(f"places.num_heads={c.num_heads} does not divide model.embedding_dim={dim}")
            self.attention = nn.MultiheadAttention(dim, c.num_heads, batch_first=True)
        if c.mixer == "attention_residual":
            self.norm = nn.LayerNorm(dim)
        last = self.leave if c.mixer == "add" else None
        if self.norm is not None and self.attention is not None:
            last = self.attention.out_proj
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def payload(self, frames: Tensor, count: int, grid: tuple[int, int], *, start: int = 0) -> Tensor:
        """[S] real frames of each set -> [S, count * N, P] of `count` frames from `start`: what is averaged over
        members, float32.

        Columns 0 to 2 are the middle of the patch: t in frames, y and x in [0, 1]; with moments 3 to 5 their squares.
        """
        c, device = self.config, frames.device
        t, y, x = (torch.arange(n, device=device).float() + 0.5 for n in (count, *grid))
        places = torch.stack(torch.meshgrid(t + start, y / grid[0], x / grid[1], indexing="ij"), -1).flatten(0, 2)
        places = places.expand(len(frames), -1, -1)
        if c.kind == "moments":
            return torch.cat([places, places.square()], -1)
        if c.kind not in ("fourier", "histogram"):
            return places
        scaled = torch.cat([places[..., :1] / frames[:, None, None], places[..., 1:]], -1).clamp(max=1)
        if c.kind == "fourier":
            angle = (scaled[..., None] * (math.pi * 2 ** torch.arange(c.bands, device=device))).flatten(2)
            return torch.cat([places, angle.sin(), angle.cos()], -1)
        bins = torch.tensor(c.bins, device=device)
        where = torch.minimum((scaled * bins).long(), bins - 1)
        return torch.cat([places, *(F.one_hot(where[..., i], n).float() for i, n in enumerate(c.bins))], -1)

    def forward(
        self, content: Tensor, means: Tensor, mass: Tensor, *, frames: Tensor, maps: Tensor | None = None
    ) -> Tensor:
        """content [S, K, D] with what its clusters are told of their places.

        Args: means [S, K, P]: the payload averaged over members. mass [S, K], 0 where there is no cluster; clusters
            come first, largest first. frames [S]. maps: [S, F, h, w] int64, cluster of each patch, for the label map.
        """
        if self.enter is None or self.leave is None:
            return content
        told = self._told(means, mass, frames, maps).to(self.enter.weight.dtype)
        told = self.leave(F.gelu(self.enter(told)))
        if self.config.kind == "label_map":
            told = told.unflatten(1, (self.num_tokens, -1))[:, : content.shape[1]]
        if self.attention is None:
            return content + told * self.rms
        query = content if self.norm is None else self.norm(content.to(self.norm.weight.dtype))
        query = query.to(told.dtype)
        mixed = self.attention(query, query, told, key_padding_mask=mass <= 0, need_weights=False)[0]
        return mixed if self.norm is None else content + mixed * self.rms

    def _told(self, means: Tensor, mass: Tensor, frames: Tensor, maps: Tensor | None) -> Tensor:
        if self.config.kind == "label_map":
            assert maps is not None
            # 1 to num_tokens as (0, 1]: VQToken reads the ids as they are, which makes the first layer's sums as large
            return (self.sampled(maps, frames).flatten(1).float() + 1) / self.num_tokens
        if self.config.kind != "moments":
            return means[..., 3:]
        length = torch.stack([frames.float(), *[torch.ones_like(frames, dtype=torch.float32)] * 2], -1)[:, None]
        mean, square = means[..., :3] / length, means[..., 3:6] / length.square()
        spread = (square - mean.square()).clamp_min(0).sqrt()
        share = mass / mass.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([2 * mean - 1, 2 * spread, share[..., None]], -1)

    def sampled(self, maps: Tensor, frames: Tensor) -> Tensor:
        """[S, F, h, w] at the nearest places of a grid of `map_size` over each set's real frames: [S, *map_size]."""
        size, device = self.config.map_size, maps.device
        t, y, x = ((torch.arange(n, device=device) + 0.5) / n for n in size)
        t = (t * frames[:, None]).long()  # [S, frames of the map]
        y, x = (y * maps.shape[2]).long(), (x * maps.shape[3]).long()
        sets = torch.arange(len(maps), device=device)[:, None, None, None]
        return maps[sets, t[:, :, None, None], y[:, None], x]
