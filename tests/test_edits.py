"""What a method may decide: its budget, what the layout can hold, tensors that fit; refused before anything moves."""

from dataclasses import dataclass, field

import pytest
import torch
from cases import SMALL, copy_of, silent_copies
from torch import nn
from torch.nn.utils import prune
from training_models import OPTIMIZERS, engine_of, masks, mlp, train

import sten
from sten.extend import DenseWeightMethod, Edit, PatternMethod
from sten.layouts import BSR, CSR, NM, FanIn, Masked, VectorNM

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:sten. the masks leave rows")]


def ragged(like):
    """All of the first row, one entry of every other."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[0] = mask[:, 0] = True
    return mask


@dataclass(frozen=True)
class Decides(PatternMethod):
    """A stranger's method, whose mask updates return what `edit` makes of the View."""

    edit: object = field(default=None, compare=False, repr=False)
    schedule: object = None

    def default_schedule(self):
        return sten.schedule.Constant(1.0, start=2, every=2)

    def score(self, view):
        return torch.rand(view.weight.shape, generator=view.generator)

    def update(self, view):
        return super().update(view) if view.mask is None else self.edit(view)


@dataclass(frozen=True)
class DecidesDense(DenseWeightMethod):
    edit: object = field(default=None, compare=False, repr=False)
    schedule: object = None
    zero_pruned = True

    def default_schedule(self):
        return sten.schedule.Constant(1.0, start=2, every=2)

    def allocate(self, views, allocation):
        return {name: view.weight.numel() // 4 for name, view in views.items()}

    def apply(self, w, view):
        return w * view.mask

    def update(self, view):
        return super().update(view) if view.mask is None else self.edit(view)


class Once(PatternMethod):
    def __init__(self, edit):
        self.edit = edit

    def update(self, view):
        return self.edit(view)


def started(edit, layout, sparsity, kind=Decides):
    model = mlp()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sten.sparsify(model, layout, kind(edit), sparsity if layout.rate is None else None, optimizer=optimizer)
    train(model, optimizer, 1)
    return model, optimizer


def snapshot(model, optimizer):
    state = {
        **model.state_dict(),
        **{f"slot {i}": s["momentum_buffer"] for i, s in optimizer.state_dict()["state"].items()},
    }
    return {name: t.clone() for name, t in state.items() if "run_" not in name}


def refused_and_unchanged(model, optimizer, match, error=ValueError):
    before = snapshot(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0  # the step itself changes no weight; its momentum is not compared
    with pytest.raises(error, match=match) as raised:
        train(model, optimizer, 1, first=1)
    assert str(raised.value).count("\n") == 0 and engine_of(model).updates == 0
    after = snapshot(model, optimizer)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape and (name.startswith("slot") or torch.equal(tensor, after[name])), name


structured = [FanIn(), BSR((4, 4)), copy_of(FanIn()), copy_of(BSR((4, 4)))]


@silent_copies
@pytest.mark.parametrize("layout", structured, ids=str)
@pytest.mark.parametrize("kind", [Decides, DecidesDense], ids=lambda k: k.__name__)
def test_a_mask_that_the_layout_cannot_hold(layout, kind):
    def cut(view):  # as many units as allowed, but not whole: rows of different fan-in, a part of a block
        mask = view.layout.mask(view.weight.abs(), 0.75)
        row, column = mask.flatten(1).nonzero()[0].tolist()
        mask.flatten(1)[row, column] = False
        return Edit(mask=mask)

    model, optimizer = started(cut, layout, 0.75, kind)
    text = r"0\.weight: .*Decides.*: Expected a mask that .* can hold, got one of \d+ entries, .* store \d+; use"
    refused_and_unchanged(model, optimizer, text)


@pytest.mark.parametrize("layout", [NM(2, 4), VectorNM(1, 4, 4)], ids=str)
def test_a_mask_beyond_the_rate_of_the_layout(layout):
    model, optimizer = started(lambda view: Edit(mask=ragged(view.weight)), layout, None)
    refused_and_unchanged(model, optimizer, r"0\.weight: Decides\(\): Expected a mask with at most")


@silent_copies
@pytest.mark.parametrize("layout", [CSR(), Masked(), copy_of(CSR()), *structured], ids=str)
@pytest.mark.parametrize("kind", [Decides, DecidesDense], ids=lambda k: k.__name__)
def test_a_mask_over_its_budget(layout, kind):
    def more(view):  # half of the entries instead of a quarter, in whole units
        return Edit(mask=view.layout.mask(view.weight.abs(), 0.5))

    model, optimizer = started(more, layout, 0.75, kind)
    refused_and_unchanged(model, optimizer, r"0\.weight: .*: Expected a mask of at most \d+ of \d+ units of .*, got")


@pytest.mark.parametrize("layout", [layout for layout in SMALL if layout.independent_units], ids=str)
def test_a_mask_below_its_budget_is_stored_as_it_is(layout):
    def fewer(view):
        return Edit(mask=view.layout.mask(view.weight.abs(), None if view.layout.rate else 0.9))

    model, optimizer = started(fewer, layout, 0.75)
    want = [layout.mask(layer.weight.to_dense().abs(), None if layout.rate else 0.9) for layer in (model[0], model[2])]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1, first=1)
    assert engine_of(model).updates == 1
    for have, mask, layer in zip(masks(model), want, (model[0], model[2]), strict=True):
        assert torch.equal(have, mask) and layer.weight.density == pytest.approx(float(mask.float().mean()))


WRONG = {
    "no Edit": (lambda view: view.mask, TypeError, "Expected update to return an Edit, got Tensor"),
    "ints": (lambda view: Edit(mask=view.mask.int()), TypeError, r"Expected a bool tensor for Edit\.mask"),
    "a list": (lambda view: Edit(mask=view.mask.tolist()), TypeError, r"Expected a tensor for Edit\.mask, got list"),
    "transposed": (lambda view: Edit(mask=view.mask.t()), ValueError, r"Expected Edit\.mask of the weight's shape"),
    "flat values": (lambda view: Edit(value=view.weight.flatten()), ValueError, r"Edit\.value of the weight's shape"),
    "fresh of a row": (lambda view: Edit(fresh=view.mask[0]), ValueError, r"Edit\.fresh of the weight's shape"),
    "other state": (lambda view: Edit(state={"x": view.weight}), ValueError, "Edit.state to have tensors of init, {}"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", [Decides, DecidesDense], ids=lambda k: k.__name__)
def test_an_edit_of_another_form(case, kind):
    edit, error, text = WRONG[case]
    model, optimizer = started(edit, CSR(), 0.75, kind)
    refused_and_unchanged(model, optimizer, rf"0\.weight: .*Decides.*: .*{text}", error)


@pytest.mark.parametrize("layout", [FanIn(), BSR((4, 4)), CSR()], ids=str)
def test_the_first_mask_is_checked_too(layout):
    once = Once(lambda view: Edit(mask=ragged(view.weight)))
    for optimizer in (False, True):
        model = mlp()
        given = torch.optim.SGD(model.parameters(), 0.1) if optimizer else None
        with pytest.raises(ValueError, match=r"[02]\.weight: .*Once.*: Expected a mask"):
            sten.sparsify(model, layout, once, 0.9, optimizer=given)
        assert type(model[0]) is type(model[2]) is nn.Linear and type(model[0].weight) is nn.Parameter
    with pytest.raises(ValueError, match=r"0\.weight: .*Once.*: Expected a first mask from Once\.update"):
        sten.sparsify(mlp(), layout, Once(lambda view: Edit()), 0.9)


@dataclass(frozen=True)
class Finishes(DenseWeightMethod):
    edit: object = field(default=None, compare=False, repr=False)

    def finish(self, view):
        return self.edit(view)


@pytest.mark.parametrize(
    ("layout", "edit"),
    [(FanIn(), lambda v: Edit(mask=ragged(v.weight) & (v.weight > 0))), (CSR(), lambda v: Edit(mask=v.weight != 0))],
    ids=["ragged", "dense"],
)
def test_what_a_dense_weight_method_stores_at_the_end_is_checked(layout, edit):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout, Finishes(edit), 0.75, optimizer=optimizer)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match=r"0\.weight: Finishes\(\): Expected a mask"):
        sten.finalize(model)
    train(model, optimizer, 1)  # it was left as it was


# masks of users


@silent_copies
@pytest.mark.parametrize("layout", structured, ids=str)
def test_from_dense_refuses_a_mask_that_it_would_widen_and_stores_non_zeros(layout):
    dense = torch.randn(8, 64)
    with pytest.raises(ValueError, match=r"Expected a mask that .* can hold, got one of 71 entries, .* would store"):
        sten.from_dense(dense, layout, ragged(dense))
    w = sten.from_dense(dense * ragged(dense), layout)  # no mask: whole units that have a non-zero
    assert torch.equal(w.to_dense(), dense * ragged(dense))
    assert w.density == float(w.mask().float().mean()) and bool((w.mask() >= ragged(dense)).all())
    mask = layout.mask(dense.abs(), 0.75)
    w = sten.from_dense(dense, layout, mask)
    assert torch.equal(w.mask(), mask) and torch.equal(w.to_dense(), dense * mask)


@pytest.mark.parametrize("layout", [FanIn(), BSR((4, 4))], ids=str)
def test_masks_of_torch_and_other_layouts_must_fit(layout):
    model = mlp()
    prune.custom_from_mask(model[0], "weight", ragged(model[0].weight))
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight: Expected a mask that .* can hold"):
        sten.sparsify(model, layout, None)
    assert list(model.state_dict()) == keys
    sten.sparsify(model, CSR(), None, weights="0.weight")
    with pytest.raises(ValueError, match=r"0\.weight: Expected a mask that .* can hold"):
        sten.finalize(model, layout)
    assert torch.equal(model[0].weight.mask(), ragged(model[0].weight.to_dense()))


@pytest.mark.parametrize("layout", [FanIn(), BSR((4, 4)), CSR()], ids=str)
@pytest.mark.parametrize("method", [sten.Gradual(2, 6, 2), sten.SRSTE()], ids=lambda m: type(m).__name__)
def test_what_torch_has_pruned_starts_at_zero_under_a_dense_weight_method(method, layout):
    """torch keeps the numbers of pruned entries; they must not come back."""
    model = mlp()
    twin = mlp()
    for layer in (*model, *twin):
        if isinstance(layer, nn.Linear):
            prune.custom_from_mask(layer, "weight", ragged(layer.weight))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout, method, 0.25, optimizer=optimizer)
    for layer, other in zip((model[0], model[2]), (twin[0], twin[2]), strict=True):
        have, want = layer.weight.detach(), other.weight.detach()
        assert torch.equal(have, want) or (method == sten.SRSTE() and torch.equal(have, want * (have != 0)))
    sten.summary(model)  # prints what would be stored now
    train(model, optimizer, 8)
    sten.finalize(model)


# ragged edges


@pytest.mark.parametrize("method", [sten.Magnitude(), sten.RigL(24, 0.5, every=2)], ids=lambda m: type(m).__name__)
def test_blocks_at_ragged_edges_compete_by_the_mean_of_their_entries(method):
    """Every entry is 1 but those of the edge blocks, which are larger: they must be kept."""
    model = nn.Sequential(nn.Linear(9, 9, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].weight[8], model[0].weight[:, 8] = 1.5, 1.5
    layout, edge = BSR((4, 4)), torch.zeros(9, 9, dtype=torch.bool)
    edge[8] = edge[:, 8] = True
    if isinstance(method, sten.Magnitude):
        sten.sparsify(model, layout, method, 1 - 5 / 9)
        assert torch.equal(model[0].weight.mask(), edge)
        return
    view = sten.extend.View("w", model[0].weight.detach(), layout, 1 - 6 / 9, mask=torch.ones(9, 9, dtype=torch.bool))
    kept = sten.extend.keep_largest(view, 4 / 9)
    assert torch.equal(kept, edge)


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (3, 3), (7, 2, 3)])
def test_unit_means_are_means_over_real_entries(shape):
    layout, score = BSR((4, 4)), torch.rand(shape, dtype=torch.float64)
    means, matrix = layout.unit_means(score), score.flatten(1)
    for i, row in enumerate(means):
        for j, mean in enumerate(row):
            torch.testing.assert_close(mean, matrix[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean())
    assert CSR().unit_means(score) is score
