"""The imports in data/, each on a miniature of the real layout with real video files."""

import csv
import importlib.util
import json
import subprocess
import sys
import tarfile
import zlib
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from waiting import PATIENCE_S

from vtok.data.manifest import read_csv, write_manifest
from vtok.data.shards import pack

DATA = Path(__file__).parent.parent / "data"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llava, webvid, ucf101, kinetics = (script(f"import_{name}") for name in ("llava", "webvid", "ucf101", "kinetics"))


def video(path: Path, *, codec: str = "libx264") -> Path:
    """Four real frames that no other path has; the container follows from the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        rng = np.random.default_rng(zlib.crc32(str(path).encode()))
        for _ in range(4):
            image = rng.integers(0, 256, (32, 32, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def packed(manifest: Path) -> tuple[dict[str, list[dict]], list[dict]]:
    """The samples' json by split after `vtok shards` took the manifest, and what it rejected."""
    out = manifest.parent / "shards"
    rejected = pack([manifest], out, workers=0, progress=False).rejected
    samples = defaultdict(list)
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as archive:
            found = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]  # type: ignore[arg-type]
            samples[path.parent.name] += found
    return samples, rejected


def lines(path: Path | None) -> list[dict]:
    assert path is not None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def talk(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DATA / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


# LLaVA


@pytest.fixture
def conversations(tmp_path) -> Path:
    for name in ("a.mp4", "academic/b.mp4", "ü c.mp4"):
        video(tmp_path / "videos" / name)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (200, 80, 20)).save(tmp_path / "images/x.jpg")
    system = {"from": "system", "value": "S"}
    roles = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    entries = [
        {"id": "0", "video": "a.mp4", "conversations": talk("<video>\nWhat moves?", "A dog. ", "How?", "It runs.")},
        {"id": "1", "video": "academic/b.mp4", "data_source": "x", "conversations": talk("<image>\nSay it.", "So.")},
        {"id": 2, "image": "x.jpg", "conversations": talk("Look at <image> here.", "Yes.")},
        {"id": "3", "video": "gone.mp4", "conversations": talk("<video>\nWhat?", "Gone.")},
        {"id": "4", "conversations": talk("Two plus two?", "Four.")},
        {"id": "5", "image": ["x.jpg", "y.jpg"], "conversations": talk("<image>\n<image>\nWhich?", "The first.")},
        {"id": "6", "video": ["ü c.mp4"], "conversations": [system, *talk("Who?\n<video>", "I")]},
        {"id": "7", "video": "a.mp4", "conversations": talk("<video>\nNo answer?")},
        {"id": "8", "video": "a.mp4", "messages": roles},
    ]
    (tmp_path / "mix.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_llava_json(conversations):
    folders = {"video_folder": conversations / "videos", "image_folder": conversations / "images"}
    out = conversations / "m.jsonl"
    written = llava.import_llava([conversations / "mix.json"], out, **folders, progress=False)
    rows = {row["id"]: row for row in lines(out)}
    assert sorted(rows) == ["0", "1", "2", "6", "8"] and written.num_kept == 5
    assert rows["0"]["path"] == "videos/a.mp4" and rows["1"]["path"] == "videos/academic/b.mp4"
    assert rows["2"]["path"] == "images/x.jpg" and rows["6"]["path"] == "videos/ü c.mp4"
    assert rows["0"]["qa"] == [
        {"id": "0-0", "type": "open", "question": "What moves?", "answer": "A dog."},
        {"id": "0-1", "type": "open", "question": "How?", "answer": "It runs."},
    ]
    assert rows["2"]["qa"][0]["question"] == "Look at here." and rows["6"]["qa"][0]["question"] == "Who?"
    assert rows["8"]["qa"][0]["answer"] == "A" and "caption" not in rows["0"] and "split" not in rows["0"]
    reasons = {row["id"]: row["reason"] for row in lines(written.missing)}
    assert sorted(reasons) == ["3", "4", "5", "7"] and written.num_missing == 4
    assert reasons["3"] == "file not found" and "text only" in reasons["4"] and "several images" in reasons["5"]
    assert "1 turns" in reasons["7"]
    samples, rejected = packed(out)
    every = [sample for split in samples.values() for sample in split]
    assert not rejected and sorted(len(sample["qa"]) for sample in every) == [1, 1, 1, 3], "a.mp4 is one clip"


def test_llava_first_answer_as_caption_and_split(conversations):
    out = conversations / "m.jsonl"
    folder = conversations / "videos"
    llava.import_llava(
        [conversations / "mix.json"], out, video_folder=folder, caption="first", split="val", progress=False
    )
    assert {row["caption"] for row in lines(out)} == {"A dog.", "So.", "I", "A"}
    assert {row["split"] for row in lines(out)} == {"val"}


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        ("all", list(range(9))),
        ("first:2", [0, 1]),
        ("end:2", [7, 8]),
        ("first:10%", [0]),
        ("end:25%", [6, 7, 8]),
        ("first:100", list(range(9))),
        ("end:0", []),
    ],
)
def test_llava_sampling(strategy, kept):
    entries = [{"id": i} for i in range(9)]
    assert [entry["id"] for entry in llava.sample(entries, strategy, seed=0, where="x")] == kept


def test_llava_random_sampling_is_seeded():
    entries = [{"id": i} for i in range(100)]
    half = [[e["id"] for e in llava.sample(entries, "random:50%", seed=seed, where="x")] for seed in (0, 0, 1)]
    assert half[0] == half[1] != half[2] and len(set(half[0])) == 50 and half[0] == sorted(half[0])


def test_llava_yaml_lists_json_with_strategies(conversations):
    rows = [{"id": f"l{i}", "video": "a.mp4", "conversations": talk("<video>\nQ", f"{i}")} for i in range(4)]
    (conversations / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (conversations / "mix.yaml").write_text(
        "datasets:\n"
        f"  - json_path: {conversations / 'mix.json'}\n    sampling_strategy: first:2\n"
        "  - json_path: more.jsonl\n    sampling_strategy: end:25%\n    video_read_type: decord\n"
        "  - json_path: more.jsonl\n"
    )
    entries = list(llava.load_entries(conversations / "mix.yaml"))
    assert [entry["id"] for entry in entries] == ["0", "1", "l3", "l0", "l1", "l2", "l3"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "datasets: []\nx: 1", None),
        ("a.yaml", "jsons: []", "no list `datasets`"),
        ("a.yaml", "datasets: [{path: a.json}]", "no json_path"),
        ("a.json", "{}", "list of objects"),
        ("a.json", "[1,", "is not json"),
        ("a.txt", "x", "expected a .json"),
    ],
)
def test_llava_bad_files(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    if words is None:
        assert list(llava.load_entries(tmp_path / name)) == []
        return
    with pytest.raises(ValueError, match=words):
        list(llava.load_entries(tmp_path / name))


@pytest.mark.parametrize("strategy", ["half", "first", "first:", "random:0.5", "first:-1", "last:3"])
def test_llava_unknown_strategy(strategy):
    with pytest.raises(ValueError, match="use all, first:N, end:N or random:N"):
        llava.sample([{}], strategy, seed=0, where="mix.yaml")


# WebVid


def webvid_table(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["videoid", "contentUrl", "duration", "page_dir", "name"], *rows])
    return path


def test_webvid(tmp_path):
    video(tmp_path / "videos/000001_000050/1066674784.mp4")
    video(tmp_path / "videos/1017.mp4")
    rows = [
        ["1066674784", "https://x/1.mp4", "PT00H00M10S", "000001_000050", 'A cat, "asleep".\nTwo lines'],
        ["1017", "https://x/2.mp4", "PT00H00M20S", "000051_000100", " Sea "],
        ["5", "https://x/3.mp4", "PT00H00M20S", "000051_000100", "Not downloaded"],
    ]
    table, out = webvid_table(tmp_path / "results.csv", rows), tmp_path / "m.jsonl"
    written = webvid.import_webvid(table, out, videos=tmp_path / "videos", split="train", progress=False)
    first, second = lines(out)
    assert first == {
        "path": "videos/000001_000050/1066674784.mp4",
        "source": "1066674784",
        "caption": 'A cat, "asleep".\nTwo lines',
        "split": "train",
    }
    assert second["path"] == "videos/1017.mp4" and second["caption"] == "Sea"
    (gone,) = lines(written.missing)
    assert gone["source"] == "5" and gone["reason"] == "file not found"
    assert gone["path"].endswith("000051_000100/5.mp4")
    samples, rejected = packed(out)
    assert not rejected and sorted(sample["caption"] for sample in samples["train"]) == [first["caption"], "Sea"]


# UCF101


@pytest.fixture
def ucf(tmp_path) -> Path:
    root, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    names = [f"ApplyEyeMakeup/v_ApplyEyeMakeup_g{g:02d}_c{c:02d}.avi" for g in (1, 8) for c in (1, 2)]
    names += ["HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g08_c01.avi"]
    for name in names:
        video(root / name, codec="mpeg4")
    train = [name for name in names if "_g08" in name] + ["ApplyEyeMakeup/v_ApplyEyeMakeup_g09_c01.avi"]
    (lists / "trainlist01.txt").write_text("".join(f"{name} {1 + ('Hand' in name)}\r\n" for name in train))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names if "_g01" in name))
    (lists / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 HandstandPushups\n")
    return tmp_path


def test_ucf101(ucf):
    out = ucf / "m.jsonl"
    written = ucf101.import_ucf101(ucf / "UCF-101", out, lists=ucf / "ucfTrainTestlist", progress=False)
    rows = lines(out)
    assert {(row["label"], row["source"], row["split"]) for row in rows} == {
        ("ApplyEyeMakeup", "ApplyEyeMakeup_g08", "train"),
        ("HandstandPushups", "HandstandPushups_g08", "train"),
        ("ApplyEyeMakeup", "ApplyEyeMakeup_g01", "val"),
        ("HandstandPushups", "HandstandPushups_g01", "val"),
    }
    assert len(rows) == 6 and len({row["source"] for row in rows}) == 4, "a group is one source"
    assert [row["reason"] for row in lines(written.missing)] == ["file not found"]
    samples, rejected = packed(out)
    assert not rejected and len(samples["train"]) == 3 and len(samples["val"]) == 3


def test_ucf101_groups_do_not_straddle_a_split_by_hash(ucf):
    ucf101.import_ucf101(ucf / "UCF-101", ucf / "m.jsonl", progress=False)
    samples, rejected = packed(ucf / "m.jsonl")
    sides = defaultdict(set)
    for split, found in samples.items():
        for sample in found:
            sides[sample["source"]].add(split)
    assert not rejected and len(sides) == 4 and all(len(split) == 1 for split in sides.values())


def test_ucf101_lists_what_it_cannot_place(ucf):
    extra = video(ucf / "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.avi", codec="mpeg4")
    odd = video(ucf / "UCF-101/ApplyEyeMakeup/makeup.avi", codec="mpeg4")
    lists = ucf / "ucfTrainTestlist"
    written = ucf101.import_ucf101(ucf / "UCF-101", ucf / "m.jsonl", lists=lists, progress=False)
    reasons = {Path(row["path"]).name: row["reason"] for row in lines(written.missing)}
    assert reasons[extra.name] == "in no list of fold 1" and "group is not known" in reasons[odd.name]
    written = ucf101.import_ucf101(ucf / "UCF-101", ucf / "m.jsonl", progress=False)
    assert written.num_kept == 7 and all("split" not in row for row in lines(ucf / "m.jsonl"))


def test_ucf101_test_list_can_stay_test_and_must_not_overlap(ucf):
    lists = ucf / "ucfTrainTestlist"
    rows = ucf101.ucf101_rows(ucf / "UCF-101", lists=lists, test_as="test")
    assert {row["split"] for row in rows} == {"train", "test"}
    (lists / "testlist01.txt").write_text((lists / "trainlist01.txt").read_text())
    with pytest.raises(ValueError, match="is in both lists of fold 1"):
        list(ucf101.ucf101_rows(ucf / "UCF-101", lists=lists))
    (lists / "testlist01.txt").write_text("v_ApplyEyeMakeup_g01_c01.avi\n")
    with pytest.raises(ValueError, match="testlist01.txt:1"):
        list(ucf101.ucf101_rows(ucf / "UCF-101", lists=lists))


# Kinetics


def kinetics_table(
    path: Path, rows: list[tuple], *, header: str = "label,youtube_id,time_start,time_end,split"
) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def test_kinetics(tmp_path):
    root = tmp_path / "k"
    video(root / "train/air drumming/-_4dbcJuKJQ_000040_000050.mp4")
    video(root / "train/abseiling/abc_000001_000011.mp4")
    video(root / "val/air_drumming/def_000002_000012.mkv")
    video(root / "val/long/ghi.mp4")
    train = kinetics_table(
        tmp_path / "train.csv",
        [
            ("air drumming", "-_4dbcJuKJQ", 40, 50, "train", 0),
            ("abseiling", "abc", 1, 11, "train", 0),
            ("abseiling", "zzz", 1, 11, "train", 0),
        ],
        header="label,youtube_id,time_start,time_end,split,is_cc",
    )
    val = kinetics_table(
        tmp_path / "val.csv", [("air drumming", "def", 2, 12, "validate"), ("long jump", "ghi", 3, 13, "validate")]
    )
    out = tmp_path / "m.jsonl"
    written = kinetics.import_kinetics(root, [train, val], out, progress=False)
    rows = {row["source"]: row for row in lines(out)}
    assert rows["-_4dbcJuKJQ"] == {
        "path": "k/train/air drumming/-_4dbcJuKJQ_000040_000050.mp4",
        "label": "air drumming",
        "split": "train",
        "source": "-_4dbcJuKJQ",
    }
    assert rows["def"]["path"] == "k/val/air_drumming/def_000002_000012.mkv" and rows["def"]["split"] == "val"
    assert (rows["ghi"]["start_s"], rows["ghi"]["end_s"]) == (3, 13), "an untrimmed download is cut by the annotation"
    (gone,) = lines(written.missing)
    assert gone["path"].endswith("k/train/abseiling/zzz_000001_000011.mp4")


def test_kinetics_copies_of_one_clip_and_test_csv(tmp_path):
    for folder in ("train/singing", "test/x"):
        video(tmp_path / "k" / folder / "abc_000001_000011.mp4")
    table = kinetics_table(tmp_path / "t.csv", [("abc", 1, 11, "test")], header="youtube_id,time_start,time_end,split")
    kinetics.import_kinetics(tmp_path / "k", [table], tmp_path / "m.jsonl", progress=False)
    expected = {"path": "k/test/x/abc_000001_000011.mp4", "split": "test", "source": "abc"}
    assert lines(tmp_path / "m.jsonl") == [expected]


def test_kinetics_without_csv_reads_folders(tmp_path):
    video(tmp_path / "k/train/air_drumming/a_b_000001_000011.mp4")
    video(tmp_path / "k/val/singing/c.mp4")
    kinetics.import_kinetics(tmp_path / "k", [], tmp_path / "m.jsonl", progress=False)
    got = {(row["source"], row["label"], row["split"]) for row in lines(tmp_path / "m.jsonl")}
    assert got == {("a_b", "air drumming", "train"), ("c", "singing", "val")}


def test_kinetics_unknown_split(tmp_path):
    table = kinetics_table(tmp_path / "t.csv", [("x", "abc", 1, 11, "holdout")])
    with pytest.raises(ValueError, match="split='holdout'"):
        kinetics.import_kinetics(tmp_path, [table], tmp_path / "m.jsonl", progress=False)
    assert not list(tmp_path.glob("*m.jsonl*")), "a failed import leaves nothing behind"


# what they share


def test_manifest_paths_and_stale_lists(tmp_path):
    inside, outside = video(tmp_path / "in/a.mp4"), video(tmp_path / "b.mp4")
    rows = [{"path": inside}, {"path": outside}, {"path": tmp_path / "in"}, {"path": "no\0name"}, {"path": "c.mp4"}]
    out = tmp_path / "in/m.jsonl"
    written = write_manifest(rows, out, progress=False)
    assert [row["path"] for row in lines(out)] == ["a.mp4", str(outside)]
    reasons = [row["reason"] for row in lines(written.missing)]
    assert reasons == ["is a folder, not a video file", "file not found", "file not found"]
    again = write_manifest(rows[:2], out, progress=False)
    assert again.missing is None and sorted(p.name for p in out.parent.iterdir()) == ["a.mp4", "m.jsonl"]


def test_csv_errors_name_the_file(tmp_path):
    (tmp_path / "t.csv").write_text("id,name\n1,x\n")
    with pytest.raises(ValueError, match="has no column videoid, page_dir; its header is"):
        list(read_csv(tmp_path / "t.csv", columns=("videoid", "page_dir", "name")))
    (tmp_path / "t.csv").write_text("id,name\n1,x\n2\n")
    with pytest.raises(ValueError, match="t.csv:3 does not have the 2 cells"):
        list(read_csv(tmp_path / "t.csv", columns=("id",)))


@pytest.mark.slow
def test_scripts_report_and_exit(tmp_path, ucf):
    table = webvid_table(tmp_path / "w.csv", [["1", "u", "d", "p", "n"], ["2", "u", "d", "p", "n"]])
    out = tmp_path / "w.jsonl"
    done = run("import_webvid", table, "--videos", tmp_path, "--out", out)
    assert done.returncode == 1 and "2 rows left out" in done.stdout and str(out) + ".missing.jsonl" in done.stdout
    done = run("import_ucf101", ucf / "UCF-101", "--lists", ucf / "ucfTrainTestlist", "--out", tmp_path / "u.jsonl")
    assert done.returncode == 0 and "6 rows in" in done.stdout and "1 rows left out" in done.stdout
    done = run("import_kinetics", tmp_path / "none", tmp_path / "none.csv", "--out", tmp_path / "k.jsonl")
    assert done.returncode == 2 and "none.csv" in done.stderr and "Traceback" not in done.stderr
    done = run("import_llava", table, "--video-folder", tmp_path, "--out", tmp_path / "l.jsonl")
    assert done.returncode == 2 and "expected a .json" in done.stderr
