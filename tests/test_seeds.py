"""The table of benchmarks/seeds.py: what it averages, and what it refuses."""

import copy
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from seeds import leads, merge, report  # noqa: E402

KEYS, VIDEOS = ["a__0000", "a__0001", "b", "c"], ["a", "a", "b", "c"]
ONE = {
    "family": "vqtoken",
    "model": "one",
    "per_question": {
        "keys": KEYS,
        "videos": VIDEOS,
        "ids": ["0"] * 4,
        "types": ["x"] * 4,
        "right": {
            "blind": {"0": [0, 0, 0, 1]},
            "vqtoken": {"4": [1, 1, 1, 0], "16": [1, 1, 1, 1]},
            "pooling": {"4": [1, 0, 1, 0], "16": [0, 0, 0, 0.4]},
            "tome": {"4": [1, 1, 1, 1]},
        },
    },
}


def other(**changes):
    table = copy.deepcopy(ONE)
    table["per_question"]["right"] |= changes
    return table | {"model": "two"}


def test_answers_of_several_runs_are_averaged_question_by_question():
    second = other(vqtoken={"4": [1, 0, 0, 0], "16": [1, 1, 1, 1]}, tome={"4": [None] * 4})
    found = merge([other(tome={"4": [None] * 4}), second])
    assert ("tome", "4") not in found and found["vqtoken", "4"] == [[1, 1, 1, 0], [1, 0, 0, 0]]
    (four, sixteen) = leads(found, "vqtoken", VIDEOS)
    assert (four["against"], four["difference"]) == ("pooling", pytest.approx((0 + 0.5 - 0.5 + 0) / 4))
    assert sixteen["difference"] == pytest.approx(0.9) and sixteen["difference_ci"][0] > 0
    assert four["difference_ci"][0] < 0 < four["difference_ci"][1]
    both = report([other(tome={}), second])
    assert "| **vqtoken** | 4 | 50.0 |" in both and "75.0, 25.0 |" in both
    alone = report([ONE])
    assert alone.count("leads") == 1 and alone.index("| 4 | tome |") < alone.index("| 4 | pooling |")


def test_tables_that_do_not_belong_together_are_refused():
    moved = other()
    moved["per_question"]["keys"] = ["a__0", "a__1", "b", "d"]
    for wrong, words in (
        (other() | {"family": "temporal"}, "of family temporal"),
        (moved, "not asked the same questions"),
        (other(vqtoken={"4": [1, 1, None, 0]}), "vqtoken was not asked every question at 4 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            merge([ONE, wrong])


def test_rows_that_do_not_change_with_the_compressors_seed_are_needed_once():
    bare = other()
    bare["per_question"]["right"] = {"vqtoken": {"4": [1, 0, 0, 0]}, "blind": {"0": [0, 0, 1, 1]}}
    temporal = copy.deepcopy(ONE) | {"family": "temporal", "model": "three"}
    temporal["per_question"]["right"] = {"temporal": {"4": [0, 1, 1, 1], "16": [1] * 4}, "dart": {"4": [0, 0, 0, 1]}}
    found = merge([ONE, bare], [temporal])
    assert found["vqtoken", "4"] == [[1, 1, 1, 0], [1, 0, 0, 0]] and ("vqtoken", "16") not in found
    assert found["pooling", "4"] == [[1, 0, 1, 0]] and len(found["blind", "0"]) == 2
    assert {each["against"] for each in leads(found, "vqtoken", VIDEOS)} == {"pooling", "tome", "temporal", "dart"}
    assert "| temporal | 4 | 75.0 |" in report([ONE, bare], [temporal])
    with pytest.raises(ValueError, match="one is of family vqtoken, three of temporal: .*--beside them of others"):
        merge([temporal, ONE])
    with pytest.raises(ValueError, match="two is of family vqtoken"):
        merge([ONE], [bare])
    bare["per_question"]["right"]["vqtoken"] = {"64": [1, 0, 0, 0]}
    with pytest.raises(ValueError, match="the runs of vqtoken have no number of tokens in common"):
        merge([ONE, bare])


def test_runs_of_one_table_given_twice_are_two_runs():
    assert len(merge([ONE, copy.deepcopy(ONE)])["vqtoken", "4"]) == 2
