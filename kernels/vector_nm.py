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
from .backend import INTERPRET, backend
from .gated import TWO_LAUNCHES, in_two_launches
from .launch import triton_launch
from .linear import Layout, Linear
from .operators import ExpandedProduct, operator
from .pdl import overlap
from .precision import exact, precision
from .split_k import workspace
from .tiles import describable, power_of_two, splits, wide
from .vector_nm_few import few_tokens
from .vector_nm_gemm import gather_gemm
from .vector_nm_gradient import expand as expand
from .vector_nm_gradient import grad_values

FEW = 64  # tokens up to which the split-K kernel reads the weight once


# ---- which variant, and with which tiles


def choose(tokens, outputs, inputs, dtype, *, n, m, v) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (split-K), ``gather`` (a gathered GEMM) or ``expand`` (then cuBLAS)."""
    if tokens == 0 or outputs == 0:
        return "empty", "nothing to compute"
    if tokens <= FEW:
        return (
            "few",
            f"{tokens} tokens: time goes to reading the weight, and the split-K kernel reads {n}/{m} of it once",
        )
    kept = n / m
    if exact(dtype):  # no tensor core whose shape asks for many rows
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


def reference(dtype, *, n, m, v) -> str | None:
    """Why the values' gradient is better gathered from a dense one, or None."""
    if exact(dtype) and n / m > 0.3 * (min(v, 128) / 128) ** 0.5:
        return f"{n}:{m} with v={v} in fp32 without tf32: the dense gradient, gathered, is faster"
    return None


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
    configs = []
    for height, depth, warps, stages in tiles:
        height = min(height, power_of_two(v, 1 if tokens == 1 else 16, 128))
        # enough programs for every multiprocessor; a split more than that only writes and reads more partial sums
        split = splits(-(-rows // v) * -(-v // height), programs, slots, depth)
        for s in (split,) if stages != 3 or tokens == 1 else (split, 2 * split):
            configs.append({"BM": height, "BK": depth, "S": s, "PIPE": stages, "num_warps": warps})
    return configs


# ---- launchers


def _prepare_many(x, values, index, bias, gate, up, up_index, up_bias, y, **numbers):
    """x is feature-major (I, >= tokens), its rows contiguous; y is (T, O) when row_major, else (O, T)."""
    parts = (x, values, index, bias, gate, up, up_index, up_bias, y)
    v, tokens, halves = numbers["v"], numbers["tokens"], 1 if up is None else 2

    def prepare(config):
        if config == TWO_LAUNCHES:
            return _in_two_launches(_prepare_many, parts, numbers)
        return _launch_many(dict(config), *parts, **numbers)

    key = (x.dtype, len(values), x.shape[0], values.shape[1], v, tokens.bit_length(), numbers["row_major"])
    configs = _many_configs(v, tokens, exact(x.dtype)) + [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("vector_nm_many" if halves == 1 else "vector_nm_gated_many", key, configs, prepare, parts)


def _in_two_launches(prepare, parts, numbers):
    fixed = {name: value for name, value in numbers.items() if name != "activation"}
    return in_two_launches(functools.partial(prepare, **fixed), parts, numbers["activation"])


def _launch_many(
    config, x, values, index, bias, gate, up, up_index, up_bias, y, tokens, row_major, n, m, v, activation
):
    inputs, (outputs, slots) = x.shape[0], values.shape
    strides = (x.stride(0), *((1, outputs) if row_major else (tokens, 1)))
    rows, width, resident = config["BM"], config["BN"], config.pop("PER_SM")
    tiles = triton.cdiv(outputs, v) * triton.cdiv(v, rows) * triton.cdiv(tokens, width)
    programs = min(tiles, resident * backend.multiprocessors(x)) if resident else tiles
    # no descriptor where a program changes weights: a load in a branch is not pipelined, a pointer can be chosen
    described = up is None and describable(values)
    launch = triton_launch(
        gather_gemm, (programs,), {1: ([rows, config["BK"]], values.shape, values.stride())} if described else {},
        V=v, ROW_MAJOR=row_major, PERSISTENT=programs < tiles, EVEN_T=x.shape[1] >= triton.cdiv(tokens, width) * width,
        EVEN_K=slots % config["BK"] == 0, EVEN_I=slots * m == inputs * n, WIDE=wide(x, values, y),
        ACTIVATION=activation, PRECISION=precision(x.dtype), **config,
    )  # fmt: skip
    integers = (tokens, inputs, outputs, slots, *strides, tiles, programs)

    def call(x, values, *parts):
        launch(x, values if described else None, values, *parts, *integers)

    return call


def _prepare_few(x, values, index, bias, gate, up, up_index, up_bias, y, **numbers):
    """x is (1, I) in any order, or feature-major (I, W), W >= the tile's tokens; ``turned`` by the launch before."""
    parts = (x, values, index, bias, gate, up, up_index, up_bias, y)
    (outputs, slots), v, tokens, halves = values.shape, numbers["v"], numbers["tokens"], 1 if up is None else 2
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)

    def prepare(config):
        if config == TWO_LAUNCHES:
            return _in_two_launches(_prepare_few, parts, numbers)
        return _launch_few(config, width, halves, *parts[:3], **numbers)

    key = (x.dtype, outputs, numbers["inputs"], slots, v, width)
    configs = _few_configs(v, tokens, outputs, slots, backend.multiprocessors(x), halves)
    configs += [TWO_LAUNCHES] * (halves - 1)
    return autotune.pick("vector_nm_few" if halves == 1 else "vector_nm_gated_few", key, configs, prepare, parts)


def _launch_few(config, width, halves, x, values, index, tokens, inputs, turned, row_major, n, m, v, activation):
    outputs, slots = values.shape
    strides = (x.stride(1 if tokens == 1 else 0), *((1, outputs) if row_major else (tokens, 1)))
    tiles = triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"])
    shares, size = tiles * config["S"], halves * config["BM"] * width
    launch = triton_launch(
        few_tokens, (tiles, config["S"]), V=v, BT=width, TURNED=turned, EVEN_K=slots % config["BK"] == 0,
        EVEN_I=slots * m == inputs * n, WIDE=wide(x, values), ACTIVATION=activation, PRECISION=precision(x.dtype),
        **overlap(x), **config,
    )  # fmt: skip
    integers = (tokens, inputs, outputs, slots, *strides)

    def call(x, *parts):
        launch(x, *parts, *workspace.take(x, tiles, shares, size), *integers)

    return call


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """x (T, I) -> (I, padded T), the form the gather reads; the padding is unwritten."""
    return transpose.transpose(x, transpose.padded(x.shape[0]))


def _check(x, weight, outputs, inputs, n, m, v):
    values, index = weight
    if x.dtype != values.dtype or index.dtype != torch.int32:
        got = f"x {x.dtype}, values {values.dtype}, index {index.dtype}"
        raise TypeError(f"Expected x and values of one dtype and an index of int32, got {got}.")
    shapes = (outputs, -(-inputs // m) * n), (-(-outputs // v), values.shape[1])
    if (values.shape, index.shape) != shapes:
        expected = f"values {shapes[0]} and index {shapes[1]} for ({outputs}, {inputs}) as {n}:{m}, v={v}"
        raise ValueError(f"Expected {expected}, got {tuple(values.shape)} and {tuple(index.shape)}.")


def _arrange(x, variant):
    """Feature-major (I, W), W whole tiles of tokens; one token as it lies."""
    tokens = x.shape[:-1].numel()
    return transpose.turned_rows(x, power_of_two(tokens, 16, FEW) if variant == "few" else transpose.padded(tokens))


def _launch(variant, x, *parts, activation, n, m, v):
    tokens = len(parts[-1])
    numbers = {"tokens": tokens, "row_major": True, "n": n, "m": m, "v": v, "activation": activation}
    if variant == "gather":
        return _prepare_many(x, *parts, **numbers)
    inputs = x.shape[1] if tokens == 1 else x.shape[0]
    return _prepare_few(x, *parts, inputs=inputs, turned=tokens > 1, **numbers)


# ---- feature-major in, and out if wanted


@operator(
    "gpu_vector_nm_linear_feature_major(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, Tensor? up,"
    " Tensor? up_index, Tensor? up_bias, int n, int m, int v, str activation, SymInt tokens, bool row_major) -> Tensor",
    lambda x, values, *rest: (rest[-2], len(values)) if rest[-1] else (len(values), rest[-2]),
)
def _feature_major(x, values, index, bias, gate, up, up_index, up_bias, n, m, v, activation, tokens, row_major):
    inputs, outputs = x.shape[0], values.shape[0]
    for weight in ((values, index), (up, up_index)):
        if weight[0] is not None:
            _check(x, weight, outputs, inputs, n, m, v)
    shape = (tokens, outputs) if row_major else (outputs, tokens)
    epilogue.check(outputs, shape, (bias, up_bias), gate)
    variant, _ = linear.choose(tokens, outputs, inputs, x.dtype, n=n, m=m, v=v)
    if variant == "empty":
        return lambda x, *parts: x.new_empty(shape)
    if variant == "expand":
        return _expanded_feature_major(inputs, n, m, v, activation, tokens, row_major)
    parts, new = (values, index, bias, gate, up, up_index, up_bias), backend.empty(x, *shape)
    numbers = {"tokens": tokens, "row_major": row_major, "n": n, "m": m, "v": v, "activation": activation}
    whole = _whole_tiles(x, tokens, variant)
    flat = whole(x)
    if variant == "gather":
        launch = _prepare_many(flat, *parts, new(), **numbers)
    else:
        launch = _prepare_few(flat, *parts, new(), inputs=inputs, turned=False, **numbers)

    def call(x, *parts):
        y = new()
        launch(whole(x), *parts, y)
        return y

    return call


def _expanded_feature_major(inputs, n, m, v, activation, tokens, row_major):
    def product(x, values, index, bias):
        dense = expand(values, index, n=n, m=m, v=v, in_features=inputs)
        if row_major:
            return torch.nn.functional.linear(x.T, dense, bias)
        return torch.mm(dense, x) if bias is None else torch.addmm(bias[:, None], dense, x)

    def call(x, values, index, bias, gate, up, up_index, up_bias):
        x = x[:, :tokens]
        gate = gate if up is None else product(x, up, up_index, up_bias)
        return epilogue.apply(product(x, values, index, bias), activation, gate)

    return call


def _whole_tiles(x, tokens, variant):
    """The function from x (I, >= tokens) to itself, or to a padded copy where the kernel could not read it as it lies;
    one token becomes (1, I)."""
    if tokens == 1 and variant == "few":
        return lambda x: x[:, :1].T
    width = transpose.padded(tokens) if variant == "gather" else power_of_two(tokens, 16, FEW)
    whole = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    if tokens > 1 and (not whole or (variant == "few" and x.shape[1] < width)):
        return lambda x: torch.nn.functional.pad(x[:, :tokens], (0, width - tokens))
    return lambda x: x


def linear_feature_major(
    x, values, index, bias=None, *, n, m, v, activation=None, gate=None, tokens=None, row_major=False
):
    """x (I, T) -> activation(W @ x + bias) * gate, (O, T): a chain of such layers transposes once, at its start.

    ``tokens`` when x is a wider buffer, as ``feature_major`` gives; with ``row_major`` the output is (T, O), for the
    end of a chain. ``gate`` is in the output's order.
    """
    numbers = {"n": n, "m": m, "v": v, "activation": epilogue.activation_name(activation), "row_major": row_major}
    return _feature_major(x, values, index, bias, gate, tokens=x.shape[1] if tokens is None else tokens, **numbers)


def gated_linear_feature_major(x, up, gate, *, n, m, v, activation="silu", tokens=None, row_major=False):
    """``gated_linear`` of x (I, T or wider) -> (O, T), or (T, O) when ``row_major``: part of a feature-major chain."""
    up, gate = ((*weight, None)[:3] for weight in (up, gate))
    numbers = {"n": n, "m": m, "v": v, "activation": epilogue.activation_name(activation), "row_major": row_major}
    return _feature_major(x, *gate, None, *up, tokens=x.shape[1] if tokens is None else tokens, **numbers)


# ---- what the framework calls


def linear_grad_values(grad, x, index, *, n, m, v, feature_major=False):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K); with ``feature_major``, x is (I, T or wider)."""
    return grad_values(grad, x, index, n=n, m=m, v=v, feature_major=feature_major)


linear = Linear(
    Layout(
        "vector_nm",
        stored="Tensor values, Tensor index",
        numbers="int n, int m, int v, ",
        check=_check,
        choose=choose,
        facts=lambda stored, up, numbers: numbers,
        expand=expand,
        arrange=_arrange,
        launch=_launch,
        dual=True,
    )
)
gated_linear = linear.gated
linear_grad_input = ExpandedProduct(expand, "rows of one group share no column of the result; expanded, cuBLAS runs")
