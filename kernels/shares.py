"""Shares: a few-token product whose kernel the compiler launches, in place of an operator that it cannot look into.

Letters: T tokens, O outputs, S splits of the reduction. The kernel stores the share of each split, fp32 (1 or 2 halves,
S, T, O), and torch operators add them up and apply the epilogue, which Inductor fuses into what comes next: up to
``MOST`` shares are read where they are used, by no kernel of their own. A launch by Inductor costs less host time than
an operator's, and needs neither workspace nor counters; it does not use PDL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch

from . import autotune
from .backend import INTERPRET

MOST = 8  # splits: Inductor unrolls a sum of so many
SHARES = "shares"  # the ``ACTIVATION`` of a kernel that stores them


@dataclass(frozen=True)
class FewTokens:
    """A kernel for a few tokens as both launches need it: the layout's own (``pick``), and the traced one.

    ``grid(config)`` and ``constants(config)`` are its grid and compile-time constants, but for ACTIVATION and PDL,
    ``splits(config)`` its S; ``integers`` are its last arguments. Before them it takes tensors, y, partial sums and
    counters.
    """

    kernel: object
    name: str
    key: tuple
    configs: list[dict]
    grid: Callable[[dict], tuple[int, ...]]
    constants: Callable[[dict], dict]
    integers: tuple[int, ...]
    splits: Callable[[dict], int] = itemgetter("S")

    def shares(self, tensors: tuple, halves: int, tokens: int, outputs: int) -> torch.Tensor:
        """The shares of this product, (halves, S, T, O); the launch is one that a compiler can trace."""
        config = autotune.known(self.name, self.key, self.configs, tensors[0])
        config["S"] = min(self.splits(config), MOST)
        shares = tensors[0].new_empty((halves, config["S"], tokens, outputs), dtype=torch.float32)
        kernel = self.kernel if INTERPRET else torch.library.wrap_triton(self.kernel)
        constants = self.constants(config) | {"ACTIVATION": SHARES, "PDL": False}
        kernel[self.grid(config)](*tensors, shares, None, None, *self.integers, **constants)
        return shares


def matrix_of(x: torch.Tensor) -> torch.Tensor:
    """x (*, I) as (T, I), contiguous, from a multiple of 16 bytes on."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return flat if begins_aligned(flat) else flat.clone()


def begins_aligned(t: torch.Tensor) -> bool:
    """Whether a tensor begins at a multiple of 16 bytes of its storage, as the compiler's own allocations all do."""
    return t.storage_offset() * t.element_size() % 16 == 0
