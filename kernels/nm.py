"""NM(n, m): n kept of every m inputs of a row, positions packed in 2, 4 or 8 bits.

Letters: T tokens, I inputs, O outputs, G groups a row, K = G * n slots; BITS a position, BYTES of index a row.
BM output rows, BT tokens, BK columns a tile; S splits of the reduction.
"""

import functools
import math

import torch
import triton

from . import autotune, cusparselt, epilogue
from .library import (
    INTERPRET,
    Launch,
    as_rows,
    contiguous,
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
from .nm_few import few_tokens, few_tokens_24, one_token_24
from .nm_gradient import as_words, bits, has_words, plan_expand
from .nm_gradient import collect as collect_slots
from .nm_gradient import expand as expand_parts

FEW = 64  # tokens up to which reading the weight decides


# ---- which variant, and with which tiles


def choose(
    out_features: int, in_features: int, n: int, m: int, tokens: int, dtype: torch.dtype, save_memory: bool = False
) -> tuple[str, str]:
    """(variant, reason): ``empty``, ``word`` and ``few`` (2:4 by words), ``tiles``, ``cusparselt`` or ``expand``."""
    return _choose(out_features, in_features, n, m, tokens, dtype, save_memory, exact(dtype))


@functools.lru_cache(maxsize=4096)
def _choose(out_features, in_features, n, m, tokens, dtype, save_memory, exactly):
    if tokens == 0 or out_features == 0:
        return "empty", "nothing to compute"
    words = has_words(n, m, dtype, in_features)
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
        split = splits(-(-rows // height), waves * programs, columns, 2 * depth, most=8)
        inside = {"BW": depth // 8} if variant == "few" else {"BK": depth // (itemsize // 2)}
        found.append(dict(BM=height, BT=width, S=split, num_warps=warps, num_stages=stages, **inside))
    return found


# ---- launchers


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
            launch = Launch(one_token_24, grid, BF16=x.dtype == torch.bfloat16, **common)
            integers = (tokens, outputs, words)
        elif variant == "few":
            launch, integers = Launch(few_tokens_24, grid, **common), (tokens, outputs, words, stride)
        else:
            launch = Launch(few_tokens, grid, N=n, M=m, BITS=bits(m), PRECISION=precision(x), **common)
            integers = (tokens, inputs, outputs, slots, index.shape[1], stride)

        def call(x, values, index, bias, gate, y):
            met = epilogue.hand_over.take(y, grid[0] * grid[2], math.prod(grid), height * width)
            if variant != "tiles":
                values, x = as_words(values), as_words(x.view(-1)) if variant == "word" else x
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
        dense, run = plan_expand(values, index, n, m, inputs), None
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
    return filled(run, x, shape, arrange=arrange)


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
    return expand_parts(values, index, n, m, in_features)


def collect(dense, index, *, n, m):
    """A dense matrix (O, I) at the pattern: values (O, K)."""
    return collect_slots(dense, index, n, m)
