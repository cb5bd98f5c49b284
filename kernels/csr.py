"""CSR: any pattern. A few tokens straight from the stored values; more by a dense expansion, or cuSPARSE where it wins.

Letters: T tokens, I inputs, O outputs; a row's entries are crow[r] to crow[r + 1]; BE entries and BT tokens a tile.
"""

import torch
import triton
import triton.language as tl

from . import autotune, csr_few, epilogue, nvrtc, transpose
from .backend import INTERPRET
from .epilogue import activate
from .launch import into_new, triton_launch
from .linear import Linear
from .operators import CollectedProduct, ExpandedProduct, operator
from .pdl import begin, overlap
from .tiles import matrix_of, power_of_two, wide

FEW = 64  # tokens up to which reading the entries, once for each 16 tokens, can cost less than a dense expansion


@triton.jit
def _rows(
    x_ptr, values_ptr, crow_ptr, col_ptr, bias_ptr, gate_ptr, y_ptr, T, O, stride_x,
    BE: tl.constexpr, BT: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row per program: a gather of the activations at its columns. x is feature-major (I, >= BT tokens a tile)."""
    begin(PDL)
    row = tl.program_id(0)
    t, e = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BE)
    start, stop = tl.load(crow_ptr + row), tl.load(crow_ptr + row + 1)
    acc = tl.zeros((BE, BT), tl.float32)
    for at in range(start, stop, BE):
        ok = at + e < stop
        column = tl.load(col_ptr + at + e, mask=ok, other=0)
        if WIDE:
            column = column.to(tl.int64)
        value = tl.load(values_ptr + at + e, mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + column[:, None] * stride_x + t[None, :], mask=ok[:, None], other=0.0)
        acc += value[:, None] * x.to(tl.float32)
    y = tl.sum(acc, 0)
    at = t.to(tl.int64) * O + row
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row).to(tl.float32)
    y = activate(y, ACTIVATION)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + at, mask=t < T, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=t < T)


@triton.jit
def _expand_row(values_ptr, crow_ptr, col_ptr, out_ptr, I, BC: tl.constexpr):
    row = tl.program_id(0)
    out, c = out_ptr + row.to(tl.int64) * I, tl.arange(0, BC)
    for c0 in range(0, I, BC):
        tl.store(out + c0 + c, tl.zeros((BC,), out_ptr.dtype.element_ty), mask=c0 + c < I)
    tl.debug_barrier()  # another thread of the program may have zeroed the element
    start, stop = tl.load(crow_ptr + row), tl.load(crow_ptr + row + 1)
    for at in range(start, stop, BC):
        ok = at + c < stop
        tl.store(out + tl.load(col_ptr + at + c, mask=ok, other=0), tl.load(values_ptr + at + c, mask=ok), mask=ok)


@triton.jit
def _collect_row(dense_ptr, crow_ptr, col_ptr, out_ptr, I, BC: tl.constexpr):
    """The dense matrix at the pattern."""
    row = tl.program_id(0)
    start, stop = tl.load(crow_ptr + row), tl.load(crow_ptr + row + 1)
    for at in range(start, stop, BC):
        e = at + tl.arange(0, BC)
        column = tl.load(col_ptr + e, mask=e < stop, other=0)
        tl.store(out_ptr + e, tl.load(dense_ptr + row.to(tl.int64) * I + column, mask=e < stop), mask=e < stop)


@operator(
    "gpu_csr_expand(Tensor values, Tensor crow, Tensor col, int in_features) -> Tensor",
    lambda values, crow, col, in_features: (crow.shape[0] - 1, in_features),
    strided=(),
)
def expand(values, crow, col, in_features):
    """values, crow, col -> the dense weight (O, I)."""
    outputs = crow.numel() - 1
    launch = triton_launch(_expand_row, (outputs,), BC=16 if INTERPRET else 1024)
    return into_new(launch, values, (outputs, in_features), in_features)


@operator("gpu_csr_collect(Tensor dense, Tensor crow, Tensor col) -> Tensor", lambda dense, crow, col: col.shape)
def collect(dense, crow, col):
    """A dense matrix (O, I) at the pattern: values (nnz,)."""
    launch = triton_launch(_collect_row, (len(dense),), BC=16 if INTERPRET else 256)
    return into_new(launch, dense, col.shape, dense.shape[1])


def _configs(tokens: int) -> list[dict]:
    if INTERPRET:
        return [{"BE": 16, "BT": 1 if tokens == 1 else 16}]
    if tokens == 1:
        return [{"BE": e, "BT": 1, "num_warps": w} for e, w in ((256, 1), (512, 1), (1024, 4))]
    return [{"BE": e, "BT": 16, "num_warps": w} for e, w in ((32, 1), (64, 1))]


class CSRLinear(Linear):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O)."""

    prefix, stored, expand = "gpu_csr_linear", "Tensor values, Tensor crow, Tensor col", expand
    cuda = ("steps",)

    def facts(self, stored, up, numbers):
        return {"entries": stored[0].numel()}

    def choose(self, tokens, outputs, inputs, dtype, *, entries):
        """``empty``, ``steps`` (CUDA C++), ``few`` (row by row), ``cusparse`` or ``expand`` (dense, then cuBLAS)."""
        if tokens == 0 or outputs == 0:
            return "empty", "nothing to compute"
        density = entries / max(1, outputs * inputs)
        if csr_few.fits(tokens, outputs, inputs, dtype) and nvrtc.available(csr_few.shared_bytes(inputs, tokens)):
            read = "each is read once, and finds its activations by a step of 4 to 8 bits from the one before"
            return "steps", f"{tokens} tokens, {entries} entries ({density:.2g}): {read}"
        if tokens <= FEW and density * -(-tokens // 16) <= (0.6 if tokens == 1 else 0.3):
            read = f"each of the {entries} entries ({density:.2g}) is read once, and gathers its activations"
            return "few", f"{tokens} tokens: {read}"
        if dtype == torch.float32 and density <= 0.002:
            return "cusparse", f"density {density:.2g} in fp32: so few entries that cuSPARSE beats a dense product"
        why = f"density {density:.2g} at {tokens} tokens: no tensor core reads single entries"
        return "expand", f"{why}; expanded, cuBLAS runs"

    def check(self, x, weight, outputs, inputs):
        if weight[1].numel() != outputs + 1:
            raise ValueError(f"Expected crow of {outputs} rows, got {weight[1].numel() - 1}.")

    def arrange(self, x, variant):
        """(T, I) for ``steps``; else (1, I), or feature-major (I, W) with whole tiles of tokens."""
        if variant in self.cuda:
            return matrix_of(x, aligned=True, packed=True)
        return transpose.feature_major_rows(x, -(-x.shape[:-1].numel() // 16) * 16)

    def launch(self, variant, x, values, crow, col, bias, gate, y, activation):
        if variant == "steps":
            return csr_few.launch(x, values, crow, col, bias, gate, y, activation)
        tokens, outputs = y.shape
        stride = x.stride(1 if tokens == 1 else 0)

        def prepare(config):
            grid = (outputs, triton.cdiv(tokens, config["BT"]))
            launch = triton_launch(_rows, grid, WIDE=wide(x), ACTIVATION=activation, **overlap(x), **config)
            return lambda *tensors: launch(*tensors, tokens, outputs, stride)

        key = (x.dtype, outputs, values.numel().bit_length(), power_of_two(tokens, 1, 64))
        return autotune.pick("csr_few", key, _configs(tokens), prepare, (x, values, crow, col, bias, gate, y))

    def library(self, variant, x, *parts, shape, activation):
        def by_cusparse(x, values, crow, col, bias, gate):
            weight = torch.sparse_csr_tensor(crow, col, values, (shape[-1], x.shape[-1]), check_invariants=False)
            y = torch.mm(weight, x.reshape(-1, x.shape[-1]).T).T.reshape(shape)
            return epilogue.apply(y if bias is None else y + bias, activation, gate)

        return by_cusparse if variant == "cusparse" else None


linear = CSRLinear()
choose = linear.choose
linear_grad_input = ExpandedProduct(expand, "no tensor core reads single entries; expanded, cuBLAS runs")
linear_grad_values = CollectedProduct(collect)
