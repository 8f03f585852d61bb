"""Submits a training, or an array of trainings or vtok commands, to SLURM.

python slurm/submit.py CONFIG [key=value ...] --nodes N --gpus-per-node G --partition P --time T [--dry-run]
python slurm/submit.py [CONFIG] [key=value ...] --array SWEEP.yaml ...

1. plan: the resolved configuration (of every element), the layout of ranks, the commands
2. snapshot: code, commit, difference to it and configurations go to RUN/slurm/<number>/; the job runs on these
3. render train.sbatch or array.sbatch into that folder
4. sbatch; the job's id and how to follow it are printed
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from sweep import combinations, filled, override, read_sweep  # noqa: E402

from vtok.commit import commit_of, difference, git  # noqa: E402
from vtok.config import RunConfig, load, to_yaml  # noqa: E402
from vtok.training import step_size  # noqa: E402
from vtok.training.lock import job_is_over  # noqa: E402


@dataclasses.dataclass
class Layout:
    """How a job lies on the machine. tasks: processes a node; cpus: cores a process."""

    nodes: int
    gpus: int
    tasks: int
    cpus: int
    threads: int


@dataclasses.dataclass
class Plan:
    """What is to be submitted. configs: file name -> yaml; tasks: a command each, whose paths lie in the snapshot."""

    name: str
    run_dir: Path
    layout: Layout
    configs: dict[str, str]
    tasks: list[list[str | PurePosixPath]]
    is_array: bool
    notes: list[str]
    at_once: int = 0


# 1. the plan


def seconds_of(text: str) -> int | None:
    """Seconds of SLURM's M, M:S, H:M:S, D-H, D-H:M and D-H:M:S; None for UNLIMITED. Raises ValueError for others."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"--time {text}: expected minutes, H:M:S or D-H:M:S, as in 90, 12:00:00 or 2-00:00:00")
    days, *rest = match.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:
        return int(days) * 86400 + first * 3600 + second * 60 + third
    return first * 3600 + second * 60 + third if rest[2] is not None else first * 60 + second


def check_time(limit: str, lead: int) -> None:
    """Raises ValueError where the signal before the limit would come as the job begins."""
    seconds = seconds_of(limit)
    if lead < 1 or (seconds is not None and seconds <= lead + 60):
        raise ValueError(
            f"--time {limit} with --signal-before {lead}: SLURM signals up to a minute early, so a job needs more than "
            f"{lead + 60} seconds; raise --time, or lower --signal-before (seconds that the last checkpoint may take)"
        )


def fit(config: RunConfig, args: argparse.Namespace, given: list[str]) -> list[str]:
    """Sets the trainer's nodes, devices and accelerator to what the arguments ask for; notes for the user.

    Raises: ValueError where overrides, or the file, say something else.
    """
    trainer, notes = config.trainer, []
    asked = (args.nodes, args.gpus_per_node or trainer.devices)
    said = (trainer.num_nodes, trainer.devices)
    keys = ("trainer.num_nodes", "trainer.devices")
    for key, want, have in zip(keys, asked, said):
        if have != want and any(item.startswith(f"{key}=") for item in given):
            raise ValueError(
                f"{key}={have}, but --nodes {args.nodes} --gpus-per-node {args.gpus_per_node} makes it {want}: "
                "drop the override, or change the arguments"
            )
    ranks, before = asked[0] * asked[1], said[0] * said[1]
    if said != (1, 1) and before != ranks:
        now = dataclasses.replace(config, trainer=dataclasses.replace(trainer, num_nodes=asked[0], devices=asked[1]))
        would, meant = (step_size.words(step_size.clips_of_a_step(each)) for each in (now, config))
        raise ValueError(
            f"the configuration is for {before} processes (trainer.num_nodes={said[0]} x trainer.devices={said[1]}), "
            f"and --nodes {args.nodes} --gpus-per-node {args.gpus_per_node} gives {ranks}: the global batch would be "
            f"{would} clips, not {meant}. To have that, add trainer.num_nodes={asked[0]} "
            f"trainer.devices={asked[1]}; else change the arguments"
        )
    if said != asked:
        notes.append(f"trainer.num_nodes={asked[0]} trainer.devices={asked[1]} (from the arguments)")
    trainer.num_nodes, trainer.devices = asked
    accelerator = "gpu" if args.gpus_per_node else "cpu"
    fits = ("gpu", "cuda") if args.gpus_per_node else ("cpu",)
    if trainer.accelerator == "auto":  # said outright: a job whose GPUs are missing must not train on the CPU
        trainer.accelerator = accelerator
    elif trainer.accelerator not in fits:
        raise ValueError(
            f"trainer.accelerator={trainer.accelerator}, but --gpus-per-node {args.gpus_per_node} needs {accelerator}: "
            "drop the override, or change the argument"
        )
    return notes


def check(config: RunConfig) -> None:
    """What the training would refuse, told now; of devices, only what is true on every machine."""
    from vtok.train import check as check_training  # Lightning: a few seconds

    machine: dict[str, Any] = {"devices": 1}
    if config.trainer.precision == "16-mixed":  # refused where there is no GPU, such as on a login node
        machine["precision"] = "32-true"
    check_training(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **machine)))


def layout_of(args: argparse.Namespace, *, tasks: int, workers: int, nodes: int) -> Layout:
    cpus = args.cpus_per_task or workers + 1
    if cpus < 1:
        raise ValueError(f"--cpus-per-task {cpus} must be above 0")
    return Layout(nodes, args.gpus_per_node, tasks, cpus, max(1, cpus - workers))


def arithmetic(config: RunConfig) -> str:
    """The global batch, spelled out."""
    t, ranks = config.trainer, step_size.processes(config)
    sizes, clips = step_size.batch_sizes(config)[1], step_size.clips_of_a_step(config)
    return (
        f"{t.strategy}: {t.num_nodes} nodes x {t.devices} = {ranks} ranks; global batch = {step_size.words(sizes)} x "
        f"{ranks} ranks x {t.accumulate} accumulated = {step_size.words(clips)} clips"
    )


def plan_training(args: argparse.Namespace) -> Plan:
    config = load(args.config, args.overrides)
    notes = fit(config, args, args.overrides)
    check(config)
    trainer = config.trainer
    return Plan(
        name=config.name,
        run_dir=config.run_dir,
        layout=layout_of(args, tasks=trainer.devices, workers=config.data.num_workers, nodes=trainer.num_nodes),
        configs={"config.yaml": to_yaml(config)},
        tasks=[["train", PurePosixPath("config.yaml")]],
        is_array=False,
        notes=[*notes, arithmetic(config)],
    )


# arrays


def plan_array(args: argparse.Namespace) -> Plan:
    path = Path(args.array)
    sweep = read_sweep(path)
    elements = combinations(sweep, path)
    if sweep["command"] == "train":
        return _plan_trainings(args, sweep, elements, path)
    if args.overrides or args.config:
        raise ValueError(f"{path}: command={sweep['command']} takes no CONFIG and no key=value: see its arguments")
    if args.nodes != 1:
        raise ValueError(f"--nodes {args.nodes}: every element of an array of `vtok {sweep['command']}` is one process")
    arguments, parts = [str(a) for a in sweep.get("arguments", [])], sweep.get("parts", 1)
    for key in {key for element in elements for key in element}:
        if not any(f"{{{key}}}" in argument for argument in arguments):
            raise ValueError(f"{path}: {key} is in grid or runs, but no argument holds {{{key}}}")
    tasks: list[list[str | PurePosixPath]] = []
    for element in elements:
        own = [filled(argument, element, f"{path}: arguments") for argument in arguments]
        if torn := [argument for argument in own if "\n" in argument or "\0" in argument]:
            raise ValueError(
                f"{path}: arguments hold a line break in {torn[0]!r}: every command is one line of tasks.txt"
            )
        for part in range(parts):
            tasks.append([sweep["command"], *own, *(["--part", f"{part}/{parts}"] if parts > 1 else [])])
    name = str(sweep.get("name", path.stem))
    return Plan(
        name=name,
        run_dir=Path(sweep.get("out", "runs")) / name,
        layout=layout_of(args, tasks=1, workers=0, nodes=1),
        configs={},
        tasks=tasks,
        is_array=True,
        notes=[f"{len(tasks)} elements of vtok {sweep['command']}"],
        at_once=sweep.get("at_once", 0),
    )


def _plan_trainings(args: argparse.Namespace, sweep: dict[str, Any], elements: list[Any], path: Path) -> Plan:
    if not args.config:
        raise ValueError(f"{path}: command=train needs CONFIG on the command line")
    base = load(args.config, args.overrides)
    pattern = str(sweep.get("name", "{name}-{index}"))
    configs, tasks, layouts, notes, seen = {}, [], [], [], {}
    for index, element in enumerate(elements):
        given = [*args.overrides, *(override(key, value) for key, value in element.items())]
        config = load(args.config, given)
        config.name = filled(pattern, {"name": base.name, "index": f"{index:03d}", **element}, f"{path}: name")
        if config.run_dir in seen:
            raise ValueError(
                f"{path}: name={pattern!r} gives elements {seen[config.run_dir]} and {index} the same run directory "
                f"{config.run_dir}: put {{index}} or the changed keys into it, or leave it out"
            )
        seen[config.run_dir] = index
        notes = fit(config, args, given)
        check(config)
        trainer, workers = config.trainer, config.data.num_workers
        layouts.append(layout_of(args, tasks=trainer.devices, workers=workers, nodes=trainer.num_nodes))
        configs[f"configs/{index:03d}.yaml"] = to_yaml(config)
        tasks.append(["train", PurePosixPath("configs", f"{index:03d}.yaml")])
        told = ", ".join(f"{key}={value}" for key, value in element.items()) or "as it is"
        notes = [*notes, arithmetic(config)]
        print(f"  {index:>3}  {config.run_dir}  {told}", file=sys.stderr)
    if any((one.nodes, one.tasks) != (layouts[0].nodes, layouts[0].tasks) for one in layouts):
        raise ValueError(f"{path}: trainer.num_nodes and trainer.devices must be the same for all elements of an array")
    widest = max(layouts, key=lambda one: one.cpus)
    return Plan(
        name=base.name,
        run_dir=base.run_dir,
        layout=dataclasses.replace(widest, threads=min(one.threads for one in layouts)),
        configs=configs,
        tasks=tasks,
        is_array=True,
        notes=[f"{len(tasks)} trainings, each: {notes[-1]}"],
        at_once=sweep.get("at_once", 0),
    )


# 2. the snapshot


def snapshot(folder: Path, plan: Plan) -> None:
    """Fills the job's folder: a queued or requeued job must not see what is edited meanwhile."""
    listed = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "vtok")
    if listed is not None:
        names = [name for name in listed.split("\0") if name]
    else:
        names = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "vtok").rglob("*")) if path.is_file()]
    for name in names:
        if (ROOT / name).is_file() and "__pycache__" not in name:
            (folder / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "code" / name)
    (folder / "code" / "COMMIT").write_text((commit_of(ROOT) or "unknown") + "\n")
    if changes := difference(ROOT):
        (folder / "code.diff").write_text(changes, errors="surrogateescape")
    shutil.copyfile(HERE / "job.sh", folder / "job.sh")
    for name, text in plan.configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def next_folder(run_dir: Path) -> Path:
    """RUN/slurm/<number> of the next submission; the numbers of earlier ones are taken."""
    return (
        run_dir
        / "slurm"
        / f"{1 + max((int(p.name) for p in (run_dir / 'slurm').glob('[0-9][0-9][0-9]')), default=0):03d}"
    )


def check_free(run_dir: Path) -> None:
    """Raises ValueError while an earlier submission for this run directory waits or runs."""
    for record in sorted((run_dir / "slurm").glob("*/submit.json")):
        job = json.loads(record.read_text())["job"]
        if job_is_over(job) is False:
            raise ValueError(f"job {job} (not ended) is for {run_dir} already: scancel {job}, or choose another name=")


# 3. the script


def commands(plan: Plan, folder: Path, args: argparse.Namespace) -> list[str]:
    """The shell command of every task. -P: the folder it starts in must not hide the snapshot."""
    around = []
    if args.container:
        nv = ["--nv"] if plan.layout.gpus else []
        around = ["apptainer", "exec", *nv, "--bind", str(Path.cwd()), "--bind", str(plan.run_dir.resolve())]
        around += [*args.container_arg, args.container]
    python = args.python or ("python3" if args.container else sys.executable)
    run = [*around, python, "-P", "-m", "vtok.cli"]
    return [
        shlex.join([*run, *(str(folder / word) if isinstance(word, PurePosixPath) else word for word in task)])
        for task in plan.tasks
    ]


def render(plan: Plan, folder: Path, args: argparse.Namespace) -> str:
    """The sbatch file. Raises ValueError for a path that SLURM's directives cannot hold."""
    layout, job_commands = plan.layout, commands(plan, folder, args)
    directives = [f"--partition={args.partition}"] if args.partition else []
    directives += [f"--gpus-per-node={layout.gpus}"] if layout.gpus else []
    directives += args.sbatch_arg
    for path in (folder, Path.cwd()):
        if re.search(r"[\s\"'%\\#:]", str(path)):
            raise ValueError(
                f"{str(path)!r}: SLURM's directives and PYTHONPATH hold no spaces, quotes, %, \\, # or : in paths; "
                "choose another name=, out= or place to submit from"
            )
    exports = {"OMP_NUM_THREADS": str(layout.threads), **dict(item.split("=", 1) for item in args.env)}
    lines = [f"export {key}={shlex.quote(value)}" for key, value in exports.items()]
    lines.append(f'export PYTHONPATH={shlex.quote(str(folder / "code"))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    ranks = layout.nodes * layout.tasks
    values = {
        "name": re.sub(r"[^\w.-]", "-", f"vtok-{plan.name}"),
        "cwd": str(Path.cwd()),
        "folder": str(folder),
        "quoted_folder": shlex.quote(str(folder)),
        "nodes": str(layout.nodes),
        "tasks": str(layout.tasks),
        "cpus": str(layout.cpus),
        "time": args.time,
        "lead": str(args.signal_before),
        "directives": "\n".join(f"#SBATCH {line}" for line in directives),
        "exports": "\n".join(lines),
        "srun_args": shlex.join([*(["--label"] if ranks > 1 else []), *args.srun_arg]),
        "most_restarts": str(args.max_restarts),
        "command": job_commands[0],
        "indices": f"0-{len(job_commands) - 1}" + (f"%{plan.at_once}" if plan.at_once else ""),
    }
    template = (HERE / ("array.sbatch" if plan.is_array else "train.sbatch")).read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


# 4. submission


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="submit.py", description="Submit to SLURM. Guide: slurm/README.md")
    add = out.add_argument
    add("words", nargs="*", metavar="CONFIG [key=value ...]", help="a configuration and overrides, as vtok train has")
    add("--array", metavar="SWEEP.yaml", help="many jobs: a sweep, or parts of a command")
    add("--nodes", type=int, default=1, help="machines (default 1)")
    add("--gpus-per-node", type=int, required=True, metavar="G", help="0: CPU nodes, trainer.devices processes on each")
    add("--partition", metavar="P", help="default: the cluster's")
    add("--time", required=True, metavar="T", help="limit of one start: minutes, H:M:S or D-H:M:S")
    add("--cpus-per-task", type=int, default=0, help="cores a process (default: loader workers + 1; a command: 1)")
    add(
        "--signal-before", type=int, default=120, metavar="S", help="seconds left for the last checkpoint (default 120)"
    )
    add("--max-restarts", type=int, default=1000, help="requeue no more often than this (default 1000)")
    add("--python", help="of the jobs (default: the one that runs this; in a container python3)")
    add("--container", metavar="IMAGE", help="run in this image by apptainer; the code still comes from the snapshot")
    for name, of in (("container", "apptainer exec"), ("sbatch", "sbatch"), ("srun", "srun")):
        add(f"--{name}-arg", action="append", default=[], metavar="=ARG", help=f"one more argument of {of}; repeat it")
    add("--env", action="append", default=[], metavar="KEY=VALUE", help="set in the job; repeat it")
    add("--dry-run", action="store_true", help="print the script; write and submit nothing")
    return out


def check_arguments(args: argparse.Namespace) -> None:
    for flag, value, at_least in (
        ("--nodes", args.nodes, 1),
        ("--gpus-per-node", args.gpus_per_node, 0),
        ("--max-restarts", args.max_restarts, 0),
    ):
        if value < at_least:
            raise ValueError(f"{flag} {value} must be {at_least} or more")
    bad = [item for item in args.env if not re.match(r"[A-Za-z_]\w*=", item)]
    if bad:
        raise ValueError(f"--env {bad[0]} is not of the form KEY=VALUE")
    check_time(args.time, args.signal_before)
    configs = [word for word in args.words if "=" not in word]
    if len(configs) > 1 or (not configs and not args.array):
        raise ValueError(f"expected one CONFIG, got {configs or 'none'}: submit.py CONFIG [key=value ...]")
    args.config, args.overrides = (configs or [None])[0], [word for word in args.words if "=" in word]


def submit(args: argparse.Namespace) -> str:
    """Does it all; the job's id, "" after --dry-run. Raises ValueError for what cannot be submitted."""
    check_arguments(args)
    plan = plan_array(args) if args.array else plan_training(args)
    folder = next_folder(plan.run_dir.resolve())
    script = render(plan, folder, args)
    if args.dry_run:
        print(script)
        if plan.is_array:
            print("\n".join(f"# {index}: {line}" for index, line in enumerate(commands(plan, folder, args))))
        for note in plan.notes:
            print(f"# {note}")
        return ""
    if shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here: run this on a login node, or with --dry-run to see the script")
    check_free(plan.run_dir)
    folder.mkdir(parents=True)
    snapshot(folder, plan)
    (folder / "tasks.txt").write_text("\n".join(commands(plan, folder, args)) + "\n")
    (folder / "job.sbatch").write_text(script)
    done = subprocess.run(["sbatch", "--parsable", str(folder / "job.sbatch")], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(folder)
        raise ValueError(f"sbatch refused: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    record = {"job": job, "time": time.strftime("%FT%T%z"), "commit": commit_of(ROOT) or "unknown", "command": sys.argv}
    (folder / "submit.json").write_text(json.dumps(record, indent=1) + "\n")
    for note in plan.notes:
        print(note)
    log = folder / (f"{job}_*.out" if plan.is_array else f"{job}.out")
    print(
        f"job {job} is submitted; its code, configuration and log: {folder}\n"
        f"  state    squeue --jobs={job}\n"
        f"  log      tail -F {log}\n"
        f"  stop     scancel {job}"
    )
    if plan.tasks[0][0] == "train":
        metrics = "metrics.jsonl" if not plan.is_array else "(each element's own)"
        print(
            f"  numbers  tail -F {plan.run_dir / metrics}"
            if not plan.is_array
            else f"  numbers  vtok info RUN {metrics}"
        )
        print(f"  save now and queue again    scancel --signal=USR1 {job}")
    return job


def main(argv: list[str]) -> int:
    try:
        submit(parser().parse_intermixed_args(argv))
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
