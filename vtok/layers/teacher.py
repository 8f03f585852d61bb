"""Predicting a frozen tokenizer's ids: their digits, the loss on them, and pixels from a distribution over them.

TiTok, Yu et al. 2024, https://arxiv.org/abs/2406.07550. An id is one digit for each factor of its codebook (one alone
for a plain codebook, one a dimension for FSQ and LFQ), the least significant first, so that no layer is as wide as the
product.

Letters: B clips, M chunks, C channels, T frames, H height, W width, K teacher's tokens of a chunk, L size of a factor,
D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Factors = tuple[tuple[int, ...], ...]


def digit_sizes(index_factors: Factors) -> list[int]:
    """L of every digit, in the order of `digits_of`."""
    return [size for factors in index_factors for size in factors]


def digits_of(indices: Tensor, index_factors: Factors) -> list[Tensor]:
    """Ids [B, blocks, K / blocks, Q] as digits, each [B, K] int64."""
    digits = []
    for part, factors in enumerate(index_factors):
        rest = indices[..., part].flatten(1)
        for size in factors:
            digits.append(rest % size)
            rest = rest // size
    return digits


@torch.no_grad()
def clip_digits(teacher: Any, video: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
    """Ids of clips of at most one chunk as digits, each [B, K], and which are real [B, K].

    Args: video: [B, C, T, H, W]; lengths: [B] real frames.
    """
    chunks = teacher.chunks(video, lengths)
    indices = teacher.encode_chunks(chunks).indices  # [B, blocks, K / blocks, Q]
    real = chunks.block_valid.repeat_interleave(teacher.num_tokens, 1)
    return digits_of(indices, teacher.index_factors), real


@torch.no_grad()
def seen_digits(teacher: Any, videos: Iterable[Tensor]) -> tuple[list[Tensor], Tensor]:
    """All tokens of some clips: their digits, each [n], and their embeddings [n, D].

    videos: [B, C, T, H, W] of at most one chunk, without padding.
    """
    digits: list[list[Tensor]] = []
    codes: list[Tensor] = []
    teacher.eval()  # its codebook follows what it sees in training
    for video in videos:
        chunks = teacher.chunks(video, torch.full((len(video),), video.shape[2], device=video.device))
        tokens = teacher.encode_chunks(chunks)
        codes.append(tokens.embeddings.flatten(0, 2))
        digits.append([d.flatten() for d in digits_of(tokens.indices, teacher.index_factors)])
    return [torch.cat(d) for d in zip(*digits)], torch.cat(codes)


def id_cross_entropy(logits: list[Tensor], digits: list[Tensor], real: Tensor) -> Tensor:
    """Scalar: nats a token, summed over digits and averaged over the tokens that `real` [B, K] marks.

    logits: by digit, [B, K, L].
    """
    entropies = [
        F.cross_entropy(scores.float().transpose(1, 2), target, reduction="none")
        for scores, target in zip(logits, digits)
    ]
    return (torch.stack(entropies).sum(0) * real).sum() / real.sum()


def expected_pixels(
    teacher: Any, logits: list[Tensor], lengths: Tensor, *, frames: int, size: tuple[int, int]
) -> Tensor:
    """[M, C, T, H, W] through the decoder of `teacher`, from the expected embedding of its ids.

    Differentiable in logits [M, K, L] and in the teacher: TiTok's second stage reads the soft codebook in the same way.
    """
    codes = teacher.quantizer.expect([part.float().softmax(-1) for part in logits])
    codes = rearrange(codes, "M (b K) D -> M b K D", b=teacher.blocks)
    blocks = -(-frames // teacher.block_frames) if teacher.blocks > 1 else 1
    everything = codes.new_ones(codes.shape[:3], dtype=torch.bool)[:, :blocks]
    return teacher.decode_chunks(codes[:, :blocks], everything, lengths, frames=frames, size=size)


def differences(want: Mapping[str, Any], have: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What the settings `have` say otherwise, for the keys of `want`: one line each."""
    out: list[str] = []
    for key, value in want.items():
        got = have.get(key)
        if isinstance(value, Mapping) and isinstance(got, Mapping):
            out += differences(value, got, f"{prefix}{key}.")
        elif value != got:
            out.append(f"{prefix}{key} is {got!r}, not {value!r}")
    return out
