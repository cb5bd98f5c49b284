"""The end of an operator in one pass over its output: an activation, and which entries are kept, zero elsewhere.

    finish    y = keep(activation(x))

``keep``: "all"; "magnitude", |y| > edge; "above", y > edge; "blocks", of every BLOCK adjacent outputs the COUNT largest
|y|, where ties go to the first and NaN is lowest. Decided after y was rounded to its dtype.
"""

import torch
import triton
import triton.language as tl

from .backend import INTERPRET
from .epilogue import ACTIVATIONS, activate, bits_of, edge_of, keep_adjacent
from .launch import triton_launch
from .operators import operator
from .pdl import begin, overlap

KEEPS = ("all", "magnitude", "above", "blocks")
MOST_BLOCK = 16  # every entry of a block is compared with every other one, in registers


@triton.jit
def _finish(
    x_ptr, edge_ptr, y_ptr, n, number,
    SIZE: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """SIZE entries per program: whole blocks, since those of a row are whole."""
    begin(PDL)
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    y = activate(tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), ACTIVATION)
    y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    edge = edge_of(edge_ptr, number, y_ptr.dtype.element_ty)
    tl.store(y_ptr + i, keep_adjacent(y, edge, KEEP, COUNT, BLOCK).to(y_ptr.dtype.element_ty), mask=i < n)


def takes(keep: str, block: int) -> bool:
    """Whether ``finish`` has this rule."""
    return keep in KEEPS and (keep != "blocks" or block in (2, 4, 8, MOST_BLOCK))


@operator(
    "gpu_finish(Tensor x, Tensor? edge, str activation, str keep, int count, int block, float number) -> Tensor",
    lambda x, edge, activation, keep, count, block, number: x.shape,
    strided=(),
)
def finish(x, edge, activation, keep, count, block, number):
    """x (*, O) -> the shape of x. The threshold is ``edge``, of one element, or if that is None, ``number``."""
    if activation not in (*ACTIVATIONS, "relu2"):
        raise ValueError(f"Expected an activation of {', '.join(ACTIVATIONS)} or relu2, got {activation!r}.")
    if not takes(keep, block):
        raise ValueError(f"Expected keep of {', '.join(KEEPS)}, blocks of 2, 4, 8 or 16, got {keep!r} of {block}.")
    if keep == "blocks" and (x.shape[-1] % block or not 1 <= count <= block):
        raise ValueError(f"Expected rows of whole blocks of {block} and a count in it, got {x.shape[-1]} and {count}.")
    if edge is not None and keep not in ("magnitude", "above"):
        raise ValueError(f"Expected an edge for a threshold only, got {keep!r}.")
    bits = bits_of(number)
    size = 64 if INTERPRET else 1024
    launch = triton_launch(
        _finish, (triton.cdiv(x.numel(), size),), SIZE=size, ACTIVATION=activation, KEEP=keep, COUNT=count,
        BLOCK=max(1, block), **overlap(x),
    )  # fmt: skip

    def call(x, edge):
        y = torch.empty_like(x)
        if y.numel():
            launch(x, edge, y, y.numel(), bits)
        return y

    return call
