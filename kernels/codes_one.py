"""``codes.linear`` for one token: programs share its entries, too, since its outputs alone would leave a part of the
GPU idle, and the rows of these come by asynchronous copies.

Letters: O outputs; BK entries and BO outputs a tile; S shares of the entries; STAGES of the pipeline.
"""

import triton
import triton.language as tl

from . import autotune
from .backend import INTERPRET
from .epilogue import finish
from .launch import triton_launch
from .pdl import begin, overlap
from .split_k import workspace
from .tiles import power_of_two, wide


@triton.jit
def _sum_one(
    values_ptr, crow_ptr, index_ptr, w_ptr, bias_ptr, y_ptr, partial_ptr, arrived_ptr, K, O,
    BK: tl.constexpr, BO: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BO outputs and every S-th tile of the entries per program; ``crow``, if any, says how many there are."""
    begin(PDL)
    tile, share, o = tl.program_id(0), tl.program_id(1), tl.program_id(0) * BO + tl.arange(0, BO)
    stop = K
    if crow_ptr is not None:
        stop = tl.load(crow_ptr + 1)
    acc = tl.zeros((BK, BO), tl.float32)
    for at in tl.range(share, tl.cdiv(stop, BK), S, num_stages=STAGES):
        e = at * BK + tl.arange(0, BK)
        row = tl.load(index_ptr + e, mask=e < stop, other=0)
        if WIDE:
            row = row.to(tl.int64)
        value = tl.load(values_ptr + e, mask=e < stop, other=0.0).to(tl.float32)
        there = (e < stop)[:, None] if EVEN else (e < stop)[:, None] & (o < O)[None, :]
        w = tl.load(w_ptr + row[:, None] * O + o[None, :], mask=there, other=0.0)
        acc += value[:, None] * w.to(tl.float32)
    y, place, there = tl.sum(acc, 0)[:, None], o[:, None], (o < O)[:, None]
    finish(
        y, y, tile, share, S, tile * S, o, o < O, place, there, 0,
        bias_ptr, None, None, y_ptr, partial_ptr, arrived_ptr, 1, S > 1, BO, 1, "none",
    )  # fmt: skip


def _configs() -> list[dict]:
    if INTERPRET:
        return [{"BK": 8, "BO": 16, "S": 3, "STAGES": 2}]
    tiles = [(32, 128, 2, 4, 4), (32, 128, 4, 4, 4)]
    return [{"BK": bk, "BO": bo, "S": s, "STAGES": n, "num_warps": w} for bk, bo, s, n, w in tiles]


def launch(values, crow, index, weight, bias):
    """A function of such tensors that writes y (1, O); values and index are a list or, with crow, a compressed row."""
    outputs, count = weight.shape[1], index.numel()
    y = weight.new_empty(1, outputs)
    constants = {"WIDE": wide(weight), **overlap(weight)}

    def prepare(config):
        size, tiles = config["BO"], triton.cdiv(outputs, config["BO"])
        shares = tiles * config["S"]
        start = triton_launch(_sum_one, (tiles, config["S"]), EVEN=outputs % size == 0, **constants, **config)
        return lambda *tensors: start(*tensors, *workspace.take(tensors[-1], tiles, shares, size), count, outputs)

    key = (weight.dtype, power_of_two(count, 1, 1 << 16), outputs, crow is None)
    return autotune.pick("codes_one", key, _configs(), prepare, (values, crow, index, weight, bias, y))
