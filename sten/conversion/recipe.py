"""Recipe: sparsify's declarative arguments as one value that can be written to JSON, and the record of those applied.

JSON                                              from
{"name": "NM", "fields": {"n": 2, "m": 4}}        a layout, a method, an allocation or a schedule
[["*.mlp.*", {...}], ["*", null]]                 a dictionary of layouts, in its order
"*.mlp.*"                                         a pattern
{"type": "torch.nn.modules.linear.Linear"}        a type of modules; it is looked up among imported modules
{"not_json": "<function ...>"}                    in a record only: a function or a module, in words
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import FormatError
from ..layouts.base import Layout
from ..layouts.registry import layout_from
from ..markup import facts
from ..sparsifiers import Magnitude, Sparsifier
from ..sparsifiers.activation import ActivationMethod
from ..sparsifiers.allocation import Allocation, allocation
from ..sparsifiers.schedule import Schedule
from .arguments import (
    Layouts,
    Modules,
    Weights,
    expect_layouts,
    expect_site,
    expect_sparsifier,
    requested_weights,
    subclasses,
)

VERSION = 2  # 1 is without `site` and `modules`, and of recipes for weights still written
DEFAULT = Magnitude()  # the same object in every signature, so that another one is seen to be given
RECORDS = "_sten_recipes"  # on the model that sparsify was called on: a list of records


@dataclass(frozen=True)
class Recipe:
    """What `sten.sparsify` does, without the model: its declarative arguments, with the same meaning and defaults.

    `sten.sparsify(model, recipe, optimizer=opt)` is `sten.sparsify(model, layout, sparsifier, sparsity, weights, opt)`,
    and so are `site` and `modules`. Objects of a run (optimizer, calibration batches) are no part of it.

    Raises:
        ValueError, TypeError: what sparsify raises for such arguments.

    Example:
        >>> import torch, sten
        >>> recipe = sten.Recipe(sten.NM(2, 4), weights="0")
        >>> recipe == sten.Recipe.from_json(recipe.to_json())
        True
        >>> model = sten.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), recipe)
        >>> model[0].weight.density, type(model[1].weight).__name__
        (0.5, 'Parameter')
        >>> inputs = sten.Recipe(sten.FanIn(), sten.TopK(0.5), site="input", modules=["*.o_proj", "*.down_proj"])
        >>> sten.Recipe.from_json(inputs.to_json()) == inputs
        True
    """

    layout: Layouts | None = None
    sparsifier: Sparsifier | ActivationMethod | None = DEFAULT
    sparsity: float | Allocation | None = None
    weights: Weights = None
    site: str = "weight"
    modules: Modules = None

    def __post_init__(self) -> None:
        for name in ("weights", "modules"):
            given = getattr(self, name)
            if isinstance(given, Iterable) and not isinstance(given, (str, nn.Module, tuple)):
                object.__setattr__(self, name, list(given))  # an iterator could be read only once
        if self.site != "weight":
            others = {"sparsity": self.sparsity, "weights": self.weights}
            expect_site(self.site, self.sparsifier, self.layout, self.modules, others)
            return
        if self.modules is not None:
            raise TypeError(
                f"Expected weights= for site='weight', got modules={self.modules!r}; modules= is for other sites."
            )
        if isinstance(self.sparsifier, ActivationMethod):
            raise TypeError(
                f"Expected a method for weights for site='weight', got {self.sparsifier}, which is for activations; "
                'pass site="input", or another one.'
            )
        expect_sparsifier(self.sparsifier)
        expect_layouts(self.layout, self.sparsifier, allocation(self.sparsity))
        requested_weights(self.weights)

    def _repr_html_(self) -> str:
        rules = self.layout if isinstance(self.layout, dict) else {"layout": self.layout}
        others = {"sparsifier": self.sparsifier, "sparsity": self.sparsity, "weights": self.weights}
        if self.site != "weight":
            others = {"sparsifier": self.sparsifier, "site": self.site, "modules": self.modules}
        return facts("Recipe", {str(key): value for key, value in {**rules, **others}.items()})

    def to_json(self) -> str:
        """The recipe as JSON text.

        Raises:
            ValueError: it has a function or a module, or a method with fields that JSON cannot hold.
        """
        return json.dumps(self.record(strict=True))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe in a text of `to_json`. Nothing is imported: methods and layouts must be known already.

        Raises:
            FormatError: another text, or the name of a class that has not been imported.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"Expected the JSON text of a Recipe, got {str(text)[:80]!r} ({error}).") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if isinstance(data, dict) and data.get("version") == 1 and not data.keys() & {"site", "modules"}:
            data |= {"version": VERSION, "site": "weight", "modules": None}
        if not isinstance(data, dict) or data.get("version") != VERSION or data.keys() - {"version"} != names:
            raise FormatError(f"Expected a Recipe of version {VERSION} with {sorted(names)}, got {text[:200]}.")
        try:
            return cls(
                layout=_layouts_from(data["layout"]),
                sparsifier=made(data["sparsifier"], Sparsifier if data["site"] == "weight" else ActivationMethod),
                sparsity=made(data["sparsity"], Allocation),
                weights=_patterns_from(data["weights"]),
                site=data["site"],
                modules=_patterns_from(data["modules"]),
            )
        except (ValueError, TypeError) as error:
            raise FormatError(f"Expected a Recipe that can be made, got one with: {error}") from error

    def record(self, strict: bool = False) -> dict[str, Any]:
        """What JSON can hold of it: all, or else in words; ValueError for the latter if `strict`."""
        rules = list(self.layout.items()) if isinstance(self.layout, dict) else None
        of_weights = {
            "version": 1,
            "layout": plain(self.layout, strict) if rules is None else [_rule(*rule, strict) for rule in rules],
            "sparsifier": plain(self.sparsifier, strict),
            "sparsity": plain(self.sparsity, strict),
            "weights": _patterns(self.weights, strict),
        }
        if self.site == "weight":
            return of_weights
        return {**of_weights, "version": VERSION, "site": self.site, "modules": _patterns(self.modules, strict)}


def recipe_of(
    layout: Any, sparsifier: Any, sparsity: Any, weights: Any, site: str = "weight", modules: Any = None
) -> Recipe:
    """The Recipe that sparsify was given, or that its arguments make."""
    if not isinstance(layout, Recipe):
        return Recipe(layout, sparsifier, sparsity, weights, site, modules)
    given = {"sparsifier": sparsifier is not DEFAULT, "sparsity": sparsity is not None, "weights": weights is not None}
    given |= {"site": site != "weight", "modules": modules is not None}
    both = ", ".join(f"{name}=" for name, is_given in given.items() if is_given)
    if both:
        raise TypeError(f"Expected a Recipe or its arguments, got a Recipe and {both}; use dataclasses.replace on it.")
    return layout


def note_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Append it to the record of what was done to a model: plain data, so that the model can be copied and pickled."""
    vars(model)[RECORDS] = [*vars(model).get(RECORDS, ()), recipe.record()]


def recipes_of(model: nn.Module) -> list[dict[str, Any]]:
    """The records of a model and of the modules in it."""
    return [record for module in model.modules() for record in vars(module).get(RECORDS, ())]


def set_recipes(model: nn.Module, records: list[dict[str, Any]]) -> None:
    """Replace the records of a model and of the modules in it; nothing is made of them."""
    for module in model.modules():
        vars(module).pop(RECORDS, None)
    if records:
        vars(model)[RECORDS] = records


def _rule(pattern: Any, layout: Layout | None, strict: bool) -> list:
    return [_pattern(pattern, strict), plain(layout, strict)]


def _patterns(given: Any, strict: bool) -> Any:
    """Of `weights=` or `modules=`."""
    return [_pattern(p, strict) for p in given] if isinstance(given, (list, tuple)) else _pattern(given, strict)


def _pattern(pattern: Any, strict: bool) -> Any:
    if pattern is None or isinstance(pattern, str):
        return pattern
    if isinstance(pattern, type):
        return {"type": f"{pattern.__module__}.{pattern.__qualname__}"}
    return _in_words(pattern, "names, globs or types in weights=, modules= and layout=", strict)


def plain(value: Any, strict: bool) -> Any:
    """A layout, method, allocation, schedule, or a field of one, as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, strict) for item in value]
    known = isinstance(value, (Layout, Sparsifier, ActivationMethod, Allocation, Schedule))
    if not known or (not dataclasses.is_dataclass(value) and vars(value)):
        return _in_words(value, "dataclasses of numbers and text", strict)
    own = [f.name for f in dataclasses.fields(value) if f.init] if dataclasses.is_dataclass(value) else []
    fields = {name: plain(getattr(value, name), strict) for name in own}
    if getattr(fields.get("schedule") and value.schedule, "default_of", None) == type(value).__qualname__:
        fields["schedule"] = None  # made of the other fields
    return {"name": type(value).__name__, "fields": fields}


def _in_words(value: Any, expected: str, strict: bool) -> dict[str, str]:
    if strict:
        raise ValueError(f"Expected {expected} for JSON, got {str(value)[:200]}.")
    return {"not_json": str(value)[:200]}


def _layouts_from(data: Any) -> Layouts | None:
    if isinstance(data, list):
        return {_patterns_from(pattern): made(layout, Layout) for pattern, layout in data}
    return made(data, Layout)


def _patterns_from(data: Any) -> Any:
    if isinstance(data, list):
        return [_patterns_from(pattern) for pattern in data]
    if isinstance(data, dict):
        path, _, name = str(data.get("type")).rpartition(".")
        found = vars(sys.modules[path]).get(name) if path in sys.modules else None
        if not isinstance(found, type):
            raise ValueError(f"Expected a type of modules that has been imported, got {str(data)[:200]}.")
        return found
    return data


def made(data: Any, base: type | tuple[type, ...]) -> Any:
    """The object of a class below `base` (or one of them), or the plain value, that `plain` has described."""
    if isinstance(data, list):
        return tuple(made(item, base) for item in data)
    if not isinstance(data, dict):
        return data
    name, fields = data.get("name"), data.get("fields")
    if data.keys() != {"name", "fields"} or not isinstance(fields, dict):
        raise ValueError(f"Expected a name and fields, got {str(data)[:200]}.")
    fields = {key: made(value, (Schedule, Sparsifier)) for key, value in fields.items()}
    if base is Layout:
        return layout_from(name, fields)
    bases = base if isinstance(base, tuple) else (base,)
    found = [cls for one in bases for cls in subclasses(one) if cls.__name__ == name]
    if len(found) != 1:
        words = " or ".join(one.__name__ for one in bases)
        raise ValueError(f"Expected one imported {words} called {name!r}, got {len(found)}; import its module.")
    return found[0](**fields)
