"""WebVid-style csv (videoid, contentUrl, duration, page_dir, name) to a manifest for `vtok shards`.

    python data/import_webvid.py results_2M_train.csv --videos /data/webvid/videos --split train --out manifest.jsonl

Downloaded files lie at <videos>/<page_dir>/<videoid>.mp4 (Bain et al. 2021, https://arxiv.org/abs/2104.00650); flat
folders <videos>/<videoid>.mp4 are read too. `name` is the caption.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok.data.manifest import Written, read_csv, run, write_manifest


def webvid_rows(table: Path, videos: Path, *, split: str | None = None) -> Iterator[dict[str, Any]]:
    """A manifest row for each line of the csv."""
    for line in read_csv(table, columns=("videoid", "page_dir", "name")):
        file = line["videoid"] + ".mp4"
        nested, flat = videos / line["page_dir"] / file, videos / file
        path = flat if flat.is_file() and not nested.is_file() else nested
        yield {"path": path, "source": line["videoid"], "caption": line["name"].strip(), "split": split}


def import_webvid(table: Path, out: Path, *, videos: Path, split: str | None = None, progress: bool = True) -> Written:
    """Write the manifest of a csv; see the module's docstring."""
    return write_manifest(webvid_rows(table, videos, split=split), out, progress=progress)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="csv")
    parser.add_argument("--videos", type=Path, required=True, help="folder of the downloaded videos")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write (jsonl)")
    parser.add_argument("--split", choices=("train", "val", "test"), help="else `vtok shards` splits by source")
    return run(parser, import_webvid)


if __name__ == "__main__":
    raise SystemExit(main())
