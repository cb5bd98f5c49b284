"""CSR for one to four tokens, in CUDA C++ (``cuda/csr_few.cu``): columns as steps of 4 to 8 bits.

A table, derived from a pattern, replaces the 32 bits of each column by the step from the one before. Values stay where
CSR has them: there is no copy that could become outdated. The size of the table depends on the sizes of a weight alone,
so that a mask update writes it in place, and it may be made in a capture.

Letters: O outputs, I inputs. A slice is 32 rows of like length, a block 32 values of each of its rows. A row's blocks
begin at a piece of 16 bytes, so that up to 7 values of the first belong to other rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import autotune, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .nm_gradient import begin_at_words
from .pattern_cache import Derived
from .tiles import power_of_two

FEW, LEAST_ROWS = 4, 2048  # tokens; outputs, below which a program for each row keeps more of a GPU busy
ROWS, BLOCK, PIECE = 32, 32, 16  # rows of a slice; values of a row in a block; bytes of a copy
GUARD, BEHIND = 8, 32  # columns beside the activations in shared memory, as in the source
RECORD, STAGE = 1088, ROWS * 5 * PIECE + 1088 + 16  # bytes of a block in the table, and in shared memory
MOST_INPUTS = (1 << 16) - GUARD - BEHIND  # a start has 16 bits
WARPS_AND_STAGES = ((8, 2), (16, 2), (4, 2), (8, 3))


def fits(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such a product: 16-bit values, slices for at least half of a large GPU's
    multiprocessors, and activations that its memory holds."""
    half = dtype in (torch.float16, torch.bfloat16)
    few = 1 <= tokens <= FEW and outputs >= LEAST_ROWS
    return few and half and inputs <= MOST_INPUTS // power_of_two(tokens, 1, FEW)


def shared_bytes(inputs: int, tokens: int, warps: int, stages: int) -> int:
    """The shared memory of a CTA."""
    column = 2 * power_of_two(tokens, 1, FEW)
    return -(-(inputs + GUARD + BEHIND) * column // PIECE) * PIECE + warps * stages * STAGE


def most_blocks(outputs: int, inputs: int, entries: int) -> int:
    """The blocks that a pattern of these sizes has at most, a multiple of 4.

    Rows are sorted by length, so that the longest of a slice is no longer than the shortest of the slice before.
    """
    slices, longest = -(-outputs // ROWS), inputs + 7
    blocks = slices + -(-longest // BLOCK) + -(-(entries + 7 * outputs) // (ROWS * BLOCK))
    return -(-blocks // 4) * 4


def table(crow: Tensor, col: Tensor, inputs: int) -> Tensor:
    """The table of a pattern, bytes; see the source for its parts. No size in here depends on the pattern."""
    outputs, entries, device = len(crow) - 1, len(col), col.device
    slices, most = -(-outputs // ROWS), most_blocks(outputs, inputs, entries)
    begin, end = crow[:-1], crow[1:]
    blocks = torch.where(end > begin, (end - begin // 8 * 8 + BLOCK - 1) // BLOCK, 0)
    blocks, order = blocks.sort(descending=True, stable=True)
    rows = torch.stack([order.int(), begin[order], end[order], torch.zeros_like(begin)], 1)
    rows = pad(rows, (0, 0, 0, slices * ROWS - outputs))
    rows[outputs:, 0] = outputs  # rows that do not exist
    firsts = pad(blocks[::ROWS].cumsum(0, dtype=torch.int32), (1, 0))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(outputs, device=device))

    entry = torch.arange(entries, device=device, dtype=torch.int32)
    row = torch.searchsorted(crow, entry, right=True, out_int32=True) - 1
    free = row >= outputs  # slots without an entry: what is written for them, behind all blocks, is cut off
    row = row.clamp(max=max(outputs - 1, 0))
    start = begin[row]
    number = entry - start // 8 * 8
    block = torch.where(free, most, firsts[place[row] // ROWS] + number // BLOCK).long()
    slot, lane = number % BLOCK, place[row] % ROWS
    leads = (entry == start) | (slot == 0)  # the first entry of a row in its block
    step = torch.where(leads, 0, col - pad(col[:-1], (1, 0)) - 1)
    lanes = (most + 1) * ROWS
    starts = torch.zeros(lanes, dtype=torch.int32, device=device)
    starts[torch.where(leads, block * ROWS + lane, lanes - 1)] = col - slot + GUARD
    steps = torch.zeros(lanes * BLOCK, dtype=torch.uint8, device=device)
    steps[(block * ROWS + lane) * BLOCK + slot] = step.clamp(max=255).to(torch.uint8)
    longest = torch.zeros(most + 1, dtype=torch.int32, device=device).scatter_reduce_(0, block, step, "amax")

    starts, steps, longest = starts[:-ROWS], steps[: -ROWS * BLOCK].view(-1, BLOCK), longest[:-1]
    low, above = (steps & 15).view(-1, BLOCK // 2, 2), (steps >> 4).view(-1, BLOCK // 4, 4)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
    parts = [torch.stack([starts & 255, starts >> 8], 1).to(torch.uint8), low[..., 0] | low[..., 1] << 4]
    parts += [((above >> plane & 3) << shift).sum(-1, dtype=torch.uint8) for plane in (0, 2)]
    records = torch.cat([part.reshape(most, -1) for part in parts], 1)
    size = sum((longest >= 1 << bits).int() * more for bits, more in ((4, 16), (6, 16), (8, 4 - 68))) + 36
    numbers = [rows.flatten(), pad(firsts, (0, -(slices + 1) % 4)), size]
    return torch.cat([torch.cat(numbers).view(torch.uint8), records.flatten()])


def launch(x, values, crow, col, bias, gate, y, activation: str):
    """A function of such tensors that writes y (T, O)."""
    (tokens, inputs), outputs = x.shape, y.shape[1]
    steps = Derived(f"csr steps {inputs}", lambda crow, col: table(crow, col, inputs))
    copied, macro = begin_at_words(values, PIECE), power_of_two(tokens, 1, FEW)
    known = {"TOKENS": macro, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation)}
    most = backend.shared_memory(x.device)
    configs = [{"WARPS": w, "STAGES": s} for w, s in WARPS_AND_STAGES if shared_bytes(inputs, macro, w, s) <= most]
    sizes = tokens, outputs, inputs, most_blocks(outputs, inputs, len(col))

    def prepare(config):
        shared = shared_bytes(inputs, macro, *config.values())
        start = nvrtc.cuda_launch("csr_few", (-(-outputs // ROWS),), 32 * config["WARPS"], shared, **known, **config)

        def call(x, values, crow, col, bias, gate, y):
            values = values if copied is None else copied(values)
            start(x, values, steps(crow, col)[0], col, bias, gate, y, *sizes)

        return call

    key = (x.dtype, outputs, inputs, len(col).bit_length(), macro)
    return autotune.pick("csr_few_cuda", key, configs, prepare, (x, values, crow, col, bias, gate, y))
