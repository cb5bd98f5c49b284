"""Bounded autotuning: a few configurations, timed once per key, remembered on disk.

``pick(kernel, key, configs, run, x)`` returns one of ``configs`` (dicts, the likeliest first). The first of them is
taken without timing in the interpreter, during a CUDA graph capture, and when ``STEN_AUTOTUNE=0``.
"""

import json
import os
import pathlib
import tempfile

import torch
import triton

from .library import INTERPRET, capturing

_chosen: dict[tuple, dict] = {}
_disk: dict[str, dict] | None = None
_ENABLED = os.environ.get("STEN_AUTOTUNE", "1") != "0"
REPEATS = 5
FLUSH_BYTES = 128 << 20  # larger than any L2, so that a small weight is timed from memory, as in a model


def pick(kernel: str, key: tuple, configs: list[dict], run, x: torch.Tensor) -> dict:
    """The fastest of ``configs`` for ``key``; ``run(config)`` launches the kernel once on the caller's tensors."""
    place = (kernel, key, x.device)
    found = _chosen.get(place)
    if found is not None:
        return found
    if INTERPRET or not _ENABLED or len(configs) == 1 or not x.is_cuda:
        _chosen[place] = configs[0]
        return configs[0]
    name = f"{kernel} {key} {torch.cuda.get_device_name(x.device)} triton {triton.__version__}"
    stored = _read().get(name)
    if stored in configs:  # a configuration that this version no longer offers is timed anew
        _chosen[place] = stored
        return stored
    if capturing(x):
        return configs[0]
    _chosen[place] = _fastest(configs, run, x)
    _write(name, _chosen[place])
    return _chosen[place]


def _fastest(configs, run, x):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=x.device)
    best, best_time = configs[0], float("inf")
    for config in configs:
        try:
            run(config)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
        times = []
        for _ in range(REPEATS):
            flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(config)
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        if sorted(times)[REPEATS // 2] < best_time:
            best, best_time = config, sorted(times)[REPEATS // 2]
    return best


def _path() -> pathlib.Path:
    root = os.environ.get("STEN_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "sten")
    return pathlib.Path(root) / "triton.json"


def _read() -> dict[str, dict]:
    global _disk
    if _disk is None:
        try:
            _disk = json.loads(_path().read_text())
        except (OSError, ValueError):
            _disk = {}
    return _disk


def _write(name: str, config: dict) -> None:
    """Adds one entry; replaces the file in one step, because other processes read and write it too."""
    global _disk
    _disk = None
    entries = _read()
    entries[name] = config
    try:
        _path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_path().parent, delete=False) as file:
            json.dump(entries, file, indent=1)
        os.replace(file.name, _path())
    except OSError:
        pass  # a read-only home only means that the next process times again
