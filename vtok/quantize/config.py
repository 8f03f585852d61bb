"""What a quantizer is configured by, and which keys belong to which quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class QuantizerConfig:
    """Settings of every quantizer. A key that the named one does not read must stay at its default.

    Where the default is None the quantizer has one of its own:
        commitment  0.25 for vq, simvq, rvq, ibq and lfq; 0 for fsq and bsq, whose rounding error is bounded
        entropy     0.1 for lfq and bsq; 0 for fsq; 0.05 for ibq
    """

    name: str = "fsq"  # fsq | vq | lfq | bsq | simvq | ibq | rvq | rfsq | identity | dimwise
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5, 5])  # fsq, rfsq: levels of each dimension
    codebook_size: int = 4096  # vq, lfq, bsq, simvq, ibq, rvq: of each codebook
    dim: int = 12  # vq, simvq, ibq, rvq, identity, dimwise: width of a token's code (lfq, bsq: log2(codebook_size))
    num_codebooks: int = 1  # all with ids but dimwise: the code is cut into so many parts, each with ids of its own
    num_quantizers: int = 4  # rvq, rfsq: steps, each of which quantizes what the ones before left over
    commitment: float | None = None  # weight of the pull of the latents towards their code
    cosine: bool = True  # vq: unit-length latents and codes
    ema_decay: float = 0.99  # vq, rvq: codebook as a moving average; 0 trains it by gradient instead
    kmeans_init: bool = True  # vq, rvq: first batch's cluster centres
    dead_code_threshold: int = 0  # vq, rvq: codes whose average count falls below are re-seeded; 0 = never
    stochastic_temperature: float = 0.0  # vq: sample codes from softmax(similarity / temperature) in training (LARP)
    rotation_trick: bool = False  # vq, simvq: gradients are turned and scaled as the latent was, instead of copied
    entropy: float | None = None  # fsq, lfq, bsq, ibq: weight of per-sample minus batch entropy
    entropy_temperature: float = 0.01  # fsq, lfq, bsq, ibq: of the soft assignment in that term
    entropy_group_bits: int = (
        18  # fsq, lfq, bsq: batch entropy is exact within groups of so many bits, summed over them
    )
    entropy_warmup_steps: int = 0  # fsq, lfq, bsq, ibq: forward passes of training over which that weight ...
    entropy_warmup_factor: float = 3.0  # ... falls from so many times its value to its value
    kl: float = 0.0  # identity: weight of KL(N(mean, std) || N(0, 1)); 0 = plain latents. dimwise: > 0 reads the mean
    bins: int = 64  # dimwise: levels of each dimension


ENTROPY_KEYS = ("entropy", "entropy_temperature", "entropy_warmup_steps", "entropy_warmup_factor")
EMA_KEYS = ("ema_decay", "kmeans_init", "dead_code_threshold")
KEYS: dict[str, tuple[str, ...]] = {
    "fsq": ("levels", "num_codebooks", "commitment", "entropy_group_bits", *ENTROPY_KEYS),
    "vq": (
        *("codebook_size", "dim", "num_codebooks", "commitment", "cosine", "stochastic_temperature", "rotation_trick"),
        *EMA_KEYS,
    ),
    "lfq": ("codebook_size", "num_codebooks", "commitment", "entropy_group_bits", *ENTROPY_KEYS),
    "bsq": ("codebook_size", "num_codebooks", "commitment", "entropy_group_bits", *ENTROPY_KEYS),
    "simvq": ("codebook_size", "dim", "num_codebooks", "commitment", "rotation_trick"),
    "ibq": ("codebook_size", "dim", "num_codebooks", "commitment", *ENTROPY_KEYS),
    "rvq": ("codebook_size", "dim", "num_codebooks", "num_quantizers", "commitment", *EMA_KEYS),
    "rfsq": ("levels", "num_codebooks", "num_quantizers"),
    "identity": ("dim", "kl"),
    "dimwise": ("dim", "kl", "bins"),
}
_COUNTS = {"codebook_size": 2, "dim": 1, "num_codebooks": 1, "num_quantizers": 1, "entropy_group_bits": 1, "bins": 2}
_NOT_NEGATIVE = (
    *("commitment", "dead_code_threshold", "stochastic_temperature", "entropy", "entropy_warmup_steps"),
    *("entropy_warmup_factor", "kl"),
)


def check(config: QuantizerConfig) -> None:
    """Raises: ValueError for an unknown name, a value out of range, or a key changed that the quantizer never reads."""
    if config.name not in KEYS:
        raise ValueError(f"model.quantizer.name={config.name!r} is unknown; choose {', '.join(KEYS)}")
    default, keys = QuantizerConfig(), KEYS[config.name]
    for key in (f.name for f in fields(config) if f.name not in ("name", *keys)):
        value: Any = getattr(config, key)
        if value != getattr(default, key):
            readers = ", ".join(name for name, its in KEYS.items() if key in its)
            raise ValueError(
                f"model.quantizer.{key}={value} does not apply to model.quantizer.name={config.name}: leave it "
                f"out (it belongs to {readers}; {config.name} reads {', '.join(keys)})"
            )
    for key, least in _COUNTS.items():
        if getattr(config, key) < least:
            raise ValueError(f"model.quantizer.{key}={getattr(config, key)} must be {least} or more")
    for key in _NOT_NEGATIVE:
        value = getattr(config, key)
        if value is not None and value < 0:
            raise ValueError(f"model.quantizer.{key}={value} must be 0 or more")
    if not config.entropy_temperature > 0:
        raise ValueError(f"model.quantizer.entropy_temperature={config.entropy_temperature} must be above 0")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(
            f"model.quantizer.ema_decay={config.ema_decay} must be in [0, 1): 0 trains the codebook by gradient"
        )
