"""VectorNM(n, m, v): n of every m inputs, one pattern shared by v consecutive output rows, as a gathered dense GEMM.

Letters: T tokens, I inputs, O outputs, K = stored slots a row (groups * n); values (O, K), index (ceil(O/v), K).
BM output rows, BN tokens, BK slots a tile; S splits of the reduction.
y[o, t] = sum_k values[o, k] * x[index[o//v, k], t].

The gather reads whole rows when activations are feature-major (I, T), so ordinary (T, I) activations are transposed
first, at memory speed; the output is written in either order at no cost. A few tokens are gathered as they lie.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from . import autotune, epilogue, transpose
from .epilogue import activate, last_to_arrive
from .library import INTERPRET, Launch, describable, multiprocessors, operator, plan, power_of_two, precision, wide
from .vector_nm_gemm import gather_gemm, group_rows, load_columns
from .vector_nm_gradient import expand as expand_parts
from .vector_nm_gradient import grad_values

FEW = 64  # tokens up to which the split-K kernel reads the weight once


@triton.jit
def _few_tokens(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    T, I, O, K, stride_xi, stride_yo, stride_yt,
    V: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PIPE: tl.constexpr,
    PDL: tl.constexpr, EVEN_K: tl.constexpr, EVEN_I: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    group, row0, limit = group_rows(tile, O, V, BM)
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
    ahead = load_columns(index_row, first, k, K, I, BK, EVEN_K)
    for k0 in tl.range(first, stop, BK, num_stages=PIPE):
        columns = ahead
        ahead = load_columns(index_row, k0 + BK, k, K, I, BK, EVEN_K)
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


# ---- which variant, and with which tiles


@functools.lru_cache(maxsize=4096)
def choose(
    out_features: int, in_features: int, n: int, m: int, v: int, tokens: int, dtype: torch.dtype
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``gather`` (tensor cores) or ``expand`` (dense, then cuBLAS)."""
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {n}/{m} of it once",
        )
    kept = n / m
    if dtype == torch.float32:
        return "expand", "fp32 rows cannot feed the tensor cores token-major; expanded, cuBLAS runs"
    need = 0.75 if v >= 128 else 0.5 if v >= 64 else 0.26 if v >= 32 else 0.13 if v >= 16 else 0.0
    if kept > need:
        return (
            "expand",
            f"v={v} rows share a gathered row, too few for {n}:{m} at {tokens} tokens; expanded, cuBLAS runs",
        )
    return "gather", f"{n}:{m} with v={v}: the gathered GEMM does {kept:.3g} of the dense work on tensor cores"


def _many_configs(v: int, tokens: int) -> list[dict]:
    """PER_SM: 0 for one tile a program, else how many persistent programs a multiprocessor holds.

    TOKENS_FIRST: the tensor cores' 64 rows are tokens, for fewer output rows than that.
    """
    if INTERPRET:
        return [
            {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "TOKENS_FIRST": v < 16, "PER_SM": tokens % 2, "num_stages": 1}
        ]
    if v >= 128:
        tiles = [(128, 256, 0, 4, 8), (128, 256, 1, 3, 8), (128, 128, 2, 3, 4), (128, 128, 0, 3, 4)]
    elif v >= 64:
        tiles = [(64, 256, 1, 3, 4), (64, 128, 3, 3, 4), (64, 256, 0, 4, 8), (64, 128, 0, 3, 4)]
    else:
        rows = power_of_two(v, 16, 32)
        tiles = [(rows, 256, 0, 3, 4), (rows, 128, 3, 3, 4), (rows, 256, 0, 2, 4), (rows, 128, 0, 3, 4)]
    tiles = [tile for tile in tiles if tile[1] <= transpose.padded(tokens)]
    return [
        {
            "BM": rows,
            "BN": width,
            "BK": 64,
            "GROUP": 32,
            "TOKENS_FIRST": rows < 64 or (v < 128 and width < 256),
            "PER_SM": p,
            "num_stages": stages,
            "num_warps": warps,
        }
        for rows, width, p, stages, warps in tiles
    ]


def _few_configs(v: int, tokens: int, rows: int, slots: int, programs: int) -> list[dict]:
    if INTERPRET:
        return [{"BM": 16, "BK": 16, "S": 2 if slots > 32 else 1, "PIPE": None}]
    if tokens == 1:
        tiles = [(8, 512, 4, None), (4, 512, 4, None), (8, 256, 2, None), (4, 512, 2, None)]
    else:
        tiles = [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3)]
    found = []
    for height, depth, warps, stages in tiles:
        height = min(height, power_of_two(v, 1 if tokens == 1 else 16, 128))
        tiles_m, split = -(-rows // v) * -(-v // height), 1
        # enough programs for every multiprocessor; a split more than that only writes and reads more partial sums
        while tiles_m * split < programs and split < 16 and slots // (2 * split) >= depth:
            split *= 2
        for s in (split,) if stages != 3 or tokens == 1 else (split, 2 * split):
            found.append({"BM": height, "BK": depth, "S": s, "PIPE": stages, "num_warps": warps})
    return [config for place, config in enumerate(found) if config not in found[:place]]


# ---- launchers


def _plan_many(x, values, index, bias, gate, y, tokens, row_major, n, m, v, activation):
    """x is feature-major (I, >= tokens), its rows contiguous; y is (T, O) when row_major, else (O, T)."""
    inputs, (outputs, slots) = x.shape[0], values.shape
    strides = (x.stride(0), *((1, outputs) if row_major else (tokens, 1)))

    def prepare(config):
        config = dict(config)
        rows, width, resident = config["BM"], config["BN"], config.pop("PER_SM")
        tiles = triton.cdiv(outputs, v) * triton.cdiv(v, rows) * triton.cdiv(tokens, width)
        programs = min(tiles, resident * multiprocessors(x)) if resident else tiles
        described = {1: ([rows, config["BK"]], values.shape, values.stride())} if describable(values) else {}
        launch = Launch(
            gather_gemm, (programs,), described, V=v, ROW_MAJOR=row_major, PERSISTENT=programs < tiles,
            EVEN_T=x.shape[1] >= triton.cdiv(tokens, width) * width,
            EVEN_K=slots % config["BK"] == 0, EVEN_I=slots * m == inputs * n, WIDE=wide(x, values, y),
            ACTIVATION=activation, PRECISION=precision(x), **config,
        )  # fmt: skip

        def call(x, values, index, bias, gate, y):
            launch(
                x, values if described else None, values, index, bias, gate, y,
                tokens, inputs, outputs, slots, *strides, tiles, programs,
            )  # fmt: skip

        return call

    key = (x.dtype, outputs, inputs, slots, v, tokens.bit_length(), row_major)
    configs = _many_configs(v, tokens)
    return autotune.pick("vector_nm_many", key, configs, prepare, (x, values, index, bias, gate, y))


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
    return autotune.pick("vector_nm_few", key, configs, prepare, (x, values, index, bias, gate, y))


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """x (T, I) -> (I, padded T), the form the gather reads; the padding is unwritten."""
    return transpose.transpose(x, transpose.padded(x.shape[0]))


def _check(x, values, index, inputs, n, m, v, out_features):
    if x.dtype != values.dtype or index.dtype != torch.int32:
        raise TypeError(f"x is {x.dtype}, values {values.dtype} and index {index.dtype}; expected one dtype and int32")
    if values.shape != (out_features, -(-inputs // m) * n) or index.shape != (-(-out_features // v), values.shape[1]):
        parts = f"values {tuple(values.shape)} and index {tuple(index.shape)}"
        raise ValueError(f"{parts} do not hold ({out_features}, {inputs}) as {n}:{m}, v={v}")


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
    return plan(
        statics, (x, values, index, bias, gate), lambda: _plan_row_major(*statics[1:6], x, values, index, bias, gate)
    )(x, values, index, bias, gate)


def _plan_row_major(n, m, v, outputs, activation, x, values, index, bias, gate):
    """The callable for ordinary activations; it is made, and its tiles are timed, on the first call's tensors."""
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

    flat = x.reshape(tokens, inputs)
    if direct and variant == "few":
        turn = lambda flat: flat  # noqa: E731
    else:
        turn = transpose.prepared(flat, width, early=variant == "few" and not INTERPRET)

    make = _plan_many if variant == "gather" else functools.partial(_plan_few, inputs=inputs)
    y = x.new_empty(tokens, outputs)
    run = make(
        turn(flat), values, index, bias, gate, y, tokens=tokens, row_major=True, n=n, m=m, v=v, activation=activation
    )

    def call(x, values, index, bias, gate):
        y = x.new_empty(shape)
        run(turn(x.reshape(tokens, inputs)), values, index, bias, gate, y)
        return y

    return call


def _feature_major_fake(x, values, index, bias, gate, n, m, v, activation, tokens, row_major):
    outputs = values.shape[0]
    return x.new_empty((tokens, outputs) if row_major else (outputs, tokens))


@operator(
    "gpu_vector_nm_linear_feature_major(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n,"
    " int m, int v, str activation, SymInt tokens, bool row_major) -> Tensor",
    _feature_major_fake,
)
def _linear_feature_major(x, values, index, bias, gate, n, m, v, activation, tokens, row_major):
    inputs, outputs = x.shape[0], values.shape[0]
    _check(x, values, index, inputs, n, m, v, outputs)
    y = x.new_empty((tokens, outputs) if row_major else (outputs, tokens))
    if tokens == 0 or outputs == 0:
        return y
    gate = None if gate is None else gate.contiguous()
    variant, _ = choose(outputs, inputs, n, m, v, tokens, x.dtype)
    if variant == "expand":
        dense, x = expand(values, index, n=n, m=m, v=v, in_features=inputs), x[:, :tokens]
        if row_major:
            return epilogue.apply(torch.nn.functional.linear(x.T, dense, bias), activation, gate)
        y = torch.mm(dense, x)
        return epilogue.apply(y if bias is None else y + bias[:, None], activation, gate)
    width = transpose.padded(tokens) if variant == "gather" else 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    whole = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if tokens > 1 and (not whole or (variant == "few" and x.shape[1] < width)):
        x = torch.nn.functional.pad(x[:, :tokens], (0, width - tokens))

    def make():
        given = {"tokens": tokens, "row_major": row_major, "n": n, "m": m, "v": v, "activation": activation}
        if variant == "gather":
            return _plan_many(x, values, index, bias, gate, y, **given)
        return _plan_few(x[:, :1].T if tokens == 1 else x, values, index, bias, gate, y, inputs=inputs, **given)

    statics = ("vector_nm feature-major", n, m, v, activation, precision(x), tokens, row_major)
    plan(statics, (x, values, index, bias, gate), make)(x, values, index, bias, gate, y)
    return y


# ---- what the framework calls


def linear(x, values, index, bias=None, *, n, m, v, out_features, activation=None, gate=None):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""
    return _linear(x, values, index, bias, gate, n, m, v, out_features, epilogue.activation_name(activation))


def linear_feature_major(
    x, values, index, bias=None, *, n, m, v, activation=None, gate=None, tokens=None, row_major=False
):
    """x (I, T) -> activation(W @ x + bias) * gate, (O, T): a chain of such layers transposes once, at its start.

    ``tokens`` when x is a wider buffer, as ``feature_major`` gives; with ``row_major`` the output is (T, O), for the
    end of a chain. ``gate`` is in the output's order.
    """
    name, tokens = epilogue.activation_name(activation), x.shape[1] if tokens is None else tokens
    return _linear_feature_major(x, values, index, bias, gate, n, m, v, name, tokens, row_major)


def gated_linear(x, up, gate, *, n, m, v, out_features, activation="silu"):
    """activation(x @ W_gate.T) * (x @ W_up.T), where ``up`` and ``gate`` are each (values, index).

    Two launches on one transpose: a single kernel would hold two accumulators, so half the tokens a tile, and would
    read a third more from L2 than the product of the first launch costs to store and load.
    """
    shape, given = (*x.shape[:-1], out_features), {"n": n, "m": m, "v": v, "row_major": True}
    tokens = x.numel() // x.shape[-1]
    turned = feature_major(x.reshape(tokens, x.shape[-1]))
    other = linear_feature_major(turned, *up, tokens=tokens, **given)
    return linear_feature_major(turned, *gate, tokens=tokens, activation=activation, gate=other, **given).view(shape)


def linear_grad_input(grad, values, index, *, n, m, v, in_features):
    """grad (*, O) -> grad @ W, (*, I): rows of one group share no column of the result, so W is expanded for cuBLAS."""
    return torch.matmul(grad, expand(values, index, n=n, m=m, v=v, in_features=in_features))


def linear_grad_values(grad, x, index, *, n, m, v, feature_major=False):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K); with ``feature_major``, x is (I, T or wider)."""
    return grad_values(grad, x, index, n, m, v, feature_major)


def expand(values, index, *, n, m, v, in_features):
    """The dense weight (O, I)."""
    return expand_parts(values, index, n, m, v, in_features)
