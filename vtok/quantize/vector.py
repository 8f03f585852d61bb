"""Quantizers with a codebook: the nearest of V rows.

Inference is plain torch. The moving-average codebook trains through vector-quantize-pytorch's (k-means, Laplace
smoothing, re-seeding), whose buffers it shares name for name, so that an export needs torch alone. Ids are the rows'
numbers.

Letters: D width of a token's code, M tokens, V codebook size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtok.layers.sampling import draw
from vtok.quantize.config import QuantizerConfig
from vtok.quantize.gradients import (
    EntropyWeight,
    as_float32,
    is_distributed,
    mean_over_tokens,
    rotate,
    straight_through,
)
from vtok.types import Quantized

try:  # training only: inference and exports carry the plain-torch codebook below
    import vector_quantize_pytorch as library
except ImportError:
    library: Any = None

SCORES = 1 << 26  # similarities held at once: 256 MB


def _mean_square(difference: Tensor) -> Tensor:
    """0 with a gradient where there is no element, so that every process has the same graph."""
    return difference.square().sum() / max(difference.numel(), 1)


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


class VectorQuantizer(nn.Module):
    """Nearest row of a codebook, in plain torch: the inference half of every class here."""

    def __init__(self, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.commitment = 0.25 if config.commitment is None else config.commitment
        self.dim = self.latent_dim = config.dim
        self.codebook_sizes = (config.codebook_size,)
        self.index_factors = (self.codebook_sizes,)

    @property
    def codebook(self) -> Tensor:
        """[V, D] float32, rows of unit length with `cosine`."""
        raise NotImplementedError

    @property
    def unit(self) -> bool:
        """Whether latents are brought to unit length first."""
        return False

    def score(self, z: Tensor, codebook: Tensor) -> Tensor:
        """[M, D], [V, D] -> [M, V], largest at the code that is chosen.

        Inner product of unit vectors; else z e - |e|^2 / 2, which orders codes as their Euclidean distance does and
        has no cancellation between |z|^2 and |e|^2.
        """
        if self.unit:
            return z @ codebook.T
        return torch.addmm(-codebook.square().sum(-1) / 2, z, codebook.T)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """[...] int64, the id of the code nearest to each latent; ties go to the lowest id."""
        codebook = self.codebook.to(z.dtype)
        ids = [self.score(chunk, codebook).argmax(-1) for chunk in self._chunks(z.reshape(-1, self.dim))]
        return torch.cat(ids).reshape(z.shape[:-1])

    @torch.no_grad()
    def chosen(self, z: Tensor) -> Tensor:
        """[M] int64, the ids that training takes for latents [M, D]: the nearest, or with `stochastic_temperature` one
        drawn from softmax(similarity / temperature), similarity being the inner product of unit vectors or minus the
        Euclidean distance."""
        temperature = self.config.stochastic_temperature
        if not temperature:
            return self.nearest(z)
        codebook = self.codebook.to(z.dtype)
        ids = []
        for chunk in self._chunks(z):
            similarity = chunk @ codebook.T if self.unit else -torch.cdist(chunk, codebook)
            ids.append(draw((similarity / temperature).softmax(-1)))
        return torch.cat(ids)

    def _chunks(self, z: Tensor) -> tuple[Tensor, ...]:
        return z.split(max(1, SCORES // self.codebook_sizes[0]))

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Training on real latents [M, D]: codes [M, D] that carry the gradient to z, ids [M], loss, report."""
        raise NotImplementedError

    def route(self, z: Tensor, codes: Tensor) -> Tensor:
        """`codes` in value, with a gradient to z."""
        return rotate(z, codes) if self.config.rotation_trick else straight_through(z, codes)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = as_float32(z)
            if self.unit:
                z = F.normalize(z, dim=-1)
            if not self.training:
                indices = self.nearest(z)[..., None]
                return Quantized(self.route(z, self.lookup(indices).to(z.dtype)), indices, z.new_zeros(()), {})
            real = z.reshape(-1, self.dim) if mask is None else z[mask]  # padding must not move the codebook
            if not len(real) and not is_distributed():
                return Quantized(z, self.nearest(z)[..., None], z.sum() * 0, {})
            codes, ids, loss, report = self.learn(real)  # with no real latent: takes part in what processes share
            if mask is None:
                return Quantized(codes.reshape(z.shape), ids.reshape(*z.shape[:-1], 1), loss, report)
            indices = self.nearest(z)[..., None].masked_scatter(mask[..., None], ids[:, None])
            return Quantized(z.masked_scatter(mask[..., None], codes.to(z.dtype)), indices, loss, report)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices [..., 1] -> embeddings [..., D]."""
        return F.embedding(indices[..., 0], self.codebook)

    def expect(self, probabilities: list[Tensor]) -> Tensor:
        """Expected embedding [..., D] under a distribution over the codebook, [[..., V]]."""
        return probabilities[0] @ self.codebook.to(probabilities[0])


class VQ(VectorQuantizer):
    """Vector quantization whose codebook is a moving average of its latents (van den Oord et al. 2017,
    https://arxiv.org/abs/1711.00937, appendix A.1), started by k-means on the first batch.

    `cosine` compares unit vectors (Yu et al. 2021, https://arxiv.org/abs/2110.04627). The initialised flag and all
    averages are buffers: a resume never re-seeds the codebook. Trains through vector-quantize-pytorch; averages,
    k-means and re-seeding are over the latents of all processes. The report's perplexity is that of the averaged
    counts.

    forward: z [..., D] -> embeddings [..., D], indices [..., 1] in [0, V).
    """

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        if library is None:
            self.layer = _CodebookOnly(config.codebook_size, config.dim)
        else:
            self.layer = library.VectorQuantize(
                dim=config.dim,
                codebook_size=config.codebook_size,
                decay=config.ema_decay,
                kmeans_init=config.kmeans_init,
                threshold_ema_dead_code=config.dead_code_threshold,
                use_cosine_sim=self.unit,
                rotation_trick=False,  # gradients are routed here, alike for every class
            )

    @property
    def unit(self) -> bool:
        return self.config.cosine

    @property
    def codebook(self) -> Tensor:
        embed = self.layer._codebook.embed
        assert isinstance(embed, Tensor)
        return embed[0]

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if library is None:
            raise RuntimeError("training an EMA codebook needs vector-quantize-pytorch: pip install vtok")
        self._share()
        codebook: Any = self.layer._codebook
        with torch.no_grad():
            codebook.init_embed_(z.detach().float()[None])
            ids = self.chosen(z)
            codes = F.embedding(ids, self.codebook).to(z.dtype)
            self._move(z.detach().float(), ids)
            usage = codebook.cluster_size[0] / codebook.cluster_size.sum().clamp_min(1e-6)
            perplexity = (-(usage * usage.clamp_min(1e-12).log()).sum()).exp()
        loss = self.commitment * _mean_square(z - codes)
        return self.route(z, codes), ids, loss, {"perplexity": perplexity}

    def _move(self, z: Tensor, ids: Tensor) -> None:
        """One step of the moving averages towards latents [M, D] of codes [M], and of re-seeding.

        The library's own step multiplies by all one-hot vectors at once, int64 and float of M x V each. Here they come
        in chunks of M; a sum by index would do without them, but adds in another order each time on a GPU.
        """
        codebook: Any = self.layer._codebook
        size, total = self.codebook_sizes[0], torch.zeros_like(codebook.embed_avg[0])
        places = torch.arange(size, device=z.device)
        for some, its in zip(self._chunks(z), self._chunks(ids)):
            total += (its[:, None] == places).to(total.dtype).T @ some.to(total.dtype)
        counts = torch.bincount(ids, minlength=size).to(codebook.cluster_size.dtype)
        codebook.all_reduce_fn(counts)
        codebook.all_reduce_fn(total)
        codebook.cluster_size.lerp_(counts[None], 1 - self.config.ema_decay)
        codebook.embed_avg.lerp_(total[None], 1 - self.config.ema_decay)
        codebook.update_ema()
        codebook.expire_codes_(z[None])

    def _share(self) -> None:
        """Make processes share statistics, also where the model was built before they knew of one another: the library
        asks only at construction (and remembers a no)."""
        codebook: Any = self.layer._codebook
        if is_distributed() and not codebook.use_ddp:
            sample = library.vector_quantize_pytorch.sample_vectors_distributed
            codebook.use_ddp = True
            codebook.sample_fn = codebook.replace_sample_fn = sample
            codebook.all_reduce_fn = codebook.kmeans_all_reduce_fn = distributed.all_reduce


class GradientVQ(VectorQuantizer):
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
                "model.quantizer.ema_decay=0 trains the codebook by gradient, without k-means start or re-seeding: set "
                f"kmeans_init=false and dead_code_threshold=0 (have {config.kmeans_init}, {config.dead_code_threshold})"
            )
        bound = 1 / config.codebook_size
        rows = torch.empty(config.codebook_size, config.dim).uniform_(-bound, bound)
        # unit rows where only their direction counts: rows of 1 / codebook_size are smaller than a few steps of AdamW,
        # each of which would turn a code all the way onto its latent
        self.weight = nn.Parameter(F.normalize(rows, dim=-1) if self.unit else rows)

    @property
    def unit(self) -> bool:
        return self.config.cosine

    @property
    def codebook(self) -> Tensor:
        weight = as_float32(self.weight)
        return F.normalize(weight, dim=-1) if self.unit else weight

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        ids = self.chosen(z)
        codes = self.codes(ids).to(z.dtype)
        loss = _mean_square(codes - z.detach()) + self.commitment * _mean_square(z - codes.detach())
        return self.route(z, codes), ids, loss, {}

    def codes(self, ids: Tensor) -> Tensor:
        """Rows [..., D] of the codebook, with its gradient."""
        return F.embedding(ids, self.codebook)


class SimVQ(GradientVQ):
    """A frozen random codebook seen through one trained linear map, so that every code moves with every latent.

    Zhu et al. 2024, https://arxiv.org/abs/2411.02038; Euclidean. Names and ids are those of vector-quantize-pytorch's
    SimVQ, and so are loss and gradients (without its rotation trick, which is `rotation_trick` here). Our own class, as
    that one knows neither masks nor parameters in bfloat16.

    forward: z [..., D] -> embeddings [..., D], indices [..., 1] in [0, V).
    """

    frozen_codebook: Tensor

    def __init__(self, config: QuantizerConfig):
        VectorQuantizer.__init__(self, config)
        self.code_transform = nn.Linear(config.dim, config.dim, bias=False)
        self.register_buffer("frozen_codebook", torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)

    @property
    def unit(self) -> bool:
        return False

    @property
    def codebook(self) -> Tensor:
        return F.linear(as_float32(self.frozen_codebook), as_float32(self.code_transform.weight))

    def codes(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, as_float32(self.frozen_codebook))  # the map of these alone: M x D, not V x D
        return F.linear(rows, as_float32(self.code_transform.weight))


class IBQ(VectorQuantizer):
    """Index backpropagation: softmax(z E^T) over the whole codebook, its hardest id passed straight through, so that
    every code is trained at every step.

    Shi et al. 2024, https://arxiv.org/abs/2412.02692: ||z_q - z||^2 + ||sg(e) - z||^2 + commitment ||e - sg(z)||^2,
    with e the chosen row and z_q its straight-through form, and the entropy term of softmax(z E^T / temperature).
    Latents are cut into chunks whose softmax is computed again in the backward pass: memory is chunk x V, not M x V.

    The chosen code has the largest inner product, which need not be the nearest: a code's own vector may be encoded as
    another, longer one.

    forward: z [..., D] -> embeddings [..., D], indices [..., 1] in [0, V).
    """

    chunk_scores = 1 << 24  # softmax entries at once: 64 MB, four times that in the backward pass

    def __init__(self, config: QuantizerConfig):
        super().__init__(config)
        self.entropy_weight = EntropyWeight(config, 0.05)
        self.weight = nn.Parameter(torch.randn(config.codebook_size, config.dim) * config.dim**-0.5)

    @property
    def codebook(self) -> Tensor:
        return as_float32(self.weight)

    def score(self, z: Tensor, codebook: Tensor) -> Tensor:
        return z @ codebook.T

    def _soft(self, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[M, D] -> softmax(z E^T) sg(E) [M, D], ids [M], entropy summed over tokens, assignments [V] summed over them.

        The codebook's gradient through z_q is that of the logits here and of the chosen row in `learn`.
        """
        logits = z @ codebook.T
        soft = logits.softmax(-1) @ codebook.detach()
        if not self.entropy_weight.weight:
            return soft, logits.argmax(-1), z.new_zeros(()), z.new_zeros(1)
        log_p = (logits / self.config.entropy_temperature).log_softmax(-1)
        p = log_p.exp()
        return soft, logits.argmax(-1), -(p * log_p).sum(), p.sum(0)

    def learn(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        codebook = self.codebook.to(z.dtype)
        parts = []
        for chunk in z.split(max(1, self.chunk_scores // codebook.shape[0])):
            parts.append(checkpoint(self._soft, chunk, codebook, use_reentrant=False, preserve_rng_state=False))
        soft, ids = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        rows = F.embedding(ids, codebook)
        codes = rows + (soft - soft.detach())
        loss = _mean_square(codes - z) + _mean_square(rows.detach() - z)
        loss = loss + self.commitment * _mean_square(rows - z.detach())
        if not self.entropy_weight.weight:
            return codes, ids, loss, {}
        sample = torch.stack([part[2] for part in parts]).sum() / max(len(z), 1)
        mean = mean_over_tokens(torch.stack([part[3] for part in parts]).sum(0), len(z))
        batch = -(mean * mean.clamp_min(1e-12).log()).sum()
        loss = loss + self.entropy_weight() * (sample - batch)
        return codes, ids, loss, {"entropy_sample": sample.detach(), "entropy_batch": batch.detach()}
