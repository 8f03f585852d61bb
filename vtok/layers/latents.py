"""The space a flow decoder works in: latents of a frozen continuous tokenizer, or pixels themselves.

Letters: B clips, C channels, T frames, H height, W width, D channels of a latent, t, h, w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.layers.conv3d import ConvConfig, ConvDecoder, ConvEncoder
from vtok.layers.spacetime import SpaceTimeConfig, SpaceTimeDecoder, SpaceTimeEncoder

PARTS = ("encoder.", "decoder.", "to_latent.", "from_code.")  # of a `discrete` model's weights, those that are kept
# of a discrete model's configuration, where `facts` leave them out
DEFAULTS: dict[str, Any] = dict(
    channels=3, stride=[4, 8, 8], backbone="conv", conv={}, transformer={}, latent_channels=16, coarse=[], num_frames=17
)


class LatentSpace(nn.Module):
    """Latents [B, D, t, h, w] of mean 0 and variance 1 a channel, and back.

    Args:
        facts: configuration of a `discrete` model with quantizer.name=identity (plain values), whose weights come with
            `adopt`; None for pixels, whose only change is the scale.
    Nothing in it learns. The first latent frame is one frame, every later one `stride[0]` frames.
    """

    mean: Tensor
    std: Tensor
    fitted: Tensor

    def __init__(self, facts: dict[str, Any] | None, *, channels: int):
        super().__init__()
        self.stride = (1, 1, 1)
        self.dim = channels
        if facts is not None:
            self.stride, self.dim = self._build(facts, channels)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))
        self.register_buffer("fitted", torch.tensor(False))
        self.requires_grad_(False).eval()

    def _build(self, facts: dict[str, Any], channels: int) -> tuple[tuple[int, int, int], int]:
        facts = DEFAULTS | facts
        quantizer = {"kl": 0.0} | facts["quantizer"]
        if quantizer["name"] != "identity" or facts["coarse"]:
            raise ValueError(
                f"model.latents is a tokenizer with quantizer.name={quantizer['name']!r}, coarse={facts['coarse']}: a "
                "flow runs on continuous latents of one level, quantizer.name=identity (with kl or without)"
            )
        if facts["channels"] != channels:
            raise ValueError(f"model.latents codes {facts['channels']} channels, model.channels={channels}")
        t, h, w = facts["stride"]
        shape: dict[str, Any] = dict(channels=channels, latent_channels=facts["latent_channels"], stride=(t, h, w))
        if facts["backbone"] == "conv":
            config = ConvConfig(**facts["conv"])
            self.encoder, self.decoder = ConvEncoder(config, **shape), ConvDecoder(config, **shape)
        else:
            shape["num_frames"], config = facts["num_frames"], SpaceTimeConfig(**facts["transformer"])
            self.encoder, self.decoder = SpaceTimeEncoder(config, **shape), SpaceTimeDecoder(config, **shape)
        dim = quantizer["dim"]
        self.to_latent = nn.Linear(facts["latent_channels"], 2 * dim if quantizer["kl"] else dim)
        self.from_code = nn.Linear(dim, facts["latent_channels"])
        return (t, h, w), dim

    def adopt(self, source: nn.Module) -> None:
        """Take the weights of the tokenizer that `facts` describes."""
        own = {name for name in self.state_dict() if name.startswith(PARTS)}
        given = {name: value for name, value in source.state_dict().items() if name.startswith(PARTS)}
        if own != given.keys():
            raise ValueError(f"model.latents does not hold what its configuration says: {sorted(own ^ given.keys())}")
        self.load_state_dict({**self.state_dict(), **given})

    def train(self, mode: bool = True) -> LatentSpace:
        return super().train(False)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """float [B, C, T, H, W] in [-1, 1], T = 1 + st n, whole strides in space -> [B, D, t, h, w]."""
        latents = video
        if hasattr(self, "encoder"):
            latents = self.encoder(video.to(self.to_latent.weight.dtype), None)
            latents = self.to_latent(latents.movedim(1, -1))[..., : self.dim].movedim(-1, 1)
        return self.standardised(latents)

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents [B, D, t, h, w] of the tokenizer, at mean 0 and variance 1 a channel."""
        return (_wide(latents) - _channels(self.mean)) / _channels(self.std)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, D, t, h, w] -> [B, C, T, H, W], not clipped."""
        latents = _wide(latents) * _channels(self.std) + _channels(self.mean)
        if not hasattr(self, "decoder"):
            return latents
        codes = latents.movedim(1, -1).to(self.from_code.weight.dtype)
        return self.decoder(self.from_code(codes).movedim(-1, 1), None)

    @torch.no_grad()
    def fit(self, latents: Iterable[Tensor]) -> None:
        """Set mean and deviation of each channel from latents [B, D, t, h, w] as `encode` gave them before: once."""
        count, total, square = 0, torch.zeros(self.dim).double(), torch.zeros(self.dim).double()
        for each in latents:
            raw = each.double().transpose(0, 1).flatten(1).cpu()
            count, total, square = count + raw.shape[1], total + raw.sum(1), square + raw.square().sum(1)
        if count:
            mean = total / count
            self.mean.copy_(mean)
            self.std.copy_((square / count - mean.square()).clamp_min(1e-8).sqrt())
            self.fitted.fill_(True)


def _channels(value: Tensor) -> Tensor:
    return _wide(value)[:, None, None, None]


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
