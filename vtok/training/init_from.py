"""`init_from`: a run begins with the weights of another model, all of them but for exceptions that are named.

    source --warm_start (strict)--> our model, at the source's resolution, frames, quantizer ... --resized--> our model

Strict: every tensor of either model is in both and has one shape, but for what a family's own stages add (a compressor
on the projector of stage 0, ids in a continuous tokenizer), which is told too. `init_allow` names what may differ
besides. For these the family's model is built once more as the source was, takes the source's weights strictly, and
what then differs from ours differs because of the exceptions alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.layers.taking import check_fit, differing
from vtok.loading import load

# exception -> the keys under model. that it lets differ
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "resolution": ("size",),
    "frames": ("num_frames", "blocks"),
    "quantizer": ("quantizer",),
    "tower": ("tower", "in_dim"),
    "llm": ("embedding_dim", "embedding_rms"),
}
_EXCEPTED = {key for keys in EXCEPTIONS.values() for key in keys}
# tensors that say one thing together: none of them is taken where one does not fit
TOGETHER = ("quantizer.", "code.")


@dataclass
class Begun:
    """What became of the tensors of a model that began with another's; `lines` says it.

    done: in the family's words. resized: name -> (shape there, shape here). new: name -> (shape there or None, shape
    here), begun anew. left_out: of the source, without a place here. changed: key under model. -> (there, here).
    """

    source: str
    done: str
    taken: int
    resized: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    new: dict[str, tuple[list[int] | None, list[int]]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For the log: one for the whole, one for each tensor that is not as it was and each key that changed."""
        kept = f" ({self.taken} tensors as they were)" if self.taken else ""  # none by its name: `done` says which
        out = [f"init_from={self.source}: {self.done}{kept}"]
        out += [f"  resized    {name}: {there} -> {here}" for name, (there, here) in self.resized.items()]
        out += [f"  begun anew {name}: {there or 'none'} -> {here}" for name, (there, here) in self.new.items()]
        out += [f"  left out   {name}: {there}" for name, there in self.left_out.items()]
        out += [f"  changed    model.{key}: {there!r} -> {here!r}" for key, (there, here) in self.changed.items()]
        return out


def check_allowed(init_from: str, allow: Sequence[str]) -> None:
    """Raises ValueError for exceptions that there are none of, or without anything to begin from."""
    unknown = [name for name in allow if name not in EXCEPTIONS]
    if unknown:
        raise ValueError(f"init_allow={list(allow)}: {unknown} unknown; choose from {', '.join(EXCEPTIONS)}")
    if allow and not init_from:
        raise ValueError(f"init_allow={list(allow)} has no effect without init_from")


def begin_from(model: nn.Module, init_from: str, *, allow: Sequence[str] = ()) -> Begun:
    """Load the weights of `init_from` into a fresh `model`, in place.

    Args:
        init_from: export folder, or Hub repository `user/name` or `user/name@revision`.
        allow: names of EXCEPTIONS.
    Raises: ValueError naming tensors and fix where the source does not fit, where an exception is not needed, and where
        those given are not enough; ExportError for what cannot be loaded.
    """
    source = load(init_from)
    told = f"{init_from} ({source.shipped.model_id})"
    try:
        return _begin(model, source, told=told, allow=allow)
    except ValueError as error:
        raise ValueError(f"init_from={init_from!r}: {error}{_advice(model, source, allow)}") from error


def _begin(model: Any, source: Any, *, told: str, allow: Sequence[str]) -> Begun:
    changed = _changed(model, source)
    _check_quantizer(model, source, allow)
    if not allow:
        return Begun(told, _take(model, source), taken=_shared(model, source), changed=changed)
    anew = _needed(model, source, allow)
    with torch.random.fork_rng(devices=[]):
        old = _as_source(model, source, allow)
        done = _take(old, source)
    begun = Begun(told, done, taken=0, changed=changed)
    _resize(model, old, begun, anew)
    begun.taken = _shared(model, source)
    if hasattr(model, "go_on_as"):
        begun.done += model.go_on_as(old) or ""
    return begun


def _take(model: Any, source: Any) -> str:
    """The family's own way to begin with another model, or all weights."""
    if hasattr(model, "warm_start"):
        return model.warm_start(source)
    check_fit(model.state_dict(), source.state_dict())
    model.load_state_dict(source.state_dict(), strict=True)
    return "all weights"


def _shared(model: nn.Module, source: nn.Module) -> int:
    """How many tensors of the model are the source's of that name."""
    given = source.state_dict()
    return sum(n in given and torch.equal(v, given[n]) for n, v in model.state_dict().items())


def _resize(model: nn.Module, old: nn.Module, begun: Begun, anew: set[str]) -> None:
    """Give `model` the tensors of `old`, which is the same but for the exceptions. anew: those not to take."""
    own, given = model.state_dict(), old.state_dict()
    unlike = set(differing(own, given))
    apart = tuple(group for group in TOGETHER if any(name.startswith(group) for name in unlike | anew))
    result: dict[str, Tensor] = {}
    for name, value in own.items():
        there = given.get(name)
        shape = None if there is None else list(there.shape)
        if name not in unlike and name not in anew and not name.startswith(apart):
            assert there is not None
            result[name] = there
            continue
        stretched = None if there is None or name in anew or name.startswith(apart) else _resized(model, name, there)
        if stretched is None:
            begun.new[name] = shape, list(value.shape)
        else:
            result[name] = stretched
            begun.resized[name] = list(there.shape) if there is not None else [], list(value.shape)
    begun.left_out = {name: list(value.shape) for name, value in given.items() if name not in own}
    model.load_state_dict({**own, **result}, strict=True)


def _resized(model: nn.Module, name: str, given: Tensor) -> Tensor | None:
    """`given` in the shape of the model's tensor `name`, by the innermost module that knows how; None: none does."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner: Any = model.get_submodule(".".join(parts[:depth]))
        if hasattr(owner, "resized"):
            return owner.resized(".".join(parts[depth:]), given)
    return None


# which exceptions there is reason for


def _keys(model: Any, source: Any, name: str) -> list[str]:
    """The keys of an exception that both configurations have, with different values."""
    ours, theirs = model.config, source.config
    both = [key for key in EXCEPTIONS[name] if hasattr(ours, key) and hasattr(theirs, key)]
    return [key for key in both if getattr(ours, key) != getattr(theirs, key)]


def _as_source(model: Any, source: Any, allow: Sequence[str]) -> Any:
    """A model like `model`, with the source's values of the keys that the exceptions let differ."""
    values = {f.name: copy.deepcopy(getattr(model.config, f.name)) for f in fields(model.config)}
    for name in allow:
        values |= {key: copy.deepcopy(getattr(source.config, key)) for key in _keys(model, source, name)}
    return type(model)(type(model.config)(**values))


def _needed(model: Any, source: Any, allow: Sequence[str]) -> set[str]:
    """Raises ValueError for an exception without which everything would fit. Returns tensors that begin anew although
    their shapes are the same: ids of another quantizer, what reads another tower."""
    anew: set[str] = set()
    with torch.random.fork_rng(devices=[]):
        whole = _as_source(model, source, allow).state_dict()
        for name in allow:
            keys = _keys(model, source, name)
            where = ", ".join(f"model.{key}" for key in EXCEPTIONS[name] if hasattr(model.config, key))
            if not keys:
                why = f"{where} {'is' if ',' not in where else 'are'} the source's" if where else "this family has none"
                raise ValueError(f"init_allow: {name} is not needed, {why}: leave it out")
            if name == "quantizer" and _inserts_ids(model, source):
                raise ValueError(
                    "init_allow: quantizer is not needed, ids go behind the latents of the continuous source without "
                    "it: leave it out"
                )
            own = model.state_dict()
            if name == "quantizer" and _ids(model) != _ids(source):
                anew |= {tensor for tensor in own if tensor.startswith("quantizer.")}
                continue
            if name == "tower" and "tower" in keys:
                anew |= _reading(model, "in_dim")
                continue
            rest = [other for other in allow if other != name]
            if not differing(_as_source(model, source, rest).state_dict(), whole):
                told = " and ".join(f"model.{key}" for key in keys)
                raise ValueError(f"init_allow: {name} is not needed, no tensor depends on {told}: leave it out")
    return anew


def _reading(model: Any, key: str) -> set[str]:
    """Names of the tensors whose shapes follow a width of the configuration."""
    values = {f.name: copy.deepcopy(getattr(model.config, f.name)) for f in fields(model.config)}
    values[key] += 1
    return set(differing(model.state_dict(), type(model)(type(model.config)(**values)).state_dict()))


def _inserts_ids(model: Any, source: Any) -> bool:
    """Whether the family puts ids behind the source's latents, as one of its stages."""
    return hasattr(model, "inserts_ids") and model.inserts_ids(source)


def _ids(model: Any) -> tuple[Any, ...]:
    quantizer = getattr(model.config, "quantizer", None)
    return (getattr(quantizer, "name", None), tuple(getattr(model, "codebook_sizes", ())))


def _check_quantizer(model: Any, source: Any, allow: Sequence[str]) -> None:
    """Raises ValueError where all tensors may fit and ids would mean something else. From latents without ids a family
    knows the way itself, or does not fit."""
    if "quantizer" in allow or not getattr(source, "codebook_sizes", ()) or type(model) is not type(source):
        return
    ours, theirs = _ids(model), _ids(source)
    if ours != theirs:
        raise ValueError(
            f"model.quantizer is {ours[0]} with ids of {list(ours[1])}, the source's {theirs[0]} with {list(theirs[1])}"
        )


def _changed(model: Any, source: Any) -> dict[str, tuple[Any, Any]]:
    """Keys under model. whose values differ, nested ones with dots; of another family, those of exceptions alone."""
    ours, theirs = (_flat(each.config) for each in (model, source))
    if type(model) is not type(source):
        ours = {key: value for key, value in ours.items() if key in theirs and key.partition(".")[0] in _EXCEPTED}
    return {key: (theirs.get(key), ours[key]) for key in ours if ours[key] != theirs.get(key)}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        out.update(_flat(value, f"{key}.") if is_dataclass(value) else {key: value})
    return out


def _advice(model: Any, source: Any, allow: Sequence[str]) -> str:
    """What would help a source that does not fit: exceptions that there is reason for, keys to put back."""
    no_need = {*allow, *(["quantizer"] if _inserts_ids(model, source) else [])}
    open_ = {name: _keys(model, source, name) for name in EXCEPTIONS if name not in no_need}
    open_ = {name: keys for name, keys in open_.items() if keys}
    out = ""
    if open_:
        keys = ", ".join(f"model.{key}" for each in open_.values() for key in each)
        out += f". {keys} differ{'s' if ',' not in keys else ''}: init_allow=[{','.join([*allow, *open_])}] lets "
        out += f"{'it' if ',' not in keys else 'them'}, or put the source's value{'s' * (',' in keys)} back"
    other = {k: pair for k, pair in _changed(model, source).items() if k.partition(".")[0] not in _EXCEPTED}
    if other:
        told = "; ".join(f"model.{key} was {there!r} and is {here!r}" for key, (there, here) in other.items())
        back = " ".join(f"model.{key}={there}" for key, (there, _) in other.items())
        out += f". No exception is for {told}: put {back} back"
    return out
