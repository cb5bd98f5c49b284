"""The forwards of fused modules. Each runs the module's own wherever it is not certain that the result is the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .._torch_private import (
    PLAIN_TENSORS,
    autocast_somewhere,
    differentiates,
    dispatch_modes,
    global_hooks,
    is_compiling,
)
from ..ops import fused
from ..tensor import SparseTensor
from .defaults import is_conv1d
from .structure import Activated, Call, Gated, NoChainError, Step

NUMBERS = (bool, int, float)  # compared by value: a compiler may make symbols of them


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is a call of its class's forward, and nothing else."""
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


class FusedForward:
    """The forward of a module whose chain of submodules has products that run together.

    Attributes:
        module: whose forward it is.
        steps: the chain.
        layers: the linear layers of the products, by name.
        instead: these layers and the activations behind them, which are not called.
        transposed: whether they are Hugging Face's Conv1D.
        children, attributes: the module's submodules and plain attributes when it was fused; if one is another
            object now, the module's own forward runs.
    """

    def __init__(self, module: nn.Module, steps: tuple[Step, ...], layers: dict[str, nn.Module]) -> None:
        after = {name for step in steps if type(step) is not Call and (name := step.after) is not None}
        self.instead = [*layers.values(), *(module._modules[name] for name in after)]
        for name in (*layers, *after):
            if not is_plain(module._modules[name]):
                raise NoChainError(f"{name} has hooks, or a forward of its own")
        if len({is_conv1d(layer) for layer in layers.values()}) > 1:
            raise NoChainError("its linear layers are of two kinds")
        self.module, self.steps, self.layers = module, steps, layers
        self.transposed = any(map(is_conv1d, layers.values()))
        self.children = dict(module._modules)
        self.attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}

    def __call__(self, *args, **kwargs):
        operands = self.operands(args[0]) if len(args) == 1 and not kwargs and self.unchanged() else None
        if operands is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        x = args[0]
        for step in self.steps:
            x = self.children[step.child](x) if type(step) is Call else self.run(step, x, operands)
        return x

    def unchanged(self) -> bool:
        """Whether the module has the submodules and attributes that it had."""
        module = self.module
        children, now = self.children, module._modules
        for name in children:
            if now.get(name) is not children[name]:
                return False
        for name, value in self.attributes.items():
            kept = getattr(module, name, None)
            if type(value) in NUMBERS:
                if type(kept) is not type(value) or kept != value:
                    return False
            elif kept is not value:
                return False
        return len(now) == len(children)

    def operands(self, x: Tensor) -> dict[str, tuple] | None:
        """(weight, bias) of each layer, if a call on x may run them together; else None."""
        for module in self.instead:
            if not is_plain(module):
                return None
        found = operands(x, self.layers.values())
        return None if found is None else dict(zip(self.layers, found, strict=True))

    def run(self, step: Activated | Gated, x: Tensor, operands: dict[str, tuple]) -> Tensor:
        if type(step) is Activated:
            return fused.linear_activation(x, *operands[step.child], step.activation, self.transposed)
        first = (*operands[step.gate], *operands[step.up])
        if step.down is None:
            return fused.gated_linear(x, *first, step.activation, self.transposed)
        return fused.gated_mlp(x, *first, *operands[step.down], step.activation, self.transposed)


def operands(x: Tensor, layers: Iterable[nn.Module]) -> list[tuple] | None:
    """(weight, bias) of each layer, or None where the layers have to run one by one: a gradient is needed, autocast,
    torch.func, a dispatch mode or a hook of all modules acts on them, or a weight is not a SparseTensor."""
    traced = is_compiling()
    if autocast_somewhere() or not (isinstance(x, Tensor) if traced else type(x) in PLAIN_TENSORS):
        return None
    if not traced and (differentiates() or global_hooks() or dispatch_modes()):
        return None
    recorded, found = torch.is_grad_enabled(), []
    if recorded and x.requires_grad:
        return None
    for layer in layers:
        weight = layer.weight if traced else layer._parameters.get("weight")  # compilers assemble it in the graph
        bias = layer._parameters.get("bias")
        if not isinstance(weight, SparseTensor):
            return None
        if recorded and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        found.append((weight, bias))
    return found


class Shared:
    """Linear layers that are called on one tensor, and what the first call computed for the later ones.

    Attributes:
        layers: in the order of the calls.
        ready: (the input, its version, the results) from the first call to the last; else None.
        taken: False once a last call did not come, as in a cross-attention, whose k and v get another tensor: from then
            on the layers run one by one.
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers, self.ready, self.taken = layers, None, True

    def run(self, x: Tensor) -> list[Tensor] | None:
        """The results of all layers on x, or None where they have to run one by one."""
        found = operands(x, self.layers)
        if found is None:
            return None
        weights, biases = [weight for weight, _ in found], [bias for _, bias in found]
        return fused.linears(x, weights, biases, is_conv1d(self.layers[0]))

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "ready": None, "taken": self.taken}


class SharedForward:
    """The forward of one of the layers: that of the first computes all results, the others take theirs."""

    def __init__(self, layer: nn.Module, shared: Shared, number: int) -> None:
        self.layer, self.shared, self.number = layer, shared, number

    def __call__(self, *args, **kwargs):
        shared, number = self.shared, self.number
        if len(args) == 1 and not kwargs:
            x = args[0]
            if number == 0:
                shared.taken = shared.taken and shared.ready is None
                results = shared.run(x) if shared.taken else None
                shared.ready = None if results is None else (x, _version(x), results)
                if results is not None:
                    return results[0]
            elif (ready := shared.ready) is not None and ready[0] is x and ready[1] == _version(x):
                if number == len(shared.layers) - 1:
                    shared.ready = None
                return ready[2][number]
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _version(x: Tensor) -> int | None:
    """Counts writes to x; None where nothing does."""
    return None if is_compiling() or x.is_inference() else x._version
