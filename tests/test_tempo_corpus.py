"""Needle videos: what is planted is seen and asked about, evenly, and only a question tells which needle matters."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from scipy import ndimage, stats
from test_synthetic import decode, mask, shape_of

from vtok.data.synthetic import Series, render, scene, scene_of, write_corpus, write_scene
from vtok.data.synthetic_names import COLOURS, SHAPES
from vtok.data.synthetic_needles import PLAIN

NEEDLES = dict(seconds=16, shots=16, fps=4, size=(32, 32), level=0, needles=6, needle_shapes=4, questions_per_type=0)


def test_clips_without_series_are_what_they_were():
    """Rows and needle frames of clips made before series existed; rendered backgrounds hang on the machine's FFT."""
    found = hashlib.sha256()
    for index in range(12):
        for settings in (
            dict(seconds=2, size=(32, 32), fps=8),
            dict(seconds=8, size=(32, 48), fps=6, shots=8, needles=3, questions_per_type=2),
        ):
            made = scene(7, index, **settings)
            found.update(json.dumps(made.row("x.mp4")).encode())
            for needle in made.needles:
                for frame in render(made, start=needle.frame, stop=needle.frame + needle.frames):
                    found.update(frame.tobytes())
    assert found.hexdigest() == "39ed1d3974ea5c75d01796cffe468b2e1f5ffd0fc688eda9997801b2744799af"


@pytest.mark.parametrize("index", range(3))
def test_series_are_seen_where_and_as_they_are_said(tmp_path, index):
    made = scene(3, index, seconds=6, shots=6, fps=4, level=1, needles=4, needle_shapes=3)
    write_scene(made, tmp_path / "x.mp4")
    frames = decode(tmp_path / "x.mp4")
    edge = frames[:, :6].reshape(len(frames), -1, 3).astype(float)
    held = [needle.frame + k for needle in made.needles for k in range(3)]
    assert max(edge[held].std(1).max(1)) < 6, "the ground is flat"
    assert len({needle.ground for needle in made.needles}) == 4
    for needle in made.needles:
        assert isinstance(needle, Series) and len({shape for _, shape in needle.pictures}) == 3
        shot = next(shot for shot in made.shots if shot.start <= needle.frame < shot.stop)
        assert needle.frame + needle.frames <= shot.stop, "inside one shot"
        for k, (colour, shape) in enumerate(needle.pictures):
            frame = frames[needle.frame + k]
            assert np.abs(edge[needle.frame + k].mean(0) - PLAIN[needle.ground]).max() < 8
            seen = mask(frame, colour)
            assert ndimage.label(seen)[1] == 1 and shape_of(seen) == shape
    text = " ".join(caption["text"] for caption in made.captions)
    assert all(needle.description in text for needle in made.needles)
    asked = [question for question in made.questions if question["type"] == "needle"]
    assert len({question["question"] for question in asked}) == len(asked) == 4


def test_questions_name_their_frame_and_answers_are_even():
    asked, by_text = Counter(), defaultdict(Counter)
    for index in range(60):
        made = scene(5, index, **{**NEEDLES, "questions_per_type": index % 3 and 2})
        questions = [q for q in made.questions if q["type"] == "needle"]
        assert len(questions) == (12 if index % 3 else 6) and (index % 3 or len(made.questions) == 6)
        for question in questions:
            frame = round(question["start_s"] * 4)
            needle = next(n for n in made.needles if n.frame <= frame < n.frame + n.frames)
            colour, shape = needle.picture(frame)
            assert question["answer"] == colour and question["choices"] == list(COLOURS)
            assert question["question"] == f"What colour is the {shape} that flashes on a plain {needle.ground} ground?"
            assert question["end_s"] == pytest.approx(question["start_s"] + 0.25)
        for k, needle in enumerate(made.needles):
            asked[k, needle.colour] += 1
            by_text[questions[k]["question"]][questions[k]["answer"]] += 1
    assert set(asked.values()) == {10}, "every needle has every answer equally often"
    right = sum(count.most_common(1)[0][1] for count in by_text.values())
    assert right / sum(sum(count.values()) for count in by_text.values()) < 0.5  # as random answers to 48 texts would


def test_a_needle_video_of_64_segments():
    made = scene(9, 0, **{**NEEDLES, "seconds": 64, "shots": 64})
    assert [shot.stop - shot.start for shot in made.shots] == [4] * 64, "a window of 4 frames is a shot"
    assert len(made.needles) == 6 and all(needle.frame % 4 == 0 for needle in made.needles)


def test_needles_lie_anywhere_and_only_a_question_singles_one_out():
    made = [scene(9, index, **NEEDLES) for index in range(60)]
    segments = [[needle.frame // 4 for needle in one.needles] for one in made]
    assert all(len(set(found)) == 6 and found == sorted(found) for found in segments)
    assert stats.chisquare(np.bincount(sum(segments, []), minlength=16)).pvalue > 0.01
    shapes = Counter(needle.shape for one in made for needle in one.needles)
    assert set(shapes) == set(SHAPES) and max(shapes.values()) < 2 * min(shapes.values())
    # all needles of a video look alike but for what a question names: as many frames, flat grounds, the same shapes
    assert {needle.frames for one in made for needle in one.needles} == {4}
    depths = Counter(k for one in made for k, _ in enumerate(one.needles))
    assert set(depths.values()) == {60}, "each needle of a video is asked for equally often"


def test_a_manifest_gives_the_scene_back(tmp_path):
    settings = dict(clips=2, seconds=2, shots=2, fps=4, size=(32, 32), needles=2, needle_shapes=4, workers=1)
    manifest = write_corpus(tmp_path, **settings, questions_per_type=0, progress=False)
    for line in manifest.read_text().splitlines():
        row = json.loads(line)
        made = scene_of(row)
        assert [needle["pictures"] for needle in row["needles"]] == [
            [list(picture) for picture in needle.pictures] for needle in made.needles
        ]
        assert decode(tmp_path / row["file"]).shape == (8, 32, 32, 3) and len(row["qa"]) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needle_shapes": 7}, "needle_shapes=7: ask for 1 to 6"),
        ({"needle_shapes": 0}, "needle_shapes=0"),
        ({"needles": 9}, "there are 8 grounds; ask for 0 to 8"),
        ({"needle_shapes": 5}, "0 shots of the clip have 5 frames or more"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        scene(0, 0, **NEEDLES | changes)
