"""Ids for a trained continuous tokenizer: `vtok quantize RUN`."""

from __future__ import annotations

import pytest
import torch
from test_export import clip, make_run, shards, video  # noqa: F401

import vtok
from vtok import ptq
from vtok.loading import load_run
from vtok.types import Clip


def continuous(folder, family, *, shards="", kl=0.0):  # noqa: F811
    return make_run(folder, family=family, shards=shards, quantizer={"name": "identity", "dim": 4, "kl": kl})


@pytest.mark.parametrize("family", ["flexible", "discrete"])
@pytest.mark.parametrize("kl", [0.0, 1e-3])
def test_more_bins_are_nearer_to_the_continuous_model(tmp_path, family, kl):
    model, config = load_run(continuous(tmp_path / "run", family, kl=kl))
    clips = [Clip([str(i)], video(5, seed=i)[:1]) for i in range(8)]
    with torch.no_grad():
        latents = model.encode(clip())
        wanted = model.decode(latents, size=(16, 16))
        errors, told = [], []
        for bins in (4, 16, 64):
            found = ptq.quantize(model, config, clips, bins=bins)
            tokens = found.model.encode(clip())
            assert tokens.codebook_sizes == (bins,) * 4 and int(tokens.indices.max()) < bins
            assert torch.equal(found.model.lookup(tokens.indices), tokens.embeddings)
            errors.append(float((found.model.decode(tokens, size=(16, 16)) - wanted).square().mean()))
            told.append(found.explained)
    assert errors[0] > errors[1] > errors[2] and told[0] < told[1] < told[2] <= 1 and told[2] > 0.99
    assert config.model.quantizer.name == "identity"  # the run's own is as it was


def test_the_command_writes_an_export_that_loads(tmp_path, shards, capsys):  # noqa: F811
    run = continuous(tmp_path / "run", "discrete", shards=shards)
    ptq.main([str(run), "--out", str(tmp_path / "ids"), "--bins", "8", "--clips", "4"])
    said = capsys.readouterr().out
    assert "4 ids a token, 12.0 bits" in said and "latents of training clips" in said
    model = vtok.load(str(tmp_path / "ids"))
    assert model.codebook_sizes == (8,) * 4 and bool(model.quantizer.fitted)
    assert (tmp_path / "ids" / "entropy.safetensors").exists()


def test_what_cannot_be_quantized_says_so(tmp_path):
    model, config = load_run(make_run(tmp_path / "run"))
    with pytest.raises(ValueError, match="model.quantizer.name=fsq: only a continuous"):
        ptq.quantize(model, config, [clip()])
    model, config = load_run(continuous(tmp_path / "other", "flexible"))
    with pytest.raises(ValueError, match="cannot fill model.quantizer.bins=4096"):
        ptq.quantize(model, config, [clip()], bins=4096)
