"""What a newcomer tries: it works as it was meant, or one sentence says what would; warnings name weight and line."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import copy_of
from small import mlp
from torch import nn

import sten
from sten import dispatch
from sten.layouts import BSR, CSR, NM, Masked

REFUSED = {
    "sten.sparsify(m, 0.9)": (TypeError, r"for layout=, got 0\.9; .*sparsity=0\.9"),
    "sten.sparsify(m, 'csr', sparsity=0.9)": (TypeError, r"got 'csr'; write sten\.CSR\(\)"),
    "sten.sparsify(m, layout='2:4')": (TypeError, r"a layout such as sten\.NM\(2, 4\)"),
    "sten.sparsify(m, sten.CSR, sparsity=0.9)": (TypeError, r"the class CSR; write sten\.CSR\(\)"),
    "sten.sparsify(m, sten.NM)": (TypeError, r"write sten\.NM\(n, m\)"),
    "sten.sparsify(m, {'*': 'bsr'}, sparsity=0.9)": (TypeError, r"got 'bsr'; write sten\.BSR\(\)"),
    "sten.sparsify(m, {0: sten.CSR()}, sparsity=0.9)": (TypeError, "as the keys of layout=, got 0"),
    "sten.sparsify(m, {nn.Conv2d: sten.CSR()}, sparsity=0.9)": (ValueError, "Expected Conv2d to match"),
    "sten.sparsify(m, {nn.Linear(2, 2): sten.CSR()}, sparsity=0.9)": (ValueError, "Expected this Linear to match"),
    "sten.sparsify(m, sten.CSR())": (ValueError, r"such as sparsity=0\.9"),
    "sten.sparsify(m, sparsity=90)": (ValueError, r"from 0 to 1, .* got 90; for 90 %, write 0\.9"),
    "sten.sparsify(m, sten.CSR(), 0.9)": (TypeError, r"for sparsifier=, got 0\.9; .*sparsity=0\.9"),
    "sten.sparsify(m, sparsity={'0.*': 0.9})": (TypeError, r"sten\.PerWeight"),
    "sten.sparsify(m, sten.CSR(), sten.RigL, sparsity=0.9)": (TypeError, r"write sten\.RigL\(total_steps\)"),
    "sten.sparsify(m, sten.CSR(), 'rigl', sparsity=0.9)": (TypeError, r"write sten\.RigL\(total_steps\)"),
    "sten.sparsify(m, sparsity=0.9, weights='eight')": (ValueError, r"'\*eight\*' matches names that contain it"),
    "sten.sparsify(m, sparsity=0.9, weights=torch.Tensor)": (TypeError, r"Expected .*function of \(name, module, attr"),
    "sten.sparsify(m, sparsity=0.9, weights=lambda n, mod: True)": (TypeError, r"write lambda name, module, attribute"),
    "sten.sparsify(m, sparsity=0.9, weights='re:*')": (ValueError, r"after 're:', got '\*' .*'re:\.\*' matches all"),
    "sten.sparsify(m.state_dict(), sparsity=0.9)": (TypeError, "got OrderedDict; pass the model itself"),
    "sten.sparsify(m.parameters(), sparsity=0.9)": (TypeError, "got generator; pass the model itself"),
    "sten.prune(m, 0.9)": (AttributeError, r"got 'prune'; sten\.sparsify\(model, sparsity=0\.9\)"),
    "sten.load_state_dict(m, m.state_dict())": (AttributeError, r"model\.load_state_dict\(state\)"),
    "sten.Sparse": (AttributeError, r"got 'Sparse'; help\(sten\) lists all"),
    "sten.CSR(0.9)": (TypeError, r"Expected CSR\(\), got CSR\(0\.9\); .*sparsity= of sten\.sparsify"),
    "sten.NM(2)": (TypeError, r"Expected NM\(n, m\), got NM\(2\); .*'m'"),
    "sten.Magnitude(0.9)": (TypeError, r"Expected Magnitude\(\), got Magnitude\(0\.9\); .*sparsity= of"),
    "sten.RigL(sparsity=0.9)": (TypeError, r"Expected RigL\(total_steps, .*sparsity= of sten\.sparsify"),
    "sten.RigL()": (TypeError, r"Expected RigL\(total_steps, .*, got RigL\(\); .*'total_steps'"),
    "sten.ERK()": (TypeError, r"Expected ERK\(sparsity\), got ERK\(\)"),
    "sten.which('Linear', (1, 12), sten.sparsify(m, sparsity=0.5)[0].weight)": (ValueError, "one of .*linear"),
    "sten.which('linear', (1, 12), m[0].weight)": (TypeError, r"convert it by sten\.from_dense or sten\.sparsify"),
    "sten.save('m.safetensors', m)": (TypeError, "got str; pass the model itself"),
    "sten.save(m.state_dict(), 'm.safetensors')": (TypeError, "got OrderedDict; pass the model itself"),
    "sten.save(m, 'nodir/m.safetensors')": (FileNotFoundError, "nodir'; make it first"),
    "sten.load('m.safetensors')": (TypeError, r"Expected sten\.load\(model, path\)"),
    "sten.SparseTensor({'values': torch.ones(1)}, sten.CSR(), (4, 4))": (TypeError, r"use sten\.from_dense"),
    "sten.sparsify(stored_by_torch(), sparsity=0.5)": (TypeError, r"weight is stored as torch\.sparse_csr: .*to_dense"),
}


def stored_by_torch() -> nn.Module:
    layer = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR is in beta
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    return layer


@pytest.mark.parametrize("guess", REFUSED)
def test_a_guess_is_answered_in_one_sentence(guess, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, (error, match) = mlp(), REFUSED[guess]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match) as caught:
        eval(guess, {"sten": sten, "torch": torch, "nn": nn, "m": model, "stored_by_torch": stored_by_torch})
    text = str(caught.value)
    assert type(caught.value) is error and "\n" not in text and text.endswith("."), text
    after = model.state_dict()
    if "which('Linear'" not in guess:
        assert all(torch.equal(after[name], before[name]) for name in before) and not list(tmp_path.iterdir())


def test_wrong_arguments_of_an_own_layout_or_method():
    """The metaclass changes nothing else: signatures, copies and errors of the class itself."""
    assert str(inspect.signature(sten.CSR)) == "()" and list(inspect.signature(sten.NM).parameters) == ["n", "m"]
    assert inspect.signature(sten.RigL).parameters["every"].default == 100
    assert pickle.loads(pickle.dumps(NM(2, 4))) == copy.deepcopy(NM(2, 4)) == NM(2, 4)
    with pytest.raises(TypeError, match="whole number for n of NM"):
        NM(2.0, 4)
    with pytest.raises(TypeError, match="abstract"):
        sten.Layout()

    class Mine(sten.extend.PatternMethod):
        def __init__(self, much) -> None:
            self.much = much + 1

    with pytest.raises(TypeError, match=r"Expected Mine\(much\), got Mine\(more=3\); .*'much'"):
        Mine(more=3)
    with pytest.raises(TypeError, match="can only concatenate"):
        Mine("a")
    assert Mine(1).much == 2


# an operator without a rule


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        out, _ = self.lstm(x)  # the line that a warning shows
        return self.fc(out)


HERE = Path(__file__)
LINE = next(i for i, line in enumerate(HERE.read_text().splitlines(), 1) if line.endswith("that a warning shows"))


def warned(call) -> tuple[str, str, int]:
    """The one warning of a call: its text, file and line."""
    dispatch._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = [w for w in caught if "dense copy" in str(w.message)]
    return str(one.message), one.filename, one.lineno


def test_a_dense_copy_is_warned_of_by_weight_and_line():
    inner = sten.sparsify(Recurrent(), Masked(), sparsity=0.5, weights="lstm*")
    model = nn.Sequential(inner, nn.ReLU())
    x = torch.randn(3, 2, 8)
    text, file, line = warned(lambda: model(x))
    assert "operator 'lstm' has no rule for 0.lstm.weight_ih_l0 (Masked(), shape (32, 8))" in text
    assert (file, line) == (__file__, LINE)
    assert "no rule for lstm.weight_ih_l0 (" in warned(lambda: inner(x))[0]
    with (
        sten.strict(),
        pytest.raises(sten.DensifyError, match=r"rule for 0\.lstm\.weight_ih_l0 \(Masked\(\), .*'lstm'"),
    ):
        model(x)


class Odd(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.cumsum(0))


@pytest.mark.parametrize("form", ["finalized", "trainable"])
@pytest.mark.parametrize("layout", [CSR(), NM(2, 4), BSR((4, 4))], ids=str)
def test_both_forms_and_calls_outside_of_a_module(layout, form):
    model = nn.Sequential(nn.ReLU(), Odd(8, 8))
    sten.sparsify(model, layout, sparsity=None if layout.rate else 0.5)
    if form == "trainable":
        sten.trainable(model)
    here = inspect.currentframe().f_lineno
    text, file, line = warned(lambda: model(torch.ones(1, 8)))
    assert f"'cumsum' has no rule for 1.weight ({layout}, shape (8, 8))" in text and file == __file__ and line < here
    text, file, line = warned(lambda: torch.cumsum(model[1].weight, 0))
    assert (file, line) == (__file__, inspect.currentframe().f_lineno - 1)
    assert f"({layout}, shape (8, 8))" in text and ("1.weight" in text) == (form == "trainable")


def test_a_missing_kernel_shows_the_callers_line():
    x, w = torch.ones(1, 8), sten.from_dense(torch.eye(8), copy_of(CSR()))
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="no kernel for 'linear' with OtherCSR") as caught:
        F.linear(x, w)
    assert (caught[0].filename, caught[0].lineno) == (__file__, inspect.currentframe().f_lineno - 1)


def test_it_is_warned_of_once():
    model = sten.sparsify(nn.Sequential(Odd(8, 8), Odd(8, 8)), CSR(), sparsity=0.5)
    assert "0.weight" in warned(lambda: model(torch.ones(1, 8)))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 8))


def test_a_method_without_a_first_mask():
    class Late(sten.extend.PatternMethod):
        def update(self, view):
            return sten.extend.Edit()

    with pytest.raises(ValueError, match=r"^0\.weight: .*Expected a first mask from Late\.update, .* got Edit"):
        sten.sparsify(mlp(), CSR(), Late(), sparsity=0.5)
