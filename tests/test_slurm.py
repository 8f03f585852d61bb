"""What slurm/submit.py plans, renders and refuses; tests/test_slurm_cluster.py sends it to a real cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from waiting import PATIENCE_S

from vtok.commit import commit_of, difference
from vtok.config import load
from vtok.evaluate import _parser as evaluation_options

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "slurm"))
import submit as slurm  # noqa: E402
import sweep as sweeps  # noqa: E402

CONFIGS = ROOT / "configs"
SMALL = re.compile(r"tiny|debug|demo|cpu_hour")
FULL = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.yaml") if not SMALL.search(path.stem)}
DEBUG = str(CONFIGS / "flexible" / "debug.yaml")


def dry_run(capsys, *words: object) -> str:
    """What --dry-run prints. Fails unless it succeeds."""
    code = slurm.main([*map(str, words), "--dry-run"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *words: object) -> str:
    assert slurm.main([*map(str, words), "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert not out
    return err


def directives(script: str) -> dict[str, str]:
    return dict(line[len("#SBATCH --") :].partition("=")[::2] for line in script.splitlines() if line[:7] == "#SBATCH")


def checked_by_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def trainer_of(name: str) -> dict[str, Any]:
    """What a preset's file, and those it builds on, say of the trainer; `load` takes longer than all the rest."""
    values = yaml.safe_load((CONFIGS / name).read_text())
    base = trainer_of(str((CONFIGS / name).parent / values["base"])) if "base" in values else {}
    return {"num_nodes": 1, "devices": 1, "strategy": "auto", **base, **values.get("trainer", {})}


MANY_GPUS = sorted(name for name in FULL if trainer_of(name)["num_nodes"] * trainer_of(name)["devices"] > 1)


@pytest.mark.parametrize("name", MANY_GPUS)
def test_full_presets_can_be_submitted(name, capsys):
    nodes, devices = trainer_of(name)["num_nodes"], trainer_of(name)["devices"]
    assert trainer_of(name)["strategy"] == "deepspeed_2"
    words = ("data.shards=corpus", "data.val_shards=held_out", "--nodes", nodes, "--gpus-per-node", devices)
    script = dry_run(capsys, CONFIGS / name, *words, "--partition", "gpus", "--time", "2-00:00:00")
    checked_by_bash(script)
    said = directives(script)
    assert said["nodes"] == str(nodes) and said["time"] == "2-00:00:00" and "requeue" in said
    assert said["gpus-per-node"] == said["ntasks-per-node"] == str(devices) and said["partition"] == "gpus"
    assert said["signal"] == "SIGUSR1@120" and said["open-mode"] == "append" and "{{" not in script
    told = re.search(rf"# deepspeed_2: .* = {nodes * devices} ranks; global batch = (.*) = ([\d or]+) clips", script)
    factors = re.fullmatch(r"([\d or]+) x (\d+) ranks x (\d+) accumulated", told[1]) if told else None
    assert told and factors
    sizes, clips = ([int(n) for n in text.split(" or ")] for text in (factors[1], told[2]))  # of each part of the data
    assert [size * int(factors[2]) * int(factors[3]) for size in sizes] == clips
    config = load(CONFIGS / name)
    assert sizes == list(config.data.part_batch_sizes or [config.data.batch_size])


def test_every_family_has_a_preset_for_many_gpus():
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert {name.partition("/")[0] for name in MANY_GPUS} == folders >= {"flexible", "discrete", "language"}


def test_layout_of_a_training_follows_the_arguments(tmp_path):
    def plan(*words: str) -> slurm.Plan:
        args = slurm.parser().parse_intermixed_args([DEBUG, "data.shards=x", "--time", "90", *words])
        slurm.check_arguments(args)
        return slurm.plan_training(args)

    def resolved(made: slurm.Plan):
        (tmp_path / "config.yaml").write_text(made.configs["config.yaml"])
        return load(tmp_path / "config.yaml").trainer

    made = plan("--nodes", "2", "--gpus-per-node", "4", "data.num_workers=3")
    assert made.layout == slurm.Layout(nodes=2, gpus=4, tasks=4, cpus=4, threads=1)
    trainer = resolved(made)
    assert (trainer.num_nodes, trainer.devices, trainer.accelerator) == (2, 4, "gpu")
    made = plan("--nodes", "2", "--gpus-per-node", "0", "data.num_workers=3", "--cpus-per-task", "16")
    assert made.layout == slurm.Layout(nodes=2, gpus=0, tasks=1, cpus=16, threads=13)
    trainer = resolved(made)
    assert (trainer.num_nodes, trainer.devices, trainer.accelerator) == (2, 1, "cpu")
    assert plan("--gpus-per-node", "0", "trainer.devices=3").layout.tasks == 3


MANY = str(CONFIGS / "discrete" / "magvit2_lfq.yaml")  # 8 nodes of 8


@pytest.mark.parametrize(
    "words, said",
    [
        ((DEBUG, "--nodes", 2, "--gpus-per-node", 2, "trainer.devices=4"), "trainer.devices=4, but --nodes 2"),
        ((DEBUG, "--nodes", 2, "--gpus-per-node", 0, "trainer.num_nodes=1"), "trainer.num_nodes=1, but --nodes 2"),
        ((MANY, "--nodes", 4, "--gpus-per-node", 8), "would be 64 clips, not 128"),
        ((DEBUG, "--gpus-per-node", 1, "trainer.accelerator=cpu"), "trainer.accelerator=cpu, but --gpus-per-node 1"),
        ((DEBUG, "--gpus-per-node", 0, "trainer.accelerator=gpu"), "trainer.accelerator=gpu, but --gpus-per-node 0"),
        ((DEBUG, "--gpus-per-node", 0, "--time", "2"), "needs more than 180 seconds"),
        ((DEBUG, "--gpus-per-node", 0, "--time", "soon"), "--time soon: expected minutes"),
        ((DEBUG, "--gpus-per-node", 0, "--nodes", 0), "--nodes 0 must be 1 or more"),
        ((DEBUG, "--gpus-per-node", 0, "--env", "A B"), "--env A B is not of the form KEY=VALUE"),
        ((DEBUG, DEBUG, "--gpus-per-node", 0), "expected one CONFIG"),
        (("--gpus-per-node", 0), "expected one CONFIG"),
        ((DEBUG, "--gpus-per-node", 0, "optim.lr=-1"), "optim.lr=-1.0 must be 0 or above"),
        ((DEBUG, "--gpus-per-node", 0, "optim.rate=1"), "Known keys here: betas"),
        ((DEBUG, "--gpus-per-node", 0, "name=a b"), "no spaces"),
        ((DEBUG, "--gpus-per-node", 0, "name='a#b'"), "# or : in paths; choose another name="),
    ],
)
def test_contradictions_are_told(capsys, words, said):
    time_limit = () if "--time" in words else ("--time", "1:00:00")
    assert said in refused(capsys, *words, "data.shards=x", *time_limit)


def test_parts_with_batch_sizes_of_their_own_are_counted(capsys):
    parts = (
        MANY,
        "data.shards=a::b",
        "data.weights=[1, 1]",
        "data.part_frames=[17, 1]",
        "data.part_batch_sizes=[2, 5]",
    )
    words = (*parts, "--time", "1-0", "--gpus-per-node", 8)
    assert "global batch = 2 or 5 x 64 ranks x 1 accumulated = 128 or 320 clips" in dry_run(
        capsys, *words, "--nodes", 8
    )
    assert "would be 64 or 160 clips, not 128 or 320" in refused(capsys, *words, "--nodes", 4)


def test_the_same_ranks_may_lie_otherwise(capsys):
    """Eight nodes of eight, or four of sixteen: the global batch is the same, so the arguments may say so."""
    words = (MANY, "data.shards=x", "--time", "1-0", "--nodes", 4, "--gpus-per-node", 16)
    assert "trainer.num_nodes=4 trainer.devices=16 (from the arguments)" in dry_run(capsys, *words)


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("90:30", 5430), ("1:02:03", 3723), ("2-03", 183600), ("1-00:30", 88200), ("1-0:0:1", 86401),
     ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text, seconds):
    assert slurm.seconds_of(text) == seconds


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))  # json is yaml
    return path


def test_a_sweep_is_every_run_with_every_combination(tmp_path, capsys):
    content = {
        "grid": {"optim.lr": [0.1, 0.2], "seed": [0, 1]},
        "runs": [{"data.fps": 4}, {"data.fps": 8}],
        "at_once": 3,
    }
    sweep = write(tmp_path / "sweep.yaml", content)
    words = [DEBUG, "data.shards=x", f"out={tmp_path}", "name=all", "--array", str(sweep), "--gpus-per-node", "0"]
    args = slurm.parser().parse_intermixed_args([*words, "--time", "10"])
    slurm.check_arguments(args)
    plan = slurm.plan_array(args)
    script = slurm.render(plan, tmp_path / "all" / "slurm" / "001", args)
    checked_by_bash(script)
    assert directives(script)["array"] == "0-7%3"
    (tmp_path / "configs").mkdir()
    for name, text in plan.configs.items():
        (tmp_path / name).write_text(text)
    made = [load(tmp_path / task[1]) for task in plan.tasks]
    assert [config.name for config in made] == [f"all-{i:03d}" for i in range(8)]
    expected = [(fps, lr, seed) for fps in (4, 8) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert [(c.data.fps, c.optim.lr, c.seed) for c in made] == expected
    named = write(tmp_path / "named.yaml", {"grid": {"seed": [0, 1]}, "name": "{name}-seed{seed}"})
    script = dry_run(capsys, DEBUG, "data.shards=x", "--array", named, "--gpus-per-node", 0, "--time", 10)
    assert "configs/001.yaml" in script and "--array=0-1" in script


def test_a_command_in_parts_and_over_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    content = {"command": "eval", "arguments": ["{run}", "--out", "{run}/eval"], "grid": {"run": {"glob": "runs/*"}}}
    script = dry_run(capsys, "--array", write(tmp_path / "scores.yaml", content), "--gpus-per-node", 1, "--time", 60)
    assert "vtok.cli eval runs/a --out runs/a/eval\n" in script and "vtok.cli eval runs/b" in script
    assert directives(script)["array"] == "0-1" and directives(script)["job-name"] == "vtok-scores"
    content = {"command": "eval", "arguments": ["runs/a", "--which", "{step}"], "grid": {"step": [1000, "best"]}}
    script = dry_run(capsys, "--array", write(tmp_path / "curve.yaml", content), "--gpus-per-node", 1, "--time", 60)
    lines = re.findall(r"^# \d: .*cli (.*)", script, re.M)
    assert lines == ["eval runs/a --which 1000", "eval runs/a --which best"]
    assert [evaluation_options().parse_args(line.split()[1:]).which for line in lines] == ["1000", "best"]
    content = {"command": "tokenize", "arguments": ["corpus", "--model", "it's", "--out", "ids"], "parts": 3}
    script = dry_run(capsys, "--array", write(tmp_path / "ids.yaml", content), "--gpus-per-node", 0, "--time", 60)
    lines = re.findall(r"^# \d: .*cli (.*)", script, re.M)
    assert lines == [f"tokenize corpus --model 'it'\"'\"'s' --out ids --part {i}/3" for i in range(3)]


@pytest.mark.parametrize(
    "content, said",
    [
        ([1], "expected a mapping"),
        ({"comand": "shards"}, "unknown key 'comand'"),
        ({"command": "pack"}, "command='pack' is not one of vtok's"),
        ({"command": "shards", "parts": 0}, "parts=0 must be a whole number, 1 or more"),
        ({"command": "shards", "arguments": "videos"}, "must be a list"),
        ({"command": "eval", "grid": {"run": {"glob": "nothing/*"}}}, "nothing matches 'nothing/*'"),
        ({"command": "eval", "grid": {"run": ["a"]}}, "run is in grid or runs, but no argument holds {run}"),
        ({"command": "eval", "arguments": ["{run}", "{ran}"], "grid": {"run": ["a"]}}, "{ran} is not one of run"),
        ({"grid": {"seed": 3}}, "grid.seed=3 must be a list"),
        ({"grid": {"seed": [1]}, "runs": [{"seed": 2}]}, "seed is in grid and in runs"),
        ({"parts": 3}, "parts and arguments are for other commands"),
        ({"grid": {"seed": [1, 2]}, "name": "{name}"}, "the same run directory"),
        ({"grid": {"seed": [1]}, "name": "{sead}"}, "{sead} is not one of name, index, seed"),
        ({"grid": {"seeds": [1]}}, "did you mean 'seed'"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_told(tmp_path, capsys, content, said):
    path = write(tmp_path / "sweep.yaml", content)
    training = "command" not in content if isinstance(content, dict) else True
    config = (DEBUG, "data.shards=x") if training else ()
    err = refused(capsys, *config, "--array", path, "--gpus-per-node", 0, "--time", 60)
    assert said in err and ("sweep.yaml" in err or "seeds" in err)


def test_strings_of_a_sweep_stay_strings(tmp_path, capsys):
    for value in ("007", "", "null", "1e3", "a: b", "ja\u00fc \U0001f600", "[1]", "x,y"):
        assert loads_word(sweeps.override("data.root", value)) == value
    assert loads_word(sweeps.override("data.root", 7)) == 7 and loads_word(sweeps.override("data.root", 1e-4)) == 1e-4


def loads_word(word: str) -> object:
    return OmegaConf.from_dotlist([word]).data.root


def test_an_argument_is_one_word_of_one_line_whatever_it_holds(tmp_path, capsys):
    content = {"command": "eval", "arguments": ["{run}"], "grid": {"run": ["a\nb"]}}
    words = ("--array", tmp_path / "s.yaml", "--gpus-per-node", 0, "--time", 60)
    write(tmp_path / "s.yaml", content)
    assert "arguments hold a line break in 'a\\nb'" in refused(capsys, *words)
    write(tmp_path / "s.yaml", {**content, "grid": {"run": ["{folder}/x"]}})
    assert "vtok.cli eval '{folder}/x'\n" in dry_run(capsys, *words)


@pytest.mark.parametrize("name", ["lr&wd(1)", "a;b", "$HOME", "a*", "<x>|`y`"])
def test_any_name_that_is_taken_passes_the_shell(tmp_path, capsys, name):
    """The head of the script, run by bash: the folder is that of the name, and nothing else is called."""
    words = ("data.shards=x", f"name={json.dumps(name)}", f"out={tmp_path}", "--gpus-per-node", 0, "--time", 60)
    script = dry_run(capsys, DEBUG, *words)
    checked_by_bash(script)
    head = "\n".join(line for line in script.splitlines() if line.startswith(("export PYTHONPATH", "vtok_folder=")))
    done = subprocess.run(
        ["bash", "-euc", f'{head}\necho "$vtok_folder"; echo "$PYTHONPATH"'], capture_output=True, text=True,
        timeout=PATIENCE_S, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    folder = tmp_path / name / "slurm" / "001"
    assert done.stdout.splitlines() == [str(folder), str(folder / "code")], done.stderr
    assert not list(tmp_path.iterdir())


def test_a_command_is_one_process(tmp_path, capsys):
    sweep = write(tmp_path / "pack.yaml", {"command": "shards", "arguments": ["videos"], "parts": 2})
    words = ("--array", sweep, "--gpus-per-node", 0, "--time", 60)
    assert "every element" in refused(capsys, *words, "--nodes", 2)
    assert "takes no CONFIG" in refused(capsys, DEBUG, *words)


def test_options_reach_the_script(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = (DEBUG, "data.shards=x", "--time", 60, "--gpus-per-node", 1, "--container", "vtok.sif")
    more = ("--container-arg=--bind=/data", "--sbatch-arg=--account=lab", "--sbatch-arg=--mem=0", "--env", "A=b c")
    script = dry_run(capsys, *words, *more, "--srun-arg=--cpu-bind=cores", "--max-restarts", 5, "--signal-before", 300)
    checked_by_bash(script)
    assert directives(script)["account"] == "lab" and directives(script)["mem"] == "0"
    assert directives(script)["signal"] == "SIGUSR1@300" and "vtok_lead=300 most_restarts=5" in script
    assert "export A='b c'" in script and "srun_args=(--cpu-bind=cores)" in script
    run = re.search(r"^vtok_run (.*)", script, re.M)
    assert run and run[1].startswith(f"apptainer exec --nv --bind {tmp_path} --bind {tmp_path}/runs/")
    assert "--bind=/data vtok.sif python3 -P -m vtok.cli train" in run[1]
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_without_slurm_it_says_where_to_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = slurm.main([DEBUG, "data.shards=x", f"out={tmp_path}", "--time", "60", "--gpus-per-node", "0"])
    assert code == 1 and "no sbatch here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_snapshot_is_the_code_as_it_stands(tmp_path):
    plan = slurm.Plan("x", tmp_path, slurm.Layout(1, 0, 1, 1, 1), {"config.yaml": "a: 1\n"}, [["train"]], False, [])
    slurm.snapshot(tmp_path, plan)
    taken = {str(path.relative_to(tmp_path / "code")): path for path in (tmp_path / "code").rglob("*.py")}
    assert {"vtok/cli.py", "vtok/train.py", "vtok/families/flexible.py"} <= taken.keys()
    assert all((ROOT / name).read_bytes() == path.read_bytes() for name, path in taken.items())
    assert (tmp_path / "job.sh").read_bytes() == (ROOT / "slurm" / "job.sh").read_bytes()
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    code = "import vtok; print(vtok.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path / "code"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "code" / "vtok" / "__init__.py"), done.stderr
    sha = slurm.git(ROOT, "rev-parse", "HEAD")
    if sha is not None:
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?\n", (tmp_path / "code" / "COMMIT").read_text())
        assert (tmp_path / "code.diff").exists() == bool(slurm.difference(ROOT))


def test_code_that_nobody_has_added_is_a_change_and_in_the_difference(tmp_path):
    root, name = tmp_path / "checkout", "vtok/ne\u00fc.py"

    def git(*words: str) -> None:
        own = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", "-C", str(root), *own, *words], check=True, capture_output=True, timeout=PATIENCE_S)

    (root / "vtok").mkdir(parents=True)
    assert commit_of(root) is None
    git("init", "-q")
    (root / "vtok" / "a.py").write_text("a = 1\n")
    (root / ".gitignore").write_text("/runs/\n*.pyc\n")
    git("add", "-A")
    git("commit", "-qm", "x")
    (root / "runs").mkdir()
    for ignored in ("runs/x.py", "vtok/a.pyc", "notes.txt"):
        (root / ignored).touch()
    assert re.fullmatch("[0-9a-f]{40}", commit_of(root) or "") and difference(root) == ""
    (root / name).write_text("b = 2\n")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", commit_of(root) or "")
    (root / "vtok" / "a.py").write_text("a = 3\n")
    (tmp_path / "code.diff").write_text(difference(root), errors="surrogateescape")
    (root / name).unlink()
    git("checkout", "-q", "vtok")
    git("apply", str(tmp_path / "code.diff"))
    assert (root / name).read_text() == "b = 2\n" and (root / "vtok" / "a.py").read_text() == "a = 3\n"


def test_scripts_are_sound_and_numbers_of_submissions_go_on(tmp_path):
    for path in (ROOT / "slurm").glob("*.sh"):
        checked_by_bash(path.read_text())
    assert slurm.next_folder(tmp_path).name == "001"
    (tmp_path / "slurm" / "007").mkdir(parents=True)
    assert slurm.next_folder(tmp_path).name == "008"
    assert sweeps.filled("{a.b}-{c}", {"a.b": 1, "c": "x"}, "here") == "1-x"
