"""What kernels ask of a GPU: its current stream, what it can do, empty memory, and whether a CUDA graph is captured.

Nothing else in this package asks ``torch.cuda``, the autotuner's timer apart. ``backend`` is the one of this process:
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
        """Whether tensors may lie on another GPU than the current one."""
        return torch.cuda.is_available() and torch.cuda.device_count() > 1

    def on(self, x: torch.Tensor):
        """Context in which the device of x is the current one: where Triton launches and memory is taken from."""
        return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

    @functools.cache  # noqa: B019 (one instance per process)
    def capability(self, device: torch.device) -> tuple[int, int]:
        """NVIDIA's compute capability; (0, 0) of any other device: an AMD GPU reports 9.4 and has no copy engine."""
        if INTERPRET or device.type != "cuda" or torch.version.hip is not None:
            return 0, 0
        return torch.cuda.get_device_capability(device)

    @functools.cache  # noqa: B019
    def _multiprocessors(self, device: torch.device) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def multiprocessors(self, x: torch.Tensor) -> int:
        """How many programs run at once at least; the interpreter gets a small number so that work is still split."""
        return self._multiprocessors(x.device) if x.is_cuda else 4

    def capturing(self, x: torch.Tensor) -> bool:
        """Whether the current stream records a CUDA graph, when nothing may be timed, synchronized or stored."""
        return x.is_cuda and _torch_private.stream_is_capturing()

    def on_default_stream(self, x: torch.Tensor) -> bool:
        """Whether launches on the GPU of x go to its default stream now: no capture is on it, no pool of a graph."""
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
        """Makes the context of the current device, which libraries beside torch want to find."""
        torch.cuda.current_blas_handle()

    def empty(self, like: torch.Tensor, *shape: int):
        """The function that makes an empty tensor of this shape, as ``like.new_empty`` would; to be called with the
        device of ``like`` current."""
        strides = tuple(math.prod(max(size, 1) for size in shape[place + 1 :]) for place in range(len(shape)))
        dtype, device = like.dtype, like.device
        allocate, fills = _torch_private.empty_strided, _torch_private.deterministic

        def plainly():
            return torch.empty(shape, dtype=dtype, device=device)

        if allocate is None or not like.is_cuda:
            return plainly
        return lambda: plainly() if fills() else allocate(shape, strides, dtype)


backend = Backend()
