"""UCF101 (class folders and the official lists) to a manifest for `vtok shards`.

    python data/import_ucf101.py UCF-101 --lists ucfTrainTestlist --fold 1 --out manifest.jsonl

Files are <Class>/v_<Class>_gXX_cYY.avi (Soomro et al. 2012, https://arxiv.org/abs/1212.0402). Clips of one group gXX of
a class were cut from the same recording, so the group is the `source`: it never falls on both sides of a split. The
test list is the validation split (`--test-as` changes that); without lists, `vtok shards` splits by group.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok.data.manifest import Written, run, write_manifest

NAME = re.compile(r"v_(?P<label>.+)_g(?P<group>\d+)_c(?P<clip>\d+)\.avi", re.IGNORECASE)


def read_list(path: Path) -> list[str]:
    """The <Class>/<file> names of a list; train lists carry a class number after each, test lists do not."""
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            name = line.split()[0].replace("\\", "/")
            if name.count("/") != 1:
                raise ValueError(f"{path}:{number}: expected <Class>/<file>.avi, got {line!r}")
            names.append(name)
    return names


def to_row(root: Path, name: str, *, split: str | None) -> dict[str, Any]:
    """The manifest row of <Class>/<file>; the folder is the label (one class is spelt otherwise in its file names)."""
    label, file = name.split("/")
    match = NAME.fullmatch(file)
    if not match:
        return {"path": root / name, "reason": "the name is not v_<Class>_gXX_cYY.avi, so its group is not known"}
    return {"path": root / name, "label": label, "source": f"{label}_g{match['group']}", "split": split}


def ucf101_rows(
    root: Path, *, lists: Path | None = None, fold: int = 1, test_as: str = "val"
) -> Iterator[dict[str, Any]]:
    """Rows of the listed files, then of files on disk that no list names (with a `reason`); without lists, of all."""
    splits: dict[str, str | None] = {}
    if lists is not None:
        for kind, split in (("train", "train"), ("test", test_as)):
            for name in read_list(lists / f"{kind}list{fold:02d}.txt"):
                if splits.setdefault(name, split) != split:
                    raise ValueError(f"{name} is in both lists of fold {fold} under {lists}")
    for name, split in splits.items():
        yield to_row(root, name, split=split)
    for path in sorted(root.glob("*/*.avi")):
        name = path.relative_to(root).as_posix()
        if name not in splits:
            row = to_row(root, name, split=None)
            yield row if lists is None else {"reason": f"in no list of fold {fold}", **row}


def import_ucf101(
    root: Path, out: Path, *, lists: Path | None = None, fold: int = 1, test_as: str = "val", progress: bool = True
) -> Written:
    """Write the manifest of a UCF101 folder; see the module's docstring."""
    return write_manifest(ucf101_rows(root, lists=lists, fold=fold, test_as=test_as), out, progress=progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of the class folders")
    parser.add_argument("--lists", type=Path, help="folder of trainlist01.txt, testlist01.txt ...")
    parser.add_argument("--fold", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--test-as", choices=("val", "test"), default="val", help="split of the test list")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write (jsonl)")
    return run(parser, import_ucf101)


if __name__ == "__main__":
    raise SystemExit(main())
