"""Every quantizer behind one return type: latents in, `Quantized(embeddings, indices, loss, report)` out.

    z [..., D] --bound, round--> embeddings [..., D] (straight-through) + indices [..., Q] int64

All arithmetic is float32 whatever autocast says: in bfloat16 neighbouring FSQ levels merge and half the ids are lost
(vector-quantize-pytorch issue 114). Inference is plain torch; VQ trains through vector-quantize-pytorch, whose codebook
buffers it shares name for name, so that an export needs torch alone. Identity is a peer: continuous tokens, no ids.

Id order: mixed radix with dimension 0 least significant for FSQ (as vector-quantize-pytorch and its followers), and
dimension 0 most significant for LFQ (as vector-quantize-pytorch; SEED-Voken counts the other way round).

Letters: D width of a token's code, Q ids per token, V codebook size, L levels of one dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.sampling import draw
from vtok.types import Quantized

try:  # training only: inference and exports carry the plain-torch codebook below
    from vector_quantize_pytorch import VectorQuantize
except ImportError:
    VectorQuantize = None


@dataclass
class QuantizerConfig:
    name: str = "fsq"  # fsq | vq | lfq | identity
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5, 5])  # fsq: levels of each dimension
    codebook_size: int = 4096  # vq, lfq
    dim: int = 12  # vq, identity: width of a token's code (lfq: log2(codebook_size))
    commitment: float = 0.25  # vq, lfq: weight of the pull of the latents towards their code
    cosine: bool = True  # vq: unit-length latents and codes
    ema_decay: float = 0.99  # vq: codebook as a moving average; 0 trains it by gradient instead
    kmeans_init: bool = True  # vq: first batch's cluster centres
    dead_code_threshold: int = 0  # vq: codes whose average count falls below are re-seeded; 0 = never
    stochastic_temperature: float = 0.0  # vq: sample codes from softmax(similarity / temperature) in training (LARP)
    entropy: float = 0.1  # lfq: weight of per-sample minus batch entropy
    entropy_temperature: float = 0.01  # lfq: of the soft assignment in that term
    entropy_group_bits: int = 9  # lfq: batch entropy is exact within groups of so many bits, summed over groups
    kl: float = 0.0  # identity: weight of KL(N(mean, std) || N(0, 1)); 0 = plain latents


def _float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


class FSQ(nn.Module):
    """Finite scalar quantization: bound every dimension by tanh and round it to L levels.

    Mentzer et al. 2023, https://arxiv.org/abs/2309.15505. Ids equal vector-quantize-pytorch's.

    forward: z [..., D] -> embeddings [..., D] in [-1, 1], indices [..., 1] in [0, prod(levels)).
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: list[int]):
        super().__init__()
        if not levels or min(levels) < 3 or math.prod(levels) >= 1 << 31:  # the bound of 2 levels is lopsided
            raise ValueError(f"quantizer.levels={levels}: every level must be 3 or more, their product below 2^31")
        self.dim = self.latent_dim = len(levels)
        self.codebook_sizes = (math.prod(levels),)
        self.index_factors = (tuple(levels),)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """z squashed so that rounding gives L distinct values."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        return (z + (offset / half.to(z.dtype)).atanh()).tanh() * half.to(z.dtype) - offset

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = _float32(z)
            bounded = self.bound(z)
            rounded = bounded + (bounded.round() - bounded).detach()
            codes = rounded / (self.levels // 2)
            digits = rounded.detach().round().long() + self.levels // 2
            indices = (digits * self.basis).sum(-1, keepdim=True)
            return Quantized(codes, indices, z.new_zeros(()), {})

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> the same float32 embeddings [..., D] that `forward` gave."""
        digits = indices // self.basis % self.levels
        return (digits - self.levels // 2).float() / (self.levels // 2)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., L] for each dimension."""
        sizes = self.index_factors[0]
        means = [
            (p * ((torch.arange(n, device=p.device) - n // 2) / (n // 2))).sum(-1) for p, n in zip(probabilities, sizes)
        ]
        return torch.stack(means, -1)


class _Codebook(nn.Module):
    """Plain-torch stand-in for vector-quantize-pytorch's codebook: the same buffers, no training."""

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", torch.zeros(1, codebook_size, dim))
        self.register_buffer("embed", torch.zeros(1, codebook_size, dim))


class _CodebookOnly(nn.Module):
    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self._codebook = _Codebook(codebook_size, dim)


class _VectorQuantizer(nn.Module):
    """Nearest row of a codebook, in plain torch: the inference half of both VQ classes."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.dim = self.latent_dim = config.dim
        self.codebook_sizes = (config.codebook_size,)
        self.index_factors = (self.codebook_sizes,)

    @property
    def codebook(self) -> Tensor:
        """[V, D] float32, rows of unit length with `cosine`."""
        raise NotImplementedError

    def similarity(self, z: Tensor) -> Tensor:
        """[M, D] -> [M, V]: inner product of unit vectors, or minus the Euclidean distance."""
        codebook = self.codebook.to(z.dtype)
        return z @ codebook.T if self.config.cosine else -torch.cdist(z, codebook)

    def nearest(self, z: Tensor) -> Tensor:
        """[...] int64, the id of the code nearest to each latent; ties go to the lowest id."""
        chunks = z.reshape(-1, self.dim).split(max(1, (1 << 26) // self.codebook.shape[0]))  # 256 MB of similarities
        ids = [self.similarity(chunk).argmax(-1) for chunk in chunks]
        return torch.cat(ids).reshape(z.shape[:-1])

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training on real latents [M, D]: straight-through codes [M, D], ids [M], loss scalar."""
        raise NotImplementedError

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = _float32(z)
            if self.config.cosine:
                z = F.normalize(z, dim=-1)
            if not self.training:
                indices = self.nearest(z)[..., None]
                return Quantized(self.lookup(indices).to(z.dtype), indices, z.new_zeros(()), {})
            real = z.reshape(-1, self.dim) if mask is None else z[mask]  # padding must not move the codebook
            codes, ids, loss = self.learn(real)
            if mask is None:
                return Quantized(codes.reshape(z.shape), ids.reshape(*z.shape[:-1], 1), loss, {})
            indices = self.nearest(z.detach())[..., None].masked_scatter(mask[..., None], ids[:, None])
            return Quantized(z.masked_scatter(mask[..., None], codes.to(z.dtype)), indices, loss, {})

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> embeddings [..., D]."""
        return F.embedding(indices[..., 0], self.codebook)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under a distribution over the codebook, [[..., V]]."""
        return probabilities[0] @ self.codebook.to(probabilities[0])


class VQ(_VectorQuantizer):
    """Vector quantization whose codebook is a moving average of its latents (van den Oord et al. 2017,
    https://arxiv.org/abs/1711.00937, appendix A.1), started by k-means on the first batch.

    `cosine` compares unit vectors (Yu et al. 2021, https://arxiv.org/abs/2110.04627). The initialised flag and all
    averages are buffers: a resume never re-seeds the codebook. Trains through vector-quantize-pytorch.

    forward: z [..., D] -> embeddings [..., D], indices [..., 1] in [0, V).
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        if VectorQuantize is None:
            self.layer = _CodebookOnly(config.codebook_size, config.dim)
        else:
            self.layer = VectorQuantize(
                dim=config.dim,
                codebook_size=config.codebook_size,
                decay=config.ema_decay,
                kmeans_init=config.kmeans_init,
                threshold_ema_dead_code=config.dead_code_threshold,
                use_cosine_sim=config.cosine,
                commitment_weight=config.commitment,
                stochastic_sample_codes=config.stochastic_temperature > 0,
                sample_codebook_temp=config.stochastic_temperature or 1.0,
                rotation_trick=False,
            )

    @property
    def codebook(self) -> Tensor:
        embed = self.layer._codebook.embed
        assert isinstance(embed, Tensor)
        return embed[0]

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if VectorQuantize is None:
            raise RuntimeError("training an EMA codebook needs vector-quantize-pytorch: pip install vtok")
        codes, ids, loss = self.layer(z[None])
        return codes[0], ids[0], loss.sum()


class GradientVQ(_VectorQuantizer):
    """Vector quantization whose codebook is a parameter: ||sg(z) - e||^2 + commitment ||z - sg(e)||^2 (van den Oord et
    al. 2017, https://arxiv.org/abs/1711.00937, eq. 3), as TiTok and LARP train theirs.

    vector-quantize-pytorch refuses a learnable codebook with cosine similarity, which both of them use; hence our own.
    `stochastic_temperature` draws the code from softmax(cosine / temperature) in training instead of taking the nearest
    (LARP, Wang et al. 2024, https://arxiv.org/abs/2410.21264); inference takes the nearest.

    forward: z [..., D] -> embeddings [..., D], indices [..., 1] in [0, V).
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        if config.kmeans_init or config.dead_code_threshold:
            raise ValueError(
                "quantizer.ema_decay=0 trains the codebook by gradient, without k-means start or re-seeding: set "
                f"kmeans_init=false and dead_code_threshold=0 (have {config.kmeans_init}, {config.dead_code_threshold})"
            )
        bound = 1 / config.codebook_size
        rows = torch.empty(config.codebook_size, config.dim).uniform_(-bound, bound)
        # unit rows where only their direction counts: rows of 1 / codebook_size are smaller than a few steps of AdamW,
        # each of which would turn a code all the way onto its latent
        self.weight = nn.Parameter(F.normalize(rows, dim=-1) if config.cosine else rows)

    @property
    def codebook(self) -> Tensor:
        weight = _float32(self.weight)
        return F.normalize(weight, dim=-1) if self.config.cosine else weight

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            if self.config.stochastic_temperature > 0:
                logits = self.similarity(z) / self.config.stochastic_temperature
                ids = draw(logits.softmax(-1))
            else:
                ids = self.nearest(z)
        codes = F.embedding(ids, self.codebook)
        loss = (codes - z.detach()).square().mean() + self.config.commitment * (z - codes.detach()).square().mean()
        return z + (codes - z).detach(), ids, loss


class LFQ(nn.Module):
    """Lookup-free quantization: the sign of every dimension (MAGVIT-v2, Yu et al. 2023,
    https://arxiv.org/abs/2310.05737).

    The entropy term is per-sample minus batch entropy of softmax(-distance / temperature). With codes in {-1, 1}^D that
    softmax factorises over bits, so the per-sample part is an exact sum of binary entropies; the batch part is exact
    within groups of `entropy_group_bits` bits and summed over groups (an upper bound of the joint entropy, as BSQ,
    Zhao et al. 2024, https://arxiv.org/abs/2406.07548): tokens x codebook is never built.

    forward: z [..., D] -> embeddings [..., D] in {-1, 1}, indices [..., 1] in [0, 2^D), bit 0 most significant.
    """

    basis: Tensor

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.dim = self.latent_dim = round(math.log2(config.codebook_size))
        if 1 << self.dim != config.codebook_size or self.dim < 1:
            raise ValueError(f"quantizer.codebook_size={config.codebook_size}: LFQ needs a power of two")
        self.codebook_sizes = (config.codebook_size,)
        self.index_factors = ((2,) * self.dim,)
        self.config = config
        self.register_buffer("basis", 1 << torch.arange(self.dim), persistent=False)

    def entropy(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(per-sample, batch) entropy in nats of the soft assignment of z [M, D]."""
        # softmax over {-1, 1} of -(z - c)^2 / temperature is a sigmoid of 4 z / temperature
        logits = 4 * z / self.config.entropy_temperature
        one, zero = logits.sigmoid(), (-logits).sigmoid()
        sample = -(one * F.logsigmoid(logits) + zero * F.logsigmoid(-logits)).sum(-1).mean()
        batch = z.new_zeros(())
        for bits in torch.stack([zero, one], -1).split(self.config.entropy_group_bits, dim=1):
            joint = bits[:, 0]  # [M, 2], grown to [M, 2^group] one bit at a time
            for bit in range(1, bits.shape[1]):
                joint = (joint[:, :, None] * bits[:, bit][:, None, :]).flatten(1)
            mean = joint.mean(0)
            batch = batch - (mean * mean.clamp_min(1e-12).log()).sum()
        return sample, batch

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = _float32(z)
            signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
            # dimension 0 of the code is the last digit of vector-quantize-pytorch's `bits`: most significant first
            indices = ((signs > 0).long() * self.basis.flip(0)).sum(-1, keepdim=True)
            loss, report = z.new_zeros(()), {}
            if self.training:
                real = z.reshape(-1, self.dim) if mask is None else z[mask]
                sample, batch = self.entropy(real)
                commit = (real - torch.where(real > 0, 1.0, -1.0)).square().mean()
                loss = self.config.entropy * (sample - batch) + self.config.commitment * commit
                report = {"entropy_sample": sample.detach(), "entropy_batch": batch.detach()}
            return Quantized(z + (signs - z).detach(), indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> embeddings [..., D] in {-1, 1}."""
        return (indices // self.basis.flip(0) % 2).float() * 2 - 1

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under one distribution [..., 2] a bit, least significant bit first."""
        return torch.stack([p[..., 1] - p[..., 0] for p in reversed(probabilities)], -1)


class Identity(nn.Module):
    """No quantization: continuous tokens, without ids. With `kl` > 0 the latents are a mean and a log-variance.

    forward: z [..., D], or [..., 2 D] with `kl` -> embeddings [..., D]; drawn in training, the mean otherwise
    (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114, eq. 10 for the KL term, summed over D, mean over tokens).
    """

    codebook_sizes: tuple[int, ...] = ()
    index_factors: tuple[tuple[int, ...], ...] = ()

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.dim, self.kl = config.dim, config.kl
        self.latent_dim = 2 * self.dim if self.kl else self.dim

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        z = _float32(z)
        if not self.kl:
            return Quantized(z, None, z.new_zeros(()), {})
        mean, logvar = z.chunk(2, -1)
        logvar = logvar.clamp(-30, 20)
        if not self.training:
            return Quantized(mean, None, z.new_zeros(()), {})
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)
        kl = kl.mean() if mask is None else kl[mask].mean()
        drawn = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        return Quantized(drawn, None, self.kl * kl, {"kl": kl.detach()})

    def lookup(self, indices: Tensor) -> Tensor:
        raise ValueError("quantizer.name=identity makes continuous tokens: they have no indices to look up")

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        raise ValueError("quantizer.name=identity makes continuous tokens: they have no ids to expect")


Quantizer = FSQ | VQ | GradientVQ | LFQ | Identity


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer a config names.

    Every one has `dim` (width of an embedding), `latent_dim` (width `forward` takes), `codebook_sizes` (Q sizes) and
    `index_factors` (the mixed-radix digits of each id, least significant first: what an entropy model factorises by).
    Raises: ValueError for an unknown name or sizes that do not fit.
    """
    if config.name == "fsq":
        return FSQ(list(config.levels))
    classes = {"vq": VQ if config.ema_decay else GradientVQ, "lfq": LFQ, "identity": Identity}
    if config.name not in classes:
        raise ValueError(f"quantizer.name={config.name!r} is unknown; choose fsq, {', '.join(classes)}")
    return classes[config.name](config)
