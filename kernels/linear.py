"""The product with a weight, as the five layouts share it: ``sten::gpu_<layout>_linear``, its decision and its launch.

x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). Where a layout takes a second weight, ``up``, the gate is
x @ up.T + up_bias, and both products are one launch or two (``gated``).

A ``Layout`` says what differs: which tensors store a weight, when they do not fit, which variant runs and how it is
launched. The variants that all share are ``empty`` (no launch) and ``expand`` (a dense weight, then cuBLAS).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from . import epilogue
from .launch import into_new
from .operators import Operator

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One layout's side of ``Linear``. A weight's ``stored`` tensors come in the order of the schema.

    ``check(x, stored, outputs, inputs, **numbers)`` raises where they hold no such weight. ``choose(tokens, outputs,
    inputs, dtype, **facts)`` gives (variant, reason), where ``facts(stored, up, numbers)`` is what it reads of the
    weight. ``arrange(x, variant)`` gives the function that makes activations as the kernel reads them, or None.
    ``launch(variant, x, *parts, y, activation=, **numbers)`` gives the function of the same tensors that fills y
    (T, O); ``parts`` are the stored tensors, bias and gate, and, if ``dual``, those of a second weight and its bias.
    ``defaults`` are numbers that a caller may leave out. ``library``: variants that are no launch of ours, {name: prepare(x, *parts, shape=, activation=, **numbers)}, which
    may answer None to have the weight expanded.
    """

    name: str
    stored: str
    numbers: str
    check: Callable
    choose: Callable[..., tuple[str, str]]
    facts: Callable[..., dict]
    expand: Operator
    arrange: Callable
    launch: Callable
    dual: bool = False
    defaults: dict[str, bool] = field(default_factory=dict)
    library: dict[str, Callable] = field(default_factory=dict)


class Linear(Operator):
    """The operator of one layout; ``linear(x, *stored, bias=None, *, out_features, activation=None, gate=None, ...)``.

    ``gate`` has the output's shape. ``choose`` is the layout's own.
    """

    def __init__(self, layout: Layout):
        self.layout, self.count = layout, layout.stored.count("Tensor ")
        stored = layout.stored.replace("Tensor ", "")
        up = "".join(f" Tensor? up_{name.strip()}," for name in (*stored.split(","), "bias")) if layout.dual else ""
        options = "".join(f", bool {name}" for name in layout.defaults)
        schema = (
            f"gpu_{layout.name}_linear(Tensor x, {layout.stored}, Tensor? bias, Tensor? gate,{up} {layout.numbers}"
            f"int out_features, str activation{options}) -> Tensor"
        )
        super().__init__(schema, self._shape, self._make, choose=layout.choose)
        self.__doc__ = type(self).__doc__
        self.absent = (None,) * (self.count + 2 if layout.dual else 1)  # of a lone product: no gate, no second weight

    def _shape(self, x, *arguments):
        return *x.shape[:-1], arguments[len(self.tensors) - 1 + self.numbers.index("out_features")]

    def __call__(self, x, *weight, activation=None, gate=None, **given):
        name = epilogue.activation_name(activation)
        stored, bias = weight[: self.count], weight[self.count :] or (given.pop("bias", None),)
        given = {**self.layout.defaults, **given, "activation": name}
        return super().__call__(x, *stored, *bias, gate, *self.absent[1:], **given)

    def gated(self, x, up, gate, *, activation="silu", **given):
        """activation(x @ W_gate.T) * (x @ W_up.T), (*, O), where ``up`` and ``gate`` are each (*stored[, bias]).

        One launch, or two where they are faster. Over 64 tokens the up half is rounded to the output's dtype once, on
        its way through the output; below, both halves meet in fp32. Nothing follows a change of one of two patterns
        alone but ``pattern_cache.invalidate`` with the tensors of both.
        """
        up, gate = ((*weight, None)[: self.count + 1] for weight in (up, gate))
        name = epilogue.activation_name(activation)
        return super().__call__(x, *gate, None, *up, activation=name, **given)

    def _make(self, x, *parts, out_features, activation, variant=None, **numbers):
        layout, count = self.layout, self.count
        stored, bias, gate = parts[:count], parts[count], parts[count + 1]
        up, up_bias = (parts[count + 2 : -1], parts[-1]) if layout.dual else ((None,), None)
        up = None if up[0] is None else up
        tokens, inputs, shape = math.prod(x.shape[:-1]), x.shape[-1], (*x.shape[:-1], out_features)
        for weight in (stored, up):
            if weight is not None:
                layout.check(x, weight, out_features, inputs, **numbers)
        epilogue.check(out_features, shape, (bias, up_bias), gate)
        facts = layout.facts(stored, up, numbers)
        if variant is None:
            variant, _ = self.choose(tokens, out_features, inputs, x.dtype, **facts)
        if variant == "empty":
            return lambda x, *parts: x.new_empty(shape)
        if variant in layout.library:
            launch = layout.library[variant](x, *parts, shape=shape, activation=activation, **numbers)
            variant = "expand" if launch is None else variant
        if variant == "expand":
            launch = self._expanded(inputs, stored, up, out_features, activation, numbers)
        elif variant not in layout.library:
            arrange = layout.arrange(x, variant)
            flat = x if arrange is None else arrange(x)
            given = (flat, *parts, x.new_empty(tokens, out_features))
            launch = layout.launch(variant, *given, activation=activation, **numbers)
            launch = into_new(launch, x, shape, arrange=arrange)
        return launch

    def _expanded(self, inputs, stored, up, outputs, activation, numbers):
        """Dense weights, cuBLAS, and the epilogue in torch."""
        count, known = self.count, {**numbers, "in_features": inputs, "out_features": outputs}
        known = {name: known[name] for name in self.layout.expand.numbers}
        dense = self.layout.expand.prepare(*stored, **known)
        dense_up = None if up is None else self.layout.expand.prepare(*up, **known)

        def call(x, *parts):
            y = torch.nn.functional.linear(x, dense(*parts[:count]), parts[count])
            gate = parts[count + 1]
            if dense_up is not None:
                gate = torch.nn.functional.linear(x, dense_up(*parts[count + 2 : -1]), parts[-1])
            return epilogue.apply(y, activation, gate)

        return call
