"""Gradients: gradcheck of all orders, training of a hand-made Parameter, torch.func, autocast, attention."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from weights import LAYOUTS, PADDING, encoders, every_layout, make

import sten
from sten.layouts import CSR, NM, GroupedNM, Masked
from sten.tensor import project

SHAPES = [(6, 8), (7, 5)]
CONV = [
    ((4, 3, 2, 2), {"stride": 2, "padding": 1}),
    ((4, 3, 2, 3), {"padding": "same", "dilation": (1, 2)}),
    ((4, 2, 2, 1), {"groups": 2, "stride": (1, 2)}),
]


def check(f, *inputs):
    """gradcheck and gradgradcheck of f(weight, *inputs), weight a SparseTensor, with respect to its values too."""
    assert gradcheck(f, inputs, fast_mode=True) and gradgradcheck(f, inputs, fast_mode=True)


def through(w):
    """A function that makes the weight from a dense leaf, differentiably, as the trainable form and gradcheck need."""
    return lambda dense: project(dense, w)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@every_layout
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_activation_after_a_layer(layout, bias):
    """nn.ReLU(inplace=True) after a layer, as in every ResNet; the result of a rule must not be a view."""
    for make_layer, x in (
        (lambda: nn.Linear(8, 6, bias=bias), torch.randn(2, 3, 8)),
        (lambda: nn.Conv2d(5, 6, 1, bias=bias), torch.randn(2, 5, 4, 4)),
        (lambda: nn.Conv2d(5, 6, 3, bias=bias), torch.randn(2, 5, 4, 4)),
        (lambda: nn.Embedding(6, 8), torch.tensor([[1, 2], [5, 1]])),
    ):
        layer = make_layer()
        sten.sparsify(layer, layout, sparsity=None if layout.rate else 0.5, weights="weight")
        twin = sten.densify(copy.deepcopy(layer))
        for model in (sten.trainable(layer), twin):
            y = model(x)
            y.mul_(2).relu_()
            y.square().sum().backward()
        torch.testing.assert_close(layer(x), twin(x))


@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck_of_products(layout, shape, strictly):
    w, dense = make(layout, shape, torch.float64)
    sparse, dense = through(w), dense.requires_grad_()
    out, into = shape
    check(lambda x, d, b: F.linear(x, sparse(d), b), leaf(2, 3, into), dense, leaf(out))
    check(lambda x, d: F.linear(x, sparse(d).t()), leaf(3, out), dense)
    check(lambda x, d: x @ sparse(d), leaf(3, out), dense)
    check(lambda x, d: sparse(d) @ x, leaf(2, into, 3), dense)
    check(lambda x, d: sparse(d).mT @ x, leaf(out), dense)
    check(lambda b, x, d: torch.addmm(b, x, sparse(d), alpha=2), leaf(into), leaf(3, out), dense)


@every_layout
@pytest.mark.parametrize("shape, geometry", CONV, ids=str)
def test_gradcheck_of_convolutions(layout, shape, geometry, strictly):
    w, dense = make(layout, shape, torch.float64)
    sparse = through(w)
    channels = shape[1] * geometry.get("groups", 1)
    check(
        lambda x, d, b: F.conv2d(x, sparse(d), b, **geometry), leaf(2, channels, 4, 3), dense.requires_grad_(), leaf(4)
    )


@every_layout
def test_gradcheck_of_the_rest(layout, strictly):
    w, dense = make(layout, (7, 5), torch.float64)
    sparse, dense = through(w), dense.requires_grad_()
    index = torch.tensor([[0, 6], [3, 3]])
    check(lambda d: F.embedding(index, sparse(d)), dense)
    check(lambda d: sparse(d).to_dense(), dense)
    check(lambda d: (sparse(d) * 2).to_dense(), dense)
    check(lambda d, x: (sparse(d) * x).to_dense(), dense, leaf(7, 5))
    check(lambda d: sparse(d).sum(), dense)
    check(lambda d: (sparse(d) ** 2).sum(), dense)
    check(lambda d: sparse(d).norm(), dense)
    check(lambda d: sparse(d).exp(), dense)


@every_layout
def test_gradcheck_of_attention(layout, strictly):
    packed, dense = make(layout, (12, 4), torch.float64)
    last, dense_last = make(layout, (4, 4), torch.float64)
    packed, last = through(packed), through(last)

    def attention(q, k, d, o, b):
        args = (4, 2, packed(d), b, None, None, False, 0.0, packed_out(o), None)
        return F.multi_head_attention_forward(q, k, k, *args)[0]  # torch's fused attention has no second derivative

    packed_out = last
    check(attention, leaf(3, 1, 4), leaf(2, 1, 4), dense.requires_grad_(), dense_last.requires_grad_(), leaf(12))


@every_layout
def test_gradients_have_the_layout_and_the_pattern(layout):
    w = nn.Parameter(make(layout, (7, 5))[0])
    x = torch.randn(3, 5)
    F.linear(x, w).sum().backward()
    assert isinstance(w.grad, sten.SparseTensor) and w.grad.sparse_layout == layout and w.grad.same_pattern(w)
    first = w.grad.to_dense()
    torch.testing.assert_close(first, torch.ones(7, 3) @ x * w.mask())
    F.linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad.to_dense(), 2 * first)
    (w + 1).sum().backward()  # a dense gradient on top of a sparse one
    torch.testing.assert_close(w.grad.to_dense(), 2 * first + w.mask())
    (torch.ones(2, 7) @ w).sum().backward()
    w.sum().backward()
    (w.exp().sum() + F.linear(x, w).sum()).backward()
    assert w.grad.same_pattern(w)
    stale = [None]
    w.register_post_accumulate_grad_hook(lambda p: stale.__setitem__(0, p.grad))
    w.sum().backward()
    assert isinstance(stale[0], sten.SparseTensor)


@every_layout
def test_a_dense_factor_gets_a_dense_gradient(layout):
    w = nn.Parameter(make(layout, (7, 5))[0])
    for shape in ((7, 5), (7, 1), (5,)):
        scale = torch.randn(shape, requires_grad=True)
        (w * scale).to_dense().sum().backward()
        (scale * w).to_dense().sum().backward()
        twin = scale.detach().clone().requires_grad_()
        (w.detach().to_dense() * twin).sum().backward()
        assert type(scale.grad) is torch.Tensor
        torch.testing.assert_close(scale.grad, 2 * twin.grad)


# training a hand-made Parameter


def twins(layout, bias=True):
    """A model with sparse weights, and the masked dense one whose gradients are masked."""
    sparse = nn.Sequential(nn.Linear(12, 8, bias), nn.Tanh(), nn.Linear(8, 5, bias)).double()
    dense = copy.deepcopy(sparse)
    for i in (0, 2):
        w, masked = make(layout, tuple(sparse[i].weight.shape), torch.float64, seed=i)
        sparse[i].weight = nn.Parameter(w)
        dense[i].weight.data.copy_(masked)
        dense[i].weight.register_hook(w.mask().mul)
    return sparse, dense


OPTIMIZERS = {
    "sgd": lambda p, **k: torch.optim.SGD(p, 0.1, **k),
    "momentum": lambda p, **k: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, weight_decay=0.01, **k),
    "nesterov": lambda p, **k: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, **k),
    "adam": lambda p, **k: torch.optim.Adam(p, 0.01, weight_decay=0.01, **k),
    "amsgrad": lambda p, **k: torch.optim.Adam(p, 0.01, amsgrad=True, **k),
    "adamw": lambda p, **k: torch.optim.AdamW(p, 0.01, weight_decay=0.1, **k),
    "rmsprop": lambda p, **k: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, **k),
    "adagrad": lambda p, **k: torch.optim.Adagrad(p, 0.01, **k),
    "adadelta": lambda p, **k: torch.optim.Adadelta(p, 0.5, **k),
}


@every_layout
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_training_matches_the_masked_dense_model(layout, name, foreach, strictly):
    sparse, dense = twins(layout)
    runs = [(m, OPTIMIZERS[name](m.parameters(), foreach=foreach)) for m in (sparse, dense)]
    for step in range(4):
        x = torch.randn(6, 12, dtype=torch.float64)
        for model, optimizer in runs:
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            model(x).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
            optimizer.step()
        for mine, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
            got = mine.detach().to_dense() if isinstance(mine, sten.SparseTensor) else mine
            torch.testing.assert_close(got, theirs.detach(), atol=1e-9, rtol=1e-9)
    for i in (0, 2):
        w = sparse[i].weight
        assert isinstance(w, sten.SparseTensor)
        w.sparse_layout.validate(w.parts, w.stored_shape)
        for slot in runs[0][1].state[w].values():
            if isinstance(slot, torch.Tensor) and slot.dim():  # Adagrad fills its state, in full
                assert isinstance(slot, sten.SparseTensor) or name == "adagrad"
    saved = copy.deepcopy(runs[0][1].state_dict())
    runs[0][1].load_state_dict(saved)
    sparse(x).sum().backward()
    runs[0][1].step()


@pytest.mark.cell("GradScaler", form="finalized")
@pytest.mark.parametrize("layout", [CSR(), GroupedNM(1, 3, 2)], ids=str)
def test_grad_scaler(layout):
    sparse, dense = twins(layout)
    runs = []
    for model in (sparse, dense):
        model.float()
        runs.append((model, torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=16.0)))
    for step in range(3):
        x = torch.randn(6, 12)
        for model, optimizer, scaler in runs:
            optimizer.zero_grad()
            loss = model(x).square().mean() * (float("inf") if step == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert runs[0][2].get_scale() == runs[1][2].get_scale()
        torch.testing.assert_close(sparse[0].weight.detach().to_dense(), dense[0].weight.detach())
    assert runs[0][2].get_scale() == 8.0


def test_regularizers_and_averages():
    sparse, _ = twins(NM(2, 4))
    (sum(p.abs().sum() + p.pow(2).sum() + p.norm() for p in sparse.parameters())).backward()
    w = sparse[0].weight
    dense = w.detach().to_dense()
    torch.testing.assert_close(w.grad.to_dense(), dense.sign() + 2 * dense + dense / dense.norm())
    for average in (torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), torch.optim.swa_utils.get_swa_multi_avg_fn()):
        mean = torch.optim.swa_utils.AveragedModel(sparse, multi_avg_fn=average)
        for _ in range(3):
            mean.update_parameters(sparse)
        torch.testing.assert_close(mean.module[0].weight.detach().to_dense(), dense)
    mean = torch.optim.swa_utils.AveragedModel(sparse)
    mean.update_parameters(sparse)
    mean.update_parameters(sparse)
    assert isinstance(mean.module[0].weight, sten.SparseTensor)


# torch.func, autocast, modes


@pytest.mark.cell("vmap", form="finalized")
@pytest.mark.cell("func.grad", form="finalized")
@every_layout
def test_func(layout, strictly):
    w, dense = make(layout, (7, 5), torch.float64)
    conv, dense_conv = make(layout, (6, 4, 2, 2), torch.float64)
    x, image = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, 4, 4, dtype=torch.float64)
    index = torch.tensor([[0, 1], [2, 6]])
    for f, arg, pair in (
        (lambda x, w: F.linear(x, w).sin().sum(), x, (w, dense)),
        (lambda x, w: (x @ w.t()).sin().sum(), x, (w, dense)),
        (lambda x, w: (w @ x.t()).sin().sum(), x, (w, dense)),
        (lambda x, w: F.conv2d(x, w).sin().sum(), image, (conv, dense_conv)),
    ):
        for take in (
            torch.func.grad,
            torch.func.vmap,
            torch.func.jacrev,
            lambda g: torch.func.vmap(torch.func.grad(g)),
        ):
            got, want = (take(lambda x, v=v, f=f: f(x, v))(arg) for v in pair)
            torch.testing.assert_close(got, want)
        twice = (torch.func.jacrev(torch.func.jacrev(lambda x, v=v, f=f: f(x, v)))(arg[:1]) for v in pair)
        torch.testing.assert_close(*twice)
    got, want = (torch.func.vmap(lambda i, v=v: F.embedding(i, v))(index) for v in (w, dense))
    torch.testing.assert_close(got, want)


def test_vmap_over_the_weight_raises():
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.vmap(lambda x, b: F.linear(x, make(CSR(), (7, 5))[0], b))(torch.ones(3, 5), torch.ones(3, 7))


@every_layout
def test_functional_call(layout, strictly):
    w, dense = make(layout, (8, 12))
    model, x = nn.Linear(12, 8), torch.randn(3, 12)
    got = torch.func.functional_call(model, {"weight": w}, x)
    torch.testing.assert_close(got, F.linear(x, dense, model.bias))
    model.weight = nn.Parameter(w)
    params = {k: v.detach() for k, v in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, x).sum())({**params})
    # torch.func hides the class of what it differentiates: the gradient of a weight is that of its dense entries
    torch.testing.assert_close(grads["weight"].to_dense() * w.mask(), torch.ones(8, 3) @ x * w.mask())


@pytest.mark.cell("autocast", form="finalized")
@every_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(layout, dtype, strictly):
    model, image = nn.Linear(12, 8), torch.randn(2, 4, 5, 5)
    w, dense = make(layout, (8, 12))
    conv, dense_conv = make(layout, (6, 4, 3, 3))
    model.weight = nn.Parameter(w)
    x = torch.randn(3, 12, requires_grad=True)
    twin, dense = x.detach().clone().requires_grad_(), dense.requires_grad_()
    with torch.autocast("cpu", dtype):
        got, want = model(x), F.linear(twin, dense, model.bias)
        assert got.dtype == want.dtype == dtype
        assert F.conv2d(image, conv).dtype == dtype and (x @ w.t()).dtype == dtype
        torch.testing.assert_close(F.conv2d(image, conv), F.conv2d(image, dense_conv))
        assert F.linear(x.double(), model.weight.double(), model.bias.double()).dtype == torch.float64
    torch.testing.assert_close(got, want)
    got.float().sum().backward()
    want.float().sum().backward()
    assert model.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    torch.testing.assert_close(model.weight.grad.to_dense(), dense.grad * w.mask())
    torch.testing.assert_close(x.grad, twin.grad)


@every_layout
def test_inference_mode(layout):
    w, dense = make(layout, (8, 12))
    model = nn.Linear(12, 8)
    model.weight = nn.Parameter(w)
    x = torch.randn(3, 12)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), F.linear(x, dense, model.bias))
        torch.testing.assert_close(x @ model.weight.t(), x @ dense.t())
        assert torch.equal((model.weight + model.weight).to_dense(), 2 * dense)
        fresh = make(layout, (7, 5))[0]
        fresh.add_(1)
        fresh.sparse_layout.validate(fresh.parts, fresh.stored_shape)


@pytest.mark.cell("checkpointing", form="finalized", layout="CSR")
def test_checkpointing():
    sparse, dense = twins(CSR())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    for model in (sparse, dense):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(sparse[0].weight.grad.to_dense(), dense[0].weight.grad)


# attention


def attentions(layout, **kwargs):
    """nn.MultiheadAttention with sparse projections, and its masked dense twin."""
    sparse = nn.MultiheadAttention(8, 2, **kwargs)
    dense = copy.deepcopy(sparse)
    for name, p in list(sparse.named_parameters()):
        if p.dim() == 2:
            w, masked = make(layout, tuple(p.shape))
            owner, _, last = name.rpartition(".")
            setattr(sparse.get_submodule(owner), last, nn.Parameter(w))
            dense.get_parameter(name).data.copy_(masked)
    return sparse, dense


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@every_layout
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention(layout, batch_first, training, strictly):
    sparse, dense = attentions(layout, batch_first=batch_first)
    sparse.train(training), dense.train(training)
    q, k, v = (torch.randn(3, 3, 8) for _ in range(3))
    padding = torch.tensor([[False, False, True], [False, False, False], [False, True, True]])
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    heads = torch.randn(6, 3, 3)
    for kwargs in (
        {}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal == 0},
        {"attn_mask": heads}, {"attn_mask": causal, "key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal, "is_causal": True, "need_weights": False}, {"average_attn_weights": False},
    ):  # fmt: skip
        if isinstance(kwargs.get("attn_mask"), torch.Tensor) and kwargs["attn_mask"].dtype == torch.bool:
            kwargs["attn_mask"] = ~kwargs["attn_mask"]
        for inputs in ((q, q, q), (q, k, k), (q, k, v)):
            same(sparse(*inputs, **kwargs), dense(*inputs, **kwargs))
            with torch.no_grad():
                same(sparse(*inputs, **kwargs), dense(*inputs, **kwargs))
    same(sparse(q[0], k[0], v[0]), dense(q[0], k[0], v[0]))
    same(sparse(q[0], q[0], q[0], need_weights=False), dense(q[0], q[0], q[0], need_weights=False))


@pytest.mark.parametrize(
    "kwargs", [{"kdim": 6, "vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}], ids=str
)
def test_attention_variants(kwargs, strictly):
    sparse, dense = attentions(CSR(), **kwargs)
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 2, kwargs.get("kdim", 8)), torch.randn(4, 2, kwargs.get("vdim", 8))
    padding = torch.tensor([[False, False, True, True], [False] * 4])
    for extra in ({}, {"need_weights": False}, {"key_padding_mask": padding}, {"attn_mask": torch.randn(3, 4)}):
        same(sparse(q, k, v, **extra), dense(q, k, v, **extra))


def test_attention_dropout_and_gradients():
    sparse, dense = attentions(NM(2, 4), dropout=0.5)
    q = torch.randn(3, 2, 8)
    for need in (True, False):
        torch.manual_seed(1)
        got = sparse(q, q, q, need_weights=need)
        torch.manual_seed(1)
        same(got, dense(q, q, q, need_weights=need))
        got[0].sum().backward()
        dense(q, q, q, need_weights=need)
    assert sparse.in_proj_weight.grad.same_pattern(sparse.in_proj_weight)


@every_layout
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(layout, batch_first, norm_first, strictly):
    sparse, dense = encoders(layout, batch_first, norm_first, "gelu" if norm_first else "relu")
    x = torch.randn(3, 4, 8) if batch_first else torch.randn(4, 3, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    keep = ~PADDING if batch_first else ~PADDING.t()
    for train in (True, False):
        sparse.train(train), dense.train(train)
        for grad in (True, False):
            for kwargs in (
                {},
                {"mask": causal},
                {"mask": causal, "is_causal": True},
                {"src_key_padding_mask": PADDING},
            ):
                with torch.set_grad_enabled(grad):
                    got, want = sparse(x, **kwargs), dense(x, **kwargs)
                rows = keep if "src_key_padding_mask" in kwargs else ...
                torch.testing.assert_close(got[rows], want[rows], atol=1e-4, rtol=1e-4)


def test_every_layout_is_here():
    assert {type(layout) for layout in LAYOUTS} == {
        sten.Masked,
        sten.CSR,
        sten.BSR,
        sten.NM,
        sten.VectorNM,
        sten.GroupedNM,
        sten.FanIn,
    }
    assert Masked() in LAYOUTS


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_one_bias_for_all_outputs(shape):
    """torch repeats it, and sums its gradient."""
    sparse = sten.from_dense(torch.randn(8, 16), sten.CSR()).requires_grad_()
    x, bias = torch.randn(3, 16), torch.randn(shape, requires_grad=True)
    got = torch.autograd.grad(F.linear(x, sparse, bias).square().sum(), bias)
    expected = torch.autograd.grad(F.linear(x, sparse.detach().to_dense(), bias).square().sum(), bias)
    torch.testing.assert_close(got, expected)
