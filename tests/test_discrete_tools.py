"""Tokenizers on a grid through the tools around them: evaluation, files, tiles, checkpoints of the maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_contract import CONV, clip
from test_discrete import learn, make, moving

from vtok.coding import codec
from vtok.data.encode import write_video
from vtok.evaluation.evaluator import Evaluator
from vtok.layers.conv3d import ConvConfig
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


@torch.no_grad()
def test_tiles_show_no_seam():
    """Frames of four tiles: beside the borders of tiles the result is as near to that of whole frames as elsewhere."""
    changes = dict(stride=[1, 4, 4], conv=ConvConfig(**CONV | dict(mult=[1, 2, 2], attention="none")))
    with torch.enable_grad():
        model = make(num_frames=1, **changes)
        learn(model, moving(2, 1), steps=30)
    pixels = clip(torch.nn.functional.interpolate(moving(1, 1, cells=8), size=(1, 64, 64), mode="trilinear"))
    whole = model.decode(model.encode(pixels), size=(64, 64))
    model.config.tile, model.config.tile_overlap = 10, 4
    tokens = model.encode(pixels)
    tiled = model.decode(tokens, size=(64, 64))
    assert tokens.lengths.tolist() == [256] and not torch.equal(tiled, whole)
    step = (tiled - whole).diff(dim=-1).abs().mean((0, 1, 2, 3))  # between neighbouring columns
    borders = torch.zeros(63, dtype=torch.bool)
    borders[[4 * edge + d for edge in (6, 10) for d in (-1, 0)]] = (
        True  # where the overlap of two tiles begins and ends
    )
    assert float(step[borders].mean()) < 3 * float(step[~borders].mean()) + 1e-3


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
