"""One kernel that is ready to start, and what makes it so.

``Launch.start`` is in one of three states:

| state | ``start`` | a call | next state |
|---|---|---|---|
| new | None | ``compile(arguments)`` compiles the kernel and runs it | direct, or compiled each call |
| direct | the compiled kernel's own launcher | starts it: no look at types, alignment or sizes | direct for ever |
| compiled each call | None for ever | goes through ``compile``, which finds the kernel again | the same |

A direct start trusts what the first call saw: dtypes, the alignment of addresses, which integers are 1 or divisible by
16, the device. Whoever keeps a ``Launch`` sees to that (``launch_cache.signature``).
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
    encode arguments that the copy engine fetches, {place: (fill, fixed, rest)}; each call does, by one call of C.
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
            self.start = start  # last: another thread may look

    def _encode(self, arguments):
        encoded, at = [], 0
        for place, (fill, fixed, rest) in self.descriptors.items():
            encoded += arguments[at:place]
            encoded += (fill(arguments[place].data_ptr(), *fixed), *rest)
            at = place + 1
        return (*encoded, *arguments[at:])


class TritonKernel:
    """The ``compile`` of a Triton kernel: its front end compiles and runs; later calls need it no more.

    ``described``: arguments that the copy engine fetches, given as tensors, {place: (block, shape, strides)}.
    """

    def __init__(self, kernel, grid, described, constants):
        self.kernel, self.grid, self.described, self.constants = kernel, grid, described, constants

    def __call__(self, arguments):
        given = [
            TensorDescriptor(a, *self.described[i][1:], self.described[i][0]) if i in self.described else a
            for i, a in enumerate(arguments)
        ]
        compiled = self.kernel[self.grid](*given, **self.constants)
        direct = None if INTERPRET else _triton_private.direct_start(compiled)
        if direct is None:
            return None
        descriptors = {
            place: _triton_private.descriptor(compiled, number, *self.described[place][1:])
            for number, place in enumerate(sorted(self.described))
        }
        if None in descriptors.values():
            return None
        constants = tuple(self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
        return *direct, constants, descriptors


def triton_launch(kernel, grid, described=None, **constants) -> Launch:
    """The launch of a Triton kernel with these compile-time constants and options."""
    return Launch(TritonKernel(kernel, grid, described or {}, constants), grid)


def table_launches(kernel, grid, described=None, **constants) -> tuple[Launch, Launch]:
    """One launch for a table that may still be computed, and one for a table that is ready: see ``pattern_cache``."""
    return tuple(triton_launch(kernel, grid, described, SETTLED=ready, **constants) for ready in (False, True))


def into_new(launch, like: torch.Tensor, shape: tuple[int, ...], *integers: int, arrange=None):
    """The function from tensors to a new one of this shape and ``like``'s dtype, which ``launch(*tensors, new,
    *integers)`` fills; ``arrange`` is applied to the first tensor. Nothing is launched for an empty one."""
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
