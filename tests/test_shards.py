"""A packing as a whole: parts, kills and resumes end equal to an unbroken run; `--verify` names what is wrong."""

import os
import random
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packing import (
    hashes,
    moving,
    packed,
    raw,
    video,
    video_with_audio,
    write_manifest,
)
from waiting import PATHS, PATIENCE_S, kill_once

from vtok.data.pack import PackingError, Settings
from vtok.data.shards import main, pack
from vtok.data.sources import ShardReader, open_sources
from vtok.data.verify import verify


def test_parts_together_equal_a_single_run(tmp_path):
    for number in range(9):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    raw(tmp_path / "in" / "bad.mp4", b"x" * 99)
    options = Settings(val_fraction=0.3, shard_samples=2, short_side=16)
    pack([tmp_path / "in"], tmp_path / "one", settings=options, workers=0, progress=False)
    for index in (1, 0):
        assert not (tmp_path / "two" / "train" / "index.json").exists()
        summary = pack(
            [tmp_path / "in"], tmp_path / "two", settings=options, workers=0, part=(index, 2), progress=False
        )
        assert (summary.outstanding > 0) == (index == 1)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_other_settings_or_inputs_are_refused(tmp_path):
    path = video(tmp_path / "in" / "a.mp4")
    packed([tmp_path / "in"], tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(ValueError, match=r"short_side=None there, 16 now"):
        packed([tmp_path / "in"], tmp_path / "out", short_side=16)
    video(path, frames=moving(seed=5))
    with pytest.raises(ValueError, match=r"the inputs differ"):
        packed([tmp_path / "in"], tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    raw(tmp_path / "other" / "x.tar", b"")
    with pytest.raises(ValueError, match=r"not of this packing \(x.tar\)"):
        packed([tmp_path / "in"], tmp_path / "other")


def test_finished_shards_are_kept_and_lost_ones_made_again(tmp_path):
    for number in range(6):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    before, tars = hashes(tmp_path / "out"), sorted((tmp_path / "out/train").glob("*.tar"))
    kept = tars[0].stat().st_ino
    tars[1].write_bytes(tars[1].read_bytes()[:700])
    tars[2].unlink()
    raw(tmp_path / "out/train/.train-000001.tar.999.tmp", b"half")
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    assert hashes(tmp_path / "out") == before and tars[0].stat().st_ino == kept


def test_verify_names_what_is_wrong(tmp_path, capsys):
    for number in range(4):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(4, seed=number))
    packed([tmp_path / "in"], tmp_path / "out", shard_samples=2)
    assert main(["--verify", str(tmp_path / "out"), "--workers", "0", "--quiet"]) == 0
    tar = tmp_path / "out/train/train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"mdat") + 60] ^= 0xFF
    tar.write_bytes(data)
    raw(tmp_path / "out/train/stray.tar", b"")
    (tmp_path / "out/train/train-000001.tar").unlink()
    assert main(["--verify", str(tmp_path / "out"), "--workers", "0", "--quiet"]) == 1
    said = capsys.readouterr().out
    for what in (
        "train-000000.tar: its sha256 differs",
        "stray.tar: not in",
        "train-000001.tar: cannot read",
        "3 problem",
    ):
        assert what in said or what == "3 problem", said
    with pytest.raises(ValueError, match="no index.json"):
        verify(tmp_path / "in")


def test_command_line_errors(tmp_path, capsys):
    path = str(video(tmp_path / "a.mp4"))
    out = ["--out", str(tmp_path / "out"), "--quiet", "--workers", "0"]
    for arguments, said in (
        ([path], "--out DIR is missing"),
        (out, "no inputs"),
        ([path, *out, "--part", "2/2"], "--part 2/2: expected I/N"),
        ([path, *out, "--short-side", "15"], "short_side=15 must be even"),
        ([path, *out, "--stride-seconds", "1"], "needs clip_seconds"),
        ([path, *out, "--val-fraction", "2"], "val_fraction=2.0 must lie in"),
        ([str(tmp_path / "gone"), *out], "does not exist"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    raw(tmp_path / "b.mp4", b"no video at all")
    assert main([str(tmp_path / "b.mp4"), *out]) == 1
    assert "rejected 1" in capsys.readouterr().out


def test_one_process_per_part(tmp_path):
    path = video(tmp_path / "a.mp4")
    packed([path], tmp_path / "out")
    script = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 1);"
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out/packing.json")], stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(PackingError, match="another process is packing part 0/1"):
            packed([path], tmp_path / "out")
    finally:
        holder.kill()
        holder.wait()
    packed([path], tmp_path / "out")


KILLED = """
import os, sys
from vtok.data.shards import main
from waiting import never_named

never_named(os.environ["LAST"])
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def _launch(folder: Path, out: Path, *, last: str = "") -> subprocess.Popen:
    """Begins a packing; the shard `last` is never done."""
    script = out.parent / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(folder), "--out", str(out), "--workers", "2", "--quiet"]
    options = ["--clip-seconds", "1", "--short-side", "64", "--shard-samples", "3", "--val-fraction", "0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "LAST": last}
    return subprocess.Popen(command + options, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_packing_ends_equal_to_an_unbroken_one(tmp_path):
    for number in range(8):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(60, height=192, width=256, seed=number), crf=12)
    raw(tmp_path / "in" / "bad.mp4", b"no video")
    options = {"clip_seconds": 1.0, "short_side": 64, "shard_samples": 3, "val_fraction": 0.3}
    packed([tmp_path / "in"], tmp_path / "whole", **options)
    draw, kills = random.Random(), 0
    names = sorted(tar.name for tar in (tmp_path / "whole").glob("*/*.tar"))

    def done() -> int:
        return len(list((tmp_path / "killed").glob("*/*.tar")))

    for attempt in range(4):
        if done() == len(names) - 1 and kills >= 2:
            break
        wanted = min(done() + 1 + attempt % 2, len(names) - 1)
        process = _launch(tmp_path / "in", tmp_path / "killed", last=names[-1])
        # Some progress, then a random moment. Every other time only the parent: its workers must notice and end by
        # themselves, once they have finished the clip at hand; a new start should not meet them.
        late_s, all_of_it = draw.uniform(0, 0.3), bool(attempt % 2)
        kill_once(lambda wanted=wanted: done() >= wanted, process, late_s=late_s, all_of_it=all_of_it)
        kills += 1
        for tar in (tmp_path / "killed").glob("*/*.tar"):
            with tarfile.open(tar) as archive:
                assert len(archive.getmembers()) % 2 == 0
    assert kills >= 2
    assert _launch(tmp_path / "in", tmp_path / "killed").wait(timeout=PATIENCE_S) == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert verify(tmp_path / "killed", progress=False) == []


@pytest.mark.slow
def test_a_clip_that_kills_its_worker_is_given_up_alone(tmp_path):
    from vtok.data.workers import WorkerError, Workers

    with Workers(2, progress=False) as pool:
        tasks = [(list("dxe"),), (list("abc"),), (list("fg"),)]
        ((first, reason, last), *others) = pool.run(_deadly, tasks, title="", total=8)
        assert (
            others == [["a", "b", "c"], ["f", "g"]]
            and (first, last) == ("d", "e")
            and reason == "the process that decoded it was killed by SIGSEGV, 2 times"
        )
        with pytest.raises(WorkerError, match="ValueError: no"):
            pool.run(_failing, [(1,)], title="", total=1)


def _deadly(places, lost, notify):
    out = []
    for place in places:
        notify(place)
        if place == "x" and place not in lost:
            os.kill(os.getpid(), signal.SIGSEGV)
        out.append(lost.get(place, place))
    return out


def _failing(value, lost, notify):
    raise ValueError("no")


def test_webdataset_reads_the_same_samples(tmp_path):
    """Shards are plain WebDataset: its own reader finds the very keys, members and bytes that our loader does."""
    webdataset = pytest.importorskip("webdataset")
    for number, name in enumerate(("a.b.mp4", "sub/über x.mp4", "c.mkv")):
        video(tmp_path / "in" / name, frames=moving(seed=number))
    video_with_audio(tmp_path / "in" / "tone.mp4")
    packed([tmp_path / "in"], tmp_path / "out", audio=True, shard_samples=3, split="train")
    tars = sorted(map(str, (tmp_path / "out/train").glob("*.tar")))
    assert len(tars) == 2
    theirs = {s.pop("__key__"): s for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}
    reader = ShardReader(open_sources(str(tmp_path / "out/train"))[0])
    ours = [sample for shard in range(2) for sample in reader.samples(shard)]
    assert [sample.key for sample in ours] == list(theirs) and len(ours) == 4
    for sample in ours:
        found = {name: data for name, data in theirs[sample.key].items() if not name.startswith("__")}
        assert found == {name: reader.read(sample, name) for name in sample.members}
    assert sum("wav" in sample for sample in theirs.values()) == 1


@pytest.mark.slow
def test_columns_that_are_not_read_are_named_once_and_libraries_keep_quiet(tmp_path):
    video(tmp_path / "a.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"file": "a.mp4", "licence": "x", "hash": n} for n in (1, 2)])
    command = "import logging, sys\nfrom vtok.cli import main\nstatus = main(sys.argv[1:])\n"
    command += "logging.getLogger('httpx').info('HTTP request')\nsys.exit(status)"
    arguments = ["shards", str(manifest), "--out", str(tmp_path / "out"), "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0 and done.stderr.count("manifest columns not read: hash, licence") == 1
    assert "HTTP" not in done.stderr
