"""The split-K workspace: where the programs that share one output tile put their partial sums, and count themselves in.

It holds no decision. Per GPU: partial sums (fp32, whatever they hold), reused by launches on the default stream up to
``KEPT`` numbers, since those follow each other; on other streams, and beyond that size, they are taken from torch for
each launch. Per GPU and stream: counters, zero before each launch and left zero by it. A launch that a CUDA graph
records gets counters of its own, cut off a block of ``BLOCK``, as its replay may run beside anything; outside of a
capture a new block is begun when half is used, and the old one stays for the graphs that were recorded with it. In a
capture that uses up the block, the graph zeroes counters by one more kernel.
"""

import functools
import threading

import torch

from .backend import DEFAULT_STREAM, backend
from .pattern_cache import outside_of_pools


class Workspace:
    """See the module. ``take`` is all that a launch needs."""

    BLOCK = 1 << 20  # counters
    KEPT = 1 << 21  # partial sums

    def __init__(self):
        self._blocks, self._used, self._counters, self._sums, self._lock = {}, {}, {}, {}, threading.Lock()

    def take(self, x: torch.Tensor, tiles: int, shares: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(partial sums, counters) for ``shares`` of ``tiles``, of ``size`` elements each, for the next launch on the
        current stream of x; pointers that nobody follows where no tile is split."""
        if shares <= tiles:
            return x, x
        return self.partial_sums(x, shares * size), self.counters(x, tiles)

    def partial_sums(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """At least ``size`` fp32 numbers, whatever they hold, for the next launch on the current stream of x."""
        device = x.get_device()
        kept = x.is_cuda and size <= self.KEPT and backend.on_default_stream(x)
        held = self._sums.get(device) if kept else None
        if held is None or held.numel() < size:
            held = torch.empty(size, dtype=torch.float32, device=x.device)
            if kept:
                self._sums[device] = held
        return held

    def counters(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """At least ``size`` counters that are zero before the next launch on the current stream of x."""
        if not x.is_cuda:
            return torch.zeros(size, dtype=torch.int32)
        device = x.get_device()
        stream = backend.stream(device)
        if stream != DEFAULT_STREAM and backend.capturing(x):  # the default stream is never captured
            return self._cut(device, size)
        if self._used.get(device, self.BLOCK) > self.BLOCK // 2:  # captures took the rest
            self._begin_block(x.device)
        held = self._counters.get((device, stream))
        if held is None or held.numel() < size:
            held = self._counters[device, stream] = self._cut(device, max(size, 4096))
        return held

    def _begin_block(self, device):
        make = functools.partial(torch.zeros, self.BLOCK, dtype=torch.int32, device=device)
        block = outside_of_pools(device, make)
        with self._lock:
            self._blocks.setdefault(device.index, []).append(block)  # recorded graphs go on with the ones before
            self._used[device.index] = 0

    def _cut(self, device, size):
        with self._lock:
            start = self._used.get(device, self.BLOCK)
            if start + size > self.BLOCK:
                return torch.zeros(size, dtype=torch.int32, device=torch.device("cuda", device))
            self._used[device] = start + -(-size // 4) * 4  # each as aligned as the first: a launch relies on it
            return self._blocks[device][-1][start : start + size]


workspace = Workspace()
