"""CSR's and GroupedNM's Triton kernels against a dense product, in the interpreter or on a GPU."""

import itertools

import pytest
import torch
from triton_cases import ACTIVATIONS, DEVICE, close, poisoned_outputs, random  # noqa: F401

from sten.kernels import csr, grouped_nm


def csr_parts(outputs, inputs, density=0.3):
    dense = random(outputs, inputs) * (random(outputs, inputs, seed=9) < torch.special.ndtri(torch.tensor(density)))
    dense[0] = 0
    row, col = dense.nonzero(as_tuple=True)
    crow = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0)).int()
    return (dense[row, col], crow, col.int()), dense


def grouped_parts(outputs, inputs, n, m, g, seed=0):
    """Random (values, index, pattern, dense)."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int32)
    patterns, strips = len(pattern), -(-outputs // m)
    slots = patterns * g
    chunks = -(-inputs // slots)
    index = torch.rand(chunks, strips, slots, generator=generator).argsort(-1)
    column = index + torch.arange(chunks)[:, None, None] * slots
    rows = torch.arange(strips)[:, None, None] * m + pattern.repeat_interleave(g, 0)[None]  # strips, slots, n
    values = torch.randn(chunks, strips, slots, n, generator=generator)
    values[(column[..., None] >= inputs) | (rows[None] >= outputs)] = 0
    dense = torch.zeros(strips * m, chunks * slots)
    dense[rows[None].expand_as(values), column[..., None].expand_as(values)] = values
    shape = (chunks, strips, patterns, g)
    parts = (values.reshape(*shape, n), index.short().reshape(shape), pattern)
    return [part.to(DEVICE) for part in parts], dense[:outputs, :inputs].contiguous().to(DEVICE)


GROUPED = [(16, 24, 1, 4, 4), (22, 50, 2, 4, 2), (20, 40, 1, 10, 3), (25, 600, 5, 10, 2), (70, 90, 1, 40, 2)]


@pytest.mark.parametrize("path", ["few", "cusparse", "expand"])
def test_csr_linear(path, monkeypatch):
    monkeypatch.setattr(csr.linear, "choose", lambda *a, **facts: (path, "the test says so"))
    parts, dense = csr_parts(37, 50)
    bias = random(37)
    for tokens in (1, 3, 17, 63):
        x = random(tokens, 50)
        close(csr.linear(x, *parts, bias, out_features=37), x @ dense.T + bias)


@pytest.mark.parametrize("density", [0.01, 0.99])
def test_csr_sparse_and_full(density):
    parts, dense = csr_parts(20, 40, density)
    x = random(3, 40)
    close(csr.linear(x, *parts, out_features=20), x @ dense.T)
    assert torch.equal(csr.expand(*parts, in_features=40), dense)
    assert torch.equal(csr.collect(dense, *parts[1:]), parts[0])


@pytest.mark.parametrize("tokens", (1, 17))
def test_csr_gradients(tokens):
    parts, dense = csr_parts(37, 50)
    x, grad = random(tokens, 50), random(tokens, 37, seed=1)
    close(csr.linear_grad_input(grad, *parts, in_features=50), grad @ dense)
    row = torch.repeat_interleave(torch.arange(37, device=DEVICE), parts[1].diff())
    close(csr.linear_grad_values(grad, x, *parts[1:]), (grad.T @ x)[row, parts[2].long()])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation):
    (parts, dense), x = csr_parts(37, 50), random(5, 50)
    bias, gate = random(37), random(5, 37, seed=3)
    got = csr.linear(x, *parts, bias, out_features=37, activation=activation, gate=gate)
    close(got, ACTIVATIONS[activation](x @ dense.T + bias) * gate)
    parts, dense = grouped_parts(37, 50, 1, 4, 4)
    got = grouped_nm.linear(x, *parts, bias, m=4, out_features=37, activation=activation, gate=gate)
    close(got, ACTIVATIONS[activation](x @ dense.T + bias) * gate)


@pytest.mark.parametrize("outputs, inputs, n, m, g", GROUPED)
@pytest.mark.parametrize("tokens", (1, 3, 16, 17, 65))
def test_grouped_linear(outputs, inputs, n, m, g, tokens):
    parts, dense = grouped_parts(outputs, inputs, n, m, g)
    x, bias = random(tokens, inputs), random(outputs)
    for save_memory in (False, True):
        got = grouped_nm.linear(x, *parts, bias, m=m, out_features=outputs, save_memory=save_memory)
        close(got, x @ dense.T + bias)


@pytest.mark.parametrize("outputs, inputs, n, m, g", GROUPED)
@pytest.mark.parametrize("path", ["few", "expand"])
def test_grouped_linear_in_half(outputs, inputs, n, m, g, path, monkeypatch):
    monkeypatch.setattr(grouped_nm.linear, "choose", lambda *a, **facts: (path, "the test says so"))
    half = torch.float16
    (values, *pattern), dense = grouped_parts(outputs, inputs, n, m, g)
    values, dense, bias = values.to(half), dense.to(half).double(), random(outputs, dtype=half)
    for tokens in (1, 3, 16, 17, 65):
        x = random(tokens, inputs, dtype=half)
        got = grouped_nm.linear(x, values, *pattern, bias, m=m, out_features=outputs)
        close(got, x.double() @ dense.T + bias.double(), half)


def test_grouped_without_rows_or_columns():
    pattern = torch.arange(4, dtype=torch.int32, device=DEVICE)[:, None]
    for chunks, strips, outputs, inputs in ((2, 0, 0, 32), (0, 2, 8, 0)):
        index = torch.zeros(chunks, strips, 4, 4, dtype=torch.int16, device=DEVICE)
        parts = torch.zeros(*index.shape, 1, device=DEVICE), index, pattern
        assert grouped_nm.expand(*parts, m=4, out_features=outputs, in_features=inputs).shape == (outputs, inputs)
        got = grouped_nm.linear_grad_input(random(3, outputs), *parts, m=4, in_features=inputs)
        assert torch.equal(got, got.new_zeros(3, inputs))
    with pytest.raises(TypeError, match="int16"):
        grouped_nm.expand(parts[0], index.int(), pattern, m=4, out_features=8, in_features=0)


def test_slots_are_computed_in_parts(monkeypatch):
    (_, index, _), _ = grouped_parts(20, 40, 1, 10, 1)
    whole = grouped_nm._slots_of_columns(index)
    monkeypatch.setattr(grouped_nm, "AT_ONCE", 1)
    assert len(index) > 1 and torch.equal(grouped_nm._slots_of_columns(index), whole)


def test_many_tiles_of_tokens_are_not_split(monkeypatch):
    """Partial sums of many tokens would take more memory than the dense weight."""
    monkeypatch.setattr(grouped_nm, "INTERPRET", False)
    few, many = (grouped_nm._configs(64, times, 4, 128, 14336, 132) for times in (1, 256))
    assert all(config["S"] == 1 for config in many) and all(config["S"] > 1 for config in few)


@pytest.mark.parametrize("outputs, inputs, n, m, g", GROUPED)
def test_grouped_gradients(outputs, inputs, n, m, g):
    (values, index, pattern), dense = grouped_parts(outputs, inputs, n, m, g)
    assert torch.equal(grouped_nm.expand(values, index, pattern, m=m, out_features=outputs, in_features=inputs), dense)
    assert torch.equal(grouped_nm.collect(dense, index, pattern, m=m), values)
    x, grad = random(7, inputs), random(7, outputs, seed=1)
    close(grouped_nm.linear_grad_input(grad, values, index, pattern, m=m, in_features=inputs), grad @ dense)
    got = grouped_nm.linear_grad_values(grad, x, index, pattern, m=m)
    close(got, grouped_nm.collect(grad.T @ x, index, pattern, m=m))


def test_shapes_of_x():
    (parts, dense), (grouped, grouped_dense) = csr_parts(37, 50), grouped_parts(37, 50, 1, 4, 4)
    for x in (random(2, 3, 50), random(50, 6).T, random(4, 100)[:, ::2], random(0, 50)):
        close(csr.linear(x, *parts, out_features=37), x @ dense.T)
        close(grouped_nm.linear(x, *grouped, m=4, out_features=37), x @ grouped_dense.T)


def test_choose_explains():
    for tokens in (0, 1, 16, 4096):
        assert csr.choose(tokens, 4096, 4096, torch.float32, entries=10**6)[1]
        assert grouped_nm.choose(tokens, 4096, 4096, torch.float32, n=1, m=4)[1]
