"""Reconstruct: the remaining weights of a block, fitted to what the dense block computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import ranks
import torch
from cases import SMALL, sparsity_of
from hf_models import gpt2, llama
from torch import nn

import sten
from sten.extend import Edit, View

every_layout = pytest.mark.parametrize("layout", SMALL, ids=str)


@dataclass
class Block:
    module: nn.Module
    inputs: list
    targets: list
    token_masks: list
    views: dict
    edits: dict
    parameters: dict
    transposed: frozenset


def attention_block(dtype=torch.float32) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True, dtype=dtype)
    return layer.eval()


def block_of(dense: nn.Module, layout, batches: list, masks=None, transposed: bool = False) -> Block:
    """The block with the largest |w| of its linear weights, as calibration would give it."""
    module, views, edits, parameters = copy.deepcopy(dense), {}, {}, {}
    targets = [dense(x).detach() for x in batches]
    for name, p in module.named_parameters():
        if name.endswith("weight") and p.dim() > 1:
            w = (p.t() if transposed else p).detach().clone()
            full = f"model.0.{name}"
            views[full] = View(full, w, layout, sparsity_of(layout))
            edits[full] = Edit(mask=layout.mask(w.float().abs(), sparsity_of(layout)))
            parameters[full] = name
            p.data.mul_(edits[full].mask.t() if transposed else edits[full].mask)
    inputs = [((x,), {}) for x in batches]
    others = frozenset(views) if transposed else frozenset()
    return Block(module, inputs, targets, masks or [None] * len(batches), views, edits, parameters, others)


def error_with(block: Block, edits: dict) -> float:
    """The mean over tokens of the relative error of the block with these edits, in float64."""
    module, total, count = copy.deepcopy(block.module).double(), 0.0, 0
    for full, edit in edits.items():
        value = block.views[full].weight if edit.value is None else edit.value
        value = value.double() * edit.mask
        value = value.t() if full in block.transposed else value
        module.get_parameter(block.parameters[full]).data.copy_(value)
    for ((x,), _), z, mask in zip(block.inputs, block.targets, block.token_masks, strict=True):
        y, z = module(x.double()).detach(), z.double()
        each = (y - z).square().sum(-1) / z.square().sum(-1)
        each = each if mask is None else each[mask]
        total, count = total + float(each.sum()), count + each.numel()
    return total / count


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_falls_and_masks_stay(layout, dtype):
    block = block_of(attention_block(dtype), layout, list(torch.randn(2, 4, 8, 16, dtype=dtype)))
    fitted = sten.Reconstruct(steps=12, lr=2e-2).reconstruct(block)
    assert fitted.keys() == block.edits.keys()
    for name, edit in fitted.items():
        assert torch.equal(edit.mask, block.edits[name].mask) and edit.value.dtype == dtype
        assert not edit.value[~edit.mask].any()
    assert error_with(block, fitted) < 0.96 * error_with(block, block.edits)


def test_a_step_is_the_first_step_of_adam_in_float64():
    dense = nn.Linear(8, 6, bias=False)
    batches = [torch.randn(3, 5, 8) * torch.tensor([30.0, 1, 1, 1, 1])[:, None]]
    block = block_of(dense, sten.CSR(), batches)
    ((name, edit),) = block.edits.items()
    w = (block.views[name].weight.double() * edit.mask).requires_grad_()
    x, z = batches[0].double(), block.targets[0].double()
    ((x @ w.T - z).square().sum(-1) / z.square().sum(-1)).mean().backward()
    rms = w.detach()[edit.mask].square().mean().sqrt()
    grad = w.grad * edit.mask
    want = w.detach() - 1e-3 * rms * grad / (grad.abs() + 1e-8)
    got = sten.Reconstruct(steps=1, lr=1e-3).reconstruct(block)[name].value
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def test_padding_does_not_count():
    dense, x = attention_block(), torch.randn(1, 4, 8, 16)
    counted = torch.arange(8) < torch.tensor([[8], [3], [5], [1]])
    block = block_of(dense, sten.NM(2, 4), list(x), [counted])
    spoiled = block_of(dense, sten.NM(2, 4), list(x), [counted])
    spoiled.targets = [z.masked_fill(~counted[..., None], 1e6) for z in spoiled.targets]
    ours, theirs = (sten.Reconstruct(steps=3).reconstruct(b) for b in (block, spoiled))
    assert all(torch.equal(ours[name].value, theirs[name].value) for name in ours)


def test_weights_that_are_stored_transposed():
    """Square ones, as Conv1D has them, whose orientation no shape tells."""
    dense = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    block = block_of(dense, sten.NM(1, 4), [torch.randn(20, 16)], transposed=True)
    fitted = sten.Reconstruct(steps=20, lr=2e-2).reconstruct(block)
    assert error_with(block, fitted) < 0.8 * error_with(block, block.edits)
    assert all((edit.value.unflatten(1, (-1, 4)) != 0).sum(-1).max() == 1 for edit in fitted.values())


def test_convolutions():
    dense = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    block = block_of(dense, sten.CSR(), [torch.randn(5, 4, 6, 6)])
    fitted = sten.Reconstruct(steps=20, lr=2e-2).reconstruct(block)
    assert error_with(block, fitted) < 0.8 * error_with(block, block.edits)


class Experts(nn.Module):
    """One of two layers, by the sign of the batch's sum, or none where it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.bias = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8), requires_grad=False)
        self.experts = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])

    def forward(self, x):
        if not x.any():
            return x + self.bias
        return x + self.experts[int(x.sum() > 0)](torch.tanh(self.shared(x)))


def test_experts_that_a_batch_does_not_reach():
    """As Adam in plain PyTorch, whose gradients are zero there."""
    dense, batches = Experts(), [torch.rand(3, 5, 8), -torch.rand(3, 5, 8), torch.zeros(3, 5, 8)]
    block = block_of(dense, sten.NM(2, 4), batches)
    module = copy.deepcopy(block.module).double()
    layers = [(module.get_parameter(block.parameters[name]), edit.mask) for name, edit in block.edits.items()]
    rates = [1e-2 * float(p.detach()[mask].square().mean().sqrt()) for p, mask in layers]
    optimizer = torch.optim.Adam([{"params": [p]} for p, _ in layers])
    for step in range(5):
        x, z = batches[step % 3].double(), block.targets[step % 3].double()
        optimizer.zero_grad()
        loss = ((module(x) - z).square().sum(-1) / z.square().sum(-1)).mean()
        if loss.requires_grad:
            loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 5)
        for p, mask in layers:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * mask
        optimizer.step()
    got = sten.Reconstruct(steps=5, lr=1e-2).reconstruct(block)
    for edit, (p, _) in zip(got.values(), layers, strict=True):
        torch.testing.assert_close(edit.value, p.float(), rtol=1e-4, atol=1e-6)


def test_nothing_else_changes_and_the_result_is_the_same_again():
    block = block_of(attention_block(), sten.NM(2, 4), list(torch.randn(3, 4, 8, 16)))
    before = copy.deepcopy(block.module.state_dict())
    first, second = (sten.Reconstruct(steps=4).reconstruct(block) for _ in range(2))
    assert all(torch.equal(first[name].value, second[name].value) for name in first)
    assert all(torch.equal(t, before[name]) for name, t in block.module.state_dict().items())
    assert all(p.grad is None for p in block.module.parameters())


def test_a_fit_that_does_not_help_is_dropped():
    block = block_of(attention_block(), sten.NM(2, 4), [torch.randn(4, 8, 16)])
    assert sten.Reconstruct(steps=2, lr=1e3).reconstruct(block) == block.edits


def _block_of_rank(rank: int | None) -> Block:
    """With the batch of a rank, or for None those of both as one; without their last tokens, as many as the rank."""
    torch.manual_seed(0)
    dense, x = attention_block(), torch.randn(2, 4, 8, 16)
    masks = [torch.arange(8).expand(4, 8) < 8 - r for r in range(2)]
    batches = [torch.cat([x[0], x[1]])] if rank is None else [x[rank]]
    return block_of(dense, sten.NM(2, 4), batches, [torch.cat(masks)] if rank is None else [masks[rank]])


def _rank(rank: int):
    fitted = sten.Reconstruct(steps=3).reconstruct(_block_of_rank(rank))
    return {name: edit.value.numpy() for name, edit in fitted.items()}


def test_ranks_fit_the_batches_of_all(tmp_path):
    found = ranks.results(_rank, tmp_path)
    want = sten.Reconstruct(steps=3).reconstruct(_block_of_rank(None))
    for values in found:
        for name, edit in want.items():
            torch.testing.assert_close(torch.tensor(values[name]), edit.value, rtol=1e-4, atol=1e-5)
    assert all((found[0][name] == found[1][name]).all() for name in want)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1.5}, {"lr": 0.0}], ids=str)
def test_wrong_arguments(wrong):
    with pytest.raises(
        (ValueError, TypeError), match=r"^Expected (steps of at least 1|a whole number for steps|a positive lr)"
    ):
        sten.Reconstruct(**wrong)


# ---- through sten.sparsify

IDS = [torch.randint(32, (4, 10), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def block_error(model: nn.Module, dense: nn.Module) -> float:
    """The mean relative error of the tokens of the last hidden state."""
    with torch.no_grad():
        y, z = (torch.cat([m(ids, output_hidden_states=True).hidden_states[-1] for ids in IDS]) for m in (model, dense))
    return float(((y - z).double().square().sum(-1) / z.double().square().sum(-1)).mean())


@every_layout
@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_a_chain_the_model_comes_nearer_to_the_dense_one(make, layout):
    dense, models = make(), []
    for method in (sten.Wanda(), sten.chain(sten.Wanda(), sten.Reconstruct(steps=30, lr=2e-2))):
        model = copy.deepcopy(dense)
        models.append(sten.sparsify(model, layout, method, sparsity_of(layout), calibration=IDS))
    for (name, plain), fitted in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if isinstance(plain, sten.SparseTensor):
            assert torch.equal(plain.mask(), fitted.mask()), name
        else:
            assert torch.equal(plain, fitted), name
    plain, fitted = (block_error(model, dense) for model in models)
    assert fitted < 0.9 * plain


def test_alone_it_starts_from_wandas_mask():
    models = [llama(), llama()]
    for model, method in zip(models, (sten.Wanda(), sten.Reconstruct(steps=1)), strict=True):
        sten.sparsify(model, sten.NM(2, 4), method, calibration=IDS)
    name = "model.layers.0.mlp.down_proj.weight"
    plain, fitted = (model.get_parameter(name) for model in models)
    assert torch.equal(plain.mask(), fitted.mask()) and not torch.equal(plain.to_dense(), fitted.to_dense())


def test_without_calibration_it_is_refused():
    with pytest.raises(ValueError, match=r"^Expected calibration= for Reconstruct"):
        sten.sparsify(llama(), sten.NM(2, 4), sten.Reconstruct())


def test_a_recipe_names_it_again():
    recipe = sten.Recipe(sten.NM(2, 4), sten.chain(sten.Wanda(), sten.Reconstruct(steps=4)))
    assert sten.Recipe.from_json(recipe.to_json()) == recipe


def test_it_is_the_last_of_a_chain():
    with pytest.raises(ValueError, match=r"^Expected Reconstruct\(.*, which fits whole blocks, as the last of chain"):
        sten.chain(sten.Wanda(), sten.Reconstruct(), sten.ADMM())
