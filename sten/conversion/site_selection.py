"""sparsify with a `site=`: which modules, checked, calibrated, and only then hooked."""

from __future__ import annotations

import contextlib
import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.data import calibration_of, inference, run_batch, tokens_of
from ..caller import user_stacklevel
from ..layouts.base import Layout
from ..sparsifiers.activation import ActivationMethod
from ..tensor import SparseTensor
from ..training.attribute import SITES, trained_of
from ..training.reminders import listed
from ..training.uninterrupted import uninterrupted
from .arguments import Modules, Pattern, expect_site, requested_modules
from .defaults import is_linear, kept_dense
from .recipe import Recipe
from .select import expect_idle, expect_unwrapped, shown
from .sites import Site, change_first, change_output, checked_on_sample

SAMPLE = 2**20  # entries of each tensor that calibration reads
ACTIVATIONS = ("input", "output")


Ready = list[tuple[nn.Module, Site, dict[str, Tensor]]]  # modules that get a site, and the method's tensors


def sparsify_site(model: nn.Module, recipe: Recipe, optimizer: Any, calibration: Any) -> None:
    """Put a site on the chosen modules, or take it off (`sparsifier` None); all or nothing."""
    ready = prepare_sites(model, recipe, optimizer, calibration)
    with uninterrupted():
        for module, one, state in ready:
            if recipe.sparsifier is None:
                one.remove(module)
            else:
                install_site(module, one, state)


def prepare_sites(model: nn.Module, recipe: Recipe, optimizer: Any, calibration: Any) -> Ready:
    """The sites that the chosen modules get, or lose (`sparsifier` None), calibrated; nothing is changed."""
    site, method, layout = recipe.site, recipe.sparsifier, recipe.layout
    expect_site(site, method, layout, recipe.modules, {"optimizer": optimizer})
    expect_idle(model)
    expect_unwrapped(model)
    if any(type(module).__name__ == "OptimizedModule" for module in model.modules()):
        raise TypeError("Expected a model before torch.compile, got a compiled one: hooks come first.")
    chosen = select_modules(model, recipe.modules)
    if method is None:
        return _with_site(chosen, site)
    for name, module in chosen:
        _expect_free(name, module, site)
    expect_sites(model, [(name, module, site) for name, module in chosen])
    ready = [(module, *site_on(name, module, site, method, layout)) for name, module in chosen]
    if calibration is not None:
        _calibrate(model, ready, calibration)
    elif site in ACTIVATIONS and getattr(method, "sparsity", None) is not None:
        warnings.warn(
            f"sten: {method} keeps all entries until its thresholds are loaded; pass calibration= to find them.",
            stacklevel=user_stacklevel(),
        )
    return ready


def expect_sites(model: nn.Module, chosen: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Raise ValueError unless each (name, module, site) can be: the module is called, and has such a tensor."""
    unused, weights = uncalled(model), Counter(id(m._parameters.get("weight")) for m in model.modules())
    for name, module, site in chosen:
        _expect_site(name, module, site)
        if id(module) in unused:
            raise ValueError(
                f"{name}: Expected a module whose forward is called, got one that MultiheadAttention reads."
            )
        if site == "grad_weight" and weights[id(module.weight)] > 1:
            raise ValueError(f"grad_weight of {name}: Expected a weight of one module, got one that several share.")


def site_on(
    name: str, module: nn.Module, site: str, method: ActivationMethod, layout: Layout | None
) -> tuple[Site, dict[str, Tensor]]:
    """(the site, the first state of its method); ValueError if they do not go together."""
    one, features = Site(name, site, method, layout, is_linear(module, "weight")), features_of(module, site)
    with torch.device("cpu"):  # from_pretrained makes models under that of meta, which has no numbers to try
        state = method.init(features) if site in ACTIVATIONS else {}
        checked_on_sample(one, state, features)
    return one, state


def install_site(module: nn.Module, site: Site, state: dict[str, Tensor]) -> None:
    """Give a module a site, and its tensors, on the module's device."""
    _place(module, state)
    site.install(module, state)


def names_module(pattern: Pattern, name: str, module: nn.Module) -> bool:
    """Whether a pattern names this module: by its own name, not by those of the modules around it."""
    if isinstance(pattern, nn.Module):
        return pattern is module
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"Expected a regular expression after 're:', got {pattern[3:]!r} ({error}).") from None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def select_modules(model: nn.Module, modules: Modules) -> list[tuple[str, nn.Module]]:
    """(name, module) of those named, each once; by default of the linear layers, without the output layer."""
    requested, every = requested_modules(modules), list(model.named_modules())
    if requested is None:
        dense, unused = kept_dense(model), uncalled(model)
        found = [(n, m) for n, m in every if is_linear(m, "weight") and id(m) not in dense and id(m) not in unused]
        if not found:
            raise ValueError(f"Expected a linear layer in {type(model).__name__}, got none; choose with modules=.")
        return found
    if not isinstance(requested, list):
        found = [(name, module) for name, module in every if requested(name, module)]
        if not found:
            raise ValueError("Expected modules= to choose a module, got a function that chooses none.")
        return found
    for pattern in requested:
        if not any(names_module(pattern, name, module) for name, module in every):
            some = listed([name for name, _ in every if name]) or "none inside"
            raise ValueError(f"Expected {shown(pattern)} to name a module, got none; there are {some}.")
    return [(n, m) for n, m in every if any(names_module(pattern, n, m) for pattern in requested)]


def uncalled(model: nn.Module) -> set[int]:
    """Ids of the layers whose weights others read, and whose forward is not called."""
    return {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def _expect_free(name: str, module: nn.Module, site: str) -> None:
    """Raise if the module has a method on the site."""
    if site in vars(module).get(SITES, {}):
        one = vars(module)[SITES][site]
        raise ValueError(
            f"{site} of {name or 'the model'}: Expected one method on a site, got a second beside {one.method}; take "
            "that off first, with sparsifier=None."
        )


def _expect_site(name: str, module: nn.Module, site: str) -> None:
    """Raise unless the module has such a site."""
    where = f"{site} of {name or 'the model'}"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        raise ValueError(f"{where}: Expected a module with a forward, got {type(module).__name__}; name those inside.")
    if site == "grad_weight":
        weight = module._parameters.get("weight")
        trained = dict(trained_of(module)) if hasattr(module, "sparse_names") else {}
        if weight is None or weight.dim() < 2:
            kind = type(module).__name__
            raise ValueError(f"{where}: Expected a module with a Parameter `weight` of two dimensions, got {kind}.")
        if isinstance(weight, SparseTensor) or "weight" in trained:
            raise ValueError(f"{where}: Expected a dense weight, got a sparse one, whose gradient has its pattern.")


def features_of(module: nn.Module, site: str) -> int | None:
    """The width of the tensor at a site of a linear layer; None where it is not known before a call."""
    weight = module._parameters.get("weight")
    if site == "grad_weight":
        return weight.flatten(1).shape[1]
    if not is_linear(module, "weight"):
        return None
    inputs, outputs = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else weight.shape
    return inputs if site in ("input", "grad_input") else outputs


def _place(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Move the tensors of a site to the module's device, in place of being made there."""
    first = next((p for p in module.parameters() if p is not None), None)
    if first is not None:
        for name, tensor in state.items():
            new = tensor.detach().to(first.device)
            state[name] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new


def _with_site(chosen: list[tuple[str, nn.Module]], site: str) -> Ready:
    """Those that have a method on the site."""
    found: Ready = [(m, s, {}) for _, m in chosen if (s := vars(m).get(SITES, {}).get(site)) is not None]
    if not found:
        raise ValueError(f"Expected a module with a method at its {site}, to be taken off, got none; see sten.summary.")
    return found


def _calibrate(model: nn.Module, ready: list, calibration: Any) -> None:
    """Find each site's state from the tensors that the dense model has there, in one pass over the batches."""
    batches = calibration_of(calibration).batches
    samples: list[list[Tensor]] = [[] for _ in ready]
    most = max(1, SAMPLE // len(batches))
    tokens = tokens_of(model, batches)

    def read(found: list[Tensor], batch: list[int]) -> Callable:
        def keep(x: Tensor) -> Tensor:
            rows = tokens[batch[0]].of(tuple(x.shape))
            x = x.to_dense() if isinstance(x, SparseTensor) else x
            x = x.detach().reshape(-1, x.shape[-1])
            x = x if rows is None else x[rows.to(x.device)]
            step = -(-len(x) // max(1, most // x.shape[1])) if len(x) else 1
            found.append(x[::step].clone())
            return x

        return keep

    current = [0]
    with contextlib.ExitStack() as stack, inference(model):
        for (module, one, _), found in zip(ready, samples, strict=True):
            keep = read(found, current)
            if one.kind == "input":

                def hook(m, args, kwargs, keep=keep, where=one.where):
                    change_first(args, kwargs, keep, where)

                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:

                def hook(m, args, output, keep=keep, where=one.where):
                    change_output(output, keep, where)

                handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        for current[0], batch in enumerate(batches):
            run_batch(model, batch, current[0])
    unseen = [one.where for (_, one, _), found in zip(ready, samples, strict=True) if not sum(map(len, found))]
    if unseen:
        raise ValueError(f"Expected calibration= to reach every chosen module, got none at {listed(unseen)}.")
    for (_, one, state), found in zip(ready, samples, strict=True):
        state.update(one.method.calibrate(torch.cat(found)))
