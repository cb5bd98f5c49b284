"""VectorNM's Triton kernels against a dense product in float64, in the interpreter or on a GPU."""

import pytest
import torch
from triton_cases import (  # noqa: F401
    ACTIVATIONS,
    DEVICE,
    TOKENS,
    close,
    poisoned_outputs,
    random,
    two_launches,
    vector_nm_parts,
)

from sten.kernels import transpose, vector_nm

SHAPES = [  # outputs, inputs, n, m, v: dividing, ragged rows, ragged columns, v smaller and larger than a tile
    (64, 64, 2, 4, 32),
    (50, 72, 1, 4, 16),
    (37, 46, 2, 4, 8),
    (70, 130, 1, 8, 64),
    (20, 33, 3, 5, 6),
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
HALF_TOO = [torch.float32, torch.float16]  # the interpreter multiplies the bits of bfloat16
if DEVICE != "cpu":
    HALF_TOO = DTYPES


@pytest.fixture(params=["few", "gather", "expand"])
def variant(request, monkeypatch):
    def choose(*sizes, **facts):
        variant, reason = vector_nm.choose(*sizes, **facts)
        return (variant, reason) if variant == "empty" else (request.param, "the test says so")

    for product in (vector_nm.linear, vector_nm._feature_major):
        monkeypatch.setattr(product, "choose", choose)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs, n, m, v", SHAPES)
def test_linear(outputs, inputs, n, m, v, dtype, variant):
    values, index, dense = vector_nm_parts(outputs, inputs, n, m, v, dtype)
    bias = random(outputs, dtype=dtype)
    for tokens in (1, 3, 17, 63) if variant == "few" else (3, 17):
        x = random(tokens, inputs, dtype=dtype)
        expected = x.double() @ dense.double().T + bias.double()
        close(vector_nm.linear(x, values, index, bias, n=n, m=m, v=v, out_features=outputs), expected, dtype)
        got = vector_nm.linear_feature_major(x.T.contiguous(), values, index, bias, n=n, m=m, v=v)
        close(got, expected.T, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, variant):
    values, index, dense = vector_nm_parts(50, 72, 1, 4, 16)
    x, bias, gate = random(5, 72), random(50), random(5, 50, seed=3)
    expected = ACTIVATIONS[activation](x @ dense.T + bias) * gate
    options = {"n": 1, "m": 4, "v": 16, "activation": activation}
    close(vector_nm.linear(x, values, index, bias, gate=gate, out_features=50, **options), expected)
    close(vector_nm.linear_feature_major(x.T.contiguous(), values, index, bias, gate=gate.T, **options), expected.T)


@pytest.mark.parametrize("dtype", HALF_TOO, ids=str)
@pytest.mark.parametrize("outputs, inputs, n, m, v", SHAPES)
def test_gated_linear(outputs, inputs, n, m, v, dtype, variant):
    """For many tokens: an odd number runs few persistent programs, an even one a program per tile."""
    up, gate = (vector_nm_parts(outputs, inputs, n, m, v, dtype, seed) for seed in (0, 1))
    for tokens in (1, 17, 63) if variant == "few" else (33, 66):
        x, options = random(tokens, inputs, dtype=dtype), {"n": n, "m": m, "v": v}
        exact = torch.nn.functional.silu(x.double() @ gate[2].double().T) * (x.double() @ up[2].double().T)
        close(vector_nm.gated_linear(x, up[:2], gate[:2], out_features=outputs, **options), exact, dtype)
        got = vector_nm.gated_linear_feature_major(x.T.contiguous(), up[:2], gate[:2], **options)
        close(got, exact.T, dtype)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_epilogue(activation, launches, variant, monkeypatch):
    if launches == 2:
        two_launches(monkeypatch)
    up, gate = vector_nm_parts(50, 72, 1, 4, 16), vector_nm_parts(50, 72, 1, 4, 16, seed=1)
    biases, options = (random(50), random(50, seed=1)), {"n": 1, "m": 4, "v": 16, "activation": activation}
    parts = (*up[:2], biases[1]), (*gate[:2], biases[0])
    for x in (random(5, 72), random(72, 6).T, random(2, 3, 144)[..., ::2], random(0, 72)):
        expected = ACTIVATIONS[activation](x @ gate[2].T + biases[0]) * (x @ up[2].T + biases[1])
        close(vector_nm.gated_linear(x, *parts, out_features=50, **options), expected)
        flat = expected.reshape(-1, 50)
        for row_major, exact in ((True, flat), (False, flat.T)):
            transposed = x.reshape(-1, 72).T
            got = vector_nm.gated_linear_feature_major(transposed, *parts, row_major=row_major, **options)
            close(got, exact)


def test_gated_linear_refuses_two_shapes():
    up, gate = vector_nm_parts(50, 80, 1, 4, 16), vector_nm_parts(50, 72, 1, 4, 16)
    with pytest.raises(ValueError, match="Expected values"):
        vector_nm.gated_linear(random(2, 72), up[:2], gate[:2], n=1, m=4, v=16, out_features=50)


GRADIENTS = [(SHAPES[1], tokens) for tokens in TOKENS] + [(SHAPES[2], 17), (SHAPES[4], 63)]


@pytest.mark.parametrize("shape, tokens", GRADIENTS)
def test_gradients(shape, tokens):
    outputs, inputs, n, m, v = shape
    values, index, dense = vector_nm_parts(outputs, inputs, n, m, v)
    x, grad = random(tokens, inputs), random(tokens, outputs, seed=1)
    close(vector_nm.linear_grad_input(grad, values, index, n=n, m=m, v=v, in_features=inputs), grad @ dense)
    columns = index.long().repeat_interleave(v, 0)[:outputs]
    padded = torch.nn.functional.pad(grad.T @ x, (0, -inputs % m))
    close(vector_nm.linear_grad_values(grad, x, index, n=n, m=m, v=v), padded.gather(1, columns))
    got = vector_nm.linear_grad_values(grad, x.T.contiguous(), index, n=n, m=m, v=v, feature_major=True)
    close(got, padded.gather(1, columns))


@pytest.mark.parametrize("outputs, inputs, n, m, v", SHAPES)
def test_expand(outputs, inputs, n, m, v):
    values, index, dense = vector_nm_parts(outputs, inputs, n, m, v)
    assert torch.equal(vector_nm.expand(values, index, n=n, m=m, v=v, in_features=inputs), dense)


def test_shapes_of_x(variant):
    values, index, dense = vector_nm_parts(50, 72, 1, 4, 16)
    call = {"n": 1, "m": 4, "v": 16, "out_features": 50}
    for x in (random(2, 3, 72), random(72, 6).T, random(4, 144)[:, ::2], random(8, 72)[::2]):
        close(vector_nm.linear(x, values, index, **call), x @ dense.T)


def test_zero_tokens():
    values, index, _ = vector_nm_parts(50, 72, 1, 4, 16)
    assert vector_nm.linear(random(0, 72), values, index, n=1, m=4, v=16, out_features=50).shape == (0, 50)
    assert vector_nm.linear_feature_major(random(72, 0), values, index, n=1, m=4, v=16).shape == (50, 0)
    got = vector_nm.linear_grad_values(random(0, 50), random(0, 72), index, n=1, m=4, v=16)
    assert torch.equal(got, torch.zeros_like(values))


def test_padded_columns_are_not_read(variant):
    """33 inputs in groups of 5: slots of the two padded columns must not touch memory beyond x."""
    values, index, dense = vector_nm_parts(20, 33, 3, 5, 6)
    backing = torch.full((3, 40), float("nan"), device=DEVICE)
    backing[:, :33] = random(3, 33)
    x = backing[:, :33]
    close(vector_nm.linear(x, values, index, n=3, m=5, v=6, out_features=20), x @ dense.T)


def test_mismatches_are_refused():
    values, index, _ = vector_nm_parts(50, 72, 1, 4, 16)
    with pytest.raises(ValueError, match="Expected values"):
        vector_nm.linear(random(2, 80), values, index, n=1, m=4, v=16, out_features=50)
    with pytest.raises(TypeError, match="one dtype"):
        vector_nm.linear(random(2, 72).half(), values, index, n=1, m=4, v=16, out_features=50)
    with pytest.raises(ValueError, match="activation"):
        vector_nm.linear(random(2, 72), values, index, n=1, m=4, v=16, out_features=50, activation="tan")


def test_choose_is_pure_and_explains():
    for tokens in (0, 1, 64, 65, 4096):
        variant, reason = vector_nm.choose(tokens, 4096, 4096, torch.bfloat16, n=1, m=4, v=128)
        assert variant in ("empty", "few", "gather", "expand") and reason


@pytest.mark.parametrize("rows, cols", [(1, 5), (33, 70), (64, 16)])
def test_transpose(rows, cols):
    x = random(rows, cols)
    assert torch.equal(transpose.transpose(x), x.T)
    assert torch.equal(transpose.transpose(x, 80)[:, :rows], x.T)


def test_under_compile():
    values, index, dense = vector_nm_parts(50, 72, 1, 4, 16)
    run = torch.compile(
        lambda x: vector_nm.linear(x, values, index, n=1, m=4, v=16, out_features=50) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    x = random(5, 72)
    close(run(x), x @ dense.T + 1)


def test_gated_under_compile():
    up, gate = vector_nm_parts(50, 72, 1, 4, 16), vector_nm_parts(50, 72, 1, 4, 16, seed=1)
    run = torch.compile(
        lambda x: vector_nm.gated_linear(x, up[:2], gate[:2], n=1, m=4, v=16, out_features=50) + 1,
        backend="aot_eager",
        fullgraph=True,
    )
    x = random(5, 72)
    close(run(x), torch.nn.functional.silu(x @ gate[2].T) * (x @ up[2].T) + 1)
