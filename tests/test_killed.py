"""A run killed by SIGKILL at a random moment and resumed from its last file ends bit for bit where it would have ended.

Every method x layout of docs/training.md, in an own loop; a sample of them unless STEN_ALL=1 (`make fuzz`).
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch
from cases import SMALL
from training_methods import METHODS, SUPPORTED
from training_models import batch, mlp

import sten

STEPS = 16
ALL = [(m, layout) for m in METHODS for layout in SMALL if SUPPORTED[type(m).__name__, type(layout).__name__] == "yes"]
CELLS = ALL if os.environ.get("STEN_ALL") else ALL[::9]


def run(cell, path, after_step=lambda step: None) -> dict:
    """Train to the end, from the file if there is one, and save after each step."""
    (method, layout), model = cell, mlp()
    kind = sten.optim.AdamS if method.optimizer else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
    first = 0
    if path.exists():
        more = sten.load_run(model, path, optimizer)
        first = more["step"]
        schedule.load_state_dict(more["schedule"])
    for step in range(first, STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        sten.save_run(model, path, optimizer, step=step + 1, schedule=schedule.state_dict())
        after_step(step)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def in_child(act) -> tuple[int, int]:
    """(pid, what to read from) of a forked process that does this."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act(write)
        finally:
            os._exit(0)
    os.close(write)
    return pid, read


def leaves(tree):
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key])
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, autograd has threads that no fork survives")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{type(cell[0]).__name__}-{cell[1]}")
def test_killed_and_resumed_bit_for_bit(cell, tmp_path, one_thread):
    torch.manual_seed(0)
    want = run(cell, tmp_path / "whole")
    r, path = random.Random(str(cell)), tmp_path / "run"
    for at in (r.randrange(1, 6), r.randrange(1, 6)):  # killed twice, at some byte of some step
        pid, read = in_child(lambda write: run(cell, path, lambda step: os.write(write, b".")))
        assert len(os.read(read, 1)) == 1
        for _ in range(at - 1):
            os.read(read, 1)
        time.sleep(r.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        os.close(read)
        assert os.waitpid(pid, 0)[1] in (signal.SIGKILL, 0)
    got = run(cell, path)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert len(list(tmp_path.iterdir())) == 2  # no leftovers
