"""Few tokens of CSR and FanIn on the CPU by a table of the pattern: bits, or windows."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import sten
from sten.backends import cpp
from sten.backends.cpu_tables import table_of
from sten.kernels import pattern_cache

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

LAYOUTS = [sten.CSR(), sten.FanIn()]
DTYPES = [torch.float32, torch.bfloat16]
wide = pytest.mark.skipif(not cpp.features()["bfloat16"], reason="this processor does not multiply bfloat16")


def assert_product(got, left, right, bias=None):
    """Check `got` against left @ right.T (+ bias) in float64: float32 sums, rounded once to the dtype."""
    left, right, bias = left.double(), right.double(), 0 if bias is None else bias.double()
    want, scale = left @ right.t() + bias, left.abs() @ right.abs().t() + abs(bias)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    assert got.shape == want.shape
    error = (got.double() - want).abs() - 2e-6 * scale - rounding * want.abs()
    assert not got.numel() or float(error.max()) <= 1e-7


def random_weight(layout, shape, density, dtype):
    """Some rows of CSR are empty, some full; FanIn leaves out empty rows."""
    score = torch.rand(shape)
    if isinstance(layout, sten.FanIn):
        mask = score >= score.kthvalue(max(1, round((1 - density) * shape[1])), 1, keepdim=True).values
    else:
        mask = score >= 1 - density
        mask[1::4] = True
    mask[::3] = False
    return sten.from_dense((torch.randn(shape) * mask).to(dtype), layout, mask)


def by_table(kind, x, weight, bias=None):
    """The product by `band_linear` with a table of the pattern, whatever the plan is."""
    parts, out, columns = weight.parts, weight.shape[0], weight.shape[1]
    crow, col = parts.get("crow"), parts["col"] if "crow" in parts else parts["index"]
    stored = torch.arange(out) if crow is not None else parts["row"].long()
    table = getattr(torch.ops.sten, f"pattern_{kind}")(crow, col, columns, len(stored))
    own = None if bias is None else bias[stored]
    y = torch.ops.sten.band_linear(
        x, parts["values"], crow, col, own, 1, columns, len(stored), trusted=True, table=table
    )
    want = torch.zeros(*x.shape[:-1], out, dtype=x.dtype) + (0 if bias is None else bias)
    want[..., stored] = y
    return want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["bits", "windows"])
def test_every_instruction_set(instruction_set, poisoned, kind, layout, dtype):
    torch.manual_seed(0)
    for shape in [(1, 1), (4, 31), (70, 33), (13, 720), (130, 96)]:
        for density in (0.02, 0.3, 0.55, 1.0):
            weight = random_weight(layout, shape, density, dtype)
            for tokens in (0, 1, 2, 3, 7, 16, 49):
                x, bias = (
                    torch.randn(tokens, shape[1]).to(dtype),
                    torch.randn(shape[0]).to(dtype) if tokens % 2 else None,
                )
                assert_product(by_table(kind, x, weight, bias), x, weight.to_dense(), bias)


def test_bits_are_the_mask():
    torch.manual_seed(0)
    mask = torch.rand(9, 75) < 0.4
    weight = sten.from_dense(mask.float(), sten.CSR(), mask)
    bits = torch.ops.sten.pattern_bits(weight.parts["crow"], weight.parts["col"], 75, 9)
    columns = torch.arange(96)
    assert torch.equal((bits[:, columns // 8] >> (columns % 8) & 1).bool()[:, :75], mask)
    assert not (bits[:, 75 // 8] >> 75 % 8).any() and not bits[:, 10:].any()


@wide
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_which(layout):
    cpp.set_instruction_set("avx512")
    try:
        compare_which(layout)
    finally:
        cpp.set_instruction_set("auto")


def compare_which(layout):
    half, single = torch.bfloat16, torch.float32
    sizes = {  # density, dtype, tokens
        (0.5, half, 1): "bitmap",
        (0.5, half, 28): "bitmap",
        (0.5, half, 29): "bfloat16",
        (0.25, half, 12): "bitmap",
        (0.25, half, 13): "bfloat16",
        (0.125, half, 1): "windows",
        (0.125, half, 4): "windows",
        (0.125, half, 5): "bfloat16",
        (0.015, half, 1): "bfloat16",
        (0.5, single, 1): "bitmap",
        (0.5, single, 12): "bitmap",
        (0.5, single, 13): "float32",
        (0.1, single, 1): "float32",
        (0.5, torch.float16, 1): "converted",
    }
    for (density, dtype, tokens), variant in sizes.items():
        mask = torch.arange(64 * 64).view(64, 64) % 64 < density * 64
        weight = sten.from_dense(mask.to(dtype), layout, mask)
        assert sten.which("linear", (tokens, 64), weight).variant == variant, (density, dtype, tokens)
        x = torch.randn(tokens, 64).to(dtype)
        assert_product(F.linear(x, weight), x, weight.to_dense())


@wide
def test_what_amx_multiplies():
    """Tiles of a bitmap, or of a dense weight; AVX-512 takes other ways for as many tokens."""
    half, sizes = torch.bfloat16, {1: "windows", 3: "windows", 4: "bits", 128: "bits", 129: "expand", 4096: "expand"}
    for tokens, kind in sizes.items():
        assert table_of("amx", 0.1, half, tokens) == kind
        assert table_of("avx512", 0.1, half, tokens) == ("windows" if tokens <= 3 else None)
        assert table_of("amx", 0.01, half, tokens) is None
    assert table_of("amx", 0.5, half, 1) == "bits" and table_of("amx", 0.5, torch.float32, 64) is None


@wide
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_many_tokens_are_multiplied_by_a_dense_copy(layout, poisoned):
    torch.manual_seed(0)
    for dtype, shape in itertools.product(DTYPES, [(1, 1), (70, 33), (130, 96)]):
        weight = random_weight(layout, shape, 0.3, dtype)
        x, bias = torch.randn(2, 65, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
        y = by_table("bits", x, weight, bias)
        assert_product(y, x, weight.to_dense(), bias)
        assert_product(by_table("bits", x[0], weight, bias), x[0], weight.to_dense(), bias)


@wide
def test_a_plan_outlives_its_instruction_set():
    torch.manual_seed(0)
    x = torch.randn(2, 70).bfloat16()
    for layout, density in itertools.product(LAYOUTS, (0.5, 0.1)):
        weight = random_weight(layout, (21, 70), density, torch.bfloat16)
        F.linear(x, weight)
        for name in cpp.features()["instruction_sets"]:
            cpp.set_instruction_set(name)
            try:
                assert_product(F.linear(x, weight), x, weight.to_dense())
            finally:
                cpp.set_instruction_set("auto")


@wide
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bits", "windows"])
def test_a_zero_multiplies_no_infinity(kind, layout, dtype):
    """Outputs without an entry in the infinite column are those of a finite activation."""
    torch.manual_seed(0)
    weight = random_weight(layout, (40, 75), 0.3, dtype)
    for number, tokens, column in itertools.product((torch.inf, torch.nan), (1, 2, 6), (0, 32, 40, 74)):
        stored = weight.to_dense()[:, column] != 0
        x = torch.randn(tokens, 75).to(dtype)
        want = by_table(kind, x, weight)
        x[:, column] = number
        got = by_table(kind, x, weight)
        assert not got[:, stored].isfinite().any()
        torch.testing.assert_close(got[:, ~stored], want[:, ~stored])


@wide
def test_values_written_in_place_are_read():
    torch.manual_seed(0)
    weight, x = random_weight(sten.CSR(), (40, 64), 0.5, torch.bfloat16), torch.randn(1, 64).bfloat16()
    F.linear(x, weight)
    weight.parts["values"].mul_(-2)
    assert_product(F.linear(x, weight), x, weight.to_dense())


@wide
@pytest.mark.parametrize("tell", [False, True])
def test_a_pattern_written_in_place_is_noticed(tell):
    """By its version, or, where memory was written behind torch's back, by `invalidate`."""
    torch.manual_seed(0)
    x = torch.randn(3, 64).bfloat16()
    weight = sten.from_dense(torch.ones(8, 64).bfloat16(), sten.CSR(), torch.arange(64).expand(8, 64) % 2 == 0)
    for tokens in (1, 3):
        F.linear(x[:tokens], weight)
    if tell:
        weight.parts["col"].numpy()[:] += 1
        weight.cache.invalidate(weight.parts["crow"], weight.parts["col"])
    else:
        weight.parts["col"].add_(1)
    for tokens in (1, 3):
        assert sten.which("linear", x[:tokens], weight).variant == "bitmap"
        assert_product(F.linear(x[:tokens], weight), x[:tokens], weight.to_dense())


@wide
def test_a_pattern_of_inference_mode():
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(1, 64).bfloat16()
        weight = random_weight(sten.CSR(), (40, 64), 0.5, torch.bfloat16)
        weight.parts["col"].copy_(weight.parts["col"])
        for _ in range(2):
            assert_product(F.linear(x, weight), x, weight.to_dense())
        few = sten.from_dense(torch.ones(8, 64).bfloat16(), sten.CSR(), torch.arange(64).expand(8, 64) % 2 == 0)
        F.linear(x, few)
        few.parts["col"].add_(1)  # such tensors have no version
        assert_product(F.linear(x, few), x, few.to_dense())


@wide
def test_one_bitmap_for_all_numbers_of_tokens():
    weight = random_weight(sten.CSR(), (40, 64), 0.5, torch.bfloat16)
    before = set(pattern_cache._entries)
    for tokens in (1, 2, 5):
        F.linear(torch.ones(tokens, 64).bfloat16(), weight)
    (new,) = set(pattern_cache._entries) - before
    assert pattern_cache._entries[new].result.shape == (40, 8)


@wide
def test_a_wrong_pattern_is_refused():
    weight = random_weight(sten.CSR(), (40, 64), 0.5, torch.bfloat16)
    weight.parts["col"][5] = 64
    with pytest.raises(ValueError, match="columns below 64"):
        F.linear(torch.ones(1, 64).bfloat16(), weight)
    crow, col = weight.parts["crow"], weight.parts["col"].clamp(max=63)
    with pytest.raises(RuntimeError, match="Expected a table"):
        torch.ops.sten.band_linear(
            torch.ones(1, 64).bfloat16(), weight.parts["values"], crow, col, None, 1, 64, 40, trusted=True,
            table=torch.zeros(40, 4, dtype=torch.uint8),
        )  # fmt: skip


@wide
def test_gradients_and_compile():
    torch.manual_seed(0)
    weight = random_weight(sten.CSR(), (40, 64), 0.5, torch.bfloat16).requires_grad_()
    x, grad = torch.randn(1, 64).bfloat16().requires_grad_(), torch.randn(1, 40).bfloat16()
    F.linear(x, weight).backward(grad)
    assert_product(x.grad, grad, weight.detach().to_dense().t())
    stored = weight.detach().to_dense() != 0
    torch.testing.assert_close(weight.grad.to_dense()[stored], (grad.t() @ x.detach())[stored])
    compiled = torch.compile(F.linear, backend="aot_eager", fullgraph=True)
    assert_product(compiled(x.detach(), weight.detach()), x.detach(), weight.detach().to_dense())
    crow, col = weight.parts["crow"], weight.parts["col"]
    torch.library.opcheck(torch.ops.sten.pattern_bits.default, (crow, col, 64, 40))
    bits = torch.ops.sten.pattern_bits(crow, col, 64, 40)
    numbers = weight.parts["values"].detach(), crow, col, None, 1, 64, 40
    torch.library.opcheck(torch.ops.sten.band_linear.default, (x.detach(), *numbers), {"trusted": True, "table": bits})
