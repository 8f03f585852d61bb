"""A window of frames keeps the questions it can answer."""

from __future__ import annotations

import torch

from vtok.data.language import visible_questions
from vtok.data.synthetic import scene


def test_only_spans_inside_the_window_stay():
    qa = [{"id": f"{a}-{b}", "start_s": a, "end_s": b} for a, b in ((0, 1), (0, 4), (1, 2), (1.5, 3), (2, 4))]
    qa += [{"id": "whole"}, {"id": "half", "start_s": 0.0}]

    def kept(times):
        return [entry["id"] for entry in visible_questions(qa, torch.as_tensor(times)) or []]

    assert kept(torch.arange(32) / 8) == [entry["id"] for entry in qa]  # the last frame stands for its 1/8 s
    assert kept(torch.arange(8, 16) / 8) == ["1-2", "whole", "half"]
    assert kept(torch.arange(8, 15) / 8) == ["whole", "half"]  # one frame short
    assert kept(torch.tensor([1.5])) == ["whole", "half"]  # an instant


def test_a_whole_procedural_clip_keeps_all_and_its_first_half_those_asked_there():
    made = scene(0, 4, level=4, seconds=6.0, needles=1)
    every = made.questions
    assert visible_questions(every, torch.arange(72) / 12) == every
    first = visible_questions(every, torch.arange(36) / 12)
    assert first == [q for q in every if q["end_s"] <= 3 + 1 / 12] and len(first) < len(every)


def test_nothing_to_filter():
    assert visible_questions(None, torch.zeros(2)) is None and visible_questions([], torch.zeros(2)) == []
