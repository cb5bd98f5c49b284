"""permute: channels between layers in an order in which a layout keeps more, while the model computes the same."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._torch_private import tree_leaves, tree_map
from ..calibration.data import Calibration, calibration_of, inference, run_batch
from ..sparsifiers.allocation import Allocation, allocation
from ..sparsifiers.precision import in_float32
from ..training.inference_mode import ordinary_tensors
from ..training.optimizer_checks import expect_elementwise, expect_slots, optimizers_of
from ..training.trained_weight import optimizer_slots
from ..training.uninterrupted import uninterrupted
from .arguments import Layouts, Weights, expect_layouts
from .channel_trace import follow
from .channels import Channels, Member, Space
from .input_statistics import Inputs, input_statistics
from .permutation_search import Scored, search
from .recipe import DEFAULT, Recipe, recipe_of
from .record import known_optimizers
from .select import Target, expect_model, select
from .sites import sites_of

Optimizers = Optimizer | Iterable[Optimizer] | None
EXAMPLE_ROWS, EXAMPLE_TOKENS = 2, 16  # of a batch of calibration, as an example
TINY = 1e-12  # the least share of a score that is divided by


@dataclass(frozen=True)
class PermuteRow:
    """One weight: the share of its score that its layout keeps, before and after, and why rows or columns stayed.

    The score is w^2, times the mean square of the input where `calibration` was given; for blocks, rows that can move
    are weighted by what their channels are worth to the layers that read them. The errors are those of the layer's own
    output, |X (W - Wp)^T| / |X W^T|, when the entries with the lowest scores, without these weights, are dropped.
    """

    name: str
    layout: str
    kept_before: float
    kept_after: float
    error_before: float | None
    error_after: float | None
    rows: str
    columns: str


@dataclass(frozen=True)
class PermuteReport:
    """What `permute` did to each weight; print it.

    Attributes:
        rows: one for each weight that the layouts are meant for.
    """

    rows: list[PermuteRow]

    def __str__(self) -> str:
        cells = [["weight", "layout", "score kept", "output error", "rows", "columns"]]
        for r in self.rows:
            error = "" if r.error_before is None else f"{r.error_before:.4f} -> {r.error_after:.4f}"
            cells.append([r.name, r.layout, f"{r.kept_before:.4f} -> {r.kept_after:.4f}", error, r.rows, r.columns])
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


@ordinary_tensors
def permute(
    model: nn.Module,
    layout: Layouts | Recipe | None = None,
    sparsity: float | Allocation | None = None,
    weights: Weights = None,
    calibration: Calibration | Iterable | None = None,
    example: Any = None,
    optimizer: Optimizers = None,
) -> PermuteReport:
    """Reorder channels inside a dense model, in place, so that `sparsify` with these arguments keeps more of it.

    The model computes the same to rounding, and costs the same: hidden channels of an MLP (rows of gate and up, columns
    of down), value channels within each attention head (rows of v, columns of o), channels between convolutions, with
    their biases and norms. They are found by running the model once and following each channel to the layers that read
    it, not by names. Where channels cannot move (the residual stream, queries and keys, tied weights), the report says
    why. The order is searched for by exchanges; no weight keeps less of its score (`PermuteRow`) than before. For
    layouts that choose entry by entry (CSR, Masked) the order does not matter, and nothing changes.

    Call it on a dense model, before `sparsify`. All or nothing: after an error the model is as it was.

    Args:
        model: any nn.Module with dense weights.
        layout, sparsity, weights: as in `sparsify`; `layout` may be a `sten.Recipe`.
        calibration: batches, as in `sparsify`: the score is then w_ij^2 * mean(x_j^2) in place of w^2, the order does
            not depend on how channels are scaled between layers, and the report has output errors.
        example: one batch to run the model on. Default: from `calibration`, or the model's `dummy_inputs`, or made for
            its first layer. Channels that a layer which it does not call may read stay where they are.
        optimizer: one or a list, whose state of the weights moves along. Left out, state that exists is in the wrong
            order afterwards.

    Returns:
        A `PermuteReport`.

    Raises:
        ValueError, TypeError: what `sparsify` would raise; no example that the model runs on; weights that are sparse
            already; state of an optimizer that cannot move along; a model whose output changed, which is undone.

    Example:
        >>> import torch, sten
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> x = torch.randn(3, 16)
        >>> before = model(x)
        >>> report = sten.permute(model, sten.VectorNM(2, 4, v=8), weights="2")
        >>> report.rows[0].columns, report.rows[0].kept_after > report.rows[0].kept_before
        ('permuted', True)
        >>> torch.allclose(model(x), before, atol=1e-6)
        True

    Source: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021 (exchanges between groups).
    """
    expect_model(model)
    recipe = recipe_of(layout, DEFAULT, sparsity, weights)
    if recipe.site != "weight":
        raise ValueError(f"Expected a Recipe for weights for sten.permute, got one for site={recipe.site!r}.")
    if sites := sites_of(model):  # thresholds and blocks belong to channels where they are
        raise ValueError(f"Expected a model without sites, got one with {sites[0]}; call sten.permute before.")
    spread = allocation(recipe.sparsity)
    targets, _ = select(model, expect_layouts(recipe.layout, recipe.sparsifier, spread), recipe.weights)
    for target in targets:
        if target.stored is not None or target.mask is not None:
            raise ValueError(f"Expected a dense model, got {target.name}, which is pruned; call sten.permute before.")
    given, optimizers = calibration_of(calibration), _optimizers(model, targets, optimizer)
    done: list[tuple[Space, Tensor]] = []
    with inference(model):
        try:
            return _permute(model, targets, spread, given, example, optimizers, done)
        except BaseException:
            with uninterrupted():
                for space, order in reversed(done):
                    _apply(space, torch.argsort(order), optimizers)
            raise


def _optimizers(model: nn.Module, targets: list[Target], optimizer: Optimizers) -> list[Optimizer]:
    """Those given, and those that the weights had before they became dense; with state that can move along."""
    known = [o for t in targets for module, name in t.owners for o in known_optimizers(module, name)]
    found = list({id(o): o for o in [*(optimizers_of(optimizer) or []), *known]}.values())
    for one in found:
        expect_elementwise(one)
        for name, param in model.named_parameters():
            expect_slots(name, param, one)
    return found


def _permute(
    model: nn.Module,
    targets: list[Target],
    spread: Allocation | None,
    given: Calibration | None,
    example: Any,
    optimizers: list[Optimizer],
    done: list,
) -> PermuteReport:
    inputs = {} if given is None else input_statistics(model, targets, given)
    example = _example(model, given) if example is None else example
    channels, out = follow(model, lambda: _expect_runs(model, example))
    before = [_outputs(out), _of_first_batch(model, given)]
    sparsities = _sparsities(targets, spread, inputs)
    by_id = {id(target.tensor): target for target in targets}
    spaces = channels.spaces()
    worth = _worth(spaces, by_id, inputs)
    first = {t.name: _kept(t, sparsities, inputs, worth) for t in targets}
    remarks: dict[tuple[str, int], str] = {}
    for space in spaces:
        members = [(by_id[id(m.tensor)], m) for m in space.members if id(m.tensor) in by_id]
        device = space.members[0].tensor.device
        group, order = space.group.to(device), None
        if members and len(members) == len({t.name for t, _ in members}):
            problem = [
                Scored(_score(t, inputs, worth).to(device), t.layout, sparsities[t.name], _dim(t, m), m.at.to(device))
                for t, m in members
            ]
            with in_float32(device):
                order = search(problem, group).cpu()
        moved = order is not None and bool((order != torch.arange(len(order))).any())
        for target, member in members:
            remarks[target.name, _dim(target, member)] = "permuted" if moved else "no better order"
        if moved:
            with uninterrupted():
                _apply(space, order, optimizers)
                done.append((space, order))
            for member in space.members:
                _move_statistics(inputs, worth, targets, member, order)
    changed = {t.name for t in targets if "permuted" in (remarks.get((t.name, 0)), remarks.get((t.name, 1)))}
    if done:
        after = [_outputs(run_batch(model, example, 0)), _of_first_batch(model, given)]
        _expect_same(model, [*before[0], *before[1]], [*after[0], *after[1]])
    rows = []
    for t in targets:
        kept, error = _kept(t, sparsities, inputs, worth) if t.name in changed else first[t.name]
        why = [remarks.get((t.name, d)) or _why_not(channels, t, d) for d in (0, 1)]
        rows.append(PermuteRow(t.name, str(t.layout), first[t.name][0], kept, first[t.name][1], error, *why))
    return PermuteReport(rows)


def _apply(space: Space, order: Tensor, optimizers: list[Optimizer]) -> None:
    """Slot s of every member gets channel order[s]; all is computed before the first write."""
    new: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for m in space.members:
            slots = [o.state[m.tensor][key] for o in optimizers for key in optimizer_slots(m.tensor, o)]
            for t in (m.tensor, m.tensor.grad, *slots):
                if t is not None:
                    _, moved = new.get(id(t), (t, t))  # channels may be rows and columns of one weight
                    new[id(t)] = t, moved.index_select(m.dim, _index(m, order).to(t.device))
        for t, moved in new.values():
            t.copy_(moved)


def _index(member: Member, order: Tensor) -> Tensor:
    index = torch.arange(member.tensor.shape[member.dim])
    index[member.at] = member.at[order]
    return index


def _dim(target: Target, member: Member) -> int:
    """Rows (0) or columns (1) in the orientation of the layout."""
    return 1 - member.dim if target.transposed else member.dim


def _move_statistics(
    inputs: dict[str, Inputs], worth: dict[str, Tensor], targets: list[Target], member: Member, order: Tensor
) -> None:
    for target in targets:
        if target.tensor is member.tensor and _dim(target, member) == 0:
            worth[target.name] = worth[target.name][_index(member, order).to(worth[target.name].device)]
        elif target.tensor is member.tensor and target.name in inputs:
            index = _index(member, order).to(inputs[target.name].square.device)
            columns = torch.arange(len(inputs[target.name].square), device=index.device)
            inputs[target.name].reorder(columns.view(len(index), -1)[index].flatten())


def _worth(spaces: list[Space], by_id: dict[int, Target], inputs: dict[str, Inputs]) -> dict[str, Tensor]:
    """By name, a factor for each row, by which the rows of a channel count as much as the columns that read it.

    A row's own score does not say what its channel is worth: a small one may be read by large weights. Sorted by their
    own scores, such rows gather in blocks that are dropped, and the channel is lost. What a channel is worth is the
    score of its columns, as a share of the whole; the sum of a weight's scores stays the same. Layouts of a fixed rate
    keep some of any few neighbours: no channel is lost, and rows count by their own scores, by which masks are chosen.
    """
    worth = {t.name: torch.ones(t.shape[1 if t.transposed else 0], device=t.tensor.device) for t in by_id.values()}
    for space in spaces:
        for maker in space.members:
            target = by_id.get(id(maker.tensor))
            if (
                target is None
                or _dim(target, maker) != 0
                or target.layout.rate is not None
                or target.layout.unstructured
            ):
                continue
            at = maker.at.to(maker.tensor.device)
            own = _score(target, inputs).flatten(1).sum(1)[at].sum(1)
            read = torch.zeros_like(own)
            for reader in space.members:
                if reader.reads:
                    read += _read(reader, by_id.get(id(reader.tensor)), inputs, own)
            if bool(read.isfinite().all()) and float(read.sum()) > 0:
                share = own / own.sum().clamp(min=TINY)
                worth[target.name][at] = (read / read.sum() / share.clamp(min=TINY))[:, None]
    return worth


def _read(reader: Member, target: Target | None, inputs: dict[str, Inputs], own: Tensor) -> Tensor:
    """Of a layer's score, the share of the columns of each channel."""
    w = reader.tensor.detach()
    score, dim = (w.float().square(), reader.dim) if target is None else (_score(target, inputs), 1)
    sums = score.movedim(dim, 0).flatten(1).sum(1)[reader.at.to(w.device)].sum(1).to(own.device)
    if target is None or target.name not in inputs:
        sums = sums * own  # not measured: the row's score stands for the mean square of the channel
    return sums / sums.sum().clamp(min=TINY)


def _score(target: Target, inputs: dict[str, Inputs], worth: dict[str, Tensor] | None = None) -> Tensor:
    """w^2, times the mean square of the input and what the row is worth, in the orientation of the layout."""
    w = target.tensor.detach()
    score = (w.t() if target.transposed else w).float().square()
    if target.name in inputs:
        score = score * inputs[target.name].square.to(score.device).view(1, *score.shape[1:])
    return score if worth is None else score * worth[target.name].view(-1, *[1] * (score.dim() - 1))


def _kept(
    target: Target, sparsities: dict[str, float | None], inputs: dict[str, Inputs], worth: dict[str, Tensor]
) -> tuple[float, float | None]:
    """The share of the score that the layout keeps, and the relative error of the layer's output."""
    score = _score(target, inputs, worth)
    mask = target.layout.mask(score, sparsities[target.name])
    total = float(score.sum(dtype=torch.float64))
    if not math.isfinite(total):
        raise ValueError(f"Expected finite numbers in {target.name}, got NaN or inf.")
    kept = float(score.masked_fill(~mask, 0).sum(dtype=torch.float64)) / total if total else 1.0
    if target.name not in inputs:
        return kept, None
    w = target.tensor.detach().float()
    w, x = (w.t() if target.transposed else w), inputs[target.name].sample.to(w.device)
    mask = target.layout.mask(_score(target, inputs), sparsities[target.name])  # as a method would choose it
    with in_float32(w.device):
        whole, lost = (float((x @ v.flatten(1).T).norm()) for v in (w, w.masked_fill(mask, 0)))
    return kept, lost / whole if whole else 0.0


def _sparsities(targets: list[Target], spread: Allocation | None, inputs) -> dict[str, float | None]:
    shapes = {t.name: t.shape[::-1] if t.transposed else t.shape for t in targets if t.layout.rate is None}
    by_name = {t.name: t for t in targets}
    counts = {} if spread is None else spread.assign(shapes, lambda name: _score(by_name[name], inputs))
    return {t.name: 1 - counts[t.name] / math.prod(t.shape) if t.name in counts else None for t in targets}


def _why_not(channels: Channels, target: Target, dim: int) -> str:
    why = channels.why_not(target.tensor, 1 - dim if target.transposed else dim)
    return f"stay: {why or 'no two channels are treated alike'}"


# ---- the example


def _example(model: nn.Module, given: Calibration | None) -> Any:
    if given is not None:
        first = given.batches[0]
        return tree_map(_smaller, dict(first) if isinstance(first, Mapping) else first)
    dummy = getattr(model, "dummy_inputs", None)
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)) or _is_conv(m)), None)
    weight = next(model.parameters())
    make = {"device": weight.device, "dtype": weight.dtype}
    random = torch.Generator().manual_seed(0)
    if _is_conv(first):
        size = getattr(getattr(model, "config", None), "image_size", None) or 32
        size = list(size) if isinstance(size, (list, tuple)) else [size] * (first.weight.dim() - 2)
        return torch.randn(2, first.in_channels, *size, generator=random).to(**make)
    if isinstance(dummy, dict):
        return tree_map(lambda t: t.to(weight.device) if isinstance(t, Tensor) else t, dummy)
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, (2, 5), generator=random).to(weight.device)
    if first is not None:
        return torch.randn(3, first.in_features, generator=random).to(**make)
    raise ValueError("Expected example=, a batch that the model can be called with, got none.")


def _is_conv(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _smaller(value: Any) -> Any:
    """A few rows and, of numbers of tokens, a few tokens."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    value = value[:EXAMPLE_ROWS]
    return value if value.is_floating_point() or value.dim() != 2 else value[:, :EXAMPLE_TOKENS]


def _expect_runs(model: nn.Module, example: Any) -> Any:
    try:
        return run_batch(model, example, 0)
    except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"Expected an example that the model can be called with, got {type(error).__name__}: {error}; pass one as "
            "example=."
        ) from error


def _outputs(out: Any) -> list[Tensor]:
    return [t.clone() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def _of_first_batch(model: nn.Module, given: Calibration | None) -> list[Tensor]:
    """Of the whole batch: the example may be too small for some branches."""
    return [] if given is None else _outputs(run_batch(model, given.batches[0], 0))


def _expect_same(model: nn.Module, before: list[Tensor], after: list[Tensor]) -> None:
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    for a, b in zip(before, after, strict=True):
        if not torch.allclose(a.float(), b.float(), rtol=0, atol=eps**0.5 * float(a.abs().max()), equal_nan=True):
            raise ValueError(
                "Expected the same outputs after the permutation, got others: the model is not deterministic in eval "
                "mode, or it does what sten.permute does not see; nothing was changed."
            )
