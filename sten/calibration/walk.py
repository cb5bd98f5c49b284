"""`Walk`: stage by stage, the statistics of a block's weights, with what has been decided before in its place.

| at a stage | the model |
|---|---|
| between stages, and while the caller decides | as it was |
| `Stage.collect` | earlier stages decided (their outputs are this block's inputs), this one dense |
| after the caller has set `Stage.values` | this block decided, for one pass that makes the next block's inputs |

A stage is a block, or a group of weights on one input that lie in no block: their statistics come from passes of the
whole model. With `true_sequential` a block has one stage for each of its groups.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsifiers import Edit, View
from .blocks import Blocks, blocks_of
from .data import Calibration, inference, run_batch, tokens_of
from .inputs import BlockInputs, Shelf
from .progress import Progress
from .statistics import Statistics
from .substitute import copied_to, substituted
from .trace import Call, Group, hooked, streamed, token_input, trace
from .trees import mapped

FEW = 16  # tokens: fewer make even a norm a matter of luck


@dataclass(frozen=True)
class Weight:
    """A weight for calibration.

    Attributes:
        name: full name.
        owners: (module, attribute) pairs.
        transposed: whether it is (in, out), as in Hugging Face's Conv1D.
        columns: of the weight in the orientation of the layout, flattened from dimension 1 on.
        device: of the weight.
    """

    name: str
    owners: list[tuple[nn.Module, str]]
    transposed: bool
    columns: int
    device: torch.device


@dataclass
class BlockView:
    """A block for a method that changes it as a whole (`reconstruct(block) -> {name: Edit}`).

    Attributes:
        name: of the block.
        module: the block, in eval mode, with the edits applied as masked dense Parameters.
        inputs: (args, kwargs) of each batch, as the pruned blocks before give them; to be iterated as often as needed.
        targets: the output of each batch that the dense block computes from the same inputs.
        views, edits: by the names of its weights.
        parameters: the weights' names as `module.named_parameters()` has them.
        transposed: the names of the weights of which views and edits have the transpose of the Parameter.
        token_masks: of each batch, bool of shape (batch, tokens), which tokens count; None: all.
    """

    name: str
    module: nn.Module
    inputs: Iterable[tuple[tuple, dict]]
    targets: Iterable[Any]
    views: dict[str, View]
    edits: dict[str, Edit]
    parameters: dict[str, str]
    transposed: frozenset[str]
    token_masks: list[Tensor | None]


@dataclass
class Stage:
    """What is decided together.

    Attributes:
        name: of the block, or of the first weight.
        weights: in the order of their calls.
        ends_block: whether what comes after sees the values: it is the last of a block, or outside of all blocks.
        values: by name, what makes the dense decided weight, as its module has it; the caller sets all of them.
        committed: set by the caller who has written the values into the model.
    """

    name: str
    weights: list[Weight]
    groups: list[Group]
    call: int | None = None
    ends_block: bool = True
    values: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    committed: bool = False
    walk: Walk | None = None

    def collect(self) -> dict[str, dict[str, Tensor]]:
        """By name, the statistics of each weight: of one pass over the batches. Weights of a group share them."""
        return self.walk.collect(self)

    def block(self, views: dict[str, View], edits: dict[str, Edit]) -> contextlib.AbstractContextManager[BlockView]:
        """The decided block, for a method that changes it as a whole; valid in the context."""
        return self.walk.block(self, views, edits)


class Walk:
    """The stages of a model, one at a time; iterate once, and set `values` of each before the next.

    Attributes:
        few: names of weights with too few tokens, and how many, once it has ended.
    """

    def __init__(
        self, model: nn.Module, weights: list[Weight], calibration: Calibration, needs: frozenset[str]
    ) -> None:
        self.model, self.weights, self.calibration, self.needs = model, weights, calibration, needs
        self.device = calibration.device
        self.tokens = tokens_of(model, calibration.batches)
        self.few: dict[str, int] = {}
        self.decided: list[Stage] = []
        self.reached: set[str] = set()  # of the present block
        self.inputs: BlockInputs | None = None

    def __iter__(self) -> Iterator[Stage]:
        blocks = blocks_of(self.model, self.weights, self.calibration.blocks)
        with inference(self.model):
            calls, outside = self._trace(blocks, self.device)
        stages = self._stages(calls, outside)
        progress, shelf = Progress(len(stages), self.calibration.progress), Shelf(self.calibration.offload)
        self.inputs = BlockInputs(self.model, calls, self.calibration, shelf)
        try:
            for stage in stages:
                progress.begin(stage.name)
                yield from self._stage(stage)
                progress.done()
        finally:
            progress.close()
            shelf.close()

    def _trace(self, blocks: Blocks, device: torch.device | None) -> tuple[list[Call], list[Group]]:
        return trace(self.model, self.weights, blocks, self.calibration.batches, self.tokens[0], device)

    def _stages(self, calls: list[Call], outside: list[Group]) -> list[Stage]:
        ordered: list[tuple[float, Stage]] = []
        for group in outside:
            first = float("inf") if group.first is None else group.first
            ordered.append((first, Stage(group.weights[0].name, group.weights, [group], walk=self)))
        for k, call in enumerate(calls):
            parts = [call.groups]
            if self.calibration.true_sequential and len(call.groups) > 1:
                parts = [[group] for group in call.groups]
            for part in parts:
                weights = [weight for group in part for weight in group.weights]
                last = part is parts[-1]
                ordered.append((call.first, Stage(call.name, weights, part, k, last, walk=self)))
        return [stage for _, stage in sorted(ordered, key=lambda pair: pair[0])]

    def _stage(self, stage: Stage) -> Iterator[Stage]:
        k = stage.call
        if k is not None and self.inputs.calls[k].starts and not self._within(stage):
            with inference(self.model):
                self.inputs.capture(k, substituted(self._values(self.decided)))
        yield stage
        missing = [weight.name for weight in stage.weights if weight.name not in stage.values]
        if missing:
            raise ValueError(f"Expected values of all weights of {stage.name}, got none of {missing}.")
        self.decided.append(stage)
        if stage.ends_block and k is not None:
            self._leave(k)
        self.decided = [old for old in self.decided if not old.committed]

    def _leave(self, k: int) -> None:
        """Make the inputs of the block after block k, if they come from it."""
        if self.inputs.linked(k + 1):
            self._run_block(k, self.decided, self.inputs.advance)
        self.inputs.drop(k)

    def _within(self, stage: Stage) -> bool:
        """Whether the block of a stage has had one before."""
        return any(old.call == stage.call for old in self.decided)

    def _values(self, stages: list[Stage]) -> Iterator[tuple[list, Tensor]]:
        for stage in stages:
            for weight in stage.weights:
                yield weight.owners, stage.values[weight.name]()

    def _run_block(self, k: int, decided: list[Stage], use: Callable[[int, int, Any], None]) -> None:
        """Run a block over all batches with what is decided of it."""
        module = self.inputs.calls[k].module
        mine = [stage for stage in decided if stage.call == k]
        with inference(self.model), substituted(self._values(mine)), copied_to(module, self.device):
            for b in range(len(self.tokens)):
                args, kwargs = self.inputs.arguments(k, b)
                use(k, b, module(*args, **kwargs))

    # ---- statistics

    def collect(self, stage: Stage) -> dict[str, dict[str, Tensor]]:
        sums = [self._empty(group) for group in stage.groups]
        batch = [0]
        with contextlib.ExitStack() as stack:
            if stage.call is None:
                stack.enter_context(substituted(self._values(self.decided)))
            for group, each in zip(stage.groups, sums, strict=True):
                self._listen(group, each, batch, stack)
            if stage.call is None:
                with inference(self.model):
                    streamed([call.module for call in self.inputs.calls], self.device, stack)
                    for batch[0], data in enumerate(self.calibration.batches):
                        run_batch(self.model, data, batch[0])
            else:

                def count(k: int, b: int, output: Any) -> None:
                    batch[0] = b + 1

                self._run_block(stage.call, self.decided, count)
        return self._finished(stage, sums)

    def _empty(self, group: Group) -> Statistics:
        device = self.device if self.device is not None and group.block is not None else group.weights[0].device
        return Statistics(self.needs, group.weights[0].columns, device)

    def _listen(self, group: Group, sums: Statistics, batch: list[int], stack: contextlib.ExitStack) -> None:
        for site in group.sites:

            def read(module: nn.Module, args: tuple, kwargs: dict, site=site) -> None:
                x = site.read(args, kwargs)
                mask = self.tokens[batch[0]].of(tuple(x.shape)) if group.rows_are_tokens else None
                sums.add(site.rows(x), batch[0], mask, routed=not group.rows_are_tokens)

            hooked(stack, site.module.register_forward_pre_hook(read, with_kwargs=True))
        if group.around is not None:

            def zero_padding(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
                tokens = self.tokens[batch[0]]
                found = token_input((args, kwargs), tokens)
                mask = None if found is None else tokens.of(tuple(found[1].shape))
                if mask is None:
                    return None
                x = found[1]
                clean = x.masked_fill(~mask.to(x.device).reshape(x.shape[:2] + (1,) * (x.dim() - 2)), 0)
                return mapped(lambda leaf: clean if leaf is x else leaf, (args, kwargs))

            hooked(stack, group.around.register_forward_pre_hook(zero_padding, with_kwargs=True))

    def _finished(self, stage: Stage, sums: list[Statistics]) -> dict[str, dict[str, Tensor]]:
        for each in sums:
            each.reduce()
        if not self._within(stage):
            self.reached = set()
        for group, each in zip(stage.groups, sums, strict=True):
            self.reached |= {weight.name for weight in group.weights} if each.tokens else set()
        found = {}
        for group, each in zip(stage.groups, sums, strict=True):
            name = group.weights[0].name
            if (batch := each.not_finite()) is not None:
                where = f"batch {batch}" if batch >= 0 else "a batch of another rank"
                raise ValueError(
                    f"Expected finite inputs of {name}, got NaN or inf in {where} of calibration=; leave that batch "
                    "out, or run the model in bfloat16 or float32."
                )
            count = int(each.tokens)
            if not count and not _is_expert(name, self.reached):
                raise ValueError(
                    f"Expected calibration= to reach every chosen weight, got no token for {name}; give batches that "
                    "use it, or leave it out with weights=."
                )
            if count < (each.columns if each.gram is not None else FEW):
                self.few |= dict.fromkeys((weight.name for weight in group.weights), count)
            stats = each.finish()
            found |= {weight.name: stats for weight in group.weights}
        return found

    def measure(self) -> dict[str, dict[str, Tensor]]:
        """By name, the statistics of all weights at once, in the model as it is: of one pass over the batches."""
        with inference(self.model):
            calls, outside = self._trace([], None)
        self.inputs = BlockInputs(self.model, calls, self.calibration, Shelf(None))
        return self.collect(Stage("", self.weights, outside, walk=self))

    # ---- whole blocks

    @contextlib.contextmanager
    def block(self, stage: Stage, views: dict[str, View], edits: dict[str, Edit]) -> Iterator[BlockView]:
        k, targets = stage.call, []
        module, shelf = self.inputs.calls[k].module, self.inputs.shelf
        self._run_block(k, [], lambda k, b, output: targets.append(mapped(shelf.put, output)))
        mine = [*(old for old in self.decided if old.call == k), stage]
        with inference(self.model), substituted(self._values(mine)), copied_to(module, self.device):
            owners = {w.name: w.owners[0] for old in mine for w in old.weights}
            paths = {id(part): path for path, part in module.named_modules()}
            names = {name: f"{paths[id(m)]}.{attribute}".lstrip(".") for name, (m, attribute) in owners.items()}
            yield BlockView(
                stage.name,
                module,
                _Again(lambda: (self.inputs.arguments(k, b) for b in range(len(self.tokens)))),
                _Again(lambda: (mapped(lambda put: put(), target) for target in targets)),
                views,
                edits,
                names,
                frozenset(w.name for old in mine for w in old.weights if w.transposed),
                [tokens.masks[0] if tokens.masks else None for tokens in self.tokens],
            )


class _Again:
    """An iterable that can be iterated as often as needed."""

    def __init__(self, make: Callable[[], Iterator]) -> None:
        self.make = make

    def __iter__(self) -> Iterator:
        return self.make()


def _is_expert(name: str, reached: set[str]) -> bool:
    """Whether a weight that saw no token has twins, its name but for one number, that did."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            before, after = ".".join(parts[:i]), ".".join(parts[i + 1 :])
            if any(_differs_at(other, before, after) for other in reached):
                return True
    return False


def _differs_at(name: str, before: str, after: str) -> bool:
    middle = name[len(before) + 1 : len(name) - len(after) - 1]
    return name.startswith(before + ".") and name.endswith("." + after) and middle.isdecimal()
