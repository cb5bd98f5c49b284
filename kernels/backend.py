"""Backend: current stream, capabilities and allocator of the GPU, and whether a CUDA graph is captured.

Only this module and the autotuner's timer use ``torch.cuda``. ``backend`` is the one of this process:
NVIDIA's and AMD's GPUs, or Triton's interpreter (TRITON_INTERPRET=1), which runs kernels on the CPU.
"""

import contextlib
import functools
import math
import os

import torch

from . import _torch_private

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEFAULT_STREAM = 0


class Backend:
    """The devices of this process. ``stream`` and ``device`` are torch's own functions: they are called before every
    launch."""

    def __init__(self):
        self.stream = _torch_private.raw_stream  # device index -> handle of the current stream
        self.device = _torch_private.current_device  # -> index of the current device

    @functools.cached_property
    def several(self) -> bool:
        """Whether tensors may be on another GPU than the current one."""
        return torch.cuda.is_available() and torch.cuda.device_count() > 1

    def on(self, x: torch.Tensor):
        """Context in which the device of x is the current one: where Triton launches and memory is taken from."""
        return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

    @functools.cache  # noqa: B019 (one instance per process)
    def capability(self, device: torch.device) -> tuple[int, int]:
        """NVIDIA's compute capability; (0, 0) of any other device: an AMD GPU reports 9.4 and has no TMA."""
        if INTERPRET or device.type != "cuda" or torch.version.hip is not None:
            return 0, 0
        return torch.cuda.get_device_capability(device)

    @functools.cache  # noqa: B019
    def _multiprocessors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def multiprocessors(self, x: torch.Tensor) -> int:
        """The number of multiprocessors; the interpreter gets a small number so that work is still split."""
        return self._multiprocessors(x.device) if x.is_cuda else 4

    @functools.cache  # noqa: B019
    def shared_memory(self, device: torch.device) -> int:
        """The bytes of shared memory that a CTA may have."""
        return torch.cuda.get_device_properties(device).shared_memory_per_block_optin

    def capturing(self, x: torch.Tensor) -> bool:
        """Whether the current stream captures a CUDA graph: nothing may be timed, synchronized or stored then."""
        return x.is_cuda and _torch_private.stream_is_capturing()

    def on_default_stream(self, x: torch.Tensor) -> bool:
        """Whether the current stream on the GPU of x is the default stream, which is never captured."""
        return self.stream(x.get_device()) == DEFAULT_STREAM

    def streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """(current, default) stream."""
        return torch.cuda.current_stream(device), torch.cuda.default_stream(device)

    def on_stream(self, stream: torch.cuda.Stream):
        """Context in which the stream is current, and its device."""
        return torch.cuda.stream(stream)

    def has_cusparselt(self) -> bool:
        """Whether the current GPU has sparse tensor cores and torch ships the library for them."""
        if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
            return False
        return self.capability(torch.device("cuda", torch.cuda.current_device()))[0] >= 8

    def initialize(self) -> None:
        """Create the context of the current device, which libraries other than torch expect."""
        torch.cuda.current_blas_handle()

    def empty(self, like: torch.Tensor, *shape: int):
        """A function that returns ``like.new_empty(shape)``, called while the device of ``like`` is current."""
        strides = tuple(math.prod(max(size, 1) for size in shape[d + 1 :]) for d in range(len(shape)))
        dtype, device = like.dtype, like.device
        allocate, fills = _torch_private.empty_strided, _torch_private.deterministic

        def torch_empty():
            return torch.empty(shape, dtype=dtype, device=device)

        if allocate is None or not like.is_cuda:
            return torch_empty
        return lambda: torch_empty() if fills() else allocate(shape, strides, dtype)


backend = Backend()
