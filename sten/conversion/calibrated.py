"""The decisions of a method that reads calibration: stage by stage of `calibration.Walk`, each seeing those before."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration import BlockView, Calibration, Stage, Walk, Weight
from ..calibration.finished import Finished
from ..sparsifiers import Edit, Sparsifier, View
from ..sparsifiers.sparsifier import CALIBRATION
from ..training.distributed import agreed, everywhere, from_rank_0
from ..training.reminders import listed
from .select import Target


@dataclass(frozen=True)
class Calibrated:
    """A model with its calibration.

    Attributes:
        commit: writes targets that are decided; None: they are written at the end.
    """

    model: nn.Module
    calibration: Calibration
    commit: Callable[[list[Target]], None] | None = None

    def weights(self, targets: list[Target]) -> list[Weight]:
        return [_weight(target) for target in targets]

    def measure(self, targets: list[Target], needs: frozenset[str]) -> dict[str, dict[str, Tensor]]:
        """The statistics of all targets in the model as it is, for an allocation that compares their scores: norms in
        the place of Gram matrices, which would not fit in memory together."""
        needs = needs - {"x_gram"} | ({"x_norm"} if "x_gram" in needs else set())
        return Walk(self.model, self.weights(targets), self.calibration, needs & CALIBRATION).measure()

    def choose(
        self,
        targets: list[Target],
        sparsifier: Sparsifier,
        view_of: Callable[[Target], View],
        choose: Callable[[Target, View], Edit],
        pack: Callable[[Target, View, Edit], None],
    ) -> None:
        """Set `result` of every target: `view_of` makes its View, `choose` decides, and `pack` stores the decision.

        Raises:
            ValueError: with the number of blocks that are written, if those of `commit` are.
        """
        done: list[str] = []
        try:
            self._choose(targets, sparsifier, view_of, choose, pack, done)
        except BaseException as error:
            folder = self.calibration.folder
            if done:
                error.add_note(
                    f"sten: {len(done)} blocks are sparse and complete ({listed(done)}); all other weights are dense, "
                    "as they were. Call sten.sparsify again for those, with weights= or Calibration(folder=...)."
                )
            if folder is not None and any(Path(folder).glob("stage-*")):
                error.add_note(f"sten: what was decided is in {str(folder)!r}; the same call again goes on from there.")
            raise

    def _choose(self, targets, sparsifier, view_of, choose, pack, done: list[str]) -> None:
        by_name = {target.name: target for target in targets}
        weights, finished = self.weights(targets), None
        walk = Walk(self.model, weights, self.calibration, sparsifier.needs & CALIBRATION)
        if self.calibration.folder is not None:
            finished = Finished(self.model, weights, self.calibration, repr(sparsifier))
        block = _Block(getattr(sparsifier, "reconstruct", None), pack, finished)
        with contextlib.closing(iter(walk)) as stages:
            for stage in stages:
                mine = [by_name[weight.name] for weight in stage.weights]
                views = {target.name: view_of(target) for target in mine}
                edits = block.known(views)
                if edits is None:
                    views = self._measured(stage, views)
                    edits = {target.name: choose(target, views[target.name]) for target in mine}
                block.add(mine, views, edits)
                stage.values = {target.name: _dense_of(target) for target in mine}
                if stage.ends_block:
                    block.finish(stage)
                    if self.commit is not None:
                        self.commit(block.targets)
                        stage.committed = True
                        done.append(stage.name)
                    block.clear()
        if walk.few:
            fewest = sorted(walk.few.items(), key=lambda pair: pair[1])
            names = listed([f"{name} ({count})" for name, count in fewest])
            warnings.warn(
                f"sten: few tokens of calibration= reached {names}; what is decided for them may be poor: give more "
                "batches.",
                stacklevel=2,
            )

    def _measured(self, stage: Stage, views: dict[str, View]) -> dict[str, View]:
        """The views with their statistics, on the device where these were made."""
        stats = stage.collect()
        return {name: _on_device_of(view, stats[name]) for name, view in views.items()}


def _on_device_of(view: View, stats: dict[str, Tensor]) -> View:
    """The view with its statistics, on their device."""
    device = stats["tokens"].device
    allowed, left = (None if mask is None else mask.to(device) for mask in (view.allowed, view.left))
    return dataclasses.replace(view, weight=view.weight.to(device), allowed=allowed, left=left, stats=stats)


class _Block:
    """What is decided of one block; it has several stages with `true_sequential`.

    Attributes:
        targets: of its stages so far, packed.
        all_known: whether all stages so far were found in files. Their decisions are those at the end of the block, so
            that they hold for all stages or for none.
    """

    def __init__(
        self,
        rebuild: Callable[[BlockView], dict[str, Edit]] | None,
        pack: Callable[[Target, View, Edit], None],
        finished: Finished | None,
    ) -> None:
        self.rebuild, self.pack, self.finished = rebuild, pack, finished
        self.clear()

    def clear(self) -> None:
        self.targets: list[Target] = []
        self.views: dict[str, View] = {}
        self.edits: dict[str, Edit] = {}
        self.files: list[tuple[Path, str, list[str]]] = []
        self.all_known = True

    def known(self, views: dict[str, View]) -> dict[str, Edit] | None:
        """The decisions of the next stage, where a file has them."""
        if self.finished is None:
            self.all_known = False
            return None
        self.finished.begin(text for view in views.values() for text in _settings(view))
        self.files.append((self.finished.path, self.finished.key, list(views)))
        edits = self.finished.read(views) if self.all_known else None
        device = next(iter(views.values())).weight.device if views else torch.device("cpu")
        self.all_known = not everywhere(edits is None, device)  # the ranks collect statistics together
        return edits if self.all_known else None

    def add(self, targets: list[Target], views: dict[str, View], edits: dict[str, Edit]) -> None:
        self.targets += targets
        self.views |= views
        self.edits |= edits
        for target in targets:
            self.pack(target, views[target.name], edits[target.name])

    def finish(self, stage: Stage) -> None:
        """Change the block as a whole, if the method does, and write the files, the first one last."""
        if self.all_known:
            return
        if self.rebuild is not None and stage.call is not None:
            with stage.block(self.views, self.edits) as block:
                changed = self.rebuild(block)
            for target in self.targets:
                self.edits[target.name] = _agreed(changed.get(target.name, self.edits[target.name]))
                self.pack(target, self.views[target.name], self.edits[target.name])
        results = {target.name: _stored(target) for target in self.targets} if self.files else {}
        for path, key, names in reversed(self.files):
            self.finished.write(
                path, key, {name: (self.views[name], self.edits[name], results[name]) for name in names}
            )


def _agreed(edit: Edit) -> Edit:
    """Of an edit that each rank has fitted to its own batches, rank 0's."""
    return dataclasses.replace(edit, mask=agreed(edit.mask), value=from_rank_0(edit.value))


def _weight(target: Target) -> Weight:
    shape = target.shape[::-1] if target.transposed else target.shape
    columns = int(torch.Size(shape[1:]).numel())
    return Weight(target.name, target.owners, target.transposed, columns, target.tensor.device)


def _stored(target: Target) -> Tensor:
    """What a target becomes, dense, in the orientation of the layout."""
    dense = target.result.to_dense()
    return dense.t() if target.transposed else dense


def _dense_of(target: Target) -> Callable[[], Tensor]:
    return lambda: target.result.to_dense().contiguous()


def _settings(view: View) -> list[str]:
    """What a decision follows from, beside the method, the batches and the weight."""
    return [view.name, str(view.layout), str(view.sparsity)]
