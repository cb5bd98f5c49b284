"""Selection of the highest scores, exact in count: ties go to the lower index, NaN counts as the lowest.

Compiled forward passes trace this code, so nothing here synchronizes with the device or calls NumPy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sten import kernels
from sten.layouts.compiled import runs

FEW = 2**18  # entries
SINGLE = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that float32 holds exactly
WITHOUT_FLOAT64 = ("mps",)  # device types


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums that decide: float64, so that their order does not depend on how a device adds up."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def block_sums(matrix: Tensor, block: tuple[int, int]) -> Tensor | None:
    """The float64 sums over the blocks of a matrix, those at its edges smaller, by a kernel, or None."""
    if matrix.dtype not in (*SINGLE, torch.float64, torch.bool) or not runs("block_sums", matrix):
        return None
    matrix = matrix.detach()
    return torch.ops.sten.block_sums((matrix.float() if matrix.dtype in SINGLE else matrix).contiguous(), *block)


def top(score: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` highest entries of a score of any shape, exactly; ties go to the lower index.

    NaN counts as the lowest score. A threshold alone would keep every tie, so ties are counted by index.
    """
    score = score.detach()
    if score.dtype in SINGLE and runs("top_mask", score):
        return torch.ops.sten.top_mask(score.float().contiguous(), count)
    flat = torch.nan_to_num(score.flatten(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if count <= 0 or flat.numel() == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    count = min(count, flat.numel())
    on_cpu = flat.device.type == "cpu"
    edge = torch.kthvalue(flat, flat.numel() - count + 1).values if on_cpu else edge_by_topk(flat, count)
    above = flat > edge
    ties = flat == edge
    more = count - above.sum()
    return (above | (ties & (ties.cumsum(0) <= more))).view(score.shape)


def largest_columns(x: Tensor, count: int) -> Tensor | None:
    """The columns of the `count` largest |x| of each row of a matrix, (rows, count) int64, ascending, by a kernel.

    Ties go to the lower column, NaN counts as the lowest. None: there is no kernel for this tensor.
    """
    x, device = x.detach(), x.device.type
    if not 1 <= count <= x.shape[1]:
        return None
    if device == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and hasattr(torch.ops.sten, "codes_topk"):
        return torch.ops.sten.codes_topk(x.contiguous(), count).long()
    if device == "cuda" and kernels.available() and kernels.top_columns.takes(x):
        return kernels.top_columns.top_columns(x.contiguous(), count=count, relu=False)[1].long()
    return None


def edge_by_topk(score: Tensor, count: int) -> Tensor:
    """The `count`-th highest along the last dimension, which stays with size 1, from the shorter side.

    For every device but the CPU: on a GPU, kthvalue gives a whole row to one block of threads.
    """
    rest = score.shape[-1] - count + 1
    if count < rest:
        return torch.topk(score, count, sorted=False).values.amin(-1, keepdim=True)
    return torch.topk(score, rest, largest=False, sorted=False).values.amax(-1, keepdim=True)


def top_of_groups(score: Tensor, n: int) -> Tensor:
    """Bool mask of the `n` highest along the last dimension; ties go to the lower index, NaN counts as the lowest."""
    score = score.detach()
    if score.dtype in (*SINGLE, torch.float64) and runs("top_of_groups", score):
        score = score if score.dtype is torch.float64 else score.float()
        return torch.ops.sten.top_of_groups(score.contiguous(), n)
    score = torch.nan_to_num(score, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if score.shape[-1] > 8:
        order = torch.sort(score, dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    if score.device.type != "cpu" and score.numel() <= FEW:  # one slice of columns: launches cost more than memory
        index = torch.arange(score.shape[-1], device=score.device)
        other, own = score.unsqueeze(-2), score.unsqueeze(-1)
        beaten = (other > own) | ((other == own) & (index < index.unsqueeze(-1)))
        return beaten.sum(-1) < n
    # Small groups: counting how many entries beat each one is seven times faster than a sort of four.
    columns = score.unbind(-1)
    beaten = [torch.zeros(score.shape[:-1], dtype=torch.uint8, device=score.device) for _ in columns]
    for i, first in enumerate(columns):
        for j in range(i + 1, len(columns)):
            wins = first >= columns[j]
            beaten[j] += wins
            beaten[i] += ~wins
    return torch.stack(beaten, dim=-1) < n


def complete_groups(mask: Tensor, n: int) -> Tensor:
    """The mask with the lowest free entries of each group (the last dimension) added, until it has `n`."""
    missing = n - mask.sum(-1, keepdim=True)
    if not bool((missing > 0).any()):
        return mask
    return mask | (~mask & ((~mask).cumsum(-1) <= missing))
