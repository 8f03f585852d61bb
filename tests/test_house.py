"""The house keeps its shape: who may import whom, every preset loads, nothing names one person's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from vtok.config import RunConfig, load

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"budget", "layers", "quantize", "losses", "vision", "llm", "reducers", "metrics", "data"}
READS_LAYERS = {"losses", "metrics", "quantize", "vision", "llm", "reducers"}
# rooms over leaves and families, and which of them they do not know; `train`, `export` ... lie between and above them
STRANGERS = {
    "training": {"coding", "evaluation", "shipping", "info"},
    "coding": {"training", "evaluation", "info"},
    "evaluation": {"training", "shipping", "info"},
    "shipping": {"training", "evaluation", "info"},
    "info": {"evaluation"},
}
# no tensor rooms: files of ids, and charts, import one another only; a prior runs on layers
PLUMBING = {f"vtok.coding.{name}" for name in ("entropy", "records", "bitstream", "stream_header", "prior_coding")}
PLUMBING |= {"vtok.evaluation.charts"}
LIGHTNING = {
    "vtok.training.strategy",
    "vtok.training.lit",
    "vtok.training.loop",
    "vtok.train",
    "vtok.evaluate",
    "vtok.data.module",
}
HUGGING = {
    "vtok.llm.frozen",
    "vtok.llm.lora",
    "vtok.llm.small",
    "vtok.layers.seams",
    "vtok.vision.load",
    "vtok.vision.audio_load",
    "vtok.vision.preprocess",
    "vtok.shipping.hf",
    "vtok.info.skeletons",
    "vtok.shipping.hf_vlm",
}
LIBRARIES = {"lightning": LIGHTNING, "transformers": HUGGING, "timm": HUGGING, "deepspeed": {"vtok.training.strategy"}}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "vtok").rglob("*.py"))}


def imports(module: str, path: Path, *, late: bool = True) -> set[str]:
    """Full names a file imports; `from vtok import train` counts as vtok.train. late=False: not those in functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, hidden) for n in ast.walk(f)} if not late else set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{name}.{alias.name}" for alias in node.names}
            found |= (inner & set(FILES)) or {name}
    return found


def allowed(module: str, other: str) -> bool:
    """Whether `module` may import the vtok module `other`."""
    room, its = (name.split(".")[1] if "." in name else "" for name in (module, other))
    if other == "vtok":
        return room not in LEAVES | {"types"} and module not in PLUMBING
    if room == "types":
        return False
    if module in PLUMBING:
        return other in PLUMBING or its == "types" or (its == "layers" and module == "vtok.coding.prior_coding")
    if its in ("types", room) and room != "families":
        return True
    if room in LEAVES:
        return (its == "layers" and room in READS_LAYERS) or (module == "vtok.data.module" and its == "config")
    if room == "families":
        return its == "types" or its in LEAVES - {"data", "metrics"}
    return its not in STRANGERS.get(room, ())  # a circle among the top files is another test's business


@pytest.mark.parametrize("module", FILES)
def test_rooms_import_only_what_they_may(module):
    found = imports(module, FILES[module])
    bad = {name for name in found if name.split(".")[0] == "vtok" and not allowed(module, name)}
    assert not bad, f"{module} may not import {sorted(bad)}; see the tree in CONTRIBUTING.md"
    for library, rooms in LIBRARIES.items():
        uses = any(name.split(".")[0] == library for name in found)
        assert not uses or module in rooms, f"{module} imports {library}, which belongs to {sorted(rooms)}"
    if module == "vtok.types":
        outside = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert outside == {"torch"}


def test_no_circle():
    graph = {module: imports(module, path, late=False) & set(FILES) for module, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another in a circle: {' -> '.join(error.args[1])}")


def test_the_rule_itself_can_fail():
    assert not allowed("vtok.quantize", "vtok.budget") and allowed("vtok.quantize", "vtok.layers.positions")
    assert not allowed("vtok.families.flexible", "vtok.families.temporal")
    assert not allowed("vtok.families.flexible", "vtok.metrics.rate") and not allowed("vtok.budget", "vtok.train")
    assert not allowed("vtok.coding.codec", "vtok.training.lit") and allowed("vtok.coding.codec", "vtok.loading")
    assert not allowed("vtok.coding.entropy", "vtok.coding.codec") and allowed("vtok.coding.prior", "vtok.coding.codec")
    assert not allowed("vtok.layers.masks", "vtok.quantize") and not allowed("vtok.data.pipeline", "vtok.config")
    assert allowed("vtok.data.pipeline", "vtok.data.decode") and allowed("vtok.training.lit", "vtok.training.strategy")


@pytest.mark.parametrize(
    "module", ["vtok", "vtok.export", "vtok.evaluation.report", "vtok.coding.codec", "vtok.info.describe"]
)
def test_inference_leaves_lightning_out(module):
    code = f"import sys, {module}; print(sorted({{'lightning', 'pytorch_lightning', 'deepspeed'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_preset_loads(path):
    config = load(path)
    where = {"flow": "flexible"}  # flexible length in its generative form: its presets stand beside the others
    assert isinstance(config, RunConfig) and where.get(config.model.name, config.model.name) == path.parent.name
    assert path.read_text().startswith("#"), "a preset opens with its command, hardware, wall time and expected score"


def test_no_path_of_one_machine():
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".html", ".css", ".js", ".json", ".sh", ".sbatch", ""}
    places = re.compile(r"(?<![\w.<-])/(?:work|home/\w|Users/\w|root/)[\w/.-]*")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    if listed.returncode:
        pytest.skip("not a git checkout")
    bad = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.suffix in suffixes and path.is_file() and name != "tests/test_house.py":
            bad += [f"{name}: {found}" for found in places.findall(path.read_text(encoding="utf-8", errors="ignore"))]
    assert not bad, bad
