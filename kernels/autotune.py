"""Bounded autotuning: a few configurations, timed once per key, stored in a file.

``pick(kernel, key, configs, prepare, tensors)`` returns ``prepare(config)``, a callable, for one of ``configs`` (dicts,
the likeliest first; duplicates count once). A key with its device is in one of four states:

| state | when | ``pick`` | next state |
|---|---|---|---|
| unknown | neither of the next two | under the lock: reads the file | in file, or timed |
| unknown, may not be timed | a CUDA graph is captured, or no memory for a timing | returns the first | unknown |
| in file | this or another process wrote one of ``configs`` | takes it | chosen |
| timed | the file has none of ``configs`` | writes the fastest to the file | chosen |
| chosen | this process took one | returns it: no lock, no file | chosen, until the process ends |

An unknown key goes to *chosen* with the first of ``configs``, nothing timed and nothing written, in Triton's
interpreter, where ``configs`` has one entry, and when timing is switched off.

Threads: one lock per process is held from reading the file to *chosen*, so that a key is timed once and two
timings do not disturb each other; it is reentrant, because ``prepare`` may pick for a launch inside its own. Do not
call ``pick`` holding a lock that ``prepare`` takes. Processes: the file is read, merged and replaced under an advisory
lock beside it, and the first to write a key decides it for all. A file that cannot be read, locked or written, and
entries that are not of this form, only mean that the next process times again.

Environment:

- ``STEN_AUTOTUNE=0`` switches timing off: every key takes the first of its configurations.
- ``STEN_CACHE_DIR`` is the folder of the file, ``triton.json`` (default ``~/.cache/sten``). One entry per kernel, key,
  name of the GPU and version of Triton; delete the file to time again.
"""

import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import threading
import time

import torch
import triton

from .backend import INTERPRET, backend
from .precision import precision

try:
    import fcntl
except ImportError:  # not POSIX: files are still replaced in one step, but two writers may lose an entry
    fcntl = None

REPEATS, SHORT_REPEATS, SHORT_MS = 7, 21, 0.1  # a launch of microseconds is noisy: measure more often
TIE = 1.02  # within which the likelier configuration, which stands before, is taken
FLUSH_BYTES = 128 << 20  # larger than any L2, so that a small weight is timed from memory, as in a model
CHAIN, CHAIN_BYTES = 8, 256 << 20  # short calls are timed in a row, as the layers of a model, each on its own copy
FILE_BYTES = 16 << 20  # what is larger was not written here
LOCK_SECONDS = 5  # a writer needs milliseconds: a process that holds the lock longer has stopped
DOES_NOT_FIT = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


class Timer:
    """All that the tuner needs of a GPU; tests use one with known costs."""

    def device_name(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)

    def usable(self, x: torch.Tensor) -> bool:
        """Whether work may be timed now: not while a CUDA graph is captured, which forbids synchronization."""
        return not backend.capturing(x)

    def milliseconds(self, call, chain, flush) -> float:
        """The time of one of several calls in a row. The flush before them is long enough that the host has queued
        them all when it ends."""
        for _ in range(2 + len(chain) // 2):
            flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for tensors in chain:
            call(*tensors)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / len(chain)


class Tuner:
    """The choices of one process; see the table of states above."""

    def __init__(self, timer, interpreted: bool = False):
        self.timer, self.interpreted = timer, interpreted
        self.chosen: dict[tuple, dict] = {}
        self.lock = threading.RLock()

    def pick(self, kernel: str, key: tuple, configs: list[dict], prepare, tensors: tuple):
        key = (kernel, (*key, precision(tensors[0].dtype)), tensors[0].device)
        config = self.chosen.get(key)
        if config is None:
            config = self._decide(key, _unique(configs), prepare, tensors)
        return prepare(config)

    def known(self, kernel: str, key: tuple, configs: list[dict], x: torch.Tensor) -> dict:
        """A copy of what ``pick`` took, or would without timing; for a trace, whose tensors cannot be timed."""
        key = (kernel, (*key, precision(x.dtype)), x.device)
        config = self.chosen.get(key)
        if config is None and not self.interpreted and os.environ.get("STEN_AUTOTUNE", "1") != "0":
            config = _matching_config(_read(_path()), self._name(key), configs)
        return dict(config if config in configs else configs[0])

    def _decide(self, key, configs, prepare, tensors):
        if self.interpreted or len(configs) == 1 or os.environ.get("STEN_AUTOTUNE", "1") == "0":
            return self.chosen.setdefault(key, configs[0])
        if not self.timer.usable(tensors[0]):  # without the lock: a capture must not wait for another thread's timing
            config = _matching_config(_read(_path()), self._name(key), configs)
            return configs[0] if config is None else self.chosen.setdefault(key, config)
        with self.lock:
            if key not in self.chosen:  # unless another thread chose meanwhile
                config = self._from_file_or_timed(self._name(key), configs, prepare, tensors)
                if config is None:
                    return configs[0]
                self.chosen[key] = config
            return self.chosen[key]

    def _from_file_or_timed(self, name, configs, prepare, tensors):
        config = _matching_config(_read(_path()), name, configs)
        if config is None:
            config = self._fastest(configs, prepare, tensors)
            if config is not None:
                config = _write(_path(), name, config, configs)
        return config

    def _name(self, key):
        kernel, settings, device = key
        return f"{kernel} {settings} {self.timer.device_name(device)} triton {triton.__version__}"

    def _fastest(self, configs, prepare, tensors):
        """None where there is no memory to time in."""
        try:
            flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=tensors[0].device)
        except torch.OutOfMemoryError:
            return None
        calls = []
        for config in configs:
            try:
                call = prepare(config)
                for _ in range(2):  # the first call compiles, the second is launched as all later ones
                    call(*tensors)
                calls.append((config, call))
            except DOES_NOT_FIT:
                pass  # a tile too large for this GPU
        if not calls:
            return configs[0]
        measure = self.timer.milliseconds
        short = min(measure(call, [tensors], flush) for _, call in calls for _ in range(3)) < SHORT_MS
        chain, repeats = (_chain(tensors), SHORT_REPEATS) if short else ([tensors], REPEATS)
        times = [_typical([measure(call, chain, flush) for _ in range(repeats)]) for _, call in calls]
        return next(config for (config, _), time_ms in zip(calls, times, strict=True) if time_ms <= TIE * min(times))


TUNER = Tuner(Timer(), interpreted=INTERPRET)


def pick(kernel: str, key: tuple, configs: list[dict], prepare, tensors: tuple):
    """``prepare`` of the fastest of ``configs`` for ``key``; ``tensors`` are the arguments.

    ``prepare(config)(*tensors)`` has to be one call of the kernel that may be repeated.
    """
    return TUNER.pick(kernel, key, configs, prepare, tensors)


def known(kernel: str, key: tuple, configs: list[dict], x: torch.Tensor) -> dict:
    """The one of ``configs`` that is known to be the fastest for ``key``, or the likeliest; nothing is timed."""
    return TUNER.known(kernel, key, configs, x)


def _unique(configs):
    return [config for number, config in enumerate(configs) if config not in configs[:number]]


def _chain(tensors):
    """``tensors`` and copies of it (of the large ones), so that each call reads its own from memory."""
    weight = sum(t.nbytes for t in tensors if t is not None)
    count = max(1, min(CHAIN, CHAIN_BYTES // max(weight, 1)))

    def copy(t):  # one with gaps is shared: a copy would have other strides than the launch was prepared for
        return t.clone() if t is not None and t.is_contiguous() and 8 * t.nbytes >= weight else t

    try:
        return [tensors] + [tuple(map(copy, tensors)) for _ in range(count - 1)]
    except torch.OutOfMemoryError:  # then calls are timed one by one, which is better than no product
        return [tensors]


def _typical(times):
    """The mean of the faster half: without calls that were disturbed."""
    return statistics.mean(sorted(times)[: (len(times) + 1) // 2])


def cache_folder() -> pathlib.Path | None:
    """The folder of what is kept from process to process; None where there is no home."""
    root = os.path.expanduser(os.environ.get("STEN_CACHE_DIR") or os.path.join("~", ".cache", "sten"))
    return None if root.startswith("~") else pathlib.Path(root)


def _path() -> pathlib.Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "triton.json"


def _read(path) -> dict[str, dict]:
    """The entries of the right form; files are replaced in one step, so that none is read half written."""
    try:
        if path is None or not path.is_file() or path.stat().st_size > FILE_BYTES:
            return {}
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # unreadable, not JSON, or nested without end
        return {}
    if not isinstance(entries, dict):
        return {}
    return {name: config for name, config in entries.items() if isinstance(config, dict)}


def _matching_config(entries, name, configs):
    """The one of ``configs`` that the file names; not the file's own object, where a number may be 64.0 or true."""
    return next((config for config in configs if config == entries.get(name)), None)


def _write(path, name, config, configs):
    """Adds an entry and returns it, or the one of ``configs`` that another process has written meanwhile."""
    try:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                entries = _read(path)
                earlier = _matching_config(entries, name, configs)
                if earlier is not None:
                    return earlier
                _replace(path, entries | {name: config})
    except OSError:
        pass  # a read-only home only means that the next process times again
    return config


def _replace(path, entries):
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            json.dump(entries, file, indent=1)
            file.close()  # all of it is written before it gets its name
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def _locked(path):
    """Hold the advisory lock, where the system and the file system have one; OSError when it is never released."""
    with open(path, "a") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield
