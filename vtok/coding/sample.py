"""`vtok sample`: videos drawn from an export's prior, decoded by its tokenizer.

    label or caption --> prefix --> prior, one digit after another --> ids --> decode --> videos, and a picture

The picture has a row for each sample and a column for each number of tokens kept of a group: of one draw, so that it
shows what the first tokens say and what the later ones add.

Letters: B samples, K tokens, G groups, Q ids a token, S digits, V values of a digit, T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtok.coding.entropy import from_symbols
from vtok.coding.prior_coding import PriorModel, PriorStream
from vtok.coding.prior_data import prefix_of, words_of
from vtok.coding.token_coding import decode_ids
from vtok.data.encode import write_video
from vtok.layers.token_prior import NULL, TokenPriorConfig
from vtok.loading import export_folder, load, read_prior_facts

log = logging.getLogger(__name__)


def condition_words(config: TokenPriorConfig, *, label: str | None = None, caption: str | None = None) -> list[int]:
    """The prefix (without START) of a label or a caption; of neither: that nothing is said.

    Raises: ValueError for a condition that the prior was not trained with, or knows no word of.
    """
    given = {"label": label, "caption": caption}
    asked = [name for name, value in given.items() if value is not None]
    if not asked:
        return [NULL] if config.condition != "none" else []
    if asked != [config.condition]:
        has = f"was trained with --condition {config.condition}"
        raise ValueError(f"--{asked[0]} {given[asked[0]]!r}: this prior {has}; train one with `vtok prior --condition`")
    text = str(given[asked[0]])
    words = [text] if asked == ["label"] else words_of(text)
    unknown = [word for word in words if word not in config.vocabulary]
    if len(unknown) == len(words):
        some = ", ".join(config.vocabulary[:12])
        raise ValueError(f"--{asked[0]} {text!r}: the prior knows none of it; it knows {some} ...")
    if unknown:
        log.warning("the prior does not know %s: left out", ", ".join(unknown))
    return prefix_of(words, config)[1:]


def conditions(config: TokenPriorConfig, *, captions: Sequence[str], count: int) -> list[str]:
    """What `count` samples are told where nobody says it: labels spread over those the prior knows, or captions, whole
    ones that it knows a word of; "" each where it can be told nothing."""
    if config.condition == "label":
        known = config.vocabulary
        return [known[at * len(known) // count] for at in range(count)] if known else [""] * count
    if config.condition == "caption":
        known = {text: None for text in captions if any(word in config.vocabulary for word in words_of(text))}
        return [*list(known)[:count], *[""] * (count - len(known))]
    return [""] * count


def draw_ids(
    prior: PriorModel,
    *,
    groups: Sequence[int],
    count: int = 1,
    words: list[int] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    guidance: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """ids [count, K, Q] of samples with `groups` tokens in each group.

    Args:
        words: `condition_words`; None: nothing is said.
        temperature: 0 takes the likeliest. top_k, top_p: of each digit, the k likeliest, the likeliest of together p.
        guidance: 1: none; more: logits go on from those without the condition, through those with it
            (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598).
    Raises: ValueError for settings out of range, or guidance without a condition.
    """
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1) or count < 1:
        raise ValueError(
            f"temperature={temperature} must be 0 or more, top_p={top_p} in (0, 1], top_k={top_k} and count={count} "
            "1 or more"
        )
    if guidance != 1 and (words is None or NULL in words or not words):
        raise ValueError(f"guidance={guidance} needs a condition: a label or a caption")
    rng, config = np.random.default_rng(seed), prior.config
    streams = [PriorStream(prior, words=words, batch=count)]
    streams += [PriorStream(prior, batch=count)] if guidance != 1 else []
    places = _places(config)
    out = []
    for size in groups:
        for stream in streams:
            stream.begin_group()
        for _ in range(size):
            known = [stream.hidden() for stream in streams]
            digits = np.zeros((count, 1, len(config.radices)), np.int64)
            for s in range(digits.shape[2]):
                told = [prior.exact.logits(inner, digits, rank, s)[:, 0] for inner, rank in known]
                logits = told[0] if len(told) == 1 else told[1] + guidance * (told[0] - told[1])
                logits = np.where(_possible(digits[:, 0], s, places[s], config), logits, -np.inf)
                digits[:, 0, s] = choose(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
            for stream in streams:
                stream.accept(digits)
            out.append(digits)
    symbols = np.concatenate(out, 1) if out else np.zeros((count, 0, len(config.radices)), np.int64)
    return np.stack([from_symbols(row, config.index_factors) for row in symbols])


def choose(
    logits: np.ndarray, rng: np.random.Generator, *, temperature: float, top_k: int | None, top_p: float
) -> np.ndarray:
    """One value [B] of each distribution [B, V]."""
    uniform = rng.random(len(logits))  # drawn in any case: the same seed goes the same way
    if temperature == 0:
        return logits.argmax(-1)
    order = np.argsort(-logits, -1, kind="stable")
    sorted_logits = np.take_along_axis(logits, order, -1)
    p = np.exp((sorted_logits - sorted_logits[:, :1]) / temperature)
    p = p / p.sum(-1, keepdims=True)
    if top_k is not None:
        p[:, top_k:] = 0.0
    p = np.where(p.cumsum(-1) - p < top_p, p, 0.0)  # the one that passes top_p stays
    upper = p.cumsum(-1)
    place = (upper < (uniform * upper[:, -1])[:, None]).sum(-1)
    return np.take_along_axis(order, np.minimum(place, (p > 0).sum(-1) - 1)[:, None], -1)[:, 0]


def _places(config: TokenPriorConfig) -> list[tuple[int, int, int]]:
    """Of each digit: its id, the first digit of that id, what it counts in it."""
    out, first = [], 0
    for q, factors in enumerate(config.index_factors):
        out += [(q, first, math.prod(factors[:n])) for n in range(len(factors))]
        first += len(factors)
    return out


def _possible(digits: np.ndarray, s: int, place: tuple[int, int, int], config: TokenPriorConfig) -> np.ndarray:
    """[B, V]: values of digit s with which the id can still lie in its codebook (split factors may pass it)."""
    q, first, weight = place
    weights = np.cumprod([1, *config.radices[first:s]])[: s - first]
    below = digits[:, first:s] @ weights if s > first else np.zeros(len(digits), np.int64)
    return below[:, None] + np.arange(config.radices[s]) * weight < config.codebook_sizes[q]


def kept(ids: np.ndarray, groups: Sequence[int], budget: int) -> tuple[np.ndarray, list[int]]:
    """The first `budget` tokens of each group: ids [K', Q] of ids [K, Q], and their tokens a group."""
    rank = np.concatenate([np.arange(n) for n in groups])
    return ids[rank < budget], [min(n, budget) for n in groups]


def at_budgets(
    model: Any, ids: np.ndarray, *, layout: dict[str, Any], groups: Sequence[int], budgets: Sequence[int]
) -> dict[int, np.ndarray]:
    """{tokens kept of a group: frames uint8 [T, H, W, 3]} of one sample's ids [K, Q]."""
    size = (int(layout["size"][0]), int(layout["size"][1]))
    out = {}
    for budget in budgets:
        part, counts = kept(ids, groups, budget)
        out[budget] = decode_ids(model, part, groups=counts, frames=int(layout["frames"]), size=size)
    return out


def budgets_of(most: int, *, nested: bool) -> list[int]:
    """1, 4, 16 ... and all; all alone for tokens that no prefix of decodes."""
    return [*(4**n for n in range(16) if 4**n < most and nested), most]


def sheet(samples: Sequence[dict[int, np.ndarray]], *, gap: int = 2) -> np.ndarray:
    """One picture uint8 [H, W, 3]: a row a sample, a column a budget, each the middle frame."""
    rows = []
    for sample in samples:
        cells = [frames[len(frames) // 2] for frames in sample.values()]
        height = cells[0].shape[0]
        between = np.full((height, gap, 3), 255, np.uint8)
        row = [part for cell in cells for part in (cell, between)][:-1]
        rows += [np.concatenate(row, 1), np.full((gap, sum(part.shape[1] for part in row), 3), 255, np.uint8)]
    return np.concatenate(rows[:-1])


def draw_samples(
    model: Any, facts: dict[str, Any], *, count: int, tokens: int | None = None, **draw: Any
) -> list[dict[int, np.ndarray]]:
    """`count` samples of the prior's commonest clip (prior.json: layout), each decoded at 1, 4, 16 ... tokens a group.

    tokens: of each group, at most; None: as many as in training.
    """
    layout = facts["layout"]
    groups = [min(n, tokens) if tokens else n for n in layout["groups"]]
    ids = draw_ids(model.shipped.prior, groups=groups, count=count, **draw)
    budgets = budgets_of(max(groups), nested=bool(facts.get("nested")))
    return [at_budgets(model, each, layout=layout, groups=groups, budgets=budgets) for each in ids]


def sample(
    export: str | Path,
    out: str | Path,
    *,
    label: str | None = None,
    caption: str | None = None,
    count: int = 4,
    tokens: int | None = None,
    device: str = "cpu",
    **draw: Any,
) -> list[int]:
    """Write `count` samples as OUT/sample_00.mp4 ... and OUT/samples.png; returns the budgets of its columns.

    Raises: ValueError for an export without a prior, or settings out of range.
    """
    folder, out = export_folder(export), Path(out)
    model = load(folder).to(device)
    prior = model.shipped.prior
    if prior is None:
        raise ValueError(f"{export} has no prior: train one with `vtok tokenize` and `vtok prior`")
    facts = read_prior_facts(folder)
    most = max(facts["layout"]["groups"])
    if tokens is not None and not 1 <= tokens <= most:
        raise ValueError(f"--tokens {tokens}: a group of this model has 1 to {most}")
    if tokens is not None and tokens < most and not facts.get("nested"):
        raise ValueError(f"--tokens {tokens}: the tokens of this model are a grid, of which none can be left out")
    words = condition_words(prior.config, label=label, caption=caption)
    made = draw_samples(model, facts, count=count, tokens=tokens, words=words or None, **draw)
    out.mkdir(parents=True, exist_ok=True)
    fps = facts["layout"]["fps"] or 1
    for number, each in enumerate(made):
        write_video(out / f"sample_{number:02d}.mp4", list(each.values())[-1], fps=fps, crf=12)
    write_video(out / "samples.png", [sheet(made)], fps=1, codec="png", container="image2")
    return list(made[0])


def main(argv: list[str]) -> int:
    """`vtok sample EXPORT --out DIR [--label L | --caption C]`."""
    parser = argparse.ArgumentParser(prog="vtok sample", description="Videos drawn from an export's prior.")
    add = parser.add_argument
    add("export", help="export folder or Hub repository with a prior (`vtok prior`)")
    add("--out", required=True, metavar="DIR", help="where sample_00.mp4 ... and samples.png go")
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--label", help="one of the labels it was trained with")
    said.add_argument("--caption", help="words; those it does not know are left out")
    add("--count", type=int, default=4, help="samples (%(default)s)")
    add("--tokens", type=int, metavar="K", help="of each group (default: all)")
    add("--temperature", type=float, default=1.0, help="0: the likeliest (%(default)s)")
    add("--top-k", type=int, help="the k likeliest values of each digit (default: all)")
    add("--top-p", type=float, default=1.0, help="the likeliest values of a digit that make up p (%(default)s)")
    add("--guidance", type=float, default=1.0, help="above 1: more of the label or caption (%(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="of the decoder; the prior runs on the CPU")
    args = vars(parser.parse_args(argv))
    out, count = args["out"], args["count"]
    budgets = sample(args.pop("export"), args.pop("out"), **args)
    print(f"{out}: {count} videos; samples.png shows each with {', '.join(map(str, budgets))} tokens a group")
    return 0
