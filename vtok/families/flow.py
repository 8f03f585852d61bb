"""Flexible-length video tokenizers that a rectified flow decodes: a few nested tokens for each latent frame, drawn back
to video by a network that fills in what they do not say.

    video --frozen tokenizer--> latents --patches--+                    +-- keep the first k of each latent frame --+
                                                   |-- encoder --> registers --> quantizer --> Tokens --> ...       |
                                      registers ---+    (masked)                                                    |
    noise --Euler steps of the flow decoder, which sees the noised latents and the tokens---------------------------+
          --> latents --frozen tokenizer--> video

The latents are those of a continuous tokenizer of ours (`model.latents`), or pixels. Latent frame 0 is one frame, later
ones `stride` frames each; a *group* of tokens is one latent frame and holds `num_tokens` tokens, of which any prefix
decodes. Longer videos go in chunks that share one frame (`vtok.layers.overlapped`): its latent, known from the chunk
before, is given to the decoder nearly clean.

FlexTok (Bachmann et al. 2025, https://arxiv.org/abs/2502.13967) for images, VideoFlexTok for video; the presets say
where they differ from these.

Letters: B clips, M chunks, C channels, T frames, H height, W width, D channels of a latent, n latent frames, h, w their
height and width, P patches and K tokens of a latent frame, Q ids a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vtok import losses
from vtok.budget import NestedConfig, nested_keep
from vtok.layers.begin import begin_encoder, patch_of_token, spread
from vtok.layers.flow import (
    FlowTransformer,
    SamplerConfig,
    Spans,
    draw_levels,
    euler,
    fixed_noise,
    gaussian_velocity,
    mix,
)
from vtok.layers.frame_code import FrameCode
from vtok.layers.latents import LatentSpace
from vtok.layers.masks import CAUSAL_MASKS, CrossTime, encoder_mask, with_valid_keys
from vtok.layers.overlapped import OverlappedTokenizer
from vtok.layers.patches import from_patches, to_patches
from vtok.layers.positions import Positions, later_as_last
from vtok.layers.teacher import differences
from vtok.layers.transformer import Transformer
from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.types import Clip, LoadTokenizer, Loss, Quantized
from vtok.vision import Tower, TowerConfig, load_tower, resample_features


@dataclass
class Config:
    name: str = "flow"
    channels: int = 3
    num_frames: int = 17  # of a chunk: 1 + a multiple of the latents' stride in time; 1 = an image tokenizer
    size: list[int] = field(default_factory=lambda: [128, 128])  # (height, width) trained at; others work too
    latents: str = (
        ""  # export or Hub repository of a continuous `discrete` tokenizer, read when a run begins; "": pixels
    )
    latents_config: Any = None  # its architecture, filled in from `latents`
    patch: int = 2  # latents a side of a patch
    width: int = 768
    decoder_width: int | None = None  # empty: width
    encoder_depth: int = 12
    decoder_depth: int = 12
    head_size: int = 64  # of attention; width / head_size heads
    mlp: str = "swiglu"  # gelu | swiglu
    mlp_ratio: float = 4.0
    mask: str = "time_block_causal_last"  # time_block_causal | time_block_causal_last | flexible (as cross_time says)
    cross_time: CrossTime = field(default_factory=CrossTime)
    num_tokens: int = 256  # of a latent frame
    registers: str = "learned"  # learned | dct (a linear transform code of each latent frame, networks residuals to it)
    dct_frequencies: list[int] = field(default_factory=lambda: [16, 16])  # dct: lowest (y, x) frequencies kept
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    flex_attention: bool = False  # FlexAttention on CUDA
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.size, self.dct_frequencies = list(self.size), list(self.dct_frequencies)
        if len(self.size) != 2 or min(*self.size, self.patch, self.num_frames, self.num_tokens) < 1:
            raise ValueError(
                f"model.size={self.size} must be (height, width); patch={self.patch}, num_frames={self.num_frames} and "
                f"num_tokens={self.num_tokens} 1 or more"
            )
        for key in ("channels", "width", "head_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more, such as {getattr(Config, key)}")
        for key in ("encoder_depth", "decoder_depth", "mlp_ratio"):
            if getattr(self, key) < 0:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 0 or more, such as {getattr(Config, key)}")
        if len(self.dct_frequencies) != 2 or min(self.dct_frequencies) < 1:
            raise ValueError(f"model.dct_frequencies={self.dct_frequencies} must be (y, x), each 1 or more")
        if self.registers not in ("learned", "dct"):
            raise ValueError(f"model.registers={self.registers!r} is unknown; choose learned or dct")
        if self.registers == "dct" and (self.quantizer.name != "fsq" or self.quantizer.num_codebooks > 1):
            raise ValueError(
                "model.registers='dct' codes with FSQ levels, one id a token: set model.quantizer.name=fsq and "
                f"num_codebooks=1 (have {self.quantizer.name!r}, {self.quantizer.num_codebooks})"
            )
        if self.mask not in CAUSAL_MASKS:
            raise ValueError(f"model.mask={self.mask!r} is unknown; choose one of {', '.join(CAUSAL_MASKS)}")
        if self.cross_time != CrossTime() and self.mask != "flexible":
            raise ValueError(f"model.cross_time is read with model.mask=flexible, not with {self.mask!r}")
        for key, width in (("width", self.width), ("decoder_width", self.decoder_width)):
            if width is not None and (width % self.head_size or width % 2):
                raise ValueError(f"model.{key}={width} must be even, a multiple of model.head_size={self.head_size}")


@dataclass
class Draw:
    """What chance decides in one training step, [B] each."""

    level: Tensor  # noise level in (0, 1)
    prefix: Tensor  # int64, latent frames that are known
    prefix_level: Tensor  # their noise level
    null: Tensor  # bool: decoded without tokens


@dataclass
class Output:
    """What one training pass makes."""

    error: Tensor  # [B, n] squared error of the velocity, mean over values
    learned: Tensor  # [B, n] bool: latent frames that are real and not given
    quantized: Quantized  # embeddings [B, n, K, D]
    valid: Tensor  # [B, n] bool
    tapped: Tensor | None  # [B, n P, width]: patches after some blocks of the decoder


@lru_cache(maxsize=64)
def _cached_mask(
    kind: str, cross: CrossTime, patches: int, registers: int, blocks: int, device: torch.device
) -> Tensor:
    mask = encoder_mask(kind, patches=patches, registers=registers, blocks=blocks, cross=cross)
    assert mask is not None
    return mask.to(device)


class Model(OverlappedTokenizer):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms (`vtok.layers.overlapped`)."""

    from_files: tuple[str, ...] = ()  # parts that `build` filled with weights

    def __init__(self, config: Config):
        c, quantizer = config, build_quantizer(config.quantizer)
        if c.latents and c.latents_config is None:
            raise ValueError("model.latents is not read yet: build the model through vtok.families.flow.build")
        space = LatentSpace(c.latents_config, channels=c.channels)
        step, side = space.stride[0], c.patch
        if c.num_frames > 1 and (c.num_frames - 1) % step:
            raise ValueError(
                f"model.num_frames={c.num_frames} must be 1 + a multiple of {step}, the stride of model.latents in time"
            )
        super().__init__(
            channels=c.channels,
            num_frames=c.num_frames,
            group_frames=step if c.num_frames > 1 else 1,
            cell=(space.stride[1] * side, space.stride[2] * side),
            num_tokens=c.num_tokens,
            embedding_dim=quantizer.dim,
            codebook_sizes=quantizer.codebook_sizes,
            index_factors=quantizer.index_factors,
        )
        self.config, self.space, self.quantizer = c, space, quantizer
        grid = (self.chunk_groups, -(-c.size[0] // self.cell[0]), -(-c.size[1] // self.cell[1]))
        values, width, wide = space.dim * side * side, c.width, c.decoder_width or c.width

        self.patch_in = nn.Linear(values, width)
        self.encoder_positions = Positions(width, grid)
        self.registers = nn.Parameter(torch.randn(self.chunk_groups * c.num_tokens, width) * 0.02)
        self.encoder = Transformer(
            width,
            c.encoder_depth,
            width // c.head_size,
            mlp_ratio=c.mlp_ratio,
            mlp=c.mlp,
            norm="layer",
            flex=c.flex_attention,
            checkpoint=c.checkpoint,
        )
        self.to_latent = nn.Linear(width, quantizer.latent_dim)

        self.from_code = nn.Linear(quantizer.dim, wide)
        self.decoder_registers = nn.Parameter(torch.randn(self.chunk_groups * c.num_tokens, wide) * 0.02)
        self.dropped, self.null, self.known = (nn.Parameter(torch.randn(wide) * 0.02) for _ in range(3))
        self.noised_in = nn.Linear(values, wide)
        self.decoder_positions = Positions(wide, grid)
        self.decoder = FlowTransformer(
            wide,
            c.decoder_depth,
            wide // c.head_size,
            mlp_ratio=c.mlp_ratio,
            mlp=c.mlp,
            flex=c.flex_attention,
            checkpoint=c.checkpoint,
        )
        self.out = nn.Linear(wide, values)
        if c.registers == "dct":
            self.code = FrameCode(
                num_tokens=c.num_tokens,
                levels=tuple(c.quantizer.levels),
                channels=space.dim,
                frequencies=(c.dct_frequencies[0], c.dct_frequencies[1]),
            )
            self.to_latent = nn.Linear(width, self.code.transform.share)  # corrections of coefficients, not latents
            self.coefficients_in = nn.Linear(self.code.transform.share, width)
            self.guess_in = nn.Linear(values, wide)
        if not self.out.weight.is_meta:
            self._begin(grid)

    @torch.no_grad()
    def _begin(self, grid: tuple[int, int, int]) -> None:
        """Registers begin spread over the patches and read those they lie on (`vtok.layers.begin`); the velocity
        begins at zero."""
        spread(self.encoder_positions)
        spots = patch_of_token(self.num_tokens, grid, grid[0])
        places = self.encoder_positions(grid)
        begin_encoder(self.encoder, places, spots, self.patch_in, self.registers, self.to_latent)
        spread(self.decoder_positions)
        places = self.decoder_positions(grid)
        self.decoder_registers.copy_(places[spots])
        self.decoder.begin_reading(places, self.from_code)
        residuals = [self.out, self.to_latent] if self.config.registers == "dct" else [self.out]
        for residual in residuals:
            nn.init.zeros_(residual.weight)
            nn.init.zeros_(residual.bias)

    def resized(self, name: str, given: Tensor) -> Tensor | None:
        """Registers of more or fewer latent frames than `given` [n * K, D] has; later ones begin as the last."""
        own = self.get_parameter(name)
        if name not in ("registers", "decoder_registers") or given.shape[1:] != own.shape[1:]:
            return None
        return later_as_last(given, len(own), group=self.num_tokens)

    # ---- tokens

    def encode_chunks(self, video: Tensor) -> Quantized:
        return self.tokens_of(self.space.encode(video), None)

    def tokens_of(self, latents: Tensor, valid: Tensor | None) -> Quantized:
        """Latents [M, D, n, h, w] -> codes [M, n, K, D]; valid [M, n] bool, what is not padding (None: all)."""
        c = self.config
        patches, grid = self._patches(latents.to(self.registers.dtype))
        x = self.patch_in(patches) + self.encoder_positions(grid).to(patches)
        count = grid[0] * c.num_tokens
        registers, coefficients = self.registers[:count].to(x).expand(x.shape[0], -1, -1), None
        if c.registers == "dct":
            coefficients = self.code.analyse(latents)  # [M n, coefficients]
            own = self.code.transform.by_token(coefficients).unflatten(0, (-1, grid[0])).flatten(1, 2)
            registers = registers + self.coefficients_in(own.to(x))
        x = torch.cat([x, registers], 1)
        mask = _cached_mask(c.mask, c.cross_time, patches.shape[1], count, grid[0], x.device)
        z = self.to_latent(self.encoder(x, mask)[:, patches.shape[1] :]).unflatten(1, (grid[0], c.num_tokens))
        if coefficients is not None:
            z = self.code.latents(coefficients, z)
        real = None if valid is None or bool(valid.all()) else valid[:, :, None].expand(z.shape[:-1])
        return self.quantizer(z, real)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.quantizer.lookup(indices)

    def _patches(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        side = self.config.patch
        _, _, n, h, w = latents.shape
        return to_patches(latents, (1, side, side)), (n, h // side, w // side)

    # ---- flow

    def velocity(
        self,
        noised: Tensor,
        level: Tensor,
        codes: Tensor,
        keep: Tensor,
        *,
        valid: Tensor,
        known: Tensor,
        null: Tensor,
        tap: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """noise - data, as the network sees it.

        Args: noised [M, D, n, h, w] at levels [M, n]; codes [M, n, K, D]; keep [M, n, K] bool; valid [M, n] bool,
            latent frames that are not padding; known [M, n] bool, those given nearly clean, which have no tokens;
            null [M] bool, where no tokens are told.
        Returns: [M, D, n, h, w]; patches after `tap` blocks.
        """
        patches, grid = self._patches(noised.to(self.null.dtype))
        x = self.noised_in(patches) + self.decoder_positions(grid).to(patches)
        guess = variance = None
        if self.config.registers == "dct":
            guess, variance = self.code.guess(codes, keep & ~(known | null[:, None])[..., None], size=noised.shape[3:])
            x = x + self.guess_in(self._patches(guess.to(x))[0])
        told = self.from_code(codes.to(self.null.dtype))
        told = torch.where(keep[..., None], told, self.dropped.to(told))
        told = torch.where(null[:, None, None, None], self.null.to(told), told)
        told = torch.where(known[:, :, None, None], self.known.to(told), told).flatten(1, 2)
        told = told + self.decoder_registers[: told.shape[1]].to(told)
        spans = Spans(patches.shape[1] // grid[0], self.num_tokens)
        real = torch.cat([valid.repeat_interleave(count, 1) for count in (spans.patches, spans.registers)], 1)
        x, tapped = self.decoder(torch.cat([x, told], 1), level, spans, with_valid_keys(None, real), tap=tap)
        side = self.config.patch
        v = from_patches(self.out(x), grid, (1, side, side))
        if guess is not None and variance is not None:
            v = v + gaussian_velocity(noised, level, guess, variance)
        return v, tapped

    def decode_chunk(
        self, codes: Tensor, keep: Tensor, *, number: int, size: tuple[int, int], past: Tensor | None, valid: Tensor
    ) -> Tensor:
        c, space = self.config, self.space
        batch, n = keep.shape[:2]
        shape = (1, space.dim, self.chunk_groups, size[0] // space.stride[1], size[1] // space.stride[2])
        noise = fixed_noise(shape, seed=c.sampler.seed, chunk=number, device=codes.device)[:, :, :n]
        noise = noise.to(torch.promote_types(self.null.dtype, torch.float32))
        known = torch.zeros(batch, n, dtype=torch.bool, device=codes.device)
        prefix = None
        if past is not None:
            known[:, 0], prefix = True, space.encode(past)

        drawn = (valid & ~known)[:, None, :, None, None]

        def velocity(x: Tensor, level: Tensor, withheld: bool) -> Tensor:
            null = torch.full((batch,), withheld, device=x.device)
            v = self.velocity(x, level, codes, keep, valid=valid, known=known, null=null)[0].to(x)
            return v * drawn  # guidance takes norms, which are of what is drawn alone

        latents = euler(velocity, noise.expand(batch, -1, -1, -1, -1), c.sampler, prefix=prefix)
        return space.decode(latents)

    # ---- training

    def forward(self, video: Tensor, lengths: Tensor, keep: Tensor, draw: Draw, *, tap: int | None = None) -> Output:
        """One training pass of clips of at most one chunk. video: float [B, C, T, H, W] in [-1, 1]; keep: [B, n]."""
        if video.shape[2] > self.num_frames:
            raise ValueError(
                f"training clips have {video.shape[2]} frames, a chunk {self.num_frames}: set data.num_frames to "
                "model.num_frames or less"
            )
        groups = self.groups(lengths)
        count = int(groups.max())
        latents = self.space.encode(self.padded(video, lengths, 1 + (count - 1) * self.group_frames))
        at = torch.arange(count, device=video.device)
        valid, known = at < groups[:, None], at < draw.prefix[:, None]
        quantized = self.tokens_of(latents, valid)
        kept = (torch.arange(self.num_tokens, device=video.device) < keep[:, :count, None]) & valid[..., None]
        level = torch.where(known, draw.prefix_level[:, None], draw.level[:, None])
        noise = torch.randn_like(latents)
        noised = mix(latents, noise, level)
        v, tapped = self.velocity(
            noised, level, quantized.embeddings, kept, valid=valid, known=known, null=draw.null, tap=tap
        )
        error = (v.to(latents) - (noise - latents)).square().mean((1, 3, 4))
        return Output(error, valid & ~known, quantized, valid, tapped)

    @torch.no_grad()
    def fit_statistics(self, videos: Iterable[Tensor]) -> dict[str, float]:
        """Mean and deviation of each channel of the latents, from training clips [B, C, T, H, W] in [-1, 1], and with
        `registers: dct` the transform code. What came fitted, with weights, stays."""
        coded = self.config.registers == "learned" or bool(self.code.transform.fitted)
        if self.space.fitted and coded:
            return {}

        def latents() -> Iterable[Tensor]:
            for video in videos:
                count = self.count_groups(min(video.shape[2], self.num_frames))
                frames = 1 + (count - 1) * self.group_frames
                lengths = torch.full((len(video),), min(video.shape[2], frames))
                yield self.space.encode(self.padded(video[:, :, :frames], lengths, frames))

        if self.config.registers == "learned":
            self.space.fit(latents())
            return {"latent_std": float(self.space.std.mean())}
        every = list(latents())
        if not self.space.fitted:
            self.space.fit(every)
        return self.code.fit([self.space.standardised(each) for each in every], self.quantizer.eval())


def build(config: Config, *, load: LoadTokenizer) -> Model:
    """A fresh model to train; the tokenizer of `latents` is read by path, and becomes part of the model."""
    if not config.latents:
        return Model(config)
    source = load(config.latents)
    found = asdict(source.config)
    if found.get("name", "").rpartition(".")[2] != "discrete":
        raise ValueError(f"model.latents={config.latents!r} is a {found.get('name')} model: it must be a discrete one")
    if config.latents_config is not None and (wrong := differences(config.latents_config, found)):
        raise ValueError(f"model.latents={config.latents!r} is not what model.latents_config says: {'; '.join(wrong)}")
    config.latents_config = found
    model = Model(config)
    model.space.adopt(source)
    model.from_files = ("space",)
    return model


@dataclass
class AlignConfig:
    """Representation alignment (REPA, Yu et al. 2024, https://arxiv.org/abs/2410.06940)."""

    weight: float = 0.0  # of 1 - cosine between a projection of the decoder's patches and a frozen tower's features
    tower: TowerConfig = field(default_factory=TowerConfig)  # an image tower; give it a size, so that it crops nothing
    depth: int = 1  # decoder blocks before the patches are read
    width: int = 2048  # hidden units of the projection, of three layers

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"objective.align.width={self.width} must be 1 or more hidden units")


@dataclass
class ObjectiveConfig:
    flow: float = 1.0  # weight of the squared error of the velocity
    quantizer: float = 1.0  # weight of the quantizer's own loss
    nested: NestedConfig = field(default_factory=lambda: NestedConfig(mode="pow2", per="block"))
    nested_first: NestedConfig | None = None  # law of the first latent frame, where it is another
    unconditional: float = 0.2  # share of clips decoded without tokens, for guidance
    full_steps: int = 0  # first steps of a run in which every clip is decoded from all of its tokens instead
    prefix: list[float] = field(default_factory=lambda: [1.0])  # chances of 0, 1, 2 ... latent frames that are known
    prefix_level: float = 0.02  # highest noise level of these ...
    prefix_noisy: float = 0.5  # ... in this share of clips; none in the others
    level_mean: float = 0.0  # noise levels are sigmoid(N(mean, std))
    level_std: float = 1.0
    stratified: bool = True  # noise levels of a batch one from each of its equal shares of the law
    align: AlignConfig = field(default_factory=AlignConfig)


class Objective(nn.Module):
    """What stays in the lab: the laws of noise, nested dropout and known frames; representation alignment."""

    Config = ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, model_config: Config, *, load: LoadTokenizer | None = None):
        super().__init__()
        c, m = config, model_config
        self.config = c
        for law in (c.nested, c.nested_first):
            if law is not None:
                nested_keep(m.num_tokens, 1, config=law)  # a law that does not fit fails here
        for key, weight in (("flow", c.flow), ("quantizer", c.quantizer), ("align.weight", c.align.weight)):
            if weight < 0:
                raise ValueError(f"objective.{key}={weight} must be 0 or above")
        for key in ("unconditional", "prefix_level", "prefix_noisy"):
            if not 0 <= getattr(c, key) <= 1:
                raise ValueError(f"objective.{key}={getattr(c, key)} must lie in [0, 1]")
        if c.level_std < 0:
            raise ValueError(f"objective.level_std={c.level_std} must be 0 or above")
        if c.full_steps < 0:
            raise ValueError(f"objective.full_steps={c.full_steps} must be 0 or more steps")
        if not c.prefix or min(c.prefix) < 0 or sum(c.prefix) <= 0 or c.prefix[0] <= 0:
            raise ValueError(
                f"objective.prefix={c.prefix} must be the chances of 0, 1, 2 ... known latent frames, that of 0 above 0"
            )
        self.tower, self.align = None, None
        if c.align.weight:
            self.tower = self._tower(c.align, m)
            wide, hidden = m.decoder_width or m.width, c.align.width
            sizes = [wide, hidden, hidden, self.tower.embedding_dim]
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
            self.align = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def begin_model(self, model: Model) -> str:
        """Raises: ValueError for a fresh run on the latents of an autoencoder that nobody has trained."""
        space = model.space
        if model.config.latents_config is not None and not model.from_files and not bool(space.fitted):
            raise ValueError(
                "model.latents is empty, so the autoencoder of model.latents_config would keep its random weights: set "
                "model.latents to the export of a continuous `discrete` tokenizer (such as "
                "configs/discrete/vidtok_kl_488.yaml), or init_from to a model of this family"
            )
        return ""

    @staticmethod
    def _tower(align: AlignConfig, model: Config) -> Tower:
        if not align.tower.name:
            raise ValueError(f"objective.align.weight={align.weight} needs objective.align.tower.name, a frozen tower")
        if not 1 <= align.depth <= model.decoder_depth:
            raise ValueError(
                f"objective.align.depth={align.depth} is outside 1 to model.decoder_depth={model.decoder_depth}"
            )
        if align.tower.size is None:
            raise ValueError(
                "objective.align.tower.size is open, so the tower may crop frames, and its features would lie beside "
                "the patches they are for: set it to (height, width), such as [224, 224]"
            )
        tower = load_tower(align.tower)
        if tower.stride != 1:
            raise ValueError(
                f"objective.align.tower.name={tower.name!r} has one feature frame for {tower.stride} frames: align to "
                "an image tower"
            )
        return tower

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        c = self.config
        assert clip.video is not None and clip.video.is_floating_point()
        video, lengths = clip.video, clip.frames()
        keep, draw = self.draw_keep(model, len(clip)).to(video.device), self.draw(model, lengths)
        if self.training and step < c.full_steps:  # a decoder that has learned without tokens is slow to turn to them
            keep, draw.null = torch.full_like(keep, model.num_tokens), torch.zeros_like(draw.null)
        tap = c.align.depth if self.align is not None else None
        out = model(video, lengths, keep, draw, tap=tap)
        flow = (out.error * out.learned).sum() / out.learned.sum().clamp_min(1)
        total = c.flow * flow + c.quantizer * out.quantized.loss
        report = {f"quantizer_{k}": v for k, v in out.quantized.report.items()}
        report |= {"flow": flow.detach(), "quantizer": out.quantized.loss.detach()}
        if self.align is not None:
            away = self._misalignment(model, out, video, lengths)
            total = total + c.align.weight * away
            report["align"] = away.detach()
        real = out.valid[..., None]
        report |= losses.codebook_report(out.quantized.indices, model.codebook_sizes, mask=real)
        return Loss(total, {"loss": total.detach(), **report})

    def _misalignment(self, model: Model, out: Output, video: Tensor, lengths: Tensor) -> Tensor:
        """1 - cosine of projected patches and the tower's features where they lie, mean over latent frames learned."""
        assert self.tower is not None and self.align is not None and out.tapped is not None
        count, step = out.valid.shape[1], model.group_frames
        windows = [1, *[step] * (count - 1)]
        windows[-1] -= sum(windows) - video.shape[2]  # a last group may hold fewer frames
        grid = (-(-video.shape[3] // model.cell[0]), -(-video.shape[4] // model.cell[1]))
        features = self.tower(video, lengths)
        wanted = resample_features(features, grid, windows, lengths=lengths).patches  # [B, n, P, D]
        found = self.align(out.tapped).unflatten(1, (count, -1))
        away = 1 - nn.functional.cosine_similarity(found.float(), wanted.float(), dim=-1).mean(-1)
        return (away * out.learned).sum() / out.learned.sum().clamp_min(1)

    def draw_keep(self, model: Model, batch: int) -> Tensor:
        """[B, n] tokens that each latent frame keeps."""
        c, groups = self.config, model.chunk_groups
        keep = nested_keep(model.num_tokens, batch, groups=groups, config=c.nested)
        if c.nested_first is not None:
            keep[:, :1] = nested_keep(model.num_tokens, batch, config=c.nested_first)
        return keep

    def draw(self, model: Model, lengths: Tensor) -> Draw:
        """Noise levels, known frames (never all of a clip's) and where tokens are withheld."""
        c, batch = self.config, len(lengths)
        level = draw_levels(batch, mean=c.level_mean, std=c.level_std, stratified=c.stratified)
        prefix = torch.multinomial(torch.tensor(c.prefix), batch, replacement=True)
        clean = torch.rand(batch) * c.prefix_level * (torch.rand(batch) < c.prefix_noisy)
        null, device = torch.rand(batch) < c.unconditional, lengths.device
        prefix = torch.minimum(prefix.to(device), model.groups(lengths) - 1)
        return Draw(level.to(device), prefix, clean.to(device), null.to(device))
