"""NM as a bitmap for a few tokens, in CUDA C++: ``cuda/bitmap_few.cu`` to four tokens, ``cuda/bitmap_many.cu`` to 64.

Letters as in ``nm``: T tokens, I inputs, O outputs.
"""

import functools

import torch

from . import autotune, fragments, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .nm_gradient import begin_at_words, bits
from .tiles import power_of_two

FEW, MOST = 4, fragments.MOST  # tokens: values multiplied one by one, and by tensor cores
BLOCK, ROWS, PIECE = 128, 32, 16  # columns and rows of a warp's block; bytes of a copy
WARPS_AND_STAGES = ((8, 2), (16, 2), (4, 2), (8, 3))  # of up to FEW tokens
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


def shared_bytes(count: int, tokens: int, warps: int, stages: int) -> int:
    """The shared memory of a CTA of up to FEW tokens; ``count`` values of each 32 columns."""
    stage = ROWS * (count // 2 | 1) * PIECE + ROWS * PIECE
    return warps * (stages * stage + (2 if tokens > 2 else 1) * 4 * BLOCK)


def launch(x, values, index, bias, gate, y, activation: str, n: int, m: int):
    """A function of such tensors that writes y (T, O)."""
    (tokens, inputs), outputs, count = x.shape, len(values), n * 32 // m
    tensors = x, values, index, bias, gate, y
    copies = tuple(begin_at_words(t, PIECE) for t in (values, index))
    if tokens > FEW:
        configs = [
            {"WARPS": warps} for warps in MANY_WARPS if warps * fragments.tiles(tokens) <= 64
        ]  # of the registers
        shared = functools.partial(fragments.sums_bytes, tokens)
        return fragments.product("bitmap_many", tensors, activation, True, copies, configs, shared, N=count)
    kernel, macros = kernel_for(tokens)
    known = {"N": count, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation), **macros}
    most = backend.shared_memory(x.device)
    configs = [{"WARPS": w, "STAGES": s} for w, s in WARPS_AND_STAGES if shared_bytes(count, tokens, w, s) <= most]

    def prepare(config):
        grid, warps = (-(-outputs // ROWS),), config["WARPS"]
        start = nvrtc.cuda_launch(
            kernel, grid, 32 * warps, shared_bytes(count, tokens, *config.values()), **known, **config
        )

        def call(x, values, index, bias, gate, y):
            values, index = (t if copy is None else copy(t) for t, copy in zip((values, index), copies, strict=True))
            start(x, values, index, bias, gate, y, tokens, outputs, inputs)

        def call_as_they_are(*tensors):
            start(*tensors, tokens, outputs, inputs)

        return call if any(copies) else call_as_they_are

    key = (kernel, x.dtype, outputs, inputs, count, *macros.values())
    return autotune.pick("nm_bitmap", key, configs, prepare, tensors)
