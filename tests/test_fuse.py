"""fuse: fused models compute what the densified ones do, also after anything that is done to them later."""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
from cases import SMALL, every_layout, random_sparse_case
from torch import nn

import sten
from sten.conversion.fused_forward import FusedForward, SharedForward

every = pytest.mark.parametrize("layout", SMALL, ids=str)


class Block(nn.Module):
    """q, k and v on one input, a gated MLP, and a plain one."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, size, bias=bias) for size in (16, 8, 8))
        self.o = nn.Linear(8, 16, bias=bias)
        self.gated, self.plain = Gated(bias), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x, mask=None):
        q = self.q(x).view(*x.shape[:-1], 2, 8)
        mixed = (q * self.k(x).unsqueeze(-2)).sum(-2) + self.v(x).relu()
        x = x + self.o(mixed if mask is None else mixed * mask)
        x = x + self.gated(x)
        return x + self.plain(x)


class Gated(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32, bias), nn.Linear(16, 32, bias), nn.Linear(32, 16, bias)
        self.act, self.scale = nn.SiLU(), 1.0

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


def sparse(model, layout, **keywords):
    torch.manual_seed(0)
    sten.sparsify(model, layout, sparsity=None if layout.rate is not None else 0.5, **keywords)
    return model.eval().requires_grad_(False)


def block(layout=None, bias=True):
    torch.manual_seed(0)
    return sparse(Block(bias).double(), sten.NM(2, 4) if layout is None else layout)


def inputs(*shape):
    return torch.randn(*shape, 16, dtype=torch.float64)


def dense(model):
    """The same model in dense weights, which runs its own forward."""
    return sten.densify(sten.unfuse(copy.deepcopy(model)))


def same(model, *arguments, **keywords):
    torch.testing.assert_close(model(*arguments, **keywords), dense(model)(*arguments, **keywords))


@every
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_dense(layout, bias):
    model = block(layout, bias)
    names = list(model.state_dict()), [(name, id(p)) for name, p in model.named_parameters()]
    report = sten.fuse(model)
    stacks = layout.stacks([16, 8, 8])
    assert report.fused["gated"] == "silu(gate) * up, then down" and report.fused["plain"] == "gelu(0)"
    assert report.fused.get("") == ("q and k and v on one input" if stacks else None)
    assert ("" in report.skipped) is not stacks
    assert names == (list(model.state_dict()), [(name, id(p)) for name, p in model.named_parameters()])
    for shape in ((3,), (2, 5), (1,), (), (0,)):
        same(model, inputs(*shape))
    same(model, inputs(2, 5), mask=torch.ones(8).double())
    assert isinstance(model.gated.forward, FusedForward)
    assert isinstance(vars(model.k).get("forward"), SharedForward) is stacks
    assert sten.unfuse(model) is model
    assert not any("forward" in vars(module) for module in model.modules())
    same(model, inputs(3))


@every
def test_gradients_are_the_modules_own(layout):
    model = block(layout)
    sten.fuse(model)
    x = inputs(3).requires_grad_()
    expected = dense(model)
    (got,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(expected(x).square().sum(), x)[0])
    model.requires_grad_(True)
    model(inputs(3)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "bert", "vit"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "vocab_size": 60}


@torch.no_grad()
@pytest.mark.parametrize("kind", FAMILIES)
def test_hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 60} if kind == "gpt2" else SIZES
    auto = transformers.AutoModel if kind in ("bert", "vit") else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse(model, sten.VectorNM(1, 4, 8) if kind in ("llama", "gpt2") else sten.NM(2, 4))
    expected, report = dense(model), sten.fuse(model)
    assert len(report.fused) == (2 if kind == "gpt2" else 4), report
    for tokens in (7, 1):
        x = {"input_ids": torch.randint(0, 60, (2, tokens))}
        x = {"pixel_values": torch.randn(1, 3, 224, 224)} if kind == "vit" else x
        torch.testing.assert_close(model(**x)[0], expected(**x)[0], rtol=1e-4, atol=1e-5)
    if kind == "llama":
        ids = torch.randint(0, 60, (2, 5))
        keywords = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **keywords), expected.generate(ids, **keywords))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_are_fused_and_independent(layout, copied):
    model = block(layout)
    sten.fuse(model)
    model(inputs(3))
    other = copied(model)
    assert isinstance(other.gated.forward, FusedForward) and other.gated.forward.module is other.gated
    x, before = inputs(3), model(inputs(3))
    other.load_state_dict(copy.deepcopy(block(layout)).state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    same(other, x)
    same(model, x)
    assert before.shape == model(x).shape
    sten.fuse(other)
    same(other, x)


def replace_layer(model):
    model.gated.up = nn.Linear(16, 32).double()


def replace_activation(model):
    model.gated.act, model.plain[1] = nn.Tanh(), nn.Tanh()


def replace_weight(model):
    model.gated.gate.weight = nn.Parameter(torch.randn(32, 16).double())
    model.k.weight = nn.Parameter(torch.randn(8, 16).double())


def write_weight(model):
    with torch.no_grad():
        for layer in (model.q, model.k, model.gated.up, model.plain[0]):
            layer.weight.mul_(3)
            layer.bias.add_(1)


def other_pattern(model):
    state = {
        name: sten.from_dense(torch.randn(p.shape).double(), sten.NM(2, 4))
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    model.load_state_dict(state, strict=False)


def other_layout(model):
    sten.sparsify(model, {"k": sten.NM(1, 4), "gated.up": sten.NM(1, 4)})


def no_layout(model):
    sten.densify(model)


def one_dense(model):
    sten.densify(model.gated.up)
    sten.densify(model.v)


def trainable(model):
    sten.trainable(model.requires_grad_(True))


def hook(model):
    for module in (model.gated.gate, model.gated.act, model.plain[1], model.k):
        module.register_forward_hook(lambda module, arguments, out: out + 1)


def forward_of_a_layer(model):
    model.gated.gate.forward = lambda x: x.new_ones(*x.shape[:-1], 32)
    model.k.forward = lambda x: x.new_ones(*x.shape[:-1], 8)


def fewer_layers(model):
    del model.plain[1]


def more_layers(model):
    model.plain.append(nn.Tanh())


def in_float(model):
    model.to(torch.float32).to(torch.float64)


CHANGES = [replace_layer, replace_activation, replace_weight, write_weight, other_pattern, other_layout, no_layout]
CHANGES += [one_dense, trainable, hook, forward_of_a_layer, fewer_layers, more_layers, in_float]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_counts(change):
    """The same change on a model that was never fused gives the same."""
    model, plain, x = block(), block(), inputs(4)
    sten.fuse(model)
    model(x)
    for each in (model, plain):
        torch.manual_seed(1)
        change(each)
    torch.testing.assert_close(model(x), plain(x))


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.act, self.drop = nn.Linear(16, 16), nn.ReLU(), nn.Dropout()

    def forward(self, x):
        x = self.act(self.one(x))
        return self.drop(x) if self.training else x


@torch.no_grad()
def test_training_mode_is_another_chain():
    model = sparse(WithDropout().double(), sten.NM(2, 4))
    assert sten.fuse(model).fused == {"": "relu(one)"}
    model.train()
    assert (model(torch.ones(200, 16).double()) == 0).double().mean() > 0.4
    with pytest.raises(ValueError, match=r"^Expected a model in eval mode to fuse, got one in training mode"):
        sten.fuse(model)


@torch.no_grad()
def test_autocast_torch_func_and_modes():
    model, x = block(), inputs(4)
    expected = dense(model)
    sten.fuse(model)
    torch.testing.assert_close(torch.func.vmap(model)(x), expected(x))
    model, expected, x = model.float(), expected.float(), x.float()
    sten.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), expected(x), rtol=5e-2, atol=5e-2)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for each in (model, sten.unfuse(copy.deepcopy(model))):
        with FlopCounterMode(display=False) as counter:
            each(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- linear layers on one input


@every_layout
@pytest.mark.parametrize("rows", [(64, 32), (16, 16, 8), (7, 9)])
def test_parts_of_stacked_weights(layout, rows):
    """The law of `Layout.stacks`."""
    weights = [random_sparse_case(layout, (count, 24), seed=count + i) for i, count in enumerate(rows)]
    if layout.stacks(rows):
        whole = layout.pack(torch.cat([dense for dense, *_ in weights]), torch.cat([mask for _, mask, _ in weights]))
        for name, part in whole.items():
            assert torch.equal(part, torch.cat([parts[name] for *_, parts in weights]))


@torch.no_grad()
def test_one_product_for_several_layers():
    """They lie together in memory, are computed at the first call, and hold nothing afterwards."""
    model, x = block(), inputs(4)
    sten.fuse(model)
    shared = model.q.forward.shared
    addresses = [layer.weight.parts["values"].data_ptr() for layer in (model.q, model.k, model.v)]
    sizes = [layer.weight.parts["values"].nbytes for layer in (model.q, model.k)]
    assert addresses == [addresses[0], addresses[0] + sizes[0], addresses[0] + sum(sizes)]
    values = [layer.weight.parts["values"] for layer in (model.q, model.v)]
    version = values[0]._version
    values[1].mul_(2)  # kernels cache what they derive from all of them by the version of the first
    assert values[0]._version > version
    model.q(x)
    assert shared.ready[0] is x
    torch.testing.assert_close(model.k(x), dense(model).k(x))
    model.v(x)
    assert shared.ready is None and shared.taken


@torch.no_grad()
def test_results_are_of_this_input_and_its_numbers():
    model, x = block(), inputs(4)
    expected = dense(model)
    sten.fuse(model)
    model.q(x)
    torch.testing.assert_close(model.k(x.clone() + 1), expected.k(x + 1))  # another tensor
    torch.testing.assert_close(model.k(x), expected.k(x))
    x.add_(1)  # the same one, written to since
    torch.testing.assert_close(model.v(x), expected.v(x))
    torch.testing.assert_close(model.q(x), expected.q(x))
    torch.testing.assert_close(model.q(x), expected.q(x))  # the last call never came: one by one from now on
    assert not model.q.forward.shared.taken and model.q.forward.shared.ready is None
    same(model, x)


def test_layers_in_other_layouts_or_dense_are_left():
    model = Block().double().eval().requires_grad_(False)
    sten.sparsify(model, {"q": sten.NM(2, 4), "k": sten.NM(1, 4), "v": sten.NM(2, 4), "gated.gate": sten.NM(2, 4)})
    report = sten.fuse(model)
    assert not report.fused and set(report.skipped) == {"", "gated"}
    assert report.skipped["gated"] == "of gate and up and down some are dense"
    assert "not fused" in str(report)
    same(model, inputs(3))


def test_a_model_in_training_is_named():
    model = Block().double()
    sten.sparsify(model, sten.NM(2, 4), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    report = sten.fuse(model.eval())
    assert not report.fused
    assert report.skipped["gated"] == "its weights are in training; call sten.finalize first"
    assert not sten.fuse(sten.finalize(model).eval()).skipped


# ---- compilers


@torch.no_grad()
@pytest.mark.parametrize("layout", SMALL if os.environ.get("STEN_ALL") else [sten.NM(2, 4)], ids=str)
def test_compiled_in_one_graph(layout):
    model = block(layout)
    expected = dense(model)
    sten.fuse(model)
    graphs = []

    def backend(graph, arguments):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return torch._dynamo.lookup_backend("aot_eager")(graph, arguments)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    x = inputs(4)
    torch.testing.assert_close(compiled(x), expected(x))
    count = len(graphs)
    for tokens in (4, 6):
        x = inputs(tokens)
        torch.testing.assert_close(compiled(x), expected(x))
    names = ["sten.sparse_gated_mlp.default", "sten.sparse_linear_activation.default"]
    assert set(names + (["sten.sparse_linears.default"] if layout.stacks([16, 8, 8]) else [])) <= graphs[-1]
    write_weight(model)
    torch.testing.assert_close(compiled(x), dense(model)(x))
    assert len(graphs) == count


@torch.no_grad()
def test_exported():
    model, x = block(), inputs(4)
    expected = dense(model)
    sten.fuse(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected(x))


def test_which():
    """Without a kernel for the whole, it says so; a call then runs one after another."""
    model = block()
    weights = [model.gated.gate.weight, model.gated.up.weight]
    plan = sten.which("gated_linear", (4, 16), weights, activation="silu")
    assert (plan.operator, plan.variant, plan.run) == ("gated_linear", "apart", None)
    assert str(plan).endswith("no kernel runs these products together: each by itself")
    with pytest.raises(TypeError, match=r"^Expected a list of 2 SparseTensors for gated_linear, got Tensor;"):
        sten.which("gated_linear", (4, 16), weights[0].to_dense(), activation="silu")
    with pytest.raises(ValueError, match=r"^Expected a first operand with 16 features"):
        sten.which("gated_linear", (4, 15), weights, activation="silu")
