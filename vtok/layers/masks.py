"""Who may look at whom: boolean masks [L, L], True where the query (row) sees the key (column).

Sequences are [patches | registers], patches in time order over `blocks` equal time blocks, registers block by block.

| mask                    | a patch of block t sees         | register i of block t sees                        |
|-------------------------|---------------------------------|---------------------------------------------------|
| full                    | everything                      | everything                                        |
| causal_last             | all patches                     | all patches, registers <= i (one block only)      |
| time_block_causal       | everything of blocks <= t       | everything of blocks <= t                         |
| time_block_causal_last  | patches of t, all of blocks < t | patches of t, registers <= i of t, all before t   |
| flexible                | patches of t, and as switched   | patches of t, registers <= i of t, and as switched |

`flexible` lets four switches (`CrossTime`) say what is seen of earlier blocks, kind by kind (VideoFlexTok's name).

`decoder` masks: `full`; for time blocks, registers see registers of blocks <= t, and the patch queries of block t see
registers of blocks <= t and only their own block's queries (AdapTok, https://arxiv.org/abs/2505.17011), so that
decoding block t never needs a later token.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

ENCODER_MASKS = ("full", "causal_last", "time_block_causal", "time_block_causal_last")
CAUSAL_MASKS = ("time_block_causal", "time_block_causal_last", "flexible")


@dataclass(frozen=True)
class CrossTime:
    """What is seen of earlier time blocks under `flexible`, from_to: patches p, registers r. full | none; `r_r` also
    causal (registers of an index up to the own one)."""

    p_p: str = "full"  # patches see earlier patches
    p_r: str = "full"  # patches see earlier registers
    r_p: str = "full"  # registers see earlier patches
    r_r: str = "full"  # registers see earlier registers

    def __post_init__(self) -> None:
        for name, value in zip(("p_p", "p_r", "r_p", "r_r"), astuple(self)):
            choices = ("full", "none", "causal") if name == "r_r" else ("full", "none")
            if value not in choices:
                raise ValueError(f"cross_time.{name}={value!r} is unknown; choose {', '.join(choices)}")


def _layout(patches: int, registers: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """(is_register, block, rank inside the block's registers) of every position, each [L]."""
    is_register = torch.arange(patches + registers) >= patches
    block = torch.cat([torch.arange(n) * blocks // max(n, 1) for n in (patches, registers)])
    rank = torch.cat([torch.zeros(patches, dtype=torch.int64), torch.arange(registers) % max(registers // blocks, 1)])
    return is_register, block, rank


def encoder_mask(
    kind: str, *, patches: int, registers: int, blocks: int = 1, cross: CrossTime | None = None
) -> Tensor | None:
    """The encoder's mask; None when everything sees everything. cross: of kind `flexible`."""
    if kind not in ENCODER_MASKS + CAUSAL_MASKS:
        raise ValueError(f"mask={kind!r} is unknown; choose one of {', '.join({*ENCODER_MASKS, *CAUSAL_MASKS})}")
    if kind == "full":
        return None
    is_register, block, rank = _layout(patches, registers, blocks)
    same, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
    if kind == "time_block_causal":
        return same | before
    upto = rank[:, None] >= rank[None, :]
    seen = ~is_register[None, :] | (is_register[:, None] & upto)
    if kind == "flexible":
        cross, (query, key) = cross or CrossTime(), (is_register[:, None], is_register[None, :])
        switches = {"full": torch.ones_like(upto), "none": torch.zeros_like(upto), "causal": upto}
        to_patch = torch.where(query, switches[cross.r_p], switches[cross.p_p])
        to_register = torch.where(query, switches[cross.r_r], switches[cross.p_r])
        before = before & torch.where(key, to_register, to_patch)
    return (same & seen) | before


def decoder_mask(kind: str, *, patches: int, registers: int, blocks: int = 1) -> Tensor | None:
    """The decoder's mask for an encoder mask of that kind."""
    if not kind.startswith("time_block"):
        return None
    is_register, block, _ = _layout(patches, registers, blocks)
    same, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
    to_register = is_register[None, :] & (same | before)
    return to_register | (same & ~is_register[:, None] & ~is_register[None, :])


def with_valid_keys(mask: Tensor | None, valid: Tensor) -> Tensor | None:
    """The mask with keys hidden where `valid` [B, L] is False; every position still sees itself, so that no row is
    empty. [L, L] (or None) when all keys are valid, [B, L, L] otherwise."""
    if bool(valid.all()):
        return mask
    seen = valid[:, None, :] if mask is None else mask & valid[:, None, :]
    return seen | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
