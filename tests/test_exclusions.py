"""Weights that cannot become sparse as they are: recomputed by a hook, or tied and pruned with several masks."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sten
from sten.layouts import CSR, NM

pytestmark = pytest.mark.usefixtures("one_thread")


def old(name):
    """torch.nn.utils.weight_norm and spectral_norm, deprecated and in use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(nn.utils, name)(nn.Linear(16, 16))


HOOKED = {
    "weight_norm": lambda: old("weight_norm"),
    "spectral_norm": lambda: old("spectral_norm"),
    "parametrizations.weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    "parametrizations.spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
    "parametrizations.orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", HOOKED)
def test_a_normed_layer_is_listed_with_its_reason_and_works_on(name):
    torch.manual_seed(0)
    model = nn.Sequential(HOOKED[name](), nn.Linear(16, 8)).eval()
    x = torch.randn(3, 16)
    inner = model[0](x)
    sten.sparsify(model, CSR(), sparsity=0.5)
    row = next(row for row in sten.summary(model).rows if row.name == "0.weight")
    assert row.layout == "dense" and row.why.endswith("remove that first")
    assert [row.name for row in sten.summary(model).rows] == ["0.weight", "1.weight"]
    torch.testing.assert_close(model[0](x), inner)
    torch.testing.assert_close(model(x), inner @ model[1].weight.to_dense().t() + model[1].bias)
    model.train()(x).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight cannot be made sparse: .* remove that first"):
        sten.sparsify(model, CSR(), sparsity=0.5, weights="0.weight")


def test_without_the_norm_the_layer_is_an_ordinary_one():
    layer = old("weight_norm")
    want = layer.weight.detach().clone()
    nn.utils.remove_weight_norm(layer)
    sten.sparsify(layer, NM(2, 4))
    assert torch.equal(layer.weight.to_dense(), want * NM(2, 4).mask(want.abs()))


class Tied(nn.Module):
    """A language model's tie: embedding and output layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 16), nn.Linear(16, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(nn.functional.one_hot(x, 16).float()))


def half(which):
    return (torch.arange(256) % 2 == which).view(16, 16)


PRUNED = {"the first": (0, None), "the second": (None, 1), "both, several masks": (0, 1)}


@pytest.mark.parametrize("make", [Tied, Twice])
@pytest.mark.parametrize("masks", PRUNED.values(), ids=PRUNED)
@pytest.mark.parametrize("how", ["keep", "magnitude", "dynamic", "trainable"])
def test_a_tied_weight_with_several_masks_is_refused_before_anything_changes(make, masks, how):
    torch.manual_seed(0)
    model = make()
    for layer, which in zip((model.embedding, model.head), masks, strict=True):
        if which is not None:
            prune.custom_from_mask(layer, "weight", half(which))
    x, keys = torch.arange(4), list(model.state_dict())
    want = model(x).detach()
    more = {
        "keep": {"sparsifier": None},
        "magnitude": {"sparsity": 0.75},
        "dynamic": {"sparsifier": sten.SET(24, every=4), "sparsity": 0.75},
        "trainable": {"sparsity": 0.75, "optimizer": torch.optim.SGD(model.parameters(), 0.1)},
    }[how]
    names = ["embedding.weight", "head.weight"]
    with pytest.raises(
        ValueError, match=r"Expected one pruning mask for embedding\.weight and head\.weight, .* several"
    ):
        sten.sparsify(model, CSR(), weights=names, **more)
    assert list(model.state_dict()) == keys and torch.equal(model(x), want)
    with pytest.raises(ValueError, match="tied"):
        sten.sparsify(model, CSR(), weights="head.weight", **more)
    assert list(model.state_dict()) == keys and torch.equal(model(x), want)


@pytest.mark.parametrize("make", [Tied, Twice])
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_tied_weight_with_one_mask_is_taken_over(make, optimizer):
    torch.manual_seed(0)
    model = make()
    for layer in (model.embedding, model.head):
        prune.custom_from_mask(layer, "weight", half(1))
    x = torch.arange(4)
    want = model(x).detach()
    given = torch.optim.SGD(model.parameters(), 0.1) if optimizer else None
    sten.sparsify(model, CSR(), None, weights=["embedding.weight", "head.weight"], optimizer=given)
    torch.testing.assert_close(model(x).detach(), want)
    sten.finalize(model)
    assert model.embedding.weight is model.head.weight and torch.equal(model.head.weight.mask(), half(1))
