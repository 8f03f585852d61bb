"""The four kinds of work that are killed, interrupted and starved here: what each is called with, what must be equal at
its end whatever happened on the way, and which files under a final name must be whole at any moment.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import vtok
from soak.corpus import PACK, Corpus
from vtok import config as vtok_config
from vtok.coding.bitstream import Reader
from vtok.data.sources import scan
from vtok.data.token_reader import IDS
from vtok.training import checkpoints

CLOCKS = ("per_s", "wait", "time_s", "seconds", "mfu", "memory", "tflops")  # of metrics.jsonl: not the same twice


@dataclass(frozen=True)
class Ended:
    """What stands at the end. samples: how often each was used or written. exact: what must be equal, by name."""

    samples: Counter[str]
    exact: dict[str, str]


@dataclass(frozen=True)
class Job:
    """arguments: of `vtok`, given where the output goes. ended: what stands there at the end."""

    name: str
    arguments: Callable[[Path], list[str]]
    ended: Callable[[Path], Ended]


@dataclass
class Count:
    """What happened to one job. moved: things that must be equal and are not, or files that are not whole."""

    times: int = 0
    starts: int = 0
    lost: int = 0
    repeated: int = 0
    corrupt: int = 0
    faults: list[str] = field(default_factory=list)

    def compare(self, found: Ended, right: Ended) -> None:
        """Adds what is lost, what is repeated, and what differs otherwise."""
        self.lost += sum((right.samples - found.samples).values())
        self.repeated += sum((found.samples - right.samples).values())
        names = sorted(right.exact.keys() | found.exact.keys())
        self.faults += [f"{name} differs" for name in names if right.exact.get(name) != found.exact.get(name)]

    def look(self, out: Path) -> None:
        """Adds what is not whole under a final name."""
        found = problems(out)
        self.corrupt += len(found)
        self.faults += found

    @property
    def sound(self) -> bool:
        return not (self.lost or self.repeated or self.corrupt or self.faults)


def jobs(corpus: Corpus, *, workers: int = 2, steps: int = 60) -> dict[str, Job]:
    """Training, packing, tokenizing and exporting of the corpus."""
    each = ["--workers", str(workers)]
    return {
        "training": Job("training", lambda out: train_arguments(corpus, out, steps=steps, workers=workers), _trained),
        "packing": Job(
            "packing", lambda out: ["shards", str(corpus.videos), "--out", str(out / "shards"), *each, *PACK], _packed
        ),
        "tokenizing": Job(
            "tokenizing",
            lambda out: (
                ["tokenize", str(corpus.shards), "--model", str(corpus.export), "--out", str(out / "tokens")]
                + [*each, "--quiet"]
            ),
            _tokenized,
        ),
        "exporting": Job("exporting", lambda out: ["export", str(corpus.run), "--out", str(out / "export")], _exported),
    }


def train_arguments(corpus: Corpus, out: Path, *, steps: int, workers: int = 2) -> list[str]:
    changes = [f"out={out}", "name=run", f"trainer.max_steps={steps}", f"data.num_workers={workers}"]
    return ["train", str(corpus.config), *changes]


def ledger(run: Path) -> dict[int, tuple[str, list[str]]]:
    """{step: (exact loss, keys of its batch)}; a later start's line replaces an earlier one's, a half line is none."""
    found = {}
    path = run / "ledger-0.txt"
    for line in path.read_text().splitlines() if path.exists() else []:
        words = line.split(" ")
        if len(words) == 4 and words[3].count(",") == 3:
            found[int(words[1])] = (words[2], words[3].split(","))
    return found


def _trained(out: Path) -> Ended:
    run = out / "run"
    steps = ledger(run)
    samples = Counter(key for _, keys in steps.values() for key in keys)
    exact = {f"step {step}": f"{loss} {keys}" for step, (loss, keys) in steps.items()}
    state = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    for part in ("state_dict", "ema"):
        exact |= {f"{part} {name}": _hash(value) for name, value in state[part].items()}
    for number, slots in state["optimizer_states"][0]["state"].items():
        exact |= {f"moments {number} {name}": _hash(torch.as_tensor(value)) for name, value in slots.items()}
    for number, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        row = {key: value for key, value in json.loads(line).items() if not any(word in key for word in CLOCKS)}
        exact[f"metrics line {number}"] = json.dumps(row)
    return Ended(samples, exact)


def _packed(out: Path) -> Ended:
    return _shards(out / "shards", "json", ("index.json", "split.json", "rejected.jsonl", "packing.json"))


def _tokenized(out: Path) -> Ended:
    return _shards(out / "tokens", IDS, ("index.json", "rejected.jsonl", "tokenizing.json"))


def _shards(folder: Path, member: str, names: tuple[str, ...]) -> Ended:
    samples: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            samples.update(name for name in tar.getnames() if name.endswith(f".{member}"))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    exact = {str(path.relative_to(folder)): _hash(path.read_bytes()) for path in files}
    litter = [name for name in exact if name.endswith(".tmp")]
    assert set(names) - {"packing.json"} <= {Path(name).name for name in exact} or not samples, exact.keys()
    return Ended(samples, exact | dict.fromkeys(litter, "a file that was left behind"))


def _exported(out: Path) -> Ended:
    folder = out / "export"
    files = {path.name: _hash(path.read_bytes()) for path in sorted(folder.iterdir())}
    litter = {path.name: "left behind" for path in out.iterdir() if path != folder}
    return Ended(Counter(), files | litter)


def _hash(value: bytes | torch.Tensor) -> str:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(value).hexdigest()


def problems(out: Path) -> list[str]:
    """Files under `out` that bear their final name and are not whole. Names with a dot before are work in progress."""
    found = []
    for path in sorted(out.rglob("*")):
        parts = path.relative_to(out).parts
        if any(part.startswith(".") and part != ".shards" for part in parts) or not path.is_file():
            continue
        if any((out / Path(*parts[:n]) / "model.safetensors").exists() for n in range(1, len(parts))):
            continue  # an export is judged as a whole
        what = _problem(path)
        if what:
            found.append(f"{Path(*parts)}: {what}")
    for config in sorted(out.rglob("modeling_vtok.py")) + sorted(out.rglob("model.safetensors")):
        folder = config.parent
        if not any(part.startswith(".") for part in folder.relative_to(out).parts):
            try:
                vtok.load(str(folder))
                missing = {"README.md", "training.yaml", "modeling_vtok.py"} - {p.name for p in folder.iterdir()}
                what = f"lacks {sorted(missing)}" if missing else ""
            except ValueError as error:
                what = str(error)
            if what:
                found.append(f"{folder.relative_to(out)}: {what}")
    return sorted(set(found))


def _problem(path: Path) -> str:
    try:
        if path.suffix == ".tar":
            bad = [sample.problem for sample in scan(path, media=("mp4", IDS)) if sample.problem is not None]
            return "; ".join(bad)
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".yaml":
            vtok_config.load(path)
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines()[:-1]:  # a line may be cut by a kill while it is appended
                json.loads(line)
        elif path.suffix == ".ckpt":
            checkpoints.verify(path)
            torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".vtok":
            with open(path, "rb") as file:
                Reader(file, name=path.name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
