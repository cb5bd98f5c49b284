"""Torch's databases of samples, which torch keeps for its own tests."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import torch

if importlib.util.find_spec("expecttest") is None:  # torch imports it for a base class that nothing here uses
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.testing._internal.common_methods_invocations as methods
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db
    from torch.testing._internal.opinfo.core import UnaryUfuncInfo

__all__ = ["dtype_of", "foreach_db", "module_db", "operator_db", "optim_db", "samples"]

operator_db = list(methods.op_db)
foreach_db = [
    info
    for kind in ("unary", "binary", "pointwise", "reduce", "other")
    for info in getattr(methods, f"foreach_{kind}_op_db", [])
]

LARGEST = 5000  # numbers in a tensor of a sample: small weights say the same, sooner
CANCELS = {"nn.functional.multi_head_attention_forward"}
LOOKED_AT = 150  # samples of one operator that are looked at


def dtype_of(info: Any) -> torch.dtype | None:
    """The floating-point dtype in which an operator is tried: float32, or float64 where it knows no other or where the
    numbers of its samples cancel, so that the dense float32 gradient itself has no right digit."""
    known = info.supported_dtypes("cpu")
    order = (torch.float64,) if info.name in CANCELS else (torch.float32, torch.float64)
    return next((dtype for dtype in order if dtype in known), None)


def samples(info: Any, dtype: torch.dtype) -> Iterator[tuple[tuple, dict]]:
    """(args, kwargs) of the first samples of an operator; the same ones in every run."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated = info.sample_inputs("cpu", dtype, requires_grad=False)
        for sample in itertools.islice(generated, LOOKED_AT):
            args = (sample.input, *sample.args)
            yield tuple(map(as_matrix, args)) if isinstance(info, UnaryUfuncInfo) else args, dict(sample.kwargs)


def as_matrix(a: Any) -> Any:
    """A vector of an elementwise operator as a matrix; anything else as it is."""
    vector = isinstance(a, torch.Tensor) and a.dim() == 1 and a.numel() > 3
    return a.detach()[: min(LARGEST, a.numel() // 2 * 2)].reshape(2, -1) if vector else a
