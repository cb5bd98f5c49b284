"""FSDP2 shards the values of a pattern: two processes train as one, and a distributed checkpoint is read back."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import SMALL
from small import mlp, rate

import sten

STEPS = 3
LAYOUTS = SMALL


def trainable(layout):
    return sten.trainable(sten.sparsify(mlp(), layout, sparsity=rate(layout)))


def sharded(layout):
    from torch.distributed.fsdp import fully_shard

    model = trainable(layout)
    for part in (model[0], model[2], model):
        fully_shard(part)
    return model


def train(model, batches, scale):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for batch in batches:
        optimizer.zero_grad()
        (model(batch).square().sum() * scale).backward()
        optimizer.step()


def worker(rank, port, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x = torch.randn(STEPS, 8, 12, generator=torch.Generator().manual_seed(1))
    try:
        for number, layout in enumerate(LAYOUTS):
            model, alone = sharded(layout), trainable(layout)
            train(model, [batch.chunk(2)[rank] for batch in x], 1.0)
            train(alone, x, 0.5)
            torch.testing.assert_close(model(x[0]), alone(x[0]), rtol=1e-4, atol=1e-5)
            dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/{number}")
            again = sharded(layout)
            state = get_model_state_dict(again)
            dcp.load(state, checkpoint_id=f"{folder}/{number}")
            set_model_state_dict(again, state)
            torch.testing.assert_close(again(x[0]), model(x[0]))
    finally:
        dist.destroy_process_group()


@pytest.mark.cell("DCP", form="trainable", layout=LAYOUTS)
@pytest.mark.cell("FSDP2 train", form="trainable", layout=LAYOUTS)
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not built in")
def test_sharded_values_train_as_one_process_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
