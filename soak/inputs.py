"""A thousand changed inputs of every kind vtok reads, drawn in turn, and the sound ones they are copies of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from soak import judge
from soak.corpus import Corpus
from soak.damage import Case, config_cases, video_cases, video_files
from soak.damage_folders import checkpoint_cases, export_cases, hostile_cases, verified_cases
from soak.damage_vtok import vtok_cases
from soak.readers import readers

# Kinds of inputs, how many of a hundred are of it, and where they come from.
KINDS: dict[str, tuple[int, Callable[[Corpus, int], Iterator[Case]]]] = {
    "vtok": (30, vtok_cases),
    "shards, verified": (15, verified_cases),
    "shards, in training": (15, hostile_cases),
    "export": (12, export_cases),
    "video": (12, video_cases),
    "config": (10, config_cases),
    "checkpoint": (6, checkpoint_cases),
}


def cases(corpus: Corpus, count: int, seed: int, *, kinds: tuple[str, ...] = ()) -> list[Case]:
    """About `count` cases, at least one of every kind asked for (all of them, unless `kinds` names some)."""
    wanted = {name: KINDS[name] for name in kinds or KINDS}
    total = sum(share for share, _ in wanted.values())
    out: list[Case] = []
    for share, made in wanted.values():
        out += islice(made(corpus, seed), max(1, round(count * share / total)))
    return out


def sound_inputs(corpus: Corpus, folder: Path) -> dict[str, Path]:
    """What `judge.original` finds the sound inputs by."""
    folder.mkdir(parents=True, exist_ok=True)
    files = video_files(corpus)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {
        "vtok/packed.vtok": corpus.vtok["packed"],
        "vtok/static.vtok": corpus.vtok["static"],
        **{f"video/{name}": folder / name for name in files},
        "shards, verified": corpus.shards,
        "shards, in training": corpus.shards,
        "export": corpus.export,
        "config": corpus.config,
        "checkpoint": corpus.run,
    }


def judged(
    corpus: Corpus, count: int, seed: int, *, kinds: tuple[str, ...] = (), child: bool = True
) -> list[judge.Verdict]:
    sound = sound_inputs(corpus, corpus.scratch("sound"))
    return judge.judge(cases(corpus, count, seed, kinds=kinds), readers(corpus), sound, child=child)
