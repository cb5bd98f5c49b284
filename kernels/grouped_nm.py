"""GroupedNM(n, m, g): strips of m rows; in a chunk of P*g columns, each pattern of n rows belongs to g columns.

Letters: T tokens, I inputs, O outputs; P patterns, Q = P * g slots a chunk; slot (chunk c, strip s, q = p*g + j) holds
n values, at rows m*s + pattern[p] of column Q*c + index[c, s, q]. MP: m rounded up to what a tile may be.
``pattern`` (P, n) int32 is the layout's own table: kernels read it, so the order of patterns is settled in one place.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from . import autotune, epilogue
from .derived import derived
from .grouped_nm_few import expand_columns, few_tokens
from .library import (
    INTERPRET,
    Launch,
    as_rows,
    contiguous,
    exact,
    filled,
    for_tables,
    multiprocessors,
    operator,
    overlap,
    plan,
    power_of_two,
    precision,
    rows_contiguous,
    splits,
    wide,
)


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


# ---- which variant


FEW = 64  # tokens up to which reading the weight decides
AT_ONCE = 1 << 23  # slots that the table is made of at a time, in 64-bit integers on the way


def choose(
    out_features: int, in_features: int, n: int, m: int, tokens: int, dtype: torch.dtype, save_memory: bool = False
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``few`` (straight from the stored slots) or ``expand`` (dense, then cuBLAS)."""
    return _choose(out_features, n, m, tokens, save_memory, exact(dtype))


@functools.lru_cache(maxsize=4096)
def _choose(out_features, n, m, tokens, save_memory, exactly):
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    if tokens == 1 or (tokens <= FEW and not exactly):
        return "few", f"{tokens} tokens: the weight is read compressed, {n} of {m}"
    if save_memory:
        return "few", "tiles are made from the slots on the fly: saves the dense weight's memory, and no time"
    if exactly:
        return "expand", f"fp32 without tf32 at {tokens} tokens: tiles made on the fly lose; expanded, cuBLAS runs"
    return "expand", f"tiles made on the fly are too slow for {tokens} tokens; expanded, cuBLAS runs"


def _configs(tokens: int, times: int, m: int, strips: int, inputs: int, programs: int) -> list[dict]:
    """``times``: how many tiles of tokens there are."""
    if INTERPRET:
        return [{"BS": power_of_two(16 // m, 1, 16), "BK": 16, "S": 2}]
    if tokens == 1:
        tiles = [(16, 256, 4, 24), (16, 256, 4, 48), (16, 128, 2, 24), (64, 32, 2, 24), (32, 64, 2, 24)]
    else:
        waves = 24 if tokens <= 16 else 12
        tiles = [(32, 128, 4, waves), (32, 128, 2, waves), (32, 64, 2, waves), (64, 64, 4, waves), (64, 128, 8, waves)]
    found = []
    for rows, depth, warps, waves in tiles:  # as many warps as hide the latency of the values
        height, depth = _tile(m, rows, depth, warps)
        split = splits(-(-strips // height) * times * warps, waves * programs, inputs, 2 * depth, most=inputs)
        found.append({"BS": height, "BK": depth, "S": split, "num_warps": warps, "num_stages": 1})
    return found


def _tile(m, rows, depth, warps):
    """(strips, columns) of a tile of about so many rows and columns whose weights fit into the registers."""
    height = power_of_two(m, 1, 256)
    strips = max(1, rows // height)
    return strips, min(depth, max(16, 2048 * warps // (strips * height)))


# ---- launchers


def _slots(index):
    """(strips, chunks * Q): which slot of its chunk each column has; made once per pattern."""
    return derived("grouped_nm slots", _slots_of_columns, index)


def _slots_of_columns(index):
    chunks, strips, patterns, g = index.shape
    q = patterns * g
    number, slot = torch.arange(q, device=index.device, dtype=torch.int16), index.new_zeros(chunks, strips, q)
    at_once = max(1, AT_ONCE // max(1, strips * q))
    for part, column in zip(slot.split(at_once), index.view(chunks, strips, q).split(at_once), strict=True):
        part.scatter_(2, column.long(), number.expand_as(part))
    slot = slot.transpose(0, 1).reshape(strips, chunks * q)
    return slot.to(torch.uint8) if q <= 256 else slot


def _plan_few(x, values, index, pattern, bias, gate, y, inputs, m, activation):
    chunks, strips, patterns, g, n = values.shape
    (tokens, outputs), q = y.shape, patterns * g
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    height, times, stride = power_of_two(m, 1, 256), triton.cdiv(tokens, width), x.stride(0)
    constants = {"Q": q, "G": g, "N": n, "M": m, "MP": height, "BT": width, "ACTIVATION": activation}
    constants |= {"PRECISION": precision(x), "WIDE": wide(values), **overlap(x)}

    def prepare(config):
        tiles = triton.cdiv(strips, config["BS"])
        grid = (tiles, config["S"], times)
        launches = for_tables(few_tokens, grid, **constants, **config)

        def call(x, values, index, pattern, bias, gate, y):
            slots, settled = _slots(index)
            met = epilogue.hand_over.take(x, tiles * times, math.prod(grid), config["BS"] * height * width)
            launches[settled](
                x, values, slots, pattern, bias, gate, y, *met, tokens, inputs, outputs, strips, chunks * q, stride
            )

        return call

    key = (x.dtype, outputs, inputs, n, m, g, width, times.bit_length())
    configs = _configs(tokens, times, m, strips, inputs, multiprocessors(x))
    return autotune.pick("grouped_nm", key, configs, prepare, (x, values, index, pattern, bias, gate, y))


def _check_pattern(index, pattern):
    if index.dtype != torch.int16 or pattern.dtype != torch.int32:
        raise TypeError(f"index {index.dtype} and pattern {pattern.dtype} do not fit; expected int16 and int32")


def _linear_fake(x, values, index, pattern, bias, gate, m, out_features, activation, save_memory):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_grouped_nm_linear(Tensor x, Tensor values, Tensor index, Tensor pattern, Tensor? bias, Tensor? gate, int m,"
    " int out_features, str activation, bool save_memory) -> Tensor",
    _linear_fake,
)
def _linear(x, values, index, pattern, bias, gate, m, out_features, activation, save_memory):
    bias, gate = contiguous(bias, gate)
    tensors = (x, values, index, pattern, bias, gate)
    statics = ("grouped_nm", m, out_features, activation, save_memory, precision(x))
    return plan(statics, tensors, lambda: _plan_linear(*tensors, *statics[1:5]))(*tensors)


def _plan_linear(x, values, index, pattern, bias, gate, m, outputs, activation, save_memory):
    """The callable for one layout of arguments; it is made on the first call's tensors."""
    inputs, shape, n = x.shape[-1], (*x.shape[:-1], outputs), values.shape[-1]
    if x.dtype != values.dtype:
        raise TypeError(f"x is {x.dtype} and values {values.dtype}; expected one dtype")
    _check_pattern(index, pattern)
    if values.shape[1] != -(-outputs // m) or values.shape[0] != -(-inputs // (values.shape[2] * values.shape[3])):
        raise ValueError(f"values {tuple(values.shape)} do not hold ({outputs}, {inputs}) in strips of {m}")
    epilogue.check(outputs, shape, (bias,), gate)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, n, m, tokens, x.dtype, save_memory)
    if variant == "empty":
        return lambda x, *rest: x.new_empty(shape)
    if variant == "expand":
        dense = _plan_expand(values, index, pattern, m, outputs, inputs)

        def call(x, values, index, pattern, bias, gate):
            y = torch.nn.functional.linear(x, dense(values, index, pattern), bias)
            return epilogue.apply(y, activation, gate)

        return call

    rows, y = as_rows(x), x.new_empty(tokens, outputs)
    run = _plan_few(rows_contiguous(rows(x)), values, index, pattern, bias, gate, y, inputs, m, activation)
    return filled(run, x, shape, arrange=lambda x: rows_contiguous(rows(x)))


def _expand_fake(values, index, pattern, m, out_features, in_features):
    return values.new_empty(out_features, in_features)


@operator(
    "gpu_grouped_nm_expand(Tensor values, Tensor index, Tensor pattern, int m, int out_features, int in_features)"
    " -> Tensor",
    _expand_fake,
)
def _expand(values, index, pattern, m, out_features, in_features):
    given, statics = (values, index, pattern), (m, out_features, in_features)
    return plan(("grouped_nm expand", *statics), given, lambda: _plan_expand(*given, *statics), strided=None)(*given)


def _plan_expand(values, index, pattern, m, outputs, inputs):
    """values, index, pattern -> the dense weight."""
    _check_pattern(index, pattern)
    chunks, strips, patterns, g, n = values.shape
    q, height = patterns * g, power_of_two(m, 1, 256)
    rows, depth = _tile(m, 32, 16 if INTERPRET else 128, 4)
    grid = (triton.cdiv(strips, rows), triton.cdiv(inputs, depth))
    constants = {"Q": q, "G": g, "N": n, "M": m, "MP": height, "BS": rows, "BK": depth, "WIDE": wide(values)}
    launch = Launch(expand_columns, grid, **constants)
    launch = filled(launch, values, (outputs, inputs), inputs, outputs, strips, chunks * q)
    return lambda values, index, pattern: launch(values, _slots(index)[0], pattern)


def _collect_fake(dense, index, pattern, m):
    return dense.new_empty(*index.shape, pattern.shape[1])


@operator("gpu_grouped_nm_collect(Tensor dense, Tensor index, Tensor pattern, int m) -> Tensor", _collect_fake)
def _collect(dense, index, pattern, m):
    given = (dense.contiguous(), index, pattern)
    return plan(("grouped_nm collect", m), given, lambda: _plan_collect(*given, m))(*given)


def _plan_collect(dense, index, pattern, m):
    (outputs, inputs), (chunks, strips, patterns, g), n = dense.shape, index.shape, pattern.shape[1]
    launch = Launch(_collect_slots, (strips, chunks), G=g, N=n, M=m, BQ=16 if INTERPRET else 128)
    return filled(launch, dense, (*index.shape, n), inputs, outputs, patterns * g, strips)


# ---- what the framework calls


def linear(x, values, index, pattern, bias=None, *, m, out_features, activation=None, gate=None, save_memory=False):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``pattern`` (P, n) int32 lies on the same device.

    ``save_memory`` rules out a dense weight, at a cost in time.
    """
    name = epilogue.activation_name(activation)
    return _linear(x, values, index, pattern, bias, gate, m, out_features, name, save_memory)


def linear_grad_input(grad, values, index, pattern, *, m, in_features):
    """grad (*, O) -> grad @ W, (*, I)."""
    dense = expand(values, index, pattern, m=m, out_features=grad.shape[-1], in_features=in_features)
    return torch.matmul(grad, dense)


def linear_grad_values(grad, x, index, pattern, *, m):
    """grad (*, O), x (*, I) -> the gradient of ``values``: a dense product, collected at the pattern."""
    return collect(grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]), index, pattern, m=m)


def expand(values, index, pattern, *, m, out_features, in_features):
    """The dense weight (O, I)."""
    return _expand(values, index, pattern, m, out_features, in_features)


def collect(dense, index, pattern, *, m):
    """A dense matrix (O, I) at the pattern: values (chunks, strips, P, g, n)."""
    return _collect(dense, index, pattern, m)
