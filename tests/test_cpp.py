"""The compiled CPU kernels against a float64 product with the unpacked weight, one instruction set after another."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from sten.backends import cpp

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

from sten import _C

SETS = cpp.features()["instruction_sets"]
TOKENS = (0, 1, 2, 15, 16, 17, 64, 65, 130)
SHAPES = [(1, 1), (3, 17), (17, 3), (63, 100), (100, 63), (500, 130), (130, 500)]
GROUPED = [
    (1, 10, 8),
    (1, 4, 16),
    (2, 4, 8),
    (2, 4, 3),
    (4, 8, 4),
    (1, 1, 7),
    (1, 3, 5),
    (2, 5, 1),
    (5, 6, 2),
    (7, 9, 1),
    (4, 4, 3),
    (6, 7, 4),
    (1, 16, 8),
]


@contextmanager
def threads(count):
    """Use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned():
    """Let torch fill uninitialized memory with NaN, so that an output that is not written is detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def revolving_door(m, n):
    """A(m, n), from the definition in docs/formats.md."""
    if n == 0 or n == m:
        return [tuple(range(n))]
    return revolving_door(m - 1, n) + [(*p, m - 1) for p in reversed(revolving_door(m - 1, n - 1))]


def random_csr(out, inp, density, tail=0):
    """Return a random weight, dense in float64, and its parts; row 0 is empty, and `tail` entries are unused."""
    mask = torch.rand(out, inp) < density
    if out > 1:
        mask[0] = False
    weight = torch.randn(out, inp) * mask
    crow = torch.zeros(out + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    values = torch.cat([weight[mask], torch.full((tail,), torch.nan)])
    col = torch.cat([mask.nonzero()[:, 1].int(), torch.zeros(tail, dtype=torch.int32)])
    return weight.double(), (values, crow, col)


def random_grouped(out, inp, n, m, g):
    """Return a random weight, dense in float64, and its parts."""
    patterns = torch.tensor(revolving_door(m, n))
    count = len(patterns)
    width = count * g
    chunks, strips = -(-inp // width), -(-out // m)
    index = torch.rand(chunks, strips, width).argsort(-1).view(chunks, strips, count, g)
    rows = torch.arange(strips).view(1, -1, 1, 1, 1) * m + patterns.view(1, 1, count, 1, n)
    cols = torch.arange(chunks).view(-1, 1, 1, 1, 1) * width + index[..., None]
    rows, cols = torch.broadcast_tensors(rows, cols)
    values = torch.randn(rows.shape) * ((rows < out) & (cols < inp))
    dense = torch.zeros(strips * m, chunks * width, dtype=torch.float64)
    dense[rows.reshape(-1), cols.reshape(-1)] = values.reshape(-1).double()
    return dense[:out, :inp].contiguous(), (values, index.short())


def run_csr(x, parts, bias, out):
    """Call the operator."""
    return torch.ops.sten.csr_linear(x, *parts, bias, out)


def assert_linear(name, got, x, weight, bias):
    """Check `got` against a float64 product, within float32 rounding of the sum of magnitudes."""
    expected = F.linear(x.double(), weight, None if bias is None else bias.double())
    scale = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.double().abs())
    assert got.shape == expected.shape and got.dtype == torch.float32, name
    error = (got.double() - expected).abs()
    assert (error <= 2e-6 * scale + 1e-30).all(), f"{name}: largest error {error.max():.3g}"


def check_tokens(name, run, weight, out, inp):
    """Run every number of tokens, with and without bias; some on two threads, which are slow on a crowded machine."""
    for tokens in TOKENS:
        x, bias = torch.randn(tokens, inp), torch.randn(out)
        for b, count in ((bias, 1), (None, 2 if tokens in (1, 130) else 1)):
            with threads(count):
                got = run(x, b)
            with threads(1):
                assert_linear(f"{name}, {tokens} tokens", got, x, weight, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_csr(instruction_set, shape, density):
    torch.manual_seed(0)
    weight, parts = random_csr(*shape, density, tail=5)
    with poisoned():
        check_tokens(f"CSR {density}", lambda x, b: run_csr(x, parts, b, shape[0]), weight, *shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nmg", GROUPED, ids=str)
def test_grouped_nm(instruction_set, shape, nmg):
    torch.manual_seed(0)
    weight, parts = random_grouped(*shape, *nmg)
    with poisoned():
        check_tokens(
            f"GroupedNM{nmg}",
            lambda x, b: torch.ops.sten.grouped_nm_linear(x, *parts, b, *nmg, shape[0]),
            weight,
            *shape,
        )


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_large(instruction_set, tokens):
    """Several k-blocks, several pieces of rows and a last panel that is not full, on two threads."""
    torch.manual_seed(0)
    x, bias = torch.randn(tokens, 700), torch.randn(2500)
    with threads(2), poisoned():
        weight, parts = random_csr(2500, 700, 0.1)
        assert_linear("CSR", run_csr(x, parts, bias, 2500), x, weight, bias)
        for nmg in [(1, 10, 8), (2, 4, 8), (4, 8, 4)]:
            weight, parts = random_grouped(2500, 700, *nmg)
            got = torch.ops.sten.grouped_nm_linear(x, *parts, bias, *nmg, 2500)
            assert_linear(f"GroupedNM{nmg}", got, x, weight, bias)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 3, 200])
def test_no_rows_or_columns(shape, tokens):
    weight, parts = random_csr(*shape, 0.5)
    x, bias = torch.randn(tokens, shape[1]), torch.randn(shape[0])
    assert_linear("CSR", run_csr(x, parts, bias, shape[0]), x, weight, bias)
    weight, parts = random_grouped(*shape, 2, 4, 1)
    got = torch.ops.sten.grouped_nm_linear(x, *parts, bias, 2, 4, 1, shape[0])
    assert_linear("GroupedNM", got, x, weight, bias)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 4)], ids=str)
def test_leading_dimensions_and_strides(instruction_set, lead):
    torch.manual_seed(0)
    weight, parts = random_csr(20, 33, 0.4)
    grouped, grouped_parts = random_grouped(20, 33, 2, 4, 2)
    base = torch.randn(*lead, 66)
    for x in (base[..., ::2], base[..., :33], base.flip(-1)[..., 3:36].transpose(0, -1).contiguous().transpose(0, -1)):
        assert_linear("CSR", run_csr(x, parts, None, 20), x, weight, None)
        got = torch.ops.sten.grouped_nm_linear(x, *grouped_parts, None, 2, 4, 2, 20)
        assert_linear("GroupedNM", got, x, grouped, None)


@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 200])
def test_infinity_stays_in_its_column(instruction_set, tokens):
    """Rows without an entry in an infinite column are exact: padding never multiplies a real activation."""
    torch.manual_seed(0)
    out, inp = 50, 150
    weight, parts = random_csr(out, inp, 0.1)
    # 2:4:8 has chunks of 48 columns, so the last is mostly padding
    grouped, grouped_parts = random_grouped(out, inp, 2, 4, 8)
    x, bias = torch.randn(tokens, inp), torch.randn(out)
    for column in (0, 127, 149):
        hot = x.clone()
        hot[:, column] = torch.inf
        cases = {
            "CSR": (run_csr(hot, parts, bias, out), weight),
            "GroupedNM": (torch.ops.sten.grouped_nm_linear(hot, *grouped_parts, bias, 2, 4, 8, out), grouped),
        }
        for name, (got, dense) in cases.items():
            clean = dense[:, column] == 0
            assert_linear(name, got[:, clean], x, dense[clean], bias[clean])
            assert not torch.isfinite(got[:, ~clean]).any()


@pytest.mark.parametrize("m", range(1, 9))
def test_pattern_order(m):
    for n in range(1, m + 1):
        assert [tuple(p) for p in _C.patterns(n, m)] == revolving_door(m, n)


@pytest.mark.parametrize("tokens", [1, 5, 130])
def test_opcheck_and_compile(tokens):
    torch.manual_seed(0)
    weight, parts = random_csr(12, 20, 0.4)
    x, bias = torch.randn(tokens, 20), torch.randn(12)
    torch.library.opcheck(torch.ops.sten.csr_linear.default, (x, *parts, bias, 12))
    _, grouped_parts = random_grouped(12, 20, 1, 4, 2)
    torch.library.opcheck(torch.ops.sten.grouped_nm_linear.default, (x, *grouped_parts, None, 1, 4, 2, 12))
    compiled = torch.compile(lambda x: run_csr(x, parts, bias, 12) + 1, backend="aot_eager", fullgraph=True)
    assert_linear("compiled", compiled(x) - 1, x, weight, bias)


def bad_csr():
    """Each way to call csr_linear wrongly, and a part of its message."""
    _, (values, crow, col) = random_csr(4, 6, 0.5)
    x, bias = torch.randn(2, 6), torch.randn(4)
    return [
        ((x.double(), values, crow, col, None, 4), "Expected x of dtype"),
        ((torch.tensor(1.0), values, crow, col, None, 4), "dimension"),
        ((x, values.double(), crow, col, None, 4), "values"),
        ((x, values, crow.long(), col, None, 4), "crow"),
        ((x, values, crow, col.long(), None, 4), "col"),
        ((x, values, crow, col[:-1], None, 4), "equal size"),
        ((x, values, crow[:-1], col, None, 4), "crow"),
        ((x, values, crow, col, bias[:3], 4), "bias"),
        ((x, values, crow, col, bias[:, None], 4), "bias"),
        ((x, values, crow * 3, col, None, 4), "Expected crow from 0"),
        ((x, values, crow, col, None, -1), "out_features"),
        ((x, values.repeat(2)[::2], crow, col, None, 4), "contiguous"),
    ]


def bad_grouped():
    """Each way to call grouped_nm_linear wrongly, and a part of its message."""
    _, (values, index) = random_grouped(8, 12, 2, 4, 2)
    x = torch.randn(2, 12)
    return [
        ((x, values, index.int(), None, 2, 4, 2, 8), "index"),
        ((x, values[..., 0], index, None, 2, 4, 2, 8), "values"),
        ((torch.randn(2, 13), values, index, None, 2, 4, 2, 8), "index"),
        ((x, values, index, None, 2, 4, 2, 9), "index"),
        ((x, values, index, None, 3, 4, 2, 8), "index"),
        ((x, values, index, None, 5, 4, 2, 8), "n <= m"),
        ((x, values, index, None, 2, 4, 0, 8), "g >= 1"),
        ((x, values, index, None, 10, 40, 2, 8), "C(m, n)"),
        ((x, values.mT.contiguous().mT, index, None, 2, 4, 2, 8), "contiguous"),
        ((x, values, index, torch.randn(7), 2, 4, 2, 8), "bias"),
    ]


@pytest.mark.parametrize("case", range(12))
def test_csr_raises(case):
    arguments, message = bad_csr()[case]
    for intercepted in (True, False):
        with pytest.raises(RuntimeError) as caught:
            cpp.operator("csr_linear", intercepted)(*arguments)
        assert message in str(caught.value)


@pytest.mark.parametrize("case", range(10))
def test_grouped_nm_raises(case):
    arguments, message = bad_grouped()[case]
    for intercepted in (True, False):
        with pytest.raises(RuntimeError) as caught:
            cpp.operator("grouped_nm_linear", intercepted)(*arguments)
        assert message in str(caught.value)


def test_a_pattern_is_checked_once():
    """While it is the same, in the same version; by each Plan for itself. Tensors without a version: every time."""
    x, (values, crow, col) = torch.randn(3, 5), random_csr(4, 5, 0.6)[1]
    linear, another = (cpp.operator("csr_linear", intercepted=False) for _ in range(2))

    def wrong(call, columns):
        with pytest.raises(ValueError, match="Expected crow that never falls and columns below 5"):
            call(x, values, crow, columns, None, 4)

    expected = torch.ops.sten.csr_linear(x, values, crow, col, None, 4)
    for _ in range(2):
        assert torch.equal(linear(x, values, crow, col, None, 4), expected)
        wrong(linear, col + 9)
    assert torch.equal(linear(x, values, crow, col, None, 4, activation=1), expected.relu())
    with torch.no_grad():
        col.add_(9)
    for call in (linear, another, linear):
        wrong(call, col)
    with torch.inference_mode():
        inference = col - 9
        assert torch.equal(linear(x, values, crow, inference, None, 4), expected)
        inference.add_(9)
        wrong(linear, inference)
    with pytest.raises(RuntimeError, match="Expected values and col of equal size"):
        linear(x, values[1:], crow, col, None, 4)


def test_instruction_sets():
    assert SETS[-1] == "portable" and cpp.features()["instruction_set"] == SETS[0]
    with pytest.raises(ValueError, match="'sse9'"):
        cpp.set_instruction_set("sse9")
    code = "import sten.backends.cpp as c; print(c.features()['instruction_set'])"
    environment = dict(os.environ, STEN_CPU="portable", PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "portable"
