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
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok import losses
from vtok.layers.begin_conv import begin_with_mean
from vtok.layers.causal import Cache, CausalConv3d, inflate_2d
from vtok.layers.code_maps import fit_code_maps
from vtok.layers.conv3d import ConvDecoder, ConvEncoder
from vtok.layers.conv_blocks import Upsample
from vtok.layers.conv_plan import ConvConfig
from vtok.layers.grid import GridTokenizer
from vtok.layers.spacetime import SpaceTimeConfig, SpaceTimeDecoder, SpaceTimeEncoder
from vtok.layers.stream import pixels_of
from vtok.layers.taking import check_fit
from vtok.layers.tiling import decode_tiled, encode_tiled
from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.types import Clip, LoadTokenizer, Loss, Quantized

CONTINUOUS = ("identity", "dimwise")  # quantizers behind which the latents of a continuous model stay what they are


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
        for key in ("channels", "latent_channels"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more, such as {getattr(Config, key)}")
        if self.backbone not in ("conv", "transformer"):
            raise ValueError(f"model.backbone={self.backbone!r} is unknown; choose conv or transformer")
        if len(self.size) != 2 or len(self.stride) != 3 or min(*self.size, *self.stride) < 1:
            raise ValueError(f"model.size={self.size} must be (height, width), model.stride={self.stride} (t, h, w)")
        if self.coarse and (len(self.coarse) != 3 or any(n not in (1, 2) for n in self.coarse)):
            raise ValueError(f"model.coarse={self.coarse} must be (t, h, w) of 1 or 2 latents each, or []")
        if self.tile < 0:
            raise ValueError(f"model.tile={self.tile} must be 0 (whole frames) or latents a side of a tile")
        if self.tile and not 0 <= 2 * self.tile_overlap <= self.tile:
            raise ValueError(
                f"model.tile_overlap={self.tile_overlap} must lie between 0 and half of model.tile={self.tile}"
            )
        self._check_read()
        if self.coarse == [1, 1, 1]:
            raise ValueError("model.coarse=[1, 1, 1] is no coarser than the fine level; leave it [] for one level")
        if self.first_fine and (self.coarse or self.tile):
            raise ValueError(
                f"model.conv.first_fine=true is for whole frames and one level: leave out model.coarse={self.coarse} "
                f"and model.tile={self.tile}"
            )
        span = self.stride[0] * (self.coarse[0] if self.coarse else 1)
        if self.num_frames < 1 or (self.num_frames - 1) % span:
            near = 1 + round((self.num_frames - 1) / span) * span
            raise ValueError(
                f"model.num_frames={self.num_frames} must be 1 + a multiple of {span} (stride x coarse in time): "
                f"{near} is near"
            )

    def _check_read(self) -> None:
        """Raises: ValueError for a key that was changed and that nothing reads."""
        other, values = ("transformer", self.transformer) if self.backbone == "conv" else ("conv", self.conv)
        default = type(values)()
        for key in (f.name for f in fields(values)):
            if getattr(values, key) != getattr(default, key):
                raise ValueError(
                    f"model.{other}.{key}={getattr(values, key)} does not apply to model.backbone={self.backbone}: "
                    f"leave it out, or set model.backbone={other}"
                )
        if not self.tile and self.tile_overlap != Config.tile_overlap:
            raise ValueError(
                f"model.tile_overlap={self.tile_overlap} does not apply to whole frames (model.tile=0): leave it out, "
                "or set model.tile"
            )

    @property
    def first_fine(self) -> bool:
        """Whether the first frame has a grid of its own."""
        return self.backbone == "conv" and self.conv.first_fine


@dataclass
class Output:
    """What one training pass makes."""

    recon: Tensor  # [B, C, T, H, W]
    quantized: list[Quantized]  # of each level: embeddings [B, t, h, w, D]
    valid: list[Tensor]  # of each level: [B, t] bool, latent frames that are not padding


Latents = tuple[Tensor, ...]  # what the decoder reads: one grid [B, Z, t, h, w], or the first frame's and the others'


class Model(GridTokenizer):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms (`vtok.layers.grid`)."""

    def __init__(self, config: Config):
        c, quantizer = config, build_quantizer(config.quantizer)
        stride = finest = (c.stride[0], c.stride[1], c.stride[2])
        levels = [(c.coarse[0], c.coarse[1], c.coarse[2]), (1, 1, 1)] if c.coarse else [(1, 1, 1)]
        if c.first_fine:
            finest, levels = (stride[0], stride[1] // 2, stride[2] // 2), [(1, 1, 1), (1, 2, 2)]
        super().__init__(
            channels=c.channels,
            stride=finest,
            levels=tuple(levels),
            first_apart=c.first_fine,
            num_frames=c.num_frames,
            size=(c.size[0], c.size[1]),
            embedding_dim=quantizer.dim,
            codebook_sizes=quantizer.codebook_sizes,
            index_factors=quantizer.index_factors,
        )
        self.config = c
        self._fit = True  # the maps beside the quantizer wait for `fit_statistics`
        self._wait = False  # and have to: the backbone is that of a model with other maps, or none
        self._sources: list[Model] = []  # that one, where it is to be followed; in a list, it is no part of this one
        shape: dict[str, Any] = dict(channels=c.channels, latent_channels=c.latent_channels, stride=stride)
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
            self.coarsen.begin_as_identity()  # the mean of what it stands for
            self.refine.begin_as_identity()  # the nearest neighbour
            self.dropped = nn.Parameter(torch.zeros(c.latent_channels))  # stands in for fine tokens that were cut

    def forward(
        self,
        video: Tensor,
        lengths: Tensor,
        *,
        coarse_only: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Output:
        """One training pass. video: float [B, C, T, H, W] in [-1, 1]. coarse_only: [B] bool, decoded without the fine
        level (two levels only). continuous: [B] bool, decoded from the latents before the quantizer.

        Raises: ValueError after a warm start with another quantizer than the source's, without `fit_statistics`.
        """
        if self._wait:
            raise ValueError(
                "init_from has another quantizer, and the maps beside model.quantizer were not fitted: set "
                "trainer.statistics_clips above 0 (256 by default)"
            )
        whole = self.whole_groups(video, lengths)
        groups = self.groups(lengths)
        valid = torch.arange(int(groups.max()), device=video.device) < groups[:, None]
        latents = self._encode(whole, None)
        coded = self._code_latents(latents, valid, None)
        keep = [torch.ones(code.embeddings.shape[:4], dtype=torch.bool, device=video.device) for code in coded]
        if coarse_only is not None:
            keep[-1] = keep[-1] & ~coarse_only[:, None, None, None]
        read = self._read_codes([code.embeddings for code in coded], keep, None)
        if continuous is not None:
            read = tuple(torch.where(continuous[:, None, None, None, None], *pair) for pair in zip(latents, read))
        recon = self._pixels(read, None)
        recon = recon[:, :, : video.shape[2], : video.shape[3], : video.shape[4]]
        real = [self._of_latents(v, k.shape[1]) for v, k in zip(self._valid(valid, latents), keep)]
        return Output(recon, coded, real)

    def code_grid(self, video: Tensor, valid: Tensor, cache: Cache | None) -> list[Quantized]:
        return self._code_latents(self._encode(video, cache), valid, cache)

    def _code_latents(self, latents: Latents, valid: Tensor, cache: Cache | None) -> list[Quantized]:
        """latents: of the encoder. valid: [B, G] bool, groups that are not padding."""
        out, rest = [], latents
        if self.config.coarse:
            (whole,) = latents
            out.append(self._quantize(self.to_coarse_latent, self.coarsen(whole, cache), valid))
            told = self.refine(self._read(self.from_coarse_code, out[0].embeddings), cache)
            # detached, as in residual quantization: else what a coarse code should change is asked of the fine one only
            rest = (whole - told.detach(),)
        of_each = self._valid(valid, latents)
        return [*out, *(self._quantize(self.to_latent, z, v) for z, v in zip(rest, of_each[-len(rest) :]))]

    def _valid(self, valid: Tensor, latents: Latents) -> list[Tensor]:
        """The groups [B, G] that each level has latent frames of."""
        if not self.first_apart:
            return [valid] * len(self.level_strides)
        begun = latents[0].shape[2]
        return [valid[:, :begun], valid[:, begun:]]

    def decode_grid(self, codes: list[Tensor], keep: list[Tensor], cache: Cache | None) -> Tensor:
        return self._pixels(self._read_codes(codes, keep, cache), cache)

    def _read_codes(self, codes: list[Tensor], keep: list[Tensor], cache: Cache | None) -> Latents:
        if self.first_apart:
            return tuple(self._read(self.from_code, each) for each in codes)
        latents = self._read(self.from_code, codes[-1])
        if self.config.coarse:
            latents = torch.where(keep[-1][:, None], latents, self.dropped[:, None, None, None])
            latents = latents + self.refine(self._read(self.from_coarse_code, codes[0]), cache)
        return (latents,)

    def _pixels(self, latents: Latents, cache: Cache | None) -> Tensor:
        tiles = self._tiles(cache)
        if tiles is None:
            return self.decoder(latents[0] if len(latents) == 1 else latents, cache)
        return decode_tiled(self.decoder, latents[0], stride=self.stride[1:], **tiles)

    def _encode(self, video: Tensor, cache: Cache | None) -> Latents:
        tiles = self._tiles(cache)
        if tiles is None:
            latents = self.encoder(video, cache)
            return (latents,) if isinstance(latents, Tensor) else latents
        return (encode_tiled(self.encoder, video, stride=self.stride[1:], **tiles),)

    def latents(self, clip: Clip) -> Latents:
        """The continuous latents of clips of one length: [B, Z, t, h, w] that the decoder reads in place of ids, with
        `conv.first_fine` the first frame's and the others'. Of use where it learned to (`objective.continuous`)."""
        video, lengths = pixels_of(self, clip), clip.frames()
        if bool((lengths != video.shape[2]).any()):
            raise ValueError(f"clips of {lengths.tolist()} frames have latents of different lengths: take one length")
        return self._encode(self.whole_groups(video, lengths), None)

    def decode_latents(self, latents: Latents, *, frames: int, size: tuple[int, int]) -> Tensor:
        """`latents` as video [B, C, frames, H, W] in [-1, 1] of (H, W) = size."""
        return self._pixels(latents, None)[:, :, :frames, : size[0], : size[1]].clamp(-1, 1)

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
        if self._inflates(source):
            begun = inflate_2d(state, self)
            self._fit = False
            return f"the weights of the image model, inflated; {len(begun)} tensors of time alone begin as identity"
        insert = self.inserts_ids(source)
        maps = (*(f"{name}." for names in self._levels() for name in names), "quantizer.") if insert else ()
        given, wanted = ({k: v for k, v in s.items() if not k.startswith(maps)} for s in (state, self.state_dict()))
        check_fit(wanted, given)
        self.load_state_dict(given, strict=False)
        if insert:
            self._wait = True
            if own.coarse:
                self._sources = [source]
            else:
                self._fold(source)
            names = ", ".join(
                f"model.{name[:-1]}" for name in maps if any(k.startswith(name) for k in self.state_dict())
            )
            return f"backbone of the continuous source; new, and fitted to training clips: {names}"
        self._fit = False
        if theirs.num_frames == 1 < own.num_frames and isinstance(self.encoder, SpaceTimeEncoder):
            assert isinstance(self.decoder, SpaceTimeDecoder)
            self.encoder.inflate()
            self.decoder.inflate()
            return "all weights of the source; later frames begin as the first one"
        return "all weights of the source"

    def inserts_ids(self, source: nn.Module) -> bool:
        """Whether `warm_start` puts ids behind the latents of `source`, a continuous model of any width."""
        if not isinstance(source, Model) or self._inflates(source):
            return False
        return source.config.quantizer.name == "identity" and self.config.quantizer.name not in CONTINUOUS

    def _inflates(self, source: Model) -> bool:
        own, theirs = self.config, source.config
        return own.backbone == theirs.backbone == "conv" and theirs.conv.temporal_kernel < own.conv.temporal_kernel

    def _levels(self) -> list[tuple[str, str]]:
        """Names of the maps into the quantizer and back, of each level."""
        coarse = [("to_coarse_latent", "from_coarse_code")] if self.config.coarse else []
        return [*coarse, ("to_latent", "from_code")]

    def go_on_as(self, other: Model) -> str:
        """What `warm_start` settled for `other` beside its weights holds here too (`vtok.training.init_from`).

        Maps beside another quantizer than that of `other` wait for `fit_statistics`, which sets them so that the
        decoder goes on reading what it read there; returns which these are, for the log.
        """
        self._fit, self._wait, self._sources = other._fit, other._wait, other._sources
        names = [name for level in self._levels() for name in level]
        if self._codes_alike(other) and all(
            getattr(self, name).weight.shape == getattr(other, name).weight.shape for name in names
        ):
            return ""
        self._fit = self._wait = True
        self._sources = [other.eval()]
        return f"; fitted to training clips: {', '.join(f'model.{name}' for name in names)}"

    def _codes_alike(self, other: Model) -> bool:
        """Whether codes of one width lie where those of `other` do: one grid, finer or coarser, or one codebook."""
        own, theirs = (model.config.quantizer.name for model in (self, other))
        if own in CONTINUOUS or own in ("fsq", "rfsq"):
            return theirs == own or {own, theirs} <= set(CONTINUOUS)
        return own == theirs and self.codebook_sizes == other.codebook_sizes

    def statistics_taken(self) -> None:
        """The tensors are of a process whose model was through `fit_statistics`: this one waits for it no more."""
        self._fit = self._wait = False
        self._sources.clear()

    @torch.no_grad()
    def _fold(self, source: Model) -> None:
        """Give the encoder the maps beside the quantizer of the continuous `source`: its latents are then what that
        model's decoder reads, with ids between or without."""
        matrix, shift = source._maps("to_latent", "from_code")
        encoder: Any = self.encoder
        last: Any = encoder.conv_out[-1] if self.config.backbone == "conv" else encoder.latent
        weight, bias = last.weight.double(), last.bias.double()
        last.weight.copy_((matrix @ weight.flatten(1)).view_as(weight))
        last.bias.copy_(matrix @ bias + shift)

    def _maps(self, *names: str) -> tuple[Tensor, Tensor]:
        """The affine map of latents by which a continuous model's decoder reads them: float64 [Z, Z] and [Z]."""
        first, second = (getattr(self, name) for name in names)
        mean, width = first.weight.double(), self.quantizer.dim  # rows past the mean's are of the variance
        matrix = second.weight.double() @ mean[:width]
        return matrix, second.weight.double() @ first.bias.double()[:width] + second.bias.double()

    @torch.no_grad()
    def fit_statistics(self, videos: Iterable[Tensor], *, count: int = 1 << 14) -> dict[str, float]:
        """Set the maps beside the quantizer from training clips, before the first step.

        Into it: the principal components of what the decoder would read without it (the encoder's latents; after a warm
        start from a model with another quantizer or none, what its decoder reads), each of unit variance, so that a
        bounded or binary quantizer uses its levels evenly from the start. Back: the least-squares map from codes to the
        same.
        A convolutional decoder that begins grey becomes the mean of the videos.
        videos: float [B, C, T, H, W] in [-1, 1]. count: latents to look at, after which no more videos are read.
        Returns: `explained`, the share of the variance that the codes of each level tell; nothing where weights came
            with maps of their own.
        """
        if not self._fit:
            return {}
        training = self.training
        self.eval()
        latents, wholes = [], []
        for video in videos:
            wholes.append(self.whole_groups(video, torch.full((len(video),), video.shape[2])))
            latents += self._encode(wholes[-1], None)
            if sum(z[:, 0].numel() for z in latents) >= count:
                break
        found = {}
        if self.config.coarse:
            coarse = [self.coarsen(z, None) for z in latents]
            maps = self.to_coarse_latent, self.from_coarse_code
            found["explained_coarse"] = self._begin_maps(coarse, maps, ("to_coarse_latent", "from_coarse_code"))
            codes = [self.quantizer(maps[0](z.movedim(1, -1)), None).embeddings for z in coarse]
            latents = [z - self.refine(self._read(maps[1], code), None) for z, code in zip(latents, codes)]
            if not (self._sources and self._sources[0].codebook_sizes):  # which learned it
                self.dropped.copy_(torch.cat([z.movedim(1, -1).flatten(0, -2) for z in latents]).mean(0))
        found["explained"] = self._begin_maps(latents, (self.to_latent, self.from_code), ("to_latent", "from_code"))
        if isinstance(self.decoder, ConvDecoder) and not self.decoder.last.any():
            begin_with_mean(self.decoder.read_out, [self.decoder.patch(video, None) for video in wholes])
        self.statistics_taken()
        self.train(training)
        return found

    def _begin_maps(self, latents: list[Tensor], maps: tuple[nn.Linear, nn.Linear], names: tuple[str, str]) -> float:
        affine = read = None
        for source in self._sources:
            if self.inserts_ids(source):
                affine = source._maps(*names)
            else:
                read = partial(source._reread, *names)
        dim = self.quantizer.dim if self.config.quantizer.name in CONTINUOUS else self.quantizer.latent_dim
        return fit_code_maps(latents, *maps, self.quantizer, dim=dim, affine=affine, read=read)

    def _reread(self, into: str, back: str, latents: Tensor) -> Tensor:
        """What the decoder reads of latents [N, Z], by the names of the maps beside the quantizer."""
        return getattr(self, back)(self.quantizer(getattr(self, into)(latents), None).embeddings)

    def _quantize(self, project: nn.Linear, latents: Tensor, valid: Tensor) -> Quantized:
        """latents [B, Z, t, h, w], valid [B, G] -> codes [B, t, h, w, D]; padding moves no codebook."""
        if not latents.shape[2]:
            return self._nothing(latents)
        mask = None
        if self.training and not bool(valid.all()):
            mask = self._of_latents(valid, latents.shape[2])[:, :, None, None].expand(-1, -1, *latents.shape[3:])
        return self.quantizer(project(latents.movedim(1, -1)), mask)

    def _nothing(self, latents: Tensor) -> Quantized:
        """Codes of no latent frames. They belong to the graph of the latents, so that a batch of images gives every
        parameter a gradient."""
        empty = latents.movedim(1, -1)[..., :1]  # [B, 0, h, w, 1]
        sizes = self.quantizer.codebook_sizes
        indices = torch.zeros(*empty.shape[:-1], len(sizes), dtype=torch.int64, device=latents.device)
        codes = empty.expand(*empty.shape[:-1], self.quantizer.dim)
        return Quantized(codes, indices if sizes else None, latents.new_zeros(()), {})

    @staticmethod
    def _read(project: nn.Linear, codes: Tensor) -> Tensor:
        """codes [B, t, h, w, D] -> latents [B, Z, t, h, w]."""
        return project(codes.to(project.weight.dtype)).movedim(-1, 1)

    @staticmethod
    def _of_latents(valid: Tensor, frames: int) -> Tensor:
        """[B, G] bool of groups -> [B, t] of the latent frames in them (the first group of a video has one)."""
        groups = valid.shape[1]
        if not frames:
            return valid[:, :0]
        each = -(-(frames - 1) // max(groups - 1, 1)) if frames % groups else frames // groups
        counts = torch.full((groups,), each, device=valid.device)
        counts[0] = frames - (groups - 1) * each
        return valid.repeat_interleave(counts, 1)


@dataclass
class ObjectiveConfig(losses.PixelConfig):
    coarse_only: float = 0.0  # two levels: share of clips that are decoded from the coarse level alone
    continuous: float = 0.0  # share of clips that are decoded from latents instead of ids: one model of both (OneVAE)


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
        if not 0 <= c.continuous < 1:
            raise ValueError(f"objective.continuous={c.continuous} is a share of the clips, in [0, 1)")
        if c.continuous and m.quantizer.name == "identity":
            raise ValueError(
                f"objective.continuous={c.continuous} is the share of clips that pass by the quantizer, and "
                "model.quantizer.name=identity has no ids to pass by: set it to 0"
            )
        super().__init__(c, channels=m.channels, frames=m.num_frames, size=(m.size[0], m.size[1]))

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        c = self.config
        assert clip.video is not None and clip.video.is_floating_point()
        video, lengths = clip.video, clip.frames()
        mask = None if clip.lengths is None else losses.frame_mask(lengths, video.shape[2])
        drop = torch.rand(len(clip), device=video.device) < c.coarse_only if c.coarse_only else None
        direct = torch.rand(len(clip), device=video.device) < c.continuous if c.continuous else None
        out = model(video, lengths, coarse_only=drop, continuous=direct)
        levels = [level for level in out.quantized if level.embeddings.shape[1]]
        weights = [level.embeddings[..., 0].numel() if model.first_apart else 1 for level in levels]
        own = torch.stack([level.loss * w for level, w in zip(levels, weights)]).sum() / sum(weights)
        report = {f"quantizer_{k}": v for k, v in levels[-1].report.items()}
        report["quantizer"] = own.detach()
        ids = [level.indices for level in out.quantized if level.indices is not None]
        if ids:
            real = [v[..., None, None].expand(i.shape[:-1]).flatten(1) for v, i in zip(out.valid, ids)]
            flat = torch.cat([i.flatten(1, 3) for i in ids], 1)
            report |= losses.codebook_report(flat, model.codebook_sizes, mask=torch.cat(real, 1))
        term, terms = self.pixels(out.recon, video, mask=mask, step=step, last=model.decoder.last)
        total = c.quantizer * own + term
        if direct is not None:
            real = torch.ones_like(video[:, 0, :, 0, 0]) if mask is None else mask.to(video.dtype)
            real = real * direct[:, None]
            error = (out.recon.detach() - video).abs().mean((1, 3, 4))
            terms["l1_continuous"] = (error * real).sum() / real.sum().clamp_min(1)
        return Loss(total, {"loss": total.detach(), **report, **terms})
