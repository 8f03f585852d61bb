"""Features resampled onto another grid: whole windows, real frames alone."""

from __future__ import annotations

import pytest
import torch
from test_vision import relative

from vtok.types import Features
from vtok.vision import resample_features


def features(frames: int = 8, grid: tuple[int, int] = (4, 6), clips: int = 2) -> Features:
    patches = torch.randn(clips, frames, grid[0] * grid[1], 3, dtype=torch.float64)
    times = torch.arange(frames, dtype=torch.float64).expand(clips, frames)
    return Features(patches, grid, times=times, frame=patches.mean(2))


def test_resampling_onto_the_same_grid_changes_nothing():
    given = features()
    same = resample_features(given, (4, 6), 8)
    torch.testing.assert_close(same.patches, given.patches)
    torch.testing.assert_close(same.times, given.times)


@pytest.mark.parametrize("grid", [(2, 3), (8, 12), (3, 5), (4, 6)])
@pytest.mark.parametrize("frames", [1, 3, 4, 8, 11, [1, 4, 3]])
def test_resampling_keeps_what_does_not_change(grid, frames):
    given = features()
    flat = Features(given.patches[:, :1, :1].expand_as(given.patches), given.grid)
    out = resample_features(flat, grid, frames)
    assert out.grid == grid and out.patches.shape[:3] == (
        2,
        len(frames) if isinstance(frames, list) else frames,
        grid[0] * grid[1],
    )
    torch.testing.assert_close(out.patches, flat.patches[:, :1, :1].expand_as(out.patches), rtol=1e-6, atol=1e-6)


def test_resampling_averages_windows_and_neighbours():
    given = features()
    windows = [1, 4, 3]
    out = resample_features(given, given.grid, windows)
    for index, part in enumerate(given.patches.split(windows, dim=1)):
        torch.testing.assert_close(out.patches[:, index], part.mean(1), rtol=1e-6, atol=1e-6)
    assert torch.allclose(out.times[0], torch.tensor([0, 2.5, 6], dtype=torch.float64))
    third = resample_features(given, given.grid, 3).patches[:, 0]  # the first 8/3 frames
    expected = (given.patches[:, 0] + given.patches[:, 1] + given.patches[:, 2] * 2 / 3) / (8 / 3)
    torch.testing.assert_close(third, expected, rtol=1e-6, atol=1e-6)
    maps = given.patches.unflatten(2, given.grid)
    ramp = Features(torch.arange(6.0).repeat(4)[None, None, :, None].double(), (4, 6))
    assert torch.allclose(
        resample_features(ramp, (4, 12), 1).patches[0, 0, 2:10, 0], torch.arange(0.75, 4.3, 0.5).double()
    )
    halved = resample_features(given, (2, 3), 8).patches.unflatten(2, (2, 3))
    inner = maps[:, :, :, :].unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    assert relative(halved, inner) < 0.7  # the antialiased average reaches a little further than the block


def test_resampling_counts_real_frames_alone():
    given = features()
    lengths = torch.tensor([8, 3])
    padded = given.patches.clone()
    padded[1, 3:] = 1e6
    out = resample_features(Features(padded, given.grid), (2, 3), [1, 4, 3], lengths=lengths)
    torch.testing.assert_close(out.patches[0], resample_features(given, (2, 3), [1, 4, 3]).patches[0])
    short = Features(given.patches[1:, :3], given.grid)
    torch.testing.assert_close(out.patches[1, :2], resample_features(short, (2, 3), [1, 2]).patches[0])
    assert not out.patches[1, 2].any()


def test_resampling_refuses_windows_that_do_not_fit():
    for frames in ([1, 4], [0, 8], [], 0):
        with pytest.raises(ValueError, match="frames="):
            resample_features(features(), (2, 2), frames)
    with pytest.raises(ValueError, match="has no patches"):
        resample_features(features(), (0, 2), 4)
