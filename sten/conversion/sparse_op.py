"""sparse_op: an operator whose output, and whose output's gradient, are made sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_private import PLAIN_TENSORS
from ..layouts.base import Layout
from ..ops.epilogue import WITH_RELU2, activate
from ..ops.inline_linear import inline_linear, runs_inline
from ..ops.sparsified import is_seen, records
from ..sparsifiers.activation import ActivationMethod
from .sites import Site, change_output

How = ActivationMethod | tuple[ActivationMethod, Layout | None] | None


class SparseOp(nn.Module):
    """What `sparse_op` returns: a module, so that a layer that has it as an attribute has its state, too."""

    def __init__(
        self,
        operator: Callable[..., Any] | str,
        out: How,
        grad: How,
        features: int | None,
        inline: bool,
        activation: str | None,
    ) -> None:
        super().__init__()
        named = isinstance(operator, str)
        if named and (operator not in WITH_RELU2 or inline or activation is not None):
            names = ", ".join(WITH_RELU2)
            raise ValueError(
                f"Expected a function or one of {names}, without inline= and activation=, got {operator!r}."
            )
        self.operator, self.inline, self.activation = operator, inline, activation
        self.out, self.grad = _site("output", operator, out), _site("grad_output", operator, grad)
        for site in (self.grad, self.out):
            if site is not None:
                state = site.method.init(features) if site is self.out else {}
                if features is not None:
                    site.expect(features)
                site.keep(self, state)
        if activation is not None and (operator is not F.linear or activation not in WITH_RELU2):
            names = ", ".join(WITH_RELU2)
            raise ValueError(f"Expected F.linear and one of {names} for activation=, got {activation!r}.")
        if inline:
            _expect_inline(operator, self.out, self.grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.inline and (operands := self._operands(*args, **kwargs)) is not None:
            return inline_linear(*operands, self.out.epilogue(self, self.activation))
        if isinstance(self.operator, str):
            if len(args) == 1 and self._finishes(*args):
                return self.out.epilogue(self, self.operator).finish(*args, own=False)
            y = activate(*args, activation=self.operator)
        else:
            y = self.operator(*args, **kwargs)
        y = y if self.activation is None else activate(y, self.activation)
        if self.grad is not None:
            y = change_output(y, self.grad.with_gradient, self.grad.where)
        if self.out is not None:
            y = change_output(y, self._sparsified, self.out.where)
        return y

    def _finishes(self, x: Tensor) -> bool:
        """Whether activation and method are one pass over x: where the output is dense, and nobody sees it between."""
        if self.out is None or self.out.layout is not None or self.grad is not None or x.numel() == 0:
            return False
        return type(x) in PLAIN_TENSORS and x.dim() > 0 and not (is_seen(x) or records(x))

    def _sparsified(self, y: Tensor) -> Tensor:
        return self.out.sparsified(self, y)

    def _operands(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple | None:
        """Those of an inline product; None where it runs as the operator, and then the method."""
        return (input, weight, bias) if runs_inline(input, weight, bias, self.out.layout) else None

    def extra_repr(self) -> str:
        end = self.out.epilogue(self, self.activation) if self.inline else None
        how = [f"inline: {end} in the epilogue of linear, whose output is never stored dense"] if self.inline else []
        return "\n".join([*(str(site) for site in (self.out, self.grad) if site is not None), *how])


def _expect_inline(operator: Callable, out: Site | None, grad: Site | None) -> None:
    """Raise ValueError unless linear can sparsify its output inside."""
    if operator is not F.linear:
        name = getattr(operator, "__name__", type(operator).__name__)
        raise ValueError(f"Expected F.linear for inline=True, got {name}; it runs after other operators.")
    if out is None or out.layout is None or grad is not None:
        raise ValueError("Expected out=(method, layout), with a layout and without grad=, for inline=True.")
    if out.method.kind == "materializing":
        raise ValueError(
            f"Expected a streaming or blocking method for inline=True, got {out.method}, which needs the whole tensor."
        )
    if out.method.full_gradient:
        raise ValueError(
            f"Expected a method without gradients of dropped entries for inline=True, got {out.method}; leave it out."
        )


def _site(kind: str, operator: Callable, how: How) -> Site | None:
    name = "out" if kind == "output" else "grad"
    method, layout = how if isinstance(how, tuple) and len(how) == 2 else (how, None)
    if method is None and layout is None:
        return None
    if not isinstance(method, ActivationMethod) or not (layout is None or isinstance(layout, Layout)):
        raise TypeError(
            f"Expected {name}=(method, layout), such as (sten.TopK(8), sten.FanIn()), or a method alone, got {how!r}."
        )
    if kind == "grad_output" and not method.takes_gradients:
        raise ValueError(f"Expected a method without state for grad=, got {method}; use sten.TopK.")
    name = operator if isinstance(operator, str) else getattr(operator, "__name__", type(operator).__name__)
    return Site(name, kind, method, layout, False)


def sparse_op(
    operator: Callable[..., Any] | str,
    out: How = None,
    grad: How = None,
    features: int | None = None,
    inline: bool = False,
    activation: str | None = None,
) -> SparseOp:
    """An operator whose output is sparsified, and whose output's gradient is on its way back.

    For layers of your own; `sten.sparsify(model, site=...)` does so to those of a model.

    Args:
        operator: any function of tensors, or a module; or the name of an activation, "relu", "relu2" (its square),
            "gelu", "gelu_tanh" or "silu": where no gradient is needed and the output is dense, the activation and the
            method are then one pass.
        out: (method, layout) of the output, which is then a SparseTensor of two dimensions; a method alone, or None as
            the layout, leaves it dense, with zeros.
        grad: the same for the gradient of the output, before the operator's own backward reads it.
        features: the width of the output, for a method that learns something of each feature (`sten.JumpReLU`).
        inline: of F.linear, whether its output is sparsified inside, in tiles of tokens, so that it is never stored
            dense, and its backward pass is that of a sparse gradient. For streaming and blocking methods and a layout;
            under a compiler the method runs after the operator, with the same numbers.
        activation: of F.linear, what comes before the method: "relu", "relu2", "gelu", "gelu_tanh" or
            "silu".

    Returns:
        A module that is called as the operator; what its methods learn is in its `state_dict`.

    Raises:
        TypeError, ValueError: a method for weights, one with state for `grad`, one that needs the whole tensor for
            `inline`; at the call, an output that the layout cannot hold.

    Example:
        >>> import torch, sten
        >>> add = sten.sparse_op(torch.add, out=(sten.Threshold(1.0), sten.CSR()), grad=(sten.TopK(1), None))
        >>> a = torch.tensor([[0.5, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> y = add(a, torch.tensor([[0.25, 0.5], [0.5, 0.0]]))
        >>> y.to_dense()
        tensor([[0.0000, 1.5000],
                [1.5000, 0.0000]], grad_fn=<ToDenseBackward>)
        >>> torch.nn.functional.linear(y, torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> a.grad
        tensor([[0., 2.],
                [1., 0.]])
    """
    return SparseOp(operator, out, grad, features, inline, activation)
