"""`vtok prior`: an autoregressive prior over an export's token ids, trained on what `vtok tokenize` wrote.

    token shards --rows()--> TokenRows --TokenPrior--> bits a token --AdamW--> the best on held-out clips
    --> EXPORT/prior.safetensors, prior.json     the entropy model of `--coding ar`, and what `vtok sample` draws from

A plain loop on one device: the network is small, the ids of a corpus fit on one machine, and `TokenLoader` already
knows its place, which is all that an exact resume needs. Every step's random choices are drawn from (seed, step), so a
run that was killed and goes on ends bitwise as one that was not.

Letters: B clips, L tokens, S digits, Q ids a token, G groups.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vtok.coding.entropy import StaticModel, to_symbols
from vtok.coding.prior_coding import PriorModel, signalling_bits
from vtok.data.pack import write_atomically
from vtok.data.token_reader import TokenSample, iter_token_samples
from vtok.data.token_shards import ClipFacts, TokenLoader, TokenShards
from vtok.layers.token_prior import NULL, START, WORDS, TokenPrior, TokenPriorConfig, TokenRows, coded_factors
from vtok.loading import PRIOR, PRIOR_CONFIG, load, read_config
from vtok.shipping.card import with_prior
from vtok.types import Tokens

log = logging.getLogger(__name__)
STATE = "state.pt"
SCAN = 4096  # training clips read for vocabulary and frequencies
MAX_VOCABULARY = 4096
MAX_CONTEXT = 2048  # tokens of context that the default number of groups keeps to


@dataclass(frozen=True)
class Training:
    """How a prior is trained. length: tokens of a row, from where a group begins. drop: share of rows whose groups are
    cut to a random length, as files of a lower budget are; 0 for tokens on a grid. null: share of rows without their
    condition. base_lr: of the log-frequencies, which are right to begin with, against `lr`."""

    steps: int = 1000
    batch_size: int = 8
    length: int = 1024
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    drop: float = 0.5
    null: float = 0.1
    base_lr: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size) < 1 or self.length < 2 or self.lr <= 0 or self.warmup < 0:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size} must be 1 or more, length={self.length} 2 or more, "
                f"lr={self.lr} above 0"
            )
        if not (0 <= self.drop <= 1 and 0 <= self.null <= 1 and self.weight_decay >= 0):
            raise ValueError(f"drop={self.drop}, null={self.null} are shares of rows, 0 to 1")

    def rate(self, step: int) -> float:
        """Share of `lr` at a step: linear warm-up, then a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


# ---- what the data is


@dataclass(frozen=True)
class Corpus:
    """What a pass over the first training clips finds. layout: groups, frames, fps and size of the commonest clip."""

    static: StaticModel
    vocabulary: list[str]
    max_words: int
    layout: dict[str, Any]
    nested: bool


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


def condition_of(facts: dict[str, Any], condition: str) -> list[str]:
    """The words that a clip's json gives as its condition; [] where it has none."""
    value = facts.get(condition)
    if condition == "caption":
        return words_of(str(value or ""))
    return [str(value)] if condition == "label" and value not in (None, "") else []


def prefix_of(words: Sequence[str], config: TokenPriorConfig) -> list[int]:
    """Words as numbers, START first; unknown words are left out, and NULL stands where none is left."""
    if config.condition == "none":
        return [START]
    known = {word: WORDS + n for n, word in enumerate(config.vocabulary)}
    found = [known[word] for word in words if word in known][: config.max_words]
    return [START, *(found or [NULL])]


def scan(samples: Iterable[TokenSample], *, index_factors: list[list[int]], ranks: int, condition: str) -> Corpus:
    """Frequencies, vocabulary and layout of some clips. Raises: ValueError where no clip has the condition."""
    words: Counter[str] = Counter()
    layouts: Counter[str] = Counter()
    longest, nested, count = 0, True, 0

    def tokens() -> Iterator[Tokens]:
        nonlocal longest, nested, count
        for sample in samples:
            here = condition_of(sample.facts, condition)
            words.update(here)
            longest, count = max(longest, len(here)), count + 1
            nested &= not sample.tokens.grids
            shape = {name: getattr(sample.tokens, name) for name in ("groups", "frames", "fps", "size")}
            layouts[json.dumps(shape)] += 1
            yield tokens_of_ids(sample.ids, sample.tokens.groups, sample.tokens.codebook_sizes)

    static = StaticModel.fit(tokens(), index_factors=index_factors, max_rank=ranks)
    if not count:
        raise ValueError("the training shards hold no clip")
    if condition != "none" and not words:
        raise ValueError(f"--condition {condition}: no clip has a {condition} in its json; use --condition none")
    often = [word for word, n in words.most_common(MAX_VOCABULARY) if n > 1 or condition == "label"]
    return Corpus(static, sorted(often), max(1, min(longest, 32)), json.loads(layouts.most_common(1)[0][0]), nested)


def tokens_of_ids(ids: np.ndarray, groups: Sequence[int], sizes: Sequence[int]) -> Tokens:
    """Ids [K, Q] as `Tokens` of one clip without embeddings: for whoever reads ids, ranks and groups only."""
    counts = np.array(groups, np.int64)
    group = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Tokens(
        embeddings=torch.zeros(1, len(ids), 1),
        lengths=torch.tensor([len(ids)]),
        positions=torch.full((1, len(ids), 3), math.nan),
        group=torch.from_numpy(group)[None],
        rank=torch.from_numpy(rank)[None],
        indices=torch.from_numpy(ids)[None],
        codebook_sizes=tuple(sizes),
    )


# ---- rows


def row_of(
    ids: np.ndarray, group: np.ndarray, rank: np.ndarray, factors: Sequence[Sequence[int]], *, start: int, length: int
) -> dict[str, np.ndarray]:
    """Tokens start ... start + length of a clip, with the places of what is known before each. ids [K, Q]."""
    here = slice(start, start + length)
    ids, group, rank = ids[here], group[here], rank[here]
    place = {key: n for n, key in enumerate(zip(group.tolist(), rank.tolist()))}
    above = [place.get((g - 1, r), -1) for g, r in zip(group.tolist(), rank.tolist())]
    return {
        "digits": to_symbols(ids, factors),
        "previous": np.arange(len(ids)) - 1,
        "above": np.array(above, np.int64),
        "group": group,
        "rank": rank,
    }


def stack(rows: Sequence[dict[str, np.ndarray]], prefixes: Sequence[list[int]]) -> TokenRows:
    """Rows of different lengths as one batch; padding has place -1, group and rank 0."""
    longest, widest = max(len(row["rank"]) for row in rows), max(map(len, prefixes))

    def padded(name: str, fill: int = 0) -> Tensor:
        first = rows[0][name]
        out = np.full((len(rows), longest, *first.shape[1:]), fill, np.int64)
        for n, row in enumerate(rows):
            out[n, : len(row[name])] = row[name]
        return torch.from_numpy(out)

    lengths = torch.tensor([len(row["rank"]) for row in rows])
    words = torch.zeros(len(rows), widest, dtype=torch.int64)
    for n, prefix in enumerate(prefixes):
        words[n, : len(prefix)] = torch.tensor(prefix)
    return TokenRows(
        digits=padded("digits"),
        previous=padded("previous", -1),
        above=padded("above", -1),
        group=padded("group"),
        rank=padded("rank"),
        mask=torch.arange(longest) < lengths[:, None],
        words=words,
        words_mask=torch.arange(widest) < torch.tensor([len(p) for p in prefixes])[:, None],
    )


def training_rows(batch: Any, config: TokenPriorConfig, how: Training, *, step: int, nested: bool) -> TokenRows:
    """A batch of clips as rows of at most `how.length` tokens, cut as chance of (seed, step) has it."""
    rng = np.random.default_rng([how.seed, step])
    rows, prefixes = [], []
    for n in range(len(batch)):
        mask = batch.mask[n].numpy()
        ids, group, rank = (value[n].numpy()[mask] for value in (batch.ids, batch.group, batch.rank))
        keep = np.ones(len(ids), bool)
        if nested and rng.random() < how.drop:
            most, groups = int(rank.max()) + 1, int(group.max()) + 1
            drawn = np.exp2(rng.uniform(0, math.log2(max(most, 1)), groups)).round().astype(np.int64)
            each = drawn if rng.random() < 0.5 else np.full(groups, drawn[0])
            keep = rank < each[group]
        ids, group, rank = ids[keep], group[keep], rank[keep]
        begins = np.flatnonzero(rank == 0)
        begins = begins[begins <= max(0, len(ids) - how.length)]
        start = int(rng.choice(begins)) if len(begins) else 0
        if rank[start : start + how.length].max() + 1 >= how.length:  # a group longer than a row: any part of it
            start = int(rng.integers(0, max(1, len(ids) - how.length + 1)))
        rows.append(row_of(ids, group, rank, config.index_factors, start=start, length=how.length))
        clip: ClipFacts = batch.clips[n][0]
        here = [] if rng.random() < how.null else condition_of(clip.facts, config.condition)
        prefixes.append(prefix_of(here, config))
    return stack(rows, prefixes)


# ---- training


class Trainer:
    """A prior in training. `run` goes on from where `folder` was left, and returns the best weights on held-out clips.

    Raises: ValueError where `folder` holds a run of other settings.
    """

    def __init__(
        self,
        config: TokenPriorConfig,
        how: Training,
        corpus: Corpus,
        loader: TokenLoader,
        held_out: Sequence[TokenSample],
        *,
        folder: Path,
        device: str = "cpu",
        save_seconds: float = 60.0,
        eval_every: int = 100,
    ) -> None:
        self.config, self.how, self.corpus, self.loader, self.folder = config, how, corpus, loader, folder
        self.held_out, self.device, self.save_seconds, self.eval_every = held_out, device, save_seconds, eval_every
        torch.manual_seed(how.seed)
        self.net = TokenPrior(config)
        ranks = torch.arange(config.max_rank).clamp(max=corpus.static.max_rank - 1)
        self.net.begin(corpus.static.frequencies[ranks])
        self.net.to(device)
        self.optimizer = torch.optim.AdamW(self._groups(), lr=how.lr, betas=(0.9, 0.95))
        self.step, self.best, self.best_bits = 0, {}, math.inf
        self.asked = json.loads(json.dumps({"prior": asdict(config), "training": asdict(how)}))
        self.asked["frequencies"] = corpus.static.sha256.hex()
        self._resume()

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [p for n, p in self.net.named_parameters() if n.startswith(("blocks", "head_")) and p.ndim == 2]
        base = [p for n, p in self.net.named_parameters() if n == "base"]
        other = {*map(id, matrices), *map(id, base)}
        rest = [p for p in self.net.parameters() if id(p) not in other]
        return [
            {"params": matrices, "weight_decay": self.how.weight_decay, "scale": 1.0},
            {"params": rest, "weight_decay": 0.0, "scale": 1.0},
            {"params": base, "weight_decay": 0.0, "scale": self.how.base_lr},
        ]

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = [
            f"{name}.{key}={value!r} there, {self.asked[name].get(key)!r} now"
            for name in ("prior", "training")
            for key, value in state["asked"][name].items()
            if self.asked[name].get(key) != value
        ]
        if differ or state["asked"] != self.asked:
            raise ValueError(
                f"{self.folder} holds a run of other settings or shards: {'; '.join(differ)[:500] or 'other ids'}; "
                "remove it, or name another --run"
            )
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        self.step, self.best, self.best_bits = state["step"], state["best"], state["best_bits"]
        log.info("goes on at step %d of %d", self.step, self.how.steps)

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{STATE}.{os.getpid()}"
        state = {
            "asked": self.asked,
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "step": self.step,
            "best": self.best,
            "best_bits": self.best_bits,
        }
        torch.save(state, part)
        os.replace(part, self.folder / STATE)

    def run(self) -> dict[str, Tensor]:
        stopped: list[int] = []
        before = {
            s: signal.signal(s, lambda number, _: stopped.append(number)) for s in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            self._run(stopped)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.best

    def _run(self, stopped: list[int]) -> None:
        if not self.best:
            self._evaluate()
        saved = began = time.monotonic()
        batches = iter(self.loader) if self.step < self.how.steps else iter(())
        total, seen = 0.0, 0
        for batch in batches:
            bits = self._advance(batch)
            self.step += 1
            total, seen = total + bits, seen + 1
            last = self.step == self.how.steps
            if self.step % self.eval_every == 0 or last:
                held = self._evaluate()
                line = {"step": self.step, "train_bits": total / seen, "val_bits": held, "best": self.best_bits}
                self._log(line | {"seconds": round(time.monotonic() - began, 1)})
                total, seen = 0.0, 0
            if stopped or last or time.monotonic() - saved > self.save_seconds:
                self.save()
                saved = time.monotonic()
            if stopped:
                raise KeyboardInterrupt
            if last:
                return

    def _advance(self, batch: Any) -> float:
        torch.manual_seed(hash((self.how.seed, self.step)) & 0x7FFFFFFF)  # of dropout; ints hash alike everywhere
        rows = training_rows(batch, self.config, self.how, step=self.step, nested=self.corpus.nested).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.lr * self.how.rate(self.step) * group["scale"]
        self.net.train()
        loss = self.net.bits(rows).sum() / rows.mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Bits a token of the first `length` tokens of the held-out clips; the best weights are kept."""
        self.net.eval()
        bits = tokens = 0.0
        for first in range(0, len(self.held_out), self.how.batch_size):
            part = self.held_out[first : first + self.how.batch_size]
            rows = []
            for sample in part:
                flat = tokens_of_ids(sample.ids, sample.tokens.groups, sample.tokens.codebook_sizes)
                where = flat.group[0].numpy(), flat.rank[0].numpy()
                rows.append(row_of(sample.ids, *where, self.config.index_factors, start=0, length=self.how.length))
            batch = stack(rows, [prefix_of([], self.config)] * len(part)).to(self.device)
            bits += float(self.net.bits(batch).double().sum())
            tokens += int(batch.mask.sum())
        value = bits / tokens
        if not math.isfinite(value):
            raise ValueError(f"the loss on held-out clips is {value} at step {self.step}: lower --lr ({self.how.lr})")
        if value < self.best_bits:
            self.best_bits = value
            self.best = {name: t.detach().cpu().clone() for name, t in self.net.state_dict().items()}
        return value

    def _log(self, line: dict[str, Any]) -> None:
        log.info(
            "step %d: %.3f bits a token, held out %.3f (best %.3f)",
            line["step"], line["train_bits"], line["val_bits"], line["best"],
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


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
