"""Calibration: bad input, errors in the middle, and going on afterwards."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from calibration_cases import Blocks, Noted, as_before, blocks, dense, same, vectors
from hf_models import llama
from small import mlp
from torch import nn

import sten


def with_nan(batches: list) -> list:
    batches[2][1, 2, 3] = float("nan")
    return batches


class Unused(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(8, 8)


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv1d(8, 8, 1, groups=2))


NAN = r"finite inputs of layers\.0\.up\.weight, got NaN or inf in batch 2"
NONE = r"'h\.\*', which is none; it has the lists layers"
REFUSED = {
    "no calibration": (blocks, {"calibration": None}, r"Expected calibration= for Wanda\(.*got None"),
    "no batches": (blocks, {"calibration": []}, "Expected batches for calibration=, got none"),
    "a used iterator": (blocks, {"calibration": iter(())}, "got none; an iterator can be read only once"),
    "one tensor": (blocks, {"calibration": torch.ones(2, 8)}, r"got one Tensor; write \[batch\] for one"),
    "texts": (blocks, {"calibration": ["a", "b"]}, "each batch of calibration= to be a tensor.*tokenize"),
    "nan": (blocks, {"calibration": with_nan(vectors())}, NAN),
    "not reached": (Unused, {}, r"reach every chosen weight, got no token for unused\.weight"),
    "no such blocks": (blocks, {"calibration": sten.Calibration(vectors(), blocks="h.*")}, NONE),
    "a method that reads none": (blocks, {"sparsifier": sten.Magnitude()}, "reads no activations"),
    "a chain of such": (blocks, {"sparsifier": sten.chain(sten.Magnitude())}, "reads no activations"),
    "a grouped convolution": (Grouped, {"weights": "0"}, r"Expected 0\.weight in .* a convolution without groups"),
    "a wrong batch": (blocks, {"calibration": [torch.ones(2, 7)]}, "shapes cannot be multiplied"),
}  # fmt: skip


@pytest.mark.parametrize("call", [sten.sparsify, sten.plan], ids=["sparsify", "plan"])
@pytest.mark.parametrize("make, given, match", REFUSED.values(), ids=REFUSED)
def test_refused(call, make, given, match):
    model = make()
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
        call(model, **{"layout": sten.NM(2, 4), "sparsifier": sten.Wanda(), "calibration": vectors(), **given})
    assert as_before(model, before)


def test_few_tokens():
    with pytest.warns(UserWarning, match=r"few tokens of calibration= reached layers\.0\.down\.weight \(8\)"):
        sten.sparsify(blocks(), sten.NM(2, 4), sten.SparseGPT(), calibration=[vectors()[0][:2]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sten.sparsify(blocks(), sten.NM(2, 4), sten.SparseGPT(), calibration=vectors())


# ---- errors in the middle, and going on


class Interrupted(Noted):
    """Ctrl-C, or an error, at one weight; what has been decided is counted."""

    def __init__(self, at: str, error: type[BaseException]) -> None:
        super().__init__()
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "error", error)

    def __repr__(self) -> str:
        return "Interrupted()"

    def update(self, view):
        if view.name == self.at:
            raise self.error("stop")
        return super().update(view)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_the_model_as_it_was(error):
    for make in (blocks, llama, lambda: mlp()):
        model = make()
        before = copy.deepcopy(model)
        last = [name for name, p in model.named_parameters() if p.dim() > 1 and "head" not in name][-1]
        batches = vectors() if isinstance(model, Blocks) else [torch.ones(2, 12)]
        batches = (
            batches if hasattr(model, "layers") or not hasattr(model, "config") else [torch.arange(10).view(1, 10)]
        )
        with pytest.raises(error, match="stop"):
            sten.sparsify(model, sten.NM(2, 4), Interrupted(last, error), calibration=batches)
        assert as_before(model, before)


def test_block_by_block():
    """With commit="block", finished blocks are valid sparse weights and the rest is dense; the note says how many."""
    model, whole, before = blocks(), blocks(), blocks()
    sten.sparsify(whole, sten.NM(2, 4), Noted(), calibration=vectors())
    calibration = sten.Calibration(vectors(), commit="block")
    with pytest.raises(KeyboardInterrupt) as caught:
        sten.sparsify(
            model, sten.NM(2, 4), Interrupted("layers.2.down.weight", KeyboardInterrupt), calibration=calibration
        )
    assert "2 blocks are sparse and complete (layers.0, layers.1)" in caught.value.__notes__[0]
    for i in (0, 1):
        assert torch.equal(model.layers[i].down.weight.to_dense(), whole.layers[i].down.weight.to_dense())
    assert torch.equal(model.layers[2].up.weight, before.layers[2].up.weight)
    assert sten.summary(model).rows[0].layout == "NM(n=2, m=4)" and not hasattr(
        model.layers[2].up.weight, "sparse_layout"
    )
    copy.deepcopy(model).load_state_dict(model.state_dict())
    done = blocks()
    sten.sparsify(done, sten.NM(2, 4), Noted(), calibration=sten.Calibration(vectors(), commit="block"))
    assert same(dense(done), dense(whole))


@pytest.mark.parametrize("commit", ["end", "block"])
def test_going_on(commit, tmp_path):
    """A second call with the same folder decides only what the first has not; other numbers begin anew."""
    whole = blocks()
    sten.sparsify(whole, sten.NM(2, 4), Noted(), calibration=vectors())
    model, method = blocks(), Interrupted("layers.2.up.weight", KeyboardInterrupt)
    calibration = sten.Calibration(vectors(), folder=tmp_path, commit=commit)
    with pytest.raises(KeyboardInterrupt):
        sten.sparsify(model, sten.NM(2, 4), method, calibration=calibration)
    again = Interrupted("none", KeyboardInterrupt)
    sten.sparsify(model, sten.NM(2, 4), again, calibration=calibration)
    assert list(again.seen) == ["layers.2.up.weight", "layers.2.down.weight"]
    assert same(dense(model), dense(whole))
    for changed in ("weights", "batches", "layout", "damaged"):
        other, seen = blocks(), Interrupted("none", KeyboardInterrupt)
        batches, layout, expected = vectors(), sten.NM(2, 4), 6
        if changed == "weights":
            with torch.no_grad():
                other.layers[1].up.weight.add_(1)
            expected = 2
        elif changed == "batches":
            batches = batches[:-1]
        elif changed == "layout":
            layout = sten.NM(1, 4)
        else:
            sten.sparsify(other, layout, seen, calibration=calibration)
            other, seen = blocks(), Interrupted("none", KeyboardInterrupt)
            path = sorted(tmp_path.iterdir())[0]
            path.write_bytes(path.read_bytes()[:-1])
            expected = 2
        sten.sparsify(other, layout, seen, calibration=sten.Calibration(batches, folder=tmp_path, commit=commit))
        assert len(seen.seen) >= expected, changed


def test_decisions_for_another_rest_of_the_model_are_made_anew(tmp_path):
    """Only the second block is chosen; what it gets follows from the first."""
    first, second = blocks(), blocks()
    with torch.no_grad():
        second.layers[0].up.weight.mul_(torch.linspace(0, 5, 16)[:, None])
    plain = copy.deepcopy(second)
    arguments = {"layout": sten.NM(2, 4), "sparsifier": sten.SparseGPT(), "weights": "layers.1"}
    for model in (first, second):
        sten.sparsify(model, calibration=sten.Calibration(vectors(), folder=tmp_path), **arguments)
    sten.sparsify(plain, calibration=vectors(), **arguments)
    assert same(dense(second), dense(plain)) and not same(dense(first), dense(plain))


@pytest.mark.filterwarnings("ignore:sten. few tokens")
@pytest.mark.parametrize("method", [sten.SparseGPT(), sten.LeastSquares()], ids=["sparsegpt", "leastsquares"])
def test_inputs_whose_gram_matrix_overflows(method):
    """Finite in every entry, but not in their sum: refused, where the values would be NaN."""
    model = nn.Linear(64, 8)
    before = copy.deepcopy(model)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).sign() * 4.5e18
    with pytest.raises(ValueError, match="Expected finite values of"):
        sten.sparsify(model, sten.NM(2, 4), method, calibration=[x])
    assert as_before(model, before)
