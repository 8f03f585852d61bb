"""The one file that ships with a model: what it imports, how it tells names apart that clash, and that it gives the
same tokens where vtok is absent."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import BLOCKS, TEACHER, VQ, make_run, video
from waiting import PATIENCE_S

import vtok
from vtok import config as vtok_config
from vtok import export as shipping
from vtok.shipping.bundle import BundleError, bundle
from vtok.types import Clip

GRID = {"coarse": [1, 2, 2]}
SPACETIME = {
    "backbone": "transformer",
    "conv": {},
    "transformer": {"width": 16, "num_heads": 2, "encoder_spatial": "tw", "decoder_spatial": "t", "window": [2, 2]},
}


def imports_of(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("family", vtok_config.family_names())
def test_the_generated_file_imports_torch_einops_and_transformers_only(family):
    source = shipping.modeling_source(vtok_config.load_family(family), family)
    assert imports_of(source) - set(sys.stdlib_module_names) - {"__future__"} <= {"torch", "einops", "transformers"}
    assert "class Objective" not in source and "Discriminator" not in source
    compile(source, "modeling_vtok.py", "exec")


def make_package(folder, **files):
    package = folder / "toyfam"
    package.mkdir()
    for name, text in {"__init__": "", **files}.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))


def test_the_bundle_renames_what_clashes_and_keeps_the_meaning(tmp_path, monkeypatch):
    make_package(
        tmp_path,
        low="""
            import math
            SCALE = 3
            def _helper(x):  # the same name as in main
                return x * SCALE
            def unused(): import_missing_thing()
        """,
        mid="""
            from .low import _helper as assist
            import toyfam.low as low
            def _helper(x):
                _local = assist(x) + 1
                return _local
            def scaled(low_value, SCALE=7):
                return low_value + SCALE + low.SCALE
        """,
        main="""
            from __future__ import annotations
            from functools import partial as part
            from toyfam import mid
            from toyfam.low import _helper as third
            try:
                from not_installed_anywhere import Fast
            except ImportError:
                Fast = None
            # a comment that stays
            def _helper(x):
                return x - 1
            class Config: pass
            class Model:
                def run(self, x):
                    return [_helper(x), mid._helper(x), third(x), mid.scaled(x), part(_helper, x)(), Fast]
            class Objective:
                import json as must_not_ship
        """,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = bundle([("toyfam.main", ("Config", "Model"))])
    assert "must_not_ship" not in source and "unused" not in source and "# a comment that stays" in source
    assert "not_installed_anywhere" not in source and "toyfam" not in imports_of(source)
    space: dict = {}
    exec(compile(source, "bundle", "exec"), space)
    import toyfam.main

    assert space["Model"]().run(5) == toyfam.main.Model().run(5) == [4, 16, 15, 15, 4, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import yaml\ndef f(): return yaml.x", "may only import torch"),
        ("def f():\n    import yaml", "may only import torch"),
        ("from toyfam.low import *\ndef f(): return 1", "import \\*"),
        ("def f(): return 1\ntry:\n    g = f()\nexcept Exception:\n    g = 2", "only `try: import"),
    ],
)
def test_what_cannot_be_bundled_says_where(tmp_path, monkeypatch, line, message):
    for name in [m for m in sys.modules if m.startswith("toyfam")]:
        del sys.modules[name]
    make_package(
        tmp_path, low="a = 1", main=line + "\nclass Model:\n    x = f()\n" + ("    y = g\n" if "g =" in line else "")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BundleError, match=message):
        bundle([("toyfam.main", ("Model",))])


# --- without vtok ---

ABSENT = ("vtok", "lightning", "omegaconf", "vector_quantize_pytorch", "av", "torchvision", "timm")

ALONE = """
import importlib.util, json, sys
for name in {absent!r}:
    assert importlib.util.find_spec(name) is None, name + " is importable here"
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
torch.set_num_threads(1)
given, out = {given!r}, {out!r}
video = load_file(given)["video"]
result = {{}}
for folder in {folders!r}:
    name = folder.rpartition("/")[2]
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "vtok"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not model.training and type(model).__name__ == "VtokModel"
    tokens = model(video)
    counts = getattr(model.model, "token_counts", None)
    short = model.encode(video, budget=counts(video.shape[2], tuple(video.shape[3:]))[0] if counts else 3)
    result |= {{
        name + ".ids": tokens.indices,
        name + ".short": short.indices,
        name + ".video": model.decode(tokens, size=(16, 24)),
        name + ".sha": torch.tensor([float(p.double().sum()) for p in model.parameters()]),
    }}
save_file({{k: v.contiguous() for k, v in result.items()}}, out)
loaded = sorted(m for m in {absent!r} if m in sys.modules)
assert not loaded, loaded
"""


def bare_environment(folder: Path) -> Path:
    """An interpreter that sees torch, transformers, einops, safetensors and what they require, and nothing else."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=PATIENCE_S)
    there = next((folder / "lib").glob("python*/site-packages"))
    wanted, seen = ["torch", "transformers", "einops", "safetensors"], set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        for item in {
            Path(file).parts[0] for file in found.files or [] if Path(file).parts[0] not in ("..", "__pycache__")
        }:
            if not (there / item).exists():
                (there / item).symlink_to(found.locate_file(item))
        needs = [Requirement(text) for text in found.requires or []]
        wanted += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


@pytest.mark.slow
def test_automodel_gives_the_same_tokens_where_vtok_is_absent(tmp_path):
    """The export's own code, in a fresh environment without vtok and what training needs."""
    dct = {"registers": "dct", "num_tokens": 8}
    kinds = {"plain": {}, "blocks": BLOCKS, "vq": VQ, "teacher": TEACHER, "dct": dct}
    runs = {name: ("flexible", changes) for name, changes in kinds.items()}
    runs |= {"grid": ("discrete", {}), "levels": ("discrete", GRID), "spacetime": ("discrete", SPACETIME)}
    exports = {}
    for name, (family, changes) in runs.items():
        run = make_run(tmp_path / f"run_{name}", family=family, **changes)
        exports[name] = shipping.export(run, tmp_path / name, entropy=False)
    save_file({"video": video(6, 16, 24)}, tmp_path / "given.safetensors")
    python = bare_environment(tmp_path / "bare")
    script = ALONE.format(
        absent=ABSENT,
        given=str(tmp_path / "given.safetensors"),
        out=str(tmp_path / "out.safetensors"),
        folders=[str(p) for p in exports.values()],
    )
    home = {
        "HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [str(python), "-I", "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, cwd=tmp_path,
        env={**home, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(tmp_path / "out.safetensors")
    for name, folder in exports.items():
        model = vtok.load(folder)
        given = Clip(keys=["a", "b"], video=video(6, 16, 24)).as_float()
        with torch.no_grad():
            counts = model.token_counts(6, (16, 24)) if runs[name][0] == "discrete" else [3]
            tokens, short = model.encode(given), model.encode(given, budget=counts[0])
            assert torch.equal(got[f"{name}.ids"], tokens.indices), name
            assert torch.equal(got[f"{name}.short"], short.indices), name
            assert len(torch.unique(tokens.indices)) > 3, "ids that are all alike prove nothing"
            assert torch.allclose(got[f"{name}.video"], model.decode(tokens, size=(16, 24)), atol=1e-5), name
