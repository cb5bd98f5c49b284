"""The first lines that a user types: which weights they choose, and what the report says."""

from __future__ import annotations

import copy

import pytest
import torch
from masked import expect_close, masked_twin, sparse_weights, state
from small import mlp, train
from torch import nn

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked


def why(table) -> dict[str, str]:
    return {row.name: row.why for row in table.rows if row.why}


def chosen(model: nn.Module, *args, **kwargs) -> list[str]:
    return sorted(sparse_weights(sten.sparsify(model, *args, **kwargs)))


# layout= and sparsity=


def test_sparsity_alone_means_csr():
    model = mlp()
    want = {name: w.detach().abs() for name, w in model.named_parameters() if w.dim() == 2}
    sten.sparsify(model, sparsity=0.9)
    for name, w in sparse_weights(model).items():
        kept = torch.zeros(w.numel(), dtype=torch.bool)
        kept[want[name].flatten().topk(round(0.1 * w.numel())).indices] = True
        assert w.sparse_layout == CSR() and torch.equal(w.mask(), kept.view(w.shape))
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, 3:] = 0
    assert sten.sparsify(model, sparsifier=None)[0].weight.density == 3 / 12  # nothing to ask for
    trained = mlp()
    optimizer = torch.optim.AdamW(trained.parameters())
    sten.sparsify(trained, sparsifier=sten.RigL(40, every=4), sparsity=0.5, optimizer=optimizer)
    train(trained, optimizer, range(5))
    assert sten.finalize(trained)[0].weight.sparse_layout == CSR()


@pytest.mark.parametrize("call", [sten.sparsify, sten.plan])
def test_without_both_it_asks(call):
    with pytest.raises(ValueError, match=r"^Expected sparsity= or layout=, got neither; .*sparsity=0\.9.*NM\(2, 4\)"):
        call(mlp())


# what a dictionary of layouts names


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)])
        self.mid = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 4)


CONVS = ["layers.0.weight", "layers.1.weight", "stem.weight"]
NAMED = {
    "a type": ({nn.Conv2d: CSR()}, CONVS),
    "a type, and a module's name that stays dense": ({nn.Conv2d: CSR(), "fc": None}, CONVS),
    "a glob of modules": ({"layers.*": CSR()}, CONVS[:2]),
    "a glob that matches modules only": ({"lay*s": CSR()}, CONVS[:2]),
    "a container's name": ({"layers": CSR()}, CONVS[:2]),
    "a type that contains": ({nn.ModuleList: CSR()}, CONVS[:2]),
    "a parameter's name": ({"stem.weight": CSR()}, ["stem.weight"]),
    "a module's name": ({"fc": CSR()}, ["fc.weight"]),
    "a regular expression": ({r"re:layers\.\d\.weight": CSR()}, CONVS[:2]),
    "first match wins": ({"layers.0": None, nn.Conv2d: CSR()}, ["layers.1.weight", "stem.weight"]),
    "star: what is chosen by default": ({"fc": None, "*": CSR()}, ["mid.0.weight", "mid.1.weight"]),
    "star and more": ({"mid": None, "stem": CSR(), "*": NM(2, 4)}, ["fc.weight", "stem.weight"]),
}


@pytest.mark.parametrize("layout, names", NAMED.values(), ids=NAMED)
def test_a_dictionary_of_layouts_chooses_what_it_names(layout, names):
    assert chosen(Net(), layout, sparsity=0.8) == sorted(names)


def test_modules_themselves():
    model = Net()
    assert chosen(model, {model.layers: CSR(), model.fc: None}, sparsity=0.8) == CONVS[:2]
    model = Net()
    assert chosen(model, CSR(), sparsity=0.8, weights=model.mid) == ["mid.0.weight", "mid.1.weight"]


def test_weights_takes_the_same_patterns():
    for weights, names in {
        nn.Conv2d: CONVS,
        "layers": CONVS[:2],
        "fc": ["fc.weight"],
        (nn.Conv2d, "fc"): ["fc.weight", *CONVS],
    }.items():
        assert chosen(Net(), CSR(), sparsity=0.8, weights=weights) == sorted(names)
    assert chosen(Net(), CSR(), sparsity=0.8, weights=iter(["fc", nn.Conv2d])) == ["fc.weight", *CONVS]


def test_a_regular_expression_is_over_names_of_weights_alone():
    """ "All but the attention" must not match a module around the attention."""
    assert chosen(Net(), CSR(), sparsity=0.8, weights=r"re:(?!.*\.0).*") == [
        "fc.weight", "layers.1.weight", "mid.1.weight", "stem.weight",
    ]  # fmt: skip


def test_what_is_named_and_cannot_be_is_refused_unless_it_stays_dense():
    def model():
        return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))

    for pattern in ("0", "0.weight"):
        with pytest.raises(ValueError, match=r"0\.weight cannot be made sparse: it is parametrized"):
            sten.sparsify(model(), {pattern: CSR(), "*": CSR()}, sparsity=0.5)
        assert chosen(model(), {pattern: None, "*": CSR()}, sparsity=0.5) == ["1.weight"]


# the output layer of a language model, and adapters


def llama(tied: bool = False):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


class Gpt(nn.Module):
    def __init__(self, head: int = 50) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 8), nn.Embedding(32, 8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)  # `up` has the shape of `places`, and is not last
        self.head = nn.Linear(8, head, bias=False)


def test_the_output_layer_stays_dense_by_default():
    model = llama()
    table = sten.summary(sten.sparsify(model, sparsity=0.9))
    assert why(table)["lm_head.weight"] == (
        "it is the output layer (get_output_embeddings): name it in weights= to choose it"
    )
    assert "lm_head.weight" not in sparse_weights(model) and len(sparse_weights(model)) == 7
    wrapped = nn.ModuleDict({"student": llama()})
    assert "student.lm_head.weight" in why(sten.plan(wrapped, {"*": CSR()}, sparsity=0.9))
    assert "output layer" in why(sten.plan(Gpt(), sparsity=0.9))["head.weight"]
    assert chosen(Gpt(), sparsity=0.9) == ["down.weight", "up.weight"]
    assert chosen(Gpt(head=3), sparsity=0.5) == ["down.weight", "head.weight", "up.weight"]  # a classifier


@pytest.mark.parametrize("how", [{"weights": "*"}, {"weights": "lm_head"}, {"layout": {"lm_head": CSR()}}], ids=str)
def test_the_output_layer_is_chosen_where_it_is_named(how):
    assert "lm_head.weight" in chosen(llama(), **how, sparsity=0.9)


def test_a_tied_output_layer_follows_its_embedding():
    reasons = why(sten.summary(sten.sparsify(llama(tied=True), sparsity=0.9)))
    assert "tied to" in reasons["model.embed_tokens.weight"] and "tied to" in reasons["lm_head.weight"]
    both = sten.sparsify(llama(tied=True), {"model.embed_tokens": CSR(), "*": CSR()}, sparsity=0.9)
    assert both.lm_head.weight is both.model.embed_tokens.weight and "model.embed_tokens.weight" in sparse_weights(both)


class Lora(nn.Module):
    """A tuner layer as peft builds it."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A")

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.lora_embedding_A = nn.ParameterDict()

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Tune(nn.Linear):
    """One that has the weight itself."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def test_adapters_are_not_chosen_by_default():
    dense = nn.Sequential(Lora(nn.Linear(8, 8)), nn.ReLU(), Lora(nn.Linear(8, 4)))
    for part in (p for layer in (dense[0], dense[2]) for p in layer.base_layer.parameters()):
        part.requires_grad_(False)
    model = sten.sparsify(copy.deepcopy(dense), sparsity=0.5)
    assert sorted(sparse_weights(model)) == ["0.base_layer.weight", "2.base_layer.weight"]
    assert "low-rank adapter" in why(sten.summary(model))["0.lora_A.default.weight"]
    twin, x = masked_twin(dense, model), torch.randn(5, 8)
    for one in (model, twin):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 0.1)
        one(x).square().mean().backward()
        optimizer.step()
    expect_close(state(model), state(twin))
    assert "0.lora_A.default.weight" in chosen(copy.deepcopy(dense), sparsity=0.5, weights="*lora_A*")
    assert chosen(nn.Sequential(Tune()), sparsity=0.5) == ["0.weight"]


# an allocation's nearly dense weights


def wide_and_narrow() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10), nn.ReLU(), nn.Linear(10, 8))


@pytest.mark.parametrize("spread", [sten.ERK(0.9), sten.ERK(0.95), sten.Global(0.9)], ids=str)
def test_a_weight_that_would_cost_more_than_dense_stays_dense(spread):
    dense = wide_and_narrow()
    with torch.no_grad():
        dense[4].weight.mul_(30)  # so that Global keeps it
    model, plan = copy.deepcopy(dense), sten.plan(dense, CSR(), sparsity=spread)
    sten.sparsify(model, CSR(), sparsity=spread)
    table = sten.summary(model)
    assert plan.rows[-1].why == table.rows[-1].why and plan.chosen() == table.chosen()
    assert {row.name: row for row in plan.rows} == {row.name: row for row in table.rows}
    assert all(row.stored_bytes <= row.dense_bytes for row in table.rows)
    reason = why(table)["4.weight"]
    assert str(spread)[:3] in reason and "needs more bytes than dense" in reason and "CSR()" in reason
    assert torch.equal(model[4].weight, dense[4].weight) and type(model[4].weight) is nn.Parameter
    if isinstance(spread, sten.ERK):
        total = sum(layer.weight.numel() for layer in dense if isinstance(layer, nn.Linear))
        active = sum(int(row.density * row.shape[0] * row.shape[1] + 0.5) for row in table.rows)
        assert active == round((1 - spread.sparsity) * total)


@pytest.mark.parametrize("layout", [FanIn(), BSR((2, 2)), BSR((8, 8))], ids=str)
def test_bytes_decide_in_every_layout_that_saves_some(layout):
    """A full weight never pays for its pattern."""
    table = sten.summary(sten.sparsify(wide_and_narrow(), layout, sparsity=sten.ERK(0.9)))
    assert [row.layout for row in table.rows] == [str(layout), "dense", "dense"]
    assert all(row.stored_bytes <= row.dense_bytes for row in table.rows)
    assert f"for which {layout} needs more bytes" in table.rows[-1].why


def test_where_bytes_do_not_decide():
    """Masked saves nothing anywhere, Uniform is the user's own number, and a budget is never taken from all others."""
    model = wide_and_narrow()
    assert len(sparse_weights(sten.sparsify(copy.deepcopy(model), CSR(), sparsity=0.3))) == 3
    masked = sten.sparsify(copy.deepcopy(model), Masked(), sparsity=sten.ERK(0.8))
    assert "0.weight" in sparse_weights(masked) and masked[0].weight.density < 0.5
    half = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 56))
    assert len(chosen(half, CSR(), sparsity=sten.ERK(0.4))) == 2


def test_nearly_dense_weights_train_dense():
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sten.sparsify(model, CSR(), sten.RigL(20, every=2), sparsity=sten.ERK(0.9), optimizer=optimizer)
    before = model[4].weight.detach().clone()
    train(model, optimizer, range(6))
    assert "4.weight" not in sparse_weights(model) and not torch.equal(model[4].weight, before)
    total = sum(model[i].weight.numel() for i in (0, 2, 4))
    active = sum(round(w.density * w.numel()) for w in sparse_weights(sten.finalize(model)).values())
    dense = sum(row.shape[0] * row.shape[1] for row in sten.summary(model).rows if row.layout == "dense")
    assert active + dense == round(0.1 * total)


# reports


def test_how_many_parameters_were_chosen():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 2, 1))
    line = "sparse: 1 of 2 weights, with 64 of 106 parameters (60%)"
    plan = sten.plan(model, sparsity=0.5)
    optimizer = sten.optim.AdamS(model.parameters())
    assert plan.chosen() == line and str(plan).splitlines()[-1] == plan.plain().splitlines()[-1] == line
    sten.sparsify(model, NM(2, 4), sten.CAST(10), optimizer=optimizer)  # its scales are no parameters of the model
    for form in (model, sten.finalize(model), sten.trainable(model)):
        assert sten.summary(form).chosen() == line


def test_present_values_after_fine_tuning():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sten.sparsify(model, BSR((4, 4)), sparsity=0.5, optimizer=optimizer)
    energy = [row.energy for row in sten.summary(model).rows]
    train(model, optimizer, range(5))
    table = sten.summary(model)
    assert [row.energy for row in table.rows] == energy and "energy kept (at sparsify)" in table.plain()
    assert "energy kept (at sparsify)" in str(table) and "(at sparsify)" not in sten.plan(mlp(), NM(2, 4)).plain()
    sten.sparsify(model, CSR(), sparsity=0.9, optimizer=optimizer)
    rows = sten.summary(model).rows
    assert [row.layout for row in rows] == ["CSR()"] * 2 and [row.density for row in rows] == [0.1, 0.1]
    assert all(row.energy < 0.9 and row.energy not in energy for row in rows)
