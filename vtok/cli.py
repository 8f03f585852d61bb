"""`vtok COMMAND ...`: one line per command, imported when asked for, so that `vtok --help` costs nothing."""

from __future__ import annotations

import importlib
import logging
import sys

COMMANDS = {
    "shards": ("vtok.data.shards:main", "pack videos into WebDataset shards, or --verify them"),
    "features": ("vtok.features:main", "what a frozen tower makes of shards: SHARDS --tower NAME --out DIR"),
    "train": ("vtok.train:main", "train: CONFIG.yaml [key=value ...]"),
    "eval": ("vtok.evaluate:main", "measure a run or an export beside its controls and real codecs"),
    "compare": ("vtok.evaluation.compare:main", "two models on the same held-out clips: BEFORE AFTER [--old SHARDS]"),
    "export": ("vtok.export:main_export", "one folder that loads anywhere: RUN --out DIR [--push USER/REPO]"),
    "encode": ("vtok.coding.codec:main_encode", "MODEL VIDEO --out FILE.vtok"),
    "decode": ("vtok.coding.codec:main_decode", "MODEL FILE.vtok --out VIDEO"),
    "tokenize": (
        "vtok.coding.tokenize:main",
        "shards of video into shards of token ids: SHARDS --model EXPORT --out DIR",
    ),
    "prior": ("vtok.coding.prior:main", "an autoregressive prior for --coding ar and sampling: TOKENS --model EXPORT"),
    "sample": ("vtok.coding.sample:main", "videos drawn from an export's prior: EXPORT --out DIR"),
    "quantize": ("vtok.ptq:main", "ids for a trained continuous tokenizer, without training: RUN --out DIR"),
    "calibrate": (
        "vtok.coding.calibrate:main",
        "lengths predicted in one pass, made to hold: RUN --shards DIR --out EXPORT",
    ),
    "info": ("vtok.info.describe:main", "what a run, export or .vtok file holds; what training by a config takes"),
    "demo": ("vtok.demo:main", "shards, training, evaluation, export and a report in one go"),
}

# What a command ends with in one line on stderr and exit code 1: words for the user. Anything else is a bug and shows
# its traceback. OSError: a full disk, a folder that cannot be written.
EXPECTED = (ValueError, OSError)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: vtok COMMAND ...   (vtok COMMAND --help for its options)\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 when it fails with a message for the user, 2 when the call is off."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vtok").setLevel(logging.INFO)  # ours alone: libraries tell of every request
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        import vtok

        print(vtok.__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"vtok: unknown command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    if argv[0] == "train":
        from vtok.training import signals

        signals.watch()  # before torch is imported: in a job, that alone may outlast the notice of its end
    try:
        return int(getattr(importlib.import_module(module), function)(argv[1:]) or 0)
    except ModuleNotFoundError as error:
        print(
            f"vtok {argv[0]}: {error}; install the extra that has it: pip install 'vtok[train,eval]'", file=sys.stderr
        )
        return 1
    except EXPECTED as error:
        print(f"vtok {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vtok {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
