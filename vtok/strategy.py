"""How a run is spread over processes, and what its checkpoints look like on disk. The only room that touches DeepSpeed.

trainer.strategy   auto | ddp | deepspeed_1 | deepspeed_2 | deepspeed_3     (CUDA with nccl, CPU with gloo)
checkpoint         one file (auto, ddp) or one folder with a shard per rank (deepspeed_*)
publish            written aside, flushed, then renamed: a reader sees the old checkpoint or the new one, whole
consolidate        either kind -> one float32 state dict
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from vtok.config import RunConfig

STRATEGIES = ("auto", "ddp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
TAG = "checkpoint"  # the name Lightning gives the shards' folder inside a DeepSpeed checkpoint
ABOUT = "vtok.json"  # what a DeepSpeed checkpoint folder says of itself


def stage_of(name: str) -> int:
    """ZeRO stage of a `trainer.strategy`: 1 to 3, 0 for the others. Raises ValueError for an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"trainer.strategy={name!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    return int(name[-1]) if name.startswith("deepspeed") else 0


def build(config: RunConfig, *, frozen_model: bool) -> Strategy | str:
    """The Lightning strategy of a run.

    Args:
        frozen_model: the model itself holds frozen parameters: DeepSpeed checkpoints must then carry them too.
    Raises: ValueError for an unknown strategy, for `trainer.deepspeed` without DeepSpeed, and where DeepSpeed is not
        installed.
    """
    trainer = config.trainer
    stage = stage_of(trainer.strategy)
    if trainer.deepspeed and not stage:
        raise ValueError(
            f"trainer.deepspeed is set, but trainer.strategy={trainer.strategy!r} does not use DeepSpeed; "
            "choose deepspeed_1, deepspeed_2 or deepspeed_3, or remove the key"
        )
    if stage:
        return _deepspeed(config, stage, frozen_model)
    world = trainer.devices * trainer.num_nodes
    if trainer.strategy == "ddp" or world > 1:
        return DDPStrategy(find_unused_parameters=trainer.find_unused_parameters)
    return "auto"


def _deepspeed(config: RunConfig, stage: int, frozen_model: bool) -> Strategy:
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"trainer.strategy={config.trainer.strategy!r} needs DeepSpeed: pip install 'vtok[train]', "
            "or choose trainer.strategy=ddp"
        ) from error
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.pytorch.strategies import DeepSpeedStrategy

    if RestingAdamW not in ZERO_SUPPORTED_OPTIMIZERS:  # known by its class: else a warning about an untested one
        ZERO_SUPPORTED_OPTIMIZERS.append(RestingAdamW)

    class Engine(DeepSpeedStrategy):
        """DeepSpeed that also runs on a CPU."""

        @property
        def root_device(self) -> torch.device:
            device = super().root_device
            # The parent compares the index with 0, and a CPU device has none; torch accepts only index 0 there.
            return torch.device("cpu", 0) if device.type == "cpu" else device

        def setup_environment(self) -> None:
            if super().root_device.type != "cpu":
                return super().setup_environment()
            super(DeepSpeedStrategy, self).setup_environment()  # the parent only adds a check for CUDA

        def setup_distributed(self) -> None:
            if super().root_device.type != "cpu":
                return super().setup_distributed()
            # Else init_distributed compiles a shared-memory all-reduce at first use (20 to 50 s, and a crash without
            # a compiler); gloo alone is enough. The rest is the parent's body less its check of device indices.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # pyright: ignore[reportAttributeAccessIssue]
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
            modules = list(model.modules()) if stage == 3 else []
            for module in modules:  # hooks run in the order they are registered: DeepSpeed's come between these two
                module.register_forward_hook(lambda _, __, output: as_containers(output))
            made = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
            for module in modules:
                module.register_forward_hook(lambda _, __, output: from_containers(output))
            return made

    engine = Engine(
        stage=stage,
        logging_batch_size_per_gpu=config.data.batch_size,
        exclude_frozen_parameters=not frozen_model,
    )
    assert isinstance(engine.config, dict)
    engine.config["gradient_clipping"] = config.optim.clip_grad_norm
    _merge(engine.config, config.trainer.deepspeed)
    return engine


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


class Fields(dict):
    """The fields of a dataclass instance (none of another value), whose tensors DeepSpeed's hooks find and replace."""

    def __init__(self, whole: Any) -> None:
        fields = dataclasses.fields(whole) if dataclasses.is_dataclass(whole) else ()
        super().__init__({field.name: as_containers(getattr(whole, field.name)) for field in fields})
        self.whole = whole


def as_containers(output: Any) -> Any:
    """What a module returned, dataclasses in it as `Fields`.

    ZeRO-3 gathers a module's parameters for the backward pass when a gradient reaches one of its outputs, and looks for
    those in tensors, tuples, lists and dictionaries alone: parameters that a module with another result holds itself
    would be empty when their gradient arrives. A number as the result is an error there.
    """
    if (dataclasses.is_dataclass(output) and not isinstance(output, type)) or isinstance(output, int | float | str):
        return Fields(output)
    return _each(as_containers, output)


def from_containers(output: Any) -> Any:
    """The inverse of `as_containers`; the tensors may be others than before."""
    if not isinstance(output, Fields):
        return _each(from_containers, output)
    whole = copy.copy(output.whole)
    for name, value in output.items():
        object.__setattr__(whole, name, from_containers(value))  # frozen ones too; what they check was checked
    return whole


def _each(function: Any, value: Any) -> Any:
    if isinstance(value, tuple | list):
        items = [function(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {name: function(item) for name, item in value.items()}
    return value


class RestingAdamW(torch.optim.AdamW):
    """AdamW that passes by the groups whose `idle` is true: weights, moments and step counters stay as they are.

    torch does so where parameters have no gradient. ZeRO hands over zeros instead, which would let moments decay and
    count the step, so that bias correction would later be another than DDP's.
    """

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("idle")]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss


def float_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the float32 buffers of `module`, by name."""
    return {name: b.detach().clone() for name, b in module.named_buffers() if b.dtype == torch.float32}


def restore_buffers(module: nn.Module, kept: dict[str, Tensor]) -> None:
    """Puts buffers that an engine turned into half precision back to float32, with their values from before.

    ZeRO-3 under bf16-mixed, and bf16-true everywhere, cast float buffers to bfloat16: a running mean, an EMA codebook
    or a LeCam average would then never move again (1.0 + 0.001 == 1.0 in bfloat16), without any error.
    """
    for name, buffer in module.named_buffers():
        if name in kept and buffer.dtype != torch.float32:
            buffer.data = kept[name].to(buffer.device)


def is_deepspeed(strategy: Any) -> bool:
    """Whether a Lightning strategy is DeepSpeed's (asked by name: DeepSpeed may not be installed)."""
    return any(cls.__name__ == "DeepSpeedStrategy" for cls in type(strategy).__mro__)


def call(trainer: Any, method: str, *args: Any) -> Any:
    """`method` of the LightningModule, run as a forward of the engine where parameters are sharded (ZeRO-3).

    ZeRO-3 gathers a module's own parameters only while its engine is inside `forward`.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if is_deepspeed(strategy):
        return strategy._forward_redirection(strategy.model, module, method, *args)
    return getattr(module, method)(*args)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as the only one: what shares statistics over processes keeps to itself.

    For what one rank does while the others wait; a collective of its own would wait for them in turn, for ever.
    """
    known = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = known


def step_outcome(strategy: Any) -> tuple[bool, float]:
    """(applied, joint gradient norm) of DeepSpeed's last optimizer step; the engine skips a norm that is not finite."""
    engine = strategy.deepspeed_engine
    norm = engine.get_global_grad_norm()
    norm = float(norm) if norm is not None else float("nan")
    return bool(engine.was_step_applied()), norm


def forget_gradients(strategy: Any) -> None:
    """After a step: gradients of parameters that the next one does not use are then zero, as at other stages.

    ZeRO-3 keeps gradients in one buffer in which each backward pass writes those it has: a resting discriminator, or a
    branch that a batch does not take, would be clipped, counted in the norm and stepped with those of steps ago.
    """
    buffer = getattr(strategy.deepspeed_engine.optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()


def autocast(strategy: Any, precision: str) -> Any:
    """Context of a forward pass whose weights are bfloat16 while float buffers are float32 (`restore_buffers`)."""
    if precision == "bf16-true" or (is_deepspeed(strategy) and precision == "bf16-mixed"):
        return torch.autocast(strategy.root_device.type, torch.bfloat16)
    return nullcontext()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole on disk before the call returns, and that load without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


def publish(written: Path, names: list[str], *, about: dict[str, Any]) -> None:
    """Give a freshly written checkpoint its public names ("last.ckpt", "best.ckpt"), each replaced in one rename.

    A file is renamed (other names are hard links, or copies where the file system has none). A folder keeps its own
    name and the public names are symbolic links, since a folder cannot be replaced in one step.
    """
    folder = written.parent
    if written.is_dir():
        (written / ABOUT).write_text(json.dumps(about))
        for path in written.rglob("*"):
            if path.is_file():
                _fsync(path)
        final = folder / f"step-{about['step']:08d}"
        if final.exists():  # the same step saved twice: the name may be in use, so take another
            final = folder / f"{final.name}-{os.getpid()}-{len(list(folder.glob(final.name + '*')))}"
        written.rename(final)
        for name in names:
            aside = folder / f".{name}.link"
            aside.unlink(missing_ok=True)
            aside.symlink_to(final.name)
            os.replace(aside, folder / name)
        _fsync(folder)
        used = {os.readlink(p) for p in folder.iterdir() if p.is_symlink()}
        for path in folder.glob("step-*"):
            if path.is_dir() and path.name not in used:
                shutil.rmtree(path, ignore_errors=True)
        return
    for name in names[1:]:
        _link(written, folder / name)
    os.replace(written, folder / names[0])
    _fsync(folder)


def mark_best(last: Path) -> None:
    """Makes best.ckpt the checkpoint that `last` is."""
    best = last.with_name("best.ckpt")
    if last.is_symlink():
        aside = best.with_name(".best.link")
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.readlink(last))
        os.replace(aside, best)
    else:
        _link(last, best)


def _link(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.aside")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
        _fsync(aside)
    os.replace(aside, target)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, elapsed_s, world_size, strategy, window ... Cheap for any size.

    Raises: FileNotFoundError, or ValueError for a file that is not a checkpoint of vtok.
    """
    path = Path(path)
    if path.is_dir():
        about = path / ABOUT
        if not about.is_file():
            raise ValueError(f"{path} is not a checkpoint of vtok: it has no {ABOUT}")
        return json.loads(about.read_text())
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return content["vtok"]
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint of vtok: {error}") from error


def _client_state(path: Path) -> dict[str, Any]:
    found = sorted((path / TAG).glob("*mp_rank_00_model_states.pt"))
    if not found:
        raise ValueError(f"{path} is not a whole DeepSpeed checkpoint: no model states under {path / TAG}")
    # DeepSpeed pickles more than tensors; this is the run's own folder, never a file from elsewhere.
    return torch.load(found[0], map_location="cpu", weights_only=False)


def consolidate(path: str | Path) -> dict[str, Tensor]:
    """The full state dict of a checkpoint, float tensors in float32: `model.*` and the objective's trained parts.

    Args:
        path: a file or, for a run with DeepSpeed, a folder of shards (of any world size).
    """
    path = Path(path)
    if path.is_dir():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state: Any = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG)
    else:
        describe(path)
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {k: v.detach().clone().float() if v.is_floating_point() else v.detach().clone() for k, v in state.items()}


def model_weights(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The shipped model's float32 state dict (no `model.` prefix): averaged weights where the run kept them.

    Args:
        ema: False for the raw weights of the last step.
    """
    path = Path(path)
    state = {k.removeprefix("model."): v for k, v in consolidate(path).items() if k.startswith("model.")}
    if ema:
        whole = _client_state(path) if path.is_dir() else torch.load(path, map_location="cpu", weights_only=True)
        for name, value in (whole.get("ema") or {}).items():
            state[name] = value.float()
    return state


def check_resumable(about: dict[str, Any], path: Path, *, strategy: str, world_size: int) -> None:
    """Raises ValueError when a checkpoint cannot be continued with this strategy and number of processes."""
    fresh = "or start a new run from its weights: `vtok export` it, then init_from=EXPORT with another name"
    if about["world_size"] != world_size:
        raise ValueError(
            f"{path} was written by {about['world_size']} process(es), this run has trainer.devices x num_nodes = "
            f"{world_size}: the order of samples and the optimizer's shards depend on it. "
            f"Continue with {about['world_size']}, {fresh}"
        )
    if stage_of(about["strategy"]) != stage_of(strategy):
        raise ValueError(
            f"{path} was written with trainer.strategy={about['strategy']}, this run has trainer.strategy={strategy}. "
            f"Continue with {about['strategy']}, {fresh}"
        )


def discard(path: Path) -> None:
    """Removes a half-written checkpoint, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
