"""Attention along time that never looks ahead and remembers a bounded window, for every backbone.

Positions enter as rotations or as ALiBi's slopes, that is as differences of times: any length works, and nothing counts
up in a stream, whose cache holds the keys and values of the last `window` - 1 latent frames.

Letters: N sequences (a place of the grid each), t latent frames, H heads, L queries, S keys; D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from vtok.layers.causal import Cache
from vtok.layers.rotary import Rotation, rotate, rotation
from vtok.layers.transformer import Attention
from vtok.layers.windows import alibi_slopes, causal_window_attend

ROTARY_BASE = 100.0  # windows are some tens of frames at most: language's 10000 would leave most pairs unturned


def rotations_of_times(frames: int, window: int, head: int, *, like: Tensor, base: float = ROTARY_BASE) -> Rotation:
    """Rotations of the newest `frames` frames and the `window` - 1 before them, in the precision of `like` or float32.

    The newest frame is time 0. head: channels of a head.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    times = torch.arange(1 - window - frames, 0, device=like.device, dtype=wide) + 1
    return rotation(times, head, base=base)


class TemporalAttention(Attention):
    """Causal attention along time at each position: [N, t, D] -> [N, t, D].

    Its cache holds the keys, not yet turned, and the values of the last window - 1 latent frames: [2, N, H, window - 1
    or fewer, D]. Keys are turned at every call by their distance from the newest frame.
    Raises: ValueError for a window without the present frame, and for rotary heads of odd width.
    """

    def __init__(self, width: int, num_heads: int, *, window: int, alibi: bool = False, qk_norm: bool = True):
        super().__init__(width, num_heads, qk_norm=qk_norm)
        if window < 1:
            raise ValueError(f"temporal_window={window} must be at least 1 frame, the present one")
        if not alibi and width // num_heads % 2:
            raise ValueError(
                f"width={width} over num_heads={num_heads} is odd: rotary positions turn pairs of channels"
            )
        self.window, self.alibi = window, alibi

    def forward(self, x: Tensor, times: Rotation | None, cache: Cache | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """times: `rotations_of_times` of at least these frames and this window; None with ALiBi."""
        new = x.shape[1]
        q_NHLD, k_NHSD, v_NHSD = rearrange(self.qkv(x), "N t (three H D) -> three N H t D", three=3, H=self.num_heads)
        q_NHLD, k_NHSD = self.q_norm(q_NHLD).to(v_NHSD.dtype), self.k_norm(k_NHSD).to(v_NHSD.dtype)
        if cache is not None:
            past = cache.get(self)
            if past is not None:
                k_NHSD, v_NHSD = torch.cat([past[0], k_NHSD], 2), torch.cat([past[1], v_NHSD], 2)
            kept = max(k_NHSD.shape[2] - self.window + 1, 0)
            cache[self] = torch.stack([k_NHSD[:, :, kept:], v_NHSD[:, :, kept:]]).detach()
        if times is not None:
            seen = k_NHSD.shape[2]
            k_NHSD = rotate(k_NHSD, (times[0][-seen:], times[1][-seen:])).to(v_NHSD.dtype)
            q_NHLD = rotate(q_NHLD, (times[0][-new:], times[1][-new:])).to(v_NHSD.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        slopes = alibi_slopes(self.num_heads, device=x.device, dtype=wide) if self.alibi else None
        out = causal_window_attend(q_NHLD, k_NHSD, v_NHSD, window=self.window, slopes=slopes)
        return self.out(rearrange(out, "N H t D -> N t (H D)"))
