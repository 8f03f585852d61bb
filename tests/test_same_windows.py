"""What `vtok eval` measures is what `vtok encode` and `vtok decode` give: same frames, same PSNR, at every budget."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from vtok.coding import codec
from vtok.config import DataConfig
from vtok.data import shards
from vtok.data.decode import VideoReader, decode_window
from vtok.data.encode import write_video
from vtok.data.pipeline import validation_batches
from vtok.data.view import view_of
from vtok.evaluation.evaluator import Evaluator
from vtok.families.flexible import Config, Model
from vtok.metrics.distortion import clip_psnr
from vtok.types import Clip, to_uint8

SMALL = dict(size=[16, 16], patch=[2, 8, 8], width=16, encoder_depth=1, decoder_depth=1, num_heads=2, num_tokens=4)
FORMS = {
    "whole": dict(num_frames=8),
    "blocks": dict(num_frames=8, mask="time_block_causal_last", blocks=2),
    "dct": dict(num_frames=8, mask="full", registers="dct", dct_frequencies=[4, 6, 6]),
}
# file, its frames, size and rate, and the rate asked for. Matroska keeps milliseconds: 1/30 s is stored as 0.033 s, and
# 2/30 s as 0.067 s, after the moment it is asked for.
SOURCES = {
    "one window": ("a.mp4", 8, (24, 32), 8, 8.0),
    "two windows": ("a.mp4", 16, (24, 32), 8, 8.0),
    "ragged": ("a.mp4", 13, (22, 18), 8, 8.0),
    "every second frame": ("a.mp4", 32, (24, 32), 16, 8.0),
    "millisecond clock": ("a.mkv", 16, (24, 32), 30, 30.0),
    "slower than the source": ("a.mkv", 32, (24, 32), 30, 15.0),
    "faster than the source": ("a.mp4", 5, (24, 32), 5, 12.0),
    "ntsc": ("a.mp4", 16, (16, 16), Fraction(30000, 1001), 29.97),
}


def make_model(form: str) -> Model:
    torch.manual_seed(0)
    model = Model(Config(**SMALL, **FORMS[form]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def moving(frames: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: smooth colours, different in every frame."""
    coarse = torch.rand(1, 3, frames, 3, 3, generator=torch.Generator().manual_seed(seed)) * 255
    video = torch.nn.functional.interpolate(coarse, size=(frames, *size), mode="trilinear")
    return video[0].permute(1, 2, 3, 0).to(torch.uint8).numpy()


def write(folder, source: str, count: int):
    name, frames, size, fps, _ = SOURCES[source]
    folder.mkdir()
    paths = [folder / f"{index}_{name}" for index in range(count)]
    for index, path in enumerate(paths):
        write_video(path, moving(frames, size, index), fps=fps, codec="libx264", crf=12)
    return paths


@pytest.mark.parametrize("source", SOURCES)
def test_the_loader_and_encode_pick_the_same_frames(tmp_path, source):
    (path,) = write(tmp_path / "videos", source, 1)
    rate = SOURCES[source][-1]
    for fps in (rate, codec.as_fraction(rate)):
        with VideoReader(path) as reader:
            streamed = np.stack(list(reader.at_rate(fps)))
        window, _ = decode_window(path, num_frames=10_000, fps=rate)
        assert np.array_equal(streamed, window.numpy())
    asked = round(SOURCES[source][1] / SOURCES[source][3] * rate)
    assert len(streamed) == asked
    if rate == SOURCES[source][3]:
        every = decode_window(path, num_frames=10_000)[0].numpy()
        assert np.array_equal(streamed, every), "at its own rate a video gives each frame once"


@pytest.mark.parametrize(
    "form, source",
    [
        ("whole", "one window"),
        ("whole", "two windows"),
        ("blocks", "millisecond clock"),
        ("dct", "every second frame"),
    ],
)
def test_the_evaluators_psnr_is_that_of_the_files(tmp_path, form, source):
    model, fps = make_model(form), SOURCES[source][-1]
    videos = {path.stem: path for path in write(tmp_path / "videos", source, 2)}
    packed = tmp_path / "shards"
    assert (
        shards.main([str(tmp_path / "videos"), "--out", str(packed), "--split", "val", "--workers", "1", "--quiet"])
        == 0
    )
    frames = round(SOURCES[source][1] / SOURCES[source][3] * fps)
    data = DataConfig(num_frames=frames, size=[16, 16], fps=fps, num_workers=0)
    val = list(validation_batches(str(packed / "val"), view=view_of(data), batch_size=2))
    groups = frames // model.config.block_frames
    per_group = [1, 2, 3, 4]
    evaluator = Evaluator(model, val=val, budgets=[k * groups for k in per_group], controls=[], fps=fps, progress=False)
    result = evaluator.run()
    measured = result["per_clip"]["psnr_db"]["flexible"]
    for index, (key, clip, row) in enumerate((k, c, r) for c in val for r, k in enumerate(c.keys)):
        name = next(name for name in videos if key.endswith(name) or name in key)
        original = clip.video[row : row + 1]  # [1, 3, T, H, W]
        for k in per_group:
            file = tmp_path / "x.vtok"
            done = codec.encode_file(model, videos[name], file, budget=k, size=(16, 16), fps=fps)
            decoded = np.stack(list(codec.decode_frames(model, file)))
            assert done.tokens == k * groups and len(decoded) == frames
            with torch.inference_mode():
                tokens = model.encode(Clip(keys=[key], video=original), budget=k * groups)
                whole = to_uint8(model.decode(tokens, size=(16, 16)))[0].permute(1, 2, 3, 0).numpy()
            assert np.abs(decoded.astype(int) - whole.astype(int)).max() <= 1  # a tie in float32 may round both ways
            recon = torch.from_numpy(decoded).permute(3, 0, 1, 2)[None]
            psnr = float(clip_psnr(recon, original))
            assert measured[str(k * groups)][index] == pytest.approx(psnr, abs=1e-3)
            row_of = next(r for r in result["rows"] if r["budget"] == k * groups)
            assert row_of["bits_mean"] == pytest.approx(done.tokens * np.log2(64000))
    assert json.dumps(result)
    assert len({round(value, 3) for column in measured.values() for value in column}) > 4, "all alike prove nothing"
