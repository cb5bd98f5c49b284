"""Launch: a kernel with its grid and constants; after its first call it goes straight to Triton's C launcher.

``Launch.start`` is in one of three states:

| state | ``start`` | a call | next state |
|---|---|---|---|
| new | None | ``compile(arguments)`` compiles the kernel and runs it | direct, or front end |
| direct | the C launcher of the compiled kernel | launches without checking types, alignment or sizes | direct |
| front end | None | goes through ``compile``, which looks the kernel up again | front end |

A direct launch assumes what the first call saw: dtypes, alignment of addresses, which integers are 1 or divisible by
16, the device. The owner of a ``Launch`` guarantees that (``launch_cache.signature``).
"""

import math

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _triton_private
from .backend import INTERPRET, backend

current_stream = backend.stream


class Launch:
    """Call it with the kernel's arguments but for its compile-time constants.

    ``compile(arguments)`` runs the kernel once and returns (start, args, constants, descriptors) for all later calls,
    or None: ``start(x, y, z, stream, *args, *arguments, *constants)`` on a grid (x, y, z). ``descriptors`` says how to
    encode the arguments that TMA loads, {position: (fill, fixed, rest)}; each call does that by one call of C.
    """

    def __init__(self, compile, grid: tuple[int, ...]):
        self.compile, self.grid, self.start = compile, (*grid, 1, 1)[:3], None

    def __call__(self, *arguments):
        start = self.start
        if start is None:
            self._first(arguments)
            return
        if self.descriptors:
            arguments = self._encode(arguments)
        start(*self.grid, current_stream(self.device), *self.args, *arguments, *self.constants)

    def _first(self, arguments):
        direct = self.compile(arguments)
        if direct is not None:
            start, self.args, self.constants, self.descriptors = direct
            self.device = backend.device()
            self.start = start  # last: another thread may read it

    def _encode(self, arguments):
        encoded, at = [], 0
        for position, (fill, fixed, rest) in self.descriptors.items():
            encoded += arguments[at:position]
            encoded += (fill(arguments[position].data_ptr(), *fixed), *rest)
            at = position + 1
        return (*encoded, *arguments[at:])


class TritonKernel:
    """The ``compile`` of a Triton kernel: its front end compiles and runs; later calls bypass it.

    ``tma_arguments``: tensors that TMA loads, {position: (block, shape, strides)}.
    """

    def __init__(self, kernel, grid, tma_arguments, constants):
        self.kernel, self.grid, self.tma_arguments, self.constants = kernel, grid, tma_arguments, constants

    def __call__(self, arguments):
        converted = [
            TensorDescriptor(a, *self.tma_arguments[i][1:], self.tma_arguments[i][0]) if i in self.tma_arguments else a
            for i, a in enumerate(arguments)
        ]
        compiled = self.kernel[self.grid](*converted, **self.constants)
        direct = None if INTERPRET else _triton_private.direct_start(compiled)
        if direct is None:
            return None
        descriptors = {
            position: _triton_private.descriptor(compiled, number, *self.tma_arguments[position][1:])
            for number, position in enumerate(sorted(self.tma_arguments))
        }
        if None in descriptors.values():
            return None
        constants = tuple(self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
        return *direct, constants, descriptors


def triton_launch(kernel, grid, tma_arguments=None, **constants) -> Launch:
    """The launch of a Triton kernel with these compile-time constants and options."""
    return Launch(TritonKernel(kernel, grid, tma_arguments or {}, constants), grid)


def table_launches(kernel, grid, tma_arguments=None, **constants) -> tuple[Launch, Launch]:
    """(launch for a table that may still be computed, launch for a table that is ready): see ``pattern_cache``."""
    return tuple(triton_launch(kernel, grid, tma_arguments, READY=ready, **constants) for ready in (False, True))


def into_new(launch, like: torch.Tensor, shape: tuple[int, ...], *integers: int, arrange=None):
    """A function from tensors to a new one of this shape and ``like``'s dtype, which ``launch(*tensors, new,
    *integers)`` writes; ``arrange`` is applied to the first tensor. Nothing is launched for an empty result."""
    new = backend.empty(like, *shape)
    if math.prod(shape) == 0:
        return lambda *tensors: new()
    if arrange is None:

        def call(*tensors):
            out = new()
            launch(*tensors, out, *integers)
            return out

    else:

        def call(first, *rest):
            out = new()
            launch(arrange(first), *rest, out, *integers)
            return out

    return call


def gradient_into_new(prepare, grad, x, pattern, shape: tuple[int, ...], arrange):
    """A function (grad, x, *pattern) -> the gradient of the values, of this shape: a new tensor that the launch of
    ``prepare(*tensors, new)`` writes. It makes grad a contiguous matrix, and applies ``arrange``, unless None, to x."""
    columns, new = grad.shape[-1], backend.empty(grad, *shape)

    def arranged(grad, x):
        return grad.reshape(-1, columns).contiguous(), x if arrange is None else arrange(x)

    launch = prepare(*arranged(grad, x), *pattern, new())

    def call(grad, x, *pattern):
        out = new()
        launch(*arranged(grad, x), *pattern, out)
        return out

    return call
