"""LLaVA-style conversations (json, jsonl, or a yaml that lists them) to a manifest for `vtok shards`.

    python data/import_llava.py video_mix.yaml --video-folder /data/videos --out manifest.jsonl

An entry is {"id", "video" or "image": file, "conversations": [{"from": "human", "value": "<video>\\nWhat ...?"},
{"from": "gpt", "value": "..."}, ...]}; turns as {"role": "user" | "assistant", "content"} are read too. Each pair of
turns becomes one question and answer, placeholders removed. A yaml holds `datasets: [{json_path, sampling_strategy}]`
with all, first:N, end:N or random:N, N a count or a percentage, as LLaVA-OneVision and LLaVA-Video are trained.
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from vtok.data.manifest import Written, run, write_manifest

PLACEHOLDER = re.compile(r"\s*<(?:image|video|audio|speech)>\s*")
ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer"}


def load_entries(path: Path, *, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The entries of a json, jsonl or yaml file, sampled as the yaml says (random: seeded, order kept).

    Raises: ValueError naming the file and what is wrong in it.
    """
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        datasets = content.get("datasets") if isinstance(content, dict) else None
        if not isinstance(datasets, list):
            raise ValueError(f"{path} has no list `datasets`; expected datasets: [{{json_path, sampling_strategy}}]")
        for number, dataset in enumerate(datasets):
            if not isinstance(dataset, dict) or not isinstance(dataset.get("json_path"), str):
                raise ValueError(f"{path}: datasets[{number}]={dataset!r} has no json_path")
            listed = Path(dataset["json_path"])
            source = path.parent / listed if (path.parent / listed).exists() else listed
            strategy = str(dataset.get("sampling_strategy", "all"))
            yield from sample(list(load_entries(source)), strategy, seed=seed + number, where=f"{path}: {listed}")
    elif suffix in (".json", ".jsonl"):
        text = path.read_text(encoding="utf-8-sig")
        try:
            entries = json.loads(text) if suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
        except ValueError as error:
            raise ValueError(f"{path} is not {suffix[1:]}: {error}") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} does not hold a list of objects")
        yield from entries
    else:
        raise ValueError(f"{path}: expected a .json, .jsonl or .yaml file")


def sample(entries: list[dict[str, Any]], strategy: str, *, seed: int, where: str) -> list[dict[str, Any]]:
    """The part of `entries` that all, first:N, end:N or random:N asks for; N% is rounded up."""
    match = re.fullmatch(r"(first|end|random):(\d+(?:\.\d+)?)(%?)", strategy.replace(" ", ""))
    if strategy == "all":
        return entries
    if not match or (not match[3] and "." in match[2]):
        raise ValueError(f"{where}: sampling_strategy={strategy!r}; use all, first:N, end:N or random:N (N or N%)")
    count = math.ceil(float(match[2]) * len(entries) / 100) if match[3] else int(match[2])
    count = min(count, len(entries))
    if match[1] == "random":
        chosen = sorted(random.Random(seed).sample(range(len(entries)), count))
        return [entries[i] for i in chosen]
    return entries[:count] if match[1] == "first" else entries[len(entries) - count :]


def conversation(turns: Any, *, name: str) -> list[dict[str, str]]:
    """[{id, type, question, answer}] of a conversation; what precedes the first human turn is a system text, left out.

    Raises: ValueError when turns do not alternate or one is not text.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations is not a list of turns")
    said = [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in turns]
    while said and ROLES.get(str(said[0][0])) != "question":
        said.pop(0)
    if not said or len(said) % 2:
        raise ValueError(f"{len(said)} turns from the first human one on: expected pairs of human and gpt")
    out = []
    for number, (human, gpt) in enumerate(zip(said[::2], said[1::2])):
        if ROLES.get(str(human[0])) != "question" or ROLES.get(str(gpt[0])) != "answer":
            raise ValueError(f"turns {2 * number} and {2 * number + 1} come from {human[0]!r} and {gpt[0]!r}")
        if not isinstance(human[1], str) or not isinstance(gpt[1], str):
            raise ValueError(f"turn {2 * number} or its answer is not text")
        question = PLACEHOLDER.sub(lambda m: " " if 0 < m.start() and m.end() < len(m.string) else "", human[1])
        answer = gpt[1].strip()
        out.append({"id": f"{name}-{number}", "type": "open", "question": question.strip(), "answer": answer})
    return out


def to_row(entry: dict[str, Any], *, video_folder: Path, image_folder: Path, caption: str = "none") -> dict[str, Any]:
    """A manifest row; an entry that is not one clip gets a `reason`. caption: "none", or "first" answer."""
    media, folder = (entry["video"], video_folder) if entry.get("video") else (entry.get("image"), image_folder)
    media = media[0] if isinstance(media, list) and len(media) == 1 else media
    name = str(entry.get("id", media))
    if not media:
        return {"id": name, "reason": "text only: no image or video"}
    if not isinstance(media, str):
        return {"id": name, "path": json.dumps(media), "reason": "several images or videos in one conversation"}
    row: dict[str, Any] = {"path": folder / media, "source": media, "id": name}
    try:
        row["qa"] = conversation(entry.get("conversations", entry.get("messages")), name=name)
    except ValueError as error:
        return {**row, "reason": str(error)}
    if caption == "first":
        row["caption"] = row["qa"][0]["answer"]
    return row


def import_llava(
    inputs: list[Path],
    out: Path,
    *,
    video_folder: Path,
    image_folder: Path | None = None,
    split: str | None = None,
    caption: str = "none",
    seed: int = 0,
    progress: bool = True,
) -> Written:
    """Write the manifest of all entries of `inputs`; see the module's docstring."""
    folders = {"video_folder": video_folder, "image_folder": image_folder or video_folder}
    entries = (entry for path in inputs for entry in load_entries(path, seed=seed))
    rows = ({**to_row(entry, caption=caption, **folders), "split": split} for entry in entries)
    return write_manifest(rows, out, progress=progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help=".json, .jsonl or .yaml")
    parser.add_argument("--video-folder", type=Path, required=True, help="what `video` paths are relative to")
    parser.add_argument("--image-folder", type=Path, help="what `image` paths are relative to; else the video folder")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write (jsonl)")
    parser.add_argument("--split", choices=("train", "val", "test"), help="else `vtok shards` splits by source")
    parser.add_argument("--caption", choices=("none", "first"), default="none", help="first: the first answer")
    parser.add_argument("--seed", type=int, default=0, help="of random:N sampling")
    return run(parser, import_llava)


if __name__ == "__main__":
    raise SystemExit(main())
