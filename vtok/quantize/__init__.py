"""Every quantizer behind one return type: latents in, `Quantized(embeddings, indices, loss, report)` out.

    z [..., D] --bound, round--> embeddings [..., D] (straight-through) + indices [..., Q] int64

    scalar       fsq, lfq, bsq             no codebook: each dimension on its own
    vector       vq, simvq, ibq            the nearest of V rows
    residual     rvq, rfsq, Product        several ids a token (`num_codebooks` > 1: parts side by side)
    continuous   identity, dimwise         no ids; ids of every dimension after training

All arithmetic is float32 (float64 stays) whatever autocast says: in bfloat16 neighbouring FSQ levels merge and half the
ids are lost (vector-quantize-pytorch issue 114). Inference is plain torch; VQ trains through vector-quantize-pytorch,
whose codebook buffers it shares name for name, so that an export needs torch alone. Identity is a peer: continuous
tokens, no ids. Positions outside `mask` move neither codebooks nor averages nor losses.

Id order: mixed radix with dimension 0 least significant for FSQ (as vector-quantize-pytorch and its followers), and
dimension 0 most significant for LFQ and BSQ (as vector-quantize-pytorch; SEED-Voken counts the other way round);
`convert_ids` goes between them.

Letters: D width of a token's code, Q ids per token, V codebook size, L levels of one dimension.
"""

from __future__ import annotations

from dataclasses import replace

from vtok.quantize.config import QuantizerConfig, check
from vtok.quantize.continuous import Dimwise, Identity
from vtok.quantize.order import convert_ids
from vtok.quantize.residual import Part, Product, ResidualFSQ, ResidualVQ
from vtok.quantize.scalar import BSQ, FSQ, LFQ
from vtok.quantize.vector import IBQ, VQ, GradientVQ, SimVQ

__all__ = [
    "BSQ",
    "Dimwise",
    "FSQ",
    "GradientVQ",
    "IBQ",
    "Identity",
    "LFQ",
    "Product",
    "Quantizer",
    "QuantizerConfig",
    "ResidualFSQ",
    "ResidualVQ",
    "SimVQ",
    "VQ",
    "build_quantizer",
    "convert_ids",
]

Quantizer = Part | Product | Identity | Dimwise


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer a config names.

    Every one has `dim` (width of an embedding), `latent_dim` (width `forward` takes), `codebook_sizes` (Q sizes) and
    `index_factors` (the mixed-radix digits of each id, least significant first: what an entropy model factorises by),
    `lookup` (ids -> embeddings) and `expect` (one distribution for each factor -> expected embeddings).
    Raises: ValueError for an unknown name, sizes that do not fit, a key set that the quantizer does not read.
    """
    check(config)
    if config.name == "identity":
        return Identity(config)
    if config.name == "dimwise":
        return Dimwise(config)
    count = config.num_codebooks
    if count == 1:
        return _part(config)
    if config.name in ("vq", "simvq", "ibq", "rvq"):  # `dim` is the whole width; levels and lfq's bits are of a part
        if config.dim % count:
            raise ValueError(
                f"model.quantizer.dim={config.dim} cannot be cut into num_codebooks={count} equal parts: choose a "
                "multiple"
            )
        config = replace(config, dim=config.dim // count)
    return Product([_part(config) for _ in range(count)])


def _part(config: QuantizerConfig) -> Part:
    if config.name == "fsq":
        return FSQ(list(config.levels), config)
    if config.name == "vq":
        return VQ(config) if config.ema_decay else GradientVQ(config)
    return {"lfq": LFQ, "bsq": BSQ, "simvq": SimVQ, "ibq": IBQ, "rvq": ResidualVQ, "rfsq": ResidualFSQ}[config.name](
        config
    )
