"""sensitivity: what each weight costs the model in each candidate layout and sparsity, and the best choice of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._torch_private import tree_leaves
from ..calibration import Calibration, Walk
from ..calibration.data import Tokens, calibration_of, inference, run_batch
from ..calibration.substitute import substituted
from ..layouts import Masked
from ..layouts.base import Layout
from ..markup import Tabular
from ..sparsifiers import Sparsifier, View, Wanda
from ..sparsifiers.allocation import Uniform
from ..sparsifiers.per_weight import PerWeight
from ..sparsifiers.precision import in_float32
from ..sparsifiers.sparsifier import CALIBRATION
from ..tensor import SparseTensor
from ..training.distributed import from_rank_0, ranks
from ..training.inference_mode import ordinary_tensors
from ..training.reminders import listed
from .arguments import Weights
from .calibrated import Calibrated
from .knapsack import knapsack
from .recipe import Recipe
from .select import Target, expect_model, select

Candidate = tuple[Layout | None, float | None]
CHUNK = 128  # tokens whose logits are compared at a time


@dataclass(frozen=True)
class Measured:
    """One weight in one candidate.

    Attributes:
        name: of the weight.
        layout: None: dense.
        sparsity: the fraction to drop, where the layout has no rate.
        entries, bytes: that are stored.
        error: of the layer's output, |X (W - Wp)^T|^2 / |X W^T|^2.
        effect: the part of the model's change that this error is held responsible for.
        seconds: of the product, where it was timed.
    """

    name: str
    layout: Layout | None
    sparsity: float | None
    entries: int
    bytes: int
    error: float
    effect: float
    seconds: float | None = None

    def __str__(self) -> str:
        given = "" if self.sparsity is None else f" {self.sparsity:g}"
        return f"{'dense' if self.layout is None else self.layout}{given}"


@dataclass(frozen=True)
class Sensitivity(Tabular):
    """The table of `sten.sensitivity`; print it, or `choose` from it.

    Attributes:
        rows: one for each weight and candidate.
        sizes: entries of each dense weight.
        sparsifier: that the errors were measured with.

    Example:
        >>> import torch, sten
        >>> layer = torch.nn.Linear(16, 8)
        >>> table = sten.sensitivity(layer, [sten.NM(2, 4), None], [torch.randn(64, 16)])
        >>> table.choose(sparsity=0.5).layout, table.choose(bytes=512).layout
        ({'weight': NM(n=2, m=4)}, {'weight': None})
    """

    rows: list[Measured]
    sizes: dict[str, int]
    sparsifier: Sparsifier

    def header(self) -> list[str]:
        return ["effect of", *dict.fromkeys(map(str, self.rows))]

    def cells(self) -> list[list[str]]:
        table = []
        for name, rows in self._by_name().items():
            found = {str(row): f"{row.effect:.3g}" for row in rows}
            table.append([name, *(found.get(title, "-") for title in self.header()[1:])])
        return table

    def records(self) -> list[dict[str, Any]]:
        """A dictionary of each weight in each candidate."""
        return [vars(row) | {"layout": str(row.layout or "dense")} for row in self.rows]

    def choose(self, sparsity: float | None = None, bytes: int | None = None, seconds: float | None = None) -> Recipe:
        """The candidate of each weight with the least effect in total, within one budget.

        Args:
            sparsity: at least this fraction of all entries is dropped.
            bytes: the weights have at most so many bytes together.
            seconds: their products take at most so long together, as `sensitivity(tokens=...)` has timed them.

        Returns:
            A `sten.Recipe` with these layouts, sparsities and the sparsifier, for `sten.sparsify(model, recipe, ...)`.

        Raises:
            ValueError: no budget or several; one that no choice meets; seconds that were not measured.
        """
        given = {k: v for k, v in {"sparsity": sparsity, "bytes": bytes, "seconds": seconds}.items() if v is not None}
        if len(given) != 1:
            raise ValueError(f"Expected one of sparsity=, bytes= and seconds=, got {sorted(given) or 'none'}.")
        [(kind, budget)] = given.items()
        if not isinstance(budget, (int, float)) or isinstance(budget, bool):
            raise TypeError(f"Expected a number for {kind}=, got {budget!r}.")
        if kind == "sparsity":
            kind, budget = "entries", math.floor((1 - Uniform(sparsity).sparsity) * sum(self.sizes.values()) + 1e-6)
        if kind == "seconds" and any(row.seconds is None for row in self.rows):
            raise ValueError("Expected a table with times for seconds=, got none; call sten.sensitivity with tokens=.")
        groups = list(self._by_name().values())
        costs = [[getattr(row, kind) for row in rows] for rows in groups]
        if not (least := sum(map(min, costs))) <= budget:
            raise ValueError(self._too_little(kind, least, next(iter(given.values()))))
        chosen = knapsack(costs, [[row.effect for row in rows] for rows in groups], budget).chosen
        rows = [rows[k] for rows, k in zip(groups, chosen, strict=True)]
        sparsities = {row.name: row.sparsity for row in rows if row.sparsity is not None}
        layouts = {row.name: row.layout for row in rows}
        return Recipe(layouts, self.sparsifier, PerWeight(sparsities) if sparsities else None)

    def _too_little(self, kind: str, least: float, given: float) -> str:
        """The sentence for a budget that no choice meets."""
        if kind == "entries":
            most = math.floor((1 - least / sum(self.sizes.values())) * 1e4) / 1e4
            return f"Expected sparsity= of at most {most:g}, that of the sparsest candidates, got {given:g}; add more."
        shown = f"{least:.3g}" if kind == "seconds" else f"{least}"
        best = "fastest candidates take" if kind == "seconds" else "smallest candidates have"
        return f"Expected {kind}= of at least {shown}, what the {best} together, got {given:g}; add more."

    def _by_name(self) -> dict[str, list[Measured]]:
        found: dict[str, list[Measured]] = {}
        for row in self.rows:
            found.setdefault(row.name, []).append(row)
        return found


@ordinary_tensors
def sensitivity(
    model: nn.Module,
    candidates: Sequence[Layout | Candidate | None],
    calibration: Calibration | Iterable,
    sparsifier: Sparsifier | None = None,
    weights: Weights = None,
    effect: Callable[[Any, Any], float | Tensor] | None = None,
    tokens: int | None = None,
) -> Sensitivity:
    """Measure what each weight costs in each candidate layout and sparsity; `choose` then finds the best for a budget.

    Of each weight alone, pruned by `sparsifier` in each candidate, the relative squared error of the layer's output is
    measured on the calibration batches, block by block. Errors of weights on one input (q, k, v; gate, up) can be
    compared, those of others cannot: an error of the values in attention costs more than as large a one in an MLP. So
    the weights on each input are pruned alone, too, in the candidate of median density, and their errors are scaled to
    what that changes in the model's outputs (on the first batch). The model is not changed.

    Args:
        model: any nn.Module with dense weights.
        candidates: layouts with a rate, (layout, sparsity) pairs for those without, and None for dense. One that a
            weight's shape does not allow is left out for that weight.
        calibration: batches, as in `sparsify`. The first one runs once more for each input of weights: a small one
            saves time.
        sparsifier: any method that acts once. Default: `sten.Wanda()`.
        weights: as in `sparsify`.
        effect: (outputs of the dense model, outputs) -> how far they are apart. Default: the mean Kullback-Leibler
            divergence where the outputs have `logits`, else the relative squared error.
        tokens: also time the product of each weight with an input of so many tokens, where it lies.

    Raises:
        ValueError, TypeError: candidates, weights or batches that cannot be meant.

    Example:
        >>> import torch, sten
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        >>> batches = [torch.randn(64, 16)]
        >>> table = sten.sensitivity(model, [sten.NM(2, 4), (sten.CSR(), 0.75), None], batches)
        >>> recipe = table.choose(sparsity=0.5)
        >>> model = sten.sparsify(model, recipe, calibration=batches)

    Source: the choice as a knapsack, Mazur et al., ROCKET, 2026.
    """
    expect_model(model)
    method = Wanda() if sparsifier is None else sparsifier
    if not isinstance(method, Sparsifier) or not method.acts_once or getattr(method, "reconstruct", None):
        raise ValueError(f"Expected a method that decides once, weight by weight, such as sten.Wanda(), got {method}.")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ValueError(f"Expected tokens= to be a number of rows of the timed inputs, at least 1, got {tokens!r}.")
    options = candidates_of(candidates)
    targets, _ = select(model, Masked(), weights)
    for target in targets:
        if target.stored is not None or target.mask is not None:
            raise ValueError(f"Expected a dense model, got {target.name}, which is pruned; call sten.densify before.")
    given = calibration_of(calibration)
    if given is None:
        raise ValueError("Expected batches in calibration=, got None.")
    by_name = {target.name: target for target in targets}
    rows: dict[str, list[Measured]] = {}
    needs = method.needs & CALIBRATION | {"x_gram"}
    once = replace(given, true_sequential=False)  # nothing is pruned here, so one pass over a block tells all
    walk = Walk(model, Calibrated(model, once).weights(targets), once, needs)
    with inference(model):
        dense = run_batch(model, given.batches[0], 0)
    for stage in walk:
        stats = stage.collect()
        for group in stage.groups:
            measured = [_measure(by_name[w.name], options, method, stats[w.name], tokens) for w in group.weights]
            pruned = [(w.owners, value) for w, (_, value) in zip(group.weights, measured, strict=True)]
            with inference(model), substituted(pruned):
                out = run_batch(model, given.batches[0], 0)
                apart = _apart(dense, out, walk.tokens[0]) if effect is None else float(effect(dense, out))
            if not math.isfinite(apart):
                names = listed([weight.name for weight in group.weights])
                raise ValueError(f"Expected a finite effect of pruning {names}, got {apart}.")
            total = sum(found[len(found) // 2].error for found, _ in measured)
            scale = max(apart, 0.0) / total if total else 0.0
            for found, _ in measured:
                rows[found[0].name] = [replace(row, effect=row.error * scale) for row in found]
        stage.values = {w.name: (lambda t=by_name[w.name]: t.tensor.detach()) for w in stage.weights}
    ordered = _of_rank_0([row for target in targets for row in rows[target.name]], targets[0].tensor.device)
    return Sensitivity(ordered, {t.name: math.prod(t.shape) for t in targets}, method)


def candidates_of(given: Sequence[Layout | Candidate | None]) -> list[Candidate]:
    """(layout, sparsity) pairs of what users write; (None, None) is dense. ValueError or TypeError for others."""
    found: list[Candidate] = []
    for one in given:
        layout, sparsity = one if isinstance(one, tuple) else (one, None)
        if layout is not None and not isinstance(layout, Layout):
            raise TypeError(f"Expected candidates to be layouts, (layout, sparsity) or None, got {one!r}.")
        if layout is not None and (layout.rate is None) != (sparsity is not None):
            raise ValueError(
                f"Expected a sparsity with a layout without a rate, and none with others, got {one}; write "
                "(sten.CSR(), 0.5), or sten.NM(2, 4)."
            )
        if sparsity is not None:
            sparsity = Uniform(sparsity).sparsity
        found.append((layout, sparsity))
    if not any(layout is not None for layout, _ in found):
        raise ValueError("Expected candidates, layouts to choose from, got none.")
    return list(dict.fromkeys(found))


def _measure(
    target: Target, options: list[Candidate], method: Sparsifier, stats: dict[str, Tensor], tokens: int | None
) -> tuple[list[Measured], Tensor]:
    """The weight in each candidate, by density, and its pruned values, as its module has them, in the median one."""
    gram = stats["x_gram"]
    w = target.tensor.detach().to(gram.device)
    w = w.t() if target.transposed else w
    whole = _energy(w.float(), gram)
    found: list[tuple[Measured, Tensor]] = []
    for layout, sparsity in options:
        size = w.numel()
        if layout is None:
            seconds = None if tokens is None else _seconds(w, tokens, target.name)
            found.append((Measured(target.name, None, None, size, size * w.element_size(), 0.0, 0.0, seconds), w))
            continue
        try:
            layout.check(tuple(w.shape))
            method.check(layout)
        except ValueError:
            continue  # this weight cannot be stored so: one candidate less
        exact = None if sparsity is None else 1 - round((1 - sparsity) * size) / size
        random = torch.Generator().manual_seed(method.seed)
        with in_float32(w.device):
            edit = method.update(View(target.name, w, layout, sparsity=exact, stats=stats, generator=random))
        value = (w if edit.value is None else edit.value.to(w.dtype)).masked_fill(~edit.mask, 0)
        sparse = SparseTensor(layout, layout.pack(value, edit.mask), w.shape)
        error = _energy(value.float() - w.float(), gram) / whole if whole else 0.0
        seconds = None if tokens is None else _seconds(sparse, tokens, target.name)
        row = Measured(target.name, layout, sparsity, int(edit.mask.sum()), sparse.stored_bytes, error, 0.0, seconds)
        found.append((row, value))
    if not found:
        raise ValueError(f"Expected a candidate that can store {target.name} of shape {target.shape}, got none.")
    found.sort(key=lambda pair: -pair[0].entries)
    reference = found[len(found) // 2][1]
    reference = reference.t().contiguous() if target.transposed else reference
    return [row for row, _ in found], reference.to(target.tensor.device)


def _energy(d: Tensor, gram: Tensor) -> float:
    """The mean over tokens of |x D^T|^2, from the mean of x x^T."""
    d = d.flatten(1)
    with in_float32(d.device):
        return float((d @ gram).mul_(d).sum(dtype=torch.float64).clamp(min=0))


def _of_rank_0(rows: list[Measured], device: torch.device) -> list[Measured]:
    """With the effects and times that rank 0 has measured, on its own batch, so that all ranks choose alike."""
    if ranks() == 1:
        return rows
    exact = torch.float32 if device.type == "mps" else torch.float64
    measured = torch.tensor([(row.effect, row.seconds or 0.0) for row in rows], dtype=exact, device=device)
    pairs = from_rank_0(measured).tolist()
    return [
        replace(row, effect=effect, seconds=None if row.seconds is None else seconds)
        for row, (effect, seconds) in zip(rows, pairs, strict=True)
    ]


@torch.no_grad()
def _seconds(w: Tensor, tokens: int, name: str) -> float:
    """The median time of x @ W.T."""
    if w.dim() != 2:
        raise ValueError(f"Expected linear weights for tokens=, got {name} of shape {tuple(w.shape)}; leave it out.")
    from torch.utils import benchmark  # takes long to import

    x = torch.randn(tokens, w.shape[1], device=w.device, dtype=w.dtype)
    timer = benchmark.Timer("F.linear(x, w)", globals={"F": F, "x": x, "w": w}, num_threads=torch.get_num_threads())
    timer.timeit(3)  # kernels are tuned
    return timer.blocked_autorange(min_run_time=0.05).median


# ---- how far outputs are apart


def _apart(dense: Any, pruned: Any, tokens: Tokens) -> float:
    if isinstance(getattr(dense, "logits", None), Tensor):
        return _divergence(_real(dense.logits, tokens), _real(pruned.logits, tokens))
    error, whole = 0.0, 0.0
    for a, b in zip(_floating(dense), _floating(pruned), strict=True):
        a, b = _real(a, tokens), _real(b, tokens)
        error += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        whole += float(a.float().square().sum(dtype=torch.float64))
    return error / whole if whole else 0.0


def _divergence(dense: Tensor, pruned: Tensor) -> float:
    """The mean of KL(softmax(dense) || softmax(pruned)) over all but the last dimension."""
    total, rows = 0.0, [logits.reshape(-1, logits.shape[-1]) for logits in (dense, pruned)]
    pairs: Iterator = zip(*(part.split(CHUNK) for part in rows), strict=True)
    for a, b in pairs:
        p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total / len(rows[0])


def _real(x: Tensor, tokens: Tokens) -> Tensor:
    """An output without padding, where it has rows for tokens."""
    mask = tokens.of(tuple(x.shape)) if x.dim() > 2 else None
    return x if mask is None else x.flatten(0, 1)[mask.to(x.device)]


def _floating(out: Any) -> list[Tensor]:
    leaves = tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
