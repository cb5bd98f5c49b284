"""Operator: ``sten::gpu_...`` in torch's registry, and ``prepare``, which returns its launches for such tensors.

``@operator(schema, shape)`` on a function ``prepare(*tensors, **numbers)`` makes an ``Operator``. Its schema names
tensors and numbers; ``shape(*tensors, *numbers)`` is that of the result, which is on the first tensor's device and has
its dtype, or ``dtype=``.
With ``choose(tokens, outputs, inputs, dtype, **facts) -> (variant, reason)`` it has several variants: ``prepare`` then
takes ``variant=``, or None: it calls ``choose`` itself.

| call | caller | when it decides |
|---|---|---|
| ``op(*tensors, **numbers)`` | anybody; compilers and modes see it | at the first call; stored in the launch cache |
| ``op.direct(*arguments)`` | the Plan of an activation | the same, with less time of the host |
| ``op.prepare(*tensors, **numbers)`` | the Plan of a weight, which stores it | at once, for such tensors |

``Library.define`` and ``impl`` are used rather than ``custom_op`` because a call through them costs the host a few
microseconds less, and the gradients belong to the framework's ``autograd.Function``, not to the operators.
"""

from operator import itemgetter

import torch

from . import launch_cache
from ._torch_private import FunctionalTensorMode, dispatch_modes, exports
from .backend import INTERPRET, backend
from .precision import precision

LIB = torch.library.Library("sten", "FRAGMENT")
DEFAULTS = {"None": None, "False": False, '"none"': "none"}  # of schemas
MADE_CONTIGUOUS = ("bias", "gate", "up_bias", "dense")  # of any strides: copied if not contiguous


class Operator:
    """See the module. ``strided``: the tensors that may have any strides, as activations do.

    A schema may give defaults, at its end. What has its default is not passed: each argument costs the host time.
    ``dtype``: of the result, if not that of the first tensor. For several results ``shape`` returns a list, and
    ``dtype``, if there is one, is a list.
    """

    def __init__(self, schema: str, shape, make, strided: tuple[str, ...] = ("x",), choose=None, dtype=None):
        self.name, _, arguments = schema.partition("(")
        arguments = [a.strip().partition("=") for a in arguments.partition(")")[0].split(",")]
        kinds = {a.split()[1]: a.split()[0] for a, _, _ in arguments}
        self.arguments = tuple(kinds)
        self.tensors = tuple(name for name, kind in kinds.items() if kind.startswith("Tensor"))
        self.numbers = tuple(name for name, kind in kinds.items() if not kind.startswith("Tensor"))
        self.defaults = {a.split()[1]: DEFAULTS[value] for a, equals, value in arguments if equals}
        self.make, self.strided, self.choose, self.__doc__ = make, strided, choose, make.__doc__
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(self.name, self._run, "CUDA")
        LIB.impl(self.name, self._on_cpu, "CPU")

        def fake(*arguments):
            named = self._named(arguments)
            size = shape(*map(named.get, self.tensors), *map(named.get, self.numbers))
            if not isinstance(size, list):
                return arguments[0].new_empty(size, dtype=dtype)
            dtypes = dtype or [None] * len(size)
            return tuple(arguments[0].new_empty(one, dtype=kind) for one, kind in zip(size, dtypes, strict=True))

        torch.library.register_fake(f"sten::{self.name}", fake, lib=LIB)
        if FunctionalTensorMode is not None:
            torch.library.register_torch_dispatch(f"sten::{self.name}", FunctionalTensorMode, self._functional, lib=LIB)
        self.overload = getattr(torch.ops.sten, self.name).default

    def _named(self, arguments) -> dict:
        return self.defaults | dict(zip(self.arguments, arguments, strict=False))

    def __call__(self, *tensors, **keywords):
        keywords = self.defaults | dict(zip(self.tensors, tensors, strict=False)) | keywords
        return self.overload(*[keywords[name] for name in self.arguments])

    def direct(self, *arguments):
        """The operator with all of its arguments, in order, past torch's dispatcher unless a mode has to see it: that
        takes the host half as long."""
        if dispatch_modes():
            return self.overload(*arguments)
        return self._run(*arguments) if arguments[0].is_cuda else self._on_cpu(*arguments)

    def prepare(self, *tensors, variant: str | None = None, **numbers):
        """A function from such tensors to the result. It assumes that all later ones have the same dtypes, shapes,
        strides, device, and alignment to 16 bytes, and that their device is the current one."""
        self._check(tensors)
        if self.choose is not None:
            numbers["variant"] = variant
        copied = [
            position
            for position, (name, t) in enumerate(zip(self.tensors, tensors, strict=True))
            if name in MADE_CONTIGUOUS and t is not None and not t.is_contiguous()
        ]
        if not copied:
            return self.make(*tensors, **numbers)

        def readable(tensors):
            return [t.contiguous() if position in copied else t for position, t in enumerate(tensors)]

        launch = self.make(*readable(tensors), **numbers)
        return lambda *tensors: launch(*readable(tensors))

    def _check(self, tensors):
        devices = {str(t.device) for t in tensors if t is not None}
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors on one device, got {', '.join(sorted(devices))}.")
        any_strides = (*self.strided, *MADE_CONTIGUOUS)
        for name, t in zip(self.tensors, tensors, strict=True):
            if t is not None and name not in any_strides and not t.is_contiguous():
                raise ValueError(
                    f"Expected a contiguous {name} of shape {tuple(t.shape)}, got strides {t.stride()}; call"
                    " .contiguous() on it."
                )

    def _run(self, *arguments):
        """The operator on tensors of one device; the launch cache has its launches for such arguments."""
        key = [self.name]
        for a in arguments:
            if isinstance(a, torch.Tensor):
                dtype = a.dtype
                key += (a.shape, a.stride(), dtype, a.get_device(), a.data_ptr() & 15)
                if dtype is torch.float32:
                    key.append(precision(dtype))
            else:
                key.append(a)
        return launch_cache.cached(tuple(key), arguments[0], lambda: self._launch(arguments))(*arguments)

    def traced(self, *tensors, **numbers):
        """The result by operators and launches that a compiler sees, for tensors of known sizes; None: it sees this
        operator instead."""
        return None

    def _functional(self, mode, op, types, arguments, keywords):
        """The operator while torch.compile makes a graph of what it does: torch.library.triton_op does the same."""
        sizes = [size for a in arguments if isinstance(a, torch.Tensor) for size in a.shape]
        if arguments[0].is_cuda and all(type(size) is int for size in sizes) and not exports():
            named = self._named(arguments)
            with mode:
                result = self.traced(*map(named.get, self.tensors), **{name: named[name] for name in self.numbers})
            if result is not None:
                return result
        return mode.__torch_dispatch__(op, types, arguments, keywords)

    def _launch(self, arguments):
        """A function of such arguments, in the order of the schema."""
        named = self._named(arguments)
        tensors = [named[name] for name in self.tensors]
        numbers = {name: named[name] for name in self.numbers}
        with backend.on(arguments[0]):
            launch = self.prepare(*tensors, **numbers)
        at = [0 if named[name] is None else 1 + self.arguments.index(name) for name in self.tensors]
        pick = itemgetter(*at) if len(at) > 1 else lambda given: (given[at[0]],)

        def call(*arguments):
            return launch(*pick((None, *arguments)))

        return on_its_device(call) if backend.several else call

    def _on_cpu(self, *arguments):
        if not INTERPRET:
            raise RuntimeError(
                f"Expected CUDA tensors for sten::{self.name}, got CPU tensors; set TRITON_INTERPRET=1 before triton is"
                " imported to run it on the CPU."
            )
        return self._run(*arguments)


def on_its_device(call):
    """``call`` with the device of its first tensor as the current one: there Triton launches, and memory is taken."""

    def there(x, *rest):
        if x.get_device() == backend.device():
            return call(x, *rest)
        with backend.on(x):
            return call(x, *rest)

    return there


def operator(schema: str, shape, **options):
    """Register the decorated ``prepare(*tensors, **numbers)`` as an operator, see ``Operator``."""
    return lambda make: Operator(schema, shape, make, **options)


class ExpandedProduct:
    """grad (*, O) -> grad @ W, (*, I): the weight is expanded, and cuBLAS multiplies."""

    def __init__(self, expand: Operator, reason: str):
        self.expand, self.reason, self.numbers = expand, reason, expand.numbers

    def __call__(self, grad, *stored, **numbers):
        if "out_features" in self.numbers:
            numbers.setdefault("out_features", grad.shape[-1])
        return torch.matmul(grad, self.expand(*stored, **numbers))

    def choose(self, tokens, outputs, inputs, dtype, **pattern) -> tuple[str, str]:
        return "expand", self.reason

    def prepare(self, grad, *stored, variant=None, **numbers):
        dense = self.expand.prepare(*stored, **numbers)
        return lambda grad, *stored: torch.matmul(grad, dense(*stored))


class CollectedProduct:
    """grad (*, O), x (*, I) -> the gradient of the values: the dense product by cuBLAS, collected at the pattern."""

    def __init__(self, collect: Operator):
        self.collect, self.numbers = collect, collect.numbers

    def __call__(self, grad, x, *pattern, **numbers):
        return self.collect(_outer(grad, x), *pattern, **numbers)

    def choose(self, tokens, outputs, inputs, dtype, **pattern) -> tuple[str, str]:
        return "collect", "the dense gradient by cuBLAS, collected at the pattern by one more kernel"

    def prepare(self, grad, x, *pattern, variant=None, **numbers):
        collect = self.collect.prepare(grad.new_empty(grad.shape[-1], x.shape[-1]), *pattern, **numbers)
        return lambda grad, x, *pattern: collect(_outer(grad, x), *pattern)


def _outer(grad, x):
    """The dense gradient (O, I)."""
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
