"""NM as a bitmap for a few tokens, in CUDA C++: ``cuda/bitmap_few.cu`` to four tokens, ``cuda/bitmap_many.cu`` to 64.

Letters as in ``nm``: T tokens, I inputs, O outputs.
"""

import functools

import torch

from . import autotune, fragments, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .nm_gradient import begin_at_words, bits
from .split_k import workspace
from .tiles import power_of_two

FEW, MOST = 4, fragments.MOST  # tokens: values multiplied one by one, and by tensor cores
BLOCK, ROWS, PIECE = 128, 32, 16  # columns and rows of a warp's block; bytes of a copy
# of up to FEW tokens: warps of a CTA, CTAs of a multiprocessor, blocks on their way for each warp
CONFIGS = [
    dict(zip(("WARPS", "CTAS", "STAGES"), config, strict=True))
    for config in ((16, 1, 1), (8, 2, 1), (16, 1, 2), (8, 3, 1), (4, 2, 1))
]
MOST_GROUPS = 4  # of rows that a CTA has, but for a group at each end
MANY_WARPS = (8, 4, 16, 2)  # with more


def fits(tokens: int, inputs: int, dtype: torch.dtype, n: int, m: int) -> bool:
    """Whether a kernel takes such a product: rows of whole blocks, whose values are whole pieces."""
    half = dtype in (torch.float16, torch.bfloat16)
    return 1 <= tokens <= MOST and half and bits(n, m) == 1 and inputs % BLOCK == 0 and n * 32 // m % 2 == 0


def kernel_for(tokens: int) -> tuple[str, dict[str, int]]:
    """The kernel, and its macro for so many tokens."""
    if tokens <= FEW:
        return "bitmap_few", {"TOKENS": power_of_two(tokens, 1, FEW)}
    return "bitmap_many", {"TILES": fragments.tiles(tokens)}


def shared_bytes(count: int, tokens: int, touched: int, WARPS: int, STAGES: int) -> int:
    """The shared memory of a CTA of up to FEW tokens: ``count`` values of each 32 columns, blocks of ``touched`` groups."""
    stage = ROWS * (count // 2 | 1) * PIECE + ROWS * PIECE
    x, sums = (2 if tokens > 2 else 1) * 4 * BLOCK, power_of_two(tokens, 1, FEW) * 4 * ROWS
    return WARPS * (STAGES * stage + x + touched * sums)


def most_touched(groups: int, blocks: int, ctas: int) -> int:
    """The groups of rows of which a CTA may have blocks, where ``ctas`` divide the blocks of all groups evenly."""
    return (-(-groups * blocks // ctas) - 2) // blocks + 2


def launch(x, values, index, bias, gate, y, activation: str, n: int, m: int):
    """A function of such tensors that writes y (T, O)."""
    tokens, count = len(x), n * 32 // m
    tensors = x, values, index, bias, gate, y
    copies = tuple(begin_at_words(t, PIECE) for t in (values, index))
    if tokens > FEW:
        configs = [
            {"WARPS": warps} for warps in MANY_WARPS if warps * fragments.tiles(tokens) <= 64
        ]  # of the registers
        shared = functools.partial(fragments.sums_bytes, tokens)
        return fragments.product("bitmap_many", tensors, activation, True, copies, configs, shared, N=count)
    return few(tensors, copies, activation, count)


def few(tensors: tuple, copies: tuple, activation: str, count: int):
    """The same for up to FEW tokens: one wave of CTAs, which share the blocks of the weight evenly."""
    x, y = tensors[0], tensors[-1]
    (tokens, inputs), outputs = x.shape, y.shape[1]
    kernel, macros = kernel_for(tokens)
    known = {"N": count, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation), **macros}
    groups, blocks, multiprocessors = -(-outputs // ROWS), inputs // BLOCK, backend.multiprocessors(x)

    def ctas_and_memory(config):
        """More than a wave where sums of all the groups that a CTA touches would be too large."""
        warps, a_wave = config["WARPS"], config["CTAS"] * multiprocessors
        waves = -(-groups // (a_wave * MOST_GROUPS))
        ctas = min(waves * a_wave, groups * blocks)
        return ctas, shared_bytes(count, tokens, most_touched(groups, blocks, ctas), warps, config["STAGES"])

    most = backend.shared_memory(x.device)
    configs = [config for config in CONFIGS if config["CTAS"] * ctas_and_memory(config)[1] <= most]

    def prepare(config):
        ctas, shared = ctas_and_memory(config)
        start = nvrtc.cuda_launch(kernel, (ctas,), 32 * config["WARPS"], shared, **known, **config)
        size = 2 * ctas * macros["TOKENS"] * ROWS

        def call(x, values, index, bias, gate, y):
            values, index = (t if copy is None else copy(t) for t, copy in zip((values, index), copies, strict=True))
            partial, counters = workspace.partial_sums(x, size), workspace.counters(x, groups)
            start(x, values, index, bias, gate, y, partial, counters, tokens, outputs, inputs, ctas)

        return call

    key = (kernel, x.dtype, outputs, inputs, count, *macros.values())
    return autotune.pick("nm_bitmap", key, configs, prepare, tensors)
