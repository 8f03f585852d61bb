"""Where a tower comes from: a name of timm, a Hub repository, or a folder; its weights hashed before they are read."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from vtok.layers.pretrained import WEIGHTS, commit_of, fetch, weight_files, weights_sha256
from vtok.layers.seams import KIND, is_vlm, load_vlm
from vtok.vision.bodies import VIDEO, Body, HubBody, TimmBody
from vtok.vision.tower import DTYPES, Tower, TowerConfig
from vtok.vision.vlm import VlmBody

_NAMES = (*WEIGHTS, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_tower(config: TowerConfig) -> Tower:
    """A frozen tower on the CPU, its weights those of the files that were hashed; no code from a repository is run.

    sha256 is that of the weights' file; of several, that of their hashes one below the other, in the order of names.
    Raises: ImportError without the library; ValueError for a name, folder or repository that holds no tower, for
        other weights than expected, for weights that are incomplete, and for a size the tower cannot see.
    """
    kind, _, rest = config.name.partition(":")
    if kind not in ("timm", "hf", KIND) or not rest:
        kind, rest = "", config.name
    size = (config.size[0], config.size[1]) if config.size else None
    if Path(rest).is_dir() and rest:
        folder, revision = Path(rest), ""
    elif kind == "timm" and "/" not in rest:
        return _registered(config, rest, size)
    elif kind and rest.count("/") == 1 and not rest.startswith((".", "/", "~")):
        folder = fetch(rest, config.revision, texts=["*.json"], what="tower")
        revision = commit_of(folder, config.revision)
    else:
        raise ValueError(
            f"tower.name={config.name!r} is no folder here and names no tower; give timm:MODEL, timm:USER/REPO, "
            "hf:USER/REPO, a folder that timm.models.save_for_hf or save_pretrained wrote, or vlm:USER/REPO or "
            "vlm:FOLDER for the tower of a VLM"
        )
    facts = _facts(folder)
    sha256 = weights_sha256(weight_files(folder, _NAMES), config.sha256, key="tower.sha256", name=config.name)
    if kind == KIND:
        vlm = load_vlm(folder, dtype=DTYPES[config.dtype], key="tower.name", name=config.name)
        facts = SimpleNamespace(model_type=vlm.config.model_type)
        body: Body = VlmBody(vlm, _processor(folder, facts, config), config.layer, size, config.name)
    elif is_vlm(facts):
        raise ValueError(
            f"tower.name={config.name!r} is a whole VLM ({facts['model_type']}): for its tower, as it reads it, give "
            f"{KIND}:{rest}"
        )
    elif "architecture" in facts and "model_type" not in facts:
        body = _timm_body(f"local-dir:{folder}", config, size, {})
    else:
        body = _hub_body(folder, config, size)
    return Tower(config, body, sha256=sha256, revision=revision)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tower: config.json is missing or not json ({error})") from error
    if not isinstance(facts, dict) or not {"architecture", "model_type"} & facts.keys():
        raise ValueError(f"{path} names neither timm's architecture nor transformers' model_type: no tower is there")
    return facts


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("this tower needs timm: pip install 'vtok[towers]'") from error
    return timm


def _registered(config: TowerConfig, name: str, size: tuple[int, int] | None) -> Tower:
    """One of timm's own names, with the weights of its tag."""
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        raise ValueError(
            f"tower.name={config.name!r}: timm has no such model" + (f"; close: {', '.join(close)}" * bool(close))
        )
    try:
        cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ValueError(f"tower.name={config.name!r}: {error} timm has {', '.join(tags) or 'none'}") from error
    repo = getattr(cfg, "hf_hub_id", None)
    if not repo:
        raise ValueError(f"tower.name={config.name!r}: timm lists no weights of it on the Hub; give a tag or a folder")
    own = cfg.hf_hub_filename or ""  # where a repository holds several libraries' weights; safetensors before a pickle
    names = (own.replace("_pytorch_model.bin", "_model.safetensors"), own) if own else ()
    texts = ["config.json"] if names else ["*.json"]
    folder = fetch(repo, config.revision, texts=texts, what="tower", files=names)
    there = [folder / own_name for own_name in names if (folder / own_name).is_file()][:1]
    files = there or weight_files(folder, _NAMES)
    sha256 = weights_sha256(files, config.sha256, key="tower.sha256", name=config.name)
    body = _timm_body(name, config, size, {"file": str(files[0])})
    return Tower(config, body, sha256=sha256, revision=commit_of(folder, config.revision))


def _timm_body(name: str, config: TowerConfig, size: tuple[int, int] | None, overlay: dict[str, Any]) -> Body:
    timm = _timm()
    args: dict[str, Any] = {"pretrained": True, "num_classes": 0, "pretrained_cfg_overlay": overlay}
    try:
        try:  # positions are resampled as the weights are loaded
            model = timm.create_model(name, **args, img_size=size)
        except TypeError:  # a net without positions takes any size
            model = timm.create_model(name, **args)
    except (RuntimeError, OSError, KeyError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"tower.name={config.name!r}: timm could not load it: {error}") from error
    return TimmBody(model.to(DTYPES[config.dtype]), config.layer, size, config.name)


def _hub_body(folder: Path, config: TowerConfig, size: tuple[int, int] | None) -> Body:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this tower needs transformers: pip install 'vtok[towers]'") from error
    try:
        facts: Any = transformers.AutoConfig.from_pretrained(folder)
        facts = getattr(facts, "vision_config", None) or facts  # the vision half of CLIP, SigLIP, ...
        if size and facts.model_type == "vjepa2":  # its rotary positions count from the frame's size
            if size[0] != size[1]:
                raise ValueError(f"tower.size={list(size)}: {config.name} sees square frames only")
            facts.crop_size = size[0]
        model, report = transformers.AutoModel.from_pretrained(
            folder, config=facts, dtype=DTYPES[config.dtype], output_loading_info=True
        )
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"tower.name={config.name!r}: transformers could not load it: {error}") from error
    missing = sorted(report["missing_keys"])
    unpooled = [name for name in missing if name.startswith("pooler.")]  # many checkpoints come without one
    if len(unpooled) < len(missing):
        rest = [name for name in missing if name not in unpooled]
        raise ValueError(
            f"{config.name}: {len(rest)} weights of {type(model).__name__} are not in its files, such as {rest[0]}: "
            "they would be random numbers; is this a vision tower's checkpoint?"
        )
    return HubBody(model, _processor(folder, facts, config), config.layer, size, not unpooled, config.name)


def _processor(folder: Path, facts: Any, config: TowerConfig) -> Any:
    import transformers

    kinds = [transformers.AutoImageProcessor]
    if facts.model_type in VIDEO or config.name.startswith(f"{KIND}:"):
        kinds.insert(0, cast(Any, transformers).AutoVideoProcessor)
    problems = []
    for kind in kinds:
        try:
            return kind.from_pretrained(folder)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            problems.append(str(error).strip().partition("\n")[0])
    raise ValueError(f"{config.name} has no usable preprocessor_config.json: {'; '.join(problems)}")
