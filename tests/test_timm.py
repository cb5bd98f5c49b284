"""Models of timm, in every form: the same as with the dense weights that they compute with."""

from __future__ import annotations

import copy

import pytest
import torch
from forms import every_form
from small import every_layout, rate

import sten

try:  # torchvision, which timm needs, does not import everywhere where it is installed
    import timm
except (ImportError, RuntimeError) as error:
    pytest.skip(f"timm: {error}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
MODELS = {  # name: (arguments, size of an image, weights)
    "vit_tiny_patch16_224": ({"img_size": 16, "patch_size": 8, "depth": 2}, 16, "*.fc?.weight"),
    "resnet10t": ({}, 32, "fc.weight"),
}


@pytest.mark.cell("timm")
@every_layout
@every_form
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_a_step(layout, form, name):
    torch.manual_seed(0)
    arguments, size, weights = MODELS[name]
    model = timm.create_model(name, num_classes=8, **arguments).eval()
    method = sten.Magnitude()
    if form == "dense weight":
        method = sten.Gradual(1, 2) if layout.rate is None else sten.STE()
    sten.sparsify(model, layout, method, rate(layout), weights=weights)
    if form == "trainable":
        sten.trainable(model)
    twin, x = sten.densify(copy.deepcopy(model)), torch.randn(2, 3, size, size)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = model(x).square().mean()
    before.backward()
    optimizer.step()
    assert model(x).square().mean() < before
