"""The procedural corpus: its truth is measured again on decoded pixels."""

import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
from scipy import ndimage, stats
from waiting import PATIENCE_S

from vtok.data.encode import write_video
from vtok.data.shards import pack
from vtok.data.synthetic import LEVELS, QUESTION_TYPES, render, scene, write_corpus, write_scene
from vtok.data.synthetic_scenes import COLOURS, GROUNDS, SHAPES, balanced


def decode(path: Path) -> np.ndarray:
    """[T, H, W, 3] uint8."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def encoded(made, tmp_path: Path) -> np.ndarray:
    path = tmp_path / f"{made.seed}_{made.index}.mp4"
    write_scene(made, path)
    return decode(path)


def hue(rgb: np.ndarray) -> np.ndarray:
    """Hue in degrees, NaN where the saturation is below 0.45 or the pixel is dark; written apart from vtok."""
    rgb = rgb.astype(float)
    high, low = rgb.max(-1), rgb.min(-1)
    span = np.maximum(high - low, 1e-9)
    r, g, b = np.moveaxis(rgb, -1, 0)
    turn = np.select([high == r, high == g], [(g - b) / span % 6, (b - r) / span + 2], (r - g) / span + 4)
    return np.where((span / np.maximum(high, 1) > 0.45) & (high > 60), turn * 60, np.nan)


PALETTE_HUES = {name: float(hue(np.array(rgb))) for name, rgb in COLOURS.items()}


def mask(image: np.ndarray, colour: str) -> np.ndarray:
    """Where an image shows a colour of the palette: nearest hue, saturated, specks removed."""
    turn = hue(image)[..., None]
    away = np.abs((turn - np.array(list(PALETTE_HUES.values())) + 180) % 360 - 180)
    nearest = np.where(np.isnan(turn[..., 0]), -1, np.nan_to_num(away, nan=360.0).argmin(-1))
    return ndimage.binary_opening(nearest == list(COLOURS).index(colour), iterations=1)


def answers(made, kind: str) -> list[str]:
    return [question["answer"] for question in made.questions if question["type"] == kind]


def test_files_hold_what_render_gives(tmp_path):
    made = scene(3, 4, level=3, seconds=1.5, size=(64, 96), fps=10)
    frames = np.stack(list(render(made)))
    assert frames.shape == (15, 64, 96, 3) == (made.frames, *made.size, 3) and frames.dtype == np.uint8
    shown = encoded(made, tmp_path)
    assert shown.shape == frames.shape
    assert 10 * np.log10(255**2 / np.mean((shown - frames.astype(float)) ** 2)) > 28
    with av.open(str(tmp_path / "3_4.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 10 and stream.pix_fmt == "yuv420p"
    assert not list(tmp_path.glob(".*")), "the aside file must be renamed"


def test_a_clip_is_a_function_of_seed_and_index(tmp_path):
    made, again = scene(1, 9, seconds=1), scene(1, 9, seconds=1)
    assert made == again and made.row("x.mp4") == again.row("x.mp4")
    for name, one in (("a", made), ("b", again)):
        write_scene(one, tmp_path / f"{name}.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert scene(1, 10, seconds=1, level=3) != scene(1, 9, seconds=1, level=3) != scene(2, 9, seconds=1, level=3)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_any_range_of_frames_equals_the_whole(level):
    made = scene(5, level, level=level, seconds=3, size=(48, 48), needles=2)
    whole = list(render(made))
    part = list(render(made, start=7, stop=29))
    assert len(whole) == 36 and np.array_equal(whole[7:29], part)


@pytest.mark.parametrize("index", range(8))
def test_colour_shape_and_direction_are_seen(tmp_path, index):
    made = scene(11, index, level=1 + index % 2, seconds=2, needles=0)
    frames, focus = encoded(made, tmp_path), made.shots[0].things[0]
    masks = [mask(frame, focus.colour) for frame in frames[focus.appears :]]
    assert min(m.sum() for m in masks) > 60, "the thing that questions ask about is visible in its colour"
    assert all(ndimage.label(m)[1] == 1 for m in masks), "and it is the only one of its colour"
    (y0, x0), (y1, x1) = ndimage.center_of_mass(masks[0]), ndimage.center_of_mass(masks[-1])
    dx, dy = x1 - x0, y1 - y0
    seen = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    assert answers(made, "direction") == [seen] and max(abs(dx), abs(dy)) > 8
    assert answers(made, "colour") == [focus.colour] and answers(made, "shape") == [focus.shape]


@pytest.mark.parametrize("index", range(9))
def test_count_is_seen(tmp_path, index):
    made = scene(13, index, level=2, seconds=2, needles=0)
    last = encoded(made, tmp_path)[-1]
    asked = next(q for q in made.questions if q["type"] == "count")
    colour = next(c for c in COLOURS if c in asked["question"])
    labels, count = ndimage.label(mask(last, colour))
    assert str(sum(np.bincount(labels.ravel())[1:] > 15)) == asked["answer"], (count, asked)


def test_order_is_seen(tmp_path):
    checked = 0
    for index in range(8):
        made = scene(17, index, level=1, seconds=1.5, size=(96, 96), needles=0)
        asked = [q for q in made.questions if q["type"] == "order"]
        if not asked:
            continue
        frames, things = encoded(made, tmp_path), made.shots[0].things
        seen = {t.name: next(i for i, f in enumerate(frames) if mask(f, t.colour).sum() > 40) for t in things}
        assert asked[0]["answer"] == min(seen, key=seen.__getitem__) and set(asked[0]["choices"]) == set(seen)
        assert all(seen[t.name] == t.appears for t in things)
        checked += 1
    assert checked >= 3


def shape_of(seen: np.ndarray) -> str:
    """A shape by its share of the bounding box; a ring has a hole, only a triangle's weight lies off the middle."""
    box = seen[ndimage.find_objects(seen.astype(int))[0]]
    if ndimage.binary_fill_holes(box).sum() > 1.05 * box.sum():
        return "ring"
    if abs(ndimage.center_of_mass(box)[0] / (len(box) - 1) - 0.5) > 0.1:
        return "triangle"
    limits = {"star": 0.47, "cross": 0.66, "circle": 0.88, "square": 1.01}
    return next(name for name, limit in limits.items() if box.mean() < limit)


def test_needles_are_seen_where_and_as_they_are_said(tmp_path):
    shapes = set()
    for index in range(8):
        made = scene(19, index, level=3, seconds=2, needles=3)
        frames = encoded(made, tmp_path)
        edge = frames[:, :8].reshape(len(frames), -1).astype(float)
        flat = np.flatnonzero(edge.std(1) < 3)
        assert flat.tolist() == [n.frame + k for n in made.needles for k in range(n.frames)]
        for needle, question in zip(made.needles, [q for q in made.questions if q["type"] == "needle"]):
            frame = frames[needle.frame]
            seen = mask(frame, needle.colour)
            assert shape_of(seen) == needle.shape and needle.shape in question["question"]
            assert abs(edge[needle.frame].mean() - GROUNDS[needle.ground]) < 4 and needle.ground in question["question"]
            assert question["answer"] == needle.colour and seen.sum() > 800
            assert question["start_s"] == pytest.approx(needle.frame / 12, abs=1e-3)
            assert 1 <= needle.frames <= 3
            shapes.add(needle.shape)
    assert shapes == set(SHAPES)


@pytest.mark.parametrize("index", range(6))
def test_cuts_are_seen(tmp_path, index):
    made = scene(23, index, level=4 + index % 2, seconds=4, needles=0)
    frames = encoded(made, tmp_path).astype(float)
    # A thing that appears changes a small part of the frame, a cut changes nearly all of it.
    change = np.median(np.abs(np.diff(frames.mean(-1), axis=0)), axis=(1, 2))
    smooth = np.array([np.abs(ndimage.uniform_filter(d, 9)).mean() for d in np.diff(frames.mean(-1), axis=0)])
    found = np.argsort(-smooth)[: len(made.cuts)] + 1
    assert made.cuts and sorted(found.tolist()) == made.cuts, change
    assert [c["start_s"] for c in made.captions] == pytest.approx([0, *(cut / 12 for cut in made.cuts)], abs=1e-3)


def test_levels_mean_what_they_say():
    made = [scene(29, level, level=level, seconds=4, needles=0) for level in range(len(LEVELS))]
    still = np.stack(list(render(made[0])))
    assert (still == still[:1]).all(), "level 0 is a still"
    for level, one in enumerate(made):
        assert all(len(shot.things) == LEVELS[level].shapes for shot in one.shots)
    motion = [np.abs(np.diff(np.stack(list(render(one))).astype(float), axis=0)).mean() for one in made]
    assert motion[0] == 0 < motion[1] < motion[3] < motion[5]
    words = [(level, len(scene(29, i, level=level).caption.split())) for level in range(6) for i in range(20)]
    assert stats.spearmanr(*zip(*words)).statistic > 0.9, "captions grow with the level"


def test_things_stay_in_the_frame_and_apart():
    gaps = []
    for index in range(120):
        made = scene(53, index, seconds=3, size=(96, 160))
        for shot in made.shots:
            for progress in np.linspace(0, 1, 7):
                places = [(*thing.at(progress), thing.radius) for thing in shot.things]
                assert all(r <= x <= 160 - r and r <= y <= 96 - r for x, y, r in places)
                pairs = [(a, b) for i, a in enumerate(places) for b in places[:i]]
                gaps += [np.hypot(a[0] - b[0], a[1] - b[1]) - a[2] - b[2] for a, b in pairs]
            assert min(thing.radius for thing in shot.things) > 3
    assert np.mean(np.array(gaps) >= 0) > 0.999


def test_answers_are_balanced_whatever_the_question_says():
    rows = defaultdict(list)
    for index in range(600):
        for question in scene(31, index, seconds=2, size=(32, 32), fps=8).questions:
            rows[question["type"]].append(question)
    assert set(rows) == set(QUESTION_TYPES)
    for kind, asked in rows.items():
        assert all(q["answer"] in q["choices"] and len(set(q["choices"])) == len(q["choices"]) for q in asked)
        place = Counter(q["choices"].index(q["answer"]) for q in asked)
        number = len(asked[0]["choices"])
        assert stats.chisquare([place[i] for i in range(number)]).pvalue > 0.01, (kind, place)
        # A guesser that learns the best answer for every question text stays at chance on other clips.
        half, table = len(asked) // 2, defaultdict(Counter)
        for q in asked[:half]:
            table[q["question"].split(", ")[-1]][q["choices"].index(q["answer"])] += 1
        right = 0
        for q in asked[half:]:
            known = table[q["question"].split(", ")[-1]]
            right += q["choices"].index(q["answer"]) == (known.most_common(1)[0][0] if known else 0)
        count, chance = len(asked) - half, 1 / number
        assert abs(right / count - chance) < 3 * (chance * (1 - chance) / count) ** 0.5, (kind, right / count)


def test_balanced_gives_every_answer_once_in_a_block():
    drawn = [balanced(7, "colour", index, 6) for index in range(60)]
    assert all(sorted(drawn[i : i + 6]) == list(range(6)) for i in range(0, 60, 6))
    assert len({tuple(drawn[i : i + 6]) for i in range(0, 60, 6)}) > 5


def test_needle_depth_is_uniform():
    made = [scene(37, index, level=0, seconds=8, size=(32, 32), needles=1) for index in range(600)]
    depth = [one.needles[0].frame / (one.frames - one.needles[0].frames) for one in made]
    assert stats.kstest(depth, "uniform").pvalue > 0.01
    assert Counter(one.needles[0].frames for one in made).keys() == {1, 2, 3}


def test_needle_video_of_64_segments():
    made = scene(41, 0, seconds=64, shots=64, needles=6, level=3, fps=4, questions_per_type=3)
    assert len(made.shots) == len(made.captions) == 64 and made.captions[-1]["end_s"] == 64
    assert made.caption.startswith("64 scenes. Scene 1: ") and made.captions[-1]["text"] in made.caption
    assert made.captions[1]["text"] not in made.caption, "one caption of a long video is a summary"
    asked = [q for q in made.questions if q["type"] == "needle"]
    assert len({q["question"] for q in asked}) == 6, "every needle has a question that no other needle answers"
    assert len({q["start_s"] for q in asked}) == 6 and len({q["id"] for q in made.questions}) == len(made.questions)
    assert Counter(q["type"] for q in made.questions)["colour"] == 3
    for question in made.questions:
        if question["type"] != "needle":
            number = int(question["question"].split(",")[0].removeprefix("In scene "))
            assert question["start_s"] == made.captions[number - 1]["start_s"]


def test_long_scenes_are_rendered_in_constant_memory():
    def peak(seconds: float) -> int:
        made = scene(43, 0, level=3, seconds=seconds, size=(64, 64), fps=4)
        tracemalloc.start()
        frames = sum(1 for _ in render(made))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert frames == seconds * 4
        return used

    assert peak(60) < 1.3 * peak(12)
    hours = scene(43, 1, level=0, seconds=2 * 3600, size=(32, 32), fps=1)
    assert hours.frames == 7200 and next(render(hours, start=7000)).shape == (32, 32, 3)


def test_a_scene_can_be_one_frame():
    made = scene(47, 5, seconds=0)
    assert made.frames == 1 and len(list(render(made))) == 1
    assert {q["type"] for q in made.questions} <= {"colour", "shape", "count"}


def test_corpus_and_manifest(tmp_path):
    manifest = write_corpus(tmp_path / "c", clips=7, seconds=(0.5, 1.0), size=(32, 48), val_fraction=0.3, workers=1)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train"] * 5 + ["val"] * 2
    assert [row["complexity"] for row in rows] == [0, 1, 2, 3, 4, 5, 0]
    assert len({row["duration"] for row in rows}) > 1 and all(0.4 < row["duration"] <= 1.01 for row in rows)
    for row in rows:
        assert decode(manifest.parent / row["file"]).shape == (row["frames"], 32, 48, 3)
    part = write_corpus(tmp_path / "d", clips=2, seconds=(0.5, 1.0), size=(32, 48), first=3, val_fraction=0, workers=1)
    for row, line in zip(rows[3:5], part.read_text().splitlines()):
        assert json.loads(line) == row, "clips do not depend on where the corpus starts"
        assert (part.parent / row["file"]).read_bytes() == (manifest.parent / row["file"]).read_bytes()


def test_shards_take_the_manifest_as_it_is(tmp_path):
    manifest = write_corpus(tmp_path / "c", clips=6, seconds=1, size=(32, 32), val_fraction=0.34, workers=1)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    summary = pack([manifest], tmp_path / "shards", workers=0, progress=False)
    assert not summary.rejected and summary.samples == {"train": 4, "val": 2}
    found = {}
    for path in tmp_path.glob("shards/*/*.tar"):
        with tarfile.open(path) as archive:
            found.update({m.name: archive.extractfile(m).read() for m in archive})
    samples = {json.loads(data)["caption"]: json.loads(data) for name, data in found.items() if name.endswith("json")}
    for row in rows:
        sample = samples[row["caption"]]
        assert sample["label"] == row["label"] and sample["captions"] == row["captions"]
        assert sample["qa"] == row["qa"]
        assert (manifest.parent / row["file"]).read_bytes() in found.values(), "bytes untouched"


@pytest.mark.slow
def test_script_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    script = Path(__file__).parent.parent / "data" / "demo_corpus.py"
    arguments = ["--clips", "6", "--seconds", "1", "--size", "32", "32", "--workers", "2"]
    command = [sys.executable, str(script), str(tmp_path / "2"), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=PATIENCE_S, stdout=subprocess.PIPE
    )
    assert done.returncode == 0 and str(tmp_path / "2" / "captions.jsonl") in done.stdout.decode()
    write_corpus(tmp_path / "1", clips=6, seconds=1, size=(32, 32), workers=1, progress=False)
    trees = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in tmp_path.iterdir()
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"level": 6}, "level=6 does not exist; choose 0 to 5"),
        ({"size": (33, 64)}, "even numbers"),
        ({"size": (16, 16)}, "at least 32"),
        ({"fps": 0}, "fps=0"),
        ({"seconds": -1}, "seconds=-1"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": 1, "shots": 13}, "shots=13 does not fit a clip of 12 frames"),
        ({"seconds": 1, "needles": 9}, "needles=9"),
        ({"index": -1}, "index=-1"),
    ],
)
def test_scene_errors_name_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        scene(0, **{"index": 0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"clips": 0}, "clips=0"),
        ({"complexity": (3, 2)}, r"complexity=\(3, 2\)"),
        ({"complexity": (0, 9)}, "within 0 to 5"),
        ({"val_fraction": 2}, "val_fraction=2"),
        ({"seconds": (2, 1)}, r"seconds=\(2, 1\)"),
        ({"workers": 0}, "workers=0"),
        ({"size": (31, 31)}, "even numbers"),
    ],
)
def test_corpus_errors_come_before_files(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        write_corpus(tmp_path / "out", **{"clips": 1, **arguments})
    assert not (tmp_path / "out").exists()


def test_the_same_small_frames_always_give_the_same_bytes(tmp_path):
    """x264 with its macroblock tree reads beyond small frames: what lay in memory before decided on the bytes."""
    write_corpus(
        tmp_path, clips=4, first=22, seconds=2, size=(32, 32), fps=8, complexity=(0, 1), workers=1, progress=False
    )
    rng = np.random.default_rng(0)
    for path in sorted(tmp_path.rglob("*.mp4")):
        frames, seen = decode(path), set()
        for _ in range(10):
            kept = [rng.bytes(int(size)) for size in rng.integers(1_000, 200_000, 5)]
            out = io.BytesIO()
            write_video(out, frames, fps=8)
            seen.add(out.getvalue())
            del kept
        assert len(seen) == 1
