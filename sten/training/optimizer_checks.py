"""Which optimizers can train sparse weights, what they wrap, and which state of theirs can follow a pattern."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from .._torch_private import tree_leaves
from ..sparsifiers import Sparsifier
from .distributed import ranks
from .trained_weight import optimizer_slots

BY_MATRIX = {"Adafactor", "LBFGS", "Muon"}  # by name, since other packages have classes of these names, too
INNER = ("optimizer", "base_optimizer", "_optimizer", "optim")  # attributes in which wrappers hold what they wrap
ADVICE = "use torch.optim.SGD, AdamW or another one that works entry by entry"


def inner_of(optimizer: object) -> Optimizer | None:
    """The optimizer that a wrapper (SAM, Lookahead, accelerate's) calls; None if it wraps none."""
    found = (getattr(optimizer, name, None) for name in INNER)
    return next((inner for inner in found if isinstance(inner, Optimizer)), None)


def unwrapped(optimizer: object) -> list[Optimizer]:
    """An optimizer, or a wrapper's innermost one and then the wrappers that have state of their own.

    The innermost one's hooks surround the real step, when gradients are complete and the weights are their own: SAM
    changes them for a second backward pass, and its `step` is not one step.

    Raises:
        TypeError: neither an optimizer nor a wrapper of one, or a wrapper with tensors that nobody can find.
    """
    inner = inner_of(optimizer)
    if inner is None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Expected for optimizer= a torch.optim.Optimizer or a list of them, got {optimizer!r}.")
        return [optimizer]
    below = unwrapped(inner)
    own = {
        k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups", "defaults") and v is not inner
    }
    params = {id(p) for group in inner.param_groups for p in group["params"]}
    for name, value in own.items():
        if any(isinstance(t, Tensor) and t.dim() > 0 and id(t) not in params for t in tree_leaves(value)):
            raise TypeError(
                f"Expected a wrapper that keeps its tensors in `state`, where sten can find them, got "
                f"{type(optimizer).__name__} with tensors in {name!r}; use the optimizer that it wraps by itself."
            )
    if isinstance(optimizer, Optimizer) and all(optimizer.state is not other.state for other in below):
        below.append(optimizer)
    return below


def optimizers_of(optimizer: object | Iterable | None) -> list[Optimizer] | None:
    """What users pass as `optimizer=`, one or several, unwrapped; each once."""
    if optimizer is None:
        return None
    single = isinstance(optimizer, Optimizer) or not isinstance(optimizer, Iterable)
    found = [one for given in ([optimizer] if single else optimizer) for one in unwrapped(given)]
    if not found:
        raise TypeError(f"Expected for optimizer= a torch.optim.Optimizer or a list of them, got {optimizer!r}.")
    return list({id(one): one for one in found}.values())


def holds(optimizer: Optimizer, param: Tensor | None) -> bool:
    """Whether the optimizer steps this parameter."""
    return any(p is param for group in optimizer.param_groups for p in group["params"])


def expect_elementwise(optimizer: Optimizer) -> None:
    """Raise TypeError for an optimizer that computes with whole matrices: stored values are none."""
    kinds = {cls.__name__ for cls in type(optimizer).__mro__}
    if kinds & BY_MATRIX:
        kind = type(optimizer).__name__
        raise TypeError(
            f"Expected another optimizer for sparse weights, got {kind}, which computes with whole matrices; {ADVICE}."
        )


def expect_optimizer(method: Sparsifier, optimizer: Optimizer) -> None:
    """Raise TypeError or ValueError if the method is not defined for this optimizer, or not on several processes."""
    kind = type(method).__name__
    if method.resizes and ranks() > 1:
        raise ValueError(
            f"Expected one process for {kind}, which changes the shapes of its parameters, as DDP cannot; got "
            f"{ranks()}: use sten.RigL."
        )
    if inner_of(optimizer) is None and method.optimizer not in (None, type(optimizer).__name__):
        raise TypeError(f"Expected sten.optim.{method.optimizer} for {kind}, got {type(optimizer).__name__}.")


def expect_slots(name: str, param: Tensor, optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer's state of a weight has tensors that cannot follow the weight's entries.

    Such are rows and columns (Adafactor), and codes of quantized blocks (bitsandbytes); a tensor subclass that can
    `dequantize` itself (torchao) follows.
    """
    state = optimizer.state.get(param, {})
    movable = optimizer_slots(param, optimizer)
    for key, slot in state.items():
        if isinstance(slot, Tensor) and slot.numel() > 1 and key not in movable:
            raise ValueError(
                f"Expected optimizer state with one number for each entry of {name}, got {key!r} of "
                f"{type(optimizer).__name__}, {slot.dtype} of shape {tuple(slot.shape)}, which cannot follow a change "
                f"of its form or pattern; {ADVICE}, or clear optimizer.state first."
            )
