"""What happens to a finished fp32 tile before it is stored: bias, activation, gate; and how the programs that
share one tile (split-K) add up their partial sums.

Letters: y the output tile; its reduction may be split.
"""

import torch
import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activation_name(activation: str | None) -> str:
    """The activation as operators take it; raises for an unknown one."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"Expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    return name


def check(outputs: int, shape: tuple[int, ...], biases: tuple, gate: torch.Tensor | None) -> None:
    """Raise unless each bias is (O,) and the gate has the output's ``shape``: kernels trust their sizes."""
    for bias in biases:
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"Expected a bias of shape ({outputs},), got {tuple(bias.shape)}.")
    if gate is not None and gate.shape != shape:
        raise ValueError(f"Expected a gate of the output's shape {tuple(shape)}, got {tuple(gate.shape)}.")


def apply(y: torch.Tensor, activation: str, gate: torch.Tensor | None) -> torch.Tensor:
    """The same epilogue in torch, for variants that end in cuBLAS."""
    if activation == "gelu_tanh":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif activation != "none":
        y = getattr(torch.nn.functional, activation)(y)
    return y if gate is None else y * gate


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu" or ACTIVATION == "relu2":
        y = tl.where(y < 0, 0.0, y)  # a maximum would turn NaN into 0
        y = y * y if ACTIVATION == "relu2" else y
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * inner))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


def bits_of(number: float) -> int:
    """The bits of a number in float32, as ``edge_of`` takes them."""
    return torch.tensor(number, dtype=torch.float32).view(torch.int32).item()


@triton.jit
def edge_of(edge_ptr, number, dtype: tl.constexpr):
    """A threshold, rounded as PyTorch rounds what it compares with a tensor of this dtype: of one element in memory, or
    if there is none, ``bits_of`` a number."""
    if edge_ptr is None:
        edge = tl.full((), number, tl.int32).to(tl.float32, bitcast=True)
    else:
        edge = tl.load(edge_ptr).to(tl.float32)
    return edge.to(dtype).to(tl.float32)


@triton.jit
def _keep_of_four(y, COUNT: tl.constexpr):
    """``keep_adjacent`` for blocks of 4, which a thread has in registers: six comparisons a block."""
    even, odd = tl.split(tl.reshape(y, (y.shape[0] // 4, 2, 2)))
    y0, y2 = tl.split(even)
    y1, y3 = tl.split(odd)
    s0, s1, s2, s3 = _magnitude(y0), _magnitude(y1), _magnitude(y2), _magnitude(y3)
    # whether a comes before b of the same block, 0 or 1
    b01, b02, b03 = (s0 >= s1).to(tl.int32), (s0 >= s2).to(tl.int32), (s0 >= s3).to(tl.int32)
    b12, b13, b23 = (s1 >= s2).to(tl.int32), (s1 >= s3).to(tl.int32), (s2 >= s3).to(tl.int32)
    y0, y1 = tl.where(3 - b01 - b02 - b03 < COUNT, y0, 0.0), tl.where(2 + b01 - b12 - b13 < COUNT, y1, 0.0)
    y2, y3 = tl.where(1 + b02 + b12 - b23 < COUNT, y2, 0.0), tl.where(b03 + b13 + b23 < COUNT, y3, 0.0)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (y.shape[0],))


@triton.jit
def _magnitude(y):
    """|y|; NaN is lowest."""
    return tl.where(y == y, tl.abs(y), -1.0)


@triton.jit
def keep_adjacent(y, edge, KEEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """y (SIZE,), outputs of one token in whole blocks, with zeros for what is dropped: see ``finish``."""
    if KEEP == "magnitude":
        y = tl.where(tl.abs(y) > edge, y, 0.0)
    elif KEEP == "above":
        y = tl.where(y > edge, y, 0.0)
    elif KEEP == "blocks" and BLOCK == 4:
        y = _keep_of_four(y, COUNT)
    elif KEEP == "blocks":
        blocks = tl.reshape(y, (y.shape[0] // BLOCK, BLOCK))
        size = _magnitude(blocks)
        own, other = size[:, :, None], size[:, None, :]
        at = tl.arange(0, BLOCK)
        first = at[None, None, :] < at[None, :, None]
        rank = tl.sum(((other > own) | ((other == own) & first)).to(tl.int32), 2)
        y = tl.reshape(tl.where(rank < COUNT, blocks, 0.0), (y.shape[0],))
    return y


@triton.jit
def last_to_arrive(count_ptr, splits):
    """Count this program; true for the last of ``splits``, which resets the counter for the next launch."""
    tl.debug_barrier()  # every thread's partial sums are written before the one thread below releases them
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(count_ptr, 0)
    return last


IN_FLIGHT = tl.constexpr(4)  # partial tiles that are loaded at a time


@triton.jit
def add_up(own_ptr, inside, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of the partial tiles in a fixed order, so that it does not depend on which program was last."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, splits, IN_FLIGHT):
        for s in tl.static_range(IN_FLIGHT):
            at = own_ptr + (first + s) * (ROWS * COLUMNS) + inside
            acc += tl.load(at, mask=first + s < splits, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def finish(
    acc, up_acc, tile, split, splits, first, rows, row_ok, offsets, mask, size,
    bias_ptr, up_bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    HALVES: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores one output tile, of which ``acc`` (ROWS, COLUMNS) is this split's share, if all others have arrived.

    Where SPLIT, its ``splits`` shares are stored from number ``first`` on, and ``tile`` is the number of its counter.
    ``rows`` are its outputs, ``offsets`` and ``mask`` its elements of y, which has ``size``. With HALVES of 2,
    ``up_acc`` is the share of the product that it is multiplied with; otherwise it is not read. ACTIVATION "shares":
    every program stores its share in y, fp32 (HALVES, splits, size), and the caller does the rest.
    """
    if ACTIVATION == "shares":
        share = y_ptr + tl.cast(split, tl.int64) * size
        tl.store(share + offsets, acc, mask=mask)
        if HALVES == 2:
            tl.store(share + tl.cast(splits, tl.int64) * size + offsets, up_acc, mask=mask)
    else:
        last = splits == 1
        if SPLIT and splits > 1:
            inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            own = partial_ptr + (first * HALVES).to(tl.int64) * (ROWS * COLUMNS)
            up_own = own + splits * (ROWS * COLUMNS)
            tl.store(own + split * (ROWS * COLUMNS) + inside, acc)
            if HALVES == 2:
                tl.store(up_own + split * (ROWS * COLUMNS) + inside, up_acc)
            last = last_to_arrive(count_ptr + tile, splits)
            if last:
                acc = add_up(own, inside, splits, ROWS, COLUMNS)
                if HALVES == 2:
                    up_acc = add_up(up_own, inside, splits, ROWS, COLUMNS)
        if last:
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            acc = activate(acc, ACTIVATION)
            if up_bias_ptr is not None:
                up_acc += tl.load(up_bias_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            if HALVES == 2:
                acc *= up_acc
            elif gate_ptr is not None:
                acc *= tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_rows(
    acc, rows, row_ok, bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr, T, O,
    ROWS: tl.constexpr, BT: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``finish`` of a row-major y (T, O) in a grid of (tiles of rows, S splits, tiles of BT tokens)."""
    tile, split, t = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BT + tl.arange(0, BT)
    number = tile * tl.num_programs(2) + tl.program_id(2)
    finish(
        acc, acc, number, split, S, number * S, rows, row_ok, t.to(tl.int64)[None, :] * O + rows[:, None],
        row_ok[:, None] & (t < T)[None, :], T * O, bias_ptr, None, gate_ptr, y_ptr, partial_ptr, count_ptr,
        1, S > 1, ROWS, BT, ACTIVATION,
    )  # fmt: skip
