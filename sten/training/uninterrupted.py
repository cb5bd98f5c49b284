"""Writes that Ctrl-C does not cut in two, and random numbers that a failed update has not used up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A SIGINT that arrives in the block is delivered at its end: weights, patterns and optimizer change together.

    Only the main thread gets signals; elsewhere, and where the handler is not Python's, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            handler(*arrived[0])


@contextlib.contextmanager
def drawn_again(generator: torch.Generator) -> Iterator[None]:
    """If the block raises, the generator is as it was before: who tries again draws the same numbers."""
    state = generator.get_state()
    try:
        yield
    except BaseException:
        generator.set_state(state)
        raise
