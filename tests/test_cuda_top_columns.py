"""The largest entries of each row, selected by a kernel in CUDA C++: on a CPU, and on a GPU."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_cases import emulated, expect_registers, in_place_of_the_driver, needs_compiler, needs_nvrtc, on_cpu, on_gpu
from triton_cases import random

import sten
from sten.kernels import top_columns as module
from sten.layouts.topk import largest_columns
from sten.ops.epilogue import Kept, selected

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 5, 5), (4, 100, 1), (6, 264, 32), (2, 300, 299), (1, 2501, 40), (2, 4096, 32)]  # rows, columns, count


def matrix(rows, columns, dtype):
    """Random numbers; one row has NaN and infinities, one many zeros, one is zero but for one column."""
    x = random(rows, columns, dtype=dtype)
    if rows > 2:
        x[0, :3], x[1, 1], x[2] = torch.nan, -torch.inf, x[2].relu()
    if columns > 2000:
        x[-1] = 0
        x[-1, columns // 2] = -1
    return x


def expect_selected(selected, x, count, relu=False):
    """As the mask of sten.TopK says: ties to the lower column, NaN last."""
    (values, got), x = selected, x.relu() if relu else x
    assert values.dtype == x.dtype and torch.equal(values.nan_to_num(), x.gather(1, got.long()).nan_to_num())
    assert got.dtype == torch.int32 and (got.diff() > 0).all()
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(1, got.long(), True)
    assert torch.equal(mask, sten.TopK(count).mask(x.cpu(), {}, True).to(x.device))


def emulate(folder, dtype, columns, warps=1, relu=False):
    size = dtype.itemsize
    vector = math.gcd(columns * size, 16) // size
    macros = {
        "SIZE": size,
        "INF": module.INFINITY[dtype],
        "VECTOR": vector,
        "ACTIVATION": 0,
        "BF16": 1,
        "RELU": int(relu),
    }
    return emulated(folder, "top_columns", WARPS=warps, **macros)


@needs_compiler
@on_cpu
@pytest.mark.parametrize("rows, columns, count", SHAPES)
@pytest.mark.parametrize("dtype, relu", [(dtype, relu) for dtype in DTYPES for relu in (False, True)], ids=str)
def test_on_a_cpu(rows, columns, count, dtype, relu, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "warps_for", lambda count: 1)
    in_place_of_the_driver(monkeypatch, top_columns=emulate(tmp_path, dtype, columns, relu=relu))
    x = matrix(rows, columns, dtype)
    expect_selected(module.top_columns(x, count=count, relu=relu), x, count, relu)


@needs_compiler
@on_cpu
def test_several_warps_and_no_rows(tmp_path, monkeypatch):
    in_place_of_the_driver(monkeypatch, top_columns=emulate(tmp_path, torch.bfloat16, 2048, module.warps_for(32)))
    for x in (matrix(1, 2048, torch.bfloat16), random(1, 2048, dtype=torch.bfloat16)):
        expect_selected(module.top_columns(x, count=32, relu=False), x, 32)
    assert all(part.shape == (0, 32) for part in module.top_columns(x[:0], count=32, relu=False))
    torch.library.opcheck(module.top_columns.overload, (x, 3, False))


@needs_compiler
@on_cpu
@pytest.mark.parametrize("layout", [sten.FanIn(), sten.CSR()], ids=str)
def test_stored_in_a_layout(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "warps_for", lambda count: 1)
    in_place_of_the_driver(monkeypatch, top_columns=emulate(tmp_path, torch.float32, 264, relu=True))
    x = random(6, 264)
    x[1] = -x[1].abs()
    parts = selected(x, Kept("row", count=32), layout, relu=True)
    layout.validate(parts, (6, 264))
    want, mask = sten.TopK(32).apply(x.relu(), {}, True)
    assert torch.equal(layout.unpack(parts, (6, 264)), want) and torch.equal(layout.support(parts, (6, 264)), mask)


def test_a_wrong_count_raises():
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"Expected a count from 1 to the columns, got {count} of 8"):
            module.top_columns.prepare(random(2, 8), count=count, relu=False)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("size, vector", [(2, 8), (4, 4), (2, 1)])
def test_it_compiles(architecture, size, vector, tmp_path, monkeypatch):
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    expect_registers(tmp_path, 64, "top_columns", architecture, SIZE=size, INF=0x7F80, VECTOR=vector, WARPS=8, RELU=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_of_a_row(dtype, monkeypatch):
    """The Triton kernel, in the interpreter or on a GPU, with ties, NaN, infinities and rows of zeros."""
    monkeypatch.setattr(module, "MOST", 0)
    for rows, columns, count in [(1, 1, 1), *SHAPES]:
        x = matrix(rows, columns, dtype)
        for relu in (False, True):
            expect_selected(module.top_columns.prepare(x, count=count, relu=relu)(x), x, count, relu)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    for rows, columns, count in [
        *SHAPES,
        (300, 32768, 32),
        (4, 40000, 700),
        (0, 16, 4),
        (1, 4096, 2048),
        (3, 14336, 7168),
    ]:
        made = matrix(rows, columns, dtype)
        shifted = torch.cat([made.new_zeros(1), made.flatten()])[1:].view_as(made)  # at an address that is not aligned
        for x in (made, shifted):
            for relu in (False, True):
                expect_selected(module.top_columns(x, count=count, relu=relu), x, count, relu)
    with ThreadPoolExecutor(1) as thread:
        x = random(4, 1000, dtype=dtype)
        index = thread.submit(largest_columns, x, 7).result()
        expect_selected((x.gather(1, index), index.int()), x, 7)
