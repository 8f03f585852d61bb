"""Flexible-length 1D video tokenizers: register tokens ordered by importance, read back by a transformer.

    video --patches--+                         +-- keep the first k of each group --+
                     |-- encoder --> registers --> quantizer --> Tokens --> ... --> decoder --> video
    registers -------+    (masked)                                      patch queries --+

A long video is cut into chunks of `num_frames`, a chunk into `blocks` time blocks; a *group* of tokens is one block and
holds `num_tokens` tokens, of which any prefix decodes. Chunks are independent, so memory is constant in the video's
length; with a `time_block_*` mask later frames of a chunk never change its earlier tokens either.

Faithful to no single paper by default; the presets are (TiTok, Yu et al. 2024, https://arxiv.org/abs/2406.07550;
One-D-Piece, Miwa et al. 2025, https://arxiv.org/abs/2501.10064; LARP, Wang et al. 2024,
https://arxiv.org/abs/2410.21264; AdapTok, Li et al. 2025, https://arxiv.org/abs/2505.17011).

Letters: B clips, M chunks, C channels, T frames, H height, W width, N patches, R registers, G groups, K tokens per
group, D width, Q ids per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtok import losses
from vtok.budget import NestedConfig, allocate_levels, interpolate_lengths, nested_keep, spread_lengths
from vtok.layers.begin import begin_decoder, begin_head, learn_as_wide, patch_of_token, show_content
from vtok.layers.halting import HaltingHead
from vtok.layers.masks import ENCODER_MASKS, with_valid_keys
from vtok.layers.positions import later_as_last
from vtok.layers.prior import ARPrior, PriorConfig
from vtok.layers.registers import RegisterTokenizer
from vtok.layers.scorer import Scorer, measure_lengths
from vtok.layers.stream import check_pixels
from vtok.layers.taking import take_all
from vtok.layers.teacher import clip_digits, differences, digit_sizes, expected_pixels, id_cross_entropy, seen_digits
from vtok.quantize import QuantizerConfig, build_quantizer
from vtok.types import Clip, LoadTokenizer, Loss, Quantized


@dataclass
class Config:
    name: str = "flexible"
    channels: int = 3
    num_frames: int = 16  # frames of a chunk, the longest stretch the network sees at once
    size: list[int] = field(default_factory=lambda: [64, 64])  # (height, width) trained at; others work too
    patch: list[int] = field(default_factory=lambda: [4, 16, 16])  # (frames, height, width) of a patch
    width: int = 256
    encoder_depth: int = 4
    decoder_depth: int = 4
    num_heads: int = 4
    mlp: str = "gelu"  # gelu | swiglu
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    norm: str = "rms"  # rms | layer
    positions: str = "learned"  # learned | sincos
    mask: str = "causal_last"  # full | causal_last | time_block_causal | time_block_causal_last
    blocks: int = 1  # time blocks of a chunk; more than one needs a time_block mask
    num_tokens: int = 64  # of a group (time block)
    registers: str = "learned"  # learned | pyramid | dct (a linear transform code, the network a residual around it)
    dct_frequencies: list[int] = field(default_factory=lambda: [16, 24, 24])  # dct: lowest (t, y, x) frequencies kept
    predictor_width: int = 384  # dct: hidden units of the perceptron that guesses what no token has told; 0 = none
    predictor_dropout: float = 0.2
    dropped: str = "mask"  # mask (a learned vector stands in) | cut (the sequence is shorter)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    head: str = "pixels"  # pixels | teacher (ids of a frozen tokenizer, whose decoder makes the pixels; TiTok)
    teacher: str = ""  # head=teacher: export folder or Hub repository of that tokenizer, read when a run begins
    teacher_config: Any = None  # head=teacher: its architecture, filled in from `teacher`
    scorer_depth: int = 0  # blocks of a network that predicts the distortion of every length (AdapTok); 0 = none
    scorer_levels: int = 8  # lengths it knows: multiples of num_tokens / scorer_levels
    halting_depth: int = 0  # blocks of a head that predicts the length for a wanted PSNR (KARL); 0 = none
    halting_width: int = 64
    halting_coverage: float = 0.9  # share of blocks that are to reach the wanted PSNR with it (`vtok calibrate`)
    flex_attention: bool = False  # FlexAttention on CUDA
    checkpoint: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        self.size, self.patch = list(self.size), list(self.patch)
        for key in ("channels", "width", "num_heads", "num_frames", "blocks", "num_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be 1 or more, such as {getattr(Config, key)}")
        if self.mask not in ENCODER_MASKS:
            raise ValueError(f"model.mask={self.mask!r} is unknown; choose one of {', '.join(ENCODER_MASKS)}")
        if self.registers not in ("learned", "pyramid", "dct"):
            raise ValueError(f"model.registers={self.registers!r} is unknown; choose learned, pyramid or dct")
        if self.dropped not in ("mask", "cut"):
            raise ValueError(f"model.dropped={self.dropped!r} is unknown; choose mask or cut")
        if len(self.size) != 2 or len(self.patch) != 3 or min(*self.size, *self.patch) < 1:
            raise ValueError(
                f"model.size={self.size} must be (height, width), model.patch={self.patch} (t, height, width)"
            )
        if self.num_frames % (self.blocks * self.patch[0]):
            raise ValueError(
                f"model.num_frames={self.num_frames} must be a multiple of blocks x patch[0] = "
                f"{self.blocks} x {self.patch[0]}, so that every time block holds whole patches"
            )
        if (self.blocks > 1) != self.mask.startswith("time_block"):
            raise ValueError(
                f"model.blocks={self.blocks} and model.mask={self.mask!r} do not fit: "
                "time_block masks need blocks > 1, other masks blocks = 1"
            )
        if self.head not in ("pixels", "teacher"):
            raise ValueError(f"model.head={self.head!r} is unknown; choose pixels or teacher")
        if self.head == "teacher" and not (self.teacher or self.teacher_config):
            raise ValueError("model.head=teacher needs model.teacher, the export of a trained tokenizer")
        if self.head == "teacher" and (self.blocks > 1 or self.registers == "dct"):
            raise ValueError(
                "model.head=teacher predicts the ids of a whole chunk: set model.blocks=1, registers=learned"
            )
        if self.scorer_depth and self.num_tokens % self.scorer_levels:
            raise ValueError(f"model.scorer_levels={self.scorer_levels} must divide model.num_tokens={self.num_tokens}")
        if self.registers == "dct" and (
            self.blocks > 1 or self.quantizer.name != "fsq" or self.quantizer.num_codebooks > 1
        ):
            raise ValueError(
                "model.registers='dct' codes the whole chunk with FSQ levels, one id a token: set model.blocks=1, "
                f"model.quantizer.name=fsq and num_codebooks=1 (have blocks={self.blocks}, quantizer="
                f"{self.quantizer.name!r}, num_codebooks={self.quantizer.num_codebooks})"
            )

    @property
    def block_frames(self) -> int:
        return self.num_frames // self.blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches (t, h, w) of a full chunk at the trained size."""
        t, h, w = self.patch
        return self.num_frames // t, -(-self.size[0] // h), -(-self.size[1] // w)


@dataclass
class Output:
    """What one training pass makes: pixels, and what the losses read beside them."""

    recon: Tensor | None  # [B, C, T, H, W], None when only the teacher's ids were asked for
    quantized: Quantized  # embeddings [B, blocks, K, D]
    keep: Tensor  # [B, blocks, K] bool
    block_valid: Tensor  # [B, blocks] bool
    teacher_logits: list[Tensor] | None = None  # by factor of the teacher's ids, [B, K', L]


class Model(RegisterTokenizer):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms (`vtok.layers.chunked`)."""

    config: Config
    from_files: tuple[str, ...] = ()  # parts that `build` filled with weights

    def __init__(self, config: Config):
        super().__init__(config, build_quantizer(config.quantizer))
        c = config
        self.resting = False  # after a warm start that only added a head
        if c.head == "teacher":
            if c.teacher_config is None:
                raise ValueError("model.teacher is not read yet: build the model through vtok.families.flexible.build")
            self.teacher = Model(_teacher_config(c))
            self.decoder_places = nn.Parameter(torch.randn(self.teacher.max_tokens, c.width) * 0.02)
            self.out = nn.Linear(c.width, sum(digit_sizes(self.teacher.index_factors)))
        else:
            self.add_pixel_head()
        if c.scorer_depth:
            self.scorer = Scorer(
                self.quantizer.latent_dim + self.quantizer.dim,
                width=c.width,
                depth=c.scorer_depth,
                num_heads=c.num_heads,
                num_tokens=c.num_tokens,
                blocks=c.blocks,
                levels=c.scorer_levels,
                mlp_ratio=c.mlp_ratio,
                mlp=c.mlp,
                norm=c.norm,
            )
        if c.halting_depth:
            self.halting = HaltingHead(
                self.quantizer.dim,
                num_tokens=c.num_tokens,
                depth=c.halting_depth,
                width=c.halting_width,
                num_heads=c.num_heads,
                coverage=c.halting_coverage,
            )
        self.add_register_inputs()
        if c.registers == "learned" and not self.registers.is_meta:
            self._begin_in_place()

    def _begin_in_place(self) -> None:
        """Learned registers begin spread over the patches, read those they lie on, and are read from there; the output
        begins at zero (`vtok.layers.begin`)."""
        c = self.config
        with torch.no_grad():
            seen, spots = self.begin_encoding()
            if c.head == "teacher":
                shape = self.teacher.config
                told = self.encoder_positions(shape.grid)
                there = patch_of_token(shape.num_tokens, shape.grid, shape.blocks)
                self.decoder_places.copy_(told[there])
                unit = c.quantizer.name == "vq" and c.quantizer.cosine
                size = self.quantizer.dim**-0.5 if unit else 1.0
                show_content(self.to_latent, self.from_code, seen, self.patch_in.bias, code_size=size)
                begin_decoder(self.decoder, told, seen[spots], self.from_code, self.decoder_registers, self.out)
            else:
                self.begin_decoding(spots)
            if c.scorer_depth:
                learn_as_wide(self.scorer.transformer, self.scorer.head)

    # ---- one chunk -----------------------------------------------------------------------------------------------

    def decode_chunks(
        self,
        codes: Tensor,
        keep: Tensor,
        lengths: Tensor,
        *,
        frames: int,
        size: tuple[int, int],
        through: Tensor | None = None,
    ) -> Tensor:
        """Pixels from the kept tokens, by the teacher's decoder where `head: teacher`; as `RegisterTokenizer`."""
        if self.config.head == "teacher":
            logits = self.teacher_logits(codes, keep)
            return expected_pixels(self.teacher, logits, lengths, frames=frames, size=size)
        return super().decode_chunks(codes, keep, lengths, frames=frames, size=size, through=through)

    def teacher_logits(self, codes: Tensor, keep: Tensor) -> list[Tensor]:
        """Scores of the teacher's ids for kept tokens, by factor of its codebook: each [M, K', L]."""
        latents, seen = self._decoder_input(codes, keep, 1)
        queries = (self.query + self.decoder_places).to(latents).expand(codes.shape[0], -1, -1)
        length = queries.shape[1]
        valid = torch.cat([seen.new_ones(codes.shape[0], length), seen.flatten(1)], 1)
        x = self.decoder(torch.cat([queries, latents.flatten(1, 2)], 1), with_valid_keys(None, valid))
        return list(self.out(x[:, :length]).split(digit_sizes(self.teacher.index_factors), -1))

    def teacher_digits(self, video: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's ids of clips of at most one chunk as digits by factor, each [B, K'], and which are real."""
        return clip_digits(self.teacher, video, lengths)

    def forward(self, video: Tensor, lengths: Tensor, keep: Tensor, *, pixels: bool = True) -> Output:
        """Training pass of clips of at most one chunk, keep [B, blocks] tokens a group."""
        chunks = self.chunks(video, lengths)
        latents = self.latents(chunks)
        quantized = self.quantize(latents, chunks)
        rank = torch.arange(self.config.num_tokens, device=video.device)
        kept = (rank < keep[:, : chunks.blocks, None]) & chunks.block_valid[..., None]
        frames, size = video.shape[2], (video.shape[3], video.shape[4])
        out = Output(None, quantized, kept, chunks.block_valid)
        if self.config.head == "teacher":
            out.teacher_logits = self.teacher_logits(quantized.embeddings, kept)
            if pixels:
                out.recon = expected_pixels(self.teacher, out.teacher_logits, lengths, frames=frames, size=size)
        else:
            codes, through = quantized.embeddings, latents.coefficients
            out.recon = self.decode_chunks(codes, kept, lengths, frames=frames, size=size, through=through)
        return out

    # ---- how many tokens -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_distortion(self, clip: Clip) -> Tensor:
        """What the scorer predicts for every time block at each of its lengths, [B, G, S]; infinity for blocks that a
        clip does not have. Raises: ValueError without a scorer."""
        if not self.config.scorer_depth:
            raise ValueError("this model has no scorer: set model.scorer_depth and train it (objective.scorer)")
        clip = clip.as_float()
        assert clip.video is not None
        video, lengths, count = self._split(clip.video, clip.frames())
        chunks = self.chunks(video, lengths)
        latents = self.latents(chunks)
        codes = self.quantize(latents, chunks).embeddings
        scores = self.scorer.distortion(latents.z, codes, chunks.block_valid)  # [M, blocks, S]
        scores = scores.masked_fill(~chunks.block_valid[..., None], torch.inf)
        return rearrange(scores, "(B n) b S -> B (n b) S", n=count)

    def allocate(self, clip: Clip, total: int) -> Tensor:
        """Tokens for every time block of every clip, [B, G] int64 with a sum of at most `total`: what the scorer
        predicts to be best, for each clip on its own (AdapTok solves a program over a whole batch instead).

        Raises: ValueError without a scorer, or when `total` does not cover one level a block.
        """
        scores = self.predict_distortion(clip)
        unit = self.config.num_tokens // self.config.scorer_levels
        return allocate_levels(scores, scores[..., 0].isfinite(), total=total, unit=unit)

    def warm_start(self, source: nn.Module) -> str:
        """Begin with the weights of `source`, a model of this family: all of them, but for a scorer or a halting head
        that it lacks, which begin as they are (the rest is then as it was: `fit_statistics` fits nothing). Returns what
        was done, for the log.

        Raises: ValueError naming what differs.
        """
        added = [f"{name}." for name in ("scorer", "halting") if hasattr(self, name) and not hasattr(source, name)]
        take_all(self, source.state_dict(), new=added)
        self.resting = bool(added)
        return "all weights" + "".join(f", but for model.{name[:-1]}, which is new" for name in added)

    def resized(self, name: str, given: Tensor) -> Tensor | None:
        """Registers of more or fewer time blocks than `given` [blocks * K, D] has; later blocks begin as the last."""
        own, count = self.get_parameter(name), self.config.num_tokens
        if name not in ("registers", "decoder_registers", "scorer.places") or given.shape[1:] != own.shape[1:]:
            return None
        return later_as_last(given, len(own), group=count)

    # ---- before training -----------------------------------------------------------------------------------------

    def fit_statistics(self, videos: Iterable[Tensor]) -> dict[str, float]:
        """Fit what depends on data alone, before the first step: the transform code of `registers: dct`, and with
        `head: teacher` how often its ids come and which are alike. A code that came fitted (`init_from`) stays, and so
        does a head that is no longer zero.

        videos: float [B, C, T, H, W] in [-1, 1], from training clips; T of at most one chunk for `head: teacher`.
        """
        if self.resting:
            return {}
        if self.config.registers == "dct":
            return {} if self.code.fitted else self.code.fit(videos)
        if self.config.head == "teacher" and not bool(self.out.weight.any()):
            digits, codes = seen_digits(self.teacher, videos)
            return begin_head(self.out, digit_sizes(self.teacher.index_factors), digits, codes)
        return {}


def _teacher_config(config: Config) -> Config:
    values = dict(config.teacher_config)
    quantizer = QuantizerConfig(**values.pop("quantizer", {}))
    teacher = Config(**values, quantizer=quantizer)
    if teacher.num_frames != config.num_frames or teacher.channels != config.channels:
        raise ValueError(
            f"model.teacher sees chunks of {teacher.num_frames} frames of {teacher.channels} channels, this model "
            f"{config.num_frames} of {config.channels}: they must agree"
        )
    return teacher


def build(config: Config, *, load: LoadTokenizer) -> Model:
    """A fresh model to train; a `teacher` is read by path, its architecture and weights become part of the model."""
    if config.head != "teacher" or not config.teacher:
        return Model(config)
    teacher = load(config.teacher)
    if not isinstance(teacher, Model):
        raise ValueError(
            f"model.teacher={config.teacher!r} is a {type(teacher).__module__} model: head=teacher decodes with a "
            "flexible one"
        )
    found = asdict(teacher.config)
    if config.teacher_config is not None and (wrong := differences(config.teacher_config, found)):
        raise ValueError(f"model.teacher={config.teacher!r} is not what model.teacher_config says: {'; '.join(wrong)}")
    config.teacher_config = found
    model = Model(config)
    model.teacher.load_state_dict(teacher.state_dict(), strict=True)
    model.from_files = ("teacher",)
    return model


@dataclass
class ObjectiveConfig(losses.PixelConfig):
    nested: NestedConfig = field(default_factory=NestedConfig)
    teacher: float = 0.0  # cross-entropy against the teacher's ids (model.head=teacher), in nats a token
    scorer: bool = False  # train model.scorer alone; everything else is frozen
    halting: bool = False  # train model.halting alone; everything else is frozen
    scorer_metric: str = "mse"  # mse | lpips: the distortion it learns to predict
    prior: PriorConfig = field(default_factory=PriorConfig)


class Objective(losses.PixelObjective):
    """What stays in the lab: losses, perceptual net, prior, discriminator."""

    Config = ObjectiveConfig
    config: ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, model_config: Config, *, load: LoadTokenizer | None = None):
        c, m = config, model_config
        nested_keep(m.num_tokens, 1, config=c.nested)  # a law that does not fit fails here
        if c.scorer and not m.scorer_depth:
            raise ValueError("objective.scorer=true needs model.scorer_depth > 0")
        if c.halting and not m.halting_depth:
            raise ValueError("objective.halting=true needs model.halting_depth > 0")
        if c.halting and c.scorer:
            raise ValueError("objective.halting and objective.scorer are stages of their own: set one of them")
        if c.scorer_metric not in ("mse", "lpips"):
            raise ValueError(f"objective.scorer_metric={c.scorer_metric!r} is unknown; choose mse or lpips")
        scored = c.scorer and c.scorer_metric == "lpips"
        if scored and c.perceptual_net != "lpips":
            raise ValueError("objective.scorer_metric=lpips needs objective.perceptual_net=lpips")
        for key, weight in (("teacher", c.teacher), ("prior.weight", c.prior.weight)):
            if weight < 0:
                raise ValueError(f"objective.{key}={weight} must be 0 or above")
        if c.teacher and m.head != "teacher":
            raise ValueError(f"objective.teacher={c.teacher} needs model.head=teacher")
        super().__init__(c, channels=m.channels, frames=m.num_frames, size=(m.size[0], m.size[1]), distances=scored)
        self.prior = None
        if c.prior.weight:
            sizes = build_quantizer(m.quantizer)
            if len(sizes.codebook_sizes) != 1:
                raise ValueError("objective.prior predicts one id a token: it needs a discrete quantizer")
            self.prior = ARPrior(
                c.prior, dim=sizes.dim, codebook_size=sizes.codebook_sizes[0], max_tokens=m.num_tokens * m.blocks
            )

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        c = self.config
        assert clip.video is not None and clip.video.is_floating_point()
        video, lengths = clip.video, clip.frames()
        check_pixels(video, model.config.channels)
        if c.scorer or c.halting:
            return self._score(model, video, lengths)
        mask = None if clip.lengths is None else losses.frame_mask(lengths, video.shape[2])
        shape = model.config
        keep = nested_keep(shape.num_tokens, video.shape[0], groups=shape.blocks, config=c.nested).to(video.device)
        wanted = bool(c.l1 or c.l2 or c.log_l2 or c.perceptual or c.adversarial.weight)
        out = model(video, lengths, keep, pixels=wanted)
        total = c.quantizer * out.quantized.loss
        report = {f"quantizer_{k}": v for k, v in out.quantized.report.items()}
        report["quantizer"] = out.quantized.loss.detach()
        ids, real = out.quantized.indices, out.block_valid[..., None]  # [B, blocks, K, Q], [B, blocks, 1]
        report |= losses.codebook_report(ids, model.codebook_sizes, mask=real)
        if out.teacher_logits is not None and c.teacher:
            digits, there = model.teacher_digits(video, lengths)
            teacher = id_cross_entropy(out.teacher_logits, digits, there)
            total = total + c.teacher * teacher
            report["teacher"] = teacher.detach()
        if self.prior is not None:
            assert ids is not None
            codes, real = out.quantized.embeddings.flatten(1, 2), real.expand(ids.shape[:3]).flatten(1)
            prior = self.prior(codes, ids.flatten(1, 2)[..., 0], lookup=model.lookup, step=step, mask=real)
            total = total + c.prior.weight * prior
            report["prior"] = prior.detach()
        if out.recon is not None:
            last = model.teacher.out.weight if shape.head == "teacher" else model.out.weight
            term, terms = self.pixels(out.recon, video, mask=mask, step=step, last=last)
            total = total + term
            report |= terms
        return Loss(total, {"loss": total.detach(), **report})

    def _score(self, model: Model, video: Tensor, lengths: Tensor) -> Loss:
        """One random block is cut to many lengths, the others stay whole: the scorer learns what that costs, or the
        halting head which length reaches a quality."""
        if self.config.halting:  # the last block of a video is as short as it happens to be
            frames = min(video.shape[2], int(torch.randint(1, 2 * video.shape[2] + 1, (1,))))
            video, lengths = video[:, :, :frames], lengths.clamp_max(frames)
        shape, chunks = model.config, model.chunks(video, lengths)
        with torch.no_grad():
            z = model.latents(chunks).z
            training = model.quantizer.training
            codes = model.quantizer.eval()(z).embeddings  # ids as inference gives them, statistics at rest
            model.quantizer.train(training)
            block = int(torch.randint(chunks.blocks, (1,)))
            unit = shape.num_tokens // shape.scorer_levels
            counts = range(unit, shape.num_tokens + 1, unit)
            if self.config.halting:
                counts = spread_lengths(shape.num_tokens, per_octave=1)
            args = (model.decode_chunks, self._distortion, codes, chunks, video)
            target = measure_lengths(*args, block=block, block_frames=shape.block_frames, counts=counts)
        if self.config.halting:
            curve = interpolate_lengths(target.exp(), list(counts), shape.num_tokens).to(video)
            error, report = model.halting.loss(codes[:, block], curve, chunks.block_valid[:, block])
            return Loss(error, {"loss": error.detach(), "halting": error.detach(), **report})
        error = model.scorer.error(z, codes, chunks.block_valid, target, block=block)
        return Loss(error, {"loss": error.detach(), "scorer": error.detach(), "distortion": target.exp().mean()})

    def _distortion(self, recon: Tensor, video: Tensor) -> Tensor:
        """[B]: mean squared error in [-1, 1] units, or LPIPS averaged over frames."""
        if self.config.scorer_metric == "mse":
            return (recon.clamp(-1, 1) - video).square().mean((1, 2, 3, 4))
        assert self.perceptual is not None
        x, y = (v.transpose(1, 2).flatten(0, 1) for v in (recon.clamp(-1, 1), video))
        return self.perceptual(x, y).reshape(video.shape[0], -1).mean(1)
