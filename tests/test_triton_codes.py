"""The Triton kernels of sparse activations against dense products, in the interpreter or on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from triton_cases import DEVICE, close, random

import sten
from sten.backends import sparse_input
from sten.kernel_table import KERNELS, Flags
from sten.kernels import codes

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SHAPES = [(1, 40, 7, 33), (5, 16, 4, 20), (9, 64, 8, 16), (20, 33, 3, 1), (3, 5, 0, 4)]  # tokens, columns, k, outputs


def lists(tokens, columns, k, dtype):
    """values, crow (None), index and the dense activation."""
    index = torch.rand(tokens, columns, generator=torch.Generator().manual_seed(k)).topk(k).indices.sort().values
    index, values = index.to(DEVICE), random(tokens, k, dtype=dtype)
    dense = torch.zeros(tokens, columns, dtype=dtype, device=DEVICE).scatter(1, index, values)
    return values, None, index.int(), dense


def rows(tokens, columns, k, dtype):
    """The same in compressed rows of different lengths, with two free slots at the end."""
    keep = torch.rand(tokens, columns, generator=torch.Generator().manual_seed(k)).to(DEVICE) < k / columns
    dense = random(tokens, columns, dtype=dtype) * keep
    crow = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    index = torch.cat([keep.nonzero()[:, 1], torch.zeros(2, dtype=torch.int64, device=DEVICE)]).int()
    return torch.cat([dense[keep], random(2, dtype=dtype)]), crow, index, dense


def grad_weight(values, crow, index, grad, columns):
    """The product, once the sums of the columns are right."""
    got, sums = codes.grad_weight(values, *codes.by_columns(crow, index, columns), grad)
    stored = values.numel() if crow is None else int(crow[-1])
    exact = values.new_zeros(columns, dtype=torch.float64)
    exact.index_add_(0, index.flatten()[:stored].long(), values.flatten()[:stored].double())
    close(sums, exact, values.dtype)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [lists, rows])
def test_products(make, dtype):
    for number, (tokens, columns, k, outputs) in enumerate(SHAPES):
        values, crow, index, dense = make(tokens, columns, k, dtype)
        weight, grad = random(columns, outputs, dtype=dtype), random(tokens, outputs, dtype=dtype)
        bias = random(outputs, dtype=dtype) if number % 2 else None
        exact = dense.double() @ weight.double() + (0 if bias is None else bias.double())
        close(codes.linear(values, crow, index, weight, bias, tokens=tokens), exact, dtype)
        close(grad_weight(values, crow, index, grad, columns), dense.double().t() @ grad.double(), dtype)
        got = codes.grad_values(grad, crow, index, weight)
        stored = int(crow[-1]) if crow is not None else got.numel()
        token = (dense != 0).nonzero()[:, 0] if crow is not None else torch.arange(tokens).repeat_interleave(k)
        exact = (grad.double() @ weight.double().t())[token.to(DEVICE), index.flatten()[:stored].long()]
        close(got.flatten()[:stored], exact, dtype)
        assert (got.flatten()[stored:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_share_their_columns(dtype):
    for tokens, columns, height, outputs in ((4, 40, 4, 33), (7, 50, 3, 16), (1, 20, 5, 8), (40, 30, 20, 20)):
        dense = random(tokens, columns, dtype=dtype)
        for number, block in enumerate(dense.split(height)):
            block[:, torch.rand(columns, generator=torch.Generator().manual_seed(number)) > 0.3] = 0
        parts = sten.from_dense(dense, sten.BSR((height, 1))).parts
        weight, bias = random(columns, outputs, dtype=dtype), random(outputs, dtype=dtype)
        got = codes.linear(parts["values"], parts["crow"], parts["col"], weight, bias, tokens=tokens)
        close(got, dense.double() @ weight.double() + bias.double(), dtype)


def test_what_is_not_used_is_not_read():
    values, _, index, dense = lists(4, 30, 3, torch.float32)
    weight = random(30, 12)
    weight[~dense.bool().any(0)] = torch.nan
    close(codes.linear(values, None, index, weight, None, tokens=4), dense.double() @ weight.nan_to_num().double())


def test_a_column_that_all_tokens_use():
    tokens = 200
    index = torch.full((tokens, 1), 3, dtype=torch.int32, device=DEVICE)
    values, grad = random(tokens, 1), random(tokens, 8)
    got = grad_weight(values, None, index, grad, 5)
    close(got[3], values[:, 0].double() @ grad.double())
    assert (got[[0, 1, 2, 4]] == 0).all()
    assert torch.equal(got, grad_weight(values, None, index, grad, 5))


@pytest.mark.parametrize("make", [lists, rows])
def test_no_tokens(make):
    values, crow, index, _ = make(0, 8, 0, torch.float32)
    values, index = values[:0], index[:0]
    assert codes.linear(values, crow, index, random(8, 6), None, tokens=0).shape == (0, 6)
    assert codes.grad_values(random(0, 6), crow, index, random(8, 6)).shape == values.shape
    assert torch.equal(grad_weight(values, crow, index, random(0, 6), 8), torch.zeros(8, 6).to(DEVICE))


def test_opcheck():
    values, crow, index, _ = rows(4, 20, 5, torch.float32)
    weight, grad = random(20, 8), random(4, 8)
    torch.library.opcheck(codes.linear.overload, (values, crow, index, weight, None, 4))
    torch.library.opcheck(codes.grad_values.overload, (grad, crow, index, weight))
    torch.library.opcheck(codes.grad_weight.overload, (values, *codes.by_columns(crow, index, 20), grad))


def test_wrong_calls_raise():
    values, _, index, _ = lists(4, 20, 5, torch.float32)
    weight = random(20, 8)
    with pytest.raises(ValueError, match="one shape"):
        codes.linear(values[:, :3].contiguous(), None, index, weight, None, tokens=4)
    with pytest.raises(ValueError, match="of 5 tokens, got 20 of 4"):
        codes.linear(values, None, index, weight, None, tokens=5)
    with pytest.raises(ValueError, match="contiguous weight"):
        codes.linear(values, None, index, random(8, 20).t(), None, tokens=4)
    with pytest.raises(ValueError, match=r"and order \(20,\) of 3 tokens"):
        codes.grad_weight(values, *codes.by_columns(None, index, 20), random(3, 8))
    with pytest.raises(ValueError, match="at least one output"):
        codes.grad_weight(values, *codes.by_columns(None, index, 20), random(4, 0))


@pytest.mark.parametrize("layout", [sten.FanIn(), sten.CSR(), sten.BSR((1, 1))], ids=str)
def test_plans_of_cuda(layout, monkeypatch):
    """The Plan that is registered for CUDA runs these kernels, also where the layout leaves out empty tokens."""
    monkeypatch.setattr(sparse_input, "why_dense", lambda *arguments: None)
    x = random(6, 40) * (random(6, 40) > 1.5)
    x[2] = 0
    x = sten.from_dense(x, layout)
    weight, bias, grad, dense = random(40, 16).t(), random(16), random(6, 16), x.to_dense().double()
    operators = dict(zip(sparse_input.PRODUCTS, sparse_input.cuda_operators(), strict=True))
    flags = Flags(6, x.parts["values"].numel(), torch.device("cuda"), geometry={"input_major": True})

    def run(name, *operands):
        prepare = sparse_input.prepare_by(name, operators[name], "cuda")
        return prepare((layout, None), ((6, 40), (16, 40)), torch.float32, flags).run(*operands)

    close(run("linear", x.parts, weight, bias), dense @ weight.double().t() + bias.double())
    close(run("linear_grad_weight", grad, x.parts, weight), grad.double().t() @ dense)
    exact = layout.pack_like(grad.double() @ weight.double(), x.parts)
    close(run("linear_grad_sparse_input", grad, weight, x.parts), exact)


@pytest.fixture
def on_this_device(monkeypatch):
    """The kernels of a GPU, also for the CPU of the interpreter, and where a dense product would be faster."""
    monkeypatch.setattr(sparse_input, "OWN", {device: {None: 1.0} for device in sparse_input.OWN})
    before = dict(KERNELS)
    if DEVICE == "cpu":
        sparse_input.register("cpu", sparse_input.cuda_operators(), "cuda")
    yield
    for key, entry in before.items():
        if KERNELS[key] is not entry:
            KERNELS[key] = entry


class Autoencoder(torch.nn.Module):
    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(8, 40), torch.nn.Parameter(torch.randn(40, 8))
        how = {"out": (sten.TopK(3), layout), "activation": "relu", "inline": True}
        self.encode = None if layout is None else sten.sparse_op(F.linear, **how)

    def forward(self, x):
        if self.encode is not None:
            return self.encode(x, self.encoder.weight, self.encoder.bias) @ self.decoder
        y = self.encoder(x).relu()
        return y.where(sten.TopK(3).mask(y.detach(), {}, True), 0) @ self.decoder


@pytest.mark.parametrize("layout", [sten.FanIn(), sten.CSR()], ids=str)
def test_an_autoencoder_sorts_its_codes_once(layout, on_this_device):
    """In a step, whose gradients are those of dense PyTorch."""
    x = random(10, 8)
    sparse, dense = (Autoencoder(each).to(DEVICE) for each in (layout, None))
    for model in (sparse, dense):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (model(x) - x).square().mean().backward()
        names = [event.name for event in profile.events()]
        if model is sparse:
            assert names.count("aten::sort") == 1
            assert sum("linear_grad_weight" in name and "[codes]" in name for name in names) == 2
    for one, other in zip(sparse.parameters(), dense.parameters(), strict=True):
        close(one.grad, other.grad.double())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_an_autoencoder_in_a_cuda_graph(on_this_device):
    """A recorded step, replayed, changes the parameters as it does eagerly."""
    x, models = random(10, 8), [Autoencoder(sten.FanIn()).to(DEVICE) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]

    def step(model, optimizer):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(models[0], optimizers[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(models[0], optimizers[0])
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(models[1], optimizers[1])
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
