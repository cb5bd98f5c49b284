"""torch.compile(fullgraph=True): forward and backward equal eager, and no step compiles again."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small import every_layout as small_layout
from torch import nn
from weights import PADDING, encoders, every_layout, make

import sten
from sten.layouts import CSR, NM, GroupedNM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Counter:
    """A backend that counts its compilations."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Products(nn.Module):
    """linear, x @ w, addmm and w @ x in one."""

    def __init__(self, layout):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.first.weight = nn.Parameter(make(layout, (8, 12))[0])
        self.second = nn.Parameter(make(layout, (8, 12), seed=1)[0])
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x):
        y = self.first(x).relu()
        y = torch.addmm(self.bias, y, self.second) + y @ self.second
        return (self.second @ y.t()).t()


class Images(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.conv.weight = nn.Parameter(make(layout, (6, 4, 3, 3))[0])
        self.same = nn.Conv2d(6, 6, (2, 1), padding="same", groups=2)
        self.same.weight = nn.Parameter(make(layout, (6, 3, 2, 1))[0])

    def forward(self, x):
        return self.same(self.conv(x).relu())


class Words(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.table = nn.Embedding(9, 8, padding_idx=0)
        self.table.weight = nn.Parameter(make(layout, (9, 8))[0])
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixer.in_proj_weight = nn.Parameter(make(layout, (24, 8))[0])
        self.mixer.out_proj.weight = nn.Parameter(make(layout, (8, 8))[0])

    def forward(self, index):
        x = self.table(index)
        return self.mixer(x, x, x, need_weights=False)[0]


def inputs_of(kind):
    if kind is Words:
        return [torch.randint(0, 9, (2, 5)) for _ in range(3)]
    return [torch.randn(2, 4, 7, 6) if kind is Images else torch.randn(5, 12) for _ in range(3)]


def train(model, run, inputs, optimizer):
    """Outputs, losses' gradients and parameters of a few steps."""
    seen = []
    for x in inputs:
        optimizer.zero_grad()
        out = run(x)
        out.square().mean().backward()
        seen.append(out.detach())
        seen += [p.grad for p in model.parameters()]
        optimizer.step()
    return [s.to_dense() if isinstance(s, sten.SparseTensor) else s for s in seen]


@pytest.mark.cell("compile", form="finalized")
@every_layout
@pytest.mark.parametrize("kind", [Products, Images, Words])
def test_training_steps(layout, kind, strictly):
    torch.manual_seed(1)
    model = kind(layout)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inputs, count = inputs_of(kind), Counter()
    want = train(model, model, inputs, torch.optim.SGD(model.parameters(), 1e-3))
    model.load_state_dict(state)
    run = torch.compile(model, fullgraph=True, backend=count)
    got = train(model, run, inputs, torch.optim.SGD(model.parameters(), 1e-3))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)
    assert count.graphs == 1
    for p in model.parameters():
        assert p.dim() == 1 or (isinstance(p.grad, sten.SparseTensor) and p.grad.same_pattern(p))
    with torch.no_grad():
        torch.testing.assert_close(run(inputs[0]), model(inputs[0]), atol=1e-5, rtol=1e-4)


def test_inductor():
    w = nn.Parameter(make(CSR(), (8, 12))[0])
    run, x = torch.compile(lambda x: F.linear(x, w).relu(), fullgraph=True), torch.randn(5, 12)
    want = F.linear(x, w).relu()
    (grad,) = torch.autograd.grad(want.sum(), w)
    got = run(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), w)[0].to_dense(), grad.to_dense())


@pytest.mark.cell("dynamic compile", form="finalized", layout="CSR")
def test_dynamic_shapes():
    model, count = Products(CSR()), Counter()
    run = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for tokens in (3, 5, 9):
        x = torch.randn(tokens, 12)
        torch.testing.assert_close(run(x), model(x))
    assert count.graphs == 1


def test_autocast():
    model = Products(NM(2, 4))
    run, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(x), model(x))


def test_pointwise_inside():
    w = nn.Parameter(make(NM(2, 4), (8, 12))[0])

    def penalty(x):
        return F.linear(x, w * 0.5).sum() + w.abs().sum() + (w**2).sum() + w.norm() + (w.to_dense() + 1).prod()

    x = torch.randn(3, 12)
    want = torch.autograd.grad(penalty(x), w)[0].to_dense()
    got = torch.autograd.grad(torch.compile(penalty, fullgraph=True, backend="aot_eager")(x), w)[0]
    torch.testing.assert_close(got.to_dense() * w.mask(), want * w.mask())


@pytest.mark.parametrize(
    "layout, batch_first, norm_first",
    [(CSR(), True, False), (CSR(), False, True), (NM(2, 4), True, True), (GroupedNM(2, 4, 1), False, False)],
    ids=str,
)
def test_encoder_in_eval(layout, batch_first, norm_first):
    """torch.compile calls torch's fused encoder layer without checking the types of the weights."""
    sparse, dense = encoders(layout, batch_first, norm_first, "gelu" if norm_first else "relu")
    sparse.eval(), dense.eval()
    x = torch.randn(3, 4, 8) if batch_first else torch.randn(4, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    keep = ~PADDING if batch_first else ~PADDING.t()
    with torch.no_grad(), warnings.catch_warnings(), sten.strict():
        warnings.simplefilter("ignore")
        for kwargs in (
            {},
            {"mask": causal},
            {"src_key_padding_mask": PADDING},
            {"mask": causal, "src_key_padding_mask": PADDING},
        ):
            torch._dynamo.reset()
            whole = "src_key_padding_mask" not in kwargs
            got = torch.compile(sparse, backend="aot_eager", fullgraph=whole)(x, **kwargs)
            want = dense(x, **kwargs)
            rows = ... if whole else keep
            torch.testing.assert_close(got[rows], want[rows], atol=1e-4, rtol=1e-4)
        layer, twin = sparse.layers[0], dense.layers[0]
        torch._dynamo.reset()
        got = torch.compile(layer, backend="aot_eager")(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(got[keep], twin(x, src_key_padding_mask=PADDING)[keep], atol=1e-4, rtol=1e-4)


def test_attention_in_eval():
    for batch_first in (False, True):
        mixer = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
        w, masked = make(NM(2, 4), (24, 8))
        x, padding = torch.randn(3, 3, 8), torch.tensor([[False, True, True], [False] * 3, [False, False, True]])
        for kwargs in ({}, {"key_padding_mask": padding}, {"need_weights": False}, {"average_attn_weights": False}):
            torch._dynamo.reset()
            mixer.in_proj_weight = nn.Parameter(masked)
            with torch.no_grad():
                want = mixer(x, x, x, **kwargs)
                mixer.in_proj_weight = nn.Parameter(w)
                got = torch.compile(mixer, backend="aot_eager", fullgraph=True)(x, x, x, **kwargs)
            for g, v in zip(got, want, strict=True):
                assert (g is None) == (v is None)
                if g is not None:
                    torch.testing.assert_close(g, v, atol=1e-5, rtol=1e-4)


@pytest.mark.cell("compile", form="dense weight")
@pytest.mark.parametrize("method", [sten.SRSTE(), sten.DecayingMask(20)], ids=lambda m: type(m).__name__)
@small_layout
def test_a_mask_inside_a_graph(layout, method):
    """Methods that choose the mask in the forward pass, also where a layout's choice takes data-dependent steps."""
    torch._dynamo.reset()
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(3):
            x = torch.randn(5, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
        models.append(model)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b)
