"""Equal rights: a stranger's exact copy of a built-in layout trains, converts and is stored as the original is."""

import runpy
import warnings
from pathlib import Path

import pytest
import torch
from cases import SMALL, copy_of, silent_copies
from torch import nn
from torch.nn import functional as F
from training_methods import METHODS, SUPPORTED
from training_models import batch, mlp

import sten
from sten.layouts import CSR, NM

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_layout.py"
CELLS = [(method, layout) for method in METHODS for layout in SMALL]
# float64: there the original has no kernel of its own on the CPU either, so both compute the same numbers
DTYPE = torch.float64


def name_of(cell):
    return f"{type(cell[0]).__name__}-{cell[1]}" if isinstance(cell, tuple) else str(cell)


def is_yes(method, layout):
    return SUPPORTED[type(method).__name__, type(layout).__name__] == "yes"


def run(method, layout, steps=14):
    """(weights, sizes of all parameters after each step, warnings but for those about reference kernels) of a run."""
    model = mlp(dtype=DTYPE)
    kind = sten.optim.AdamS if method.optimizer else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2)
    sizes = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sten.sparsify(model, layout, method, None if layout.rate else 0.75, optimizer=optimizer)
        for step in range(steps):
            x, y = batch(step, dtype=DTYPE)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            sizes.append([p.numel() for p in model.parameters()])
        sten.finalize(model)
    said = sorted(str(w.message) for w in caught if "no kernel for" not in str(w.message))
    return [model[i].weight for i in (0, 2)], sizes, said


@silent_copies
@pytest.mark.parametrize("cell", [cell for cell in CELLS if is_yes(*cell) and not cell[0].layouts], ids=name_of)
def test_a_copy_trains_like_the_original(cell):
    method, layout = cell
    ours, sizes, said = run(method, layout)
    theirs, other_sizes, other_said = run(method, copy_of(layout))
    for have, want in zip(theirs, ours, strict=True):
        assert have.sparse_layout == copy_of(layout) and torch.equal(have.to_dense(), want.to_dense())
        assert torch.equal(have.mask(), want.mask())
    assert other_sizes == sizes and other_said == said


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not is_yes(*cell) or cell[0].layouts], ids=name_of)
def test_a_copy_is_refused_by_a_method_of_one_layout(cell):
    method, layout = cell
    model, other = mlp(), copy_of(layout)
    kind = sten.optim.AdamS if method.optimizer else torch.optim.AdamW
    with pytest.raises(ValueError, match="Expected") as error:
        sten.sparsify(model, other, method, None if layout.rate else 0.5, optimizer=kind(model.parameters()))
    assert "\n" not in str(error.value) and str(other) in str(error.value) and type(model[0]) is nn.Linear


class Tight(NM):
    """A layout that extends NM."""


def test_a_subclass_is_accepted_by_a_method_of_one_layout():
    for method in (sten.Transposable(refresh=3), sten.BDWP(), sten.DecayingStructure(20)):
        assert run(method, Tight(2, 4), 4)[0][0].sparse_layout == Tight(2, 4)


def test_free_slots_keep_the_shapes_of_a_copy_of_csr():
    _, sizes, _ = run(sten.SparseMomentum(60, every=5), copy_of(CSR()), 22)
    assert len({tuple(size) for size in sizes}) == 1
    assert 256 in sizes[0]  # slots for twice the 128 entries


@silent_copies
@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_a_copy_converts_like_the_original(layout, tmp_path):
    found = []
    for one in (layout, copy_of(layout)):
        model = sten.sparsify(mlp(), one, sparsity=None if layout.rate else 0.75)
        again = sten.sparsify(mlp(seed=1), one, sparsity=None if layout.rate else 0.75)
        again.load_state_dict(model.state_dict())
        assert again[0].weight.sparse_layout == one and torch.equal(
            again[0].weight.to_dense(), model[0].weight.to_dense()
        )
        kept = sten.sparsify(sten.densify(again), one, sparsifier=None)
        sten.save(model, tmp_path / "model.safetensors")
        loaded = sten.load(mlp(seed=2), tmp_path / "model.safetensors")
        found.append([model[0].weight, kept[0].weight, loaded[0].weight])
        assert [w.sparse_layout for w in found[-1]] == [one] * 3
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.stored_bytes == theirs.stored_bytes


FOUR_METHODS = [
    sten.Static(), sten.SET(24, every=4), sten.RigL(24, every=4), sten.DSTEE(24, every=4), sten.Gradual(2, 12, 4),
    sten.STE(), sten.SRSTE(), sten.DecayingMask(20, rate=0.2), sten.CAST(20, 1e-2, 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def columns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(EXAMPLE))["Columns"]()


@pytest.mark.filterwarnings("ignore:sten. no kernel")
@pytest.mark.parametrize("method", FOUR_METHODS, ids=lambda m: type(m).__name__)
def test_a_layout_of_four_methods_trains(method, columns):
    (first, _), _, _ = run(method, columns)
    assert first.sparse_layout == columns and first.density == pytest.approx(0.25)
