"""The laws of methods for activations and gradients: what `check_sparsifier` checks of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conversion import densify, sparse_op, sparsify
from ..layouts import CSR, FanIn, Masked
from ..layouts.base import Layout
from ..sparsifiers.activation import ActivationMethod
from .layouts import claim

ROWS, FEATURES = 8, 16


@dataclass(frozen=True)
class CheckedSites:
    """What `check_sparsifier` checked of an activation method."""

    method: ActivationMethod
    layouts: tuple[Layout, ...]
    sites: tuple[str, ...]


def check_activations(method: ActivationMethod, layout: Layout | None) -> CheckedSites:
    """Check the laws of a method for activations; see `check_sparsifier`."""
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        _numbers(method, x, training)
        _kind(method, x, training)
        _gradient(method, x, training)
    layouts = (layout,) if layout is not None else (Masked(), CSR(), FanIn())
    for each in layouts:
        _layout(method, each, x)
    sites = ("input", "output", *(("grad_input", "grad_output", "grad_weight") if method.takes_gradients else ()))
    for site in sites:
        _site(method, site, x)
    return CheckedSites(method, layouts, sites)


def _applied(method: ActivationMethod, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """`apply` with fresh state and the random numbers of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {name: tensor.detach().clone() for name, tensor in method.init(x.shape[1]).items()}
        return method.apply(x, state, training)


def _numbers(method: ActivationMethod, x: Tensor, training: bool) -> None:
    for given in (x, x[:3], x[:1], x[:0], x.bfloat16(), x.double()):
        before = given.clone()
        y, mask = _applied(method, given, training)
        claim(torch.equal(given, before), f"{method} must not change its input")
        claim(mask.dtype == torch.bool, f"the mask of {method} must be bool; got {mask.dtype}")
        claim(y.shape == mask.shape == given.shape, f"{method} must keep the shape {tuple(given.shape)}")
        claim(y.dtype == given.dtype, f"{method} must keep the dtype {given.dtype}; got {y.dtype}")
        claim(not y[~mask].any(), f"{method} must give zero off its mask")


def _kind(method: ActivationMethod, x: Tensor, training: bool) -> None:
    """A decision depends on no more than the kind says."""
    mask = _applied(method, x, training)[1]
    if method.kind == "blocking":
        other = torch.cat([x[: ROWS // 2], x[ROWS // 2 :].flip(0) * 3])
        claim(
            torch.equal(_applied(method, other, training)[1][: ROWS // 2], mask[: ROWS // 2]),
            f"{method} is declared blocking, but other rows change what it keeps of one",
        )
    elif method.kind == "streaming":
        changed = torch.zeros_like(x, dtype=torch.bool)
        changed[::2, 1::3] = True
        other = torch.where(changed, -3 * x, x)
        claim(
            torch.equal(_applied(method, other, training)[1][~changed], mask[~changed]),
            f"{method} is declared streaming, but other entries change whether it keeps one",
        )
    else:
        claim(method.kind == "materializing", f"{method}.kind must be one of three words; got {method.kind!r}")


def _gradient(method: ActivationMethod, x: Tensor, training: bool) -> None:
    """The gradient is the factor of each kept entry; of a dropped one zero, or if it is straight-through one."""
    x = x.double().requires_grad_()
    y, mask = _applied(method, x, training)
    (grad,) = torch.autograd.grad(y.sum(), x)
    want = torch.where(mask, (y / x).detach(), 0)
    want = torch.ones_like(x) if method.straight_through else want
    claim(torch.allclose(grad, want), f"the gradient of {method} must be y / x where it keeps x, and zero elsewhere")


def _layout(method: ActivationMethod, layout: Layout, x: Tensor) -> None:
    """Stored in a layout, numbers and gradients are those of the dense tensor; also of an odd number of tokens."""
    weight = torch.randn(5, FEATURES, generator=torch.Generator().manual_seed(1))
    for rows in (ROWS, 3, 1):
        results = []
        for how in (None, layout):
            a, w = x[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
            op = sparse_op(torch.clone, out=(method, how), features=FEATURES)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                y = nn.functional.linear(op(a), w)
            y.square().sum().backward()
            results.append((y, a.grad, w.grad, *(p.grad for p in op.parameters())))
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
        claim(same, f"{method} in {layout} must give the numbers and gradients that it gives dense")


def _site(method: ActivationMethod, site: str, x: Tensor) -> None:
    """At a site of a layer: state is saved and copied, and `densify` gives the layer back."""
    layer = nn.Linear(FEATURES, FEATURES)
    keys, before = list(layer.state_dict()), layer(x)
    sparsify(layer, site=site, sparsifier=method)
    layer(x.clone().requires_grad_()).square().sum().backward()
    twin = sparsify(copy.deepcopy(densify(copy.deepcopy(layer))), site=site, sparsifier=method)
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer)):
        ys = []
        for each in (layer, other):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                ys.append(each.eval()(x))
        claim(torch.equal(*ys), f"a layer with {method} at its {site} must be the same after state_dict and deepcopy")
    densify(layer)
    claim(list(layer.state_dict()) == keys and torch.equal(layer(x), before), f"densify must take {method} off")
