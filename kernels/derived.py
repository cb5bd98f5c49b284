"""What is computed once from a stored tensor and kept while it lives: an order of rows, a library's own format."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .library import capturing, on_default_stream

_kept: dict[tuple, "_Entry"] = {}
_turn = threading.Lock()


class _Entry:
    """``changed``: the sources were written since it was first made. ``settled``: the device has finished it."""

    def __init__(self, make, sources, versions, result, changed, settled):
        self.make, self.versions, self.result = make, versions, result
        self.changed, self.settled = changed, settled
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in sources]

    def alive(self):
        return not any(map(StorageWeakRef.expired, self.storages))


def derived(tag: str, make, *sources: torch.Tensor, renewed: bool = True) -> tuple[torch.Tensor, bool]:
    """(``make(*sources)``, settled), kept while the sources live; made again when one was written in place.

    What is settled the device has finished, so that any stream may use it, and a kernel may read it even before it
    waits for the kernel before it. It keeps its address, which a recorded graph remembers: whoever writes the sources
    where no call follows has to say so, by ``renew``. Where nobody does (``renewed`` is False: weights change at every
    step), a capture makes its own, if the first source is trained or was seen to change. What is made in a capture is
    neither kept nor settled. An inference tensor counts as never written, except by ``renew``. What a compiled graph
    computes on its way must not be a source: the graph uses its memory again and counts no version.
    """
    key, versions = (tag, *[_place(t) for t in sources]), [_version(t) for t in sources]
    found, first = _kept.get(key), sources[0]
    if found is None or found.versions != versions:
        if capturing(first):
            return make(*sources), False
        found = _made(key, make, sources, versions, renewed)
    elif not renewed and (found.changed or first.requires_grad) and capturing(first):
        return make(*sources), False
    if first.is_cuda and not on_default_stream(first):  # for which it was allocated, and where it was made
        current = torch.cuda.current_stream(first.device)
        if not found.settled and not capturing(first):
            current.wait_stream(torch.cuda.default_stream(first.device))
        found.result.record_stream(current)
    return found.result, found.settled


def _place(t):
    """Whose memory, not only where: at one address another storage may lie, when the first one was emptied. An entry
    holds on to the identity of its storages, which no other takes on before."""
    return t.untyped_storage()._cdata, t.data_ptr(), t.shape


def _version(t):
    return 0 if t.is_inference() else t._version


def _made(key, make, sources, versions, renewed, anyway=False):
    """The entry made by the first thread that comes; in place of an older one, and where that one lay."""
    with _turn:
        old = _kept.get(key)
        if old is not None and not anyway and old.versions == versions:
            return old

        def made():
            result = make(*sources)
            if old is None or old.result.shape != result.shape:
                return result
            return old.result.copy_(result)

        settled = renewed or old is None  # a trained weight changes at every step: the host does not wait for each
        result = outside_of_pools(sources[0].device, made, wait=settled)
        for other in [k for k, entry in _kept.items() if not entry.alive()]:
            del _kept[other]
        entry = _Entry(make if renewed else None, sources, versions, result, old is not None, settled)
        _kept[key] = entry
        return entry


def renew(*written: torch.Tensor) -> None:
    """What was derived from these tensors alone, which have been written in place, is made again where it lies. They
    are the tensors themselves or views of their storages; another storage over the same memory is not recognized."""
    places = {_place(t): t for t in written}
    for key, found in list(_kept.items()):
        if found.make is not None and all(place in places for place in key[1:]):
            sources = [places[place] for place in key[1:]]
            _made(key, found.make, sources, [_version(t) for t in sources], renewed=True, anyway=True)


def outside_of_pools(device: torch.device, make, wait: bool = True):
    """``make()``, to be kept, which the device has finished on return, unless the caller need not ``wait``.

    A call that warms up a graph may give all memory of its stream, or of its thread, to that graph's pool, whose owner
    takes it back. So it is made on the default stream; where the call is on another, in a thread of its own.
    """

    def plainly():
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be written in place later
            return make()

    if device.type != "cuda":
        return plainly()
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)

    def elsewhere():
        with torch.cuda.device(device), torch.cuda.stream(default):
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
