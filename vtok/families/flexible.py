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
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtok import losses
from vtok.budget import NestedConfig, allocate_levels, interpolate_lengths, nested_keep, spread_lengths
from vtok.layers.begin import (
    begin_decoder,
    begin_encoder,
    begin_head,
    learn_as_wide,
    patch_of_token,
    show_content,
    spread,
)
from vtok.layers.chunked import ChunkedTokenizer, Chunks
from vtok.layers.halting import HaltingHead
from vtok.layers.masks import ENCODER_MASKS, decoder_mask, encoder_mask, with_valid_keys
from vtok.layers.patches import block_coverage, from_patches, pad_to_patches, to_patches
from vtok.layers.positions import Positions, later_as_last
from vtok.layers.prior import ARPrior, PriorConfig
from vtok.layers.scorer import Scorer, measure_lengths
from vtok.layers.taking import take_all
from vtok.layers.teacher import differences, digit_sizes, digits_of, expected_pixels, id_cross_entropy
from vtok.layers.transform import CoefficientPredictor, TransformCode
from vtok.layers.transformer import Transformer
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


class Latents(NamedTuple):
    z: Tensor  # [M, blocks, K, latent]
    coefficients: Tensor | None = None  # registers=dct: [M, coefficients], what z was made from


@lru_cache(maxsize=64)
def _cached_mask(
    which: str, kind: str, patches: int, registers: int, blocks: int, device: torch.device
) -> Tensor | None:
    build = encoder_mask if which == "encoder" else decoder_mask
    mask = build(kind, patches=patches, registers=registers, blocks=blocks)
    return None if mask is None else mask.to(device)


class Model(ChunkedTokenizer):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms (`vtok.layers.chunked`)."""

    def __init__(self, config: Config):
        c, quantizer = config, build_quantizer(config.quantizer)
        super().__init__(
            channels=c.channels,
            num_frames=c.num_frames,
            blocks=c.blocks,
            num_tokens=c.num_tokens,
            embedding_dim=quantizer.dim,
            codebook_sizes=quantizer.codebook_sizes,
            index_factors=quantizer.index_factors,
        )
        self.config, self.quantizer = config, quantizer
        self.resting = False  # after a warm start that only added a head
        num_registers = c.num_tokens * c.blocks
        pixels = c.channels * c.patch[0] * c.patch[1] * c.patch[2]

        self.patch_in = nn.Linear(pixels, c.width)
        self.encoder_positions = Positions(c.width, c.grid, kind=c.positions)
        self.registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.encoder = self._transformer(c.encoder_depth)
        self.to_latent = nn.Linear(c.width, self.quantizer.latent_dim)

        self.from_code = nn.Linear(self.quantizer.dim, c.width)
        self.decoder_registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.query = nn.Parameter(torch.randn(c.width) * 0.02)
        self.dropped = nn.Parameter(torch.randn(c.width) * 0.02) if c.dropped == "mask" else None
        self.decoder = self._transformer(c.decoder_depth)
        if c.head == "teacher":
            if c.teacher_config is None:
                raise ValueError("model.teacher is not read yet: build the model through vtok.families.flexible.build")
            self.teacher = Model(_teacher_config(c))
            self.decoder_places = nn.Parameter(torch.randn(self.teacher.max_tokens, c.width) * 0.02)
            self.out = nn.Linear(c.width, sum(digit_sizes(self.teacher.index_factors)))
        else:
            self.decoder_positions = Positions(c.width, c.grid, kind=c.positions)
            self.out = nn.Linear(c.width, pixels)
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

        if c.registers == "pyramid":
            self.pool_in = nn.Linear(pixels, c.width)
            self.unpool = nn.Linear(self.quantizer.dim, c.width)
        if c.registers == "dct":
            self.code = TransformCode(
                num_tokens=c.num_tokens,
                levels=tuple(c.quantizer.levels),
                channels=c.channels,
                max_frequencies=(c.dct_frequencies[0], c.dct_frequencies[1], c.dct_frequencies[2]),
            )
            count = self.code.num_coefficients
            self.predictor = (
                CoefficientPredictor(count, width=c.predictor_width, dropout=c.predictor_dropout)
                if c.predictor_width
                else None
            )
            # coefficients go with tokens in order of variance, `share` to a token
            self.share = -(-count // c.num_tokens)
            self.to_latent = nn.Linear(c.width, self.share)  # corrections of coefficients, not latents
            self.coefficients_in = nn.Linear(self.share, c.width)
            self.decoded_in = nn.Linear(self.share, c.width)
            self.base_in = nn.Linear(pixels, c.width)
            for residual in (self.to_latent, self.out):  # the network begins as no correction at all
                nn.init.zeros_(residual.weight)
                nn.init.zeros_(residual.bias)
        if c.registers == "learned" and not self.registers.is_meta:
            self._begin_in_place()

    def _transformer(self, depth: int) -> Transformer:
        c = self.config
        return Transformer(
            c.width,
            depth,
            c.num_heads,
            mlp_ratio=c.mlp_ratio,
            mlp=c.mlp,
            qk_norm=c.qk_norm,
            norm=c.norm,
            flex=c.flex_attention,
            checkpoint=c.checkpoint,
        )

    def _begin_in_place(self) -> None:
        """Learned registers begin spread over the patches, read those they lie on, and are read from there; the output
        begins at zero (`vtok.layers.begin`)."""
        c = self.config
        with torch.no_grad():
            spread(self.encoder_positions)
            seen, spots = self.encoder_positions(c.grid), patch_of_token(c.num_tokens, c.grid, c.blocks)
            begin_encoder(self.encoder, seen, spots, self.patch_in, self.registers, self.to_latent)
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
                spread(self.decoder_positions)
                told = self.decoder_positions(c.grid)
                begin_decoder(self.decoder, told, told[spots], self.from_code, self.decoder_registers, self.out)
            if c.scorer_depth:
                learn_as_wide(self.scorer.transformer, self.scorer.head)

    # ---- chunks and patches ------------------------------------------------------------------------------------

    def chunks(self, video: Tensor, lengths: Tensor) -> Chunks:
        """[M, C, T, H, W] with T <= num_frames, padded to whole patches (and whole time blocks)."""
        c = self.config
        return pad_to_patches(video, lengths, patch=c.patch, block_frames=c.block_frames if c.blocks > 1 else None)

    def _cells(self, chunks: Chunks) -> Tensor:
        """[M, blocks, K, N / blocks]: pyramid coverage of every time block."""
        return block_coverage(
            chunks, self.config.num_tokens, full_grid=self.config.grid, full_blocks=self.config.blocks
        )

    # ---- one chunk -----------------------------------------------------------------------------------------------

    def _by_token(self, coefficients: Tensor) -> Tensor:
        """[M, coefficients] -> [M, K, share], zero where there are no more."""
        short = self.share * self.config.num_tokens - coefficients.shape[1]
        return F.pad(coefficients, (0, short)).unflatten(1, (-1, self.share))

    def latents(self, chunks: Chunks) -> Latents:
        """Register outputs, ready for the quantizer."""
        c = self.config
        patches = to_patches(chunks.video, c.patch)  # [M, N, P]
        x = self.patch_in(patches) + self.encoder_positions(chunks.grid).to(patches)
        num_registers = chunks.blocks * c.num_tokens
        registers = self.registers[:num_registers].expand(x.shape[0], -1, -1)  # [M, R, D]
        if c.registers == "pyramid":
            cells = self._cells(chunks).to(patches)
            weight = cells / cells.sum(-1, keepdim=True).clamp_min(1e-6)
            pooled = weight @ rearrange(patches, "M (b n) P -> M b n P", b=chunks.blocks)
            registers = registers + self.pool_in(pooled.flatten(1, 2))
        coefficients = None
        if c.registers == "dct":
            coefficients = self.code.analyse(chunks.video, chunks.lengths.clamp_min(1))
            registers = registers + self.coefficients_in(self._by_token(coefficients).to(patches))
        mask = _cached_mask("encoder", c.mask, patches.shape[1], num_registers, chunks.blocks, x.device)
        block_valid = chunks.block_valid.repeat_interleave(c.num_tokens, 1)
        mask = with_valid_keys(mask, torch.cat([chunks.patch_valid, block_valid], 1))
        x = self.encoder(torch.cat([x, registers.to(x)], 1), mask)
        z = self.to_latent(x[:, patches.shape[1] :])  # [M, R, latent]
        if coefficients is not None:
            wanted = coefficients + z.flatten(1)[:, : coefficients.shape[1]].float()
            return Latents(self.code.encode(wanted)[:, None], wanted)
        return Latents(rearrange(z, "M (b K) D -> M b K D", b=chunks.blocks))

    def quantize(self, latents: Latents, chunks: Chunks) -> Quantized:
        """Latents as tokens [M, blocks, K, D]; padding moves no statistics."""
        z = latents.z
        real = None if bool(chunks.block_valid.all()) else chunks.block_valid[:, :, None].expand(z.shape[:-1])
        return self.quantizer(z, real)

    def encode_chunks(self, chunks: Chunks) -> Quantized:
        """Every token of every chunk: embeddings [M, blocks, K, D], indices [M, blocks, K, Q]."""
        return self.quantize(self.latents(chunks), chunks)

    def _decoder_input(self, codes: Tensor, keep: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """Kept tokens as decoder latents [M, blocks, K', D], and which of them may be seen [M, blocks, K']."""
        c = self.config
        count = c.num_tokens
        if c.dropped == "cut":
            count = max(int(keep.sum(-1).max()), 1)
            codes, keep = codes[:, :, :count], keep[:, :, :count]
        places = rearrange(self.decoder_registers[: blocks * c.num_tokens], "(b K) D -> b K D", b=blocks)
        latents = self.from_code(codes.to(self.query.dtype))
        if self.dropped is None:
            return latents + places[:, :count].to(latents), keep
        latents = torch.where(keep[..., None], latents, self.dropped.to(latents))
        return latents + places.to(latents), torch.ones_like(keep)

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
        """Pixels from the kept tokens.

        Args: codes [M, blocks, K, D]; keep [M, blocks, K] bool, a prefix of each group; lengths [M] real frames;
            frames: T of the result; size: (H, W) of the result; through: in training with registers=dct, the
            coefficients that gradients pass to.
        Returns: [M, C, T, H, W], not clipped.
        """
        c = self.config
        if c.head == "teacher":
            logits = self.teacher_logits(codes, keep)
            return expected_pixels(self.teacher, logits, lengths, frames=frames, size=size)
        chunks = self.chunks(codes.new_zeros(()).expand(codes.shape[0], 1, frames, *size), lengths)
        latents, seen = self._decoder_input(codes, keep, chunks.blocks)
        queries = (self.query + self.decoder_positions(chunks.grid)).to(latents).expand(codes.shape[0], -1, -1)
        count, base = latents.shape[2], None
        if c.registers == "pyramid":
            value = (self.unpool(codes.to(latents.dtype)) * keep[..., None])[:, :, :count]
            cells = self._cells(chunks)[:, :, :count].to(value)
            queries = queries + (cells.transpose(-1, -2) @ value).flatten(1, 2)
        elif c.registers == "dct":
            known, bits = self.code.dequantize(codes[:, 0], keep[:, 0], through=through)
            if self.predictor is not None:
                known = self.predictor(known, bits)
            base = self.code.synthesise(
                known,
                frames=lengths.clamp_min(1),
                num_frames=chunks.video.shape[2],
                size=(chunks.video.shape[3], chunks.video.shape[4]),
            )
            latents = latents + self.decoded_in(self._by_token(known).to(latents))[:, None, :count]
            queries = queries + self.base_in(to_patches(base, c.patch).to(queries))
        length = queries.shape[1]
        mask = _cached_mask("decoder", c.mask, length, chunks.blocks * count, chunks.blocks, latents.device)
        seen = (seen & chunks.block_valid[:, :, None]).flatten(1)
        mask = with_valid_keys(mask, torch.cat([chunks.patch_valid, seen], 1))
        x = self.decoder(torch.cat([queries, latents.flatten(1, 2)], 1), mask)[:, :length]
        video = from_patches(self.out(x), chunks.grid, c.patch)
        if base is not None:
            video = video + base
        return video[:, :, :frames, : size[0], : size[1]]

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
        with torch.no_grad():
            chunks = self.teacher.chunks(video, lengths)
            indices = self.teacher.encode_chunks(chunks).indices  # [B, blocks, K, Q]
        assert indices is not None
        real = chunks.block_valid.repeat_interleave(self.teacher.num_tokens, 1)
        return digits_of(indices, self.teacher.index_factors), real

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

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        return self.quantizer.lookup(indices)

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
            return self._fit_head(videos)
        return {}

    @torch.no_grad()
    def _fit_head(self, videos: Iterable[Tensor]) -> dict[str, float]:
        digits: list[list[Tensor]] = []
        codes: list[Tensor] = []
        self.teacher.eval()  # its codebook follows what it sees in training
        for video in videos:
            chunks = self.teacher.chunks(video, torch.full((len(video),), video.shape[2], device=video.device))
            tokens = self.teacher.encode_chunks(chunks)
            assert tokens.indices is not None
            codes.append(tokens.embeddings.flatten(0, 2))
            digits.append([d.flatten() for d in digits_of(tokens.indices, self.teacher.index_factors)])
        sizes = digit_sizes(self.teacher.index_factors)
        return begin_head(self.out, sizes, [torch.cat(d) for d in zip(*digits)], torch.cat(codes))


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
