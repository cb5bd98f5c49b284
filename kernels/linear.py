"""Linear: the part of ``sten::gpu_<layout>_linear`` that all layouts share.

x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). Where a layout takes a second weight, ``up``, the gate is
x @ up.T + up_bias, and both products are one launch or two (``gated``).
"""

import torch

from . import epilogue, shares
from .launch import into_new
from .operators import Operator
from .traced_launch import TracedLaunch

FEW = 64  # tokens up to which a product may be a traced launch


class Linear(Operator):
    """The operator of one layout; ``linear(x, *stored, bias=None, *, out_features, activation=None, gate=None, ...)``.

    ``gate`` has the output's shape. A subclass defines the ``stored`` tensors of a weight, its integers
    (``layout_numbers``), what a caller may pass (``options``), and the methods under "of a layout". ``parts`` are the
    stored tensors, bias and gate, and, if ``dual``, those of a second weight and its bias. All layouts have the
    variants ``empty`` (no launch) and ``expand`` (a dense weight, then cuBLAS).
    """

    prefix, stored, layout_numbers, dual, options = "", "", "", False, 'str activation="none"'
    cuda: tuple[str, ...] = ()  # variants in CUDA C++, which read x (T, I) without gaps
    expand: Operator

    def __init__(self):
        self.count = self.stored.count("Tensor ")
        names = self.stored.replace("Tensor ", "").replace(" ", "").split(",")
        up = "".join(f" Tensor? up_{name}=None," for name in (*names, "bias")) if self.dual else ""
        numbers = f"{self.layout_numbers}int out_features"
        ends = f"Tensor? bias=None, Tensor? gate=None,{up} {self.options}"
        schema = f"{self.prefix}(Tensor x, {self.stored}, {numbers}, {ends}) -> Tensor"
        super().__init__(schema, self._shape, self._make, choose=self.choose)
        self.__doc__ = type(self).__doc__
        self.traced_launch = TracedLaunch(self.prefix, self.stored, self.launch) if self.cuda else None
        self.absent = (None,) * (self.count + 2 if self.dual else 1)  # of a plain product: no gate, no second weight

    # ---- of a layout

    def choose(self, tokens, outputs, inputs, dtype, **facts) -> tuple[str, str]:
        """(variant, reason)."""
        raise NotImplementedError

    def facts(self, stored, up, numbers) -> dict:
        """The keywords that ``choose`` takes, from a weight."""
        return numbers

    def check(self, x, weight, outputs, inputs, **numbers) -> None:
        """Raise unless the stored tensors are a weight of these sizes."""
        raise NotImplementedError

    def arrange(self, x, variant, **numbers):
        """A function from activations to the form that the kernel reads, or None: as they are."""
        raise NotImplementedError

    def launch(self, variant, x, *parts, activation, **numbers):
        """A function of the same tensors that writes the last of them, y (T, O)."""
        raise NotImplementedError

    def library(self, variant, x, *parts, shape, activation, **numbers):
        """A function for a variant that a library runs; "expand" if it cannot run now, None if ``launch`` runs it."""
        return None

    def shares(self, variant, x, stored, up, outputs, **numbers):
        """The shares of a variant for a few tokens (see ``shares``), x (T, I), from a traced launch; None: it has none.
        ``up``: the stored tensors of a second weight, or None."""
        return None

    def sizes(self, x, outputs, numbers):
        """(tokens, inputs, the result's shape, the shape of the launch's y)."""
        tokens = x.shape[:-1].numel()
        return tokens, x.shape[-1], (*x.shape[:-1], outputs), (tokens, outputs)

    def multiply(self, x, dense, bias, numbers):
        """The product with a dense weight, by cuBLAS."""
        return torch.nn.functional.linear(x, dense, bias)

    # ---- shared

    def _shape(self, x, *arguments):
        return *x.shape[:-1], arguments[len(self.tensors) - 1 + self.numbers.index("out_features")]

    def __call__(self, x, *weight, activation=None, gate=None, **options):
        stored, bias = weight[: self.count], weight[self.count :] or (options.pop("bias", None),)
        name = epilogue.activation_name(activation)
        return super().__call__(x, *stored, *bias, gate, *self.absent[1:], activation=name, **options)

    def gated(self, x, up, gate, *, activation="silu", **options):
        """activation(x @ W_gate.T) * (x @ W_up.T), (*, O), where ``up`` and ``gate`` are each (*stored[, bias]).

        One launch, or two where they are faster. Over 64 tokens the up half is rounded to the output's dtype first; up
        to 64, both halves are multiplied in fp32. After a pattern was written, call ``pattern_cache.invalidate`` with
        the tensors of both weights.
        """
        up, gate = ((*weight, None)[: self.count + 1] for weight in (up, gate))
        name = epilogue.activation_name(activation)
        return super().__call__(x, *gate, None, *up, activation=name, **options)

    def _checked(self, x, parts, out_features, numbers):
        """(stored tensors, bias, gate, stored tensors of a second weight, its bias); raises unless the sizes fit."""
        count, (_, inputs, shape, _) = self.count, self.sizes(x, out_features, numbers)
        stored, bias, gate = parts[:count], parts[count], parts[count + 1]
        up, up_bias = (parts[count + 2 : -1], parts[-1]) if self.dual and parts[-2] is not None else (None, None)
        for weight in (stored, up):
            if weight is None:
                continue
            if x.dtype != weight[0].dtype:
                raise TypeError(f"Expected x and values of one dtype, got {x.dtype} and {weight[0].dtype}.")
            self.check(x, weight, out_features, inputs, **numbers)
        epilogue.check(out_features, shape, (bias, up_bias), gate)
        return stored, bias, gate, up, up_bias

    def _make(self, x, *parts, out_features, activation, variant=None, **numbers):
        tokens, inputs, shape, flat_shape = self.sizes(x, out_features, numbers)
        stored, _, _, up, _ = self._checked(x, parts, out_features, numbers)
        facts = self.facts(stored, up, numbers)
        if variant is None:
            variant, _ = self.choose(tokens, out_features, inputs, x.dtype, **facts)
        if variant == "empty":
            return lambda x, *parts: x.new_empty(shape)
        library = self.library(variant, x, *parts, shape=shape, activation=activation, **numbers)
        if variant == "expand" or library == "expand":
            return self._expanded(x, stored, up, activation, inputs, out_features, numbers)
        if library is not None:
            return library
        arrange = self.arrange(x, variant, **numbers)
        flat, y = x if arrange is None else arrange(x), x.new_empty(flat_shape)
        if x.is_contiguous() and flat.is_contiguous() and flat.data_ptr() == x.data_ptr():
            arrange = None  # a view, which to a kernel is the same
        launch = self.launch(variant, flat, *parts, y, activation=activation, **numbers)
        return into_new(launch, x, shape, arrange=arrange)

    def traced(self, x, *parts, out_features, activation, **numbers):
        tokens, inputs, shape, _ = self.sizes(x, out_features, numbers)
        if tokens == 0 or tokens > FEW or x.dtype != parts[0].dtype:
            return None
        stored, bias, gate, up, up_bias = self._checked(x, parts, out_features, numbers)
        variant, _ = self.choose(tokens, out_features, inputs, x.dtype, **self.facts(stored, up, numbers))
        if variant in self.cuda:
            y = self.traced_launch(variant, x, stored, bias, gate, out_features, activation, **numbers)
            return y if y is None else y.view(shape)
        halves = self.shares(variant, shares.matrix_of(x), stored, up, out_features, **numbers)
        if halves is None:
            return None
        y, *up_y = (half.sum(0) for half in halves)
        y = epilogue.apply(y if bias is None else y + bias, activation, gate if gate is None else gate.view(y.shape))
        for other in up_y:
            y = y * (other if up_bias is None else other + up_bias)
        return y.to(x.dtype).view(shape)

    def _expanded(self, x, stored, up, activation, inputs, outputs, numbers):
        """The variant ``expand``: dense weights, cuBLAS, and the epilogue in torch."""
        count, multiply, known = self.count, self.multiply, {"in_features": inputs, "out_features": outputs, **numbers}
        known = {name: known[name] for name in self.expand.numbers}
        dense, dense_up = (None if w is None else self.expand.prepare(*w, **known) for w in (stored, up))

        def call(x, *parts):
            y, gate = multiply(x, dense(*parts[:count]), parts[count], numbers), parts[count + 1]
            if dense_up is not None:
                gate = multiply(x, dense_up(*parts[count + 2 : -1]), parts[-1], numbers)
            return epilogue.apply(y, activation, gate)

        return call
