"""Adapters: factors of a frozen sparse weight, compared with dense PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import gpt2, llama
from small import batch, every_layout, mlp, rate
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from weights import one_sentence

import sten

IDS = torch.arange(12).view(2, 6)


def adapted(layout, model: nn.Module | None = None, **more) -> nn.Module:
    return sten.add_adapters(sten.sparsify(model or mlp().double(), layout, sparsity=rate(layout)), **more)


def moved(model: nn.Module) -> nn.Module:
    """The model with adapters that are not at their start."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    return model


def by_hand(w: torch.Tensor, adapter: nn.Module, scale: float) -> torch.Tensor:
    """The formula of SPP, entry by entry."""
    each = -(-len(w) // len(adapter.lora_A))
    rows = [
        row * (1 + scale * adapter.lora_B[i] * adapter.lora_A[i // each].view(row.shape)) for i, row in enumerate(w)
    ]
    return torch.stack(rows)


def train(model: nn.Module, steps: int = 10, lr: float = 0.05) -> list[float]:
    optimizer, seen = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(batch(0).to(next(model.parameters()).dtype)) - 1).float().square().mean()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


@every_layout
def test_the_weight_and_its_gradients_are_the_formula(layout):
    model = moved(adapted(layout, rank=3, scale=1.5))
    adapter, x = model[0].parametrizations.weight[0], batch(0).double()
    original = model[0].parametrizations.weight.original
    w = by_hand(original.to_dense(), adapter, 1.5)
    want = nn.functional.linear(x, w, model[0].bias)
    torch.testing.assert_close(model[0](x), want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(model[0](x).square().sum(), adapter.parameters())
    for ours, theirs in zip(got, torch.autograd.grad(want.square().sum(), adapter.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_layout
def test_merge_writes_the_weights_once_in_their_pattern(layout):
    model = adapted(layout, rank=4)
    patterns = [m.parametrizations.weight.original.mask() for m in (model[0], model[2])]
    train(model)
    outputs = model(batch(1).double())
    assert sten.merge_adapters(model) is model
    torch.testing.assert_close(model(batch(1).double()), outputs, rtol=1e-12, atol=1e-12)
    for layer, pattern in zip((model[0], model[2]), patterns, strict=True):
        assert type(layer).__name__ == "Linear" and not parametrize.is_parametrized(layer)
        assert isinstance(layer._parameters["weight"], sten.SparseTensor) and torch.equal(layer.weight.mask(), pattern)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    with pytest.raises(
        ValueError, match=r"^Expected a model with adapters, got none; call sten\.add_adapters"
    ) as error:
        sten.merge_adapters(model)
    assert one_sentence(error)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_adapters_train(layout, dtype):
    model = adapted(layout, mlp().to(dtype))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert len(trained) == 4 and all(
        p.dtype == torch.float32 for name, p in model.named_parameters() if name in trained
    )
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        same = p.to_dense() == before[name].to_dense() if isinstance(p, sten.SparseTensor) else p == before[name]
        assert bool(same.all()) != (name in trained), name


def test_nothing_changes_at_the_start():
    model = sten.sparsify(mlp(), sten.NM(2, 4))
    outputs = model(batch(0))  # its graph is alive
    torch.testing.assert_close(sten.add_adapters(model)(batch(0)), outputs)


def test_weights_that_are_stored_transposed():
    model = moved(adapted(sten.NM(2, 4), gpt2().double(), weights=["*mlp*"], rank=3))
    layer = model.transformer.h[0].mlp.c_fc
    w = by_hand(layer.parametrizations.weight.original.to_dense().T, layer.parametrizations.weight[0], 2.0).T
    torch.testing.assert_close(layer.weight.to_dense(), w, rtol=1e-12, atol=1e-12)
    assert not parametrize.is_parametrized(model.transformer.h[0].attn.c_attn)
    outputs = model(IDS).logits
    torch.testing.assert_close(sten.merge_adapters(model)(IDS).logits, outputs)


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    sten.sparsify(model, sten.CSR(), sparsity=0.5, weights=[nn.Conv2d])
    moved(sten.add_adapters(model, rank=4))
    w = by_hand(model[0].parametrizations.weight.original.to_dense(), model[0].parametrizations.weight[0], 2.0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, w, model[0].bias))


def test_tied_weights_share_one_adapter():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    moved(sten.add_adapters(sten.sparsify(model, sten.NM(2, 4)), rank=2))
    x = torch.randn(3, 8, dtype=torch.float64)
    outputs = model(x)
    assert sum(p.requires_grad for p in model.parameters()) == 2
    sten.merge_adapters(model)
    assert model[0].weight is model[2].weight
    torch.testing.assert_close(model(x), outputs)


def test_the_state_is_small_and_resumes():
    model = adapted(sten.CSR())
    train(model, 3)
    state = sten.adapter_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {"lora_A", "lora_B"} and len(state) == 4
    other = adapted(sten.CSR())
    loaded = other.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert torch.equal(other(batch(1).double()), model(batch(1).double()))


def test_copies_and_files_keep_adapters(tmp_path):
    model = moved(adapted(sten.NM(2, 4)))
    outputs, copied = model(batch(0).double()), copy.deepcopy(model)
    assert torch.equal(copied(batch(0).double()), outputs)
    sten.save(model, tmp_path / "model.safetensors")
    other = sten.load(adapted(sten.NM(2, 4)), tmp_path / "model.safetensors")
    assert torch.equal(other(batch(0).double()), outputs)


def test_folders_of_transformers_come_after_the_merge(tmp_path):
    pytest.importorskip("sten.integrations.transformers")
    model = moved(adapted(sten.NM(2, 4), llama()))
    with pytest.raises(ValueError, match=r"^Expected sparse weights without parametrizations.*sten\.merge_adapters\.$"):
        model.save_pretrained(tmp_path)
    sten.merge_adapters(model).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_distill_trains_adapters_and_what_is_unfrozen():
    teacher = llama(num_hidden_layers=2)
    student = adapted(sten.NM(2, 4), copy.deepcopy(teacher), rank=4)
    student.model.norm.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    loss = sten.Distillation(student, teacher)
    start = float(loss(IDS).detach())
    sten.distill(student, teacher, [IDS], steps=20, lr=2e-2)
    assert float(loss(IDS).detach()) < 0.8 * start
    for name, p in student.named_parameters():
        if isinstance(p, sten.SparseTensor):
            assert torch.equal(p.to_dense(), before[name].to_dense())
        else:
            assert torch.equal(p, before[name]) == ("lora" not in name and name != "model.norm.weight"), name


REFUSED = {
    "dense": (lambda: sten.add_adapters(mlp()), r"a model with sparse weights for adapters, got none"),
    "in training": (
        lambda: sten.add_adapters(sten.trainable(sten.sparsify(mlp(), sten.NM(2, 4)))),
        r"finalized weights for adapters, got 0\.weight in training; call sten\.finalize first",
    ),
    "twice": (lambda: sten.add_adapters(adapted(sten.CSR())), r"plain sparse weights .* parametrized by SPP"),
    "no match": (lambda: adapted(sten.CSR(), weights=["*encoder*"]), r"weights= to match a sparse weight, got none"),
    "rank": (lambda: adapted(sten.CSR(), rank=0), r"a positive rank and scale, got rank=0"),
    "no adapters": (lambda: sten.adapter_state_dict(mlp()), r"a model with adapters, got none"),
    "finalize": (lambda: sten.finalize(adapted(sten.CSR())), r"without parametrizations, got 0\.weight"),
    "densify": (lambda: sten.densify(adapted(sten.CSR())), r"without parametrizations, got 0\.weight"),
    "trainable": (lambda: sten.trainable(adapted(sten.CSR())), r"without parametrizations, got 0\.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case):
    call, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=f"^Expected .*{words}") as error:
        call()
    assert one_sentence(error)


def test_a_recurrent_layer_is_refused_and_nothing_frozen():
    model = sten.sparsify(nn.Sequential(nn.LSTM(8, 8)), sten.CSR(), sparsity=0.5, weights=["*weight*"])
    with pytest.raises(TypeError, match="of a fused recurrent layer; leave it out with weights="):
        sten.add_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


class SecondFails(TorchDispatchMode):
    """The second adapter finds no memory."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten.uniform_
        if self.count == 2:
            raise RuntimeError("out of memory")
        return func(*args, **(kwargs or {}))


def test_all_or_nothing():
    model = sten.sparsify(mlp(), sten.NM(2, 4))
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="out of memory"), SecondFails():
        sten.add_adapters(model, rank=2)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
