"""What the inputs of a model's weights are on calibration batches, in the model as it is: mean squares, and samples."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.data import Calibration, Tokens, inference, run_batch
from ..calibration.sites import Site, output_layers, sites_of
from .select import Target

SAMPLED = 256  # tokens of each weight's input that output errors are measured on


@dataclass
class Inputs:
    """Of one weight: the mean of x_j^2 over tokens, (columns,), and some of the tokens, (n, columns)."""

    square: Tensor
    sample: Tensor
    tokens: int = 0

    def reorder(self, index: Tensor) -> None:
        """The columns have changed places."""
        self.square, self.sample = self.square[index], self.sample[:, index]

    def add(self, x: Tensor, share: int) -> None:
        """Add rows (tokens, columns) to the mean, and at most `share` of them to the sample."""
        self.square = (self.square * self.tokens + x.square().sum(0)) / (self.tokens + len(x))
        self.tokens += len(x)
        self.sample = torch.cat([self.sample, x[:: -(-len(x) // share)]])[:SAMPLED]


def input_statistics(model: nn.Module, targets: list[Target], calibration: Calibration) -> dict[str, Inputs]:
    """Statistics of the targets' inputs, by name; padding does not count. A weight that sees no token has none.

    Raises:
        ValueError: an input with NaN or inf; a weight whose input is not known.
    """
    found: dict[str, Inputs] = {}
    tokens = [Tokens(batch) for batch in calibration.batches]
    share, batch = max(1, -(-SAMPLED // len(tokens))), 0

    def listen(target: Target, site: Site):
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = site.read(args, kwargs)
            x, mask = site.rows(given).detach().float(), tokens[batch].of(tuple(given.shape))
            x = x if mask is None else x[mask.to(x.device)]
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"Expected finite inputs of {target.name}, got NaN or inf in batch {batch} of calibration=; leave "
                    "that batch out."
                )
            if len(x):
                empty = Inputs(x.new_zeros(x.shape[1]), x[:0])
                found.setdefault(target.name, empty).add(x, share)

        return site.module.register_forward_pre_hook(read, with_kwargs=True)

    attentions = output_layers(model)
    with contextlib.ExitStack() as stack:
        for target in targets:
            for site in sites_of(target, attentions):
                stack.callback(listen(target, site).remove)
        stack.enter_context(inference(model))
        for batch, data in enumerate(calibration.batches):
            run_batch(model, data, batch)
    return found
