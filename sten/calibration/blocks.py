"""The blocks of a model: modules that are pruned one after another, and what lies outside of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

Blocks = list[tuple[str, nn.Module]]


def blocks_of(model: nn.Module, weights: Iterable, requested: Any = None) -> Blocks:
    """(name, module) of each block that contains one of the weights.

    Without `requested`: the members of the model's outermost ModuleLists, and of Sequentials of one class of modules.

    Raises:
        ValueError: `requested` names no module of the model.
    """
    owners = {id(module) for weight in weights for module, _ in weight.owners}
    if requested is not None:
        return _requested(model, requested, owners)
    found: Blocks = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        members = list(module.named_children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if isinstance(module, nn.Sequential) and (len(members) < 2 or len({type(m) for _, m in members}) > 1):
            continue
        chosen = [(key, m) for key, m in members if id(m) not in owners and _contains(m, owners)]
        if chosen:
            prefix = f"{name}." if name else ""
            inside.append(prefix)
            found += [(prefix + key, member) for key, member in chosen]
    return found


def _contains(module: nn.Module, owners: set[int]) -> bool:
    return any(id(part) in owners for part in module.modules())


def _requested(model: nn.Module, requested: Any, owners: set[int]) -> Blocks:
    names = {id(module): name for name, module in model.named_modules()}
    several = isinstance(requested, Iterable) and not isinstance(requested, (str, nn.Module))
    found: Blocks = []
    for one in requested if several or isinstance(requested, nn.ModuleList) else [requested]:
        if isinstance(one, str):
            matches = [(name, m) for name, m in model.named_modules() if name and fnmatch.fnmatchcase(name, one)]
            if len(matches) == 1 and isinstance(matches[0][1], nn.ModuleList):
                matches = [(f"{matches[0][0]}.{key}", m) for key, m in matches[0][1].named_children()]
        else:
            matches = [(names[id(one)], one)] if id(one) in names else []
        if not matches:
            some = ", ".join([name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)][:3])
            raise ValueError(
                f"Expected for blocks= names or modules of the model, got {str(one)[:80]!r}, which is none; it has "
                f"{'the lists ' + some if some else 'no ModuleList'}."
            )
        found += matches
    outer = [(n, m) for n, m in found if not any(n != other and n.startswith(other + ".") for other, _ in found)]
    return [(name, m) for name, m in dict(outer).items() if _contains(m, owners)]
