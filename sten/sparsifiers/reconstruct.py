"""Reconstruct: the weights that a block has left, fitted to what the dense block computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ..layouts.checks import expect_whole
from .calibration import Refinement, filled, starting_mask
from .sparsifier import Edit, View


class Block(Protocol):
    """What `reconstruct` reads of a block; calibration makes it.

    Attributes:
        module: the block, with the edits applied to its dense weights.
        inputs: (args, kwargs) of each batch; read several times.
        targets: the outputs of the dense block, one a batch.
        token_masks: bool, which tokens of each batch count; None: all.
        views, edits: of each weight of the block that is pruned, by its full name.
        parameters: each weight's name in `module`.
        transposed: the weights of which `views` and `edits` have the transpose of the Parameter.
    """

    module: nn.Module
    inputs: Iterable[tuple[tuple, dict[str, Any]]]
    targets: Iterable[Any]
    token_masks: Iterable[Tensor | None]
    views: dict[str, View]
    edits: dict[str, Edit]
    parameters: dict[str, str]
    transposed: frozenset[str]


@dataclass(frozen=True)
class Reconstruct(Refinement):
    """Fit the remaining weights of each block to the dense block's outputs; the last method of a `sten.chain`.

    The loss is the relative error of each token, `|y - z|^2 / |z|^2` of the block's output y and the dense block's z,
    as a mean over the tokens that are not padding: some tokens, mostly the first one, have outputs ten times as long as
    the others', which would dominate a plain mean. (Outputs of four or more dimensions, as of convolutions: of each
    sample.) Adam in float32, for `steps` steps, each over one batch of the calibration in turn, so that a batch of more
    tokens is a better step. Masks do not change; a block whose error over all batches has not fallen keeps the values
    that it had. Biases and norms stay: calibration writes weights only. Gradients and errors are those of the batches
    of all processes.

    Without a method before it, the masks are Wanda's. Weights that lie in no block of the calibration stay as they were
    decided.

    Args:
        steps: of Adam, for each block.
        lr: the first step's length, as a fraction of the root mean square of each weight's remaining entries, so that
            it does not depend on the scale of a model; it decays linearly to zero.

    Example:
        >>> import sten
        >>> sten.Reconstruct(steps=32)
        Reconstruct(steps=32, lr=0.005)
    """

    steps: int = 16
    lr: float = 5e-3

    needs: ClassVar[frozenset[str]] = frozenset({"x_norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_whole(self, "steps", 1)
        if not self.lr > 0:
            raise ValueError(f"Expected a positive lr for Reconstruct, got {self.lr}.")

    def update(self, view: View) -> Edit:
        """What the method before has decided; the block is fitted when all its weights have been."""
        return Edit(mask=starting_mask(view)) if view.previous is None else view.previous

    def reconstruct(self, block: Block) -> dict[str, Edit]:
        """The edits with fitted values, by name."""
        weights = [_Weight(name, block) for name in block.edits]
        device_type = weights[0].values.device.type
        groups = [{"params": [w.values], "lr": self.lr * w.scale} for w in weights]
        optimizer = torch.optim.Adam(groups)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        with torch.autocast(device_type, enabled=False):
            before = _mean_error(block, weights)
            for batch in islice(_again_and_again(block), self.steps):
                with torch.enable_grad():
                    errors = _errors(block, weights, *batch)
                    grads = _gradients(errors.sum(), [w.values for w in weights])
                count = _over_ranks(errors.new_tensor(errors.numel())).clamp(min=1)
                for weight, grad in zip(weights, grads, strict=True):
                    weight.values.grad = _over_ranks(grad) / count
                optimizer.step()
                decay.step()
            if not _mean_error(block, weights) < before:
                return dict(block.edits)
        return {weight.name: weight.edit() for weight in weights}


def _batches(block: Block) -> Iterator[tuple]:
    """(inputs, target, token mask) of each batch; read anew each time, since activations may lie on a disk."""
    return zip(block.inputs, block.targets, block.token_masks, strict=True)


def _again_and_again(block: Block) -> Iterator[tuple]:
    while True:
        yield from _batches(block)


class _Weight:
    """The values of one weight, dense and float32, that are fitted where the block lies; zero off the mask."""

    def __init__(self, name: str, block: Block) -> None:
        view, self.name, self.before = block.views[name], name, block.edits[name]
        self.parameter, self.transposed = block.parameters[name], name in block.transposed
        p = block.module.get_parameter(self.parameter)
        self.mask, self.dtype = filled(view, self.before.mask).to(p.device), p.dtype
        start = view.weight if self.before.value is None else self.before.value
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        start = start.detach().to(p.device, wide).masked_fill(~self.mask, 0)
        self.scale = float(start.square().sum().div(self.mask.sum().clamp(min=1)).sqrt())
        self.values = start.requires_grad_()

    def effective(self) -> Tensor:
        """The weight as the block's Parameter; its gradient is zero off the mask."""
        w = self.values.masked_fill(~self.mask, 0).to(self.dtype)
        return w.t() if self.transposed else w

    def edit(self) -> Edit:
        mask = self.before.mask
        return Edit(mask=mask, value=self.values.detach().to(mask.device, self.dtype))


def _errors(block: Block, weights: list[_Weight], inputs: tuple, target: Any, mask: Tensor | None) -> Tensor:
    """The relative error of each token that counts."""
    args, kwargs = inputs
    output = functional_call(block.module, {w.parameter: w.effective() for w in weights}, args, kwargs)
    return relative_errors(hidden(output), hidden(target), mask)


def _gradients(loss: Tensor, values: list[Tensor]) -> Iterable[Tensor]:
    """Zero for a weight that the batch has not reached, as an expert."""
    if not loss.requires_grad:
        return [torch.zeros_like(v) for v in values]
    return torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)


@torch.no_grad()
def _mean_error(block: Block, weights: list[_Weight]) -> float:
    total = weights[0].values.new_zeros(2, dtype=torch.float64)  # the sum, and how many
    for batch in _batches(block):
        errors = _errors(block, weights, *batch).double()
        total += torch.stack([errors.sum(), errors.new_tensor(errors.numel())])
    total = _over_ranks(total)
    return float(total[0] / total[1].clamp(min=1))


def _over_ranks(t: Tensor) -> Tensor:
    """The sum over all processes, each of which has its own batches; of one, itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(t)
    return t


def hidden(output: Any) -> Tensor:
    """The tensor that a block hands on: its output, or the first of several."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if hasattr(output, "values") else output[0]
    return output


def relative_errors(output: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """|y - z|^2 / |z|^2 of each token (of each sample, of four or more dimensions) that a bool mask of tokens keeps."""
    y, z = (t if t.dtype == torch.float64 else t.float() for t in (output, target))
    if mask is not None and mask.shape == z.shape[:-1]:
        y, z = y[mask], z[mask]
    elif z.dim() > 3:
        y, z = y.flatten(1), z.flatten(1)
    length = z.square().sum(-1)
    least = 1e-6 * length.mean() + torch.finfo(length.dtype).tiny  # of a token whose output is zero
    return (y - z).square().sum(-1) / length.clamp(min=least)
