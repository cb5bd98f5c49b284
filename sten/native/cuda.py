"""The Triton kernels of CUDA, where triton can be imported. Each function only names the parts that a kernel reads."""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

from .. import kernels
from .. import ops as ops  # declares the operators
from ..dispatch import Plan, kernel
from ..layouts import BSR, CSR, NM, GroupedNM, VectorNM

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rate(layout: VectorNM) -> dict[str, int]:
    return {"n": layout.n, "m": layout.m, "v": layout.v}


_patterns: dict[tuple[GroupedNM, torch.device], Tensor] = {}


def patterns(layout: GroupedNM, device: torch.device) -> Tensor:
    """GroupedNM's patterns (P, n) int32 on the device; kept, unless a trace or a capture runs: what they make must not
    stay here."""
    traced = torch._C._len_torch_dispatch_stack()
    found = None if traced else _patterns.get((layout, device))
    if found is not None:
        return found
    if traced or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return layout.rows(device).int()
    made = kernels.derived.outside_of_pools(device, lambda: layout.rows(device).int())
    return _patterns.setdefault((layout, device), made)


def in_known_dtypes(choose):
    """A `choose` that answers for every dtype: the kernels know three, the others expand."""

    @functools.wraps(choose)  # the signature too: it says whether the number of entries is wanted
    def asked(shape, dtype, spec, **entries):
        if dtype not in DTYPES:
            known = "float16, bfloat16 and float32"
            return "reference", f"expands to dense: the Triton kernels are for {known}, not {dtype}"
        return choose(shape, dtype, spec, **entries)

    return asked


def prepared(choose, function):
    """The `prepare` of a launcher, which decides by the same rule when it runs."""
    counts = "entries" in inspect.signature(choose).parameters

    def prepare(layout, shape, dtype, flags):
        entries = {"entries": flags.entries or 0} if counts else {}
        variant, reason = choose((flags.tokens or 1, *shape), dtype, layout, **entries)
        run = functools.partial(function, spec=layout, shape=shape, variant=None)
        return Plan.of(variant, reason, run)

    prepare.__name__ = function.__name__
    return prepare


def choose_vector_nm(shape, dtype, spec):
    tokens, outputs, inputs = shape
    return kernels.vector_nm.choose(outputs, inputs, spec.n, spec.m, spec.v, tokens, dtype)


def choose_bsr(shape, dtype, spec, *, entries):
    tokens, outputs, inputs = shape
    (bh, bw) = spec.block
    return kernels.bsr.choose(outputs, inputs, bh, bw, entries // (bh * bw), tokens, dtype)


def choose_nm(shape, dtype, spec):
    tokens, outputs, inputs = shape
    return kernels.nm.choose(outputs, inputs, spec.n, spec.m, tokens, dtype)


def choose_csr(shape, dtype, spec, *, entries):
    tokens, outputs, inputs = shape
    return kernels.csr.choose(outputs, inputs, entries, tokens, dtype)


def choose_grouped_nm(shape, dtype, spec):
    tokens, outputs, inputs = shape
    return kernels.grouped_nm.choose(outputs, inputs, spec.n, spec.m, tokens, dtype)


def choose_gradient(shape, dtype, spec):
    if isinstance(spec, BSR) and min(spec.block) < 16:
        size = "x".join(map(str, spec.block))  # the kernel takes them too, but more slowly
        return "reference", f"blocks of {size} are below the 16 of tensor cores and each reads x again: dense is faster"
    return "triton", "Triton, or its expansion and a dense product"


def choose_grad_weight(shape, dtype, spec):
    if isinstance(spec, VectorNM):
        return kernels.vector_nm.choose_grad_values(spec.n, spec.m, spec.v, dtype)
    return choose_gradient(shape, dtype, spec)


def vector_nm_linear(x, weight, bias, *, spec, shape, variant):
    """Triton: a gathered dense product on tensor cores."""
    return kernels.vector_nm.linear(x, weight["values"], weight["index"], bias, **rate(spec), out_features=shape[0])


def vector_nm_linear_grad_input(grad, weight, *, spec, shape, variant):
    """Triton expansion, then the dense product: the rows of a group share no column."""
    return kernels.vector_nm.linear_grad_input(
        grad, weight["values"], weight["index"], **rate(spec), in_features=shape[1]
    )


def vector_nm_linear_grad_weight(grad, x, weight, *, spec, shape, variant):
    """Triton: the stored entries' products alone."""
    return kernels.vector_nm.linear_grad_values(grad, x, weight["index"], **rate(spec))


def bsr_linear(x, weight, bias, *, spec, shape, variant):
    """Triton: a product block by block on tensor cores."""
    return kernels.bsr.linear(x, weight["values"], weight["crow"], weight["col"], bias, out_features=shape[0])


def bsr_linear_grad_input(grad, weight, *, spec, shape, variant):
    """Triton: the blocks of a column, by the transposed index."""
    parts = (weight[name] for name in ("values", "crow", "col", "t_crow", "t_row", "t_block"))
    return kernels.bsr.linear_grad_input(grad, *parts, in_features=shape[1])


def bsr_linear_grad_weight(grad, x, weight, *, spec, shape, variant):
    """Triton: a product sampled at the blocks."""
    bh, bw = spec.block
    parts = (weight[name] for name in ("col", "t_row", "t_block"))
    return kernels.bsr.linear_grad_values(grad, x, *parts, bh=bh, bw=bw)


def nm_linear(x, weight, bias, *, spec, shape, variant):
    """cuSPARSELt for many tokens of 2:4, Triton otherwise."""
    given = {"n": spec.n, "m": spec.m, "out_features": shape[0]}
    return kernels.nm.linear(x, weight["values"], weight["index"], bias, **given)


def nm_linear_grad_input(grad, weight, *, spec, shape, variant):
    """Triton expansion, then the dense product."""
    given = {"n": spec.n, "m": spec.m, "in_features": shape[1]}
    return kernels.nm.linear_grad_input(grad, weight["values"], weight["index"], **given)


def nm_linear_grad_weight(grad, x, weight, *, spec, shape, variant):
    """The dense gradient, collected at the pattern by Triton."""
    return kernels.nm.linear_grad_values(grad, x, weight["index"], n=spec.n, m=spec.m)


def csr_linear(x, weight, bias, *, spec, shape, variant):
    """Triton for few tokens, expansion for more."""
    return kernels.csr.linear(x, weight["values"], weight["crow"], weight["col"], bias, out_features=shape[0])


def csr_linear_grad_input(grad, weight, *, spec, shape, variant):
    """Triton expansion, then the dense product."""
    parts = (weight[name] for name in ("values", "crow", "col"))
    return kernels.csr.linear_grad_input(grad, *parts, in_features=shape[1])


def csr_linear_grad_weight(grad, x, weight, *, spec, shape, variant):
    """The dense gradient, collected at the pattern by Triton."""
    return kernels.csr.linear_grad_values(grad, x, weight["crow"], weight["col"])


def grouped_nm_linear(x, weight, bias, *, spec, shape, variant):
    """Triton from the stored slots for few tokens, expansion for more."""
    pattern = patterns(spec, x.device)
    given = {"m": spec.m, "out_features": shape[0]}
    return kernels.grouped_nm.linear(x, weight["values"], weight["index"], pattern, bias, **given)


def grouped_nm_linear_grad_input(grad, weight, *, spec, shape, variant):
    """Triton expansion, then the dense product."""
    pattern = patterns(spec, grad.device)
    given = {"m": spec.m, "in_features": shape[1]}
    return kernels.grouped_nm.linear_grad_input(grad, weight["values"], weight["index"], pattern, **given)


def grouped_nm_linear_grad_weight(grad, x, weight, *, spec, shape, variant):
    """The dense gradient, collected at the pattern by Triton."""
    return kernels.grouped_nm.linear_grad_values(grad, x, weight["index"], patterns(spec, grad.device), m=spec.m)


TABLE = {
    VectorNM: (choose_vector_nm, vector_nm_linear, vector_nm_linear_grad_input, vector_nm_linear_grad_weight),
    BSR: (choose_bsr, bsr_linear, bsr_linear_grad_input, bsr_linear_grad_weight),
    NM: (choose_nm, nm_linear, nm_linear_grad_input, nm_linear_grad_weight),
    CSR: (choose_csr, csr_linear, csr_linear_grad_input, csr_linear_grad_weight),
    GroupedNM: (choose_grouped_nm, grouped_nm_linear, grouped_nm_linear_grad_input, grouped_nm_linear_grad_weight),
}


if kernels.available():
    for _layout, (_choose, *_functions) in TABLE.items():
        _picks = {"linear": _choose, "linear_grad_input": choose_gradient, "linear_grad_weight": choose_grad_weight}
        for (_name, _pick), _function in zip(_picks.items(), _functions, strict=True):
            _prepare = prepared(in_known_dtypes(_pick), _function)
            kernel(_name, weight=_layout, device="cuda", prepare=True)(_prepare)
