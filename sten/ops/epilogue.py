"""Epilogues: the end of an operator whose output is sparsified: an activation, what a method keeps, and the storing.

    y = store(keep(activation(z)))

Where the device has a kernel for the rule of a method (`Kept`), all three are one pass over rows that have just been
computed; elsewhere they are PyTorch's operators. The slopes dy / dz, one number an entry, since neither an activation
nor a method mixes entries, are stored at the same pattern.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from ..layouts.base import Layout, Parts

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
WITH_RELU2 = {**ACTIVATIONS, "relu2": lambda y: F.relu(y).square()}  # which only what comes before a method may be
# as csrc/epilogue.h
NUMBERS = {name: number for number, name in enumerate(("none", "relu", "gelu", "gelu_tanh", "silu"))}
RULES = {name: number for number, name in enumerate(("all", "magnitude", "above", "random", "row", "blocks"))}
THRESHOLDS = ("magnitude", "above")
DTYPES = (torch.float32, torch.bfloat16)


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of this name, of WITH_RELU2 or "none"."""
    return y if activation == "none" else WITH_RELU2[activation](y)


class Kept(NamedTuple):
    """The rule of a method, as kernels know it.

    Attributes:
        rule: "all"; "magnitude", |x| > edge; "above", x > edge; "random", each with probability `edge`, divided by it;
            "row", the `count` largest |x| of a row; "blocks", of every `block` features the `count` largest |x|.
        edge, count, block: its numbers; of a threshold that was calibrated `edge` is a tensor.
    """

    rule: str
    edge: float | Tensor = 0.0
    count: int = 0
    block: int = 0

    def numbers(self, dtype: torch.dtype) -> tuple[int, float, int, int]:
        """As the C++ operators take it, for rows of this dtype, in which PyTorch rounds a number that it compares."""
        edge = self.edge
        if self.rule in THRESHOLDS:
            edge = float(edge if dtype is torch.float32 else torch.as_tensor(edge, dtype=dtype))
        return RULES[self.rule], edge, self.count, self.block

    def threshold(self) -> tuple[Tensor | None, float]:
        """The edge as the operators for a GPU take it: a tensor, or a number."""
        return (self.edge, 0.0) if isinstance(self.edge, Tensor) else (None, float(self.edge))

    def stored_by(self, layout: Layout, features: int) -> bool:
        """Whether the layout stores what the kernel makes of rows of so many features."""
        counts = {"row": (self.count, None), "blocks": (self.count, self.block), "all": (features, None)}
        return layout.packs_rows(*counts.get(self.rule, (None, None)))


def has_kernel(x: Tensor) -> bool:
    """Whether the CPU has kernels for rows of this dtype."""
    return x.device.type == "cpu" and x.dtype in DTYPES and hasattr(torch.ops.sten, "compress")


def selects_on_gpu(x: Tensor, kept: Kept, layout: Layout, activation: str) -> bool:
    """Whether a GPU has a kernel that stores what is kept of activation(x): the largest of rows, or of one row what is
    above a threshold, whose count the host does not know, in a layout with free slots."""
    if not x.is_cuda or activation not in ("none", "relu"):
        return False
    if kept.rule in THRESHOLDS:
        return layout.free_slots and kernels.above.takes(x)
    return kept.rule == "row" and kernels.top_columns.takes(x)


def compressed(
    z: Tensor, kept: Kept, layout: Layout, activation: str = "none", before: bool = False
) -> tuple[Parts, Tensor | None]:
    """The parts of activation(z) at what is kept, by the kernel, and there z itself (`before`; on the CPU)."""
    z = z.detach().contiguous()
    if z.is_cuda:
        return selected(z, kept, layout, activation == "relu"), None
    uniform = torch.rand_like(z, dtype=torch.float32) if kept.rule == "random" else None
    values, crow, col, z_kept = torch.ops.sten.compress.default(
        z, NUMBERS[activation], *kept.numbers(z.dtype), uniform, before
    )
    return layout.pack_rows(values, crow, col, tuple(z.shape)), z_kept


def selected(z: Tensor, kept: Kept, layout: Layout, relu: bool) -> Parts:
    """The parts of z, or of relu(z), at what is kept, by a kernel for a GPU."""
    if kept.rule in THRESHOLDS:
        edge, number = kept.threshold()
        values, crow, col = kernels.above.above.direct(z, edge, number, kept.rule == "above", relu)
        return layout.pack_rows(values, crow, col, tuple(z.shape))
    count = kept.count
    values, col = kernels.top_columns.top_columns.direct(z, count, relu)
    crow = None  # which a layout of equal rows does not read
    if layout.packs_rows(None, None):
        values, col = values.flatten(), col.flatten()
        crow = torch.arange(0, values.numel() + 1, count, dtype=torch.int32, device=z.device)
    return layout.pack_rows(values, crow, col, tuple(z.shape))


class Epilogue(NamedTuple):
    """What happens to z, (tokens, features).

    Attributes:
        method, state, training: an activation method, its tensors, and whether the module trains.
        layout: of the output; None: dense, with zeros.
        activation: before the method.
        plans: of the site: the Plans of operators that read what is stored, whose pattern is new at each call.
    """

    method: Any
    state: dict[str, Tensor]
    training: bool
    layout: Layout | None
    activation: str = "none"
    plans: dict | None = None

    def __str__(self) -> str:
        first = "" if self.activation == "none" else f"{self.activation} and "
        return f"{first}{self.method}"

    def rule(self, z: Tensor) -> Kept | None:
        """The rule that a kernel runs on tensors like z; None: PyTorch's operators run."""
        on_cpu = has_kernel(z) and self.activation in NUMBERS
        if not (on_cpu or (z.is_cuda and kernels.available())):
            return None
        kept = self.method.kept(z, self.state, self.training)
        if kept is None:
            return None
        if self.layout is not None:
            served = on_cpu or selects_on_gpu(z, kept, self.layout, self.activation)
            served = served and kept.stored_by(self.layout, z.shape[-1])
        else:
            served = kept.rule != "random" if on_cpu else kernels.finish.takes(kept.rule, kept.block)
        return kept if served else None

    def describe(self, z: Tensor, tokens: int | None) -> str:
        """What `sten.which` and `sten.summary` say of outputs like z, of which so many are a tile; None: they are
        finished as a whole."""
        kernel = self.rule(z) is not None
        language = "C++" if not z.is_cuda else "Triton" if self.layout is None else "CUDA C++"
        by = f"one {language} pass" if kernel else "PyTorch's operators"
        end = "dense with zeros" if self.layout is None else f"stored as {self.layout}"
        if tokens is None:
            return f"{self} after it, by {by}{' where no gradient is needed' if kernel else ''}, {end}"
        return f"{self} in the epilogue, by {by} over up to {tokens} tokens at a time, {end}"

    def stored(self, z: Tensor, slopes: bool) -> tuple[Parts, Tensor | None]:
        """The parts, and if asked for the slopes as values are stored, None for ones; z may be overwritten."""
        kept = self.rule(z)
        return self._by_operators(z, slopes) if kept is None else self._by_kernel(z, kept, slopes)

    def _by_kernel(self, z: Tensor, kept: Kept, slopes: bool) -> tuple[Parts, Tensor | None]:
        activation = self.activation
        before = slopes and activation not in ("none", "relu")
        if not (slopes or z.is_cuda) and activation != "none":  # in place, without memory for a second tile
            z, activation = z.contiguous(), "none"
            torch.ops.sten.epilogue_.default(z, NUMBERS[self.activation], *Kept("all").numbers(z.dtype))
        parts, z_kept = compressed(z, kept, self.layout, activation, before)
        if not slopes:
            return parts, None
        values, slope = parts["values"], None
        if before:
            slope = slope_of(z_kept, self.activation).view_as(values)
        elif activation == "relu":
            slope = values != 0  # as of z: NaN, too, is stored, and no zero is stored of what is positive
        if kept.rule == "random":
            slope = (torch.ones_like(values) if slope is None else slope.to(values.dtype)) / kept.edge
        return parts, slope

    def _by_operators(self, z: Tensor, slopes: bool) -> tuple[Parts, Tensor | None]:
        with torch.set_grad_enabled(slopes):
            z = z.detach().requires_grad_(slopes)
            y = activate(z, self.activation)
        columns = self.method.columns(y.detach())
        if columns is not None:  # of entries that are kept as they are
            slope = None  # of one
            if slopes and self.activation != "none":
                slope = slope_of(self.layout.pack_columns(z.detach(), columns)["values"], self.activation)
            return self.layout.pack_columns(y.detach(), columns), slope
        with torch.set_grad_enabled(slopes):
            y, mask = self.method.apply(y, self.state, self.training)
            slope = torch.autograd.grad(y.sum(), z)[0] if slopes else None
        parts = self.layout.pack(y.detach(), mask)
        return parts, None if slope is None else self.layout.pack_like(slope, parts)

    def finish(self, z: Tensor, own: bool) -> Tensor:
        """z (*, features) as it is left dense, without gradients; if nothing else refers to it (`own`), in place."""
        kept = self.rule(z)
        if kept is None:
            y = activate(z, self.activation).reshape(-1, z.shape[-1])
            return self.method.apply(y, self.state, self.training)[0].view(z.shape)
        if z.is_cuda:
            return finished_on_gpu(z.contiguous(), kept, self.activation)
        z = z.contiguous() if own else z.clone(memory_format=torch.contiguous_format)
        torch.ops.sten.epilogue_.default(z, NUMBERS[self.activation], *kept.numbers(z.dtype))
        return z


def finished_on_gpu(z: Tensor, kept: Kept, activation: str) -> Tensor:
    """keep(activation(z)) by the Triton kernel, for a contiguous z."""
    edge, number = kept.threshold()
    return kernels.finish.finish.direct(z, edge, activation, kept.rule, kept.count, kept.block, number)


def slope_of(z: Tensor, activation: str) -> Tensor:
    """The derivative of an activation at z."""
    if activation == "relu":
        return (~(z <= 0)).to(z.dtype)  # of NaN it is one
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return torch.autograd.grad(activate(z, activation).sum(), z)[0]
