"""The sound track of a clip as a wav file, in step with its frames."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import av
import av.error
import numpy as np

from vtok.data.strict import FORMATS, DecodeError


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
