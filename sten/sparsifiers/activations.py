"""The activation methods: thresholds, the largest of a row, a block or a batch, and random fractions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.topk import edge_by_topk, largest_columns, top, top_of_groups
from ..ops.epilogue import Kept
from .activation import ActivationMethod, State, count_of, expect_count, expect_fraction

SAMPLE = 2**22  # entries whose quantile is taken


@dataclass(frozen=True)
class Threshold(ActivationMethod):
    """The entries with |x| above a threshold: a number, or what keeps a fraction of the calibration data.

    Args:
        value: the threshold; None: from `sparsity`.
        sparsity: the fraction to drop. The threshold is then the quantile of |x| over `calibration=` of
            `sten.sparsify`, one for each module, a buffer in its state dict.
        signed: whether to keep x > threshold instead, as a shifted ReLU does.
        straight_through: whether dropped entries get a gradient.

    Example:
        >>> import torch, sten
        >>> layer = torch.nn.Linear(8, 4)
        >>> batches = [torch.randn(64, 8)]
        >>> layer = sten.sparsify(layer, site="input", sparsifier=sten.Threshold(sparsity=0.5), calibration=batches)
        >>> print(sten.summary(layer).sites[0])
        input of the model: Threshold(sparsity=0.5), dense with zeros

    Source: Liu et al., Training-Free Activation Sparsity in Large Language Models, https://arxiv.org/abs/2408.14690
    (which takes the quantile from a histogram).
    """

    value: float | None = None
    sparsity: float | None = None
    signed: bool = False
    straight_through: bool = False

    kind: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        if (self.value is None) == (self.sparsity is None):
            raise ValueError("Expected either value= or sparsity= for Threshold; Threshold(0.1) keeps |x| > 0.1.")
        if not isinstance(self.value, (int, float, type(None))):
            raise ValueError(f"Expected a number for Threshold(value=...), got {self.value!r}.")
        if self.sparsity is not None:
            expect_fraction(self, "sparsity")

    @property
    def takes_gradients(self) -> bool:
        return self.sparsity is None

    def init(self, features: int | None) -> State:
        if self.sparsity is None:
            return {}
        return {"threshold": torch.tensor(-torch.inf)}  # until it is calibrated, or loaded

    def calibrate(self, x: Tensor) -> State:
        if self.sparsity is None:
            return super().calibrate(x)
        x = x.flatten() if self.signed else x.abs().flatten()
        x = x[:: -(-x.numel() // SAMPLE)].float()
        return {"threshold": x.kthvalue(max(1, round(self.sparsity * len(x)))).values}

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        edge = state["threshold"].to(x.dtype) if self.value is None else self.value
        return (x if self.signed else x.abs()) > edge

    def kept(self, x: Tensor, state: State, training: bool) -> Kept:
        return Kept("above" if self.signed else "magnitude", state["threshold"] if self.value is None else self.value)


@dataclass(frozen=True)
class TopK(ActivationMethod):
    """The k entries of the largest |x| in each row (token), or in each block of it; ties go to the lower index.

    Args:
        k: a count, or a fraction of the row or block.
        block: k of every `block` consecutive features, so that `sten.NM(k, block)` can store it; None: of the row.
        straight_through: whether dropped entries get a gradient.

    Example:
        >>> import torch, sten
        >>> top = sten.sparse_op(torch.relu, out=(sten.TopK(2), sten.FanIn()))
        >>> y = top(torch.tensor([[3.0, 1.0, 2.0, -1.0]]))
        >>> y.parts["index"].tolist(), y.parts["values"].tolist()
        ([[0, 2]], [[3.0, 2.0]])
    """

    k: int | float
    block: int | None = None
    straight_through: bool = False

    kind: ClassVar[str] = "blocking"

    def __post_init__(self) -> None:
        expect_count(self)
        if self.block is not None and (self.block < 1 or (isinstance(self.k, int) and self.k > self.block)):
            raise ValueError(f"Expected a block of at least k={self.k} features for TopK, got block={self.block}.")

    def check(self, features: int) -> None:
        if isinstance(self.k, int) and self.k > features:
            raise ValueError(f"Expected k of at most {features}, the number of features, for {self}, got {self.k}.")
        if self.block is not None and features % self.block:
            raise ValueError(f"Expected features in whole blocks of {self.block} for {self}, got {features}.")

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        if self.block is not None:
            blocks = x.abs().unflatten(-1, (-1, self.block))
            return top_of_groups(blocks, count_of(self.k, self.block)).flatten(-2)
        return top_of_rows(x.abs(), count_of(self.k, x.shape[-1]))

    def kept(self, x: Tensor, state: State, training: bool) -> Kept:
        if self.block is not None:
            return Kept("blocks", count=count_of(self.k, self.block), block=self.block)
        return Kept("row", count=count_of(self.k, x.shape[-1]))

    def columns(self, x: Tensor) -> Tensor | None:
        if self.block is not None:
            return None
        k = count_of(self.k, x.shape[-1])
        columns = largest_columns(x, k)
        return top_columns(x.abs(), k) if columns is None else columns


def top_columns(score: Tensor, k: int) -> Tensor:
    """The columns of the k highest of each row, ascending; ties go to the lower index, NaN counts as the lowest."""
    score = torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf)
    if score.device.type != "cpu" and score.dtype != torch.float64:
        return columns_by_key(score, k)
    values, index = score.topk(min(k + 1, score.shape[1]))
    index = index[:, :k]
    if k < score.shape[1]:
        tied = (values[:, -1] == values[:, -2]).nonzero()[:, 0]  # topk breaks ties as it likes
        if len(tied):
            index[tied] = score[tied].sort(descending=True, stable=True).indices[:, :k]
    return index.sort().values


def columns_by_key(score: Tensor, k: int) -> Tensor:
    """The same for magnitudes, and -inf, without a look at the numbers, which would wait for the device.

    The bits of such numbers are in their order, and the column below them breaks ties.
    """
    last = score.shape[1] - 1
    column = torch.arange(last, -1, -1, device=score.device)
    key = (score.float().view(torch.int32).long() << 32) | column
    return (last - (key.topk(k, sorted=False).values & 0xFFFFFFFF)).sort().values


def top_of_rows(score: Tensor, k: int) -> Tensor:
    """Bool mask of the k highest of each row; ties go to the lower index. One selection, not a sort."""
    if score.dtype == torch.bool or k >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    score = torch.nan_to_num(score, nan=-torch.inf, posinf=torch.inf)
    edge = edge_by_topk(score, k)
    above, ties = score > edge, score == edge
    free = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= free))


@dataclass(frozen=True)
class BatchTopK(ActivationMethod):
    """The k * rows entries of the largest |x| of a whole batch; in eval mode those above a threshold.

    The threshold is the running mean of the smallest magnitude that training kept, a buffer in the state dict: a token
    alone then keeps what it would in a batch. Before any training it is 0.

    Args:
        k: a count for each row on average, or a fraction of all entries.
        momentum: the weight of a new batch in the running mean.
        straight_through: whether dropped entries get a gradient.

    Example:
        >>> import torch, sten
        >>> top = sten.sparse_op(torch.relu, out=sten.BatchTopK(1))
        >>> top(torch.tensor([[3.0, 2.0], [0.5, 0.2]]))
        tensor([[3., 2.],
                [0., 0.]])

    Source: Bussmann et al., BatchTopK Sparse Autoencoders, https://arxiv.org/abs/2412.06410.
    """

    k: int | float
    momentum: float = 0.01
    straight_through: bool = False

    kind: ClassVar[str] = "materializing"

    def __post_init__(self) -> None:
        expect_count(self)
        expect_fraction(self, "momentum")

    def check(self, features: int) -> None:
        if isinstance(self.k, int) and self.k > features:
            raise ValueError(f"Expected k of at most {features}, the number of features, for {self}, got {self.k}.")

    def init(self, features: int | None) -> State:
        return {"threshold": torch.tensor(0.0)}

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        score, running = x.abs(), state.get("threshold")
        if not training:
            return score > running.to(x.dtype)
        count = self.k * len(x) if isinstance(self.k, int) else count_of(self.k, x.numel())
        mask = top(score, count)
        if x.numel() and running is not None:  # a gradient has no running mean
            least = score.masked_fill(~mask, torch.inf).min().to(running.dtype)
            with torch.no_grad():
                running.copy_(torch.where(running == 0, least, torch.lerp(running, least, self.momentum)))
        return mask


@dataclass(frozen=True)
class RandomFraction(ActivationMethod):
    """Each entry with probability `fraction`, divided by it, so that the expectation is x. In eval mode all entries.

    Example:
        >>> import torch, sten
        >>> layer = sten.sparsify(torch.nn.Linear(8, 4), site="grad_output", sparsifier=sten.RandomFraction(0.25))
    """

    fraction: float

    kind: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        expect_fraction(self, "fraction")
        if self.fraction == 0:
            raise ValueError("Expected a fraction above 0 for RandomFraction, got 0, which keeps nothing.")

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        return torch.rand_like(x, dtype=torch.float32) < (self.fraction if training else 1.0)

    def kept(self, x: Tensor, state: State, training: bool) -> Kept:
        return Kept("random", self.fraction) if training else Kept("all")

    def apply(self, x: Tensor, state: State, training: bool) -> tuple[Tensor, Tensor]:
        mask = self.mask(x, state, training)
        return torch.where(mask, x / self.fraction if training else x, 0), mask


@dataclass(frozen=True)
class MVUE24(ActivationMethod):
    """2 of every 4 entries at random, without bias and with the least variance: for gradients.

    Of a group of four, entry i is kept with probability p_i and divided by it, where p is proportional to |x|, at most
    1, and adds up to 2; `docs/activations.md` has the derivation. In eval mode it does the same.

    Args:
        dim: 1, groups of features, which `sten.NM(2, 4)` can store; 0, groups of tokens, for the product of a weight's
            gradient, which runs along the tokens.

    Example:
        >>> import torch, sten
        >>> layer = sten.sparsify(torch.nn.Linear(8, 4), site="grad_output", sparsifier=sten.MVUE24(dim=0))

    Source: Chmiel et al., Minimum Variance Unbiased N:M Sparsity for the Neural Gradients,
    https://arxiv.org/abs/2203.10991.
    """

    dim: int = 1

    kind: ClassVar[str] = "blocking"

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise ValueError(f"Expected dim=0, groups of tokens, or dim=1, of features, for MVUE24, got {self.dim!r}.")

    def probabilities(self, groups: Tensor) -> Tensor:
        """p of magnitudes (..., 4): min(1, 2|x| / sum), where an entry beyond 1 leaves one slot to the other three."""
        total, most = groups.sum(-1, keepdim=True), groups.amax(-1, keepdim=True)
        rest = total - most
        first = F.one_hot(groups.argmax(-1), 4).bool()
        alone = torch.where(first, 1.0, groups / rest.clamp(min=torch.finfo(groups.dtype).tiny))
        p = torch.where(most >= rest, alone, 2 * groups / total.clamp(min=torch.finfo(groups.dtype).tiny))
        return torch.where(groups > 0, p.clamp(max=1.0), 0.0)

    def mask(self, x: Tensor, state: State, training: bool) -> Tensor:
        return self.apply(x, state, training)[1]

    def apply(self, x: Tensor, state: State, training: bool) -> tuple[Tensor, Tensor]:
        lines = x if self.dim else x.t()
        groups = F.pad(lines.detach().abs().float(), (0, -lines.shape[1] % 4)).unflatten(-1, (-1, 4))
        p = self.probabilities(groups)
        ends = p.cumsum(-1).clamp(max=2.0)  # systematic sampling: one number u for a group, at most two entries
        u = torch.rand_like(ends[..., :1])
        passed = torch.floor(ends - u)
        keep = passed > torch.cat([torch.floor(-u), passed[..., :-1]], -1)
        weights = torch.where(keep, 1 / p, 0.0).flatten(-2)[:, : lines.shape[1]]
        mask = keep.flatten(-2)[:, : lines.shape[1]]
        weights, mask = (weights, mask) if self.dim else (weights.t(), mask.t())
        return torch.where(mask, x * weights.to(x.dtype), 0), mask
