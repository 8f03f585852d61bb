"""What an exported projector says of itself: its card, its length policy, and that the card's own code runs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from waiting import PATIENCE_S

from vtok import config as vtok_config
from vtok import export as shipping
from vtok.loading import load_run
from vtok.shipping.projector_card import FULL_TABLE, hub_id, projector_card

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from tiny_tower import write_tower

TOWER, LLM = "timm:vit_so400m_patch14_siglip_384.webli", "hf:Qwen/Qwen2-7B-Instruct"
FORMER = {"num_queries": 2, "width": 8, "depth": 2, "num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "temporal": {"former": FORMER, "window": 2, "max_tokens": 64, "static": {"keep": "pool", "tokens": 4}},
    "vqtoken": {"num_tokens": 8},
    "reducer": {"max_tokens": 64},
    "language": {"max_tokens": 64, "num_tokens": 4},
}


def make_projector(
    folder: Path, *, family: str = "temporal", tower: str = TOWER, objective: dict[str, Any] | None = None, **model: Any
) -> Path:
    """A run directory as training leaves it: config.yaml and a checkpoint with random weights."""
    widths = {"in_dim": 6, "embedding_dim": 16, "embedding_rms": 0.05}
    small = {"max_tokens": 64} if "compressor" in model else SMALL[family]  # which are tdc's, of temporal
    config = vtok_config.loads(
        {
            "name": folder.name,
            "out": str(folder.parent),
            "model": {"name": family, "tower": {"name": tower}, **widths, **small, **model},
            "objective": {"llm": {"name": LLM, "revision": "f" * 40, "dtype": "bfloat16"}, **(objective or {})},
            "data": {"num_frames": 4, "size": [32, 32], "shards": "shards/train"},
        }
    )
    torch.manual_seed(0)
    net = vtok_config.load_family(family).Model(config.model)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(vtok_config.to_yaml(config))
    state = {f"model.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    return folder


def row(method: str, budget: int | None, accuracy: float, **more: Any) -> dict[str, Any]:
    tokens = 64.0 if budget is None else float(budget)
    return {
        "method": method, "budget": budget, "questions": 300, "tokens_mean": tokens, "positions_mean": 20.0 + tokens,
        "accuracy": accuracy, "accuracy_ci": [accuracy - 0.031, accuracy + 0.029], "chance": 0.25, "retained": None,
        "by_type": {"colour": accuracy, "count": accuracy / 2}, "prefill_flops": 1e9 * (20 + tokens),
        "kv_bytes": 1000 * (20 + int(tokens)), "compress_flops": 1.5e8 if budget else None, "note": None, **more,
    }  # fmt: skip


ROWS = [
    row("blind", 0, 0.26),
    row("full", None, 0.81, retained=1.0),
    row("temporal", 4, 0.63, retained=0.679),
    row("temporal", 16, 0.74, retained=0.875),
    row("pooling", 4, 0.51, retained=0.46),
    row("pooling", 16, 0.66, retained=0.73),
    row("random", 16, 0.44, retained=0.34),
]


def card(run: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    """The text of a run's card and what the Hub reads of it."""
    model, config = load_run(run)
    facts = {"family": config.model.name, "model_id": "a-model", "weights_sha256": "0" * 64}
    text = projector_card(model, config, facts, run_dir=run, **more)
    return text, ModelCard(text).data.to_dict()


def test_the_card_says_what_it_reads_makes_and_is_worth(tmp_path):
    run = make_projector(tmp_path / "run", objective={"logits": 1.0, "teacher": "stage0"})
    (run / "eval").mkdir()
    llm = {"name": LLM, "revision": "e" * 40, "sha256": "ab12" * 16}
    found = {"schema": 1, "clips": 59, "shards": "shards/val", "family": "temporal", "llm": llm, "rows": ROWS}
    (run / "eval" / "eval.json").write_text(json.dumps(found))
    text, front = card(run, licence="cc-by-4.0")
    assert front["base_model"] == ["Qwen/Qwen2-7B-Instruct", "timm/vit_so400m_patch14_siglip_384.webli"]
    assert front["base_model_relation"] == "adapter" and front["license"] == "cc-by-4.0"
    assert {"vtok", "projector", "temporal", "custom_code"} <= set(front["tags"])
    assert "f" * 40 in text and "e" * 40 not in text, "the revision that was asked for, before the one that was met"
    assert "ab12" * 16 in text and "not recorded" in text, "of the tower nothing is known"
    assert "| method | budget | tokens | accuracy % | 95 % | kept % | positions | prefill FLOPs | KV bytes |" in text
    assert "| blind | 0 | 0 | 26.0 | 22.9-28.9 |  | 20 | 2e+10 | 20000 |  |" in text
    assert "| full |  | 64 | 81.0 | 77.9-83.9 | 100.0 | 84 | 8.4e+10 | 84000 |  |" in text
    assert "| temporal | 16 | 16 | 74.0 | 70.9-76.9 | 87.5 | 36 | 3.6e+10 | 36000 | 1.5e+08 |" in text
    assert "| | 4 | 16 |" in text and "| pooling | 51.0 | 66.0 |" in text and "| random |  | 44.0 |" in text
    assert "| | blind | full | temporal 4 | temporal 16 |" in text and "| count | 13.0 | 40.5 | 31.5 | 37.0 |" in text
    assert "59 clips of `shards/val`" in text and "over chance (25.0 %)" in text
    assert "reducers on the projector of all tokens, by tokens" in text
    (run / "eval" / "eval.json").write_text(json.dumps(found | {"tuned": "pooling-tiny"}))
    assert "reducers on the projector of `pooling-tiny`, trained as long, by tokens" in card(run)[0]
    assert "Query-free" in text and "distilled from all tokens (weights: logits 1, hidden states 0)" in text
    assert "video tokenizer" not in text and "bits" not in text, "the words of tokenizers"


def test_every_column_is_one_that_eval_writes():
    sources = [path.read_text() for path in (Path(shipping.__file__).parent / "evaluation").glob("answer*.py")]
    written = {node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert set(FULL_TABLE) | {"by_type", "chance"} <= written


def test_only_tokens_of_the_video_alone_may_be_kept(tmp_path):
    free, _ = card(make_projector(tmp_path / "free"))
    aware, _ = card(make_projector(tmp_path / "aware", text=True))
    assert "**Query-free**" in free and "every turn" in free and "prompt=" not in free
    assert "**Query-aware**" in aware and "serves no other turn" in aware and 'prompt=["What happens?"]' in aware


def test_the_policy_of_lengths_is_in_config_json_and_on_the_card(tmp_path):
    for name, settings in (("content", {}), ("metadata", {"segments": {"name": "fixed"}})):
        out = shipping.export(make_projector(tmp_path / name, **settings), tmp_path / f"export-{name}")
        assert json.loads((out / "config.json").read_text())["length_policy"] == name
        assert f"`length_policy: {name}`" in (out / "README.md").read_text()
        source = (out / "modeling_vtok.py").read_text()
        assert "\ndef token_count(config: VtokConfig, frames: int, height: int, width: int" in source


def test_a_card_without_measurements_or_public_bases_says_so(tmp_path):
    secret = tmp_path / "of-mine" / "tower"
    objective = {"llm": {"name": str(tmp_path / "of-mine" / "llm")}, "lora": {"rank": 4}, "timestamps": True}
    run = make_projector(tmp_path / "run", family="reducer", tower=str(secret), objective=objective)
    text, front = card(run)
    assert "base_model" not in front and "base_model_relation" not in front
    assert "`tower`, a folder of the exporter's" in text and "`llm`, a folder of the exporter's" in text
    assert "of-mine" not in text, "no path of the exporter's machine"
    assert (
        "Not evaluated before the export" in text and "adapters of rank 4, which are in `adapters.safetensors`" in text
    )
    assert "their number cannot be chosen" in text and "budget=" not in text.partition("## Use")[2]
    assert "times written before groups of tokens" in text


def test_a_reader_of_texts_has_no_tower_and_a_small_model(tmp_path):
    small = dict(model_type="qwen2", vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    small |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    lm = {"name": "hf:Qwen/Qwen2-0.5B", "architecture": small, "sha256": "cd34" * 16}
    text, front = card(make_projector(tmp_path / "run", family="language", tower="", lm=lm))
    assert front["base_model"] == ["Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-0.5B"]
    assert "it makes tokens of a text, and" in text and "| tower |" not in text
    assert "cd34" * 16 in text and "trained from there on, its weights are here" in text
    assert 'text=["A long text."]' in text and "torch.zeros" not in text and "attach" not in text


def test_a_table_without_all_tokens_says_what_it_lacks(tmp_path):
    run = make_projector(tmp_path / "run")
    (run / "eval").mkdir()
    rows = [ROWS[0], row("temporal", 4, 0.6)]
    (run / "eval" / "eval.json").write_text(json.dumps({"clips": 3, "shards": "s", "rows": rows}))
    text, _ = card(run)
    assert "There is no row of all tokens" in text and "kept %" not in text and "training-free" not in text


def test_names_on_the_hub():
    assert hub_id("hf:Qwen/Qwen3-4B") == "Qwen/Qwen3-4B" and hub_id("timm:someone/tower") == "someone/tower"
    assert hub_id("timm:vit_base_patch16_224.augreg_in21k") == "timm/vit_base_patch16_224.augreg_in21k"
    for name in ("timm:vit_base_patch16_224", "hf:gpt2", "/folder/llm", "runs/llm", "./runs", ""):
        assert hub_id(name) is None


@pytest.mark.slow
def test_the_card_s_code_runs(tmp_path):
    """Every block that names the export, in a process of its own, without the Hub."""
    write_tower(tmp_path / "tower", size=32, patch=8, width=16, depth=3)
    summary = {"num_tokens": 2, "width": 8, "depth": 1, "num_heads": 2}
    code = []
    for at, (family, blocks, settings) in enumerate((
        ("temporal", 2, {"text": True, "summary": summary}),
        ("vqtoken", 2, {"scope": "stream"}),
        ("reducer", 2, {}),
        ("reducer", 1, {"method": "visionzip", "attention_layers": [-2]}),
        ("reducer", 1, {"method": "downsample"}),
    )):  # fmt: skip
        run = make_projector(
            tmp_path / f"run-{at}", family=family, tower=str(tmp_path / "tower"), in_dim=16, **settings
        )
        out = shipping.export(run, tmp_path / f"export-{at}")
        found = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
        found = [block for block in found if "PATH_OR_REPO" in block]
        assert len(found) == blocks, "patches alone are not enough for the last two"
        code += [block.replace("PATH_OR_REPO", repr(str(out))) for block in found]
    check = "\nassert tokens.embeddings.shape[2] == 16 and int(tokens.lengths[0]) >= 1\n"
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = "".join(block + check for block in code)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **home}
    )
    assert done.returncode == 0, f"{script}\n{done.stderr[-3000:]}"


def test_an_export_tells_no_key_of_an_address(tmp_path, caplog):
    run = make_projector(tmp_path / "run")
    config = vtok_config.load(run / "config.yaml", ["data.shards='https://me:w0rd@host/x.tar?sign=w0rd'"])
    (run / "config.yaml").write_text(vtok_config.to_yaml(config))
    command = ["/bin/python", "/bin/vtok", "train", "data.shards=https://me:w0rd@host/x.tar", "name=run"]
    (run / "environment.json").write_text(json.dumps({"starts": [{"command": command, "packages": {}}]}))
    (run / "eval").mkdir()
    shards = {"clips": 3, "family": "temporal", "shards": "https://host/val.tar?sign=w0rd", "rows": ROWS}
    (run / "eval" / "eval.json").write_text(json.dumps(shards))
    out = shipping.export(run, tmp_path / "out")
    texts = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"training.yaml", "README.md", "config.json"} <= texts.keys()
    assert not [name for name, text in texts.items() if b"w0rd" in text]
    card, training = texts["README.md"].decode(), texts["training.yaml"].decode()
    assert (
        "train data.shards=https://***@host/x.tar name=run" in card and "3 clips of `https://host/val.tar?***`" in card
    )
    assert "shards: https://***@host/x.tar?***" in training
    assert ["the export tells data.shards with ***" in message for message in caplog.messages].count(True) == 1
    kept = vtok_config.load(run / "config.yaml")
    assert "w0rd" in kept.data.shards, "the run itself goes on reading its shards"
