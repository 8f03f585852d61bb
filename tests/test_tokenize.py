"""Video shards to shards of ids: the model's own ids, the same after any kill. Their readers: test_token_shards.py."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import clip, movie, photo, write_index, write_tar
from test_codec import direct
from test_export import TINY, make_run
from waiting import PATHS, PATIENCE_S, kill_once

import vtok
from vtok import export as shipping
from vtok.coding import tokenize as tokenizing
from vtok.coding.token_coding import Encoder, Settings, decode_ids, decode_sample, piece_facts, tokens_of
from vtok.coding.tokenize import tokenize
from vtok.config import loads
from vtok.data.maps import map_bytes
from vtok.data.sources import ShardReader, open_sources
from vtok.data.token_reader import (
    TokenizerIdentity,
    TokenShardError,
    iter_token_samples,
    open_token_shards,
)
from vtok.data.token_shards import TokenShards
from vtok.families.discrete import Model
from vtok.loading import identify
from vtok.types import Clip, to_uint8

FRAMES = (24, 4, 9, 1, 30, 6, 13)  # of the clips, in turn: shorter and longer than the model's 4 and a batch's 8


def corpus(folder: Path, shards: int = 3, samples: int = 7) -> Path:
    counts = {}
    for s in range(shards):
        members = []
        for i in range(samples):
            media = photo(40 * s) if FRAMES[i] == 1 else movie(30 * s + 10 * i, frames=FRAMES[i])
            facts = {"caption": f"clip {s} {i}", "source": f"video {i}", "duration_s": FRAMES[i] / 12}
            members += clip(f"k{s}_{i}", media, "png" if FRAMES[i] == 1 else "mov", **facts)
        counts[write_tar(folder / f"train-{s:06d}.tar", members).name] = samples
    write_index(folder, counts)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A corpus, an export, and its token shards, made once."""
    root = tmp_path_factory.mktemp("tokenize")
    corpus(root / "shards")
    shipping.export(make_run(root / "run"), root / "export", entropy=False)
    tokenize(root / "shards", root / "tokens", model=root / "export", workers=0, progress=False)
    return root


def run(home: Path, out: Path, **keywords):
    settings = {"model": home / "export", "workers": 0, "progress": False}
    return tokenize(keywords.pop("shards", home / "shards"), out, **(settings | keywords))


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file of an output but what tells of the work itself."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def frames_of(key: str) -> int:
    return FRAMES[int(key.rpartition("_")[2])]


def pixels(key: str, size=(16, 16)) -> np.ndarray:
    """uint8 [T, *size, 3]: what validation sees of a clip, all of its frames."""
    from vtok.coding.codec import resize_crop
    from vtok.data.decode import iter_frames

    s, i = (int(n) for n in key[1:].split("_"))
    media = photo(40 * s) if FRAMES[i] == 1 else movie(30 * s + 10 * i, frames=FRAMES[i])
    return np.stack([resize_crop(frame, size) for frame, _ in iter_frames(media)])


# ---- what is written


def test_ids_are_the_models_own_for_every_length(home):
    model = vtok.load(home / "export")
    samples = list(iter_token_samples(home / "tokens", model_id=model.shipped.model_id))
    assert [s.key for s in samples] == [f"k{s}_{i}" for s in range(3) for i in range(7)]
    for sample in samples:
        seen = pixels(sample.key)
        video = torch.from_numpy(seen).permute(3, 0, 1, 2)[None]
        with torch.inference_mode():
            tokens = model.encode(Clip(keys=["x"], video=video))
            decoded = to_uint8(model.decode(tokens, size=(16, 16)))[0].permute(1, 2, 3, 0).numpy()
        assert np.array_equal(sample.ids, tokens.indices[0].numpy()), sample.key
        assert sample.tokens.frames == len(seen) == frames_of(sample.key)
        assert sample.tokens.groups == [4] * -(-len(seen) // 4) and sample.tokens.size == [16, 16]
        assert sample.tokens.fps == (None if len(seen) == 1 else pytest.approx(12))
        assert np.array_equal(decode_sample(model, sample), decoded)
        assert np.array_equal(decoded, direct(model, seen))
        s, i = sample.key[1:].split("_")
        assert sample.facts["caption"] == f"clip {s} {i}" and sample.facts["source"] == f"video {i}"
    assert len({s.ids.tobytes() for s in samples}) > 15, "ids that are all alike prove nothing"


def test_the_files_are_as_documented(home):
    index = json.loads((home / "tokens" / "index.json").read_text())
    who = identify(vtok.load(home / "export"))
    assert index["kind"] == "tokens" and index["dtype"] == "uint16" and index["samples"] == 21
    assert index["tokenizer"]["model_id"] == who.model_id
    assert index["tokenizer"]["weights_sha256"] == who.weights_sha256.hex()
    assert index["tokenizer"]["codebook_sizes"] == [int(np.prod(index["tokenizer"]["index_factors"][0]))]
    assert index["frames"] == 3 * sum(FRAMES) and index["tokens"] == 3 * sum(4 * -(-n // 4) for n in FRAMES)
    for entry in index["shards"]:
        data = (home / "tokens" / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        assert entry["longest"] == 32 and entry["samples"] == 7
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            first = f"k{int(entry['name'][6:12])}_0"
            assert tar.getnames()[:2] == [f"{first}.tokens.npy", f"{first}.json"]
            member = tar.extractfile(tar.getnames()[0])
            ids = np.load(io.BytesIO(member.read()))
            assert ids.dtype == np.uint16 and ids.shape == (24,)
    assert (home / "tokens" / "rejected.jsonl").read_text() == ""
    assert not list((home / "tokens").rglob("*.tmp"))


def test_rate_size_and_pieces_when_told(home, tmp_path):
    run(home, tmp_path / "t", fps=6.0, size=(8, 16), clip_frames=6)
    samples = {s.key: s for s in iter_token_samples(tmp_path / "t")}
    pieces = {"k0_0": [6, 6], "k0_1": [2], "k0_2": [5], "k0_3": [1], "k0_4": [6, 6, 3], "k0_5": [3], "k0_6": [6, 1]}
    assert {k: s.tokens.frames for k, s in samples.items() if k.startswith("k0")} == {
        f"{key}__{n:04d}": frames for key, counts in pieces.items() for n, frames in enumerate(counts)
    }
    model = vtok.load(home / "export")
    part = samples["k1_4__0001"]
    seen = pixels("k1_4", (8, 16))[::2][6:12]
    with torch.inference_mode():
        wanted = model.encode(Clip(keys=["x"], video=torch.from_numpy(seen).permute(3, 0, 1, 2)[None])).indices[0]
    assert np.array_equal(part.ids, wanted.numpy())
    assert (part.tokens.start_s, part.tokens.fps, part.tokens.size) == (1.0, 6.0, [8, 16])
    assert (part.facts["start_s"], part.facts["duration_s"], part.facts["caption"]) == (1.0, 1.0, "clip 1 4")


def test_captions_and_questions_of_a_piece():
    facts = {
        "captions": [{"start_s": 0.0, "end_s": 1.5, "text": "a"}, {"start_s": 3.0, "end_s": 4.0, "text": "b"}],
        "qa": [{"id": 1}, {"id": 2, "start_s": 1.0, "end_s": 1.5}, {"id": 3, "start_s": 0.5, "end_s": 1.5}],
        "start_s": 10.0,
        "label": 3,
    }
    assert piece_facts(facts, 1.0, 1.0) == {
        "captions": [{"start_s": 0.0, "end_s": 0.5, "text": "a"}],
        "qa": [{"id": 1}, {"id": 2, "start_s": 0.0, "end_s": 0.5}],
        "start_s": 11.0,
        "duration_s": 1.0,
        "label": 3,
    }


def test_budget_keeps_the_first_of_each_group(home, tmp_path):
    run(home, tmp_path / "t", budget=3)
    model = vtok.load(home / "export")
    whole = {s.key: s for s in iter_token_samples(home / "tokens")}
    for sample in iter_token_samples(tmp_path / "t"):
        rank = np.arange(len(whole[sample.key].ids)) % 4
        assert np.array_equal(sample.ids, whole[sample.key].ids[rank < 3]) and set(sample.tokens.groups) == {3}
        assert np.array_equal(decode_sample(model, sample), direct(model, pixels(sample.key), budget=3))
    with pytest.raises(ValueError, match="budget=5: a group of this model has 1 to 4"):
        run(home, tmp_path / "u", budget=5)


def test_a_whole_packing_keeps_its_splits(home, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(home / "shards", tmp_path / "packed" / split)
    done = run(home, tmp_path / "t", shards=tmp_path / "packed")
    assert done.samples == 42 and sorted(p.parent.name for p in (tmp_path / "t").glob("*/index.json")) == [
        "train",
        "val",
    ]
    assert contents(tmp_path / "t" / "val") == contents(tmp_path / "t" / "train")
    assert sum(1 for _ in iter_token_samples(tmp_path / "t" / "val")) == 21


def test_dtype_follows_the_codebook():
    def dtype(*sizes):
        return TokenizerIdentity("m", "", sizes, ()).dtype

    assert dtype(1 << 16) == dtype(4, 1 << 16) == "uint16" and dtype((1 << 16) + 1) == dtype(4, 1 << 32) == "uint32"


def test_ids_above_32_bits_are_refused_rather_than_wrapped():
    told = rf"codebook of {1 << 40} entries .*model.quantizer.num_codebooks"
    with pytest.raises(ValueError, match=told):
        assert TokenizerIdentity("m", "", (4, 1 << 40), ()).dtype
    quantizer = {"name": "bsq", "codebook_size": 1 << 40}
    model = Model(loads({"model": {**TINY["discrete"], "quantizer": quantizer}}).model)
    with pytest.raises(ValueError, match=told):
        Encoder(model, Settings(fps=None, size=(16, 16)))


def test_large_codebooks_and_several_ids_a_token(home, tmp_path):
    quantizer = {"name": "fsq", "levels": [8] * 6}
    shipping.export(make_run(tmp_path / "run", quantizer=quantizer), tmp_path / "large", entropy=False)
    run(home, tmp_path / "t", model=tmp_path / "large")
    index = json.loads((tmp_path / "t" / "index.json").read_text())
    assert index["dtype"] == "uint32" and index["tokenizer"]["index_factors"] == [[8] * 6]
    model = vtok.load(tmp_path / "large")
    samples = list(iter_token_samples(tmp_path / "t"))
    assert max(int(s.ids.max()) for s in samples) > 1 << 16
    for sample in samples[:7]:
        assert np.array_equal(decode_sample(model, sample), direct(model, pixels(sample.key)))


def test_dense_maps_where_the_model_reads_them(tmp_path):
    """All frames of a map at a rate, in the pieces of a long one too."""
    generator = np.random.default_rng(0)
    maps = {
        f"m{n}": generator.uniform(-1, 1, (frames, 16, 16, 5)).astype(np.float32) for n, frames in enumerate((7, 30))
    }
    maps["m2"] = generator.integers(0, 256, (1, 20, 16, 5), np.uint8)
    members = [m for key, value in maps.items() for m in clip(key, map_bytes(value), "npy", fps=12.0)]
    members += clip("wide", map_bytes(np.zeros((3, 16, 16, 4), np.uint8)), "npy", fps=12.0)
    members += clip("fast", map_bytes(np.zeros((3, 16, 16, 5), np.uint8)), "npy")
    write_tar(tmp_path / "s" / "a.tar", members)
    write_index(tmp_path / "s", {"a.tar": 5})
    shipping.export(make_run(tmp_path / "run", channels=5), tmp_path / "export", entropy=False)
    settings = (tmp_path / "export" / "training.yaml").read_text()
    with pytest.raises(ValueError, match="model.channels=5"):
        run(tmp_path, tmp_path / "t", shards=tmp_path / "s")
    (tmp_path / "export" / "training.yaml").write_text(settings.replace("map: ''", "map: npy"))
    done = run(tmp_path, tmp_path / "t", shards=tmp_path / "s", fps=6.0)
    assert [r["key"] for r in done.rejected] == ["wide", "fast"] and "5" in done.rejected[0]["reason"]
    model = vtok.load(tmp_path / "export")
    samples = {s.key: s for s in iter_token_samples(tmp_path / "t")}
    for key, value in maps.items():
        seen = torch.from_numpy(value[:: 2 if len(value) > 1 else 1]).permute(3, 0, 1, 2)[None]
        seen = seen[..., 2:18, :] if key == "m2" else seen
        with torch.inference_mode():
            wanted = model.encode(Clip(keys=["x"], video=seen)).indices[0].numpy()
        assert np.array_equal(samples[key].ids, wanted)
        assert samples[key].tokens.frames == seen.shape[2]
        assert samples[key].tokens.fps == (6.0 if len(value) > 1 else None)


# ---- kills, parts, other settings


def test_an_interrupted_call_goes_on_and_ends_bitwise_the_same(home, tmp_path, monkeypatch):
    out, made = tmp_path / "t", []
    write = tokenizing.write_shard

    def stops(job, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(job.name)
        return write(job, *rest)

    monkeypatch.setattr(tokenizing, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run(home, out)
    assert [p.name for p in out.glob("*.tar")] == made and not (out / "index.json").exists()
    (out / ".train-000001.tar.77.tmp").write_bytes(b"half")
    made.clear()
    monkeypatch.setattr(tokenizing, "write_shard", lambda job, *rest: made.append(job.name) or write(job, *rest))
    done = run(home, out)
    assert made == ["train-000001.tar", "train-000002.tar"] and done.samples == 21
    assert contents(out) == contents(home / "tokens")
    made.clear()
    damaged = bytearray((out / "train-000001.tar").read_bytes())
    damaged[700] ^= 1
    (out / "train-000001.tar").write_bytes(bytes(damaged))
    run(home, out)
    assert made == ["train-000001.tar"] and contents(out) == contents(home / "tokens")


def test_parts_make_the_whole(home, tmp_path):
    first = run(home, tmp_path / "t", part=(0, 2))
    assert first.outstanding == 1 and not (tmp_path / "t" / "index.json").exists()
    last = run(home, tmp_path / "t", part=(1, 2))
    assert last.outstanding == 0 and contents(tmp_path / "t") == contents(home / "tokens")
    with pytest.raises(ValueError, match="part=2/2"):
        run(home, tmp_path / "t", part=(2, 2))


def test_an_output_of_other_settings_is_refused(home, tmp_path):
    shutil.copytree(home / "tokens", tmp_path / "t")
    with pytest.raises(ValueError, match=r"made otherwise: fps=None there, 6.0 now"):
        run(home, tmp_path / "t", fps=6.0)
    shipping.export(make_run(tmp_path / "run", seed=3), tmp_path / "other", entropy=False)
    with pytest.raises(ValueError, match="made otherwise: tokenizer='flexible-"):
        run(home, tmp_path / "t", model=tmp_path / "other")
    with pytest.raises(ValueError, match="holds shards of something else"):
        run(home, home / "shards")


KILLED = """
import os, sys, torch
from vtok.coding import tokenize as tokenizing
from waiting import never_named

never_named(os.environ.get("LAST", ""))
if __name__ == "__main__":
    tokenizing.tokenize(sys.argv[1], sys.argv[2], model=sys.argv[3], workers=int(sys.argv[4]), progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "kills"), [pytest.param(0, (1, 2), marks=pytest.mark.long), (2, (1,))]
)  # when so many shards are there
def test_kill_9_anywhere_and_again_equals_uninterrupted(home, tmp_path, workers, kills):
    out, script = tmp_path / "t", tmp_path / "go.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(home / "shards"), str(out), str(home / "export"), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    last = max(path.name for path in (home / "tokens").glob("*.tar"))
    for wanted in kills:
        process = subprocess.Popen(command, env=environment | {"LAST": last}, start_new_session=True)
        kill_once(lambda wanted=wanted: len(list(out.glob("*.tar"))) >= wanted, process)
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S)
    assert contents(out) == contents(home / "tokens")


def test_memory_does_not_grow_with_the_video(home, tmp_path):
    """The frames of the long one would take 7 MB; a batch of them takes 0.1."""
    write_tar(tmp_path / "s" / "a.tar", clip("a", movie(9, frames=600)))
    write_index(tmp_path / "s", {"a.tar": 1})
    encoder = Encoder(vtok.load(home / "export"), Settings(fps=None, size=(64, 64), batch_size=2))
    reader = ShardReader(open_sources(str(tmp_path / "s"))[0])
    tracemalloc.start()
    ((_, (sample,)),) = encoder.shard(reader, 0, lost={}, notify=lambda key: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.tokens.frames == 600 and len(sample.ids) == 600 and peak < 3e6


# ---- what cannot be


def test_broken_samples_are_listed_and_too_many_fail(home, tmp_path):
    shutil.copytree(home / "shards", tmp_path / "s")
    movie_bytes = movie(40, frames=24)
    members = clip("k9_0", movie_bytes) + clip("k9_1", movie_bytes[: len(movie_bytes) // 2])
    members += [("k9_2.mov", movie_bytes), ("k9_2.json", b"{not json"), ("k9_3.json", b"{}"), *clip("k9_4", b"text")]
    write_tar(tmp_path / "s" / "z.tar", members)
    counts = {f"train-{n:06d}.tar": 7 for n in range(3)} | {"z.tar": 5}
    write_index(tmp_path / "s", counts)
    with pytest.raises(ValueError, match="3 of 25 samples seen are broken .*Rejected samples so far: .*rejected.jsonl"):
        run(home, tmp_path / "t", shards=tmp_path / "s")
    assert not (tmp_path / "t" / "index.json").exists()
    done = run(home, tmp_path / "t", shards=tmp_path / "s", max_bad_fraction=0.2)
    lines = [json.loads(line) for line in (tmp_path / "t" / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k9_1", "k9_2", "k9_3", "k9_4"]
    assert "not json" in lines[1]["reason"] and "no video or image" in lines[2]["reason"]
    assert (done.samples, len(done.rejected), done.done_now) == (22, 4, {"samples": 1, "frames": 24, "tokens": 24})
    assert contents(tmp_path / "t")["train-000000.tar"] == contents(home / "tokens")["train-000000.tar"]


def test_the_share_is_that_of_all_parts(home, tmp_path):
    for n in range(3):
        members = [m for i in range(6) for m in clip(f"p{n}_{i}", b"text" if i == n else photo(), "png")]
        write_tar(tmp_path / "s" / f"{n}.tar", members)
    write_index(tmp_path / "s", {f"{n}.tar": 6 for n in range(3)})
    for n in range(2):
        assert run(home, tmp_path / "t", shards=tmp_path / "s", part=(n, 3)).outstanding == 2 - n
    with pytest.raises(ValueError, match="3 of 18 samples were rejected, above --max-bad-fraction 0.01"):
        run(home, tmp_path / "t", shards=tmp_path / "s", part=(2, 3))
    assert not (tmp_path / "t" / "index.json").exists()
    assert run(home, tmp_path / "t", shards=tmp_path / "s", max_bad_fraction=0.2).samples == 15


def test_nothing_but_broken_samples_stops_early(home, tmp_path):
    write_tar(tmp_path / "s" / "a.tar", [m for i in range(40) for m in clip(f"b{i:02d}", b"text")])
    write_index(tmp_path / "s", {"a.tar": 40})
    with pytest.raises(ValueError, match="20 of 20 samples seen are broken.*Rejected samples so far"):
        run(home, tmp_path / "t", shards=tmp_path / "s")
    assert len((tmp_path / "t" / "rejected.jsonl").read_text().splitlines()) == 20


def test_a_video_that_breaks_far_in_leaves_no_piece(home, tmp_path):
    data = movie(40, frames=30)
    write_tar(tmp_path / "s" / "a.tar", clip("a", movie(10)) + clip("b", damage_late(data)) + clip("c", movie(20)))
    write_index(tmp_path / "s", {"a.tar": 3})
    done = run(home, tmp_path / "t", shards=tmp_path / "s", clip_frames=4)
    assert done.samples == 12 and [r["key"] for r in done.rejected] == ["b"]
    assert {s.key[0] for s in iter_token_samples(tmp_path / "t")} == {"a", "c"}


def damage_late(data: bytes) -> bytes:
    """Zeros in the last picture of a movie of PNG pictures."""
    at = data.rindex(b"IDAT") + 20
    return data[:at] + bytes(40) + data[at + 40 :]


def test_models_without_ids_and_missing_facts(home, tmp_path):
    quantizer = {"name": "identity", "dim": 4}
    shipping.export(make_run(tmp_path / "run", quantizer=quantizer), tmp_path / "continuous", entropy=False)
    with pytest.raises(ValueError, match="continuous tokens"):
        run(home, tmp_path / "t", model=tmp_path / "continuous")
    shutil.copytree(home / "export", tmp_path / "bare")
    (tmp_path / "bare" / "training.yaml").unlink()
    with pytest.raises(ValueError, match="training.yaml is missing"):
        run(home, tmp_path / "t", model=tmp_path / "bare")
    for settings, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"fps": -1.0}, "fps=-1.0"),
        ({"clip_frames": 0}, "clip_frames=0"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"max_bad_fraction": 2}, "max_bad_fraction=2"),
        ({"shards": tmp_path}, "holds no shards"),
    ):
        with pytest.raises(ValueError, match=message):
            run(home, tmp_path / "t", **settings)


def test_another_tokenizers_ids_are_refused(home, tmp_path):
    shipping.export(make_run(tmp_path / "run", seed=3), tmp_path / "other", entropy=False)
    other, own = vtok.load(tmp_path / "other").shipped.model_id, vtok.load(home / "export").shipped.model_id
    with pytest.raises(TokenShardError, match=f"holds ids of {own}, but {other} is to read them"):
        TokenShards(home / "tokens" / "", batch_size=1, length=8, model_id=other)
    run(home, tmp_path / "t", model=tmp_path / "other")
    with pytest.raises(TokenShardError, match="equal numbers mean different things"):
        open_token_shards(f"{home / 'tokens'}::{tmp_path / 't'}")
    assert len(open_token_shards(f"{home / 'tokens'}", model_id=own).shards) == 3
    with pytest.raises(ValueError, match="holds no token shards"):
        open_token_shards(str(home / "shards"))


def test_damaged_token_shards_are_errors(home, tmp_path):
    for number, (at, message) in enumerate(((650, "do not fit codebooks"), (-9000, "cut short|json"))):
        folder = tmp_path / str(number)
        shutil.copytree(home / "tokens", folder)
        path = folder / "train-000001.tar"
        data = bytearray(path.read_bytes())
        if at > 0:
            data[at : at + 2] = b"\xff\xff"  # an id past the codebook
        path.write_bytes(bytes(data) if at > 0 else bytes(data[: len(data) + at]))
        with pytest.raises(TokenShardError, match=message):
            list(TokenShards(folder, batch_size=2, length=16, epochs=1))


def test_ids_that_no_clip_has_do_not_decode(home):
    model = vtok.load(home / "export")
    with pytest.raises(ValueError, match="7 tokens for groups of 8"):
        tokens_of(model, np.zeros(7), groups=[4, 4], frames=8)
    with pytest.raises(ValueError, match="the codebooks have"):
        tokens_of(model, np.full(4, 1 << 20), groups=[4], frames=4)
    assert decode_ids(model, np.zeros(8, np.int64), groups=[4, 4], frames=7, size=(16, 16)).shape == (7, 16, 16, 3)


def test_the_command(home, tmp_path, capsys):
    arguments = [str(home / "shards"), "--model", str(home / "export"), "--out", str(tmp_path / "t"), "--workers", "0"]
    assert tokenizing.main([*arguments, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "21 clips, 261 frames" in out and "tokens/s" in out
    assert contents(tmp_path / "t") == contents(home / "tokens")
    more = ["--clip-frames", "model", "--fps", "source", "--size", "16x16", "--out", str(tmp_path / "u"), "--quiet"]
    assert tokenizing.main([*arguments, *more]) == 0
    assert max(s.tokens.frames for s in iter_token_samples(tmp_path / "u")) == 4
    for wrong, message in (("--part", "expected I/N"), ("--size", "not HxW"), ("--fps", "not a number")):
        with pytest.raises(ValueError, match=message):
            tokenizing.main([*arguments, wrong, "x"])
