"""Products in one launch or few on the GPU's kernels: by the operators, in Triton's interpreter on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import ACTIVATIONS, DEVICE, close, random

import sten
from sten import dispatch
from sten.backends import cuda, cuda_fused
from sten.conversion.fuse import _lay_together
from sten.ops import fused

I, H, O = 32, 48, 16
LAYOUTS = [sten.CSR(), sten.BSR((8, 8)), sten.NM(2, 4), sten.VectorNM(1, 4, 16), sten.GroupedNM(2, 4, 1)]
every = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The kernels of CUDA, registered for the device of the tests."""
    for key, entry in list(dispatch.KERNELS.items()):
        if key[1] == "cuda":
            monkeypatch.setitem(dispatch.KERNELS, (key[0], DEVICE, *key[2:]), entry)


def weight(layout, rows, columns, seed=0, dtype=torch.float32):
    dense = random(rows, columns, seed=seed, dtype=dtype)
    mask = layout.mask(dense.abs().float(), None if layout.rate is not None else 0.5)
    return sten.from_dense(dense, layout, mask)


def plan_of(name, w):
    plans = [plan for plan in w.cache.plans.values() if plan.operator == name]
    assert len(plans) == 1
    return plans[0]


@every
@torch.no_grad()
@pytest.mark.parametrize(("tokens", "activation"), [(1, "gelu"), (5, "relu"), (70, "gelu")])
def test_activation(layout, tokens, activation):
    w, bias, x = weight(layout, H, I), random(H, seed=5), random(tokens, I, seed=9)
    for _ in range(2):
        got = fused.linear_activation(x, w, bias, activation, False)
        close(got, ACTIVATIONS[activation](F.linear(x, w.to_dense(), bias)))
    assert plan_of("linear_activation", w).kernel == "prepare_activation"


@every
@torch.no_grad()
@pytest.mark.parametrize(("tokens", "biased"), [(1, True), (5, False), (70, True)])
def test_gated(layout, tokens, biased):
    gate, up = weight(layout, H, I), weight(layout, H, I, seed=1)
    b, c = (random(H, seed=3), random(H, seed=4)) if biased else (None, None)
    for seed in range(2):
        x = random(2, tokens, I, seed=seed) if tokens > 1 else random(1, I, seed=seed)
        expected = F.silu(F.linear(x, gate.to_dense(), b)) * F.linear(x, up.to_dense(), c)
        close(fused.gated_linear(x, gate, b, up, c, "silu", False), expected)
    assert plan_of("gated_linear", gate).kernel == "prepare_gated"


@every
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 70, 129])
def test_gated_mlp(layout, tokens):
    if tokens == 129 and not isinstance(layout, sten.VectorNM):
        pytest.skip("only VectorNM has a chain")
    gate, up, down = weight(layout, H, I), weight(layout, H, I, seed=1), weight(layout, O, H, seed=2)
    bias = random(O, seed=3)
    for seed in range(2):
        x = random(tokens, I, seed=seed)
        middle = F.silu(F.linear(x, gate.to_dense())) * F.linear(x, up.to_dense())
        expected = F.linear(middle, down.to_dense(), bias)
        close(fused.gated_mlp(x, gate, None, up, None, down, bias, "silu", False), expected)
    if isinstance(layout, sten.VectorNM):
        assert plan_of("gated_mlp", gate).variant == ("chain" if tokens > 64 else "two products")


@pytest.mark.parametrize("layout", [sten.NM(2, 4), sten.VectorNM(1, 4, 16)], ids=str)
@torch.no_grad()
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rows", [(32, 16), (16, 16, 8)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_linears(layout, tokens, rows, together):
    weights = [weight(layout, count, I, seed=seed) for seed, count in enumerate(rows)]
    biases = [None, *(random(count, seed=count) for count in rows[1:])]
    dense = [w.to_dense() for w in weights]
    if together and layout.stacks(rows):
        _lay_together(weights)
    for seed in range(2):
        x = random(tokens, I, seed=seed)
        for y, w, bias in zip(fused.linears(x, weights, biases, False), dense, biases, strict=True):
            close(y, F.linear(x, w, bias))
    if layout.stacks(rows):
        assert plan_of("linears", weights[0]).kernel == "prepare_several"


@torch.no_grad()
def test_weights_that_move_apart_are_multiplied_one_by_one():
    """The plan is the same, and it asks the addresses at each call."""
    weights = [weight(sten.NM(2, 4), 16, I, seed=seed) for seed in range(2)]
    _lay_together(weights)
    x = random(5, I)
    before = fused.linears(x, weights, [None, None], False)
    weights[1].parts["values"] = weights[1].parts["values"].clone().mul_(2)
    after = fused.linears(x, weights, [None, None], False)
    assert len(weights[0].cache.plans) == 1
    close(after[0], before[0])
    close(after[1], 2 * before[1])


@torch.no_grad()
def test_a_write_to_one_of_them_counts():
    """Also where the library multiplies its own form of all of them (2:4 on a GPU), which is cached."""
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(3)).to(DEVICE, dtype)
    sten.sparsify(model, sten.NM(2, 4))
    weights = [layer.weight for layer in model.layers]
    _lay_together(weights)
    x = random(128, 64, dtype=dtype)
    for number in (0, 2, 1):
        for y, w in zip(fused.linears(x, weights, [None] * 3, False), weights, strict=True):
            close(y, F.linear(x, w.to_dense()), dtype)
        weights[number].mul_(2)


@torch.no_grad()
def test_transposed_weights():
    """Those of Hugging Face's Conv1D: y = x @ W, stored as the transpose."""
    w, x = weight(sten.VectorNM(1, 4, 8), H, I), random(5, I)
    close(fused.linear_activation(x, w.t(), None, "relu", True), F.relu(F.linear(x, w.to_dense())))
    square = weight(sten.NM(2, 4), I, I)
    for transposed in (False, True):  # the product that is asked for, whatever way the weight is stored
        expected = x @ square.to_dense().t() if not transposed else x @ square.to_dense()
        close(fused.linear_activation(x, square, None, "relu", transposed), F.relu(expected))


def test_every_layout_with_a_linear_kernel_has_the_others():
    for layout in cuda.TABLE:
        assert ("linear_activation", "cuda", layout) in dispatch.KERNELS
        assert ("gated_linear", "cuda", layout, layout) in dispatch.KERNELS
    assert set(cuda_fused.STACKED) <= set(cuda.TABLE)


def fused_calls(layout):
    """{operator: (a function of x, the same in dense products)}."""
    gate, up, down = weight(layout, H, I), weight(layout, H, I, seed=1), weight(layout, O, H, seed=2)
    last = weight(layout, H, O, seed=3)
    dense = [w.to_dense() for w in (gate, up, down, last)]

    def pair(x):
        return F.silu(F.linear(x, dense[0])) * F.linear(x, dense[1])

    return {
        "gated": (
            lambda x: fused.linear_activation(
                fused.gated_mlp(x, gate, None, up, None, down, None, "silu", False), last, None, "relu", False
            ),
            lambda x: F.relu(F.linear(F.linear(pair(x), dense[2]), dense[3])),
        ),
        "linears": (
            lambda x: torch.cat(fused.linears(x, [gate, up], [None, None], False), -1),
            lambda x: torch.cat([F.linear(x, dense[0]), F.linear(x, dense[1])], -1),
        ),
    }


@every
@torch.no_grad()
@pytest.mark.parametrize("name", ["gated", "linears"])
def test_traced_with_symbolic_sizes(layout, name):
    """A compiler sees the operators of the kernels, for any number of tokens."""
    call, expected = fused_calls(layout)[name]
    graph = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(random(5, I))
    targets = {str(node.target) for node in graph.graph.nodes}
    assert any(target.startswith("sten.gpu_") for target in targets), targets
    for tokens in (5, 9, 1):
        x = random(tokens, I, seed=tokens)
        close(graph(x), expected(x))


class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(*size, bias=False) for size in ((I, H), (I, H), (H, O)))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [2, 70])
def test_a_fused_model_runs_them(tokens):
    torch.manual_seed(0)
    model = torch.nn.Sequential(MLP(), torch.nn.Linear(O, H), torch.nn.ReLU()).to(DEVICE).eval().requires_grad_(False)
    sten.sparsify(model, {"0": sten.VectorNM(1, 4, 16), "1": sten.NM(2, 4)})
    x = random(tokens, I)
    expected = model(x)
    assert sten.fuse(model).fused == {"": "relu(1)", "0": "silu(gate) * up, then down"}
    for _ in range(2):
        close(model(x), expected)
    assert {plan.operator for plan in model[0].gate.weight.cache.plans.values()} == {"linear", "gated_mlp"}
    plan = sten.which("gated_mlp", x, [getattr(model[0], n).weight for n in ("gate", "up", "down")], activation="silu")
    assert plan in model[0].gate.weight.cache.plans.values() and "gate and up in one launch" in str(plan)
    assert {plan.operator for plan in model[1].weight.cache.plans.values()} == {"linear", "linear_activation"}
