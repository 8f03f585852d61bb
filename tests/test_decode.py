"""Frames by time, upright, in the right colours; damage that libav would conceal is an error."""

from __future__ import annotations

import functools
import io
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from vtok.data.decode import DecodeError, VideoReader, decode_window, iter_frames, probe
from vtok.data.encode import write_video


def encode(frames, **keywords) -> bytes:
    settings = {"fps": 30} | keywords
    if settings.get("codec") == "libx265":  # 216 corrupts the heap now and then: not in the process of the tests
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
            path = Path(folder) / "video.mp4"
            pool.submit(write_video, path, np.stack(list(frames)), **settings).result(timeout=PATIENCE_S)
            return path.read_bytes()
    file = io.BytesIO()
    write_video(file, frames, **settings)
    return file.getvalue()


def ramp(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """Frame k is grey 4 k."""
    return np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


def noise(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """A texture that pans: hard to predict, so damage is spread over many frames."""
    texture = np.random.default_rng(0).integers(0, 256, (height + count, width + count, 3)).astype(np.uint8)
    return [texture[k : k + height, k : k + width] for k in range(count)]


@functools.cache
def sample(container: str = "mp4", codec: str = "libx264") -> bytes:
    return encode(noise(60), codec=codec, container=container)


def numbers(frames) -> list[int]:
    return [round(float(frame[0, 0, 0]) / 4) for frame in frames]


def remux(data: bytes, *, degrees: int = 0, mirror: bool = False) -> bytes:
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees, hflip=mirror)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4", "ffv1", "png"])
def test_written_frames_come_back_in_order_and_number(codec):
    data = encode(ramp(30, 64, 64), codec=codec)
    info = probe(data)
    assert (info.width, info.height, info.fps, info.rotation, info.has_audio) == (64, 64, 30.0, 0, False)
    assert info.frames in (30, None) and abs(info.duration_s - 1.0) < 0.01
    frames = list(iter_frames(data))
    assert np.abs([int(f[0, 0, 0]) - 4 * k for k, (f, _) in enumerate(frames)]).max() <= 7 and len(frames) == 30
    assert np.allclose([t for _, t in frames], np.arange(30) / 30, atol=1e-3)


@pytest.mark.parametrize("codec", ["ffv1", "png"])
def test_lossless_codecs_return_the_same_bytes(codec):
    frames = torch.from_numpy(np.stack(noise(4, 17, 23)))
    assert torch.equal(decode_window(encode(frames, codec=codec), num_frames=4)[0], frames)


def test_frames_are_picked_by_time():
    data = encode(ramp(40))
    window, times = decode_window(data, start_s=0.5, num_frames=4, fps=10)
    assert numbers(window) == [15, 18, 21, 24] and np.allclose(times, [0.5, 0.6, 0.7, 0.8])
    assert numbers(decode_window(data, times=[0.0, 0.02, 0.049, 0.051, 0.051])[0]) == [0, 0, 1, 1, 1]
    assert numbers(decode_window(data, start_s=0.11, num_frames=3)[0]) == [3, 4, 5]
    assert numbers(f for f, _ in iter_frames(data, start_s=0.11, end_s=0.2)) == [3, 4, 5]


def test_variable_frame_rate_shows_a_frame_until_the_next():
    shown_at = [0.0, 0.1, 0.5, 0.55, 1.4, 1.45]
    data = encode(ramp(6), times=shown_at, options={"bf": "0"})
    wanted = np.arange(0, 1.45, 0.04)
    expected = [int(np.searchsorted(shown_at, t + 1e-6, side="right")) - 1 for t in wanted]
    assert numbers(decode_window(data, times=wanted)[0]) == expected and {0, 1, 2, 3, 4} == set(expected)
    assert np.allclose([t for _, t in iter_frames(data)], shown_at, atol=1e-4)


def test_coarse_ticks_of_matroska_do_not_shift_frames():
    data = encode(ramp(40), codec="ffv1")  # ticks of 1 ms: 1/30 s is stored as 33 ms
    assert numbers(decode_window(data, num_frames=38, fps=30)[0]) == list(range(38))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3"}),
        ("libx264", {"g": "12", "intra-refresh": "1"}),
        ("libx265", {"x265-params": "log-level=none:open-gop=1:keyint=12:bframes=4"}),
    ],
)
def test_every_seek_gives_the_frames_of_a_full_decode(codec, options):
    data = encode(noise(40), codec=codec, options=options)
    whole = np.stack([frame for frame, _ in iter_frames(data)])
    with VideoReader(data) as reader:
        for k in (*range(0, 38, 3), 5):
            assert (reader.window(start_s=k / 30, num_frames=2, fps=30)[0].numpy() == whole[k : k + 2]).all()


def test_windows_end_with_the_video():
    data = encode(ramp(12))
    window, times = decode_window(data, start_s=0.3, num_frames=8, fps=10)
    assert numbers(window) == [9] and times.tolist() == [0.3]
    with pytest.raises(DecodeError, match="before 5.000 s"):
        decode_window(data, start_s=5.0, num_frames=2, fps=10)
    assert list(iter_frames(data, start_s=5.0)) == []


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_and_mirroring_are_applied(degrees, mirror):
    """Mirrored as stored first, then turned counterclockwise, as the display matrix says."""
    plain = encode(noise(2, 32, 48))
    stored = decode_window(plain, num_frames=2)[0].numpy()
    turned = remux(plain, degrees=degrees, mirror=mirror)
    seen = decode_window(turned, num_frames=2)[0].numpy()
    steps = degrees // 90
    expected = np.rot90(stored[:, :, ::-1] if mirror else stored, -steps if mirror else steps, axes=(1, 2))
    assert seen.shape == expected.shape and (seen == expected).all()
    info = probe(turned)
    assert (info.height, info.width) == seen.shape[1:3] and info.rotation == (0 if mirror else degrees)


@pytest.mark.parametrize(("space", "name"), [(1, "ITU709"), (6, "SMPTE170M"), (9, "BT2020")])
@pytest.mark.parametrize("color_range", [1, 2])
def test_declared_colours_are_honoured(space, name, color_range):
    colour = np.zeros((32, 32, 3), np.uint8)
    colour[:] = (200, 60, 30)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=10, options={"crf": "2"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, color_range
        frame = av.VideoFrame.from_ndarray(colour, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=name, dst_color_range=color_range)
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    (frame, _), *_ = iter_frames(out.getvalue())
    assert np.abs(frame.astype(int) - (200, 60, 30)).max() <= 3
    assert np.abs(next(iter_frames(encode(colour[None], crf=2)))[0].astype(int) - (200, 60, 30)).max() <= 3


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("png", "rgb24"), ("png", "gray"), ("mjpeg", "yuvj444p"), ("bmp", "bgr24")]
)
def test_images_are_clips_of_one_frame(codec, pix_fmt, tmp_path):
    flat = np.full((1, 21, 33, 3), 90, np.uint8)
    data = encode(flat, fps=1, codec=codec, container="image2pipe", pix_fmt=pix_fmt)
    info = probe(data)
    assert info.is_image and (info.frames, info.width, info.height, info.fps) == (1, 33, 21, 0.0)
    for keywords in ({"num_frames": 8, "fps": 8.0}, {"num_frames": 8}, {"times": [0.0]}):
        frames, _ = decode_window(data, **keywords)
        assert frames.shape == (1, 21, 33, 3) and (frames.int() - 90).abs().max() <= 1
    (tmp_path / "a%03d.png").write_bytes(data)  # libav would take the name as a pattern
    assert len(list(iter_frames(tmp_path / "a%03d.png"))) == 1
    with pytest.raises(DecodeError):
        decode_window(data[: len(data) // 2], num_frames=1)


@pytest.mark.parametrize("pix_fmt", ["gray", "yuv420p10le", "yuv444p", "yuvj420p"])
def test_grey_and_ten_bit_videos_decode(pix_fmt):
    frames, _ = decode_window(encode(ramp(8), pix_fmt=pix_fmt, crf=4), num_frames=8)
    assert np.abs(frames[:, 0, 0, 0].numpy().astype(int) - 4 * np.arange(8)).max() <= 3


def _flipped(data: bytes, count: int) -> bytes:
    rng, out = random.Random(1), bytearray(data)
    for _ in range(count):
        out[rng.randint(len(data) * 3 // 10, len(data) * 7 // 10)] ^= 0xFF
    return bytes(out)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda: b"", "0 bytes"),
        (lambda: random.Random(0).randbytes(4000), "Invalid data"),
        (lambda: b"\x89PNG\r\n" + b"0" * 999, "Invalid data"),
        (lambda: sample()[: len(sample()) // 2], "Invalid data"),
        (lambda: _flipped(sample(), 2), "Invalid data"),
        (lambda: _flipped(sample(), 300), "Invalid data"),
        (lambda: sample("matroska")[: len(sample("matroska")) // 2], "cut short: the video ends at"),
        (lambda: sample("avi", "mpeg4")[: len(sample("avi", "mpeg4")) // 2], "cut short"),
        (lambda: b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n", "Invalid data"),
        (lambda: b"ffconcat version 1.0\nfile '/etc/hostname'\n", "Invalid argument"),
    ],
)
def test_damage_and_foreign_files_are_errors(damage, reason, capfd):
    with pytest.raises(DecodeError, match=reason):
        list(iter_frames(damage()))
    assert capfd.readouterr().err == ""


def test_sound_alone_is_not_a_video():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    with pytest.raises(DecodeError, match="no video stream"):
        probe(out.getvalue())


def test_frame_size_is_limited_before_decoding():
    with pytest.raises(DecodeError, match="64x64, above the limit of 1000 pixels|Invalid"):
        VideoReader(sample(), max_frame_pixels=1000)


@pytest.mark.parametrize("path", ["/no/such/file.mp4", "/no/such/file.png", "/"])
def test_unreadable_paths_are_decode_errors(path):
    with pytest.raises(DecodeError):
        probe(path)


def test_threads_do_not_change_the_frames():
    one, two = (np.stack([f for f, _ in iter_frames(sample(), threads=n)]) for n in (1, 2))
    assert (one == two).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": 2, "fps": 0.0}, "fps=0.0"),
        ({"times": []}, "times must be"),
        ({"times": [0.2, 0.1]}, "not decreasing"),
        ({"times": [-1.0]}, ">= 0"),
    ],
)
def test_bad_requests_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        decode_window(sample(), **keywords)


@pytest.mark.parametrize(
    ("frames", "keywords", "message"),
    [
        ([], {}, "no frames"),
        (ramp(2), {"fps": 0}, "fps=0"),
        (ramp(2), {"codec": "nope"}, "codec='nope'"),
        (ramp(2), {"pix_fmt": "pal8"}, "pix_fmt='pal8' is not written by libx264"),
        ([np.zeros((4, 4), np.uint8)], {}, "expected uint8"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((8, 4, 3), np.uint8)], {}, "the first one was"),
    ],
)
def test_bad_frames_are_named(frames, keywords, message):
    with pytest.raises(ValueError, match=message):
        encode(frames, **keywords)


def test_odd_sizes_and_fractional_rates(tmp_path):
    path = tmp_path / "odd.mp4"
    assert write_video(path, ramp(5, 17, 23), fps=Fraction(30000, 1001)) == 5
    info = probe(path)
    assert (info.width, info.height, info.pix_fmt) == (23, 17, "yuv444p") and abs(info.fps - 29.97) < 0.01
