"""What happens to a finished fp32 tile before it is stored: bias, activation, gate; and how the programs that
share one (split-K) add up their parts.

Letters: y the output tile; its reduction may be split.
"""

import torch
import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activation_name(activation: str | None) -> str:
    """The name the operators take; refuses one that no kernel knows."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
    return name


def check(outputs: int, shape: tuple[int, ...], biases: tuple, gate: torch.Tensor | None) -> None:
    """Refuses a bias that is not (O,) and a gate that has not the output's ``shape``: kernels read them unmasked."""
    for bias in biases:
        if bias is not None and bias.shape != (outputs,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({outputs},)")
    if gate is not None and gate.shape != shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; expected the output's, {tuple(shape)}")


def apply(y: torch.Tensor, activation: str, gate: torch.Tensor | None) -> torch.Tensor:
    """The same epilogue in torch, for variants that end in cuBLAS."""
    if activation == "gelu_tanh":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif activation != "none":
        y = getattr(torch.nn.functional, activation)(y)
    return y if gate is None else y * gate


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # a maximum would turn NaN into 0
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * inner))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def last_to_arrive(count_ptr, splits):
    """Counts this program in; true for the last of ``splits``. The counter is 0 again for the next launch."""
    tl.debug_barrier()  # every thread's partial sums are written before the one thread below releases them
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(count_ptr, 0)
    return last


TOGETHER = tl.constexpr(4)  # partial tiles that are on their way at a time


@triton.jit
def add_up(own_ptr, inside, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The partial tiles, in a fixed order, so that the sum does not depend on who came last."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, splits, TOGETHER):
        for s in tl.static_range(TOGETHER):
            at = own_ptr + (first + s) * (ROWS * COLUMNS) + inside
            acc += tl.load(at, mask=first + s < splits, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def finish(
    acc, up_acc, tile, split, splits, first, rows, row_ok, offsets, mask,
    bias_ptr, up_bias_ptr, gate_ptr, y_ptr, partial_ptr, count_ptr,
    HALVES: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores one output tile, of which ``acc`` (ROWS, COLUMNS) is this split's share, if all others have arrived.

    Its ``splits`` shares, where SPLIT says that there may be several, lie from number ``first`` on; ``tile`` is its
    counter. ``rows`` are its outputs, ``offsets`` and ``mask`` its places in y. With HALVES of 2, ``up_acc`` is the
    share of the product that it is multiplied with; else it is not looked at.
    """
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
    place = tile * tl.num_programs(2) + tl.program_id(2)
    finish(
        acc, acc, place, split, S, place * S, rows, row_ok, t.to(tl.int64)[None, :] * O + rows[:, None],
        row_ok[:, None] & (t < T)[None, :], bias_ptr, None, gate_ptr, y_ptr, partial_ptr, count_ptr,
        1, S > 1, ROWS, BT, ACTIVATION,
    )  # fmt: skip
