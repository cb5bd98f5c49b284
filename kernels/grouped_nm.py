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

from . import autotune, epilogue, transpose
from .grouped_nm_few import gathered, slot_rows, slot_tiles
from .library import (
    INTERPRET,
    Launch,
    contiguous,
    filled,
    multiprocessors,
    operator,
    overlap,
    plan,
    power_of_two,
    precision,
)


@triton.jit
def _expand_slots(
    values_ptr, index_ptr, pattern_ptr, out_ptr, I, O, Q, strips,
    G: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Each column of a (chunk, strip) belongs to one slot, so the slots together write every element once."""
    strip, c = tl.program_id(0), tl.program_id(1)
    base = (c * strips + strip).to(tl.int64) * Q
    r = tl.arange(0, MP)
    rows = (strip * M + r).to(tl.int64)
    for q0 in range(0, Q, BQ):
        q = q0 + tl.arange(0, BQ)
        dense, column = slot_rows(values_ptr, index_ptr, pattern_ptr, base, q, c, I, Q, G, N, MP)
        at = out_ptr + rows[None, :] * I + column[:, None]
        mask = (column < I)[:, None] & ((r < M) & (rows < O))[None, :]
        tl.store(at, dense.to(out_ptr.dtype.element_ty), mask=mask)


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


GATHERED = 16  # tokens up to which the entries' own products are made
ROOM = 8192  # fp32 sums that a program can hold


@functools.lru_cache(maxsize=4096)
def choose(
    out_features: int,
    in_features: int,
    n: int,
    m: int,
    g: int,
    tokens: int,
    dtype: torch.dtype,
    save_memory: bool = False,
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``gather`` (entry by entry), ``slots`` (tiles made from the stored slots) or
    ``expand`` (dense, then cuBLAS)."""
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    if tokens <= GATHERED and max(_sums(n, m, g, power_of_two(tokens, 1, GATHERED))) <= ROOM:
        return (
            "gather",
            f"{tokens} tokens: the weight is read compressed, {n} of {m}, and entries find their activations",
        )
    if tokens == 1:
        return "slots", f"one token: the weight is read compressed, {n} of {m}"
    if save_memory:
        return "slots", "tiles are made from the slots on the fly: saves the dense weight's memory, and no time"
    return "expand", f"strips of {m} rows are too low for tensor cores at {tokens} tokens; expanded, cuBLAS runs"


def _sums(n, m, g, width):
    """Sums that one strip's entries have, and on the way to their rows."""
    places = power_of_two(math.comb(m, n), 1, 1 << 30) * power_of_two(n, 1, 256)
    return places * power_of_two(g, 1, 1 << 30) * width, places * power_of_two(m, 1, 256) * width


def _configs(tokens: int, strips: int, slots: int, programs: int) -> list[dict]:
    if INTERPRET:
        return [{"BQ": 16, "S": 2, "UNROLL": 1}]
    found = []
    for depth, warps in ((64, 1), (128, 1), (128, 2)) if tokens == 1 else ((64, 2), (128, 4)):
        split = 1
        while strips * split < 32 * programs and split < 8 and slots // (2 * split) >= 4 * depth:
            split *= 2
        found.append({"BQ": depth, "S": split, "UNROLL": 4, "num_warps": warps})
    return found


def _gather_configs(n: int, m: int, g: int, width: int, strips: int, chunks: int, programs: int) -> list[dict]:
    if INTERPRET:
        return [{"BS": 2, "S": 2, "UNROLL": 1}]
    found, least = [], max(_sums(n, m, g, width))
    for room, warps, unroll, waves in ((2048, 4, 2, 2), (2048, 2, 2, 4), (1024, 1, 4, 4), (ROOM, 8, 1, 2)):
        height, split = power_of_two(room // least, 1, 256), 1
        while -(-strips // height) * split < waves * programs and split < 8 and chunks >= 4 * split:
            split *= 2
        found.append({"BS": height, "S": split, "UNROLL": unroll, "num_warps": warps})
    return found


# ---- launchers


def _plan_few(x, values, index, pattern, bias, gate, y, tokens, inputs, n, m, activation):
    chunks, strips, patterns, g, _ = values.shape
    outputs, width = y.shape[1], 1 if tokens == 1 else 16
    height = power_of_two(m, 1 if tokens == 1 else 16, 256)
    stride, tiles = x.stride(1 if tokens == 1 else 0), triton.cdiv(tokens, width)

    def prepare(config):
        split = config["S"]
        launch = Launch(
            slot_tiles, (strips, split, tiles), G=g, N=n, M=m, MP=height, BT=width, ACTIVATION=activation,
            PRECISION=precision(x), **overlap(x), **config,
        )  # fmt: skip

        def call(x, values, index, pattern, bias, gate, y):
            met = epilogue.hand_over.take(x, strips * tiles, strips * tiles * split, height * width)
            launch(
                x, values, index, pattern, bias, gate, y, *met,
                tokens, inputs, outputs, patterns * g, chunks, strips, stride,
            )  # fmt: skip

        return call

    key = (x.dtype, outputs, inputs, n, m, g, width)
    configs = _configs(tokens, strips, chunks * patterns * g, multiprocessors(x))
    given = (x, values, index, pattern, bias, gate, y)
    return autotune.pick("grouped_nm_few", key, configs, prepare, given)


def _plan_gather(x, values, index, pattern, bias, gate, y, tokens, inputs, n, m, activation):
    """As ``_plan_few``, for tokens that one program takes together."""
    chunks, strips, patterns, g, _ = values.shape
    outputs, width = y.shape[1], power_of_two(tokens, 1, GATHERED)
    sides = {"P": patterns, "G": g, "N": n, "M": m}
    padded = {"PP": patterns, "GP": g, "NP": n, "MP": m}
    sides |= {name: power_of_two(size, 1, 1 << 30) for name, size in padded.items()}
    stride = x.stride(1 if tokens == 1 else 0)

    def prepare(config):
        split, height = config["S"], config["BS"] * sides["MP"]
        tiles = triton.cdiv(strips, config["BS"])
        launch = Launch(gathered, (tiles, split), BT=width, ACTIVATION=activation, **sides, **overlap(x), **config)

        def call(x, values, index, pattern, bias, gate, y):
            met = epilogue.hand_over.take(x, tiles, tiles * split, height * width)
            launch(x, values, index, pattern, bias, gate, y, *met, tokens, inputs, outputs, chunks, strips, stride)

        return call

    key = (x.dtype, outputs, inputs, n, m, g, width)
    configs = _gather_configs(n, m, g, width, strips, chunks, multiprocessors(x))
    given = (x, values, index, pattern, bias, gate, y)
    return autotune.pick("grouped_nm_gather", key, configs, prepare, given)


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
    if x.dtype != values.dtype or index.dtype != torch.int16 or pattern.dtype != torch.int32:
        raise TypeError(
            f"x {x.dtype}, values {values.dtype}, index {index.dtype} and pattern {pattern.dtype} do not fit"
        )
    if values.shape[1] != -(-outputs // m) or values.shape[0] != -(-inputs // (values.shape[2] * values.shape[3])):
        raise ValueError(f"values {tuple(values.shape)} do not hold ({outputs}, {inputs}) in strips of {m}")
    epilogue.check(outputs, shape, (bias,), gate)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, n, m, values.shape[3], tokens, x.dtype, save_memory)
    if variant == "empty":
        return lambda x, *rest: x.new_empty(shape)
    if variant == "expand":
        dense = _plan_expand(values, index, pattern, m, outputs, inputs)

        def call(x, values, index, pattern, bias, gate):
            y = torch.nn.functional.linear(x, dense(values, index, pattern), bias)
            return epilogue.apply(y, activation, gate)

        return call

    turn, y = transpose.prepared_rows(x, -(-tokens // 16) * 16), x.new_empty(tokens, outputs)
    make = _plan_gather if variant == "gather" else _plan_few
    run = make(turn(x), values, index, pattern, bias, gate, y, tokens, inputs, n, m, activation)

    def call(x, values, index, pattern, bias, gate):
        y = x.new_empty(shape)
        run(turn(x), values, index, pattern, bias, gate, y)
        return y

    return call


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
    chunks, strips, patterns, g, n = values.shape
    constants = {"G": g, "N": n, "M": m, "MP": power_of_two(m, 1, 256), "BQ": 16 if INTERPRET else 128}
    launch = Launch(_expand_slots, (strips, chunks), **constants)
    return filled(launch, (outputs, inputs), inputs, outputs, patterns * g, strips)


def _collect_fake(dense, index, pattern, m):
    return dense.new_empty(*index.shape, pattern.shape[1])


@operator("gpu_grouped_nm_collect(Tensor dense, Tensor index, Tensor pattern, int m) -> Tensor", _collect_fake)
def _collect(dense, index, pattern, m):
    given = (dense.contiguous(), index, pattern)
    return plan(("grouped_nm collect", m), given, lambda: _plan_collect(*given, m))(*given)


def _plan_collect(dense, index, pattern, m):
    (outputs, inputs), (chunks, strips, patterns, g), n = dense.shape, index.shape, pattern.shape[1]
    launch = Launch(_collect_slots, (strips, chunks), G=g, N=n, M=m, BQ=16 if INTERPRET else 128)
    return filled(launch, (*index.shape, n), inputs, outputs, patterns * g, strips)


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
