"""What is computed once from a stored tensor and kept while it lives: an order of rows, a library's own format."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .library import capturing

_kept: dict[tuple, tuple] = {}


def derived(tag: str, source: torch.Tensor, make):
    """``make()``, kept until ``source`` is written in place or its storage dies; not kept inside a capture."""
    key = (tag, source.data_ptr(), source.shape, source.device)
    version = 0 if source.is_inference() else source._version
    found = _kept.get(key)
    if found is not None and found[1] == version and not found[0].expired():
        return found[2]
    result = _outside_of_pools(source, make)
    if not capturing(source):
        for other in [k for k, entry in _kept.items() if entry[0].expired()]:
            del _kept[other]
        _kept[key] = (StorageWeakRef(source.untyped_storage()), version, result)
    return result


def _outside_of_pools(source: torch.Tensor, make):
    """``make()`` on the default stream: what another allocates may lie in the pool of a graph to be recorded."""
    if not source.is_cuda or capturing(source):
        return make()
    current, default = torch.cuda.current_stream(source.device), torch.cuda.default_stream(source.device)
    if current == default:
        return make()
    default.wait_stream(current)
    with torch.cuda.stream(default):
        result = make()
    current.wait_stream(default)
    return result
