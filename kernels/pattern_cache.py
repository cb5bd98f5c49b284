"""The pattern cache: what is computed once from a stored tensor and kept while it lives, at one address.

A key is a tag and the identity of each source's storage, address and shape. There is no limit: an entry goes when one
of its sources is freed. What follows a *pattern* does not look at versions: whoever writes a pattern in place calls
``invalidate``. What follows trained *values* (cuSPARSELt's form of a weight) does, since they change at every step.

| state of a key | how it comes about | a look-up | and in a capture of a CUDA graph |
|---|---|---|---|
| absent | never looked up, or a source is freed | makes it: ready | makes its own: not kept, not ready |
| ready | the device has finished it | returns it | returns it; of values that are trained or changed, its own |
| outdated | values were written, or a pattern in a capture | makes it in place: queued, ready | makes its own |
| queued | as above | returns it; other streams wait | makes its own |
| invalidated | by ``invalidate`` | (made in place at once: ready) | (a recorded graph reads the new one) |

*Ready* also means that a kernel may read it before it waits for the kernel before it (``pdl``). It keeps its address as
long as its shape, which a recorded graph remembers. What a compiled graph computes on its way must not be a source:
the graph uses its memory again.
"""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

from ._torch_private import StorageWeakRef, dispatch_modes, storage_identity, stream_is_capturing
from .backend import backend

OUTDATED = ()
_entries: dict[tuple, "_Entry"] = {}
_constants: dict[tuple, torch.Tensor] = {}
_lock = threading.Lock()


class _Entry:
    """``versions``: of the values that it follows; None of a pattern, or OUTDATED. ``changed``: the values were written
    since it was first made. ``make``: of a pattern alone, as values are followed by calls."""

    def __init__(self, make, sources, versions, result, changed=False, ready=True):
        self.make, self.versions, self.result, self.changed, self.ready = make, versions, result, changed, ready
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in sources]

    def alive(self) -> bool:
        return not any(storage.expired() for storage in self.storages)


class Derived:
    """``make(*sources)`` of the tensors that one launch reads; it remembers the entry of the last ones.

    Call it with the sources: (tensor, ready). ``values``: the source is trained, its version is looked at; then
    ``make`` may differ from call to call, as it reads other tensors too.
    """

    def __init__(self, tag: str, make=None, values: bool = False):
        self.tag, self.make, self.values = tag, make, values
        self.last = (), None  # weak references to the sources, and to their entry

    def __call__(self, *sources: torch.Tensor, make=None) -> tuple[torch.Tensor, bool]:
        last, entry = self.last
        entry = entry() if entry is not None else None
        for known, source in zip(last, sources, strict=False):
            if known() is not source:
                entry = None
        if entry is None or entry.versions is not None:
            entry = self._find(sources, make or self.make)
            if isinstance(entry, torch.Tensor):
                return entry, False  # made in a capture
        first = sources[0]
        if first.is_cuda and not backend.on_default_stream(first):  # for which it was allocated, and where it was made
            current, default = backend.streams(first.device)
            if not entry.ready and not backend.capturing(first):
                current.wait_stream(default)
            entry.result.record_stream(current)
        return entry.result, entry.ready

    def _find(self, sources, make):
        """The entry, or, in a capture that cannot use it, the tensor itself."""
        key, first = (self.tag, *map(_place, sources)), sources[0]
        versions = [_version(t) for t in sources] if self.values else None
        entry = _entries.get(key)
        if entry is None or entry.versions != versions:
            if backend.capturing(first):
                return make(*sources)
            entry = _make(key, make, sources, versions)
        elif self.values and (entry.changed or first.requires_grad) and backend.capturing(first):
            return make(*sources)
        self.last = tuple(map(weakref.ref, sources)), weakref.ref(entry)  # at once: other threads look here
        return entry


def _place(t):
    """Whose memory, not only where: at one address another storage may lie, when the first one was emptied. An entry
    holds on to the identity of its storages, which no other takes on before."""
    return storage_identity(t), t.data_ptr(), t.shape


def _version(t):
    return 0 if t.is_inference() else t._version


def _make(key, make, sources, versions):
    """The entry made by the first thread that comes; in place of an older one, and where that one lay."""
    with _lock:
        old = _entries.get(key)
        if old is not None and old.versions == versions:
            return old
        # values that are trained change at every step: the host does not wait for each form
        changed = old is not None and versions is not None
        result = outside_of_pools(sources[0].device, lambda: _at_its_place(old, make(*sources)), wait=not changed)
        for other in [k for k, entry in _entries.items() if not entry.alive()]:
            del _entries[other]
        kept = make if versions is None else None
        entry = _entries[key] = _Entry(kept, sources, versions, result, changed, not changed)
        return entry


def _at_its_place(old, result):
    return result if old is None or old.result.shape != result.shape else old.result.copy_(result)


def invalidate(*pattern: torch.Tensor) -> None:
    """What was derived from these tensors alone, which have been written in place, is made again where it lies.

    They are the tensors themselves or views of their storages; another storage over the same memory is not recognized.
    A CUDA graph that was recorded before reads the new tables. In a capture, whose graph writes the pattern at each
    replay, later calls of that capture make tables of their own.
    """
    places = {_place(t): t for t in pattern}
    with _lock:
        for key, entry in list(_entries.items()):
            if entry.make is not None and all(place in places for place in key[1:]):
                sources = [places[place] for place in key[1:]]
                if backend.capturing(sources[0]):
                    entry.versions = OUTDATED
                    continue
                made = lambda entry=entry, sources=sources: _at_its_place(entry, entry.make(*sources))  # noqa: E731
                entry.result, entry.versions = outside_of_pools(sources[0].device, made), None


def lasting(device: torch.device) -> bool:
    """Whether what is made now may be kept: not what a trace or a capture of a CUDA graph makes."""
    return not dispatch_modes() and not (device.type == "cuda" and stream_is_capturing())


def constant(key: tuple, device: torch.device, make) -> torch.Tensor:
    """``make()``, a small table that depends on no weight, kept for each key and device as long as the program runs."""
    found = None if dispatch_modes() else _constants.get((key, device))
    if found is None and not lasting(device):
        return make()
    return _constants.setdefault((key, device), outside_of_pools(device, make)) if found is None else found


def outside_of_pools(device: torch.device, make, wait: bool = True) -> torch.Tensor:
    """``make()``, to be kept, which the device has finished on return, unless the caller need not ``wait``.

    A call that warms up a graph may give all memory of its stream, or of its thread, to that graph's pool, whose owner
    takes it back. So it is made on the default stream; where the call is on another, in a thread of its own.
    """

    def plainly():
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be written in place later
            return make()

    if device.type != "cuda":
        return plainly()
    current, default = backend.streams(device)

    def elsewhere():
        with backend.on_stream(default):
            return plainly()

    if current == default:
        result = plainly()
    else:
        default.wait_stream(current)
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(elsewhere).result()
    if wait or current != default:
        default.synchronize()
    return result
