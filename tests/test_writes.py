"""Writing to a sparse tensor: what fits the pattern happens, as on the dense twin; the rest is refused and changes
nothing. What shares no memory with it, such as a row, cannot be written at all."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from weights import LAYOUTS, make, one_sentence

import sten
from sten.layouts import CSR, NM

every_form = pytest.mark.parametrize(
    ("layout", "flip"), [(layout, flip) for layout in LAYOUTS for flip in (False, True)], ids=str
)
pytestmark = pytest.mark.filterwarnings("ignore:sten. operator")


def pair(layout, flip, shape=(8, 12)):
    """A sparse tensor, its dense twin and its mask."""
    w, dense = make(layout, shape)
    if flip:
        w, dense = w.t().detach(), dense.t()
    return w, dense.clone(), w.mask()


def assign(t, index, value):
    t[index] = value


FITTING = {
    "row = 0": lambda t, mask: assign(t, 0, 0),
    "column = 0": lambda t, mask: assign(t, (slice(None), 1), 0.0),
    "slice = 0": lambda t, mask: assign(t, slice(1, 3), 0),
    "everything = 0": lambda t, mask: assign(t, ..., 0),
    "indices = 0": lambda t, mask: assign(t, torch.tensor([0, 2]), 0),
    "mask = 5": lambda t, mask: assign(t, mask, 5.0),
    "row = itself doubled": lambda t, mask: assign(t, 1, t[1] * 2),
    "row *= 2": lambda t, mask: exec("t[2] *= 2", {"t": t}),
    "column *= 3": lambda t, mask: exec("t[:, 1] *= 3", {"t": t}),
    "column /= 4": lambda t, mask: exec("t[:, 2] /= 4", {"t": t}),
    "row -= masked": lambda t, mask: exec("t[1] -= m", {"t": t, "m": mask[1].float()}),
    "data row = 0": lambda t, mask: assign(t.data, 0, 0),
    "transposed row = 0": lambda t, mask: assign(t.t(), 0, 0),
    "fill_diagonal_": lambda t, mask: t.fill_diagonal_(0),
    "index_fill_": lambda t, mask: t.index_fill_(0, torch.tensor([1, 3]), 0),
    "tril_": lambda t, mask: t.tril_(),
    "masked_scatter_": lambda t, mask: t.masked_scatter_(mask, torch.arange(96.0)),
    "out= of a factor": lambda t, mask: torch.mul(mask.float(), 3, out=t),
    "out= of itself": lambda t, mask: torch.neg(t, out=t),
    "out= of zeros": lambda t, mask: torch.zeros(t.shape, out=t),
    "out= of where": lambda t, mask: torch.where(mask, t, 0 * mask, out=t),
    "relu in place": lambda t, mask: F.relu(t, inplace=True),
    "dropout in place": lambda t, mask: F.dropout(t, 0.5, True, True),
    "foreach": lambda t, mask: torch._foreach_tan_([t]),
    "copy_": lambda t, mask: t.copy_(2 * mask),
}
REFUSED = {
    "row = 1": lambda t: assign(t, slice(0, 4), 1.0),
    "entry off the pattern": lambda t: assign(t, tuple((~as_mask(t)).nonzero()[0].tolist()), 7.0),
    "cos_": lambda t: t.cos_(),
    "cumsum_": lambda t: t.cumsum_(0),
    "out=": lambda t: torch.exp(t, out=t),
    "foreach": lambda t: torch._foreach_cos_([torch.ones(2), t]),
    "add_": lambda t: t.add_(torch.ones(t.shape)),
    "resized out=": lambda t: torch.add(torch.ones(2, 2), 1, out=t),
}
READ_ONLY = {
    "row": lambda t: t[0].zero_(),
    "row of data": lambda t: t.data[0].mul_(2),
    "rows": lambda t: [row.zero_() for row in t],
    "chunk": lambda t: t.chunk(2)[0].zero_(),
    "split": lambda t: t.split(2)[1].add_(1),
    "unbind": lambda t: t.unbind()[0].fill_(0),
    "narrow": lambda t: t.narrow(0, 0, 2).zero_(),
    "select": lambda t: t.select(1, 0).zero_(),
    "diagonal": lambda t: t.diagonal().zero_(),
    "flatten": lambda t: t.contiguous().clone().flatten().requires_grad_(False),
    "unsqueeze": lambda t: t.unsqueeze(0).zero_(),
    "view of a view": lambda t: t[0][1:].zero_(),
    "assignment into a view": lambda t: assign(t[0], 0, 1.0),
    "out= a view": lambda t: torch.ones(t.shape[1], out=t[0]),
    "copy_ into a view": lambda t: t[0].copy_(torch.ones(t.shape[1])),
    "activation on a view": lambda t: F.relu(t[0:2], inplace=True),
    "init of a view": lambda t: nn.init.zeros_(t[0:2]),
    "foreach on views": lambda t: torch._foreach_zero_([t[0], t[1]]),
    "data of a view": lambda t: setattr(t[0], "data", torch.ones(t.shape[1])),
    "numpy of a view": lambda t: t[0].numpy().fill(0),
}
del READ_ONLY["flatten"]  # of a transposed tensor it is a copy in torch, too


def as_mask(t):
    return t.mask() if isinstance(t, sten.SparseTensor) else t != 0


@every_form
@pytest.mark.parametrize("act", FITTING)
def test_what_fits_the_pattern_is_written(layout, flip, act):
    w, dense, mask = pair(layout, flip)
    for t in (w, dense):
        torch.manual_seed(0)
        with torch.no_grad():
            FITTING[act](t, mask)
    torch.testing.assert_close(w.to_dense(), dense)
    w.sparse_layout.validate(w.parts, w.stored_shape)


@every_form
@pytest.mark.parametrize("act", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(layout, flip, act):
    w, dense, _ = pair(layout, flip)
    version = w.parts["values"]._version
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as error, torch.no_grad():
        REFUSED[act](w)
    assert one_sentence(error) and "Expected" in str(error.value)
    assert torch.equal(w.to_dense(), dense) and w.parts["values"]._version == version


@every_form
@pytest.mark.parametrize("act", READ_ONLY)
def test_views_are_read_only(layout, flip, act):
    w, dense, _ = pair(layout, flip)
    with pytest.raises((RuntimeError, ValueError)) as error, torch.no_grad():
        READ_ONLY[act](w)
    assert "w[i] = value" in str(error.value) or "read-only" in str(error.value)
    assert torch.equal(w.to_dense(), dense)


def test_a_refused_call_leaves_dense_operands_as_they_were():
    w, _ = make(CSR(), (8, 12))
    other, mean = torch.ones(3), torch.zeros(12)
    with pytest.raises(ValueError):
        torch._foreach_exp_([other, w])
    values, indices = torch.zeros(8, 12), torch.full((8, 12), 7)
    with pytest.raises(ValueError):
        torch.cummax(torch.randn(8, 12), 0, out=(w, indices))
    assert torch.equal(other, torch.ones(3)) and (indices == 7).all() and not values.any() and not mean.any()


def test_reading_a_view_is_as_dense():
    w, dense = make(NM(2, 4), (8, 12))
    for read in (
        lambda t: t[1] + t[2], lambda t: t[3:5] @ torch.ones(12), lambda t: torch.stack(list(t)), lambda t: t[0].sum(),
        lambda t: t.view(-1)[3:], lambda t: t[0].clone().zero_(), lambda t: t.unsqueeze(0) * 2,
        lambda t: torch.tensor(t[0].tolist()), lambda t: copy.deepcopy(t[1]), lambda t: t[0:2].T.contiguous(),
        lambda t: torch.from_numpy(np.array(t[0])),
    ):  # fmt: skip
        assert torch.equal(torch.as_tensor(read(w)), torch.as_tensor(read(dense)))
    assert type(w[0] + 1) is torch.Tensor and type(w[0].clone()) is torch.Tensor
    view = w[0]
    view *= 2  # a new tensor
    assert type(view) is torch.Tensor and torch.equal(w.to_dense(), dense)


def test_gradients_through_a_view_and_an_assignment():
    w, dense = make(CSR(), (8, 12), torch.float64)
    w, dense = w.requires_grad_(), dense.requires_grad_()
    for t in (w, dense):
        (t[1] * t[2].exp()).sum().backward()
    torch.testing.assert_close(w.grad.to_dense(), dense.grad * w.mask())
    with pytest.raises(RuntimeError, match="leaf"):
        w[0] = 0
    (grad,) = torch.autograd.grad(w[3].sum() + w.relu().sum(), w)
    assert grad.same_pattern(w)


def test_no_views_where_autograd_or_a_compiler_watches():
    w, dense = make(CSR(), (8, 12))
    with torch.inference_mode():
        inference = w.clone()
        inference[0] = 0
        assert not inference.to_dense()[0].any()
        with pytest.raises(RuntimeError, match="written"):
            inference[1].zero_()
    compiled = torch.compile(lambda t: t[0] * 2 + t.flatten()[:12], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(w), dense[0] * 2 + dense.flatten()[:12])
    got = torch.vmap(lambda x: x * w[0])(torch.ones(3, 12))
    torch.testing.assert_close(got, dense[0].expand(3, 12))
