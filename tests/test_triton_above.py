"""One token above a threshold: selected into CSR with a slot for each column, and read by the product."""

import pytest
import torch
import torch.nn.functional as F
from triton_cases import DEVICE, close, random

import sten
from sten.backends import sparse_input
from sten.dispatch import planned_input
from sten.kernel_table import Flags
from sten.kernels import above, codes
from sten.ops.epilogue import Kept, selected

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUT = sten.CSR()


def row(columns, dtype):
    """A token with ties, zeros of both signs, NaN and infinities."""
    x = random(1, columns, dtype=dtype)
    special = torch.tensor([0.5, -0.5, 0.0, -0.0, torch.nan, torch.inf, -torch.inf, 0.5])
    x[0, : min(8, columns)] = special[:columns].to(x)
    return x


def expect_selected(x, kept, relu=False):
    """What the mask of sten.Threshold keeps, in valid parts of one size."""
    columns, z = x.shape[1], x.relu() if relu else x
    want = sten.Threshold(float(kept.edge), signed=kept.rule == "above").mask(z.cpu(), {}, False).to(DEVICE)
    parts = selected(x, kept, LAYOUT, relu)
    LAYOUT.validate(parts, (1, columns))
    assert parts["values"].shape == parts["col"].shape == (columns,)
    assert torch.equal(LAYOUT.support(parts, (1, columns)), want), (kept, relu)
    dense = LAYOUT.unpack(parts, (1, columns))
    assert dense.dtype == x.dtype and torch.equal(dense, torch.where(want, z, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_mask_says(dtype):
    """For each rule, a number and a tensor, and of all entries, some and none."""
    for columns in (1, 7, 16, 100):
        expect_selected(row(columns, dtype), Kept("magnitude", 0.5))
    x = row(33, dtype)
    for rule in ("magnitude", "above"):
        for edge in (0.5, torch.tensor(0.5, device=DEVICE)):
            for relu in (False, True):
                expect_selected(x, Kept(rule, edge), relu)
    for edge in (0.1, 0.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e300):  # also what the dtype rounds
        expect_selected(x, Kept("magnitude", edge))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: many programs, each of which counts many entries")
@pytest.mark.parametrize("columns", [1023, 14336, 100_000])
def test_wide_rows(columns):
    for dtype in DTYPES[::2]:
        expect_selected(row(columns, dtype), Kept("magnitude", 0.7))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_product_reads_what_is_stored(dtype):
    """Whatever stands in the free slots; with a bias, of no entries, of few and of all."""
    for columns, outputs in ((40, 33), (100, 16), (3, 1)):
        x, weight, bias = random(1, columns, dtype=dtype), random(columns, outputs, dtype=dtype), random(outputs)
        for edge in (9.0, 1.0, -1.0):
            parts = selected(x, Kept("magnitude", edge), LAYOUT, False)
            parts["values"][int(parts["crow"][1]) :] = torch.nan
            dense = torch.where(x.abs() > edge, x, 0).double()
            for own in (None, bias.to(dtype)):
                y = codes.linear(parts["values"], parts["crow"], parts["col"], weight, own, tokens=1)
                close(y, dense @ weight.double() + (0 if own is None else own.double()), dtype)


def test_the_plan():
    """The product is not expected to be dense, since the host does not know the count; gradients know no more."""
    x = random(1, 40)
    made = sten.SparseTensor(LAYOUT, selected(x, Kept("magnitude", 0.5), LAYOUT, False), (1, 40))
    prepare = sparse_input.prepare_by("linear", sparse_input.cuda_operators()[0], "cuda")
    flags = Flags(1, 40, torch.device("cuda"), geometry={"input_major": True})
    plan = prepare((LAYOUT, None), ((1, 40), (16, 40)), torch.float32, flags)
    assert plan.variant == "codes" and "the GPU counts them" in plan.reason
    weight = random(40, 16).t()
    close(plan.run(made.parts, weight, None), torch.where(x.abs() > 0.5, x, 0).double() @ weight.double().t())
    for changed in ({"device": torch.device("cpu")}, {"geometry": {"input_major": False}}):
        assert sparse_input.why_dense("linear", LAYOUT, ((1, 40), (16, 40)), x.dtype, flags._replace(**changed))
    assert sparse_input.why_dense("linear", LAYOUT, ((2, 40), (16, 40)), x.dtype, flags._replace(entries=80))
    assert sparse_input.why_dense("linear", sten.FanIn(), ((1, 40), (16, 40)), x.dtype, flags)


def test_refused_and_opcheck():
    x, edge = random(1, 40), torch.tensor([0.5], device=DEVICE)
    for wrong, message in (
        ((random(2, 8), None), "one row"),
        ((x.double(), None), "float64"),
        ((x, edge.expand(2).clone()), "one floating-point threshold"),
        ((x, edge.int()), "int32"),
    ):
        with pytest.raises(ValueError, match=message):
            above.above.prepare(*wrong, number=0.0, signed=False, relu=False)
    torch.library.opcheck(above.above.overload, (x, edge, 0.0, False, True))
    torch.library.opcheck(above.above.overload, (x, None, 0.5, True, False))


needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def layers(method, **keywords):
    """The same layer with an input site, and dense; the first is input-major."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(300, 64, device=DEVICE).requires_grad_(False)
    sparse = torch.nn.Linear(300, 64, device=DEVICE).requires_grad_(False)
    sparse.load_state_dict(dense.state_dict())
    sparse.weight.data = sparse.weight.data.t().contiguous().t()
    return sten.sparsify(sparse, LAYOUT, method, site="input", modules="", **keywords), dense


@needs_gpu
def test_a_site_on_a_gpu():
    """A calibrated threshold: nothing waits for the device; two tokens, and gradients, are right as well."""
    sparse, dense = layers(sten.Threshold(sparsity=0.5), calibration=[random(64, 300)])
    edge = sparse.sparse_input_threshold
    for shape in ((1, 300), (1, 1, 300), (2, 300), (3, 1, 300)):
        x = random(*shape)
        want = F.linear(torch.where(x.abs() > edge, x, 0), dense.weight, dense.bias)
        close(sparse(x), want)
    x = random(1, 300)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = sparse(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close(y, F.linear(torch.where(x.abs() > edge, x, 0), dense.weight, dense.bias))
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    sparse(x).square().sum().backward()
    F.linear(torch.where(other.abs() > edge, other, 0), dense.weight, dense.bias).square().sum().backward()
    close(x.grad, other.grad)
    assert (
        planned_input(
            "linear", sten.sparse_op(F.relu, out=(sten.Threshold(0.1), LAYOUT))(random(1, 300)), sparse.weight, 1
        ).variant
        == "codes"
    )


@needs_gpu
def test_a_site_in_a_cuda_graph():
    """The count of a replay is that of its input, not of the one that was recorded."""
    sparse, dense = layers(sten.Threshold(1.0))
    x = random(1, 300)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            sparse(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
    for scale in (1.0, 0.0, 100.0, 0.5):
        x.copy_(random(1, 300) * scale)
        graph.replay()
        close(y, F.linear(torch.where(x.abs() > 1.0, x, 0), dense.weight, dense.bias))
