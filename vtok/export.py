"""What ships: a run's model as one folder that loads anywhere.

run directory --load_run--> Model --> config.json, model.safetensors, entropy.safetensors (static model of .vtok files),
                                      training.yaml, README.md (model card), modeling_vtok.py
folder --vtok.load--> Model           vtok's own code
folder --AutoModel--> VtokModel       the folder's modeling_vtok.py, where vtok is not installed
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import vtok
from vtok.bundle import bundle
from vtok.card import describe, model_card
from vtok.codec import main_decode, main_encode
from vtok.config import RunConfig, load_family, to_dict, to_yaml
from vtok.data.order import one_pass, seeded
from vtok.data.sample import collate, load_sample
from vtok.data.sources import BrokenSample, ShardReader, every_shard
from vtok.data.strict import DecodeError
from vtok.data.view import view_of
from vtok.entropy import StaticModel, factors_of
from vtok.loading import (
    CODE,
    ENTROPY,
    FORMAT,
    PREFIX,
    WEIGHTS,
    ExportError,
    identify,
    load,
    load_any,
    load_run,
    read_config,
)
from vtok.types import Clip, Tokens

__all__ = [
    "ExportError",
    "export",
    "fit_entropy",
    "load",
    "load_any",
    "load_run",
    "main_decode",
    "main_encode",
    "main_export",
    "main_info",
    "modeling_source",
    "publish",
    "push",
    "read_config",
    "training_clips",
    "write_export",
]

log = logging.getLogger(__name__)


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    which: str = "best",
    ema: bool = True,
    entropy: bool = True,
    entropy_clips: int = 512,
    licence: str = "apache-2.0",
) -> Path:
    """Write a run's model as one folder that loads anywhere; it appears under `out` once it is complete.

    Args:
        which, ema: as `load_run`.
        entropy: fit the static entropy model of `.vtok` files on `entropy_clips` training clips (where the run's shards
            are at hand; without them it is left out and the card says so).
        licence: Hub identifier of the weights' licence, for the model card.
    Raises: ExportError where `out` is something else, or the family cannot be written as one file.
    """
    model, config = load_run(run_dir, which=which, ema=ema)
    return publish(
        model, config, out, run_dir=Path(run_dir), entropy=entropy, entropy_clips=entropy_clips, licence=licence
    )


def publish(
    model: nn.Module,
    config: RunConfig,
    out: str | Path,
    *,
    run_dir: Path | None = None,
    entropy: bool = True,
    entropy_clips: int = 512,
    licence: str = "apache-2.0",
) -> Path:
    """`export` of a model at hand. config: that of the run it comes from, with the model's own under `model`."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_export(out))):
        raise ExportError(f"--out {out} exists and is not an export; choose another folder, or remove it")
    static, why_not = None, "it was not asked for"
    if entropy and getattr(model, "codebook_sizes", ()):
        try:
            static = fit_entropy(model, training_clips(config, limit=entropy_clips))
        except (ValueError, OSError) as error:
            why_not = f"it could not be fitted ({error})"
            log.warning("no static entropy model in the export: %s", why_not)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_export(model, config, part, entropy=static, run_dir=run_dir, licence=licence, no_entropy=why_not)
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def write_export(
    model: nn.Module,
    config: RunConfig,
    folder: Path,
    *,
    entropy: StaticModel | None = None,
    run_dir: Path | None = None,
    licence: str = "apache-2.0",
    no_entropy: str = "",
) -> None:
    """The files of an export of `model`, into an empty folder."""
    who = identify(model)
    module = load_family(config.model.name)
    (folder / CODE).write_text(modeling_source(module, who.model_id), encoding="utf-8")
    # Copies: safetensors refuses tensors that share memory.
    state = {PREFIX + k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if entropy is not None:
        save_file(entropy.tensors(), folder / ENTROPY, metadata={"format": "pt"})
    facts = {
        "architectures": ["VtokModel"],
        "auto_map": {"AutoConfig": "modeling_vtok.VtokConfig", "AutoModel": "modeling_vtok.VtokModel"},
        "dtype": "float32",
        "entropy_sha256": entropy.sha256.hex() if entropy is not None else None,
        "family": config.model.name,
        "format": FORMAT,
        "model": to_dict(config.model),
        "model_id": who.model_id,
        "model_type": "vtok",
        "vtok_version": vtok.__version__,
        "weights_sha256": who.weights_sha256.hex(),
    }
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "training.yaml").write_text(to_yaml(config), encoding="utf-8")
    card = model_card(model, config, facts, run_dir=run_dir, licence=licence, no_entropy=no_entropy)
    (folder / "README.md").write_text(card, encoding="utf-8")


def modeling_source(module: ModuleType, name: str) -> str:
    """The text of modeling_vtok.py: a family's Config and Model with all they use, and transformers' face of them.

    Raises: vtok.bundle.BundleError for a family that needs more than torch, einops and transformers.
    """
    code = bundle([(module.__name__, ("Config", "Model")), ("vtok.hf", ("VtokConfig", "CompressorModel"))])
    return (
        f'"""{name}: generated by `vtok export` (vtok {vtok.__version__}). Apache-2.0. Needs torch, einops, '
        "transformers.\n\n"
        'AutoModel.from_pretrained(folder, trust_remote_code=True) runs this file; vtok.load(folder) does not.\n"""\n\n'
        f"from __future__ import annotations\n\n{code}\n\n"
        "class VtokModel(CompressorModel):\n    make_config, make_model = Config, Model\n"
    )


def fit_entropy(model: Any, clips: Iterable[Clip]) -> StaticModel:
    """The static entropy model of a tokenizer's ids over some clips, with a table for each rank as far as they fit.

    Raises: ValueError where one table of the ids would be too large: the family should give `index_factors`.
    """
    factors = factors_of(model)
    ranks = StaticModel.affordable_ranks(factors, model.max_tokens)
    if not ranks:
        raise ValueError(f"ids of codebooks {model.codebook_sizes} have no index_factors: their histogram is too large")

    def tokens() -> Iterator[Tokens]:
        device = next(iter(model.parameters())).device
        with torch.inference_mode():
            for clip in clips:
                yield model.encode(clip.to(device).as_float())

    return StaticModel.fit(tokens(), index_factors=factors, max_rank=ranks)


def training_clips(config: RunConfig, *, limit: int) -> Iterator[Clip]:
    """Up to `limit` clips of the run's training shards, in batches, seen as in training; broken samples left out.

    Raises: ValueError where there are no shards, or no clip in them.
    """
    data = config.data
    view = view_of(data)
    shards = every_shard(data.shards, root=data.root, cache_dir=data.cache_dir)
    reader = ShardReader(shards, cache_dir=data.cache_dir, media=view.media)
    samples = one_pass(reader, seed=data.seed, epoch=0, stream=0, streams=1, shuffle_buffer=data.shuffle_buffer)

    def items() -> Iterator[Any]:
        for sample in samples:
            if sample.problem:
                continue
            try:
                yield load_sample(reader, sample, view, rng=seeded("entropy", sample.key), key=sample.key)
            except (DecodeError, BrokenSample, OSError) as error:
                log.info("left out of the entropy model: %s: %s", sample.key, error)

    chosen, found = itertools.islice(items(), limit), False
    while batch := list(itertools.islice(chosen, data.val_batch_size)):
        found = True
        yield collate(batch)
    if not found:
        raise ValueError(f"data.shards={data.shards!r} holds no usable clip")


def _is_export(folder: Path) -> bool:
    try:
        return bool(read_config(folder))
    except ExportError:
        return False


def push(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload an export to the Hub repository `user/name` (made where it is missing); returns its address.

    The token is huggingface_hub's own (HF_TOKEN, or `hf auth login`). Raises: ExportError when the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    facts = read_config(Path(folder))
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True, private=private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"vtok export of {facts['model_id']}")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ExportError(f"--push {repo}: the Hub refused: {error}") from error
    return str(url)


def main_export(argv: list[str]) -> None:
    """`vtok export RUN --out DIR [--push USER/REPO]`."""
    parser = argparse.ArgumentParser(prog="vtok export", description="One folder that loads anywhere.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--out", required=True, help="folder to write; an earlier export there is replaced")
    parser.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint (default: best)")
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average")
    parser.add_argument("--no-entropy", action="store_true", help="no static entropy model")
    parser.add_argument("--entropy-clips", type=int, default=512, help="training clips it is fitted on (default: 512)")
    parser.add_argument("--license", default="apache-2.0", help="Hub identifier of the weights' licence")
    parser.add_argument("--push", metavar="USER/REPO", help="upload to the Hub as well")
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    args = parser.parse_args(argv)
    out = export(
        args.run,
        args.out,
        which=args.which,
        ema=not args.no_ema,
        entropy=not args.no_entropy,
        entropy_clips=args.entropy_clips,
        licence=args.license,
    )
    facts = read_config(out)
    print(f"{out}: {facts['model_id']}, {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.1f} MB")
    if args.push:
        print(f"pushed to {push(out, args.push, private=args.private)}")


def main_info(argv: list[str]) -> None:
    """`vtok info RUN | EXPORT | CONFIG | FILE.vtok`."""
    parser = argparse.ArgumentParser(prog="vtok info", description="What a run, export, config or .vtok file holds.")
    parser.add_argument("path")
    print(describe(parser.parse_args(argv).path))
