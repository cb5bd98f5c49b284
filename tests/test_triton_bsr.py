"""BSR's Triton kernels against a dense product, in the interpreter or on a GPU."""

import pytest
import torch
from triton_cases import ACTIVATIONS, DEVICE, TOKENS, bsr_parts, close, poisoned_outputs, random  # noqa: F401

from sten.kernels import bsr

SHAPES = [  # outputs, inputs, block: dividing, ragged in both, oblong, not a power of two
    (64, 64, (16, 16)),
    (50, 72, (16, 16)),
    (70, 66, (32, 16)),
    (40, 90, (12, 24)),
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["few", "blocks", "expand"])
def variant(request, monkeypatch):
    monkeypatch.setattr(bsr, "choose", lambda *a: (request.param, "the test says so"))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs, block", SHAPES)
def test_linear(outputs, inputs, block, dtype, variant):
    parts, dense = bsr_parts(outputs, inputs, *block, dtype=dtype)
    bias = random(outputs, dtype=dtype)
    for tokens in (1, 3, 17, 63) if variant == "few" else (3, 17):
        x = random(tokens, inputs, dtype=dtype)
        got = bsr.linear(x, parts["values"], parts["crow"], parts["col"], bias, out_features=outputs)
        close(got, x.double() @ dense.double().T + bias.double(), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, variant):
    parts, dense = bsr_parts(50, 72, 16, 16)
    x, bias, gate = random(5, 72), random(50), random(5, 50, seed=3)
    got = bsr.linear(
        x, parts["values"], parts["crow"], parts["col"], bias, out_features=50, activation=activation, gate=gate
    )
    close(got, ACTIVATIONS[activation](x @ dense.T + bias) * gate)


def test_gated_linear():
    (up, up_dense), (gate, gate_dense) = bsr_parts(50, 72, 16, 16), bsr_parts(50, 72, 16, 16, seed=1)
    names, x = ("values", "crow", "col"), random(9, 72)
    got = bsr.gated_linear(x, [up[k] for k in names], [gate[k] for k in names], out_features=50)
    close(got, torch.nn.functional.silu(x @ gate_dense.T) * (x @ up_dense.T))


GRADIENTS = [(SHAPES[1], tokens) for tokens in TOKENS] + [(SHAPES[2], 17), (SHAPES[3], 63)]


@pytest.mark.parametrize("path", ["blocks", "expand"])
@pytest.mark.parametrize("shape, tokens", GRADIENTS)
def test_gradients(shape, tokens, path, monkeypatch):
    outputs, inputs, block = shape
    monkeypatch.setattr(bsr, "choose", lambda *a: (path, "the test says so"))
    parts, dense = bsr_parts(outputs, inputs, *block)
    x, grad = random(tokens, inputs), random(tokens, outputs, seed=1)
    close(bsr.linear_grad_input(grad, **parts, in_features=inputs), grad @ dense)
    if path == "blocks":
        bh, bw = block
        full = torch.nn.functional.pad(grad.T @ x, (0, -inputs % bw, 0, -outputs % bh))
        rows = torch.repeat_interleave(torch.arange(parts["crow"].numel() - 1, device=DEVICE), parts["crow"].diff())
        expected = full.unflatten(0, (-1, bh)).unflatten(2, (-1, bw)).transpose(1, 2)[rows.long(), parts["col"].long()]
        got = bsr.linear_grad_values(grad, x, parts["col"], parts["t_row"], parts["t_block"], bh=bh, bw=bw)
        close(got, expected)


@pytest.mark.parametrize("outputs, inputs, block", SHAPES)
def test_expand(outputs, inputs, block):
    parts, dense = bsr_parts(outputs, inputs, *block)
    got = bsr.expand(parts["values"], parts["crow"], parts["col"], out_features=outputs, in_features=inputs)
    assert torch.equal(got, dense)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_empty_and_full_rows(density, variant):
    parts, dense = bsr_parts(64, 80, 16, 16, density=density)
    x = random(5, 80)
    close(bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=64), x @ dense.T)


def test_one_row_holds_all_blocks(variant):
    keep = torch.zeros(4, 5, dtype=torch.bool)
    keep[2] = True
    parts, dense = bsr_parts(64, 80, 16, 16, keep=keep)
    x, grad = random(5, 80), random(5, 64)
    close(bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=64), x @ dense.T)
    if variant != "few":
        close(bsr.linear_grad_input(grad, **parts, in_features=80), grad @ dense)


def test_shapes_of_x(variant):
    parts, dense = bsr_parts(50, 72, 16, 16)
    for x in (random(2, 3, 72), random(72, 6).T, random(4, 144)[:, ::2], random(8, 72)[::2]):
        close(bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=50), x @ dense.T)


def test_zero_tokens():
    parts, _ = bsr_parts(50, 72, 16, 16)
    assert bsr.linear(random(0, 72), parts["values"], parts["crow"], parts["col"], out_features=50).shape == (0, 50)
    assert bsr.linear_grad_input(random(0, 50), **parts, in_features=72).shape == (0, 72)
    got = bsr.linear_grad_values(
        random(0, 50), random(0, 72), parts["col"], parts["t_row"], parts["t_block"], bh=16, bw=16
    )
    assert torch.equal(got, torch.zeros_like(parts["values"]))


def test_memory_beyond_x_is_not_read(variant):
    parts, dense = bsr_parts(50, 70, 16, 16)
    backing = torch.full((3, 96), float("nan"), device=DEVICE)
    backing[:, :70] = random(3, 70)
    x = backing[:, :70]
    close(bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=50), x @ dense.T)


def test_choose_explains():
    for tokens in (0, 1, 64, 65, 4096):
        variant, reason = bsr.choose(4096, 4096, 64, 64, 400, tokens, torch.bfloat16)
        assert variant in ("empty", "few", "blocks", "expand") and reason
