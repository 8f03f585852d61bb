"""Texts into shards and out of them: names, cuts, splits by source, resuming, and what the loader makes of them."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from vtok.config import DataConfig
from vtok.data.module import ClipDataModule
from vtok.data.shards import main as shards
from vtok.data.text_shards import TextSettings, cut, pack_texts, read_texts
from vtok.data.verify import verify
from vtok.data.view import View

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from demo_texts import story, write_stories


def manifest(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "notes" / "deep").mkdir(parents=True)
    (root / "notes" / "one.txt").write_text(" a first note\n")
    (root / "notes" / "deep" / "two.txt").write_text("\ufeffzweite Notiz, größer")
    (root / "notes" / "empty.txt").write_text(" \n")
    (root / "notes" / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "notes" / "film.mp4").write_bytes(b"no text")
    write_stories(root / "stories.jsonl", stories=60, val_fraction=0.2)
    return root


def samples(folder: Path) -> dict[str, tuple[str, dict]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.rpartition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return {key: (own["txt"].decode(), json.loads(own["json"])) for key, own in found.items()}


def test_folders_and_manifests_become_shards(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    assert shards(["--texts", str(corpus / "notes"), str(corpus / "stories.jsonl"), "--out", str(out),
                   "--shard-samples", "16", "--quiet"]) == 0  # fmt: skip
    assert "rejected 1: no text" in capsys.readouterr().out
    held = samples(out)
    assert held["notes-one"][0] == "a first note" and held["notes-deep-two"][0] == "zweite Notiz, größer"
    rows = [json.loads(line) for line in (corpus / "stories.jsonl").read_text().splitlines()]
    assert len(held) == 62
    for row in rows:
        text, facts = held[row["key"]]
        assert text == row["text"] and facts["source"] == row["key"]
        assert [(q["question"], q["answer"], q["choices"]) for q in facts["qa"]] == [
            (q["question"], q["answer"], q["choices"]) for q in row["qa"]
        ]
    split = json.loads((out / "split.json").read_text())
    assert {row["key"] for row in rows if row["split"] == "val"} <= set(split["val"])
    rejected = {json.loads(line)["source"] for line in (out / "rejected.jsonl").read_text().splitlines()}
    assert rejected == {"notes/empty.txt", "notes/bytes.txt"}
    assert verify(out, progress=False) == []


def test_a_killed_packing_goes_on_and_gives_the_same_bytes(corpus, tmp_path):
    settings = TextSettings(shard_samples=16)
    first, whole = (tmp_path / name for name in ("killed", "whole"))
    pack_texts([corpus / "stories.jsonl"], whole, settings=settings, progress=False)
    for part in range(2):
        done = pack_texts([corpus / "stories.jsonl"], first, settings=settings, part=(part, 2), progress=False)
        assert bool(done.outstanding) == (part == 0)
    tars = sorted(p.relative_to(whole) for p in whole.glob("*/*.tar"))
    assert len(tars) > 3
    (first / tars[0]).unlink()
    (first / tars[1]).write_bytes((first / tars[1]).read_bytes()[:700])
    (first / "train" / ".train-000009.tar.1.tmp").write_bytes(b"half")
    kept = (first / tars[2]).stat().st_mtime_ns
    pack_texts([corpus / "stories.jsonl"], first, settings=settings, progress=False)
    for tar in tars:
        assert (first / tar).read_bytes() == (whole / tar).read_bytes()
    assert (first / tars[2]).stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="words=0 there, 5 now"):
        pack_texts([corpus / "stories.jsonl"], first, settings=TextSettings(shard_samples=16, words=5), progress=False)
    with pytest.raises(ValueError, match="the inputs differ"):
        pack_texts([corpus / "notes"], first, settings=settings, progress=False)


@pytest.mark.slow
def test_processes_write_what_one_writes(corpus, tmp_path):
    settings = TextSettings(shard_samples=16)
    for workers in (0, 2):
        out = tmp_path / str(workers)
        pack_texts([corpus / "stories.jsonl"], out, settings=settings, workers=workers, progress=False)
    one, two = ([p.read_bytes() for p in sorted((tmp_path / name).glob("*/*.tar"))] for name in "02")
    assert one == two and len(one) > 3


def test_texts_of_one_source_and_equal_texts_stay_together(tmp_path):
    rows = [{"key": f"k{i}", "text": f"text {i}", "source": f"book {i % 7}"} for i in range(70)]
    rows += [{"key": f"twin{i}", "text": f"text {i}"} for i in range(7)]
    rows += [{"key": "odd", "text": "text 1", "split": "train"}, {"key": "even", "text": "text 1", "split": "val"}]
    out = tmp_path / "out"
    pack_texts([manifest(tmp_path / "m.jsonl", rows)], out, settings=TextSettings(val_fraction=0.4), progress=False)
    held, side = samples(out), {}
    for split in ("train", "val"):
        for path in (out / split).glob("*.tar"):
            with tarfile.open(path) as tar:
                side |= {name.rpartition(".")[0]: split for name in tar.getnames()}
    assert {"train", "val"} == set(side.values())
    for i in range(7):
        assert len({side[f"k{k}"] for k in range(i, 70, 7)} | {side[f"twin{i}"]}) == 1
    assert "odd" not in held and side["even"] == side["k1"] == "val"
    (reject,) = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert reject["source"] == "odd" and "the same video or content" in reject["reason"]


def test_long_texts_are_cut_at_spaces(tmp_path):
    text = "one two  three\nfour five six seven"
    assert cut(text, 0) == [text]
    assert cut(text, 3) == ["one two", "three\nfour", "five six seven"]
    assert cut(text, 100) == [text]
    row = {"key": "a", "text": text, "qa": [{"question": "which?", "answer": "two"}]}
    pack_texts([manifest(tmp_path / "m.jsonl", [row])], tmp_path / "o", settings=TextSettings(words=4), progress=False)
    held = samples(tmp_path / "o")
    assert {key: text for key, (text, _) in held.items()} == {
        "a__0000": "one two  three",
        "a__0001": "four five six seven",
    }
    assert all(facts["qa"] == [] and facts["source"] == "a" for _, facts in held.values())


def test_rows_that_cannot_be_used_are_listed(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"caption": "used"}, {"text": ""}, {"text": 3}, {"text": "x", "split": "dawn"}, ["x"]]
    rows += [{"text": "y", "qa": 1}, {"text": "z", "key": "m-000001"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    texts, rejected = read_texts([path])
    assert [text.text for text in texts] == ["used"] and texts[0].name == "m-000001"
    reasons = [reject.reason for reject in rejected]
    for part in ("no text or caption", "split='dawn' is unknown", "holds a list", "qa must be a list", "came before"):
        assert any(part in reason for reason in reasons), part
    assert len(rejected) == 7
    for inputs, message in (
        ([], "nothing to pack"),
        ([tmp_path / "x"], "does not exist"),
        ([__file__], "come as .txt"),
    ):
        with pytest.raises(ValueError, match=message):
            read_texts(inputs)
    assert shards(["--texts", str(path), "--out", str(tmp_path / "out"), "--words", "-1"]) == 2


def test_the_loader_reads_texts(corpus, tmp_path):
    out = tmp_path / "out"
    pack_texts([corpus / "stories.jsonl"], out, progress=False)
    data = dict(shards=str(out / "train"), val_shards=str(out / "val"), texts=True, batch_size=5, num_workers=0)
    module = ClipDataModule(DataConfig(**data))
    told = {row["key"]: row for row in map(json.loads, (corpus / "stories.jsonl").read_text().splitlines())}
    seen = [(key, text, qa) for clip in module.val_dataloader() for key, text, qa in zip(clip.keys, clip.text, clip.qa)]
    assert len(seen) == sum(row["split"] == "val" for row in told.values()) > 5
    for key, text, qa in seen:
        assert told[key]["text"] == text and [q["answer"] for q in qa] == [q["answer"] for q in told[key]["qa"]]
    batches = iter(module.train_dataloader())
    clip = next(batches)
    assert clip.video is None and clip.times is None and len(clip) == 5
    assert [told[key.partition(":")[2]]["text"] for key in clip.keys] == clip.text
    module.advance(clip)
    again = ClipDataModule(DataConfig(**data))
    again.load_state_dict(module.state_dict())
    assert next(iter(again.train_dataloader())).keys == next(batches).keys
    with pytest.raises(ValueError, match="data.texts=true and data.map='npy'"):
        View(texts=True, map="npy")
    with pytest.raises(ValueError, match="no usable clip"):  # videos are asked for
        ClipDataModule(DataConfig(**{**data, "texts": False})).val_dataloader()


def test_a_story_can_be_answered_from_its_text():
    for number in range(40):
        row = story(3, number)
        assert row == story(3, number) != story(4, number)
        for question in row["qa"]:
            assert question["answer"] in question["choices"] and len(set(question["choices"])) == 4
            thing = question["question"].rpartition(" the ")[2].rstrip("?")
            (sentence,) = [part for part in row["text"].split(".") if f"the {thing} " in f"{part} "]
            assert question["answer"] in sentence.split() or f" {question['answer']}" in sentence
            assert sum(choice in sentence.split() for choice in question["choices"]) == 1


def test_captions_of_videos_are_texts_without_their_seconds(tmp_path, caplog):
    """A manifest of videos packs as texts; a row of `text` with seconds is somebody's mistake."""
    asked = {"question": "What?", "answer": "ring"}
    timed = {**asked, "start_s": 0.0, "end_s": 1.5}
    path = tmp_path / "captions.jsonl"
    rows = [{"file": "a.mp4", "caption": "A ring.", "qa": [timed, asked]}, {"text": "A star.", "qa": [timed]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO", logger="vtok"):
        texts, rejected = read_texts([path])
    assert [text.text for text in texts] == ["A ring."] and len(texts[0].qa) == 2
    assert not any("start_s" in question or "end_s" in question for question in texts[0].qa)
    assert "a text has no seconds" in rejected[0].reason and len(rejected) == 1
    assert "captions.jsonl: 1 questions have seconds of a video" in caplog.text


def test_a_packing_killed_at_its_index_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").write_text("A ring.")
    out = tmp_path / "out"
    left = out / "train" / ".index.json.1234.tmp"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    assert shards(["--texts", str(tmp_path / "a.txt"), "--out", str(out), "--split", "train", "--quiet"]) == 0
    assert (out / "train" / "index.json").is_file() and not left.exists()
