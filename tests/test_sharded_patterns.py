"""FSDP2, tensor parallelism and distributed checkpoints on 2 and 4 processes: equal to one process, in every form.

With gloo, and with NCCL where there are two GPUs: `STEN_ALL=1 python -m pytest tests/test_sharded_patterns.py`. The
processes try every cell and note what failed; the tests below read the notes.
"""

from __future__ import annotations

import datetime
import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cases import SMALL
from small import mlp, rate
from torch import nn

import sten

STEPS = 3
FORMS = ("finalized", "trainable", "dense weight")
TRAINING = FORMS[1:]
LAYOUTS = SMALL if os.environ.get("STEN_ALL") else [SMALL[n] for n in (1, 3, 5, 6)]  # CSR, NM, GroupedNM, FanIn
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built in"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:sten. the masks leave rows empty"),
]


def here():
    """The device of this process."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", dist.get_rank()) if nccl else torch.device("cpu")


def numbers(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(here())


def close(got, want, name=""):
    """Equal but for the order of sums."""
    got, want = (t.to_dense() if isinstance(t, sten.SparseTensor) else t for t in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


def sparse(layout, form, seed=0, model=None):
    """A model in a form; of another seed, with another pattern of equally many entries."""
    model = (mlp() if model is None else model).to(here())
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(numbers(100 * seed + number, *p.shape) / p.shape[-1] ** 0.5)
    if form == "dense weight":
        method = sten.Gradual(1, 2) if layout.rate is None else sten.SRSTE()
        return sten.sparsify(model, layout, method, sparsity=rate(layout), weights="*")
    model = sten.sparsify(model, layout, sparsity=rate(layout), weights="*")
    return sten.trainable(model) if form == "trainable" else model


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[2], model):
        fully_shard(part)
    return model


def batches():
    return numbers(1, STEPS, 8, 12)


def train(model, form, inputs, scale):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if form == "dense weight":
        sten.attach(model, optimizer)
    for x in inputs:
        optimizer.zero_grad()
        (model(x).square().sum() * scale).backward()
        optimizer.step()


def fsdp_train(layout, form, rank, world, folder):
    """Trains as one process does; the checkpoint is for processes of other numbers."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, alone, x = shard(sparse(layout, form)), sparse(layout, form), batches()
    train(model, form, [batch.chunk(world)[rank] for batch in x], 1.0)
    train(alone, form, x, 1 / world)
    close(model(x[0]), alone(x[0]))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    again = shard(sparse(layout, form, seed=2))
    state = get_model_state_dict(again)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state)
    close(again(x[0]), model(x[0]))
    torch.save(model(x[0]).detach(), f"{folder}/output-{rank}.pt")


def fsdp_inference(layout, form, rank, world, folder):
    model, alone, x = sparse(layout, form), sparse(layout, form), batches()[0]
    model = shard(model.requires_grad_(False).eval())
    with torch.no_grad():
        close(model(x), alone(x))
        model(x).sum()
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in alone.parameters())


def fsdp_refused(layout, form, rank, world, folder):
    from torch.distributed.fsdp import fully_shard

    model, x = sparse(layout, form), batches()[0]
    want = model(x)
    with pytest.raises(NotImplementedError, match=r"for FSDP2 call sten\.trainable\(model\) before fully_shard"):
        fully_shard(model)
    assert torch.equal(sparse(layout, form)(x), want)


def checkpoint(layout, form, rank, world, folder):
    """Of a model that is not divided."""
    import torch.distributed.checkpoint as dcp

    model, x = sparse(layout, form), batches()[0]
    dcp.save(model.state_dict(), checkpoint_id=folder)
    torch.save(model(x).detach(), f"{folder}/output-{rank}.pt")


def reshard(layout, form, rank, world, folder):
    """A checkpoint of two processes, read by other numbers of them, into another pattern."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = sparse(layout, form, seed=0 if form == "finalized" else 3)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    if world > 1 and form != "finalized":
        shard(model)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    close(model(batches()[0]).detach(), torch.load(f"{folder}/output-0.pt", map_location=here()))


class Block(nn.Module):
    """As of Llama, with biases."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(96, 96) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(96, 192), nn.Linear(96, 192, bias=False), nn.Linear(192, 96)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def plan_for(layout):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = {f"*.{name}": ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    return plan | {"*.o": RowwiseParallel(), "*.down": RowwiseParallel()}


def tensor_parallel(layout, form, rank, world, folder):
    """Outputs, gradients, a step and state dicts of a block as those of one process."""
    mesh = dist.init_device_mesh(here().type, (world,))
    plan = plan_for(layout)
    alone, model, again = (sparse(layout, form, seed, nn.Sequential(Block())) for seed in (0, 0, 1))
    if type(layout) is sten.FanIn:  # rows of a slice of the inputs have different counts
        before = model[0].o.weight
        with pytest.raises(
            ValueError, match=r"^Expected \d slices of 0.o.weight that FanIn\(\) can store, .* sten.CSR"
        ):
            sten.parallelize_module(model, mesh, plan)
        assert model[0].o.weight.shape == before.shape and type(model[0].q).__name__ == "Linear"
        for each in (alone, model, again):
            for block in each:
                sten.finalize(block.o, sten.CSR())
                sten.finalize(block.down, sten.CSR())
            if form == "trainable":
                sten.trainable(each)
    for each in (model, again):
        sten.parallelize_module(each, mesh, plan)
    assert model[0].down.weight.shape == (96, 192 // world) and model[0].q.weight.shape == (96 // world, 96)
    assert type(model[0].down.weight) is sten.SparseTensor
    x = numbers(1, 2, 5, 96)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(a) for each, a in zip((model, alone), inputs, strict=True)]
    close(*outputs)
    for each, y in zip((model, alone), outputs, strict=True):
        optimizer = torch.optim.SGD(each.parameters(), 1.0)
        y.square().mean().backward()
        optimizer.step()
    close(inputs[0].grad, inputs[1].grad)
    state, whole = model.state_dict(), alone.state_dict()
    assert list(state) == list(whole)
    for name, got, want in zip(state, state.values(), whole.values(), strict=True):
        close(got, want, name)
    again.load_state_dict(state)
    close(again(x), model(x))
    sten.save(model, f"{folder}-{rank}.safetensors")
    with pytest.raises(
        TypeError, match=r"^Expected a model that is not divided among ranks for sten\.load, got one .*;"
    ):
        sten.load(model, f"{folder}-{rank}.safetensors")
    loaded = sten.load(nn.Sequential(Block()).to(here()), f"{folder}-{rank}.safetensors")
    close(loaded(x), model(x))
    dense = sten.densify(model)  # and its state dicts are those of the whole model as well
    close(dense(x), loaded(x))
    again = nn.Sequential(Block()).to(here())
    again.load_state_dict(dense.state_dict())
    close(again(x), loaded(x))


def tensor_parallel_refused(layout, form, rank, world, folder):
    mesh = dist.init_device_mesh(here().type, (world,))
    model = sparse(layout, form, model=nn.Sequential(Block()))
    with pytest.raises(ValueError, match=r"^Expected 0\.\w\.weight finalized or with a static pattern, .* sten\.final"):
        sten.parallelize_module(model, mesh, plan_for(layout))
    assert type(model[0].q).__name__ == "Linear"


JOBS = {  # row: (processes, forms, what each of them does)
    "FSDP2 train": (2, TRAINING, fsdp_train),
    "FSDP2 inference": (2, TRAINING, fsdp_inference),
    "FSDP2 refused": (2, ("finalized",), fsdp_refused),
    "DCP": (2, ("finalized",), checkpoint),
    "TP": (2, FORMS[:2], tensor_parallel),
    "TP refused": (2, ("dense weight",), tensor_parallel_refused),
    "reshard": (4, FORMS, reshard),
    "TP of 4": (4, FORMS[:1], tensor_parallel),
}
FOLDERS = {"reshard": {"finalized": "DCP", "trainable": "FSDP2 train", "dense weight": "FSDP2 train"}}


def worker(rank, world, port, folder, backend):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    notes = {}
    for row, (processes, forms, job) in JOBS.items():
        cells = [(layout, form) for layout in LAYOUTS for form in forms] if processes == world else []
        for layout, form in cells:
            where = f"{folder}/{FOLDERS.get(row, {}).get(form, row)}-{form}-{SMALL.index(layout)}"
            try:
                job(layout, form, rank, world, where)
            except Exception:
                notes[row, form, str(layout)] = traceback.format_exc()
    torch.save(notes, f"{folder}/notes-{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["gloo", "nccl"])
def notes(tmp_path_factory, request):
    """(row, form, layout) of what failed on any process, with its traceback; and the folder of the checkpoints."""
    if not getattr(dist, f"is_{request.param}_available")():
        pytest.skip(f"torch.distributed with {request.param} is not built in")
    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are wanted")
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for world in (2, 4) if request.param == "gloo" or torch.cuda.device_count() >= 4 else (2,):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(worker, args=(world, port, str(folder), request.param), nprocs=world)
        for rank in range(world):
            found.update(torch.load(folder / f"notes-{world}-{rank}.pt"))
    return found, folder


def expect(notes, row, form, layout):
    error = notes[0].get((row, form, str(layout)))
    assert error is None, error


@pytest.mark.cell("FSDP2 train")
@pytest.mark.cell("DCP")
@every_layout
@pytest.mark.parametrize("form", TRAINING)
def test_fsdp_trains_as_one_process_does(notes, layout, form):
    expect(notes, "FSDP2 train", form, layout)


@pytest.mark.cell("FSDP2 inference")
@every_layout
@pytest.mark.parametrize("form", TRAINING)
def test_fsdp_of_a_frozen_model(notes, layout, form):
    expect(notes, "FSDP2 inference", form, layout)


@pytest.mark.cell("FSDP2 train", form="finalized", refused="call sten.trainable(model) before fully_shard")
@pytest.mark.cell("FSDP2 inference", form="finalized", refused="call sten.trainable(model) before fully_shard")
@every_layout
def test_fsdp_of_a_finalized_model_is_refused(notes, layout):
    expect(notes, "FSDP2 refused", "finalized", layout)


@pytest.mark.cell("DCP", form="finalized")
@every_layout
def test_checkpoint_of_a_finalized_model(notes, layout):
    expect(notes, "DCP", "finalized", layout)


@pytest.mark.cell("reshard")
@every_layout
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_two_processes_for_four_and_for_one(notes, layout, form):
    expect(notes, "reshard", form, layout)
    reshard(layout, form, 0, 1, f"{notes[1]}/{FOLDERS['reshard'][form]}-{form}-{SMALL.index(layout)}")


@pytest.mark.cell("TP")
@every_layout
@pytest.mark.parametrize("form", FORMS[:2])
def test_tensor_parallel(notes, layout, form):
    expect(notes, "TP", form, layout)
    expect(notes, "TP of 4", form, layout)


@pytest.mark.cell("TP", form="dense weight", refused="call sten.finalize(model) before sten.parallelize_module")
@every_layout
def test_tensor_parallel_under_a_method_is_refused(notes, layout):
    expect(notes, "TP refused", "dense weight", layout)
