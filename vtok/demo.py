"""`vtok demo`: from videos to a report in one command, through the same steps a user would type.

videos (or a procedural corpus) -> vtok shards -> vtok train -> vtok export -> vtok eval -> report.html
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from vtok import config as configuration
from vtok.data import shards, synthetic

PRESET = Path(__file__).parent.parent / "configs" / "flexible" / "demo.yaml"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vtok demo", description=__doc__)
    parser.add_argument("--videos", type=Path, help="folder of videos to train on; a procedural corpus when left out")
    parser.add_argument("--val", type=Path, help="folder of held-out videos; a tenth of --videos when left out")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes")
    parser.add_argument("--config", type=Path, default=PRESET)
    parser.add_argument("--clips", type=int, default=320, help="clips of the procedural corpus")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    options = parser.parse_args(argv)
    if options.val and not options.videos:
        raise ValueError(f"--val={options.val} without --videos: name the folder of training videos too")
    for name in ("videos", "val"):
        folder = getattr(options, name)
        if folder is not None and not folder.exists():
            raise FileNotFoundError(f"--{name}={folder} does not exist")
    started = time.monotonic()
    overrides = [f"out={options.out}", "name=run", *options.overrides]
    settings = configuration.load(options.config, overrides)  # a wrong setting fails before any work
    training, validation = _pack(options, settings)
    run = options.out / "run"
    export = options.out / "export"
    _say(2, f"training for at most {settings.trainer.max_minutes} minutes")
    from vtok import train

    found = [f"data.shards={training}", f"data.val_shards={validation}"]
    train.train(configuration.load(options.config, [*overrides, *found]))
    _say(3, "measuring, beside controls and codecs")
    from vtok import evaluate
    from vtok.export import main_export

    _run(evaluate.main, [str(run), "--out", str(run / "eval")])
    _say(4, "exporting")
    _run(main_export, [str(run), "--out", str(export)])
    minutes = (time.monotonic() - started) / 60
    print(f"\ndone in {minutes:.1f} minutes")
    print(f"  report   {run / 'eval' / 'report.html'}")
    print(f"  table    {run / 'eval' / 'eval.json'}")
    print(f"  model    {export}   (vtok.load({str(export)!r}); vtok encode {export} VIDEO --out FILE.vtok)")
    return 0


def _pack(options: argparse.Namespace, settings: configuration.RunConfig) -> tuple[Path, Path]:
    """Shards of the caller's videos or of a procedural corpus: the folders of training and validation shards."""
    out: Path = options.out
    given = [options.videos and options.videos.resolve(), options.val and options.val.resolve(), options.clips]
    stamp = out / "videos.txt"
    if stamp.exists() and stamp.read_text() != str(given):
        raise ValueError(f"--out={out} holds a demo of other videos ({stamp}); name another folder, or remove that one")
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(str(given))
    if options.videos is None:
        _say(1, f"writing a procedural corpus of {options.clips} clips, and packing it")
        source = synthetic.write_corpus(out / "corpus", clips=options.clips, seed=settings.seed)
    else:
        _say(1, f"packing {options.videos} into shards")
        source = options.videos
    # two cores cannot decode large video as fast as a small model learns from it: small copies to train on
    small = ["--short-side", str(max(settings.data.size) * 3 // 2), "--crf", "10"]
    if options.val is None:
        _run(shards.main, [str(source), "--out", str(out / "shards"), *small])
        return out / "shards" / "train", out / "shards" / "val"
    _run(shards.main, [str(source), "--out", str(out / "shards-train"), "--split", "train", *small])
    _run(shards.main, [str(options.val), "--out", str(out / "shards-val"), "--split", "val"])
    return out / "shards-train" / "train", out / "shards-val" / "val"


def _run(command: Callable[[list[str]], object], argv: list[str]) -> None:
    """One command of vtok's; a status other than 0 ends the demo with it."""
    status = command(argv)
    if status:
        raise SystemExit(status)


def _say(step: int, what: str) -> None:
    print(f"\n[{step}/4] {what}", flush=True)
