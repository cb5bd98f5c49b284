"""The pattern cache: tables computed once from a stored tensor, cached until it is freed, at one address.

A key is a tag and the identity of each source's storage, address and shape. There is no limit: an entry is dropped when
one of its sources is freed. Versions of a *pattern* are not checked on a GPU: code that writes a pattern in place calls
``invalidate``. Versions of trained *values* (cuSPARSELt's form of a weight) are, since values change at every step, and
those of a pattern on the CPU, whose writes are noticed there.

| state of a key | reached by | a look-up | a look-up in a capture of a CUDA graph |
|---|---|---|---|
| absent | never looked up, or a source was freed | makes it: ready | makes its own: not cached, not ready |
| ready | the device has finished it | returns it | returns it; of values that are trained or changed, its own |
| outdated | values were written, or a pattern in a capture | makes it in place: queued, ready | makes its own |
| queued | as above | returns it; other streams wait | makes its own |
| invalidated | ``invalidate`` | (made in place at once: ready) | (a recorded graph reads the new one) |

*Ready* also means that a kernel may read it before it waits for the previous kernel (``pdl``). The address stays the
same as long as the shape does, since a recorded graph stores it. An intermediate tensor of a compiled graph must not be
a source: the graph reuses its memory.
"""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from ._torch_private import StorageWeakRef, dispatch_modes, storage_identity, stream_is_capturing
from .backend import backend

OUTDATED, NOTHING, REMEMBERED = (), ((), None), 1024
_entries: dict[tuple, "_Entry"] = {}
_constants: dict[tuple, torch.Tensor] = {}
_lock = threading.Lock()


class _Entry:
    """``versions``: of its source values; None for a pattern, or OUTDATED. ``changed``: the values were written since
    it was first made. ``make``: None for values, whose ``make`` comes with each call."""

    def __init__(self, make, sources, versions, result, changed=False, ready=True):
        self.make, self.versions, self.result, self.changed, self.ready = make, versions, result, changed, ready
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in sources]

    def valid(self) -> bool:
        return not any(storage.expired() for storage in self.storages)


class Derived:
    """A cached ``make(*sources)``; it remembers the entries of its last sources, since weights may share a launch.

    Call it with the sources; it returns (tensor, ready). ``values``: the sources' versions are checked, as of trained
    values; then ``make`` may differ from call to call, as it may read other tensors too.
    """

    def __init__(self, tag: str, make=None, values: bool = False):
        self.tag, self.make, self.values = tag, make, values
        # id of the first source -> weak references to the sources, and to their entry; other sources may have that id
        self.last: dict[int, tuple] = {}

    def __call__(self, *sources: torch.Tensor, make=None) -> tuple[torch.Tensor, bool]:
        last, entry = self.last.get(id(sources[0]), NOTHING)
        entry = entry() if entry is not None else None
        for previous, source in zip(last, sources, strict=False):
            if previous() is not source:
                entry = None
        if entry is None or entry.versions is not None:
            entry = self._entry(sources, make or self.make)
            if isinstance(entry, torch.Tensor):
                return entry, False  # made in a capture
        first = sources[0]
        if first.is_cuda and not backend.on_default_stream(first):  # which allocated and computed it
            current, default = backend.streams(first.device)
            if not entry.ready and not backend.capturing(first):
                current.wait_stream(default)
            entry.result.record_stream(current)
        return entry.result, entry.ready

    def _entry(self, sources, make):
        """The entry, or, in a capture that cannot use it, the tensor itself."""
        key, first = (self.tag, *map(_identity, sources)), sources[0]
        versions = [_version(t) for t in sources] if self.values else None
        entry = _entries.get(key)
        if entry is None or entry.versions != versions:
            if backend.capturing(first):
                return make(*sources)
            entry = _make(key, make, sources, versions)
        elif self.values and (entry.changed or first.requires_grad) and backend.capturing(first):
            return make(*sources)
        if len(self.last) >= REMEMBERED:
            self.last.clear()
        self.last[id(first)] = tuple(map(weakref.ref, sources)), weakref.ref(entry)
        return entry


def _identity(t):
    """The key of a tensor: its storage as well as its address, which another storage may take over when the first is
    freed. An entry holds weak references to its storages, so that no other gets their identity."""
    return storage_identity(t), t.data_ptr(), t.shape


def _version(t):
    return 0 if t.is_inference() else t._version


def _make(key, make, sources, versions):
    """The entry, made by the first thread; at the address of an older entry."""
    with _lock:
        old = _entries.get(key)
        if old is not None and old.versions == versions:
            return old
        # trained values change at every step: the host does not wait each time
        changed = old is not None and versions is not None
        result = outside_of_pools(sources[0].device, lambda: _at_same_address(old, make(*sources)), wait=not changed)
        for other in [k for k, entry in _entries.items() if not entry.valid()]:
            del _entries[other]
        remake = make if versions is None else None
        entry = _entries[key] = _Entry(remake, sources, versions, result, changed, not changed)
        return entry


def _at_same_address(old, result):
    return result if old is None or old.result.shape != result.shape else old.result.copy_(result)


def invalidate(*pattern: torch.Tensor) -> None:
    """Make again, in place, what was derived from these tensors, which have been written in place.

    Pass the tensors themselves or views of their storages; another storage over the same memory is not recognized. Only
    entries all of whose sources are passed are made again. A CUDA graph recorded before reads the new tables. In a
    capture, whose graph writes the pattern at each replay, later calls of that capture make tables of their own.
    """
    by_identity = {_identity(t): t for t in pattern}
    with _lock:
        for key, entry in list(_entries.items()):
            if all(identity in by_identity for identity in key[1:]):
                sources = [by_identity[identity] for identity in key[1:]]
                if entry.make is None or backend.capturing(sources[0]):
                    entry.versions = OUTDATED
                    continue
                made = lambda entry=entry, sources=sources: _at_same_address(entry, entry.make(*sources))  # noqa: E731
                entry.result, entry.versions = outside_of_pools(sources[0].device, made), None


def cacheable(device: torch.device) -> bool:
    """Whether a tensor made now may be cached: not in a trace, nor in a capture of a CUDA graph."""
    return not dispatch_modes() and not (device.type == "cuda" and stream_is_capturing())


def constant(key: tuple, device: torch.device, make) -> torch.Tensor:
    """``make()``, a small table that depends on no weight, cached for each key and device until the process ends."""
    cached = None if dispatch_modes() else _constants.get((key, device))
    if cached is None and not cacheable(device):
        return make()
    return _constants.setdefault((key, device), outside_of_pools(device, make)) if cached is None else cached


def outside_of_pools(device: torch.device, make, wait: bool = True) -> torch.Tensor:
    """``make()`` with memory that no CUDA graph's pool owns; with ``wait``, the device has finished it on return.

    While a graph is warmed up, all memory of the stream, or of the thread, may come from that graph's pool, and is
    freed with it. So it is made on the default stream; if the call is on another stream, in another thread.
    """

    def make_here():
        with torch.inference_mode(False), torch.no_grad():  # it may be written in place later
            return make()

    if device.type != "cuda":
        return make_here()
    current, default = backend.streams(device)

    def make_on_default():
        with backend.on_stream(default):
            return make_here()

    if current == default:
        result = make_here()
    else:
        default.wait_stream(current)
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(make_on_default).result()
    if wait or current != default:
        default.synchronize()
    return result
