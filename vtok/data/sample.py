"""A reference to a sample into tensors and texts (`load_sample`), and several of those into a `Clip` (`collate`).

Legend: B batch, T frames, H height, W width.
"""

from __future__ import annotations

import functools
import json
import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.data.audio import SOUND, WavFile, frame_spans
from vtok.data.feature_shards import Window, collate_features, heard_in_window, window_of_features
from vtok.data.language import visible_questions
from vtok.data.sources import BrokenSample, Sample, ShardReader
from vtok.data.stems import stem_of
from vtok.data.view import HEARD, TEXT, Hearing, View, decode_view, fit, map_view
from vtok.types import Clip, Sound


class Item(NamedTuple):
    key: str
    video: Tensor | None  # uint8 [3, T, H, W]; of a map uint8 or float32 [C, T, H, W]; None for features and texts
    times: Tensor  # [T]; [0] of a text
    text: str | None
    qa: list[Any] | None
    features: Window | None = None
    captions: list[Any] | None = None
    heard: Window | None = None  # features of what is heard
    sound: Heard | None = None
    source: str = ""  # the video it was cut from


class Heard(NamedTuple):
    """samples: int16 [n] at `rate` Hz, from the beginning of a chunk on. spans: int64 [T, 2], of the frames in them."""

    samples: Tensor
    spans: Tensor
    rate: int


def read_facts(reader: ShardReader, sample: Sample) -> dict[str, Any]:
    """The json of a sample, its txt as the caption where there is one. Raises BrokenSample, OSError."""
    facts: Any = {}
    if "json" in sample.members:
        try:
            facts = json.loads(reader.read(sample, "json"))
        except (ValueError, RecursionError) as error:
            raise error if isinstance(error, BrokenSample) else BrokenSample(f".json is not json: {error}") from error
        if not isinstance(facts, dict):
            raise BrokenSample(f".json holds a {type(facts).__name__}, not an object")
    if "txt" in sample.members:
        facts["caption"] = reader.read(sample, "txt").decode("utf-8", errors="replace")
    return facts


def load_sample(reader: ShardReader, sample: Sample, view: View, *, rng: random.Random | None, key: str) -> Item:
    """One decoded sample. Raises DecodeError, BrokenSample or OSError."""
    facts = read_facts(reader, sample)
    source = str(facts.get("source") or stem_of(sample.key))
    return _loaded(reader, sample, view, facts, rng=rng, key=key)._replace(source=source)


def _loaded(
    reader: ShardReader, sample: Sample, view: View, facts: dict[str, Any], *, rng: random.Random | None, key: str
) -> Item:
    caption, qa = facts.get("caption"), facts.get("qa")
    if caption is not None and not isinstance(caption, str):
        raise BrokenSample(f"caption is a {type(caption).__name__}, not a string")
    timed = facts.get("captions")
    for name, value in (("qa", qa), ("captions", timed)):
        if value is not None and not isinstance(value, list):
            raise BrokenSample(f"{name} is a {type(value).__name__}, not a list")
    suffix = next(suffix for suffix in view.media if suffix in sample.members)
    if suffix == TEXT:
        if not (caption or "").strip():
            raise BrokenSample(".txt holds no text")
        return Item(key, None, torch.zeros(0), caption, qa)
    if view.cached is not None:
        read = functools.partial(_read_part, reader, sample, suffix)
        window = window_of_features(read, sample.members[suffix][1], view, rng)
        heard = None if view.hearing is None else _recorded_sound(reader, sample, view.hearing, window.times, view.fps)
        return Item(key, None, window.times.float(), caption, visible_questions(qa, window.times), window, timed, heard)
    if view.map:
        fps = facts.get("fps")
        if fps is not None and not (type(fps) in (int, float) and math.isfinite(fps) and fps > 0):
            raise BrokenSample(f"fps is {str(fps)[:40]!r}, not a number above 0")
        read = functools.partial(_read_part, reader, sample, suffix)
        frames, times = map_view(read, sample.members[suffix][1], view, rng, fps=fps)
    else:
        frames, times = decode_view(reader.read(sample, suffix), view, rng)
    sound = None if view.hearing is None else _sound(reader, sample, view.hearing, times, view.fps)
    video, told = fit(frames, view, rng), visible_questions(qa, times)
    return Item(key, video, times.float(), caption, told, captions=timed, sound=sound)


def _recorded_sound(reader: ShardReader, sample: Sample, hearing: Hearing, times: Tensor, fps: float | None) -> Window:
    spans = frame_spans(times, fps=fps, rate=hearing.rate)
    if HEARD not in sample.members:
        return heard_in_window(None, 0, hearing, times, spans)
    read = functools.partial(_read_part, reader, sample, HEARD)
    return heard_in_window(read, sample.members[HEARD][1], hearing, times, spans)


def _sound(reader: ShardReader, sample: Sample, hearing: Hearing, times: Tensor, fps: float | None) -> Heard:
    """The chunks of a clip's sound in which the frames lie. Raises DecodeError, BrokenSample, OSError."""
    spans = frame_spans(times, fps=fps, rate=hearing.rate)
    if SOUND not in sample.members:
        return Heard(torch.zeros(0, dtype=torch.int16), spans, hearing.rate)
    read = functools.partial(_read_part, reader, sample, SOUND)
    file = WavFile(read, sample.members[SOUND][1], rate=hearing.rate, chunk=hearing.chunk)
    first = int(spans.min()) // hearing.chunk
    samples = file.chunks(first, -(-int(spans.max()) // hearing.chunk))
    return Heard(samples, spans - first * hearing.chunk, hearing.rate)


def _read_part(reader: ShardReader, sample: Sample, suffix: str, first: int, num_bytes: int) -> bytes:
    return reader.read(sample, suffix, first=first, num_bytes=num_bytes)


def collate(items: Sequence[Item], *, frames: int | None = None) -> Clip:
    """Items as one batch, padded with repeats of the last frame (and its time) to `frames`; None: to the longest.

    Where uint8 and float maps meet in a batch, all become float32 in [-1, 1]. Features are padded with zeros. Texts are
    a batch without frames. Raises ValueError where clips have different numbers of channels.
    """
    told: dict[str, Any] = dict(
        text=[item.text or "" for item in items] if any(item.text for item in items) else None,
        qa=[item.qa or [] for item in items] if any(item.qa for item in items) else None,
        captions=[item.captions or [] for item in items] if any(item.captions for item in items) else None,
        sources=[item.source or stem_of(item.key) for item in items],
    )
    if all(item.video is None and item.features is None for item in items):
        return Clip([item.key for item in items], **told)
    counts = [len(item.times) for item in items]
    most = frames or max(counts)
    times = torch.empty((len(items), most))
    for row, item in enumerate(items):
        times[row, : counts[row]] = item.times
        times[row, counts[row] :] = item.times[-1]
    windows = [item.features for item in items if item.features is not None]
    heard = [item.heard for item in items if item.heard is not None]
    features = {each[0].tower: collate_features(each, most) for each in (windows, heard) if each}
    sounds = [item.sound for item in items if item.sound is not None]
    return Clip(
        keys=[item.key for item in items],
        video=None if windows else _videos([(item.key, item.video) for item in items if item.video is not None], most),
        lengths=None if min(counts) == most else torch.tensor(counts),
        times=times,
        **told,
        features=features or None,
        sound=_sounds(sounds, most) if sounds else None,
    )


def _sounds(sounds: Sequence[Heard], frames: int) -> Sound:
    lengths = torch.tensor([len(each.samples) for each in sounds])
    samples = torch.nn.utils.rnn.pad_sequence([each.samples for each in sounds], batch_first=True)
    spans = torch.zeros(len(sounds), frames, 2, dtype=torch.int64)
    for row, each in enumerate(sounds):
        spans[row, : len(each.spans)] = each.spans
    return Sound(samples, lengths, spans, sounds[0].rate)


def _videos(keyed: Sequence[tuple[str, Tensor]], most: int) -> Tensor:
    """(key, video [C, T, H, W]) of each clip as [B, C, most, H, W], the last frame repeated."""
    channels = {video.shape[0]: key for key, video in keyed}
    if len(channels) > 1:
        told = ", ".join(f"{count} in {key!r}" for count, key in sorted(channels.items()))
        raise ValueError(f"the dense maps of data.shards have different numbers of channels: {told}; use one number")
    videos = [video for _, video in keyed]
    if len({video.dtype for video in videos}) > 1:
        videos = [_as_float(video) for video in videos]
    first = videos[0]
    out = torch.empty((len(videos), first.shape[0], most, *first.shape[2:]), dtype=first.dtype)
    for row, video in enumerate(videos):
        out[row, :, : video.shape[1]] = video
        out[row, :, video.shape[1] :] = video[:, -1:]
    return out


def _as_float(video: Tensor) -> Tensor:
    return video if video.is_floating_point() else video.float().div_(127.5).sub_(1.0)
