"""`vtok features` itself: what it writes, which settings it refuses, and that kills, parts and broken videos change
nothing of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from miniature import clip, config, movie, write_index, write_tar
from test_features import FILE, FRAMES, SEEN, corpus, run, tower_config
from test_features import home as home  # a fixture
from waiting import PATHS, PATIENCE_S, kill_once

from vtok import features as recording
from vtok.data.feature_index import FeatureSettings
from vtok.data.module import ClipDataModule
from vtok.data.shard_work import plan
from vtok.data.view import view_of
from vtok.vision import load_tower


def contents(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def hashed(folder: Path) -> dict[str, str]:
    return {name: value for name, value in contents(folder).items() if name.endswith(".tar")}


def config_of(folder: Path):
    return config(folder / "train", **SEEN)


def test_the_files_are_as_documented(home):
    safetensors = pytest.importorskip("safetensors")
    folder, tower = home / "at_12.0", load_tower(tower_config(home))
    index = json.loads((folder / "index.json").read_text())
    assert (index["schema"], index["kind"], index["samples"], index["frames"]) == (1, "features", 10, 2 * sum(FRAMES))
    assert index["tower"] == {**tower.identity(), "stride": 1, "window": 1, "embedding_dim": 16}
    assert index["settings"] | {"fps": 12.0, "size": [17, 17], "crop": "center", "frames": None} == index["settings"]
    for number, entry in enumerate(index["shards"]):
        data = (folder / entry["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        with tarfile.open(folder / entry["name"]) as tar:
            names = [f"k{number}_{i}.{suffix}" for i in range(5) for suffix in (FILE, "json")]
            assert tar.getnames() == names
            tar.extract(names[0], home / "out", filter="data")
            facts = json.loads(tar.extractfile(names[1]).read())
        assert facts["caption"] == f"clip {number} 0" and facts["qa"][0]["id"] == f"{number}0"
        with safetensors.safe_open(home / "out" / names[0], "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
            stated = {name: json.loads(value) for name, value in file.metadata().items()}
        assert set(found) == {"seconds", "crc32", "patches", "frame"} and stated["grid"] == [2, 2]
        assert found["patches"].shape == (24, 4, 16) and found["patches"].dtype == torch.bfloat16
        assert torch.allclose(found["seconds"], torch.arange(24).double() / 12)
        assert [stated["duration_s"], stated["end_s"]] == pytest.approx([2.0, 2.0]) and not stated["image"]
    assert (folder / "rejected.jsonl").read_text() == "" and not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": -1.0}, "--fps -1.0"),
        ({"crop": "random"}, "--crop 'random' is not one of center, none"),
        ({"frames": 0}, "--frames 0"),
        ({"attention": (7,)}, "layer=7 is out of range"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction=2.0"),
        ({"part": (2, 2)}, "part=2/2"),
    ],
)
def test_settings_that_cannot_be(home, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(home, tmp_path / "t", **settings)


# ---- kills, parts, damage


def test_an_interrupted_call_goes_on_and_ends_bitwise_the_same(home, tmp_path, monkeypatch):
    out, made, write = tmp_path / "t", [], recording.write_shard

    def stops(job, *rest):
        if made:
            raise KeyboardInterrupt
        made.append(job.name)
        return write(job, *rest)

    monkeypatch.setattr(recording, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        run(home, out, fps=12.0)
    assert [p.name for p in out.glob("*.tar")] == made and not (out / "index.json").exists()
    (out / ".train-000001.tar.77.tmp").write_bytes(b"half")
    monkeypatch.setattr(recording, "write_shard", lambda job, *rest: made.append(job.name) or write(job, *rest))
    assert run(home, out, fps=12.0).samples == 10 and made == ["train-000000.tar", "train-000001.tar"]
    assert contents(out) == contents(home / "at_12.0")
    damaged = bytearray((out / "train-000001.tar").read_bytes())
    damaged[4000] ^= 1
    (out / "train-000001.tar").write_bytes(bytes(damaged))
    run(home, out, fps=12.0)
    assert made[2:] == ["train-000001.tar"] and contents(out) == contents(home / "at_12.0")
    with pytest.raises(ValueError, match="holds features made otherwise: fps=12.0 there, 6.0 now"):
        run(home, out, fps=6.0)
    (job, _), tower = plan(str(home / "shards")), json.dumps(asdict(tower_config(home)))
    with pytest.raises(ValueError, match="changed: its weights were 00 when recording began"):
        write(job, out, tower, "00", FeatureSettings(size=(17, 17)), ["cpu"], 0.0, {}, print)
    with pytest.raises(ValueError, match="holds features made otherwise: tower.layer=1 there, 0 now"):
        run(home, out, fps=12.0, tower=tower_config(home, layer=0))


def test_parts_make_the_whole(home, tmp_path):
    assert run(home, tmp_path / "t", fps=12.0, part=(0, 2)).outstanding == 1
    assert not (tmp_path / "t" / "index.json").exists()
    assert run(home, tmp_path / "t", fps=12.0, part=(1, 2)).outstanding == 0
    assert contents(tmp_path / "t") == contents(home / "at_12.0")


KILLED = """
import os, sys
from vtok import features
from vtok.vision import TowerConfig
from waiting import never_named

never_named(os.environ.get("LAST", ""))
if __name__ == "__main__":
    tower = TowerConfig(sys.argv[3], dtype="bfloat16", frames_per_call=16)
    features.record_features(
        sys.argv[1], sys.argv[2], tower=tower, fps=12.0, workers=int(sys.argv[4]), progress=False
    )
"""


@pytest.mark.slow
@pytest.mark.long  # the same code as tokenize's
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_anywhere_and_again_equals_uninterrupted(home, tmp_path, workers):
    corpus(tmp_path / "shards", shards=4)
    run(home, tmp_path / "wanted", shards=tmp_path / "shards", fps=12.0)
    out, script = tmp_path / "t", tmp_path / "go.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "shards"), str(out), str(home / "tower"), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    last = max(path.name for path in (tmp_path / "wanted").glob("*.tar"))
    for pattern in (".*.tar.*.tmp", "*.tar"):  # in the middle of a shard, and after the first
        process = subprocess.Popen(command, env=environment | {"LAST": last}, start_new_session=True)
        kill_once(lambda pattern=pattern: list(out.glob(pattern)), process)
    subprocess.run(command, env=environment, check=True, timeout=PATIENCE_S)
    assert contents(out) == contents(tmp_path / "wanted")


def test_broken_videos_are_listed_and_too_many_fail(home, tmp_path):
    shutil.copytree(home / "shards", tmp_path / "s")
    data = movie(40, frames=24)
    members = clip("k9_0", data) + clip("k9_1", data[: len(data) // 2]) + clip("k9_2", b"text")
    members += [("k9_3.mov", data), ("k9_3.json", b"{not json"), ("k9_4.json", b"{}")]
    write_tar(tmp_path / "s" / "z.tar", members)
    write_index(tmp_path / "s", {"train-000000.tar": 5, "train-000001.tar": 5, "z.tar": 5})
    with pytest.raises(ValueError, match="of 15 samples were rejected|Rejected samples so far: .*rejected.jsonl"):
        run(home, tmp_path / "t", shards=tmp_path / "s", fps=12.0)
    done = run(home, tmp_path / "t", shards=tmp_path / "s", fps=12.0, max_bad_fraction=0.3)
    lines = [json.loads(line) for line in (tmp_path / "t" / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k9_1", "k9_2", "k9_3", "k9_4"] and done.samples == 11
    assert contents(tmp_path / "t")["train-000001.tar"] == contents(home / "at_12.0")["train-000001.tar"]


# ---- the command


def test_the_command(home, tmp_path, capsys):
    shards = tmp_path / "packed"
    shutil.copytree(home / "shards", shards / "train")
    corpus(shards / "val", shards=1, first=1)
    arguments = [
        str(shards),
        "--tower",
        str(home / "tower"),
        "--fps",
        "12",
        "--frames-per-call",
        "16",
        "--workers",
        "0",
    ]
    assert recording.main([*arguments, "--out", str(tmp_path / "t"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "15 clips, 204 frames in 3 shards" in printed and "frames/s" in printed
    assert hashed(tmp_path / "t" / "train") == hashed(home / "at_12.0")
    assert (tmp_path / "t" / "val" / "index.json").is_file()
    config = view_of(ClipDataModule(config_of(tmp_path / "t")).config)
    assert config.cached is None, "the view of the configuration itself stays that of pixels"
    for wrong, message in (("--part", "expected I/N"), ("--size", "--size 'x' is not HxW"), ("--attention", "blocks")):
        with pytest.raises(ValueError, match=message):
            recording.main([*arguments, "--out", str(tmp_path / "u"), wrong, "x"])
    with pytest.raises(ValueError, match="--tower-size '3' is not HxW"):
        recording.main([*arguments, "--out", str(tmp_path / "u"), "--tower-size", "3"])
