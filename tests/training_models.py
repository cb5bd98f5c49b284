"""Small models, data and a training loop for the tests of sparse training."""

import torch
from torch import nn
from torch.nn import functional as F

import sten
from sten.training.engine import engines_of

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
}


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).to(dtype)


def batch(step, size=32, dtype=torch.float32):
    """The same batch for the same step, in every process."""
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(size, 16, generator=g).to(dtype)
    return x, x[:, :8].argmax(1)


def loss_of(model, step, size=32, dtype=torch.float32):
    x, y = batch(step, size, dtype)
    return F.cross_entropy(model(x), y)


def train(model, optimizer, steps, first=0, microbatches=1, dtype=torch.float32):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        x, y = batch(step, dtype=dtype)
        for xs, ys in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            (F.cross_entropy(model(xs), ys) / microbatches).backward()
        optimizer.step()
    return model


def engine_of(model):
    return engines_of(model)[0]


def sparse(method, layout=None, sparsity=0.75, optimizer="momentum", seed=0, dtype=torch.float32):
    """(model, optimizer, engine) under a method."""
    layout = sten.CSR() if layout is None else layout
    model = mlp(seed, dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    sparsity = None if layout.rate is not None else sparsity
    sten.sparsify(model, layout, method, sparsity, optimizer=optimizer)
    return model, optimizer, engine_of(model)


def dense_weights(model):
    """Every weight as the model computes with it, dense."""
    return [layer.weight.to_dense().detach().clone() for layer in model if isinstance(layer, nn.Linear)]


def masks(model):
    return [layer.weight_pattern.tensor().mask() for layer in model if isinstance(layer, nn.Linear)]
