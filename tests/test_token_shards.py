"""Token shards, read: batches that lose and repeat no id, grids that decode, a language model that learns."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_tar
from test_export import make_run
from test_tokenize import FRAMES, corpus, pixels
from waiting import PATIENCE_S

import vtok
from vtok import export as shipping
from vtok.coding import tokenize as tokenizing
from vtok.coding.token_coding import decode_sample
from vtok.coding.tokenize import tokenize
from vtok.data.token_reader import SampleFacts, TokenizerIdentity, iter_token_samples
from vtok.data.token_shards import TokenLoader, TokenShards
from vtok.types import Clip, to_uint8


def hand_made(folder: Path, clips: dict[str, tuple[np.ndarray, list[int]]], *, sizes=(64,), shards: int = 1) -> Path:
    """Token shards of given ids, without a model."""
    who = TokenizerIdentity("hand-000000000000", "00", sizes, tuple((n,) for n in sizes))
    entries = []
    for number in range(shards):
        members = []
        mine = list(clips.items())[number::shards]
        for key, (ids, groups) in mine:
            about = SampleFacts(groups, len(groups), 8.0, [16, 16], [], list(sizes))
            facts = {"caption": f"about {key}", "tokens": about._asdict()}
            members += [
                (f"{key}.tokens.npy", tokenizing.npy(ids, who.dtype)),
                (f"{key}.json", json.dumps(facts).encode()),
            ]
        path = write_tar(folder / f"t-{number}.tar", members)
        counts = [len(ids) for _, (ids, _) in mine]
        facts = {"tokens": sum(counts), "longest": max(counts, default=0)}
        entries.append({"name": path.name, "samples": len(mine), "bytes": path.stat().st_size, "sha256": "", **facts})
    index = {"kind": "tokens", "tokenizer": tokenizing.asdict(who), "shards": entries}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_a_hand_made_shard_of_two_ids_a_token_reads_back(tmp_path):
    """Q = 2: kept [K, Q], flattened with offsets or kept apart in batches."""
    ids = np.arange(12).reshape(6, 2) % [5, 7]
    hand_made(tmp_path, {"a": (ids, [2, 4])}, sizes=(5, 7))
    (sample,) = iter_token_samples(tmp_path)
    assert np.array_equal(sample.ids, ids)
    (batch,) = TokenShards(tmp_path, batch_size=1, length=15, epochs=1)
    assert batch.ids[0, :13].tolist() == [12] + (ids + [0, 5]).reshape(-1).tolist()
    assert batch.mask[0].tolist() == [True] * 13 + [False] * 2
    assert batch.group[0].tolist() == [-1] + [0] * 4 + [1] * 8 + [-1] * 2
    assert batch.rank[0].tolist() == [-1, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, -1, -1]
    apart = TokenShards(tmp_path, batch_size=1, length=8, epochs=1, flatten=False)
    assert apart.vocabulary == (6, 8)
    (batch,) = apart
    assert batch.ids.shape == (1, 8, 2) and batch.ids[0, :7].tolist() == [[5, 7], *ids.tolist()]


# ---- batches


def corpus_of_ids(folder: Path, *, clips: int = 23, shards: int = 4) -> Path:
    """Clips of 3 to 12 tokens in groups of 3; ids say the clip and the place, so that a wrong one shows."""
    made = {}
    for n in range(clips):
        groups = [3] * (1 + n % 4)
        made[f"c{n:02d}"] = ((n * 16 + np.arange(sum(groups)))[:, None], groups)
    return hand_made(folder, made, sizes=(clips * 16,), shards=shards)


def used(batch) -> list[tuple]:
    """(epoch, clip, place) of every id in a batch but the begins."""
    out = []
    for row, (ids, mask) in enumerate(zip(batch.ids, batch.mask)):
        for value, segment, group in zip(ids[mask], batch.segment[row][mask], batch.group[row][mask]):
            epoch, _, key = batch.keys[row][segment].partition(":")
            assert int(group) == -1 or int(key[1:]) == int(value) // 16
            if int(group) >= 0:
                out.append((int(epoch), int(value) // 16, int(value) % 16))
    return out


EVERY = {(n, place) for n in range(23) for place in range(3 * (1 + n % 4))}
ROWS = [{"mode": "packed", "length": 10}, {"mode": "clips"}, {"mode": "clips", "length": 13}]


@pytest.mark.parametrize("rows", ROWS, ids=["packed", "clips", "fixed"])
@pytest.mark.parametrize(("workers", "world", "shards"), [(0, 1, 4), (2, 1, 4), (0, 2, 4), (2, 2, 4), (0, 3, 2)])
def test_no_id_is_lost_or_repeated(tmp_path, rows, workers, world, shards):
    if workers and rows is ROWS[2]:
        pytest.skip("processes are slow to start, and the other two show it")
    corpus_of_ids(tmp_path, shards=shards)
    seen = Counter()
    for rank in range(world):
        dataset = TokenShards(tmp_path, batch_size=2, epochs=2, rank=rank, world=world, shuffle_buffer=3, **rows)
        for batch in TokenLoader(dataset, num_workers=workers):
            seen.update(used(batch))
    assert seen == Counter({(epoch, *each): 1 for epoch in range(2) for each in EVERY})


def test_packed_rows_are_full_and_clips_go_on(tmp_path):
    corpus_of_ids(tmp_path, shards=1)
    batches = list(TokenShards(tmp_path, batch_size=1, length=8, epochs=1, shuffle_buffer=0))
    assert all(batch.mask.all() for batch in batches[:-1])
    flat = torch.cat([batch.ids[batch.mask] for batch in batches])
    begins = (flat == 23 * 16).nonzero().flatten().tolist()
    assert len(begins) == 23 and flat[0] == 23 * 16
    assert flat[begins[3] + 1 : begins[4]].tolist() == [3 * 16 + k for k in range(12)]
    assert sum(len(row) for batch in batches for row in batch.captions) > 23, "clips that go on count in both rows"
    assert batches[0].captions[0][0] == "about c00"


def test_rows_of_clips(tmp_path):
    corpus_of_ids(tmp_path)
    with pytest.raises(ValueError, match="longest clip takes 13 places"):
        TokenShards(tmp_path, batch_size=2, mode="clips", length=9)
    cut = TokenShards(tmp_path, batch_size=2, mode="clips", length=9, cut=True, epochs=1)
    assert max(place for batch in cut for _, _, place in used(batch)) == 7
    plain = TokenShards(tmp_path, batch_size=4, mode="clips", begin=False, epochs=1)
    assert plain.vocabulary == (23 * 16,) and all((b.rank[b.mask] < 3).all() for b in plain)
    shapes = {tuple(batch.ids.shape) for batch in plain}
    assert max(width for _, width in shapes) == 12 and sum(rows for rows, _ in [b.ids.shape for b in plain]) == 23


@pytest.mark.parametrize("rows", ROWS[:2], ids=["packed", "clips"])
@pytest.mark.parametrize(("workers", "world", "shards"), [(0, 1, 4), (2, 1, 4), (2, 2, 4), (0, 2, 1), (0, 1, 1)])
def test_a_resume_is_exact(tmp_path, rows, workers, world, shards):
    corpus_of_ids(tmp_path, shards=shards)

    def loader(rank):
        dataset = TokenShards(tmp_path, batch_size=2, rank=rank, world=world, shuffle_buffer=3, seed=5, **rows)
        return TokenLoader(dataset, num_workers=workers)

    total = 34 if not workers else 24
    for rank in range(world):
        whole = loader(rank)
        wanted = [(b.ids, b.keys) for b in itertools.islice(whole, total)]
        assert whole.batches == total
        for stop in (1, 9, total - 3) if not workers else (7,):
            first = loader(rank)
            for _ in itertools.islice(first, stop):
                pass
            state = json.loads(json.dumps(first.state_dict()))
            second = loader(rank)
            second.load_state_dict(state)
            got = [(b.ids, b.keys) for b in itertools.islice(second, total - stop)]
            assert all(torch.equal(a, x) and b == y for (a, b), (x, y) in zip(got, wanted[stop:], strict=True))


def test_a_resume_reads_no_ids_on_the_way(tmp_path, monkeypatch):
    corpus_of_ids(tmp_path)
    for rows in ROWS[:2]:
        dataset = TokenShards(tmp_path, batch_size=2, start=301, **rows)
        read = []
        load = dataset.reader._load
        monkeypatch.setattr(
            dataset.reader, "_load", lambda sample, load=load, read=read: read.append(sample.key) or load(sample)
        )
        scanned = []
        samples = dataset.reader.samples
        monkeypatch.setattr(dataset.reader, "samples", lambda n, s=samples, k=scanned: k.append(n) or s(n))
        next(iter(dataset))
        assert len(read) <= 6 and len(scanned) <= 8, "whole epochs are passed over by the index"


def test_a_resume_of_another_stream_is_refused(tmp_path):
    corpus_of_ids(tmp_path)
    state = TokenLoader(TokenShards(tmp_path, batch_size=2, length=8)).state_dict()
    for changed, message in (
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"length": 9}, "length was 8 and is 9"),
    ):
        loader = TokenLoader(TokenShards(tmp_path, **({"batch_size": 2, "length": 8} | changed)))
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="shards was"):
        other = corpus_of_ids(tmp_path / "other", clips=22)
        TokenLoader(TokenShards(str(other), batch_size=2, length=8)).load_state_dict(state)
    with pytest.raises(ValueError, match="nothing to resume"):
        dataset = TokenShards(tmp_path, batch_size=2, length=8, epochs=1)
        TokenLoader(dataset).load_state_dict(TokenLoader(dataset).state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "rows"}, "choose one of packed, clips"),
        ({"length": None}, "length=None"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cut": True}, "cut=True is for mode='clips'"),
        ({"rank": 1}, "give both"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1, "start": 2}, "from the beginning"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    corpus_of_ids(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenShards(tmp_path, **({"batch_size": 2, "length": 8} | settings))


# ---- a model on a grid, and a language model on the ids


GRID = {"name": "discrete", "num_frames": 5, "size": [16, 16], "stride": [4, 8, 8], "latent_channels": 8}
SMALL_CONV = {"width": 8, "mult": [1, 1, 1, 1], "num_res_blocks": 1, "mid_blocks": 1, "attention": "none"}


@pytest.mark.parametrize("levels", [{}, {"coarse": [1, 2, 2]}], ids=["one", "two"])
def test_tokens_of_a_grid(tmp_path, levels):
    """Long videos as a stream, short ones in batches: the ids of the whole; the grid is in the json."""
    pytest.importorskip("vtok.families.discrete")
    shipping.export(grid_run(tmp_path / "run", **levels), tmp_path / "export", entropy=False)
    shards, settings = corpus(tmp_path / "s", shards=1), {"model": tmp_path / "export", "workers": 0, "progress": False}
    done = tokenize(shards, tmp_path / "t", **settings)
    assert done.samples == 7
    model = vtok.load(tmp_path / "export")
    different = 0
    for sample in iter_token_samples(tmp_path / "t"):
        seen = pixels(sample.key)
        with torch.inference_mode():
            tokens = model.encode(Clip(keys=["x"], video=torch.from_numpy(seen).permute(3, 0, 1, 2)[None]))
            decoded = to_uint8(model.decode(tokens, size=(16, 16)))[0].permute(1, 2, 3, 0).numpy()
        different += int((sample.ids != tokens.indices[0].numpy()).sum())
        latents = 1 + -(-(len(seen) - 1) // 4)
        assert sample.tokens.grids == ([[latents, 1, 1]] if levels else []) + [[latents, 2, 2]]
        assert len(sample.tokens.groups) == latents and sum(sample.tokens.groups) == len(sample.ids)
        if not different:
            assert np.abs(decode_sample(model, sample).astype(int) - decoded).max() <= 1
    assert different <= 2, "ids may differ at ties alone"
    assert sample.ids.std() > 1
    if levels:
        tokenize(shards, tmp_path / "u", budget=1, **settings)
        first = next(iter_token_samples(tmp_path / "u"))
        assert set(first.tokens.groups) == {1} and first.tokens.grids == [[7, 1, 1]]
        assert decode_sample(model, first).shape == (24, 16, 16, 3)
    with pytest.raises(
        ValueError, match="whole levels can be left out: .*" + ("ask for 1 of" if levels else "one level")
    ):
        tokenize(shards, tmp_path / "v", budget=3, **settings)


def grid_run(folder: Path, **changes) -> Path:
    """A run directory of a small discrete tokenizer with random weights."""
    from vtok import config as configuration

    values = {"name": folder.name, "out": str(folder.parent), "model": {**GRID, "conv": SMALL_CONV, **changes}}
    values["data"] = {"num_frames": 5, "size": [16, 16], "fps": None, "crop": "center", "val_batch_size": 2}
    config = configuration.loads(values)
    torch.manual_seed(0)
    net = configuration.load_family("discrete").Model(config.model)
    with torch.no_grad():
        net.to_latent.weight.mul_(8)  # or every id would be the middle one
        if changes:
            net.to_coarse_latent.weight.mul_(8)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(configuration.to_yaml(config))
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.slow
def test_the_example_trains_resumes_and_samples(tmp_path):
    """Bits a token end below the entropy of the ids, on ids that a model can learn; the sample is a video."""
    quantizer = {"name": "fsq", "levels": [4, 4]}
    shipping.export(make_run(tmp_path / "run", quantizer=quantizer), tmp_path / "export", entropy=False)
    for split in ("train", "val"):
        corpus(tmp_path / "shards" / split, shards=1 + 3 * (split == "train"))
    tokenize(tmp_path / "shards", tmp_path / "tokens", model=tmp_path / "export", workers=0, progress=False)
    example = Path(__file__).parents[1] / "examples" / "train_ar.py"
    pytest.importorskip("transformers")
    command = [sys.executable, str(example), str(tmp_path / "tokens"), "--model", str(tmp_path / "export")]
    command += [
        "--out",
        str(tmp_path / "s.mp4"),
        "--checkpoint",
        str(tmp_path / "c.pt"),
        "--width",
        "32",
        "--depth",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for steps in ("40", "80"):
        call = [*command, "--steps", steps]
        done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    entropy = float(re.search(r"entropy of their ids: ([\d.]+)", done.stdout)[1])
    held_out = float(re.search(r"held out: ([\d.]+)", done.stdout)[1])
    assert "step 50:" in done.stdout and held_out < 0.8 * entropy
    from vtok.data.decode import iter_frames

    assert len(list(iter_frames(tmp_path / "s.mp4"))) == FRAMES[0]
