"""One forward pass that shows how a model is put together: when each weight and block is called, and with what.

The arguments of each block become a template, whose leaves say where they come from:

    Out(path)         the output of the block before
    Kept(block, path) an argument of an earlier block whose calls are captured (a mask, positions)
    anything else     a constant

A block that gets any other tensor starts a new chain: its calls are captured, in forward passes of the whole model. So
does a block with a chosen weight called between it and the block before, and, where the shapes of the batches differ,
one that gets a number which may follow from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Blocks
from .data import Tokens, on_device, run_batch, tensors_of
from .sites import Located, Site, output_layers, sites_of
from .substitute import copied_to
from .trees import Path, at, leaves, mapped, placed

HELD = 8  # inputs outside of blocks that are kept, to see whether the next weight gets the same


@dataclass(frozen=True)
class Out:
    path: Path


@dataclass(frozen=True)
class Kept:
    block: int
    path: Path


@dataclass
class Group:
    """Weights that get one tensor, in the order of their calls.

    Attributes:
        block: its number in the order of calls; None: outside of all blocks.
        first: time of the first call; None: not called in the first batch.
        rows_are_tokens: whether the input has a row for each token of the batch.
        around: where it has not (an expert), the innermost module around it that gets all tokens.
    """

    weights: list[Located]
    sites: list[Site]
    block: int | None
    first: int | None
    rows_are_tokens: bool
    around: nn.Module | None


@dataclass
class Call:
    """A block, in the order of their calls.

    Attributes:
        first: time of its call.
        template: of its (args, kwargs).
        starts: whether its calls are captured.
    """

    name: str
    module: nn.Module
    first: int
    template: Any
    starts: bool
    groups: list[Group] = field(default_factory=list)

    def sources(self, kind: type) -> set:
        return {leaf for _, leaf in leaves(self.template) if isinstance(leaf, kind)}


def filled(template: Any, kept: dict[Kept, Any], outs: dict[Path, Any]) -> Any:
    """The arguments that a template describes."""

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Out):
            return outs[leaf.path]
        return kept[leaf] if isinstance(leaf, Kept) else leaf

    return mapped(value, template)


def version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def trace(
    model: nn.Module,
    weights: list[Located],
    blocks: Blocks,
    batches: list,
    tokens: Tokens,
    device: torch.device | None,
) -> tuple[list[Call], list[Group]]:
    """The blocks in the order of their calls, with their groups, and the groups outside of them.

    Where a block is called more than once, as shared layers are, all weights are outside.
    """
    alike = len({tuple(t.shape for t in tensors_of(batch)) for batch in batches}) == 1
    tracer = _Tracer(model, weights, blocks, tokens, alike)
    with contextlib.ExitStack() as stack:
        tracer.hook_before(stack)
        streamed([block for _, block in blocks], device, stack)
        tracer.hook_after(stack)
        run_batch(model, batches[0], 0)
    if blocks and any(len(times) > 1 for times in tracer.times.values()):
        return trace(model, weights, [], batches, tokens, None)
    return tracer.result()


class _Tracer:
    """What hooks note during the pass; tensors whose identity is compared later are held."""

    def __init__(self, model: nn.Module, weights: list[Located], blocks: Blocks, tokens: Tokens, alike: bool) -> None:
        self.blocks, self.tokens, self.alike = blocks, tokens, alike
        self.weights = {weight.name: weight for weight in weights}
        attentions = output_layers(model)
        self.sites = {weight.name: sites_of(weight, attentions) for weight in weights}
        inside = [{id(part) for part in block.modules()} for _, block in blocks]
        self.block = {weight.name: _block_of(weight, inside) for weight in weights}
        self.parents = {id(child): module for module in model.modules() for child in module.children()}
        self.clock = 0
        self.times: dict[int, list[int]] = {i: [] for i in range(len(blocks))}
        self.templates: dict[int, Any] = {}
        self.first: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.groups: list[list[str]] = []
        self.held: list[tuple[Tensor, int, Any, list[str]]] = []  # inputs of weights, with their group
        self.outs: dict[int, tuple[Tensor, int, Out]] = {}
        self.seen: dict[int, tuple[Tensor, int, Kept]] = {}
        self.order: list[int] = []
        self.starts: set[int] = set()
        self.start: tuple[int, Any] | None = None
        self.get_tokens: set[int] = set()

    def hook_before(self, stack: contextlib.ExitStack) -> None:
        for i, (_, block) in enumerate(self.blocks):
            hooked(stack, block.register_forward_pre_hook(self._entering(i), with_kwargs=True))

    def hook_after(self, stack: contextlib.ExitStack) -> None:
        for _, block in self.blocks:
            hooked(stack, block.register_forward_hook(self._left))
        for name, sites in self.sites.items():
            for site in sites:
                hooked(stack, site.module.register_forward_pre_hook(self._reading(name, site), with_kwargs=True))
        around: dict[int, nn.Module] = {}
        for sites in self.sites.values():
            around |= {id(module): module for module in self._around(sites[0].module)}
        for module in around.values() if self.tokens.shapes else ():
            hooked(stack, module.register_forward_pre_hook(self._inside, with_kwargs=True))

    def _around(self, module: nn.Module) -> list[nn.Module]:
        found = []
        while (module := self.parents.get(id(module))) is not None:
            found.append(module)
        return found

    def _inside(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if token_input((args, kwargs), self.tokens) is not None:
            self.get_tokens.add(id(module))

    def _entering(self, i: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.clock += 1
            self.times[i].append(self.clock)
            self.order.append(i)
            self.held.clear()
            self.templates[i] = self._template(i, (args, kwargs))

        return hook

    def _left(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.outs = {id(t): (t, version(t), Out(path)) for path, t in leaves(output) if isinstance(t, Tensor)}
        self.held.clear()

    def _template(self, i: int, call: tuple) -> Any:
        """Of the arguments of a call; also notes whether it starts a chain."""
        for _, leaf in leaves(call):
            if any(cls.__name__ == "Cache" for cls in type(leaf).__mro__):
                raise ValueError(
                    f"Expected blocks without a cache of keys and values, got a {type(leaf).__name__} in "
                    f"{self.blocks[i][0]}; pass use_cache=False in each batch of calibration=."
                )
        tensors = [leaf for _, leaf in leaves(call) if isinstance(leaf, Tensor)]
        if self.start is not None and all(self._known(t) for t in tensors):
            template = placed(self._source, call)
            if self.alike or not any(type(leaf) in (int, float) for _, leaf in leaves(template)):
                return template
        self.starts.add(i)
        self.start = (i, call)
        self.seen |= {id(t): (t, version(t), Kept(i, path)) for path, t in leaves(call) if isinstance(t, Tensor)}
        return placed(lambda path, leaf: Kept(i, path), call)

    def _known(self, t: Tensor) -> Out | Kept | None:
        for known in (self.outs, self.seen):
            if id(t) in known and known[id(t)][1] == version(t):
                return known[id(t)][2]
        return None

    def _source(self, path: Path, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._known(leaf)
        block, call = self.start
        try:
            known = at(call, path)
        except (LookupError, TypeError):
            return leaf
        return Kept(block, path) if known is leaf or (type(known) is type(leaf) and known == leaf) else leaf

    def _reading(self, name: str, site: Site) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.clock += 1
            if self.block[name] is None:
                self.outs = {}  # what is decided for it changes what comes after
            x = site.read(args, kwargs)
            if name not in self.first:
                self.first[name], self.shapes[name] = self.clock, tuple(x.shape)
                self._join(name, x, site)

        return hook

    def _join(self, name: str, x: Tensor, site: Site) -> None:
        """Put a weight into the group of those that got the same tensor; one with several owners is alone."""
        if len(self.sites[name]) == 1:
            for held, old, kind, group in self.held:
                together = self.block[group[0]] == self.block[name]
                if held is x and old == version(x) and kind == site.kind and together:
                    group.append(name)
                    return
        self.groups.append([name])
        if len(self.sites[name]) == 1:
            self.held.append((x, version(x), site.kind, self.groups[-1]))
            if self.block[name] is None:
                del self.held[:-HELD]

    def result(self) -> tuple[list[Call], list[Group]]:
        place = {i: k for k, i in enumerate(self.order)}
        calls = []
        for i in self.order:
            template = mapped(lambda leaf: Kept(place[leaf.block], leaf.path) if isinstance(leaf, Kept) else leaf,
                              self.templates[i])  # fmt: skip
            calls.append(Call(*self.blocks[i], self.times[i][0], template, i in self.starts))
        outside = []
        called = {name for group in self.groups for name in group}
        for names in [*self.groups, *([name] for name in self.weights if name not in called)]:
            group = self._group(names)
            group.block = place.get(group.block)
            (outside if group.block is None else calls[group.block].groups).append(group)
        return calls, outside

    def _group(self, names: list[str]) -> Group:
        name = names[0]
        shape, sites = self.shapes.get(name), self.sites[name]
        tokens = shape is not None and (not self.tokens.shapes or self.tokens.knows(shape))
        around = None
        if not tokens:
            around = next((m for m in self._around(sites[0].module) if id(m) in self.get_tokens), None)
        weights = [self.weights[each] for each in names]
        return Group(weights, sites, self.block[name], self.first.get(name), tokens, around)


def _block_of(weight: Located, inside: list[set[int]]) -> int | None:
    """The number of the only block that has owners of a weight, if it has all."""
    owners = {id(module) for module, _ in weight.owners}
    having = [i for i, parts in enumerate(inside) if parts & owners]
    return having[0] if len(having) == 1 and owners <= inside[having[0]] else None


def token_input(call: Any, tokens: Tokens) -> tuple[Path, Tensor] | None:
    """The first tensor of numbers in the arguments of a call that has a row for each token."""
    for path, leaf in leaves(call):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 2 and tokens.knows(tuple(leaf.shape)):
            return path, leaf
    return None


def hooked(stack: contextlib.ExitStack, handle: Any) -> None:
    """Remove a hook when the stack ends."""
    stack.callback(handle.remove)


def streamed(blocks: list[nn.Module], device: torch.device | None, stack: contextlib.ExitStack) -> None:
    """Until the stack ends, each block runs on the device in forward passes of the model, and its output comes back."""
    if device is None:
        return
    running: dict[int, tuple[contextlib.ExitStack, torch.device | None]] = {}

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        home = next((t.device for _, t in leaves((args, kwargs)) if isinstance(t, Tensor)), None)
        scope = stack.enter_context(contextlib.ExitStack())
        scope.enter_context(copied_to(module, device))
        running[id(module)] = scope, home
        return on_device((args, kwargs), device)

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        scope, home = running.pop(id(module))
        scope.close()
        return on_device(output, home)

    for block in blocks:
        hooked(stack, block.register_forward_pre_hook(enter, with_kwargs=True))
        hooked(stack, block.register_forward_hook(leave))
