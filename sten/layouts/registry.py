"""The registered layouts by class name, and a layout as name and fields, as in files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sten.layouts.base import Layout

GROUP = "sten.layouts"  # of entry points: `Bitmask = "sten_bitmask:Bitmask"`
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


def _declared(name: str) -> type[Layout] | None:
    """The layout that an installed distribution declares under this name, in its entry points of GROUP.

    What is imported is what that distribution says, not what a file says.
    """
    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"Expected {entry.value} to be importable, which an installed package declares for layout {name!r}, "
                f"got {type(error).__name__}: {error}; repair that package."
            ) from error
    return REGISTERED.get(name)


def fields(layout: Layout) -> dict[str, int | float | bool | tuple]:
    """The dataclass fields of a layout, as JSON can hold them (tuples become lists there)."""
    return {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}


def layout_from(name: str, values: dict) -> Layout:
    """Make a registered layout from its class name and fields; ValueError where name or fields do not fit."""
    cls = REGISTERED.get(name) or _declared(name)
    if cls is None:
        known = ", ".join(sorted(REGISTERED))
        raise ValueError(
            f"Expected a registered layout ({known}), got {name[:200]!r}; import the module that defines it, "
            "or install the package that declares it."
        )
    names = {f.name for f in dataclasses.fields(cls)}
    if set(values) != names:
        raise ValueError(f"Expected the fields {sorted(names)} for layout {name}, got {sorted(values)}.")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**plain)
    except TypeError as error:
        raise ValueError(f"Expected fields that layout {name} accepts, got {plain}: {error}.") from None
