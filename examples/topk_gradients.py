"""Data-parallel training that exchanges the largest 1 % of the gradients: python topk_gradients.py

What a rank does not send, it adds to its next gradient (error feedback), so that nothing is lost, only late.
"""

import argparse
import tempfile
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sten


@dataclass
class Exchange:
    """The state of the hook: how it chooses, of a bucket as one row, and what it has not sent, by Parameter."""

    method: sten.TopK
    unsent: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)


def exchange_top_k(state, bucket):
    """A communication hook of DDP: sends the entries that `state.method` keeps, and gets the mean over the ranks."""
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        grad.add_(state.unsent.get(p, 0))
    flat, ranks = bucket.buffer(), dist.get_world_size()
    index = state.method.columns(flat[None])[0]
    sent = flat[index]
    flat[index] = 0
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        state.unsent[p] = grad.clone()
    values, indices = [[torch.empty_like(t) for _ in range(ranks)] for t in (sent, index)]
    dist.all_gather(values, sent)
    dist.all_gather(indices, index)
    flat.zero_()
    for value, where in zip(values, indices, strict=True):
        flat.index_add_(0, where, value / ranks)
    done = torch.futures.Future()
    done.set_result(flat)
    return done


def train(rank, ranks, store, steps):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(Exchange(sten.TopK(0.01)), exchange_top_k)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    numbers, losses = torch.Generator().manual_seed(rank), []
    for _ in range(steps):
        x = torch.randn(64, 32, generator=numbers)
        loss = nn.functional.cross_entropy(wrapped(x), x[:, :8].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    weight = model[0].weight.detach().clone()
    dist.broadcast(weight, 0)
    assert torch.equal(weight, model[0].weight), "the ranks agree"
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), "and learn"
    if rank == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} with 1 % of the gradients")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    steps = 60 if parser.parse_args().tiny else 500
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(train, (2, f"{folder}/store", steps), nprocs=2, start_method="fork")
