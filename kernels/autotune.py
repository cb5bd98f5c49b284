"""Bounded autotuning: a few configurations, timed once per key, remembered on disk.

``pick(kernel, key, configs, prepare, given)`` returns ``prepare(config)``, a callable, for one of ``configs`` (dicts,
the likeliest first; one that comes again counts once). The first is taken without timing in the interpreter, during a
CUDA graph capture, and when ``STEN_AUTOTUNE=0``.
"""

import json
import os
import pathlib
import statistics
import tempfile

import torch
import triton

from .backend import INTERPRET, backend
from .precision import precision

_chosen: dict[tuple, dict] = {}
_disk: dict[str, dict] | None = None
_ENABLED = os.environ.get("STEN_AUTOTUNE", "1") != "0"
REPEATS, SHORT_REPEATS, SHORT_MS = 7, 21, 0.1  # a launch of microseconds is hard to tell from another: look more often
TIE = 1.02  # within which the likelier configuration, which stands before, is taken
FLUSH_BYTES = 128 << 20  # larger than any L2, so that a small weight is timed from memory, as in a model
CHAIN, CHAIN_BYTES = 8, 64 << 20  # short calls are timed in a row, as the layers of a model, each on its own copy


def pick(kernel: str, key: tuple, configs: list[dict], prepare, given: tuple):
    """``prepare`` of the fastest of ``configs`` for ``key``; the first of the tensors ``given`` says the device.

    ``prepare(config)(*given)`` has to be one call of the kernel that may be repeated.
    """
    x, configs = given[0], [config for place, config in enumerate(configs) if config not in configs[:place]]
    key = (*key, precision(x.dtype))
    place = (kernel, key, x.device)
    found = _chosen.get(place)
    if found is None:
        if INTERPRET or not _ENABLED or len(configs) == 1:
            found = configs[0]
        else:
            name = f"{kernel} {key} {torch.cuda.get_device_name(x.device)} triton {triton.__version__}"
            found = _read().get(name)
            if found not in configs:  # never timed, or a configuration that this version no longer offers
                if backend.capturing(x):
                    return prepare(configs[0])
                found = _fastest(configs, prepare, given)
                _write(name, found)
        _chosen[place] = found
    return prepare(found)


def _fastest(configs, prepare, given):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=given[0].device)
    calls = []
    for config in configs:
        try:
            call = prepare(config)
            for _ in range(2):  # the first call compiles, the second is launched as all later ones
                call(*given)
            calls.append((config, call))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            pass  # a tile that this GPU has no room for
    if not calls:
        return configs[0]
    short = min(_once(call, [given], flush) for _, call in calls for _ in range(3)) < SHORT_MS
    chain, repeats = (_chain(given), SHORT_REPEATS) if short else ([given], REPEATS)
    times = [_typical(call, chain, flush, repeats) for _, call in calls]
    return next(config for (config, _), spent in zip(calls, times, strict=True) if spent <= TIE * min(times))


def _chain(given):
    """``given`` and copies of it: of the tensors that weigh, so that each call reads its own from memory."""
    weight = sum(t.nbytes for t in given if t is not None)
    count = max(1, min(CHAIN, CHAIN_BYTES // max(weight, 1)))

    def copy(t):  # one with gaps is shared: its copy would have other strides than the launch was made for
        return t.clone() if t is not None and t.is_contiguous() and 8 * t.nbytes >= weight else t

    try:
        return [given] + [tuple(map(copy, given)) for _ in range(count - 1)]
    except torch.OutOfMemoryError:  # then calls are timed one by one, which is better than no product
        return [given]


def _typical(call, chain, flush, repeats):
    """Milliseconds of a call, without what disturbs some of them: the mean of the faster half."""
    found = [_once(call, chain, flush) for _ in range(repeats)]
    return statistics.mean(sorted(found)[: (repeats + 1) // 2])


def _once(call, chain, flush):
    """Milliseconds of one of several calls in a row; the flush before them is long enough that the host has queued
    them by its end."""
    for _ in range(2 + len(chain) // 2):
        flush.zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for given in chain:
        call(*given)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / len(chain)


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
        if not isinstance(_disk, dict):
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
