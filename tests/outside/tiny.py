"""A family outside the package, small enough for every test of training: a linear tokenizer with nested tokens.

It has what real families have: nested dropout, a discriminator in one backward, a frozen net, a running buffer,
statistics fitted before step 0, and (for tests of failure) steps whose loss is not finite.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vtok.types import Clip, Loss, Tokens


@dataclass
class Config:
    name: str = "outside.tiny"
    num_frames: int = 4
    size: int = 16
    num_tokens: int = 8
    dim: int = 4


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding_dim, self.max_tokens, self.codebook_sizes = config.dim, config.num_tokens, (5,) * config.dim
        values = 3 * config.num_frames * config.size**2
        self.inward = nn.Linear(values, config.num_tokens * config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.outward = nn.Linear(config.num_tokens * config.dim, values)
        self.registers = nn.Parameter(torch.zeros(config.num_tokens, config.dim))
        self.register_buffer("seen", torch.ones(4))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))

    def fit_statistics(self, videos: Iterable[Tensor]) -> dict:
        whole = torch.cat([v.flatten(1) for v in videos])
        with torch.no_grad():
            self.outward.bias.copy_(whole.mean(0))
        self.fitted += len(whole)
        return {"clips": len(whole)}

    def quantize(self, clip: Clip) -> Tensor:
        z = self.inward(clip.video.flatten(1)).unflatten(1, (self.config.num_tokens, -1))
        z = torch.tanh(self.norm(z) + self.registers) * 2
        return z + (z.float().round().to(z.dtype) - z).detach()  # [B, K, D]

    def encode(self, clip: Clip, *, budget: int | None = None) -> Tokens:
        z = self.quantize(clip)
        batch, count = z.shape[:2]
        rank = torch.arange(count, device=z.device).expand(batch, count)
        tokens = Tokens(
            embeddings=z,
            lengths=torch.full((batch,), count, device=z.device),
            positions=torch.full((batch, count, 3), torch.nan, device=z.device),
            group=torch.zeros_like(rank),
            rank=rank,
            indices=(z.float().round() + 2).long(),
            codebook_sizes=self.codebook_sizes,
        )
        return tokens if budget is None else tokens.truncate(budget)

    def expand(self, z: Tensor) -> Tensor:
        shape = (3, self.config.num_frames, self.config.size, self.config.size)
        return self.outward(z.flatten(1)).unflatten(1, shape)

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        z = tokens.embeddings * tokens.mask[..., None]
        return self.expand(nn.functional.pad(z, (0, 0, 0, self.config.num_tokens - z.shape[1])))


class Objective(nn.Module):
    @dataclass
    class Config:
        adversarial: float = 0.1
        start: int = 4  # the discriminator is idle before this step
        not_finite_at: list[int] = field(default_factory=list)  # steps whose loss is NaN
        not_finite_rank: int = 0
        slow_s: float = 0.0  # seconds a step takes longer

    def __init__(self, config: Config, model_config: Config, *, load=None) -> None:
        super().__init__()
        self.config = config
        self.discriminator = nn.Sequential(nn.Conv3d(3, 4, 4, 4), nn.GELU(), nn.Conv3d(4, 1, 1))
        self.frozen = nn.Conv3d(3, 4, (1, 4, 4), (1, 4, 4)).requires_grad_(False)

    def idle(self, step: int) -> tuple[str, ...]:
        return ("discriminator",) if step < self.config.start else ()

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        z = model.quantize(clip)
        keep = torch.randint(1, model.max_tokens + 1, (len(clip), 1))  # CPU generator, set anew for every step
        z = z * (torch.arange(model.max_tokens) < keep).to(z.device)[..., None]
        video = model.expand(z)
        if model.training:
            model.seen.add_(0.001)
        reconstruction = (video - clip.video).abs().mean()
        perceptual = (self.frozen(video) - self.frozen(clip.video)).square().mean()
        total = reconstruction + 0.1 * perceptual
        report = {"l1": reconstruction.detach(), "tokens": keep.float().mean()}
        if step >= self.config.start:
            self.discriminator.requires_grad_(False)
            generator = -self.discriminator(video).mean()
            self.discriminator.requires_grad_(True)
            real, fake = self.discriminator(clip.video), self.discriminator(video.detach())
            critic = (nn.functional.relu(1 - real) + nn.functional.relu(1 + fake)).mean() / 2
            total = total + self.config.adversarial * generator + critic
            report |= {"generator": generator.detach(), "critic": critic.detach()}
        if self.config.slow_s:
            import time

            time.sleep(self.config.slow_s)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if model.training and step in self.config.not_finite_at and rank == self.config.not_finite_rank:
            total = total * torch.nan
        return Loss(total, report)
