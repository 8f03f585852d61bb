"""Which number a code has elsewhere: ids between this package and its peers.

Our own order ("vtok"): fsq and rfsq count dimension 0 least significant, lfq and bsq most significant, ids of a
codebook are the numbers of its rows, dimwise counts bins upwards. What the peers do:

    lucidrains    vector-quantize-pytorch: the same for every quantizer here
    vidtok        FSQ of vector-quantize-pytorch: the same
    cosmos        FSQ of vector-quantize-pytorch: the same
    seed_voken    LFQ of SEED-Voken and Open-MAGVIT2 counts dimension 0 least significant: bits reversed

ElasticTok's FSQ bounds latents by another formula (1 - eps where the others have 1 + eps, and tan for atanh in the
shift): the same latent falls onto another level, so no map of ids makes the two equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.quantize.config import QuantizerConfig

SAME = {
    "vtok": ("fsq", "rfsq", "lfq", "bsq", "vq", "rvq", "simvq", "ibq", "dimwise"),
    "lucidrains": ("fsq", "rfsq", "lfq", "bsq", "vq", "rvq", "simvq"),
    "vidtok": ("fsq",),
    "cosmos": ("fsq",),
}
REVERSED = {"seed_voken": ("lfq",)}  # bits counted from the other end


def reverse_bits(indices: Tensor, *, bits: int) -> Tensor:
    """ids int64 of `bits` bits with their bits in the opposite order; its own inverse."""
    out = torch.zeros_like(indices)
    for bit in range(bits):
        out |= (indices >> bit & 1) << (bits - 1 - bit)
    return out


def convert_ids(indices: Tensor, config: QuantizerConfig, *, to: str = "vtok", source: str = "vtok") -> Tensor:
    """ids [..., Q] in one convention -> the same codes' ids in another.

    Args:
        config: the quantizer whose ids these are.
        to, source: "vtok", "lucidrains", "vidtok", "cosmos" or "seed_voken"; see the head of this file.
    Raises: ValueError where a convention is unknown, does not have the quantizer, or cannot be converted to.
    """
    for end in (source, to):
        if end == "elastictok":
            raise ValueError(
                "ElasticTok's FSQ bounds latents by another formula: its levels are other levels, and no order of ids "
                "makes them ours; encode again"
            )
        kinds = SAME.get(end, ()) + REVERSED.get(end, ())
        if not kinds:
            raise ValueError(f"convention {end!r} is unknown; choose {', '.join([*SAME, *REVERSED])}")
        if config.name not in kinds:
            raise ValueError(
                f"convention {end!r} is stated for {', '.join(kinds)}, not model.quantizer.name={config.name!r}"
            )
    turns = sum(config.name in REVERSED.get(end, ()) for end in (source, to))
    return reverse_bits(indices, bits=config.codebook_size.bit_length() - 1) if turns == 1 else indices
