"""The structure of a model: which of its linear layers belong together, found from what its modules compute.

No class and no attribute is known by name. A module whose forward is a chain of its own submodules (an MLP, an
`nn.Sequential`) is traced by torch.fx, with its submodules as the nodes, and read as `Step`s. In a module whose forward
is more than that (attention), the linear layers that get one tensor are found by running its forward on a fake tensor,
with its linear layers replaced for the time of the run.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .._torch_private import fake_mode
from ..ops.fused import ACTIVATIONS
from .defaults import is_conv1d

MULTIPLICATIONS = (operator.mul, torch.mul, "mul")


class NoChainError(Exception):
    """Why the forward of a module is not read as a chain."""


@dataclass(frozen=True)
class Call:
    """A step of a chain: child(x), as it is."""

    child: str


@dataclass(frozen=True)
class Activated:
    """A step of a chain: activation(child(x)), child a linear layer; `after` is the child that is the activation, if
    it is one."""

    child: str
    activation: str
    after: str | None = None

    def __str__(self) -> str:
        return f"{self.activation}({self.child})"


@dataclass(frozen=True)
class Gated:
    """A step of a chain: activation(gate(x)) * up(x), then down(...) if that is a linear layer, else None; `after` as
    of `Activated`."""

    gate: str
    up: str
    activation: str
    after: str | None = None
    down: str | None = None

    def __str__(self) -> str:
        then = "" if self.down is None else f", then {self.down}"
        return f"{self.activation}({self.gate}) * {self.up}{then}"


Step = Call | Activated | Gated


def is_linear_layer(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b or, as Hugging Face's Conv1D, x @ W + b."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None and is_linear_layer(child)}


def features(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `ACTIVATIONS` of the function that this one computes, found by its values; None if it is none."""
    if isinstance(function, nn.Module) and any(True for _ in (*function.parameters(), *function.buffers())):
        return None
    x = torch.linspace(-8, 8, 129, dtype=torch.float64)
    try:
        y = function(x.clone())
    except Exception:  # some function that does not take such a tensor: not an activation
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    return next(
        (name for name, known in ACTIVATIONS.items() if torch.allclose(y, known(x), rtol=1e-9, atol=1e-9)), None
    )


# ---- chains


class _Tracer(fx.Tracer):
    """Records calls of submodules, and does not look inside them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def chain_of(module: nn.Module) -> tuple[Step, ...]:
    """The steps of a module whose forward is a chain of its children, each called once in the chain.

    Raises:
        NoChainError: with the reason, if it is not.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward does with a proxy
        raise NoChainError("its forward does more than call its submodules one after another") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        raise NoChainError(f"its forward takes {len(inputs)} inputs")
    steps, node = [], inputs[0]
    while not _is_output(node):
        step, node = _gated(module, node) if len(node.users) == 2 else _single(module, node)
        steps.append(step)
    return tuple(steps)


def _is_output(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].op == "output" and users[0].args == (node,)


def _child(module: nn.Module, node: fx.Node, argument: fx.Node) -> nn.Module:
    """The child that a node calls with one argument."""
    if node.op != "call_module" or node.args != (argument,) or node.kwargs:
        raise NoChainError(f"its forward has {node.target} between its submodules")
    child = module._modules.get(node.target)
    if child is None:
        raise NoChainError(f"its forward calls {node.target}, which is not its own child")
    return child


def _activation(module: nn.Module, node: fx.Node, argument: fx.Node) -> str | None:
    """The activation that a node is, applied to this argument."""
    if node.args[:1] != (argument,):
        return None
    if node.op == "call_module":
        child = module._modules.get(node.target)
        return None if child is None or is_linear_layer(child) or len(node.args) > 1 else activation_of(child)
    rest = (*node.args[1:], *node.kwargs.values())
    if node.op != "call_function" or any(isinstance(a, fx.Node) for a in rest):
        return None
    return activation_of(lambda x: node.target(x, *node.args[1:], **node.kwargs))


def _module_of(activation: fx.Node) -> str | None:
    return activation.target if activation.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _single(module: nn.Module, node: fx.Node) -> tuple[Step, fx.Node]:
    """The step that begins with the only user of a node, and the node of its result."""
    user = _only_user(node)
    if user is None:
        raise NoChainError("its forward uses an intermediate result more than once")
    child, after = _child(module, user, node), _only_user(user)
    if is_linear_layer(child) and after is not None and (activation := _activation(module, after, user)):
        return Activated(user.target, activation, _module_of(after)), after
    return Call(user.target), user


def _gated(module: nn.Module, node: fx.Node) -> tuple[Step, fx.Node]:
    """activation(gate(x)) * up(x) of a node with two users, and the node of the result."""
    calls = list(node.users)
    layers = [_child(module, call, node) for call in calls]
    if all(map(is_linear_layer, layers)) and layers[0] is not layers[1]:
        for gate, up in (calls, calls[::-1]):
            activated = _only_user(gate)
            name = None if activated is None else _activation(module, activated, gate)
            product = _only_user(activated) if name else None
            if product is None or product is not _only_user(up):
                continue
            if product.target not in MULTIPLICATIONS or product.kwargs or {*product.args} != {activated, up}:
                continue
            down = _only_user(product)
            if down is not None and down.op == "call_module" and is_linear_layer(_child(module, down, product)):
                return Gated(gate.target, up.target, name, _module_of(activated), down.target), down
            return Gated(gate.target, up.target, name, _module_of(activated)), product
    raise NoChainError("two submodules on one input do not meet in activation(a) * b")


# ---- linear layers on one input


def shared_inputs(module: nn.Module) -> list[tuple[str, ...]]:
    """Groups of two or more linear children that the module's forward calls on one tensor, which it does not change.

    Such as q, k and v of an attention, in the order of the calls. A forward that needs more than its first argument is
    run with None for the others, up to where that fails.
    """
    layers = linear_children(module)
    widths = Counter(features(layer)[0] for layer in layers.values())
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    found: list[tuple[str, ...]] = []
    for width in sorted(width for width, count in widths.items() if count > 1):
        calls = _calls_on(module, layers, width, (None,) * (len(required) - 1))
        groups: dict[int, list[str]] = {}
        for name, x, version in calls:
            if x._version == version:
                groups.setdefault(id(x), []).append(name)
        found += [tuple(names) for names in groups.values() if len(names) > 1 and len(set(names)) == len(names)]
    return list(dict.fromkeys(found))


def _calls_on(
    module: nn.Module, layers: dict[str, nn.Module], width: int, more: tuple
) -> list[tuple[str, Tensor, int]]:
    """(child, its input, that one's version) of each call of a linear child, in a forward on a fake tensor."""
    calls: list[tuple[str, Tensor, int]] = []
    saved = {name: layer.__dict__.get("forward") for name, layer in layers.items()}

    def instead(name: str, outputs: int):
        def forward(x):
            calls.append((name, x, x._version))
            return x.new_empty(*x.shape[:-1], outputs)

        return forward

    p, log = next(module.parameters()), logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True  # it reports every operator that fails, which is expected here
    try:
        for name, layer in layers.items():
            layer.__dict__["forward"] = instead(name, features(layer)[1])
        with torch.no_grad(), fake_mode(allow_non_fake_inputs=True):
            type(module).forward(module, torch.empty(1, 2, width, device=p.device, dtype=p.dtype), *more)
    except Exception:  # a forward that needs its other arguments ends here; what it called before counts
        return calls
    finally:
        log.disabled = silent
        for name, layer in layers.items():
            del layer.__dict__["forward"]
            if saved[name] is not None:
                layer.__dict__["forward"] = saved[name]
    return calls


# ---- blocks


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the blocks of a model: the members, all of one class, of its outermost ModuleLists and
    Sequentials that have linear layers in them; in order."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        members = list(module.named_children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(members) < 2 or len({type(member) for _, member in members}) > 1:
            continue
        if any(is_linear_layer(m) for m in members[0][1].modules() if m is not members[0][1]):
            prefix = f"{name}." if name else ""
            inside.append(prefix)
            for key, member in members:
                yield prefix + key, member
