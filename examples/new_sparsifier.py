"""A method that sten does not have, without touching sten: inputs that have few weights so far grow first."""

from dataclasses import dataclass

import torch

import sten


@dataclass(frozen=True)
class FewestFirst(sten.extend.PatternMethod):
    """RigL whose growth score is |g| / (1 + weights of the input). It runs on every layout and optimizer."""

    total_steps: int
    every: int = 100
    schedule: sten.schedule.Schedule | None = None
    needs, replaces_step = frozenset({"grad"}), True

    def default_schedule(self):
        return sten.schedule.Cosine(0.3, 0.0, 0, self.total_steps, self.every)

    def update(self, view):
        if view.mask is None:  # the first pattern, at random
            score = sten.scores.random(view.weight, view.generator)
            return sten.extend.Edit(mask=view.layout.mask(score, view.sparsity))
        keep = sten.extend.keep_largest(view, self.schedule.value(view.step))
        return sten.extend.Edit(mask=sten.extend.fill_up(view, keep, view.grad.abs() / (1 + keep.sum(0))))


if __name__ == "__main__":
    sten.testing.check_sparsifier(FewestFirst(total_steps=12, every=3))
    model = torch.nn.Linear(64, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sten.sparsify(model, sten.CSR(), FewestFirst(60, every=10), sparsity=0.8, optimizer=optimizer)
    for x in torch.randn(60, 128, 64):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
    print(sten.summary(sten.finalize(model)))
