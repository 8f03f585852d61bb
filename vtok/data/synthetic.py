"""A procedural corpus: real mp4 files of moving textured shapes, with captions and questions true by construction.

1. `scene(seed, index)` draws everything that is true of a clip (`synthetic_scenes.py`, needles in
   `synthetic_needles.py`). No pixels.
2. `render(scene)` turns it into frames one by one (`synthetic_pixels.py`): a clip of any length needs the memory of
   one shot's background.
3. `Scene.captions` and `Scene.questions` read the same truth.
4. `render_map(scene)` makes a dense map of the same truth (`synthetic_maps.py`).
5. `write_corpus(out)` encodes clips in parallel and writes `captions.jsonl`, which `vtok shards` takes as it is.

A clip is a pure function of (seed, index, level, seconds, size, ...), a frame one of (scene, frame number).
Give corpora that will be mixed different seeds: seed and index name a clip.
"""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vtok.data.encode import write_video
from vtok.data.synthetic_maps import MAP_CHANNELS, check_map_settings, render_map, write_map
from vtok.data.synthetic_needles import Needle, Series
from vtok.data.synthetic_pixels import render
from vtok.data.synthetic_scenes import LEVELS, QUESTION_TYPES, Level, Scene, Shot, Thing, scene, scene_of
from vtok.data.workers import Notify, WorkerError, Workers, cores

__all__ = ["LEVELS", "MAP_CHANNELS", "QUESTION_TYPES", "Level", "Needle", "Scene", "Series", "Shot", "Thing"]
__all__ += ["render", "render_map", "scene", "scene_of", "write_corpus", "write_scene"]


def write_scene(scene: Scene, path: Path, *, crf: int = 14, preset: str = "veryfast") -> None:
    """Encode a scene as H.264 (4:2:0) mp4: written aside, then renamed. Equal scenes are equal bytes."""
    aside = path.with_name(f".{path.name}.part")
    # Random windows are decoded from a keyframe at most 2 s before them.
    options = {"preset": preset, "g": str(max(1, round(2 * scene.fps)))}
    write_video(aside, render(scene), fps=scene.fps, crf=crf, options=options, container="mp4")
    os.replace(aside, path)


Job = tuple[dict[str, Any], Path, str, str | None, int, dict[str, Any]]


def _write_some(jobs: list[Job], lost: dict[str, str], notify: Notify) -> list[dict[str, Any]]:
    rows = []
    for job in jobs:
        notify(job[2])
        if job[2] in lost:  # nothing here can be left out: the corpus is a function of its seed
            raise WorkerError(f"{job[2]}: {lost[job[2]]}")
        rows.append(_write_one(job))
    return rows


def _write_one(job: Job) -> dict[str, Any]:
    arguments, out, file, split, crf, dense = job
    made = scene(**arguments)
    write_scene(made, out / file, crf=crf)
    row = made.row(file, split=split)
    if dense["size"] is not None:
        row["map"] = str(Path(file).with_suffix(".npy"))
        write_map(made, out / row["map"], **dense)
    return row


def write_corpus(
    out: Path | str,
    *,
    clips: int,
    seed: int = 0,
    seconds: float | tuple[float, float] = 4.0,
    size: tuple[int, int] = (128, 128),
    fps: float | Fraction = 12,
    complexity: tuple[int, int] = (0, len(LEVELS) - 1),
    val_fraction: float = 0.1,
    first: int = 0,
    shots: int | None = None,
    needles: int | None = None,
    needle_shapes: int = 1,
    questions_per_type: int = 1,
    crf: int = 14,
    map_size: tuple[int, int] | None = None,
    map_dtype: str = "uint8",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `clips` mp4 files under out/train and out/val, and out/captions.jsonl; with map_size, a map beside each.

    Args:
        seconds: length of every clip, or (low, high): uniform in between.
        complexity: lowest and highest level, in turn over the clips.
        val_fraction: share of the clips, the last ones, that make the split "val".
        first: index of the first clip: clips `first ... first + clips - 1` of this seed are made.
        shots, needles, needle_shapes, questions_per_type: as in `scene`; videos that nothing but their needles is asked
            about are `seconds=64, shots=64, fps=4, needles=6, needle_shapes=4, questions_per_type=0`.
        crf: x264 quality, lower is cleaner.
        map_size, map_dtype: (H, W) and uint8, float16 or float32 of dense maps [T, H, W, MAP_CHANNELS], named in the
            manifest's `map`; None writes none. Their bytes are T x H x W x MAP_CHANNELS x (1, 2 or 4).
        workers: processes; None: one a core. Only a script's `if __name__ == "__main__":` may call with several.
    Returns: the path of captions.jsonl.
    Raises: ValueError on arguments out of range, before anything is written.
    """
    out = Path(out)
    check_map_settings(map_size, map_dtype)
    low, high = complexity
    shortest, longest = seconds if isinstance(seconds, tuple) else (seconds, seconds)
    if clips < 1:
        raise ValueError(f"clips={clips}: ask for at least 1")
    if not 0 <= low <= high < len(LEVELS):
        raise ValueError(f"complexity={complexity}: give (lowest, highest) within 0 to {len(LEVELS) - 1}")
    if not 0 <= val_fraction <= 1:
        raise ValueError(f"val_fraction={val_fraction}: give a share between 0 and 1")
    if not 0 <= shortest <= longest:
        raise ValueError(f"seconds={seconds}: give a length, or (shortest, longest)")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: ask for at least 1, or None for one a core")
    train = clips - round(val_fraction * clips)
    jobs = []
    for place in range(clips):
        index, split = first + place, "train" if place < train else "val"
        length = shortest
        if longest > shortest:
            length = float(np.random.default_rng([seed, index, 4]).uniform(shortest, longest))
        arguments: dict[str, Any] = {"seed": seed, "index": index, "level": low + index % (high - low + 1)}
        arguments |= {"seconds": length, "size": size, "fps": fps, "shots": shots, "needles": needles}
        arguments |= {"needle_shapes": needle_shapes, "questions_per_type": questions_per_type}
        dense = {"size": map_size, "dtype": map_dtype}
        jobs.append((arguments, out, f"{split}/{seed:04d}_{index:06d}.mp4", split, crf, dense))
    scene(**jobs[0][0])  # bad arguments fail here, before a folder or a process is made
    for split in {job[3] for job in jobs}:
        (out / split).mkdir(parents=True, exist_ok=True)
    workers = min(workers or cores(), clips)
    size_of_task = min(8, -(-clips // (4 * workers)))
    tasks = [(jobs[at : at + size_of_task],) for at in range(0, clips, size_of_task)]
    with Workers(workers if workers > 1 else 0, progress=progress) as pool:
        rows = [row for made in pool.run(_write_some, tasks, title="synthetic clips", total=clips) for row in made]
    manifest = out / "captions.jsonl"
    aside = manifest.with_name(".captions.jsonl.part")
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, manifest)
    return manifest
