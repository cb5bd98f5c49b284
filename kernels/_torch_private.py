"""The private parts of torch that kernels use, each with a public fallback that is slower and safe.

``NAMES`` lists them for a test that fails when torch no longer has one; no other module of this package uses
``torch._C``.
"""

import torch

NAMES = (
    "_C._cuda_getCurrentRawStream",
    "_C._cuda_getDevice",
    "_C._cuda_isCurrentStreamCapturing",
    "_C._dynamo.guards._empty_strided_cuda",
    "_C._get_deterministic_algorithms",
    "_C._len_torch_dispatch_stack",
    "multiprocessing.reductions.StorageWeakRef",
    "_subclasses.functional_tensor.FunctionalTensorMode",
    "compiler._is_exporting_flag",
)


def _fetch(name: str, fallback):
    value = torch
    for part in name.split("."):
        value = getattr(value, part, None)
    return fallback if value is None else value


class _AlwaysExpired:
    """Replaces torch's weak reference to a storage where torch has none: nothing is cached then."""

    def __init__(self, storage):
        pass

    def expired(self) -> bool:
        return True


# stream(device index) -> the handle of the current stream; 0 is the default stream
raw_stream = _fetch(NAMES[0], lambda index: torch.cuda.current_stream(index).cuda_stream)
current_device = _fetch(NAMES[1], torch.cuda.current_device)
stream_is_capturing = _fetch(NAMES[2], torch.cuda.is_current_stream_capturing)
# (shape, strides, dtype) -> empty tensor on the current device, as torch.compile's generated code allocates: a few
# microseconds less host time than torch.empty. None: use torch.empty. It does not fill memory in deterministic mode.
empty_strided = _fetch(NAMES[3], None)
deterministic = _fetch(NAMES[4], torch.are_deterministic_algorithms_enabled)
dispatch_modes = _fetch(NAMES[5], lambda: 1)  # number of active modes; 1 if unknown
StorageWeakRef = _fetch(NAMES[6], _AlwaysExpired)
FunctionalTensorMode = _fetch(NAMES[7], None)  # active while a graph for a compiler is made; None: it sees operators


def exports() -> bool:
    """Whether torch.export traces, whose graphs keep operators whole."""
    return getattr(torch.compiler, "_is_exporting_flag", True)


def storage_identity(t: torch.Tensor):
    """Equal for two tensors on one storage, and for no other storage while a ``StorageWeakRef`` to it is held."""
    return getattr(t.untyped_storage(), "_cdata", None) or object()
