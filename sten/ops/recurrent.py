"""Fused recurrent layers (LSTM, GRU, RNN) run on dense copies, differentiably, with one warning."""

from __future__ import annotations

import torch

from .._torch_private import fused_recurrent, tree_leaves, tree_map
from ..dispatch import warn_densified
from ..tensor import SparseTensor, function

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FUSED = [getattr(fused_recurrent, kind + ending) for kind in KINDS for ending in ("", "_cell")]


def _dense_rule(fused):
    def rule(*args, **kwargs):
        first = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, SparseTensor))
        warn_densified(fused.__name__, first)
        args, kwargs = tree_map(lambda a: a.to_dense() if isinstance(a, SparseTensor) else a, (args, kwargs))
        return fused(*args, **kwargs)

    return rule


for _fused in FUSED:
    function(_fused, getattr(torch, _fused.__name__))(_dense_rule(_fused))
