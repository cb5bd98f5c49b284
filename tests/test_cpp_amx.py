"""Products in AMX's tiles: emulated where the processor has none, by the drivers that run them.

Where the processor has tiles, the fixture `instruction_set` runs the tests of all C++ kernels with them as well.
"""

import copy
import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sten
from sten.backends import cpp
from sten.backends.cpu import BANDS

HERE = Path(__file__).parent
SOURCES = ["isa_bf16", "dots_linear", "band_linear", "csr_linear", "schedule"]
TOKENS = (0, 1, 8, 15, 16, 17, 33, 64, 100)
NMS = [sten.NM(16, 32), sten.NM(5, 16), sten.NM(2, 4), sten.NM(3, 7), sten.NM(20, 64)]
BANDED = [
    sten.VectorNM(2, 4, 128),
    sten.VectorNM(1, 4, 16),
    sten.VectorNM(2, 4, 40),
    sten.VectorNM(3, 8, 9),
    sten.BSR((16, 16)),
    sten.BSR((8, 6)),
    sten.BSR((8, 24)),
    sten.BSR((40, 64)),
]
OTHERS = [sten.VectorNM(1, 4, 4), sten.BSR((16, 3)), sten.CSR()]  # by other kernels

if not cpp.available() or not cpp.features()["bfloat16"] or not shutil.which("g++"):
    pytest.skip("needs g++, and a processor with AVX512_BF16", allow_module_level=True)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A library of the kernels that knows nothing of torch, with poisoned scratch memory and emulated tiles."""
    library, sources = tmp_path_factory.mktemp("tiles") / "tiles.so", [HERE / "tiles_emulated.cpp"]
    sources += [HERE.parent / "csrc" / f"{name}.cpp" for name in SOURCES]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-DSTEN_POISON"]
    flags.append(f'-DSTEN_TILES="{HERE / "tiles_emulated.h"}"')
    subprocess.run(["g++", *flags, *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.products.restype = ctypes.c_int64
    return loaded


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def product(library, x, weight, bias, threads):
    """y, and the products of tiles that it took."""
    parts, layout, before = weight.parts, weight.sparse_layout, library.products()
    out, values = weight.shape[0], parts["values"].contiguous()
    y = torch.full((len(x), out), torch.nan, dtype=torch.bfloat16)
    shared = (address(x), address(bias), address(y), *map(ctypes.c_int64, (*x.shape, out)), threads, address(values))
    if isinstance(layout, sten.NM):
        index, groups = parts["index"], values.shape[1] // layout.n
        width = 2 if layout.m <= 4 else 4 if layout.m <= 16 else 8
        bits = 1 if index.dim() == 3 else width
        sizes = ctypes.c_int64(groups), ctypes.c_int64(index[0].numel()), layout.n, layout.m, bits
        library.nm_linear(*shared, address(index), *sizes)
    else:
        band = BANDS[type(layout)]
        (crow, col), (height, width, columns) = band.pattern(parts), band.sizes(layout, tuple(weight.shape))
        sizes = (columns, height, max(width, 1), col.shape[-1] if band.lists else 0)
        library.band_linear(*shared, address(crow), address(col), *map(ctypes.c_int64, sizes))
    return y, library.products() - before


def random_weight(layout, shape):
    score = torch.randn(shape)
    mask = layout.mask(score, None if layout.rate else 0.6)
    return sten.from_dense((score * mask).bfloat16(), layout, mask)


def assert_product(y, x, dense, bias):
    """As float32 sums, rounded once."""
    x, dense, bias = x.double(), dense.double(), 0 if bias is None else bias.double()
    want, scale = x @ dense.t() + bias, x.abs() @ dense.abs().t() + abs(bias)
    error = (y.double() - want).abs() - 2e-6 * scale - 2.0**-8 * want.abs()
    assert y.shape == want.shape and (error <= 1e-7).all(), float(error.max())


@pytest.mark.parametrize("layout", NMS + BANDED + OTHERS, ids=str)
@pytest.mark.parametrize("shape", [(3, 130), (100, 126), (70, 200), (150, 330)], ids=str)
def test_products(emulated, layout, shape):
    """Rows, tokens and columns that are no multiple of a tile; several blocks of columns, several threads."""
    weight, used = random_weight(layout, shape), 0
    for tokens in TOKENS:
        x, bias = torch.randn(tokens, shape[1]).bfloat16(), torch.randn(shape[0]).bfloat16() if tokens % 2 else None
        y, products = product(emulated, x, weight, bias, 3 if tokens > 16 else 1)
        assert_product(y, x, weight.to_dense(), bias)
        used += products
    assert (used > 0) == (layout not in OTHERS)


@pytest.mark.parametrize("rows", [3, 40, 100])
def test_bits_of_csr(emulated, rows):
    """Rows of any length, some at the end of memory shorter than a vector; infinite activations are not for bits."""
    mask = torch.rand(rows, 90) < torch.rand(rows, 1)
    mask[-2] = False
    weight = sten.from_dense((torch.randn(rows, 90) * mask).bfloat16(), sten.CSR(), mask)
    bits = (F.pad(mask, (0, 6)).view(rows, 12, 8).int() << torch.arange(8)).sum(2).to(torch.uint8)
    values, crow, used = weight.parts["values"], weight.parts["crow"], emulated.products()
    for tokens in TOKENS:
        x, y = torch.randn(tokens, 90).bfloat16(), torch.full((tokens, rows), torch.nan).bfloat16()
        sizes = map(ctypes.c_int64, (tokens, 90, rows))
        emulated.csr_bits_linear(address(x), None, address(y), *sizes, 2, address(values), address(crow), address(bits))
        assert_product(y, x, weight.to_dense(), None)
    assert emulated.products() > used or rows == 3


@pytest.mark.parametrize("layout", BANDED, ids=str)
def test_what_fills_up_a_tile_is_not_multiplied(emulated, layout):
    """Infinite activations and weights: of other columns, rows and tokens than those of a sum."""
    weight = random_weight(layout, (150, 75))
    stored = weight.to_dense() != 0
    for column in (40, stored[0].nonzero()[-1].item()):  # the last one may fill half a pair
        x = torch.randn(33, 75).bfloat16()
        x[5, column] = torch.inf
        y, _ = product(emulated, x, weight, None, 1)
        finite = torch.ones(33, 150, dtype=torch.bool)
        finite[5] = ~stored[:, column]
        if isinstance(layout, sten.BSR):  # which stores zeros as well
            assert y.isfinite()[finite.all(1)].all()
        else:
            assert torch.equal(y.isfinite(), finite) and not y.isnan().any()
    dense = weight.to_dense()
    row, column = stored.nonzero()[-1].tolist()
    dense[row, column] = torch.inf
    y, _ = product(emulated, torch.ones(33, 75).bfloat16(), sten.from_dense(dense, layout, stored), None, 1)
    assert y.isinf().any(0).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("layout", NMS[:3], ids=str)
def test_wrong_bits_read_nothing_beyond(emulated, layout):
    weight = random_weight(layout, (70, 200))
    weight.parts["index"].copy_(torch.randint(0, 256, weight.parts["index"].shape, dtype=torch.uint8))
    y, products = product(emulated, torch.ones(20, 200).bfloat16(), weight, None, 1)
    assert products and y.isfinite().all()


@pytest.mark.skipif("amx" not in cpp.features()["instruction_sets"], reason="needs AMX, and a system that permits it")
def test_beside_onednn():
    """A model whose layers use the tiles in turn, oneDNN with shapes of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layouts = {0: sten.NM(16, 32), 2: sten.VectorNM(2, 4, 16), 4: sten.NM(2, 4)}
        sizes = [(96, 200), (200, 50), (50, 330), (330, 70), (70, 96)]
        dense = nn.Sequential(*(nn.Linear(*size) for size in sizes)).bfloat16().requires_grad_(False)
        sparse = copy.deepcopy(dense)
        for i, layout in layouts.items():
            weight = random_weight(layout, dense[i].weight.shape)
            dense[i].weight.copy_(weight.to_dense())
            sparse[i].weight = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(40, 96).bfloat16()
        want = dense(x)
        for _ in range(20):
            torch.testing.assert_close(sparse(x), want, rtol=0.03, atol=0.03)
            torch.testing.assert_close(dense(x), want, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
