"""Other ways from the frames of a clip to a few tokens, one idea of one paper each, under one call:

    module(frames, words, audio) -> (pieces it learned, pieces that are averages of the projector's own patches)

attention pooling and grouped Token Turing Machine (BLIP-3-Video), region attention (TokenPacker), progressive encoding
(PVC), Matryoshka levels (M3); the memory bridge is in memory_bridge.py. Words and audio are not read here.

Letters: B clips, T frames, N patches, M packed frames, n tokens, G memories of a token, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.frames import Frames, centres, clip_piece, pack, place_code, pool_grid, pool_shape
from vtok.layers.pieces import Piece, spread_grid, spread_order
from vtok.layers.positions import sincos
from vtok.layers.resampler import CrossAttention
from vtok.layers.transformer import MLP, Attention, RMSNorm, make_norm

Pieces = tuple[list[Piece], list[Piece]]


@dataclass
class PoolConfig:
    """Attention pooling, and the last step of the Token Turing Machine."""

    num_tokens: int = 32  # of a clip
    hidden: int = 1024  # of the network that scores patches


@dataclass
class TuringConfig:
    """Grouped Token Turing Machine."""

    num_inputs: int = 16  # tokens of a frame, each with a memory of its own
    memories: int = 4  # G
    width: int = 512
    depth: int = 4
    num_heads: int = 8
    pool: PoolConfig = field(default_factory=PoolConfig)


@dataclass
class RegionConfig:
    """Region attention."""

    scale: int = 2  # a token for scale x scale patches
    width: int = 1024
    num_heads: int = 8


@dataclass
class ProgressiveConfig:
    """Progressive encoding."""

    depth: int = 2
    num_heads: int = 8
    shuffle: int = 2  # a token for shuffle x shuffle patches
    repeat_images: int = 4  # an image is a still video of so many frames


@dataclass
class MatryoshkaConfig:
    """Nested levels of average pooling."""

    sides: list[int] = field(default_factory=lambda: [1, 3, 6, 12])  # of a level's square of tokens, ascending


class AttentionPool(nn.Module):
    """All patches of a clip -> n tokens, each a weighted mean with weights of its own: TokenLearner (Ryoo et al. 2021,
    https://arxiv.org/abs/2106.11297) over space and time at once, as in BLIP-3-Video (Ryoo et al. 2024,
    https://arxiv.org/abs/2410.16267)."""

    def __init__(self, dim: int, config: PoolConfig):
        super().__init__()
        for name in ("num_tokens", "hidden"):
            if getattr(config, name) < 1:
                raise ValueError(f"pool.{name}={getattr(config, name)} must be at least 1")
        self.norm, self.hidden = nn.LayerNorm(dim), nn.Linear(dim, config.hidden)
        self.score = nn.Linear(config.hidden, config.num_tokens)

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, S, D], mask [B, S] -> [B, n, S], of sum 1 over what is there."""
        logits = self.score(F.gelu(self.hidden(self.norm(x)))).masked_fill(~mask[..., None], -torch.inf)
        return logits.transpose(1, 2).float().softmax(-1).to(x) if x.dtype != torch.float64 else logits.mT.softmax(-1)

    def forward(self, frames: Frames, words: object = None, audio: object = None) -> Pieces:
        positions = patch_positions(frames)
        x = (frames.patches + place_code(positions, frames.patches.shape[-1]).to(frames.patches)).flatten(1, 2)
        weights = self.weights(x, frames.mask.repeat_interleave(frames.patches.shape[2], 1))
        return [clip_piece(weights @ x, (weights @ positions.flatten(1, 2).to(weights)).detach())], []


def patch_positions(frames: Frames) -> Tensor:
    """[B, T, N, 3] (t, y, x) in [0, 1]."""
    time = frames.time[:, :, None, None].expand(-1, -1, frames.patches.shape[2], 1)
    return torch.cat([time, centres(frames.grid, frames.time).expand(*time.shape[:3], 2)], -1)


_TENSORS = ("norm1", "qkv", "out", "norm2", "up", "down")  # of one pre-norm block of `TuringMachine`


class TuringMemory(nn.Module):
    """Inputs [B, T, m, width] and mask [B, T] -> the memories after the last real frame [B, m, G, width].

    Its tensors are its own, not those of modules inside, and it gives a tensor: an engine that gathers weights module
    by module (ZeRO-3) meets one call however many frames a clip has, and finds what its backward pass reads again.
    """

    def __init__(self, config: TuringConfig):
        super().__init__()
        self.config = config
        width, many = config.width, config.num_inputs
        self.begin = nn.Parameter(torch.randn(many, config.memories, width))
        tensors: dict[str, Tensor] = {}
        for i in range(config.depth):
            tensors |= {f"{i}_norm1": torch.ones(width), f"{i}_norm2": torch.ones(width)}
            tensors |= {
                f"{i}_qkv": torch.randn(3 * width, width) * 0.02,
                f"{i}_up": torch.randn(4 * width, width) * 0.02,
            }
            small = 0.02 / (2 * config.depth) ** 0.5
            tensors |= {
                f"{i}_out": torch.randn(width, width) * small,
                f"{i}_down": torch.randn(width, 4 * width) * small,
            }
        tensors["write_norm"] = torch.ones(width)
        tensors["write"] = torch.randn(config.memories, width) * 0.02
        tensors["write_slot"] = torch.eye(config.memories, 2 * config.memories + 1) * 2  # begins by keeping
        for name, value in tensors.items():
            self.register_parameter(f"memory_{name}", nn.Parameter(value))

    def _tensor(self, name: str) -> Tensor:
        return self.get_parameter(f"memory_{name}")

    def _blocks(self, x: Tensor) -> Tensor:
        """x [R, G + 1, width] through the transformer blocks."""
        heads = self.config.num_heads
        for i in range(self.config.depth):
            p = {name: self._tensor(f"{i}_{name}").to(x.dtype) for name in _TENSORS}
            h = F.rms_norm(x, x.shape[-1:], p["norm1"], 1e-6)
            q, k, v = F.linear(h, p["qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), p["out"])
            x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, x.shape[-1:], p["norm2"], 1e-6), p["up"])), p["down"])
        return x

    def step(self, memory: Tensor, token: Tensor) -> Tensor:
        """memory [R, G, width], token [R, width] -> the new memory."""
        both = torch.cat([memory, token[:, None]], 1)
        made = torch.cat([both, self._blocks(both)[:, : self.config.memories]], 1)  # [R, 2 G + 1, width]
        normed = F.rms_norm(made, made.shape[-1:], self._tensor("write_norm").to(made.dtype), 1e-6)
        logits = self._tensor("write").to(made.dtype) @ normed.transpose(1, 2) + self._tensor("write_slot").to(made)
        return logits.softmax(-1) @ made

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        memory = self.begin.to(inputs).expand(len(inputs), -1, -1, -1)
        for t in range(inputs.shape[1]):
            new = self.step(memory.flatten(0, 1), inputs[:, t].flatten(0, 1)).unflatten(0, memory.shape[:2])
            memory = torch.where(mask[:, t, None, None, None], new, memory)
        return memory


class TuringMachine(nn.Module):
    """A memory of G vectors for each of the m tokens of a frame, read and written frame by frame, pooled at the end:
    the Token Turing Machine (Ryoo et al. 2022, https://arxiv.org/abs/2211.09119) in BLIP-3-Video's grouped form.

    At each frame and for each of its m tokens: [memories, token] -> transformer blocks -> a new memory, each of G
    vectors a weighted mean of [memories, what the blocks gave]. Weights are shared by the m tokens. Frames come one
    after the other, so the state of a stream is m x G vectors.
    """

    def __init__(self, dim: int, config: TuringConfig):
        super().__init__()
        if config.width % config.num_heads or min(config.num_inputs, config.memories) < 1:
            raise ValueError(
                f"turing.width={config.width} must be a multiple of num_heads={config.num_heads}, num_inputs="
                f"{config.num_inputs} and memories={config.memories} at least 1"
            )
        self.config = config
        width = config.width
        self.into = nn.Linear(dim, width)
        self.memory = TuringMemory(config)
        self.pool = AttentionPool(width, config.pool)
        self.out = nn.Linear(width, dim)

    def forward(self, frames: Frames, words: object = None, audio: object = None) -> Pieces:
        c = self.config
        batch, count = frames.patches.shape[:2]
        shape = pool_shape(c.num_inputs, frames.grid)
        tokens = pool_grid(frames.patches.flatten(0, 1), frames.grid, shape).unflatten(0, (batch, count))
        inputs = self.into(tokens)  # [B, T, m, width]
        stamp = sincos(frames.time.flatten() * 64.0, c.width + c.width % 2)[:, : c.width].to(inputs)
        inputs = inputs + stamp.unflatten(0, (batch, count))[:, :, None]
        flat = self.memory(inputs, frames.mask).flatten(1, 2)
        weights = self.pool.weights(flat, torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device))
        return [clip_piece(self.out(weights @ flat))], []


class RegionAttention(nn.Module):
    """A token for each scale x scale patches: their mean asks, they alone answer. TokenPacker (Li et al. 2024,
    https://arxiv.org/abs/2407.02392), with the features of one layer (four, there)."""

    def __init__(self, dim: int, config: RegionConfig):
        super().__init__()
        if config.scale < 1:
            raise ValueError(f"region.scale={config.scale} must be at least 1")
        self.scale = config.scale
        self.into, self.norm = nn.Linear(dim, config.width), nn.LayerNorm(dim)
        self.query_norm, self.read = make_norm("rms", config.width), CrossAttention(config.width, dim, config.num_heads)
        self.mlp_norm, self.mlp, self.out = (
            make_norm("rms", config.width),
            MLP(config.width),
            nn.Linear(config.width, dim),
        )
        nn.init.normal_(self.out.weight, std=0.1 / config.width**0.5)

    def forward(self, frames: Frames, words: object = None, audio: object = None) -> Pieces:
        rows, scale = pack(frames.mask), self.scale
        own = frames.patches[rows.clip, rows.frame]
        regions, there, shape = in_squares(own, frames.grid, scale)  # [M, n, s s, D], [n, s s]
        mean = (regions * there[..., None]).sum(2) / there.sum(-1)[:, None]
        x, flat = self.into(mean).flatten(0, 1)[:, None], self.norm(regions.flatten(0, 1))
        x = x + self.read(self.query_norm(x), flat, there.repeat(len(own), 1))
        x = self.out(x + self.mlp(self.mlp_norm(x)))[:, 0].unflatten(0, mean.shape[:2]) + mean
        return [frames.piece(x, rows, spread_grid(shape, own.device), centres(shape, frames.time))], []


def in_squares(patches: Tensor, grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Patches [M, N, D] as squares of side x side, zeros past the edges: [M, n, side side, D], [n, side side] bool of
    what is there, (rows, columns) with n = rows x columns."""
    shape = (-(-grid[0] // side), -(-grid[1] // side))
    more = (shape[0] * side - grid[0], shape[1] * side - grid[1])

    def cut(value: Tensor) -> Tensor:  # [M, h, w, D] -> [M, n, side side, D]
        value = F.pad(value, (0, 0, 0, more[1], 0, more[0]))
        value = value.unflatten(2, (shape[1], side)).unflatten(1, (shape[0], side))
        return value.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    there = cut(torch.ones(1, *grid, 1, device=patches.device))[0, :, :, 0] > 0
    return cut(patches.unflatten(1, grid)), there, shape


class ProgressiveBlock(nn.Module):
    """Causal attention along time at each place, then a feed-forward; both normalised as the frame's time says."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.attention = RMSNorm(dim, affine=False), Attention(dim, num_heads)
        self.norm2, self.mlp = RMSNorm(dim, affine=False), MLP(dim)
        self.modulate = nn.Linear(dim, 4 * dim)
        nn.init.normal_(self.modulate.weight, std=0.02 / dim**0.5)
        nn.init.zeros_(self.modulate.bias)
        for last in (self.attention.out, self.mlp.down):
            nn.init.normal_(last.weight, std=0.1 / last.in_features**0.5)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, code: Tensor, mask: Tensor) -> Tensor:
        """x [R, T, D]; code [R, T, D] of times; mask [T, T]."""
        scale1, shift1, scale2, shift2 = self.modulate(code).chunk(4, -1)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1, mask)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Progressive(nn.Module):
    """Each frame adds what the frames before it lack: causal attention along time under norms that know the time, then
    squares of patches side by side in one token. PVC (Yang et al. 2024, https://arxiv.org/abs/2412.09613); there inside
    the tower's last blocks, here behind the projector. Later frames never change the tokens of earlier ones."""

    def __init__(self, dim: int, config: ProgressiveConfig):
        super().__init__()
        for name in ("depth", "shuffle", "repeat_images"):
            if getattr(config, name) < 1:
                raise ValueError(f"progressive.{name}={getattr(config, name)} must be at least 1")
        self.config = config
        self.blocks = nn.ModuleList(ProgressiveBlock(dim, config.num_heads) for _ in range(config.depth))
        self.out = nn.Linear(config.shuffle**2 * dim, dim)

    def forward(self, frames: Frames, words: object = None, audio: object = None) -> Pieces:
        batch, count, places, dim = frames.patches.shape
        x = frames.patches.transpose(1, 2).flatten(0, 1)  # [B N, T, D]
        at = torch.arange(count, device=x.device)
        code = sincos(at, dim + dim % 2)[:, :dim].to(x)
        for block in self.blocks:
            x = block(x, code.expand_as(x), at[:, None] >= at)
        x = x.unflatten(0, (batch, places)).transpose(1, 2)  # [B, T, N, D]
        rows = pack(frames.mask)
        squares, _, shape = in_squares(x[rows.clip, rows.frame], frames.grid, self.config.shuffle)
        tokens = self.out(squares.flatten(2))
        return [frames.piece(tokens, rows, spread_grid(shape, x.device), centres(shape, frames.time))], []


class Matryoshka(nn.Module):
    """Each frame averaged to a square of tokens whose side the budget chooses: M3 (Cai et al. 2024,
    https://arxiv.org/abs/2405.17430). Nothing in it learns; the projector before it does.

    The finest level that the budget affords for every frame; what is left lifts single frames to the next level. A
    budget below one token a frame keeps that many frames. Never above the budget, and not nested: a smaller budget has
    other tokens, not fewer of the same.
    """

    def __init__(self, config: MatryoshkaConfig):
        super().__init__()
        if not config.sides or config.sides != sorted(set(config.sides)) or config.sides[0] < 1:
            raise ValueError(f"matryoshka.sides={config.sides} must be sides of at least 1, ascending")
        self.sides = config.sides

    def forward(self, frames: Frames, asked: Tensor) -> Pieces:
        """asked: [B] int64 tokens of each clip at most."""
        sides = [side for side in self.sides if side <= min(frames.grid)]
        if not sides:
            raise ValueError(
                f"matryoshka.sides={self.sides}: none fits the tower's {frames.grid} patches; begin with 1"
            )
        cost = torch.tensor([side * side for side in sides], device=asked.device)
        # spread over the clip's own frames: those of padding have no turn
        turn = spread_order(frames.patches.shape[1], asked.device).expand(frames.mask.shape)
        turn = _order(_order(turn.masked_fill(~frames.mask, frames.patches.shape[1])))
        affords = cost * frames.lengths[:, None] <= asked[:, None]  # [B, levels]
        base = affords.sum(1) - 1  # -1: not one token a frame
        now = torch.where(base < 0, 0, cost[base.clamp_min(0)])
        step = cost[(base + 1).clamp(max=len(cost) - 1)] - now
        more = torch.where(step > 0, (asked - now * frames.lengths) // step.clamp_min(1), 0)
        level = base[:, None] + (turn < more[:, None])  # [B, T]
        out = []
        for index, side in enumerate(sides):
            rows = pack((level == index) & frames.mask)
            tokens = pool_grid(frames.patches[rows.clip, rows.frame], frames.grid, (side, side))
            order = spread_grid((side, side), asked.device)
            out.append(frames.piece(tokens, rows, order, centres((side, side), frames.time)))
        return [], out


def _order(values: Tensor) -> Tensor:
    return values.argsort(dim=1, stable=True)
