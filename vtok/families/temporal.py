"""Projectors that compress along time: the patches of many frames become a few tokens for a frozen LLM.

    clip --tower--> patches --MLP--> patches in the LLM's space --compressor--> tokens of frames, windows or the clip
                                        |                                            |
    cuts between unlike frames ---------+              summary queries read them all +--> one nesting order --> Tokens

`compressor` chooses among published ways (see Config); tdc, the first, keeps the first frame of every window and reads
the others with a query-former that begins from it and knows the question. What is common to all:

- All frames of a batch go through each network in one call, and each network is called equally often whatever the
  clips hold, so that sharded training (ZeRO-3) never waits for a rank with shorter clips.
- Tokens stand in time order and have one nesting order over the clip (vtok/layers/pieces.py): any budget from 1 to
  `max_tokens` is met exactly by clips that have as many tokens, and one trained with random budgets serves them all.
- `summary` queries of the whole clip come first in that order: a budget below the number of frames then holds the
  clip, not its first frames. Where questions are known (`text`), they begin from what those ask for.

Letters: B clips, T frames, N patches of a frame, P tokens of a batch, K tokens per clip, D width of the LLM's words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.layers.asked_means import AskedMeans
from vtok.layers.byte_words import ByteWords
from vtok.layers.dynamic_context import DualConfig, DualPath, DynamicContext, FormerConfig, StaticConfig, Words
from vtok.layers.frames import (
    Frames,
    bin_means,
    clip_piece,
    halves,
    place_code,
    repeat_images,
    thin,
)
from vtok.layers.memory_bridge import BridgeConfig, MemoryBridge
from vtok.layers.pieces import Piece, arrange, gather_tokens, kept
from vtok.layers.projector import ProjectorConfig, ProjectorModel, load_ears
from vtok.layers.resampler import Resampler
from vtok.layers.segment_counts import cut_by_length, fixed_sizes, segments_between, windows_between
from vtok.layers.segments import SegmentConfig, segment, windows
from vtok.layers.temporal_options import (
    AttentionPool,
    Matryoshka,
    MatryoshkaConfig,
    PoolConfig,
    Progressive,
    ProgressiveConfig,
    RegionAttention,
    RegionConfig,
    TuringConfig,
    TuringMachine,
)
from vtok.layers.unread import refuse_unread
from vtok.llm import ObjectiveConfig, ProjectorObjective
from vtok.types import Budget, Clip, Features, Tokens
from vtok.vision import AudioTowerConfig, TowerConfig, names_an_audio_tower

Objective = ProjectorObjective
__all__ = ["Config", "Model", "Objective", "ObjectiveConfig"]

COMPRESSORS = ("tdc", "dual_path", "attn_pool", "turing", "bridge", "region", "progressive", "matryoshka")
OF_CLIP = ("attn_pool", "turing")  # whose tokens belong to no frame
WITH_FORMER = ("tdc", "dual_path")  # that read questions and audio
NODES = {"static": "tdc", "former": "tdc"} | {
    name: "attn_pool" if name == "pool" else name
    for name in ("dual_path", "pool", "turing", "bridge", "region", "progressive", "matryoshka")
}  # settings of one compressor
NORMS = ("none", "unit", "match")


@dataclass
class AudioConfig(AudioTowerConfig):
    """Audio beside the video, heard by a frozen tower; or cached features under any name, of the same stretch of the
    same clips."""

    in_dim: int = 0  # D of its features; 0 = filled in when a fresh model is built


@dataclass
class SummaryConfig:
    """Queries of the whole clip, first in the nesting order."""

    num_tokens: int = 0  # 0 = none
    width: int = 768
    depth: int = 2
    num_heads: int = 12


@dataclass
class Config(ProjectorConfig):
    name: str = "temporal"
    tower: TowerConfig = field(default_factory=TowerConfig)
    # tdc | dual_path (pooled patches and queries, EVE) | attn_pool, turing (BLIP-3-Video) | bridge (VideoLLaMB) |
    # region (TokenPacker) | progressive (PVC) | matryoshka (M3); each has its node below, tdc has static and former
    compressor: str = "tdc"
    max_tokens: int = 1024  # of a clip; where there are more, those last in the nesting order are left out
    max_frames: int = 224  # feature frames looked at; longer clips are thinned out evenly
    segments: SegmentConfig = field(default_factory=SegmentConfig)
    window: int = 8  # frames of a window, which never spans a cut
    groups: str = "clip"  # clip | window: what a group of Tokens is (its times may be told to the LLM)
    output_norm: str = "match"  # of what was learned: match (the words' rms) | unit (length 1) | none
    text: bool = False  # queries know the question: tokens are then for that question alone
    text_words: int = 64
    audio: AudioConfig = field(default_factory=AudioConfig)
    separator: bool = False  # a learned token closes every frame
    summary: SummaryConfig = field(default_factory=SummaryConfig)
    static: StaticConfig = field(default_factory=StaticConfig)
    former: FormerConfig = field(default_factory=FormerConfig)
    dual_path: DualConfig = field(default_factory=DualConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    turing: TuringConfig = field(default_factory=TuringConfig)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    region: RegionConfig = field(default_factory=RegionConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    matryoshka: MatryoshkaConfig = field(default_factory=MatryoshkaConfig)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("compressor", self.compressor, COMPRESSORS),
            ("groups", self.groups, ("clip", "window")),
            ("output_norm", self.output_norm, NORMS),
        ):
            if value not in choices:
                raise ValueError(f"model.{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("max_tokens", "max_frames", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.groups == "window" and self.compressor in OF_CLIP:
            raise ValueError(f"model.groups=window: tokens of {self.compressor} belong to no window; groups=clip")
        if self.compressor not in WITH_FORMER and (self.text or self.audio.name):
            raise ValueError(
                f"model.compressor={self.compressor!r} reads neither questions nor audio: set text=false and "
                f"audio.name='', or choose one of {', '.join(WITH_FORMER)}"
            )
        if self.separator and self.compressor != "tdc":
            raise ValueError(f"model.separator=true is of tdc, not of {self.compressor}")
        if self.compressor == "matryoshka" and self.summary.num_tokens:
            raise ValueError("model.summary with matryoshka: its budget chooses a level; summary.num_tokens=0")
        if self.audio.name and self.audio.in_dim < 1 and not names_an_audio_tower(self.audio.name):
            raise ValueError(
                f"model.audio.name={self.audio.name!r} is no folder and no hf:USER/REPO of a tower, so it needs "
                f"in_dim, the width of the features that clips bring under that name ({self.audio.in_dim})"
            )
        refuse_unread(self, self._unread())
        if self.static.keep != "pool":
            refuse_unread(self.static, [("tokens", "model.static.keep=pool")], where="model.static")
        if not self.summary.num_tokens:
            sizes = [(name, "model.summary.num_tokens above 0") for name in ("width", "depth", "num_heads")]
            refuse_unread(self.summary, sizes, where="model.summary")

    def _unread(self) -> Iterator[tuple[str, str]]:
        """(setting, what would read it) of what this compressor does not read."""
        cuts, own = self.groups == "window", self.compressor
        yield from ((node, f"model.compressor={its}") for node, its in NODES.items() if its != own)
        if not cuts and own not in ("tdc", "bridge"):
            yield "segments", "model.groups=window, or model.compressor=tdc or bridge"
        if not cuts and own != "tdc":
            yield "window", "model.groups=window, or model.compressor=tdc"
        if own == "matryoshka":
            yield "output_norm", "compressors whose tokens a network makes, and matryoshka averages patches"
        if not self.text:
            yield "text_words", "model.text=true"
        if not self.audio.name:
            yield "audio", "an audio tower, model.audio.name"

    @property
    def length_policy(self) -> str:
        if cut_by_length(self.segments, most_frames=self.max_frames):
            return "metadata"
        if self.compressor == "tdc":
            alike = self.static.keep == "pool" and self._static_tokens((1, 1)) == self.former.num_queries
            return "metadata" if self.window == 1 or self.static.keep == "none" or alike else "content"
        return "content" if self.compressor == "bridge" and self.bridge.emit != "memory" else "metadata"

    def _bounds(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        if self.compressor == "progressive" and frames == 1:
            frames = self.progressive.repeat_images
        frames = min(frames, self.max_frames)
        most = min(budget, self.max_tokens)
        found = sorted(self.summary.num_tokens + count for count in self._made(frames, grid, budget))
        return min(found[0], most), min(found[1], most)

    def _made(self, frames: int, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """Tokens of the compressor at both ends of what the cuts can be."""
        if self.compressor == "tdc":
            still, moving = self._static_tokens(grid), self.former.num_queries
            if self.static.keep == "none":
                still = moving
            few, many = windows_between(frames, self.segments, length=self.window)
            each = frames * (moving + self.separator)
            return each + few * (still - moving), each + many * (still - moving)
        if self.compressor == "bridge":
            few, many = self._bridged(frames)
            return self.bridge.memory + self.bridge.pooled * few, self.bridge.memory + self.bridge.pooled * many
        if self.compressor == "attn_pool":
            count = self.pool.num_tokens
        elif self.compressor == "turing":
            count = self.turing.pool.num_tokens
        elif self.compressor == "dual_path":
            count = frames * (self.dual_path.pooled + self.dual_path.former.num_queries)
        elif self.compressor == "matryoshka":
            count = self._levels(frames, grid, budget)
        else:
            side = self.region.scale if self.compressor == "region" else self.progressive.shuffle
            count = frames * -(-grid[0] // side) * -(-grid[1] // side)
        return count, count

    def _static_tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of a window's first frame (of tdc), what is heard in it included."""
        heard = self.audio.tokens if self.audio.name else 0
        return heard + (self.static.tokens if self.static.keep == "pool" else grid[0] * grid[1])

    def _bridged(self, frames: int) -> tuple[int, int]:
        """Frames that the bridge gives tokens of, at least and at most."""
        c = self.bridge
        if c.emit == "memory":
            return 0, 0
        few, many = segments_between(frames, self.segments)
        if self.segments.name == "fixed":
            sizes = fixed_sizes(frames, self.segments)
            count = sum(min(size, c.frames) for size in (sizes if c.emit == "all" else sizes[-1:]))
            return count, count
        longest = frames - few + 1  # of one segment, beside others of one frame
        if c.emit == "last":
            return min(longest if many == 1 else 1, c.frames), min(longest, c.frames)
        return few - 1 + min(longest, c.frames), min(frames, many * c.frames)

    def _levels(self, frames: int, grid: tuple[int, int], budget: int) -> int:
        """Tokens of matryoshka: the finest level for all frames, and the next for as many as the rest affords."""
        costs = [side * side for side in self.matryoshka.sides if side <= min(grid)]
        if not costs:
            raise ValueError(f"matryoshka.sides={self.matryoshka.sides}: none fits {grid} patches; begin with 1")
        now = max([cost for cost in costs if cost * frames <= budget], default=0)
        above = [cost - now for cost in costs if cost > now]
        return frames * now + (above[0] * ((budget - frames * now) // above[0]) if above else 0)


class WordSize(nn.Module):
    """Tokens around 1 in size [M, n, D] at the size that `model.output_norm` asks."""

    def __init__(self, kind: str, dim: int, rms: float):
        super().__init__()
        self.kind, self.rms = kind, rms
        self.gain = nn.Parameter(torch.ones(dim)) if kind == "match" else None
        self.shift = nn.Parameter(torch.zeros(dim)) if kind == "match" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "unit":
            return F.normalize(x, dim=-1)
        if self.gain is not None and self.shift is not None:
            x = F.layer_norm(x, x.shape[-1:]) * self.gain + self.shift
        return x * self.rms


class Model(ProjectorModel):
    """max_tokens: the largest budget. nested: whether a smaller budget keeps some of the tokens of a larger one; by
    `Tokens.truncate` with an int where groups=clip, with the budgets of groups where groups=window. reads_prompt:
    whether tokens are for one question. ears: the audio tower, by reference as the tower is; None for a model that
    hears nothing.

    A network's parameters are read inside its own forward alone, as an engine that shards them (ZeRO-3) needs it.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        c, dim = config, config.embedding_dim
        self.max_tokens, self.nested = c.max_tokens, c.compressor != "matryoshka"
        self.reads_prompt = c.text
        width = c.former.width if c.compressor == "tdc" else c.dual_path.former.width
        self.words = ByteWords(width, most=c.text_words) if c.text else None
        if c.audio.name and c.audio.in_dim < 1:
            raise ValueError(f"model.audio.in_dim={c.audio.in_dim} must be above 0: it is the audio tower's")
        self.audio = nn.Linear(c.audio.in_dim, dim) if c.audio.name else None
        self._ears: Any = None  # no module, as the tower is none
        self.compressor = _build(c, dim)
        s = c.summary
        self.summary, self.asked = None, None
        if s.num_tokens:
            shape = dict(width=s.width, depth=s.depth, num_heads=s.num_heads)
            self.summary = Resampler(dim, num_queries=s.num_tokens, **shape)
            if c.text:
                self.asked = AskedMeans(dim, words=width, width=s.width, count=s.num_tokens)
        # of what networks make: the projector's own patches have their size already
        self.size = None if c.compressor == "matryoshka" else WordSize(c.output_norm, dim, c.embedding_rms)

    def beside(self, clip: Clip) -> dict[str, Features]:
        """What `compress` is given of a clip beside its tower's features and its prompt: features of what is heard,
        which the clip brings, or which the audio tower makes of its sound."""
        name = self.config.audio.name
        if not name:
            return {}
        found = (clip.features or {}).get(name)
        if found is None and clip.sound is None:
            raise ValueError(
                f"the clips bring no features of model.audio.name={name!r}, only of {sorted(clip.features or {})}, and "
                "no sound: read shards of videos made with `vtok shards --audio`, or features recorded of them with "
                "`vtok features --audio-tower`, or train without audio"
            )
        return {"audio": self.ears.features(clip) if found is None else found}

    @property
    def ears(self) -> Any:
        if self._ears is None and self.config.audio.name:
            self._ears = load_ears(self.config.audio)
        return self._ears

    def encode(self, clip: Clip, *, budget: Budget | None = None) -> Tokens:
        return self.compress(self.features(clip), budget=budget, prompt=clip.prompt, **self.beside(clip))

    def compress(
        self,
        features: Features,
        *,
        budget: Budget | None = None,
        prompt: list[str] | None = None,
        audio: Features | None = None,
    ) -> Tokens:
        """Tokens of a batch of clips, in time order, those of whole clips first.

        Args:
            budget: tokens of each clip, 1 to `max_tokens`; clips with fewer give all they have. int64 [B, G]: of each
                group. None: all, up to `max_tokens`.
            prompt: questions, read where `text` is on; None: none. audio: features, where `audio.name` is set.
        Raises: ValueError for features of another width, for budgets out of range, where audio is missing.
        """
        c = self.config
        if (audio is None) == bool(c.audio.name):
            raise ValueError(
                f"model.audio.name={c.audio.name!r}, and compress was given {'no ' * (audio is None)}audio: `beside` "
                "says what it is to be given of a clip"
            )
        if prompt is not None and len(prompt) != len(features.patches):
            raise ValueError(f"{len(prompt)} prompts for {len(features.patches)} clips")
        if c.compressor == "progressive":
            features = repeat_images(features, c.progressive.repeat_images)
        batch = features.patches.shape[0]
        features, time = thin(features, c.max_frames)
        starts = segment(features, c.segments)
        lengths = features.count()
        scale = c.embedding_rms
        projected = self.project(features).patches
        projected = projected.masked_fill(~features.mask[:, :, None, None], 0) / scale
        cut = windows(starts, lengths, length=c.window)
        frames = Frames(projected, features.grid, lengths, time, cut, starts.cumsum(1) - 1)
        words = None if self.words is None else self.words(prompt or [""] * batch)
        made, plain = self._pieces(frames, words, audio, budget)
        groups = cut.index if c.groups == "window" else None
        pieces = [replace(p, embeddings=p.embeddings * scale) for p in plain]
        pieces += [replace(p, embeddings=self.size(p.embeddings)) for p in made if self.size is not None]
        if self.summary is not None and self.size is not None:
            tokens = self._summarise(frames, pieces, words)
            pieces.append(replace(tokens, embeddings=self.size(tokens.embeddings)))
        layout = arrange(pieces, frames=frames.patches.shape[1], groups=groups)
        keep = kept(layout, batch=batch, most=c.max_tokens, budget=budget)
        out = gather_tokens(pieces, layout, keep, lengths=lengths, seconds=features.times)
        # every network has a part in the loss, whatever was cut: its gradients are awaited on all ranks
        unused = torch.stack([(p.embeddings * 0).sum() for p in pieces]).sum()
        return replace(out, embeddings=out.embeddings + unused)

    @torch.no_grad()
    def most_tokens(self, features: Features) -> Tensor:
        """[B] int64: tokens of each clip without a budget, as many as its length and its cuts make."""
        audio = None
        if self.audio is not None:  # what is heard does not change how many there are
            audio = Features(features.patches.new_zeros(len(features.patches), 1, 1, self.config.audio.in_dim), (1, 1))
        return self.compress(features, audio=audio).lengths

    def _pieces(
        self, frames: Frames, words: Words | None, audio: Features | None, budget: Budget | None
    ) -> tuple[list[Piece], list[Piece]]:
        """Tokens around 1 in size: those that a network made, and patches of the projector's, or their means."""
        batch = len(frames.lengths)
        if isinstance(self.compressor, Matryoshka):
            asked = budget if isinstance(budget, Tensor) else torch.tensor(budget or self.max_tokens)
            asked = asked.to(frames.lengths.device).reshape(-1, asked.shape[-1] if asked.ndim else 1).sum(1)
            return self.compressor(frames, asked.expand(batch))
        return self.compressor(frames, words, None if audio is None else self._heard(frames, audio))

    def _heard(self, frames: Frames, audio: Features) -> Tensor:
        """[B, T, A, D]: what is heard during each frame, A means in time order, a learned vector where a clip has no
        sound. The audio features are those of the same stretch as the video's frames, so the one's time is the other's.
        """
        assert self.audio is not None
        tokens, count = self.config.audio.tokens, frames.patches.shape[1]
        heard = self.audio(audio.patches.to(self.audio.weight.dtype)).flatten(1, 2)  # [B, S, D]
        places = audio.patches.shape[2]
        at = torch.arange(count * tokens, device=heard.device)
        whole = (frames.lengths * tokens)[:, None].double()
        means = bin_means(heard, audio.count() * places, at / whole, (at + 1) / whole)
        return means.unflatten(1, (count, tokens))

    def _summarise(self, frames: Frames, pieces: list[Piece], words: Words | None) -> Piece:
        """Queries of whole clips: the mean of all frames, of each half, of each quarter ..., weighted by the question
        where it is known, and what they read in the clip's other tokens."""
        assert self.summary is not None
        batch, count = len(frames.lengths), self.config.summary.num_tokens
        layout = arrange(pieces, frames=frames.patches.shape[1])
        everything = torch.ones_like(layout.clip, dtype=torch.bool)
        read = gather_tokens(pieces, layout, everything, lengths=frames.lengths, seconds=None)
        context = read.embeddings / self.config.embedding_rms
        context = context + place_code(read.positions.to(context), context.shape[-1])
        begin, end = halves(count, frames.lengths.device)
        if self.asked is not None and words is not None:
            means = self.asked(frames, begin, end, *words)
        else:
            means = bin_means(frames.patches.mean(2), frames.lengths, begin, end)
        spans = torch.stack([(begin + end) / 2, *[torch.full_like(begin, torch.nan)] * 2], -1)
        queries = means + place_code(spans, means.shape[-1]).to(means)
        out = self.summary(queries, context, valid=read.mask) + means
        return clip_piece(out, spans.to(frames.time).expand(batch, -1, -1))


def _build(c: Config, dim: int) -> nn.Module:
    if c.compressor == "tdc":
        return DynamicContext(dim, former=c.former, static=c.static, separator=c.separator)
    if c.compressor == "dual_path":
        return DualPath(dim, c.dual_path)
    if c.compressor == "bridge":
        return MemoryBridge(dim, c.bridge, most=c.segments.most)
    if c.compressor == "matryoshka":
        return Matryoshka(c.matryoshka)
    kinds = {
        "attn_pool": (AttentionPool, c.pool),
        "turing": (TuringMachine, c.turing),
        "region": (RegionAttention, c.region),
        "progressive": (Progressive, c.progressive),
    }
    kind, own = kinds[c.compressor]
    return kind(dim, own)
