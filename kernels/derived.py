"""What is computed once from a stored tensor and kept while it lives: an order of rows, a library's own format."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .library import capturing

_kept: dict[tuple, tuple] = {}


def derived(tag: str, make, *sources: torch.Tensor) -> tuple:
    """(``make()``, settled), kept until one of ``sources`` is written in place or its storage dies.

    What is kept is settled: the device has finished it, so that any stream may use it, and a kernel may read it even
    before it waits for the kernel before it. Inside a capture nothing is kept.
    """
    key, versions = [tag], []
    for t in sources:
        key += t.data_ptr(), t.shape
        versions.append(0 if t.is_inference() else t._version)
    key = tuple(key)
    found = _kept.get(key)
    if found is not None and found[0] == versions and not any(map(StorageWeakRef.expired, found[1])):
        return found[2], True
    first = sources[0]
    if capturing(first):
        return make(), False
    result = outside_of_pools(first.device, make)
    if first.is_cuda:
        torch.cuda.current_stream(first.device).synchronize()
    for other in [k for k, (_, refs, _) in _kept.items() if any(map(StorageWeakRef.expired, refs))]:
        del _kept[other]
    _kept[key] = (versions, [StorageWeakRef(t.untyped_storage()) for t in sources], result)
    return result, True


def outside_of_pools(device: torch.device, make):
    """``make()``, to be kept: a call that warms up a graph may give all memory of its stream, or of its thread, to that
    graph's pool, whose owner takes it back. So it runs on the default stream, then in a thread of its own."""
    if device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return make()
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)

    def elsewhere():
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(default):
            return make()

    default.wait_stream(current)
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(elsewhere).result()
    current.wait_stream(default)
    return result
