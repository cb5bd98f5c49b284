"""The oracle of sparse training: the masked dense model, whose weights and gradients are masked.

A helper of the tests, not a test: every comparison is by the names that a finalized model has in its state_dict.
"""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn

import sten
from sten.training import TrainedWeight
from sten.training.attribute import trained_of
from sten.training.pattern_weight import PatternWeight


def sparse_weights(model: nn.Module) -> dict[str, sten.SparseTensor]:
    """Every sparse weight by the name of its Parameter, in either form; ties under the first name alone."""
    found = {n: p.detach() for n, p in model.named_parameters() if isinstance(p, sten.SparseTensor)}
    return found | {name: weight.tensor().detach() for name, weight in trained(model).items()}


def trained(model: nn.Module) -> dict[str, TrainedWeight]:
    """The weights in trainable form by the name of their Parameter; ties under the first name alone."""
    named = [
        (f"{prefix}.{name}" if prefix else name, weight)
        for prefix, module in model.named_modules()
        for name, weight in trained_of(module)
    ]
    return dict({id(weight): (name, weight) for name, weight in reversed(named)}.values())


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.mask() for name, w in sparse_weights(model).items()}


def masked_twin(dense: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of the dense model with the masks of the sparse one on its weights and on their gradients."""
    twin = copy.deepcopy(dense)
    for name, mask in masks(model).items():
        param = twin.get_parameter(name)
        with torch.no_grad():
            param.mul_(mask)
        if param.requires_grad:
            param.register_hook(lambda grad, mask=mask: grad * mask)
    return twin


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, dense and detached."""
    found = {n: p.detach() for n, p in model.named_parameters()} | sparse_weights(model)
    return {n: t.to_dense() if isinstance(t, sten.SparseTensor) else t.clone() for n, t in found.items()}


def grads(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, dense; no entry where there is none."""
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, weight in trained(model).items():
        grad = weight.param.grad
        if isinstance(weight, PatternWeight) and grad is not None:
            dense = weight.dense(grad)
            found[name] = dense.t() if weight.transposed else dense
    return {n: g.to_dense() if isinstance(g, sten.SparseTensor) else g for n, g in found.items() if g is not None}


def expect_close(got: dict[str, Tensor], want: dict[str, Tensor], rtol=1e-4, atol=1e-5, what="") -> None:
    """The same names (a tie under one of them) and numbers."""
    for name in got:
        assert name in want, f"{what} {name} is too many"
        torch.testing.assert_close(
            got[name], want[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{what} {n}: {m}"
        )
    assert set(want) == set(got), f"{what}: {set(want) ^ set(got)}"


def calls(model: nn.Module, seen: list) -> dict[str, list[str]]:
    """Which kernels ran on each sparse weight, from `sten.dispatch.observe()`; all must be registered ones."""
    owner = {w.parts["values"].data_ptr(): name for name, w in sparse_weights(model).items()}
    found = defaultdict(list)
    for operator, layout, parts, kernel, _ in seen:
        assert kernel is not None, f"{operator} on {layout} ran the fallback"
        found[owner[parts["values"].data_ptr()]].append(operator)
    return dict(found)


def slots(model: nn.Module, opt) -> dict[str, Tensor]:
    """Every slot by parameter and name, dense."""
    found = {}
    names = {id(p): (n, None) for n, p in model.named_parameters()}
    for name, weight in trained(model).items():
        if isinstance(weight, PatternWeight):
            names[id(weight.param)] = name, weight
    for param, own in opt.state.items():
        name, weight = names[id(param)]
        for key, slot in own.items():
            if weight is not None and slot.shape == param.shape:
                slot = weight.dense(slot).t() if weight.transposed else weight.dense(slot)
            found[f"{name}/{key}"] = slot.to_dense() if isinstance(slot, sten.SparseTensor) else slot.clone()
    return found
