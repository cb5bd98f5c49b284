"""BSR's Triton kernels against a dense product, in the interpreter or on a GPU."""

import pytest
import torch
from triton_cases import ACTIVATIONS, DEVICE, TOKENS, bsr_parts, close, poisoned_outputs, random, two_launches  # noqa: F401

from sten.kernels import bsr, pattern_cache

SHAPES = [  # outputs, inputs, block: dividing, ragged in both, oblong, not a power of two
    (64, 64, (16, 16)),
    (50, 72, (16, 16)),
    (70, 66, (32, 16)),
    (40, 90, (12, 24)),
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
HALF_TOO = [torch.float32, torch.float16]  # the interpreter multiplies the bits of bfloat16
if DEVICE != "cpu":
    HALF_TOO = DTYPES


@pytest.fixture(params=["few", "blocks", "expand"])
def variant(request, monkeypatch):
    monkeypatch.setattr(bsr.linear, "choose", lambda *a, **facts: (request.param, "the test says so"))
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


def gated(parts, bias=None):
    return [parts[name] for name in ("values", "crow", "col")] + ([] if bias is None else [bias])


@pytest.mark.parametrize("dtype", HALF_TOO, ids=str)
@pytest.mark.parametrize("outputs, inputs, block", SHAPES)
def test_gated_linear(outputs, inputs, block, dtype, variant):
    """Different patterns: in ``gate`` the first block row is empty, in ``up`` only the last column."""
    gate, gate_dense = bsr_parts(outputs, inputs, *block, dtype=dtype, seed=1)
    keep = torch.rand(-(-outputs // block[0]), -(-inputs // block[1]), generator=torch.Generator().manual_seed(2)) < 0.2
    keep[:, -1], keep[1] = True, False
    up, up_dense = bsr_parts(outputs, inputs, *block, keep=keep, dtype=dtype)
    for tokens in (1, 17, 63) if variant == "few" else (3, 33):
        x = random(tokens, inputs, dtype=dtype)
        got = bsr.gated_linear(x, gated(up), gated(gate), out_features=outputs)
        exact = torch.nn.functional.silu(x.double() @ gate_dense.double().T) * (x.double() @ up_dense.double().T)
        close(got, exact, dtype)


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_epilogue(activation, launches, variant, monkeypatch):
    if launches == 2:
        two_launches(monkeypatch)
    (up, up_dense), (gate, gate_dense) = bsr_parts(50, 72, 16, 16), bsr_parts(50, 72, 16, 16, density=0.7, seed=1)
    biases = random(50), random(50, seed=1)
    for x in (random(5, 72), random(72, 6).T, random(2, 3, 144)[..., ::2], random(0, 72)):
        expected = ACTIVATIONS[activation](x @ gate_dense.T + biases[0]) * (x @ up_dense.T + biases[1])
        weights = gated(up, biases[1]), gated(gate, biases[0])
        close(bsr.gated_linear(x, *weights, out_features=50, activation=activation), expected)


def test_gated_linear_without_a_block(variant):
    (up, _), (gate, _) = bsr_parts(64, 80, 16, 16, density=0.0), bsr_parts(64, 80, 16, 16)
    biases, x = (random(64), random(64, seed=1)), random(5, 80)
    for first, second in ((up, gate), (gate, up), (up, up)):
        got = bsr.gated_linear(x, gated(first), gated(second), out_features=64)
        assert torch.equal(got, torch.zeros_like(got))
    got = bsr.gated_linear(x, gated(up, biases[0]), gated(up, biases[1]), out_features=64, activation="relu")
    close(got, (biases[0] * torch.relu(biases[1])).expand(5, 64))


def test_gated_linear_with_two_block_shapes_raises():
    (up, _), (gate, _) = bsr_parts(64, 64, 16, 16), bsr_parts(64, 64, 32, 16)
    with pytest.raises(ValueError, match="one gated product"):
        bsr.gated_linear(random(2, 64), gated(up), gated(gate), out_features=64)


GRADIENTS = [(SHAPES[1], tokens) for tokens in TOKENS] + [(SHAPES[2], 17), (SHAPES[3], 63)]


@pytest.mark.parametrize("path", ["blocks", "expand"])
@pytest.mark.parametrize("shape, tokens", GRADIENTS)
def test_gradients(shape, tokens, path, monkeypatch):
    outputs, inputs, block = shape
    monkeypatch.setattr(bsr, "choose_grad_input", lambda *a, **facts: (path, "the test says so"))
    parts, dense = bsr_parts(outputs, inputs, *block)
    x, grad = random(tokens, inputs), random(tokens, outputs, seed=1)
    close(bsr.linear_grad_input(grad, **parts, in_features=inputs), grad @ dense)
    if path == "blocks":
        check_grad_values(parts, grad, x, block)


def check_grad_values(parts, grad, x, block, dtype=None):
    bh, bw = block
    full = grad.double().T @ x.double()
    full = torch.nn.functional.pad(full, (0, -full.shape[1] % bw, 0, -full.shape[0] % bh))
    rows = torch.repeat_interleave(torch.arange(parts["crow"].numel() - 1, device=DEVICE), parts["crow"].diff())
    expected = full.unflatten(0, (-1, bh)).unflatten(2, (-1, bw)).transpose(1, 2)[rows.long(), parts["col"].long()]
    got = bsr.linear_grad_values(grad, x, parts["col"], parts["t_row"], parts["t_block"], bh=bh, bw=bw)
    close(got, expected, dtype)


@pytest.mark.parametrize("dtype", HALF_TOO, ids=str)
@pytest.mark.parametrize("block", [(4, 8), (8, 4), (8, 8), (20, 24)])
def test_grad_values_of_small_blocks(block, dtype):
    """Tiles are 16 wide at least, so that they reach into the next blocks, whose products are not stored."""
    parts, _ = bsr_parts(48, 72, *block, density=0.3, dtype=dtype)
    check_grad_values(parts, random(33, 48, dtype=dtype, seed=1), random(33, 72, dtype=dtype), block, dtype)


@pytest.mark.parametrize("outputs, inputs, block", SHAPES)
def test_expand(outputs, inputs, block):
    parts, dense = bsr_parts(outputs, inputs, *block)
    got = bsr.expand(parts["values"], parts["crow"], parts["col"], out_features=outputs, in_features=inputs)
    assert torch.equal(got, dense)


@pytest.mark.parametrize("most", [None, 1, 3])
@pytest.mark.parametrize("depth, width", [(16, 32), (32, 16), (16, 24), (128, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_shares(seed, depth, width, most):
    """Every step of every block row belongs to one of consecutive programs; unused programs have no steps."""
    weights = []
    for half in range(1 + seed % 2):
        g = torch.Generator().manual_seed(10 * seed + half)
        counts = torch.randint(0, 6, (7,), generator=g) * (torch.rand(7, generator=g) < 0.7) * 3
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE)
        weights.append((start, torch.randint(0, 9, (int(start[-1]),), generator=g).int().to(DEVICE)))
    blocks = sum(len(other) for _, other in weights)
    programs = bsr._most_programs(7, blocks, width, depth, most, len(weights))
    table = bsr._shares(programs, most, depth, width, *(t for weight in weights for t in weight))
    assert table.shape == (programs, 3 + 5 * len(weights))
    taken = {}
    for program, (block_row, split, splits, *shares) in enumerate(table.tolist()):
        assert 0 <= split < splits
        if block_row == 7:
            assert splits == 1
        else:
            assert table[program - split : program - split + splits, 0].tolist() == [block_row] * splits
        work = 0
        for half, (start, other) in enumerate(weights):
            first, stop, low, high, column = shares[5 * half : 5 * half + 5]
            work += max(0, high - low)
            steps = taken.setdefault((block_row, half), [])
            steps += range(low, high)
            if low < high:
                assert [first, stop] == start[block_row : block_row + 2].tolist() and column == other[
                    first + low * depth // width
                ]
        assert most is None or work <= most + len(weights) - 1
    for half, (start, _) in enumerate(weights):
        lengths = -(-start.diff() * width // depth)
        assert [taken[block_row, half] for block_row in range(7)] == [
            list(range(length)) for length in lengths.tolist()
        ]
        assert taken.get((7, half), []) == []


def test_pattern_written_in_place(variant):
    """Tables are derived again after `invalidate`: of a weight, and of one of two weights."""
    keep = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    (first, _), (second, dense) = (bsr_parts(64, 80, 16, 16, keep=k, seed=7) for k in (keep, keep.roll(1, 0)))
    other, other_dense = bsr_parts(64, 80, 16, 16, seed=5)
    x, names = random(3, 80), ("values", "crow", "col")
    for _ in range(2):
        got = bsr.linear(x, *(first[name] for name in names), out_features=64)
        both = bsr.gated_linear(x, gated(first), gated(other), out_features=64)
        for name in names:
            first[name].copy_(second[name])
        pattern_cache.invalidate(first["crow"], first["col"], other["crow"], other["col"])
    close(got, x @ dense.T)
    close(both, torch.nn.functional.silu(x @ other_dense.T) * (x @ dense.T))


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
        variant, reason = bsr.choose(tokens, 4096, 4096, torch.bfloat16, bh=64, bw=64, blocks=400)
        assert variant in ("empty", "few", "blocks", "expand") and reason
