"""BSR: dense blocks (bh, bw) at block columns ``col`` of each block row, and the same blocks column by column.

Letters: T tokens, I inputs, O outputs; BO output features, BT tokens, BK reduction a tile.
BH and BW are the block's output and reduction sides: (bh, bw) for x @ W.T, (bw, bh) for grad @ W, which goes through
``t_crow``, ``t_row`` and ``t_block`` in the same way. The blocks of a block row (or column) form a reduction of length
count * BW, BK at a time.
"""

import functools

import torch
import triton

from . import autotune, gated, transpose
from .backend import INTERPRET, backend
from .bsr_few import few_tokens
from .bsr_gemm import block_gemm
from .bsr_gradient import expand as expand
from .bsr_gradient import grad_values
from .launch import into_new, table_launches
from .linear import Linear
from .operators import operator
from .pattern_cache import Derived
from .pdl import overlap
from .precision import exact, precision
from .shares import FewTokens
from .split_k import workspace
from .tiles import matrix_of, power_of_two, tma_can_load, wide

FEW = 64


# ---- tiles, and the tables that programs read


def _many_configs(side_out: int, side_in: int, itemsize: int, exactly: bool) -> list[dict]:
    if INTERPRET:
        return [{"BO": 16, "BT": 16, "BK": 16, "TOKENS_FIRST": side_out < 16, "num_stages": 1}]
    out = power_of_two(side_out, 16, 128)
    if exactly:  # no tensor cores: larger tiles spill, smaller ones read more than they multiply
        if out >= 64:
            tiles = [(64, 64, 4), (out, 128, 8), (64, 128, 4)]
        else:
            tiles = [(out, 128, 4), (out, 256, 4), (out, 256, 8)]
        fixed = {"BK": 16, "TOKENS_FIRST": False, "num_stages": 3}
        return [{"BO": o, "BT": t, "num_warps": w, **fixed} for o, t, w in tiles]
    depth = power_of_two(side_in, 16, 64 if itemsize == 2 else 32)
    first = out < 64
    if out >= 128:
        tiles = [(128, 3, 4, True), (256, 4, 8, True), (128, 3, 8, True)]
    else:
        tiles = [(128, 4, 4, True), (256, 4, 8, True), (256, 3, 4, True), (128, 3, 4, first)]
    names = ("BT", "num_stages", "num_warps", "TOKENS_FIRST")
    return [{"BO": out, "BK": depth, **dict(zip(names, tile, strict=True))} for tile in tiles]


def _few_configs(bh: int, bw: int, block_rows: int, blocks: int, width: int, programs: int) -> list[dict]:
    """C: the most steps of BK per program; None: a block row is not split."""
    if INTERPRET:
        return [{"BO": 16, "BK": 16, "C": 2, "num_stages": 1}]
    depth = power_of_two(bw, 16, 128)
    short = min(depth, 64)
    if width == 1 and depth >= 64 and bw % depth == 0:
        tiles = [(8, depth, depth // 64, 4, 0), (4, depth, 1, 4, 0), (8, 512, 4, 1, 0), (8, 512, 4, 1, 4)]
    elif width == 1:
        tiles = [(8, 512, 4, 1, 0), (16, 256, 4, 1, 0), (8, 256, 2, 1, 0), (8, 512, 4, 1, 4)]
    elif width == 16:
        tiles = [(64, short, 4, 4, 0), (64, depth, 4, 3, 0), (64, depth, 4, 3, 1), (16, depth, 2, 4, 0)]
        tiles += [(16, short, 2, 4, 4), (32, short, 4, 5, 0), (32, depth, 2, 3, 3)]
    else:
        tiles = [(64, short, 4, 4, 0), (64, short, 4, 4, 2), (64, depth, 4, 3, 0), (64, depth, 4, 3, 2)]
        tiles += [(32, depth, 4, 3, 2), (32, short, 4, 5, 0)]
    if 2 * block_rows * triton.cdiv(bh, tiles[0][0]) < programs:  # whole block rows leave most multiprocessors idle
        tiles.sort(key=lambda tile: tile[-1] == 0)
    configs = []
    for rows, depth, warps, stages, waves in tiles:  # so many waves of programs
        rows = min(rows, power_of_two(bh, 1 if width == 1 else 16, 128))
        work = triton.cdiv(blocks * bw, depth) * triton.cdiv(bh, rows)
        most = max(1, triton.cdiv(work, waves * programs)) if waves else None
        configs.append({"BO": rows, "BK": depth, "C": most, "num_stages": stages, "num_warps": warps})
    return configs


def _schedule(start, other, second_start=None):
    """(block row, its start, its stop, its first ``other``) of each block row, the longest first, so that none is last.

    ``second_start``: the ``start`` of a second weight that the same programs multiply with; it only affects the order.
    """
    length = start.diff() if second_start is None else start.diff() + second_start.diff()
    row = length.argsort(descending=True, stable=True)
    first = other[start[row].long().clamp(max=len(other) - 1)] if len(other) else torch.zeros_like(start[1:])
    return torch.stack([row.int(), start[row], start[row + 1], first], 1).contiguous()


def _most_programs(block_rows, blocks, bw, depth, most, halves):
    """The most programs of up to ``most`` steps that any pattern with so many blocks can need."""
    steps = min(blocks * triton.cdiv(bw, depth), halves * block_rows + blocks * bw // depth)
    return block_rows + (steps // most if most else 0)


def _shares(programs, most, depth, bw, *starts_and_others):
    """The table of ``few_tokens`` for one weight or two, (start, other) of each. A program takes up to ``most`` steps
    of ``depth``; with two weights one more, since each is rounded up.

    Only the device knows how many programs a pattern needs: the table has a row for as many as any pattern may need,
    and the rest do nothing, in a block row that does not exist.
    """
    weights = list(zip(starts_and_others[::2], starts_and_others[1::2], strict=True))
    starts = [start.long() for start, _ in weights]
    steps = [-(-(start.diff() * bw) // depth) for start in starts]
    splits = torch.ones_like(steps[0]) if most is None else (-(-sum(steps) // most)).clamp(min=1)
    stops, count = splits.cumsum(0), splits.numel()
    program = torch.arange(programs, device=splits.device)
    row = torch.searchsorted(stops, program, right=True)
    valid, at = row < count, row.clamp(max=count - 1)
    split, shares = program - (stops - splits)[at], torch.where(valid, splits[at], 1)
    columns = [row, torch.where(valid, split, 0), shares]
    for start, length, (_, other) in zip(starts, steps, weights, strict=True):
        share = -(-length[at] // shares)
        low = torch.minimum(split * share, length[at])
        high = torch.where(valid, torch.minimum(low + share, length[at]), low)
        first = (start[at] + low * depth // bw).clamp(max=max(len(other) - 1, 0))
        columns += [start[at], start[at + 1], low, high, other[first] if len(other) else torch.zeros_like(low)]
    return torch.stack(columns, 1).int()


# ---- launches


def _many(x, values, start, other, bias, gate, up, up_start, up_other, up_bias, y, block=None, *, activation):
    """y[:, block row] = the sum of x[:, other] @ block over its blocks. For grad @ W, ``block`` has their numbers."""
    (tokens, inputs), outputs, block_rows, transposed = x.shape, y.shape[1], start.numel() - 1, block is not None
    bh, bw = values.shape[:0:-1] if transposed else values.shape[1:]
    blocks, table = len(values) + (0 if up is None else len(up)), Derived("bsr schedule", _schedule)
    constants = {"BH": bh, "BW": bw, "TRANSPOSED": transposed, "WIDE": wide(x, y), "ACTIVATION": activation}
    constants |= {"PRECISION": precision(x.dtype), **overlap(x)}
    integers = (tokens, inputs, outputs, block_rows, *x.stride())

    def prepare(config):
        bo, bt, bk = config["BO"], config["BT"], config["BK"]
        by_tma, matrix = {}, values.view(-1, values.shape[2])  # the blocks as one matrix
        if bw % bk == 0 and tma_can_load(x) and tma_can_load(matrix):
            by_tma[0] = [bt, bk], x.shape, x.stride()
            if up is None:  # a load in a branch is not pipelined, so the weight of a half is a selected pointer
                by_tma[2] = [bk, bo] if transposed else [bo, bk], matrix.shape, matrix.stride()
        grid = (block_rows * triton.cdiv(bh, bo) * triton.cdiv(tokens, bt),)
        launches = table_launches(block_gemm, grid, by_tma, **constants, **config)

        def call(x, values, start, other, bias, gate, up, up_start, up_other, up_bias, y, block=None):
            schedule, ready = table(start, other) if up is None else table(start, other, up_start)
            launches[ready](
                x if 0 in by_tma else None, x, values if 2 in by_tma else None, values, other, block,
                schedule, bias, gate, up, up_start, up_other, up_bias, y, *integers,
            )  # fmt: skip

        return call

    key = (x.dtype, outputs, inputs, bh, bw, blocks.bit_length(), tokens.bit_length(), transposed)
    configs = _many_configs(bh, bw, x.element_size(), exact(x.dtype))
    tensors = (x, values, start, other, bias, gate, up, up_start, up_other, up_bias, y)
    if transposed:
        return autotune.pick("bsr_many", key, configs, prepare, (*tensors, block))
    return gated.pick("bsr", "many", key, configs, prepare, tensors, _many, activation)


def _few(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y, *, activation):
    few = _described(x, values, crow, up, y.shape[1])
    (blocks, bh, bw), block_rows, halves = values.shape, crow.numel() - 1, 1 if up is None else 2
    blocks += 0 if up is None else len(up)

    def prepare(config):
        most, depth, rows = config["C"], config["BK"], config["BO"]
        sub, programs = triton.cdiv(bh, rows), _most_programs(block_rows, blocks, bw, depth, most, halves)
        make = functools.partial(_shares, programs, most, depth, bw)
        table = Derived(f"bsr shares {programs} {most} {depth} {bw}", make)
        constants = few.constants(config) | {"SPLIT": programs > block_rows, "ACTIVATION": activation, **overlap(x)}
        del constants["READY"]
        tiles, shares, size = block_rows * sub, programs * sub, halves * rows * constants["BT"]
        launches = table_launches(few_tokens, (shares,), **constants)

        def call(x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y):
            shared, ready = table(crow, col) if up is None else table(crow, col, up_crow, up_col)
            tensors = (x, values, None, col, bias, gate, up, None, up_col, up_bias, shared, y)
            launches[ready](*tensors, *workspace.take(x, tiles, shares, size), *few.integers)

        return call

    tensors = (x, values, crow, col, bias, gate, up, up_crow, up_col, up_bias, y)
    return gated.pick("bsr", "few", few.key, few.configs, prepare, tensors, _few, activation)


def _described(x, values, crow, up, outputs) -> FewTokens:
    """Splits S are those of a launch without a table: as many of each block row as the average one has shares."""
    (tokens, inputs), (blocks, bh, bw), block_rows = x.shape, values.shape, crow.numel() - 1
    blocks += 0 if up is None else len(up)
    width = 1 if tokens == 1 else power_of_two(tokens, 16, FEW)
    fixed = {"BH": bh, "BW": bw, "BT": width, "PRECISION": precision(x.dtype)}
    configs = _few_configs(bh, bw, block_rows, blocks, width, backend.multiprocessors(x))

    def constants(config):
        own = {name: number for name, number in config.items() if name != "C"}
        return {"S": 0, **fixed, **own, "STAGES": config["num_stages"], "SPLIT": False, "READY": True}

    def splits(config):
        steps = blocks * bw / (config["BK"] * max(1, block_rows))
        return max(1, round(steps / config["C"])) if config["C"] else 1

    return FewTokens(
        few_tokens,
        "bsr_few" if up is None else "bsr_gated_few",
        (x.dtype, outputs, inputs, bh, bw, blocks.bit_length(), width),
        configs,
        lambda config: (block_rows * triton.cdiv(bh, config["BO"]) * config["S"],),
        constants,
        (tokens, inputs, outputs, *x.stride()),
        splits,
    )


def _arrange(x):
    """A function from x (*, I) to the form that the kernels read: contiguous rows; or, without tensor cores, contiguous
    columns, as threads read along the tokens."""
    tokens = x.shape[:-1].numel()
    if not exact(x.dtype) or tokens <= 1:
        return matrix_of(x)
    turn = transpose.prepared(x, transpose.padded(tokens))
    return lambda x: turn(x).T[:tokens]


def _check(x, values, features, start, side):
    if x.dtype != values.dtype:
        raise TypeError(f"Expected x and values of one dtype, got {x.dtype} and {values.dtype}.")
    expected, got = -(-features // side), start.numel() - 1
    if got != expected:
        raise ValueError(f"Expected {expected} block rows of side {side} for {features} features, got {got}.")


class BSRLinear(Linear):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``gate`` has the output's shape."""

    prefix, stored, expand, dual = "gpu_bsr_linear", "Tensor values, Tensor crow, Tensor col", expand, True

    def facts(self, stored, up, numbers):
        blocks, bh, bw = stored[0].shape
        if up is not None:
            if up[0].shape[1:] != stored[0].shape[1:]:
                shapes = f"{bh}x{bw} and {up[0].shape[1]}x{up[0].shape[2]}"
                raise ValueError(f"Expected blocks of one shape in one gated product, got {shapes}.")
            blocks = (blocks + len(up[0]) + 1) // 2
        return {"bh": bh, "bw": bw, "blocks": blocks}

    def choose(self, tokens, outputs, inputs, dtype, *, bh, bw, blocks):
        """``empty``, ``few`` (split-K), ``blocks`` (block by block) or ``expand`` (then cuBLAS)."""
        if tokens == 0 or outputs == 0:
            return "empty", "nothing to compute"
        density = blocks * bh * bw / max(1, outputs * inputs)
        if tokens <= FEW:
            why = f"time goes to reading the weight, and the split-K kernel reads {density:.2g} of it once"
            return "few", f"{tokens} tokens: {why}"
        exactly, side = exact(dtype), min(bh, bw)
        if exactly:
            limit = 0.5 if side >= 64 else 0.35 if side >= 16 else 0.12
        else:
            limit = 0.4 if side >= 128 else 0.35 if side >= 64 else 0.15 if side >= 32 else 0.06
        if density > limit:
            return "expand", f"density {density:.2g} is over {limit} for blocks of {bh}x{bw}; expanded, cuBLAS runs"
        means = "fp32 without tf32" if exactly else "tensor cores"
        return "blocks", f"{means} over {blocks} blocks of {bh}x{bw}, {density:.2g} of the dense work"

    def check(self, x, weight, outputs, inputs):
        _check(x, weight[0], outputs, weight[1], weight[0].shape[1])

    def arrange(self, x, variant):
        return _arrange(x)

    def launch(self, variant, x, *parts, activation):
        return (_few if variant == "few" else _many)(x, *parts, activation=activation)

    def shares(self, variant, x, stored, up, outputs):
        if variant != "few":
            return None
        few = _described(x, *stored[:2], up and up[0], outputs)
        tensors = (x, *stored, None, None, *(up or (None,) * 3), None, None)
        return few.shares(tensors, 1 if up is None else 2, len(x), outputs)


linear = BSRLinear()
choose, gated_linear, linear_grad_values = linear.choose, linear.gated, grad_values


def choose_grad_input(tokens, outputs, inputs, dtype, *, bh, bw, blocks) -> tuple[str, str]:
    """(variant, reason) of grad @ W: ``empty``, ``blocks`` or ``expand``."""
    variant, reason = choose(tokens, inputs, outputs, dtype, bh=bw, bw=bh, blocks=blocks)
    if variant == "few":
        return "blocks", f"{tokens} tokens: all blocks of each block column, by the transposed index"
    return variant, reason


@operator(
    "gpu_bsr_grad_input(Tensor grad, Tensor values, Tensor crow, Tensor col, Tensor t_crow, Tensor t_row,"
    " Tensor t_block, int in_features) -> Tensor",
    lambda grad, *rest: (*grad.shape[:-1], rest[-1]),
    strided=("grad",),
    choose=choose_grad_input,
)
def linear_grad_input(grad, values, crow, col, t_crow, t_row, t_block, in_features, variant=None):
    """grad (*, O) -> grad @ W, (*, I), by the blocks of each block column."""
    (blocks, bh, bw), outputs, tokens = values.shape, grad.shape[-1], grad.shape[:-1].numel()
    _check(grad, values, in_features, t_crow, bw)
    if variant is None:
        variant, _ = choose_grad_input(tokens, outputs, in_features, grad.dtype, bh=bh, bw=bw, blocks=blocks)
    if variant == "empty":
        return lambda grad, *parts: grad.new_empty(*grad.shape[:-1], in_features)
    if variant == "expand":
        dense = expand.prepare(values, crow, col, out_features=outputs, in_features=in_features)
        return lambda grad, values, crow, col, *rest: torch.matmul(grad, dense(values, crow, col))
    arrange, absent, y = _arrange(grad), (None,) * 6, grad.new_empty(tokens, in_features)
    flat = grad if arrange is None else arrange(grad)
    many = _many(flat, values, t_crow, t_row, *absent, y, t_block, activation="none")

    def launch(grad, values, crow, col, t_crow, t_row, t_block, y):
        many(grad, values, t_crow, t_row, *absent, y, t_block)

    return into_new(launch, grad, (*grad.shape[:-1], in_features), arrange=arrange)
