"""The CUDA C++ kernels without a GPU: NVRTC compiles them, and a CPU runs what they do."""

import ctypes
import importlib
from concurrent.futures import ThreadPoolExecutor

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
from triton_cases import DEVICE, close, nm_parts, random

from sten.kernels import fragments, nm, nm24, nm_bitmap, nvrtc

CASES = [  # n, m, tokens, warps, stages, x as fp32, dtype, activation, bias and gate
    (16, 32, 1, 2, 3, 1, torch.bfloat16, 0, False),
    (6, 16, 3, 2, 1, 0, torch.float16, 4, True),
    (2, 8, 2, 1, 2, 1, torch.bfloat16, 3, True),
    (10, 32, 4, 2, 1, 1, torch.float16, 0, True),
    (16, 32, 13, 2, 2, 0, torch.bfloat16, 0, False),
    (6, 16, 40, 2, 3, 0, torch.float16, 4, True),
    (10, 32, 5, 1, 2, 0, torch.bfloat16, 3, True),
    (14, 16, 20, 2, 2, 0, torch.bfloat16, 3, True),
]
CASES_24 = [  # tokens, warps, stages, dtype, activation, bias and gate
    (2, 2, 3, torch.bfloat16, 0, False),
    (13, 2, 2, torch.float16, 4, True),
    (40, 1, 2, torch.bfloat16, 3, True),
]


def bitmap(folder, count, tokens, dtype, activation, config):
    """The emulated kernel for so many values of each 32."""
    kernel, macros = nm_bitmap.kernel_for(tokens)
    known = {"N": count, "BF16": int(dtype == torch.bfloat16), "ACTIVATION": activation}
    return emulated(folder, kernel, **macros, **known, **config)


def in_order(x, segments):
    """x (T, I) as order.cu has it, I / 128 blocks of four steps."""
    tiles, blocks = fragments.tiles(len(x)), x.shape[1] // 128
    x = F.pad(x, (0, 0, 0, 8 * tiles - len(x)))
    if segments:
        return x.view(tiles, 8, blocks, 4, 4, 8).permute(2, 4, 0, 1, 3, 5).contiguous()  # tile g block t step 8
    return x.view(tiles, 8, blocks, 4, 4, 4, 2).permute(2, 3, 0, 1, 5, 4, 6).contiguous()  # tile g block step i t 2


@needs_compiler
@pytest.mark.parametrize("tokens, segments", [(5, 0), (13, 1), (64, 0)])
def test_activations_in_the_order_of_fragments_on_a_cpu(tokens, segments, tmp_path):
    x = random(tokens, 384, dtype=torch.bfloat16).cpu()
    want = in_order(x, segments)
    got = torch.full_like(want, torch.nan)
    given, tiles = (x, got, tokens, 384), fragments.tiles(tokens)
    driver = emulated(tmp_path, "order", TILES=tiles, SEGMENTS=segments, WARPS=8, ACTIVATION=0, BF16=1)
    nvrtc.starter("order", driver, 0, 256, 0, given)(-(-got.numel() // 2048), 1, 1, 0, *given)
    assert torch.equal(got, want)


def run_on_a_cpu(driver, kernel, parts, x, warps, shared, activation, more, dtype):
    """y is written, and is the dense product."""
    values, index, dense = parts
    outputs, tokens = len(values), len(x)
    bias, gate = (random(*size, dtype=dtype).cpu() for size in ((outputs,), (tokens, outputs)))
    y, ordered = torch.full((tokens, outputs), torch.nan, dtype=dtype), x
    if kernel.endswith("many"):
        ordered = in_order(x, kernel.startswith("bitmap"))
    given = ordered, values, index, *((bias, gate) if more else (None, None)), y, tokens, *dense.shape
    want = ACTIVATIONS[activation](x.double() @ dense.double().T + (bias.double() if more else 0))
    want = want * gate.double() if more else want
    for late in (0, 1):
        y.fill_(torch.nan)
        driver.late.value = late
        nvrtc.starter(kernel, driver, 0, 32 * warps, shared, given)(-(-outputs // 32), 1, 1, 0, *given)
        torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitmaps_on_a_cpu(case, tmp_path):
    """40 rows: the second CTA has 24 too many; five blocks of 128 columns, which the warps share unequally."""
    n, m, tokens, warps, stages, single, dtype, activation, more = case
    count, outputs, inputs = n * 32 // m, 40, 640
    parts = [t.cpu() for t in nm_parts(outputs, inputs, n, m, dtype)[:3]]
    config = {"WARPS": warps, "CTAS": 1, "STAGES": stages} | ({"SINGLE": single} if tokens <= nm_bitmap.FEW else {})
    driver = bitmap(tmp_path, count, tokens, dtype, activation, config)
    kernel, _ = nm_bitmap.kernel_for(tokens)
    shared = nm_bitmap.shared_bytes(count, tokens, **config)
    x = random(tokens, inputs, dtype=dtype).cpu()
    run_on_a_cpu(driver, kernel, parts, x, warps, shared, activation, more, dtype)


def sparse_mma(folder, tokens, dtype, activation, warps, stages):
    """The emulated kernel of 2:4."""
    known = {"TILES": fragments.tiles(tokens), "BF16": int(dtype == torch.bfloat16), "ACTIVATION": activation}
    return emulated(folder, "nm24_many", **known, WARPS=warps, STAGES=stages)


@needs_compiler
@pytest.mark.parametrize("case", CASES_24, ids=str)
def test_24_on_a_cpu(case, tmp_path):
    tokens, warps, stages, dtype, activation, more = case
    parts, x = [t.cpu() for t in nm_parts(40, 640, 2, 4, dtype)[:3]], random(tokens, 640, dtype=dtype).cpu()
    driver, shared = (
        sparse_mma(tmp_path, tokens, dtype, activation, warps, stages),
        nm24.shared_bytes(tokens, warps, stages),
    )
    run_on_a_cpu(driver, "nm24_many", parts, x, warps, shared, activation, more, dtype)


@needs_compiler
@on_cpu
def test_the_product_of_a_weight_starts_the_kernel(tmp_path, monkeypatch):
    """From x of any strides and parts of any alignment to y, with the grid, memory and macros of the first choice."""
    config, dtype = nm_bitmap.few_configs(3)[0], torch.bfloat16
    driver = bitmap(tmp_path, 16, 3, dtype, 4, config)
    in_place_of_the_driver(monkeypatch, bitmap_few=driver)
    parts, bias = nm_parts(70, 256, 8, 16, dtype), random(70, dtype=dtype)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in parts[:2]]
    x, gate = random(3, 2, 259, dtype=dtype)[:, 1, 1:257], random(3, 70, dtype=dtype, seed=3)
    want = F.silu(x.double() @ parts[2].double().T + bias.double()) * gate.double()
    for stored in (parts[:2], shifted):
        for _ in range(2):  # the first call prepares the launch, the second one uses it again
            close(call(x, (*stored, *parts[2:]), bias, gate=gate, activation="silu"), want, dtype)


@needs_compiler
@on_cpu
@pytest.mark.parametrize("n, m", [(2, 4), (8, 16)])
def test_the_product_of_a_weight_orders_its_activations(n, m, tmp_path, monkeypatch):
    """The same for the two kernels of a product."""
    warps, stages, dtype, tokens = 2, 2, torch.bfloat16, 17 if m == 4 else 9
    monkeypatch.setattr(nm24, "CONFIGS", [{"WARPS": warps, "STAGES": stages}])
    config = {"WARPS": warps, "CTAS": 1, "STAGES": stages}
    monkeypatch.setattr(nm_bitmap, "many_configs", lambda *sizes: [config])
    order = emulated(
        tmp_path, "order", TILES=fragments.tiles(tokens), SEGMENTS=int(m > 4), WARPS=8, ACTIVATION=0, BF16=1
    )
    (tmp_path / "many").mkdir()
    if m == 4:
        kernels = {"nm24_many": sparse_mma(tmp_path / "many", tokens, dtype, 4, warps, stages)}
    else:
        kernels = {"bitmap_many": bitmap(tmp_path / "many", 16, tokens, dtype, 4, config)}
    in_place_of_the_driver(monkeypatch, order=order, **kernels)
    parts, bias = nm_parts(70, 256, n, m, dtype), random(70, dtype=dtype)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in parts[:2]]
    x, gate = random(tokens, 2, 259, dtype=dtype)[:, 1, 1:257], random(tokens, 70, dtype=dtype, seed=3)
    want = F.silu(x.double() @ parts[2].double().T + bias.double()) * gate.double()
    for stored in (parts[:2], shifted):
        close(call(x, (*stored, *parts[2:]), bias, gate=gate, activation="silu"), want, dtype)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("count", "tokens", "dtype"), [(16, 1, 1), (24, 4, 0), (16, 16, 1), (12, 64, 0), (24, 32, 1)])
def test_bitmaps_compile(architecture, count, tokens, dtype, tmp_path, monkeypatch):
    """Without a stack: no register spills, and no array of registers is indexed by an unknown number."""
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    kernel, macros = nm_bitmap.kernel_for(tokens)
    macros |= {"N": count, "BF16": dtype, "ACTIVATION": 2}
    configs = nm_bitmap.few_configs(tokens) if tokens <= nm_bitmap.FEW else nm_bitmap.many_configs(tokens, count)
    expect_registers(tmp_path, 1 << 16, kernel, architecture, **macros, **configs[0])


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("tokens, dtype", [(2, 1), (64, 0)])
def test_24_compiles(architecture, tokens, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    macros = {"TILES": fragments.tiles(tokens), "BF16": dtype, "ACTIVATION": 2, "WARPS": 8, "STAGES": 2}
    expect_registers(tmp_path, 64 if tokens < 64 else 168, "nm24_many", architecture, **macros)
    expect_registers(tmp_path, 64, "order", architecture, TILES=fragments.tiles(tokens), SEGMENTS=dtype)


@needs_nvrtc
def test_code_is_cached_and_a_damaged_file_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path))
    first = nvrtc.compiled("probe", (), "sm_80")
    (file,) = (tmp_path / "cuda").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert nvrtc.compiled("probe", (), "sm_80") == first and file.read_bytes().endswith(first)
    for architecture, driver in (("sm_90a", 0), ("sm_80", 13000)):
        nvrtc.compiled("probe", (), architecture, driver)
    assert len([*(tmp_path / "cuda").iterdir()]) == 3
    monkeypatch.setenv("STEN_CACHE_DIR", str(file))  # where no folder can be made
    assert nvrtc.compiled("probe", (), "sm_80") == first


@needs_nvrtc
def test_a_launch_that_overlaps_is_what_the_driver_takes():
    """The bytes of the structs of cuda-bindings; the attribute is compared while it exists."""
    driver = importlib.import_module("cuda.bindings.driver")
    attribute, config, compared = driver.CUlaunchAttribute(), driver.CUlaunchConfig(), []
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.gridDimX, config.gridDimY, config.gridDimZ = 2, 3, 4
    config.blockDimX, config.blockDimY, config.blockDimZ, config.sharedMemBytes, config.hStream = 256, 1, 1, 77, 9
    config.attrs, config.numAttrs = [attribute], 1
    want = ctypes.string_at(config.getPtr(), 56)

    def launch(config, handle, parameters, extra):
        got = ctypes.string_at(config, 56)
        address = int.from_bytes(got[40:48], "little")
        compared.append(got[:40] + got[48:] == want[:40] + want[48:])
        compared.append(ctypes.string_at(address, 72) == ctypes.string_at(int.from_bytes(want[40:48], "little"), 72))
        return 0

    x = torch.zeros(1)
    nvrtc.starter("probe", launch, 0, 256, 77, (x, 5), overlaps=True)(2, 3, 4, 9, x, 5)
    assert compared == [True, True]


@needs_nvrtc
def test_an_error_names_the_kernel_and_shows_the_log():
    with pytest.raises(RuntimeError, match=r"(?s)'bitmap_few' to compile with .*sm_80.*bitmap_few.cu.*N.*undefined"):
        nvrtc.compiled("bitmap_few", (("STAGES", 2),), "sm_80")


@pytest.mark.skipif(DEVICE != "cpu", reason="needs a machine without a driver")
def test_one_warning_where_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(nvrtc.backend, "initialize", lambda: None)
    monkeypatch.setattr(nvrtc.backend, "capability", lambda device: (9, 0))
    nvrtc._works.cache_clear()
    with pytest.warns(UserWarning, match="cannot be compiled and run on GPU 0; slower ones are used") as warned:
        assert not nvrtc._works(0) and not nvrtc._works(0)
    nvrtc._works.cache_clear()
    assert len(warned) == 1 and not nvrtc.available()


def test_what_fits():
    half, single = torch.bfloat16, torch.float32
    assert nm_bitmap.fits(1, 4096, half, 16, 32) and nm_bitmap.fits(4, 128, torch.float16, 2, 8)
    assert not any(nm_bitmap.fits(tokens, 4096, half, 16, 32) for tokens in (0, 65))
    for inputs, dtype, n, m in ((4160, half, 16, 32), (4096, single, 16, 32), (4096, half, 15, 32), (4096, half, 2, 4)):
        assert not nm_bitmap.fits(1, inputs, dtype, n, m)

    assert nm24.fits(17, 4096, half, 2, 4) and nm24.fits(64, 128, torch.float16, 2, 4)
    for tokens, inputs, dtype, n in (
        (16, 128, half, 2),
        (65, 128, half, 2),
        (20, 192, half, 2),
        (20, 128, single, 2),
        (20, 128, half, 1),
    ):
        assert not nm24.fits(tokens, inputs, dtype, n, 4)


# on a GPU


def call(x, parts, *bias, **more):
    values, index, _, n, m = parts
    return nm.linear(x, values, index, *bias, n=n, m=m, out_features=len(values), **more)


@on_gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n, m", [(2, 8), (7, 16), (6, 32), (16, 32), (32, 32)])
def test_bitmaps(n, m, dtype):
    parts, bias = nm_parts(130, 1152, n, m, dtype), random(130, dtype=dtype)
    dense = parts[2].double()
    for tokens in (1, 2, 3, 4, 5, 16, 33, 64):
        assert nm.choose(tokens, 130, 1152, dtype, n=n, m=m)[0] == "bitmap"
        x = random(tokens, 1152, dtype=dtype)
        close(call(x, parts, bias), x.double() @ dense.T + bias.double(), dtype)
        gate = random(tokens, 130, dtype=dtype, seed=3)
        close(call(x, parts, gate=gate, activation="silu"), F.silu(x.double() @ dense.T) * gate.double(), dtype)


@on_gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_24(dtype):
    parts, bias = nm_parts(130, 1152, 2, 4, dtype), random(130, dtype=dtype)
    dense = parts[2].double()
    for tokens in (17, 32, 33, 64):
        assert nm.choose(tokens, 130, 1152, dtype, n=2, m=4)[0] == "sparse_mma"
        x = random(tokens, 1152, dtype=dtype)
        close(call(x, parts, bias), x.double() @ dense.T + bias.double(), dtype)
        gate = random(tokens, 130, dtype=dtype, seed=3)
        close(call(x, parts, gate=gate, activation="silu"), F.silu(x.double() @ dense.T) * gate.double(), dtype)


@on_gpu
@pytest.mark.parametrize("n, m", [(2, 4), (16, 32)])
def test_operands_that_are_not_aligned(n, m):
    parts, x = nm_parts(64, 256, n, m, HALF[1]), random(20, 259, dtype=HALF[1])
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in parts[:2]]
    for row in (x[:, :256], x[1:2, 3:]):
        close(call(row, (*shifted, *parts[2:])), row.double() @ parts[2].double().T, HALF[1])


@on_gpu
def test_bitmaps_in_a_graph_and_in_another_thread():
    parts, x = nm_parts(64, 256, 16, 32, HALF[1]), random(1, 256, dtype=HALF[1])
    want = x.double() @ parts[2].double().T
    with ThreadPoolExecutor(1) as thread:
        close(thread.submit(call, x, parts).result(), want, HALF[1])
    call(x, parts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x, parts)
    x.mul_(2)
    y.zero_()
    graph.replay()
    close(y, 2 * want, HALF[1])
