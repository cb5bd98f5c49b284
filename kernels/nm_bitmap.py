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


def fits(tokens: int, inputs: int, dtype: torch.dtype, n: int, m: int) -> bool:
    """Whether a kernel takes such a product: rows of whole blocks, whose values are whole pieces."""
    half = dtype in (torch.float16, torch.bfloat16)
    return 1 <= tokens <= MOST and half and bits(n, m) == 1 and inputs % BLOCK == 0 and n * 32 // m % 2 == 0


def kernel_for(tokens: int) -> tuple[str, dict[str, int]]:
    """The kernel, and its macro for so many tokens."""
    if tokens <= FEW:
        return "bitmap_few", {"TOKENS": power_of_two(tokens, 1, FEW)}
    return "bitmap_many", {"TILES": fragments.tiles(tokens)}


def few_configs(tokens: int) -> list[dict[str, int]]:
    """To choose from, up to FEW tokens: STAGES blocks are on their way for each warp, x is fp32 where it is SINGLE."""
    if tokens == 1:
        return [{"WARPS": w, "CTAS": c, "STAGES": 1, "SINGLE": 1} for w, c in ((8, 2), (8, 3), (16, 1), (16, 2))]
    return [{"WARPS": w, "CTAS": c, "STAGES": 1, "SINGLE": single} for w, c in ((8, 2), (16, 1)) for single in (0, 1)]


def many_configs(tokens: int, count: int) -> list[dict[str, int]]:
    """To choose from, above FEW: 16 warps of a multiprocessor if sums and values of a lane fit in 128 registers."""
    small = fragments.tiles(tokens) <= 2 and count <= 16
    return [{"WARPS": w, "CTAS": c, "STAGES": 2} for w, c in (((8, 2), (16, 1), (4, 4)) if small else ((8, 1), (4, 2)))]


def shared_bytes(count: int, tokens: int, WARPS: int, CTAS: int, STAGES: int, SINGLE: int = 0) -> int:
    """The shared memory of a CTA; ``count`` values of each 32 columns."""
    blocks = STAGES * ROWS * ((count // 2 | 1) + 1) * PIECE
    if tokens > FEW:
        return max(WARPS * blocks, fragments.sums_bytes(tokens, WARPS))
    few = power_of_two(tokens, 1, FEW)
    return WARPS * (blocks + (few if SINGLE else few // 2) * 4 * BLOCK)


def launch(x, values, index, bias, gate, y, activation: str, n: int, m: int):
    """A function of such tensors that writes y (T, O)."""
    (tokens, inputs), outputs, count = x.shape, len(values), n * 32 // m
    tensors = x, values, index, bias, gate, y
    copies = tuple(begin_at_words(t, PIECE) for t in (values, index))
    shared = functools.partial(shared_bytes, count, tokens)
    if tokens > FEW:
        configs = many_configs(tokens, count)
        return fragments.product("bitmap_many", tensors, activation, True, copies, configs, shared, N=count)
    kernel, macros = kernel_for(tokens)
    known = {"N": count, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation), **macros}
    most = backend.shared_memory(x.device)
    configs = [config for config in few_configs(tokens) if shared(**config) <= most]

    def prepare(config):
        grid, threads = (-(-outputs // ROWS),), 32 * config["WARPS"]
        start = nvrtc.cuda_launch(kernel, grid, threads, shared(**config), **known, **config)

        def call(x, values, index, bias, gate, y):
            values, index = (t if copy is None else copy(t) for t, copy in zip((values, index), copies, strict=True))
            start(x, values, index, bias, gate, y, tokens, outputs, inputs)

        def call_as_they_are(*tensors):
            start(*tensors, tokens, outputs, inputs)

        return call if any(copies) else call_as_they_are

    key = (kernel, x.dtype, outputs, inputs, count, *macros.values())
    return autotune.pick("nm_bitmap", key, configs, prepare, tensors)
