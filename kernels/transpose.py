"""(tokens, features) -> (features, tokens) at memory speed; torch's own copy runs at a fifth of it.

Letters: R rows, C columns of the source, L the leading dimension of the result.
"""

import torch
import triton
import triton.language as tl

from . import autotune
from .library import INTERPRET, Launch, as_rows, filled, operator, overlap, plan, rows_contiguous, wide
from .tiles import begin


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


def _fake(x, leading):
    return x.new_empty(x.shape[1], leading)


def prepared(x, leading):
    """The launch itself, x -> (C, leading), for matrices of this shape, stride and alignment."""
    if x.stride(1) != 1:
        after = prepared(rows_contiguous(x), leading)
        return lambda x: after(rows_contiguous(x))
    (rows, cols), stride = x.shape, x.stride(0)

    def prepare(config):
        grid = (triton.cdiv(rows, config["BR"]) * triton.cdiv(cols, config["BC"]),)
        launch = Launch(_transpose, grid, WIDE=wide(x) or cols * leading >= 2**31, **overlap(x), **config)
        return filled(launch, x, (cols, leading), rows, cols, stride, leading)

    if rows == 0 or cols == 0:
        return lambda x: x.new_empty(cols, leading)
    key = (x.element_size(), rows.bit_length(), cols)
    return autotune.pick("transpose", key, CONFIGS, prepare, (x,))


def prepared_rows(x, leading):
    """``prepared`` for x (*, C); one token, which is row-major and feature-major at once, stays (1, C)."""
    rows = as_rows(x)
    flat = rows(x)
    if len(flat) == 1:
        return rows
    turn = prepared(flat, leading)
    return turn if x.dim() == 2 else lambda x: turn(rows(x))


@operator("gpu_transpose(Tensor x, int leading) -> Tensor", _fake)
def _transpose_op(x, leading):
    return plan(("transpose", leading), (x,), lambda: prepared(x, leading))(x)


def transpose(x: torch.Tensor, leading: int | None = None) -> torch.Tensor:
    """x (R, C) -> (C, leading); columns R and above of the result are left unwritten. leading defaults to R."""
    return _transpose_op(x, x.shape[0] if leading is None else leading)
