"""Sensitivity: the knapsack against exhaustion, budgets, measured errors against dense PyTorch."""

from __future__ import annotations

import copy
import fnmatch
import itertools

import numpy as np
import pytest
import torch
from cases import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from permuted import IDS, hugging_face, mlp, resnet
from torch import nn

import sten
from sten.conversion import knapsack as solver
from sten.conversion.knapsack import knapsack

numbers = st.one_of(st.integers(0, 9).map(float), st.floats(0, 10))
items = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(items, st.floats(0, 40))
def test_knapsack_is_exact(problem, budget):
    costs, errors = ([[pair[part] for pair in item] for item in problem] for part in (0, 1))
    every = [
        (sum(costs[i][k] for i, k in enumerate(c)), sum(errors[i][k] for i, k in enumerate(c)))
        for c in itertools.product(*(range(len(item)) for item in problem))
    ]
    fitting = [error for cost, error in every if cost <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="budget"):
            knapsack(costs, errors, budget)
        return
    found = knapsack(costs, errors, budget)
    assert found.cost <= budget and found.error == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)
    assert found.bound <= found.error + 1e-9
    assert found.cost == pytest.approx(sum(costs[i][k] for i, k in enumerate(found.chosen)))


def test_knapsack_of_many_items(monkeypatch):
    """Thinned out, the result is still within the budget and near the bound."""
    random = np.random.default_rng(0)
    costs, errors = random.random((200, 8)) * random.lognormal(size=(200, 1)), random.random((200, 8))
    budget = float(costs.mean(1).sum()) * 0.7
    best = knapsack(costs, errors, budget)
    assert best.cost <= budget and best.error <= best.bound * 1.01
    monkeypatch.setattr(solver, "STATES", 50)
    rough = knapsack(costs, errors, budget)
    assert rough.cost <= budget and best.error <= rough.error <= rough.bound * 1.05


CANDIDATES = [sten.NM(2, 4), (sten.CSR(), 0.25), (sten.CSR(), 0.5), (sten.CSR(), 0.75), None]


def batches(rows=64):
    return [torch.randn(rows, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def by_key(table):
    return {(row.name, str(row)): row for row in table.rows}


def test_errors_and_effects_are_those_of_dense_pytorch():
    """An MLP without blocks: each weight is a group of its own, so its effect in the median candidate is measured."""
    model, _ = mlp()
    state = copy.deepcopy(model.state_dict())
    table = sten.sensitivity(model, CANDIDATES, batches())
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    rows, x = by_key(table), torch.cat(batches())
    assert len(rows) == 3 * len(CANDIDATES)
    for number in (0, 3, 5):
        layer, inputs = model[number], model[:number](x)
        names = [str(row) for row in table.rows if row.name == f"{number}.weight"]
        effects = []
        for name in names:
            row = rows[f"{number}.weight", name]
            if row.layout is None:
                assert (row.error, row.effect, row.entries) == (0, 0, layer.weight.numel())
                continue
            score = layer.weight.detach().abs() * inputs.square().mean(0).sqrt()
            per_row = sten.FanIn() if row.layout.rate is None else row.layout  # Wanda compares in each row
            mask = per_row.mask(score, row.sparsity)
            pruned = layer.weight.detach() * mask
            error = float(
                (inputs @ (pruned - layer.weight).T).square().sum() / (inputs @ layer.weight.T).square().sum()
            )
            assert row.error == pytest.approx(error, rel=1e-3) and row.entries == int(mask.sum())
            other = copy.deepcopy(model)
            other[number].weight.data = pruned
            y = model(batches()[0])
            apart = float((other(batches()[0]) - y).square().sum() / y.square().sum())
            effects.append((row.effect, apart))
        assert any(got == pytest.approx(expected, rel=1e-3) for got, expected in effects)  # the median candidate
        ratios = {round(rows[f"{number}.weight", n].effect / rows[f"{number}.weight", n].error, 4) for n in names[1:]}
        assert len(ratios) == 1


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_blocks_of_hugging_face(kind):
    """The effects of the weights on one input, in the median candidate, add up to what pruning them changes."""
    pytest.importorskip("transformers")
    model, example = hugging_face(kind)
    table = sten.sensitivity(model, [(sten.CSR(), 0.5)], [example], weights=["*.0.*", "*.1.*"])
    names = {"gpt2": ["*attn.c_attn.weight", "*attn.c_proj.weight", "*mlp.c_fc.weight", "*mlp.c_proj.weight"],
             "bert": ["*.self.*.weight", "*attention.output.dense.weight", "*intermediate.dense.weight"]}  # fmt: skip
    for block, pattern in itertools.product((0, 1), names[kind]):
        group = [r for r in table.rows if f".{block}." in r.name and fnmatch.fnmatchcase(r.name, pattern)]
        pruned = sten.sparsify(
            copy.deepcopy(model), sten.CSR(), sten.Wanda(), 0.5, [row.name for row in group],
            calibration=sten.Calibration([example]),
        )  # fmt: skip
        floats = [(a, b) for a, b in zip(model(**example).to_tuple()[:2], pruned(**example).to_tuple()[:2], strict=True)
                  if isinstance(a, torch.Tensor)]  # fmt: skip
        wrong = sum((a - b).square().sum() for a, b in floats) / sum(a.square().sum() for a, _ in floats)
        assert len(group) == (3 if "self" in pattern else 1)
        assert sum(row.effect for row in group) == pytest.approx(float(wrong.detach()), rel=2e-2)


class Unequal(nn.Module):
    """Two branches of a block whose layers have the same relative errors, one of which hardly reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        h = x + self.first(x)
        return h + 0.05 * self.second(h.tanh())


def test_the_default_is_better_than_the_same_sparsity_for_all():
    torch.manual_seed(0)
    model = nn.Sequential(Unequal(), Unequal())
    x = [torch.randn(256, 16) for _ in range(2)]
    candidates = [(sten.CSR(), sparsity) for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7)]
    recipe = sten.sensitivity(model, candidates, x).choose(sparsity=0.5)

    def wrong(layout, **given):
        pruned = sten.sparsify(copy.deepcopy(model), layout, calibration=x, **given)
        kept = sum(int((w.to_dense() != 0).sum()) for w in pruned.parameters())
        return float((pruned(x[0]) - model(x[0])).square().mean().detach()), kept

    chosen, kept = wrong(recipe)
    uniform, count = wrong(sten.CSR(), sparsifier=sten.Wanda(), sparsity=0.5)
    assert kept <= count and chosen < 0.8 * uniform


def test_logits_are_compared_by_their_divergence():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    seen = []

    def effect(dense, pruned):
        p, q = (out.logits.log_softmax(-1) for out in (dense, pruned))
        seen.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return seen[-1]

    own = sten.sensitivity(model, [sten.NM(1, 4)], [IDS], effect=effect)
    table = sten.sensitivity(model, [sten.NM(1, 4)], [IDS])
    assert sum(row.effect for row in table.rows) == pytest.approx(sum(seen), rel=1e-4)
    assert [row.effect for row in own.rows] == pytest.approx([row.effect for row in table.rows], rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_a_budget_of_entries_is_kept_and_the_choice_is_the_best(sparsity):
    model, _ = mlp()
    table = sten.sensitivity(model, CANDIDATES, batches())
    recipe = table.choose(sparsity=sparsity)
    assert sten.Recipe.from_json(recipe.to_json()) == recipe
    groups = {}
    for row in table.rows:
        groups.setdefault(row.name, []).append(row)
    total = sum(table.sizes.values())
    fitting = [c for c in itertools.product(*groups.values()) if sum(r.entries for r in c) <= (1 - sparsity) * total]
    best = min(fitting, key=lambda c: sum(row.effect for row in c))
    sparse = sten.sparsify(model, recipe, calibration=batches())
    kept = sum(int((p.to_dense() != 0).sum()) for p in sparse.parameters() if p.dim() > 1)
    assert kept <= (1 - sparsity) * total
    for row in best:
        w = sparse.get_parameter(row.name)
        assert (w.sparse_layout if isinstance(w, sten.SparseTensor) else None) == row.layout, row


def test_budgets_of_bytes_and_seconds():
    model, _ = mlp()
    table = sten.sensitivity(model, [(sten.CSR(), 0.8), sten.NM(2, 4), None], batches(), tokens=4)
    assert all(row.seconds > 0 for row in table.rows)
    dense = sum(4 * size for size in table.sizes.values())
    sparse = sten.sparsify(copy.deepcopy(model), table.choose(bytes=dense * 3 // 4), calibration=batches())
    rows = sten.summary(sparse).rows
    assert sum(row.stored_bytes for row in rows) <= dense * 3 // 4
    fastest = sum(min(r.seconds for r in table.rows if r.name == name) for name in table.sizes)
    assert isinstance(table.choose(seconds=fastest * 1.01), sten.Recipe)
    assert set(table.choose(bytes=dense).layout.values()) == {None}


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_every_layout_is_a_candidate(layout):
    model, _ = mlp()
    table = sten.sensitivity(model, [layout if layout.rate else (layout, 0.5), None], batches())
    errors = [row.error for row in table.rows if row.layout is not None]
    assert len(errors) == 3 and all(0 < error < 1 for error in errors) and str(layout) in str(table)
    recipe = table.choose(sparsity=0.5)
    assert {str(w.sparse_layout) for w in sten.sparsify(model, recipe, calibration=batches()).parameters()
            if isinstance(w, sten.SparseTensor)} == {str(layout)}  # fmt: skip


def test_values_of_a_method_and_convolutions():
    """SparseGPT changes what it keeps, so its errors are lower; of a convolution the input is its patches."""
    model, x = resnet()
    weights = ["stem", "block.0", "last", "head"]
    errors = {}
    for method in (sten.Wanda(), sten.SparseGPT()):
        table = sten.sensitivity(model, [sten.NM(2, 4)], [x], method, weights)
        errors[type(method)] = sum(row.error for row in table.rows)
    assert 0 < errors[sten.SparseGPT] < errors[sten.Wanda]


def test_per_weight():
    model, _ = mlp()
    sparse = sten.sparsify(
        model, sten.CSR(), sparsity=sten.PerWeight({"0.weight": 0.9, "3.weight": 0.1, "5.weight": 0})
    )
    assert [round(model[i].weight.density, 2) for i in (0, 3, 5)] == [0.1, 0.9, 1.0]
    with pytest.raises(ValueError, match=r"a sparsity for 5\.weight"):
        sten.sparsify(mlp()[0], sten.CSR(), sparsity=sten.PerWeight({"0.weight": 0.9, "3.weight": 0.1}))
    with pytest.raises(ValueError, match="0 to 1"):
        sten.PerWeight({"0.weight": 90})
    allocation = sten.PerWeight({"0.weight": 0.5})
    assert eval(repr(allocation), vars(sten)) == allocation and hash(allocation)
    assert isinstance(sparse, nn.Module)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"candidates": []}, "candidates"),
        ({"candidates": [None]}, "candidates"),
        ({"candidates": [sten.CSR()]}, "sparsity with a layout"),
        ({"candidates": [(sten.NM(2, 4), 0.5)]}, "sparsity with a layout"),
        ({"candidates": [(sten.CSR(), 50)]}, "0 to 1"),
        ({"candidates": ["nm"]}, "layouts"),
        ({"calibration": None}, "batches"),
        ({"calibration": []}, "batches"),
        ({"tokens": True}, "number of rows"),
        ({"tokens": 0}, "number of rows"),
        ({"sparsifier": sten.SRSTE()}, "decides once"),
        ({"effect": lambda a, b: float("nan")}, "finite effect"),
    ],
)
def test_refusals(bad, words):
    arguments = {"candidates": CANDIDATES, "calibration": batches(), **bad}
    with pytest.raises((ValueError, TypeError), match=words):
        sten.sensitivity(mlp()[0], **arguments)


def test_budgets_that_cannot_be_met():
    table = sten.sensitivity(mlp()[0], [sten.NM(2, 4), None], batches())
    for budget, words in (
        ({}, "one of"),
        ({"sparsity": 0.5, "bytes": 3}, "one of"),
        ({"sparsity": 0.6}, "sparsity= of at most 0.5, that of the sparsest candidates, got 0.6"),
        ({"sparsity": float("nan")}, "0 to 1"),
        ({"bytes": 10}, r"bytes= of at least \d+, what the smallest candidates have together, got 10"),
        ({"bytes": -1}, "bytes= of at least"),
        ({"seconds": 1.0}, "tokens="),
    ):
        with pytest.raises(ValueError, match=words):
            table.choose(**budget)
    for bad in ({"bytes": True}, {"bytes": "1G"}, {"sparsity": True}):
        with pytest.raises(TypeError, match="Expected a number for"):
            table.choose(**bad)
    with pytest.raises(ValueError, match="dense model"):
        sten.sensitivity(sten.sparsify(mlp()[0], sten.NM(2, 4)), [sten.NM(2, 4)], batches())


def test_padding_does_not_count():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    padded = {"input_ids": torch.cat([IDS, IDS[:, :2]], 1), "attention_mask": torch.tensor([[1] * 7 + [0] * 2] * 2)}
    tables = [sten.sensitivity(model, [sten.NM(2, 4)], [batch]) for batch in (IDS, padded)]
    finer = sten.sensitivity(model, [sten.NM(2, 4)], sten.Calibration([IDS], true_sequential=True))
    for a, b, c in zip(*(table.rows for table in (*tables, finer)), strict=True):
        assert (a.error, a.effect) == pytest.approx((b.error, b.effect), rel=1e-3, abs=1e-9)
        assert (a.error, a.effect) == pytest.approx((c.error, c.effect), rel=1e-4)  # nothing is pruned on the way


def test_chains_and_autocast():
    """Errors are those of exact least squares on the mask, in float64, also under autocast."""
    layer, x = nn.Linear(12, 6), torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    w, wide = layer.weight.detach().double(), x.double()
    mask = sten.NM(2, 4).mask(w.abs() * wide.square().mean(0).sqrt())
    error, whole = 0.0, (wide @ w.T).square().sum()
    for row, kept in zip(w, mask, strict=True):
        values = torch.linalg.lstsq(wide[:, kept], wide @ row).solution
        error += float((wide[:, kept] @ values - wide @ row).square().sum() / whole)
    method = sten.chain(sten.Wanda(), sten.LeastSquares(30, damping=1e-7))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            table = sten.sensitivity(layer, [sten.NM(2, 4)], [x], method)
        assert table.rows[0].error == pytest.approx(error, rel=1e-5)
    with pytest.raises(ValueError, match="decides once"):
        sten.sensitivity(layer, [sten.NM(2, 4)], [x], sten.chain(sten.Wanda(), sten.Reconstruct()))
