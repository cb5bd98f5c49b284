"""Statistics of the inputs of one weight (or of several on one input), summed batch by batch in float32 and float64."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..sparsifiers.precision import in_float32
from ..training.distributed import ranks


class Statistics:
    """Sums over tokens, and which batches had numbers that are not finite.

    Attributes:
        columns: of the weight.
        tokens: how many were added, 0-d int64.
    """

    def __init__(self, needs: frozenset[str], columns: int, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.columns = columns
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if "x_gram" in needs else None
        self.squares = torch.zeros(columns, dtype=exact, device=device) if needs & {"x_norm", "x_mean_var"} else None
        self.total = torch.zeros(columns, dtype=exact, device=device) if "x_mean_var" in needs else None
        self.finite: list[tuple[int, Tensor]] = []
        self.needs = needs

    def add(self, x: Tensor, batch: int, mask: Tensor | None = None, routed: bool = False) -> None:
        """Add the rows of x (tokens, columns) without those where `mask` is False; of a `routed` x, without zero rows.

        Nothing here waits for the device.
        """
        with in_float32(self.tokens.device):
            x = x.detach().to(self.tokens.device).float()
            if mask is not None:
                mask = mask.to(x.device)
                x = x.masked_fill(~mask[:, None], 0)
                self.tokens += mask.sum()
            elif routed:
                self.tokens += (x != 0).any(1).sum()
            else:
                self.tokens += len(x)
            self.finite.append((batch, x.isfinite().all()))
            if self.gram is not None:
                self.gram.addmm_(x.t(), x)
            if self.total is not None:  # a variance is a small difference of these
                x = x.to(self.total.dtype)
            if self.squares is not None:
                self.squares += x.square().sum(0, dtype=self.squares.dtype)
            if self.total is not None:
                self.total += x.sum(0, dtype=self.total.dtype)

    def reduce(self) -> None:
        """Sum over all ranks."""
        if ranks() > 1:
            for t in (self.tokens, self.gram, self.squares, self.total):
                if t is not None:
                    dist.all_reduce(t)

    def not_finite(self) -> int | None:
        """The first batch with NaN or inf; -1: a batch of another rank; None: there was none."""
        for batch, finite in self.finite:
            if not bool(finite):
                return batch
        sums = [t for t in (self.gram, self.squares, self.total) if t is not None]
        return None if all(bool(t.isfinite().all()) for t in sums) else -1

    def finish(self) -> dict[str, Tensor]:
        """What `View.stats` holds: means over tokens. Without tokens, those of inputs that are all alike."""
        count = self.tokens.clamp(min=1)
        stats = {"tokens": self.tokens}
        none = int(self.tokens) == 0
        if self.gram is not None:
            stats["x_gram"] = torch.eye(self.columns, device=self.gram.device) if none else self.gram.div_(count)
        if "x_norm" in self.needs:
            mean = self.squares / count
            stats["x_norm"] = torch.ones_like(mean).float() if none else mean.sqrt().float()
        if self.total is not None:
            mean = self.total / count
            variance = (self.squares / count - mean.square()).clamp(min=0)
            stats["x_mean"] = mean.float()
            stats["x_var"] = torch.ones_like(mean).float() if none else variance.float()
        return stats
