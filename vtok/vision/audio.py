"""A frozen audio tower: the sound of clips in, Features out, a vector for every part of every video frame.

    the clip's sound -> chunks, counted from its start -> the tower -> a vector for every `step`   (what a cache keeps)
                                                                               |
    when each frame is on show ------------------------------------------> means over its parts -> Features [B, T, A, D]

A chunk is heard by itself, whichever frames of the clip are looked at: features recorded of whole clips are those that
a window of frames would be given.

Letters: B clips, T frames, A tokens of a frame, M chunks in one call, S vectors of a sound, n samples, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.types import Clip, Features, Sound, means_over
from vtok.vision.held import Held
from vtok.vision.tower import DTYPES


@dataclass
class AudioTowerConfig:
    """Which audio tower, and what is taken from it."""

    name: str = ""  # hf:USER/REPO, or a folder that save_pretrained wrote; "" = no audio
    tokens: int = 50  # of a video frame: means over equal parts of the time that it is on show
    layer: int = -1  # block whose output is taken; -1 = the tower's own last output
    dtype: str = "float32"  # float32 | bfloat16 | float16: of the weights and of the features
    # seconds heard at once, counted from the clip's start; 0 = all that the tower hears (Whisper 30, AST 10.1), and 10
    # of one that would hear any length
    chunk_s: float = 0.0
    pool: int = 1  # successive vectors of the tower that are averaged into one, before anything else
    chunks_per_call: int = 8  # that go through the tower at once; bounds the memory
    revision: str = ""  # branch, tag or commit of a repository; "" = its default branch
    sha256: str = ""  # expected hash of the weights; "" = any

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"audio.dtype={self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        for key in ("tokens", "pool", "chunks_per_call"):
            if getattr(self, key) < 1:
                raise ValueError(f"audio.{key}={getattr(self, key)} must be at least 1")
        if self.chunk_s < 0:
            raise ValueError(f"audio.chunk_s={self.chunk_s} must be above 0 seconds, or 0 for the tower's own")


class Ear:
    """A library's model behind one call."""

    model: torch.nn.Module
    facts: dict[str, Any]  # of its feature extractor: plain values, what the model hears depends on them
    rate: int  # Hz
    stride: int  # samples behind one vector
    longest: int | None  # vectors of the longest sound it hears; None: of any length
    depth: int
    embedding_dim: int

    def heard_as(self, samples: int) -> int:
        """Samples that a chunk of so many is filled up to with silence; chunks with as many share a call."""
        raise NotImplementedError

    def inputs(self, sound: Tensor) -> dict[str, Tensor]:
        """What the model takes for one chunk, float32 [n] in [-1, 1]: tensors [1, ...]."""
        raise NotImplementedError

    def run(self, inputs: dict[str, Tensor], layer: int) -> Tensor:
        """Vectors [M, S, D] of chunks, one for every `stride` samples; the last ones may be missing."""
        raise NotImplementedError


class AudioTower(Held):
    """A frozen audio tower; no nn.Module, as `Tower` is none. `load_audio_tower` makes one.

    name, sha256, revision: where its weights came from. embedding_dim: D. tokens: A. rate: Hz of the sound it hears.
    step: samples behind each vector that it gives. chunk: samples heard at once, a multiple of it.
    """

    def __init__(self, config: AudioTowerConfig, ear: Ear, *, layer: int, sha256: str, revision: str = ""):
        super().__init__(config, ear.model, layer=layer, facts=ear.facts, sha256=sha256, revision=revision)
        self._ear = ear
        self.embedding_dim, self.rate, self.tokens = ear.embedding_dim, ear.rate, config.tokens
        self.step = ear.stride * config.pool
        longest = ear.longest or round(10.0 * ear.rate / ear.stride)
        vectors = round(config.chunk_s * ear.rate / ear.stride) if config.chunk_s else longest
        if ear.longest is not None and vectors > ear.longest:
            raise ValueError(
                f"audio.chunk_s={config.chunk_s}: {config.name} hears {ear.longest * ear.stride / ear.rate:g} s at once"
            )
        if vectors < config.pool:
            raise ValueError(
                f"audio.pool={config.pool} is more than the {vectors} vectors of a chunk of {config.name}: lower it, "
                "or raise audio.chunk_s"
            )
        self.chunk = vectors // config.pool * self.step

    def identity(self) -> dict[str, Any]:
        """As of every tower; chunk counts samples, pool is the config's: vectors depend on them, too."""
        return {**super().identity(), "chunk": self.chunk, "pool": self.config.pool}

    def __reduce__(self) -> tuple[Any, ...]:
        from vtok.vision.audio_load import load_audio_tower

        return load_audio_tower, (self.pinned(),)

    def features(self, clip: Clip) -> Features:
        """The clip's cached features of this tower where it brings them, else those of its sound; see `forward`.

        Raises: ValueError for a clip with neither.
        """
        if clip.features and self.name in clip.features:
            return clip.features[self.name]
        if clip.sound is None:
            raise ValueError(
                f"the clip has neither a sound nor features of {self.name!r}, only of {list(clip.features or {})}"
            )
        return self.forward(clip.sound, clip.lengths, times=clip.times)

    def __call__(self, sound: Sound, lengths: Tensor | None = None, **asked: Any) -> Features:
        return self.forward(sound, lengths, **asked)

    @torch.no_grad()
    def forward(self, sound: Sound, lengths: Tensor | None = None, *, times: Tensor | None = None) -> Features:
        """Features of what is heard during each frame, on the sound's device, where the tower is moved to.

        Args:
            sound: its first sample is the first of a chunk, counted from the clip's start. lengths: [B] real frames;
                None: all. times: [B, T] seconds of the frames.
        Returns: patches [B, T, A, D] on a grid (1, A), in time order. frame: float32 [B, T, 1], the share of each frame
            during which there is sound: 0 in clips without a sound track, whose patches are zeros, as padding's are.
        Raises: ValueError for sound of another rate.
        """
        if sound.rate != self.rate:
            raise ValueError(f"{self.name} hears sound at {self.rate} Hz, this one is at {sound.rate} Hz: resample it")
        if self.device != sound.samples.device:
            self.to(sound.samples.device)
        batch, frames = sound.spans.shape[:2]
        given = [row[:count] for row, count in zip(sound.samples, sound.lengths.tolist())]
        patches = torch.zeros(batch, frames, self.tokens, self.embedding_dim, dtype=self._dtype, device=self.device)
        share = torch.zeros(batch, frames, 1, device=self.device)
        for row, vectors in enumerate(self.sequences(given)):
            patches[row], share[row, :, 0] = means_over(vectors, sound.spans[row].double() / self.step, self.tokens)
        return Features(patches, (1, self.tokens), times=times, frame=share, lengths=lengths)

    @torch.no_grad()
    def sequences(self, sounds: Sequence[Tensor]) -> list[Tensor]:
        """The vectors [ceil(n / step), D] of sounds int16 [n] that begin where a chunk does, on the tower's device."""
        pieces = [(row, piece) for row, sound in enumerate(sounds) if len(sound) for piece in sound.split(self.chunk)]
        found: list[Tensor] = [torch.empty(0)] * len(pieces)
        groups: dict[int, list[int]] = {}
        for number, (_, piece) in enumerate(pieces):
            groups.setdefault(self._ear.heard_as(len(piece)), []).append(number)
        for numbers in groups.values():
            for part in torch.tensor(numbers).split(self.config.chunks_per_call):
                some = part.tolist()
                for number, vectors in zip(some, self._hear([pieces[number][1] for number in some])):
                    found[number] = vectors
        empty = torch.zeros(0, self.embedding_dim, dtype=self._dtype, device=self.device)
        own: list[list[Tensor]] = [[empty] for _ in sounds]
        for (row, _), vectors in zip(pieces, found):
            own[row].append(vectors)
        return [torch.cat(each) for each in own]

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    def _hear(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of chunks that share a call."""
        made = [self._ear.inputs(piece.cpu().float() / 32768) for piece in pieces]
        inputs = {name: torch.cat([each[name] for each in made]).to(self.device) for name in made[0]}
        inputs = {n: v.to(self._dtype) if v.is_floating_point() else v for n, v in inputs.items()}
        # what is cached must be what is heard live: the tower's dtype, whatever the trainer's precision
        with torch.autocast(self.device.type, enabled=False):
            vectors = self._ear.run(inputs, self.layer)
        return [self._pooled(row, -(-len(piece) // self._ear.stride)) for row, piece in zip(vectors, pieces)]

    def _pooled(self, vectors: Tensor, count: int) -> Tensor:
        """The first `count` vectors (the last one stands for those that are missing), `pool` averaged into one."""
        last = vectors[-1:].expand(max(0, count - len(vectors)), -1)
        vectors = torch.cat([vectors[:count], last])
        if self.config.pool == 1:
            return vectors
        means = [part.float().mean(0) for part in vectors.split(self.config.pool)]
        return torch.stack(means).to(vectors.dtype)
