"""What is asked of a clip and what is learned as the answer: captions, questions, and repeated text, by weight.

Every choice is a function of (seed, step, key), so a resumed run asks what the uninterrupted one would have asked, and
a clip's task does not depend on the batch it is in.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple

from vtok.llm.reading import PLACE
from vtok.types import Clip

QUESTION, CHOICES = "{question}", "{choices}"
TASKS = ("caption", "qa", "reconstruction")


@dataclass
class TaskConfig:
    """Shares of the clips that learn each task, and its prompts, of which one is drawn; evaluation takes the first.

    A clip that lacks what a task needs takes another one; shares are then those of the tasks it can take.
    """

    caption: float = 1.0  # the clip's caption is the answer
    qa: float = 1.0  # one of its questions, drawn evenly
    reconstruction: float = 0.0  # the caption again, asked for as a text to repeat
    caption_prompts: list[str] = field(default_factory=lambda: [f"{PLACE}\nDescription:"])
    qa_prompts: list[str] = field(default_factory=lambda: [f"{PLACE}\nQuestion: {QUESTION}\nAnswer:"])
    reconstruction_prompts: list[str] = field(default_factory=lambda: [f"{PLACE}\nRepeat the text:"])

    def __post_init__(self) -> None:
        for name in TASKS:
            share, prompts = getattr(self, name), getattr(self, f"{name}_prompts")
            if share < 0:
                raise ValueError(f"tasks.{name}={share} must be 0 or above")
            if share and not prompts:
                raise ValueError(f"tasks.{name}_prompts is empty, and tasks.{name}={share}: give one prompt at least")
            for prompt in prompts:
                if prompt.count(PLACE) != 1:
                    raise ValueError(f"tasks.{name}_prompts: {prompt!r} must hold {PLACE!r} once")
                if name == "qa" and QUESTION not in prompt:
                    raise ValueError(f"tasks.qa_prompts: {prompt!r} does not hold {QUESTION!r}")


def first_prompt(config: TaskConfig, task: str) -> str:
    """The prompt of a task that evaluation takes. Raises: ValueError where there is none."""
    prompts = getattr(config, f"{task}_prompts")
    if not prompts:
        raise ValueError(
            f"objective.tasks.{task}_prompts=[]: evaluation asks with the first of them, whatever training does "
            f"(tasks.{task}={getattr(config, task):g}): give one, or leave the key out"
        )
    return prompts[0]


class Told(NamedTuple):
    """Of each clip: the prompt, its answer ("" where there is nothing to learn), what a compressor that reads prompts
    is given (the prompt without the place of the video), and the task ("" for none, "given" for the clip's own)."""

    prompts: list[str]
    answers: list[str]
    instructions: list[str]
    tasks: list[str]


def choose(clip: Clip, config: TaskConfig, *, step: int, seed: int = 0) -> Told:
    """What each clip is asked at a step. A clip that brings `prompt` and `target` of its own is asked that."""
    rows = [_choose(clip, row, config, step=step, seed=seed) for row in range(len(clip))]
    prompts, answers, tasks = ([row[part] for row in rows] for part in range(3))
    return Told(prompts, answers, [instruction(prompt) for prompt in prompts], tasks)


def _choose(clip: Clip, row: int, config: TaskConfig, *, step: int, seed: int) -> tuple[str, str, str]:
    if clip.prompt is not None and clip.target is not None:
        prompt = clip.prompt[row]
        return (prompt if PLACE in prompt else f"{PLACE}\n{prompt}"), clip.target[row], "given"
    rng = draw(seed, step, clip.keys[row])
    caption = plain(clip.text[row]) if clip.text else ""
    questions = [question for question in (clip.qa[row] if clip.qa else None) or [] if is_question(question)]
    able = {"caption": bool(caption), "qa": bool(questions), "reconstruction": bool(caption)}
    shares = [getattr(config, task) * able[task] for task in TASKS]
    if not sum(shares):
        return PLACE, "", ""
    (task,) = rng.choices(TASKS, shares)
    template = rng.choice(getattr(config, f"{task}_prompts"))
    if task != "qa":
        return template, caption, task
    question = rng.choice(questions)
    return ask_as(template, question), str(question["answer"]), task


def is_question(entry: Any) -> bool:
    """Whether an entry of a sample's `qa` can be asked: it has a question and an answer, which may be 0 or false."""
    if not isinstance(entry, dict) or not entry.get("question"):
        return False
    answer = entry.get("answer")
    return bool(answer) or isinstance(answer, (int, float))


def some_questions(clip: Clip, most: int, *, seed: int) -> Clip:
    """The clips with `most` of their questions each, at most, in their order; a clip's are the same in any batch."""
    kept = []
    for key, row in zip(clip.keys, clip.qa or [None] * len(clip)):
        able = [at for at, entry in enumerate(row or []) if is_question(entry)]
        at = sorted(draw(seed, 0, f"questions {key}").sample(able, min(most, len(able))))
        kept.append([(row or [])[i] for i in at])
    return replace(clip, qa=kept)


def draw(seed: int, step: int, name: str) -> random.Random:
    """A generator of its own for each (seed, step, name)."""
    return random.Random(int.from_bytes(blake2b(f"{seed}:{step}:{name}".encode(), digest_size=8).digest(), "big"))


def ask_as(template: str, question: dict[str, Any]) -> str:
    """A prompt with the question, and its choices where the template asks for them."""
    offered = ", ".join(str(choice) for choice in question.get("choices") or [])
    return template.replace(CHOICES, plain(offered)).replace(QUESTION, plain(str(question["question"])))


def instruction(prompt: str) -> str:
    """A prompt without the place of the video."""
    return " ".join(piece.strip() for piece in prompt.split(PLACE) if piece.strip())


def plain(text: str) -> str:
    """A clip's text without what would be taken for the place of a video."""
    return text.replace(PLACE, " ").strip()
