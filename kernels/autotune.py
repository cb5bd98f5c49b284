"""Bounded autotuning: a few configurations, timed once per key, remembered on disk.

``pick(kernel, key, configs, prepare, given)`` returns ``prepare(config)``, a callable, for one of ``configs`` (dicts,
the likeliest first). The first is taken without timing in the interpreter, during a CUDA graph capture, and when
``STEN_AUTOTUNE=0``.
"""

import json
import os
import pathlib
import statistics
import tempfile

import torch
import triton

from .library import INTERPRET, capturing, precision

_chosen: dict[tuple, dict] = {}
_disk: dict[str, dict] | None = None
_ENABLED = os.environ.get("STEN_AUTOTUNE", "1") != "0"
REPEATS, SHORT_REPEATS, SHORT_MS = 7, 21, 0.1  # a launch of microseconds is hard to tell from another: look more often
TIE = 1.02  # within which the likelier configuration, which stands before, is taken
FLUSH_BYTES = 128 << 20  # larger than any L2, so that a small weight is timed from memory, as in a model


def pick(kernel: str, key: tuple, configs: list[dict], prepare, given: tuple):
    """``prepare`` of the fastest of ``configs`` for ``key``; the first of the tensors ``given`` says the device.

    ``prepare(config)(*given)`` has to be one call of the kernel that may be repeated.
    """
    x = given[0]
    key = (*key, precision(x))
    place = (kernel, key, x.device)
    found = _chosen.get(place)
    if found is None:
        if INTERPRET or not _ENABLED or len(configs) == 1:
            found = configs[0]
        else:
            name = f"{kernel} {key} {torch.cuda.get_device_name(x.device)} triton {triton.__version__}"
            found = _read().get(name)
            if found not in configs:  # never timed, or a configuration that this version no longer offers
                if capturing(x):
                    return prepare(configs[0])
                found = _fastest(configs, prepare, given)
                _write(name, found)
        _chosen[place] = found
    return prepare(found)


def _fastest(configs, prepare, given):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=given[0].device)
    times = []
    for config in configs:
        try:
            call = prepare(config)
            for _ in range(2):  # the first call compiles, the second is launched as all later ones
                call(*given)
            times.append(_typical(call, given, flush))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            times.append(float("inf"))
    return next(config for config, spent in zip(configs, times, strict=True) if spent <= TIE * min(times))


def _typical(call, given, flush):
    """Milliseconds of a call, without what disturbs some of them: the mean of the faster half."""
    found = [_once(call, given, flush)]
    repeats = SHORT_REPEATS if found[0] < SHORT_MS else REPEATS
    found += [_once(call, given, flush) for _ in range(repeats - 1)]
    return statistics.mean(sorted(found)[: (repeats + 1) // 2])


def _once(call, given, flush):
    """Milliseconds of one call; the flush before it is long enough that the host has queued the call by its end."""
    flush.zero_()
    flush.zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call(*given)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


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
