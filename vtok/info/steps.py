"""Words that a small language model writes one after the other, counted without taking every step.

A step reads one position more than the one before it, and otherwise does the same: on a cache that keeps every position
as it is, the operations of a step, and what is held at each of its moments, grow by the same amount from step to step.
Two steps are taken; those after them are told from these, to the number. Caches that forget (sliding windows) or that
are no lists of positions (state spaces), steps that do not go as the two before them went, and models so small that
their words are followed (`DryRun`) go the long way.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtok.info.dry_run import FOLLOWED, Watch
from vtok.llm.small import SmallReader


@dataclass
class _Step:
    """operations: by kind. held: bytes above those at the step's begin, after each thing that it made."""

    operations: dict[Any, int] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)


@dataclass
class _Course:
    """What is known of the steps on one cache. told: how many were told, after those taken. made: shape and type of the
    logits and states of each."""

    taken: list[_Step] = field(default_factory=list)
    told: int = 0
    made: list[tuple[torch.Size, torch.dtype]] = field(default_factory=list)

    @property
    def known(self) -> bool:
        return len(self.taken) == 2 and len(self.taken[0].held) == len(self.taken[1].held)


class Steps:
    """`with Steps(watch).in_place(): ...`: while active, small language models write so.

    taken, told: how many steps on a cache went through a model, and how many did not.
    """

    def __init__(self, watch: Watch):
        self.watch, self.taken, self.told = watch, 0, 0
        self._courses: weakref.WeakKeyDictionary[Any, _Course] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        reading: Any = SmallReader
        original = reading.speak

        def speak(
            reader: Any, embeds: Tensor, mask: Tensor, *, cache: Any = None, **asked: Any
        ) -> tuple[Tensor, Tensor, Any]:
            if cache is None or torch.is_grad_enabled() or embeds.shape[1] != 1 or not _keeps_all(cache):
                return original(reader, embeds, mask, cache=cache, **asked)
            course = self._courses.setdefault(cache, _Course())
            if course.known:
                self.told, course.told = self.told + 1, course.told + 1
                self._tell(course)
                return self._next(course, cache)
            self.taken += 1
            with self._counted() as step:
                out = original(reader, embeds, mask, cache=cache, **asked)
            if len(course.taken) < 2 and out[0].numel() > FOLLOWED:
                course.taken.append(step)
                course.made = [(made.shape, made.dtype) for made in out[:2]]
            return out

        reading.speak = speak
        try:
            yield
        finally:
            reading.speak = original

    @contextlib.contextmanager
    def _counted(self) -> Iterator[_Step]:
        """The step that is taken while active. What circles of Python objects hold is let go before, and not during it:
        it would be taken for something that changes from step to step."""
        step, counter, live = _Step(), self.watch.counter, self.watch.live
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        before = dict(counter.flop_counts["Global"]) if counter else {}
        begin = live.now if live else 0
        if live:
            live.trace = []
        try:
            yield step
        finally:
            if collects:
                gc.enable()
        if counter:
            step.operations = {k: n - before.get(k, 0) for k, n in counter.flop_counts["Global"].items()}
        if live:
            step.held, live.trace = [now - begin for now in live.trace or []], None

    def _tell(self, course: _Course) -> None:
        """Counts the next step of a course."""
        (first, second), counter, live = course.taken, self.watch.counter, self.watch.live
        if counter:
            for kind, count in second.operations.items():
                grown = count - first.operations.get(kind, 0)
                counter.flop_counts["Global"][kind] += count + course.told * grown
        if live:
            above = (b + course.told * (b - a) for a, b in zip(first.held, second.held))
            live.peak = max(live.peak, live.now + max(above, default=0))

    @staticmethod
    def _next(course: _Course, cache: Any) -> tuple[Tensor, Tensor, Any]:
        """What a step gives: logits, states, and another position in the cache."""
        for layer in cache.layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                setattr(layer, name, held.new_empty((*held.shape[:-2], held.shape[-2] + 1, held.shape[-1])))
        logits, states = (cache.layers[0].keys.new_empty(shape, dtype=dtype) for shape, dtype in course.made)
        return logits, states, cache


def _keeps_all(cache: Any) -> bool:
    """Whether a cache of transformers keeps keys and values of every position, and nothing else."""
    layers = getattr(cache, "layers", None) or []
    kinds = {type(cache).__name__, *(type(layer).__name__ for layer in layers)}
    return kinds == {"DynamicCache", "DynamicLayer"}
