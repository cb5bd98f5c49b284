"""VectorNM(n, m, v): n of every m inputs, one pattern shared by v consecutive output rows, as a gathered dense GEMM.

Letters: T tokens, I inputs, O outputs, K = stored slots a row (groups * n); values (O, K), index (ceil(O/v), K).
BM output rows, BN tokens, BK slots a tile; S splits of the reduction. y[o, t] = sum_k values[o, k] * x[index[o//v, k], t].

The gather reads whole rows when activations are feature-major (I, T), so ordinary (T, I) activations are transposed
first, at memory speed; the output is written in either order at no cost. A few tokens are gathered as they lie.
"""

import functools

import torch
import triton
import triton.language as tl

from triton.tools.tensor_descriptor import TensorDescriptor

from . import autotune, epilogue, transpose
from .epilogue import activate, last_to_arrive
from .library import INTERPRET, Launch, describable, multiprocessors, operator, plan, power_of_two, precision, wide
from .tiles import grouped

FEW = 64  # tokens up to which the split-K kernel reads the weight once


@triton.jit
def _group_rows(tile, O, V: tl.constexpr, BM: tl.constexpr):
    """The pattern row of a row tile, its first row, and the row where its group or the matrix ends."""
    SUB: tl.constexpr = (V + BM - 1) // BM
    group = tile // SUB
    return group, group * V + (tile % SUB) * BM, tl.minimum(O, (group + 1) * V)


@triton.jit
def _columns(index_row, k0, k, K, I, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """The columns of slots k0 + k; beyond the end, a column that is not there (or, without tails, unused ones)."""
    if EVEN_K:
        return tl.load(index_row + tl.minimum(k0, K - BK) + k)
    return tl.load(index_row + k0 + k, mask=k0 + k < K, other=I)


@triton.jit
def _gather_gemm(
    x_ptr, w_desc, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr,
    T, I, O, K, stride_x, stride_yo, stride_yt,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, ROW_MAJOR: tl.constexpr, EVEN_T: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_I: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(O, V) * ((V + BM - 1) // BM), tl.cdiv(T, BN)
    tile_m, tile_n = grouped(tl.program_id(0), tiles_m, tiles_n, GROUP)
    group, row0, limit = _group_rows(tile_m, O, V, BM)
    rows = row0 + tl.arange(0, BM)
    t = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    if WIDE:
        rows, t = rows.to(tl.int64), t.to(tl.int64)
    row_ok = rows < limit
    w_rows = tl.minimum(rows, limit - 1)  # no mask on loads; not for stores, where it would hide that rows are contiguous
    index_row = index_ptr + group.to(tl.int64) * K
    acc = tl.zeros((BN, BM) if TOKENS_FIRST else (BM, BN), tl.float32)
    # The columns are loaded one step ahead, by hand: left to the compiler's pipeline, the chain index -> activations
    # costs one of its buffers of both operands.
    ahead = _columns(index_row, 0, k, K, I, BK, EVEN_K)
    for k0 in range(0, K, BK):
        columns = ahead
        ahead = _columns(index_row, k0 + BK, k, K, I, BK, EVEN_K)
        if WIDE:
            columns = columns.to(tl.int64)
        pointers = x_ptr + columns[:, None] * stride_x + t[None, :]
        if EVEN_K and EVEN_I and EVEN_T:
            x = tl.load(pointers)
        elif EVEN_T:
            x = tl.load(pointers, mask=(columns < I)[:, None], other=0.0)
        else:
            x = tl.load(pointers, mask=(columns < I)[:, None] & (t < T)[None, :], other=0.0)
        if w_desc is not None:
            w = w_desc.load([row0, k0])
        elif EVEN_K:
            w = tl.load(w_ptr + w_rows[:, None] * K + (k0 + k)[None, :])
        else:
            w = tl.load(w_ptr + w_rows[:, None] * K + (k0 + k)[None, :], mask=(k0 + k < K)[None, :], other=0.0)
        if TOKENS_FIRST:
            acc = tl.dot(tl.trans(x), tl.trans(w), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)

    if TOKENS_FIRST != ROW_MAJOR:
        acc = tl.trans(acc)
    o_axis: tl.constexpr = 0 if ROW_MAJOR else 1  # the axis along which an output index is broadcast
    offsets = tl.expand_dims(rows, o_axis) * stride_yo + tl.expand_dims(t, 1 - o_axis) * stride_yt
    mask = tl.expand_dims(row_ok, o_axis) & tl.expand_dims(t < T, 1 - o_axis)
    if bias_ptr is not None:
        acc += tl.expand_dims(tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32), o_axis)
    acc = activate(acc, ACTIVATION)
    if gate_ptr is not None:
        acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _few_tokens(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, K, stride_xi, stride_yo, stride_yt,
    V: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PIPE: tl.constexpr,
    PDL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    group, row0, limit = _group_rows(tile, O, V, BM)
    rows = row0 + tl.arange(0, BM)
    if WIDE:
        rows = rows.to(tl.int64)
    row_ok = rows < limit
    w_rows = tl.minimum(rows, limit - 1)
    t, k = tl.arange(0, BT), tl.arange(0, BK)
    index_row = index_ptr + group.to(tl.int64) * K
    steps = tl.cdiv(K, S * BK) * BK
    first, stop = split * steps, tl.minimum((split + 1) * steps, K)
    acc = tl.zeros((BM, BK) if BT == 1 else (BM, BT), tl.float32)
    if PDL:
        gdc_wait()  # the transpose before this kernel may still run: all until here overlaps with its end
    ahead = _columns(index_row, first, k, K, I, BK, EVEN_K)
    for k0 in tl.range(first, stop, BK, num_stages=PIPE):
        columns = ahead
        ahead = _columns(index_row, k0 + BK, k, K, I, BK, EVEN_K)
        w_at = w_ptr + w_rows[:, None] * K + (k0 + k)[None, :]
        w = tl.load(w_at) if EVEN_K else tl.load(w_at, mask=(k0 + k < K)[None, :], other=0.0)
        if BT == 1:
            if EVEN_K and EVEN_I:
                x = tl.load(x_ptr + columns * stride_xi)
            else:
                x = tl.load(x_ptr + columns * stride_xi, mask=columns < I, other=0.0)
            acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
        else:
            x_at = x_ptr + columns[:, None] * stride_xi + t[None, :]
            if EVEN_K and EVEN_I:
                x = tl.load(x_at)
            else:
                x = tl.load(x_at, mask=(columns < I)[:, None], other=0.0)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    if BT == 1:
        acc = tl.sum(acc, 1)[:, None]

    finish = True
    if S > 1:
        inside = tl.arange(0, BM)[:, None] * BT + t[None, :]
        own = partial_ptr + (tile * S).to(tl.int64) * (BM * BT)
        tl.store(own + split * (BM * BT) + inside, acc)
        finish = last_to_arrive(count_ptr + tile, S)
        if finish:  # in a fixed order, so that the sum does not depend on who came last
            acc = tl.zeros((BM, BT), tl.float32)
            for s in range(S):
                acc += tl.load(own + s * (BM * BT) + inside, cache_modifier=".cg")
    if finish:
        offsets = rows[:, None] * stride_yo + t[None, :] * stride_yt
        mask = row_ok[:, None] & (t < T)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION)
        if gate_ptr is not None:
            acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _values_gradient(
    g_ptr, x_ptr, index_ptr, out_ptr, T, I, O, K, stride_g, stride_x,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN_T: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[o, k] = sum_t g[t, o] * x[index[o//v, k], t]: here BN counts slots and BK tokens."""
    tiles_m, tiles_n = tl.cdiv(O, V) * ((V + BM - 1) // BM), tl.cdiv(K, BN)
    tile_m, tile_n = grouped(tl.program_id(0), tiles_m, tiles_n, GROUP)
    group, row0, limit = _group_rows(tile_m, O, V, BM)
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
def _expand(
    w_ptr, index_ptr, out_ptr, I, O, K,
    N: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes every element of a dense tile once: a column looks at the N slots of its own group."""
    group, row0, limit = _group_rows(tl.program_id(0), O, V, BM)
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


# ---- which variant, and with which tiles


@functools.lru_cache(maxsize=4096)
def choose(out_features: int, in_features: int, n: int, m: int, v: int, tokens: int, dtype: torch.dtype) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``gather`` (gathered GEMM) or ``expand`` (dense, then cuBLAS)."""
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    if tokens <= FEW:
        return "few", f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {n}/{m} of it once"
    kept = n / m
    if dtype == torch.float32:
        return "expand", "fp32 rows cannot feed the tensor cores token-major; expanded, cuBLAS runs"
    need = 0.75 if v >= 128 else 0.5 if v >= 64 else 0.26 if v >= 32 else 0.13 if v >= 16 else 0.0
    if kept > need:
        return "expand", f"v={v} rows share a gathered row, too few for {n}:{m} at {tokens} tokens; expanded, cuBLAS runs"
    return "gather", f"{n}:{m} with v={v}: the gathered GEMM does {kept:.3g} of the dense work on tensor cores"


def _many_configs(v: int, tokens: int) -> list[dict]:
    """TOKENS_FIRST: the tensor cores' 64 rows are tokens, for fewer output rows than that."""
    if INTERPRET:
        return [dict(BM=16, BN=16, BK=16, GROUP=2, TOKENS_FIRST=v < 16, num_stages=1)]
    if v >= 128:
        tiles = [(128, 256, 64, 4, 8), (128, 256, 64, 3, 8), (128, 128, 64, 3, 4), (128, 128, 64, 4, 8)]
    elif v >= 64:
        tiles = [(64, 256, 64, 3, 4), (64, 256, 64, 4, 8), (64, 128, 64, 4, 4), (64, 256, 32, 6, 4)]
    else:
        rows = power_of_two(v, 16, 32)
        tiles = [(rows, 256, 64, 3, 4), (rows, 256, 64, 4, 8), (rows, 128, 64, 4, 4)]
    tiles = [tile for tile in tiles if tile[1] <= transpose.padded(tokens)]
    return [dict(BM=a, BN=b, BK=c, GROUP=8, TOKENS_FIRST=a < 64, num_stages=d, num_warps=e) for a, b, c, d, e in tiles]


def _few_configs(v: int, tokens: int, rows: int, slots: int, programs: int) -> list[dict]:
    if INTERPRET:
        return [dict(BM=16, BK=16, S=2 if slots > 32 else 1, PIPE=None)]
    if tokens == 1:
        tiles = [(16, 256, 4, None), (8, 512, 4, None), (32, 256, 4, None), (16, 512, 4, None)]
    else:
        tiles = [(64, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 5), (128, 128, 4, 3)]
    found = []
    for height, depth, warps, stages in tiles:
        height = min(height, power_of_two(v, 1 if tokens == 1 else 16, 128))
        tiles_m = -(-rows // v) * -(-v // height)
        split = 1
        while tiles_m * split < 3 * programs and split < 32 and slots // (2 * split) >= depth:
            split *= 2
        found.append(dict(BM=height, BK=depth, S=split, PIPE=stages, num_warps=warps))
    return [config for place, config in enumerate(found) if config not in found[:place]]


def _gradient_configs(v: int, itemsize: int) -> list[dict]:
    if INTERPRET:
        return [dict(BM=16, BN=16, BK=16, GROUP=2, num_stages=1)]
    rows = power_of_two(v, 16, 128)
    depth = 64 if itemsize == 2 else 32
    tiles = [(rows, 128, 4, 4), (rows, 256, 3, 8), (rows, 128, 4, 8)]
    return [dict(BM=a, BN=b, BK=depth, GROUP=8, num_stages=c, num_warps=d) for a, b, c, d in tiles]


# ---- launchers


def _descriptor(values, config):
    if not describable(values):
        return None
    return TensorDescriptor(values, values.shape, values.stride(), [config["BM"], config["BK"]])


def _plan_many(x, values, index, bias, gate, y, tokens, row_major, n, m, v, activation):
    """x is feature-major (I, >= tokens), its rows contiguous; y is (T, O) when row_major, else (O, T)."""
    inputs, (outputs, slots) = x.shape[0], values.shape
    strides = (x.stride(0), *((1, outputs) if row_major else (tokens, 1)))

    def prepare(config):
        rows, width = config["BM"], config["BN"]
        launch = Launch(
            _gather_gemm, (triton.cdiv(outputs, v) * triton.cdiv(v, rows) * triton.cdiv(tokens, width),),
            V=v, ROW_MAJOR=row_major, EVEN_T=x.shape[1] >= triton.cdiv(tokens, width) * width,
            EVEN_K=slots % config["BK"] == 0, EVEN_I=slots * m == inputs * n, WIDE=wide(x, values, y),
            ACTIVATION=activation, PRECISION=precision(x), **config,
        )  # fmt: skip

        def call(x, values, index, bias, gate, y):
            launch(
                x, _descriptor(values, config), values, index, bias, gate, y, tokens, inputs, outputs, slots, *strides
            )

        return call

    key = (x.dtype, outputs, inputs, slots, v, tokens.bit_length(), row_major)
    configs = _many_configs(v, tokens)
    return prepare(autotune.pick("vector_nm_many", key, configs, lambda c: prepare(c)(x, values, index, bias, gate, y), x))


def _plan_few(x, values, index, bias, gate, y, tokens, inputs, row_major, n, m, v, activation):
    """x is (1, I) in any order, or feature-major (I, W) with W >= the tile's tokens."""
    outputs, slots = values.shape
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    strides = (x.stride(1 if tokens == 1 else 0), *((1, outputs) if row_major else (tokens, 1)))
    overlap = tokens > 1 and row_major and not INTERPRET  # then the kernel before this one is the transpose

    def prepare(config):
        tiles, split = triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"]), config["S"]
        launch = Launch(
            _few_tokens, (tiles, split), V=v, BT=width, PDL=overlap, EVEN_K=slots % config["BK"] == 0,
            EVEN_I=slots * m == inputs * n, WIDE=wide(x, values), ACTIVATION=activation, PRECISION=precision(x),
            **config, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip

        def call(x, values, index, bias, gate, y):
            partial = count = x  # unused without a split, but a pointer is
            if split > 1:
                partial = torch.empty(tiles * split * config["BM"] * width, dtype=torch.float32, device=x.device)
                count = epilogue.counters.take(x, tiles)
            launch(x, values, index, bias, gate, y, partial, count, tokens, inputs, outputs, slots, *strides)

        return call

    key = (x.dtype, outputs, inputs, slots, v, width)
    configs = _few_configs(v, tokens, outputs, slots, multiprocessors(x))
    return prepare(autotune.pick("vector_nm_few", key, configs, lambda c: prepare(c)(x, values, index, bias, gate, y), x))


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """x (T, I) -> (I, padded T), the form the gather reads; the padding is unwritten."""
    return transpose.transpose(x, transpose.padded(x.shape[0]))


def _check(x, values, index, inputs, n, m, v, out_features):
    if x.dtype != values.dtype or index.dtype != torch.int32:
        raise TypeError(f"x is {x.dtype}, values {values.dtype} and index {index.dtype}; expected one dtype and int32")
    if values.shape != (out_features, -(-inputs // m) * n) or index.shape != (-(-out_features // v), values.shape[1]):
        raise ValueError(f"values {tuple(values.shape)} and index {tuple(index.shape)} do not hold ({out_features}, {inputs}) as {n}:{m}, v={v}")  # fmt: skip


def _linear_fake(x, values, index, bias, gate, n, m, v, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_vector_nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n, int m, int v,"
    " int out_features, str activation) -> Tensor",
    _linear_fake,
)
def _linear(x, values, index, bias, gate, n, m, v, out_features, activation):
    inputs = x.shape[-1]
    _check(x, values, index, inputs, n, m, v, out_features)
    gate = None if gate is None else gate.contiguous()
    statics = ("vector_nm", n, m, v, out_features, activation, precision(x))
    return plan(statics, (x, values, index, bias, gate), lambda: _plan_row_major(*statics[1:6], x, values, index, bias, gate))(
        x, values, index, bias, gate
    )


def _plan_row_major(n, m, v, outputs, activation, x, values, index, bias, gate):
    """The callable for ordinary activations; plans are made on the first call's tensors, whose output they overwrite."""
    inputs, shape = x.shape[-1], (*x.shape[:-1], outputs)
    _check(x, values, index, inputs, n, m, v, outputs)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, n, m, v, tokens, x.dtype)
    if variant == "empty":
        return lambda x, values, index, bias, gate: x.new_empty(shape)
    if variant == "expand":

        def call(x, values, index, bias, gate):
            dense = expand(values, index, n=n, m=m, v=v, in_features=inputs)
            return epilogue.apply(torch.nn.functional.linear(x, dense, bias), activation, gate)

        return call
    direct = tokens == 1  # one token is row-major and feature-major at once
    width = power_of_two(tokens, 16, FEW) if variant == "few" else transpose.padded(tokens)

    def arrange(x):
        flat = x.reshape(tokens, inputs)
        return flat if direct and variant == "few" else transpose.transpose_now(flat, width)

    make = _plan_many if variant == "gather" else functools.partial(_plan_few, inputs=inputs)
    y = x.new_empty(tokens, outputs)
    run = make(
        arrange(x), values, index, bias, gate, y, tokens=tokens, row_major=True, n=n, m=m, v=v, activation=activation
    )

    def call(x, values, index, bias, gate):
        y = x.new_empty(shape)
        run(arrange(x), values, index, bias, gate, y)
        return y

    return call


def _feature_major_fake(x, values, index, bias, gate, n, m, v, activation):
    return x.new_empty(values.shape[0], x.shape[1])


@operator(
    "gpu_vector_nm_linear_feature_major(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n, int m,"
    " int v, str activation) -> Tensor",
    _feature_major_fake,
)
def _linear_feature_major(x, values, index, bias, gate, n, m, v, activation):
    (inputs, tokens), outputs = x.shape, values.shape[0]
    _check(x, values, index, inputs, n, m, v, outputs)
    y = x.new_empty(outputs, tokens)
    gate = None if gate is None else gate.contiguous()
    if tokens == 0 or outputs == 0:
        return y
    variant, _ = choose(outputs, inputs, n, m, v, tokens, x.dtype)
    if variant == "expand":
        y = torch.mm(expand(values, index, n=n, m=m, v=v, in_features=inputs), x)
        return epilogue.apply(y if bias is None else y + bias[:, None], activation, gate)
    width = transpose.padded(tokens) if variant == "gather" else 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    whole = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if not whole and tokens > 1 or variant == "few" and tokens < width:
        x = torch.nn.functional.pad(x, (0, width - tokens))
    statics = ("vector_nm feature-major", n, m, v, activation, precision(x), tokens)

    def make():
        given = dict(tokens=tokens, row_major=False, n=n, m=m, v=v, activation=activation)
        if variant == "gather":
            return _plan_many(x, values, index, bias, gate, y, **given)
        return _plan_few(x.T if tokens == 1 else x, values, index, bias, gate, y, inputs=inputs, **given)

    plan(statics, (x, values, index, bias, gate), make)(x, values, index, bias, gate, y)
    return y


def _values_fake(grad, x, index, n, m, v, feature_major):
    return x.new_empty(grad.shape[-1], index.shape[1])


@operator(
    "gpu_vector_nm_grad_values(Tensor grad, Tensor x, Tensor index, int n, int m, int v, bool feature_major) -> Tensor",
    _values_fake,
)
def _grad_values(grad, x, index, n, m, v, feature_major_x):
    outputs, slots = grad.shape[-1], index.shape[1]
    grad = grad.reshape(-1, outputs).contiguous()
    tokens = grad.shape[0]
    out = grad.new_empty(outputs, slots)
    if tokens == 0 or out.numel() == 0:
        return out.zero_()
    x = x if feature_major_x else feature_major(x.reshape(-1, x.shape[-1]))

    def run(config):
        grid = (triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"]) * triton.cdiv(slots, config["BN"]),)
        _values_gradient[grid](
            grad, x, index, out, tokens, x.shape[0], outputs, slots, outputs, x.stride(0),
            V=v, EVEN_T=tokens % config["BK"] == 0, WIDE=wide(grad, x, out), PRECISION=precision(x), **config,
        )  # fmt: skip

    key = (x.dtype, outputs, x.shape[0], slots, v, tokens.bit_length())
    run(autotune.pick("vector_nm_grad_values", key, _gradient_configs(v, x.element_size()), run, x))
    return out


def _expand_fake(values, index, n, m, v, in_features):
    return values.new_empty(values.shape[0], in_features)


@operator("gpu_vector_nm_expand(Tensor values, Tensor index, int n, int m, int v, int in_features) -> Tensor", _expand_fake)
def _expand_op(values, index, n, m, v, in_features):
    outputs, slots = values.shape
    dense = values.new_empty(outputs, in_features)
    rows, width = (16, 32) if INTERPRET else (power_of_two(v, 4, 32), 256)
    grid = (triton.cdiv(outputs, v) * triton.cdiv(v, rows), triton.cdiv(in_features, width))
    if dense.numel():
        _expand[grid](
            values, index, dense, in_features, outputs, slots, N=n, M=m, V=v, BM=rows, BC=width, WIDE=wide(dense)
        )
    return dense


# ---- what the framework calls


def linear(x, values, index, bias=None, *, n, m, v, out_features, activation=None, gate=None):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""
    return _linear(x, values, index, bias, gate, n, m, v, out_features, epilogue.activation_name(activation))


def linear_feature_major(x, values, index, bias=None, *, n, m, v, activation=None, gate=None):
    """x (I, T) -> activation(W @ x + bias) * gate, (O, T): a chain of such layers transposes once, at its start."""
    return _linear_feature_major(x, values, index, bias, gate, n, m, v, epilogue.activation_name(activation))


def gated_linear(x, up, gate, *, n, m, v, out_features, activation="silu"):
    """activation(x @ W_gate.T) * (x @ W_up.T), where ``up`` and ``gate`` are each (values, index)."""
    other = linear(x, *up, n=n, m=m, v=v, out_features=out_features)
    return linear(x, *gate, n=n, m=m, v=v, out_features=out_features, activation=activation, gate=other)


def linear_grad_input(grad, values, index, *, n, m, v, in_features):
    """grad (*, O) -> grad @ W, (*, I). Rows of one group share no column of the result, so it expands and calls cuBLAS."""
    return torch.matmul(grad, expand(values, index, n=n, m=m, v=v, in_features=in_features))


def linear_grad_values(grad, x, index, *, n, m, v, feature_major=False):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K); with ``feature_major``, x is (I, T)."""
    return _grad_values(grad, x, index, n, m, v, feature_major)


def expand(values, index, *, n, m, v, in_features):
    """The dense weight (O, I)."""
    return _expand_op(values, index, n, m, v, in_features)
