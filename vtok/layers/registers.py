"""A tokenizer of chunks whose tokens are registers: patches and registers in one transformer, and back to patches.

    video --patches--+                         +-- keep the first k of each block --+
                     |-- encoder --> registers --> quantizer --> Tokens --> ... --> decoder --> video
    registers -------+    (masked)                                 patch queries --+

What a register begins as is `config.registers`: a vector of its own (learned), with the mean of the patches that its
cell of a pyramid covers (pyramid), or with coefficients of a transform code, around which the networks are a residual
(dct). Which register sees what is the mask's business (`vtok.layers.masks`), how a network begins that of
`vtok.layers.begin`.

Letters: M chunks, C channels, T frames, H height, W width, N patches, P pixels of a patch, R registers, K tokens per
block, D width, Q ids per token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from vtok.layers.begin import begin_decoder, begin_encoder, patch_of_token, spread
from vtok.layers.chunked import ChunkedTokenizer, Chunks
from vtok.layers.coefficient_predictor import CoefficientPredictor
from vtok.layers.masks import decoder_mask, encoder_mask, with_valid_keys
from vtok.layers.patches import block_coverage, from_patches, pad_to_patches, to_patches
from vtok.layers.positions import Positions
from vtok.layers.transform import TransformCode
from vtok.layers.transformer import Transformer
from vtok.types import Quantized


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


class RegisterTokenizer(ChunkedTokenizer):
    """One chunk to register tokens and back to pixels, under `encode`, `decode` and streams of `ChunkedTokenizer`.

    A subclass adds its output (`add_pixel_head`, or one of its own), then what registers begin with
    (`add_register_inputs`): the order of parameters is part of a checkpoint, which keeps the optimizer's state by it.

    Args:
        config: settings as `vtok.families.flexible.Config` names them. quantizer: a module of vtok.quantize.
    """

    def __init__(self, config: Any, quantizer: Any):
        c = config
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
        self.patch_pixels = c.channels * c.patch[0] * c.patch[1] * c.patch[2]
        num_registers = c.num_tokens * c.blocks

        self.patch_in = nn.Linear(self.patch_pixels, c.width)
        self.encoder_positions = Positions(c.width, c.grid, kind=c.positions)
        self.registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.encoder = self._transformer(c.encoder_depth)
        self.to_latent = nn.Linear(c.width, quantizer.latent_dim)

        self.from_code = nn.Linear(quantizer.dim, c.width)
        self.decoder_registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.query = nn.Parameter(torch.randn(c.width) * 0.02)
        self.dropped = nn.Parameter(torch.randn(c.width) * 0.02) if c.dropped == "mask" else None
        self.decoder = self._transformer(c.decoder_depth)

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

    def add_pixel_head(self) -> None:
        """The output: queries for patches of pixels."""
        c = self.config
        self.decoder_positions = Positions(c.width, c.grid, kind=c.positions)
        self.out = nn.Linear(c.width, self.patch_pixels)

    def add_register_inputs(self) -> None:
        """What registers and queries begin with, beside their own vectors."""
        c = self.config
        if c.registers == "pyramid":
            self.pool_in = nn.Linear(self.patch_pixels, c.width)
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
            self.to_latent = nn.Linear(c.width, self.code.share)  # corrections of coefficients, not latents
            self.coefficients_in = nn.Linear(self.code.share, c.width)
            self.decoded_in = nn.Linear(self.code.share, c.width)
            self.base_in = nn.Linear(self.patch_pixels, c.width)
            for residual in (self.to_latent, self.out):  # the network begins as no correction at all
                nn.init.zeros_(residual.weight)
                nn.init.zeros_(residual.bias)

    @torch.no_grad()
    def begin_encoding(self) -> tuple[Tensor, Tensor]:
        """Learned registers begin spread over the patches and read those they lie on.

        Returns: positions [N, D] of the patches, and the patch [R] of each register.
        """
        c = self.config
        spread(self.encoder_positions)
        seen, spots = self.encoder_positions(c.grid), patch_of_token(c.num_tokens, c.grid, c.blocks)
        begin_encoder(self.encoder, seen, spots, self.patch_in, self.registers, self.to_latent)
        return seen, spots

    @torch.no_grad()
    def begin_decoding(self, spots: Tensor) -> None:
        """Pixels begin to be read from the tokens that lie on their patch ([R] of each), and as zero."""
        spread(self.decoder_positions)
        told = self.decoder_positions(self.config.grid)
        begin_decoder(self.decoder, told, told[spots], self.from_code, self.decoder_registers, self.out)

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
            registers = registers + self.coefficients_in(self.code.by_token(coefficients).to(patches))
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
            latents = latents + self.decoded_in(self.code.by_token(known).to(latents))[:, None, :count]
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

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        return self.quantizer.lookup(indices)
