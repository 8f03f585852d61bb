"""Which parameters learn, how fast, and how large their gradients are: what a step needs beside AdamW itself."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vtok.config import OptimConfig

SCHEDULES = ("cosine", "constant", "wsd")
_UNDECAYED = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def rate(optim: OptimConfig, step: int, progress: float) -> float:
    """Factor on the learning rate at optimizer step `step`.

    Linear warm-up over `warmup_steps`; then, over `progress` in [0, 1] of the whole run, a cosine down to
    `min_lr_ratio`, a constant, or wsd (constant, then linear down to `min_lr_ratio` over the last fifth).
    """
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    low = optim.min_lr_ratio
    if optim.schedule == "cosine":
        shape = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    elif optim.schedule == "wsd":
        shape = 1.0 if progress < 0.8 else 1.0 - (1 - low) * (progress - 0.8) / 0.2
    else:
        shape = 1.0
    return warm * shape


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """AdamW groups of a module that holds `model` and `objective`.

    A group is (part, factor on lr, decayed or not). Decayed: the weights of linear and convolution layers; not biases,
    norms, embeddings, nor tensors a module holds directly (registers, mask tokens, positions). `part` is "" for the
    model and "objective.<child>" for each child of the objective, so that each can be idle on its own.
    Raises: ValueError when an `optim.lr_multipliers` prefix names no trained parameter.
    """
    used: set[str] = set()
    groups: dict[tuple[str, float, bool], dict[str, Any]] = {}
    for owner_name, owner in module.named_modules():
        for local, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{owner_name}.{local}" if owner_name else local
            prefixes = [p for p in optim.lr_multipliers if name == p or name.startswith(p + ".")]
            used.update(prefixes)
            factor = optim.lr_multipliers[max(prefixes, key=len)] if prefixes else 1.0
            parts = name.split(".")
            part = ".".join(parts[:2]) if parts[0] == "objective" else ""
            decayed = local.endswith("weight") and parameter.ndim >= 2 and not isinstance(owner, _UNDECAYED)
            group = groups.setdefault(
                (part, factor, decayed),
                {"params": [], "part": part, "factor": factor, "weight_decay": optim.weight_decay if decayed else 0.0},
            )
            group["params"].append(parameter)
    for prefix in optim.lr_multipliers:
        if prefix not in used:
            tops = sorted({".".join(n.split(".")[:2]) for n, p in module.named_parameters() if p.requires_grad})
            raise ValueError(
                f"optim.lr_multipliers: {prefix!r} is the prefix of no trained parameter; names begin with "
                f"{', '.join(tops)}"
            )
    seen: set[int] = set()
    for group in groups.values():  # a tensor shared by two modules is stepped once
        group["params"] = [p for p in group["params"] if not (id(p) in seen or seen.add(id(p)))]
    return [group for group in groups.values() if group["params"]]


def total_norms(gradients: list[Tensor], parts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """The joint Euclidean norm of `gradients`, as torch's, and that of each part where there are several.

    parts: the part of each gradient, those of a part together ("" is the model, "objective.<child>" another). Keys of
    the result: "model", "<child>". On the device; the norms of single tensors are computed once.
    """
    if not gradients:
        return torch.zeros(()), {}
    if len({g.device for g in gradients}) > 1 or len(set(parts)) == 1:
        return nn.utils.get_total_norm(gradients, foreach=True), {}
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    names, counts = zip(*[(part.rpartition(".")[2] or "model", len(list(run))) for part, run in groupby(parts)])
    return norms.norm(), {name: n.norm() for name, n in zip(names, norms.split(list(counts)))}


def untrained_at_rest(model: nn.Module) -> list[str]:
    """Parts of a model without `init_from` that rest as they began: neither this run nor another trains them.

    Not those that came from files of their own, which `model.from_files` names (set by the family's `build`).
    """
    own = tuple(f"{name}." for name in getattr(model, "from_files", ()))
    resting = [n for n, p in model.named_parameters() if not (p.requires_grad or own and f"{n}.".startswith(own))]
    return [f"model.{part}" for part in dict.fromkeys(name.partition(".")[0] for name in resting)]


def freeze(module: nn.Module, optim: OptimConfig) -> list[nn.Module]:
    """Switch off the parameters that `optim.freeze` and `optim.train_only` name; returns the modules wholly at rest,
    which stay in eval mode too (a frozen codebook must not follow its latents).

    Raises: ValueError for a prefix that names no parameter, or when nothing is left to learn.
    """
    names = [name for name, _ in module.named_parameters()]

    def under(name: str, prefixes: list[str]) -> bool:
        return any(name == p or name.startswith(p + ".") for p in prefixes)

    parts = {name for name, _ in module.named_modules()} | set(names)
    for key, prefixes in (("freeze", optim.freeze), ("train_only", optim.train_only)):
        for prefix in prefixes:
            if prefix not in parts:
                tops = sorted({".".join(n.split(".")[:2]) for n in names})
                raise ValueError(f"optim.{key}: {prefix!r} is the prefix of no parameter; names begin with {tops}")
    if not optim.freeze and not optim.train_only:
        return []
    resting = {n for n in names if under(n, optim.freeze) or (optim.train_only and not under(n, optim.train_only))}
    for name, parameter in module.named_parameters():
        if name in resting:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"optim.freeze={optim.freeze}, train_only={optim.train_only} leave nothing to learn")

    def at_rest(name: str) -> bool:
        inside = [n for n in names if n.startswith(name + ".")]
        return all(n in resting for n in inside) if inside else under(name, optim.freeze)

    return [part for name, part in module.named_modules() if name and at_rest(name)]
