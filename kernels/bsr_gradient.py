"""BSR's weight gradient, a product sampled at the blocks, and its expansion to a dense weight.

Letters: T tokens, I inputs, O outputs; a block is (BH, BW); BM by BN of it are a tile; S splits of the tokens.
"""

import triton
import triton.language as tl

from . import autotune
from .backend import INTERPRET, backend
from .epilogue import add_up, last_to_arrive
from .launch import gradient_into_new, into_new, triton_launch
from .operators import operator
from .precision import exact, precision
from .split_k import workspace
from .tiles import matrix_of, power_of_two, splits, tma_can_load, wide


@triton.jit
def _sampled_product(
    g_desc, g_ptr, x_desc, x_ptr, col_ptr, row_ptr, block_ptr, out_ptr, partial_ptr, count_ptr,
    T, I, O, stride_x,
    BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[block] = g[:, its rows].T @ x[:, its columns]; by block columns, so that neighbouring programs share x."""
    NM: tl.constexpr = (BH + BM - 1) // BM
    NN: tl.constexpr = (BW + BN - 1) // BN
    tile, split = tl.program_id(0), tl.program_id(1)
    block = tl.load(block_ptr + tile // (NM * NN))
    m0, n0 = tile // NN % NM * BM, tile % NN * BN
    row0 = tl.load(row_ptr + tile // (NM * NN)) * BH + m0
    col0 = tl.load(col_ptr + block) * BW + n0
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    share = tl.cdiv(T, S * BK) * BK
    acc = tl.zeros((BM, BN), tl.float32)
    for t0 in range(split * share, tl.minimum((split + 1) * share, T), BK):
        if x_desc is not None:
            g = g_desc.load([t0, row0])
            x = x_desc.load([t0, col0])
        else:
            t = t0 + k
            t_ok = (t < T)[:, None]
            if WIDE:
                t = t.to(tl.int64)
            g = tl.load(
                g_ptr + t[:, None] * O + (row0 + i)[None, :],
                mask=t_ok & ((m0 + i < BH) & (row0 + i < O))[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + t[:, None] * stride_x + (col0 + j)[None, :],
                mask=t_ok & ((n0 + j < BW) & (col0 + j < I))[None, :],
                other=0.0,
            )
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    finish = True
    if S > 1:
        at = i[:, None] * BN + j[None, :]
        own = partial_ptr + (tile * S).to(tl.int64) * (BM * BN)
        tl.store(own + split * (BM * BN) + at, acc)
        finish = last_to_arrive(count_ptr + tile, S)
        if finish:
            acc = add_up(own, at, S, BM, BN)
    if finish:
        out = out_ptr + block.to(tl.int64) * (BH * BW) + (m0 + i)[:, None] * BW + (n0 + j)[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m0 + i < BH)[:, None] & (n0 + j < BW)[None, :])


@triton.jit
def _expand_block_row(
    w_ptr, crow_ptr, col_ptr, out_ptr, I, O, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    """One block row, BM of its rows: zeros first, then the blocks over them."""
    block_row, i0 = tl.program_id(0), tl.program_id(1) * BM
    i, c = i0 + tl.arange(0, BM), tl.arange(0, BC)
    row_ok = (i < BH) & (block_row * BH + i < O)
    out = out_ptr + (block_row * BH + i).to(tl.int64)[:, None] * I
    for c0 in range(0, I, BC):
        tl.store(
            out + (c0 + c)[None, :],
            tl.zeros((BM, BC), out_ptr.dtype.element_ty),
            mask=row_ok[:, None] & (c0 + c < I)[None, :],
        )
    tl.debug_barrier()  # another thread of the program may have zeroed the element
    start, stop = tl.load(crow_ptr + block_row), tl.load(crow_ptr + block_row + 1)
    for s0 in range(0, (stop - start) * BW, BC):
        slot = s0 + c
        ok = slot < (stop - start) * BW
        column = tl.load(col_ptr + start + slot // BW, mask=ok, other=0) * BW + slot % BW
        at = w_ptr + (start + slot // BW).to(tl.int64)[None, :] * (BH * BW) + i[:, None] * BW + (slot % BW)[None, :]
        mask = row_ok[:, None] & (ok & (column < I))[None, :]
        tl.store(out + column[None, :], tl.load(at, mask=mask), mask=mask)


def _gradient_configs(
    bh: int, bw: int, blocks: int, tokens: int, itemsize: int, programs: int, exactly: bool
) -> list[dict]:
    if INTERPRET:
        return [{"BM": 16, "BN": 16, "BK": 16, "S": 2, "num_stages": 1}]
    side, depth = (64, 16) if exactly else (128, 64 if itemsize == 2 else 32)
    rows, width = power_of_two(bh, 16, side), power_of_two(bw, 16, side)
    tiles, configs = blocks * -(-bh // rows) * -(-bw // width), []
    for waves, stages, warps in ((2, 4, 4), (4, 3, 4), (2, 4, 8)):
        warps = min(warps, rows * width // 256)  # a warp multiplies 16 by 8: more warps than that repeat the work
        split = splits(tiles, waves * programs, tokens, 4 * depth)
        configs.append({"BM": rows, "BN": width, "BK": depth, "S": split, "num_stages": stages, "num_warps": warps})
    return configs


def choose_grad_values(tokens, outputs, inputs, dtype, *, bh, bw, blocks) -> tuple[str, str]:
    """(variant, reason) of the values' gradient: ``sampled``."""
    return "sampled", f"a product sampled at {blocks} blocks of {bh}x{bw}, block column by block column"


@operator(
    "gpu_bsr_grad_values(Tensor grad, Tensor x, Tensor col, Tensor t_row, Tensor t_block, int bh, int bw) -> Tensor",
    lambda grad, x, col, t_row, t_block, bh, bw: (col.shape[0], bh, bw),
    strided=("grad", "x"),
    choose=choose_grad_values,
)
def grad_values(grad, x, col, t_row, t_block, bh, bw, variant=None):
    """grad (*, O), x (*, I) -> the gradient of ``values`` (blocks, bh, bw): a product sampled at the blocks."""
    shape = (col.shape[0], bh, bw)
    if x.numel() == 0 or grad.numel() == 0 or col.shape[0] == 0:
        return lambda grad, *rest: grad.new_zeros(shape)
    return gradient_into_new(_launch, grad, x, (col, t_row, t_block), shape, matrix_of(x))


def _launch(grad, x, col, t_row, t_block, out):
    (blocks, bh, bw), (tokens, inputs), outputs, stride = out.shape, x.shape, grad.shape[1], x.stride(0)

    def prepare(config):
        bm, bn, bk, split = (config[name] for name in ("BM", "BN", "BK", "S"))
        tiles, by_tma = blocks * triton.cdiv(bh, bm) * triton.cdiv(bw, bn), {}
        # blocks of (4, 8), fetched as tiles of 16 at any column, stopped on an H100 with an illegal instruction: the
        # TMA only serves blocks that fill a tile and begin at multiples of 16 bytes
        whole = all(side >= 16 and side * x.element_size() % 16 == 0 for side in (bh, bw))
        if whole and tma_can_load(x) and tma_can_load(grad):
            by_tma = {0: ([bk, bm], grad.shape, grad.stride()), 2: ([bk, bn], x.shape, x.stride())}
        constants = {"BH": bh, "BW": bw, "WIDE": wide(x, grad), "PRECISION": precision(x.dtype)}
        launch = triton_launch(_sampled_product, (tiles, split), by_tma, **constants, **config)

        def call(grad, x, col, t_row, t_block, out):
            partial = workspace.take(x, tiles, tiles * split, bm * bn)
            g_desc, x_desc = (grad, x) if by_tma else (None, None)
            launch(g_desc, grad, x_desc, x, col, t_row, t_block, out, *partial, tokens, inputs, outputs, stride)

        return call

    key = (x.dtype, outputs, inputs, bh, bw, blocks.bit_length(), tokens.bit_length())
    programs = backend.multiprocessors(x)
    configs = _gradient_configs(bh, bw, blocks, tokens, x.element_size(), programs, exact(x.dtype))
    return autotune.pick("bsr_grad_values", key, configs, prepare, (grad, x, col, t_row, t_block, out))


@operator(
    "gpu_bsr_expand(Tensor values, Tensor crow, Tensor col, int out_features, int in_features) -> Tensor",
    lambda values, crow, col, out_features, in_features: (out_features, in_features),
    strided=(),
)
def expand(values, crow, col, out_features, in_features):
    """values, crow, col -> the dense weight (O, I)."""
    _, bh, bw = values.shape
    grid, width = (crow.numel() - 1, triton.cdiv(bh, 16)), 32 if INTERPRET else 256
    launch = triton_launch(_expand_block_row, grid, BH=bh, BW=bw, BM=16, BC=width)
    return into_new(launch, values, (out_features, in_features), in_features, out_features)
