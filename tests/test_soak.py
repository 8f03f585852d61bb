"""The harness of `make soak` finds what it is there to find: bugs are planted, and it must fail on each of them.

The corpus is made once, by the commands themselves; where vtok is as it is, the same harness passes.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import PATIENCE_S

from soak import corpus as corpora
from soak import damage, inputs, judge
from soak.__main__ import Row, dealt, table
from soak.corpus import FPS, moving
from soak.crashes import Operations
from soak.damage import DIFFER, EQUAL, REJECT
from soak.jobs import Count, Ended, problems
from vtok.data.decode import iter_frames
from vtok.data.encode import write_video
from vtok.data.strict import DecodeError, ffv1_sound

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


# what the harness counts


@pytest.mark.parametrize(
    ("rule", "outcome", "fault"),
    [
        (REJECT, judge.REFUSED, ""),
        (REJECT, judge.SAME, "silent"),
        (REJECT, judge.OTHER, "silent"),
        (EQUAL, judge.SAME, ""),
        (EQUAL, judge.OTHER, "refused well"),
        (EQUAL, judge.REFUSED, "refused well"),
        (DIFFER, judge.OTHER, ""),
        (DIFFER, judge.REFUSED, ""),
        (DIFFER, judge.SAME, "silent"),
        (REJECT, judge.UNCAUGHT, "uncaught"),
        (EQUAL, judge.UNCAUGHT, "uncaught"),
    ],
)
def test_each_rule_has_its_outcomes(rule, outcome, fault):
    assert judge.fault_of(rule, outcome) == fault


def _cases(count: int) -> list[damage.Case]:
    return [damage.Case("any", str(n), REJECT, damage.in_a_file("x", bytes([n]))) for n in range(count)]


def test_whatever_reading_does_is_told(monkeypatch, tmp_path):
    """Errors that are not in words, loops without end, crashes and exits each cost their own input alone."""
    monkeypatch.setattr(judge, "SECONDS", PATIENCE_S)

    def read(path: Path) -> str:
        what = path.read_bytes()[0]
        if what == 0:
            damage.foreign(b"", None)  # type: ignore[arg-type]  # an AttributeError
        if what == 1:
            int("no number")  # a ValueError, but Python's own words
        if what == 2:
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
            signal.setitimer(signal.ITIMER_REAL, 0.2)  # the time that an input may take is nearly over
        while what == 2:
            pass
        if what == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 4:
            sys.exit(0)
        if what == 5:
            bytearray(judge.MEMORY + (1 << 30))
        if what == 6:
            iter_frames(b"x").__next__()  # an error of vtok, in words
        return "read"

    (tmp_path / "sound").write_bytes(b"\xff")
    found = judge.judge(_cases(8), {"any": read}, {"any": tmp_path / "sound"})
    assert [v.outcome for v in found] == [judge.UNCAUGHT] * 6 + [judge.REFUSED, judge.SAME]
    words = ("AttributeError", "invalid literal", "no end after", "ended with -9", "SystemExit", "MemoryError")
    assert all(word in verdict.text for word, verdict in zip(words, found))
    counted = judge.tally(found)
    assert (counted.inputs, counted.uncaught, counted.silent, counted.refused_well) == (8, 6, 1, 0)


def test_lost_repeated_and_differing_samples_are_counted():
    from collections import Counter

    right = Ended(Counter("aabc"), {"weights": "1", "step 3": "0.5"})
    count = Count()
    count.compare(right, right)
    assert count.sound
    count.compare(Ended(Counter("abccc"), {"weights": "2", "step 3": "0.5", "litter": "x"}), right)
    assert (count.lost, count.repeated, count.faults) == (1, 2, ["litter differs", "weights differs"])


def test_files_that_are_not_whole_are_found(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1')
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / ".d.json.tmp").write_text("{")  # in work
    (tmp_path / "e.vtok").write_bytes(b"\x89VTOK")
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n{"a"')  # a last line that was being written
    (tmp_path / "g.jsonl").write_text('{"a"\n{"a": 1}\n')
    assert [line.partition(":")[0] for line in problems(tmp_path)] == ["a.json", "b.tar", "e.vtok", "g.jsonl"]


def test_kills_are_dealt_to_all_kinds_of_work():
    assert dealt(20) == {"training": 8, "packing": 4, "tokenizing": 4, "exporting": 4}
    assert sum(dealt(7).values()) == 7 and set(dealt(4).values()) == {1} and sum(dealt(2).values()) == 2


def test_the_table_says_what_is_wrong():
    text = table([Row("a", "3", "fine", []), Row("b", "2 of 3", "x", ["one", "two"])], seconds=90, seed=5)
    assert "| a | 3 | fine | ok |" in text and "**2 wrong**" in text and "seed 5, 1.5 minutes" in text


def test_operations_are_those_under_the_folder(tmp_path):
    operations = Operations(tmp_path / "out", 0)
    (tmp_path / "out").mkdir()
    opener = operations.opener(open)
    for folder, counted in (("out", 1), (".", 1)):
        with opener(tmp_path / folder / "x", "wb") as file:
            file.write(b"abc")
        assert operations.count == counted
    operations.watch("os.rename", (str(tmp_path / "y"), str(tmp_path / "out" / "y")))
    operations.watch("open", (str(tmp_path / "out" / "x"), "r", os.O_RDONLY))
    assert operations.count == 2


# what it found


def test_changes_change(tmp_path):
    draw, data = random.Random(0), bytes(range(200))
    for change in (
        damage.flip,
        damage.cut,
        damage.overwrite,
        damage.remove,
        damage.insert,
        damage.noise,
        damage.foreign,
    ):
        assert all(change(data, draw) != data for _ in range(50)), change
    assert (
        damage.flip(data, draw, [(10, 12)])[:10] == data[:10] and damage.flip(data, draw, [(10, 12)])[12:] == data[12:]
    )


@pytest.mark.parametrize("options", [{}, {"level": "3", "slicecrc": "1", "slices": "4"}, {"level": "1"}])
def test_a_flipped_bit_in_ffv1_is_refused_where_it_carries_checksums(options):
    file = io.BytesIO()
    write_video(file, moving(0, 4), fps=FPS, codec="ffv1", container="matroska", options=options)
    data = file.getvalue()
    sound = list(iter_frames(data))
    assert len(sound) == 4
    if "slicecrc" not in options:
        return
    draw = random.Random(0)
    for _ in range(40):
        with pytest.raises(DecodeError):
            list(iter_frames(damage.flip(data, draw, damage.packets(data))))


def test_ffv1_without_checksums_is_no_chain():
    draw = random.Random(0)
    assert all(ffv1_sound(draw.randbytes(draw.randrange(0, 400))) for _ in range(200)) and ffv1_sound(b"")


# planted bugs

PLANTS = {
    "the checksums of records": (
        "vtok",
        "from vtok.coding import bitstream as b; import zlib\n"
        "b.Reader._checked = lambda self, frame: frame + self._read(4)\n"
        "b.Reader._check_footer = lambda self, **k: (self._file.read(), b.Footer(16, k['groups'], k['tokens'], 1))[1]",
    ),
    "the hash of an export's weights": (
        "export",
        "from vtok import loading as l; real = l.read_config\n"
        "l.weights_sha256 = lambda state: bytes.fromhex(stated['weights_sha256'])\n"
        "l.model_id = lambda *a: stated['model_id']\n"
        "stated = {}\n"
        "def read(folder):\n    facts = real(folder); stated.update(facts); return facts\n"
        "l.read_config = read",
    ),
    "the hashes of shards": (
        "shards, verified",
        "from vtok.data import verify as v; import hashlib\n"
        "real = v._read_index\n"
        "class Any(str):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
        "def rows(*a):\n    found = real(*a)\n    return [{**r, 'sha256': Any(r['sha256'])} for r in found]\n"
        "v._read_index = rows",
    ),
    "the hashes of checkpoints": (
        "checkpoint",
        "from vtok.training import checkpoints as c; c.verify = lambda path: None",
    ),
}
JUDGE = """
import sys; from pathlib import Path
import torch; torch.set_num_threads(1)
from soak import inputs, judge
from soak.corpus import at
{plant}
found = judge.tally(inputs.judged(at(Path(sys.argv[1])), int(sys.argv[3]), 0, kinds=(sys.argv[2],), child=False))
print(found.inputs, found.uncaught, found.silent, found.refused_well)
for verdict in found.faults[:10]:
    print(verdict.case.change, verdict.outcome, verdict.text[:300])
"""
CRASH = """
import random, sys; from pathlib import Path
import torch; torch.set_num_threads(1)
from soak import crashes, jobs
from soak.corpus import at
import planted

if __name__ == "__main__":
    crashes.dying = planted.dying
    corpus = at(Path(sys.argv[1]))
    job = jobs.jobs(corpus, workers=0)["tokenizing"]
    count = crashes.crashed(job, corpus, random.Random(0), most=int(sys.argv[2]), again=False)
    print(count.times, count.corrupt)
"""
RENAME_OFF = """
from pathlib import Path
from soak import crashes

def dying(*arguments):
    import json
    from vtok.coding import tokenize as t
    from vtok.data import shard_work as s
    def at_once(path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        data = value if isinstance(value, bytes) else (json.dumps(value, indent=1) + "\\n").encode()
        with open(path, "wb") as file:
            file.write(data)
    def begin(self, path):
        self.path = self._temporary = path
    def leave(self, *_):
        self._file.close()
    s.TarWriter.__init__, s.TarWriter.__exit__ = begin, leave
    s.write_atomically = t.write_atomically = at_once
    return real(*arguments)

real = crashes.dying
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], corpora.Corpus]:
    """The short form of `make soak`, and the corpus it was done to."""
    folder = tmp_path_factory.mktemp("soak")
    command = [sys.executable, "-m", "soak", "--short", "--minutes", "40", "--folder", str(folder), "--keep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment, cwd=ROOT)
    (root,) = folder.iterdir()
    return done, corpora.at(root)


def _python(text: str, folder: Path, *arguments: object) -> str:
    script = folder / "script.py"
    script.write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_short_form_finds_nothing_wrong(short, record_property):
    done, _ = short
    record_property("table", done.stdout)  # conftest.py prints it at the end
    assert done.returncode == 0, done.stderr[-5000:] + done.stdout
    assert "3 of 3 survived" in done.stdout and "wrong**" not in done.stdout
    for kind in inputs.KINDS:
        assert f"| changed: {kind} |" in done.stdout
    for word in ("training", "packing", "tokenizing", "exporting"):
        assert f"SIGKILL while {word} | 1 |" in done.stdout and f"an operation on files, {word} |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTS)
def test_a_planted_bug_is_found(short, tmp_path, what):
    kind, plant = PLANTS[what]
    told = _python(JUDGE.format(plant=plant), tmp_path, short[1].root, kind, 14)
    assert int(told.split()[2]) > 0, f"{what} switched off, and no changed input was taken in silence: {told}"


@pytest.mark.slow
def test_a_missing_rename_is_found(short, tmp_path):
    (tmp_path / "planted.py").write_text(RENAME_OFF)
    times, corrupt = map(int, _python(CRASH, tmp_path, short[1].root, 12).split()[-2:])
    assert times >= 8 and corrupt > 0, "written in place, and no kill left half a file behind"


TABLE = """
def test_it(record_property):
    record_property("table", "| SIGUSR1 | 3 of 3 survived |")
    print("nobody sees this")
"""


@pytest.mark.slow
def test_tables_are_printed_at_the_end_by_whichever_process(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_table.py").write_text(TABLE)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("| SIGUSR1 | 3 of 3 survived |") == 1, done.stdout
    assert "nobody sees this" not in done.stdout
