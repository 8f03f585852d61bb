"""A training step without its numbers: shapes, operations and memory of a model of any size, on any machine.

    small integers, lengths, masks, ids  real     they decide shapes and branches
    parameters, videos, all made of them fake     shape, dtype and device alone, no memory, no arithmetic

`DryRun` keeps the two apart, op by op. Where a branch or a shape hangs on a fake number (a cut at the least alike
frames, an argmax), random numbers stand in for it: the count of operations is then that of a typical batch.
`measure` runs a step, dry or real, and says what it computes and holds.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from vtok.metrics.operations import Operations

aten = torch.ops.aten
SMALL = 1 << 20  # elements: above it a new float tensor is fake, and a fake one has no stand-in
FOLLOWED = 1 << 16  # elements up to which stand-ins are computed on, where no gradients are asked: k-means, cuts


class _Fake(FakeTensorMode):
    """Asks once whether there is a GPU; torch asks the driver at every operation, which took a quarter of the time."""

    @functools.cached_property
    def avoid_device_init(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return super().avoid_device_init


class DryRun(TorchDispatchMode):
    """While active, tensors made of fake ones are fake; what has no fake part is computed.

    Small parts (statistics, tables, everything with integers) stay real, so that code may branch on them. Loops without
    gradients that run until small tensors rest (k-means) run on random numbers, as often as for those.
    """

    def __init__(self, *, seed: int = 0):
        super().__init__()
        self.fake = _Fake(allow_non_fake_inputs=True)
        self._generator = torch.Generator().manual_seed(seed)
        self._real = WeakIdKeyDictionary()  # stand-ins
        self.guessed = False  # whether a stand-in was needed: set it back before what is to be asked about
        self._made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._patched = contextlib.ExitStack()

    def __enter__(self) -> Any:
        self._patched.enter_context(_moved_in_place())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.close()

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A fake tensor."""
        with self.fake:
            return torch.empty(shape, dtype=dtype)

    def empty_module(self, module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Every parameter of the module made fake, in place, in `dtype` where one is given; tensors that several
        modules share stay shared, over calls too."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                kind = parameter.dtype if dtype is None or not parameter.is_floating_point() else dtype
                if isinstance(parameter, FakeTensor) and parameter.dtype == kind:
                    continue
                if id(parameter) not in self._made:
                    fake = self.empty(*parameter.shape, dtype=kind)
                    made = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                    self._made[id(parameter)] = parameter, made  # the first is kept: no other may take its place
                part._parameters[name] = self._made[id(parameter)][1]
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        fakes = [x for x in tensors if isinstance(x, FakeTensor)]
        if not tensors:
            with self.fake:
                shape = func(*args, **kwargs)
            if isinstance(shape, Tensor) and shape.is_floating_point() and shape.numel() > SMALL:
                return shape
            return func(*args, **kwargs)
        if not fakes:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return func(self._stand_in(fakes[0]))
        if func._schema.is_mutable and not self._writes_fake(func, args, kwargs):
            return func(*self._with_numbers(args), **self._with_numbers(kwargs))
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], self._places(args[1]), *args[2:])
        if torch.Tag.dynamic_output_shape in func.tags and func is not aten.index.Tensor:
            return func(*self._with_numbers(args), **self._with_numbers(kwargs))
        with self.fake:
            out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        counts = any(not x.is_floating_point() and not x.is_complex() for x in made)
        if counts and not func._schema.is_mutable and all(x.numel() <= SMALL for x in fakes):
            known = func(*self._with_numbers(args), **self._with_numbers(kwargs))
            return _whole_numbers(known, out)
        small = all(x.numel() <= FOLLOWED for x in (*fakes, *made))
        in_backward = torch._C._current_graph_task_id() != -1
        if small and not torch.is_grad_enabled() and not in_backward:
            known = func(*self._with_numbers(args), **self._with_numbers(kwargs))
            for fake, value in zip(tree_leaves(out), tree_leaves(known)):
                if isinstance(fake, FakeTensor):
                    self._real[fake] = value
        return out

    def _stand_in(self, fake: FakeTensor) -> Tensor:
        if fake not in self._real:
            self.guessed = True
            if fake.numel() > SMALL:
                raise ValueError(f"a branch or a shape hangs on {fake.numel()} numbers that a dry run does not compute")
            if fake.is_floating_point():
                value = torch.rand(fake.shape, generator=self._generator).to(fake.dtype)
            else:
                value = torch.zeros(fake.shape, dtype=fake.dtype)
            self._real[fake] = value
        return self._real[fake]

    def _with_numbers(self, value: Any) -> Any:
        return tree_map_only(FakeTensor, self._stand_in, value)

    @staticmethod
    def _writes_fake(func: Any, args: Any, kwargs: Any) -> bool:
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        named = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        return all(isinstance(x, FakeTensor) for name in written for x in tree_leaves(named.get(name)) if x is not None)

    def _places(self, indices: Any) -> list[Any]:
        """Masks as the places they are true at: how many there are is known only of real ones."""
        out: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                real = self._stand_in(index) if isinstance(index, FakeTensor) else index
                out += real.nonzero(as_tuple=True)
            else:
                out.append(index)
        return out


@contextlib.contextmanager
def _moved_in_place() -> Iterator[None]:
    """While active, `Module.to` and its like give fake parameters other data, as they do real ones.

    torch would swap a fake parameter with another, which fails as soon as anything refers to it weakly: fake tensors
    that were made of it do.
    """
    original = nn.Module._apply

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)
        fakes = {name: value for name, value in self._parameters.items() if isinstance(value, FakeTensor)}
        for parameter in fakes.values():
            with torch.no_grad():
                moved = fn(parameter)
                gradient = None if parameter.grad is None else fn(parameter.grad)
            if moved is not parameter:
                parameter.grad = None
                parameter.data, parameter.grad = moved, gradient
        self._parameters.update(dict.fromkeys(fakes))
        try:
            return original(self, fn, recurse=False)
        finally:
            self._parameters.update(fakes)

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = original


def _whole_numbers(known: Any, out: Any) -> Any:
    """`out` with every tensor that holds no floats replaced by the real one."""
    if isinstance(out, Tensor):
        return known if not out.is_floating_point() else out
    if isinstance(out, (list, tuple)):
        pairs = [_whole_numbers(a, b) for a, b in zip(known, out)]
        return type(out)(pairs) if type(out) in (list, tuple) else type(out)(*pairs)
    return out


class Live(TorchDispatchMode):
    """Bytes of the storages that were made while it was active and are still held: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.trace: list[int] | None = None  # `now` after each thing that is made, where it is asked for
        self._known: dict[int, Any] = {}
        self._sizes: dict[int, int] = {}

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Storages that were there before are not counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage, self._release(storage._cdata, 0))
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known[key], self._sizes[key] = weakref.ref(storage, self._release(key, size)), size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    if self.trace is not None:
                        self.trace.append(self.now)
        return out

    def held(self) -> dict[int, tuple[Any, int]]:
        """Storages that are held now: (reference, bytes)."""
        return {key: (ref, self._sizes[key]) for key, ref in self._known.items() if self._sizes[key]}

    def still(self, before: dict[int, tuple[Any, int]]) -> int:
        """Bytes of those of `before` that are held still: tables that the code keeps for the next step."""
        return sum(size for key, (ref, size) in before.items() if self._known.get(key) is ref)

    def _release(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.now -= size

        return gone


@dataclass(frozen=True)
class Cost:
    """Of one forward and backward pass. flops: a multiply-add is two; products of matrices, convolutions and attention
    are counted. held_bytes: activations held when the backward pass begins. peak_bytes: activations, temporaries and
    gradients together, at the worst moment. Tables that are made once and kept (masks) are in neither."""

    forward_flops: int
    backward_flops: int
    held_bytes: int
    peak_bytes: int


class Watch:
    """Counts the operations of some functions apart, by name: `flops`.

    counter, live: of the step that is measured, while its forward pass runs; else None.
    """

    def __init__(self) -> None:
        self.counter: Operations | None = None
        self.live: Live | None = None
        self.flops: dict[str, int] = {}

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted while a step is measured."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = self.counter.get_total_flops() if self.counter else 0
            out = function(*args, **kwargs)
            if self.counter:
                self.flops[name] = self.flops.get(name, 0) + self.counter.get_total_flops() - before
            return out

        return counted


def measure(step: Callable[[], Tensor], *, held: Iterable[Tensor], watch: Watch | None = None) -> Cost:
    """What one step costs: `step` gives the loss, and its backward pass is run. Real tensors or those of a `DryRun`.

    Args:
        held: parameters, buffers and inputs: what is there before the step and is not counted.
    """
    live = Live()
    live.forget(held)
    with live, Operations() as counter:
        if watch is not None:
            watch.counter, watch.live = counter, live
        loss = step()
        gc.collect()  # what only circles of Python objects still hold is not held by a step that goes on
        forward, activations, begun = counter.get_total_flops(), live.now, live.held()
        if watch is not None:
            watch.counter = watch.live = None
        loss.backward()
        del loss
    gc.collect()
    kept = live.still(begun)
    return Cost(forward, counter.get_total_flops() - forward, activations - kept, live.peak - kept)


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """The trainer's precision, on tensors of the CPU: autocast where it is a mixed one."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    with torch.autocast("cpu", dtype=kinds[name]) if name in kinds else contextlib.nullcontext():
        yield
