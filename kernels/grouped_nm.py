"""GroupedNM(n, m, g): strips of m rows; in a chunk of P*g columns, each pattern of n rows belongs to g columns.

Letters: T tokens, I inputs, O outputs; P patterns, Q = P * g slots a chunk; slot (chunk c, strip s, q = p*g + j) holds
n values, at rows m*s + pattern[p] of column Q*c + index[c, s, q]. MP: m rounded up to what a tile may be.
``pattern`` (P, n) int32 is the layout's own table: kernels read it, so that the order of patterns is defined once.
"""

import math

import torch
import triton
import triton.language as tl

from . import autotune
from .backend import INTERPRET, backend
from .grouped_nm_few import expand_columns, few_tokens
from .launch import into_new, table_launches, triton_launch
from .linear import Linear
from .operators import CollectedProduct, ExpandedProduct, operator
from .pattern_cache import Derived
from .pdl import overlap
from .precision import exact, precision
from .split_k import workspace
from .tiles import matrix_of, power_of_two, splits, wide


@triton.jit
def _collect_slots(
    dense_ptr, index_ptr, pattern_ptr, out_ptr, I, O, Q, strips,
    G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The dense matrix at the pattern; zero in slots beyond the matrix."""
    strip, c = tl.program_id(0), tl.program_id(1)
    base = (c * strips + strip).to(tl.int64) * Q
    for q0 in range(0, Q, BQ):
        q = q0 + tl.arange(0, BQ)
        ok = q < Q
        column = c * Q + tl.load(index_ptr + base + q, mask=ok, other=0).to(tl.int32)
        for i in tl.static_range(N):
            row = (strip * M + tl.load(pattern_ptr + q // G * N + i, mask=ok, other=0)).to(tl.int64)
            value = tl.load(dense_ptr + row * I + column, mask=ok & (row < O) & (column < I), other=0.0)
            tl.store(out_ptr + (base + q) * N + i, value, mask=ok)


FEW = 64  # tokens up to which reading the weight decides
AT_ONCE = 1 << 23  # slots per step while the table is made, which needs 64-bit integers


def _configs(tokens: int, times: int, m: int, strips: int, inputs: int, programs: int) -> list[dict]:
    """``times``: the number of token tiles."""
    if INTERPRET:
        return [{"BS": power_of_two(16 // m, 1, 16), "BK": 16, "S": 2}]
    if tokens == 1:
        tiles = [(16, 256, 4, 24), (16, 256, 4, 48), (16, 128, 2, 24), (64, 32, 2, 24), (32, 64, 2, 24)]
    else:
        waves = 24 if tokens <= 16 else 12
        tiles = [(32, 128, 4, waves), (32, 128, 2, waves), (32, 64, 2, waves), (64, 64, 4, waves), (64, 128, 8, waves)]
    configs = []
    for rows, depth, warps, waves in tiles:  # as many warps as hide the latency of the values
        height, depth = _tile(m, rows, depth, warps)
        split = splits(-(-strips // height) * times * warps, waves * programs, inputs, 2 * depth, most=inputs)
        configs.append({"BS": height, "BK": depth, "S": split, "num_warps": warps, "num_stages": 1})
    return configs


def _tile(m, rows, depth, warps):
    """(strips, columns) of a tile of about so many rows and columns whose weights fit into the registers."""
    height = power_of_two(m, 1, 256)
    strips = max(1, rows // height)
    return strips, min(depth, max(16, 2048 * warps // (strips * height)))


def _slots_of_columns(index):
    """(strips, chunks * Q): which slot of its chunk each column has; made once per pattern."""
    chunks, strips, patterns, g = index.shape
    q = patterns * g
    number, slot = torch.arange(q, device=index.device, dtype=torch.int16), index.new_zeros(chunks, strips, q)
    at_once = max(1, AT_ONCE // max(1, strips * q))
    for part, column in zip(slot.split(at_once), index.view(chunks, strips, q).split(at_once), strict=True):
        part.scatter_(2, column.long(), number.expand_as(part))
    slot = slot.transpose(0, 1).reshape(strips, chunks * q)
    return slot.to(torch.uint8) if q <= 256 else slot


def _check_pattern(index, pattern):
    if index.dtype != torch.int16 or pattern.dtype != torch.int32:
        raise TypeError(f"Expected an index of int16 and a pattern of int32, got {index.dtype} and {pattern.dtype}.")


@operator(
    "gpu_grouped_nm_expand(Tensor values, Tensor index, Tensor pattern, int m, int out_features, int in_features)"
    " -> Tensor",
    lambda values, index, pattern, m, out_features, in_features: (out_features, in_features),
    strided=(),
)
def expand(values, index, pattern, m, out_features, in_features):
    """values, index, pattern -> the dense weight (O, I)."""
    _check_pattern(index, pattern)
    chunks, strips, patterns, g, n = values.shape
    q, height = patterns * g, power_of_two(m, 1, 256)
    rows, depth = _tile(m, 32, 16 if INTERPRET else 128, 4)
    grid = (triton.cdiv(strips, rows), triton.cdiv(in_features, depth))
    constants = {"Q": q, "G": g, "N": n, "M": m, "MP": height, "BS": rows, "BK": depth, "WIDE": wide(values)}
    launch = triton_launch(expand_columns, grid, **constants)
    launch = into_new(launch, values, (out_features, in_features), in_features, out_features, strips, chunks * q)
    slots_of = Derived("grouped_nm slots", _slots_of_columns)
    return lambda values, index, pattern: launch(values, slots_of(index)[0], pattern)


@operator(
    "gpu_grouped_nm_collect(Tensor dense, Tensor index, Tensor pattern, int m) -> Tensor",
    lambda dense, index, pattern, m: (*index.shape, pattern.shape[1]),
)
def collect(dense, index, pattern, m):
    """A dense matrix (O, I) at the pattern: values (chunks, strips, P, g, n)."""
    (outputs, inputs), (chunks, strips, patterns, g), n = dense.shape, index.shape, pattern.shape[1]
    launch = triton_launch(_collect_slots, (strips, chunks), G=g, N=n, M=m, BQ=16 if INTERPRET else 128)
    return into_new(launch, dense, (*index.shape, n), inputs, outputs, patterns * g, strips)


class GroupedNMLinear(Linear):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``pattern`` (P, n) int32 is on the same device.

    ``save_memory`` avoids a dense weight, at a cost in time.
    """

    prefix, stored = "gpu_grouped_nm_linear", "Tensor values, Tensor index, Tensor pattern"
    layout_numbers, options, expand = "int m, ", 'str activation="none", bool save_memory=False', expand

    def facts(self, stored, up, numbers):
        return {"n": stored[0].shape[-1], **numbers}

    def choose(self, tokens, outputs, inputs, dtype, *, n, m, save_memory=False):
        """``empty``, ``few`` (straight from the stored slots) or ``expand`` (dense, then cuBLAS)."""
        if tokens == 0 or outputs == 0:
            return "empty", "nothing to compute"
        exactly = exact(dtype)
        if tokens == 1 or (tokens <= FEW and not exactly):
            return "few", f"{tokens} tokens: the weight is read compressed, {n} of {m}"
        if save_memory:
            return "few", "tiles are made from the slots on the fly: saves the dense weight's memory, and no time"
        if exactly:
            return "expand", f"fp32 without tf32 at {tokens} tokens: tiles made on the fly lose; expanded, cuBLAS runs"
        return "expand", f"tiles made on the fly are too slow for {tokens} tokens; expanded, cuBLAS runs"

    def check(self, x, weight, outputs, inputs, m, save_memory):
        values, index, pattern = weight
        _check_pattern(index, pattern)
        if values.shape[1] != -(-outputs // m) or values.shape[0] != -(-inputs // (values.shape[2] * values.shape[3])):
            raise ValueError(
                f"Expected values of ({outputs}, {inputs}) in strips of {m} rows, got the shape {tuple(values.shape)}."
            )

    def arrange(self, x, variant, **numbers):
        return matrix_of(x)

    def launch(self, variant, x, values, index, pattern, bias, gate, y, activation, m, save_memory):
        chunks, strips, patterns, g, n = values.shape
        (tokens, outputs), inputs, q = y.shape, x.shape[1], patterns * g
        width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
        height, times, stride = power_of_two(m, 1, 256), triton.cdiv(tokens, width), x.stride(0)
        constants = {"Q": q, "G": g, "N": n, "M": m, "MP": height, "BT": width, "ACTIVATION": activation}
        constants |= {"PRECISION": precision(x.dtype), "WIDE": wide(values), **overlap(x)}
        integers = (tokens, inputs, outputs, strips, chunks * q, stride)

        def prepare(config):
            grid = (triton.cdiv(strips, config["BS"]), config["S"], times)
            tiles, shares, size = grid[0] * times, math.prod(grid), config["BS"] * height * width
            launches = table_launches(few_tokens, grid, **constants, **config)
            slots_of = Derived("grouped_nm slots", _slots_of_columns)

            def call(x, values, index, pattern, bias, gate, y):
                slots, ready = slots_of(index)
                partial = workspace.take(x, tiles, shares, size)
                launches[ready](x, values, slots, pattern, bias, gate, y, *partial, *integers)

            return call

        key = (x.dtype, outputs, inputs, n, m, g, width, times.bit_length())
        configs = _configs(tokens, times, m, strips, inputs, backend.multiprocessors(x))
        return autotune.pick("grouped_nm", key, configs, prepare, (x, values, index, pattern, bias, gate, y))


linear = GroupedNMLinear()
choose = linear.choose
linear_grad_input = ExpandedProduct(expand, "the rows of a strip share no column; expanded, cuBLAS runs")
linear_grad_values = CollectedProduct(collect)
