"""Discrete video tokenizers on a grid: causal encoder, any quantizer, causal decoder; images and videos in one model.

    video --encoder--> latents [t, h, w] --quantizer--> ids --lookup--> codes --decoder--> video

A video of 1 + st n frames has 1 + n latent frames and an image is a video of one frame; other lengths are padded by
their last frame and trimmed. Both backbones are causal in time, so that a stream of any length is coded in constant
memory with the result of the whole. With `coarse` there are two levels of tokens: few coarse ones, and fine ones that
say what the coarse ones did not (as VQ-VAE-2, Razavi et al. 2019, https://arxiv.org/abs/1906.00446, did for images and
HiTVideo, Zhou et al. 2025, https://arxiv.org/abs/2503.11513, for video); the coarse level decodes alone too.

The presets say which paper each follows.

Letters: B clips, C channels, T frames, H height, W width, t, h, w latent frames, height and width, D width of a code,
Q ids a token, Z channels of the backbone's latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok import losses
from vtok.layers.causal import Cache, CausalConv3d, inflate_2d
from vtok.layers.conv3d import ConvDecoder, ConvEncoder
from vtok.layers.conv_blocks import Upsample
from vtok.layers.conv_plan import ConvConfig
from vtok.layers.grid import GridTokenizer
from vtok.layers.spacetime import SpaceTimeConfig, SpaceTimeDecoder, SpaceTimeEncoder
from vtok.layers.tiling import decode_tiled, encode_tiled
from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.types import Clip, LoadTokenizer, Loss, Quantized


@dataclass
class Config:
    name: str = "discrete"
    channels: int = 3  # of the video; of the dense map where the data hold one
    num_frames: int = 17  # of training clips; any length works
    size: list[int] = field(default_factory=lambda: [128, 128])  # (height, width) trained at; others work too
    stride: list[int] = field(default_factory=lambda: [4, 8, 8])  # frames, height and width a latent stands for
    backbone: str = "conv"  # conv (causal 3D convolution) | transformer (space-time, windows, causal attention)
    conv: ConvConfig = field(default_factory=ConvConfig)
    transformer: SpaceTimeConfig = field(default_factory=SpaceTimeConfig)
    latent_channels: int = 16  # between backbone and quantizer, which have a linear map on either side
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    tile: int = 0  # latents a side of a tile, by which larger frames are coded; 0 = whole frames (training sees those)
    tile_overlap: int = 4  # latents that neighbouring tiles share and blend
    coarse: list[int] = field(
        default_factory=list
    )  # (t, h, w) of the coarse level in latents, e.g. [2, 2, 2]; [] = none

    def __post_init__(self) -> None:
        self.size, self.stride, self.coarse = list(self.size), list(self.stride), list(self.coarse)
        if self.backbone not in ("conv", "transformer"):
            raise ValueError(f"model.backbone={self.backbone!r} is unknown; choose conv or transformer")
        if len(self.size) != 2 or len(self.stride) != 3 or min(*self.size, *self.stride) < 1:
            raise ValueError(f"model.size={self.size} must be (height, width), model.stride={self.stride} (t, h, w)")
        if self.coarse and (len(self.coarse) != 3 or any(n not in (1, 2) for n in self.coarse)):
            raise ValueError(f"model.coarse={self.coarse} must be (t, h, w) of 1 or 2 latents each, or []")
        if self.tile and not 0 <= 2 * self.tile_overlap <= self.tile:
            raise ValueError(
                f"model.tile_overlap={self.tile_overlap} must lie between 0 and half of model.tile={self.tile}"
            )
        if self.coarse == [1, 1, 1]:
            raise ValueError("model.coarse=[1, 1, 1] is no coarser than the fine level; leave it [] for one level")
        span = self.stride[0] * (self.coarse[0] if self.coarse else 1)
        if self.num_frames < 1 or (self.num_frames - 1) % span:
            near = 1 + round((self.num_frames - 1) / span) * span
            raise ValueError(
                f"model.num_frames={self.num_frames} must be 1 + a multiple of {span} (stride x coarse in time): "
                f"{near} is near"
            )


@dataclass
class Output:
    """What one training pass makes."""

    recon: Tensor  # [B, C, T, H, W]
    quantized: list[Quantized]  # of each level: embeddings [B, t, h, w, D]
    valid: list[Tensor]  # of each level: [B, t] bool, latent frames that are not padding


class Model(GridTokenizer):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms (`vtok.layers.grid`)."""

    def __init__(self, config: Config):
        c, quantizer = config, build_quantizer(config.quantizer)
        levels = [(c.coarse[0], c.coarse[1], c.coarse[2])] if c.coarse else []
        super().__init__(
            channels=c.channels,
            stride=(c.stride[0], c.stride[1], c.stride[2]),
            levels=(*levels, (1, 1, 1)),
            num_frames=c.num_frames,
            size=(c.size[0], c.size[1]),
            embedding_dim=quantizer.dim,
            codebook_sizes=quantizer.codebook_sizes,
            index_factors=quantizer.index_factors,
        )
        self.config = c
        self._fit = True  # the maps beside the quantizer wait for `fit_statistics`
        self._sources: list[Model] = []  # a continuous model to follow there; in a list, it is no part of this one
        shape: dict[str, Any] = dict(channels=c.channels, latent_channels=c.latent_channels, stride=self.stride)
        if c.backbone == "conv":
            self.encoder, self.decoder = ConvEncoder(c.conv, **shape), ConvDecoder(c.conv, **shape)
        else:
            shape["num_frames"] = c.num_frames
            self.encoder = SpaceTimeEncoder(c.transformer, **shape)
            self.decoder = SpaceTimeDecoder(c.transformer, **shape)
        self.quantizer = quantizer  # one for both levels, so that an id means one embedding
        self.to_latent = nn.Linear(c.latent_channels, quantizer.latent_dim)
        self.from_code = nn.Linear(quantizer.dim, c.latent_channels)
        if c.coarse:
            factor, width = self.level_strides[0], c.latent_channels
            self.coarsen = CausalConv3d(width, width, stride=factor, skip="add")
            self.refine = Upsample(width, (3, 3, 3), factor=factor, kind="residual", padding="replicate")
            self.to_coarse_latent = nn.Linear(c.latent_channels, quantizer.latent_dim)
            self.from_coarse_code = nn.Linear(quantizer.dim, c.latent_channels)
            self.dropped = nn.Parameter(torch.zeros(c.latent_channels))  # stands in for fine tokens that were cut

    def forward(self, video: Tensor, lengths: Tensor, *, coarse_only: Tensor | None = None) -> Output:
        """One training pass. video: float [B, C, T, H, W] in [-1, 1]. coarse_only: [B] bool, decoded without the fine
        level (two levels only).

        Raises: ValueError after a warm start from a continuous model without `fit_statistics`.
        """
        if self._sources:
            raise ValueError(
                "init_from is a continuous model, and the maps into ids were not fitted: set trainer.statistics_clips "
                "above 0 (256 by default)"
            )
        whole = self.whole_groups(video, lengths)
        groups = self.groups(lengths)
        valid = torch.arange(int(groups.max()), device=video.device) < groups[:, None]
        coded = self.code_grid(whole, valid, None)
        keep = [torch.ones(code.embeddings.shape[:4], dtype=torch.bool, device=video.device) for code in coded]
        if coarse_only is not None:
            keep[-1] = keep[-1] & ~coarse_only[:, None, None, None]
        recon = self.decode_grid([code.embeddings for code in coded], keep, None)
        recon = recon[:, :, : video.shape[2], : video.shape[3], : video.shape[4]]
        return Output(recon, coded, [self._of_latents(valid, k.shape[1]) for k in keep])

    def code_grid(self, video: Tensor, valid: Tensor, cache: Cache | None) -> list[Quantized]:
        latents = self._encode(video, cache)
        out = []
        if self.config.coarse:
            out.append(self._quantize(self.to_coarse_latent, self.coarsen(latents, cache), valid))
            latents = latents - self.refine(self._read(self.from_coarse_code, out[0].embeddings), cache)
        return [*out, self._quantize(self.to_latent, latents, valid)]

    def decode_grid(self, codes: list[Tensor], keep: list[Tensor], cache: Cache | None) -> Tensor:
        latents = self._read(self.from_code, codes[-1])
        if self.config.coarse:
            latents = torch.where(keep[-1][:, None], latents, self.dropped[:, None, None, None])
            latents = latents + self.refine(self._read(self.from_coarse_code, codes[0]), cache)
        tiles = self._tiles(cache)
        if tiles is None:
            return self.decoder(latents, cache)
        return decode_tiled(self.decoder, latents, stride=self.stride[1:], **tiles)

    def _encode(self, video: Tensor, cache: Cache | None) -> Tensor:
        tiles = self._tiles(cache)
        if tiles is None:
            return self.encoder(video, cache)
        return encode_tiled(self.encoder, video, stride=self.stride[1:], **tiles)

    def _tiles(self, cache: Cache | None) -> dict[str, Any] | None:
        """How frames are cut, with a cache for each tile; None for whole frames."""
        if self.training or not self.config.tile:
            return None
        caches = None if cache is None else cache.setdefault(self, {})
        return dict(tile=self.config.tile, overlap=self.config.tile_overlap, caches=caches)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.quantizer.lookup(indices)

    # ---- before training -------------------------------------------------------------------------------------------

    def warm_start(self, source: nn.Module) -> str:
        """Begin with the weights of `source`; returns what was done, for the log.

        Of the same architecture: all weights; where the source saw images only, the space-time transformer's branch of
        later frames begins as that of the first one. A continuous tokenizer (`quantizer.name: identity`) of the same
        backbone: all but the maps beside the quantizer, which `fit_statistics` then sets so that ids begin where the
        continuous latents were (OneVAE, 2025, https://arxiv.org/abs/2508.09857, starts FSQ from a continuous tokenizer;
        the least squares are ours). An image model of convolutions (`conv.temporal_kernel: 1`): those
        become the last slices in time of ours (`vtok.layers.causal.inflate_2d`).
        Raises: ValueError for any other source.
        """
        if not isinstance(source, Model):
            raise ValueError(
                f"init_from is a {type(source).__module__} model; a discrete one starts from a discrete one"
            )
        own, theirs = self.config, source.config
        state = source.state_dict()
        if own.backbone == theirs.backbone == "conv" and theirs.conv.temporal_kernel < own.conv.temporal_kernel:
            inflate_2d(state, self)
            self._fit = False
            return "the weights of the image model, inflated"
        insert = theirs.quantizer.name == "identity" and own.quantizer.name not in ("identity", "dimwise")
        maps = ("to_latent.", "from_code.", "to_coarse_latent.", "from_coarse_code.", "quantizer.") if insert else ()
        given, wanted = ({k: v for k, v in s.items() if not k.startswith(maps)} for s in (state, self.state_dict()))
        wrong = sorted(given.keys() ^ wanted.keys()) or [k for k in given if given[k].shape != wanted[k].shape]
        if wrong:
            raise ValueError(
                f"init_from does not fit model.*: {len(wrong)} tensors differ, such as {', '.join(wrong[:4])}. "
                "The keys of the backbone must be the source's; only the quantizer may change, from identity to one "
                "with ids"
            )
        self.load_state_dict(given, strict=False)
        if insert:
            self._sources = [source]
            return "backbone of the continuous source; the maps beside the quantizer follow from training clips"
        self._fit = False
        if theirs.num_frames == 1 < own.num_frames and isinstance(self.encoder, SpaceTimeEncoder):
            assert isinstance(self.decoder, SpaceTimeDecoder)
            self.encoder.inflate()
            self.decoder.inflate()
            return "all weights of the source; later frames begin as the first one"
        return "all weights of the source"

    @torch.no_grad()
    def fit_statistics(self, videos: Iterable[Tensor], *, count: int = 1 << 14) -> dict[str, float]:
        """Set the maps beside the quantizer from training clips, before the first step.

        Into it: the principal components of what the decoder would read without it (the encoder's latents; after a warm
        start, what the continuous source's decoder reads), each of unit variance, so that a bounded or binary quantizer
        uses its levels evenly from the start. Back: the least-squares map from codes to the same.
        videos: float [B, C, T, H, W] in [-1, 1]. count: latents to look at, after which no more videos are read.
        Returns: `explained`, the share of the variance that the codes of each level tell; nothing where weights came
            with maps of their own.
        """
        if not self._fit:
            return {}
        self._fit = False
        training = self.training
        self.eval()
        latents, seen = [], 0
        for video in videos:
            lengths = torch.full((len(video),), video.shape[2])
            latents.append(self.encoder(self.whole_groups(video, lengths), None))
            seen += latents[-1][:, 0].numel()
            if seen >= count:
                break
        found = {}
        if self.config.coarse:
            coarse = [self.coarsen(z, None) for z in latents]
            maps = self.to_coarse_latent, self.from_coarse_code
            found["explained_coarse"] = self._begin_maps(coarse, maps, ("to_coarse_latent", "from_coarse_code"))
            codes = [self.quantizer(maps[0](z.movedim(1, -1)), None).embeddings for z in coarse]
            latents = [z - self.refine(self._read(maps[1], code), None) for z, code in zip(latents, codes)]
        found["explained"] = self._begin_maps(latents, (self.to_latent, self.from_code), ("to_latent", "from_code"))
        self._sources.clear()
        self.train(training)
        return found

    def _begin_maps(self, latents: list[Tensor], maps: tuple[nn.Linear, nn.Linear], names: tuple[str, str]) -> float:
        into, back = maps
        z = torch.cat([each.movedim(1, -1).flatten(0, -2) for each in latents]).double()  # [N, Z]
        matrix, shift = torch.eye(z.shape[1], dtype=z.dtype), z.new_zeros(z.shape[1])
        if self._sources:
            source = self._sources[0]
            first, second = (getattr(source, name) for name in names)
            mean, width = first.weight.double(), source.quantizer.dim  # rows past the mean's are of the variance
            matrix = second.weight.double() @ mean[:width]
            shift = second.weight.double() @ first.bias.double()[:width] + second.bias.double()
        wanted = z @ matrix.T + shift
        centre = wanted.mean(0)
        _, singular, axes = torch.linalg.svd(wanted - centre, full_matrices=False)
        scale = singular / len(z) ** 0.5
        rank = max(int((scale > 1e-4 * scale[0]).sum()), 1)
        project = axes[:rank] / scale[:rank, None].clamp_min(1e-8)  # [rank, Z], to unit variance
        dim = self.quantizer.dim if self.config.quantizer.name == "identity" else self.quantizer.latent_dim
        if dim > rank:  # mixtures of all components
            mix = F.normalize(torch.randn(dim - rank, rank, dtype=z.dtype), dim=-1)
            project = torch.cat([project, mix @ project])
        project = project[:dim]
        weight, bias = torch.zeros_like(into.weight), torch.zeros_like(into.bias)
        weight[:dim], bias[:dim] = (project @ matrix).float(), (project @ (shift - centre)).float()
        bias[dim:] = -4.0  # of a variance, where there is one: latents begin with little noise
        into.weight.copy_(weight)
        into.bias.copy_(bias)
        inputs = into(z.to(weight.dtype))
        self.quantizer.train()(inputs, None)  # a codebook starts from its first batch
        codes = self.quantizer.eval()(inputs, None).embeddings.double()
        one = torch.cat([codes, codes.new_ones(len(codes), 1)], 1)
        solution = torch.linalg.lstsq(one, wanted, driver="gelsd").solution  # [D + 1, Z]
        back.weight.copy_(solution[:-1].T)
        back.bias.copy_(solution[-1])
        return float(1 - (wanted - one @ solution).square().mean() / (wanted - centre).square().mean())

    def _quantize(self, project: nn.Linear, latents: Tensor, valid: Tensor) -> Quantized:
        """latents [B, Z, t, h, w], valid [B, G] -> codes [B, t, h, w, D]; padding moves no codebook."""
        mask = None
        if self.training and not bool(valid.all()):
            mask = self._of_latents(valid, latents.shape[2])[:, :, None, None].expand(-1, -1, *latents.shape[3:])
        return self.quantizer(project(latents.movedim(1, -1)), mask)

    @staticmethod
    def _read(project: nn.Linear, codes: Tensor) -> Tensor:
        """codes [B, t, h, w, D] -> latents [B, Z, t, h, w]."""
        return project(codes.to(project.weight.dtype)).movedim(-1, 1)

    @staticmethod
    def _of_latents(valid: Tensor, frames: int) -> Tensor:
        """[B, G] bool of groups -> [B, t] of the latent frames in them (the first group of a video has one)."""
        groups = valid.shape[1]
        each = -(-(frames - 1) // max(groups - 1, 1)) if frames % groups else frames // groups
        counts = torch.full((groups,), each, device=valid.device)
        counts[0] = frames - (groups - 1) * each
        return valid.repeat_interleave(counts, 1)


@dataclass
class ObjectiveConfig(losses.PixelConfig):
    coarse_only: float = 0.0  # two levels: share of clips that are decoded from the coarse level alone


class Objective(losses.PixelObjective):
    """What stays in the lab: losses, perceptual net, discriminator."""

    Config = ObjectiveConfig
    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, model_config: Config, *, load: LoadTokenizer | None = None):
        c, m = config, model_config
        if c.coarse_only and not m.coarse:
            raise ValueError(f"objective.coarse_only={c.coarse_only} needs two levels: set model.coarse")
        if not 0 <= c.coarse_only < 1:
            raise ValueError(f"objective.coarse_only={c.coarse_only} is a share of the clips, in [0, 1)")
        super().__init__(c, channels=m.channels, frames=m.num_frames, size=(m.size[0], m.size[1]))

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        c = self.config
        assert clip.video is not None and clip.video.is_floating_point()
        video, lengths = clip.video, clip.frames()
        mask = None if clip.lengths is None else losses.frame_mask(lengths, video.shape[2])
        drop = torch.rand(len(clip), device=video.device) < c.coarse_only if c.coarse_only else None
        out = model(video, lengths, coarse_only=drop)
        own = torch.stack([level.loss for level in out.quantized]).mean()
        report = {f"quantizer_{k}": v for k, v in out.quantized[-1].report.items()}
        report["quantizer"] = own.detach()
        ids = [level.indices for level in out.quantized if level.indices is not None]
        if ids:
            real = [v[..., None, None].expand(i.shape[:-1]).flatten(1) for v, i in zip(out.valid, ids)]
            flat = torch.cat([i.flatten(1, 3) for i in ids], 1)
            report |= losses.codebook_report(flat, model.codebook_sizes, mask=torch.cat(real, 1))
        term, terms = self.pixels(out.recon, video, mask=mask, step=step, last=model.decoder.last)
        total = c.quantizer * own + term
        return Loss(total, {"loss": total.detach(), **report, **terms})
