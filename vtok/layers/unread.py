"""Settings that nothing reads, refused by name: whoever set one expects it to do something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any


def refuse_unread(config: Any, unread: Iterable[tuple[str, str]], *, where: str = "model") -> None:
    """Settings away from their defaults, of those that nothing reads as the others are.

    Args:
        config: a dataclass, with others in it. unread: (setting or node of settings, what would read it).
        where: what the configuration is called in a yaml.
    Raises: ValueError naming the first one, its value and what would read it.
    """
    for key, reader in unread:
        for name, value, usual in _changed(key, getattr(config, key), _usual(_field(config, key))):
            raise ValueError(
                f"{where}.{name}={value!r} is read by nothing here: it is of {reader}; leave it out, or where a preset "
                f"says it, {where}.{name}={_as_override(usual)}"
            )


def _field(config: Any, key: str) -> Field[Any]:
    return next(each for each in fields(config) if each.name == key)


def _usual(of: Field[Any]) -> Any:
    if of.default is not MISSING:
        return of.default
    assert of.default_factory is not MISSING, f"{of.name} has no default, so it is always read"
    return of.default_factory()


def _as_override(usual: Any) -> str:
    """A default as one writes it behind `key=`."""
    words = {None: "null", True: "true", False: "false", "": "''"}
    return words[usual] if isinstance(usual, bool | str | None) and usual in words else str(usual)


def _changed(name: str, value: Any, usual: Any) -> Iterator[tuple[str, Any, Any]]:
    """The settings in `value` that are not those of `usual`, by their full names, with both."""
    if is_dataclass(usual) and type(value) is type(usual):
        for each in fields(usual):
            yield from _changed(f"{name}.{each.name}", getattr(value, each.name), getattr(usual, each.name))
    elif value != usual:
        yield name, value, usual
