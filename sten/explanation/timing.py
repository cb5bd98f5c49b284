"""Times of calls that take turns, so that other load on the machine affects all of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE = 5e-4  # seconds of a sample at least, so that the clock's resolution does not matter
LEAST, MOST = 5, 51  # rounds

Run = tuple[Callable[[], contextlib.AbstractContextManager], Callable[[], Any]]  # what surrounds the calls; a call


@dataclass(frozen=True)
class Spread:
    """A measured number: its median and quartiles.

    Attributes:
        low, median, high: a quarter of the samples lies below `low`, a half below `median`, three quarters below
            `high`.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, median, high = (
            ordered[math.floor(at)] + (ordered[math.ceil(at)] - ordered[math.floor(at)]) * (at % 1)
            for at in (last / 4, last / 2, last * 3 / 4)
        )
        return cls(low, median, high)

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.low * factor, self.median * factor, self.high * factor)

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.low + other.low, self.median + other.median, self.high + other.high)


def wait(device: torch.device) -> None:
    """Wait until the device has done what was launched on it."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def take_turns(runs: Sequence[Run], device: torch.device, seconds: float) -> list[list[float]]:
    """Seconds of one call of each run, in at least five rounds, for about so many seconds in all.

    A sample is the mean over calls one after another; the device is waited for at its two ends. So launches overlap
    with what runs, as they do in a model. All samples of a round take about as long, because other load interrupts a
    longer one more often.
    """
    once = []
    for around, call in runs:
        with around():
            call()  # kernels are tuned, plans prepared
            call()
            once.append(max(_sample(call, 1, device), 1e-7))
    longest = max(SAMPLE, *once)
    loops = [math.ceil(longest / each) for each in once]
    whole = sum(count * each for count, each in zip(loops, once, strict=True))
    rounds = min(max(round(seconds / whole), LEAST), MOST)
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for (around, call), count, own in zip(runs, loops, found, strict=True):
            with around():
                own.append(_sample(call, count, device))
    return found


def _sample(call: Callable[[], Any], count: int, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    wait(device)
    return (time.perf_counter() - start) / count
