"""Sites: inputs, outputs and gradients that are sparse, against the same model written by hand in dense PyTorch."""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM

pytestmark = pytest.mark.usefixtures("one_thread")
TOP = sten.TopK(4)
EVERY = bool(os.environ.get("STEN_ALL"))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def top(x, k):
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.abs().topk(k).indices, True)


def by_hand(x, k, straight_through=False):
    return x + (x * top(x, k) - x).detach() if straight_through else x * top(x, k)


class Changed(torch.autograd.Function):
    """x, whose gradient keeps its k largest in each row."""

    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return by_hand(grad, ctx.k), None


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def expect_same(model, written, x, params):
    """Output, gradient of the input and of the parameters are those of a function written by hand."""
    y, grad, grads = run(model, x)
    want = x.clone().requires_grad_()
    z = written(want)
    z.square().sum().backward()
    dense = [g.to_dense() if isinstance(g, sten.SparseTensor) else g for g in (grad, *grads)]
    torch.testing.assert_close(y, z.detach())
    for a, b in zip(dense, [want.grad, *(p.grad for p in params)], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("layout", [None, Masked(), CSR(), FanIn()], ids=str)
@pytest.mark.parametrize("shape", [(5, 16), (3, 2, 16), (16,), (0, 16)], ids=str)
def test_inputs(layout, straight_through, shape):
    model, ref = sten.sparsify(mlp(), layout, sten.TopK(4, straight_through=straight_through), site="input"), mlp()

    def written(x):
        return ref[2](by_hand(ref[1](ref[0](by_hand(x, 4, straight_through))), 4, straight_through))

    expect_same(model, written, torch.randn(shape), [*ref.parameters()])


def test_n_of_m_of_the_features():
    model, ref = sten.sparsify(mlp(), NM(2, 4), sten.TopK(2, block=4), site="input"), mlp()

    def groups(x):
        return by_hand(x.unflatten(-1, (-1, 4)), 2).flatten(-2)

    expect_same(model, lambda x: ref[2](groups(ref[1](ref[0](groups(x))))), torch.randn(7, 16), [*ref.parameters()])


@pytest.mark.parametrize("layout", [None, CSR(), FanIn()], ids=str)
def test_outputs_and_a_sparse_input_after_a_sparse_output(layout):
    model, ref = sten.sparsify(mlp(), layout, sten.TopK(6), site="output", modules=nn.ReLU), mlp()
    seen = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    expect_same(model, lambda x: ref[2](by_hand(ref[1](ref[0](x)), 6)), torch.randn(5, 16), [*ref.parameters()])
    assert isinstance(seen[0], sten.SparseTensor) == (layout is not None)


@pytest.mark.parametrize("layout", [None, CSR(), FanIn()], ids=str)
@pytest.mark.parametrize("site", ["grad_input", "grad_output", "grad_weight"])
def test_gradients(site, layout):
    if site == "grad_weight" and layout is not None:
        pytest.skip("the gradient of a dense Parameter is dense")
    model, ref = sten.sparsify(mlp(), layout, sten.TopK(3), site=site), mlp()

    def written(x):
        for layer in ref:
            linear = isinstance(layer, nn.Linear)
            x = Changed.apply(x, 3) if linear and site == "grad_input" else x
            x = layer(x)
            x = Changed.apply(x, 3) if linear and site == "grad_output" else x
        return x

    if site == "grad_weight":
        for layer in (ref[0], ref[2]):
            layer.weight.register_hook(lambda grad: by_hand(grad, 3))
    expect_same(model, written, torch.randn(5, 16), [*ref.parameters()])


@pytest.mark.parametrize("layout", [None, CSR(), FanIn()], ids=str)
@pytest.mark.parametrize("form", ["finalized", "trainable", "dense weight"])
@pytest.mark.parametrize("first", ["weights", "sites"])
def test_sites_and_sparse_weights_on_one_module(form, layout, first):
    model, ref = mlp(), mlp()

    def weights():
        optimizer = torch.optim.SGD(model.parameters(), 0.1) if form != "finalized" else None
        method = sten.STE() if form == "dense weight" else sten.Magnitude()
        sten.sparsify(model, NM(2, 4), method, optimizer=optimizer)

    if first == "weights":
        weights()
    sten.sparsify(model, layout, TOP, site="input")
    sten.sparsify(model, site="grad_output", sparsifier=sten.TopK(3))
    if first == "sites":
        weights()
    with torch.no_grad():
        for layer in (ref[0], ref[2]):
            layer.weight.mul_(NM(2, 4).mask(layer.weight.abs()))
    x, want = torch.randn(5, 16).requires_grad_(), None
    y = model(x)
    y.square().sum().backward()
    want = x.detach().clone().requires_grad_()
    z = Changed.apply(ref[0](by_hand(want, 4)), 3)
    z = Changed.apply(ref[2](by_hand(ref[1](z), 4)), 3)
    z.square().sum().backward()
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(x.grad, want.grad)


def test_other_modules_and_arguments():
    """A module of any kind: its first floating-point tensor, also by keyword; the first of a tuple."""
    encoder = nn.MultiheadAttention(16, 2, batch_first=True)
    twin = copy.deepcopy(encoder)
    sten.sparsify(encoder, site="output", sparsifier=TOP, modules="")
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(encoder(x, x, x)[0], by_hand(twin(x, x, x)[0], 4))
    sten.sparsify(encoder, site="input", sparsifier=TOP, modules=encoder)
    wants = by_hand(twin(query=by_hand(x, 4), key=x, value=x)[0], 4)
    torch.testing.assert_close(encoder(query=x, key=x, value=x)[0], wants)


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers").pytorch_utils
    layer = utils.Conv1D(12, 16)
    x = torch.randn(2, 3, 16)
    for layout in (None, CSR(), FanIn()):
        sparse = sten.sparsify(copy.deepcopy(layer), layout, TOP, site="input")
        torch.testing.assert_close(sparse(x), layer(by_hand(x, 4)))


def test_the_summary_lists_sites_and_densify_takes_them_off():
    model, x = mlp(), torch.randn(5, 16)
    keys, before = list(model.state_dict()), model(x)
    sten.sparsify(model, FanIn(), TOP, site="input", modules="2")
    sten.sparsify(model, site="output", sparsifier=sten.JumpReLU(0.3, 0.5), modules=[nn.ReLU, "0"])
    sten.sparsify(model, site="grad_weight", sparsifier=TOP)
    text = str(sten.summary(model))
    assert "input of 2: TopK(k=4), FanIn()" in text and "grad_weight of 0: TopK(k=4), dense with zeros" in text
    assert len(sten.summary(model).sites) == 5
    assert "0.sparse_output_log_threshold" in model.state_dict()
    sten.sparsify(model, site="output", sparsifier=None, modules="0")
    assert "0.sparse_output_log_threshold" not in model.state_dict()
    sten.densify(model)
    assert sten.summary(model).sites == [] and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    model(x).sum().backward()
    assert bool((model[2].weight.grad != 0).sum() > 8 * 4)


def test_copies_keep_their_sites():
    model = sten.sparsify(mlp(), FanIn(), TOP, site="input")
    sten.sparsify(model, site="grad_weight", sparsifier=sten.TopK(2))
    x = torch.randn(5, 16)
    want = run(copy.deepcopy(model), x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sten.densify(model)
        for a, b in zip(run(twin, x)[2], want[2], strict=True):
            torch.testing.assert_close(a, b)
        assert all(int((p.grad != 0).sum(-1).max()) <= 2 for p in twin.parameters() if p.dim() == 2)


def test_a_gradient_site_follows_the_parameter():
    model = sten.sparsify(mlp(), site="grad_weight", sparsifier=sten.TopK(2))
    model.load_state_dict(mlp().state_dict(), assign=True)
    run(model, torch.randn(5, 16))
    assert int((model[0].weight.grad != 0).sum(-1).max()) == 2


def test_a_gradient_site_of_a_frozen_weight():
    """It acts when the weight trains again; copies in between are none the worse."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    sten.sparsify(model, site="grad_weight", sparsifier=sten.TopK(2))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        run(each, torch.randn(5, 16))
        each[0].weight.requires_grad_(True)
        run(each, torch.randn(5, 16))
        assert int((each[0].weight.grad != 0).sum(-1).max()) == 2
        sten.densify(each)


def test_modules_that_share_or_are_not_called():
    model = mlp()
    model.append(nn.Linear(8, 32)), model.append(nn.Linear(16, 32))
    model[4].weight = model[0].weight
    with pytest.raises(ValueError, match="of one module, got one that several share"):
        sten.sparsify(model, site="grad_weight", sparsifier=TOP)
    attention = nn.TransformerEncoderLayer(16, 2, 32)
    sten.sparsify(attention, site="input", sparsifier=TOP)
    assert [site.name for site in sten.summary(attention).sites] == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="whose forward is called"):
        sten.sparsify(attention, site="output", sparsifier=TOP, modules="*.out_proj")


def test_learned_thresholds_are_saved(tmp_path):
    def model():
        return sten.sparsify(mlp(), site="output", sparsifier=sten.JumpReLU(0.3, 0.5))

    a, b, x = model(), model(), torch.randn(5, 16)
    optimizer = torch.optim.SGD(a.parameters(), 0.1)
    run(a, x)
    optimizer.step()
    assert bool((a[0].sparse_output_log_threshold != b[0].sparse_output_log_threshold).any())
    sten.save(a, tmp_path / "model.safetensors")
    sten.load(b, tmp_path / "model.safetensors")
    torch.testing.assert_close(b(x), a(x), rtol=0, atol=0)


def test_calibrated_thresholds():
    """Each is the quantile of its own inputs; padding does not count."""
    torch.manual_seed(0)
    model, ref = mlp(), mlp()
    batches = [torch.randn(64, 16) * 3 for _ in range(2)]
    sten.sparsify(model, site="input", sparsifier=sten.Threshold(sparsity=0.7), calibration=batches)
    x = torch.cat(batches)
    for layer, seen in ((model[0], x), (model[2], ref[1](ref[0](x)))):
        dropped = (seen.abs() <= layer.sparse_input_threshold).float().mean()
        assert abs(float(dropped) - 0.7) < 0.01
    with pytest.warns(UserWarning, match="keeps all entries until"):
        other = sten.sparsify(mlp(), site="input", sparsifier=sten.Threshold(sparsity=0.7))
    torch.testing.assert_close(other(x), ref(x))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_autocast_checkpointing_and_inference():
    model, x = sten.sparsify(mlp(), FanIn(), TOP, site="input"), torch.randn(2, 3, 16)
    dense = sten.sparsify(mlp(), None, TOP, site="input")
    with torch.autocast("cpu", torch.bfloat16):
        y, z = model(x), dense(x)
    torch.testing.assert_close(y, z)
    (y.float().sum() + z.float().sum()).backward()
    torch.testing.assert_close(model[0].weight.grad, dense[0].weight.grad)
    want = run(dense, x)[1]
    x.requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, want)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize(
    ("site", "method", "layout"),
    [
        ("input", sten.TopK(4, straight_through=True), FanIn()),
        ("output", sten.JumpReLU(0.3, 0.5), None),
        ("grad_output", sten.MVUE24(dim=0), None),
        ("grad_weight", TOP, None),
        *([("output", sten.BatchTopK(3), CSR()), ("grad_input", TOP, CSR())] if EVERY else []),
    ],
    ids=str,
)
def test_compiled(site, method, layout):
    """One graph; there a tensor is dense with zeros, whatever its layout."""
    model = sten.sparsify(mlp(), layout, method, site=site)
    twin, x = copy.deepcopy(model), torch.randn(6, 16)
    torch.manual_seed(0)
    want = run(twin, x)
    torch.manual_seed(0)
    torch.compile(model, backend="aot_eager", fullgraph=True)
    a = x.clone().requires_grad_()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(a)
    y.square().sum().backward()
    torch.testing.assert_close(y, want[0])
    for p, grad in zip([a, *model.parameters()], [want[1], *want[2]], strict=True):
        grad = grad.to_dense() if isinstance(grad, sten.SparseTensor) else grad
        torch.testing.assert_close(p.grad.to_dense() if isinstance(p.grad, sten.SparseTensor) else p.grad, grad)


# what cannot be meant: one sentence, and nothing changed

REFUSED = {
    "an unknown site": ({"site": "inputs", "sparsifier": TOP}, "Expected site= to be one of 'weight', 'input'"),
    "a method for weights": ({"site": "input", "sparsifier": sten.Magnitude()}, "Magnitude.*, which is for weights"),
    "no method": ({"site": "input"}, "which is for weights"),
    "a class": ({"site": "input", "sparsifier": sten.TopK}, "Expected a method for activations"),
    "sparsity": ({"site": "input", "sparsifier": TOP, "sparsity": 0.5}, "Expected no sparsity= with site='input'"),
    "weights": ({"site": "input", "sparsifier": TOP, "weights": "0"}, "modules= chooses modules"),
    "optimizer": ({"site": "input", "sparsifier": TOP, "optimizer": []}, "make the optimizer afterwards"),
    "k beyond the width": ({"site": "input", "sparsifier": sten.TopK(17)}, "input of 0: Expected k of at most 16"),
    "blocks": ({"site": "output", "sparsifier": sten.TopK(1, block=3)}, "whole blocks of 3"),
    "a mask that a layout cannot hold": (
        {"site": "input", "sparsifier": sten.TopK(12), "layout": NM(2, 4)},
        "at most 2 of 4",
    ),
    "a shape that a layout cannot hold": (
        {"site": "input", "sparsifier": TOP, "layout": GroupedNM(2, 4, 4)},
        "input of 0: Expected",
    ),
    "a layout of grad_weight": ({"site": "grad_weight", "sparsifier": TOP, "layout": CSR()}, "Expected layout=None"),
    "layouts": ({"site": "input", "sparsifier": TOP, "layout": {"*": CSR()}}, "Expected one layout"),
    "state of a gradient": ({"site": "grad_output", "sparsifier": sten.JumpReLU()}, "Expected a method without state"),
    "no such module": ({"site": "input", "sparsifier": TOP, "modules": "fc"}, "Expected 'fc' to name a module"),
    "a function that chooses none": (
        {"site": "input", "sparsifier": TOP, "modules": lambda n, m: False},
        "chooses none",
    ),
    "a function of one": (
        {"site": "input", "sparsifier": TOP, "modules": lambda n: False},
        r"function of \(name, module\)",
    ),
    "no weight": (
        {"site": "grad_weight", "sparsifier": TOP, "modules": "1"},
        "Expected a module with a Parameter `weight`",
    ),
    "nothing to take off": ({"site": "output", "sparsifier": None}, "Expected a module with a method at its output"),
    "modules of weights": ({"sparsity": 0.5, "modules": "0"}, "Expected weights= for site='weight'"),
    "nothing to calibrate": (
        {"site": "input", "sparsifier": TOP, "calibration": [torch.ones(1, 16)]},
        "nothing to calibrate",
    ),
    "a second method": ({"site": "grad_input", "sparsifier": TOP}, "Expected one method on a site"),
    "weights under a gradient site": ({"layout": CSR(), "sparsity": 0.5}, "Expected a weight without a site"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case):
    model, (arguments, message) = mlp(), REFUSED[case]
    if case == "a second method":
        sten.sparsify(model, site="grad_input", sparsifier=TOP, modules="2")
    if case == "weights under a gradient site":
        sten.sparsify(model, site="grad_weight", sparsifier=TOP, modules="2")
    before = str(sten.summary(model)), list(model.state_dict()), len(model[0]._forward_pre_hooks)
    with pytest.raises((TypeError, ValueError), match=message) as error:
        sten.sparsify(model, **arguments)
    assert str(error.value).count(". ") == 0, "one sentence"
    assert before == (str(sten.summary(model)), list(model.state_dict()), len(model[0]._forward_pre_hooks))


def test_refused_at_the_call():
    model = sten.sparsify(nn.Sequential(nn.ReLU()), CSR(), TOP, site="output", modules="0")
    with pytest.raises(ValueError, match=r"output of 0: Expected a matrix \(tokens, features\) for CSR\(\)"):
        model(torch.randn(2, 3, 16))
    with pytest.raises(ValueError, match="output of 0: Expected k of at most 3"):
        model(torch.randn(2, 3))
    table = sten.sparsify(nn.Embedding(4, 8), site="input", sparsifier=TOP, modules="")
    with pytest.raises(TypeError, match="Expected a floating-point tensor among the arguments"):
        table(torch.tensor([1]))
    wrapped = torch.compile(mlp())
    with pytest.raises(TypeError, match=r"before torch\.compile"):
        sten.sparsify(wrapped, site="input", sparsifier=TOP)


@pytest.mark.parametrize("layout", [BSR((2, 4)), VectorNM(1, 4, 4), GroupedNM(2, 4, 4)], ids=str)
def test_layouts_of_groups_hold_the_activation_or_refuse(layout):
    """An odd number of tokens too."""
    try:
        model = sten.sparsify(mlp(), layout, TOP, site="input", modules="0")
    except ValueError as error:
        assert str(error).startswith("input of 0: Expected")
        return
    for rows in (1, 3, 8):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(model(x), mlp()(by_hand(x, 4)))


# the functional form


def test_sparse_op():
    a, b = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16)
    add = sten.sparse_op(torch.add, out=(TOP, FanIn()), grad=(sten.TopK(2), CSR()))
    y = add(a, b)
    assert y.sparse_layout == FanIn()
    weight = torch.randn(8, 16)
    F.linear(F.silu(y) * 2, weight).square().sum().backward()
    c = a.detach().clone().requires_grad_()
    F.linear(F.silu(by_hand(Changed.apply(c + b, 2), 4)) * 2, weight).square().sum().backward()
    torch.testing.assert_close(a.grad.to_dense(), c.grad)


def test_sparse_op_in_a_layer():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.act = sten.sparse_op(F.relu, out=sten.JumpReLU(0.3, 0.5), features=32)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    layer = Layer()
    assert layer.act.sparse_output_log_threshold.shape == (32,)
    layer(torch.randn(5, 16)).square().sum().backward()
    assert bool(layer.act.sparse_output_log_threshold.grad.any())
    assert "JumpReLU" in repr(layer)
    for wrong in ((CSR(), TOP), sten.Magnitude(), (TOP, CSR)):
        with pytest.raises(TypeError, match=r"Expected out=\(method, layout\)"):
            sten.sparse_op(torch.relu, out=wrong)
    with pytest.raises(ValueError, match="at most 8"):
        sten.sparse_op(torch.relu, out=sten.TopK(9), features=8)


POINTWISE = {
    "add": lambda x: x + x, "mul": lambda x: x * 2, "square": lambda x: x * x, "relu": F.relu, "gelu": F.gelu,
    "silu": F.silu, "dropout": lambda x: F.dropout(x, 0.5, training=False),
}  # fmt: skip
DENSE = {
    "softmax": lambda x: torch.softmax(x, -1), "sum": lambda x: x.sum(-1), "mean": lambda x: x.mean(0),
    "all": lambda x: x.sum(), "plus": lambda x: x + torch.ones(4, 8), "norm": lambda x: F.layer_norm(x, (8,)),
    "linear": lambda x: F.linear(F.relu(x) * 2, torch.ones(3, 8)), "matmul": lambda x: x @ torch.ones(8, 3),
    "gram": lambda x: x @ x.t(), "times": lambda x: x * torch.full((4, 8), 2.0),
    "left": lambda x: x.t() @ torch.ones(4, 2), "as weight": lambda x: F.linear(torch.ones(2, 8), x),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("layout", [CSR(), FanIn(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", [*POINTWISE, *DENSE])
def test_operators_on_an_activation(name, layout, straight_through):
    """Values and gradients, straight-through ones too; a pointwise operator with f(0) = 0 stays in the layout."""
    method, f = sten.TopK(2, block=4, straight_through=straight_through), {**POINTWISE, **DENSE}[name]
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    y = f(sten.sparse_op(torch.clone, out=(method, layout))(x))
    if name in POINTWISE:
        assert isinstance(y, sten.SparseTensor)
    want = f(sten.sparse_op(torch.clone, out=method)(z))
    torch.testing.assert_close(y.to_dense(), want)
    weight = torch.randn(want.shape)
    (y.to_dense() * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_which_of_a_sparse_input():
    x = sten.sparse_op(torch.clone, out=(TOP, Masked()))(torch.randn(5, 16))
    plan = sten.which("linear", x, torch.randn(8, 16))
    assert (plan.operator, plan.layouts, plan.device) == ("linear", ("Masked()",), "cpu") and plan.variant == "dense"

    class Held(Masked):
        pass

    @sten.kernel("linear", input=Held, device="cpu")
    def held_linear(input, weight, bias, *, layout, shape):
        """Multiplies by hand."""
        assert layout == (Held(), None) and shape == ((5, 16), (8, 16))
        return F.linear(layout[0].unpack(input, shape[0]), weight, bias) + 1

    x, w = sten.from_dense(torch.randn(5, 16), Held()), torch.randn(8, 16)
    torch.testing.assert_close(F.linear(x, w), F.linear(x.to_dense(), w) + 1)
    assert sten.which("linear", x, w).kernel == "held_linear"
