"""Attention within bounds: windows of a frame, a causal window of time; no mask where slices do.

Letters: F frames, N sequences, H heads, h, w patch grid; L queries, S keys; D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

_MAX_SEQUENCES = 1 << 15  # CUDA kernels of scaled_dot_product_attention take fewer than 2^16 sequences in one call
_QUERY_CHUNK = 32  # queries of long videos are taken so many at a time: cost grows with t x window, not t x t


def attend(
    q_NHLD: Tensor, k_NHSD: Tensor, v_NHSD: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of any number of sequences under one mask [L, S] or [H, L, S]: [N, H, L, D]."""
    if mask is not None and mask.ndim == 3:
        mask = mask[None]
    parts = zip(*(x.split(_MAX_SEQUENCES) for x in (q_NHLD, k_NHSD, v_NHSD)))
    out = [F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal) for q, k, v in parts]
    return out[0] if len(out) == 1 else torch.cat(out)


def window_spans(size: int, window: int, *, shifted: bool) -> list[tuple[int, int, int]]:
    """How windows cut one axis: (start, stop, length of each window in between), ends shorter than `window` apart.

    Shifted windows begin at half a window, as in Swin (Liu et al. 2021, https://arxiv.org/abs/2103.14030), whose cyclic
    shift and mask give the same sets. An axis that one window covers is not cut.
    """
    if size <= window:
        return [(0, size, size)]
    start = window // 2 if shifted else 0
    stop = start + (size - start) // window * window
    spans = [(0, start, start), (start, stop, window), (stop, size, size - stop)]
    return [span for span in spans if span[0] < span[1]]


def window_attend(
    q_FHhwD: Tensor, k_FHhwD: Tensor, v_FHhwD: Tensor, *, window: tuple[int, int], shifted: bool
) -> Tensor:
    """Attention inside windows of a frame: [F, H, h, w, D].

    Windows at the border of a grid that they do not divide are smaller. All windows of one size are one call without
    padding and without a mask: at most 9 calls, one where the window divides the grid.
    """
    rows = window_spans(q_FHhwD.shape[2], window[0], shifted=shifted)
    columns = window_spans(q_FHhwD.shape[3], window[1], shifted=shifted)
    out = []
    for top, bottom, high in rows:
        line = []
        for left, right, wide in columns:
            parts = [x[:, :, top:bottom, left:right] for x in (q_FHhwD, k_FHhwD, v_FHhwD)]
            shape = {"a": high, "b": wide, "i": (bottom - top) // high}
            parts = [rearrange(x, "F H (i a) (j b) D -> (F i j) H (a b) D", a=high, b=wide) for x in parts]
            back = "(F i j) H (a b) D -> F H (i a) (j b) D"
            line.append(rearrange(attend(*parts), back, F=len(q_FHhwD), **shape))
        out.append(torch.cat(line, 3) if len(line) > 1 else line[0])
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def alibi_slopes(num_heads: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[H] falling powers of two, the same share of every octave (Press et al. 2021, https://arxiv.org/abs/2108.12409).

    The paper gives slopes for powers of two; other numbers of heads follow the same formula here.
    """
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device, dtype=dtype) / num_heads)


def causal_window_attend(
    q_NHLD: Tensor, k_NHSD: Tensor, v_NHSD: Tensor, *, window: int, slopes: Tensor | None = None
) -> Tensor:
    """Attention of the last L of S positions to themselves and the window - 1 positions before: [N, H, L, D].

    Args:
        slopes: [H], a key d positions back loses slope x d before the softmax (ALiBi).
    """
    queries, past = q_NHLD.shape[2], k_NHSD.shape[2] - q_NHLD.shape[2]
    if queries == k_NHSD.shape[2] <= window and slopes is None:
        return attend(q_NHLD, k_NHSD, v_NHSD, causal=True)
    step = max(window, _QUERY_CHUNK)
    out = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        first = max(past + start - window + 1, 0)
        at = torch.arange(past + start, past + stop, device=q_NHLD.device)
        back = at[:, None] - torch.arange(first, past + stop, device=q_NHLD.device)  # [L, S] frames back in time
        mask = (back >= 0) & (back < window)
        if slopes is not None:
            mask = torch.where(mask, -slopes[:, None, None] * back, -torch.inf).to(q_NHLD.dtype)
        keys, values = (x[:, :, first : past + stop] for x in (k_NHSD, v_NHSD))
        out.append(attend(q_NHLD[:, :, start:stop], keys, values, mask=mask))
    return out[0] if len(out) == 1 else torch.cat(out, 2)
