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

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vtok import losses
from vtok.budget import NestedConfig, nested_keep
from vtok.layers.masks import ENCODER_MASKS, decoder_mask, encoder_mask, with_valid_keys
from vtok.layers.perceptual import load_lpips
from vtok.layers.positions import Positions
from vtok.layers.pyramid import coverage
from vtok.layers.transform import TransformCode
from vtok.layers.transformer import Transformer
from vtok.quantize import FSQ, QuantizerConfig, build_quantizer
from vtok.types import Budget, Clip, LoadTokenizer, Loss, Quantized, ShapeError, StreamState, Tokens, resolve_budget


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
    positions: str = "learned"  # learned | sincos
    mask: str = "causal_last"  # full | causal_last | time_block_causal | time_block_causal_last
    blocks: int = 1  # time blocks of a chunk; more than one needs a time_block mask
    num_tokens: int = 64  # of a group (time block)
    registers: str = "learned"  # learned | pyramid | dct (a linear transform code, the network a residual around it)
    dct_frequencies: list[int] = field(default_factory=lambda: [8, 24, 24])  # dct: lowest (t, y, x) frequencies kept
    dropped: str = "mask"  # mask (a learned vector stands in) | cut (the sequence is shorter)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
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
        if self.registers == "dct" and (self.blocks > 1 or self.quantizer.name != "fsq"):
            raise ValueError(
                "model.registers='dct' codes the whole chunk with FSQ levels: set model.blocks=1 and "
                f"model.quantizer.name=fsq (have blocks={self.blocks}, quantizer={self.quantizer.name!r})"
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
class _Chunks:
    """Chunks ready for the network: patches padded, padding known."""

    video: Tensor  # [M, C, T, H, W], every frame past the real ones repeats the last real one
    lengths: Tensor  # [M] real frames, 0 for a chunk that only pads a ragged batch
    grid: tuple[int, int, int]
    blocks: int  # time blocks these T frames span
    patch_valid: Tensor  # [M, N] bool
    block_valid: Tensor  # [M, blocks] bool


@lru_cache(maxsize=64)
def _cached_mask(
    which: str, kind: str, patches: int, registers: int, blocks: int, device: torch.device
) -> Tensor | None:
    build = encoder_mask if which == "encoder" else decoder_mask
    mask = build(kind, patches=patches, registers=registers, blocks=blocks)
    return None if mask is None else mask.to(device)


class Model(nn.Module):
    """What ships: `encode`, `decode`, `lookup` and their streaming forms.

    Attributes: `embedding_dim` width of a token, `max_tokens` tokens of one chunk, `codebook_sizes` and
    `index_factors` of its ids (empty for continuous tokens).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.quantizer = build_quantizer(c.quantizer)
        self.codebook_sizes = self.quantizer.codebook_sizes
        self.index_factors = self.quantizer.index_factors
        self.embedding_dim = self.quantizer.dim
        self.max_tokens = c.num_tokens * c.blocks
        num_registers = c.num_tokens * c.blocks
        pixels = c.channels * c.patch[0] * c.patch[1] * c.patch[2]

        self.patch_in = nn.Linear(pixels, c.width)
        self.encoder_positions = Positions(c.width, c.grid, kind=c.positions)
        self.registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.encoder = self._transformer(c.encoder_depth)
        self.to_latent = nn.Linear(c.width, self.quantizer.latent_dim)

        self.from_code = nn.Linear(self.quantizer.dim, c.width)
        self.decoder_registers = nn.Parameter(torch.randn(num_registers, c.width) * 0.02)
        self.decoder_positions = Positions(c.width, c.grid, kind=c.positions)
        self.query = nn.Parameter(torch.randn(c.width) * 0.02)
        self.dropped = nn.Parameter(torch.randn(c.width) * 0.02) if c.dropped == "mask" else None
        self.decoder = self._transformer(c.decoder_depth)
        self.patch_out = nn.Linear(c.width, pixels)

        if c.registers == "pyramid":
            self.pool_in = nn.Linear(pixels, c.width)
            self.unpool = nn.Linear(self.quantizer.dim, c.width)
        if c.registers == "dct":
            levels = tuple(c.quantizer.levels)
            self.code = TransformCode(
                num_tokens=c.num_tokens,
                levels=levels,
                channels=c.channels,
                max_frequencies=(c.dct_frequencies[0], c.dct_frequencies[1], c.dct_frequencies[2]),
            )
            self.base_in = nn.Linear(pixels, c.width)
            for residual in (self.to_latent, self.patch_out):  # the network begins as no correction at all
                nn.init.zeros_(residual.weight)
                nn.init.zeros_(residual.bias)

    def _transformer(self, depth: int) -> Transformer:
        c = self.config
        return Transformer(
            c.width,
            depth,
            c.num_heads,
            mlp_ratio=c.mlp_ratio,
            mlp=c.mlp,
            qk_norm=c.qk_norm,
            flex=c.flex_attention,
            checkpoint=c.checkpoint,
        )

    # ---- chunks and patches ------------------------------------------------------------------------------------

    def _chunks(self, video: Tensor, lengths: Tensor) -> _Chunks:
        """[M, C, T, H, W] with T <= num_frames, padded to whole patches (and whole time blocks)."""
        c = self.config
        unit = c.block_frames if c.blocks > 1 else c.patch[0]
        frames = -(-video.shape[2] // unit) * unit
        at = torch.arange(frames, device=video.device).expand(video.shape[0], -1)
        at = torch.minimum(at, (lengths - 1).clamp_min(0)[:, None])  # the last real frame stands in for padding
        if frames != video.shape[2] or bool((lengths < frames).any()):
            video = video.gather(2, at[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:]))
        bottom, right = -video.shape[3] % c.patch[1], -video.shape[4] % c.patch[2]
        if bottom or right:
            video = F.pad(video, (0, right, 0, bottom, 0, 0), mode="replicate")
        grid = (frames // c.patch[0], video.shape[3] // c.patch[1], video.shape[4] // c.patch[2])
        starts = torch.arange(grid[0], device=video.device) * c.patch[0]
        patch_valid = (starts < lengths[:, None]).repeat_interleave(grid[1] * grid[2], 1)
        blocks = frames // c.block_frames if c.blocks > 1 else 1
        block_starts = torch.arange(blocks, device=video.device) * c.block_frames
        return _Chunks(video, lengths, grid, blocks, patch_valid, block_starts < lengths[:, None])

    def _patchify(self, video: Tensor) -> Tensor:
        """[M, C, T, H, W] -> [M, N, C * patch volume]."""
        p, q, r = self.config.patch
        return rearrange(video, "M C (t p) (h q) (w r) -> M (t h w) (C p q r)", p=p, q=q, r=r)

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        p, q, r = self.config.patch
        t, h, w = grid
        return rearrange(patches, "M (t h w) (C p q r) -> M C (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r)

    def _cells(self, chunks: _Chunks) -> Tensor:
        """[M, blocks, K, N / blocks]: pyramid coverage of every time block."""
        t, h, w = chunks.grid
        full = self.config.grid
        per_block = t // chunks.blocks
        valid = rearrange(chunks.patch_valid, "M (b t n) -> (M b) t n", b=chunks.blocks, t=per_block)
        cells = coverage(
            self.config.num_tokens,
            (per_block, h, w),
            valid[..., 0].sum(1),
            full_grid=(full[0] // self.config.blocks, full[1], full[2]),
        )
        return rearrange(cells, "(M b) K n -> M b K n", b=chunks.blocks)

    # ---- one chunk -----------------------------------------------------------------------------------------------

    def encode_chunks(self, chunks: _Chunks) -> Quantized:
        """Every token of every chunk: embeddings [M, blocks, K, D], indices [M, blocks, K, Q]."""
        c = self.config
        patches = self._patchify(chunks.video)  # [M, N, P]
        x = self.patch_in(patches) + self.encoder_positions(chunks.grid).to(patches)
        num_registers = chunks.blocks * c.num_tokens
        registers = self.registers[:num_registers].expand(x.shape[0], -1, -1)  # [M, R, D]
        if c.registers == "pyramid":
            cells = self._cells(chunks).to(patches)
            weight = cells / cells.sum(-1, keepdim=True).clamp_min(1e-6)
            pooled = weight @ rearrange(patches, "M (b n) P -> M b n P", b=chunks.blocks)
            registers = registers + self.pool_in(pooled.flatten(1, 2))
        mask = _cached_mask("encoder", c.mask, patches.shape[1], num_registers, chunks.blocks, x.device)
        block_valid = chunks.block_valid.repeat_interleave(c.num_tokens, 1)
        mask = with_valid_keys(mask, torch.cat([chunks.patch_valid, block_valid], 1))
        x = self.encoder(torch.cat([x, registers.to(x)], 1), mask)
        z = self.to_latent(x[:, patches.shape[1] :])  # [M, R, latent]
        if c.registers == "dct":
            coefficients = self.code.analyse(chunks.video, chunks.lengths.clamp_min(1))
            assert isinstance(self.quantizer, FSQ)
            z = self.code.encode(coefficients, z)
        z = rearrange(z, "M (b K) D -> M b K D", b=chunks.blocks)
        real = None if bool(chunks.block_valid.all()) else chunks.block_valid[:, :, None].expand(z.shape[:-1])
        return self.quantizer(z, real)

    def decode_chunks(
        self, codes: Tensor, keep: Tensor, lengths: Tensor, *, frames: int, size: tuple[int, int]
    ) -> Tensor:
        """Pixels from the kept tokens.

        Args: codes [M, blocks, K, D]; keep [M, blocks, K] bool, a prefix of each group; lengths [M] real frames;
            frames: T of the result; size: (H, W) of the result.
        Returns: [M, C, T, H, W], not clipped.
        """
        c = self.config
        canvas = codes.new_zeros(()).expand(codes.shape[0], 1, frames, *size)
        chunks = self._chunks(canvas, lengths)
        count = c.num_tokens
        if c.dropped == "cut":
            count = max(int(keep.sum(-1).max()), 1)
            codes, keep = codes[:, :, :count], keep[:, :, :count]
        places = rearrange(self.decoder_registers[: chunks.blocks * c.num_tokens], "(b K) D -> b K D", b=chunks.blocks)
        latents = self.from_code(codes)
        if self.dropped is not None:
            latents = torch.where(keep[..., None], latents, self.dropped.to(latents))
        latents = (latents + places[:, :count].to(latents)).flatten(1, 2)  # [M, R, D]
        queries = (self.query + self.decoder_positions(chunks.grid)).to(latents).expand(codes.shape[0], -1, -1)
        base = None
        if c.registers == "pyramid":
            value = self.unpool(codes) * keep[..., None]
            cells = self._cells(chunks)[:, :, :count].to(value)
            queries = queries + (cells.transpose(-1, -2) @ value).flatten(1, 2)
        elif c.registers == "dct":
            padded = (chunks.grid[0] * c.patch[0], chunks.grid[1] * c.patch[1], chunks.grid[2] * c.patch[2])
            base = self.code.decode(codes[:, 0], keep[:, 0], lengths.clamp_min(1), padded[0], (padded[1], padded[2]))
            queries = queries + self.base_in(self._patchify(base).to(queries))
        length = queries.shape[1]
        mask = _cached_mask("decoder", c.mask, length, chunks.blocks * count, chunks.blocks, latents.device)
        seen = keep if c.dropped == "cut" else chunks.block_valid[:, :, None].expand(keep.shape)
        mask = with_valid_keys(mask, torch.cat([chunks.patch_valid, seen.flatten(1)], 1))
        x = self.decoder(torch.cat([queries, latents], 1), mask)[:, :length]
        video = self._unpatchify(self.patch_out(x), chunks.grid)
        if base is not None:
            video = video + base
        return video[:, :, :frames, : size[0], : size[1]]

    # ---- whole clips ---------------------------------------------------------------------------------------------

    def _split(self, video: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
        """A clip as chunks: [B * n, C, num_frames or T, H, W], lengths [B * n], n chunks a clip."""
        span = self.config.num_frames
        count = max(-(-video.shape[2] // span), 1)
        if count == 1:
            return video, lengths, 1
        short = count * span - video.shape[2]
        if short:
            video = torch.cat([video, video[:, :, -1:].expand(-1, -1, short, -1, -1)], 2)
        starts = torch.arange(count, device=lengths.device) * span
        lengths = (lengths[:, None] - starts).clamp(0, span).flatten()
        return rearrange(video, "B C (n T) H W -> (B n) C T H W", n=count), lengths, count

    def forward(self, video: Tensor, lengths: Tensor, keep: Tensor) -> tuple[Tensor, Quantized]:
        """Training pass of clips of at most one chunk, keep [B, blocks] tokens a group: (recon, quantized)."""
        chunks = self._chunks(video, lengths)
        quantized = self.encode_chunks(chunks)
        rank = torch.arange(self.config.num_tokens, device=video.device)
        kept = (rank < keep[:, : chunks.blocks, None]) & chunks.block_valid[..., None]
        size = (video.shape[3], video.shape[4])
        recon = self.decode_chunks(quantized.embeddings, kept, lengths, frames=video.shape[2], size=size)
        return recon, quantized

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        """Tokens of a clip of any length and size; an image is a clip of one frame.

        Groups are time blocks in order; `rank` is the nesting order inside a group. 1D tokens have no place: positions
        are NaN. `budget` keeps the first tokens of every group (`vtok.types.resolve_budget`).
        """
        clip = clip.as_float()
        if clip.video is None:
            raise ShapeError("flexible.encode needs Clip.video")
        if clip.video.shape[1] != self.config.channels:
            raise ShapeError(f"Clip.video has {clip.video.shape[1]} channels, model.channels={self.config.channels}")
        lengths = clip.frames()
        video, chunk_lengths, count = self._split(clip.video, lengths)
        chunks = self._chunks(video, chunk_lengths)
        quantized = self.encode_chunks(chunks)
        tokens = self._tokens(quantized, chunks.block_valid, count, lengths)
        if clip.times is not None:
            tokens = replace(tokens, times=self._group_times(clip.times, lengths, int(tokens.num_groups.max())))
        if budget is None:
            return tokens
        groups = tokens.num_groups
        resolved = resolve_budget(budget, groups=groups, max_per_group=self.config.num_tokens)
        assert resolved is not None
        return tokens.truncate(resolved)

    def _tokens(self, quantized: Quantized, block_valid: Tensor, count: int, frames: Tensor) -> Tokens:
        """[B * n, blocks, K, ...] as Tokens, groups of padding left out."""
        tokens = self.config.num_tokens

        def flat(value: Tensor) -> Tensor:
            return rearrange(value, "(B n) b K D -> B (n b K) D", n=count)

        embeddings = flat(quantized.embeddings)
        batch, length, _ = embeddings.shape
        at = torch.arange(length, device=embeddings.device).expand(batch, -1)
        lengths = rearrange(block_valid, "(B n) b -> B (n b)", n=count).sum(1) * tokens
        longest = int(lengths.max())
        everything = Tokens(
            embeddings=embeddings[:, :longest],
            lengths=lengths,
            positions=embeddings.new_full((batch, longest, 3), torch.nan),
            group=(at // tokens)[:, :longest],
            rank=(at % tokens)[:, :longest],
            indices=None if quantized.indices is None else flat(quantized.indices)[:, :longest],
            codebook_sizes=self.codebook_sizes if quantized.indices is not None else (),
            frames=frames,
        )
        return everything

    def _group_times(self, times: Tensor, lengths: Tensor, groups: int) -> Tensor:
        """[B, G, 2] seconds of the first and last frame of every group."""
        first = torch.arange(groups, device=times.device) * self.config.block_frames
        last = first + self.config.block_frames - 1
        edges = torch.stack([first, last], -1).flatten().expand(times.shape[0], -1)
        edges = torch.minimum(edges, lengths[:, None] - 1)
        return times.gather(1, edges).reshape(times.shape[0], groups, 2)

    def _slots(self, tokens: Tokens, groups: int) -> tuple[Tensor, Tensor]:
        """Ragged tokens back in their places: codes [B, G, K, D] (zero where absent), keep [B, G, K] bool."""
        batch, _, dim = tokens.embeddings.shape
        count = self.config.num_tokens
        mask = tokens.mask
        if mask.any() and (int(tokens.group[mask].max()) >= groups or int(tokens.rank[mask].max()) >= count):
            raise ShapeError(
                f"tokens reach past the {groups} groups of {count} tokens that {tokens.frames} frames have"
            )
        where = torch.where(mask, tokens.group * count + tokens.rank, groups * count)
        codes = tokens.embeddings.new_zeros(batch, groups * count + 1, dim)
        codes = codes.scatter(1, where[..., None].expand(-1, -1, dim), tokens.embeddings)
        keep = torch.zeros(batch, groups * count + 1, dtype=torch.bool, device=where.device)
        keep = keep.scatter(1, where, True)
        codes, keep = codes[:, :-1], keep[:, :-1]
        return codes.reshape(batch, groups, count, dim), keep.reshape(batch, groups, count)

    def decode(self, tokens: Tokens, *, size: tuple[int, int]) -> Tensor:
        """Video [B, C, T, H, W] in [-1, 1] with T = max(tokens.frames); frames past a clip's own repeat its last."""
        c = self.config
        if tokens.frames is None:
            raise ShapeError("flexible.decode needs Tokens.frames: how many frames each clip has")
        frames = int(tokens.frames.max())
        count = max(-(-frames // c.num_frames), 1)
        if count == 1:
            blocks = -(-frames // c.block_frames) if c.blocks > 1 else 1
            span, lengths = frames, tokens.frames
        else:
            blocks, span = c.blocks, c.num_frames
            starts = torch.arange(count, device=tokens.frames.device) * span
            lengths = (tokens.frames[:, None] - starts).clamp(0, span).flatten()
        codes, keep = self._slots(tokens, count * blocks)
        codes, keep = (rearrange(v, "B (n b) ... -> (B n) b ...", b=blocks) for v in (codes, keep))
        video = self.decode_chunks(codes, keep, lengths, frames=span, size=size)
        video = rearrange(video, "(B n) C T H W -> B C (n T) H W", n=count)[:, :, :frames].clamp(-1, 1)
        last = torch.minimum(torch.arange(frames, device=video.device), tokens.frames[:, None] - 1)
        return video.gather(2, last[:, None, :, None, None].expand_as(video))

    def lookup(self, indices: Tensor) -> Tensor:
        """Token ids [..., Q] -> embeddings [..., D]."""
        return self.quantizer.lookup(indices)

    def tokens_from_indices(
        self, indices: Tensor, *, lengths: Tensor, group: Tensor, rank: Tensor, frames: Tensor
    ) -> Tokens:
        """Tokens read back from a file: ids [B, K, Q] with their groups and ranks."""
        embeddings = self.lookup(indices)
        return Tokens(
            embeddings=embeddings,
            lengths=lengths,
            positions=embeddings.new_full((*indices.shape[:2], 3), torch.nan),
            group=group,
            rank=rank,
            indices=indices,
            codebook_sizes=self.codebook_sizes,
            frames=frames,
        )

    # ---- streaming -----------------------------------------------------------------------------------------------
    # A step's Tokens count their groups from 0: `state.done` groups came before. With a time_block mask a block is
    # coded as soon as its frames are there, by re-reading the chunk's earlier frames (at most num_frames of them).

    def init_state(self, batch: int, size: tuple[int, int]) -> StreamState:
        """State of an encoding stream of `batch` videos of (H, W) = size, all of one length."""
        return StreamState(batch, size)

    def step(self, clip: Clip, state: StreamState) -> tuple[Tokens | None, StreamState]:
        """Take any number of frames; return the tokens of every group completed by them, or None."""
        clip = clip.as_float()
        if clip.video is None or tuple(clip.video.shape[3:]) != state.size or clip.video.shape[0] != state.batch:
            have = None if clip.video is None else list(clip.video.shape)
            raise ShapeError(f"stream of {state.batch} videos of size {state.size} got a clip of shape {have}")
        if clip.lengths is not None and bool((clip.lengths != clip.video.shape[2]).any()):
            raise ShapeError("a stream takes clips without padding: every video of the batch advances together")
        state.buffer = clip.video if state.buffer is None else torch.cat([state.buffer, clip.video], 2)
        return self._drain(state, final=False), state

    def flush(self, state: StreamState) -> Tokens | None:
        """Tokens of the frames left over, as the end of the video; None when there are none."""
        return self._drain(state, final=True)

    def _drain(self, state: StreamState, *, final: bool) -> Tokens | None:
        c = self.config
        done_blocks = state.cache.setdefault("blocks", 0)  # blocks of the buffered chunk already given out
        pieces: list[Tokens] = []
        while state.buffer is not None:
            available = min(state.buffer.shape[2], c.num_frames)
            ready = available // c.block_frames
            if final and available % c.block_frames:
                ready += 1
            if ready <= done_blocks:
                break
            part = state.buffer[:, :, : min(ready * c.block_frames, available)]
            lengths = torch.full((state.batch,), part.shape[2], dtype=torch.int64, device=part.device)
            chunks = self._chunks(part, lengths)
            quantized = self.encode_chunks(chunks)
            fresh = slice(done_blocks, ready)
            indices = None if quantized.indices is None else quantized.indices[:, fresh]
            quantized = quantized._replace(embeddings=quantized.embeddings[:, fresh], indices=indices)
            frames = lengths - done_blocks * c.block_frames
            pieces.append(self._tokens(quantized, chunks.block_valid[:, fresh], 1, frames))
            state.done += ready - done_blocks
            done_blocks = ready
            if ready == c.blocks:
                rest = state.buffer[:, :, c.num_frames :]
                state.buffer, done_blocks = (rest if rest.shape[2] else None), 0
            elif final:
                state.buffer, done_blocks = None, 0
        state.cache["blocks"] = done_blocks
        return _join(pieces)

    def init_decode_state(self, batch: int, size: tuple[int, int]) -> StreamState:
        """State of a decoding stream that makes frames of (H, W) = size."""
        return StreamState(batch, size)

    def decode_step(self, tokens: Tokens, state: StreamState) -> tuple[Tensor | None, StreamState]:
        """Tokens of the next whole groups (as `step` or `truncate` gave them) -> their frames [B, C, T, H, W].

        `tokens.frames` says how many frames they hold, equal over the batch.
        """
        c = self.config
        if tokens.frames is None or tokens.frames.shape[0] != state.batch:
            raise ShapeError(f"a decoding stream of {state.batch} videos needs Tokens.frames of that many")
        frames = int(tokens.frames[0])
        if bool((tokens.frames != frames).any()):
            raise ShapeError("a stream decodes videos of one length: Tokens.frames differ over the batch")
        groups = -(-frames // c.block_frames)
        codes, keep = self._slots(tokens, groups)
        past = state.buffer  # groups of the unfinished chunk: (codes, keep)
        if past is not None:
            codes, keep = torch.cat([past[0], codes], 1), torch.cat([past[1], keep], 1)
        skip = 0 if past is None else past[0].shape[1]
        total = skip * c.block_frames + frames
        out = []
        for start in range(0, codes.shape[1], c.blocks):
            part = slice(start, min(start + c.blocks, codes.shape[1]))
            length = min(total - start * c.block_frames, c.num_frames)
            lengths = torch.full((state.batch,), length, dtype=torch.int64, device=codes.device)
            video = self.decode_chunks(codes[:, part], keep[:, part], lengths, frames=length, size=state.size)
            out.append(video[:, :, (skip * c.block_frames if start == 0 else 0) :])
        left = codes.shape[1] % c.blocks
        complete = total % c.block_frames == 0
        state.buffer = (codes[:, -left:], keep[:, -left:]) if left and complete else None
        state.done += groups
        return torch.cat(out, 2).clamp(-1, 1), state

    def decode_flush(self, state: StreamState) -> Tensor | None:
        """Nothing is held back by `decode_step`: always None."""
        state.buffer = None
        return None

    # ---- before training -----------------------------------------------------------------------------------------

    def fit_statistics(self, videos: list[Tensor]) -> dict[str, float]:
        """Fit what depends on data alone, before the first step: the transform code of `registers: dct`.

        videos: float [B, C, T, H, W] in [-1, 1], from training clips.
        """
        return self.code.fit(videos) if self.config.registers == "dct" else {}


def _join(pieces: list[Tokens]) -> Tokens | None:
    """Consecutive tokens of one stream as one Tokens, groups counted through."""
    if len(pieces) < 2:
        return pieces[0] if pieces else None
    offsets, groups = [], 0
    for piece in pieces:
        offsets.append(groups)
        groups += int(piece.num_groups.max())

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces], 1)

    frames = torch.stack([piece.frames for piece in pieces if piece.frames is not None]).sum(0)
    return Tokens(
        embeddings=cat("embeddings"),
        lengths=torch.stack([piece.lengths for piece in pieces]).sum(0),
        positions=cat("positions"),
        group=torch.cat([piece.group + offset for piece, offset in zip(pieces, offsets)], 1),
        rank=cat("rank"),
        indices=None if pieces[0].indices is None else cat("indices"),
        codebook_sizes=pieces[0].codebook_sizes,
        frames=frames,
    )


@dataclass
class ObjectiveConfig:
    nested: NestedConfig = field(default_factory=NestedConfig)
    l1: float = 1.0
    l2: float = 0.0
    perceptual: float = 0.0  # LPIPS per frame
    perceptual_weights: str = ""  # path of the LPIPS weights
    perceptual_sha256: str = ""
    quantizer: float = 1.0  # weight of the quantizer's own loss
    adversarial: losses.AdversarialConfig = field(default_factory=losses.AdversarialConfig)


class Objective(nn.Module):
    """What stays in the lab: losses, perceptual net, discriminator."""

    Config = ObjectiveConfig

    def __init__(self, config: ObjectiveConfig, model_config: Config, *, load: LoadTokenizer | None = None):
        super().__init__()
        self.config = c = config
        nested_keep(model_config.num_tokens, 1, config=c.nested)  # a law that does not fit fails here
        self.perceptual = None
        if c.perceptual:
            if not c.perceptual_weights:
                raise ValueError(
                    f"objective.perceptual={c.perceptual} needs objective.perceptual_weights, a file of LPIPS weights"
                )
            self.perceptual = load_lpips(c.perceptual_weights, sha256=c.perceptual_sha256).requires_grad_(False)
        self.adversarial = None
        if c.adversarial.weight:
            self.adversarial = losses.Adversarial(
                c.adversarial,
                channels=model_config.channels,
                frames=model_config.num_frames,
                size=(model_config.size[0], model_config.size[1]),
            )

    def idle(self, step: int) -> tuple[str, ...]:
        """Parameter prefixes that rest at this step: learning rate 0, or weight decay would still move them."""
        return ("adversarial",) if self.adversarial is not None and step < self.config.adversarial.start else ()

    def forward(self, model: Model, clip: Clip, step: int) -> Loss:
        c = self.config
        assert clip.video is not None and clip.video.is_floating_point()
        video, lengths = clip.video, clip.frames()
        mask = None if clip.lengths is None else losses.frame_mask(lengths, video.shape[2])
        shape = model.config
        keep = nested_keep(shape.num_tokens, video.shape[0], groups=shape.blocks, config=c.nested).to(video.device)
        recon, quantized = model(video, lengths, keep)
        recon = recon.float()
        report: dict[str, Tensor] = {f"quantizer_{k}": v for k, v in quantized.report.items()}
        l1 = losses.reconstruction(recon, video, kind="l1", mask=mask)
        l2 = losses.reconstruction(recon, video, kind="l2", mask=mask)
        total = c.l1 * l1 + c.l2 * l2 + c.quantizer * quantized.loss
        report |= {"l1": l1.detach(), "l2": l2.detach(), "quantizer": quantized.loss.detach()}
        if self.perceptual is not None:
            distance = losses.perceptual(self.perceptual, recon, video, mask=mask)
            total = total + c.perceptual * distance
            report["perceptual"] = distance.detach()
        if self.adversarial is not None and step >= c.adversarial.start:
            term, terms = self.adversarial(recon, video, total, last=model.patch_out.weight)
            total = total + term
            report |= terms
        return Loss(total, {"loss": total.detach(), **report})
