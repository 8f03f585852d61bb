"""Long videos in parts: each part is asked by itself, and its answer stands as text in the question about the whole.

    clip --split--> part 1 | part 2 | ... --compress, LLM--> "From 0.0 to 4.0 s: ..." for each
      '-----------compress-----------> tokens + those lines + question --LLM--> answer

Training-free: the long-video chain of thought of TDC (Hao et al. 2025, https://arxiv.org/abs/2504.10443), with a prompt
of one's own for the parts. Letters: B clips, T frames.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok.llm.frozen import FrozenLLM
from vtok.llm.reading import PLACE, generate, prompt_ids, tokens_at, with_times
from vtok.llm.tasks import ask_as, instruction, plain
from vtok.types import Budget, Clip, Features, Tokens

EPSILON = 1e-6  # of a clip's length: times are float32


@dataclass(frozen=True)
class PartsConfig:
    """How parts are asked.

    count: parts of a clip, equally long; 1 = the whole at once. A clip of fewer frames has as many parts as frames.
    prompt: with "<video>", and "{question}" where a part is to be asked for what matters to it.
    max_new_tokens: of the answer about a part.
    """

    count: int = 1
    prompt: str = f"{PLACE}\nSay briefly what this part of a video shows that matters for the question: {{question}}"
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"parts of a clip: count={self.count} and max_new_tokens={self.max_new_tokens} must be 1 or more"
            )
        if self.prompt.count(PLACE) != 1:
            raise ValueError(f"the prompt of a part, {self.prompt!r}, must hold {PLACE!r} once")


class Part(NamedTuple):
    """The clips of a batch that have this part. rows: their places in the batch. clip: their frames of this part.
    start_s, end_s: of each of them, in seconds; of the share of the clip from 0 to 1 where it brings no times."""

    rows: list[int]
    clip: Clip
    start_s: list[float]
    end_s: list[float]


class Said(NamedTuple):
    """What the parts of a question's clip said: the lines that go into its prompt, the positions of the prompts that
    were read for them, the ids that were generated."""

    lines: list[str]
    positions: list[int]
    generated: int


def split(clip: Clip, count: int, *, tower: str = "") -> list[Part]:
    """The parts of a batch of clips, equally long in time; every frame is in exactly one of them.

    A frame belongs to the part in which it begins to be on show; the last one lasts as long as frames do on average.
    Everything that a clip brings is split alike: of its video, its times and all its features each part gets the frames
    of the same share of the clip. A part in which no frame begins is none.

    Args:
        tower: the features whose frames decide; those of the video where the clip brings none of that name.
    Raises: ValueError for a clip without video and features, and for one whose other features have too few frames.
    """
    found = (clip.features or {}).get(tower)
    if found is not None:
        lengths, times = found.count().tolist(), found.times
    elif clip.video is not None:
        lengths, times = clip.frames().tolist(), clip.times
    else:
        raise ValueError(f"clips without video and without features of {tower!r} cannot be split into parts")
    cuts = [_cuts(length, count, None if times is None else times[row]) for row, length in enumerate(lengths)]
    whole = [_extent(length, None if times is None else times[row]) for row, length in enumerate(lengths)]
    out = []
    for part in range(count):
        rows = [row for row in range(len(clip)) if cuts[row][part] < cuts[row][part + 1]]
        if not rows:
            continue
        shares = [(cuts[row][part] / lengths[row], cuts[row][part + 1] / lengths[row]) for row in rows]
        parts = [min(count, lengths[row]) for row in rows]
        begins = [whole[row][0] + part / n * (whole[row][1] - whole[row][0]) for row, n in zip(rows, parts)]
        ends = [whole[row][0] + (part + 1) / n * (whole[row][1] - whole[row][0]) for row, n in zip(rows, parts)]
        out.append(Part(rows, _frames_of(clip, rows, shares), begins, ends))
    return out


def _extent(length: int, times: Tensor | None) -> tuple[float, float]:
    """(start, end) of a clip in seconds; (0, 1) without times."""
    if times is None:
        return 0.0, 1.0
    first, last = float(times[0]), float(times[length - 1])
    return first, last + ((last - first) / (length - 1) if length > 1 else 0.0)


def _cuts(length: int, count: int, times: Tensor | None) -> list[int]:
    """count + 1 numbers of frames at which the parts begin, of a clip of `length` frames; those it does not have are
    empty and come last."""
    parts = min(count, length)
    if times is None or length == 1:
        edges = [
            -(-length * part // parts) for part in range(parts + 1)
        ]  # frame i is in part floor(parts * i / length)
    else:
        start, end = _extent(length, times)
        share = (times[:length].double() - start) / max(end - start, 1e-12)
        at = (parts * (share + EPSILON)).floor().clamp(0, parts - 1).cpu()
        edges = [int((at < part).sum()) for part in range(parts)] + [length]
    return edges + [length] * (count - parts)


def _frames_of(clip: Clip, rows: Sequence[int], shares: Sequence[tuple[float, float]]) -> Clip:
    """The clips of these rows, each with the frames of its share (from, to) of the clip alone."""
    at = list(rows)
    video, times, lengths, sound = clip.video, clip.times, clip.lengths, clip.sound
    if video is not None:
        frames = [clip.frames().tolist()[row] for row in at]
        index, lengths = _index(frames, shares, "the video", device=video.device)
        video = _taken(video[at], index, axis=2)
        times = None if times is None else _taken(times[at], index.to(times.device), axis=1)
        if sound is not None:
            spans = _taken(sound.spans[at], index.to(sound.spans.device), axis=1)
            sound = replace(sound, samples=sound.samples[at], lengths=sound.lengths[at], spans=spans)
    else:
        sound = None
        lengths, times = None, None  # those of the features count
    features = None
    if clip.features is not None:
        features = {name: _features_of(value, at, shares, name) for name, value in clip.features.items()}
    texts: dict[str, Any] = {
        name: [value[row] for row in at] if (value := getattr(clip, name)) is not None else None
        for name in ("text", "prompt", "target", "qa")
    }
    keys = [clip.keys[row] for row in at]
    return Clip(keys=keys, video=video, lengths=lengths, times=times, features=features, sound=sound, **texts)


def _features_of(features: Features, rows: Sequence[int], shares: Sequence[tuple[float, float]], name: str) -> Features:
    found = features_at(features, rows)
    index, lengths = _index(found.count().tolist(), shares, f"the features of {name!r}", device=found.patches.device)

    def take(value: Tensor | None) -> Tensor | None:
        return None if value is None else _taken(value, index.to(value.device), axis=1)

    patches = take(found.patches)
    assert patches is not None
    attention = {
        layer: _taken(value, index.to(value.device), axis=1) for layer, value in (found.attention or {}).items()
    }
    return replace(
        found,
        patches=patches,
        times=take(found.times),
        frame=take(found.frame),
        keys=take(found.keys),
        attention=attention or None,
        lengths=lengths,
    )


def _index(
    frames: Sequence[int], shares: Sequence[tuple[float, float]], what: str, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """([n, most] frames of each share, the last one repeated; [n] how many there are)."""
    spans = [(round(low * count), round(high * count)) for count, (low, high) in zip(frames, shares)]
    for count, (first, stop) in zip(frames, spans):
        if first == stop:
            raise ValueError(f"{what} has {count} frames for a clip, too few for so many parts: ask for fewer")
    counts = torch.tensor([stop - first for first, stop in spans], device=device)
    nth = torch.arange(int(counts.max()), device=device).expand(len(spans), -1)
    firsts = torch.tensor([first for first, _ in spans], device=device)[:, None]
    return firsts + nth.minimum(counts[:, None] - 1), counts


def _taken(value: Tensor, index: Tensor, *, axis: int) -> Tensor:
    """[n, ..., T, ...] -> the frames `index` [n, F] of it along `axis`."""
    shape = [1] * value.ndim
    shape[0], shape[axis] = index.shape
    wide = list(value.shape)
    wide[axis] = index.shape[1]
    return value.gather(axis, index.view(shape).expand(wide))


def features_at(features: Features, index: Sequence[int]) -> Features:
    """The features of these clips, in this order; a clip may come several times."""
    at = torch.as_tensor(list(index), dtype=torch.int64, device=features.patches.device)

    def take(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: take(item) for name, item in value.items()}
        return value[at.to(value.device)] if isinstance(value, Tensor) else value

    return replace(features, **{f.name: take(getattr(features, f.name)) for f in fields(features)})


def compressed(model: Any, clip: Clip, rows: Sequence[int], prompts: Sequence[str], *, budget: Budget | None) -> Tokens:
    """Tokens of each of `prompts`, whose clips are those of `rows`: a clip is compressed once, or once for each prompt
    where the model reads them (`model.reads_prompt`), with what the model is given beside (`model.beside`)."""
    if not getattr(model, "reads_prompt", False):
        return tokens_at(model.encode(clip, budget=budget), rows)
    beside = getattr(model, "beside", None)
    heard = {name: features_at(each, rows) for name, each in (beside(clip) if beside is not None else {}).items()}
    asked = [instruction(prompt) for prompt in prompts]
    return model.compress(features_at(model.features(clip), rows), budget=budget, prompt=asked, **heard)


def ask_parts(
    llm: FrozenLLM,
    clip: Clip,
    model: Any,
    asked: Sequence[tuple[int, dict[str, Any]]],
    config: PartsConfig,
    *,
    budget: Budget | None = None,
    timestamps: bool = False,
    texts_per_call: int = 64,
) -> tuple[list[Said], float]:
    """What the parts say, for each of the (row, question) `asked`, and the seconds that took.

    Each part is compressed at the same budget as the whole. Clips of one part say nothing: they are the whole.
    """
    began = time.perf_counter()
    tower = getattr(getattr(model.config, "tower", None), "name", "")
    parts = split(clip, config.count, tower=tower)
    alone = {row for row in range(len(clip)) if sum(row in part.rows for part in parts) < 2}
    out = [Said([], [], 0) for _ in asked]
    for part in parts:
        place = {row: at for at, row in enumerate(part.rows) if row not in alone}
        mine = [i for i, (row, _) in enumerate(asked) if row in place]
        if not mine:
            continue
        prompts = [ask_as(config.prompt, asked[i][1]) for i in mine]
        at = [place[asked[i][0]] for i in mine]
        tokens = compressed(model, part.clip, at, prompts, budget=budget)
        if timestamps:
            prompts = with_times(prompts, tokens)
        for group in torch.arange(len(mine)).split(texts_per_call):
            own = group.tolist()
            texts = generate(
                llm, [prompts[i] for i in own], tokens_at(tokens, own), max_new_tokens=config.max_new_tokens
            )
            for i, text in zip(own, texts):
                words = plain(" ".join(text.split()))
                read = sum(item >= 0 for item in prompt_ids(llm, prompts[i])) + int(tokens.lengths[i])
                where = f"From {part.start_s[at[i]]:.1f} to {part.end_s[at[i]]:.1f} s"
                written = len(llm.tokenizer(text, add_special_tokens=False).input_ids) if text else 0
                before = out[mine[i]]
                lines, positions = [*before.lines, f"{where}: {words}"], [*before.positions, read]
                out[mine[i]] = Said(lines, positions, before.generated + written)
    return out, time.perf_counter() - began


def with_parts(prompt: str, said: Said) -> str:
    """The prompt with what the parts said between the video and the question."""
    return prompt.replace(PLACE, "\n".join([PLACE, *said.lines])) if said.lines else prompt
