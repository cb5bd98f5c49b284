"""torch.distributed on sparse weights, in two processes: right, or one sentence on every rank."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SMALL
from forms import FORMS
from small import mlp, rate

import sten


def sparse(layout, form, seed=0):
    torch.manual_seed(seed)
    model = mlp() if seed == 0 else reseeded(seed)
    if form == "dense weight":
        method = sten.Gradual(1, 2) if layout.rate is None else sten.SRSTE()
        return sten.sparsify(model, layout, method, sparsity=rate(layout))
    model = sten.sparsify(model, layout, sparsity=rate(layout))
    return sten.trainable(model) if form == "trainable" else model


def reseeded(seed):
    model = mlp()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def refused(call, match):
    with pytest.raises((NotImplementedError, TypeError, RuntimeError), match=match) as error:
        call()
    text = str(error.value)
    assert text.startswith("Expected") and text.endswith(".") and text.count(". ") == 0, text


def divided(layout, form):
    """FSDP2 of a finalized model, FSDP1 and tensor parallelism of every one: refused, and the weights stay sparse."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    model = sparse(layout, form)
    before = type(model[0].weight)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    refused(lambda: parallelize_module(model, mesh, plan), r"for tensor parallelism sten\.parallelize_module")
    refused(lambda: distribute_module(model, mesh), r"for tensor parallelism sten\.parallelize_module")
    refused(lambda: FullyShardedDataParallel(model, device_id=torch.device("cpu")), r"sten\.densify")
    assert type(model[0].weight) is before
    if form == "finalized":
        model = sparse(layout, form)
        refused(lambda: fully_shard(model), r"for FSDP2 call sten\.trainable\(model\) before fully_shard")
        for placement in (Shard(0), Replicate()):
            weight = model[0].weight.detach()
            refused(lambda w=weight, p=placement: distribute_tensor(w, mesh, [p]), r"for FSDP1 sten\.densify")
        assert isinstance(model[0].weight, sten.SparseTensor)


def collectives(layout, form):
    if form == "dense weight":
        return
    w = sparse(layout, form)[0].weight.detach()
    dense = w.to_dense()
    for call in (
        lambda: dist.broadcast(w, 0),
        lambda: dist.all_reduce(w),
        lambda: dist.reduce(w, 0),
        lambda: dist.all_gather_into_tensor(w, dense[: len(dense) // 2]),
        lambda: dist.reduce_scatter_tensor(w, torch.cat([dense, dense])),
    ):
        refused(call, "call it on the parts")
    assert torch.equal(w.to_dense(), dense)
    both = torch.zeros(2 * len(dense), dense.shape[1])
    dist.all_gather_into_tensor(both, w)
    assert torch.equal(both, torch.cat([dense, dense]))
    values = w.parts["values"].clone()
    dist.all_reduce(w.parts["values"])  # what the sentence names
    assert torch.equal(w.parts["values"], 2 * values)
    targets = [w.clone().zero_(), w.clone().zero_()]
    dist.all_gather(targets, dense)  # into lists, which torch copies to one by one
    assert all(torch.equal(target.to_dense(), dense) for target in targets)
    objects = [None, None]
    dist.all_gather_object(objects, w)
    assert torch.equal(objects[0].to_dense(), w.to_dense())


def data_parallel(layout, form, rank):
    """Two ranks with half the batch each train as one process does, from the weights and patterns of rank 0."""
    same = sparse(layout, form)
    model = sparse(layout, form, seed=0 if form == "finalized" else rank)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    x = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    if form != "dense weight":  # whose mask is made anew by each forward pass
        torch.testing.assert_close(model(x[0]), same(x[0]))
        assert torch.equal(model[0].weight.mask(), same[0].weight.mask())
    optimizers = [torch.optim.AdamW(each.parameters(), 0.01) for each in (model, same)]
    for batch in x:
        (parallel(batch.chunk(2)[rank]) - 1).square().mean().backward()
        (same(batch) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model(x[0]), same(x[0]), rtol=1e-4, atol=1e-5)


def in_bfloat16(layout, form, rank):
    """The averaged gradients are those of the whole batch."""
    same, model = sparse(layout, form).bfloat16(), sparse(layout, form, seed=0 if form == "finalized" else rank)
    parallel = torch.nn.parallel.DistributedDataParallel(model.bfloat16())
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(1)).bfloat16()
    parallel(x.chunk(2)[rank]).square().mean().backward()
    same(x).square().mean().backward()
    for got, want in zip(model.parameters(), same.parameters(), strict=True):
        got, want = (g.to_dense() if isinstance(g, sten.SparseTensor) else g for g in (got.grad, want.grad))
        torch.testing.assert_close(got, want, rtol=5e-2, atol=2e-2)


def other_patterns(layout, rank):
    """DDP of finalized models whose patterns differ cannot copy rank 0's numbers."""
    model = sparse(layout, "finalized", seed=rank)
    if rank == 0:
        torch.nn.parallel.DistributedDataParallel(model)
    else:
        with pytest.raises(ValueError, match="Expected no non-zeros off the pattern"):
            torch.nn.parallel.DistributedDataParallel(model)


def checkpoints(layout, form, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, x = sparse(layout, form), torch.randn(4, 12)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(0)
    state = {"model": again.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    again.load_state_dict(state["model"])
    assert torch.equal(again(x), model(x))
    other = sparse(layout, form, seed=5)
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(other(x), model(x)) or form == "dense weight"


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for number, layout in enumerate(SMALL):
            for form in FORMS:
                if form == "dense weight" and layout.rate is None and type(layout) is not sten.CSR:
                    continue
                data_parallel(layout, form, rank)
                in_bfloat16(layout, form, rank)
                if layout in (sten.CSR(), sten.GroupedNM(2, 4, 1)):  # what follows knows no layouts; it takes seconds
                    divided(layout, form)
                    checkpoints(layout, form, f"{folder}/{number}-{form}")
                    collectives(layout, form)
        other_patterns(sten.CSR(), rank)
    finally:
        dist.destroy_process_group()


@pytest.mark.cell("DDP", form=FORMS[:2], layout=SMALL)
@pytest.mark.cell("DDP", form="dense weight", layout=["CSR", "NM", "VectorNM", "GroupedNM"])
@pytest.mark.cell(
    "FSDP2 train",
    form="finalized",
    layout=["CSR", "GroupedNM"],
    refused="call sten.trainable(model) before fully_shard",
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not built in")
def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
