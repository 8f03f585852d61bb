"""Clips asked part by part: every frame in exactly one part, by time; prompts as documented; one part is the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llm import Pooled, PooledConfig, clips, folders, one  # noqa: F401  (folders is a fixture)

from vtok.llm import LLMConfig, PartsConfig, ask, load_llm
from vtok.llm.parts import ask_parts, split
from vtok.llm.reading import generate, prompt_ids
from vtok.types import Clip, Features, Sound

torch.set_num_threads(1)
TEMPLATE = "<video>\nQuestion: {question}\nAnswer:"
PART = "<video>\nDescription:"


def numbered(lengths: list[int], *, times: bool = True, fps: float = 8.0, audio: int = 0) -> Clip:
    """Clips whose patches hold the number of their frame; audio: frames of sound for each of the video's."""
    most = max(lengths)
    patches = torch.arange(most).float().view(1, -1, 1, 1).expand(len(lengths), -1, 4, 5).clone()
    seconds = torch.arange(most).float().expand(len(lengths), -1) / fps + 0.25
    counts = torch.tensor(lengths)
    found = {"cached": Features(patches, (2, 2), times=seconds if times else None, lengths=counts)}
    if audio:
        heard = torch.arange(most * audio).float().view(1, -1, 1, 1).expand(len(lengths), -1, 1, 3).clone()
        found["ears"] = Features(heard, (1, 1), lengths=counts * audio)
    video = torch.arange(most, dtype=torch.uint8).view(1, 1, -1, 1, 1).expand(len(lengths), 3, -1, 2, 2).clone()
    begin = 10 * torch.arange(most).expand(len(lengths), -1)
    spans = torch.stack([begin, begin + 10], -1)
    sound = Sound(torch.zeros(len(lengths), 10 * most, dtype=torch.int16), 10 * counts, spans, rate=80)
    keys = [f"c{i}" for i in range(len(lengths))]
    return Clip(keys, video=video, lengths=counts, times=seconds, features=found, sound=sound)


def frames(features: Features, row: int) -> list[int]:
    return features.patches[row, : int(features.count()[row]), 0, 0].long().tolist()


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    count=st.integers(1, 9),
    fps=st.sampled_from([0.3, 1.0, 7.0, 8.0, 29.97]),
    times=st.booleans(),
    audio=st.integers(1, 3),
)
def test_every_frame_is_in_exactly_one_part(lengths, count, fps, times, audio):
    clip = numbered(lengths, fps=fps, times=times, audio=audio)
    seen: dict[str, list[list[int]]] = {name: [[] for _ in lengths] for name in ("cached", "ears", "video", "sound")}
    sizes: list[list[int]] = [[] for _ in lengths]
    for part in split(clip, count, tower="cached"):
        assert part.clip.keys == [clip.keys[row] for row in part.rows]
        for at, row in enumerate(part.rows):
            assert part.clip.features is not None and part.clip.video is not None
            for name in ("cached", "ears"):
                seen[name][row] += frames(part.clip.features[name], at)
            seen["video"][row] += part.clip.video[at, 0, : int(part.clip.frames()[at]), 0, 0].tolist()
            assert part.clip.sound is not None
            spans = part.clip.sound.spans[at, : int(part.clip.frames()[at])]
            assert (spans[:, 1] - spans[:, 0] == 10).all()
            seen["sound"][row] += (spans[:, 0] // 10).tolist()
            sizes[row].append(int(part.clip.frames()[at]))
            if times and part.clip.times is not None:
                inside = part.clip.times[at, : sizes[row][-1]]
                slack = 1e-4 * (part.end_s[at] - part.start_s[at] + 1)
                assert part.start_s[at] - slack <= float(inside.min()) <= float(inside.max()) < part.end_s[at] + slack
    for row, length in enumerate(lengths):
        assert seen["cached"][row] == seen["video"][row] == seen["sound"][row] == list(range(length))
        assert seen["ears"][row] == list(range(length * audio))
        assert len(sizes[row]) == min(count, length) and max(sizes[row]) - min(sizes[row]) <= 1


def test_parts_are_cut_by_time_not_by_number():
    clip = numbered([6])
    assert clip.features is not None
    uneven = torch.tensor([[0.0, 0.1, 0.2, 0.3, 2.0, 4.0]])
    clip.features["cached"].times = uneven
    found = split(clip, 2, tower="cached")  # 4.8 s: until 2.4 s, and from then on
    assert [frames(part.clip.features["cached"], 0) for part in found if part.clip.features] == [[0, 1, 2, 3, 4], [5]]
    assert [(round(p.start_s[0], 3), round(p.end_s[0], 3)) for p in found] == [(0.0, 2.4), (2.4, 4.8)]
    clip.features["cached"].times = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 9.0]])
    third = split(clip, 3, tower="cached")
    assert [frames(part.clip.features["cached"], 0) for part in third if part.clip.features] == [[0, 1, 2, 3, 4], [5]]


def test_a_clip_without_the_towers_features_is_cut_by_its_video():
    clip = numbered([8, 3])
    clip.features = None
    found = split(clip, 2, tower="cached")
    shown = [
        part.clip.video[0, 0, : int(part.clip.frames()[0]), 0, 0].tolist()
        for part in found
        if part.clip.video is not None
    ]
    assert shown == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match="without features of 'cached' cannot be split"):
        split(Clip(["a"]), 2, tower="cached")
    clip = numbered([8], audio=1)
    assert clip.features is not None
    clip.features["ears"] = replace(clip.features["ears"], lengths=torch.tensor([1]))
    with pytest.raises(ValueError, match="the features of 'ears' has 1 frames for a clip, too few"):
        split(clip, 4, tower="cached")


@pytest.fixture(scope="module")
def lab(folders):  # noqa: F811
    llm = load_llm(LLMConfig(name=folders["llama"]))
    torch.manual_seed(0)
    return llm, Pooled(PooledConfig(in_dim=5, embedding_dim=32, embedding_rms=llm.embedding_rms))


def test_one_part_is_the_plain_answer(lab):
    llm, model = lab
    plain = ask(llm, clips(), model, template=TEMPLATE, budget=2, max_new_tokens=3)
    same = ask(llm, clips(), model, template=TEMPLATE, budget=2, max_new_tokens=3, parts=PartsConfig(1))
    assert plain == same
    still = numbered([1])
    still.qa = [[dict(question="What?", answer="red", choices=["red", "blue"])]]
    parts = PartsConfig(4, PART, 3)
    assert ask(llm, still, model, template=TEMPLATE, budget=2, parts=parts)[0].parts == [], "a frame has no parts"


def test_the_last_prompt_holds_what_each_part_said(lab):
    """Computed by hand: each part's own frames, their greedy answer, a line with its seconds, then the question."""
    llm, model = lab
    clip = clips()
    assert clip.features is not None and clip.qa is not None
    parts = PartsConfig(2, PART, 4)
    found = ask(llm, clip, model, template=TEMPLATE, budget=2, max_new_tokens=4, parts=parts)
    for each in found:
        row = clip.keys.index(each.key)
        own = one(clip, row).features["cached"]
        length = own.patches.shape[1]
        if length == 1:
            assert each.parts == []
            continue
        middle = -(-length // 2)
        start, step = float(own.times[0, 0]), 1 / 8
        half = step * length / 2
        lines = []
        for first, stop, begin in ((0, middle, start), (middle, length, start + half)):
            piece = Features(own.patches[:, first:stop], own.grid, times=own.times[:, first:stop])
            (said,) = generate(llm, [PART], model.compress(piece, budget=2), max_new_tokens=4)
            lines.append(f"From {begin:.1f} to {begin + half:.1f} s: {' '.join(said.split())}")
        assert each.parts == lines
        question = TEMPLATE.replace("{question}", each.question)
        prompt = question.replace("<video>", "<video>\n" + "\n".join(lines))
        tokens = model.compress(own, budget=2)
        assert generate(llm, [prompt], tokens, max_new_tokens=4) == [each.text]
        assert each.positions == sum(i >= 0 for i in prompt_ids(llm, prompt)) + 2
        assert each.part_positions == [sum(i >= 0 for i in prompt_ids(llm, PART)) + 2] * 2
        assert each.part_seconds > 0
    assert sum(bool(each.parts) for each in found) >= 1


def test_parts_know_the_question_where_the_prompt_asks_it(lab):
    llm, model = lab
    model.reads_prompt, model.seen_prompts = True, []
    try:
        clip = clips(1)
        assert clip.qa is not None
        asked = [(0, question) for question in clip.qa[0]]
        config = PartsConfig(2, "<video>\nWhat matters for: {question}", 2)
        found, seconds = ask_parts(llm, clip, model, asked, config, budget=2)
        assert model.seen_prompts == [["What matters for: What colour is the circle?"]] * 2
        assert len(found[0].lines) == 2 and seconds > 0
    finally:
        model.reads_prompt = False


def test_a_part_cannot_smuggle_a_place_for_a_video(lab, monkeypatch):
    llm, model = lab
    monkeypatch.setattr("vtok.llm.parts.generate", lambda *_, **__: ["red\n<video> <video>"])
    (each, *_) = ask(llm, clips(1), model, template=TEMPLATE, budget=2, parts=PartsConfig(2, PART, 2))
    assert [line.partition(": ")[2] for line in each.parts] == ["red"] * 2


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(count=0), "count=0 and max_new_tokens=128 must be 1 or more"),
        (dict(count=2, prompt="What is this?"), "must hold '<video>' once"),
        (dict(count=2, max_new_tokens=0), "max_new_tokens=0 must be 1 or more"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        PartsConfig(**values)
