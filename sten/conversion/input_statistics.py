"""What the inputs of a model's weights are on calibration batches, in the model as it is: mean squares, and samples."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.data import Calibration, inference, run_batch, tokens_of
from ..calibration.sites import Site, output_layers, sites_of
from ..calibration.statistics import Statistics
from .select import Target

SAMPLED = 256  # tokens of each weight's input that output errors are measured on


@dataclass
class Inputs:
    """Of one weight: the mean of x_j^2 over tokens, (columns,), and some of the tokens, (n, columns)."""

    square: Tensor
    sample: Tensor

    def reorder(self, index: Tensor) -> None:
        """The columns have changed places."""
        self.square, self.sample = self.square[index], self.sample[:, index]


def input_statistics(model: nn.Module, targets: list[Target], calibration: Calibration) -> dict[str, Inputs]:
    """Statistics of the targets' inputs, by name; padding does not count, and mean squares are those of all ranks. A
    weight that sees no token has none.

    Raises:
        ValueError: an input with NaN or inf; a weight whose input is not known.
    """
    tokens = tokens_of(model, calibration.batches)
    share, batch = max(1, -(-SAMPLED // len(tokens))), 0
    sums: dict[str, Statistics] = {}
    samples: dict[str, Tensor] = {}

    def listen(target: Target, site: Site):
        def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = site.read(args, kwargs)
            x, mask = site.rows(given).detach().float(), tokens[batch].of(tuple(given.shape))
            sums[target.name].add(x, batch, mask)
            x = x if mask is None else x[mask.to(x.device)]
            rows = x[:: max(1, -(-len(x) // share))]
            samples[target.name] = torch.cat([samples.get(target.name, x[:0]), rows])[:SAMPLED]

        return site.module.register_forward_pre_hook(read, with_kwargs=True)

    attentions = output_layers(model)
    with contextlib.ExitStack() as stack:
        for target in targets:
            shape = target.shape[::-1] if target.transposed else target.shape
            columns = math.prod(shape[1:])
            sums[target.name] = Statistics(frozenset({"x_norm"}), columns, target.tensor.device)
            for site in sites_of(target, attentions):
                stack.callback(listen(target, site).remove)
        stack.enter_context(inference(model))
        for batch, data in enumerate(calibration.batches):
            run_batch(model, data, batch)
    found: dict[str, Inputs] = {}
    for name, each in sums.items():
        each.reduce()
        if (bad := each.not_finite()) is not None:
            where = f"batch {bad}" if bad >= 0 else "a batch of another rank"
            raise ValueError(
                f"Expected finite inputs of {name}, got NaN or inf in {where} of calibration=; leave that batch out."
            )
        if int(each.tokens):
            square = each.finish()["x_norm"].square()
            found[name] = Inputs(square, samples.get(name, square.new_zeros(0, len(square))))
    return found
