"""The arguments of each block, batch by batch: captured in forward passes of the model, or the outputs of the last."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from .data import Calibration, on_device, run_batch
from .trace import Call, Kept, Out, filled, hooked, streamed
from .trees import Path, at, leaves


class _Captured(Exception):
    """Ends a forward pass when the arguments of a block are known."""


class Shelf:
    """Where tensors wait for the next block: in their place, on the CPU, or in files of a temporary folder."""

    def __init__(self, offload: str | os.PathLike | None) -> None:
        self.to_cpu = offload is not None
        self.folder = None
        if offload is not None and str(offload) != "cpu":
            self.folder = tempfile.TemporaryDirectory(prefix="sten-calibration-", dir=offload)
        self.count = 0

    def put(self, leaf: Any) -> Callable[[], Any]:
        """What gives the leaf again; its memory is free when that is dropped."""
        if not isinstance(leaf, Tensor) or not self.to_cpu:
            return lambda: leaf
        home, there = leaf.device, _alone(leaf.cpu())
        if self.folder is None:
            return lambda: there.to(home)
        self.count += 1
        return _OnDisk(File(self.folder.name) / f"{self.count}.pt", there, home)

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()


def _alone(t: Tensor) -> Tensor:
    """The tensor without the rest of a larger storage, of which it is a view: that would be kept, or written, whole."""
    return t if t.untyped_storage().nbytes() <= t.numel() * t.element_size() else t.clone()


class _OnDisk:
    def __init__(self, path: File, t: Tensor, home: torch.device) -> None:
        self.path, self.home = path, home
        torch.save(t, path)

    def __call__(self) -> Tensor:
        return torch.load(self.path, weights_only=True).to(self.home)

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


class BlockInputs:
    """The arguments of the present block for every batch.

    `capture` and `advance` go to a block; `arguments` gives what it gets.
    """

    def __init__(self, model: nn.Module, calls: list[Call], calibration: Calibration, shelf: Shelf) -> None:
        self.model, self.calls, self.calibration, self.shelf = model, calls, calibration, shelf
        self.device = calibration.device
        count = len(calibration.batches)
        self.kept: list[dict[Kept, Callable]] = [{} for _ in range(count)]
        self.outs: list[dict[Path, Callable]] = [{} for _ in range(count)]

    def capture(self, k: int, decided: AbstractContextManager) -> None:
        """Catch the calls of block k in forward passes of the model with the weights that `decided` puts in place."""
        call, caught = self.calls[k], []

        def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
            caught.append((args, kwargs))
            raise _Captured

        with contextlib.ExitStack() as stack:
            stack.enter_context(decided)
            hooked(stack, call.module.register_forward_pre_hook(catch, with_kwargs=True))
            streamed([other.module for other in self.calls[:k]], self.device, stack)
            for b, batch in enumerate(self.calibration.batches):
                with contextlib.suppress(_Captured):
                    run_batch(self.model, batch, b)
                if len(caught) <= b:
                    raise ValueError(
                        f"Expected every batch of calibration= to call {call.name}, as the first does, got batch {b}, "
                        "which does not; pass batches of one kind."
                    )
                wanted = call.sources(Kept) | self._later(k)
                tree, caught[b] = caught[b], None
                for path, leaf in leaves(tree):
                    if Kept(k, path) in wanted:
                        self.kept[b][Kept(k, path)] = self.shelf.put(leaf)
                self.outs[b] = {}

    def arguments(self, k: int, b: int) -> tuple[tuple, dict]:
        """(args, kwargs) of block k; tensors that come from the block before are copies, which it may write."""
        call = self.calls[k]
        kept = {source: self.kept[b][source]() for source in call.sources(Kept)}
        outs = {source.path: self.outs[b][source.path]() for source in call.sources(Out)}
        for values in (kept, outs):
            values |= {key: t.clone() for key, t in values.items() if isinstance(t, Tensor) and t.is_floating_point()}
        return on_device(filled(call.template, kept, outs), self.device)

    def linked(self, k: int) -> bool:
        """Whether there is a block k that gets outputs of the block before."""
        return k < len(self.calls) and not self.calls[k].starts

    def advance(self, k: int, b: int, output: Any) -> None:
        """Note what block k + 1 gets of the output of block k."""
        paths = {source.path for source in self.calls[k + 1].sources(Out)}
        self.outs[b] = {path: self.shelf.put(at(output, path)) for path in paths}

    def drop(self, k: int) -> None:
        """Free what no block after block k gets."""
        later = self._later(k)
        for b, kept in enumerate(self.kept):
            self.kept[b] = {source: value for source, value in kept.items() if source in later}
            if not self.linked(k + 1):
                self.outs[b] = {}

    def _later(self, k: int) -> set[Kept]:
        return set().union(*(call.sources(Kept) for call in self.calls[k + 1 :]))
