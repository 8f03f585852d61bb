"""`vtok prior`: an autoregressive prior over an export's token ids, trained on what `vtok tokenize` wrote.

    token shards --training_rows()--> TokenRows --TokenPrior--> bits a token --AdamW--> the best on held-out clips
    --> EXPORT/prior.safetensors, prior.json     the entropy model of `--coding ar`, and what `vtok sample` draws from

`vtok.coding.prior_data` says what it learns from, `vtok.coding.prior_training` how; here is what it is worth, how it
becomes part of an export, and the command.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vtok.coding.entropy import StaticModel
from vtok.coding.prior_coding import PriorModel, signalling_bits
from vtok.coding.prior_data import scan, tokens_of_ids
from vtok.coding.prior_training import Trainer, Training
from vtok.data.pack import write_atomically
from vtok.data.token_reader import TokenSample, iter_token_samples
from vtok.data.token_shards import TokenLoader, TokenShards
from vtok.layers.token_prior import TokenPriorConfig, coded_factors
from vtok.loading import PRIOR, PRIOR_CONFIG, load, read_config
from vtok.shipping.card import with_prior

SCAN = 4096  # training clips read for vocabulary and frequencies
MAX_CONTEXT = 2048  # tokens of context that the default number of groups keeps to


# ---- what it is worth


def measure(
    prior: PriorModel, static: StaticModel, samples: Sequence[TokenSample], *, budgets: Sequence[int]
) -> list[dict[str, float]]:
    """Bits a token of held-out clips at each budget (tokens kept of a group): nominal, static, ar, and signalling of
    lengths. `ar` is what the coder's own frequencies cost."""
    nominal = sum(math.log2(size) for size in prior.codebook_sizes)
    out = []
    for budget in budgets:
        sums: dict[str, float] = defaultdict(float)
        for sample in samples:
            tokens = tokens_of_ids(sample.ids, sample.tokens.groups, sample.tokens.codebook_sizes)
            kept = torch.tensor([[min(budget, n) for n in sample.tokens.groups]])
            tokens = tokens.truncate(kept)
            sums["tokens"] += int(tokens.lengths[0])
            sums["static"] += float(static.bits(tokens)[0])
            sums["ar"] += float(prior.bits(tokens)[0])
            sums["signalling"] += float(signalling_bits(tokens)[0])
        row = {name: sums[name] / sums["tokens"] for name in ("static", "ar", "signalling")}
        out.append({"budget": budget, "tokens": sums["tokens"], "nominal": nominal, **row})
    return out


def print_measured(rows: Sequence[dict[str, float]]) -> None:
    print(f"{'kept':>6} {'tokens':>8} {'nominal':>9} {'static':>9} {'ar':>9} {'lengths':>9}   bits a token, held out")
    for row in rows:
        values = " ".join(f"{row[name]:9.3f}" for name in ("nominal", "static", "ar", "signalling"))
        print(f"{row['budget']:>6} {row['tokens']:>8} {values}   ar {1 - row['ar'] / row['static']:+.1%} below static")


# ---- the export


def add_to_export(prior: PriorModel, facts: dict[str, Any], *, export: Path, out: Path) -> None:
    """The export with this prior in it, as `out` (which may be `export` itself): built aside, then put in its place."""
    if out.exists() and out.resolve() != export.resolve() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; choose another folder, or leave --out out to add to the export")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(export, part)
        save_file(prior.state_dict, part / PRIOR, metadata={"format": "pt"})
        write_atomically(part / PRIOR_CONFIG, {"config": asdict(prior.config), **facts})
        write_atomically(part / "config.json", read_config(export) | {"prior_sha256": prior.sha256.hex()})
        card = part / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        card.write_text(with_prior(text, facts), encoding="utf-8")
        load(part)  # what was written is what loads
        if out.exists():
            old = out.with_name(f".{out.name}.{os.getpid()}.old")
            os.replace(out, old)
            os.replace(part, out)
            shutil.rmtree(old)
        else:
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def train_prior(
    tokens: str | Path,
    *,
    model: str | Path,
    out: str | Path | None = None,
    run: str | Path | None = None,
    how: Training | None = None,
    condition: str = "none",
    context_groups: int | None = None,
    device: str = "cpu",
    val: str | Path | None = None,
    val_clips: int | None = None,
    eval_every: int = 100,
    num_workers: int = 0,
    **shape: Any,
) -> list[dict[str, float]]:
    """Train a prior on token shards and add it to an export; returns `measure` of the held-out clips.

    Args:
        tokens: folder with train/ and val/ of token shards, or the training shards with `val` beside them.
        model: the export whose ids these are. out: where the export with its prior goes; None: `model` itself.
        run: folder of what a resume needs; None: `<out>.prior` beside the export.
        condition: none, label or caption of the clips. shape: other fields of `TokenPriorConfig`.
    Raises: ValueError for bad settings, other ids than the model's, or a run of other settings.
    """
    how, export = how or Training(), Path(model)
    out = export if out is None else Path(out)
    run = out.with_name(f"{out.name}.prior") if run is None else Path(run)
    loaded = load(export)
    sizes, who = tuple(int(n) for n in getattr(loaded, "codebook_sizes", ())), loaded.shipped
    if not sizes:
        raise ValueError(f"{export} makes continuous tokens (no codebook): a prior is over ids")
    train, held = (Path(tokens, "train"), Path(tokens, "val")) if val is None else (Path(tokens), Path(val))
    samples = list(iter_token_samples(held, model_id=who.model_id))[:val_clips]
    if not samples:
        raise ValueError(f"{held} holds no clip to measure on")
    own = getattr(loaded, "index_factors", None) or [[n] for n in sizes]
    factors = coded_factors([list(map(int, each)) for each in own])
    most = max(max(sample.tokens.groups) for sample in samples)
    ranks = StaticModel.affordable_ranks(factors, max(most, int(getattr(loaded, "num_tokens", 0) or 0)))
    clips = (sample for _, sample in zip(range(SCAN), iter_token_samples(train, model_id=who.model_id)))
    corpus = scan(clips, index_factors=factors, ranks=ranks, condition=condition)
    config = TokenPriorConfig(
        codebook_sizes=list(sizes),
        index_factors=factors,
        max_rank=ranks,
        blocks=blocks if isinstance(blocks := getattr(loaded.config, "blocks", 1), int) else 1,
        context_groups=context_groups or max(1, min(4, MAX_CONTEXT // most)),
        condition=condition,
        vocabulary=corpus.vocabulary,
        max_words=corpus.max_words,
        **shape,
    )
    shards = TokenShards(
        train, batch_size=how.batch_size, mode="clips", flatten=False, begin=False, seed=how.seed, model_id=who.model_id
    )
    trainer = Trainer(
        config, how, corpus, TokenLoader(shards, num_workers=num_workers), samples,
        folder=run, device=device, eval_every=eval_every,
    )  # fmt: skip
    count = sum(p.numel() for p in trainer.net.parameters())
    print(f"{count / 1e6:.2f} M parameters, {sum(shards.index.tokens)} training tokens, {len(samples)} clips held out")
    prior = PriorModel(config, trainer.run())
    budgets = [4**n for n in range(8) if 4**n < most and corpus.nested] + [most]
    rows = measure(prior, corpus.static, samples, budgets=budgets)
    facts = {"layout": corpus.layout, "nested": corpus.nested, "training": asdict(how), "held_out": rows}
    add_to_export(prior, facts, export=export, out=out)
    return rows


def main(argv: list[str]) -> int:
    """`vtok prior TOKENS --model EXPORT [--out EXPORT2]`."""
    parser = argparse.ArgumentParser(prog="vtok prior", description="An autoregressive prior over token ids.")
    add = parser.add_argument
    add("tokens", help="folder of `vtok tokenize` with train/ and val/")
    add("--model", required=True, help="the export that made the tokens")
    add("--out", help="export to write (default: the prior is added to --model)")
    add("--val", help="held-out token shards, where TOKENS is one folder of training shards")
    add("--val-clips", type=int, help="at most so many held-out clips (default: all)")
    add("--run", help="folder of what a resume needs (default: <out>.prior)")
    for name, kind, text in (
        ("steps", int, "optimizer steps"),
        ("batch-size", int, "rows a step"),
        ("length", int, "tokens of a row"),
        ("lr", float, "peak learning rate"),
        ("warmup", int, "steps to it"),
        ("weight-decay", float, "of the matrices"),
        ("drop", float, "share of rows with groups cut to a random length"),
        ("null", float, "share of rows without their condition"),
        ("seed", int, "of everything"),
    ):
        add(f"--{name}", type=kind, default=getattr(Training, name.replace("-", "_")), help=f"{text} (%(default)s)")
    for name, kind in (("width", int), ("depth", int), ("num-heads", int), ("head-width", int), ("dropout", float)):
        add(f"--{name}", type=kind, default=getattr(TokenPriorConfig, name.replace("-", "_")), help="(%(default)s)")
    add("--context-groups", type=int, help="groups that attention sees (default: 4, fewer where that is > 2048 tokens)")
    add("--digits", choices=("chain", "parallel"), default=TokenPriorConfig.digits, help="(%(default)s)")
    add("--condition", choices=("none", "label", "caption"), default="none", help="what `vtok sample` can be told")
    add("--eval-every", type=int, default=100, help="steps (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    args = vars(parser.parse_args(argv))
    how = Training(**{name: args.pop(name) for name in list(args) if name in Training.__dataclass_fields__})
    rows = train_prior(args.pop("tokens"), how=how, **args)
    print_measured(rows)
    print(f"{args['out'] or args['model']}: now codes with `vtok encode --coding ar`, and `vtok sample` draws from it")
    return 0
