"""What ships: a run's model as one folder that loads anywhere.

run directory --load_run--> Model --> config.json, model.safetensors, entropy.safetensors (static model of .vtok files),
                                      adapters.safetensors (of the LLM that reads a projector, where it learned some),
                                      training.yaml, README.md (model card), modeling_vtok.py
folder --vtok.load--> Model           vtok's own code
folder --AutoModel--> VtokModel       the folder's modeling_vtok.py, where vtok is not installed
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import vtok
from vtok.coding.codec import main_decode, main_encode
from vtok.coding.entropy import StaticModel, factors_of
from vtok.config import RunConfig, flatten, load_family, loads, to_dict, to_yaml
from vtok.data.order import one_pass, seeded
from vtok.data.sample import collate, load_sample
from vtok.data.sources import BrokenSample, ShardReader, every_shard
from vtok.data.strict import DecodeError
from vtok.data.view import view_of
from vtok.layers.projector import ProjectorConfig
from vtok.loading import (
    ADAPTERS,
    CODE,
    ENTROPY,
    FORMAT,
    PREFIX,
    PRIOR,
    PRIOR_CONFIG,
    WEIGHTS,
    ExportError,
    add_which,
    hub_errors,
    identify,
    load,
    load_adapters,
    load_any,
    load_run,
    read_config,
    step_of,
    weights_sha256,
    without_token,
)
from vtok.projecting import is_projector
from vtok.shareable import shareable
from vtok.shipping.bundle import bundle
from vtok.shipping.card import model_card
from vtok.shipping.projector_card import projector_card
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
    which: str | int = "best",
    ema: bool = True,
    entropy: bool = True,
    entropy_clips: int = 512,
    licence: str = "apache-2.0",
    vlm: str = "",
) -> Path:
    """Write a run's model as one folder that loads anywhere; it appears under `out` once it is complete.

    Args:
        which, ema: as `load_run`.
        entropy: fit the static entropy model of `.vtok` files on `entropy_clips` training clips (where the run's shards
            are at hand; without them it is left out and the card says so).
        licence: Hub identifier of the weights' licence, for the model card.
        vlm: a VLM that reads this projector's tokens, NAME or NAME@REVISION, or a folder: the export then loads as both
            joined, too (`vtok.shipping.hf_vlm`). Its weights are not copied.
    Raises: ExportError where `out` is something else, the family cannot be written as one file, or the VLM cannot read
        the tokens.
    """
    model, config = load_run(run_dir, which=which, ema=ema)
    how: dict[str, Any] = {"entropy": entropy, "entropy_clips": entropy_clips, "licence": licence, "vlm": vlm}
    how |= {"adapters": load_adapters(run_dir, which=which), "step": step_of(run_dir, which=which)}
    return publish(model, config, out, run_dir=Path(run_dir), **how)


def publish(
    model: nn.Module,
    config: RunConfig,
    out: str | Path,
    *,
    run_dir: Path | None = None,
    step: int | None = None,
    entropy: bool = True,
    entropy_clips: int = 512,
    licence: str = "apache-2.0",
    vlm: str = "",
    adapters: dict[str, torch.Tensor] | None = None,
) -> Path:
    """`export` of a model at hand. config: that of the run it comes from, with the model's own under `model`.
    step: of the run's checkpoint. adapters: of `load_adapters`."""
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_export(out))):
        raise ExportError(f"--out {out} exists and is not an export; choose another folder, or remove it")
    named = named_vlm(vlm, config) if vlm else None
    static, why_not = None, "it was not asked for"
    if entropy and getattr(model, "codebook_sizes", ()):
        try:
            static = fit_entropy(model, training_clips(config, limit=entropy_clips))
        except (ValueError, OSError) as error:
            why_not = f"it could not be fitted ({error})"
            log.warning("no static entropy model in the export: %s", why_not)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.part"):  # by exports that were killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir()
        about: dict[str, Any] = dict(entropy=static, run_dir=run_dir, step=step, licence=licence, vlm=named)
        about["no_entropy"] = why_not
        write_export(model, config, part, adapters=adapters, **about)
        _put_in_place(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _put_in_place(part: Path, out: Path) -> None:
    """Gives a whole export its name; one of that name is there in whole until the moment it is replaced."""
    for path in part.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if not out.exists():
        os.replace(part, out)
        return
    swapped = _exchange(part, out)
    if not swapped:  # a file system that cannot: between two renames there is none, and the old one stands beside it
        old = out.with_name(f".{out.name}.old.part")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(part, out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two paths exchanged their names, in one step (Linux, most file systems)."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
    except (OSError, AttributeError):
        return False


def write_export(
    model: nn.Module,
    config: RunConfig,
    folder: Path,
    *,
    entropy: StaticModel | None = None,
    run_dir: Path | None = None,
    step: int | None = None,
    licence: str = "apache-2.0",
    no_entropy: str = "",
    vlm: dict[str, Any] | None = None,
    adapters: dict[str, torch.Tensor] | None = None,
) -> None:
    """The files of an export of `model`, into an empty folder. vlm: of `named_vlm`. adapters: of `load_adapters`."""
    who, config = identify(model), _without_keys(config)
    if vlm is not None and adapters:
        raise ExportError(
            f"--vlm {vlm['name']}: these tokens are read through adapters in {config.objective.llm.name} "
            "(objective.lora), which a VLM has not: leave --vlm out, or train with objective.lora.rank=0"
        )
    module = load_family(config.model.name)
    (folder / CODE).write_text(modeling_source(module, who.model_id, joined=vlm is not None), encoding="utf-8")
    # Copies: safetensors refuses tensors that share memory.
    state = {PREFIX + k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if entropy is not None:
        save_file(entropy.tensors(), folder / ENTROPY, metadata={"format": "pt"})
    facts: dict[str, Any] = {
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
    if is_projector(config):
        facts["length_policy"] = config.model.length_policy
    if adapters:
        save_file(adapters, folder / ADAPTERS, metadata={"format": "pt"})
        facts["adapters_sha256"] = weights_sha256(adapters).hex()
    if vlm is not None:
        facts["vlm"] = vlm
        facts["auto_map"]["AutoModelForImageTextToText"] = "modeling_vtok.VtokVLM"
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "training.yaml").write_text(to_yaml(config), encoding="utf-8")
    if is_projector(config):
        card = projector_card(model, config, facts, run_dir=run_dir, step=step, licence=licence)
    else:
        how: dict[str, Any] = dict(run_dir=run_dir, step=step, licence=licence, no_entropy=no_entropy)
        card = model_card(model, config, facts, **how)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _without_keys(config: RunConfig) -> RunConfig:
    """The configuration as an export tells it: no users, passwords, signatures of addresses, no shell commands."""
    values = to_dict(config)
    told = shareable(values)
    if told == values:
        return config
    shared, before = loads(told, where="the export's configuration"), flatten(config)
    hidden = [key for key, value in flatten(shared).items() if value != before[key]]
    log.warning("the export tells %s with *** in the place of what may be a key", ", ".join(hidden))
    return shared


def modeling_source(module: ModuleType, name: str, *, joined: bool = False) -> str:
    """The text of modeling_vtok.py: a family's Config and Model with all they use, and transformers' face of them.

    joined: with the class that loads a VLM and joins the compressor to it.

    Raises: vtok.shipping.bundle.BundleError for a family that needs more than torch, einops and transformers.
    """
    projects = issubclass(module.Config, ProjectorConfig)
    face = "FeatureCompressorModel" if projects else "CompressorModel"
    roots: list[tuple[str, tuple[str, ...]]] = [
        (module.__name__, ("Config", "Model")),
        ("vtok.shipping.hf", ("VtokConfig", face)),
    ]
    roots += [("vtok.shipping.hf_vlm", ("JoinedModel",))] if joined else []
    code = bundle(roots)
    return (
        f'"""{name}: generated by `vtok export` (vtok {vtok.__version__}). Apache-2.0. Needs torch, einops, '
        "transformers.\n\n"
        'AutoModel.from_pretrained(folder, trust_remote_code=True) runs this file; vtok.load(folder) does not.\n"""\n\n'
        f"from __future__ import annotations\n\n{code}\n\n"
        f"class VtokModel({face}):\n    make_config, make_model = Config, Model\n"
        f"{JOINED if joined else ''}{TOKEN_COUNT if projects else ''}"
    )


JOINED = """

class VtokVLM(JoinedModel):
    make_config, make_model = Config, Model
"""


# Engines that serve a VLM lay out placeholders in a process that has config.json and no weights.
TOKEN_COUNT = '''

def token_count(config: VtokConfig, frames: int, height: int, width: int, *, budget: int | None = None) -> int:
    """Exactly the tokens of a clip whose features have so many frames, rows and columns of patches; no weights needed.

    Raises: ValueError where that depends on what is seen, as with length_policy "content" it may.
    """
    return build_config(Config, config.model).token_count(frames, height, width, budget=budget)
'''


def named_vlm(vlm: str, config: RunConfig) -> dict[str, Any]:
    """name and revision (the commit, of a Hub repository) of the VLM that an export is to be joined to.

    vlm: NAME, NAME@REVISION, or a folder. Raises: ExportError for one that cannot be had, or cannot read the tokens.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from vtok.layers.seams import SEAMS, check_tower

    if not is_projector(config):
        raise ExportError(f"--vlm {vlm}: a VLM reads the tokens of projectors; {config.model.name} is none")
    name, _, revision = vlm.partition("@")
    try:
        if Path(name).is_dir():
            commit, path = None, Path(name) / "config.json"
        else:
            commit = HfApi().model_info(name, revision=revision or None).sha
            path = Path(hf_hub_download(name, "config.json", revision=commit))
        facts = json.loads(path.read_text(encoding="utf-8"))
    except hub_errors() as error:
        why = without_token(str(error))
        raise ExportError(f"--vlm {vlm} is no folder here and could not be had from the Hub: {why}") from None
    if facts.get("model_type") not in SEAMS:
        raise ExportError(f"--vlm {vlm} is of type {facts.get('model_type')!r}; tokens are put into {', '.join(SEAMS)}")
    width = facts.get("text_config", facts).get("hidden_size")
    if width is not None and width != config.model.embedding_dim:
        raise ExportError(
            f"--vlm {vlm}: its words are {width} wide, this projector's tokens {config.model.embedding_dim}: it was "
            f"trained for {config.objective.llm.name}"
        )
    try:
        check_tower(config.model, facts, SEAMS[facts["model_type"]])
    except ValueError as error:
        raise ExportError(f"--vlm {vlm}: {error}") from None
    return {"name": name, "revision": commit}


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


def push(folder: str | Path, repo: str, *, private: bool = False, endpoint: str | None = None) -> str:
    """Upload an export to the Hub repository `user/name` (made where it is missing); returns its address.

    In one commit, so that nobody meets half of it: an earlier export there is replaced, its history stays. The token is
    huggingface_hub's own (HF_TOKEN, or `hf auth login`).

    Args:
        private: make a private repository. endpoint: another Hub than HF_ENDPOINT's.
    Raises: ExportError when the Hub refuses or cannot be reached, when the repository holds something else than an
        export, and when it is public and private was asked. The folder is only read.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    facts, api = read_config(folder), HfApi(endpoint=endpoint)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if facts.get("vlm") and not facts["vlm"]["revision"]:
        raise ExportError(
            f"--push {repo}: the VLM is {facts['vlm']['name']}, a folder here; name one of the Hub (--vlm)"
        )
    try:
        url = api.create_repo(repo, exist_ok=True, private=private)
        there = _replaceable(api, repo, private=private)
        stale = {ENTROPY, PRIOR, PRIOR_CONFIG, ADAPTERS} & there - {path.name for path in files}
        operations = [CommitOperationAdd(path.name, path) for path in files]
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        api.create_commit(repo, operations, commit_message=f"vtok export of {facts['model_id']}")
    except ExportError:
        raise
    except (*hub_errors(), RuntimeError) as error:
        why = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of one file's upload
        raise ExportError(
            f"--push {repo}: {without_token(_refusal(why))}. Nothing is lost: the export is complete in {folder}; give "
            "the same command again, which sends what did not arrive"
        ) from None
    return str(url)


def _replaceable(api: Any, repo: str, *, private: bool) -> set[str]:
    """The names of a repository's files. Raises: ExportError where they are no export, and for a public repository
    where a private one was asked."""
    info = api.model_info(repo)
    if private and info.private is False:
        raise ExportError(f"--push {repo} --private: the repository exists and is public; make it private there first")
    files = {file.rfilename for file in info.siblings or []}
    foreign = files - {".gitattributes", "README.md"}  # which the Hub makes itself
    if "config.json" in foreign:
        with tempfile.TemporaryDirectory() as aside:
            api.hf_hub_download(repo, "config.json", local_dir=aside)
            foreign = set() if _is_export(Path(aside)) else foreign
    if foreign:
        raise ExportError(
            f"--push {repo}: the repository exists and holds {', '.join(sorted(foreign)[:3])}, which is no export; "
            "choose another name"
        )
    return files


def _refusal(error: BaseException) -> str:
    """What went wrong at the Hub, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and isinstance(error, ValueError):  # a name that no repository can have
        return str(error)
    if status is None:
        return f"the Hub could not be reached, or broke off ({type(error).__name__}: {error})"
    advice = {
        401: "it does not know the token: set HF_TOKEN, or run `hf auth login`",
        403: "the token may not write there: take one with write access, of a user or organisation that owns the name",
    }
    return f"the Hub refused with {status}: {advice.get(status, str(error))}"


def main_export(argv: list[str]) -> None:
    """`vtok export RUN --out DIR [--vlm NAME] [--push USER/REPO]`."""
    parser = argparse.ArgumentParser(prog="vtok export", description="One folder that loads anywhere.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--out", required=True, help="folder to write; an earlier export there is replaced")
    add_which(parser)
    parser.add_argument("--no-ema", action="store_true", help="the raw weights, not their moving average")
    parser.add_argument("--no-entropy", action="store_true", help="no static entropy model")
    parser.add_argument("--entropy-clips", type=int, default=512, help="training clips it is fitted on (default: 512)")
    parser.add_argument("--license", default="apache-2.0", help="Hub identifier of the weights' licence")
    parser.add_argument("--vlm", metavar="NAME[@REV]", default="", help="projectors: loads joined to this VLM, too")
    parser.add_argument("--push", metavar="USER/REPO", help="upload to the Hub as well")
    parser.add_argument("--private", action="store_true", help="with --push: a private repository")
    args = parser.parse_args(argv)
    if args.private and not args.push:
        raise ExportError("--private: it is of a --push; name the repository, --push USER/REPO, or leave it out")
    out = export(
        args.run,
        args.out,
        which=args.which,
        ema=not args.no_ema,
        entropy=not args.no_entropy,
        entropy_clips=args.entropy_clips,
        licence=args.license,
        vlm=args.vlm,
    )
    facts = read_config(out)
    print(f"{out}: {facts['model_id']}, {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.1f} MB")
    if args.push:
        print(f"pushed to {push(out, args.push, private=args.private)}")
