"""A run's lines in Weights & Biases: the real client, offline, in a folder of its own, and what it is not told."""

from __future__ import annotations

import re
import signal
import socket
import sys
import tomllib
from pathlib import Path

import pytest
import test_train

from vtok import train as training
from vtok.shareable import shareable

ROOT = Path(__file__).parent.parent


def test_the_client_is_part_of_what_tests_are_run_with():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "wandb" in extras and any(each.startswith("vtok[") and "wandb" in each for each in extras["dev"])
    assert "\nwandb==" in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:word@host:8/a/x-{000..003}.tar", "https://***@host:8/a/x-{000..003}.tar"),
        ("s3://host/x.tar?X-Amz-Signature=ab12&n=1", "s3://host/x.tar?***"),
        ("pipe:curl -H 'Authorization: key' https://host/x.tar", "pipe:***"),
        ("shards/train", "shards/train"),
        ("timm:vit_base@main", "timm:vit_base@main"),
        ("https://host/a@b/x.tar", "https://host/a@b/x.tar"),
    ],
)
def test_what_may_hold_a_key_is_not_told(text, told):
    assert shareable({"data": {"shards": text, "sizes": [1, text]}, "lr": 0.1}) == {
        "data": {"shards": told, "sizes": [1, told]},
        "lr": 0.1,
    }


@pytest.mark.slow  # its service is a process
def test_the_real_client_offline_writes_one_run_and_no_secret_and_calls_nobody(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    secrets = {
        "key": "5ecre7" * 6 + "5e5e",
        "hub": "hf_s3cr3tt0kenofnobody",
        "config": "w0rdoftheconfig",
        "line": "w0rdof4line",
    }
    shards = f"https://me:{secrets['config']}@host/x-{{000..003}}.tar?sign={secrets['config']}"
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # whoever it wants to call, it has to ask here
        proxy.setblocking(False)
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_API_KEY", secrets["key"])
        monkeypatch.setenv("HF_TOKEN", secrets["hub"])
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setattr(sys, "argv", ["train.py", "a.yaml", f"data.shards=pipe:curl -u {secrets['line']}"])
        trainer = {"wandb": "mine", "log_every": 1, "val_every": 4, "max_steps": 6}
        data = {"shards": shards, "val_shards": "stream", "batch_size": test_train.BATCH}
        config = test_train.settings(tmp_path, trainer=trainer, data=data)
        with pytest.raises(SystemExit):
            training.train(config, data=test_train.Data(signal_at={3: signal.SIGTERM}))
        run = training.train(config, data=test_train.Data())
        with pytest.raises(BlockingIOError):
            proxy.accept()
    name = (run / "wandb" / "id.txt").read_text().strip()
    folders = sorted(p for p in (run / "wandb").iterdir() if p.is_dir() and not p.is_symlink())
    # one run, in two parts, whose folders the client numbers where both began in one second
    assert len(folders) == 2 and all(re.search(rf"-{name}(-\d+)?$", p.name) for p in folders)
    logs = [next(p.glob("run-*.wandb")).read_bytes() for p in folders]
    assert all(b"train/loss" in log and b"https://***@host/x-" in log for log in logs)
    assert b"val/psnr_db_4" in logs[1] and b"val/psnr_db_4" not in logs[0]
    assert not any(b"train/mfu" in log for log in logs)  # not a number here
    for path in (p for p in (run / "wandb").rglob("*") if p.is_file()):
        found = [kind for kind, secret in secrets.items() if secret.encode() in path.read_bytes()]
        assert not found, f"{path} holds the secret of the {found}"
