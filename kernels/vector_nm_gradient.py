"""VectorNM's training side: the gradient of the values as a gathered product, and the expansion to a dense weight.

Letters as in ``vector_nm``: T tokens, I inputs, O outputs, K slots a row; tiles as each kernel says.
"""

import functools

import triton
import triton.language as tl

from . import autotune, transpose
from .backend import INTERPRET
from .launch import gradient_into_new, into_new, triton_launch
from .operators import operator
from .precision import exact, precision
from .tiles import grouped, power_of_two, wide
from .vector_nm_gemm import group_rows


@triton.jit
def _values_gradient(
    g_ptr, x_ptr, index_ptr, out_ptr, T, I, O, K, stride_g, stride_x,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_T: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[o, k] = sum_t g[t, o] * x[index[o//v, k], t]: here BN counts slots and BK tokens."""
    tiles_m, tiles_n = tl.cdiv(O, V) * ((V + BM - 1) // BM), tl.cdiv(K, BN)
    tile_m, tile_n = grouped(tl.program_id(0), tiles_m, tiles_n, GROUP)
    group, row0, limit = group_rows(tile_m, O, V, BM)
    rows = row0 + tl.arange(0, BM)
    slots = tile_n * BN + tl.arange(0, BN)
    columns = tl.load(index_ptr + group.to(tl.int64) * K + slots, mask=slots < K, other=I)
    column_ok = columns < I  # padded columns have no activation, and their gradient is zero
    t = tl.arange(0, BK)
    if WIDE:
        columns, t, rows = columns.to(tl.int64), t.to(tl.int64), rows.to(tl.int64)
    row_ok = rows < limit
    x_at = x_ptr + tl.where(column_ok, columns, 0)[:, None] * stride_x + t[None, :]
    g_at = g_ptr + t[:, None] * stride_g + rows[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for t0 in range(0, T, BK):
        if EVEN_T:
            g = tl.load(g_at, mask=row_ok[None, :], other=0.0)
            x = tl.load(x_at, mask=column_ok[:, None], other=0.0)
        else:
            g = tl.load(g_at, mask=(t0 + t < T)[:, None] & row_ok[None, :], other=0.0)
            x = tl.load(x_at, mask=(t0 + t < T)[None, :] & column_ok[:, None], other=0.0)
        acc = tl.dot(tl.trans(g), tl.trans(x), acc, input_precision=PRECISION)
        g_at += BK * stride_g
        x_at += BK
    at = out_ptr + rows[:, None] * K + slots[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & (slots < K)[None, :])


@triton.jit
def _expand_tile(
    w_ptr, index_ptr, out_ptr, I, O, K,
    N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes every element of a dense tile once: a column looks at the N slots of its own group."""
    group, row0, limit = group_rows(tl.program_id(0), O, V, BM)
    rows = row0 + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    if WIDE:
        rows, c = rows.to(tl.int64), c.to(tl.int64)
    row_ok = rows < limit
    w_rows = tl.minimum(rows, limit - 1)
    dense = tl.zeros((BM, BC), w_ptr.dtype.element_ty)
    for s in tl.static_range(N):
        slot = c // M * N + s
        mine = (tl.load(index_ptr + group.to(tl.int64) * K + slot, mask=slot < K, other=-1) == c) & (c < I)
        w = tl.load(w_ptr + w_rows[:, None] * K + slot[None, :], mask=mine[None, :], other=0)
        dense = tl.where(mine[None, :], w, dense)
    tl.store(out_ptr + rows[:, None] * I + c[None, :], dense, mask=row_ok[:, None] & (c < I)[None, :])


def _gradient_configs(v: int, itemsize: int, exactly: bool) -> list[dict]:
    if INTERPRET:
        return [{"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "num_stages": 1}]
    rows = power_of_two(v, 16, 128)
    depth = 64 if itemsize == 2 else 32
    tiles = [(rows, 256, 4, 8), (rows, 128, 4, 4), (rows, 128, 4, 8)]
    if exactly:
        depth, tiles = 16, [(rows, 128, 3, 8), (rows, 64, 3, 8), (min(rows, 64), 64, 3, 4)]
    return [{"BM": a, "BN": b, "BK": depth, "GROUP": 8, "num_stages": c, "num_warps": d} for a, b, c, d in tiles]


def choose_grad_values(tokens, outputs, inputs, dtype, *, n, m, v) -> tuple[str, str]:
    """(variant, reason) of the values' gradient: ``gather``."""
    return "gather", f"a gathered product of {n}/{m} of the dense work"


@operator(
    "gpu_vector_nm_grad_values(Tensor grad, Tensor x, Tensor index, int n, int m, int v, bool feature_major=False)"
    " -> Tensor",
    lambda grad, x, index, *numbers: (grad.shape[-1], index.shape[1]),
    strided=("grad", "x"),
    choose=choose_grad_values,
)
def grad_values(grad, x, index, n, m, v, feature_major, variant=None):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K); with ``feature_major``, x is (I, T or wider)."""
    outputs, slots = grad.shape[-1], index.shape[1]
    tokens = grad.shape[:-1].numel()
    if tokens == 0 or outputs == 0 or slots == 0:
        return lambda grad, *rest: grad.new_zeros(outputs, slots)
    arrange = None if feature_major else transpose.prepared(x, transpose.padded(tokens))
    return gradient_into_new(functools.partial(_launch, v), grad, x, (index,), (outputs, slots), arrange)


def _launch(v, grad, x, index, out):
    (tokens, outputs), slots, inputs, stride = grad.shape, index.shape[1], x.shape[0], x.stride(0)

    def prepare(config):
        grid = (triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"]) * triton.cdiv(slots, config["BN"]),)
        launch = triton_launch(
            _values_gradient, grid, V=v, EVEN_T=tokens % config["BK"] == 0, WIDE=wide(grad, x, out),
            PRECISION=precision(x.dtype), **config,
        )  # fmt: skip

        def call(grad, x, index, out):
            launch(grad, x, index, out, tokens, inputs, outputs, slots, outputs, stride)

        return call

    key = (x.dtype, outputs, inputs, slots, v, tokens.bit_length())
    configs = _gradient_configs(v, x.element_size(), exact(x.dtype))
    return autotune.pick("vector_nm_grad_values", key, configs, prepare, (grad, x, index, out))


@operator(
    "gpu_vector_nm_expand(Tensor values, Tensor index, int n, int m, int v, int in_features) -> Tensor",
    lambda values, index, n, m, v, in_features: (values.shape[0], in_features),
    strided=(),
)
def expand(values, index, n, m, v, in_features):
    """values, index -> the dense weight (O, I)."""
    (outputs, slots), (rows, width) = values.shape, (16, 32) if INTERPRET else (power_of_two(v, 4, 32), 256)
    grid = (triton.cdiv(outputs, v) * triton.cdiv(v, rows), triton.cdiv(in_features, width))
    launch = triton_launch(_expand_tile, grid, N=n, M=m, V=v, BM=rows, BC=width, WIDE=outputs * in_features >= 2**31)
    return into_new(launch, values, (outputs, in_features), in_features, outputs, slots)
