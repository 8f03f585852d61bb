"""Dense maps: the same windows and crops as of a video, packed with their clips, refused where they are not maps."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import packing
import pytest
import torch
from miniature import SMALL, clip, config, fingerprint, movie, stream, take, write_index, write_tar

from vtok.data.decode import decode_window, iter_frames
from vtok.data.manifest import write_manifest as write_portable
from vtok.data.maps import HEAD_BYTES, MapError, check_values, map_bytes, parse_map, read_header
from vtok.data.module import ClipDataModule
from vtok.data.order import seeded
from vtok.data.pack import Settings
from vtok.data.pipeline import TrainingStream, make_loader, num_val_clips, training_batches, validation_batches
from vtok.data.shards import pack
from vtok.data.sources import open_sources
from vtok.data.synthetic import MAP_CHANNELS, render_map, scene, write_corpus
from vtok.data.verify import verify
from vtok.data.view import View, decode_view, fit, map_view


def npy(array: np.ndarray, **keywords) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **keywords)
    return file.getvalue()


def heat(frames: int = 24, *, channels: int = 5, dtype=np.uint8, height: int = 18, width: int = 24) -> np.ndarray:
    """Frame k of channel c is k + 40 c in uint8, the same as (k + 40 c) / 127.5 - 1 in floats, plus a ramp across."""
    level = np.arange(frames)[:, None, None, None] + 40 * np.arange(channels)
    level = np.broadcast_to(level, (frames, height, width, channels)) + (np.arange(width) // 8)[None, None, :, None]
    return level.astype(np.uint8) if dtype == np.uint8 else (level / 127.5 - 1).astype(dtype)


def dense(key: str, array: np.ndarray | bytes, *, fps: object = 12, suffix: str = "npy") -> list[tuple[str, bytes]]:
    data = array if isinstance(array, bytes) else npy(array)
    return [(f"{key}.{suffix}", data), (f"{key}.json", json.dumps({"fps": fps}).encode())]


def view_map(data: bytes, view: View, draw: int | None, *, fps: float | None = 12.0):
    rng = None if draw is None else seeded(draw)
    return map_view(lambda first, size: data[first : first + size], len(data), view, rng, fps=fps)


# ---- windows


@pytest.mark.parametrize("fps", [6.0, 12.0, 5.0, 30.0, None])
def test_a_map_is_windowed_exactly_as_its_video(fps):
    """A video's own frames as a map: the same start, the same frames, the same crop and flip for every draw."""
    whole, _ = decode_window(movie(60), num_frames=24)
    data, starts = npy(whole.numpy()), set()
    for draw in (None, *range(30)):
        view = View(num_frames=4, size=(16, 16), fps=fps, scale=(0.5, 1.0), hflip=0.5)
        rngs = [None if draw is None else seeded(draw) for _ in range(2)]
        frames, times = decode_view(movie(60), view, rngs[0])
        rows, seconds = map_view(lambda a, n: data[a : a + n], len(data), view, rngs[1], fps=12.0)
        assert torch.equal(rows, frames) and torch.allclose(seconds, times, atol=2e-3)
        assert torch.equal(fit(frames, view, rngs[0]), fit(rows, view, rngs[1]))
        starts.add(float(times[0]))
    assert len(starts) > 10


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ">f2", ">f4"])
def test_every_dtype_keeps_its_values(dtype):
    frames, times = view_map(npy(heat(dtype=dtype)), View(num_frames=4, fps=6.0), None)
    assert frames.shape == (4, 18, 24, 5) and times.tolist() == pytest.approx([8 / 12 + i / 6 for i in range(4)])
    assert frames.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    level = frames.float() if dtype == np.uint8 else (frames + 1) * 127.5
    want = torch.tensor([8, 10, 12, 14])[:, None] + 40 * torch.arange(5)
    assert (level[:, 0, 0] - want).abs().max() < (0.07 if np.dtype(dtype).itemsize == 2 else 1e-4)


def test_only_the_window_is_read():
    data, read = npy(np.zeros((1000, 18, 24, 5), np.float32)), []
    view = View(num_frames=4, fps=12.0)
    map_view(lambda a, n: read.append(n) or data[a : a + n], len(data), view, seeded(1), fps=12.0)
    assert read[0] == HEAD_BYTES and read[1:] == [4 * 18 * 24 * 5 * 4]


def test_short_maps_and_single_frames_come_whole():
    view = View(num_frames=8, fps=12.0)
    assert len(view_map(npy(heat(5)), view, 1)[0]) == 5
    frames, times = view_map(npy(heat(1)), view, 1, fps=None)
    assert len(frames) == 1 and times.tolist() == [0.0]
    with pytest.raises(MapError, match="the map has 5 frames, and .json no `fps`"):
        view_map(npy(heat(5)), view, 1, fps=None)
    with pytest.raises(MapError, match="8x18x24 of 5 channels are above data.max_pixels=3000"):
        view_map(npy(heat(50)), View(num_frames=8, fps=12.0, max_pixels=3000), 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_resize_of_maps_is_antialiased_and_stays_in_range(dtype, channels):
    board = np.indices((64, 96)).sum(0) % 2
    board = (board * 255).astype(np.uint8) if dtype == np.uint8 else (2.0 * board - 1.0).astype(np.float32)
    frames = torch.from_numpy(np.repeat(np.repeat(board[None, :, :, None], channels, 3), 2, 0))
    out = fit(frames, View(size=(16, 16), crop="center"), None)
    assert out.shape == (channels, 2, 16, 16) and out.dtype == frames.dtype
    grey, tolerance, peak = (127, 12, 255) if dtype == np.uint8 else (0.0, 0.1, 1)
    assert (out.double() - grey).abs().max() <= tolerance
    assert fit(frames, View(size=(100, 130), crop="none"), None).float().abs().max() <= peak
    full = fit(torch.ones(1, 37, 53, 2), View(size=(16, 24)), seeded(1))
    assert float(full.max()) <= 1.0


# ---- through the stream


def write_maps(path: Path, arrays: dict[str, np.ndarray | bytes], **facts) -> None:
    write_tar(path, [member for key, array in arrays.items() for member in dense(key, array, **facts)])


def test_maps_become_clips_of_their_channels(tmp_path):
    write_maps(tmp_path / "a.tar", {f"k{i}": heat() for i in range(6)})
    view = View(num_frames=4, size=(16, 16), fps=6.0, map="npy")
    (batch,) = take(stream(tmp_path, view=view), 1)
    assert batch.video.shape == (3, 5, 4, 16, 16) and batch.video.dtype == torch.uint8 and batch.lengths is None
    assert -1 <= float(batch.as_float().video.min()) < float(batch.as_float().video.max()) <= 1
    write_maps(tmp_path / "f" / "a.tar", {f"k{i}": heat(dtype=np.float16) for i in range(6)})
    (floats,) = take(stream(tmp_path / "f", view=view), 1)
    assert floats.video.dtype == torch.float32 and floats.keys == batch.keys
    assert (floats.video - batch.as_float().video).abs().max() < 1.1 / 127.5  # uint8 rounds after resizing
    assert torch.equal(floats.times, batch.times)


def test_uint8_and_float_maps_of_one_batch_are_floats(tmp_path):
    write_maps(tmp_path / "a.tar", {"a": heat(), "b": heat(dtype=np.float32), "c": heat(3)})
    (batch,) = take(stream(tmp_path, view=View(num_frames=4, size=(18, 24), fps=12.0, map="npy", crop="center")), 1)
    assert batch.video.dtype == torch.float32 and sorted(batch.lengths.tolist()) == [3, 4, 4]
    values = {key[2:]: (video + 1) * 127.5 for key, video in zip(batch.keys, batch.video)}
    assert torch.allclose(values["c"][:, 0, 0, 0], 40.0 * torch.arange(5), atol=1e-3)
    first = values["b"][0, 0, 0, 0]
    assert torch.allclose(values["b"][0, :, 0, 0], first + torch.arange(4.0), atol=1e-3)


def test_the_same_shards_serve_videos_and_maps(tmp_path):
    """The video's view needs a video, the map's a map; a sample that lacks it is bad, the others are not."""
    write_tar(
        tmp_path / "a.tar",
        [
            *[(f"both.{suffix}", data) for suffix, data in (("mov", movie()), ("npy", npy(heat())))],
            ("both.json", b'{"fps": 12}'),
            *clip("video"),
            *dense("map", heat()),
            *dense("pose", heat(), suffix="pose.npy"),
        ],
    )
    seen = {}
    for name in ("", "npy", "pose.npy"):
        quarantine = tmp_path / f"q{name}"
        view = View(num_frames=2, size=(8, 8), fps=6.0, map=name)
        settings = {"view": view, "batch_size": 1, "max_bad_fraction": 1.0, "quarantine": quarantine}
        seen[name] = {b.keys[0][2:] for b in take(stream(tmp_path, **settings), 6)}
        lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
        what = f".{name}" if name else "video or image"
        assert all(line["reason"].startswith(f"no {what} among its members") for line in lines)
    assert seen == {"": {"both", "video"}, "npy": {"both", "map"}, "pose.npy": {"pose"}}


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("pickled",))


def _header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + body


_bad = heat(dtype=np.float32)
_nan, _high = _bad.copy(), _bad.copy()
_nan[:, 3, 3, 1], _high[:, 0, 0, 2] = np.nan, 1.5
CORRUPT = {
    "empty": (b"", r"^0 bytes$"),
    "not npy": (b"hello" * 99, r"not a \.npy file"),
    "cut short": (npy(heat())[:-1], r"cut short: \d+ bytes, a map of shape \[24, 18, 24, 5\] has \d+"),
    "cut in the header": (npy(heat())[:40], r"header cannot be read"),
    "too long": (npy(heat()) + b"x", r"too long"),
    "pickled": (npy(np.array([[[[Trap()]]]], object), allow_pickle=True), r"its dtype is object"),
    "a pickle": (pickle.dumps(heat()), r"not a \.npy file"),
    "int16": (npy(heat().astype(np.int16)), r"its dtype is int16; a map is uint8, or float16 or float32"),
    "float64": (npy(heat().astype(np.float64)), r"its dtype is float64"),
    "records": (npy(np.zeros((2, 2, 2, 2), "u1,f4")), r"its dtype is"),
    "three axes": (npy(heat()[0]), r"its shape is \[18, 24, 5\]; a map is \[T, H, W, C\]"),
    "no frames": (npy(heat()[:0]), r"its shape is \[0, 18, 24, 5\]"),
    "fortran": (npy(np.asfortranarray(heat())), r"Fortran order; save numpy.ascontiguousarray"),
    "nan": (npy(_nan), r"values that are not finite"),
    "out of range": (npy(_high), r"values in \[-1, 1.5\]; a float map must lie in \[-1, 1\]"),
    "endless header": (_header("{" * 9000), r"header cannot be read"),
    "code in the header": (_header("{'descr': __import__('os').mkdir('pickled')}\n"), r"header cannot be read"),
    "vast": (_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({1 << 40}, 9, 9, 9)}}\n"), r"cut short"),
    "version 3": (b"\x93NUMPY\x03\x00" + npy(heat())[8:], r"\.npy of version 3\.0"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_maps_are_bad_samples_with_their_reason(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, reason = CORRUPT[name]
    good = heat(dtype=np.float32)
    write_maps(tmp_path / "a.tar", {"a": good, "bad": data, "z": good})
    batches = training_batches(
        str(tmp_path), view=View(num_frames=4, size=(8, 8), fps=6.0, map="npy"), batch_size=2, shuffle_buffer=0,
        max_bad_fraction=1.0, quarantine=tmp_path / "q",
    )  # fmt: skip
    assert [b.keys for b in take(batches, 2)] == [["0:a", "0:z"], ["1:a", "1:z"]]
    entry = json.loads((tmp_path / "q").read_text().splitlines()[0])
    assert entry["key"] == "bad" and entry["reason"] and not (tmp_path / "pickled").exists()
    with pytest.raises(MapError, match=reason):
        parse_map(data)


@pytest.mark.parametrize("fps", [None, 0, -1, "12", True, math.nan])
def test_a_map_needs_a_rate(tmp_path, fps):
    write_tar(tmp_path / "a.tar", [*dense("a", heat()), *dense("bad", heat(), fps=fps)])
    view = View(num_frames=4, size=(8, 8), fps=6.0, map="npy")
    settings = {"view": view, "batch_size": 1, "max_bad_fraction": 1.0, "quarantine": tmp_path / "q"}
    assert [b.keys for b in take(stream(tmp_path, **settings), 2)] == [["0:a"], ["1:a"]]
    assert "fps" in json.loads((tmp_path / "q").read_text().splitlines()[0])["reason"]


def test_other_numbers_of_channels_in_a_batch_are_an_error_with_their_keys(tmp_path):
    write_maps(tmp_path / "a.tar", {"a": heat(), "b": heat(channels=3)})
    with pytest.raises(ValueError, match="different numbers of channels: 3 in '0:b', 5 in '0:a'"):
        take(stream(tmp_path, view=View(num_frames=2, size=(8, 8), fps=6.0, map="npy"), batch_size=2), 1)


def test_names_of_maps_are_checked():
    for name in ("npz", "NPY", ".npy", "pose", "a b.npy"):
        with pytest.raises(ValueError, match="data.map="):
            View(map=name)
    assert View(map="pose.npy").media == ("pose.npy",)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_module_trains_and_validates_on_maps_and_resumes(tmp_path, workers):
    counts = {f"m-{s}.tar": 5 for s in range(3)}
    for s, name in enumerate(counts):
        write_maps(tmp_path / name, {f"k{s}{i}": heat(channels=4) for i in range(5)})
    write_index(tmp_path, counts)
    module = ClipDataModule(config(tmp_path, map="npy", num_workers=workers))
    whole = take(module.train_dataloader(), 8)
    assert {tuple(b.video.shape) for b in whole} == {(3, 4, 4, 16, 16)}
    other = ClipDataModule(config(tmp_path, map="npy", num_workers=workers))
    other.load_state_dict({**module.state_dict(), "batches": 3})
    assert fingerprint(take(other.train_dataloader(), 5)) == fingerprint(whole[3:])
    assert sum(len(b) for b in module.val_dataloader()) == 15 == num_val_clips(str(tmp_path), view=module.view)
    buckets = TrainingStream(
        open_sources("::".join([str(tmp_path)] * 2), apart=True), view=module.view, batch_size=2, seed=1,
        weights=[1.0, 1.0], part_frames=[4, 1],
    )  # fmt: skip
    assert {b.video.shape[2] for b in take(make_loader(buckets, num_workers=0), 10)} == {4, 1}


# ---- packing


def with_map(folder: Path, name: str, array: np.ndarray | bytes, *, frames: int = 10, **row) -> dict:
    packing.video(folder / f"{name}.mp4", frames=packing.moving(frames, seed=len(name)))
    (folder / f"{name}.npy").write_bytes(array if isinstance(array, bytes) else npy(array))
    return {"path": f"{name}.mp4", "map": f"{name}.npy", **row}


def test_a_whole_clip_keeps_its_map_untouched(tmp_path):
    row = with_map(tmp_path / "in", "a", heat(10, dtype=np.float16))
    manifest = packing.write_manifest(tmp_path / "in" / "m.jsonl", [row])
    packing.packed([manifest, tmp_path / "in"], tmp_path / "out")  # the folder's .npy is no stray file
    (sample,) = packing.samples(tmp_path / "out").values()
    assert list(sample) == ["mp4", "json", "npy"] and sample["npy"] == (tmp_path / "in/a.npy").read_bytes()
    assert packing.rejected(tmp_path / "out") == [] and verify(tmp_path / "out", progress=False) == []
    (batch,) = validation_batches(
        str(tmp_path / "out/train"), view=View(num_frames=4, size=(8, 8), fps=5.0, map="npy"), batch_size=1
    )
    assert batch.video.shape == (1, 5, 4, 8, 8) and batch.times.tolist()[0] == pytest.approx([0.1, 0.3, 0.5, 0.7])


def test_a_map_is_cut_with_its_video(tmp_path):
    """At another rate and in pieces: the map's frames are those that the clip's frames were taken from."""
    rows = [with_map(tmp_path, "long", heat(53), frames=53), {**with_map(tmp_path, "part", heat(40), frames=40)}]
    rows[1] |= {"start_s": 0.75, "end_s": 2.05}
    manifest = packing.write_manifest(tmp_path / "m.jsonl", rows)
    packing.packed([manifest], tmp_path / "out", clip_seconds=1.2, stride_seconds=0.7, crf=0, fps=5.0)
    found = packing.samples(tmp_path / "out")
    whole = {name: [f for f, _ in iter_frames(tmp_path / f"{name}.mp4")] for name in ("long", "part")}
    assert sorted({key.partition("__")[0] for key in found}) == ["long", "part"] and len(found) == 8
    for key, sample in found.items():
        numbers = parse_map(sample["npy"])[:, 0, 0, 0].tolist()  # frame k of a map holds k
        shown = [frame for frame, _ in iter_frames(sample["mp4"])]
        assert len(numbers) == len(shown) > 0
        for number, frame in zip(numbers, shown):
            distance = [np.abs(frame.astype(int) - other).mean() for other in whole[key.partition("__")[0]]]
            assert int(np.argmin(distance)) == number
    assert verify(tmp_path / "out", progress=False) == []


def test_variable_rate_cuts_and_images_keep_their_maps(tmp_path):
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.4, 1.5]
    packing.video(tmp_path / "vfr.mp4", times=times)
    packing.image(tmp_path / "p.png", "png")
    (tmp_path / "vfr.npy").write_bytes(npy(heat(10)))
    (tmp_path / "p.npy").write_bytes(npy(heat(1)))
    rows = [{"path": "vfr.mp4", "map": "vfr.npy", "end_s": 1.2}, {"path": "p.png", "map": "p.npy"}]
    packing.packed([packing.write_manifest(tmp_path / "m.jsonl", rows)], tmp_path / "out")
    found = packing.samples(tmp_path / "out")
    assert len(parse_map(found["p"]["npy"])) == 1
    numbers = parse_map(found["vfr__0000"]["npy"])[:, 0, 0, 0].tolist()
    fps = packing.meta(found["vfr__0000"])["fps"]
    middles = [(tick + 0.5) / fps for tick in range(len(numbers))]
    assert numbers == [max(k for k, t in enumerate(times) if t <= middle) for middle in middles]
    assert verify(tmp_path / "out", progress=False) == []


@pytest.mark.parametrize("name", [*CORRUPT, "another length", "not there", "no string", "another suffix"])
def test_bad_maps_are_rejected_at_packing(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = with_map(tmp_path, "good", heat(10, dtype=np.float32))
    if name in CORRUPT:
        data, reason = CORRUPT[name]
        row = with_map(tmp_path, "bad", data, frames=24)
        reason = reason.strip("^$")
    else:
        row = with_map(tmp_path, "bad", heat(9))
        changes, reason = {
            "another length": ({}, r"the map has 9 frames, the video 10; frame k must go with frame k"),
            "not there": ({"map": "gone.npy"}, r"map: the file is missing: 'gone.npy'"),
            "no string": ({"map": 3}, r"map must be the path of a .npy file, got int '3'"),
            "another suffix": ({"map": "bad.mp4"}, r"map must be the path of a .npy file, got str 'bad.mp4'"),
        }[name]
        row |= changes
    packing.packed([packing.write_manifest(tmp_path / "m.jsonl", [row, good])], tmp_path / "out")
    (reject,) = packing.rejected(tmp_path / "out")
    assert reject["source"] == "bad.mp4"
    with pytest.raises(MapError, match=reason):
        raise MapError(reject["reason"])
    assert set(packing.samples(tmp_path / "out")) == {"good"} and not (tmp_path / "pickled").exists()


def test_maps_are_part_of_a_packing_and_rows_without_keep_theirs(tmp_path):
    manifest = packing.write_manifest(tmp_path / "m.jsonl", [with_map(tmp_path, "a", heat(10))])
    packing.packed([manifest], tmp_path / "out")
    (tmp_path / "a.npy").write_bytes(npy(heat(10)[::-1].copy()))
    with pytest.raises(ValueError, match="the inputs differ"):
        packing.packed([manifest], tmp_path / "out")
    rows = [{"path": "a.mp4", "map": "a.npy", "caption": "x"}, {"path": "a.mp4", "caption": "y"}]
    with_map(tmp_path, "b", heat(10))
    rows += [{"path": "a.mp4", "map": "b.npy"}]
    packing.packed([packing.write_manifest(tmp_path / "n.jsonl", rows)], tmp_path / "two")
    (sample,) = packing.samples(tmp_path / "two").values()
    assert "npy" in sample and [c["text"] for c in packing.meta(sample)["captions"]] == ["x", "y"]
    assert "another map than that of the same clip in n.jsonl:1" in packing.rejected(tmp_path / "two")[0]["reason"]


def test_verify_reads_maps(tmp_path):
    manifest = packing.write_manifest(tmp_path / "m.jsonl", [with_map(tmp_path, "a", heat(10, dtype=np.float32))])
    packing.packed([manifest], tmp_path / "out")
    tar = tmp_path / "out/train/train-000000.tar"
    with tarfile.open(tar) as archive:
        at = archive.getmember("a.npy").offset_data
    data = bytearray(tar.read_bytes())
    data[at + 200 : at + 204] = np.float32(7).tobytes()
    tar.write_bytes(data)
    problems = verify(tmp_path / "out", progress=False)
    assert len(problems) == 2 and "a: npy: values in [-1, 7]" in problems[1]


def test_portable_manifests_hold_maps(tmp_path):
    row = with_map(tmp_path / "in", "a", heat(10))
    full = {**row, "path": str(tmp_path / "in/a.mp4"), "map": str(tmp_path / "in/a.npy")}
    written = write_portable([full, {**full, "map": str(tmp_path / "none.npy")}], tmp_path / "m.jsonl", progress=False)
    assert json.loads(written.manifest.read_text())["map"] == "in/a.npy" and written.num_missing == 1
    assert json.loads(written.missing.read_text())["reason"] == "map: file not found"


# ---- the procedural corpus


def test_heat_maps_peak_where_the_shapes_are():
    made = scene(3, 5, level=4, seconds=2.0, size=(64, 96))
    dense_map = render_map(made)
    assert dense_map.shape == (made.frames, 64, 96, MAP_CHANNELS) and dense_map.dtype == np.uint8
    hidden = {n.frame + k for n in made.needles for k in range(n.frames)}
    for shot in made.shots:
        for t in range(shot.start, shot.stop):
            for channel in range(MAP_CHANNELS):
                shown = channel < len(shot.things) and t - shot.start >= shot.things[channel].appears
                if not shown or t in hidden:
                    assert not dense_map[t, :, :, channel].any()
                    continue
                x, y = shot.things[channel].at((t - shot.start) / max(shot.stop - shot.start - 1, 1))
                row, column = np.unravel_index(dense_map[t, :, :, channel].argmax(), (64, 96))
                assert abs(column + 0.5 - x) <= 1 and abs(row + 0.5 - y) <= 1
                assert dense_map[t, row, column, channel] > 220
    floats = render_map(made, dtype="float32")
    assert floats.min() == -1 and floats.max() <= 1 and np.abs((floats + 1) * 127.5 - dense_map).max() <= 0.5 + 1e-4
    small = render_map(made, size=(16, 24), dtype="float16")
    assert small.shape[1:3] == (16, 24) and small.dtype == np.float16
    check_values(small)


def test_the_corpus_with_maps_packs_and_streams(tmp_path):
    manifest = write_corpus(
        tmp_path / "c", clips=4, seconds=1.0, size=(32, 32), val_fraction=0.25, workers=1, progress=False,
        map_size=(16, 16), map_dtype="float16",
    )  # fmt: skip
    pack([manifest], tmp_path / "s", settings=Settings(), workers=0, progress=False)
    assert verify(tmp_path / "s", progress=False) == [] and (tmp_path / "s/rejected.jsonl").read_text() == ""
    view = View(num_frames=4, size=(16, 16), fps=6.0, crop="none", map="npy")
    (batch,) = itertools.islice(training_batches(str(tmp_path / "s/train"), view=view, batch_size=3), 1)
    assert batch.video.shape == (3, MAP_CHANNELS, 4, 16, 16) and batch.video.dtype == torch.float32
    assert batch.video.min() == -1 and batch.video.max() > 0.5 and all(batch.text)
    for key, video, times in zip(batch.keys, batch.video, batch.times):
        index = int(key[-6:])
        made = scene(0, index, seconds=1.0, size=(32, 32), level=index % 6)
        want = render_map(made, size=(16, 16), dtype="float16")
        picks = ((times + 1e-5) * 12).long()
        assert torch.equal(video.permute(1, 2, 3, 0), torch.from_numpy(want.astype(np.float32))[picks])


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"map_size": (0, 4)}, r"map_size=\(0, 4\)"), ({"map_size": (8, 8), "map_dtype": "int8"}, "map_dtype='int8'")],
)
def test_bad_map_settings_come_before_files(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        write_corpus(tmp_path / "c", clips=1, progress=False, **settings)
    assert not (tmp_path / "c").exists()


def test_headers_of_other_byte_orders_and_small_files(tmp_path):
    data = map_bytes(heat(2, dtype=np.float16).astype(">f2"))
    header = read_header(data[:HEAD_BYTES], len(data))
    assert header.shape == (2, 18, 24, 5) and header.frame_bytes == 18 * 24 * 5 * 2
    assert SMALL.media != ("npy",) and np.array_equal(parse_map(data), heat(2, dtype=np.float16))
