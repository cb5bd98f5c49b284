"""NM's Triton kernels against a dense product, in the interpreter or on a GPU."""

import pytest
import torch
from triton_cases import ACTIVATIONS, DEVICE, close, nm_parts, poisoned_outputs, random  # noqa: F401

from sten.kernels import nm

SHAPES = [(20, 64, 2, 4), (33, 46, 2, 4), (17, 40, 1, 8), (16, 35, 3, 5), (18, 40, 2, 20)]
SHAPES += [(33, 46, 2, 8), (17, 40, 5, 16), (20, 70, 16, 32), (18, 64, 31, 32)]  # bitmaps
HALF = [torch.float16, torch.bfloat16]


def call(x, parts, *bias, **more):
    values, index, _, n, m = parts
    return nm.linear(x, values, index, *bias, n=n, m=m, out_features=len(values), **more)


@pytest.mark.parametrize("outputs, inputs, n, m", SHAPES)
@pytest.mark.parametrize("path", ["tiles", "expand"])
def test_linear(outputs, inputs, n, m, path, monkeypatch):
    monkeypatch.setattr(nm.linear, "choose", lambda *a, **facts: (path, "the test says so"))
    parts, bias = nm_parts(outputs, inputs, n, m), random(outputs)
    for tokens in (1, 3, 17, 63):
        x = random(tokens, inputs)
        close(call(x, parts, bias), x @ parts[2].T + bias)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_token_from_words(dtype):
    parts, x, bias = nm_parts(20, 72, 2, 4, dtype), random(1, 72, dtype=dtype), random(20, dtype=dtype)
    assert nm.choose(1, 20, 72, dtype, n=2, m=4)[0] == "word"
    close(call(x, parts, bias), x.double() @ parts[2].double().T + bias.double(), dtype)


def test_one_token_of_a_wide_tensor():
    """A row that does not start at a multiple of a word."""
    parts, x = nm_parts(20, 72, 2, 4, HALF[0]), random(3, 75, dtype=HALF[0])
    for row in (x[:1, :72], x[2:, :72], x[1:2, :72].view(1, 1, 72)):
        close(call(row, parts), row.double() @ parts[2].double().T, HALF[0])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs no inline assembly")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [3, 17, 63, 64])
def test_few_tokens_from_words(dtype, tokens):
    parts, x, bias = nm_parts(130, 264, 2, 4, dtype), random(tokens, 264, dtype=dtype), random(130, dtype=dtype)
    assert nm.choose(tokens, 130, 264, dtype, n=2, m=4)[0] == "few"
    close(call(x, parts, bias), x.double() @ parts[2].double().T + bias.double(), dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs sparse tensor cores")
@pytest.mark.parametrize("tokens", [65, 130, 256])
def test_cusparselt(tokens):
    """One plan for every bias; neither bias nor x needs to be aligned for the library."""
    parts, x, flat = nm_parts(128, 256, 2, 4, HALF[1]), random(tokens, 256, dtype=HALF[1]), random(400, dtype=HALF[1])
    assert nm.choose(tokens, 128, 256, HALF[1], n=2, m=4)[0] == "cusparselt"
    product = x.double() @ parts[2].double().T
    for _ in range(3):  # the second call times the library's algorithms
        for bias in (flat[:128], flat[128:256], flat[129:257], flat[::3][:128]):
            close(call(x, parts, bias), product + bias.double(), HALF[1])
        close(call(x, parts), product, HALF[1])
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    close(call(shifted, parts, flat[:128]), product + flat[:128].double(), HALF[1])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs sparse tensor cores")
def test_cusparselt_in_a_graph():
    """A recorded product reads its own bias, whatever was called since."""
    parts, x, biases = nm_parts(128, 256, 2, 4, HALF[1]), random(130, 256, dtype=HALF[1]), random(2, 128, dtype=HALF[1])
    for _ in range(3):
        call(x, parts, biases[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, parts, biases[0])
    call(x, parts, biases[1])
    biases[0].neg_()
    graph.replay()
    close(y, x.double() @ parts[2].double().T + biases[0].double(), HALF[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation):
    parts, x, bias, gate = nm_parts(20, 40, 1, 4), random(5, 40), random(20), random(5, 20, seed=3)
    close(call(x, parts, bias, gate=gate, activation=activation), ACTIVATIONS[activation](x @ parts[2].T + bias) * gate)


@pytest.mark.parametrize("outputs, inputs, n, m", SHAPES)
def test_expand_and_collect(outputs, inputs, n, m):
    values, index, dense, n, m = nm_parts(outputs, inputs, n, m)
    assert torch.equal(nm.expand(values, index, n=n, m=m, in_features=inputs), dense)
    assert torch.equal(nm.collect(dense, index, n=n, m=m), values)


@pytest.mark.parametrize("tokens", (1, 17))
def test_gradients(tokens):
    values, index, dense, n, m = nm_parts(33, 46, 2, 4)
    x, grad = random(tokens, 46), random(tokens, 33, seed=1)
    close(nm.linear_grad_input(grad, values, index, n=n, m=m, in_features=46), grad @ dense)
    got = nm.expand(nm.linear_grad_values(grad, x, index, n=n, m=m), index, n=n, m=m, in_features=46)
    mask = nm.expand(torch.ones_like(values), index, n=n, m=m, in_features=46)
    close(got, grad.T @ x * mask)


def test_shapes_of_x():
    parts = nm_parts(20, 40, 1, 4)
    for x in (random(2, 3, 40), random(40, 6).T, random(4, 80)[:, ::2], random(0, 40)):
        close(call(x, parts), x @ parts[2].T)


def test_choose_explains():
    for n, m in ((2, 4), (1, 8)):
        for tokens in (0, 1, 16, 65, 4096):
            variant, reason = nm.choose(tokens, 4096, 4096, torch.bfloat16, n=n, m=m)
            assert variant in ("empty", "word", "few", "tiles", "cusparselt", "expand") and reason
