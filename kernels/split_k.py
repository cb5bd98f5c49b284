"""The split-K workspace: partial sums and counters of the programs that share one output tile.

Per GPU: partial sums (fp32, uninitialized), reused by launches on the default stream up to ``MAX_SUMS`` elements, since
those launches run one after the other; on other streams, and beyond that size, each launch allocates them.

Per GPU and stream: counters, zero before each launch and left zero by it. A launch in a CUDA graph gets counters of its
own, a slice of a block of ``BLOCK``, as its replay may run concurrently with anything. Outside of a capture a new block
is allocated when half is used, and the old one stays for the graphs that were recorded with it. In a capture that uses
up the block, the graph zeroes counters by one more kernel.
"""

import functools
import threading

import torch

from .backend import DEFAULT_STREAM, backend
from .pattern_cache import outside_of_pools


class Workspace:
    """See the module. ``take`` is all that a launch needs."""

    BLOCK = 1 << 20  # counters
    MAX_SUMS = 1 << 21  # partial sums that are cached

    def __init__(self):
        self._blocks, self._used, self._counters, self._sums, self._lock = {}, {}, {}, {}, threading.Lock()

    def take(self, x: torch.Tensor, tiles: int, shares: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(partial sums, counters) for ``shares`` of ``tiles``, of ``size`` elements each, for the next launch on the
        current stream of x; unused pointers if no tile is split."""
        if shares <= tiles:
            return x, x
        return self.partial_sums(x, shares * size), self.counters(x, tiles)

    def partial_sums(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """At least ``size`` uninitialized fp32 elements for the next launch on the current stream of x."""
        device = x.get_device()
        cacheable = x.is_cuda and size <= self.MAX_SUMS and backend.on_default_stream(x)
        buffer = self._sums.get(device) if cacheable else None
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.float32, device=x.device)
            if cacheable:
                self._sums[device] = buffer
        return buffer

    def counters(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """At least ``size`` counters that are zero before the next launch on the current stream of x."""
        if not x.is_cuda:
            return torch.zeros(size, dtype=torch.int32)
        device = x.get_device()
        stream = backend.stream(device)
        if stream != DEFAULT_STREAM and backend.capturing(x):  # the default stream is never captured
            return self._slice(device, size)
        if self._used.get(device, self.BLOCK) > self.BLOCK // 2:  # captures use the rest
            self._add_block(x.device)
        buffer = self._counters.get((device, stream))
        if buffer is None or buffer.numel() < size:
            buffer = self._counters[device, stream] = self._slice(device, max(size, 4096))
        return buffer

    def _add_block(self, device):
        make = functools.partial(torch.zeros, self.BLOCK, dtype=torch.int32, device=device)
        block = outside_of_pools(device, make)
        with self._lock:
            self._blocks.setdefault(device.index, []).append(block)  # recorded graphs still use the older blocks
            self._used[device.index] = 0

    def _slice(self, device, size):
        with self._lock:
            start = self._used.get(device, self.BLOCK)
            if start + size > self.BLOCK:
                return torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device))
            self._used[device] = start + -(-size // 4) * 4  # a multiple of 16 bytes: a launch relies on the alignment
            return self._blocks[device][-1][start : start + size]


workspace = Workspace()
