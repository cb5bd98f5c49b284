"""What is computed once from a stored tensor and kept while it lives: an order of rows, a library's own format."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .library import capturing, on_default_stream

_kept: dict[tuple, "_Entry"] = {}
_turn = threading.Lock()


class _Entry:
    def __init__(self, make, sources, versions, result):
        self.make, self.versions, self.result, self.changed = make, versions, result, False
        self.storages = [StorageWeakRef(t.untyped_storage()) for t in sources]

    def alive(self):
        return not any(map(StorageWeakRef.expired, self.storages))


def derived(tag: str, make, *sources: torch.Tensor, renewed: bool = True) -> tuple[torch.Tensor, bool]:
    """(``make(*sources)``, settled), kept while the sources live; made again when one was written in place.

    What is kept is settled: the device has finished it, so that any stream may use it, and a kernel may read it even
    before it waits for the kernel before it. It keeps its address, which a recorded graph remembers. Whoever writes the
    sources where no call follows has to say so, by ``renew``. Where nobody does (``renewed`` is False: weights change
    at every step), a capture makes its own as soon as the sources were seen to change. What is made in a capture is
    neither kept nor settled. An inference tensor counts as never written.
    """
    key, versions = [tag], []
    for t in sources:
        key += t.data_ptr(), t.shape
        versions.append(0 if t.is_inference() else t._version)
    key = tuple(key)
    found, first = _kept.get(key), sources[0]
    if found is None or found.versions != versions or not found.alive():
        if capturing(first):
            return make(*sources), False
        found = _renewed(key, found, make, sources, versions, renewed)
    elif found.changed and not renewed and capturing(first):
        return make(*sources), False
    if first.is_cuda and not on_default_stream(first):
        found.result.record_stream(torch.cuda.current_stream(first.device))  # it was allocated for the default one
    return found.result, True


def _renewed(key, found, make, sources, versions, renewed):
    def made():
        result = make(*sources)
        if found is None or not found.alive() or found.result.shape != result.shape:
            return result
        return found.result.copy_(result)

    result = outside_of_pools(sources[0].device, made)
    with _turn:
        for other in [k for k, entry in _kept.items() if not entry.alive()]:
            del _kept[other]
        entry = _kept[key] = _Entry(make if renewed else None, sources, versions, result)
        entry.changed = found is not None and found.alive()
    return entry


def renew(*written: torch.Tensor) -> None:
    """What was derived from these tensors alone, which have been written in place, is made again where it lies."""
    places = {(t.data_ptr(), t.shape): t for t in written}
    for key, found in list(_kept.items()):
        pairs = list(zip(key[1::2], key[2::2], strict=True))
        if found.make is None or not found.alive() or not all(pair in places for pair in pairs):
            continue
        sources = [places[pair] for pair in pairs]
        derived(key[0], found.make, *sources)


def outside_of_pools(device: torch.device, make):
    """``make()``, to be kept, which the device has finished on return.

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
    default.synchronize()
    return result
