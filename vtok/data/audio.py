"""The sound track of a clip as a wav file, in step with its frames: written, and read for a window of them.

Legend: T frames, n samples.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from pathlib import Path

import av
import av.error
import numpy as np
import torch
from torch import Tensor

from vtok.data.strict import FORMATS, DecodeError

SOUND = "wav"  # member of a sample that holds its sound
_HEAD_BYTES = 1 << 16  # in which the samples of a wav file begin, whatever else it tells


def read_audio(path: Path, *, start_s: float, duration_s: float, rate: int) -> bytes:
    """A wav file, mono 16 bit, of [start_s, start_s + duration_s): seconds from the first video frame, as for frames.

    Where the audio track begins later, ends earlier or has a hole there is silence. Raises DecodeError for damage.
    """
    samples = np.zeros(max(1, round(duration_s * rate)), np.int16)
    options = {"err_detect": "explode", "protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        with av.open(f"file:{path}", options=options) as container:
            video, stream = container.streams.video[0], container.streams.audio[0]
            origin = float((video.start_time or 0) * (video.time_base or 0))
            if start_s > 1.0:
                container.seek(int((origin + start_s - 1.0) * av.time_base))
            resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
            place: int | None = None
            for frame in container.decode(stream):
                if frame.time is not None:
                    due = round((frame.time - origin - start_s) * rate)
                    if place is None or abs(due - place) > 0.05 * rate:  # rounded timestamps are not a hole
                        place = due
                for piece in resampler.resample(frame):
                    place = _put(samples, piece.to_ndarray()[0], place or 0)
                if place is not None and place >= len(samples):
                    break
            for piece in resampler.resample(None):
                place = _put(samples, piece.to_ndarray()[0], place or 0)
    except (av.error.FFmpegError, IndexError) as error:
        raise DecodeError(f"audio track: {error}") from error
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def _put(samples: np.ndarray, piece: np.ndarray, place: int) -> int:
    """Copy the part of `piece` that falls inside `samples` when it begins at `place`; where it ends."""
    first, last = max(0, place), min(len(samples), place + len(piece))
    if first < last:
        samples[first:last] = piece[first - place : last - place]
    return place + len(piece)


class WavFile:
    """Sound of a wav file at a rate, mono, int16; only the bytes of what is asked are read.

    read: (offset, bytes) of a file of `num_bytes`. rate: Hz of the samples that are given, resampled where the file has
    another, chunk by chunk: a chunk is the same whichever others are asked. chunk: samples of one, at `rate`.
    total: samples of the whole sound, at `rate`.
    Raises: DecodeError for a file that is no 16-bit PCM, or damaged.
    """

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int, *, rate: int, chunk: int) -> None:
        head = read(0, min(_HEAD_BYTES, num_bytes))
        self._read, self.rate, self.chunk = read, rate, chunk
        self._channels, self._rate, self._begin, size = _wav_header(head, num_bytes)
        self._samples = size // (2 * self._channels)
        self.total = round(self._samples * rate / self._rate)

    def chunks(self, first: int, stop: int) -> Tensor:
        """int16 [n]: the sound from chunk `first` to before chunk `stop`, where there is any. Raises DecodeError."""
        pieces = [self._piece(number) for number in range(first, min(stop, -(-self.total // self.chunk)))]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int16), *pieces]))

    def _piece(self, number: int) -> np.ndarray:
        begin, end = number * self.chunk, min((number + 1) * self.chunk, self.total)
        first = round(begin * self._rate / self.rate)
        stop = min(round(end * self._rate / self.rate), self._samples)
        width = 2 * self._channels
        data = self._read(self._begin + first * width, (stop - first) * width)
        if len(data) != (stop - first) * width:
            raise DecodeError(f"the sound is cut short: {len(data)} of {(stop - first) * width} bytes")
        sound = np.frombuffer(data, "<i2").reshape(-1, self._channels)
        if self._channels > 1:
            sound = np.rint(sound.astype(np.float32).mean(1)).astype(np.int16)
        sound = np.ascontiguousarray(sound.reshape(-1), dtype=np.int16)
        if self._rate == self.rate:
            return sound
        out = np.zeros(end - begin, np.int16)
        _put(out, _resampled(sound, self._rate, self.rate), 0)
        return out


def _wav_header(head: bytes, num_bytes: int) -> tuple[int, int, int, int]:
    """(channels, Hz, where the samples begin, their bytes). Raises DecodeError."""
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise DecodeError("the sound is no wav file")
    at, told = 12, None
    while at + 8 <= len(head):
        name, size = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if name == b"fmt " and at + 24 <= len(head):
            kind, channels = (int.from_bytes(head[at + i : at + i + 2], "little") for i in (8, 10))
            if kind == 0xFFFE and size >= 26:  # the kind stands further on
                kind = int.from_bytes(head[at + 32 : at + 34], "little")
            told = kind, channels, int.from_bytes(head[at + 12 : at + 16], "little")
            bits = int.from_bytes(head[at + 22 : at + 24], "little")
            if kind != 1 or bits != 16 or not channels or not told[2]:
                raise DecodeError(
                    f"the wav has format {kind} of {bits} bits, {channels} channels at {told[2]} Hz: 16-bit PCM is read"
                )
        if name == b"data" and told is not None:
            if at + 8 + size > num_bytes:
                raise DecodeError(f"the sound is cut short: {num_bytes - at - 8} of {size} bytes")
            return told[1], told[2], at + 8, size
        at += 8 + size + size % 2
    raise DecodeError(f"the wav tells no samples in its first {len(head)} bytes")


def _resampled(sound: np.ndarray, rate: int, to: int) -> np.ndarray:
    resampler = av.AudioResampler(format="s16", layout="mono", rate=to)
    frame = av.AudioFrame.from_ndarray(sound[None], format="s16", layout="mono")
    frame.sample_rate = rate
    try:
        pieces = [piece.to_ndarray()[0] for given in (frame, None) for piece in resampler.resample(given)]
    except av.error.FFmpegError as error:
        raise DecodeError(f"the sound cannot be resampled from {rate} to {to} Hz: {error}") from error
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int16)


def frame_spans(times: Tensor, *, fps: float | None, rate: int) -> Tensor:
    """int64 [T, 2]: the samples at `rate`, counted from the clip's start, between which each frame is on show.

    times: float64 [T] seconds. fps: frames per second; None: each lasts until the next, the last one as long as the one
    before it, and a single one for a second.
    """
    if fps is not None:
        end = times + 1 / fps
    else:
        last = times[-1] - times[-2] if len(times) > 1 else torch.ones((), dtype=times.dtype)
        end = torch.cat([times[1:], (times[-1] + last)[None]])
    return (torch.stack([times, end], 1) * rate).round().long()
