"""What the model sees of a clip: window, rate, crop, resize, texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from miniature import SMALL, clip, make_shards, movie, photo, stream, take, write_tar

from vtok.data.order import seeded
from vtok.data.pipeline import validation_batches
from vtok.data.view import View, decode_view, fit


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """5 shards x 6 clips, with an index."""
    return make_shards(tmp_path_factory.mktemp("corpus"), 5, 6)


def test_random_window_starts_and_frame_rates(corpus):
    """Source: 12 fps, frame k has grey 4 k. At 6 fps every second frame is shown, from any start."""
    starts = set()
    for draw in range(40):
        frames, times = decode_view(movie(), View(num_frames=4, fps=6.0), seeded(draw))
        numbers = (frames[:, 0, 0, 0] // 4).tolist()
        starts.add(numbers[0])
        assert np.diff(numbers).tolist() == [2, 2, 2] and np.allclose(np.diff(times), 1 / 6)
        assert numbers[0] == int(float(times[0]) * 12 + 5e-4)
    assert len(starts) > 8 and max(starts) <= 17
    assert (decode_view(movie(), View(num_frames=4, fps=6.0), None)[0][:, 0, 0, 0] // 4).tolist() == [8, 10, 12, 14]
    assert (decode_view(movie(), View(num_frames=4, fps=None), None)[0][:, 0, 0, 0] // 4).tolist() == [10, 11, 12, 13]


def test_short_clips_and_images_come_whole_with_lengths(tmp_path):
    write_tar(tmp_path / "a.tar", [*clip("long"), *clip("short", movie(0, 5)), *clip("still", photo(77), "png")])
    (batch,) = take(stream(tmp_path, view=View(num_frames=8, size=(16, 16), fps=12.0, crop="center")), 1)
    length = dict(zip([k[2:] for k in batch.keys], batch.lengths.tolist()))
    assert length == {"long": 8, "short": 5, "still": 1} and batch.video.shape == (3, 3, 8, 16, 16)
    for row, count in enumerate(batch.lengths.tolist()):
        assert (batch.video[row, :, count:] == batch.video[row, :, count - 1 : count]).all()
        assert (batch.times[row, count:] == batch.times[row, count - 1]).all()
    assert (batch.video[batch.keys.index("0:still")] == 77).all() and batch.video.dtype == torch.uint8


def test_captions_and_questions_reach_the_clip(tmp_path):
    qa = [{"id": "1", "type": "count", "question": "how many?", "answer": "2"}]
    write_tar(tmp_path / "a.tar", [*clip("a", caption="one", qa=qa), ("b.mov", movie()), ("b.txt", b"two"), *clip("c")])
    (batch,) = take(stream(tmp_path, shuffle_buffer=0), 1)
    assert batch.text == ["one", "two", ""] and batch.qa == [qa, [], []]
    write_tar(tmp_path / "b" / "a.tar", clip("c"))
    (batch,) = validation_batches(str(tmp_path / "b"), view=SMALL, batch_size=1)
    assert batch.text is None and batch.qa is None and batch.lengths is None


@pytest.mark.parametrize("crop", ["random", "center", "none"])
def test_resize_is_antialiased(crop):
    """A fine checkerboard becomes flat grey; without antialiasing it would alias. Equal to the float kernel."""
    board = (np.indices((64, 96)).sum(0) % 2 * 255).astype(np.uint8)
    frames = torch.from_numpy(np.repeat(np.repeat(board[None, :, :, None], 3, 3), 2, 0))
    out = fit(frames, View(size=(16, 16), crop=crop), seeded(1))
    assert out.shape == (3, 2, 16, 16) and out.dtype == torch.uint8
    assert (out.int() - 127).abs().max() <= 12
    noise = torch.randint(0, 256, (2, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = fit(noise, View(size=(16, 24), crop="center"), None).permute(1, 0, 2, 3)
    want = F.interpolate(noise.permute(0, 3, 1, 2).float(), size=(16, 24), mode="bilinear", antialias=True)
    assert (got.float() - want).abs().max() <= 1.0


def test_crops_lie_in_the_frame_and_keep_the_aspect():
    ramp = torch.arange(96, dtype=torch.uint8)[None, None, :, None].expand(1, 64, 96, 3)
    assert torch.equal(
        fit(ramp, View(size=(64, 64), crop="center"), None)[0, 0, 0], torch.arange(16, 80, dtype=torch.uint8)
    )
    lefts, flips = set(), 0
    for draw in range(60):
        row = fit(ramp, View(size=(64, 64), crop="random", hflip=0.5), seeded(draw))[0, 0, 0].int()
        flips += int(row[0] > row[-1])
        lefts.add(int(row.min()))
        assert (row.diff().abs() == 1).all()
    assert len(lefts) > 15 and min(lefts) >= 0 and max(lefts) <= 32 and 15 < flips < 45
    spans = [
        float(fit(ramp, View(size=(32, 32), scale=(0.25, 1.0)), seeded(d))[0, 0, 0].float().diff().mean())
        for d in range(60)
    ]
    assert min(spans) < 0.8 and 1.6 < max(spans) <= 2.05 and np.isclose(np.mean(spans), 1.25, atol=0.25)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_frames": 0}, "num_frames=0"),
        ({"size": (0, 4)}, "data.size"),
        ({"fps": 0.0}, "data.fps=0.0"),
        ({"crop": "middle"}, "crop='middle' is not one of random, center, none"),
        ({"scale": (0.5, 1.5)}, "data.scale"),
        ({"hflip": 2.0}, "data.hflip=2.0"),
    ],
)
def test_bad_views_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        View(**bad)
