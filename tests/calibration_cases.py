"""A method that notes what it is given, and the same statistics by plain PyTorch. A helper of the tests, not a test."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sten

ALL = frozenset({"x_norm", "x_gram", "x_mean_var"})


@dataclass(frozen=True)
class Noted(sten.extend.PatternMethod):
    """Wanda, with every statistic of every weight kept, by name, in the order of the decisions."""

    needs: ClassVar[frozenset[str]] = ALL
    seen: dict = field(default_factory=dict, compare=False)

    def score(self, view):
        return (view.weight.abs().flatten(1) * view.stats["x_norm"]).view(view.weight.shape)

    def update(self, view):
        self.seen[view.name] = {key: value.clone() for key, value in view.stats.items()}
        return super().update(view)


def run(model: nn.Module, batch) -> object:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def statistics(x: Tensor) -> dict[str, Tensor]:
    """Of rows x (tokens, columns), in float64."""
    x = x.double()
    gram = x.t() @ x / len(x)
    mean = x.mean(0)
    moments = {"x_mean": mean, "x_var": (x - mean).square().mean(0)}
    return {"tokens": torch.tensor(len(x)), "x_norm": gram.diagonal().sqrt(), "x_gram": gram, **moments}


def rows(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The input of a layer as rows of its weight's columns, without padding."""
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return x.transpose(1, 2).flatten(0, 1)
    if mask is not None and (x.shape[:2] == mask.shape or len(x) == mask.numel()):
        return x.view(*mask.shape, -1)[mask]
    return x.reshape(-1, x.shape[-1])


def plain(model: nn.Module, names: list[str], batches: list) -> dict[str, dict[str, Tensor]]:
    """The statistics of some weights, from whole forward passes with hooks."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    given: list = [None]
    handles = []
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])

        def hook(module, args, kwargs, name=name):
            x = args[0] if args else next(iter(kwargs.values()))
            decoder = "decoder." in name and not re.search(r"(EncDecAttention|encoder_attn)\.[kv]", name)
            decoder = decoder and not {"labels", "decoder_input_ids"}.isdisjoint(given[0])
            mask = given[0].get("decoder_attention_mask" if decoder else "attention_mask")
            inputs[name].append(rows(module, x, None if mask is None else mask.bool()))

        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    model.eval()
    with torch.no_grad():
        for batch in batches:
            given[0] = batch if isinstance(batch, dict) else {}
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {name: statistics(torch.cat(x)) for name, x in inputs.items() if x}


def check(model: nn.Module, calibration, stage_of, layout=None, weights=None) -> list[str]:
    """sparsify, and compare every statistic with whole forward passes of a dense copy whose earlier stages are pruned.

    `stage_of(name)`: a key that weights share whose statistics are collected together. Returns the order of decisions.
    """
    batches = list(getattr(calibration, "batches", calibration))
    dense, method = copy.deepcopy(model), Noted()
    layout = layout or sten.NM(2, 4)
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, weights, calibration=calibration)
    order = list(method.seen)
    before = copy.deepcopy(dense)
    stages: dict[str, list[str]] = {}
    for name in order:
        stages.setdefault(stage_of(name), []).append(name)
    assert [name for names in stages.values() for name in names] == order, "the weights of a stage come together"
    for names in stages.values():
        for name, want in plain(before, names, batches).items():
            for key, value in want.items():
                got = method.seen[name][key]
                assert got.dtype == (torch.int64 if key == "tokens" else torch.float32)
                scale = value.abs().max().item()
                close = {"rtol": 1e-4, "atol": 1e-5 * scale, "msg": f"{name} {key}"}
                torch.testing.assert_close(got.double(), value.double(), **close)
        with torch.no_grad():
            for name in names:
                before.get_parameter(name).copy_(model.get_parameter(name).to_dense())
    return order


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, mask=None):
        return x + self.down(torch.tanh(self.up(x)))


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x, mask=attention_mask)
        return x


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return Blocks()


def vectors(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 4, 8, generator=generator) for _ in range(count)]


def dense(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.to_dense().detach().clone() for name, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_before(model: nn.Module, before: nn.Module) -> bool:
    """Whether nothing has changed: state, classes, attributes, hooks, modes."""
    pairs = list(zip(model.modules(), before.modules(), strict=True))
    kinds = all(type(a) is type(b) and vars(a).keys() == vars(b).keys() and a.training == b.training for a, b in pairs)
    hooks = any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return kinds and not hooks and same(model.state_dict(), before.state_dict())
