"""(tokens, features) -> (features, tokens) at memory speed; torch's own copy runs at a fifth of it.

Letters: R rows, C columns of the source, L the leading dimension of the result.
"""

import torch
import triton
import triton.language as tl

from . import autotune
from .backend import INTERPRET
from .launch import into_new, triton_launch
from .operators import operator
from .pdl import begin, overlap
from .tiles import matrix_of, wide


@triton.jit
def _transpose(
    x_ptr, y_ptr, R, C, stride_x, L, BR: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr
):
    begin(PDL)
    tiles_r = tl.cdiv(R, BR)
    pid = tl.program_id(0)
    r = (pid % tiles_r) * BR + tl.arange(0, BR)
    c = (pid // tiles_r) * BC + tl.arange(0, BC)
    if WIDE:
        r, c = r.to(tl.int64), c.to(tl.int64)
    mask = (r < R)[:, None] & (c < C)[None, :]
    tile = tl.load(x_ptr + r[:, None] * stride_x + c[None, :], mask=mask)
    tl.store(y_ptr + c[:, None] * L + r[None, :], tl.trans(tile), mask=tl.trans(mask))


CONFIGS = [
    {"BR": 32, "BC": 64, "num_warps": 4},
    {"BR": 128, "BC": 128, "num_warps": 8},
    {"BR": 64, "BC": 64, "num_warps": 4},
]
if INTERPRET:
    CONFIGS = [{"BR": 32, "BC": 16}]


def padded(tokens: int) -> int:
    """The leading dimension of a feature-major buffer: whole tiles, so that rows are aligned and need no mask."""
    step = 256 if tokens > 128 else 128
    return -(-tokens // step) * step


def prepared(x, leading):
    """A function x (*, C) -> (C, leading), for tensors of this shape, strides and alignment."""
    arrange = matrix_of(x)
    flat = x if arrange is None else arrange(x)
    (rows, cols), stride = flat.shape, flat.stride(0)

    def prepare(config):
        grid = (triton.cdiv(rows, config["BR"]) * triton.cdiv(cols, config["BC"]),)
        launch = triton_launch(_transpose, grid, WIDE=wide(flat) or cols * leading >= 2**31, **overlap(x), **config)
        return into_new(launch, x, (cols, leading), rows, cols, stride, leading, arrange=arrange)

    if rows == 0 or cols == 0:
        return lambda x: x.new_empty(cols, leading)
    key = (x.element_size(), rows.bit_length(), cols)
    return autotune.pick("transpose", key, CONFIGS, prepare, (x,))


def feature_major_rows(x, leading):
    """``prepared``, except that one token, which is row-major and feature-major at once, stays (1, C), of any stride;
    None if it is (1, C) already."""
    if x.shape[:-1].numel() > 1:
        return prepared(x, leading)
    return None if x.dim() == 2 else lambda x: x.reshape(1, x.shape[-1])


@operator("gpu_transpose(Tensor x, int leading) -> Tensor", lambda x, leading: (x.shape[1], leading))
def transposed(x, leading):
    """x (R, C) -> (C, leading); columns R and above of the result are left unwritten."""
    return prepared(x, leading)


def transpose(x: torch.Tensor, leading: int | None = None) -> torch.Tensor:
    """x (R, C) -> (C, leading); columns R and above of the result are left unwritten. leading defaults to R."""
    return transposed(x, leading=x.shape[0] if leading is None else leading)
