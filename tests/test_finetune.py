"""docs/finetune.md as a user types it, and the comparison of two models that it ends with."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import Hub, running
from test_export import TINY, clip, make_run
from test_init_from import ship
from test_projector import lab, settings, stage0  # noqa: F401
from waiting import PATIENCE_S

from vtok import cli
from vtok.config import loads, to_yaml
from vtok.data import shards, synthetic
from vtok.evaluation.compare import compare, main, print_comparison
from vtok.export import main_export, read_config
from vtok.train import build, train
from vtok.training.run_files import write_run_files

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "finetune.md"
SMALLER = {"trainer.max_steps=600": "trainer.max_steps=6", "trainer.val_every=200": "trainer.val_every=3",
           "optim.warmup_steps=20": "optim.warmup_steps=1"}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)


def corpus(folder: Path, *, seed: int, clips: int = 12, complexity: tuple[int, int] = (0, 1)) -> Path:
    synthetic.write_corpus(
        folder, clips=clips, seconds=1, size=(32, 32), fps=8, complexity=complexity, val_fraction=0.25, workers=1,
        progress=False, seed=seed,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """Shards of the corpus from before."""
    folder = tmp_path_factory.mktemp("old")
    made = corpus(folder / "corpus", seed=1)
    shards.main([str(made / "captions.jsonl"), "--out", str(folder / "shards"), "--workers", "1"])
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.hub
def test_the_commands_of_the_document(old, tmp_path):
    values = ["name=base", f"out={tmp_path / 'runs'}", f"data.shards={old / 'train'}", f"data.val_shards={old / 'val'}"]
    values += ["trainer.max_steps=4", "data.num_workers=0", "trainer.progress=false", "trainer.tensorboard=false"]
    assert not cli.main(["train", str(ROOT / "configs" / "flexible" / "debug.yaml"), *values])
    main_export([str(tmp_path / "runs" / "base"), "--out", str(tmp_path / "exports" / "base"), "--no-entropy"])
    videos = corpus(tmp_path / "corpus", seed=2, clips=24, complexity=(3, 3)) / "train"
    given, *commands = blocks("sh")
    said = [line.partition("=")[0] for line in given.splitlines()]
    ours = {"VIDEOS": videos, "SOURCE": "exports/base", "OLD": old / "val", "REPO": "user/base-mine"}
    assert said == list(ours), "the first block says all that is a user's"
    script = "".join(commands)
    for there, here in SMALLER.items():
        assert script.count(there) == 1
        script = script.replace(there, here)
    with running() as hub:
        told = run(hub, tmp_path, ["bash", "-euxc", script], **{name: str(value) for name, value in ours.items()})
        source = read_config(tmp_path / "exports" / "base")["model_id"]
        tensors = len(json.loads(_header(tmp_path / "exports" / "base" / "model.safetensors"))) - 1  # __metadata__
        assert f"init_from=exports/base ({source}): all weights ({tensors} tensors as they were)" in told
        result = json.loads((tmp_path / "runs" / "mine" / "eval" / "compare.json").read_text())
        assert [each["corpus"] for each in result["corpora"]] == ["own", "old"]
        assert result["before"]["model_id"] == source
        for each in result["corpora"]:
            assert each["clips"] > 0 and [row["budget"] for row in each["rows"]] == [1, 4, 16]
            assert all(math.isclose(r["after"] - r["before"], r["difference"], abs_tol=1e-9) for r in each["rows"])
        assert any(row["difference"] for row in result["corpora"][0]["rows"])
        exported = tmp_path / "exports" / "mine"
        assert result["after"]["model_id"] == read_config(exported)["model_id"] != source
        repository = hub.repositories["user/base-mine"]
        assert (
            repository.private
            and repository.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()
        )
        assert "started from the weights of `exports/base`" in repository.files["README.md"].decode()
        (loading,) = blocks("python")
        loading = loading.replace("9f2c...", repository.head) + "print(model.shipped.model_id)"
        assert run(hub, tmp_path, [sys.executable, "-c", loading]).split()[-1] == result["after"]["model_id"]


def run(hub: Hub, folder: Path, command: list[str], **more: str) -> str:
    """The output of a command in a folder, whose client takes the stand-in for the Hub."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = hub.environment(folder / "home", PATH=path, **more)
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_tokenizers_are_compared_clip_by_clip(old, tmp_path, capsys):
    data = {"num_frames": 4, "size": [16, 16], "fps": 4.0, "val_batch_size": 3, "num_workers": 0}
    one, other = (make_run(tmp_path / f"run-{seed}", seed=seed) for seed in (0, 1))
    for folder in (one, other):
        values = loads({"model": TINY["flexible"], "data": {**data, "val_shards": str(old / "val")}})
        (folder / "config.yaml").write_text(to_yaml(values))
    result = compare(str(one), str(other), old=str(old / "train"), progress=False, budgets=[1, 4])
    own, before = result["corpora"]
    assert (own["corpus"], before["corpus"]) == ("own", "old") and before["clips"] > own["clips"] > 1
    back = compare(str(other), str(one), progress=False, budgets=[1, 4])
    for row, turned in zip(own["rows"], back["corpora"][0]["rows"]):
        assert (row["before"], row["after"]) == (turned["after"], turned["before"])
        assert row["difference"] == pytest.approx(-turned["difference"]) and row["difference"] != 0
        low, high = row["difference_ci"]
        assert low <= row["difference"] <= high and row["measured"] == own["clips"]
    same = compare(str(one), str(ship(one)), own=str(old / "val"), progress=False, budgets=[4])
    (row,) = same["corpora"][0]["rows"]
    assert (
        row["difference"] == 0
        and row["difference_ci"] == [0, 0]
        and same["before"]["model_id"] == same["after"]["model_id"]
    )
    assert main([str(one), str(other), "--budgets", "4", "--clips", "2", "--no-progress"]) == 0
    told = capsys.readouterr().out
    assert "forgetting was not measured: name the corpus from before, --old DIR" in told and "own" in told
    written = json.loads((other / "eval" / "compare.json").read_text())
    assert written["corpora"][0]["clips"] == 2
    print_comparison(result)
    assert "old" in capsys.readouterr().out


def test_what_rests_is_named_in_the_document_counted_and_in_no_optimizer(tmp_path, capsys):
    (frozen,) = re.findall(r"^optim.freeze=\[(.*)\]$", DOC.read_text(encoding="utf-8"), re.M)
    (tmp_path / "run").mkdir()
    values = {"name": "run", "out": str(tmp_path), "model": TINY["flexible"], "optim": {"freeze": frozen.split(",")}}
    config = loads(values | {"data": {"shards": "none", "num_frames": 4, "size": [16, 16]}})
    lit = build(config)
    write_run_files(config, lit)
    rests = {name for name, p in lit.model.named_parameters() if not p.requires_grad}
    said = capsys.readouterr().out
    assert f"at rest (optim.freeze, optim.train_only): {len(rests)} tensors of the model" in said
    assert "warning: model.registers" in said and "rest as they began, untrained: init_from is empty" in said
    assert "model.decoder" not in said.partition("warning")[2]
    lit.model.from_files = tuple(frozen.replace("model.", "").split(","))  # as a family's `build` says it
    write_run_files(config, lit)
    assert "warning" not in capsys.readouterr().out
    learns = {id(p) for group in lit.configure_optimizers().param_groups for p in group["params"]}
    assert learns == {id(p) for name, p in lit.model.named_parameters() if name not in rests}
    seen = clip(frames=4)
    before = lit.model.eval().encode(seen).indices
    with torch.no_grad():
        for parameter in lit.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert torch.equal(lit.model.encode(seen).indices, before), "what learns comes after the ids"


def test_what_cannot_be_compared_is_said(tmp_path, old):
    run_dir = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="says no validation shards: name them, --shards DIR"):
        compare(str(run_dir), str(run_dir))


@pytest.mark.slow
def test_projectors_are_compared_question_by_question(lab, stage0):  # noqa: F811
    more = train(loads(settings(lab, "more", "name: reducer", top=f"init_from: {stage0}")))
    shown = str(lab / "shards" / "val")
    result = compare(str(stage0), str(more), own=shown, old=shown, progress=False)
    assert result["measure"] == "accuracy" and result["kind"] == "projector"
    own, again = result["corpora"]
    assert own["rows"] == again["rows"], "the same corpus twice"
    (row,) = own["rows"]
    assert row["budget"] is None and 0 <= row["before"] <= 1 and row["measured"] > own["clips"]
    same = compare(str(stage0), str(stage0), own=shown, progress=False)
    assert same["corpora"][0]["rows"][0]["difference"] == 0
    with pytest.raises(ValueError, match="is a tokenizer, .* a projector: two of one kind are compared"):
        compare(str(ship(make_run(lab / "tokenizer"))), str(more), own=shown)
