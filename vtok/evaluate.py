"""`vtok eval RUN_OR_EXPORT`: measures on the run's own data settings, writes eval.json and report.html, prints a table.

What is measured, and how, is `vtok.evaluation.evaluator`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vtok.config import DataConfig, EvalConfig, from_dict, load_family
from vtok.config import load as load_config
from vtok.data.workers import cores
from vtok.evaluation.evaluator import Evaluator, durations
from vtok.evaluation.rows import check_same_weights
from vtok.layers.perceptual import file_sha256, load_lpips
from vtok.loading import add_which, identify, is_run, step_of
from vtok.metric_lines import metric_lines
from vtok.metrics.codecs import CODECS
from vtok.metrics.controls import CONTROLS
from vtok.metrics.i3d import load_i3d
from vtok.metrics.inception import load_inception

log = logging.getLogger(__name__)

# (key, heading, decimals); eval.json and the report hold everything
COLUMNS = (
    ("method", "method", 0),
    ("budget", "tokens", 0),
    ("bits_mean", "bits", 0),
    ("entropy_bits_mean", "coded", 0),
    ("ar_bits_mean", "prior", 0),
    ("bits_per_pixel", "bits/px", 5),
    ("psnr_db", "PSNR", 2),
    ("ssim", "SSIM", 3),
    ("tdiff_psnr_db", "tdiff", 2),
    ("lpips", "LPIPS", 3),
    ("rfvd", "rFVD", 1),
    ("rfid", "rFID", 1),
    ("worse_share", "worse", 2),
)
# left out in this order beyond 80 columns
SPARE = ("worse_share", "tdiff_psnr_db", "entropy_bits_mean", "bits_per_pixel", "ar_bits_mean")


def _cell(row: dict[str, Any], key: str, decimals: int) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    text = f"{value:.{decimals}f}" if isinstance(value, float) else str(value)
    return text + "*" if key == "bits_mean" and row.get("below_floor") else text


def _table(result: dict[str, Any], columns: list[tuple[str, str, int]]) -> Table:
    rows = result["rows"]
    table = Table(
        title=f"{result['model']}: {result['clips']} clips of {result['shards'] or 'the given set'}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for key, heading, _ in columns:
        table.add_column(heading, justify="left" if key == "method" else "right", no_wrap=True)
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for row in (row for row in rows if row["budget"] == budget):
            table.add_row(*(_cell(row, key, decimals) for key, _, decimals in columns))
        table.add_section()
    return table


def print_table(result: dict[str, Any], console: Console | None = None) -> None:
    """The rows that matter for a terminal of 80 columns: each budget with everything that was given its bits."""
    rows = result["rows"]
    columns = [each for each in COLUMNS if any(row.get(each[0]) is not None for row in rows)]
    table = _table(result, columns)
    wide = Console(width=1000)
    for key in SPARE:
        if wide.measure(table).maximum <= 80:
            break
        columns = [each for each in columns if each[0] != key]
        table = _table(result, columns)
    keys = {key for key, _, _ in columns}
    out = console or Console()
    out.print(table)
    said = ["PSNR and tdiff (of frame differences) in dB" if "tdiff_psnr_db" in keys else "PSNR in dB"]
    said += ["coded: entropy-coded bits"] if "entropy_bits_mean" in keys else []
    said += ["prior: the same under the prior"] if "ar_bits_mean" in keys else []
    said += ["worse: share of clips below the budget before"] if "worse_share" in keys else []
    said += ["*: for some clips the fewest bits the codec can write"] if any(r.get("below_floor") for r in rows) else []
    out.print("; ".join(said), style="dim")


def showcase(evaluator: Evaluator, result: dict[str, Any], *, fps: float | None, each: int = 2) -> list[dict[str, Any]]:
    """The clips of a report: the worst, the best and some drawn at random, by PSNR at the largest budget."""
    scores = result["per_clip"]["psnr_db"][evaluator.family][str(evaluator.budgets[-1])]
    order = sorted(range(len(scores)), key=lambda at: scores[at])
    tags: dict[int, str] = dict.fromkeys(order[:each], "worst")
    tags |= {at: "best" for at in order[-each:] if at not in tags}
    rest = [at for at in order if at not in tags]
    draw = torch.randperm(len(rest), generator=torch.Generator().manual_seed(evaluator.seed))[:each].tolist()
    tags |= {rest[at]: "random" for at in draw}
    out, first = {}, 0
    for batch in evaluator.val:
        for index in range(len(batch)):
            at = first + index
            if at not in tags:
                continue
            clip = batch.rows(slice(index, index + 1))
            assert clip.video is not None
            videos, psnr = evaluator.reconstruct(clip)
            seconds, frames = float(durations(clip, fps)[0]), int(clip.frames()[0])
            out[at] = {
                "key": clip.keys[0],
                "caption": (clip.text or [""])[0],
                "tags": [tags[at]],
                "fps": frames / seconds if math.isfinite(seconds) and seconds > 0 else fps or 8.0,
                "original": clip.video[0, :, :frames].permute(1, 2, 3, 0).contiguous(),
                "reconstructions": videos,
                "psnr_db": psnr,
            }
        first += len(batch)
    return [out[at] for at in tags if at in out]


def _samples(
    model: Any, path: str, clips: list[dict[str, Any]], *, seed: int
) -> tuple[list[str], list[dict[int, Any]]]:
    """Four samples of the export's prior at several lengths, for the report, and what each was told: a label it knows,
    the caption of one of the report's clips, nothing (""); none where there is no prior."""
    from vtok.coding.sample import condition_words, conditions, draw_samples
    from vtok.loading import export_folder, prior_of, read_prior_facts

    prior = prior_of(model)
    if prior is None:
        return [], []
    facts, made = read_prior_facts(export_folder(path)), []
    told = conditions(prior.config, captions=[clip["caption"] for clip in clips], count=4)
    for number, said in enumerate(told):
        words = condition_words(prior.config, **({prior.config.condition: said} if said else {}))
        made += draw_samples(model, facts, count=1, words=words or None, seed=seed + number)
    return told, made


# options that only some kinds of models read; what is not listed, all do
READ_BY = {
    "a tokenizer": (
        "train_shards train_clips budgets controls codecs codec_clips profile processes lpips lpips_sha256 fvd "
        "fvd_sha256 fid fid_sha256"
    ),
    "a projector": (
        "budgets controls llm full tuned answers parts part_prompt part_answers allocations shares questions facts "
        "seeds frames"
    ),
    "a compressor of texts": "llm answers ratios",
}


def _names(text: str) -> list[str]:
    return [] if text in ("", "none") else [part.strip() for part in text.split(",") if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtok eval", description="Measure a run or an export; writes eval.json, report.html."
    )
    parser.add_argument("model", help="run directory, export folder or Hub repository")
    add_which(parser, default=None)
    parser.add_argument(
        "--shards", help="validation shards, or a folder with train/ and val/; default: those of the run"
    )
    parser.add_argument("--train-shards", help="training shards for controls and the entropy model; default: the run's")
    parser.add_argument("--budgets", help="tokens, e.g. 1,4,16; default: the run's, else 1, 4, 16 ... the maximum")
    where = "where to write; default: RUN/eval, with --which RUN/eval/CHECKPOINT; for an export ./eval/NAME"
    parser.add_argument("--out", type=Path, help=where)
    parser.add_argument("--clips", type=int, help="at most this many validation clips")
    parser.add_argument("--train-clips", type=int, default=512, help="at most this many training clips (default 512)")
    parser.add_argument("--controls", help=f"comma-separated from {','.join(CONTROLS)}, or none")
    parser.add_argument("--codecs", help=f"comma-separated from {','.join(CODECS)}, or none")
    parser.add_argument("--codec-clips", type=int, help="at most this many clips through the codecs")
    parser.add_argument("--profile", default="offline", choices=("offline", "low-delay"), help="how codecs are driven")
    parser.add_argument("--processes", type=int, default=cores(), help="processes that run codecs")
    parser.add_argument("--lpips", help="LPIPS weights; default: the run's eval.lpips_weights")
    parser.add_argument("--lpips-sha256", help="their hash")
    parser.add_argument("--fvd", help="I3D weights for rFVD; default: the run's eval.fvd_weights")
    parser.add_argument("--fvd-sha256", help="their hash")
    parser.add_argument("--fid", help="Inception weights for rFID; default: the run's eval.fid_weights")
    parser.add_argument("--fid-sha256", help="their hash")
    parser.add_argument("--batch-size", type=int, help="clips per batch")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--seed", type=int, default=0)
    projector = parser.add_argument_group("projectors", "--controls are then reducers, beside those always there")
    projector.add_argument("--llm", help="frozen language model; default: the one it was trained for")
    projector.add_argument("--full", help="stage-0 model: the full-token row and the reducers' projector")
    projector.add_argument("--tuned", help="the same, trained on for as many steps as MODEL: the reducers' projector")
    projector.add_argument("--answers", type=int, default=0, help="generate so many ids: exact match and F1")
    projector.add_argument(
        "--parts", type=int, default=1, help="ask so many parts of each clip first (default 1: none)"
    )
    projector.add_argument("--part-prompt", help="of a part, with <video> and, where it is to know it, {question}")
    projector.add_argument("--part-answers", type=int, default=128, help="ids of the answer about a part (default 128)")
    shares = "totals, each shared over segments in several ways, e.g. 128:1,320:4"
    projector.add_argument("--allocations", metavar="TOTAL:MINIMUM,...", help=shares)
    projector.add_argument("--shares", help="ways beside the model's own (default: even,novelty,similarity,truth)")
    projector.add_argument("--questions", type=int, help="ask at most so many of each clip, drawn (default: all)")
    projector.add_argument("--facts", metavar="JSONL", help="videos' complexity and duration: what free lengths follow")
    projector.add_argument("--seeds", type=int, default=5, help="of reducers that draw (default 5)")
    projector.add_argument("--frames", type=int, help="of a clip, where it is not to be the training's data.num_frames")
    parser.add_argument("--ratios", help="compressors of texts: words of the LLM a token (default 5,10,20,40)")
    parser.add_argument("--no-progress", action="store_true")
    parser.add_argument("--no-report", action="store_true", help="eval.json only")
    return parser


def _check_read(options: argparse.Namespace, kind: str) -> None:
    """Raises ValueError for an option that says nothing to such a model."""
    usual = vars(_parser().parse_args([options.model]))
    for name in sorted({name for names in READ_BY.values() for name in names.split()} - set(READ_BY[kind].split())):
        if getattr(options, name) != usual[name]:
            readers = [other for other, names in READ_BY.items() if name in names.split()]
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is for {' or '.join(readers)}, and "
                f"{options.model} is {kind}: leave it out"
            )


def load_model(path: str, *, which: str | None = None) -> tuple[Any, DataConfig, EvalConfig]:
    """A model from a run, an export or a Hub repository, and the data and eval settings it was trained with.

    An export says where its training shards were; they need not be there any more.

    Args:
        which: checkpoint of a run, as `load_run`; None: the best.
    Raises: ValueError for `which` of what has one set of weights.
    """
    from vtok.loading import export_folder, load, load_run, read_training

    if is_run(Path(path)):
        model, config = load_run(path, which=which or "best")
        return model, config.data, config.eval
    if which is not None:
        raise ValueError(f"--which {which}: {path} is no run directory, and holds one set of weights: leave it out")
    folder = export_folder(path)
    model, node, trained = load(folder), read_training(folder), folder / "training.yaml"
    data = from_dict(DataConfig, node.get("data") or {}, where=f"{trained}: data", trusted=False)
    settings = from_dict(EvalConfig, node.get("eval") or {}, where=f"{trained}: eval", trusted=False)
    return model, data, settings


def window_loader(
    data: DataConfig, shards: str, *, clips: int | None, setting: str, tower: Any = None, audio: Any = None
) -> Any:
    """Batches of the middle window and centre crop of each clip, the same for training and validation clips.

    tower: gives the model's frozen tower, whose features the shards may hold instead of videos. audio: its audio tower.
    """
    from vtok.data.feature_index import feature_view
    from vtok.data.pipeline import ValidationSet, make_loader
    from vtok.data.sources import every_shard
    from vtok.data.view import view_of

    where: dict[str, Any] = dict(root=data.root, cache_dir=data.cache_dir, setting=setting)
    held = ValidationSet(
        every_shard(shards, **where),
        view=feature_view(view_of(data), shards, training=False, tower=tower, audio=audio, **where),
        batch_size=data.val_batch_size,
        val_clips=clips,
        cache_dir=data.cache_dir,
        max_bad_fraction=data.max_bad_fraction,
        setting=setting,
    )
    return make_loader(held, num_workers=data.num_workers)


def _resolve_shards(data: DataConfig, options: argparse.Namespace) -> tuple[str, str]:
    """(validation, training) shards; training is "" where there is none."""
    val, train = data.val_shards, data.shards
    if options.shards:
        folder = Path(options.shards)
        split = (folder / "val").is_dir() and not (folder / "index.json").is_file()
        val = str((folder / "val" if split else folder).absolute())
        if split and (folder / "train").is_dir():
            train = str((folder / "train").absolute())
    if options.train_shards:
        train = str(Path(options.train_shards).absolute())
    if not val:
        raise ValueError("there are no validation shards to measure on; name them: --shards DIR")
    return val, train


def _weights(name: str, options: argparse.Namespace, settings: EvalConfig) -> tuple[str, str]:
    """(path, sha256) of a metric's weights: the command's, else the run's, each by itself.

    So another path must hold the run's own weights, unless the command gives another hash too (or an empty one).
    """
    path, sha256 = getattr(options, name), getattr(options, f"{name}_sha256")
    path = getattr(settings, f"{name}_weights") if path is None else path
    sha256 = getattr(settings, f"{name}_sha256") if sha256 is None else sha256
    return path, sha256


def _check_previous(written: Path, evaluator: Evaluator) -> None:
    """Raises ValueError when a table stands there that was measured with other weights."""
    try:
        previous = json.loads(written.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # none, or one that a kill cut short
    try:
        check_same_weights({**previous, "model": str(written)}, {"model": "this run", "weights": evaluator.weights})
    except ValueError as error:
        raise ValueError(f"{error}, with the same weights, or name another folder: --out DIR") from error


def device_of(asked: str) -> str:
    """`auto` is a GPU where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _budgets(options: argparse.Namespace, settings: EvalConfig) -> list[int]:
    return [int(part) for part in _names(options.budgets)] if options.budgets else settings.budgets


def objective_of(path: str) -> Any:
    """The `objective:` node that a run or an export of a projector was trained with."""
    from vtok.loading import export_folder, read_training

    if is_run(Path(path)):
        return load_config(Path(path) / "config.yaml").objective
    folder = export_folder(path)
    node = read_training(folder)
    kind = load_family(str((node.get("model") or {}).get("name")), trusted=False).Objective.Config
    where = f"{folder / 'training.yaml'}: objective"
    return from_dict(kind, node.get("objective") or {}, where=where, trusted=False)


def reader_of(path: str, *, llm: str = "", which: str | None = None) -> tuple[Any, Any]:
    """The `objective:` node of a projector, and the language model that reads its tokens (`vtok.llm.FrozenLLM`), with
    the adapters that it learned with them.

    llm: another one's name; "": the one that the projector was trained for. which: of `load_model`.
    Raises: ValueError for another LLM where adapters were learned.
    """
    from vtok.llm import load_adapted
    from vtok.loading import load_adapters, weights_sha256

    objective, adapters = objective_of(path), load_adapters(path, which=which or "best")
    if llm and adapters:
        raise ValueError(
            f"--llm {llm}: {path} was trained with adapters in {objective.llm.name} (objective.lora), which belong "
            "to no other LLM: leave --llm out; where that one has moved, say so in its objective.llm.name"
        )
    if llm:
        objective.llm = replace(objective.llm, name=llm, revision="", sha256="")
    found = load_adapted(objective.llm, objective.lora, adapters)
    found.adapters_sha256 = weights_sha256(adapters).hex() if adapters else ""
    return objective, found


def check_no_adapters(path: str, *, setting: str) -> None:
    """Raises ValueError for a model that one language model cannot read beside another one's."""
    from vtok.loading import load_adapters

    if load_adapters(path):
        raise ValueError(
            f"{setting} {path}: its tokens are read through adapters that its LLM learned (objective.lora), and a "
            "table has one LLM: name a model that was trained with objective.lora.rank=0"
        )


def _main_projector(
    options: argparse.Namespace, model: Any, val: Any, settings: EvalConfig, *, shards: str, fps: float | None
) -> int:
    """A projector before its language model: eval.json, report.html and the table."""
    from vtok.evaluation.allocations import SCORES, parse_allocations
    from vtok.evaluation.answering import AnsweringEvaluator, print_answers
    from vtok.evaluation.free_lengths import read_facts
    from vtok.llm import PartsConfig
    from vtok.llm.tasks import first_prompt

    objective, llm = reader_of(options.model, llm=options.llm or "", which=options.which)
    source, full = Path(options.model), options.full or objective.teacher
    for setting, other in (("--full", full), ("--tuned", options.tuned)):
        if other and other != options.model:
            check_no_adapters(other, setting=setting)
    reducers = _names(options.controls) if options.controls else []
    parts = PartsConfig(options.parts, max_new_tokens=options.part_answers)
    evaluator = AnsweringEvaluator(
        model,
        llm,
        val=val,
        template=first_prompt(objective.tasks, "qa"),
        timestamps=objective.timestamps,
        budgets=_budgets(options, settings),
        full=load_model(full)[0] if full else None,
        tuned=load_model(options.tuned)[0] if options.tuned else None,
        reducers=reducers,
        seeds=options.seeds,
        max_new_tokens=options.answers,
        parts=replace(parts, prompt=options.part_prompt) if options.part_prompt else parts,
        allocations=parse_allocations(options.allocations or ""),
        shares=tuple(SCORES) if options.shares is None else _names(options.shares),
        questions=options.questions,
        facts=read_facts(options.facts) if options.facts else None,
        device=device_of(options.device),
        seed=options.seed,
        progress=not options.no_progress,
    )
    result = evaluator.run(model=source.name, shards=shards, tuned=Path(options.tuned).name if options.tuned else "")
    out = _write_table(options, model, result)
    print_answers(result)
    print(f"table   {out / 'eval.json'}")
    if not options.no_report:
        from vtok.evaluation.answer_report import write_answer_report

        clips = evaluator.show(result, fps=fps)
        print(f"report  {write_answer_report(result, clips, out / 'report.html', history=_history(source))}")
    return 0


def _main_texts(options: argparse.Namespace, model: Any, val: Any, *, shards: str) -> int:
    """A compressor of texts before its language model: eval.json, report.html and the table."""
    from vtok.evaluation.repeating import RATIOS, RepeatingEvaluator, print_repeats

    source = Path(options.model)
    objective, llm = reader_of(options.model, llm=options.llm or "", which=options.which)
    evaluator = RepeatingEvaluator(
        model,
        llm,
        val=val,
        repeat=objective.tasks.reconstruction_prompts[0],
        question=objective.tasks.qa_prompts[0] if objective.tasks.qa_prompts else "",
        ratios=[float(part) for part in options.ratios.split(",")] if options.ratios else RATIOS,
        most_words=options.answers,
        device=device_of(options.device),
        seed=options.seed,
        progress=not options.no_progress,
    )
    result = evaluator.run(model=source.name, shards=shards)
    out = _write_table(options, model, result)
    print_repeats(result)
    print(f"table   {out / 'eval.json'}")
    if not options.no_report:
        from vtok.evaluation.repeat_report import write_repeat_report

        history = _history(source)
        print(f"report  {write_repeat_report(result, evaluator.examples, out / 'report.html', history=history)}")
    return 0


def results_folder(out: Path | None, source: Path, *, which: str | None = None) -> Path:
    """Where results of a run or an export go: `out`, else RUN/eval (RUN/eval/CHECKPOINT for one that was named), else
    eval/NAME in the folder one stands in, so that those of one model do not replace those of another."""
    own = source / "eval" / (which or "") if is_run(source) else Path("eval") / source.resolve().name
    return out or own


def _write_table(options: argparse.Namespace, model: Any, result: dict[str, Any]) -> Path:
    """Writes eval.json, with what tells whose numbers they are; returns the folder it lies in."""
    source = Path(options.model)
    out = results_folder(options.out, source, which=options.which)
    result["model_id"] = identify(model).model_id
    if is_run(source):
        which = options.which or "best"
        result["checkpoint"] = {"which": which, "step": step_of(source, which=which)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "eval.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return out


def _history(source: Path) -> list[dict[str, Any]] | None:
    """The lines of a run's metrics.jsonl."""
    lines = source / "metrics.jsonl"
    return metric_lines(lines) if lines.is_file() else None


def main(argv: list[str] | None = None) -> int:
    """`vtok eval RUN_OR_EXPORT [options]`: writes eval.json and report.html, prints the table."""
    options = _parser().parse_args(argv)
    model, data, settings = load_model(options.model, which=options.which)
    val_shards, train_shards = _resolve_shards(data, options)
    texts, projector = getattr(model.config, "source", "") == "text", not hasattr(model, "decode")
    _check_read(options, "a compressor of texts" if texts else "a projector" if projector else "a tokenizer")
    if options.batch_size:
        data = replace(data, val_batch_size=options.batch_size)
    if options.frames:
        data = replace(data, num_frames=options.frames)
    clips = data.val_clips if options.clips is None else options.clips
    tower = (lambda: model.tower) if hasattr(model, "compress") else None
    where: dict[str, Any] = dict(tower=tower, audio=lambda: getattr(model, "ears", None))
    val = window_loader(data, val_shards, clips=clips, setting="--shards", **where)
    if texts:
        return _main_texts(options, model, val, shards=val_shards)
    if projector:
        return _main_projector(options, model, val, settings, shards=val_shards, fps=data.fps)
    train = None
    if train_shards:
        try:
            train = list(window_loader(data, train_shards, clips=options.train_clips, setting="--train-shards"))
        except ValueError as error:
            if options.train_shards:
                raise
            log.warning("no training clips, so no dct, downsample and entropy coding: %s", error)
    lpips, fvd, fid = (_weights(name, options, settings) for name in ("lpips", "fvd", "fid"))
    device, budgets = device_of(options.device), _budgets(options, settings)
    evaluator = Evaluator(
        model,
        val=val,
        train=train,
        budgets=budgets,
        controls=settings.controls if options.controls is None else _names(options.controls),
        codecs=settings.codecs if options.codecs is None else _names(options.codecs),
        lpips=load_lpips(*lpips) if lpips[0] else None,
        fvd=load_i3d(*fvd) if fvd[0] else None,
        fid=load_inception(*fid) if fid[0] else None,
        fps=data.fps,
        device=device,
        seed=options.seed,
        profile=options.profile,
        processes=options.processes,
        codec_clips=options.codec_clips,
        progress=not options.no_progress,
    )
    source = Path(options.model)
    if lpips[0]:
        evaluator.weights["lpips"] = {"sha256": file_sha256(lpips[0])}
    _check_previous(results_folder(options.out, source, which=options.which) / "eval.json", evaluator)
    result = evaluator.run(model=source.name, shards=val_shards)
    out = _write_table(options, model, result)
    print_table(result)
    print(f"table   {out / 'eval.json'}")
    if not options.no_report:
        from vtok.evaluation.report import write_report

        clips = showcase(evaluator, result, fps=data.fps)
        told, made = _samples(model, options.model, clips, seed=options.seed)
        page = out / "report.html"
        print(f"report  {write_report(result, clips, page, history=_history(source), samples=made, told=told)}")
    return 0
