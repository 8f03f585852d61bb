"""Tokenizers on a grid through the tools around them: evaluation, files, tiles, checkpoints of the maps."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_contract import CONV, FLOW, clip
from test_discrete import learn, make, moving

from vtok.coding import codec
from vtok.data.encode import write_video
from vtok.evaluation.evaluator import Evaluator
from vtok.families import flow
from vtok.layers.conv3d import ConvConfig
from vtok.loading import identify, in_tiles
from vtok.metrics.distortion import clip_psnr
from vtok.types import Clip, to_uint8


def held_out(lengths: list[int]) -> list[Clip]:
    """Batches of two uint8 clips, of these lengths."""
    pairs = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]
    return [
        Clip([f"{i}-0", f"{i}-1"], to_uint8(moving(2, max(pair), cells=3 + i)), torch.tensor(pair))
        for i, pair in enumerate(pairs)
    ]


def test_evaluation_has_a_row_for_each_level():
    model = make(coarse=[2, 2, 2])
    learn(model, moving(2, 5), steps=10)
    val = held_out([5, 5, 5, 5])
    result = Evaluator(model, val=val, train=held_out([5, 5]), controls=["dct", "downsample"], progress=False).run()
    ours = [row for row in result["rows"] if row["method"] == "discrete"]
    assert [row["budget"] for row in ours] == [32, 224] == model.token_counts(5, (16, 16))
    assert [row["bits_mean"] for row in ours] == pytest.approx([32 * np.log2(64000), 224 * np.log2(64000)])
    with torch.no_grad():
        for row in ours:
            recon = [model.decode(model.encode(c.as_float(), budget=row["budget"]), size=(16, 16)) for c in val]
            psnr = torch.cat([clip_psnr(to_uint8(r), c.video) for r, c in zip(recon, val)]).mean()
            assert row["psnr_db"] == pytest.approx(float(psnr), abs=1e-3)
    assert {row["method"] for row in result["rows"]} == {"discrete", "dct", "downsample"}
    with pytest.raises(ValueError, match=r"eval.budgets=\[64\]: the tokens of this model are a grid, of 32, 224"):
        Evaluator(model, val=val, budgets=[64, 224], progress=False)


def test_shorter_clips_are_coded_with_the_tokens_they_have():
    model = make()
    result = Evaluator(model, val=held_out([5, 3, 5, 1]), controls=[], progress=False).run()
    (row,) = result["rows"]
    counts = [model.token_counts(frames, (16, 16))[0] for frames in (5, 3, 5, 1)]
    assert counts == [192, 128, 192, 64] and row["budget"] == 192 and row["tokens_mean"] == np.mean(counts)
    assert "clips of fewer frames have fewer tokens" in row["note"]


def test_a_file_holds_a_grid_and_its_coarse_level(tmp_path):
    model = make(coarse=[2, 2, 2])
    frames = to_uint8(moving(1, 12))[0].permute(1, 2, 3, 0).numpy()
    write_video(tmp_path / "v.mkv", frames, fps=8, codec="ffv1")
    groups = 1 + -(-11 // 4)
    for budget, tokens in ((None, groups * 16 + (1 + 2 * (groups - 1)) * 64), (16, groups * 16)):
        done = codec.encode_file(model, tmp_path / "v.mkv", tmp_path / "v.vtok", budget=budget)
        assert done.tokens == tokens and done.groups == groups
        decoded = np.stack(list(codec.decode_frames(model, tmp_path / "v.vtok")))
        whole = clip(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
        with torch.no_grad():
            kept = model.encode(whole, budget=None if budget is None else budget * groups)
            direct = to_uint8(model.decode(kept, size=(16, 16)))[0].permute(1, 2, 3, 0).numpy()
        assert np.abs(decoded.astype(int) - direct.astype(int)).max() <= 1  # a tie in float32 may round both ways
    for settings in (dict(budget=7), dict(tokens_per_second=40)):
        with pytest.raises(ValueError, match="are a grid over frames of 16x16; ask for budget=16"):
            codec.encode_file(model, tmp_path / "v.mkv", tmp_path / "x.vtok", **settings)
    with pytest.raises(ValueError, match="are a grid over frames of 16x16; leave it out"):
        codec.encode_file(make(), tmp_path / "v.mkv", tmp_path / "x.vtok", budget=64)


@pytest.mark.parametrize("frames, attention", [(1, "none"), (5, "spatial"), (5, "spatial_temporal")])
@torch.no_grad()
def test_tiles_show_no_seam(frames, attention):
    """Frames of four tiles: beside the borders of tiles the result is as near to that of whole frames as elsewhere."""
    changes = dict(stride=[1, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2], attention=attention)))
    with torch.enable_grad():
        model = make(num_frames=frames, **changes)
        learn(model, moving(2, frames), steps=30)
    pixels = clip(torch.nn.functional.interpolate(moving(1, frames, cells=8), size=(frames, 64, 64), mode="trilinear"))
    whole = model.decode(model.encode(pixels), size=(64, 64))
    named = identify(model)
    in_tiles(model, 10)
    assert identify(model) == named and (model.config.tile, model.config.tile_overlap) == (10, 4)
    tokens = model.encode(pixels)
    tiled = model.decode(tokens, size=(64, 64))
    assert tokens.lengths.tolist() == [frames * 256] and not torch.equal(tiled, whole)
    step = (tiled - whole).diff(dim=-1).abs().mean((0, 1, 2, 3))  # between neighbouring columns
    borders = torch.zeros(63, dtype=torch.bool)
    borders[[4 * edge + d for edge in (6, 10) for d in (-1, 0)]] = (
        True  # where the overlap of two tiles begins and ends
    )
    assert float(step[borders].mean()) < 3 * float(step[~borders].mean()) + 1e-3


def test_files_are_coded_in_tiles_and_read_without(tmp_path, monkeypatch):
    model = make()
    learn(model, moving(2, 5), steps=5)
    monkeypatch.setattr(codec, "load_any", lambda path, revision: copy.deepcopy(model).eval())
    frames = to_uint8(moving(1, 9))[0].permute(1, 2, 3, 0).repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
    write_video(tmp_path / "v.mkv", frames, fps=8, codec="ffv1")
    files = {}
    for name, tile in {"whole": [], "tiles": ["--tile", "8,2"], "own": ["--tile", "8"]}.items():
        codec.main_encode(["MODEL", str(tmp_path / "v.mkv"), "--out", str(tmp_path / f"{name}.vtok"), *tile])
        codec.main_decode(["MODEL", str(tmp_path / f"{name}.vtok"), "--out", str(tmp_path / f"{name}.mkv"), *tile])
        codec.main_decode(["MODEL", str(tmp_path / f"{name}.vtok"), "--out", str(tmp_path / f"{name}-whole.mkv")])
        files[name] = np.stack(list(codec.read_frames(tmp_path / f"{name}.mkv")))
    assert files["whole"].shape == files["tiles"].shape == frames.shape
    assert not np.array_equal(files["whole"], files["tiles"]) and not np.array_equal(files["own"], files["tiles"])
    for tile, said in (("8,5", "model.tile_overlap=5"), ("eight", "--tile eight: write latents a side"), ("0", "1 or")):
        with pytest.raises(ValueError, match=said):
            codec.main_decode(["MODEL", "x.vtok", "--out", str(tmp_path / "x.mkv"), "--tile", tile])
    with pytest.raises(ValueError, match="flow models code whole frames"):
        in_tiles(flow.Model(flow.Config(**FLOW)), 8)


def test_maps_are_fitted_once_and_saved():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert 0.5 < model.fit_statistics([moving(2, 5)])["explained"] <= 1
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    maps = {f"{part}.{kind}" for part in ("to_latent", "from_code") for kind in ("weight", "bias")}
    mean = {k for k, value in model.named_parameters() if value is model.decoder.read_out.bias}
    assert changed == maps | mean and not model.training
    with torch.no_grad():
        ids = model.encode(clip(moving(2, 5))).indices
    assert len(ids.unique()) > 0.3 * ids.numel(), "ids are spread from the start"
    other = make()
    other.load_state_dict(after)
    with torch.no_grad():
        assert torch.equal(other.encode(clip(moving(2, 5))).indices, ids)
