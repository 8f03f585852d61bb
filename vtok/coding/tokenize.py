"""`vtok tokenize`: shards of video into shards of token ids, what autoregressive models train on.

Whole videos, at the frame rate, size and centre crop of validation, as `vtok.coding.token_coding` does; in many
processes and resumed after any kill, as `vtok.data.shard_work` does. What the result depends on stands in
`tokenizing.json`. The formats are those of `vtok.data.token_reader`; the model's identity goes with the ids.

Letters: B clips, T frames, H height, W width, K tokens, Q ids a token, G groups.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from vtok.coding.token_coding import Encoder, Settings, TokenSample
from vtok.config import DataConfig, from_dict
from vtok.config import load as load_config
from vtok.data import shard_work
from vtok.data.pack import write_atomically
from vtok.data.shard_work import Job, Ledger, TarWriter
from vtok.data.sources import ShardReader
from vtok.data.token_reader import IDS, KIND, TokenizerIdentity
from vtok.data.workers import Notify
from vtok.loading import export_folder, identify, is_run, load_any, read_training

COUNTS = ("samples", "frames", "tokens")


@dataclass(frozen=True)
class Summary:
    """What stands in the output folder, and how fast this call was. outstanding: shards of other parts."""

    samples: int
    frames: int
    tokens: int
    shards: int
    outstanding: int
    rejected: list[dict[str, Any]]
    seconds: float
    done_now: dict[str, int]  # samples, frames, tokens that this call encoded


def tokenize(
    shards: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    fps: float | None | str = "model",
    size: tuple[int, int] | None = None,
    clip_frames: int | None = None,
    budget: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "cpu",
    part: tuple[int, int] = (0, 1),
    max_bad_fraction: float | None = None,
    cache_dir: str = "",
    progress: bool = True,
) -> Summary:
    """Token shards of video shards, resuming what an earlier call left in `out`.

    Args:
        shards: a folder with index.json, a whole packing (train/, val/ ...), or what `data.shards` may be.
        model: export folder, Hub repository or run directory of a discrete tokenizer.
        fps: "model": as it was trained; None: the source's own. size: (height, width); None: as it was trained.
        clip_frames: cut videos into samples of so many frames, each encoded on its own; None: whole videos.
        budget: tokens kept of each group; None: all.
        batch_size: clips of the model's length encoded at once; None: the training's data.val_batch_size.
        workers: processes; None: one a core, on CUDA one a device; 0: this process. More than there are devices share.
        device: cpu, cuda (every device) or cuda:N.
        part: (i, n): every n-th shard from the i-th on.
        max_bad_fraction: share of the samples that may be rejected; None: the training's data.max_bad_fraction.
    Raises: ValueError for bad settings or inputs, a model without codebooks, an `out` that holds something else, or
        too many rejected samples.
    """
    began, out = time.monotonic(), Path(out)
    shard_work.check_part(part)
    loaded = load_any(model)
    trained = trained_data(model)
    settings = Settings(
        fps=trained.fps if isinstance(fps, str) else fps,
        size=size or (trained.size[0], trained.size[1]),
        crop="none" if trained.crop == "none" else "center",
        clip_frames=clip_frames,
        budget=budget,
        batch_size=trained.val_batch_size if batch_size is None else batch_size,
        map=trained.map,
    )
    Encoder(loaded, settings)  # bad settings fail before any work
    who = identity_of(loaded)
    jobs = shard_work.plan(str(shards), cache_dir=cache_dir)
    limit = trained.max_bad_fraction if max_bad_fraction is None else max_bad_fraction
    if not 0 <= limit <= 1:
        raise ValueError(f"max_bad_fraction={limit} is a share of the samples, 0 to 1")
    devices = shard_work.devices_of(device)
    if workers is None:
        workers = shard_work.default_workers(device, devices)
    for cached in (_encoder, shard_work.health):  # of an earlier call in this process
        cached.cache_clear()
    kept = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    ledger = Ledger(out, jobs, claim="tokenizing.json", counts=COUNTS, made="tokens")
    ledger.claim(
        {"tokenizer": who.model_id, **kept},
        {"batch_size": settings.batch_size, "torch": torch.__version__, "av": av.__version__},
    )
    now = ledger.run(
        write_shard,
        lambda job: (job, out, str(model), who.model_id, settings, devices, limit),
        part=part,
        workers=workers,
        title="tokenizing clips",
        progress=progress,
    )

    def index(rows: list[dict[str, Any]]) -> dict[str, Any]:
        columns = (*COUNTS, "name", "longest", "bytes", "sha256")
        shards = [{key: row[key] for key in columns} for row in rows]
        return {"kind": KIND, "dtype": who.dtype, "tokenizer": asdict(who), "settings": kept, "shards": shards}

    done = ledger.finish(index, limit=limit)
    return Summary(
        **done.totals,
        shards=done.shards,
        outstanding=done.outstanding,
        rejected=done.rejected,
        seconds=time.monotonic() - began,
        done_now=now,
    )


def trained_data(model: str | Path) -> DataConfig:
    """The `data:` node a model was trained with. Raises ValueError where the export has no training.yaml."""
    if is_run(Path(model)):
        return load_config(Path(model) / "config.yaml").data
    folder = export_folder(model)
    values, path = read_training(folder), folder / "training.yaml"
    if not values:
        raise ValueError(f"{path} is missing: which frames, size and crop the model was trained on is not known")
    return from_dict(DataConfig, values.get("data") or {}, where=f"{path}: data", trusted=False)


def identity_of(model: Any) -> TokenizerIdentity:
    """What token shards say of the tokenizer that made them."""
    sizes = tuple(int(n) for n in model.codebook_sizes)
    factors = getattr(model, "index_factors", ()) or tuple((size,) for size in sizes)
    who = identify(model)
    return TokenizerIdentity(who.model_id, who.weights_sha256.hex(), sizes, tuple(tuple(each) for each in factors))


@lru_cache(maxsize=1)
def _encoder(model: str, model_id: str, settings: Settings, device: str) -> Encoder:
    """This process's encoder: the model is read once, not once a shard."""
    loaded = load_any(model)
    if identify(loaded).model_id != model_id:
        raise ValueError(
            f"{model} changed: it was {model_id} when tokenizing began, and is {identify(loaded).model_id}"
        )
    return Encoder(loaded.to(device), settings)


def write_shard(
    job: Job,
    out: Path,
    model: str,
    model_id: str,
    settings: Settings,
    devices: list[str],
    limit: float,
    lost: dict[str, str],
    notify: Notify,
) -> dict[str, Any]:
    """Tokenize one shard; returns its record.

    Args:
        lost: {key: reason} of samples not to touch again. notify: called with each sample's key before it is touched.
    Raises: ValueError past the share of broken samples. OSError where the shard cannot be read or written.
    """
    number = (multiprocessing.current_process()._identity or (0,))[0]  # 1, 2 ... in worker processes
    encoder = _encoder(model, model_id, settings, devices[number % len(devices)])
    reader = ShardReader([job.shard()], cache_dir=job.cache_dir, media=encoder.view.media)
    counts = dict.fromkeys(COUNTS, 0) | {"longest": 0}

    def add(tar: TarWriter, _: str, result: list[TokenSample]) -> None:
        for sample in result:
            tar.add(f"{sample.key}.{IDS}", npy(sample.ids, encoder.dtype))
            facts = {**sample.facts, "tokens": sample.tokens._asdict()}
            tar.add(f"{sample.key}.json", (json.dumps(facts) + "\n").encode())
            for name, more in (("samples", 1), ("frames", sample.tokens.frames), ("tokens", len(sample.ids))):
                counts[name] += more
            counts["longest"] = max(counts["longest"], len(sample.ids))

    results = encoder.shard(reader, 0, lost=lost, notify=notify)
    written = shard_work.write_results(job, out, results, add, command="vtok tokenize", limit=limit)
    record = {"name": job.name, **counts, **written}
    write_atomically(job.record(out), record)
    return record


def npy(ids: np.ndarray, dtype: str) -> bytes:
    """A .npy file of ids [K, Q]; [K] where there is one id a token."""
    file = io.BytesIO()
    np.save(file, (ids[:, 0] if ids.shape[1] == 1 else ids).astype(dtype), allow_pickle=False)
    return file.getvalue()


def main(argv: list[str]) -> int:
    """`vtok tokenize SHARDS --model EXPORT --out DIR`."""
    parser = argparse.ArgumentParser(prog="vtok tokenize", description="Shards of token ids for autoregressive models.")
    add = parser.add_argument
    add("shards", help="folder of `vtok shards` (one split, or all), or what data.shards may be")
    add("--model", required=True, help="export folder, Hub repository or run directory of a discrete tokenizer")
    add("--out", required=True, type=Path, metavar="DIR", help="where token shards go; run again to resume or to check")
    add("--fps", help="frames per second, or `source` (default: as the model was trained)")
    add("--size", help="HxW (default: as the model was trained)")
    add("--clip-frames", help="cut into samples of N frames, or `model` (default: whole videos)")
    add("--budget", type=int, metavar="K", help="keep the first K tokens of each group (default: all)")
    add("--batch-size", type=int, help="clips of the model's length at once (default: data.val_batch_size)")
    shard_work.add_arguments(parser, bad_fraction="the training's")
    args = parser.parse_args(argv)
    done = tokenize(
        args.shards,
        args.out,
        model=args.model,
        fps="model" if args.fps is None else shard_work.parse_rate(args.fps),
        size=None if args.size is None else shard_work.parse_size(args.size),
        clip_frames=_clip_frames(args.clip_frames, args.model),
        budget=args.budget,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        part=shard_work.parse_part(args.part),
        max_bad_fraction=args.max_bad_fraction,
        cache_dir=args.cache_dir,
        progress=not args.quiet,
    )
    print(f"{args.out}: {done.samples} clips, {done.frames} frames, {done.tokens} tokens in {done.shards} shards")
    speed = ", ".join(
        f"{done.done_now.get(name, 0) / done.seconds:.1f} {word}/s"
        for name, word in zip(COUNTS, ("clips", *COUNTS[1:]))
    )
    print(f"  {done.done_now.get('samples', 0)} clips now, in {done.seconds:.1f} s: {speed}")
    shard_work.print_rest(args.out, done.rejected, done.outstanding)
    return 0


def _clip_frames(text: str | None, model: str) -> int | None:
    if text is None:
        return None
    if text == "model":
        return trained_data(model).num_frames
    if not text.isdecimal():
        raise ValueError(f"--clip-frames {text!r} is not a number of frames, nor `model`")
    return int(text)
