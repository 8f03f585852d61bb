"""`vtok info`: a few lines on a run, an export, a config or a `.vtok` file, and what training by a config takes.

What knows of training, and brings Lightning, is imported for runs and configs alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from vtok.coding.bitstream import MAGIC, Reader, read_footer
from vtok.config import load, to_yaml
from vtok.loading import is_run, read_config


def main(argv: list[str]) -> None:
    """`vtok info CONFIG.yaml [key=value ...] [--json | --yaml]`, or a run, an export, a `.vtok` file."""
    parser = argparse.ArgumentParser(
        prog="vtok info", description="What a run, an export or a .vtok file holds; what training by a config takes."
    )
    parser.add_argument("path", help="run directory, export, .vtok file, or CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--answer-words", type=int, help="of the captions or texts that projectors learn")
    parser.add_argument("--json", action="store_true", help="of a config or a run, as json")
    parser.add_argument("--yaml", action="store_true", help="of a config: every setting, nothing is estimated")
    args = parser.parse_args(argv)
    path = Path(args.path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        if args.overrides or args.yaml or (args.json and not is_run(path)):
            raise ValueError(f"{path} is no config (.yaml): key=value, --json and --yaml are for those")
        if args.json:
            from vtok.info.run_info import summary

            print(json.dumps(summary(path), indent=2))
        else:
            print(describe(path))
        return
    config = load(path, args.overrides)
    if args.yaml:
        print(to_yaml(config).rstrip())
        return
    from vtok.info.estimate import estimate, table

    with contextlib.redirect_stdout(None):  # what a start of a run would tell
        found = estimate(config, answer_words=args.answer_words)
    print(json.dumps(found.values(), indent=2) if args.json else table(found))


def describe(path: str | Path) -> str:
    """A few lines on a run directory, an export, a config or a .vtok file.

    Raises: ValueError where it is none of these. FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        if not is_run(path):
            return _describe_export(path)
        from vtok.info.run_info import summary, text

        return text(summary(path))
    if not path.is_file():
        raise FileNotFoundError(f"no such file or folder: {path}")
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
    if start == MAGIC or path.suffix == ".vtok":
        return _describe_vtok(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is no run directory, export, config (.yaml) or .vtok file")
    return to_yaml(load(path)).rstrip()


def _describe_export(path: Path) -> str:
    facts = read_config(path)
    names = ("family", "model_id", "weights_sha256", "entropy_sha256", "prior_sha256", "vtok_version")
    lines = [f"export {path}", *(f"  {name:<15} {facts.get(name) or '-'}" for name in names)]
    lines += [f"  {'model.' + key:<22} {value}" for key, value in facts["model"].items()]
    return "\n".join(lines)


def _describe_vtok(path: Path) -> str:
    with open(path, "rb") as file:
        header = Reader(file, name=str(path)).header
        footer = read_footer(file, name=str(path))
    size = path.stat().st_size
    duration = float(footer.frames / header.fps)
    limit = "all tokens" if not header.budget else f"at most {header.budget} tokens a group"
    if header.tokens_per_second:
        limit = f"at most {float(header.tokens_per_second):g} tokens/s"
    if header.asked:
        limit = f"chosen for {header.asked}={float(header.asked_value):g}"
        limit += (
            ""
            if header.asked not in ("tokens", "bytes") or header.look_ahead is None
            else (f", {header.look_ahead} groups ahead")
        )
    return "\n".join(
        [
            f".vtok file {path} (records are not checked here; decoding checks them)",
            f"  model         {header.model_id}, key {header.key.hex()}",
            f"  video         {footer.frames} frames of {header.size[1]}x{header.size[0]} at {header.fps} frames/s, "
            f"{duration:.2f} s",
            f"  tokens        {footer.tokens} in {footer.groups} groups ({limit}), codebooks {header.codebook_sizes}",
            f"  coding        {header.coding}",
            f"  size          {size} bytes" + (f", {size * 8 / duration / 1000:.3f} kbit/s" if duration else ""),
        ]
    )
