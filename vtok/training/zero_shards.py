"""What lies where in a run that DeepSpeed's ZeRO splits: its checkpoint folders are read whole, its engines are filled.

    folder of shards --read_shards--> weights and AdamW's moments by parameter name, float32, and what the run kept
    those, of any strategy --fill--> a live engine of any stage and number of processes

ZeRO keeps the float32 weights and the two moments of each optimizer group as one flat vector. Stages 1 and 2 lay the
group's tensors end to end and cut the whole into one part per process (Rajbhandari et al. 2019,
https://arxiv.org/abs/1910.02054); stage 3 cuts every tensor into one part per process, the last one padded, and lays
each process's parts end to end. DeepSpeed is not imported here: an export is made where it is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TAG = "checkpoint"  # the name Lightning gives the shards' folder inside a DeepSpeed checkpoint
MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed writes beside the run's own state.
OWN = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names", "skipped_steps",
    "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version",
    "checkpoint_parallel_dimensions",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is damaged, is none, or could not be written."""


class _Kept:
    """Stands for the few classes of DeepSpeed that its files name; nothing of theirs is needed."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


_SCALERS = ("LossScaler", "DynamicLossScaler")
_NAMED: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Kept, "deepspeed.utils.tensor_fragment.fragment_address"),
    *((_Kept, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in _SCALERS),
]


def load_shard(path: Path) -> dict[str, Any]:
    """One file of a DeepSpeed checkpoint. Nothing is unpickled but tensors, plain values and four known classes.

    Raises: CheckpointError for a file that holds anything else, or is no such file.
    """
    try:
        with torch.serialization.safe_globals(_NAMED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{path} is not a file of a DeepSpeed checkpoint: {str(error)[:300]}") from error


def check_shards(folder: Path) -> None:
    """Raises CheckpointError where a file names a class that DeepSpeed's files do not; no file is unpickled for it."""
    known = {name for _, name in _NAMED}
    for path in sorted((folder / TAG).glob("*.pt")):
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception as error:
            raise CheckpointError(f"{path} is not a file of a DeepSpeed checkpoint: {str(error)[:300]}") from error
        if named - known:
            raise CheckpointError(
                f"{path} would run {sorted(named - known)} when it is loaded: vtok wrote no such file"
            )


def client_state(folder: Path) -> dict[str, Any]:
    """What the run itself keeps in a folder of shards: step, averaged weights, loops, place in the data ..."""
    return {k: v for k, v in _model_states(folder)[0].items() if k not in OWN}


@torch.no_grad()
def read_shards(folder: Path, *, moments: bool = True) -> dict[str, Any]:
    """A folder of shards, of any stage and number of processes, as one checkpoint.

    Returns: `client_state`, "state_dict" {name: tensor; floats in float32} and "moments"
        {name: {"exp_avg", "exp_avg_sq", "step"}} of the parameters that were stepped at least once.
    Raises: CheckpointError for missing or damaged files.
    """
    models = _model_states(folder)
    first = models[0]
    optims = [load_shard(path)["optimizer_state_dict"] for path in _ranks(folder, "optim_states")]
    stage = int(optims[0]["zero_stage"])
    count = optims[0]["partition_count"]
    if (max(count) if isinstance(count, list) else count) != len(optims):
        raise CheckpointError(f"{folder} holds the shards of {len(optims)} processes and was written by {count}")
    inner = [o["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"] for o in optims]
    flats = [o["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] for o in optims]
    gaps = optims[0].get("param_alignment_paddings")
    state: dict[str, Tensor] = {name: _float(first["module"][name]) for name in first["buffer_names"]}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [model["frozen_param_fragments"][name] for model in (models if stage == 3 else models[:1])]
        state[name] = _float(torch.cat([p.flatten() for p in parts])[: math.prod(shape)].reshape(shape))
    found: dict[str, dict[str, Any]] = {}
    for index, shapes in enumerate(first["param_shapes"]):
        gap = gaps[index] if gaps else [0] * len(shapes)
        state |= _unflatten([flat[index] for flat in flats], shapes, whole=stage < 3, gaps=gap, where=folder)
        if not moments or index not in inner[0]:  # a group that has been idle since the run began
            continue
        for key in MOMENTS:
            parts = [of_rank[index][key] for of_rank in inner]
            for name, value in _unflatten(parts, shapes, whole=stage < 3, gaps=gap, where=folder).items():
                found.setdefault(name, {"step": float(inner[0][index]["step"])})[key] = value
    for name, same in first["shared_params"].items():
        if same in state:
            state[name] = state[same]
    return {**client_state(folder), "state_dict": state, **({"moments": found} if moments else {})}


def same_groups(folder: Path, engine: Any) -> bool:
    """Whether the shards hold the parameters in the optimizer groups that an engine has: it takes no others."""
    written = load_shard(_ranks(folder, "model_states")[0])["param_shapes"]
    return [list(shapes) for shapes in written] == [list(shapes) for shapes in engine._get_zero_param_shapes()]


def check_trained(moments: Iterable[str], trained: Iterable[str]) -> None:
    """Raises CheckpointError for moments of parameters that are not trained: they would be lost."""
    if strange := sorted(set(moments) - set(trained)):
        raise CheckpointError(
            f"the checkpoint holds the optimizer's state of {strange[:4]}, which are not trained here: put optim."
            "freeze and optim.train_only back, or start a new run with init_from"
        )


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _model_states(folder: Path) -> list[dict[str, Any]]:
    return [load_shard(path) for path in _ranks(folder, "model_states")]


def _ranks(folder: Path, kind: str) -> list[Path]:
    """The files of a kind in the order of the processes that wrote them."""

    def rank(path: Path) -> int:
        head = path.name.partition("_mp_rank_")[0].rpartition("_")[2]
        return int(head) if head.isdigit() else 0

    found = sorted((folder / TAG).glob(f"*mp_rank_00_{kind}.pt"), key=rank)
    if not found:
        raise CheckpointError(f"{folder} is not a whole DeepSpeed checkpoint: no *_{kind}.pt under {folder / TAG}")
    return found


def _unflatten(
    parts: list[Tensor], shapes: Mapping[str, Any], *, whole: bool, gaps: list[int], where: Path
) -> dict[str, Tensor]:
    """{name: tensor} of one optimizer group, from every process's flat part of it.

    whole: the parts make up one vector of all tensors (stages 1 and 2), else each tensor is split over the parts.
    gaps: elements left free after each tensor.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    needed = sum(sizes.values()) + sum(gaps) if whole else sum(math.ceil(n / len(parts)) for n in sizes.values())
    held = sum(p.numel() for p in parts) if whole else min(p.numel() for p in parts)
    if held < needed:
        raise CheckpointError(f"{where}: {held} elements where {sorted(shapes)[:3]} and others need {needed}")
    out, at = {}, 0
    flat = torch.cat(parts) if whole else None
    for (name, size), gap in zip(sizes.items(), gaps):
        if flat is not None:
            piece, step = flat[at : at + size], size + gap
        else:
            step = math.ceil(size / len(parts))
            piece = torch.cat([part[at : at + step] for part in parts])[:size]
        out[name], at = piece.reshape(tuple(shapes[name])), at + step
    return out


def fill(engine: Any, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts whole weights and AdamW's moments, by parameter name, into a DeepSpeed engine that has not stepped yet.

    Each process keeps its own part. A group whose parameters were stepped unequally often (DDP passes by those without
    a gradient, ZeRO does not) takes the largest count: ZeRO has one for a group.
    Raises: CheckpointError where a trained parameter is not in `weights`, or has another shape, and where one with
        moments is not trained.
    """
    outer = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters()}
    check_trained(moments, [n for n, p in engine.module.named_parameters() if p.requires_grad])
    lacking = [n for n, p in engine.module.named_parameters() if p.requires_grad and n not in weights]
    if lacking:
        raise CheckpointError(f"the checkpoint does not fit the model: it lacks {lacking[:8]}")
    sharded = hasattr(outer, "fp32_partitioned_groups_flat")  # stage 3
    if not sharded and not hasattr(outer, "single_partition_of_fp32_groups"):
        raise CheckpointError(
            f"{type(outer).__name__} cannot take over another strategy's checkpoint: remove data_types from "
            "trainer.deepspeed, or continue with the strategy and number of processes that wrote it"
        )
    if sharded:
        outer.checkpoint_event_prologue()
    with torch.no_grad():
        for parameter in engine.module.parameters():
            name = names[id(parameter)]
            if name in weights:
                _fits(name, weights[name], parameter.ds_shape if sharded else parameter.shape)
                target = parameter.ds_tensor if sharded else parameter.data
                target.copy_(_own_part(weights[name], target, engine) if sharded else weights[name])
        for name, buffer in engine.module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        groups = outer.fp16_groups if sharded else outer.bit16_groups
        flats = outer.fp32_partitioned_groups_flat if sharded else outer.single_partition_of_fp32_groups
        for flat, group in zip(flats, groups):
            known = [moments[names[id(p)]] for p in group if names[id(p)] in moments]
            state = outer.optimizer.state[flat] if known else {}
            if known:
                state["step"] = torch.tensor(max(float(m["step"]) for m in known), dtype=torch.float32)
                state |= {key: torch.zeros_like(flat) for key in MOMENTS}
            for parameter in group:
                name = names[id(parameter)]
                _put(flat, parameter, weights[name], outer, engine)
                for key in MOMENTS if name in moments else ():
                    _put(state[key], parameter, moments[name][key], outer, engine)
    if sharded:
        outer.checkpoint_event_epilogue()


def _fits(name: str, value: Tensor, shape: Any) -> None:
    if tuple(value.shape) != tuple(shape):
        raise CheckpointError(
            f"the checkpoint does not fit the model: {name} is {tuple(value.shape)} there and {tuple(shape)} here"
        )


def _own_part(value: Tensor, like: Tensor, engine: Any) -> Tensor:
    """This process's part of a tensor that stage 3 cuts into parts of `like`'s size, zeros after its end."""
    size, rank = like.numel(), torch.distributed.get_rank(group=engine.data_parallel_group)
    piece = value.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(piece, (0, size - piece.numel())).reshape(like.shape)


def _put(flat: Tensor, parameter: nn.Parameter, value: Tensor, outer: Any, engine: Any) -> None:
    """Writes this process's part of a tensor to its place in the flat vector of its group."""
    for start, size, begin in _places(parameter, outer, engine):
        piece = value.flatten()[begin : begin + size]
        flat.narrow(0, start, piece.numel()).copy_(piece)


def _places(parameter: Any, outer: Any, engine: Any) -> Iterator[tuple[int, int, int]]:
    """(place in the flat vector, elements, place in the tensor) of this process's part of a tensor, if it has one."""
    if hasattr(parameter, "ds_tensor"):
        _, start, size = outer.grad_position[outer.get_param_id(parameter)]
        yield int(start), int(size), torch.distributed.get_rank(group=engine.data_parallel_group) * int(size)
    elif parameter._hp_mapping is not None:
        there, here = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        yield there.start, there.numel, here.start
