"""Activations in the order of mma fragments (``cuda/order.cu``), for CUDA C++ kernels of up to 64 tokens.

Read as they are, row by row, they cost such a kernel more time than its weight: each lane's piece is on a line of its
own. A kernel before it takes 2 us. Letters: T tokens, I inputs, a multiple of 128.
"""

import torch

from . import autotune, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .tiles import power_of_two

MOST, TILE, BLOCK, ROWS = 64, 8, 128, 32  # tokens; tokens of a tile; columns and rows of a warp's block


def tiles(tokens: int) -> int:
    """How many tiles of tokens a kernel is compiled for."""
    return power_of_two(-(-tokens // TILE), 1, MOST // TILE)


def sums_bytes(tokens: int, WARPS: int) -> int:
    """The shared memory in which a CTA adds up what its warps have (``write_sums``)."""
    return WARPS * 4 * ROWS * (TILE * tiles(tokens) + 1)


def ordered(x: torch.Tensor, segments: bool):
    """A function of x (T, I) to what ``order`` makes of it."""
    tokens, inputs = x.shape
    size = tiles(tokens) * TILE * inputs
    new, grid = backend.empty(x, size), (-(-size // (256 * 8)),)
    launch = nvrtc.cuda_launch("order", grid, 256, TILES=tiles(tokens), SEGMENTS=int(segments))

    def call(x):
        made = new()
        launch(x, made, tokens, inputs)
        return made

    return call


def product(
    kernel: str, tensors: tuple, activation: str, segments: bool, copies: tuple, configs, shared, **macros: int
):
    """A function of such tensors, x (T, I), stored, bias, gate and y (T, O), that writes y by one of these kernels.

    ``copies`` are functions of the stored tensors, or None; ``configs`` are macros to choose from, of which
    ``shared(**config)`` is the memory of a CTA.
    """
    x, y = tensors[0], tensors[-1]
    (tokens, inputs), outputs, order = x.shape, y.shape[1], ordered(x, segments)
    known = {"BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation), **macros}
    known |= {"TILES": tiles(tokens)}
    most = backend.shared_memory(x.device)
    configs = [config for config in configs if shared(**config) <= most]

    def prepare(config):
        warps = config["WARPS"]
        start = nvrtc.cuda_launch(kernel, (-(-outputs // ROWS),), 32 * warps, shared(**config), **known, **config)

        def call(x, *tensors):
            stored = (t if copy is None else copy(t) for t, copy in zip(tensors, copies, strict=False))
            start(order(x), *stored, *tensors[len(copies) :], tokens, outputs, inputs)

        return call

    key = (kernel, x.dtype, outputs, inputs, *macros.values(), tiles(tokens))
    return autotune.pick(kernel, key, configs, prepare, tensors)
