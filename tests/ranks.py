"""Two processes of one process group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _run(worker: Callable[[int], Any], rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    queue.put((rank, worker(rank)))
    dist.barrier()
    dist.destroy_process_group()


def results(worker: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `worker(rank, *arguments)`, a function of a module, returns on each of two ranks; arrays, no tensors."""
    context = torch.multiprocessing.get_context("spawn")  # two imports of torch: most of such a test's time
    queue = context.Queue()
    called = functools.partial(_call, worker, arguments)
    processes = [context.Process(target=_run, args=(called, r, str(folder / "store"), queue)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(2)]


def _call(worker: Callable[..., Any], arguments: tuple, rank: int) -> Any:
    return worker(rank, *arguments)
