"""A product bound to its weight: a call goes from the activations to the launch with one look-up.

An ordinary call asks who watches, which kernel serves, and which plan is made for tensors like these, and looks at
every stored tensor on the way. That is more host time than the launch. Here the answers are kept together.
"""

from collections.abc import Callable
from operator import is_
from typing import NamedTuple

import torch

from .library import appearance, capturing, decision, precision, watched

KEPT = 64  # kinds of activations


class _Decision(NamedTuple):
    """The call, where its tensors lie, those between x and the bias, and those after it."""

    run: Callable
    lie: list
    before: list
    after: list


def bind(product, parts: dict):
    """(x, bias, checked) -> ``product(x, bias)`` for the weight that ``parts`` stores, or None: it has to be asked.

    ``product`` is one operator of this package, called with x, the bias, tensors of ``parts`` as they are then, and
    others that live as long as the program. It has to be asked for operands that are not ``checked`` and unlike any
    before, where somebody watches, where x lies on another device than the current one, and for what cannot be planned
    now: a kind of activations that a graph capture is the first to bring. A part that was replaced, moved, emptied or
    cut is noticed at each call.
    """
    held, decisions = (), {}

    def call(x, bias, checked):
        nonlocal held, decisions
        if watched((x, bias)) or (x.is_cuda and x.get_device() != torch._C._cuda_getDevice()):
            return None
        stored = parts.values()
        if torch.is_grad_enabled() and any(part.requires_grad for part in stored):
            return None
        if not all(map(is_, stored, held)) or not held:
            held, decisions = tuple(stored), {}  # what was replaced is not held here either
        kept, key = decisions, (appearance(x), appearance(bias), precision(x))
        found = kept.get(key)
        if found is None or found.lie != _lie(found.before):
            if not checked or capturing(x) or watched(stored):
                return None
            found = _decided(product, x, bias, stored)
            if found is None:
                return None
            if len(kept) >= KEPT:
                kept.clear()
            kept[key] = found
        return found.run(x, *found.before, bias, *found.after)

    return call


def _lie(tensors):
    """Where they lie and how large they are, which may change in place."""
    return [(t.data_ptr(), t.shape) for t in tensors]


def _decided(product, x, bias, stored):
    """The decision, or None: the bias was copied, since it was not contiguous, or it is another operand too."""
    told = decision(product, x, bias)
    if told is None or bias is x or any(part is bias for part in stored):
        return None
    run, (_, *rest) = told
    for place, t in enumerate(rest):
        if t is bias:
            return _Decision(run, _lie(rest[:place]), rest[:place], rest[place + 1 :])
    return None
