"""NM(2, 4) for 17 to 64 tokens on sparse tensor cores, in CUDA C++ (``cuda/nm24_many.cu``): the weight as it is stored.

Letters as in ``nm``: T tokens, I inputs, O outputs.
"""

import functools

import torch

from . import fragments
from .nm_gradient import begin_at_words, has_words

LEAST = 17  # tokens: fewer are not worth a kernel that orders activations
CONFIGS = [{"WARPS": w, "STAGES": s} for w, s in ((8, 2), (16, 2), (4, 2), (8, 3))]
STAGE = fragments.ROWS * (9 + 1) * 16  # bytes of a block: values with one piece between rows, positions


def fits(tokens: int, inputs: int, dtype: torch.dtype, n: int, m: int) -> bool:
    """Whether the kernel takes such a product: 2:4 in 16-bit types, rows of whole blocks."""
    return LEAST <= tokens <= fragments.MOST and has_words(n, m, dtype, inputs) and inputs % fragments.BLOCK == 0


def shared_bytes(tokens: int, WARPS: int, STAGES: int) -> int:
    """The shared memory of a CTA, ``MEMORY`` of the source."""
    return max(WARPS * STAGES * STAGE, fragments.sums_bytes(tokens, WARPS))


def launch(x, values, index, bias, gate, y, activation: str):
    """A function of such tensors that writes y (T, O)."""
    tokens, copies = len(x), tuple(begin_at_words(t, 16) for t in (values, index))
    tensors, shared = (x, values, index, bias, gate, y), functools.partial(shared_bytes, tokens)
    return fragments.product("nm24_many", tensors, activation, False, copies, CONFIGS, shared)
