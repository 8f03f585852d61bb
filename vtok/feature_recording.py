"""The clips of a shard through frozen towers: short ones in calls they share, long ones piece after piece.

    sample -> frames at a rate, fitted to a size --+-- fewer than frames_per_call -> wait for others -> tower -+-> clip
                                                   +-- more -----> tower, piece after piece -------------------+
    its sound, where an audio tower is to hear it -> chunk after chunk ----------------------------------------+

Which clips share a call depends on the shard and the settings alone, so that the same shard gives the same bytes again.
What is held of pixels is bounded by `frames_per_call`, whatever the length of the clips.

Letters: B clips, T frames, S feature frames (vectors, of a sound), H height, W width, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from vtok.data.audio import SOUND, WavFile
from vtok.data.decode import VideoReader
from vtok.data.feature_index import FeatureSettings, hearing_of
from vtok.data.feature_shards import Recording, check_size, recorded_sound
from vtok.data.sample import read_facts
from vtok.data.shard_work import Rejected
from vtok.data.sources import BrokenSample, Sample, ShardReader
from vtok.data.strict import DecodeError
from vtok.data.view import View, decode_view, fit
from vtok.data.workers import Notify
from vtok.types import Features
from vtok.vision import AudioTower, Tower


class _Video(VideoReader):
    """A video that knows, once it is read to its end, until when its last frame is on show."""

    end_s = 0.0

    @property
    def tolerance_s(self) -> float:
        return self._tolerance

    def _from(self, start_s: float) -> Iterator[tuple[VideoFrame, float]]:
        for frame, seconds in super()._from(start_s):
            self.end_s = seconds + self._shown_for(frame)
            yield frame, seconds


@dataclass
class RecordedClip:
    """A clip on its way: its frames uint8 [T, 3, H, W] until the tower has seen them, and then its features."""

    key: str
    json: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)  # of its `Recording`
    seconds: list[float] = field(default_factory=list)
    frames: Tensor | None = None
    features: list[Features] = field(default_factory=list)
    heard: Recording | None = None  # of its sound

    def recording(self, stride: int) -> Recording:
        first = self.features[0]

        def joined(values: list[Tensor | None]) -> Tensor | None:
            kept = [value for value in values if value is not None]
            return torch.cat(kept, 1) if kept else None

        patches = joined([f.patches for f in self.features])
        assert patches is not None
        attention = {n: joined([(f.attention or {})[n] for f in self.features]) for n in first.attention or {}}
        features = Features(
            patches,
            first.grid,
            frame=joined([f.frame for f in self.features]),
            attention={n: value for n, value in attention.items() if value is not None} or None,
            keys=joined([f.keys for f in self.features]),
        )
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        return Recording(features=features, seconds=seconds, stride=stride, **self.facts)


class Recorder:
    """A tower on clips, and an audio tower on their sound. Raises ValueError for settings it cannot follow."""

    def __init__(self, tower: Tower, settings: FeatureSettings, *, audio: AudioTower | None = None) -> None:
        self.tower, self.settings, self.audio = tower, settings, audio
        self.view = View(num_frames=settings.frames or 1, size=settings.size, fps=settings.fps, crop=settings.crop)
        # video towers see each window by itself, so a long clip may be cut between windows
        self.most = max(1, tower.config.frames_per_call // tower.window) * tower.window

    def shard(
        self, reader: ShardReader, index: int, *, lost: dict[str, str], notify: Notify
    ) -> Iterator[tuple[str, RecordedClip | Rejected]]:
        """(key, the clip with its features, or why there are none) of every sample of a shard.

        Clips come in order. lost: {key: reason} of samples not to touch. notify: called with each key before it is
        touched. Raises: OSError where the shard cannot be read.
        """
        waiting: list[RecordedClip] = []
        for sample in reader.samples(index):
            if sample.passing:
                raise OSError(f"{reader.shards[index].url}: {sample.problem}")
            notify(sample.key)
            reason = sample.problem or lost.get(sample.key)
            if reason is not None:
                yield sample.key, Rejected(reason, sample.lost)
                continue
            try:
                clip = self._read(reader, sample)
            except (DecodeError, BrokenSample) as error:
                yield sample.key, Rejected(str(error))
                continue
            counts = [len(each.seconds) for each in (*waiting, clip)]
            # the second: they are padded to the longest, which must not hold an image each for every frame of it
            if clip.frames is None or sum(counts) > self.most or len(counts) * max(counts) > 2 * self.most:
                yield from self._see_all(waiting)
                waiting = []
            if clip.frames is None:
                yield clip.key, clip
            else:
                waiting.append(clip)
        yield from self._see_all(waiting)

    def _read(self, reader: ShardReader, sample: Sample) -> RecordedClip:
        """The clip with its frames; where they are too many to wait, they have been seen already."""
        clip = RecordedClip(sample.key, read_facts(reader, sample))
        suffix = next(suffix for suffix in self.view.media if suffix in sample.members)
        media = reader.read(sample, suffix)
        with _Video(media) as video:
            frames = self._whole(video) if self.settings.frames is None else self._middle(video, media)
            held: list[Tensor] = []
            num_bytes = 0
            for pixels, seconds in frames:
                if len(held) == self.most:
                    num_bytes += self._see_piece(clip, held)
                    check_size(num_bytes)
                    held = []
                clip.seconds.append(seconds)
                held.append(pixels)
            if not clip.seconds:
                raise DecodeError("0 frames")
            if clip.features or len(clip.seconds) >= self.most:
                check_size(num_bytes + self._see_piece(clip, held))
            else:
                clip.frames = torch.stack(held)
            clip.facts = self._facts(video, clip.seconds)
        if self.audio is not None and SOUND in sample.members:
            clip.heard = self._hear(reader, sample, clip.facts)
        return clip

    @torch.inference_mode()
    def _hear(self, reader: ShardReader, sample: Sample, facts: dict[str, Any]) -> Recording | None:
        """What the audio tower makes of a clip's sound: of all of it, or of the window that was recorded."""
        assert self.audio is not None
        tower, whole = self.audio, self.settings.frames is None

        def read(first: int, num_bytes: int) -> bytes:
            return reader.read(sample, SOUND, first=first, num_bytes=num_bytes)

        file = WavFile(read, sample.members[SOUND][1], rate=tower.rate, chunk=tower.chunk)
        begin, end = (0, file.total) if whole else (round(facts[key] * tower.rate) for key in ("start_s", "end_s"))
        chunk = begin // tower.chunk
        (vectors,) = tower.sequences([file.chunks(chunk, -(-end // tower.chunk)).to(tower.device)])
        first, before = begin // tower.step, chunk * tower.chunk // tower.step
        vectors = vectors.cpu()[first - before : -(-end // tower.step) - before]
        return recorded_sound(vectors, hearing_of(tower), first=first) if len(vectors) else None

    def _facts(self, video: _Video, seconds: list[float]) -> dict[str, Any]:
        rate = self.settings.fps or video.fps or 1.0
        facts = {"image": video.is_image, "fps": video.fps, "tolerance_s": video.tolerance_s}
        if self.settings.frames is None:
            return {**facts, "start_s": 0.0, "duration_s": video.duration_s or 0.0, "end_s": video.end_s}
        span = {"start_s": seconds[0], "duration_s": len(seconds) / rate, "end_s": seconds[-1] + 1 / rate}
        return facts | span

    def _whole(self, video: _Video) -> Iterator[tuple[Tensor, float]]:
        """Every frame at the rate, uint8 [3, H, W] of settings.size, and its time."""
        fps = self.settings.fps
        if video.is_image or fps is None:
            shown = video.frames()
        else:
            shown = ((frame, number / fps) for number, frame in enumerate(video.at_rate(fps)))
        last = out = None
        for frame, seconds in shown:
            if frame is not last or out is None:
                if last is not None and frame.shape != last.shape:
                    raise DecodeError(f"the frame size changes from {last.shape[:2]} to {frame.shape[:2]}")
                pixels = torch.from_numpy(np.ascontiguousarray(frame))[None]
                last, out = frame, fit(pixels, self.view, None)[:, 0]
            yield out, seconds

    def _middle(self, video: _Video, media: bytes) -> Iterator[tuple[Tensor, float]]:
        """The same of the window that validation sees."""
        frames, times = decode_view(media, self.view, None)
        yield from zip(fit(frames, self.view, None).unbind(1), times.tolist())

    def _see_piece(self, clip: RecordedClip, frames: list[Tensor]) -> int:
        """Features of a stretch of frames [3, H, W] of a long clip; how many bytes they take."""
        if not frames:
            return 0
        (found,) = self._see([torch.stack(frames)])
        clip.features.append(found)
        tensors = (found.patches, found.frame, found.keys, *(found.attention or {}).values())
        return sum(value.numel() * value.element_size() for value in tensors if value is not None)

    def _see_all(self, clips: list[RecordedClip]) -> Iterator[tuple[str, RecordedClip]]:
        """The clips with their features, from one call of the tower."""
        if not clips:
            return
        found = self._see([clip.frames for clip in clips if clip.frames is not None])
        for clip, features in zip(clips, found):
            clip.features, clip.frames = [features], None
            yield clip.key, clip

    @torch.inference_mode()
    def _see(self, videos: list[Tensor]) -> list[Features]:
        """Features [1, S, ...] of each of the videos uint8 [T, 3, H, W]."""
        counts = torch.tensor([len(video) for video in videos])
        pixels = torch.nn.utils.rnn.pad_sequence(videos, batch_first=True).transpose(1, 2)  # [B, 3, T, H, W]
        settings = self.settings
        seen = self.tower(
            pixels.to(self.tower.device),
            counts,
            attention=settings.attention,
            attention_from=settings.attention_from,
            keys=settings.keys,
        )
        seen = _on_cpu(seen)
        out = []
        for row, steps in enumerate(self.tower.feature_frames(counts).tolist()):
            cut = {n: v[row : row + 1, :steps] for n, v in (seen.attention or {}).items()}
            frame, keys = (None if v is None else v[row : row + 1, :steps] for v in (seen.frame, seen.keys))
            patches = seen.patches[row : row + 1, :steps]
            out.append(Features(patches, seen.grid, frame=frame, attention=cut or None, keys=keys))
        return out


def _on_cpu(seen: Features) -> Features:
    attention = {n: v.cpu() for n, v in (seen.attention or {}).items()} or None
    frame, keys = (None if v is None else v.cpu() for v in (seen.frame, seen.keys))
    return replace(seen, patches=seen.patches.cpu(), frame=frame, attention=attention, keys=keys, lengths=None)


def own_size(tower: Tower) -> tuple[int, int]:
    """(height, width) that the tower resizes square frames to: frames of it are only cropped and normalised."""
    resize = tower.preprocess.resize
    if resize is None:
        raise ValueError(f"{tower.name} takes frames as they are: say at which --size HxW it should see them")
    return (resize[0], resize[0]) if tower.preprocess.fit == "shortest" else (resize[0], resize[1])


def try_settings(tower: Tower, settings: FeatureSettings) -> None:
    """Raise now what the tower would refuse after an hour."""
    black = torch.zeros(1, 3, 1, *settings.size, dtype=torch.uint8)
    asked = {"attention": settings.attention, "attention_from": settings.attention_from, "keys": settings.keys}
    with torch.inference_mode():
        tower(black, **asked)
