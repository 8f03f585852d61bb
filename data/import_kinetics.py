"""Kinetics (csv annotations and downloaded clips) to a manifest for `vtok shards`.

    python data/import_kinetics.py /data/kinetics400 train.csv val.csv --out manifest.jsonl

Annotations are label, youtube_id, time_start, time_end, split (Kay et al. 2017, https://arxiv.org/abs/1705.06950; the
test csv has no label). Clips are found by name anywhere under the folder: <split>/<label>/<id>_000010_000020.mp4, flat
folders, and labels spelt with underscores. An untrimmed <id>.mp4 is taken with start_s and end_s. The YouTube id is the
`source`. Without a csv, split and label are the names of the folders.
"""

import argparse
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok.data.manifest import Written, read_csv, run, write_manifest

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
NAME = re.compile(r"(?P<id>.+)_(?P<start>\d{6})_(?P<end>\d{6})")


def find_clips(root: Path) -> dict[str, list[Path]]:
    """Every video under `root` by its name without suffix."""
    found = defaultdict(list)
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES:
                found[stem].append(Path(folder) / file)
    return found


def csv_rows(root: Path, table: Path, clips: dict[str, list[Path]]) -> Iterator[dict[str, Any]]:
    """A manifest row for each line of the csv; a clip that is not on disk has the path where it is usually put."""
    for line in read_csv(table, columns=("youtube_id", "time_start", "time_end", "split")):
        label, video = line.get("label") or None, line["youtube_id"]
        split = SPLITS.get(line["split"].strip().lower())
        start, end = float(line["time_start"]), float(line["time_end"])
        stem = f"{video}_{int(start):06d}_{int(end):06d}"
        if split is None:
            raise ValueError(f"{table}: split={line['split']!r} of {stem} is unknown; known are {', '.join(SPLITS)}")
        row: dict[str, Any] = {"label": label, "split": split, "source": video}
        if clips.get(stem):
            yield {"path": _nearest(clips[stem], root, split, label), **row}
        elif clips.get(video):
            yield {"path": _nearest(clips[video], root, split, label), **row, "start_s": start, "end_s": end}
        else:
            yield {"path": root / line["split"] / (label or "") / f"{stem}.mp4", **row}


def _nearest(paths: list[Path], root: Path, split: str, label: str | None) -> Path:
    """Of files of one name, that whose folders name the split and the label."""

    def score(path: Path) -> int:
        parts = [part.lower().replace("_", " ") for part in path.relative_to(root).parts[:-1]]
        return (label is not None and label.lower().replace("_", " ") in parts) + (split in map(SPLITS.get, parts))

    return max(paths, key=score)


def folder_rows(root: Path, clips: dict[str, list[Path]]) -> Iterator[dict[str, Any]]:
    """Rows from <split>/<label>/<clip> or <label>/<clip> alone."""
    for stem, paths in clips.items():
        match = NAME.fullmatch(stem)
        for path in paths:
            folders = path.relative_to(root).parts[:-1]
            split = SPLITS.get(folders[0].lower()) if folders else None
            labels = folders[1:] if split else folders
            label = labels[-1].replace("_", " ") if labels else None
            yield {"path": path, "label": label, "split": split, "source": match["id"] if match else stem}


def import_kinetics(root: Path, tables: list[Path], out: Path, *, progress: bool = True) -> Written:
    """Write the manifest of a Kinetics folder; see the module's docstring. Files that no csv names are not imported."""
    clips = find_clips(root)
    rows = (row for table in tables for row in csv_rows(root, table, clips)) if tables else folder_rows(root, clips)
    return write_manifest(rows, out, progress=progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the downloaded clips")
    parser.add_argument("tables", nargs="*", type=Path, help="csv annotations")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write (jsonl)")
    return run(parser, import_kinetics)


if __name__ == "__main__":
    raise SystemExit(main())
