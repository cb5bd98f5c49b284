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

from . import autotune, epilogue, transpose
from .gated import TWO_LAUNCHES, in_two_launches, with_bias
from .library import (
    INTERPRET,
    Launch,
    contiguous,
    describable,
    exact,
    filled,
    multiprocessors,
    operator,
    overlap,
    plan,
    power_of_two,
    precision,
    splits,
    wide,
)
from .vector_nm_few import few_tokens
from .vector_nm_gemm import gather_gemm
from .vector_nm_gradient import expand as expand_parts
from .vector_nm_gradient import grad_values

FEW = 64  # tokens up to which the split-K kernel reads the weight once


# ---- which variant, and with which tiles


def choose(
    out_features: int, in_features: int, n: int, m: int, v: int, tokens: int, dtype: torch.dtype
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``gather`` (a gathered GEMM) or ``expand`` (then cuBLAS)."""
    return _choose(out_features, n, m, v, tokens, dtype, exact(dtype))


@functools.lru_cache(maxsize=4096)
def _choose(out_features, n, m, v, tokens, dtype, exactly):
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {n}/{m} of it once",
        )
    kept = n / m
    if exactly:  # no tensor core whose shape asks for many rows
        need = 0.6 if v >= 64 else 0.5 if v >= 32 else 0.4 if v >= 16 else 0.2 if v >= 8 else 0.0
        if kept > need:
            return "expand", f"v={v} rows are too few for {n}:{m} in fp32 without tf32; expanded, cuBLAS runs"
        return "gather", f"{n}:{m} with v={v} in fp32 without tf32: the gathered GEMM does {kept:.3g} of the dense work"
    if dtype == torch.float32:
        return "expand", "fp32 rows cannot feed the tensor cores token-major; expanded, cuBLAS runs"
    need = 0.75 if v >= 128 else 0.5 if v >= 64 else 0.26 if v >= 32 else 0.13 if v >= 16 else 0.0
    if kept > need:
        return (
            "expand",
            f"v={v} rows share a gathered row, too few for {n}:{m} at {tokens} tokens; expanded, cuBLAS runs",
        )
    return "gather", f"{n}:{m} with v={v}: the gathered GEMM does {kept:.3g} of the dense work on tensor cores"


def choose_grad_values(n: int, m: int, v: int, dtype: torch.dtype) -> tuple[str, str]:
    """(variant, reason) of the values' gradient: ``gather``, or ``reference``, the dense gradient at the pattern."""
    if exact(dtype) and n / m > 0.3 * (min(v, 128) / 128) ** 0.5:
        return "reference", f"{n}:{m} with v={v} in fp32 without tf32: the dense gradient, gathered, is faster"
    return "gather", f"a gathered product of {n}/{m} of the dense work"


def _many_configs(v: int, tokens: int, exactly: bool) -> list[dict]:
    """PER_SM: 0 for one tile a program, else how many persistent programs a multiprocessor holds.

    TOKENS_FIRST: the tensor cores' 64 rows are tokens, for fewer output rows than that.
    """
    if INTERPRET:
        return [
            {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "TOKENS_FIRST": v < 16, "PER_SM": tokens % 2, "num_stages": 1}
        ]
    held = power_of_two(v, 16, 128)
    if exactly:
        tiles = [(held, 128, 0, 3, 8), (min(held, 64), 128, 0, 3, 4), (held, 64, 0, 3, 4), (min(held, 64), 64, 0, 3, 4)]
    elif v >= 128:
        tiles = [(128, 256, 0, 4, 8), (128, 256, 1, 3, 8), (128, 128, 2, 3, 4), (128, 128, 0, 3, 4)]
    elif v >= 64:
        tiles = [(64, 256, 1, 3, 4), (64, 128, 3, 3, 4), (64, 256, 0, 4, 8), (64, 128, 0, 3, 4)]
    else:
        rows = min(held, 32)
        tiles = [(rows, 256, 0, 3, 4), (rows, 128, 3, 3, 4), (rows, 256, 0, 2, 4), (rows, 128, 0, 3, 4)]
    tiles = [tile for tile in tiles if tile[1] <= transpose.padded(tokens)]
    return [
        {
            "BM": rows,
            "BN": width,
            "BK": 16 if exactly else 64,
            "GROUP": 32,
            "TOKENS_FIRST": not exactly and (rows < 64 or (v < 128 and width < 256)),
            "PER_SM": p,
            "num_stages": stages,
            "num_warps": warps,
        }
        for rows, width, p, stages, warps in tiles
    ]


def _few_configs(v: int, tokens: int, rows: int, slots: int, programs: int, halves: int) -> list[dict]:
    if INTERPRET:
        return [{"BM": 16, "BK": 16, "S": 2 if slots > 32 else 1, "PIPE": None}]
    if tokens == 1:
        tiles = [(8, 512, 4, None), (4, 512, 4, None), (8, 256, 2, None), (4, 512, 2, None)]
    elif halves == 1:
        tiles = [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3)]
    else:  # two weights and two sets of activations fill the same memory
        tiles = [(64, 64, 4, 4), (32, 128, 4, 4), (64, 128, 4, 3)]
    found = []
    for height, depth, warps, stages in tiles:
        height = min(height, power_of_two(v, 1 if tokens == 1 else 16, 128))
        # enough programs for every multiprocessor; a split more than that only writes and reads more partial sums
        split = splits(-(-rows // v) * -(-v // height), programs, slots, depth)
        for s in (split,) if stages != 3 or tokens == 1 else (split, 2 * split):
            found.append({"BM": height, "BK": depth, "S": s, "PIPE": stages, "num_warps": warps})
    return found


# ---- launchers


def _plan_many(x, values, index, bias, gate, up, up_index, up_bias, y, **given):
    """x is feature-major (I, >= tokens), its rows contiguous; y is (T, O) when row_major, else (O, T)."""
    parts = (x, values, index, bias, gate, up, up_index, up_bias, y)
    v, tokens, halves = given["v"], given["tokens"], 1 if up is None else 2

    def prepare(config):
        if config == TWO_LAUNCHES:
            settled = {name: value for name, value in given.items() if name != "activation"}
            return in_two_launches(functools.partial(_plan_many, **settled), parts, given["activation"])
        return _launch_many(dict(config), *parts, **given)

    key = (x.dtype, len(values), x.shape[0], values.shape[1], v, tokens.bit_length(), given["row_major"])
    configs = _many_configs(v, tokens, exact(x.dtype)) + [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("vector_nm_many" if halves == 1 else "vector_nm_gated_many", key, configs, prepare, parts)


def _launch_many(
    config, x, values, index, bias, gate, up, up_index, up_bias, y, tokens, row_major, n, m, v, activation
):
    inputs, (outputs, slots) = x.shape[0], values.shape
    strides = (x.stride(0), *((1, outputs) if row_major else (tokens, 1)))
    rows, width, resident = config["BM"], config["BN"], config.pop("PER_SM")
    tiles = triton.cdiv(outputs, v) * triton.cdiv(v, rows) * triton.cdiv(tokens, width)
    programs = min(tiles, resident * multiprocessors(x)) if resident else tiles
    # no descriptor where a program changes weights: a load in a branch is not pipelined, a pointer can be chosen
    described = up is None and describable(values)
    launch = Launch(
        gather_gemm, (programs,), {1: ([rows, config["BK"]], values.shape, values.stride())} if described else {},
        V=v, ROW_MAJOR=row_major, PERSISTENT=programs < tiles, EVEN_T=x.shape[1] >= triton.cdiv(tokens, width) * width,
        EVEN_K=slots % config["BK"] == 0, EVEN_I=slots * m == inputs * n, WIDE=wide(x, values, y),
        ACTIVATION=activation, PRECISION=precision(x), **config,
    )  # fmt: skip

    def call(x, values, *parts):
        described_values = values if described else None
        launch(x, described_values, values, *parts, tokens, inputs, outputs, slots, *strides, tiles, programs)

    return call


def _plan_few(x, values, index, bias, gate, up, up_index, up_bias, y, **given):
    """x is (1, I) in any order, or feature-major (I, W), W >= the tile's tokens; ``turned`` by the launch before."""
    parts = (x, values, index, bias, gate, up, up_index, up_bias, y)
    (outputs, slots), v, tokens, halves = values.shape, given["v"], given["tokens"], 1 if up is None else 2
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)

    def prepare(config):
        if config == TWO_LAUNCHES:
            settled = {name: value for name, value in given.items() if name != "activation"}
            return in_two_launches(functools.partial(_plan_few, **settled), parts, given["activation"])
        return _launch_few(config, width, halves, *parts[:3], **given)

    key = (x.dtype, outputs, given["inputs"], slots, v, width)
    configs = _few_configs(v, tokens, outputs, slots, multiprocessors(x), halves) + [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("vector_nm_few" if halves == 1 else "vector_nm_gated_few", key, configs, prepare, parts)


def _launch_few(config, width, halves, x, values, index, tokens, inputs, turned, row_major, n, m, v, activation):
    outputs, slots = values.shape
    strides = (x.stride(1 if tokens == 1 else 0), *((1, outputs) if row_major else (tokens, 1)))
    tiles, split = triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"]), config["S"]
    launch = Launch(
        few_tokens, (tiles, split), V=v, BT=width, TURNED=turned, EVEN_K=slots % config["BK"] == 0,
        EVEN_I=slots * m == inputs * n, WIDE=wide(x, values), ACTIVATION=activation, PRECISION=precision(x),
        **overlap(x), **config,
    )  # fmt: skip

    def call(x, *parts):
        met = epilogue.hand_over.take(x, tiles, tiles * split, halves * config["BM"] * width)
        launch(x, *parts, *met, tokens, inputs, outputs, slots, *strides)

    return call


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """x (T, I) -> (I, padded T), the form the gather reads; the padding is unwritten."""
    return transpose.transpose(x, transpose.padded(x.shape[0]))


def _check(x, parts, inputs, n, m, v, out_features):
    """Refuses a weight, or an up weight beside it, that does not hold (out_features, inputs)."""
    for values, index in (parts[:2], parts[4:6]):
        if values is None:
            continue
        if x.dtype != values.dtype or index.dtype != torch.int32:
            kinds = f"x is {x.dtype}, values {values.dtype} and index {index.dtype}"
            raise TypeError(f"{kinds}; expected one dtype and int32")
        lines = -(-out_features // v)
        if values.shape != (out_features, -(-inputs // m) * n) or index.shape != (lines, values.shape[1]):
            shapes = f"values {tuple(values.shape)} and index {tuple(index.shape)}"
            raise ValueError(f"{shapes} do not hold ({out_features}, {inputs}) as {n}:{m}, v={v}")


def _linear_fake(x, values, index, bias, gate, n, m, v, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_vector_nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n, int m, int v,"
    " int out_features, str activation) -> Tensor",
    _linear_fake,
)
def _linear(x, values, index, bias, gate, n, m, v, out_features, activation):
    bias, gate = contiguous(bias, gate)
    return _row_major(x, values, index, bias, gate, None, None, None, n, m, v, out_features, activation)


def _gated_fake(x, values, index, bias, up, up_index, up_bias, n, m, v, out_features, activation):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_vector_nm_gated_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor up, Tensor up_index,"
    " Tensor? up_bias, int n, int m, int v, int out_features, str activation) -> Tensor",
    _gated_fake,
)
def _gated_linear(x, values, index, bias, up, up_index, up_bias, n, m, v, out_features, activation):
    bias, up_bias = contiguous(bias, up_bias)
    return _row_major(x, values, index, bias, None, up, up_index, up_bias, n, m, v, out_features, activation)


def _row_major(x, values, index, bias, gate, up, up_index, up_bias, n, m, v, out_features, activation):
    given = (x, values, index, bias, gate, up, up_index, up_bias)
    statics = ("vector_nm", n, m, v, out_features, activation, precision(x))
    return plan(statics, given, lambda: _plan_row_major(*statics[1:6], *given))(*given)


def _plan_row_major(n, m, v, outputs, activation, x, *parts):
    """The callable for ordinary activations; it is made, and its tiles are timed, on the first call's tensors."""
    inputs, shape = x.shape[-1], (*x.shape[:-1], outputs)
    _check(x, parts, inputs, n, m, v, outputs)
    epilogue.check(outputs, shape, (parts[2], parts[6]), parts[3])
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, n, m, v, tokens, x.dtype)
    if variant == "empty":
        return lambda x, *parts: x.new_empty(shape)
    if variant == "expand":

        def expanded(x, *parts):
            return _expanded(
                lambda *weight: torch.nn.functional.linear(x, *weight), inputs, n, m, v, activation, *parts
            )

        return expanded
    width = power_of_two(tokens, 16, FEW) if variant == "few" else transpose.padded(tokens)
    turn = transpose.prepared_rows(x, width)
    make = _plan_many if variant == "gather" else functools.partial(_plan_few, inputs=inputs, turned=tokens > 1)
    y = x.new_empty(tokens, outputs)
    run = make(turn(x), *parts, y, tokens=tokens, row_major=True, n=n, m=m, v=v, activation=activation)
    return filled(run, x, shape, arrange=turn)


def _expanded(multiply, inputs, n, m, v, activation, values, index, bias, gate, up, up_index, up_bias):
    """``multiply(dense weight, bias)`` by cuBLAS, and the epilogue in torch."""

    def product(values, index, bias):
        return multiply(expand(values, index, n=n, m=m, v=v, in_features=inputs), bias)

    gate = gate if up is None else product(up, up_index, up_bias)
    return epilogue.apply(product(values, index, bias), activation, gate)


def _feature_major_fake(x, values, index, bias, gate, n, m, v, activation, tokens, row_major):
    outputs = values.shape[0]
    return x.new_empty((tokens, outputs) if row_major else (outputs, tokens))


@operator(
    "gpu_vector_nm_linear_feature_major(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n,"
    " int m, int v, str activation, SymInt tokens, bool row_major) -> Tensor",
    _feature_major_fake,
)
def _linear_feature_major(x, values, index, bias, gate, n, m, v, activation, tokens, row_major):
    bias, gate = contiguous(bias, gate)
    return _feature_major(x, values, index, bias, gate, None, None, None, n, m, v, activation, tokens, row_major)


def _gated_feature_major_fake(x, values, index, bias, up, up_index, up_bias, n, m, v, activation, tokens, row_major):
    return _feature_major_fake(x, values, index, bias, up, n, m, v, activation, tokens, row_major)


@operator(
    "gpu_vector_nm_gated_linear_feature_major(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor up,"
    " Tensor up_index, Tensor? up_bias, int n, int m, int v, str activation, SymInt tokens, bool row_major) -> Tensor",
    _gated_feature_major_fake,
)
def _gated_feature_major(x, values, index, bias, up, up_index, up_bias, n, m, v, activation, tokens, row_major):
    bias, up_bias = contiguous(bias, up_bias)
    return _feature_major(x, values, index, bias, None, up, up_index, up_bias, n, m, v, activation, tokens, row_major)


def _feature_major(x, values, index, bias, gate, up, up_index, up_bias, n, m, v, activation, tokens, row_major):
    inputs, outputs, parts = x.shape[0], values.shape[0], (values, index, bias, gate, up, up_index, up_bias)
    _check(x, parts, inputs, n, m, v, outputs)
    y = x.new_empty((tokens, outputs) if row_major else (outputs, tokens))
    epilogue.check(outputs, y.shape, (bias, up_bias), gate)
    if tokens == 0 or outputs == 0:
        return y
    variant, _ = choose(outputs, inputs, n, m, v, tokens, x.dtype)
    if variant == "expand":
        x = x[:, :tokens]

        def multiply(dense, bias):
            if row_major:
                return torch.nn.functional.linear(x.T, dense, bias)
            return torch.mm(dense, x) if bias is None else torch.addmm(bias[:, None], dense, x)

        return _expanded(multiply, inputs, n, m, v, activation, *parts)
    x = _whole_tiles(x, tokens, variant)

    def make():
        given = {"tokens": tokens, "row_major": row_major, "n": n, "m": m, "v": v, "activation": activation}
        if variant == "gather":
            return _plan_many(x, *parts, y, **given)
        return _plan_few(x[:, :1].T if tokens == 1 else x, *parts, y, inputs=inputs, turned=False, **given)

    statics = ("vector_nm feature-major", n, m, v, activation, precision(x), tokens, row_major)
    plan(statics, (x, *parts), make)(x, *parts, y)
    return y


def _whole_tiles(x, tokens, variant):
    """x (I, >= tokens) itself, or a padded copy where the kernel of ``variant`` could not read it as it lies."""
    width = transpose.padded(tokens) if variant == "gather" else 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    whole = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if tokens > 1 and (not whole or (variant == "few" and x.shape[1] < width)):
        return torch.nn.functional.pad(x[:, :tokens], (0, width - tokens))
    return x


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
    """activation(x @ W_gate.T) * (x @ W_up.T), (*, O), where ``up`` and ``gate`` are each (values, index[, bias]).

    One launch on one transpose, or two where they are faster. Over 64 tokens the up half is rounded to the output's
    dtype once, on its way through the output; below, both halves meet in fp32.
    """
    parts, name = (*with_bias(gate, 2), *with_bias(up, 2)), epilogue.activation_name(activation)
    return _gated_linear(x, *parts, n, m, v, out_features, name)


def gated_linear_feature_major(x, up, gate, *, n, m, v, activation="silu", tokens=None, row_major=False):
    """``gated_linear`` of x (I, T or wider) -> (O, T), or (T, O) when ``row_major``: part of a feature-major chain."""
    parts, name = (*with_bias(gate, 2), *with_bias(up, 2)), epilogue.activation_name(activation)
    return _gated_feature_major(x, *parts, n, m, v, name, x.shape[1] if tokens is None else tokens, row_major)


def linear_grad_input(grad, values, index, *, n, m, v, in_features):
    """grad (*, O) -> grad @ W, (*, I): rows of one group share no column of the result, so W is expanded for cuBLAS."""
    return torch.matmul(grad, expand(values, index, n=n, m=m, v=v, in_features=in_features))


def linear_grad_values(grad, x, index, *, n, m, v, feature_major=False):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K); with ``feature_major``, x is (I, T or wider)."""
    return grad_values(grad, x, index, n, m, v, feature_major)


def expand(values, index, *, n, m, v, in_features):
    """The dense weight (O, I)."""
    return expand_parts(values, index, n, m, v, in_features)
