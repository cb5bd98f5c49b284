"""fuse and unfuse: the modules of a model run the products that belong together in fewer launches.

A fused module has a `forward` in its instance, a `FusedForward` or `SharedForward`. Parameters, buffers, submodules and
the state dict stay what they are. At each call it asks whether everything still is as it was when the module was fused,
and whether a gradient is needed; where not, or if so, it runs the module's own forward, which is always right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._torch_private import PLAIN_TENSORS, autocast_somewhere, differentiates, global_hooks, is_compiling, no_function
from ..ops import fused
from ..tensor import SparseTensor
from ..training.attribute import installed
from .defaults import is_conv1d
from .select import expect_model
from .structure import Activated, Call, Gated, NoChainError, Step, chain_of, features, linear_children, shared_inputs

TOKENS = 3  # of the input on which a fused product is compared with its parts


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: for each module what runs together, or why nothing does. Print it.

    Attributes:
        fused: module name -> what runs together.
        skipped: module name -> why its sparse linear layers run one by one.
    """

    fused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused: {len(self.fused)} modules, skipped: {len(self.skipped)}"]
        lines += [f"  {name or '(model)'}: {what}" for name, what in self.fused.items()]
        lines += [f"  {name or '(model)'}: not fused, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Run the products of a finalized sparse model that belong together in fewer launches, in inference.

    Fused are, wherever the weights are sparse: activation(gate(x)) * up(x), with the linear layer behind it, as in the
    MLPs of Llama, Qwen, Mistral and Gemma; activation(linear(x)), as in GPT-2, BERT, ViT and `nn.Sequential`; and linear
    layers that a module calls on one tensor, as q, k and v of an attention. They are found from what the modules compute,
    not by names; the activations are relu, gelu, gelu with tanh, and silu. Each is compared with its parts before it is
    taken. A layout without a kernel for it runs its operators one after another, as before.

    Nothing changes but the instances' `forward`: no parameter, module, name or state dict. (The parts of q, k and v are
    copied so that they lie one behind the other in memory.) Under autograd, autocast and torch.func, for modules with
    hooks, and where something was replaced later, a module runs its own forward. Deep copies stay fused; after `.to()`
    and `deepcopy` q, k and v run one by one until `fuse` is called again. Call `unfuse` before replacing a `forward`
    yourself.

    Args:
        model: any module; call `finalize` first.

    Returns:
        A `FuseReport`: what was fused, and what was not and why.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
        >>> model = sten.sparsify(model, sten.NM(2, 4)).requires_grad_(False)
        >>> print(sten.fuse(model))
        fused: 1 modules, skipped: 0
          (model): relu(0)
    """
    expect_model(model)
    unfuse(model)
    report = FuseReport()
    for name, module in model.named_modules():
        layers = linear_children(module)
        if not any(isinstance(layer._parameters.get("weight"), SparseTensor) for layer in layers.values()):
            if any(map(installed, layers.values())):
                report.skipped[name] = "its weights are in training; call sten.finalize first"
            continue
        if "forward" in vars(module):
            report.skipped[name] = "its forward was replaced by another library"
            continue
        try:
            done = _fuse_chain(module, layers)
        except NoChainError as reason:
            done = _fuse_shared(module, layers)
            if done is None:
                report.skipped[name] = str(reason)
                continue
        report.fused[name] = done
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: every module runs its own forward again. Returns the model.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU()).requires_grad_(False)
        >>> model = sten.sparsify(model, sten.NM(2, 4))
        >>> report = sten.fuse(model)
        >>> "forward" in vars(sten.unfuse(model))
        False
    """
    expect_model(model)
    for module in model.modules():
        if isinstance(vars(module).get("forward"), (FusedForward, SharedForward)):
            del module.__dict__["forward"]
    return model


def _fuse_chain(module: nn.Module, layers: dict[str, nn.Module]) -> str:
    """Fuse a chain, and say what runs together."""
    steps: list[Step] = []
    for step in chain_of(module):
        if isinstance(step, Call) or all(isinstance(layers[n].weight, SparseTensor) for n in _layers_of(step)):
            steps.append(step)
        elif isinstance(step, Activated) and step.after is not None:
            steps += [Call(step.child), Call(step.after)]
        else:
            raise NoChainError(f"of {' and '.join(_layers_of(step))} some are dense")
    together = [step for step in steps if not isinstance(step, Call)]
    if not together:
        raise NoChainError("no activation follows its sparse linear layers")
    forward = FusedForward(module, tuple(steps), {n: layers[n] for step in together for n in _layers_of(step)})
    for step in together:
        _compare(module, step, forward)
    module.__dict__["forward"] = forward
    return ", ".join(map(str, together))


def _layers_of(step: Step) -> tuple[str, ...]:
    if isinstance(step, Gated):
        return (step.gate, step.up) if step.down is None else (step.gate, step.up, step.down)
    return (step.child,)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is a call of its class's forward, and nothing else."""
    return not (
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


@torch.no_grad()
def _compare(module: nn.Module, step: Step, forward: FusedForward) -> None:
    """Raise NoChainError unless the step gives what its parts give."""
    layers = [module._modules[name] for name in _layers_of(step)]
    weight = layers[0].weight
    x = torch.randn(TOKENS, features(layers[0])[0], device=weight.device, dtype=weight.dtype)
    if isinstance(step, Gated):
        expected = fused.activate(layers[0](x), step.activation) * layers[1](x)
        expected = expected if step.down is None else layers[2](expected)
    else:
        expected = fused.activate(layers[0](x), step.activation)
    if not _same(forward.run(step, x, forward.operands(x)), expected):
        raise NoChainError(f"{step} differs from what its parts give")


def _same(got: Tensor, expected: Tensor) -> bool:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3}.get(got.dtype, 3e-2)
    near = tolerance * float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=near, equal_nan=True)


class FusedForward:
    """The forward of a module whose chain of submodules has products that run together.

    Attributes:
        module: whose forward it is.
        steps: the chain.
        layers: the linear layers of the products, by name.
        transposed: whether they are Hugging Face's Conv1D.
        children, attributes: the module's submodules and plain attributes when it was fused; if one is another
            object now, the module's own forward runs.
    """

    def __init__(self, module: nn.Module, steps: tuple[Step, ...], layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            if not _is_plain(layer):
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
            if getattr(module, name) is not value:
                return False
        return len(now) == len(children)

    def operands(self, x: Tensor) -> dict[str, tuple] | None:
        """(weight, bias) of each layer, if a call on x may run them together; else None."""
        if not all(map(_is_plain, self.layers.values())):
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
    torch.func or a hook of all modules acts on them, or a weight is not a SparseTensor."""
    traced = is_compiling()
    if autocast_somewhere() or not (isinstance(x, Tensor) if traced else type(x) in PLAIN_TENSORS):
        return None
    if not traced and (differentiates() or global_hooks()):
        return None
    recorded, found = torch.is_grad_enabled(), []
    if recorded and x.requires_grad:
        return None
    for layer in layers:
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if not isinstance(weight, SparseTensor):
            return None
        if recorded and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        found.append((weight, bias))
    return found


# ---- linear layers on one input


def _fuse_shared(module: nn.Module, layers: dict[str, nn.Module]) -> str | None:
    """Fuse the linear layers that the module calls on one tensor, and say which; None if there are none."""
    done = []
    for names in shared_inputs(module):
        group = {name: layers[name] for name in names}
        weights = [layer._parameters["weight"] for layer in group.values()]
        if len(group) > 3 or not all(isinstance(w, SparseTensor) for w in weights):
            continue
        layout, rows = weights[0].sparse_layout, [w.stored_shape[0] for w in weights]
        if any(w.sparse_layout != layout for w in weights) or not layout.stacks(rows):
            continue
        if any("forward" in vars(layer) for layer in group.values()):
            continue
        _lay_together(weights)
        _lay_biases_together([layer._parameters["bias"] for layer in group.values()])
        shared = Shared(list(group.values()))
        if not _same_one_by_one(shared, features(shared.layers[0])[0]):
            continue
        for number, layer in enumerate(shared.layers):
            layer.__dict__["forward"] = SharedForward(layer, shared, number)
        done.append(" and ".join(names) + " on one input")
    return ", ".join(done) if done else None


@torch.no_grad()
def _same_one_by_one(shared: Shared, width: int) -> bool:
    weight = shared.layers[0].weight
    x = torch.randn(TOKENS, width, device=weight.device, dtype=weight.dtype)
    return all(map(_same, shared.run(x), [type(layer).forward(layer, x) for layer in shared.layers]))


def _behind(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, one behind the other in one storage; not views of one tensor for autograd."""
    whole, row, placed = torch.cat(list(tensors)), 0, []
    for t in tensors:
        size = whole[row : row + len(t)]
        placed.append(whole.new_empty(0).set_(whole.untyped_storage(), size.storage_offset(), t.shape, size.stride()))
        row += len(t)
    return placed


@torch.no_grad()
def _lay_together(weights: list[SparseTensor]) -> None:
    """Copy the parts of the weights, so that they lie one behind the other."""
    with no_function():
        names = list(weights[0].parts)
        placed = {name: _behind([w.parts[name] for w in weights]) for name in names}
        for number, w in enumerate(weights):
            parts = {name: placed[name][number] for name in names}
            w._adopt(w.sparse_layout, parts, w.stored_shape, w.transposed, None)


@torch.no_grad()
def _lay_biases_together(biases: list[Tensor | None]) -> None:
    if all(bias is not None for bias in biases):
        for bias, placed in zip(biases, _behind([bias.detach() for bias in biases]), strict=True):
            bias.data = placed


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


__all__ = ["FuseReport", "fuse", "unfuse"]
