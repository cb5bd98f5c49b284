"""What a module remembers of each of its weights, whatever form they are in: where it came from, and its optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.optim import Optimizer

from .select import Target

ATTRIBUTE = "_sten_records"  # on a module: {weight name: Record}


@dataclass
class Record:
    """Of one weight.

    Attributes:
        energy: the share of sum |w| that was kept at conversion.
        why: why it was skipped; empty if it was not.
        optimizers: weak references to those whose state follows the weight from form to form.
    """

    energy: float | None = None
    why: str = ""
    optimizers: list[weakref.ref] = field(default_factory=list)

    def __getstate__(self) -> dict:
        return {"energy": self.energy, "why": self.why, "optimizers": []}  # a copy is in no optimizer yet


def record_of(module: nn.Module, name: str) -> Record:
    """The record of a weight; an empty one if there is none."""
    records = module.__dict__.get(ATTRIBUTE, {})
    return records[name] if name in records else Record()


def remember(target: Target, optimizers: Iterable[Optimizer] = (), why: str = "") -> None:
    """Note on the modules that own a weight what was decided for it, and which optimizers follow it."""
    for module, name in target.owners:
        record = module.__dict__.setdefault(ATTRIBUTE, {}).setdefault(name, Record())
        record.energy = record.energy if target.energy is None else target.energy
        record.why = why
        if optimizers:
            remember_optimizers(module, name, optimizers)


def remember_optimizers(module: nn.Module, name: str, optimizers: Iterable[Optimizer]) -> None:
    """Note the optimizers whose state follows a weight from now on."""
    record = module.__dict__.setdefault(ATTRIBUTE, {}).setdefault(name, Record())
    known = known_optimizers(module, name)
    record.optimizers += [weakref.ref(o) for o in optimizers if not any(o is other for other in known)]


def known_optimizers(module: nn.Module, name: str) -> list[Optimizer]:
    """The optimizers that a weight was given."""
    record = module.__dict__.get(ATTRIBUTE, {}).get(name)
    if record is None or not record.optimizers:
        return []
    return [o for ref in record.optimizers if (o := ref()) is not None]
