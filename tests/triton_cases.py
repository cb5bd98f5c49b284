"""Shared by the tests of the Triton kernels: the interpreter switch, packers of raw parts, references, the comparison.

Import it before anything that imports triton: without a GPU the kernels run in Triton's interpreter, and the switch is
read at import.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the Triton kernels need triton")

if DEVICE == "cpu":
    # numpy 2.4 no longer turns an array of one element into an int, which Triton 3.6's interpreter does for loop bounds
    import triton.runtime.interpreter as interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index

TOKENS = (1, 3, 17, 63, 130)
ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape, dtype=torch.float32, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return made.to(dtype).to(DEVICE)


def close(got, expected, dtype=None):
    """Relative error in the Frobenius norm, NaN never passing, and every element written."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert not torch.isnan(got).any()
    got, expected = got.double().cpu(), expected.double().cpu()
    error = (got - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < TOLERANCE[dtype or torch.float32], float(error)


def vector_nm_parts(outputs, inputs, n, m, v, dtype=torch.float32, seed=0):
    """Random (values, index, dense) of one VectorNM weight; the padded columns hold zeros."""
    g = torch.Generator().manual_seed(seed)
    groups, bands = -(-inputs // m), -(-outputs // v)
    order = torch.rand(bands, groups, m, generator=g).argsort(-1)[..., :n].sort(-1).values
    index = (order + torch.arange(groups)[:, None] * m).reshape(bands, groups * n).int()
    rows = index.long().repeat_interleave(v, 0)[:outputs]
    values = torch.randn(outputs, groups * n, generator=g).to(dtype)
    values[rows >= inputs] = 0
    dense = torch.zeros(outputs, groups * m, dtype=dtype).scatter_(1, rows, values)[:, :inputs]
    return values.to(DEVICE), index.to(DEVICE), dense.contiguous().to(DEVICE)


def nm_parts(outputs, inputs, n, m, dtype=torch.float32, seed=0):
    """Random (values, index, dense, n, m) of one NM weight, positions or a bitmap packed low bits first."""
    g = torch.Generator().manual_seed(seed)
    groups, bits = -(-inputs // m), 2 if m <= 4 else 4 if m <= 16 else 8
    position = torch.rand(outputs, groups, m, generator=g).argsort(-1)[..., :n].sort(-1).values
    column = (position + torch.arange(groups)[:, None] * m).reshape(outputs, -1)
    values = torch.randn(outputs, groups * n, generator=g).to(dtype)
    values[column >= inputs] = 0
    dense = torch.zeros(outputs, groups * m, dtype=dtype).scatter_(1, column, values)[:, :inputs].contiguous()
    if m in (8, 16, 32) and n * bits >= m:
        one = torch.zeros(outputs, groups, m, dtype=torch.uint8).scatter_(-1, position, 1).unflatten(-1, (-1, 8))
        index = (one << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        return values.to(DEVICE), index.to(DEVICE), dense.to(DEVICE), n, m
    each = 8 // bits
    packed = torch.nn.functional.pad(position.reshape(outputs, -1), (0, -groups * n % each)).unflatten(1, (-1, each))
    index = (packed << torch.arange(each) * bits).sum(-1).to(torch.uint8)
    return values.to(DEVICE), index.to(DEVICE), dense.to(DEVICE), n, m


def bsr_parts(outputs, inputs, bh, bw, density=0.4, keep=None, dtype=torch.float32, seed=0):
    """Random (parts, dense) of one BSR weight, the first block row and the last block column empty."""
    g = torch.Generator().manual_seed(seed)
    block_rows, columns = -(-outputs // bh), -(-inputs // bw)
    if keep is None:
        keep = torch.rand(block_rows, columns, generator=g) < density
        if density < 1:
            keep[0], keep[:, -1] = False, False
            keep[-1, 0] = density > 0
    full = torch.randn(outputs, inputs, generator=g).to(dtype)
    full = torch.nn.functional.pad(full, (0, columns * bw - inputs, 0, block_rows * bh - outputs))
    blocks = full.unflatten(0, (block_rows, bh)).unflatten(2, (columns, bw)).transpose(1, 2)
    row, col = keep.nonzero(as_tuple=True)
    t_col, t_row = keep.T.nonzero(as_tuple=True)
    slot = torch.full(keep.shape, -1)
    slot[row, col] = torch.arange(len(row))
    starts = [torch.nn.functional.pad(keep.sum(axis).cumsum(0), (1, 0)).int() for axis in (1, 0)]
    parts = {"values": blocks[keep].contiguous(), "crow": starts[0], "col": col.int()}
    parts |= {"t_crow": starts[1], "t_row": t_row.int(), "t_block": slot[t_row, t_col].int()}
    dense = (blocks * keep[:, :, None, None]).transpose(1, 2).reshape(block_rows * bh, columns * bw)[:outputs, :inputs]
    return {name: part.to(DEVICE) for name, part in parts.items()}, dense.contiguous().to(DEVICE)


def two_launches(monkeypatch):
    """Gated products take the slower candidate of their tuning, where they have it."""
    from sten.kernels import autotune, gated

    pick = autotune.pick

    def forced(kernel, key, configs, prepare, tensors):
        two = [gated.TWO_LAUNCHES] if gated.TWO_LAUNCHES in configs else configs
        return pick(kernel + " forced", key, two, prepare, tensors)

    monkeypatch.setattr(autotune, "pick", forced)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Every output starts as NaN, so that an element that no program writes is seen; the launch cache is empty."""
    from sten.kernels import _torch_private, launch_cache

    def poisoned(allocate):
        def make(*args, **options):
            made = allocate(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return make

    launch_cache.clear()
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty"), (_torch_private, "empty_strided")):
        if getattr(owner, name) is not None:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
