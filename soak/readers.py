"""How each kind of input is read, by the code that users' commands call, and a fingerprint of what came out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtok
from soak.corpus import Corpus
from vtok import config as vtok_config
from vtok.coding.codec import decode_frames
from vtok.data.decode import iter_frames, probe
from vtok.data.sample import load_sample
from vtok.data.sources import BrokenSample, ShardReader, open_sources
from vtok.data.strict import DecodeError
from vtok.data.verify import verify
from vtok.data.view import View
from vtok.loading import identify, load_run
from vtok.training import strategy


class Refused(ValueError):
    """What a reader that goes on after damage says of it: problems, one line each."""


def read_video(path: Path) -> str:
    data = path.read_bytes()
    info = probe(data)
    digest = hashlib.sha256(f"{info.width}x{info.height}".encode())
    for frame, seconds in iter_frames(data):
        digest.update(np.ascontiguousarray(frame).data)
        digest.update(f"{seconds:.2f}".encode())  # containers count in ticks of their own
    return digest.hexdigest()


def read_config(path: Path) -> str:
    return json.dumps(vtok_config.flatten(vtok_config.load(path)), sort_keys=True, default=str)


def read_packing(folder: Path) -> str:
    """`vtok shards --verify`: what the checksums of index.json promise. Raises Refused with what it lists."""
    problems = verify(folder, progress=False)
    if problems:
        raise Refused("; ".join(problems))
    return _samples(folder)


def read_samples(folder: Path) -> str:
    """What training reads. Raises Refused where samples are broken, as its quarantine would list them."""
    return _samples(folder)


def _samples(folder: Path) -> str:
    view = View(num_frames=4, size=(16, 16), fps=8.0, crop="center")
    (shards,) = open_sources(str(folder / "train"))
    reader = ShardReader(shards)
    digest, broken = hashlib.sha256(), []
    for number in range(len(shards)):
        for sample in reader.samples(number):
            if sample.problem is not None:
                broken.append(f"{sample.key}: {sample.problem}")
                continue
            try:
                item = load_sample(reader, sample, view, rng=None, key=sample.key)
            except (BrokenSample, DecodeError, OSError) as error:
                broken.append(f"{sample.key}: {error}")
                continue
            assert item.video is not None
            digest.update(f"{item.key} {item.text} {item.qa}".encode())
            digest.update(item.video.contiguous().numpy().data)
    if broken:
        raise Refused("; ".join(broken))
    return digest.hexdigest()


def read_vtok(path: Path, *, export: Path) -> str:
    digest = hashlib.sha256()
    for frame in decode_frames(_model(str(export)), path):
        digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _model(export: str) -> Any:
    return vtok.load(export)


def read_export(folder: Path) -> str:
    model = vtok.load(str(folder))
    who = identify(model)
    coder = None if who.entropy is None else who.entropy.sha256.hex()
    return json.dumps([who.model_id, who.weights_sha256.hex(), coder, vtok_config.to_dict(model.config)])


def read_run(folder: Path) -> str:
    """What `vtok train` goes on from, and what `vtok export` takes."""
    last = folder / "checkpoints" / "last.ckpt"
    about = strategy.describe(last)
    whole = strategy.AtomicCheckpointIO().load_checkpoint(last)
    model, config = load_run(folder, which="last")
    shipped = {name: _value(value) for name, value in model.state_dict().items()}
    return json.dumps([about["step"], _value(whole), shipped, vtok_config.flatten(config)], default=str)


def _value(value: Any) -> Any:
    """Plain values; tensors as hashes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, dict):
        return {str(key): _value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_value(each) for each in value]
    return repr(value)


def readers(corpus: Corpus) -> dict[str, Callable[[Path], str]]:
    """By the kind of a case. Each gives a fingerprint, or raises."""
    return {
        "video": read_video,
        "shards, verified": read_packing,
        "shards, in training": read_samples,
        "config": read_config,
        "vtok": lambda path: read_vtok(path, export=corpus.export),
        "export": read_export,
        "checkpoint": read_run,
    }
