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
    monkeypatch.setattr(csr, "choose", lambda *a: (path, "the test says so"))
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
@pytest.mark.parametrize("path", ["few", "expand"])
def test_grouped_linear(outputs, inputs, n, m, g, path, monkeypatch):
    monkeypatch.setattr(grouped_nm, "choose", lambda *a: (path, "the test says so"))
    parts, dense = grouped_parts(outputs, inputs, n, m, g)
    bias = random(outputs)
    for tokens in (1, 3, 16, 17, 65):
        x = random(tokens, inputs)
        close(grouped_nm.linear(x, *parts, bias, m=m, out_features=outputs), x @ dense.T + bias)


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
        assert csr.choose(4096, 4096, 10**6, tokens, torch.float32)[1]
        assert grouped_nm.choose(4096, 4096, 1, 4, tokens, torch.float32)[1]
