"""The decisions of a method that reads calibration: stage by stage of `calibration.Walk`, each seeing those before."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration import Calibration, Stage, Walk, Weight
from ..calibration.finished import Finished, digest
from ..sparsifiers import Edit, Sparsifier, View
from ..sparsifiers.sparsifier import CALIBRATION
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
            if done:
                error.add_note(
                    f"sten: {len(done)} blocks are sparse and complete ({listed(done)}); all other weights are dense, "
                    "as they were. Call sten.sparsify again for those, with weights= or Calibration(folder=...)."
                )
            raise

    def _choose(self, targets, sparsifier, view_of, choose, pack, done: list[str]) -> None:
        by_name = {target.name: target for target in targets}
        rebuild = getattr(sparsifier, "reconstruct", None)
        walk = Walk(self.model, self.weights(targets), self.calibration, sparsifier.needs & CALIBRATION)
        finished = None
        if self.calibration.folder is not None:
            finished = Finished(self.calibration.folder, self.calibration, repr(sparsifier))
        views: dict[str, View] = {}
        edits: dict[str, Edit] = {}
        block: list[Target] = []
        for stage in walk:
            mine = [by_name[weight.name] for weight in stage.weights]
            fresh = {target.name: view_of(target) for target in mine}
            dense = {name: view.weight for name, view in fresh.items()}
            known = None
            if finished is not None:
                finished.begin(text for view in fresh.values() for text in _settings(view))
                known = finished.read(dense)
            if known is None:
                views |= self._measured(stage, fresh)
                edits |= {target.name: choose(target, views[target.name]) for target in mine}
            else:
                views, edits = views | fresh, edits | known
            block += mine
            for target in mine:
                pack(target, views[target.name], edits[target.name])
            stage.values = {target.name: _dense_of(target) for target in mine}
            whole = stage.ends_block or stage.call is None
            if rebuild is not None and stage.ends_block and known is None:
                with stage.block(views, edits) as seen:
                    changed = rebuild(seen)
                for target in (target for target in block if target.name in changed):
                    edits[target.name] = changed[target.name]
                    pack(target, views[target.name], edits[target.name])
            if finished is not None:
                results = {target.name: _stored(target) for target in mine}
                finished.write(dense, {target.name: edits[target.name] for target in mine}, results)
            if not whole:
                continue
            if self.commit is not None:
                self.commit(block)
                stage.committed = True
                done.append(stage.name)
            views, edits, block = {}, {}, []
        if walk.few:
            names = listed([f"{name} ({count})" for name, count in walk.few.items()])
            warnings.warn(
                f"sten: few tokens of calibration= reached {names}; what is decided for them may be poor: give more "
                "batches.",
                stacklevel=2,
            )

    def _measured(self, stage: Stage, views: dict[str, View]) -> dict[str, View]:
        """The views with their statistics, on the device where these were made."""
        stats = stage.collect()
        return {
            name: dataclasses.replace(view, weight=view.weight.to(stats[name]["tokens"].device), stats=stats[name])
            for name, view in views.items()
        }


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
    allowed = "" if view.allowed is None else digest(view.allowed)
    return [view.name, str(view.layout), str(view.sparsity), allowed]
