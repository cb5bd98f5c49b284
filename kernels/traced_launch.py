"""TracedLaunch: ``sten::gpu_<layout>_launch``, a kernel in CUDA C++ as a compiled graph starts it.

The whole operator decides when it runs: it describes its tensors to find its launches, and allocates its result. Here a
trace has done so: the graph has the activations as a matrix, y as a buffer that the compiler planned, and a
``signature``, the text of everything else that a launch depends on. A graph that is read from a disk in another process
has it, too; the first call there prepares the launch. Inductor itself starts Triton's kernels, see ``shares``.
"""

import ast

import torch

from . import launch_cache, shares
from .backend import INTERPRET, backend
from .operators import LIB, on_its_device


class TracedLaunch:
    """See the module. ``prepare(variant, x, *stored, bias, gate, y, activation=, **numbers)`` is that of the launches
    of ``variant``, x (T, I) and y (T, O)."""

    def __init__(self, prefix: str, stored: str, prepare):
        self.name, self.prepare, self.read = f"{prefix}_launch", prepare, 1 + stored.count("Tensor ")
        schema = f"{self.name}(Tensor x, {stored}, Tensor? bias, Tensor? gate, Tensor(a!) y, str signature) -> ()"
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        for device in ("CUDA", "CPU"):
            LIB.impl(self.name, self._run, device)
        torch.library.register_fake(f"sten::{self.name}", lambda *arguments: None, lib=LIB)
        self.overload = getattr(torch.ops.sten, self.name).default

    def __call__(self, variant, x, stored, bias, gate, outputs, activation, **numbers):
        """The product (T, O) of x (*, I), in a trace; None where a part of the weight is not as a launch reads it."""
        if not all(t.is_contiguous() and shares.begins_aligned(t) for t in stored):
            return None
        x = shares.matrix_of(x)
        bias = bias if bias is None else bias.contiguous()
        gate = gate if gate is None else gate.reshape(len(x), outputs).contiguous()
        y = x.new_empty((len(x), outputs))
        tensors = x, *stored, bias, gate, y
        described = [t if t is None else (tuple(t.shape), str(t.dtype)) for t in tensors]
        self.overload(*tensors, repr((self.name, described, variant, activation, numbers)))
        return y

    def _run(self, *arguments):
        *tensors, signature = arguments
        place = 0
        for t in tensors[: self.read]:
            place |= t.data_ptr()
        if place & 15:  # an input of a graph whose compiler does not look
            tensors[: self.read] = [t.clone() if t.data_ptr() & 15 else t for t in tensors[: self.read]]
        first = tensors[0]
        launch_cache.cached((signature, first.get_device()), first, lambda: self._make(tensors, signature))(*tensors)

    def _make(self, tensors, signature):
        if not tensors[0].is_cuda and not INTERPRET:
            raise RuntimeError(f"Expected CUDA tensors for sten::{self.name}, got CPU tensors.")
        _, _, variant, activation, numbers = ast.literal_eval(signature)
        with backend.on(tensors[0]):
            launch = self.prepare(variant, *tensors, activation=activation, **numbers)
        return on_its_device(launch) if backend.several else launch
