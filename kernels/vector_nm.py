"""VectorNM(n, m, v): n of every m inputs, one pattern shared by v consecutive output rows, as a gathered dense GEMM.

Letters: T tokens, I inputs, O outputs, K = stored slots a row (groups * n); values (O, K), index (ceil(O/v), K).
BM output rows, BN tokens, BK slots a tile; S splits of the reduction.
y[o, t] = sum_k values[o, k] * x[index[o//v, k], t].

The gather reads whole rows when activations are feature-major (I, T), so ordinary (T, I) activations are transposed
first, at memory speed; the output is written in either order at no cost. A few tokens are gathered in place.
"""

import functools

import torch
import triton

from . import gated, transpose
from .backend import INTERPRET, backend
from .launch import triton_launch
from .linear import Linear
from .operators import ExpandedProduct
from .pdl import overlap
from .precision import exact, precision
from .shares import FewTokens
from .split_k import workspace
from .tiles import power_of_two, splits, tma_can_load, wide
from .vector_nm_few import few_tokens
from .vector_nm_gemm import gather_gemm
from .vector_nm_gradient import expand as expand
from .vector_nm_gradient import grad_values

FEW = 64  # tokens up to which the split-K kernel reads the weight once


# ---- tiles


def _many_configs(v: int, tokens: int, exactly: bool) -> list[dict]:
    """PER_SM: 0 for one tile per program, else the number of persistent programs per multiprocessor.

    TOKENS_FIRST: the tensor cores' 64 rows are tokens, for fewer output rows than that.
    """
    if INTERPRET:
        return [
            {"BM": 16, "BN": 16, "BK": 16, "GROUP": 2, "TOKENS_FIRST": v < 16, "PER_SM": tokens % 2, "num_stages": 1}
        ]
    height = power_of_two(v, 16, 128)
    short = min(height, 64)
    if exactly:
        tiles = [(height, 128, 0, 3, 8), (short, 128, 0, 3, 4), (height, 64, 0, 3, 4), (short, 64, 0, 3, 4)]
    elif v >= 128:
        tiles = [(128, 256, 0, 4, 8), (128, 256, 1, 3, 8), (128, 128, 2, 3, 4), (128, 128, 0, 3, 4)]
    elif v >= 64:
        tiles = [(64, 256, 1, 3, 4), (64, 128, 3, 3, 4), (64, 256, 0, 4, 8), (64, 128, 0, 3, 4)]
    else:
        rows = min(height, 32)
        tiles = [(rows, 256, 0, 3, 4), (rows, 128, 3, 3, 4), (rows, 256, 0, 2, 4), (rows, 128, 0, 3, 4)]
    tiles = [tile for tile in tiles if tile[1] <= transpose.padded(tokens)]
    fixed = {"BK": 16 if exactly else 64, "GROUP": 32}
    return [
        {"BM": rows, "BN": width, "TOKENS_FIRST": not exactly and (rows < 64 or (v < 128 and width < 256)),
         "PER_SM": resident, "num_stages": stages, "num_warps": warps, **fixed}
        for rows, width, resident, stages, warps in tiles
    ]  # fmt: skip


def _few_configs(v: int, tokens: int, rows: int, slots: int, programs: int, halves: int) -> list[dict]:
    if INTERPRET:
        return [{"BM": 16, "BK": 16, "S": 2 if slots > 32 else 1, "PIPE": None}]
    if tokens == 1:
        tiles = [(8, 512, 4, None), (4, 512, 4, None), (8, 256, 2, None), (4, 512, 2, None)]
    elif halves == 1:
        tiles = [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3)]
    else:  # two weights and two sets of activations share the memory
        tiles = [(64, 64, 4, 4), (32, 128, 4, 4), (64, 128, 4, 3)]
    configs = []
    for height, depth, warps, stages in tiles:
        height = min(height, power_of_two(v, 1 if tokens == 1 else 16, 128))
        # enough programs for every multiprocessor; more splits only add partial sums
        split = splits(-(-rows // v) * -(-v // height), programs, slots, depth)
        for s in (split,) if stages != 3 or tokens == 1 else (split, 2 * split):
            configs.append({"BM": height, "BK": depth, "S": s, "PIPE": stages, "num_warps": warps})
    return configs


# ---- launches; x is feature-major (I, W), its rows contiguous; y is (T, O) when row_major, else (O, T)


def _many(*tensors, n, m, v, tokens, row_major, activation):
    """``tensors``: x of whole tiles of tokens, values, index, bias, gate, up, up_index, up_bias, y."""
    x, values, up, y = tensors[0], tensors[1], tensors[5], tensors[-1]
    inputs, (outputs, slots) = x.shape[0], values.shape
    strides = (x.stride(0), *((1, outputs) if row_major else (tokens, 1)))
    # no TMA where a program changes weights: a load in a branch is not pipelined, a selected pointer is
    use_tma = up is None and tma_can_load(values)
    constants = {"V": v, "ROW_MAJOR": row_major, "EVEN_I": slots * m == inputs * n, "WIDE": wide(x, values, y)}
    constants |= {"ACTIVATION": activation, "PRECISION": precision(x.dtype)}

    def prepare(config):
        rows, width, depth, resident = config["BM"], config["BN"], config["BK"], config["PER_SM"]
        tiles = triton.cdiv(outputs, v) * triton.cdiv(v, rows) * triton.cdiv(tokens, width)
        programs = min(tiles, resident * backend.multiprocessors(x)) if resident else tiles
        launch = triton_launch(
            gather_gemm, (programs,), {1: ([rows, depth], values.shape, values.stride())} if use_tma else {},
            PERSISTENT=programs < tiles, EVEN_T=x.shape[1] >= triton.cdiv(tokens, width) * width,
            EVEN_K=slots % depth == 0, **constants, **{name: config[name] for name in config if name != "PER_SM"},
        )  # fmt: skip
        integers = (tokens, inputs, outputs, slots, *strides, tiles, programs)

        def call(x, values, *parts):
            launch(x, values if use_tma else None, values, *parts, *integers)

        return call

    key = (x.dtype, outputs, inputs, slots, v, tokens.bit_length(), row_major)
    single = functools.partial(_many, n=n, m=m, v=v, tokens=tokens, row_major=row_major)
    configs = _many_configs(v, tokens, exact(x.dtype))
    return gated.pick("vector_nm", "many", key, configs, prepare, tensors, single, activation)


def _few(*tensors, n, m, v, tokens, row_major, inputs, after_transpose, activation):
    """The same ``tensors``; x is (1, I) in any order, or has W >= the tile's tokens. ``after_transpose``: the previous
    launch wrote x."""
    x, values, up = tensors[0], tensors[1], tensors[5]
    fixed = {"n": n, "m": m, "v": v, "tokens": tokens, "row_major": row_major, "inputs": inputs}
    fixed["after_transpose"] = after_transpose
    few, halves = _described(x, values, up, **fixed), 1 if up is None else 2

    def prepare(config):
        (tiles, split), constants = few.grid(config), few.constants(config)
        size = halves * config["BM"] * constants["BT"]
        launch = triton_launch(few_tokens, (tiles, split), ACTIVATION=activation, **constants, **overlap(x))

        def call(x, *parts):
            launch(x, *parts, *workspace.take(x, tiles, tiles * split, size), *few.integers)

        return call

    single = functools.partial(_few, **fixed)
    return gated.pick("vector_nm", "few", few.key, few.configs, prepare, tensors, single, activation)


def _described(x, values, up, *, n, m, v, tokens, row_major, inputs, after_transpose) -> FewTokens:
    (outputs, slots), halves = values.shape, 1 if up is None else 2
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    strides = (x.stride(1 if tokens == 1 else 0), *((1, outputs) if row_major else (tokens, 1)))
    fixed = {"V": v, "BT": width, "AFTER_TRANSPOSE": after_transpose, "EVEN_I": slots * m == inputs * n}
    fixed |= {"WIDE": wide(x, values), "PRECISION": precision(x.dtype)}
    return FewTokens(
        few_tokens,
        "vector_nm_few" if up is None else "vector_nm_gated_few",
        (x.dtype, outputs, inputs, slots, v, width),
        _few_configs(v, tokens, outputs, slots, backend.multiprocessors(x), halves),
        lambda config: (triton.cdiv(outputs, v) * triton.cdiv(v, config["BM"]), config["S"]),
        lambda config: {**fixed, **config, "EVEN_K": slots % config["BK"] == 0},
        (tokens, inputs, outputs, slots, *strides),
    )


class VectorNMLinear(Linear):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""

    prefix, stored, layout_numbers = "gpu_vector_nm_linear", "Tensor values, Tensor index", "int n, int m, int v, "
    expand, dual = expand, True

    def facts(self, stored, up, numbers):
        return {name: numbers[name] for name in ("n", "m", "v")}

    def choose(self, tokens, outputs, inputs, dtype, *, n, m, v):
        """``empty``, ``few`` (split-K), ``gather`` (a gathered GEMM) or ``expand`` (then cuBLAS)."""
        if tokens == 0 or outputs == 0:
            return "empty", "nothing to compute"
        if tokens <= FEW:
            why = f"time goes to reading the weight, and the split-K kernel reads {n}/{m} of it once"
            return "few", f"{tokens} tokens: {why}"
        density = n / m
        if exact(dtype):  # no tensor core whose shape asks for many rows
            need = 0.6 if v >= 64 else 0.5 if v >= 32 else 0.4 if v >= 16 else 0.2 if v >= 8 else 0.0
            if density > need:
                return "expand", f"v={v} rows are too few for {n}:{m} in fp32 without tf32; expanded, cuBLAS runs"
            work = f"the gathered GEMM does {density:.3g} of the dense work"
            return "gather", f"{n}:{m} with v={v} in fp32 without tf32: {work}"
        if dtype == torch.float32:
            return "expand", "fp32 rows cannot feed the tensor cores token-major; expanded, cuBLAS runs"
        need = 0.75 if v >= 128 else 0.5 if v >= 64 else 0.26 if v >= 32 else 0.13 if v >= 16 else 0.0
        if density > need:
            why = f"v={v} rows share a gathered row, too few for {n}:{m} at {tokens} tokens"
            return "expand", f"{why}; expanded, cuBLAS runs"
        return "gather", f"{n}:{m} with v={v}: the gathered GEMM does {density:.3g} of the dense work on tensor cores"

    def check(self, x, weight, outputs, inputs, n, m, v, **rest):
        values, index = weight
        if index.dtype != torch.int32:
            raise TypeError(f"Expected an index of int32, got {index.dtype}.")
        shapes = (outputs, -(-inputs // m) * n), (-(-outputs // v), values.shape[1])
        if (values.shape, index.shape) != shapes:
            expected = f"values {shapes[0]} and index {shapes[1]} for ({outputs}, {inputs}) as {n}:{m}, v={v}"
            raise ValueError(f"Expected {expected}, got {tuple(values.shape)} and {tuple(index.shape)}.")

    def arrange(self, x, variant, **numbers):
        """Feature-major (I, W), W whole tiles of tokens; one token stays as it is."""
        tokens = x.shape[:-1].numel()
        width = power_of_two(tokens, 16, FEW) if variant == "few" else transpose.padded(tokens)
        return transpose.feature_major_rows(x, width)

    def launch(self, variant, x, *parts, activation, **numbers):
        tokens = len(parts[-1])
        numbers |= {"tokens": tokens, "row_major": True, "activation": activation}
        if variant == "gather":
            return _many(x, *parts, **numbers)
        return _few(x, *parts, inputs=x.shape[1 if tokens == 1 else 0], after_transpose=tokens > 1, **numbers)

    def shares(self, variant, x, stored, up, outputs, n, m, v):
        if variant != "few":
            return None
        tokens, inputs = x.shape
        if tokens > 1:  # feature-major
            x = torch.nn.functional.pad(x.t(), (0, power_of_two(tokens, 16, FEW) - tokens)).contiguous()
        numbers = {"tokens": tokens, "row_major": True, "inputs": inputs, "after_transpose": False}
        few = _described(x, stored[0], up and up[0], n=n, m=m, v=v, **numbers)
        tensors = (x, *stored, None, None, *(up or (None, None)), None)
        return few.shares(tensors, 1 if up is None else 2, tokens, outputs)


class FeatureMajor(VectorNMLinear):
    """The same of x (I, T or wider) -> (O, T), or (T, O) when ``row_major``."""

    prefix = "gpu_vector_nm_linear_feature_major"
    layout_numbers = f"SymInt tokens, bool row_major, {VectorNMLinear.layout_numbers}"

    def traced(self, *_, **__):
        return None  # part of a chain for many tokens

    def sizes(self, x, outputs, numbers):
        shape = (numbers["tokens"], outputs) if numbers["row_major"] else (outputs, numbers["tokens"])
        return numbers["tokens"], x.shape[0], shape, shape

    def _shape(self, x, *arguments):
        tokens, row_major, *_, outputs, _ = arguments[-len(self.numbers) :]
        return (tokens, outputs) if row_major else (outputs, tokens)

    def arrange(self, x, variant, tokens, **numbers):
        """None for x itself, or a padded copy if the kernel could not read x in place; one token becomes (1, I)."""
        if tokens == 1:
            return (lambda x: x[:, :1].T) if variant == "few" else None
        width = transpose.padded(tokens) if variant == "gather" else power_of_two(tokens, 16, FEW)
        whole = x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        if whole and (variant == "gather" or x.shape[1] >= width):
            return None
        return lambda x: torch.nn.functional.pad(x[:, :tokens], (0, width - tokens))

    def multiply(self, x, dense, bias, numbers):
        x = x[:, : numbers["tokens"]]
        if numbers["row_major"]:
            return torch.nn.functional.linear(x.T, dense, bias)
        return torch.mm(dense, x) if bias is None else torch.addmm(bias[:, None], dense, x)

    def launch(self, variant, x, *parts, **numbers):
        if variant == "gather":
            return _many(x, *parts, **numbers)
        inputs = x.shape[1 if numbers["tokens"] == 1 else 0]
        return _few(x, *parts, inputs=inputs, after_transpose=False, **numbers)


linear, _feature_major = VectorNMLinear(), FeatureMajor()
choose, gated_linear, linear_grad_values = linear.choose, linear.gated, grad_values
linear_grad_input = ExpandedProduct(expand, "rows of one group share no column of the result; expanded, cuBLAS runs")


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """x (T, I) -> (I, padded T), the form the gather reads; the padding is unwritten."""
    return transpose.transpose(x, transpose.padded(x.shape[0]))


def linear_feature_major(x, values, index, bias=None, *, tokens=None, row_major=False, **options):
    """x (I, T) -> activation(W @ x + bias) * gate, (O, T): a chain of such layers transposes once, at its start.

    ``tokens`` when x is a wider buffer, as ``feature_major`` gives; with ``row_major`` the output is (T, O), for the
    end of a chain. ``gate`` is in the output's order.
    """
    tokens = x.shape[1] if tokens is None else tokens
    options |= {"out_features": len(values), "tokens": tokens, "row_major": row_major}
    return _feature_major(x, values, index, bias, **options)


def gated_linear_feature_major(x, up, gate, *, tokens=None, row_major=False, **options):
    """``gated_linear`` of x (I, T or wider) -> (O, T), or (T, O) when ``row_major``: part of a feature-major chain."""
    tokens = x.shape[1] if tokens is None else tokens
    options |= {"out_features": len(up[0]), "tokens": tokens, "row_major": row_major}
    return _feature_major.gated(x, up, gate, **options)
