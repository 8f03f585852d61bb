"""From a folder, a Hub repository or a run directory back to a model; nothing in a folder is run or unpickled.

export folder, Hub repository --load--> Model, its identity as `.shipped`
run directory --load_run--> Model, RunConfig
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtok.coding.entropy import StaticModel
from vtok.coding.prior_coding import PriorModel
from vtok.config import RunConfig, from_dict, load_family, read_plain, to_dict
from vtok.config import load as load_config
from vtok.layers.token_prior import TokenPriorConfig
from vtok.training import checkpoints

log = logging.getLogger(__name__)

FORMAT = 1  # of config.json
WEIGHTS, ENTROPY, CODE = "model.safetensors", "entropy.safetensors", "modeling_vtok.py"
PRIOR, PRIOR_CONFIG = "prior.safetensors", "prior.json"
ADAPTERS = "adapters.safetensors"  # of the language model that reads a projector's tokens, where they learned
PREFIX = "model."  # of the names in model.safetensors: the module's name inside transformers' wrapper
MAX_CONFIG = 1 << 20  # bytes of a config.json


class ExportError(ValueError):
    """A folder or repository that is not a usable export, or a run that cannot become one."""


@dataclass(frozen=True)
class Identity:
    """What a .vtok file says about the model that made it.

    model_id: `<family>-<12 hex digits>` of the configuration and the weights. weights_sha256: 32 bytes.
    entropy, prior: the static entropy model and the autoregressive prior that ship with it, or None. adapters: the
    sha256 of those that the language model has learned to read its tokens with, hex, or "".
    """

    model_id: str
    weights_sha256: bytes
    entropy: StaticModel | None = None
    prior: PriorModel | None = None
    adapters: str = ""

    def coder(self, coding: str) -> StaticModel | PriorModel | None:
        """What a `.vtok` file of this coding needs beside the codebooks; None where there is none of it."""
        return self.entropy if coding == "static" else self.prior if coding == "ar" else None


def weights_sha256(state: dict[str, Tensor]) -> bytes:
    """32 bytes that name a set of weights, whatever file holds them.

    sha256 over the tensors in the order of their names: name, dtype, shape (each as text ending in a newline), bytes.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{str(tensor.dtype).removeprefix('torch.')}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def model_id(family: str, config: dict[str, Any], sha256: bytes) -> str:
    """`<family>-<hash>` of a configuration (plain values) and the sha256 of its weights."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return f"{family.rpartition('.')[2]}-{hashlib.sha256(text.encode() + sha256).hexdigest()[:12]}"


def identify(model: nn.Module) -> Identity:
    """The identity of a model as its weights are now: the export's own where it was loaded from one and not changed."""
    sha256 = weights_sha256(model.state_dict())
    shipped = getattr(model, "shipped", None)
    if isinstance(shipped, Identity) and shipped.weights_sha256 == sha256:
        return shipped
    config: Any = model.config
    return Identity(model_id(config.name, to_dict(config), sha256), sha256)


def prior_of(model: nn.Module) -> PriorModel | None:
    """The prior that ships with a model, as long as its weights are those it was trained on."""
    return identify(model).prior if isinstance(getattr(model, "shipped", None), Identity) else None


def load(path_or_repo: str | Path, *, revision: str | None = None, family: str | None = None) -> Any:
    """The compressor in an export folder or Hub repository, in eval mode, with its identity as `.shipped`.

    Runs no code from the folder and unpickles nothing: the model class is this vtok's own.

    Args:
        path_or_repo: a folder made by `vtok export`, or a Hub repository `user/name`.
        revision: branch, tag or commit of the repository.
        family: dotted module of an out-of-tree family that you trust; the folder's own word is not taken for it.
    Raises: ExportError for a missing, foreign, damaged or newer export; ValueError from the configuration's checks.
    """
    folder = export_folder(path_or_repo, revision=revision)
    facts = read_config(folder)
    module = load_family(family) if family else load_family(str(facts["family"]), trusted=False)
    where = f"{folder / 'config.json'}: model"
    config = from_dict(module.Config, facts["model"], where=where, trusted=False)
    state = _read_tensors(folder / WEIGHTS)
    wrong = sorted(name for name in state if not name.startswith(PREFIX))
    if wrong:
        raise ExportError(f"{folder / WEIGHTS} holds {wrong[:3]}, names that vtok does not write: is it an export?")
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    sha256 = weights_sha256(state)
    stated = str(facts["weights_sha256"])
    if sha256.hex() != stated:
        raise ExportError(
            f"{folder / WEIGHTS}: the weights are not those that config.json was written for (sha256 "
            f"{sha256.hex()[:16]}..., stated {stated[:16]}...): the files are damaged or mixed up; export or "
            "download again"
        )
    found = model_id(facts["family"], facts["model"], sha256)
    if found != facts["model_id"]:
        raise ExportError(
            f"{folder / 'config.json'}: the weights are as stated, family and model are not (they make model_id "
            f"{found}, stated {facts['model_id']}): it was edited, or the files are damaged or mixed up; export or "
            "download again"
        )
    model = module.Model(config)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ExportError(f"{folder / WEIGHTS} does not fit this vtok's {facts['family']}: {error}") from error
    entropy = None
    if (folder / ENTROPY).is_file():
        entropy = StaticModel.from_tensors(_read_tensors(folder / ENTROPY))
        if entropy.sha256.hex() != facts.get("entropy_sha256"):
            raise ExportError(f"{folder / ENTROPY} is not the entropy model that config.json was written for")
    prior = load_prior(folder) if facts.get("prior_sha256") else None
    if prior is not None and prior.codebook_sizes != tuple(getattr(model, "codebook_sizes", ())):
        raise ExportError(f"{folder / PRIOR} is for codebooks {prior.codebook_sizes}, which this model does not have")
    model.shipped = Identity(str(facts["model_id"]), sha256, entropy, prior, str(facts.get("adapters_sha256") or ""))
    return model.eval()


def load_prior(folder: Path) -> PriorModel:
    """The prior of an export that `vtok prior` trained. Raises: ExportError for a missing, damaged or another one."""
    facts = read_prior_facts(folder)
    try:
        config = TokenPriorConfig(**facts["config"])
        prior = PriorModel(config, _read_tensors(folder / PRIOR))
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / PRIOR} does not fit {PRIOR_CONFIG}: {error}") from error
    if prior.sha256.hex() != read_config(folder).get("prior_sha256"):
        raise ExportError(f"{folder / PRIOR} is not the prior that config.json was written for")
    return prior


def read_prior_facts(folder: Path) -> dict[str, Any]:
    """prior.json of an export: config, and what is known of the prior (layout, measured). Raises: ExportError."""
    path = folder / PRIOR_CONFIG
    if not path.is_file() or path.stat().st_size > MAX_CONFIG:
        raise ExportError(f"{path} is missing, or larger than any prior.json: the export is incomplete")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not json: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        raise ExportError(f"{path} holds no prior's configuration; train one again with `vtok prior`")
    return facts


def in_tiles(model: Any, tile: int, *, overlap: int | None = None) -> Any:
    """`model`, which from now on codes frames larger than `tile` latents a side tile by tile (`vtok.layers.tiling`):
    memory of one tile, whatever the frame. It stays the model that it is: its files name it as before, and files and
    tokens made in tiles are decoded with or without.

    overlap: latents that neighbouring tiles share and blend; None: the model's own, half a tile at most.
    Raises: ValueError for a model that knows whole frames only, or an overlap above half a tile.
    """
    if not hasattr(model.config, "tile"):
        raise ValueError(
            f"tiles of {tile} latents: {model.config.name} models code whole frames, `discrete` ones tiles"
        )
    if tile < 1:
        raise ValueError(f"tiles of {tile} latents: a tile has 1 or more a side")
    model.shipped = identify(model)
    shared = min(model.config.tile_overlap, tile // 2) if overlap is None else overlap
    model.config = replace(model.config, tile=tile, tile_overlap=shared)
    return model


def load_any(path: str | Path, *, revision: str | None = None) -> Any:
    """A model in eval mode from an export, a Hub repository, or a run directory (its best checkpoint)."""
    if is_run(Path(path)):
        return load_run(path)[0]
    return load(path, revision=revision)


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def load_run(run_dir: str | Path, *, which: str | int = "best", ema: bool = True) -> tuple[Any, RunConfig]:
    """A run's model in eval mode, and its configuration.

    Args:
        which: checkpoint: "best" (the last one where no best was kept), "last", "previous" or a step.
        ema: take the averaged weights where the run kept them.
    Raises: ExportError for a directory without a run or a checkpoint, or a checkpoint that does not fit config.yaml.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ExportError(f"{run_dir} is not a run directory: it has no config.yaml")
    config, path = load_config(run_dir / "config.yaml"), _checkpoint_of(run_dir, which)
    model = load_family(config.model.name).Model(config.model)
    try:
        model.load_state_dict(_checkpoint_weights(path, ema=ema), strict=True)
    except RuntimeError as error:
        raise ExportError(f"{path} does not fit {run_dir / 'config.yaml'}: {error}") from error
    return model.eval(), config


def load_adapters(path: str | Path, *, which: str | int = "best") -> dict[str, Tensor]:
    """The adapters of the language model that learned with a run's projector, as its checkpoint or its export holds
    them: the weights of `vtok.llm.Adapters`. {} where the language model stayed as it was.

    which: checkpoint of a run, as `load_run`.
    Raises: ExportError where there should be adapters and are none, and for others than config.json states.
    """
    folder = Path(path)
    if is_run(folder):
        if not _learns_adapters(load_config(folder / "config.yaml").objective):
            return {}
        found = _checkpoint_of(folder, which)
        checkpoints.verify(found)
        prefix, state = "objective.adapters.", checkpoints.consolidate(found)
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not state:
            raise ExportError(f"{found} holds no adapters, but objective.lora.rank is above 0 in {folder}: train again")
        return state
    folder = export_folder(path)
    stated = read_config(folder).get("adapters_sha256")
    if not stated:
        if ((read_training(folder).get("objective") or {}).get("lora") or {}).get("rank"):
            raise ExportError(
                f"{folder}: the language model learned adapters (objective.lora) that are not here, and without them "
                "the tokens mean something else: export the run again"
            )
        return {}
    state = _read_tensors(folder / ADAPTERS)
    if weights_sha256(state).hex() != stated:
        raise ExportError(f"{folder / ADAPTERS} is not what config.json was written for: export or download again")
    return state


def _learns_adapters(objective: Any) -> bool:
    return bool(getattr(getattr(objective, "lora", None), "rank", 0))


def add_which(parser: argparse.ArgumentParser, *, default: str | None = "best") -> None:
    """The option --which of a command that reads a run. default: None tells it from one that was given."""
    told = f"which checkpoint: best, last, previous or a step (default: {default or 'best'})"
    parser.add_argument("--which", metavar="CHECKPOINT", default=default, help=told)


def _checkpoint_of(run_dir: Path, which: str | int) -> Path:
    """Of `vtok.training.checkpoints.find`. Raises: ExportError where there is none, naming those that are there."""
    try:
        return checkpoints.find(run_dir / "checkpoints", which)
    except checkpoints.CheckpointError as error:
        raise ExportError(str(error)) from error


def step_of(run_dir: str | Path, *, which: str | int = "best") -> int | None:
    """The step of a run's checkpoint; None where it does not tell."""
    return checkpoints.step_of(_checkpoint_of(Path(run_dir), which))


def _checkpoint_weights(path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The model's state dict, float32, without prefix, of a checkpoint whose bytes are those that were written."""
    try:
        checkpoints.verify(path)
        return checkpoints.model_weights(path, ema=ema)
    except (RuntimeError, KeyError, TypeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as error:
        raise ExportError(f"{path} is not a readable checkpoint: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config.json of an export: family, model, model_id, weights_sha256 and what else it holds."""
    path = folder / "config.json"
    if not path.is_file():
        raise ExportError(
            f"{folder} is not an export: it has no config.json; make one with `vtok export RUN --out DIR`"
        )
    if path.stat().st_size > MAX_CONFIG:
        raise ExportError(f"{path} has {path.stat().st_size} bytes, more than any export's config.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is not json: {error}") from error
    if not isinstance(facts, dict) or facts.get("model_type") != "vtok":
        kind = facts.get("model_type") if isinstance(facts, dict) else type(facts).__name__
        raise ExportError(f"{folder} is not a vtok export: its config.json is of type {kind!r}")
    version = facts.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ExportError(f"{path} has format {version!r}, this vtok reads 1 to {FORMAT}: install a newer vtok")
    kinds = {"family": str, "model": dict, "model_id": str, "weights_sha256": str}
    bad = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    if bad:
        raise ExportError(f"{path} lacks {', '.join(bad)}: it is damaged or was not written by `vtok export`")
    return facts


def read_training(folder: Path) -> dict[str, Any]:
    """training.yaml of an export as plain values, {} where there is none: what the model was trained with.

    It came from elsewhere. Shards that it names by a shell command (`pipe:`) are left out, with a warning, and so is
    the folder it would have copies written to. Raises: ValueError as `read_plain`.
    """
    path = folder / "training.yaml"
    if not path.is_file():
        return {}
    values = read_plain(path)
    data = values.get("data")
    if isinstance(data, dict):
        data.pop("cache_dir", None)
        for key in ("shards", "val_shards"):
            if "pipe:" in str(data.get(key) or ""):
                log.warning("%s: data.%s is a shell command, which is not run: name shards yourself", path, key)
                data.pop(key)
    return values


def export_folder(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """The folder of an export, fetched first where it is a Hub repository: `user/name`, or `user/name@revision`.

    What was fetched is kept (HF_HOME) and found again without a network, with HF_HUB_OFFLINE=1 without asking for one.
    Raises: ExportError.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    text = str(path_or_repo)
    found = re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+)(?:@([A-Za-z0-9_./-]+))?", text)
    if path.exists() or not found:
        raise ExportError(
            f"no export at {text!r}: give a folder made by `vtok export`, or a Hub repository user/name[@revision]"
        )
    repo, said = found[1], found[2]
    if said and revision and said != revision:
        raise ExportError(f"{text!r} names revision {said!r}, and revision={revision!r} was given: give one of them")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # no code is asked for: nothing of it would be run
        patterns = ["config.json", "*.safetensors", "prior.json", "README.md", "training.yaml"]
        return Path(snapshot_download(repo, revision=revision or said, allow_patterns=patterns))
    except hub_errors() as error:
        if is_offline_mode() and isinstance(error, LocalEntryNotFoundError):
            raise ExportError(
                f"{text!r} is no folder here, and it was not downloaded before HF_HUB_OFFLINE=1 was set: load it once "
                "without that, or copy the folder here"
            ) from None
        told = without_token(str(error))
        raise ExportError(f"{text!r} is no folder here and could not be had from the Hub: {told}") from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises for what it cannot do. The HTTP library under it, whose errors of the network pass
    through it, has changed from version to version: its error is a base of the client's own."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def without_token(text: str) -> str:
    """A message without the Hub's token: proxies have been seen to repeat what they were sent."""
    from huggingface_hub import get_token

    token = get_token()
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text.replace(token, "hf_***") if token else text)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ExportError(f"{path} is missing: the export is incomplete")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(f"{path} is damaged, or not a safetensors file: {error}") from error
