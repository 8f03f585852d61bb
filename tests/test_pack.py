"""What packing does to a clip: a bad input is handled or rejected with its reason, a good one kept or cut exactly."""

import io
import random
import re
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import (
    FPS,
    flipped,
    image,
    meta,
    moving,
    no_frames,
    packed,
    raw,
    rejected,
    rotated,
    samples,
    truncated,
    video,
    video_with_audio,
)

from vtok.data.decode import iter_frames, probe
from vtok.data.pack import constant_rate
from vtok.data.verify import verify

BAD = {
    "not_a_video.mp4": (lambda p: raw(p, b"hello " * 500), r"."),
    "random_bytes.mkv": (lambda p: raw(p, random.Random(0).randbytes(5000)), r"."),
    "empty.mp4": (lambda p: raw(p, b""), r"^0 bytes$"),
    "no_frames.avi": (no_frames, r"."),
    "truncated.mp4": (truncated, r"."),
    "truncated_faststart.mp4": (lambda p: truncated(p, options={"movflags": "faststart"}), r"."),
    "truncated.mkv": (lambda p: truncated(p), r"."),
    "audio_only.mp4": (lambda p: video_with_audio(p, with_video=False), r"no video stream"),
    "flipped.mp4": (lambda p: flipped(video(p, frames=moving(40), crf=18)), r"."),
    "playlist.mp4": (lambda p: raw(p, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"), r"."),
    "notes.txt": (lambda p: raw(p, b"not meant as an input"), r"not a video or image by its extension '.txt'"),
    "only_a_box.mp4": (lambda p: raw(p, b"\0\0\0\x18ftypmp42"), r"."),
    "torn.png": (lambda p: raw(p, image(p, "png").read_bytes()[:120]), r"."),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("options", [{}, {"clip_seconds": 0.4, "short_side": 16, "fps": 5.0}], ids=["as_is", "encoded"])
def test_bad_inputs_are_rejected_with_a_reason(tmp_path, name, options):
    make, reason = BAD[name]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / name)
    video(tmp_path / "in" / "good.mp4")
    packed([tmp_path / "in"], tmp_path / "out", **options)
    found = rejected(tmp_path / "out")
    assert found and all(r["source"] == f"in/{name}" for r in found)
    for reject in found:
        assert re.search(reason, reject["reason"]), reject
    kept = {meta(s)["source"] for s in samples(tmp_path / "out").values()}
    # A cut video keeps the clips before its damage.
    assert "in/good.mp4" in kept and (kept == {"in/good.mp4"} or options)
    assert verify(tmp_path / "out", progress=False) == []


def _same(got: np.ndarray, want: np.ndarray, tolerance: float = 4.0) -> bool:
    return got.shape == want.shape and np.abs(got.astype(float) - want).mean() < tolerance


GOOD = {
    "odd.mp4": (lambda p: video(p, frames=moving(height=47, width=63)), (63, 47), 10),
    "rotated.mp4": (rotated, (48, 64), 10),
    "ten_bit.mp4": (lambda p: video(p, pix_fmt="yuv420p10le"), (64, 48), 10),
    "grey.mp4": (lambda p: video(p, pix_fmt="gray"), (64, 48), 10),
    "one_frame.mp4": (lambda p: video(p, frames=moving(1)), (64, 48), 1),
    "lossless.mkv": (lambda p: video(p, codec="ffv1", crf=None), (64, 48), 10),
    "ünï 動画.mp4": (video, (64, 48), 10),
    "with.many.dots.mp4": (video, (64, 48), 10),
    "UPPER.MP4": (video, (64, 48), 10),
}


@pytest.mark.parametrize("name", GOOD)
def test_unusual_videos_are_packed(tmp_path, name):
    make, (width, height), num_frames = GOOD[name]
    path = make(tmp_path / name)
    before = [frame for frame, _ in iter_frames(path)]
    packed([path], tmp_path / "as_is")
    ((key, sample),) = samples(tmp_path / "as_is").items()
    assert key.isascii() and "." not in key and "/" not in key
    assert sample[path.suffix[1:].lower()] == path.read_bytes()  # nothing to change: the source's own bytes
    values = meta(sample)
    assert (values["width"], values["height"]) == (width, height)
    assert values["duration_s"] == pytest.approx(num_frames / FPS) and values["fps"] == pytest.approx(FPS)
    assert list(values) == [
        "caption", "captions", "label", "qa", "source", "start_s", "duration_s", "fps", "width", "height",
    ]  # fmt: skip

    packed([path], tmp_path / "small", short_side=24, crf=4)
    ((_, sample),) = samples(tmp_path / "small").items()
    info, values = probe(sample["mp4"]), meta(sample)
    assert min(info.width, info.height) == 24 and info.rotation == 0
    assert (values["width"], values["height"]) == (info.width, info.height)
    after = [frame for frame, _ in iter_frames(sample["mp4"])]
    assert len(before) == len(after) == num_frames and (before[0].shape[0] > before[0].shape[1]) == (width < height)
    for folder in ("as_is", "small"):
        assert verify(tmp_path / folder, progress=False) == []


def test_containers_are_named_as_the_loader_knows_them(tmp_path):
    stream = video(tmp_path / "a.m2ts", container="mpegts")
    lone = video(tmp_path / "b", container="matroska")
    plain = video(tmp_path / "c.y4m", codec="rawvideo", crf=None, container="yuv4mpegpipe")
    packed([tmp_path, lone], tmp_path / "out", crf=0)
    found = samples(tmp_path / "out")
    assert rejected(tmp_path / "out") == []
    by_end = {key.rpartition("-")[2]: sample for key, sample in found.items()}
    assert by_end["a"]["ts"] == stream.read_bytes() and by_end["b"]["mkv"] == lone.read_bytes()
    recoded = by_end["c"]["mp4"]
    pairs = list(zip(iter_frames(plain), iter_frames(recoded)))
    assert len(pairs) == 10 and all(_same(got, want) for (want, _), (got, _) in pairs)
    assert verify(tmp_path / "out", progress=False) == []


def test_variable_rate_becomes_constant_when_cut_and_stays_when_whole(tmp_path):
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.4, 1.5]
    path = video(tmp_path / "vfr.mp4", times=times)
    packed([path], tmp_path / "as_is")
    ((_, sample),) = samples(tmp_path / "as_is").items()
    assert sample["mp4"] == path.read_bytes()
    packed([path], tmp_path / "cut", clip_seconds=0.8)
    clips = [samples(tmp_path / "cut")[f"vfr__000{i}"] for i in (0, 1)]
    shown = [seconds for _, seconds in iter_frames(clips[0]["mp4"])]
    assert np.allclose(np.diff(shown), np.diff(shown)[0], atol=1e-3)
    assert sum(meta(c)["duration_s"] for c in clips) == pytest.approx(1.6, abs=0.2)
    assert verify(tmp_path / "cut", progress=False) == []


@pytest.mark.parametrize(
    ("name", "codec"), [("a.png", "png"), ("b.jpg", "mjpeg"), ("c.jpeg", "mjpeg"), ("d.webp", "libwebp")]
)
def test_images_are_clips_of_one_frame(tmp_path, name, codec):
    path = image(tmp_path / name, codec)
    packed([path], tmp_path / "out", short_side=16, clip_seconds=1.0, fps=2.0)
    ((_, sample),) = samples(tmp_path / "out").items()
    assert sample[path.suffix[1:]] == path.read_bytes()
    assert meta(sample)["fps"] is None and meta(sample)["duration_s"] == 0.0 and meta(sample)["width"] == 64
    assert verify(tmp_path / "out", progress=False) == []


def test_cuts_are_exact_to_the_frame(tmp_path):
    path = video(tmp_path / "long.mp4", frames=moving(53), crf=0, options={"g": "20"})
    whole = [frame for frame, _ in iter_frames(path)]
    packed([path], tmp_path / "out", clip_seconds=1.2, stride_seconds=0.7, crf=0)
    clips = samples(tmp_path / "out")
    starts = [meta(clips[key])["start_s"] for key in sorted(clips)]
    assert starts == pytest.approx([0.7 * i for i in range(7)])
    for key in clips:
        first = round(meta(clips[key])["start_s"] * FPS)
        got = [frame for frame, _ in iter_frames(clips[key]["mp4"])]
        want = whole[first : first + 12]
        assert len(got) == len(want) and all(_same(g, w, 1.5) for g, w in zip(got, want))
        assert meta(clips[key])["duration_s"] == pytest.approx(len(want) / FPS)


def test_short_remainders_are_left_out_and_long_ones_kept(tmp_path):
    for frames, clips in ((24, 2), (25, 3), (10, 1), (4, 1)):
        path = video(tmp_path / f"n{frames}.mp4", frames=moving(frames))
        packed([path], tmp_path / f"out{frames}", clip_seconds=1.0)
        assert len(samples(tmp_path / f"out{frames}")) == clips


def test_fps_is_an_upper_limit(tmp_path):
    fast, slow = video(tmp_path / "fast.mp4", fps=30, frames=moving(30)), video(tmp_path / "slow.mp4", fps=5)
    packed([fast, slow], tmp_path / "out", fps=10.0)
    found = samples(tmp_path / "out")
    assert meta(found["fast"])["fps"] == 10.0 and len(list(iter_frames(found["fast"]["mp4"]))) == 10
    assert found["slow"]["mp4"] == slow.read_bytes()


@given(count=st.integers(1, 40), source=st.sampled_from([5.0, 24.0, 29.97, 60.0]), jitter=st.floats(0, 0.4))
@settings(max_examples=50, deadline=None)
def test_constant_rate_keeps_every_frame_at_its_own_rate(count, source, jitter):
    draw = random.Random(count)
    at = [(i + (draw.uniform(-jitter, jitter) if i else 0.0)) / source for i in range(count)]
    frames = [(np.full((1, 1, 3), i, np.uint8), t) for i, t in enumerate(at)]
    kept = constant_rate(frames, fps=source, last_s=1 / source, end_s=float("inf"))
    numbers = [int(frame[0, 0, 0]) for frame in kept]
    assert numbers[: count - 1] == list(range(count - 1)) and set(numbers) == set(range(count))


def test_audio_is_cut_with_the_video(tmp_path):
    path = video_with_audio(tmp_path / "av.mp4", seconds=2.0)
    packed([path], tmp_path / "out", clip_seconds=1.0, audio=True, audio_rate=8000)
    loud = []
    for key in ("av__0000", "av__0001"):
        with wave.open(io.BytesIO(samples(tmp_path / "out")[key]["wav"])) as audio:
            assert (audio.getframerate(), audio.getnchannels(), audio.getsampwidth()) == (8000, 1, 2)
            assert audio.getnframes() == 8000
            loud.append(np.abs(np.frombuffer(audio.readframes(8000), "<i2").astype(float)).mean())
    assert loud[0] < 300 < 3000 < loud[1]  # the tone begins at 1.0 s
    assert verify(tmp_path / "out", progress=False) == []
    silent = video(tmp_path / "silent.mp4")
    packed([silent], tmp_path / "silent", audio=True)
    assert set(samples(tmp_path / "silent")["silent"]) == {"mp4", "json"}


def test_names_that_clash_get_distinct_keys(tmp_path):
    for number, name in enumerate(
        ("a/x.mp4", "b/x.mp4", "b/X.mkv", "b/x y.mp4", "b/x_y.mp4", "動.mp4", "画.mp4", "n" * 200 + ".mp4")
    ):
        video(tmp_path / "in" / name, frames=moving(3, seed=number))
    packed([tmp_path / "in" / "a", tmp_path / "in" / "b", tmp_path / "in"], tmp_path / "out")
    found = samples(tmp_path / "out")
    assert len(found) == 8 and len({key.casefold() for key in found}) == 8
    assert all(len(key) <= 80 and key.isascii() for key in found)
    assert rejected(tmp_path / "out") == []
