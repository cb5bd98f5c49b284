"""A model that is dropped is freed: nothing of sten's keeps weights, engines or gradients alive."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from training_models import batch, loss_of, mlp, train

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, VectorNM
from sten.training.reminders import REMINDERS

METHODS = [
    (sten.Magnitude(), CSR()), (sten.Static(), GroupedNM(1, 4, 4)), (sten.SET(48, every=6), CSR()),
    (sten.RigL(48, every=6), CSR()), (sten.RigL(48, every=6), BSR((4, 4))),
    (sten.DSTEE(48, every=6), VectorNM(1, 4, 4)),
    (sten.SRigL(48, every=6), FanIn()), (sten.SparseMomentum(48, every=6), CSR()), (sten.Gradual(2, 40, 6), CSR()),
    (sten.BlockPruneGrow(2, 40, 6), BSR((4, 4))), (sten.STE(), NM(2, 4)), (sten.SRSTE(), NM(2, 4)),
    (sten.DecayingMask(40), NM(1, 4)), (sten.DecayingStructure(40), NM(1, 4)), (sten.Transposable(6), NM(2, 4)),
    (sten.BDWP(), NM(2, 4)), (sten.BiMask(6), NM(2, 4)), (sten.CAST(40), NM(2, 4)),
]  # fmt: skip


def dropped(method, layout, steps, end):
    """Weak references to what a run of so many steps leaves behind."""
    model = mlp()
    kind = sten.optim.AdamS if method.optimizer else torch.optim.Adam
    optimizer = kind(model.parameters(), 1e-2)
    attached = end != "unattached"
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer if attached else None)
    if attached:
        train(model, optimizer, steps)
    layer = model[0]
    things = [model, layer, layer._parameters["weight"], optimizer]
    things += [w for w in [layer._modules.get("weight_pattern")] if w is not None]
    if end == "backward":
        loss_of(model, 0).backward()
    elif end == "finalize":
        sten.finalize(model)
        model(batch(0)[0])
    elif end == "average":
        things.append(torch.optim.swa_utils.AveragedModel(model))
    return [weakref.ref(thing) for thing in things]


@pytest.mark.parametrize("end", ["step", "backward", "finalize", "average", "unattached"])
@pytest.mark.parametrize("steps", [2, 5, 7])  # a mask update comes at step 6
@pytest.mark.parametrize("case", METHODS, ids=lambda c: f"{type(c[0]).__name__}-{type(c[1]).__name__}")
def test_a_dropped_model_is_freed(case, steps, end):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refs = dropped(*case, steps, end)
    gc.collect()
    assert not any(ref() for ref in refs)


def test_a_dropped_model_is_reminded_of_no_more():
    gc.collect()
    before = len(REMINDERS)
    model = sten.sparsify(mlp(), CSR(), sten.SET(24, every=4), 0.5)
    assert len(REMINDERS) == before + 1
    del model
    gc.collect()
    assert len(REMINDERS) == before


def test_products_keep_nothing_of_a_weight():
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sten.sparsify(layers, CSR(), sparsity=0.9)
    layers(torch.randn(3, 64)).sum().backward()
    refs = [weakref.ref(part) for layer in layers for part in layer.weight.parts.values()]
    del layers
    gc.collect()
    assert not any(ref() for ref in refs)
