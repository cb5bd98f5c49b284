"""traceable: the `forward` of a rule, and the opaque operator that torch.compile and dispatch modes see instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .._torch_private import dispatch_modes, is_compiling, is_intercepted
from ..rule import Rule
from ..tensor import ATEN, LIBRARY, OPS, SparseTensor, without_view


def traceable(schema: str) -> Callable[[type[Rule]], type[Rule]]:
    """Give the decorated rule its `forward`, and an opaque operator of this schema for compilers and dispatch modes.

    The operator takes the arguments of the rule.
    """
    LIBRARY.define(schema)
    operator = getattr(OPS, schema.partition("(")[0])

    def decorate(rule: type[Rule]) -> type[Rule]:
        position, compute = rule.weight_position, rule.compute

        def forward(*args):
            intercepted = is_intercepted()
            if intercepted and not args[position].assembled and (is_compiling() or dispatch_modes()):
                return operator(*args)
            out = compute(*args, intercepted)
            return out if isinstance(out, SparseTensor) else without_view(out)

        *parameters, _ = inspect.signature(compute).parameters.values()
        forward.__signature__ = inspect.Signature(parameters)  # Dynamo passes a ctx unless it counts all arguments
        rule.forward = staticmethod(forward)
        ATEN[operator.default] = lambda _, *args: compute(*args, is_intercepted())
        return rule

    return decorate
