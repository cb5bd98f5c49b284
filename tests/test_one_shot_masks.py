"""SparseSwaps and DSnoT, which make masks better, and chains of methods."""

import dataclasses
import itertools

import pytest
import torch
from cases import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from one_shot_views import error, inputs, view_of

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM
from sten.sparsifiers import sparse_swaps
from sten.sparsifiers.edits import expect_edit

pytestmark = pytest.mark.usefixtures("one_thread")

REFINED = [Masked(), CSR(), FanIn(), BSR((4, 4)), NM(2, 4), NM(3, 7), VectorNM(1, 4, 4), GroupedNM(2, 4, 1)]


def exchanged(view, mask, here, there):
    """The mask (a matrix) with two tiles exchanged: (rows, columns) each."""
    other = mask.clone()
    other[here], other[there] = mask[there], mask[here]
    return sten.extend.Edit(other.view(view.weight.shape))


def every_exchange(view, mask):
    """All exchanges of two tiles that the layout allows, by the documented law."""
    layout, shape = view.layout, tuple(view.weight.shape)
    groups, (height, width) = layout.column_groups(shape), layout.tile(shape)
    order = groups.argsort(stable=True)
    whole = layout.rate is None
    parts = [order] if whole else [order[groups[order] == g] for g in groups.unique()]
    for top in range(0, shape[0], height):
        rows = torch.arange(top, min(top + height, shape[0])).unsqueeze(1)
        for part in parts:
            for a, b in itertools.combinations(part.split(width), 2):
                if len(a) == len(b):
                    yield exchanged(view, mask, (rows, a), (rows, b))


@pytest.mark.parametrize("layout", REFINED, ids=str)
def test_after_enough_sweeps_no_exchange_lowers_the_error(layout):
    view = view_of(layout, (8, 16) if layout != NM(3, 7) else (5, 17))
    random = torch.rand(view.weight.shape, generator=torch.Generator().manual_seed(1))
    first = sten.extend.Edit(layout.mask(random, view.sparsity))
    edit = sten.SparseSwaps(sweeps=100).update(dataclasses.replace(view, previous=first))
    expect_edit(edit, view, sten.SparseSwaps(), exact=True)
    least, start = error(view, edit).sum(), error(view, first).sum()
    count = 0
    for other in every_exchange(view, edit.mask):
        assert error(view, other).sum() >= least * (1 - 1e-5)
        count += 1
    assert count >= 12 and least < start


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_sweep_lowers_the_error(layout):
    view = view_of(layout, (32, 96))
    edit, errors = sten.Wanda().update(view), []
    for _ in range(4):
        errors.append(error(view, edit).sum())
        edit = sten.SparseSwaps(sweeps=1).update(dataclasses.replace(view, previous=edit))
    assert all(now <= before * (1 + 1e-6) for before, now in itertools.pairwise(errors)) and errors[3] < errors[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(REFINED), st.integers(1, 13), st.integers(1, 40), st.integers(0, 99), st.floats(0.3, 0.9))
def test_refinements_never_raise_what_they_lower(layout, rows, columns, seed, sparsity):
    view = view_of(layout, (rows, columns), sparsity, seed)
    start = sten.Wanda().update(view)
    edit = sten.SparseSwaps(sweeps=3).update(view)
    assert (error(view, edit) <= error(view, start) + 1e-4).all() or layout.tile((rows, columns))[0] > 1
    assert error(view, edit).sum() <= error(view, start).sum() * (1 + 1e-5)
    if layout.independent_units:
        edit = sten.DSnoT().update(view)
        expect_edit(edit, view, sten.DSnoT(), exact=True)
        assert expected(view, edit.mask).sum() <= expected(view, start.mask).sum() * (1 + 1e-5)


@pytest.mark.parametrize("layout", [NM(2, 4), NM(1, 4), NM(4, 8), VectorNM(2, 4, 8), VectorNM(1, 4, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_groups_that_are_visited_together(layout, seed, monkeypatch):
    """No row's error rises, also with inputs that are nearly the same, and the mask is about as good as one by one."""
    alike = inputs(144, seed=seed)[:, :1] + 0.1 * inputs(144, seed=seed)
    for x, margin in ((None, 1.03), (alike, 1.1)):
        view = view_of(layout, (32, 144), seed=seed, x=x)
        start, errors = sten.Wanda().update(view), []
        for together in (sparse_swaps.TOGETHER, 1000):
            monkeypatch.setattr(sparse_swaps, "TOGETHER", together)
            edit = sten.SparseSwaps().update(view)
            expect_edit(edit, view, sten.SparseSwaps(), exact=True)
            bands = [error(view, e).view(-1, layout.tile((32, 144))[0]).sum(1) for e in (edit, start)]
            assert (bands[0] <= bands[1] * (1 + 1e-4) + 1e-6).all()
            errors.append(error(view, edit).sum())
        monkeypatch.undo()
        assert errors[0] <= errors[1] * margin and errors[0] < 0.95 * error(view, start).sum()


def test_a_swap_may_not_bring_back_what_was_pruned_before():
    allowed = torch.rand(16, 32, generator=torch.Generator().manual_seed(0)) < 0.6
    view = view_of(CSR(), (16, 32), 0.6, allowed=allowed)
    view.weight.mul_(allowed)
    start = sten.Wanda().update(view)
    edit = sten.SparseSwaps().update(dataclasses.replace(view, previous=start))
    assert not (edit.mask & ~allowed & ~start.mask).any() and error(view, edit).sum() < error(view, start).sum()


# ---- DSnoT


def expected(view, mask):
    """|e| of every row: the mean over tokens of what the dropped weights would give."""
    effect = view.weight.double().flatten(1) * view.stats["x_mean"].double()
    return (effect * ~mask.flatten(1)).sum(1).abs()


def dsnot(view, mask, cycles, group):
    """The rule row by row, in float64; `group` columns are chosen among together."""
    weight, mean = view.weight.double(), view.stats["x_mean"].double()
    var, norm, mask = view.stats["x_var"].double(), view.stats["x_norm"].double(), mask.clone()
    for r in range(len(weight)):
        effect, cost = weight[r] * mean, weight[r].abs() * norm
        for _ in range(cycles):
            e = float(effect[~mask[r]].sum())
            sign = 1 if e > 0 else -1
            best = None
            for j in (~mask[r]).nonzero().flatten().tolist():
                kept = [i for i in range(len(effect)) if mask[r, i] and i // group == j // group]
                kept = [i for i in kept if sign * effect[i] < 0]
                gain = sign * float(effect[j] / var[j])
                if kept and sign * effect[j] > 0 and (best is None or gain > best[0]):
                    best = gain, j, min(kept, key=lambda i: float(cost[i]))
            if best is None or abs(e - float(effect[best[1]] - effect[best[2]])) >= abs(e):
                break
            mask[r, best[1]], mask[r, best[2]] = True, False
    return mask


@pytest.mark.parametrize(("layout", "group"), [(CSR(), 999), (FanIn(), 999), (NM(2, 4), 4), (NM(2, 8), 8)], ids=str)
def test_dsnot_is_the_rule_of_the_paper(layout, group):
    view = view_of(layout, (12, 24), 0.7)
    start = sten.Wanda().update(view).mask
    for cycles in (1, 3, 50):
        edit = sten.DSnoT(cycles=cycles).update(view)
        assert torch.equal(edit.mask, dsnot(view, start, cycles, group)) and not torch.equal(edit.mask, start)
        assert torch.equal(edit.mask.sum(1), start.sum(1))
        assert (expected(view, edit.mask) <= expected(view, start) + 1e-6).all()


@pytest.mark.parametrize("layout", [VectorNM(2, 4, 4), BSR((4, 4))], ids=str)
def test_dsnot_moves_whole_tiles(layout):
    view = view_of(layout, (16, 32), 0.5)
    start, edit = sten.Wanda().update(view), sten.DSnoT().update(view)
    assert expected(view, edit.mask).sum() < expected(view, start.mask).sum()
    assert edit.mask.sum() == start.mask.sum()


def test_an_input_without_variance_counts_first():
    x = inputs(16)
    x[:, 3] = 2.0
    view = view_of(NM(2, 4), (8, 16), x=x)
    view.stats["x_var"][3] = 0
    edit = sten.DSnoT().update(view)
    assert (expected(view, edit.mask) <= expected(view, sten.Wanda().update(view).mask) + 1e-6).all()


# ---- chains


def test_a_chain_is_its_methods_one_after_the_other():
    view = view_of(NM(2, 4))
    first = sten.Wanda().update(view)
    second = sten.SparseSwaps().update(dataclasses.replace(view, previous=first))
    third = sten.LeastSquares().update(dataclasses.replace(view, previous=second))
    edit = sten.chain(sten.Wanda(), sten.SparseSwaps(), sten.LeastSquares()).update(view)
    assert torch.equal(edit.mask, third.mask) and torch.equal(edit.value, third.value)
    assert not torch.equal(first.mask, second.mask) and error(view, third).sum() < error(view, second).sum()


class Doubled(sten.extend.PatternMethod):
    """Changes values, not the mask; what it saw is in the values."""

    refines = True

    def update(self, view):
        assert view.previous.mask.dtype == torch.bool
        value = view.weight if view.previous.value is None else view.previous.value
        return sten.extend.Edit(value=2 * value)


class Nothing(sten.extend.PatternMethod):
    refines = True

    def update(self, view):
        return sten.extend.Edit()


def test_what_a_method_leaves_out_stays():
    view = view_of(CSR())
    mask = sten.Magnitude().update(view).mask
    edit = sten.chain(sten.Magnitude(), Doubled(), Nothing(), Doubled()).update(view)
    assert torch.equal(edit.mask, mask) and torch.equal(edit.value, 4 * view.weight)


def test_a_weight_update_that_would_be_lost_is_refused():
    """A mask that moves on has the weight's own values, so an update of weights comes after it."""
    view = view_of(CSR())
    for mover in (sten.SparseSwaps(), sten.DSnoT()):
        for updated in (sten.SparseGPT(), sten.chain(sten.Wanda(), sten.ADMM())):
            with pytest.raises(ValueError, match=r"Expected a weight update behind .* put sten\.ADMM"):
                sten.chain(updated, mover).update(view)
            edit = sten.chain(updated, mover, sten.LeastSquares()).update(view)
            assert edit.value is not None
            assert sten.chain(updated, mover, sten.Reconstruct()).update(view).value is None  # which makes its own


def test_chains_in_a_chain_are_their_methods():
    one = sten.chain(sten.chain(sten.Wanda(), sten.SparseSwaps()), sten.ADMM())
    assert one == sten.chain(sten.Wanda(), sten.SparseSwaps(), sten.ADMM())


def test_a_chain_is_written_and_made_again():
    names = {name: getattr(sten, name) for name in sten.__all__}
    for method in (
        sten.chain(sten.Wanda(per="layer"), sten.SparseSwaps(2), sten.ADMM(damping=0.1)),
        sten.chain(sten.SparseGPT(64), sten.LeastSquares(5)),
        sten.chain(sten.Magnitude()),
    ):
        assert eval(repr(method), names) == method and hash(method) == hash(eval(repr(method), names))
        recipe = sten.Recipe(NM(2, 4), method)
        assert sten.Recipe.from_json(recipe.to_json()) == recipe
    assert sten.chain(sten.Wanda(), sten.DSnoT(), sten.ADMM()).needs == {"x_norm", "x_mean_var", "x_gram"}


def test_a_chain_without_statistics_prunes_a_model():
    """And its score is that of its first method, for allocations."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
    sten.sparsify(model, CSR(), sten.chain(sten.Magnitude(), Doubled()), sten.Global(0.5))
    kept = {name: model.get_parameter(name).mask() for name in weights}
    least = min(float(weights[name].abs()[kept[name]].min()) for name in weights)
    assert least >= max(float(weights[name].abs()[~kept[name]].max()) for name in weights)
    for name, w in weights.items():
        assert torch.equal(model.get_parameter(name).to_dense(), 2 * w * kept[name])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: sten.chain(), ValueError, r"Expected methods for chain\(\), such as .*, got none"),
        (
            lambda: sten.chain(sten.Wanda),
            TypeError,
            r"Expected methods for chain\(\), such as .* got <class",
        ),
        (lambda: sten.chain(sten.RigL(100, every=5)), ValueError, r"Expected methods that decide once, .* got RigL\("),
        (lambda: sten.chain(sten.STE()), ValueError, r"Expected methods that decide once, .* got STE\("),
        (
            lambda: sten.chain(sten.SparseGPT(), sten.Wanda()),
            ValueError,
            r"Expected methods that start from .* behind the first of chain\(\), got Wanda\(per='row'\), ",
        ),
    ],
)
def test_methods_that_do_not_make_a_chain_are_refused(make, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_layout_that_does_not_name_its_groups_is_refused():
    class Own(NM):
        column_groups = sten.Layout.column_groups

    for method in (sten.SparseSwaps(), sten.DSnoT(), sten.chain(sten.Wanda(), sten.SparseSwaps())):
        with pytest.raises(
            ValueError, match=r"Expected a layout that defines column_groups and tile for \w+\(.*got .*Own\(n=2"
        ):
            method.check(Own(2, 4))
    view = view_of(Own(2, 4))  # SparseGPT then chooses the whole mask at once
    expect_edit(sten.SparseGPT().update(view), view, sten.SparseGPT(), exact=True)
