"""One table over all families (`families.py --family all`): tokens, bits, quality, time of a step, memory.

Everything is made here, small: a procedural corpus, a tower and language models to freeze, texts; then each twin is
trained by `vtok train` and measured by `vtok eval` on held-out clips, beside the control of its kind. Twins differ in
resolution, corpus, steps and in what quality is, so rows of different kinds are not to be ranked: the table says what
each family makes of a clip, and what that costs.

    tokens    of a clip, at the budget measured
    bits      of these: of ids by their codebooks; of vectors 16 for each of their numbers, as bfloat16 has
    quality   tokenizers: PSNR in dB; projectors: questions answered right by the frozen language model, %; compressors
              of texts: F1 of what it repeats, %
    control   at as many bits or tokens: dct; sums of runs of words; projectors stand beside the row `pooling`
    step      ms of wall time: median of all steps but the first five, loading and logging included
    memory    largest resident set of the training process, MiB
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twins import CONFIGS, ROOT, loss_networks, run, step_ms, train

from vtok.config import load

FROZEN = ("model.tower.name=TOWER", "objective.llm.name=LLM")
SMALL = ("model.tower.name=TOWER", "model.lm.name=LLM", "objective.llm.name=LLM")
TEXTS = ("model.lm.name=READER", "objective.llm.name=READER")


@dataclass(frozen=True)
class Entry:
    """A row. given: overrides; TOWER, LLM and READER stand for what is made here. begins: the row whose export it
    begins with. budget: at which it is measured; "" = all its tokens."""

    family: str
    twin: str  # of configs/FAMILY
    given: tuple[str, ...] = ()
    begins: str = ""
    budget: str = ""
    corpus: str = "clips"

    @property
    def decodes(self) -> bool:
        return self.family in ("discrete", "flexible")

    @property
    def kind(self) -> tuple[str, float, str, str]:
        """(key of eval.json, what it is multiplied by, its unit, the control or "")."""
        if self.corpus == "texts":
            return "token_f1", 100.0, "% F1", "mean_pool"
        return ("psnr_db", 1.0, "dB", "dct") if self.decodes else ("accuracy", 100.0, "%", "")


ENTRIES = {
    "vidtok_fsq_488": Entry("discrete", "vidtok_fsq_488_tiny"),
    "phenaki": Entry("discrete", "phenaki_tiny"),
    "flexible_base": Entry("flexible", "base_tiny"),
    "larp": Entry("flexible", "larp_tiny"),
    "flextok_pixel": Entry("flexible", "flextok_pixel_tiny", ("objective.align.tower.name=TOWER",)),
    "stage0": Entry("reducer", "tiny", FROZEN),
    "pooling": Entry("reducer", "tiny_pooling", FROZEN, "stage0", "16"),
    "tdc": Entry("temporal", "tdc_tiny", FROZEN, "stage0", "16"),
    "vqtoken": Entry("vqtoken", "tiny", FROZEN, "stage0", "16"),
    "c3": Entry("language", "c3_tiny", TEXTS, budget="10", corpus="texts"),
    # captions learn in stages, each a row: the last one trains what reads them alone
    "langdc_stage1": Entry("language", "langdc_stage1_tiny", SMALL, budget="16"),
    "langdc_stage2": Entry("language", "langdc_stage2_tiny", SMALL, "langdc_stage1", "16"),
    "langdc": Entry("language", "langdc_tiny", SMALL, "langdc_stage2", "16"),
    # a clip of 4 segments, each given 4 tokens at least: 16 would leave nothing to share by scores
    "tempo": Entry("language", "tempo_tiny", SMALL, "stage0", "64"),
}
COLUMNS = (("steps", 6), ("tokens", 8), ("bits", 9), ("quality", 14), ("control", 10), ("step", 8), ("memory", 8))
HEAD = f"{'family':10}{'twin':20}" + "".join(f"{name:>{width}}" for name, width in COLUMNS)


def needed(only: list[str]) -> list[str]:
    """The rows asked for, each after those that it begins with. Raises: SystemExit for one that there is not."""
    unknown = sorted(set(only) - ENTRIES.keys())
    if unknown:
        raise SystemExit(f"error: --only {','.join(unknown)}: choose from {', '.join(ENTRIES)}")
    wanted: list[str] = []
    for name in only or ENTRIES:
        if ENTRIES[name].begins:
            wanted += needed([ENTRIES[name].begins])
        wanted.append(name)
    return list(dict.fromkeys(wanted))


def made(root: Path, corpora: set[str], *, clips: int = 600) -> dict[str, str]:
    """What the twins need, made under `root` where it is not there: name in overrides -> folder."""
    log, data = root / "made.log", ROOT / "data"
    folders = {"CORPUS": root / "corpus", "CLIPS": root / "clips", "TOWER": root / "tower", "LLM": root / "llm"}
    if not (folders["CLIPS"] / "val" / "index.json").is_file():
        sizes = ["--clips", clips, "--size", 64, 64, "--fps", 8, "--complexity", 0, 1, "--workers", 1]
        run(data / "demo_corpus.py", folders["CORPUS"], *sizes, log=log)
        manifest = folders["CORPUS"] / "captions.jsonl"
        run("-m", "vtok.cli", "shards", manifest, "--out", folders["CLIPS"], "--quiet", log=log)
    if "frozen" in corpora:
        run(data / "tiny_tower.py", folders["TOWER"], "--corpus", folders["CORPUS"], "--steps", 400, log=log)
        manifest = folders["CORPUS"] / "captions.jsonl"
        run(data / "tiny_lm.py", manifest, folders["LLM"], "--steps", 600, log=log)
    if "texts" in corpora:
        folders |= {"TEXTS": root / "texts", "READER": root / "reader"}
        if not (folders["TEXTS"] / "val" / "index.json").is_file():
            told = root / "stories" / "texts.jsonl"
            run(data / "demo_texts.py", told, "--stories", 1000, "--sentences", 2, 4, log=log)
            run("-m", "vtok.cli", "shards", "--texts", told, "--out", folders["TEXTS"], "--quiet", log=log)
        small = ["--repeat", "--steps", 600, "--width", 96, "--layers", 3, "--batch-size", 16]
        run(data / "tiny_lm.py", folders["TEXTS"] / "train", folders["READER"], *small, log=log)
    return {name: str(folder) for name, folder in folders.items()}


def overrides(name: str, folders: dict[str, str], *, root: Path, steps: int | None) -> list[str]:
    """The settings of a row's run beside its yaml; where it has few steps, a quarter of them are for warming up."""
    entry = ENTRIES[name]
    shards = folders["TEXTS" if entry.corpus == "texts" else "CLIPS"]
    given = [f"{key}={folders[value]}" for key, _, value in (each.partition("=") for each in entry.given)]
    given += [f"out={root}", f"name={name}", f"data.shards={shards}/train", f"data.val_shards={shards}/val"]
    given += ["data.num_workers=0", "trainer.progress=false", "trainer.tensorboard=false", "trainer.log_every=1"]
    given += ["trainer.accelerator=cpu", *[f"trainer.max_steps={steps}"] * (steps is not None)]
    given += [f"init_from={root / f'{entry.begins}-export'}"] * bool(entry.begins)
    config = load(CONFIGS / entry.family / f"{entry.twin}.yaml", given)
    own = config.trainer.max_steps if steps is None else steps
    late = config.optim.warmup_steps >= own
    given += [f"optim.warmup_steps={max(own // 4, 1)}"] * late
    return given + loss_networks(config.objective, root)


def measured(name: str, *, root: Path) -> dict[str, Any]:
    """eval.json of a row's run, written where it is not there."""
    entry, written = ENTRIES[name], root / name / "eval" / "eval.json"
    if written.is_file():
        return json.loads(written.read_text())
    words: list[object] = ["--no-report", "--no-progress", "--clips", 48]
    if entry.corpus == "texts":
        words += ["--ratios", entry.budget]
    else:
        words += ["--budgets", entry.budget] * bool(entry.budget)
        words += ["--controls", "dct", "--codecs", "none"] if entry.decodes else []
    run("-m", "vtok.cli", "eval", root / name, *words, log=root / f"{name}.log")
    return json.loads(written.read_text())


def row(name: str, result: dict[str, Any], *, root: Path, memory: float | None) -> str:
    """A line of the table."""
    entry = ENTRIES[name]
    key, scale, unit, control = entry.kind
    facts = json.loads((root / f"{name}-export" / "config.json").read_text())["model"]
    own = [r for r in result["rows"] if r["method"] == result["family"]][-1]
    beside = [r for r in result["rows"] if r["method"] == control and r.get("budget") == own.get("budget")]
    tokens = own["tokens_mean"]
    bits = own.get("bits_mean") or 16 * tokens * facts["embedding_dim"]
    quality = f"{scale * own[key]:.1f} {unit}"
    other = f"{scale * beside[0][key]:.1f}" if beside and beside[0].get(key) is not None else "-"
    steps = sum("train/loss" in line for line in map(json.loads, (root / name / "metrics.jsonl").open()))
    step = step_ms(root / name)
    told = f"{entry.family:10}{name:20}{steps:6d}{tokens:8.0f}{bits:9.0f}{quality:>14}{other:>10}"
    return told + "".join("       -" if value is None else f"{value:8.0f}" for value in (step, memory))


def every_family(root: Path, *, only: list[str], steps: int | None) -> None:
    """Trains and measures what is not there yet, and prints the table."""
    names = needed(only)
    corpora = {"texts" if ENTRIES[name].corpus == "texts" else "frozen" for name in names if ENTRIES[name].given}
    folders = made(root, corpora)
    print(HEAD, flush=True)
    for name in names:
        entry = ENTRIES[name]
        twin = CONFIGS / entry.family / f"{entry.twin}.yaml"
        memory = train(name, twin=twin, out=root, given=overrides(name, folders, root=root, steps=steps))
        print(row(name, measured(name, root=root), root=root, memory=memory), flush=True)
