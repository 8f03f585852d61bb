"""data/tiny_lm.py: texts stay true when names are exchanged, packing changes nothing, folders are made once."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from vtok.data.synthetic import LEVELS, scene
from vtok.data.synthetic_scenes import DIRECTIONS, MOST_TOLD
from vtok.llm import LLMConfig, load_llm, read

pytest.importorskip("transformers")
torch.set_num_threads(1)
SCRIPT = Path(__file__).parent.parent / "data" / "tiny_lm.py"
spec = importlib.util.spec_from_file_location("tiny_lm", SCRIPT)
assert spec and spec.loader
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny_lm"] = tiny
spec.loader.exec_module(tiny)

SMALL = dict(steps=2, batch_size=4, width=16, layers=1, heads=2, vocabulary=640, positions=512)


def rows(count: int, *, first: int = 0, levels: tuple[int, ...] = tuple(range(len(LEVELS)))):
    return [
        scene(0, i, level=levels[i % len(levels)]).row(f"{i}.mp4", split="train") for i in range(first, first + count)
    ]


def manifest(path: Path, entries) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in entries))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    source = manifest(folder / "captions.jsonl", rows(24))
    return source, tiny.train_tiny_lm(source, folder / "lm", tiny.TinyConfig(**SMALL))


def test_exchanged_names_keep_texts_true():
    changed = 0
    for row in rows(60, levels=(2,)):
        asked = {q["type"]: q for q in row["qa"]}
        texts = [row["caption"], *(asked[k][part] for k in ("colour", "shape") for part in ("question", "answer"))]
        caption, colour_of, colour, shape_of, shape = tiny.exchanged(texts, random.Random(row["index"]))
        changed += caption != row["caption"]
        things = [tuple(words.split()) for words in re.findall(r"\b[Aa] (\w+ \w+ \w+)(?= moves| stays)", caption)]
        assert len(things) == LEVELS[2].shapes
        assert [c for c, _, s in things if s == re.search(r"the (\w+)\?", colour_of)[1]] == [colour]
        assert [s for c, _, s in things if c == re.search(r"the (\w+) object", shape_of)[1]] == [shape]
    assert changed == 60


def test_answers_are_labelled_and_questions_do_not_see_one_another(small):
    _, folder = small
    llm = load_llm(LLMConfig(name=str(folder)))
    config = tiny.TinyConfig(**SMALL, phrases=0.5)
    rng = random.Random(3)
    drawn = [tiny.make_document(row, llm.tokenizer, config, rng) for row in rows(12)]
    batch = tiny.make_batch(drawn)
    assert any(len(slot) > 1 for document in drawn for slot in document.slots)
    assert any(d.places[-1] > len(d.slots) for d in drawn)  # gaps
    for row, document in enumerate(drawn):
        sees = batch["mask"][row, 0]
        count = len(document.slots)
        for at in range(count):
            others = [j for j in range(count) if j < at and document.branch[j] in (0, document.branch[at])]
            assert sees[at].nonzero()[:, 0].tolist() == [*others, at]
        assert max(document.places) < config.positions and document.branch == sorted(document.branch)
        answers = [i for _, i, weight in document.labels if weight == tiny.WEIGHTS["answer"]]
        said = llm.tokenizer.decode(answers).split("<end>")
        assert len(said) >= 3 and all(re.fullmatch(r" (\w+|\w+ \w+)", text) for text in said[:-1])


def test_a_description_without_motion_is_not_asked_about_it_and_flashes_stay(small):
    _, folder = small
    tokenizer = load_llm(LLMConfig(name=str(folder))).tokenizer
    config = tiny.TinyConfig(**SMALL, phrases=0.0, frames=1.0, empty=0.0)
    rng = random.Random(5)
    told: set[tuple[bool, bool]] = set()
    some = [scene(0, i, level=i % len(LEVELS), needles=i % 2).row(f"{i}.mp4", split="train") for i in range(40)]
    assert sum("flashes" in row["caption"] for row in some) == 20
    for row in some:
        document = tiny.make_document(row, tokenizer, config, rng)
        seen = [set(tokenizer.decode(slot).split()) for slot in document.slots[: document.branch.count(0)]]
        answers = [i for _, i, weight in document.labels if weight == tiny.WEIGHTS["answer"]]
        asked = [text.strip() for text in tokenizer.decode(answers).split("<end>")]
        motion, direction = any("still" in s or s & set(DIRECTIONS) for s in seen), bool(set(asked) & set(DIRECTIONS))
        told.add((motion, direction))
        assert any("flashes" in words for words in seen) == ("flashes" in row["caption"])
    assert (True, True) in told and (False, False) in told and (False, True) not in told


def needles(count: int):
    sizes = dict(level=1, seconds=10, shots=10, fps=4, needles=4, needle_shapes=3, questions_per_type=0)
    return [scene(0, i, **sizes).row(f"{i}.mp4", split="train") for i in range(count)]


def test_long_clips_are_told_by_stretches_with_the_questions_about_them(tmp_path, small):
    """What is asked about a stretch of shots is shown in it; a needle at least is."""
    tokenizer = load_llm(LLMConfig(name=str(small[1]))).tokenizer
    config, rng, lengths = tiny.TinyConfig(**SMALL, empty=0.0, phrases=0.0, frames=0.0), random.Random(2), set()
    for row in tiny.read_texts(manifest(tmp_path / "m.jsonl", needles(40))):
        assert row["caption"].count("Scene ") == 2 and len(row["captions"]) == 10
        some = tiny._some_shots(row, rng)
        lengths.add(max(some["caption"].count("Scene "), 1))
        assert 1 <= len(some["qa"]) <= tiny.MOST_ASKED
        document = tiny.make_document(row, tokenizer, config, rng)
        assert max(document.places) < config.positions
        texts = ["".join(tokenizer.decode(slot) for slot, b in zip(document.slots, document.branch) if b == n)
                 for n in range(max(document.branch) + 1)]  # fmt: skip
        asked = [
            re.search(r"colour is the (\w+) that flashes on a plain (\w+) ground\?\nAnswer: (\w+)", t) for t in texts
        ]
        assert sum(each is not None for each in asked) >= 1
        for shape, ground, colour in (each.groups() for each in asked if each):
            (told,) = re.findall(rf"For an instant ([^.]*) flash on a plain {ground} ground", texts[0])
            assert f"a {colour} {shape}" in told
    assert {1, 2, 3} <= lengths and 5 < max(lengths) <= MOST_TOLD
    short = rows(1, levels=(4,))[0]
    assert tiny._some_shots(short, rng) is short, "clips that one caption tells are told whole"


def test_shapes_that_flash_in_turn_are_told_one_by_one():
    (made,) = needles(1)
    told = [clause for shot in made["captions"] for _, clauses in tiny._scenes(shot["text"]) for clause in clauses]
    one_by_one = [
        f"For an instant a {colour} {shape} flashes on a plain {needle['ground']} ground"
        for needle in made["needles"]
        for colour, shape in needle["pictures"]
    ]
    assert [clause for clause in told if "flash" in clause] == one_by_one
    short = tiny._shortened(one_by_one[0], random.Random(0), 1.0, motion=False).split()
    ground, (colour, shape) = made["needles"][0]["ground"], made["needles"][0]["pictures"][0]
    assert short == [colour, shape, "flashes", ground]


def test_packed_texts_are_learned_as_projectors_read_them(small):
    """Without gaps, phrases and noise, the packed loss of a clip is that of its prompts one by one."""
    _, folder = small
    llm = load_llm(LLMConfig(name=str(folder)))
    config = tiny.TinyConfig(**SMALL, phrases=0.0, frames=0.0, empty=0.0)
    for seed, row in enumerate(rows(4)):
        rng = random.Random(seed)
        while True:  # a draw without gaps
            state = rng.getstate()
            document = tiny.make_document(row, llm.tokenizer, config, rng)
            if document.places[: document.branch.count(0)] == list(range(document.branch.count(0))):
                break
        batch = tiny.make_batch([document])
        batch["weight"] = (batch["weight"] == tiny.WEIGHTS["answer"]).float()
        packed = float(tiny.loss_of(llm.model, batch, noise=0.0).detach())
        rng.setstate(state)
        assert rng.random() >= 0  # the draw of the description's form
        texts = [row["caption"], *(q[k] for q in row["qa"] for k in ("question", "answer"))]
        rng.setstate(state)
        caption, *rest = tiny.exchanged(texts, rng)
        prompts = [f"{caption}\nQuestion: {question}\nAnswer:" for question in rest[::2]]
        seen = read(llm, prompts, rest[1::2], None)
        assert packed == pytest.approx(float(seen.nll().mean()), abs=1e-4)


def test_a_folder_is_made_once_for_its_texts_and_settings(small, tmp_path):
    source, folder = small
    config = tiny.TinyConfig(**SMALL)
    weights = (folder / "model.safetensors").read_bytes()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny.train_tiny_lm(source, folder, config) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    again = tiny.train_tiny_lm(source, tmp_path / "again", config)
    assert (again / "model.safetensors").read_bytes() == weights  # seeded
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    other = tiny.train_tiny_lm(source, tmp_path / "again", tiny.TinyConfig(**{**SMALL, "seed": 1}))
    assert (other / "model.safetensors").read_bytes() != weights


def test_it_loads_by_path_and_writes_any_text(small):
    llm = load_llm(LLMConfig(name=str(small[1])))
    assert llm.embedding_dim == 16 and llm.max_length == 512 and not llm.chat
    for text in ("What colour is the ring?", "Ünlikely, 漢字!"):
        assert llm.tokenizer.decode(llm.tokenizer(text).input_ids) == text
    for name in ("red", "triangle", "left", "mottled", "mossy"):
        assert len(llm.tokenizer(f" {name}").input_ids) == 1


def test_shards_are_read_like_their_manifest(small, tmp_path):
    source, _ = small
    listed = [json.loads(line) for line in source.read_text().splitlines()]
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for row in listed:
            data = json.dumps({k: row[k] for k in ("caption", "qa")}).encode()
            info = tarfile.TarInfo(row["file"].replace("mp4", "json"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    both = tiny.read_texts(source), tiny.read_texts(tmp_path)
    assert [[(r["caption"], r["qa"]) for r in texts] for texts in both][0] == [(r["caption"], r["qa"]) for r in both[1]]


def test_only_the_train_split_is_read(tmp_path):
    entries = rows(4)
    for row in entries[2:]:
        row["split"] = "val"
    assert [row["key"] for row in tiny.read_texts(manifest(tmp_path / "m.jsonl", entries))] == ["0.mp4", "1.mp4"]
    with pytest.raises(ValueError, match="no row of the train split with a caption and questions"):
        tiny.read_texts(manifest(tmp_path / "m.jsonl", entries[2:]))


def test_a_folder_of_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds files of something else"):
        tiny.train_tiny_lm(small[0], tmp_path, tiny.TinyConfig(**SMALL))
