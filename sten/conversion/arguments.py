"""The arguments of sparsify and plan as users write them; each error says what would work."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..layouts import CSR
from ..layouts.base import Layout
from ..layouts.registry import REGISTERED
from ..sparsifiers import Sparsifier
from ..sparsifiers.activation import ActivationMethod
from ..sparsifiers.allocation import Allocation

Pattern = str | type[nn.Module] | nn.Module  # a key of a dictionary of layouts, and what weights= takes
Predicate = Callable[[str, nn.Module, str], bool]
Weights = Pattern | Iterable[Pattern] | Predicate | None
Layouts = Layout | dict[Pattern, Layout | None]
Modules = Pattern | Iterable[Pattern] | Callable[[str, nn.Module], bool] | None
KINDS = ("weight", "input", "output", "grad_weight", "grad_input", "grad_output")  # of sites


def expect_layouts(layout: Layouts | None, sparsifier: Sparsifier | None, allocation: Allocation | None) -> Layouts:
    """`layout=` as it was given, checked; CSR where it is left out and the number of entries is known."""
    if layout is None:
        if allocation is None and sparsifier is not None:
            raise ValueError(
                "Expected sparsity= or layout=, got neither; sten.sparsify(model, sparsity=0.9) keeps a tenth of each "
                "weight in sten.CSR(), and sten.sparsify(model, layout=sten.NM(2, 4)) 2 of every 4 entries."
            )
        return CSR()
    for key, value in layout.items() if isinstance(layout, dict) else [("*", layout)]:
        if not is_pattern(key):
            raise TypeError(f"Expected names, modules or types of modules as the keys of layout=, got {key!r}.")
        if not isinstance(value, Layout) and not (value is None and isinstance(layout, dict)):
            fitting = "a layout such as sten.NM(2, 4), or a dictionary {pattern: layout or None}, for layout="
            raise TypeError(f"Expected {fitting}, got {_shown(value)}{_constructor(value, Layout, REGISTERED)}.")
    return layout


def expect_sparsifier(sparsifier: Any) -> None:
    """Raise TypeError unless `sparsifier=` is a method or None."""
    if sparsifier is not None and not isinstance(sparsifier, Sparsifier):
        known = {cls.__name__: cls for cls in subclasses(Sparsifier) if not inspect.isabstract(cls)}
        raise TypeError(
            "Expected a method such as sten.Magnitude() (an instance), or None, for sparsifier=, got "
            f"{_shown(sparsifier)}{_constructor(sparsifier, Sparsifier, known)}."
        )


def requested_weights(weights: Weights) -> list[Pattern] | Predicate | None:
    """`weights=` as a list of patterns or a function, checked; None if it is left out."""
    return requested(weights, "weights", {"name": "", "module": nn.Module(), "attribute": ""})


def requested_modules(modules: Modules) -> list[Pattern] | Callable[[str, nn.Module], bool] | None:
    """`modules=` as a list of patterns or a function, checked; None if it is left out."""
    return requested(modules, "modules", {"name": "", "module": nn.Module()})


def expect_site(site: Any, method: Any, layout: Any, modules: Modules, others: dict[str, Any]) -> None:
    """Raise unless these are arguments for a site other than a weight; `others` are those that it does not take."""
    if site not in KINDS:
        raise ValueError(f"Expected site= to be one of {', '.join(map(repr, KINDS))}, got {site!r}.")
    for name, value in others.items():
        if value is not None:
            hint = {
                "optimizer": "make the optimizer afterwards, so that it has the thresholds that are learned",
                "sparsity": "the method has it, as in sten.TopK(0.1)",
                "weights": "modules= chooses modules",
            }[name]
            raise TypeError(f"Expected no {name}= with site={site!r}, got {value!r}; {hint}.")
    if method is not None and not isinstance(method, ActivationMethod):
        got = f"{method}, which is for weights" if isinstance(method, Sparsifier) else repr(method)
        raise TypeError(
            f"Expected a method for activations, such as sten.TopK(0.1), for site={site!r}, got {got}; None takes it "
            "off."
        )
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"Expected one layout such as sten.FanIn(), or None for dense, with site=, got {layout!r}.")
    if site == "grad_weight" and layout is not None:
        raise ValueError(
            f"Expected layout=None for site='grad_weight', got {layout}: the gradient of a dense Parameter is dense; "
            "make the weight sparse for one that is not."
        )
    if site.startswith("grad") and isinstance(method, ActivationMethod) and not method.takes_gradients:
        raise ValueError(f"Expected a method without state for site={site!r}, got {method}; use sten.TopK.")
    requested_modules(modules)


def requested(given: Any, keyword: str, example: dict[str, Any]) -> Any:
    """An argument that chooses by patterns, or by a function of what `example` names; see requested_weights."""
    names = ", ".join(example)
    if given is None:
        return None
    if callable(given) and not isinstance(given, (nn.Module, type)):
        try:
            inspect.signature(given).bind(*example.values())
        except TypeError as error:
            raise TypeError(
                f"Expected a function of ({names}) for {keyword}=, got another one ({error}); write lambda {names}: ..."
            ) from None
        return given
    patterns = list(given) if isinstance(given, Iterable) and not is_pattern(given) else [given]
    if not all(map(is_pattern, patterns)):
        raise TypeError(
            f"Expected for {keyword}= a name or glob, a module, a type such as nn.Linear, a list of these, or a "
            f"function of ({names}), got {given!r}."
        )
    return patterns


def is_pattern(key: Any) -> bool:
    """Whether it can be a pattern, alone."""
    return isinstance(key, (str, nn.Module)) or (isinstance(key, type) and issubclass(key, nn.Module))


def _shown(value: Any) -> str:
    if isinstance(value, nn.Module):
        return f"a model, {type(value).__name__}"
    return f"the class {value.__name__}" if isinstance(value, type) else repr(value)


def _constructor(value: Any, kind: type, known: dict[str, type]) -> str:
    """How to write what was meant: a class or its name, a fraction, or nothing known."""
    if isinstance(value, (int, float)):
        return f"; for the fraction to drop, write sparsity={value}"
    if isinstance(value, dict):
        return "; name the weights of a part by their full names or a glob, as in {'encoder.*': sten.NM(2, 4)}"
    cls = value if isinstance(value, type) and issubclass(value, kind) else None
    if isinstance(value, str):
        cls = next((cls for name, cls in known.items() if name.lower() == value.lower()), None)
    if cls is None:
        return ""
    required = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
    package = "sten." if cls.__module__.startswith("sten.") else ""
    return f"; write {package}{cls.__name__}({', '.join(required)})"


def subclasses(cls: type) -> list[type]:
    """All classes below one that have been imported."""
    return [sub for direct in cls.__subclasses__() for sub in (direct, *subclasses(direct))]
