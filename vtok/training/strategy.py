"""How a run is spread over processes, and what its checkpoints look like on disk. The only room that touches DeepSpeed.

trainer.strategy   auto | ddp | fsdp | deepspeed_1 | deepspeed_2 | deepspeed_3, the last two with _offload (AdamW in
                   the host's memory)                                        (CUDA with nccl, CPU with gloo)
checkpoint         one file (auto, ddp, fsdp) or one folder with a shard per rank (deepspeed_*): checkpoints.py;
                   each strategy goes on from the checkpoints of every other, and of any number of processes
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vtok.config import RunConfig
from vtok.training import checkpoints, step_size
from vtok.training.checkpoints import KEPT as KEPT
from vtok.training.checkpoints import consolidate as consolidate
from vtok.training.checkpoints import describe as describe
from vtok.training.checkpoints import discard as discard
from vtok.training.checkpoints import mark_best as mark_best
from vtok.training.checkpoints import model_weights as model_weights
from vtok.training.checkpoints import publish as publish
from vtok.training.zero_shards import TAG as TAG
from vtok.training.zero_shards import CheckpointError, fill, same_groups

STRATEGIES = (
    "auto", "ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3", "deepspeed_2_offload", "deepspeed_3_offload",
)  # fmt: skip


def stage_of(name: str) -> int:
    """ZeRO stage of a `trainer.strategy`: 1 to 3, 0 for the others. Raises ValueError for an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"trainer.strategy={name!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    return int(name.split("_")[1]) if name.startswith("deepspeed") else 0


# What of DeepSpeed's configuration has a key of vtok's, and where: a second value would be another truth beside it.
SAID_ELSEWHERE = {
    "train_batch_size": "data.batch_size and trainer.accumulate",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate",
    "gradient_clipping": "optim.clip_grad_norm",
    "zero_optimization.stage": "trainer.strategy (deepspeed_1, deepspeed_2, deepspeed_3)",
    "optimizer": "optim.lr, optim.betas and optim.weight_decay (AdamW)",
    "scheduler": "optim.schedule, optim.warmup_steps and optim.min_lr_ratio",
}


def check_deepspeed(config: RunConfig) -> None:
    """Raises ValueError for what `trainer.deepspeed` says beside the key that says it for every strategy."""
    for key, instead in SAID_ELSEWHERE.items():
        value: Any = config.trainer.deepspeed
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            raise ValueError(f"trainer.deepspeed.{key}={value!r}: set {instead} instead")


def batch_line(config: RunConfig) -> str:
    """How many clips a step learns from, and how that comes about."""
    key, sizes = step_size.batch_sizes(config)
    return (
        f"a step learns from {step_size.words(step_size.clips_of_a_step(config))} clips: {step_size.words(sizes)} "
        f"({key}) x {step_size.processes(config)} process(es) x {config.trainer.accumulate} (trainer.accumulate)"
    )


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
    world = step_size.processes(config)
    if trainer.strategy == "fsdp":
        return Sharded(data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False)
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

        def setup(self, trainer: Any) -> None:
            super().setup(trainer)
            if self.is_global_zero:  # complete only now: precision and accumulation are the trainer's
                path = config.run_dir / "deepspeed.json"
                path.write_text(json.dumps(self.config, indent=1, sort_keys=True, default=str) + "\n")
                print(f"DeepSpeed, as in {path}: {json.dumps(self.config, sort_keys=True, default=str)}")

        def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            """As the parent's; a shard that cannot be written is kept as the IO's `failure`, and all ranks meet."""
            io, path = self.checkpoint_io, Path(self.broadcast(str(filepath)))
            assert isinstance(io, AtomicCheckpointIO)
            engine, own = self.deepspeed_engine, ("state_dict", "optimizer_states")
            with io.keeping():
                if self.is_global_zero:
                    (path / TAG).mkdir(parents=True, exist_ok=True)
                    (path / "latest").write_text(TAG)  # by DeepSpeed one rank alone would fail at it, after all else
            writes = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
            for owner, name in writes:
                setattr(owner, name, _inside(io.keeping, getattr(owner, name)))
            try:
                state = {k: v for k, v in checkpoint.items() if k not in own}
                frozen = self.exclude_frozen_parameters
                engine.save_checkpoint(
                    path, tag=TAG, client_state=state, save_latest=False, exclude_frozen_parameters=frozen
                )
            finally:
                for owner, name in writes:
                    delattr(owner, name)

        def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            path = Path(self.broadcast(str(checkpoint_path)))
            verify(path)
            if goes_on(describe(path), config) and same_groups(path, self.deepspeed_engine):
                optimizer: Any = self.deepspeed_engine.optimizer
                groups = optimizer.param_groups
                now = [{k: v for k, v in group.items() if k != "params"} for group in groups]
                state = super().load_checkpoint(path)
                # the engine puts back the settings of then: what `optim.` says now would not take effect
                for group, settings in zip(optimizer.param_groups, now, strict=True):
                    group.update(settings)
                return state
            whole = checkpoints.read(path)
            fill(self.deepspeed_engine, whole.pop("state_dict"), checkpoints.moments_of(whole) or {})
            return {k: v for k, v in whole.items() if k not in ("moments", "optimizer_states", "optimizer_names")}

    engine = Engine(
        stage=stage,
        logging_batch_size_per_gpu=config.data.batch_size,
        exclude_frozen_parameters=not frozen_model,
    )
    assert isinstance(engine.config, dict)
    engine.config["gradient_clipping"] = config.optim.clip_grad_norm
    if config.trainer.strategy.endswith("_offload"):
        pinned = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        parts = ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",)
        engine.config["zero_optimization"] |= {part: dict(pinned) for part in parts}
        # torch's fused AdamW runs on CPUs; DeepSpeed's own would be compiled at the first use, and knows no idle groups
        engine.config["zero_force_ds_cpu_optimizer"] = False
    _merge(engine.config, config.trainer.deepspeed)
    return engine


def _inside(context: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **keywords: Any) -> Any:
        with context():
            return function(*args, **keywords)

    return wrapped


class Sharded(ModelParallelStrategy):
    """PyTorch's own sharding (`fully_shard`): each rank holds its part of weights, gradients and moments between steps.

    Model and objective are one unit, gathered whole for a step: parts of a family may be read by whoever likes, as
    under DDP. What lies between the forward and the backward pass is not smaller than there; ZeRO-3 is for models whose
    weights alone are too large. Checkpoints are one file, as those of DDP.
    """

    def setup(self, trainer: Any) -> None:  # the parent's, with the module sharded here and not by a hook of its own
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
        for method in ("training_step", "measure", "pictures", "answers"):  # what the run calls in place of `forward`
            register_fsdp_forward_method(self.model, method)
        self.barrier()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole, on the first rank, numbered as any optimizer's."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper, or what it wraps
        groups = optimizer.state_dict()["param_groups"]
        state: dict[int, Any] = {}
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if parameter in optimizer.state:
                state[index] = {name: _gathered(value) for name, value in optimizer.state[parameter].items()}
        return {"state": state if self.is_global_zero else {}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        verify(path)
        whole = checkpoints.read(path)
        module, moments = self.lightning_module, checkpoints.moments_of(whole) or {}
        assert module is not None
        state = whole.pop("state_dict")
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            module.load_state_dict({n: _scattered(v, parameters.get(n)) for n, v in state.items()})
            optimizer = self.optimizers[0]
            for name, kept in moments.items():
                parameter = parameters[name]
                steps = torch.tensor(float(kept["step"]))
                optimizer.state[parameter] = {
                    "step": steps.to(parameter.device) if optimizer.defaults["fused"] else steps,
                    **{key: _scattered(kept[key].to(parameter.dtype), parameter) for key in checkpoints.MOMENTS},
                }
        return whole


def _gathered(value: Any) -> Any:
    """A tensor whole, in host memory."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def _scattered(value: Tensor, like: Any) -> Tensor:
    """A whole tensor, which every rank has, split as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def local(gradients: list[Tensor]) -> list[Tensor]:
    """This rank's parts of gradients that are sharded; others as they are."""
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def joint_norms(strategy: Any, norms: Tensor) -> Tensor:
    """Euclidean norms of whole gradients from those of this rank's parts, where they are sharded."""
    if not isinstance(strategy, Sharded):
        return norms
    squares = norms.double().square()
    torch.distributed.all_reduce(squares)
    return squares.sqrt().to(norms.dtype)


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


def in_step(strategy: Any) -> bool:
    """Whether a forward pass takes every rank: parameters are sharded, and gathered for it."""
    return is_deepspeed(strategy) or isinstance(strategy, Sharded)


def call(trainer: Any, method: str, *args: Any) -> Any:
    """`method` of the LightningModule, run as a forward of the engine where parameters are sharded (ZeRO-3).

    ZeRO-3 gathers a module's own parameters only while its engine is inside `forward`.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if is_deepspeed(strategy):
        return strategy._forward_redirection(strategy.model, module, method, *args)
    result = getattr(module, method)(*args)
    if isinstance(strategy, Sharded):  # after a forward pass alone the unit would stay whole
        module.reshard()
    return result


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
    """Checkpoint files that are whole on disk before the call returns, and that load without unpickling code.

    A file that could not be written is kept as `failure`, for `save` to tell on every rank: one rank that raises alone
    would leave the others waiting.
    """

    failure: Exception | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, a file that cannot be written becomes the `failure`."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch tells of a full disk as a RuntimeError
            self.failure = error

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with self.keeping():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(path)
        verify(path)
        return checkpoints.read(path)


def save(trainer: Any, folder: Path, names: list[str], *, about: dict[str, Any], keep: int = 2) -> None:
    """Writes a checkpoint on all ranks together and publishes it (`vtok.training.checkpoints.publish`) under `names`.

    Raises: CheckpointError, on every rank, where it could not be written: the checkpoints of before are untouched.
    """
    written, first = folder / ".writing", trainer.is_global_zero
    if first:
        folder.mkdir(exist_ok=True)
        discard(written)
    trainer.strategy.barrier("before saving")
    trainer.save_checkpoint(written)
    io = trainer.strategy.checkpoint_io
    failure, io.failure = io.failure, None
    told = [failure and str(failure).splitlines()[0]]
    if trainer.world_size > 1:  # any of them may have had a shard to write
        told *= trainer.world_size
        torch.distributed.all_gather_object(told, told[0])
    problem = next((each for each in told if each), "")
    if first:
        try:
            if not problem:
                publish(written, names, about=about, keep=keep)
        except OSError as error:
            problem = str(error).splitlines()[0]
        if problem:
            with suppress(OSError):
                discard(written)
    problem = trainer.strategy.broadcast(problem)
    if problem:
        kept = folder / checkpoints.LAST
        kept = f"{kept} (step {describe(kept)['step']}) is as it was" if kept.exists() else "there is none from before"
        raise CheckpointError(
            f"the checkpoint of step {about['step']} could not be written: {problem}. {kept}; make room under {folder} "
            "and give the same command again"
        )


def verify(path: Path) -> None:
    """`vtok.training.checkpoints.verify` by the first rank for all of them; every rank raises what it finds."""
    together = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    problem = [""]
    if not together or torch.distributed.get_rank() == 0:
        try:
            checkpoints.verify(path)
        except (CheckpointError, OSError) as error:
            problem = [str(error)]
    if together:
        torch.distributed.broadcast_object_list(problem)
    if problem[0]:
        raise CheckpointError(problem[0])


def goes_on(about: dict[str, Any], config: RunConfig) -> bool:
    """Whether a checkpoint was written by the strategy and number of processes that `config` asks for.

    DeepSpeed goes on from no other shards; everything else passes through `vtok.training.checkpoints.read`.
    """
    return about["strategy"] == config.trainer.strategy and about["world_size"] == step_size.processes(config)
