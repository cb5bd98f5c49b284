"""CSR for one to four tokens, in CUDA C++ (``cuda/csr_few.cu``): columns as steps of 4 to 8 bits.

A table, derived from a pattern, replaces the 32 bits of each column by the step to the one before. Values stay where
CSR has them: there is no copy that could become outdated. The size of the table depends on the sizes of a weight alone,
so that a mask update writes it in place, and it may be made in a capture.

Letters: O outputs, I inputs. A piece is 8 consecutive entries, which begins at a multiple of 8: those of a row begin at
the piece of its first entry, so that up to 7 entries of the first belong to other rows.
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
PIECE, UNIT, WIDTHS = 8, 256, 8  # entries of a piece, and of a unit whose steps have one width; widths of a row
MOST_INPUTS = 1 << 16  # a column has 16 bits
# WARPS, CTAS, LANES, PIECES, BUFFERS, for rows of at least UNIT entries and for shorter ones
LONG = ((8, 3, 32, 2, 2), (20, 1, 32, 4, 1), (8, 2, 32, 4, 2), (16, 1, 32, 2, 2), (16, 2, 32, 2, 1), (8, 3, 16, 2, 2))
SHORT = ((16, 1, 16, 1, 2), (16, 2, 16, 1, 1), (16, 1, 8, 2, 2), (8, 3, 16, 1, 2), (8, 3, 16, 2, 1), (8, 3, 8, 2, 1))
MOST_WARPS = {1: 32, 2: 32, 4: 24}  # of a multiprocessor, whose registers hold what so many tokens need
RESERVED = 1 << 10  # bytes of shared memory of each CTA
SPREAD = (0, 4, 1, 5, 2, 6, 3, 7)  # the entries of a piece in the order of their higher bits


def fits(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such a product: 16-bit values, rows for many warps, and activations that shared memory
    holds."""
    half = dtype in (torch.float16, torch.bfloat16)
    few = 1 <= tokens <= FEW and outputs >= LEAST_ROWS
    return few and half and inputs <= MOST_INPUTS // power_of_two(tokens, 1, FEW)


def shared_bytes(inputs: int, tokens: int) -> int:
    """The shared memory of a CTA."""
    return max(1, -(-inputs // 8)) * 16 * power_of_two(tokens, 1, FEW)


def configs(inputs: int, tokens: int, length: int, most: int) -> list[dict[str, int]]:
    """For rows of such a mean length, on a GPU whose CTAs have so much shared memory."""
    shared = shared_bytes(inputs, tokens)
    names = "WARPS", "CTAS", "LANES", "PIECES", "BUFFERS"
    found = [dict(zip(names, config, strict=True)) for config in (LONG if length >= UNIT else SHORT)]
    found = [c for c in found if c["WARPS"] * c["CTAS"] <= MOST_WARPS[power_of_two(tokens, 1, FEW)]]
    return [c for c in found if shared <= most and (c["CTAS"] == 1 or c["CTAS"] * (shared + RESERVED) <= most)]


def table_of(crow: Tensor, col: Tensor) -> Tensor:
    """The table of a pattern, bytes; see the source for its parts. No size in here depends on the pattern."""
    outputs, entries, device = len(crow) - 1, len(col), col.device
    begin, end = crow[:-1], crow[1:]
    lengths = end - begin // PIECE * PIECE
    order = ((lengths + PIECE - 1) // PIECE).sort(descending=True, stable=True)[1]

    entry = torch.arange(entries, device=device, dtype=torch.int32)
    row = torch.searchsorted(crow, entry, right=True, out_int32=True) - 1
    free = row >= outputs  # slots without an entry
    row = row.clamp(max=max(outputs - 1, 0))
    step = torch.where(free | (entry == begin[row]), 0, col - pad(col[:-1], (1, 0)))

    unit = (entry - begin[row] // PIECE * PIECE) // UNIT
    last = (lengths - 1).clamp(min=0) // UNIT  # unit of a row
    scale = sum((last >= WIDTHS << bits).int() for bits in range(16))  # of a unit to the width that holds for it
    longest = torch.zeros(outputs * WIDTHS, dtype=step.dtype, device=device)
    longest.scatter_reduce_(0, row.long() * WIDTHS + torch.where(free, 0, unit >> scale[row]), step, "amax")
    width = sum((longest >= 1 << bits).int() for bits in (4, 6, 8)).view(outputs, WIDTHS)
    widths = (width << torch.arange(0, 2 * WIDTHS, 2, device=device)).sum(1, dtype=torch.int32)
    start = torch.where(end > begin, pad(col, (0, 1))[begin], 0)
    rows = torch.stack([begin, end, torch.arange(outputs, device=device), start | widths << 16], 1)[order].int()

    pieces = -(-entries // PIECE) + outputs  # a row begins a new one: entries of the rows beside it have no steps there
    steps = torch.zeros((pieces + 1) * PIECE, dtype=torch.uint8, device=device)
    steps[torch.where(free, pieces * PIECE, entry + row.long() * PIECE)] = step.clamp(max=255).to(torch.uint8)
    steps = steps[:-PIECE].view(-1, PIECE)
    low, above = steps & 15, (steps >> 4)[:, SPREAD].view(-1, 2, 4)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
    planes = [((above >> plane & 3) << shift).sum(-1, dtype=torch.uint8) for plane in (0, 2)]
    return torch.cat([part.flatten() for part in (rows.view(torch.uint8), low[:, ::2] | low[:, 1::2] << 4, *planes)])


def launch(x, values, crow, col, bias, gate, y, activation: str):
    """A function of such tensors that writes y (T, O)."""
    (tokens, inputs), outputs, entries = x.shape, y.shape[1], len(col)
    steps, copied, macro = (
        Derived("csr steps", table_of),
        begin_at_words(values, 2 * PIECE),
        power_of_two(tokens, 1, FEW),
    )
    known = {"TOKENS": macro, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation)}
    shared, most = shared_bytes(inputs, macro), backend.shared_memory(x.device)
    multiprocessors = backend.multiprocessors(x)

    def prepare(config):
        warps = config["WARPS"]
        ctas = min(multiprocessors * config["CTAS"], -(-outputs * config["LANES"] // (32 * warps)))
        start = nvrtc.cuda_launch("csr_few", (ctas,), 32 * warps, shared, **known, **config)

        def call(x, values, crow, col, bias, gate, y):
            values = values if copied is None else copied(values)
            table, ready = steps(crow, col)
            start(x, values, table, col, bias, gate, y, tokens, outputs, inputs, entries, int(ready))

        return call

    length = entries // max(1, outputs)
    key, candidates = (x.dtype, outputs, inputs, length.bit_length(), macro), configs(inputs, macro, length, most)
    return autotune.pick("csr_few_cuda", key, candidates, prepare, (x, values, crow, col, bias, gate, y))
