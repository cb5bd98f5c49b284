"""NM(n, m): n kept of every m inputs of a row, positions packed in 2, 4 or 8 bits.

Letters: T tokens, I inputs, O outputs, G groups a row, K = G * n slots; BITS a position, BYTES of index a row.
BM output rows, BT tokens, BK columns a tile; S splits of the reduction.
A word is two groups of 2:4 in 16-bit types: 4 values in 64 bits, whose positions share one byte.
"""

import functools

import torch
import triton
import triton.language as tl

from . import autotune, cusparselt, epilogue
from .epilogue import finish
from .library import (
    INTERPRET,
    Launch,
    as_rows,
    contiguous,
    exact,
    multiprocessors,
    operator,
    overlap,
    plan,
    power_of_two,
    precision,
    wide,
)
from .tiles import begin

FEW = 64  # tokens up to which reading the weight decides


@triton.jit
def _finish(
    acc, rows, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O,
    BM: tl.constexpr, BT: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores the row-major output tile (BM, BT) of this program, or its share."""
    tile, split, t = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BT + tl.arange(0, BT)
    row_ok, place = rows < O, tile * tl.num_programs(2) + tl.program_id(2)
    finish(
        acc, acc, place, split, rows, row_ok, t.to(tl.int64)[None, :] * O + rows[:, None],
        row_ok[:, None] & (t < T)[None, :], bias_ptr, None, gate_ptr, y_ptr, partial_ptr, count_ptr,
        1, S, BM, BT, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _half(word, shift, BF16: tl.constexpr):
    """The 16-bit float at bit ``shift`` of a 64-bit word, as fp32."""
    bits = (word >> shift.to(tl.int64)).to(tl.int32)
    if BF16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _one_token_24(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, words,
    BM: tl.constexpr, BW: tl.constexpr, S: tl.constexpr, BF16: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x and values as 64-bit words: the four activations of a group are one word, and a position is a shift."""
    begin(PDL)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    w_rows = tl.minimum(rows, O - 1)
    if WIDE:
        w_rows = w_rows.to(tl.int64)
    share = tl.cdiv(words, S * BW) * BW
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BW), tl.float32)
    for w0 in range(first, tl.minimum(first + share, words), BW):
        j = w0 + tl.arange(0, BW)
        ok = j < words
        w = tl.load(w_ptr + w_rows[:, None] * words + j[None, :], mask=ok[None, :], other=0)
        p = tl.load(index_ptr + w_rows[:, None] * words + j[None, :], mask=ok[None, :], other=0).to(tl.int32)
        even, odd = tl.load(x_ptr + 2 * j, mask=ok, other=0), tl.load(x_ptr + 2 * j + 1, mask=ok, other=0)
        for s in tl.static_range(4):
            x = even if s < 2 else odd
            shift = (p << 4 >> 2 * s) & 48  # 16 bits a position
            acc += _half(x[None, :], shift, BF16) * _half(w, tl.full((1, 1), 16 * s, tl.int32), BF16)
    _finish(
        tl.sum(acc, 1)[:, None], rows, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BM, 1, S, ACTIVATION
    )


@triton.jit
def _dense_group(values, nibble, dtype: tl.constexpr):
    """Four elements of a 2:4 group, from its two values in 32 bits and its two positions in 4.

    One byte permute builds two elements: its selector is "zero, zero" with the bytes of the first value put at the
    first position and those of the second at the second.
    """
    d0, d1, d2, d3 = tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, s, lo, hi;
        shl.b32 a, $5, 3; and.b32 a, a, 24; shl.b32 a, 0x54, a;
        shl.b32 b, $5, 1; and.b32 b, b, 24; shl.b32 b, 0x76, b;
        xor.b32 s, a, b; xor.b32 s, s, 0x44444444;
        prmt.b32 lo, $4, 0, s; shr.u32 s, s, 16; prmt.b32 hi, $4, 0, s;
        mov.b32 {$0, $1}, lo; mov.b32 {$2, $3}, hi;
        }""",
        "=h,=h,=h,=h,r,r", [values, nibble], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return (
        d0.to(dtype, bitcast=True),
        d1.to(dtype, bitcast=True),
        d2.to(dtype, bitcast=True),
        d3.to(dtype, bitcast=True),
    )


@triton.jit
def _dense_words(w, p, dtype: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """The (BM, 8 * BW) dense elements of words w and their position bytes p."""
    a0, a1, a2, a3 = _dense_group(w.to(tl.int32), p, dtype)
    b0, b1, b2, b3 = _dense_group((w >> 32).to(tl.int32), p >> 4, dtype)
    even, odd = tl.join(tl.join(a0, b0), tl.join(a2, b2)), tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(even, odd), (BM, BW * 8))


@triton.jit
def _few_tokens_24(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, words, stride_x,
    BM: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tensor cores over tiles that are expanded in registers, 64-bit word by word."""
    begin(PDL)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    w_rows = tl.minimum(rows, O - 1)
    if WIDE:
        w_rows = w_rows.to(tl.int64)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    share = tl.cdiv(words, S * BW) * BW
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BT), tl.float32)
    for w0 in range(first, tl.minimum(first + share, words), BW):
        j, c = w0 + tl.arange(0, BW), w0 * 8 + tl.arange(0, BW * 8)
        w = tl.load(w_ptr + w_rows[:, None] * words + j[None, :], mask=(j < words)[None, :], other=0)
        p = tl.load(index_ptr + w_rows[:, None] * words + j[None, :], mask=(j < words)[None, :], other=0).to(tl.int32)
        x = tl.load(
            x_ptr + t[:, None] * stride_x + c[None, :], mask=(t < T)[:, None] & (c < words * 8)[None, :], other=0.0
        )
        acc = tl.dot(_dense_words(w, p, dtype, BM, BW), tl.trans(x), acc)
    _finish(acc, rows, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BM, BT, S, ACTIVATION)


@triton.jit
def _dense_tile(
    w_ptr, index_ptr, w_rows, c, K, BYTES, N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Columns c of the dense weight: each looks at the N slots of its own group."""
    dense = tl.zeros((BM, BK), w_ptr.dtype.element_ty)
    for s in tl.static_range(N):
        slot = c // M * N + s
        ok = (slot < K)[None, :]
        byte = tl.load(index_ptr + w_rows[:, None] * BYTES + (slot * BITS // 8)[None, :], mask=ok, other=0).to(tl.int32)
        position = (byte >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1)
        mine = ok & (position == (c % M)[None, :])
        dense = tl.where(mine, tl.load(w_ptr + w_rows[:, None] * K + slot[None, :], mask=mine, other=0.0), dense)
    return dense


@triton.jit
def _tiles(
    x_ptr, w_ptr, index_ptr, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, I, O, K, BYTES, stride_x,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    S: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Any n, m and dtype: dense tiles are made on the fly, so that the dense weight is never in memory."""
    begin(PDL)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    w_rows = tl.minimum(rows, O - 1)
    if WIDE:
        w_rows = w_rows.to(tl.int64)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    t_ok = (t < T)[:, None]
    if WIDE:
        t = t.to(tl.int64)
    share = tl.cdiv(I, S * BK) * BK
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BT), tl.float32)
    for c0 in range(first, tl.minimum(first + share, I), BK):
        c = c0 + tl.arange(0, BK)
        w = _dense_tile(w_ptr, index_ptr, w_rows, c, K, BYTES, N, M, BITS, BM, BK)
        x = tl.load(x_ptr + t[:, None] * stride_x + c[None, :], mask=t_ok & (c < I)[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    _finish(acc, rows, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O, BM, BT, S, ACTIVATION)


@triton.jit
def _expand_tile(
    w_ptr, index_ptr, out_ptr, I, O, K, BYTES,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    rows, c = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    dense = _dense_tile(w_ptr, index_ptr, tl.minimum(rows, O - 1), c, K, BYTES, N, M, BITS, BM, BC)
    tl.store(out_ptr + rows[:, None] * I + c[None, :], dense, mask=(rows < O)[:, None] & (c < I)[None, :])


@triton.jit
def _expand_words(w_ptr, index_ptr, out_ptr, O, words, BM: tl.constexpr, BW: tl.constexpr):
    """2:4 in 16-bit types, 64-bit word by word: eight elements of the dense weight each."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows, j = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BW + tl.arange(0, BW)
    c = tl.program_id(1) * BW * 8 + tl.arange(0, BW * 8)
    ok = (rows < O)[:, None] & (j < words)[None, :]
    w = tl.load(w_ptr + rows[:, None] * words + j[None, :], mask=ok, other=0)
    p = tl.load(index_ptr + rows[:, None] * words + j[None, :], mask=ok, other=0).to(tl.int32)
    dense = _dense_words(w, p, dtype, BM, BW)
    tl.store(
        out_ptr + rows[:, None] * words * 8 + c[None, :], dense, mask=(rows < O)[:, None] & (c < words * 8)[None, :]
    )


@triton.jit
def _collect(
    dense_ptr, index_ptr, out_ptr, I, O, K, BYTES,
    N: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The dense matrix at the pattern: values, and zero in the slots of columns that the matrix does not have."""
    rows, slot = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (rows < O)[:, None] & (slot < K)[None, :]
    byte = tl.load(index_ptr + rows[:, None] * BYTES + (slot * BITS // 8)[None, :], mask=ok, other=0).to(tl.int32)
    column = (slot // N * M)[None, :] + ((byte >> (slot * BITS % 8)[None, :]) & ((1 << BITS) - 1))
    values = tl.load(dense_ptr + rows[:, None] * I + column, mask=ok & (column < I), other=0.0)
    tl.store(out_ptr + rows[:, None] * K + slot[None, :], values, mask=ok)


# ---- which variant, and with which tiles


def bits(m: int) -> int:
    """Bits a stored position takes."""
    return 2 if m <= 4 else 4 if m <= 16 else 8


def _has_words(n: int, m: int, dtype: torch.dtype, in_features: int) -> bool:
    """Whether two groups fill a 64-bit word; values whose storage is not so aligned are copied first."""
    return (n, m) == (2, 4) and dtype in (torch.float16, torch.bfloat16) and in_features % 8 == 0


def choose(
    out_features: int, in_features: int, n: int, m: int, tokens: int, dtype: torch.dtype, save_memory: bool = False
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``word`` and ``few`` (2:4 by words), ``tiles``, ``cusparselt`` or ``expand``."""
    return _choose(out_features, in_features, n, m, tokens, dtype, save_memory, exact(dtype))


@functools.lru_cache(maxsize=4096)
def _choose(out_features, in_features, n, m, tokens, dtype, save_memory, exactly):
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    words = _has_words(n, m, dtype, in_features)
    if tokens == 1 and words:
        return "word", "one token of 2:4: 0.5625 of the dense bytes are read, a position is a shift"
    if tokens <= FEW and not exactly:
        if words:
            return "few", f"{tokens} tokens of 2:4: 0.5625 of the dense bytes are read and expanded in registers"
        return (
            "tiles",
            f"{tokens} tokens: the weight is read compressed, tiles are expanded on the way to the tensor cores",
        )
    if words and in_features % 64 == 0 and out_features % 64 == 0 and cusparselt.available():
        return "cusparselt", "2:4 on sparse tensor cores, with a plan and a searched algorithm that are kept"
    if save_memory:
        return "tiles", "tiles are expanded on the fly: saves the dense weight's memory, and no time"
    if exactly:
        return "expand", "fp32 without tf32: tiles expanded on the fly are slower than the dense product; cuBLAS runs"
    return "expand", f"{n}:{m} at {tokens} tokens is arithmetic that tensor cores cannot skip; expanded, cuBLAS runs"


def _configs(variant: str, tokens: int, rows: int, columns: int, programs: int, itemsize: int) -> list[dict]:
    if INTERPRET:
        inside = {"BW": 2} if variant in ("word", "few") else {"BK": 16}
        return [dict(BM=16, S=2, **inside, **({} if variant == "word" else {"BT": 16}))]
    if variant == "word":
        return [
            {"BM": a, "BW": b, "S": 1, "num_warps": c}
            for a, b, c in ((4, 256, 4), (8, 128, 4), (4, 512, 4), (4, 128, 2))
        ]
    width, found = power_of_two(tokens, 16, 64), []
    tiles = ((64, 64, 4, 2, 2), (32, 64, 4, 2, 2))
    if variant == "few":
        tiles = ((64, 128, 4, 3, 2), (64, 128, 4, 3, 1), (64, 64, 4, 3, 2))
        if tokens <= 16:
            tiles = ((32, 128, 4, 3, 3), (32, 128, 4, 3, 2), (32, 128, 2, 3, 2), (32, 128, 4, 4, 2))
    for height, depth, warps, stages, waves in tiles:
        split = 1
        while -(-rows // height) * split < waves * programs and split < 8 and columns // (2 * split) >= 2 * depth:
            split *= 2
        inside = {"BW": depth // 8} if variant == "few" else {"BK": depth // (itemsize // 2)}
        found.append(dict(BM=height, BT=width, S=split, num_warps=warps, num_stages=stages, **inside))
    return found


# ---- launchers


def _words(x: torch.Tensor) -> torch.Tensor:
    return (x if x.data_ptr() % 8 == 0 else x.clone()).view(torch.int64)


def _plan_few(variant, x, values, index, bias, gate, y, n, m, activation):
    (tokens, inputs), (outputs, slots) = x.shape, values.shape
    stride, words, size = x.stride(0), inputs // 8, x.element_size()

    def prepare(config):
        height, width, split = config["BM"], config.get("BT", 1), config["S"]
        grid = (triton.cdiv(outputs, height), split, triton.cdiv(tokens, width))
        # beyond 16 tokens programs compute more than they wait: those of the next launch, which come early to where
        # there is room, would then share their multiprocessors unevenly (49 us became 60)
        early = overlap(x) if width <= 16 else {"PDL": False}
        common = dict(ACTIVATION=activation, WIDE=wide(x, values), **early, **config)
        if variant == "word":
            launch = Launch(_one_token_24, grid, BF16=x.dtype == torch.bfloat16, **common)
            integers = (tokens, outputs, words)
        elif variant == "few":
            launch, integers = Launch(_few_tokens_24, grid, **common), (tokens, outputs, words, stride)
        else:
            launch = Launch(_tiles, grid, N=n, M=m, BITS=bits(m), PRECISION=precision(x), **common)
            integers = (tokens, inputs, outputs, slots, index.shape[1], stride)

        def call(x, values, index, bias, gate, y):
            met = epilogue.hand_over.take(y, grid[0] * grid[2], split, height * width)
            if variant != "tiles":
                values, x = _words(values), _words(x) if variant == "word" else x
            launch(x, values, index, bias, gate, y, *met, *integers)

        return call

    key = (variant, x.dtype, outputs, inputs, n, m, power_of_two(tokens, 1, 1 << 20))
    configs = _configs(variant, tokens, outputs, inputs, multiprocessors(x), size)
    given = (x, values, index, bias, gate, y)
    return autotune.pick("nm", key, configs, prepare, given)


def _check(x, values, index, n, m, out_features):
    slots = -(-x.shape[-1] // m) * n
    if x.dtype != values.dtype or index.dtype != torch.uint8:
        raise TypeError(f"x is {x.dtype}, values {values.dtype} and index {index.dtype}; expected one dtype and uint8")
    if values.shape != (out_features, slots) or index.shape != (out_features, -(-slots * bits(m) // 8)):
        raise ValueError(
            f"values {tuple(values.shape)} and index {tuple(index.shape)} do not hold {n}:{m} of {x.shape[-1]}"
        )


def _linear_fake(x, values, index, bias, gate, n, m, out_features, activation, save_memory):
    return x.new_empty(*x.shape[:-1], out_features)


@operator(
    "gpu_nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? gate, int n, int m, int out_features,"
    " str activation, bool save_memory) -> Tensor",
    _linear_fake,
)
def _linear(x, values, index, bias, gate, n, m, out_features, activation, save_memory):
    bias, gate = contiguous(bias, gate)
    tensors = (x, values, index, bias, gate)
    statics = ("nm", n, m, out_features, activation, save_memory, precision(x))
    return plan(statics, tensors, lambda: _plan_linear(*tensors, *statics[1:6]))(*tensors)


def _plan_linear(x, values, index, bias, gate, n, m, outputs, activation, save_memory):
    """The callable for one layout of arguments; it is made on the first call's tensors."""
    _check(x, values, index, n, m, outputs)
    inputs, shape = x.shape[-1], (*x.shape[:-1], outputs)
    epilogue.check(outputs, shape, (bias,), gate)
    tokens = x.numel() // inputs
    variant, _ = choose(outputs, inputs, n, m, tokens, x.dtype, save_memory)
    if variant == "empty":
        return lambda x, *rest: x.new_empty(shape)
    if variant in ("expand", "cusparselt"):
        dense, run = _plan_expand(values, index, n, m, inputs), None
        if variant == "cusparselt":
            run = cusparselt.plan_linear(x, values, bias)

        def call(x, values, index, bias, gate):
            y = None if run is None else run(x, values, bias, lambda: dense(values, index))
            if y is None:
                y = torch.nn.functional.linear(x, dense(values, index), bias)
            return epilogue.apply(y, activation, gate)

        return call

    rows = as_rows(x)

    def arrange(x):
        flat = rows(x)
        return (
            flat
            if flat.stride(1) == 1 and flat.data_ptr() % 16 == 0
            else flat.clone(memory_format=torch.contiguous_format)
        )

    run = _plan_few(variant, arrange(x), values, index, bias, gate, x.new_empty(tokens, outputs), n, m, activation)

    def call(x, values, index, bias, gate):
        y = x.new_empty(shape)
        run(arrange(x), values, index, bias, gate, y)
        return y

    return call


def _expand_fake(values, index, n, m, in_features):
    return values.new_empty(values.shape[0], in_features)


@operator("gpu_nm_expand(Tensor values, Tensor index, int n, int m, int in_features) -> Tensor", _expand_fake)
def _expand(values, index, n, m, in_features):
    given, statics = (values, index), (n, m, in_features)
    return plan(("nm expand", *statics), given, lambda: _plan_expand(*given, *statics), strided=None)(*given)


def _plan_expand(values, index, n, m, inputs):
    """values, index -> the dense weight."""
    outputs, words, by_words = len(values), inputs // 8, _has_words(n, m, values.dtype, inputs) and not INTERPRET
    if by_words:
        launch = Launch(_expand_words, (triton.cdiv(outputs, 8), triton.cdiv(words, 128)), BM=8, BW=128)
        integers = (outputs, words)
    else:
        height, width = (16, 32) if INTERPRET else (8, 512)
        grid = (triton.cdiv(outputs, height), triton.cdiv(inputs, width))
        launch = Launch(_expand_tile, grid, N=n, M=m, BITS=bits(m), BM=height, BC=width)
        integers = (inputs, outputs, values.shape[1], index.shape[1])

    def call(values, index):
        dense = values.new_empty(outputs, inputs)
        if outputs and inputs:
            launch(_words(values) if by_words else values, index, dense, *integers)
        return dense

    return call


def _collect_fake(dense, index, n, m):
    return dense.new_empty(dense.shape[0], -(-dense.shape[1] // m) * n)


@operator("gpu_nm_collect(Tensor dense, Tensor index, int n, int m) -> Tensor", _collect_fake)
def _collect_op(dense, index, n, m):
    given = (dense.contiguous(), index)
    return plan(("nm collect", n, m), given, lambda: _plan_collect(*given, n, m))(*given)


def _plan_collect(dense, index, n, m):
    (outputs, inputs), height, width = dense.shape, *((16, 32) if INTERPRET else (8, 512))
    slots = -(-inputs // m) * n
    grid = (triton.cdiv(outputs, height), triton.cdiv(slots, width))
    launch = Launch(_collect, grid, N=n, M=m, BITS=bits(m), BM=height, BC=width)
    integers = (inputs, outputs, slots, index.shape[1])

    def call(dense, index):
        values = dense.new_empty(outputs, slots)
        if outputs and slots:
            launch(dense, index, values, *integers)
        return values

    return call


# ---- what the framework calls


def linear(x, values, index, bias=None, *, n, m, out_features, activation=None, gate=None, save_memory=False):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``save_memory`` rules out a dense weight, and is slow."""
    return _linear(x, values, index, bias, gate, n, m, out_features, epilogue.activation_name(activation), save_memory)


def linear_grad_input(grad, values, index, *, n, m, in_features):
    """grad (*, O) -> grad @ W, (*, I): 2:4 runs along the inputs, so its transpose is dense to the hardware."""
    return torch.matmul(grad, expand(values, index, n=n, m=m, in_features=in_features))


def linear_grad_values(grad, x, index, *, n, m):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (O, K): a dense product, collected at the pattern."""
    return collect(grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]), index, n=n, m=m)


def expand(values, index, *, n, m, in_features):
    """The dense weight (O, I)."""
    return _expand(values, index, n, m, in_features)


def collect(dense, index, *, n, m):
    """A dense matrix (O, I) at the pattern: values (O, K)."""
    return _collect_op(dense, index, n, m)
