"""CSR: any pattern. A few tokens straight from the stored values; more by a dense expansion, or cuSPARSE where it wins.

Letters: T tokens, I inputs, O outputs; a row's entries are crow[r] to crow[r + 1]; BE entries and BT tokens a tile.
"""

import functools

import torch
import triton
import triton.language as tl

from . import autotune, epilogue, transpose
from .epilogue import activate
from .library import INTERPRET, Launch, contiguous, filled, operator, overlap, plan, power_of_two, wide
from .tiles import begin

FEW = 64  # tokens up to which reading the entries, once for each 16 tokens, can cost less than a dense expansion


@triton.jit
def _rows(
    x_ptr, values_ptr, crow_ptr, col_ptr, bias_ptr, gate_ptr, y_ptr, T, O, stride_x,
    BE: tl.constexpr, BT: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row a program: a gather of the activations at its columns. x is feature-major (I, >= BT tokens a tile)."""
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
    tl.debug_barrier()  # another thread of the program may have zeroed the place
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


# ---- which variant


@functools.lru_cache(maxsize=4096)
def choose(out_features: int, in_features: int, entries: int, tokens: int, dtype: torch.dtype) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (row by row), ``cusparse`` or ``expand`` (dense, then cuBLAS)."""
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    density = entries / max(1, out_features * in_features)
    if tokens <= FEW and density * -(-tokens // 16) <= (0.6 if tokens == 1 else 0.3):
        return (
            "few",
            f"{tokens} tokens: each of the {entries} entries ({density:.2g}) is read once, and gathers its activations",
        )
    if dtype == torch.float32 and density <= 0.002:
        return "cusparse", f"density {density:.2g} in fp32: so few entries that cuSPARSE beats a dense product"
    return (
        "expand",
        f"density {density:.2g} at {tokens} tokens: no tensor core reads single entries; expanded, cuBLAS runs",
    )


def _configs(tokens: int) -> list[dict]:
    if INTERPRET:
        return [{"BE": 16, "BT": 1 if tokens == 1 else 16}]
    if tokens == 1:
        return [{"BE": e, "BT": 1, "num_warps": w} for e, w in ((256, 1), (512, 1), (1024, 4))]
    return [{"BE": e, "BT": 16, "num_warps": w} for e, w in ((32, 1), (64, 1))]


# ---- launchers


def _plan_few(x, values, crow, col, bias, gate, y, tokens, activation):
    """x is (1, I), or feature-major (I, W) with whole tiles of tokens."""
    outputs, stride = crow.numel() - 1, x.stride(1 if tokens == 1 else 0)

    def prepare(config):
        grid = (outputs, triton.cdiv(tokens, config["BT"]))
        launch = Launch(_rows, grid, WIDE=wide(x), ACTIVATION=activation, **overlap(x), **config)

        def call(x, values, crow, col, bias, gate, y):
            launch(x, values, crow, col, bias, gate, y, tokens, outputs, stride)

        return call

    key = (x.dtype, outputs, values.numel().bit_length(), power_of_two(tokens, 1, 64))
    given = (x, values, crow, col, bias, gate, y)
    return autotune.pick("csr_few", key, _configs(tokens), prepare, given)


def _linear_fake(x, values, crow, col, bias, gate, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_csr_linear(Tensor x, Tensor values, Tensor crow, Tensor col, Tensor? bias, Tensor? gate, int out_features,"
    " str activation) -> Tensor",
    _linear_fake,
)
def _linear(x, values, crow, col, bias, gate, out_features, activation):
    bias, gate = contiguous(bias, gate)
    tensors = (x, values, crow, col, bias, gate)
    return plan(("csr", out_features, activation), tensors, lambda: _plan_linear(*tensors, out_features, activation))(
        *tensors
    )


def _plan_linear(x, values, crow, col, bias, gate, outputs, activation):
    """The callable for one layout of arguments; it is made on the first call's tensors."""
    if x.dtype != values.dtype or crow.numel() != outputs + 1:
        raise ValueError(f"x is {x.dtype} and values {values.dtype}, for {crow.numel() - 1} rows of {outputs} outputs")
    inputs, shape = x.shape[-1], (*x.shape[:-1], outputs)
    epilogue.check(outputs, shape, (bias,), gate)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, values.numel(), tokens, x.dtype)
    if variant == "empty":
        return lambda x, *rest: x.new_empty(shape)
    if variant != "few":
        dense = _plan_expand(values, crow, col, inputs)

        def call(x, values, crow, col, bias, gate):
            if variant == "cusparse":
                weight = torch.sparse_csr_tensor(crow, col, values, (outputs, inputs), check_invariants=False)
                y = torch.mm(weight, x.reshape(tokens, inputs).T).T.reshape(shape)
                y = y if bias is None else y + bias
            else:
                y = torch.nn.functional.linear(x, dense(values, crow, col), bias)
            return epilogue.apply(y, activation, gate)

        return call

    turn = transpose.prepared_rows(x, -(-tokens // 16) * 16)
    run = _plan_few(turn(x), values, crow, col, bias, gate, x.new_empty(tokens, outputs), tokens, activation)
    return filled(run, x, shape, arrange=turn)


def _expand_fake(values, crow, col, in_features):
    return values.new_empty(crow.shape[0] - 1, in_features)


@operator("gpu_csr_expand(Tensor values, Tensor crow, Tensor col, int in_features) -> Tensor", _expand_fake)
def _expand(values, crow, col, in_features):
    given = (values, crow, col)
    return plan(("csr expand", in_features), given, lambda: _plan_expand(*given, in_features), strided=None)(*given)


def _plan_expand(values, crow, col, inputs):
    """values, crow, col -> the dense weight."""
    outputs = crow.numel() - 1
    launch = Launch(_expand_row, (outputs,), BC=16 if INTERPRET else 1024)
    return filled(launch, values, (outputs, inputs), inputs)


def _collect_fake(dense, crow, col):
    return dense.new_empty(col.shape[0])


@operator("gpu_csr_collect(Tensor dense, Tensor crow, Tensor col) -> Tensor", _collect_fake)
def _collect(dense, crow, col):
    given = (dense.contiguous(), crow, col)
    return plan(("csr collect",), given, lambda: _plan_collect(*given))(*given)


def _plan_collect(dense, crow, col):
    (outputs, inputs), entries = dense.shape, col.numel()
    launch = Launch(_collect_row, (outputs,), BC=16 if INTERPRET else 256)
    return filled(launch, dense, (entries,), inputs)


# ---- what the framework calls


def linear(x, values, crow, col, bias=None, *, out_features, activation=None, gate=None):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O)."""
    return _linear(x, values, crow, col, bias, gate, out_features, epilogue.activation_name(activation))


def linear_grad_input(grad, values, crow, col, *, in_features):
    """grad (*, O) -> grad @ W, (*, I)."""
    return torch.matmul(grad, expand(values, crow, col, in_features=in_features))


def linear_grad_values(grad, x, crow, col):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (nnz,): a dense product, collected at the pattern."""
    return collect(grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]), crow, col)


def expand(values, crow, col, *, in_features):
    """The dense weight (O, I)."""
    return _expand(values, crow, col, in_features)


def collect(dense, crow, col):
    """A dense matrix (O, I) at the pattern: values (nnz,)."""
    return _collect(dense, crow, col)
