"""Weights of one model taken over by another, tensor by tensor, with nothing left out in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

SHOWN = 8  # tensors that an error names


def take_all(model: nn.Module, given: Mapping[str, Tensor], *, new: Iterable[str] = ()) -> list[str]:
    """Load `given` into `model`: every tensor of either must be in both and of one shape.

    new: prefixes of `model`'s tensors that the source does not know, and that begin as they are.
    Returns: their names.
    Raises: ValueError naming the tensors that differ, with both shapes; nothing is loaded then.
    """
    own, added = model.state_dict(), tuple(new)
    begun = [name for name in own if added and name.startswith(added) and name not in given]
    check_fit({name: value for name, value in own.items() if name not in begun}, given)
    model.load_state_dict(dict(given), strict=False)
    return begun


def check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the tensors that are not in both, or of another shape."""
    if wrong := differing(own, given):
        told = "; ".join(f"{name} {_shape(own, name)} here, {_shape(given, name)} there" for name in wrong[:SHOWN])
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"init_from does not fit model.*: {len(wrong)} tensors differ: {told}{more}")


def differing(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Names that are in one alone, or whose shapes differ: those of `own` in its order, then those of `given`."""
    return [
        name
        for name in dict.fromkeys([*own, *given])
        if name not in own or name not in given or own[name].shape != given[name].shape
    ]


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "none"
