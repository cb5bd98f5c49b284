"""NM of 8, 16 and 32 as bitmaps: their form to the bit, what is refused, and positions of earlier versions."""

import io

import numpy as np
import pytest
import torch
from cases import random_sparse_case
from torch import nn

import sten
from sten.checked import checked
from sten.layouts import NM

BITMAPS = [NM(2, 8), NM(8, 8), NM(4, 16), NM(5, 16), NM(4, 32), NM(16, 32), NM(31, 32)]
every_bitmap = pytest.mark.parametrize("layout", BITMAPS, ids=str)


def positions(parts, layout, shape):
    """The parts as earlier versions stored them: positions of 4 or 8 bits, the first in the lowest bits."""
    bits, rows = 4 if layout.m <= 16 else 8, len(parts["values"])
    matrix = (
        layout.support(parts, (rows, parts["index"].shape[1] * layout.m, *shape[2:])).movedim(1, -1).reshape(rows, -1)
    )
    position = np.array([row.nonzero()[0] for row in matrix.numpy()]) % layout.m
    if bits == 4:
        position = np.pad(position, ((0, 0), (0, position.shape[1] % 2)))
        position = position[:, ::2] | position[:, 1::2] << 4
    return {**parts, "index": torch.from_numpy(position.astype(np.uint8))}


@every_bitmap
def test_index_is_a_bitmap(layout):
    """As compressed-tensors has it: bit c % 8 of byte c // 8 is column c."""
    dense, mask, parts = random_sparse_case(layout, (3, 4 * layout.m))
    bits = np.unpackbits(parts["index"].numpy().reshape(3, -1), axis=1, bitorder="little")
    assert (bits == mask.numpy()).all() and torch.equal(parts["values"], dense[mask].view(3, -1))


def test_the_smaller_form_is_stored():
    stored = {
        n: sum(part.nbytes for part in random_sparse_case(NM(n, 32), (8, 64), torch.bfloat16)[2].values())
        for n in (3, 4, 16)
    }
    assert stored == {3: 16 * (6 + 3), 4: 16 * (8 + 4), 16: 16 * (32 + 4)}  # of 16 groups; 16:32 has .5625 of the bytes


@pytest.mark.parametrize("number", [0b1, 0b111])
def test_other_counts_are_refused(number):
    layout = NM(2, 8)
    _, _, parts = random_sparse_case(layout, (2, 16))
    parts["index"][1, 1, 0] = number
    with pytest.raises(ValueError, match=r"Expected 2 bits for each 8 columns .* got [13] for columns 8 to 15"):
        layout.validate(parts, (2, 16))


@every_bitmap
@pytest.mark.parametrize("width", [32, 35])
def test_positions_become_a_bitmap(layout, width):
    dense, _, parts = random_sparse_case(layout, (3, width))
    old = positions(parts, layout, (3, width))
    _, new, _, _ = checked("NM", {"n": layout.n, "m": layout.m}, old, (3, width))
    assert torch.equal(new["index"], parts["index"]) and torch.equal(layout.unpack(new, (3, width)), dense)
    meta = {name: part.to("meta") for name, part in old.items()}
    assert checked("NM", {"n": layout.n, "m": layout.m}, meta, (3, width))[1]["index"].shape == parts["index"].shape


@pytest.mark.parametrize("byte", [0x12, 0x11, 0x05], ids=hex)
def test_positions_out_of_order_are_refused(byte):
    """Their values would become those of other columns."""
    layout = NM(2, 8)
    _, _, parts = random_sparse_case(layout, (2, 8))
    old = {**parts, "index": torch.tensor([[0x51], [byte]], dtype=torch.uint8)}
    with pytest.raises(sten.FormatError, match="Expected ascending positions"):
        checked("NM", {"n": 2, "m": 8}, old, (2, 8))


@pytest.mark.parametrize("layout", [NM(2, 8), NM(16, 32)], ids=str)
def test_state_dicts_of_earlier_versions_load(layout):
    torch.manual_seed(0)
    model = sten.sparsify(nn.Sequential(nn.Linear(40, 6)), layout, optimizer=None)
    trained = sten.trainable(sten.sparsify(nn.Sequential(nn.Linear(40, 6)), layout))
    want = model[0].weight.detach()
    old = positions(want.parts, layout, want.shape)
    state = {"0.bias": model[0].bias.detach(), "0.weight": old["values"], "0.weight_pattern.index": old["index"]}
    trained.load_state_dict(state)
    assert torch.equal(trained[0].weight.to_dense(), want.to_dense())
    assert trained[0].weight_pattern.index.shape == want.parts["index"].shape


def test_a_dense_twin_in_every_form():
    """Forward and backward pass of a finalized weight, one in training, and one of a dense weight."""
    torch.manual_seed(0)
    x = torch.randn(5, 40)
    for method in (sten.Magnitude(), sten.STE()):
        model = nn.Sequential(nn.Linear(40, 6))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        dense = model[0].weight.detach().clone()
        mask = NM(16, 32).mask(dense.abs())
        sten.sparsify(model, NM(16, 32), method, optimizer=optimizer)
        twin = (dense * mask).requires_grad_()
        want = nn.functional.linear(x, twin, model[0].bias.detach())
        got = model(x)
        torch.testing.assert_close(got, want)
        got.square().sum().backward()
        want.square().sum().backward()
        grad = twin.grad if isinstance(method, sten.STE) else NM(16, 32).pack(twin.grad, mask)["values"]
        torch.testing.assert_close(model[0]._parameters["weight"].grad, grad)
        sten.finalize(model)
        torch.testing.assert_close(model(x), want)


def test_files_hold_the_bits():
    model = sten.sparsify(nn.Sequential(nn.Linear(64, 4)), NM(16, 32))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = sten.sparsify(nn.Sequential(nn.Linear(64, 4)), NM(16, 32))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other[0].weight.to_dense(), model[0].weight.to_dense())
