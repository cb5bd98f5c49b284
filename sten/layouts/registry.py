"""The registered layouts by class name, and a layout as name and fields, as in files."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sten.layouts.base import Layout

REGISTERED: dict[str, type[Layout]] = {}


def register(cls: type[Layout]) -> None:
    """Register a layout by its class name; TypeError if another class has that name."""
    known = REGISTERED.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(
            f"Expected a new name for a layout, got {cls.__name__!r}, which {known.__module__} has registered; choose "
            "another name."
        )
    REGISTERED[cls.__name__] = cls


def fields(layout: Layout) -> dict[str, int | float | bool | tuple]:
    """The dataclass fields of a layout, as JSON can hold them (tuples become lists there)."""
    return {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}


def layout_from(name: str, values: dict) -> Layout:
    """Make a registered layout from its class name and fields; ValueError where name or fields do not fit."""
    cls = REGISTERED.get(name)
    if cls is None:
        known = ", ".join(sorted(REGISTERED))
        raise ValueError(f"Expected a registered layout ({known}), got {name!r}; import the module that defines it.")
    names = {f.name for f in dataclasses.fields(cls)}
    if set(values) != names:
        raise ValueError(f"Expected the fields {sorted(names)} for layout {name}, got {sorted(values)}.")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        raise ValueError(f"Expected fields that layout {name} accepts, got {plain}: {error}.") from None
