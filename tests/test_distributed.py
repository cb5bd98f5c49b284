"""Two processes, gloo (NCCL too where there are two GPUs): the same masks on every rank, and the weights of one process
with the joint batch."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_models import OPTIMIZERS, engine_of, masks, mlp

import sten
from sten.layouts import BSR, CSR, NM, VectorNM
from sten.training import engine as engines
from sten.training import optimizer_checks
from sten.training.pattern_weight import PatternWeight

STEPS = 10
CASES = {
    "rigl-csr": (lambda: sten.RigL(12, every=3), CSR(), 0.75),
    "rigl-bsr": (lambda: sten.RigL(12, every=3), BSR((4, 4)), 0.5),
    "rigl-vector": (lambda: sten.RigL(12, every=3), VectorNM(1, 4, 4), None),
    "set-csr": (lambda: sten.SET(12, every=3), CSR(), 0.75),
    "dstee-csr": (lambda: sten.DSTEE(12, every=3), CSR(), 0.75),
    "momentum-csr": (lambda: sten.SparseMomentum(12, every=4), CSR(), 0.75),
    "gradual": (lambda: sten.Gradual(2, 8, 3), CSR(), 0.75),
    "srste": (lambda: sten.SRSTE(0.1), NM(2, 4), None),
    "decaying": (lambda: sten.DecayingMask(12, rate=0.3), NM(1, 4), None),
}
SHARDED = ["gradual", "srste", "decaying"]


def joint(step):
    g = torch.Generator().manual_seed(100 + step)
    x = torch.randn(32, 16, generator=g, dtype=torch.float64)
    return x, x[:, :8].argmax(1)


def loop(model, optimizer, rank, world, device="cpu"):
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (t.chunk(world)[rank].to(device) for t in joint(step))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def build(case, attach_later=False, device="cpu"):
    make, layout, sparsity = CASES[case]
    model = mlp(dtype=torch.float64).to(device)
    if attach_later:
        return sten.sparsify(model, layout, make(), sparsity), None
    optimizer = OPTIMIZERS["adam"](model.parameters())
    return sten.sparsify(model, layout, make(), sparsity, optimizer=optimizer), optimizer


def under_ddp(rank, world, case, device):
    model, optimizer = build(case, device=device)
    if case.endswith("csr"):  # what travels is compressed
        assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in mlp().parameters())
    loop(torch.nn.parallel.DistributedDataParallel(model), optimizer, rank, world, device)
    return model, optimizer


def under_fsdp(rank, world, case, device):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _ = build(case, attach_later=True, device=device)
    mesh = init_device_mesh(torch.device(device).type, (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    sten.attach(model, optimizer)
    loop(model, optimizer, rank, world, device)
    return model, optimizer


def weights(model):
    """Dense weights, whole, or the weights of compressed layers."""
    out = []
    for layer in (model[0], model[2]):
        param = layer._parameters["weight"]
        if isinstance(layer.weight_pattern, PatternWeight):
            param = layer.weight.to_dense()
        out.append((param.full_tensor() if hasattr(param, "full_tensor") else param).detach().cpu().clone())
    return out


def worker(rank, world, port, jobs, folder, backend):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world)
    try:
        for kind, case in jobs:
            model, optimizer = (under_ddp if kind == "ddp" else under_fsdp)(rank, world, case, device)
            assert engine_of(model).step == STEPS and optimizer.param_groups
            state = {"weights": weights(model), "masks": [mask.cpu() for mask in masks(model)]}
            torch.save(state, f"{folder}/{kind}-{case}-{rank}.pt")
            engines.stop(model)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def results(tmp_path_factory, request):
    if not dist.is_available() or not getattr(dist, f"is_{request.param}_available")():
        pytest.skip(f"torch.distributed with {request.param} is not built in")
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are wanted")
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [("ddp", case) for case in CASES] + [("fsdp", case) for case in SHARDED]
    mp.spawn(worker, args=(2, free_port(), jobs, str(folder), request.param), nprocs=2)
    return lambda kind, case: [torch.load(folder / f"{kind}-{case}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("kind", "case"), [("ddp", c) for c in CASES] + [("fsdp", c) for c in SHARDED])
def test_ranks_agree_and_equal_one_process(results, kind, case):
    first, second = results(kind, case)
    for key in ("masks", "weights"):
        assert all(map(torch.equal, first[key], second[key])), key
    on_gpus = "nccl" in os.environ["PYTEST_CURRENT_TEST"]  # whose sums are in another order; Adam makes more of it
    device = "cuda" if on_gpus else "cpu"  # SET draws on the device
    model, optimizer = build(case, device=device)
    loop(model, optimizer, 0, 1, device)
    near = {"rtol": 1e-5, "atol": 1e-7} if on_gpus else {"rtol": 1e-7, "atol": 1e-9}
    for have, want in zip(first["weights"], weights(model), strict=True):
        torch.testing.assert_close(have, want, **near)
    assert all(map(torch.equal, first["masks"], [mask.cpu() for mask in masks(model)]))


def one_rank_without_a_weight(rank, world, port):
    """A layer that one rank does not use in the step of a mask update."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sten.sparsify(model, CSR(), sten.RigL(12, every=1), 0.75, optimizer=optimizer)
        x = torch.randn(4, 16)
        hidden = model[:2](x)
        (hidden.sum() if rank else model[2](hidden).sum()).backward()
        optimizer.step()
        both = [torch.zeros(8, 32, dtype=torch.uint8) for _ in range(world)]
        dist.all_gather(both, masks(model)[1].to(torch.uint8))
        assert engine_of(model).updates == 1 and torch.equal(*both)
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch.distributed without gloo")
def test_a_weight_that_one_rank_does_not_use_gloo():
    mp.spawn(one_rank_without_a_weight, args=(2, free_port()), nprocs=2)


def test_a_method_that_resizes_is_refused_on_several_ranks(monkeypatch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(optimizer_checks, "ranks", lambda: 2)
    with pytest.raises(ValueError, match=r"Expected one process for SRigL, .* use sten\.RigL"):
        sten.sparsify(model, sten.FanIn(), sten.SRigL(12, every=3), 0.5, optimizer=optimizer)
    assert type(model[0]) is torch.nn.Linear
