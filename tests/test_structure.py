"""What is found of a model's structure: chains of submodules, linear layers on one input, blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sten.conversion.structure import (
    Activated,
    Call,
    Gated,
    NoChainError,
    activation_of,
    blocks,
    chain_of,
    shared_inputs,
)

transformers = pytest.importorskip("transformers")


def linear(*sizes):
    return nn.Linear(*sizes)


class GatedMLP(nn.Module):
    """Of names and orders that no library uses."""

    def __init__(self, activation=F.silu, swapped=False):
        super().__init__()
        self.one, self.two, self.three = linear(8, 12), linear(8, 12), linear(12, 8)
        self.activation, self.swapped = activation, swapped

    def forward(self, x):
        a, b = self.activation(self.one(x)), self.two(x)
        return self.three(b * a if self.swapped else torch.mul(a, b))


class Attention(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self, change=False):
        super().__init__()
        self.c, self.a, self.b, self.out = (linear(8, 8) for _ in range(4))
        self.norm, self.change = nn.LayerNorm(8), change

    def forward(self, x, other, mask=None):
        shape = (*x.shape[:-1], -1, 4)
        a = self.norm(self.a(x)).view(shape)
        if self.change:
            x += 1
        b, c = self.b(x).view(shape), self.c(x).view(shape)
        return self.out((a * b * c * other.cos()).flatten(-2))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", [F.silu, torch.relu, nn.GELU(), lambda y: F.gelu(y, approximate="tanh")])
def test_gated(activation, swapped):
    (step,) = chain_of(GatedMLP(activation, swapped))
    assert (step.gate, step.up, step.down) == ("one", "two", "three")
    x = torch.randn(5)
    known = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
    torch.testing.assert_close(known[step.activation](x), activation(x))


def test_an_activation_of_another_kind_is_none():
    with pytest.raises(NoChainError):
        chain_of(GatedMLP(torch.tanh))
    for other in (
        nn.PReLU(),
        nn.Tanh(),
        nn.Dropout(0.5),
        nn.ELU(),
        nn.Softmax(-1),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.Linear(2, 2),
    ):
        assert activation_of(other.train()) is None
    assert activation_of(nn.ReLU(inplace=True)) == "relu"


def test_sequential():
    model = nn.Sequential(linear(8, 9), nn.ReLU(), nn.Dropout(), linear(9, 9), nn.GELU("tanh"), linear(9, 2), nn.Tanh())
    expected = Activated("0", "relu", "1"), Call("2"), Activated("3", "gelu_tanh", "4"), Call("5"), Call("6")
    assert chain_of(model) == expected


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.three(F.silu(self.one(x)) + self.two(x)),
        lambda self, x: self.three(F.silu(self.one(x)) * self.two(x + 1)),
        lambda self, x: self.three(F.silu(a := self.one(x)) * self.two(x)) + a.sum(),
        lambda self, x: self.three(F.silu(self.one(x)) * F.silu(self.one(x))),
        lambda self, x: self.three(F.silu(self.one(x)) * self.two(x)) if x.sum() > 0 else x,
        lambda self, x: self.three(F.dropout(F.silu(self.one(x)), 0.5, self.training)),
        lambda self, x, y: self.three(F.silu(self.one(x)) * self.two(y)),
        lambda self, x: (self.three(F.silu(self.one(x)) * self.two(x)), 1),
        lambda self, x: self.three(F.silu(self.one(x)) * self.two(x)) * 2,
    ],
)
def test_anything_else_is_no_chain(forward):
    cls = type("Other", (GatedMLP,), {"forward": forward})
    with pytest.raises(NoChainError):
        chain_of(cls())


def test_linear_layers_on_one_input(caplog):
    module = Attention()
    assert shared_inputs(module) == [("a", "b", "c")]
    assert "forward" not in vars(module.a)  # what was replaced for the run is back
    assert shared_inputs(Attention(change=True)) == [("b", "c")]  # a got other numbers
    assert not caplog.records  # the run on a fake tensor ends in an error, of which nobody hears
    assert shared_inputs(nn.Sequential(linear(8, 8), linear(8, 8))) == []


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
QKV = ("q_proj", "k_proj", "v_proj")
GATED = Gated("gate_proj", "up_proj", "silu", "act_fn", "down_proj")
FAMILIES = {  # the MLP's chain; the linear layers on one input; the number of blocks
    "llama": ((GATED,), QKV),
    "qwen3": ((GATED,), QKV),
    "mistral": ((GATED,), QKV),
    "gemma": ((Gated("gate_proj", "up_proj", "gelu_tanh", "act_fn", "down_proj"),), QKV),
    "gpt2": ((Activated("c_fc", "gelu_tanh", "act"), Call("c_proj"), Call("dropout")), None),
    "bert": ((Activated("dense", "gelu", "intermediate_act_fn"),), ("query", "key", "value")),
    "vit": ((Activated("fc1", "gelu", "activation_fn"), Call("fc2")), QKV),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_hugging_face(kind):
    sizes = (
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 50}
        if kind == "gpt2"
        else {**SIZES, "num_hidden_layers": 2}
    )
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    chain, shared = FAMILIES[kind]
    found = list(blocks(model))
    assert len(found) == 2 and len({type(block) for _, block in found}) == 1
    for name, block in found:
        assert model.get_submodule(name) is block
        chains, groups = [], []
        for module in block.modules():
            try:
                steps = chain_of(module)
            except NoChainError:
                groups += shared_inputs(module)
            else:
                chains += [steps] if any(not isinstance(step, Call) for step in steps) else []
        assert chains == [chain]
        assert groups == ([shared] if shared else [])
