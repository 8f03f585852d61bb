"""Rows of a manifest become clips, or are rejected with their line; clips of one video stay on one side."""

import json
import re

import pytest
from packing import (
    image,
    meta,
    moving,
    packed,
    rejected,
    samples,
    video,
    write_manifest,
)

from vtok.data.inputs import collect


def test_manifest_rows_and_folder_are_one(tmp_path):
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4")):
        video(tmp_path / "clips" / name, frames=moving(20, seed=number))
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"file": "clips/a.mp4", "caption": "uno", "label": "x", "split": "val", "unknown": 1},
            {
                "file": "clips/a.mp4",
                "caption": "due",
                "qa": [{"question": "q?", "answer": "yes", "choices": ["Yes.", "no"]}],
            },
            {
                "path": str(tmp_path / "clips/b.mp4"),
                "captions": [{"start_s": 0.5, "end_s": 1.5, "text": "mid"}],
                "start_s": 1.0,
            },
        ],
    )
    packed([manifest, tmp_path / "clips"], tmp_path / "out")
    val, train = samples(tmp_path / "out", "val"), samples(tmp_path / "out", "train")
    assert set(val) == {"clips-a"} and set(train) == {"clips-b__0000", "clips-c"}
    whole = meta(val["clips-a"])
    assert whole["caption"] == "uno" and whole["label"] == "x"
    assert whole["captions"] == [{"start_s": 0.0, "end_s": 2.0, "text": text} for text in ("uno", "due")]
    assert whole["qa"] == [{"id": "0", "type": "choice", "question": "q?", "answer": "yes", "choices": ["Yes.", "no"]}]
    part = meta(train["clips-b__0000"])
    assert part["captions"] == [{"start_s": 0.0, "end_s": 0.5, "text": "mid"}] and part["start_s"] == 1.0
    assert json.loads((tmp_path / "out/split.json").read_text())["val"] == ["clips/a.mp4"]


def test_a_cut_video_keeps_with_each_clip_what_is_on_show_in_it(tmp_path):
    video(tmp_path / "long.mp4", frames=moving(60))  # 6 s
    seen = {
        "early": (0.0, 1.0),
        "needle": (1.9, 2.0),
        "over the cut": (1.5, 3.0),
        "late": (4.5, 6.0),
        "open": (5, None),
    }
    qa = [
        {"id": name, "question": f"{name}?", "answer": "yes", "start_s": first} | ({"end_s": last} if last else {})
        for name, (first, last) in seen.items()
    ]
    captions = [{"start_s": a, "end_s": b, "text": f"{a}"} for a, b in ((0, 1.9), (1.9, 4), (4, 6))]
    row = {"file": "long.mp4", "qa": [*qa, {"id": "any", "question": "?", "answer": 1}], "captions": captions}
    manifest = write_manifest(tmp_path / "m.jsonl", [row, {"file": "long.mp4", "end_s": 1.0, "qa": qa[:-1]}])
    packed([manifest], tmp_path / "out", clip_seconds=2, split="train")
    clips = sorted(
        map(meta, samples(tmp_path / "out", "train").values()), key=lambda c: (c["start_s"], c["duration_s"])
    )
    asked = [[question["id"] for question in clip["qa"]] for clip in clips]
    assert asked == [["early"], ["early", "needle", "any"], ["any"], ["late", "open", "any"]]
    assert [(q["start_s"], q["end_s"]) for q in clips[1]["qa"][:2]] == [(0.0, 1.0), (1.9, 2.0)]
    assert [(q["start_s"], q["end_s"]) for q in clips[3]["qa"][:2]] == [(0.5, 2.0), (1.0, 2.0)]
    assert "start_s" not in clips[3]["qa"][2]
    assert [clip["caption"] for clip in clips[1:]] == ["0", "1.9", "4"]  # not the first of the video for all of them


ROWS = {
    '{"file": "a.mp4", ': r"line 1 is not JSON",
    "[1, 2]": r"line 1 is not a JSON object but list",
    "[" * 100000: r"line 1 is not JSON",
    '{"file": "gone.mp4"}': r"the file is missing: 'gone.mp4'",
    '{"caption": "no file"}': r"no path or file",
    '{"file": 3}': r"no path or file or video: int '3'",
    '{"file": "a\\u0000.mp4"}': r"NUL",
    '{"file": "a.mp4", "start_s": 0.8, "end_s": 0.2}': r"start_s=0.8 is not before end_s=0.2",
    '{"file": "a.mp4", "start_s": 5}': r"start_s=5 lies beyond the end \(1.000 s\)",
    '{"file": "a.mp4", "start_s": 0.5, "end_s": 9}': r"end_s=9 lies beyond the end",
    '{"file": "a.mp4", "start_s": -1}': r"start_s=-1 is negative",
    '{"file": "a.mp4", "start_s": NaN}': r"start_s='nan' is not a finite number",
    '{"file": "a.mp4", "end_s": "soon"}': r"end_s='soon' is not a finite number",
    '{"file": "a.mp4", "caption": ["x"]}': r"caption must be a string, got list",
    '{"file": "a.mp4", "captions": [{"start_s": 0}]}': r"captions must hold",
    '{"file": "a.mp4", "qa": {"question": "?"}}': r"qa must be a list",
    '{"file": "a.mp4", "qa": [{"question": "?"}]}': r"qa must hold",
    '{"file": "a.mp4", "qa": [{"question": "?", "answer": "B", "choices": ["red", "blue"]}]}': r"'B' of '\?' is none "
    r"of its choices \['red', 'blue'\]: give the text",
    '{"file": "a.mp4", "qa": [{"question": "?", "answer": 1, "start_s": 3, "end_s": 2}]}': r"qa: start_s=3 is not",
    '{"file": "a.mp4", "split": "everything"}': r"split='everything' is unknown",
    '{"file": "a.mp4", "label": [1]}': r"label must be",
    '{"file": "p.png", "end_s": 1}': r"an image has no start_s",
}


@pytest.mark.parametrize("line", ROWS, ids=range(len(ROWS)))
def test_bad_rows_are_rejected_with_their_line(tmp_path, line):
    video(tmp_path / "a.mp4")
    video(tmp_path / "b.mp4", frames=moving(seed=9))
    image(tmp_path / "p.png", "png")
    manifest = write_manifest(tmp_path / "m.jsonl", [line, '{"file": "b.mp4"}'])
    packed([manifest], tmp_path / "out")
    (reject,) = rejected(tmp_path / "out")
    assert reject["where"] == "m.jsonl:1"
    assert re.search(ROWS[line], reject["reason"]), reject
    assert set(samples(tmp_path / "out")) == {"b"}


def test_csv_manifest(tmp_path):
    video(tmp_path / "a.mp4"), video(tmp_path / "ü.mp4", frames=moving(seed=3))
    text = (
        'path,caption,label,qa,split,start_s\na.mp4,"one, two",3,"[{""question"": ""q"", ""answer"": 1}]",validation,\n'
    )
    text += "ü.mp4,,,,,0.5\nbad,row\n"
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\xff.mp4,,,,,\n")
    packed([tmp_path / "m.csv"], tmp_path / "out")
    (sample,) = samples(tmp_path / "out", "val").values()
    assert (
        meta(sample)["caption"] == "one, two" and meta(sample)["label"] == "3" and meta(sample)["qa"][0]["answer"] == 1
    )
    (sample,) = samples(tmp_path / "out", "train").values()
    assert meta(sample)["start_s"] == 0.5 and meta(sample)["duration_s"] == pytest.approx(0.5)
    reasons = {r["where"]: r["reason"] for r in rejected(tmp_path / "out")}
    assert reasons == {"m.csv:4": "line 4 has 2 cells, the header 6", "m.csv:5": "line 5 is not UTF-8"}
    (tmp_path / "n.csv").write_text("name,caption\na.mp4,x\n")
    with pytest.raises(ValueError, match="no column path or file or video"):
        collect([tmp_path / "n.csv"])


def test_clips_of_one_video_stay_on_one_side(tmp_path):
    rows = []
    for number in range(12):
        video(tmp_path / f"{number}.mp4", frames=moving(20, seed=number))
        rows += [{"path": f"{number}.mp4", "source": f"film {number // 3}"}]
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "0.mp4").read_bytes())
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    packed([manifest, tmp_path / "copy.mp4"], tmp_path / "out", clip_seconds=1.0, val_fraction=0.4)
    side = {meta(s)["source"]: split for split in ("train", "val") for s in samples(tmp_path / "out", split).values()}
    for split in ("train", "val"):
        found = samples(tmp_path / "out", split)
        assert found and all(side[meta(s)["source"]] == split for s in found.values())
    assert side["copy.mp4"] == side["film 0"] and len(side) == 5
    split = json.loads((tmp_path / "out/split.json").read_text())
    assert sorted(split["train"] + split["val"]) == sorted(side)

    rows = [
        {"path": "0.mp4", "split": "train"},
        {"path": "copy.mp4", "split": "val"},
        {"path": "1.mp4", "split": "train"},
    ]
    rows += [{"path": "2.mp4", "split": "train"}, {"path": "2.mp4", "split": "val", "start_s": 1}]
    packed([write_manifest(tmp_path / "n.jsonl", rows)], tmp_path / "named")
    assert set(samples(tmp_path / "named", "val")) == {"copy"} and set(samples(tmp_path / "named")) == {"1"}
    reasons = {r["source"]: r["reason"] for r in rejected(tmp_path / "named")}
    assert "same video or content as 'copy.mp4'" in reasons["0.mp4"] and "several splits" in reasons["2.mp4"]


def test_adding_a_video_moves_no_other(tmp_path):
    for number in range(30):
        video(tmp_path / "in" / f"{number}.mp4", frames=moving(2, seed=number))
    packed([tmp_path / "in"], tmp_path / "a", val_fraction=0.3)
    video(tmp_path / "in" / "0 more.mp4", frames=moving(2, seed=50))
    packed([tmp_path / "in"], tmp_path / "b", val_fraction=0.3)
    before, after = (json.loads((tmp_path / f / "split.json").read_text()) for f in "ab")
    assert 3 <= len(before["val"]) <= 16
    assert set(before["val"]) <= set(after["val"]) and set(before["train"]) <= set(after["train"])
