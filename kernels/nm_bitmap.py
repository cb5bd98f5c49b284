"""NM as a bitmap for one to four tokens, by ``cuda/bitmap_few.cu``.

Letters as in ``nm``: T tokens, I inputs, O outputs.
"""

import torch

from . import autotune, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .nm_gradient import begin_at_words, bits
from .tiles import power_of_two

MOST = 4  # tokens; with more, arithmetic on single values decides
BLOCK, ROWS, PIECE = 128, 32, 16  # columns and rows of a warp's block; bytes of a copy
WARPS_AND_STAGES = ((8, 2), (16, 2), (4, 2), (8, 3))


def fits(tokens: int, inputs: int, dtype: torch.dtype, n: int, m: int) -> bool:
    """Whether the kernel takes such a product: rows of whole blocks, whose values are whole pieces."""
    half = dtype in (torch.float16, torch.bfloat16)
    return 1 <= tokens <= MOST and half and bits(n, m) == 1 and inputs % BLOCK == 0 and n * 32 // m % 2 == 0


def shared_bytes(count: int, tokens: int, warps: int, stages: int) -> int:
    """The shared memory of a CTA, as the source lays it out; ``count`` values of each 32 columns."""
    stage = ROWS * (count // 2 | 1) * PIECE + ROWS * PIECE
    return warps * (stages * stage + (2 if tokens == 4 else 1) * 4 * BLOCK)


def launch(x, values, index, bias, gate, y, activation: str, n: int, m: int):
    """A function of such tensors that writes y (T, O)."""
    (tokens, inputs), outputs, count = x.shape, len(values), n * 32 // m
    width, copies = power_of_two(tokens, 1, MOST), [begin_at_words(t, PIECE) for t in (values, index)]
    known = {"N": count, "TOKENS": width, "BF16": int(x.dtype == torch.bfloat16)}
    known["ACTIVATION"] = ACTIVATIONS.index(activation)
    most = backend.shared_memory(x.device)
    configs = [{"WARPS": w, "STAGES": s} for w, s in WARPS_AND_STAGES if shared_bytes(count, width, w, s) <= most]

    def prepare(config):
        warps, stages = config["WARPS"], config["STAGES"]
        shared, grid = shared_bytes(count, width, warps, stages), (-(-outputs // ROWS),)
        start = nvrtc.cuda_launch("bitmap_few", grid, 32 * warps, shared, **known, **config)

        def call(x, values, index, bias, gate, y):
            values, index = (t if copy is None else copy(t) for t, copy in zip((values, index), copies, strict=True))
            start(x, values, index, bias, gate, y, tokens, outputs, inputs)

        return call

    key = (x.dtype, outputs, inputs, count, width)
    return autotune.pick("nm_bitmap", key, configs, prepare, (x, values, index, bias, gate, y))
