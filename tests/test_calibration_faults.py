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


def test_the_note_names_the_folder(tmp_path):
    """With a folder, the error says where the decisions are; without files, or without a folder, it does not."""
    for at, commit, notes in (
        ("layers.2.up.weight", "end", [f"what was decided is in '{tmp_path}'; the same call again goes on from there"]),
        ("layers.2.up.weight", "block", ["2 blocks are sparse and complete", f"is in '{tmp_path}'"]),
    ):
        with pytest.raises(KeyboardInterrupt) as caught:
            calibration = sten.Calibration(vectors(), folder=tmp_path, commit=commit)
            sten.sparsify(blocks(), sten.NM(2, 4), Interrupted(at, KeyboardInterrupt), calibration=calibration)
        found = caught.value.__notes__
        assert len(found) == len(notes) and all(note in text for note, text in zip(notes, found, strict=True))
    for more in ({}, {"folder": tmp_path / "empty"}):
        with pytest.raises(KeyboardInterrupt) as caught:
            calibration = sten.Calibration(vectors(), **more)
            sten.sparsify(
                blocks(), sten.NM(2, 4), Interrupted("layers.0.up.weight", KeyboardInterrupt), calibration=calibration
            )
        assert not getattr(caught.value, "__notes__", [])


class Routed(nn.Module):
    """Two experts, of which the second gets one token of each batch, and a layer for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        x = self.first(x).flatten(0, -2)
        return torch.cat([self.experts[0](x[:-1]), self.experts[1](x[-1:])])


def test_the_weights_with_the_fewest_tokens_come_first():
    with pytest.warns(
        UserWarning, match=r"reached experts\.1\.weight \(1\), experts\.0\.weight \(5\), first\.weight \(6\);"
    ):
        sten.sparsify(Routed(), sten.NM(2, 4), sten.SparseGPT(), calibration=[torch.randn(2, 3, 8)])


# ---- conversions inside of a calibration


def _converts(kind: str, model: nn.Module):
    """A conversion that a hook of one layer calls."""
    acts = {
        "sparsify": lambda: sten.sparsify(model, sten.CSR(), sparsity=0.5),
        "the same": lambda: sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=vectors()),
        "a part": lambda: sten.sparsify(model.layers[1], sten.CSR(), sparsity=0.5),
        "sensitivity": lambda: sten.sensitivity(model, [sten.NM(2, 4)], vectors()),
        "finalize": lambda: sten.finalize(model),
    }
    return lambda module, args: acts[kind]() and None


@pytest.mark.parametrize("kind", ["sparsify", "the same", "a part", "sensitivity", "finalize"])
def test_a_conversion_from_inside_is_refused(kind):
    model = blocks()
    before = copy.deepcopy(model)
    handle = model.layers[0].up.register_forward_pre_hook(_converts(kind, model))
    with pytest.raises(RuntimeError, match=r"Expected no conversion of .* while sten runs it for calibration="):
        sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=vectors())
    handle.remove()
    assert as_before(model, before)
    sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=vectors())


# ---- where inputs wait


class Sliced(nn.Module):
    """A block whose output is a small view of a large tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).repeat(1, 100)[:, :8]


def test_a_view_is_kept_without_the_rest_of_its_storage(tmp_path):
    """On the disk the files have the size of what the next block gets, and the result is the same."""
    sizes, results = [], []

    def measure(module, args):
        sizes.extend(path.stat().st_size for path in tmp_path.rglob("*.pt"))

    for offload in (None, "cpu", tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(*(Sliced() for _ in range(3)))
        if offload is tmp_path:
            model[2].register_forward_pre_hook(measure)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        calibration = sten.Calibration([x, x + 1], offload=offload)
        sten.sparsify(model, sten.NM(2, 4), sten.SparseGPT(), calibration=calibration)
        results.append(dense(model))
    assert sizes and max(sizes) < 2 * 64 * 8 * 4 + 4096  # 205 kB with the rest
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_a_view_on_the_cpu_keeps_no_other_memory_alive():
    from sten.calibration.inputs import Shelf

    large = torch.randn(1000, 8)
    for view in (large[:4], large[:, :1], large[3:5].t()):
        kept = Shelf("cpu").put(view)()
        assert torch.equal(kept, view) and kept.untyped_storage().nbytes() == view.numel() * 4
    whole = torch.randn(4, 8)
    assert Shelf("cpu").put(whole)() is whole and Shelf("cpu").put(whole.t())().data_ptr() == whole.data_ptr()
