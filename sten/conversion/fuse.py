"""fuse and unfuse: the modules of a model run the products that belong together in fewer launches.

A fused module has a `forward` in its instance, a `FusedForward` or `SharedForward`. Parameters, buffers, submodules and
the state dict stay what they are. At each call it asks whether everything still is as it was when the module was fused,
and whether a gradient is needed; where not, or if so, it runs the module's own forward, which is always right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._torch_private import no_function
from ..ops import fused
from ..tensor import SparseTensor
from ..training.attribute import installed
from ..training.inference_mode import ordinary_tensors
from .fused_forward import FusedForward, Shared, SharedForward
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


@ordinary_tensors
def fuse(model: nn.Module) -> FuseReport:
    """Run the products of a finalized sparse model that belong together in fewer launches, in inference.

    Where the weights are sparse, these are fused: activation(gate(x)) * up(x) with the linear layer behind it, as in
    the MLPs of Llama, Qwen, Mistral and Gemma; activation(linear(x)), as in GPT-2, BERT, ViT and `nn.Sequential`; and
    linear layers that a module calls on one tensor, as q, k and v of an attention. They are found from what the modules
    compute, not by names; the activations are relu, gelu, gelu with tanh, and silu. Each is compared with its parts
    before it is taken. A layout without a kernel for it runs its operators one after another, as before.

    Nothing changes but the instances' `forward`: no parameter, module, name or state dict. (The parts of q, k and v are
    copied so that they lie one behind the other in memory.) Under autograd, autocast and torch.func, for modules with
    hooks, and where something was replaced later, a module runs its own forward. Deep copies stay fused; after `.to()`
    and `deepcopy`, q, k and v run one by one until `fuse` is called again. Record CUDA graphs after it, and call
    `unfuse` before `nn.DataParallel`.

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
    if model.training:
        raise ValueError("Expected a model in eval mode to fuse, got one in training mode; call model.eval() first.")
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
        if any(p.is_meta for layer in layers.values() for p in layer.parameters()):
            report.skipped[name] = "it is on the meta device; load the model first"
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


@ordinary_tensors
def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: every module runs its own forward again. Returns the model.

    Example:
        >>> import torch, sten
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU()).eval().requires_grad_(False)
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
    operands = forward.operands(x)
    if operands is None:
        raise NoChainError("autocast, a mode or a hook of all modules is active; call sten.fuse outside of it")
    if not _same(forward.run(step, x, operands), expected):
        raise NoChainError(f"{step} differs from what its parts give")


def _same(got: Tensor, expected: Tensor) -> bool:
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-3}.get(got.dtype, 3e-2)
    near = tolerance * float(expected.abs().nan_to_num(0, 0).max()) if expected.numel() else 0.0
    return torch.allclose(got.double(), expected.double(), rtol=tolerance, atol=near, equal_nan=True)


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
    results = shared.run(x)
    return results is not None and all(map(_same, results, [layer(x) for layer in shared.layers]))


def _behind(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies of the tensors, one behind the other. As views of one tensor they count writes together: what a kernel
    derived from all of them, such as cuSPARSELt's form, is then made again after a write to any."""
    return torch.cat(list(tensors)).split([len(t) for t in tensors])


@torch.inference_mode(False)
@torch.no_grad()
def _lay_together(weights: list[SparseTensor]) -> None:
    """Copy the parts of the weights, so that they lie one behind the other."""
    with no_function():
        names = list(weights[0].parts)
        placed = {name: _behind([w.parts[name] for w in weights]) for name in names}
        for number, w in enumerate(weights):
            parts = {name: placed[name][number] for name in names}
            w._adopt(w.sparse_layout, parts, w.stored_shape, w.transposed, None)


@torch.inference_mode(False)
@torch.no_grad()
def _lay_biases_together(biases: list[Tensor | None]) -> None:
    if all(bias is not None for bias in biases):
        for bias, placed in zip(biases, _behind([bias.detach() for bias in biases]), strict=True):
            bias.data = placed


__all__ = ["FuseReport", "fuse", "unfuse"]
