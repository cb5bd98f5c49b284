"""CSR for one to four tokens in CUDA C++: its table against the pattern, and the kernel on a CPU and on a GPU."""

import itertools

import pytest
import torch
from cuda_cases import (
    ACTIVATIONS,
    HALF,
    F,
    emulated,
    expect_registers,
    in_place_of_the_driver,
    needs_compiler,
    needs_nvrtc,
    on_cpu,
    on_gpu,
)
from triton_cases import DEVICE, close, poisoned_outputs, random  # noqa: F401

from sten.kernels import csr, csr_few, pattern_cache


def parts_of(dense, free=0):
    """CSR's parts, with so many free slots."""
    crow = F.pad((dense != 0).sum(1).cumsum(0), (1, 0)).int()
    values, col = dense[dense != 0], dense.nonzero()[:, 1].int()
    return F.pad(values, (0, free)), crow, F.pad(col, (0, free))


def rows_of_all_kinds(outputs, inputs, dtype=torch.float32):
    """Empty and full rows, entries in the first and last column only, and gaps that need each number of bits."""
    dense = random(outputs, inputs)
    dense[dense == 0] = 1
    keep = torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, outputs)[:, None]
    for row, step in enumerate((1, 5, 17, 64, 65, 257, 300)):
        keep[3 * row] = torch.arange(inputs) % step == 0
    keep[5::7], keep[-2] = False, False
    keep[-2, [0, -1]] = True
    return (dense.to(dtype) * keep.to(DEVICE)).to(dtype)


def decoded(table, outputs, inputs, entries):
    """(row, column) of each entry, read from the table as the source says."""
    slices, most = -(-outputs // 32), csr_few.most_blocks(outputs, inputs, entries)
    ends = torch.tensor([16 * 32 * slices, 4 * (-(-(slices + 1) // 4) * 4), 4 * most, 1088 * most]).cumsum(0).tolist()
    assert len(table) == ends[-1]
    parts = table.tensor_split(ends[:-1])
    rows, firsts, sizes = parts[0].view(torch.int32).view(-1, 32, 4), *(part.view(torch.int32) for part in parts[1:3])
    records, found = parts[3].view(most, 1088).int(), {}
    for slice_, (first, stop) in enumerate(itertools.pairwise(firsts[: slices + 1])):
        for block in range(first, stop):
            starts, low, middle, high = records[block].tensor_split([64, 576, 832])
            nibbles = torch.stack([low & 15, low >> 4], 1).view(32, 32)
            crumbs = [(part[:, None] >> torch.arange(0, 8, 2) & 3).view(32, 32) for part in (middle, high)]
            planes = {36: 0, 52: 1, 68: 2, 4: None}[int(sizes[block])]
            step = nibbles if planes == 0 else nibbles + 16 * crumbs[0]
            step = step + 64 * crumbs[1] if planes == 2 else step
            at = (starts[::2] + 256 * starts[1::2])[:, None] - 8 + step.cumsum(1) + torch.arange(32)
            for lane, (row, begin, end, _) in enumerate(rows[slice_].tolist()):
                entry = begin // 8 * 8 + 32 * (block - int(first)) + torch.arange(32)
                for k in ((entry >= begin) & (entry < end)).nonzero().flatten().tolist():
                    assert int(entry[k]) not in found
                    found[int(entry[k])] = row, None if planes is None else int(at[lane, k])
    return found


@pytest.mark.parametrize("shape, free", [((70, 400), 0), ((40, 1000), 30), ((1, 3), 0), ((3, 2), 1)])
def test_the_table_has_each_entry_once(shape, free):
    outputs, inputs = shape
    dense = rows_of_all_kinds(*shape).cpu() if outputs > 30 else random(*shape).cpu()
    _, crow, col = parts_of(dense, free)
    found = decoded(csr_few.table(crow, col, inputs), outputs, inputs, len(col))
    row = torch.repeat_interleave(torch.arange(outputs), crow.diff().long())
    assert sorted(found) == list(range(int(crow[-1])))
    for entry, (its, column) in found.items():
        assert its == row[entry] and column in (None, col[entry])
    absolute = sum(column is None for _, column in found.values())
    assert 0 < absolute < len(found) / 2 if outputs > 30 else absolute == 0


def test_the_table_of_no_entries():
    table = csr_few.table(torch.zeros(34, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 50)
    assert decoded(table, 33, 50, 0) == {}


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (33, 129), (200, 7)])
def test_blocks_never_exceed_the_capacity(outputs, inputs):
    """The worst is one long row a slice, or all full rows."""
    for full in (torch.arange(outputs) % 32 == 0, torch.ones(outputs, dtype=torch.bool), torch.arange(outputs) == 1):
        crow = F.pad((full * inputs).cumsum(0), (1, 0)).int()
        col = torch.arange(inputs).repeat(int(full.sum())).int()
        table, slices = csr_few.table(crow, col, inputs), -(-outputs // 32)
        used = table[512 * slices :].view(torch.int32)[slices]
        assert used <= csr_few.most_blocks(outputs, inputs, len(col)) < used + slices + inputs / 32 + outputs / 32 + 8


CASES = [  # outputs, inputs, tokens, warps, stages, dtype, activation, bias and gate, free slots
    (70, 400, 1, 2, 2, torch.bfloat16, 0, False, 0),
    (40, 1001, 2, 2, 3, torch.float16, 4, True, 5),
    (33, 330, 3, 1, 3, torch.bfloat16, 3, True, 0),
    (35, 408, 4, 2, 2, torch.float16, 0, True, 0),
]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_on_a_cpu(case, tmp_path):
    """No value, activation or column that a row does not own is used: they are NaN or infinite here."""
    outputs, inputs, tokens, warps, stages, dtype, activation, more, free = case
    dense = rows_of_all_kinds(outputs, inputs, dtype).cpu()
    values, crow, col = parts_of(dense, free)
    used = dense[: outputs // 2].any(0)
    x, bias, gate = (random(*size, dtype=dtype).cpu() for size in ((tokens, inputs), (outputs,), (tokens, outputs)))
    y = torch.full((tokens, outputs), torch.nan, dtype=dtype)
    given = x, values, csr_few.table(crow, col, inputs), col, *((bias, gate) if more else (None, None)), y
    given += tokens, outputs, inputs, csr_few.most_blocks(outputs, inputs, len(col))
    macros = {"TOKENS": 4 if tokens > 2 else tokens, "BF16": int(dtype == torch.bfloat16), "ACTIVATION": activation}
    driver = emulated(tmp_path, "csr_few", **macros, WARPS=warps, STAGES=stages)
    shared = csr_few.shared_bytes(inputs, tokens, warps, stages)
    start = csr.nvrtc.starter("csr_few", driver, 0, 32 * warps, shared, given)
    want = ACTIVATIONS[activation](x.double() @ dense.double().T + (bias.double() if more else 0))
    want = want * gate.double() if more else want
    for late in (0, 1):
        y.fill_(torch.nan)
        driver.late.value = late
        start(-(-outputs // 32), 1, 1, 0, *given)
        torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
    half = outputs // 2  # rows below are not to be seen in rows above, nor columns that these do not have
    values[int(crow[half]) :] = torch.nan
    x[:, ~used] = torch.inf
    y.fill_(torch.nan)
    start(-(-outputs // 32), 1, 1, 0, *given)
    torch.testing.assert_close(y.double()[:, :half], want[:, :half], rtol=1e-2, atol=1e-2 * float(want.abs().max()))


@needs_compiler
@on_cpu
def test_the_product_of_a_weight_starts_the_kernel(tmp_path, monkeypatch, steps):
    """From x of any strides and parts of any alignment to y; after a mask update by the new pattern."""
    (warps, stages), dtype = csr_few.WARPS_AND_STAGES[0], torch.bfloat16
    macros = {"TOKENS": 4, "BF16": 1, "ACTIVATION": 4, "WARPS": warps, "STAGES": stages}
    in_place_of_the_driver(monkeypatch, csr_few=emulated(tmp_path, "csr_few", **macros))
    dense, bias = rows_of_all_kinds(70, 256, dtype), random(70, dtype=dtype)
    values, crow, col = parts_of(dense)
    shifted = torch.cat([values.new_zeros(1), values])[1:]
    x, gate = random(3, 2, 259, dtype=dtype)[:, 1, 1:257], random(3, 70, dtype=dtype, seed=3)
    options = {"out_features": 70, "gate": gate, "activation": "silu"}
    for stored in (values, shifted):
        for _ in range(2):  # the first call prepares the launch, the second one uses it again
            want = F.silu(x.double() @ dense.double().T + bias.double()) * gate.double()
            close(csr.linear(x, stored, crow, col, bias, **options), want, dtype)
    other = dense.flip(0)
    for part, new in zip((values, crow, col), parts_of(other), strict=True):
        part.copy_(new)
    pattern_cache.invalidate(crow, col)
    want = F.silu(x.double() @ other.double().T + bias.double()) * gate.double()
    close(csr.linear(x, values, crow, col, bias, **options), want, dtype)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("tokens, dtype", [(1, 1), (2, 0), (4, 1)])
def test_steps_compile(architecture, tokens, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    macros = {"TOKENS": tokens, "BF16": dtype, "ACTIVATION": 2, "WARPS": 8, "STAGES": 2}
    expect_registers(tmp_path, 96, "csr_few", architecture, **macros)


def test_what_fits():
    half = torch.bfloat16
    assert csr_few.fits(1, 2048, 65000, half) and csr_few.fits(4, 4096, 16000, torch.float16)
    for tokens, outputs, inputs, dtype in (
        (0, 4096, 64, half), (5, 4096, 64, half), (1, 2047, 64, half), (1, 4096, 64, torch.float32),
        (1, 4096, 70000, half), (3, 4096, 20000, half),
    ):  # fmt: skip
        assert not csr_few.fits(tokens, outputs, inputs, dtype)


@pytest.fixture
def steps(monkeypatch):
    """Also small weights are read by steps."""
    monkeypatch.setattr(csr.linear, "choose", lambda *sizes, **facts: ("steps", "the test says so"))


# on a GPU


@on_gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("outputs, inputs", [(130, 1152), (70, 1001), (33, 14336), (1, 8), (4100, 130)])
def test_steps(outputs, inputs, dtype, steps):
    dense = rows_of_all_kinds(outputs, inputs, dtype) if outputs > 30 else random(outputs, inputs, dtype=dtype)
    parts, bias = parts_of(dense, 7), random(outputs, dtype=dtype)
    for tokens in (1, 2, 3, 4):
        assert outputs < 2048 or csr.choose(tokens, outputs, inputs, dtype, entries=len(parts[0]))[0] == "steps"
        x = random(tokens, inputs, dtype=dtype)
        got = csr.linear(x, *parts, bias, out_features=outputs)
        close(got, x.double() @ dense.double().T + bias.double(), dtype)
        assert torch.equal(got, csr.linear(x, *parts, bias, out_features=outputs))
        gate = random(tokens, outputs, dtype=dtype, seed=3)
        got = csr.linear(x, *parts, gate=gate, activation="silu", out_features=outputs)
        close(got, F.silu(x.double() @ dense.double().T) * gate.double(), dtype)


@on_gpu
def test_steps_in_a_graph_with_a_mask_update(steps):
    """A recorded graph reads values as they are, and the table at its address, which an update writes."""
    dense, x = rows_of_all_kinds(64, 256, HALF[1]), random(1, 256, dtype=HALF[1])
    values, crow, col = parts_of(dense)
    csr.linear(x, values, crow, col, out_features=64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = csr.linear(x, values, crow, col, out_features=64)
    other = dense.flip(0) * 2
    for part, new in zip((values, crow, col), parts_of(other), strict=True):
        part.copy_(new)
    pattern_cache.invalidate(crow, col)
    y.zero_()
    graph.replay()
    close(y, x.double() @ other.double().T, HALF[1])


@on_gpu
def test_steps_first_called_in_a_graph(steps):
    dense, x = rows_of_all_kinds(96, 520, HALF[1]), random(2, 520, dtype=HALF[1])
    parts, others = parts_of(dense), parts_of(dense.clone())
    csr.linear(x, *others, out_features=96)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = csr.linear(x, *parts, out_features=96)
    graph.replay()
    close(y, x.double() @ dense.double().T, HALF[1])
