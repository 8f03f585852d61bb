"""A small causal language model for texts of clips: python data/tiny_lm.py captions.jsonl OUT [--steps 1800].

It is the frozen LLM of commands and tests where no other is at hand (`objective.llm.name=OUT`); it knows the captions
and questions of one procedural train split (vtok/data/synthetic.py) and nothing else. Reads a manifest that
`demo_corpus.py` wrote (its rows with split "train") or a folder of shards. Trained in minutes on one core; a folder
that holds the same model already is left as it is.

What it learns: given a description of a clip in front, to answer questions about it and to describe it, in the
prompts that projectors are trained with (`vtok.llm.TaskConfig`). So what stands in place of "<video>" decides the
answer, as it does in a large model, which a projector over a frozen model needs:

- In every text the names of colours, shapes, directions, textures and palettes are exchanged at random, the same way
  in description, question and answer. What is true of a clip cannot be learned by heart, only read.
- A description is its words, or phrases: one vector each, the sum of several words' embeddings with noise added, in
  any order and several times over, at positions that leave gaps. Or it is told as patches of frames tell it: frame
  after frame, each clause again where the thing is seen, some of its words left out, often those of its motion (a
  frame shows none), lost among vectors that say nothing. Frozen models have not seen a projector's vectors; large ones
  can be spoken to in mixtures of words, and this makes a small one alike.
- The questions of a clip stand side by side after its description and do not see one another.

With --repeat it is one for texts (data/demo_texts.py): names stay, and each text is also to be repeated word for word,
from its words or from runs of several words as one vector each, in order. The frozen reader of a compressor of texts.

Letters: B descriptions, L positions, W words of a phrase, D width.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag

from vtok.data.synthetic_needles import PLAIN
from vtok.data.synthetic_scenes import COLOURS, DIRECTIONS, MOST_TOLD, PALETTES, SHAPES, TEXTURES
from vtok.llm import PLACE, LLMConfig, TaskConfig, ask, load_llm
from vtok.llm.tasks import ask_as
from vtok.types import Clip

NAMES = (tuple(COLOURS), SHAPES, tuple(DIRECTIONS), TEXTURES, tuple(PALETTES))
END = "<end>"
GROUP = 8  # batches drawn together
RECIPE = 5  # raised when the same settings would give another model
MOTION = {*DIRECTIONS, "moves", "stays", "still"}
SERIES = re.compile(r"For an instant (an? [^.]*) flash on a plain (\w+) ground\.")  # several shapes, one a frame
MOST_ASKED = 3  # questions about the needles of a stretch of shots
RUNS = (2, 3, 4, 5, 6, 8)  # words that are one vector, of a text that is to be repeated
# of a position's loss: what is asked for, descriptions, and the wording of questions and descriptions
WEIGHTS = {"answer": 1.0, "description": 0.2, "repeated": 0.5, "wording": 0.02}


@dataclass
class TinyConfig:
    seed: int = 0
    steps: int = 1800
    batch_size: int = 32  # descriptions a step, each with its questions
    lr: float = 2e-3
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    positions: int = 1024  # longest text, and the reach of the gaps
    phrases: float = 0.25  # share of the descriptions that are phrases, not words
    frames: float = 0.5  # share of the descriptions that are told frame by frame
    longest: int = 320  # vectors of a description told frame by frame
    noise: float = 0.3  # standard deviation of the noise on a phrase, over the embeddings' RMS
    empty: float = 0.05  # share of the descriptions that are left out: without a video, the model guesses evenly
    tasks: TaskConfig = field(default_factory=TaskConfig)  # the prompts
    repeat: bool = False  # texts are repeated word for word too, and may come without questions

    def settings(self) -> dict[str, Any]:
        """What a model is a function of, beside its texts."""
        return {key: value for key, value in asdict(self).items() if key != "repeat" or value}


def read_texts(source: Path, *, repeat: bool = False) -> list[dict[str, Any]]:
    """[{key, caption, captions, qa}] of the train rows of a manifest (all rows where none is marked), or of a folder of
    shards.

    A row's caption is its `text` where it has one, the sample's txt in shards; captions: those of its shots. repeat:
    without questions, too.
    Raises: ValueError where there is no caption with questions.
    """
    rows: list[dict[str, Any]] = []
    if source.is_dir():
        for path in sorted(source.glob("*.tar")):
            found: dict[str, dict[str, Any]] = {}
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.rpartition(".")
                    file = tar.extractfile(member) if suffix in ("json", "txt") else None
                    if file is not None:
                        facts = json.load(file) if suffix == "json" else {"text": file.read().decode("utf-8")}
                        found.setdefault(key, {"key": key}).update(facts)
            rows += found.values()
    elif source.is_file():
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    every = [
        {
            "key": str(r.get("key") or r.get("file")),
            "caption": r.get("text") or r.get("caption"),
            "captions": r.get("captions") or [],
            "qa": r.get("qa") or [],
            "split": r.get("split"),
        }
        for r in rows
    ]
    texts = [row for row in every if row["caption"] and (row["qa"] or repeat) and row.pop("split") in (None, "train")]
    if not texts:
        raise ValueError(f"{source}: no row of the train split with a caption and questions; see data/demo_corpus.py")
    return texts


def exchanged(texts: list[str], rng: random.Random) -> list[str]:
    """The texts with the names of each kind exchanged for one another, the same way in all of them."""
    to: dict[str, str] = {}
    for names in NAMES:
        to |= dict(zip(names, rng.sample(names, len(names))))
    words = re.compile(r"\b(" + "|".join(to) + r")\b")
    return [words.sub(lambda found: to[found[0]], text) for text in texts]


def make_tokenizer(texts: Iterable[str], config: TinyConfig) -> Any:
    """A byte-level BPE of the texts: every byte can be written, the corpus's words are one id each."""
    listed = list(texts)
    known = [f" {name}" for names in NAMES for name in names] * max(2, len(listed) // 100)
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(
        listed + known, vocab_size=config.vocabulary, min_frequency=2, special_tokens=[END], show_progress=False
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=END, pad_token=END)


class Document(NamedTuple):
    """One description and what is asked after it. slots: the ids at each position (several in a phrase, none in
    one that says nothing); branch: 0 for
    the description, 1, 2 ... for what follows; places: positions; labels: (position, id, weight) to be predicted."""

    slots: list[list[int]]
    branch: list[int]
    places: list[int]
    labels: list[tuple[int, int, float]]


def make_document(row: dict[str, Any], tokenizer: Any, config: TinyConfig, rng: random.Random) -> Document:
    """A clip's texts with exchanged names, or as they are where they are repeated."""
    row = row if config.repeat else _some_shots(row, rng)
    questions, tasks = row["qa"], config.tasks
    texts = [row["caption"], *(str(q[k]) for q in questions for k in ("question", "answer"))]
    caption, *rest = texts if config.repeat else exchanged(texts, rng)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    mark = rng.random()
    slots = [] if mark < config.empty else [[i] for i in ids(caption)]
    repeats, motion = 1, True
    if slots and mark < config.empty + config.phrases and config.repeat:
        words, size = ids(f" {caption}"), rng.choice(RUNS)
        slots = [words[i : i + size] for i in range(0, len(words), size)]
    elif slots and mark < config.empty + config.phrases:
        repeats = rng.choice((1, 1, 1, 2, 4))
        slots, motion = _phrases(caption, ids, rng, repeats)
    elif slots and not config.repeat and mark < config.empty + config.phrases + config.frames:
        slots, repeats, motion = _frames(caption, ids, rng, most=config.longest)
    asked = [
        (ask_as(rng.choice(tasks.qa_prompts), {"question": question}), f" {answer}", "answer")
        for question, answer in zip(rest[::2], rest[1::2])
        if (repeats == 1 or not answer.isdigit())  # what is told twice cannot be counted
        and (motion or answer not in DIRECTIONS)
    ]
    if config.repeat:
        if slots or not asked:
            asked.append((rng.choice(tasks.reconstruction_prompts), f" {caption}", "repeated"))
    elif rng.random() < 0.3 * bool(slots) or not asked:
        prompts = tasks.caption_prompts + tasks.reconstruction_prompts
        asked.append((rng.choice(prompts), f" {caption}", "description"))
    longest = max(len(ids(p + a)) + 1 for p, a, _ in asked)
    room = config.positions - longest
    span = len(slots)
    if not config.repeat and rng.random() >= 0.5:
        span = rng.randint(len(slots), max(room, len(slots)))
    branch, places = [0] * len(slots), sorted(rng.sample(range(span), len(slots)))
    labels = [
        (i, slot[0], WEIGHTS["wording"]) for i, slot in enumerate(slots) if i and len(slot) == len(slots[i - 1]) == 1
    ]
    for number, (prompt, answer, kind) in enumerate(asked, 1):
        before, after = ids(prompt.split(PLACE)[-1]), [*ids(answer), tokenizer.eos_token_id]
        first = len(slots)
        slots += [[i] for i in before + after]
        branch += [number] * (len(slots) - first)
        places += range(span, span + len(slots) - first)
        for at, item in enumerate(before[1:] + after, first + 1):
            labels.append((at, item, WEIGHTS[kind] if at >= first + len(before) else WEIGHTS["wording"]))
    return Document(slots, branch, places, labels)


def _some_shots(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A stretch of a clip of more shots than its caption tells, and questions about its needles: as many shots as a
    caption tells at most, few more often than many. Other clips, and those without needles, are as they were."""
    shots, asked = row["captions"], [q for q in row["qa"] if q.get("type") == "needle"]
    if len(shots) <= MOST_TOLD or not asked:
        return row
    count, one = int((MOST_TOLD + 1) ** (rng.random() ** 1.5)), rng.choice(asked)
    at = next(i for i, shot in enumerate(shots) if one["end_s"] <= shot["end_s"])
    first = rng.randint(max(0, at - count + 1), min(at, len(shots) - count))
    told = shots[first : first + count]
    asked = [q for q in asked if told[0]["start_s"] <= q["start_s"] and q["end_s"] <= told[-1]["end_s"]]
    texts = [f"Scene {number}: {shot['text']}" for number, shot in enumerate(told, 1)]
    caption = " ".join(texts) if count > 1 else told[0]["text"]
    return {**row, "caption": caption, "qa": rng.sample(asked, min(len(asked), MOST_ASKED))}


def _scenes(caption: str) -> list[tuple[list[str], list[str]]]:
    """What each scene of a description begins with ("Scene 2:" or nothing), and its clauses; shapes that flash one
    after the other are told one by one, as frames show them."""
    caption = SERIES.sub(
        lambda found: " ".join(
            f"For an instant {picture} flashes on a plain {found[2]} ground."
            for picture in re.split(", | and ", found[1])
        ),
        caption,
    )
    out = []
    for scene in re.split(r"(?=Scene \d+:)", caption):
        clauses = [
            clause.strip(" .")
            for clause in re.split(r",(?! then)| and |(?= over )|(?<=[.:])", scene)
            if clause.strip(" .")
        ]
        head = [clauses.pop(0)] if clauses and clauses[0].startswith("Scene") else []
        out.append((head, clauses))
    return out


def _shortened(clause: str, rng: random.Random, share: float, *, motion: bool) -> str:
    """A clause about one thing without a share of its words, and without those of its motion; what is asked about
    stays."""
    if "appears first" in clause:
        return clause
    asked = {"flashes", *COLOURS, *SHAPES, *DIRECTIONS, *PALETTES, *PLAIN}
    words = [word for word in clause.split() if motion or word not in MOTION]
    return " ".join(word for word in words if word in asked or rng.random() >= share) or clause


def _phrases(caption: str, ids: Any, rng: random.Random, repeats: int) -> tuple[list[list[int]], bool]:
    """A description's clauses as sums of 2, 4 or all their words, whole ones within a scene in any order; and whether
    they tell motion."""
    out: list[list[int]] = []
    size, shuffled = rng.choice((2, 4, 64)), rng.random() < 0.7
    share = rng.choice((0.0, 0.5, 1.0)) if size == 64 else 0.0
    motion = share == 0.0 or rng.random() < 0.5
    for head, clauses in _scenes(caption):
        clauses = clauses * repeats
        if shuffled and size == 64:
            rng.shuffle(clauses)
        for clause in head + [_shortened(c, rng, share, motion=motion) for c in clauses]:
            words = ids(f" {clause}")
            out += [words[i : i + size] for i in range(0, len(words), size)]
    return out, motion


def _frames(caption: str, ids: Any, rng: random.Random, *, most: int) -> tuple[list[list[int]], int, bool]:
    """A description as patches of frames would tell it, one vector a clause, in how many frames, and whether motion is
    told: what appears late is not told before, a flash hides the rest for a frame, and vectors of the ground or of
    nothing stand between."""
    scenes = [(head, clauses) for head, clauses in _scenes(caption) if clauses]
    frames = max(1, min(rng.choice((1, 2, 4, 8, 16)), most // (2 * sum(len(clauses) for _, clauses in scenes))))
    out: list[list[int]] = []
    share, motion = rng.choice((0.0, 0.5, 1.0)), rng.random() < 0.5
    for head, clauses in scenes:
        count = max(1, frames // len(scenes))
        flashes = [c for c in clauses if "flashes" in c]
        late = [found for c in clauses if (found := re.match(r"The (\w+ \w+) appears first, then the (\w+ \w+)", c))]
        since = {found[k + 1]: min(count * (k + 1) // 3, count - 1) for found in late for k in range(2)}
        if late and count > 2 and rng.random() < 0.5:  # seen in the frames alone
            clauses = [c for c in clauses if "appears first" not in c]
        grounds = [c for c in clauses if c.startswith("over ")]
        between = ids(f" {grounds[0]}") if grounds and rng.random() < 0.5 else []
        of_flash = {c: ids(" on" + c.rpartition(" on")[2]) for c in flashes}
        hidden = rng.sample(range(count), min(len(flashes), count))
        out += [ids(f" {c}") for c in head]
        for frame in range(count):
            told = [c for c in clauses if c not in flashes and rng.random() < (0.9 if frame else 1.0)]
            told = [
                c for c in told if all(frame >= at for name, at in since.items() if set(name.split()) <= set(c.split()))
            ]
            around = between
            if frame in hidden and count > len(flashes):
                told = [flashes[hidden.index(frame)]]
                around = of_flash[told[0]] if between else []
            elif count <= len(flashes):
                told += flashes
            empty = rng.randint(0, max(0, min(15, most // frames - len(told))))
            vectors = [ids(f" {_shortened(c, rng, share, motion=motion)}") for c in told] + [
                list(around) for _ in range(empty)
            ]
            rng.shuffle(vectors)
            out += vectors
    return out, frames, motion


def make_batch(documents: list[Document]) -> dict[str, Tensor]:
    """ids [I] of all slots, sizes [B * L] of the slots (1 in padding), mask [B, 1, L, L] bool, places [B, L], and row,
    at, label, weight [M] of what is predicted."""
    batch, most = len(documents), max(len(d.slots) for d in documents)
    slots = [slot for d in documents for slot in [*d.slots, *[[0]] * (most - len(d.slots))]]
    branch, places = torch.full((batch, most), -1), torch.zeros(batch, most, dtype=torch.int64)
    for row, document in enumerate(documents):
        count = len(document.slots)
        branch[row, :count], places[row, :count] = torch.tensor(document.branch), torch.tensor(document.places)
    earlier = torch.ones(most, most, dtype=torch.bool).tril()
    sees = earlier & ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])) & (branch[:, None] >= 0)
    sees |= torch.eye(most, dtype=torch.bool)  # padding sees itself: a softmax over nothing is not a number
    labels = torch.tensor([(row, *label) for row, d in enumerate(documents) for label in d.labels], dtype=torch.float64)
    row, at, label = labels[:, :3].long().unbind(1)
    ids, sizes = torch.tensor([i for slot in slots for i in slot]), torch.tensor([len(slot) for slot in slots])
    parts = dict(ids=ids, sizes=sizes, mask=sees[:, None], places=places, row=row, at=at - 1, label=label)
    return {**parts, "weight": labels[:, 3].float()}


def loss_of(model: Any, batch: dict[str, Tensor], *, noise: float) -> Tensor:
    """Weighted cross-entropy. A phrase is the sum of its words over the root of their number, which keeps the scale; a
    vector that says nothing is noise of that scale."""
    words, sizes = model.get_input_embeddings().weight, batch["sizes"]
    sums = embedding_bag(batch["ids"], words, sizes.cumsum(0) - sizes, mode="sum")
    embeds = sums / sizes.clamp(min=1)[:, None].sqrt()
    size = words.detach().square().mean().sqrt() * torch.where(sizes > 1, noise, (sizes == 0).float())
    embeds = (embeds + torch.randn_like(embeds) * size[:, None]).unflatten(0, batch["places"].shape)
    mask = torch.zeros_like(batch["mask"], dtype=embeds.dtype).masked_fill(
        ~batch["mask"], torch.finfo(embeds.dtype).min
    )
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["places"], use_cache=False)[0]
    logits = model.lm_head(hidden[batch["row"], batch["at"]])
    each = cross_entropy(logits, batch["label"], reduction="none")
    return (each * batch["weight"]).sum() / batch["weight"].sum()


def train_tiny_lm(
    source: Path | str, out: Path | str, config: TinyConfig | None = None, *, progress: bool = False
) -> Path:
    """The folder `out` with a model and its tokenizer as `save_pretrained` writes them, and tiny_lm.json about them.

    Raises: ValueError for a source without texts, and where `out` holds something else.
    """
    config, source, out = config or TinyConfig(), Path(source), Path(out)
    texts = read_texts(source, repeat=config.repeat)
    facts: dict[str, Any] = {"recipe": RECIPE, "settings": config.settings()}
    known = json.dumps([facts, texts], sort_keys=True).encode()
    facts["hash"] = hashlib.sha256(known).hexdigest()
    told = out / "tiny_lm.json"
    if told.is_file() and json.loads(told.read_text(encoding="utf-8")).get("hash") == facts["hash"]:
        return out
    if out.exists() and any(out.iterdir()) and not told.is_file():
        raise ValueError(f"{out} holds files of something else; name another folder")
    rng = random.Random(config.seed)
    wording = [
        prompt for name in ("caption", "qa", "reconstruction") for prompt in getattr(config.tasks, f"{name}_prompts")
    ]
    spoken = [t for row in texts for t in (row["caption"], *(f"{q['question']} {q['answer']}" for q in row["qa"]))]
    tokenizer = make_tokenizer(spoken + [p.replace(PLACE, "") for p in wording] * 20, config)
    torch.manual_seed(config.seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=3 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.positions,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.05)
    warm = max(1, config.steps // 20)
    losses, ready = [], []
    for step in track(range(config.steps), description="tiny language model", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        if not ready:  # documents of like length together: little padding
            rows = rng.choices(texts, k=config.batch_size * GROUP)
            drawn = sorted((make_document(row, tokenizer, config, rng) for row in rows), key=lambda d: len(d.slots))
            ready = [drawn[i : i + config.batch_size] for i in range(0, len(drawn), config.batch_size)]
            rng.shuffle(ready)
        loss = loss_of(model, make_batch(ready.pop()), noise=config.noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    out.mkdir(parents=True, exist_ok=True)
    told.unlink(missing_ok=True)  # the folder counts as made once this stands again
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    last = losses[-max(1, len(losses) // 20) :]
    facts |= {"texts": len(texts), "loss": sum(last) / len(last)}
    told.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return out


def accuracy(folder: Path | str, rows: list[dict[str, Any]], *, captions: bool) -> dict[str, float]:
    """Share of questions whose likeliest choice is right, by type and over all ("all"); with the clip's caption in
    place of a video, or with nothing there."""
    llm = load_llm(LLMConfig(name=str(folder)))
    clip = Clip(
        keys=[row["key"] for row in rows], text=[row["caption"] for row in rows], qa=[row["qa"] for row in rows]
    )
    answered = ask(llm, clip, template=TaskConfig().qa_prompts[0], captions=captions)
    found: dict[str, list[bool]] = {"all": []}
    for one in answered:
        if one.right is not None:
            found.setdefault(one.type, []).append(one.right)
            found["all"].append(one.right)
    return {kind: sum(right) / len(right) for kind, right in found.items() if right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="captions.jsonl of a procedural corpus, or a folder of its shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", type=Path, help="such a folder or manifest (all its rows) to measure answers on")
    for name in ("seed", "steps", "batch_size", "width", "layers", "longest"):
        default = getattr(TinyConfig(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--repeat", action="store_true", help="texts are repeated word for word, too")
    args = vars(parser.parse_args())
    source, out, held_out = (args.pop(name) for name in ("source", "out", "held_out"))
    train_tiny_lm(source, out, TinyConfig(**args), progress=True)
    print(f"{out}: {json.loads((out / 'tiny_lm.json').read_text())['loss']:.3f} nats a position")
    for told in (True, False) if held_out else ():
        kinds = accuracy(out, read_texts(held_out), captions=told)
        text = ", ".join(f"{kind} {share:.1%}" for kind, share in kinds.items())
        print(f"answers {'with the caption' if told else 'blind'}: {text}")


if __name__ == "__main__":
    main()
