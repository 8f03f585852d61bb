"""What only the sound tells is learned: packed with `vtok shards --audio`, trained, measured, recorded and exported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from packing import packed, write_manifest
from test_audio import write_audio_tower
from test_llm import small_model, small_tokenizer
from waiting import PATIENCE_S

import vtok
from vtok import features as recording
from vtok.config import loads
from vtok.evaluate import main as evaluate
from vtok.export import main_export
from vtok.train import train
from vtok.training import strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from tiny_tower import write_tower

torch.set_num_threads(1)
FPS, RATE, TONES = 8, 16000, {"red": 300.0, "blue": 2000.0}  # Hz


def film(path: Path, hertz: float, noise: np.random.Generator) -> Path:
    """A second of the same grey in every film, and a tone."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=RATE, layout="mono")
        for _ in range(FPS):
            picture = noise.integers(90, 110, (48, 64, 3)).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
        at = np.arange(RATE) / RATE + noise.random()
        frame = av.AudioFrame.from_ndarray(
            (0.4 * np.sin(2 * np.pi * hertz * at)).astype(np.float32)[None], "fltp", "mono"
        )
        frame.sample_rate, frame.pts = RATE, 0
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


def corpus(root: Path, *, clips: int) -> Path:
    noise, rows = np.random.default_rng(0), []
    (root / "films").mkdir()
    for i in range(clips):
        answer, hertz = list(TONES.items())[i % 2]
        path = film(root / "films" / f"{i}.mp4", hertz * noise.uniform(0.9, 1.1), noise)
        asked = dict(id=f"q{i}", type="sound", question="What colour is the circle?", answer=answer, choices=[*TONES])
        rows.append({"path": str(path), "qa": [asked], "split": "val" if i >= 0.75 * clips else "train"})
    packed([write_manifest(root / "films.jsonl", rows)], root / "shards", audio=True)
    return root / "shards"


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sounds")
    corpus(root, clips=32)
    torch.manual_seed(3)
    tokenizer = small_tokenizer("llama")
    small_model("llama", len(tokenizer)).save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    write_tower(root / "tower", size=16, width=16, depth=2)
    write_audio_tower(root / "ears", "whisper", init_std=0.3)  # or all it says is its positions
    return root


def settings(lab: Path, name: str, shards: Path, *, steps: int, heard: bool = True) -> str:
    audio = f"audio: {{name: {lab / 'ears'}, tokens: 2}}," if heard else ""
    return f"""
name: {name}
out: {lab / "runs"}
model: {{name: temporal, tower: {{name: {lab / "tower"}}}, max_tokens: 8, window: 4, segments: {{most: 1}}, {audio}
        static: {{keep: pool, tokens: 1}}, former: {{num_queries: 1, width: 16, depth: 1, num_heads: 2}}}}
objective: {{llm: {{name: {lab / "llm"}}}, max_answer: 24, tasks: {{caption: 0, qa: 1}}}}
data: {{shards: {shards / "train"}, val_shards: {shards / "val"}, num_frames: 4, fps: 8.0, crop: center,
       size: [17, 17], batch_size: 8, val_batch_size: 4, num_workers: 0}}
optim: {{lr: 2.0e-2, warmup_steps: 5, schedule: constant}}
trainer: {{max_steps: {steps}, devices: 1, accelerator: cpu, log_every: 1, val_every: {steps},
          progress: false, tensorboard: false}}
eval: {{budgets: [4, 8]}}
"""


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def right(out: Path) -> dict[int | None, float]:
    rows = json.loads((out / "eval.json").read_text())["rows"]
    return {row["budget"]: row["accuracy"] for row in rows if row["method"] == "temporal"}


@pytest.mark.long
def test_what_only_the_sound_tells_is_learned_measured_and_exported(lab, capsys, monkeypatch):
    """20 steps gave 100 % of held-out clips with 8 tokens; a model without ears stays at chance, one half."""
    shards, out = lab / "shards", lab / "export"
    run = train(loads(settings(lab, "hears", shards, steps=24)))
    written = loads((run / "config.yaml").read_text()).model
    assert (written.audio.in_dim, written.in_dim) == (16, 16)
    kept = strategy.consolidate(run / "checkpoints" / "last.ckpt")
    assert not [name for name in kept if "ears" in name or "tower" in name] and "model.audio.weight" in kept
    assert [line for line in lines(run) if "val/accuracy_8" in line][-1]["val/sound_accuracy_8"] >= 0.9
    deaf = train(loads(settings(lab, "deaf", shards, steps=6, heard=False)))
    assert 0.3 <= [line for line in lines(deaf) if "val/accuracy_8" in line][-1]["val/accuracy_8"] <= 0.7
    main_export([str(run), "--out", str(out), "--which", "last"])
    how = ["--budgets", "4,8", "--device", "cpu", "--no-progress"]
    evaluate([str(out), "--shards", str(shards / "val"), "--out", str(lab / "from_pixels"), *how])
    found = right(lab / "from_pixels")
    assert found[8] >= 0.9

    # the same from a cache of both towers, in one pass
    options = ["--tower", str(lab / "tower"), "--dtype", "float32", "--audio-tower", str(lab / "ears"), "--fps", "8"]
    recording.main([str(shards), *options, "--size", "17x17", "--workers", "0", "--out", str(lab / "cache"), "--quiet"])
    evaluate([str(out), "--shards", str(lab / "cache" / "val"), "--out", str(lab / "from_cache"), *how])
    assert right(lab / "from_cache") == found
    again = train(loads(settings(lab, "cached", lab / "cache", steps=6)))
    seen, cached = ([line["train/loss"] for line in lines(each) if "train/loss" in line][:6] for each in (run, again))
    assert cached == pytest.approx(seen, rel=1e-3) and len(set(seen)) == 6

    # the export holds neither tower: both are loaded by name, and the card says so
    text = (out / "README.md").read_text()
    assert "| audio tower | `ears`, a folder of the exporter's |" in text and "2 tokens a frame" in text
    assert not [name for name in vtok.load(str(out)).state_dict() if "ears" in name]
    blocks = [each for each in re.findall(r"```python\n(.*?)```", text, re.S) if "PATH_OR_REPO" in each]
    assert len(blocks) == 1, "patches alone are not enough"
    script = blocks[0].replace("PATH_OR_REPO", repr(str(out))) + "\nassert tokens.embeddings.shape[2] == 32\n"
    home = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **home}
    )
    assert done.returncode == 0, f"{script}\n{done.stderr[-3000:]}"
