"""Write procedural stories as a manifest of texts: python data/demo_texts.py OUT/texts.jsonl --stories 2000.

For compressors of text (configs/language/): `vtok shards --texts OUT/texts.jsonl --out SHARDS` packs it. A story is a
few sentences about who did what with which thing where. Every word of a sentence is drawn by itself, so a text cannot
be guessed, only read; questions ask for one word of one sentence, and offer others of the same story first. Story k is
a function of (seed, k): a longer manifest begins with the shorter one, and its splits do not move.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import Any

NAMES = "Anna Boris Clara Dmitri Elsa Farid Greta Hugo Irene Jonas Karin Leon Mira Nadia Otto Petra Quentin Rosa Samir"
NAMES += " Tilda Ulrich Vera Wanda Yusuf"
COLOURS = "red blue green yellow white black brown grey golden silver purple orange"
KINDS = "small heavy broken old new painted wooden round dusty borrowed"
THINGS = "lamp basket letter drum ladder mirror kettle blanket clock violin bucket map candle chair rope book mask coin"
THINGS += " umbrella bottle"
PLACES = "kitchen garden cellar attic station harbour library market tower stable bakery school bridge forest office"
PLACES += " theatre hospital museum garage chapel"
TIMES = ("Early in the morning", "At noon", "In the evening", "Later", "Before the storm", "After dinner", "On Monday",
         "On Friday", "Without a word", "Soon")  # fmt: skip
FORMS = (  # each gives who, what, where; `does` is what the question says that was done
    ("{who} carried the {thing} to the {place}", "carry"),
    ("{who} found the {thing} behind the {place}", "find"),
    ("{who} hid the {thing} under the {place}", "hide"),
    ("{who} sold the {thing} near the {place}", "sell"),
    ("{who} repaired the {thing} in the {place}", "repair"),
    ("{who} lost the {thing} on the way to the {place}", "lose"),
    ("{who} left the {thing} beside the {place}", "leave"),
    ("{who} washed the {thing} in front of the {place}", "wash"),
)


def story(seed: int, number: int, *, sentences: tuple[int, int] = (4, 10)) -> dict[str, Any]:
    """{key, text, source, qa} of one story, of so many sentences, shortest and longest."""
    rng = random.Random(f"story:{seed}:{number}")
    count = rng.randint(*sentences)
    names, places = rng.sample(NAMES.split(), min(count, 6)), rng.sample(PLACES.split(), min(count, 8))
    things = [
        f"{rng.choice((rng.choice(COLOURS.split()), rng.choice(KINDS.split())))} {noun}"
        for noun in rng.sample(THINGS.split(), count)
    ]
    told, qa = [], []
    for thing in things:
        who, place = rng.choice(names), rng.choice(places)
        form, does = rng.choice(FORMS)
        when = f"{rng.choice(TIMES)}, " if rng.random() < 0.5 else ""
        told.append(f"{when}{form.format(who=who, thing=thing, place=place)}.")
        qa.append(_question("who", f"Who was there with the {thing}?", who, names, NAMES.split(), rng))
        qa.append(_question("where", f"Where did {who} {does} the {thing}?", place, places, PLACES.split(), rng))
    asked = sorted(rng.sample(range(len(qa)), min(4, len(qa))))
    questions = [{"id": str(i), **qa[at]} for i, at in enumerate(asked)]
    name = f"story-{number:06d}"
    return {"key": name, "text": " ".join(told), "source": name, "qa": questions}


def _question(
    kind: str, question: str, answer: str, near: list[str], every: list[str], rng: random.Random
) -> dict[str, Any]:
    others = [word for word in near if word != answer]
    others = rng.sample(others, min(3, len(others)))
    others += rng.sample([word for word in every if word != answer and word not in others], 3 - len(others))
    choices = [answer, *others]
    rng.shuffle(choices)
    return {"type": kind, "question": question, "answer": answer, "choices": choices}


def write_stories(
    out: Path | str,
    *,
    stories: int = 2000,
    seed: int = 0,
    first: int = 0,
    sentences: tuple[int, int] = (4, 10),
    val_fraction: float = 0.1,
) -> Path:
    """The manifest `out` of so many stories, a share of them validation by a hash of their numbers."""
    if stories < 1 or not 1 <= sentences[0] <= sentences[1] <= len(THINGS.split()):
        raise ValueError(
            f"stories={stories} must be 1 or more, sentences={sentences} shortest and longest, 1 to "
            f"{len(THINGS.split())}"
        )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for number in range(first, first + stories):
            row = story(seed, number, sentences=sentences)
            share = int(hashlib.sha256(f"{seed}:{number}".encode()).hexdigest()[:8], 16) / 16**8
            file.write(json.dumps({**row, "split": "val" if share < val_fraction else "train"}) + "\n")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", type=Path, help="the manifest to write, such as texts.jsonl")
    parser.add_argument("--stories", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first story")
    parser.add_argument("--sentences", type=int, nargs=2, default=[4, 10], metavar=("LEAST", "MOST"))
    parser.add_argument("--val-fraction", type=float, default=0.1)
    options = vars(parser.parse_args())
    options["sentences"] = tuple(options["sentences"])
    print(write_stories(options.pop("out"), **options))


if __name__ == "__main__":
    main()
