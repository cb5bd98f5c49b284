"""CSR for one to four tokens in CUDA C++: its table against the pattern, and the kernel on a CPU and on a GPU."""

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
    """Empty and full rows, entries in the first and last column only, and steps that need each number of bits."""
    dense = random(outputs, inputs)
    dense[dense == 0] = 1
    keep = torch.rand(dense.shape, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, outputs)[:, None]
    for row, step in enumerate((1, 5, 17, 64, 65, 257, 300)):
        keep[3 * row] = torch.arange(inputs) % step == 0
    keep[5::7], keep[-2] = False, False
    keep[-2, [0, -1]] = True
    return (dense.to(dtype) * keep.to(DEVICE)).to(dtype)


def decoded(table, crow, col):
    """The column of each entry, as the source says to read it; None where it reads ``col``."""
    outputs = len(crow) - 1
    pieces = -(-len(col) // 8) + outputs
    ends = torch.tensor([16 * outputs, 4 * pieces, 2 * pieces, 2 * pieces]).cumsum(0).tolist()
    assert len(table) == ends[-1]
    rows, *planes = table.tensor_split(ends[:-1])
    steps = (planes[0][:, None] >> torch.tensor([0, 4]) & 15).view(-1, 8).int()
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of the entries whose bits follow each other
    middle, high = ((p[:, None] >> torch.arange(0, 8, 2) & 3).view(-1, 8).int()[:, order.argsort()] for p in planes[1:])
    found, lengths = [None] * int(crow[-1]), []
    for begin, end, row, last in rows.view(torch.int32).view(-1, 4).tolist():
        assert (begin, end) == (int(crow[row]), int(crow[row + 1]))
        lengths.append((end + 7) // 8 - begin // 8)
        column, widths, units = last & 0xFFFF, last >> 16 & 0xFFFF, 1
        while -(-lengths[-1] // 32) > 8 * units:
            units *= 2
        for entry in range(begin, end):
            piece, k = entry // 8 + row, entry % 8
            width = widths >> 2 * ((entry // 8 - begin // 8) // 32 // units) & 3
            step = steps[piece, k] + 16 * middle[piece, k] * (width > 0) + 64 * high[piece, k] * (width > 1)
            column = column + int(step) if width < 3 else int(col[entry])
            found[entry] = None if width == 3 else column
    assert lengths == sorted(lengths, reverse=True)
    return found


@pytest.mark.parametrize("shape, free", [((70, 400), 0), ((40, 1000), 30), ((35, 5000), 3), ((1, 3), 0), ((3, 2), 1)])
def test_the_table_has_each_column(shape, free):
    dense = rows_of_all_kinds(*shape).cpu() if shape[0] > 30 else random(*shape).cpu()
    _, crow, col = parts_of(dense, free)
    found = decoded(csr_few.table_of(crow, col), crow, col)
    assert all(column in (None, its) for column, its in zip(found, col.tolist()[: int(crow[-1])], strict=True))
    assert 0 < found.count(None) < len(found) / 2 if shape[0] > 30 else found.count(None) == 0


def test_the_table_of_no_entries():
    crow, col = torch.zeros(34, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    assert decoded(csr_few.table_of(crow, col), crow, col) == []


CASES = [  # outputs, inputs, tokens, CTAs, warps, lanes, pieces, buffers, dtype, activation, bias and gate, free slots
    (70, 400, 1, 3, 2, 32, 2, 2, torch.bfloat16, 0, False, 0),
    (40, 1001, 2, 4, 2, 8, 1, 1, torch.float16, 4, True, 5),
    (33, 330, 3, 2, 1, 4, 4, 2, torch.bfloat16, 3, True, 0),
    (35, 408, 4, 9, 2, 16, 2, 1, torch.float16, 0, True, 0),
    (33, 5000, 1, 1, 4, 32, 4, 1, torch.bfloat16, 0, False, 0),
]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_on_a_cpu(case, tmp_path):
    """No value, activation or column that a row does not own is used: they are NaN or infinite here."""
    outputs, inputs, tokens, ctas, warps, lanes, pieces, buffers, dtype, activation, more, free = case
    dense = rows_of_all_kinds(outputs, inputs, dtype).cpu()
    values, crow, col = parts_of(dense, free)
    used = dense[: outputs // 2].any(0)
    x, bias, gate = (random(*size, dtype=dtype).cpu() for size in ((tokens, inputs), (outputs,), (tokens, outputs)))
    y = torch.full((tokens, outputs), torch.nan, dtype=dtype)
    given = x, values, csr_few.table_of(crow, col), col, *((bias, gate) if more else (None, None)), y
    given += tokens, outputs, inputs, len(col), 1
    macros = {"TOKENS": 4 if tokens > 2 else tokens, "BF16": int(dtype == torch.bfloat16), "ACTIVATION": activation}
    driver = emulated(tmp_path, "csr_few", **macros, WARPS=warps, CTAS=1, LANES=lanes, PIECES=pieces, BUFFERS=buffers)
    shared = csr_few.shared_bytes(inputs, tokens)
    start = csr.nvrtc.starter("csr_few", driver, 0, 32 * warps, shared, given)
    want = ACTIVATIONS[activation](x.double() @ dense.double().T + (bias.double() if more else 0))
    want = want * gate.double() if more else want
    start(ctas, 1, 1, 0, *given)
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
    half = outputs // 2  # rows below are not to be seen in rows above, nor columns that these do not have
    values[int(crow[half]) :] = torch.nan
    x[:, ~used] = torch.inf
    y.fill_(torch.nan)
    start(ctas, 1, 1, 0, *given)
    torch.testing.assert_close(y.double()[:, :half], want[:, :half], rtol=1e-2, atol=1e-2 * float(want.abs().max()))


@needs_compiler
@on_cpu
def test_the_product_of_a_weight_starts_the_kernel(tmp_path, monkeypatch, steps):
    """From x of any strides and parts of any alignment to y; after a mask update by the new pattern."""
    config = {"WARPS": 4, "CTAS": 1, "LANES": 16, "PIECES": 2, "BUFFERS": 1}
    monkeypatch.setattr(csr_few, "configs", lambda *sizes: [config])
    dtype, macros = torch.bfloat16, {"TOKENS": 4, "BF16": 1, "ACTIVATION": 4, **config}
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
@pytest.mark.parametrize(
    "tokens, config", [(1, (20, 1, 32, 4, 1)), (2, (16, 2, 16, 1, 1)), (4, (8, 3, 32, 2, 2)), (4, (8, 2, 32, 4, 2))]
)
def test_steps_compile(architecture, tokens, config, tmp_path, monkeypatch):
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    assert config in csr_few.LONG + csr_few.SHORT
    macros = dict(zip(("WARPS", "CTAS", "LANES", "PIECES", "BUFFERS"), config, strict=True))
    most = 65536 // (32 * config[0] * config[1])
    expect_registers(tmp_path, most, "csr_few", architecture, TOKENS=tokens, BF16=tokens % 2, ACTIVATION=2, **macros)


def test_a_gpu_with_little_shared_memory():
    """An L40S has 99 kB for a CTA."""
    for tokens, inputs, some in ((1, 50000, True), (1, 52000, False), (4, 12000, True), (4, 14336, False)):
        found = csr_few.configs(inputs, tokens, 1000, 99 << 10)
        assert bool(found) == some and all(c["CTAS"] == 1 for c in found)
        assert some == (csr_few.shared_bytes(inputs, tokens) <= 99 << 10)


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
