"""data/tiny_lm.py --repeat: texts are to be told again word for word, whatever stands for their words."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from vtok.data.text_shards import pack_texts

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
import tiny_lm
from demo_texts import write_stories


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories") / "texts.jsonl", stories=20, val_fraction=0.3)


def test_a_text_is_repeated_from_its_words_or_from_runs_of_them(stories):
    rows = tiny_lm.read_texts(stories, repeat=True)
    config = tiny_lm.TinyConfig(vocabulary=400, positions=512, empty=0.0, phrases=0.5, repeat=True)
    tokenizer = tiny_lm.make_tokenizer([row["caption"] for row in rows], config)
    rng, sizes = random.Random(0), set()
    for row in rows:
        document = tiny_lm.make_document(row, tokenizer, config, rng)
        text = [slot for slot, branch in zip(document.slots, document.branch) if not branch]
        sizes.add(max(len(slot) for slot in text))
        assert tokenizer.decode([i for slot in text for i in slot]).strip() == row["caption"]
        assert document.places[: len(text)] == list(range(len(text))), "as a compressor's tokens, without gaps"
        told = [i for _, i, weight in document.labels if weight == tiny_lm.WEIGHTS["repeated"]]
        assert tokenizer.decode(told) == f" {row['caption']}{tiny_lm.END}"
        answers = [i for _, i, weight in document.labels if weight == tiny_lm.WEIGHTS["answer"]]
        said = [part.strip() for part in tokenizer.decode(answers).split(tiny_lm.END)[:-1]]
        assert said == [question["answer"] for question in row["qa"]]
    assert 1 in sizes and sizes & set(tiny_lm.RUNS)


def test_texts_are_read_from_shards_and_without_questions(stories, tmp_path):
    pack_texts([stories], tmp_path / "shards", progress=False)
    listed = {row["key"]: row["caption"] for row in tiny_lm.read_texts(stories, repeat=True)}
    packed = {row["key"]: row["caption"] for row in tiny_lm.read_texts(tmp_path / "shards" / "train", repeat=True)}
    assert listed == packed and 5 < len(listed) < 20
    (tmp_path / "m.jsonl").write_text('{"text": "one"}\n')
    assert [row["caption"] for row in tiny_lm.read_texts(tmp_path / "m.jsonl", repeat=True)] == ["one"]
    with pytest.raises(ValueError, match="with a caption and questions"):
        tiny_lm.read_texts(tmp_path / "m.jsonl")


def test_models_of_clips_are_known_by_the_settings_they_had():
    plain, repeats = tiny_lm.TinyConfig(), tiny_lm.TinyConfig(repeat=True)
    assert "repeat" not in plain.settings() and repeats.settings() == {**plain.settings(), "repeat": True}
