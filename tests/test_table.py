"""docs/training.md is what the code does: its table method x layout x optimizer, its signatures, its programs."""

import inspect
import re
import warnings

import pytest
import torch
from cases import SMALL
from torch import nn
from torch.nn import functional as F
from training_methods import METHODS, PAGE, SUPPORTED
from training_models import OPTIMIZERS, batch, dense_weights, loss_of, masks, mlp, train

import sten

pytestmark = pytest.mark.usefixtures("one_thread")

ADAMS = {"adams": lambda p: sten.optim.AdamS(p, lr=1e-2)}


ALL = [(method, layout) for method in METHODS for layout in SMALL]
YES = [cell for cell in ALL if SUPPORTED[type(cell[0]).__name__, type(cell[1]).__name__] == "yes"]
NO = [cell for cell in ALL if cell not in YES]


def name_of(cell):
    return f"{type(cell[0]).__name__}-{cell[1]}" if isinstance(cell, tuple) else str(cell)


def optimizers_of(method):
    return ADAMS if method.optimizer else OPTIMIZERS


def build(cell, optimizer, sparsity):
    method, layout = cell
    model = mlp()
    opt = optimizers_of(method)[optimizer](model.parameters())
    sten.sparsify(model, layout, method, None if layout.rate else sparsity, optimizer=opt)
    return model, opt


def test_the_table_has_every_cell():
    assert set(SUPPORTED.values()) == {"yes", "no"} and len(SUPPORTED) == len(ALL)
    assert set(SUPPORTED) == {(type(method).__name__, type(layout).__name__) for method, layout in ALL}


@pytest.mark.parametrize(
    ("cell", "optimizer"), [(cell, name) for cell in YES for name in optimizers_of(cell[0])], ids=name_of
)
def test_supported_cells_learn_and_end_in_their_layout(cell, optimizer):
    method, layout = cell
    model, opt = build(cell, optimizer, 0.5)
    before = [float(loss_of(model, step)) for step in range(100, 104)]
    train(model, opt, 16)
    assert sum(float(loss_of(model, step)) for step in range(100, 104)) < sum(before)
    pairs = [(torch.where(m, w, 0), w) for m, w in zip(masks(model), dense_weights(model), strict=True)]
    x = batch(0)[0]
    want = model(x).detach()
    sten.finalize(model)
    left = [layer.weight.mask() for layer in model if isinstance(layer, nn.Linear)]
    assert model[0].weight.sparse_layout == layout
    assert sum(int(m.sum()) for m in left) / 768 == pytest.approx(layout.rate or 0.5, abs=0.1)
    if isinstance(method, sten.extend.PatternMethod) or method.zero_pruned:
        assert all(torch.equal(a, b) for a, b in pairs)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", NO, ids=name_of)
def test_refused_cells_raise_one_sentence_and_change_nothing(cell):
    model, (method, layout) = mlp(), cell
    optimizer = next(iter(optimizers_of(method).values()))(model.parameters())
    with pytest.raises(ValueError) as error:
        sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
    assert "\n" not in str(error.value) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("stop", [3, 7, 8])
@pytest.mark.parametrize("cell", YES, ids=name_of)
def test_resume_is_bit_identical(cell, stop, tmp_path):
    name = next(iter(ADAMS)) if cell[0].optimizer else "adamw"
    straight, optimizer = build(cell, name, 0.75)
    train(straight, optimizer, 14)
    model, optimizer = build(cell, name, 0.75)
    train(model, optimizer, stop)
    sten.save_run(model, tmp_path / "run.pt", optimizer, step=stop)
    again, optimizer = build(cell, name, 0.75)
    train(again, optimizer, 2, first=50)  # leftovers of another run
    assert sten.load_run(again, tmp_path / "run.pt", optimizer) == {"step": stop}
    train(again, optimizer, 14 - stop, first=stop)
    for have, want in zip(dense_weights(again), dense_weights(straight), strict=True):
        assert torch.equal(have, want)
    for have, want in zip(masks(again), masks(straight), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_signatures(method):
    cls = type(method)
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(cls).parameters.values()]
    assert f"\nsten.{cls.__name__}{inspect.Signature(parameters)}\n" in PAGE


def test_the_pages_programs_run():
    loss, data = F.cross_entropy, [batch(step) for step in range(2)]
    space = {"torch": torch, "sten": sten, "model": mlp(), "loss": loss, "data": data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
            exec(compile(code, "docs/training.md", "exec"), space)
    assert space["model"][0].weight.density == 0.25
