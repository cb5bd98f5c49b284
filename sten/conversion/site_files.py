"""Sites in files: what `sten.save` and `save_pretrained` say of them, and a model's sites made those of a file.

An entry of the list "sites" in a file's header, as JSON; the tensors of the method are in the file under their own
names, `<module>.sparse_<site>_<name>`:

    {"module": "0", "site": "input", "method": {"name", "fields"}, "layout": {"name", "fields"} or null}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError
from ..layouts.base import Layout
from ..sparsifiers.activation import ActivationMethod
from ..tensor import SparseTensor
from ..training.attribute import SITES
from ..training.uninterrupted import uninterrupted
from .arguments import KINDS, expect_site
from .recipe import made, plain
from .site_selection import expect_sites, install_site, site_on
from .sites import Site


def described_sites(model: nn.Module) -> list[dict[str, Any]]:
    """The entries of a model's sites.

    Raises:
        ValueError: a method has fields that JSON cannot hold.
    """
    return [
        {"module": path, "site": kind, "method": plain(one.method, True), "layout": plain(one.layout, True)}
        for path, _, kind, one in _sites(model)
    ]


def _sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Site]]:
    for path, module in model.named_modules():
        for kind, one in vars(module).get(SITES, {}).items():
            yield path, module, kind, one


def expect_site_entries(entries: Any) -> None:
    """Raise FormatError unless it is a list of entries."""
    kinds = {"module": str, "site": str, "method": dict, "layout": (dict, type(None))}
    for entry in entries if isinstance(entries, list) else [entries]:
        fits = isinstance(entry, dict) and entry.keys() == kinds.keys() and entry["site"] in KINDS[1:]
        if not fits or not all(isinstance(entry[key], kind) for key, kind in kinds.items()):
            raise FormatError(f"Expected sites with {sorted(kinds)} in the file, got {str(entry)[:200]}.")


@dataclass
class SiteChange:
    """What makes the sites of a model those of a file; those that are the same stay, with their tensors.

    Attributes:
        gone: (module, its site, the names of its tensors in the model's state), of those that the file has not.
        new: (module, site, the method's tensors), of those that the model has not.
        new_names: by name in the state, (the tensors of a new site, the name among them).
    """

    gone: list[tuple[nn.Module, Site, list[str]]]
    new: list[tuple[nn.Module, Site, dict[str, Tensor]]]
    new_names: dict[str, tuple[dict[str, Tensor], str]]

    def take(self, state: dict[str, Tensor]) -> None:
        """Move the tensors of the new sites from a file's state to them; FormatError if one is missing or another."""
        for name, (own, key) in self.new_names.items():
            first, found = own[key], state.pop(name, None)
            if found is None or isinstance(found, SparseTensor) or found.shape != first.shape:
                got = "none" if found is None else f"shape {tuple(found.shape)}"
                raise FormatError(f"Expected shape {tuple(first.shape)} for {name} in the file, got {got}.")
            if found.is_floating_point() != first.is_floating_point():
                raise FormatError(f"Expected {first.dtype} or the like for {name}, got {found.dtype} in the file.")
            value = found.to(first.dtype)
            own[key] = nn.Parameter(value) if isinstance(first, nn.Parameter) else value

    def without_gone(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A model's state without the sites that go."""
        names = {name for *_, names in self.gone for name in names}
        return {name: value for name, value in state.items() if name not in names}

    def remove(self) -> None:
        with uninterrupted():
            for module, site, _ in self.gone:
                site.remove(module)

    def install(self) -> None:
        with uninterrupted():
            for module, site, state in self.new:
                install_site(module, site, state)


def change_of_sites(model: nn.Module, entries: list[dict[str, Any]] | None, state: dict[str, Tensor]) -> SiteChange:
    """How the model gets the sites of a file, all checked; nothing is changed. `state` is the file's.

    A file without entries (None) knows no sites: those of the model stay.

    Raises:
        FormatError: an unknown method, layout or module, or what `sten.sparsify` would refuse.
    """
    if entries is None:
        return SiteChange([], [], {})
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: dict[tuple[int, str], tuple[str, nn.Module, ActivationMethod, Layout | None]] = {}
    for entry in entries:
        path, site = entry["module"], entry["site"]
        where = f"{site} of {path or 'the model'}"
        module = modules.get(path)
        if module is None or (id(module), site) in wanted:
            got = "none" if module is None else "a second entry"
            raise FormatError(f"Expected a module for each site of the file, got {got} for {where}.")
        try:
            method, layout = made(entry["method"], ActivationMethod), made(entry["layout"], Layout)
            expect_site(site, method, layout, None, {})
        except (ValueError, TypeError) as error:
            raise FormatError(f"{where}: {error}") from None
        if site == "grad_weight" and isinstance(state.get(_joined(path, "weight")), SparseTensor):
            raise FormatError(f"{where}: Expected a dense weight in the file, got a sparse one.")
        wanted[id(module), site] = path, module, method, layout
    gone, new, new_names = [], [], {}
    for path, module, kind, one in _sites(model):
        found = wanted.get((id(module), kind))
        if found is not None and found[2:] == (one.method, one.layout):
            del wanted[id(module), kind]
        else:
            gone.append((module, one, [_joined(path, one.full(name)) for name in one.state]))
    try:
        expect_sites(model, [(path, module, site) for (_, site), (path, module, *_) in wanted.items()])
        for (_, site), (path, module, method, layout) in wanted.items():
            one, tensors = site_on(path, module, site, method, layout)
            new.append((module, one, tensors))
            new_names |= {_joined(path, one.full(name)): (tensors, name) for name in tensors}
    except (ValueError, TypeError) as error:
        raise FormatError(f"Expected sites that this model can have in the file: {error}") from None
    return SiteChange(gone, new, new_names)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
