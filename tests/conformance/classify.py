"""What became of one call on sparse tensors, judged by the same call on their dense twins.

| outcome | what happened |
|---|---|
| right | the result and every argument are those of the dense twin |
| refused | sten raised one sentence, and nothing changed; `ADVICE` looks whether it says what would work |
| documented | what docs/semantics.md says: `in place with a number`, or `off the pattern` |
| skipped | the dense twin raises, too |
| wrong | another result, argument or gradient; or an act that was refused and changed something |
| lost | a write returned without an error, and the sparse tensor is as before while the dense twin changed |
| crash | any other exception, or the end of the process |
"""

from __future__ import annotations

import linecache
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import sten

OFF_PATTERN = "zero off the pattern, where the dense twin is infinite or NaN"
FAULTS = ("wrong", "lost", "crash")
OUTCOMES = ("right", "refused", "documented", *FAULTS, "skipped")
REFUSALS = (NotImplementedError, TypeError, ValueError, RuntimeError)
SOURCE = str(Path(sten.__file__).parent)
ADVICE = re.compile(
    r"\b(call|use|takes?|assign|expected|pass|give|store|register|convert|mask it|instead|choose|make)\b|to_dense",
    re.IGNORECASE,
)


class Verdict(NamedTuple):
    """An outcome and, where it is not right, one line that says why."""

    outcome: str
    detail: str = ""


Call = Callable[[list], Any]


def judge(
    call: Call, dense: list, sparse: list, writes: bool = False, scalar: bool = False, random: bool = False
) -> Verdict:
    """Play a call on dense arguments and on the same arguments with some of them sparse.

    Args:
        call: takes the arguments as a list; may write into them.
        dense: the arguments of the oracle.
        sparse: the same arguments, some of them SparseTensors.
        writes: whether the call is a write: only a write can be refused for being one.
        scalar: whether the call may write at the stored entries alone.
        random: whether its numbers are random, so that only shapes, dtypes and patterns can be compared.
    """
    before, masks = [copied(a) for a in dense], [mask_of(a) for a in sparse]
    try:
        want = played(call, dense)
    except Exception as error:
        return Verdict("skipped", line(error))
    try:
        got = played(call, sparse)
    except Exception as error:
        writes = writes or any(isinstance(a, Tensor) and not same(a, b) for a, b in zip(before, dense, strict=True))
        return after_error(error, before, sparse, writes)
    try:
        written = after_writes(before, dense, sparse, masks, scalar, random)
        if written.outcome != "right":
            return written
        return judged_result(want, got, sparse, random, written)
    except Exception as error:  # the result itself cannot be read
        return Verdict("crash", "reading the result: " + line(error))


def judged_result(want: Any, got: Any, arguments: list, random: bool, otherwise: Verdict) -> Verdict:
    """The verdict on a result, `otherwise` if there is nothing to say of it."""
    problem = difference(want, got, arguments, random)
    if problem and not difference(finite_at(got, want), got, arguments, random):
        return Verdict("documented", OFF_PATTERN)
    return Verdict("wrong", problem) if problem else otherwise


def finite_at(got: Any, want: Any) -> Any:
    """The result of the dense twin with zeros for what is not finite, off the pattern of a sparse result."""
    (gots, _), (wants, tree) = tree_flatten(got), tree_flatten(want)
    if len(gots) != len(wants):
        return want
    pairs = zip(gots, wants, strict=True)
    return tree_unflatten([finite(g, w) for g, w in pairs], tree)


def finite(got: Any, want: Any) -> Any:
    if not isinstance(got, sten.SparseTensor) or not isinstance(want, Tensor) or want.shape != got.shape:
        return want
    return want.masked_fill(~got.mask() & ~want.isfinite(), 0)


def played(call: Call, arguments: list) -> Any:
    """The result of the call with the random numbers of every other call (torch.manual_seed takes a millisecond)."""
    torch.default_generator.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(arguments)


def after_error(error: Exception, before: list, sparse: list, writes: bool) -> Verdict:
    """Refused by sten and nothing changed; else a crash, or wrong. Who writes nothing cannot be refused a write."""
    if not is_refusal(error) or (not writes and "an operator that can write to" in str(error)):
        return Verdict("crash", line(error))
    for index, (old, now) in enumerate(zip(before, sparse, strict=True)):
        if isinstance(old, Tensor) and not same(old, now):
            return Verdict("wrong", f"argument {index} changed though the call was refused: {line(error)}")
    return Verdict("refused", line(error))


def is_refusal(error: Exception) -> bool:
    """Whether the exception was raised by a `raise` in sten, with a sentence, or by torch for want of a storage."""
    if isinstance(error, RuntimeError) and "Cannot access data pointer" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, REFUSALS) or not frames or not frames[-1].filename.startswith(SOURCE):
        return False
    raised = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip().startswith("raise ")
    return raised and len(str(error)) > 20


def after_writes(before: list, dense: list, sparse: list, masks: list, scalar: bool, random: bool) -> Verdict:
    """Whether every argument is, after the call, what its dense twin is."""
    worst = Verdict("right")
    for index, (old, want, now, mask) in enumerate(zip(before, dense, sparse, masks, strict=True)):
        if not isinstance(old, Tensor):
            continue
        verdict = after_write(old, want, now, mask, scalar, random)
        if verdict.outcome in FAULTS:
            return Verdict(verdict.outcome, f"argument {index}: {verdict.detail}")
        if verdict.outcome == "documented":
            worst = verdict
    return worst


def after_write(old: Tensor, want: Tensor, now: Tensor, mask: Tensor | None, scalar: bool, random: bool) -> Verdict:
    """One argument before the call, what its dense twin is now, and what it is itself."""
    if same(want, now):
        return Verdict("right")
    if same(old, want):
        return Verdict("wrong", "changed, where the dense twin does not")
    if mask is None:
        return Verdict("right") if random and plain(now).shape == want.shape else Verdict("wrong", unequal(want, now))
    if want.shape == mask.shape and same(want.masked_fill(~mask & ~want.isfinite(), 0), now):
        return Verdict("documented", OFF_PATTERN)
    if scalar and want.shape == mask.shape and same(want.masked_fill(~mask, 0), now):
        return Verdict("documented", "at the stored entries alone")
    if same(old, now):
        return Verdict("lost", "the dense twin changed")
    if random and want.shape == mask.shape == now.shape and not plain(now).masked_fill(mask, 0).any():
        return Verdict("documented", "random numbers at the stored entries alone")
    return Verdict("wrong", unequal(want, now))


def difference(want: Any, got: Any, arguments: list, random: bool) -> str:
    """Why a result is not that of the dense twin; empty if it is. A returned argument was judged as an argument."""
    wants, gots = (list(map(as_tensor, tree_flatten(tree)[0])) for tree in (want, got))
    if len(wants) != len(gots):
        return f"{len(gots)} results instead of {len(wants)}"
    for w, g in zip(wants, gots, strict=True):
        if isinstance(w, Tensor) != isinstance(g, Tensor):
            return f"{type(g).__name__} instead of {type(w).__name__}"
        if not isinstance(w, Tensor):
            if w != g and w == w and not isinstance(w, torch.Generator):
                return f"{g!r} instead of {w!r}"[:200]
        elif any(g is a for a in arguments):
            continue
        elif random:
            if w.shape != g.shape or w.dtype != g.dtype:
                return f"{g.dtype} {tuple(g.shape)} instead of {w.dtype} {tuple(w.shape)}"
        elif not same(w, g):
            return unequal(w, g)
    return ""


def gradients(call: Call, arguments: list) -> list[Tensor | None]:
    """The gradient of each tensor argument, for fixed gradients of the results."""
    for a in arguments:
        if isinstance(a, Tensor) and a.is_floating_point():
            a.requires_grad_()
    results = [r for r in tree_flatten(call(arguments))[0] if isinstance(r, Tensor) and r.requires_grad]
    if not results:
        raise NotAGradient
    results = [r.to_dense() if isinstance(r, sten.SparseTensor) or r.layout != torch.strided else r for r in results]
    torch.default_generator.manual_seed(1)
    torch.autograd.backward(results, [torch.randn(r.shape, dtype=torch.float64).to(r.dtype) for r in results])
    return [a.grad if isinstance(a, Tensor) else None for a in arguments]


class NotAGradient(Exception):
    """The dense twin has no gradient."""


def judge_gradients(call: Call, dense: list, sparse: list, random: bool = False) -> Verdict:
    """The gradients of a call: of a sparse argument at its pattern, of a dense one dense."""
    before, masks = [copied(a) for a in dense], [mask_of(a) for a in sparse]
    try:
        wants = played(lambda a: gradients(call, a), dense)
    except Exception as error:
        return Verdict("skipped", line(error))
    try:
        gots = played(lambda a: gradients(call, a), sparse)
    except Exception as error:
        if isinstance(error, NotAGradient):
            return Verdict("wrong", "no gradient")
        return after_error(error, before, sparse, False)
    for index, (want, got, mask) in enumerate(zip(wants, gots, masks, strict=True)):
        problem = wrong_gradient(want, got, mask, random)
        if problem:
            return Verdict("wrong", f"gradient of argument {index}: {problem}")
    return Verdict("right")


def wrong_gradient(want: Tensor | None, got: Tensor | None, mask: Tensor | None, random: bool) -> str:
    """Why a gradient is not the one of the dense twin, at the pattern where the argument is sparse; else empty."""
    if want is None or got is None:
        other = got if want is None else want
        return "" if other is None or not plain(other).any() else "missing" if got is None else "unexpected"
    if isinstance(got, sten.SparseTensor) != (mask is not None):
        return "sparse, of a dense argument" if mask is None else "dense, of a sparse argument"
    if mask is not None:
        want = plain(want).masked_fill(~mask, 0)
    if random:
        return "" if want.shape == got.shape else unequal(want, got)
    return "" if same(want, got) else unequal(want, got)


# tensors


def as_tensor(a: Any) -> Any:
    """A number or an array of numpy as a tensor, to be compared up to rounding; anything else as it is."""
    number = isinstance(a, (float, complex)) or type(a).__module__ == "numpy"
    return torch.tensor(a, dtype=torch.float32 if isinstance(a, float) else None) if number else a


def plain(t: Tensor) -> Tensor:
    """The dense numbers of any tensor, without a gradient."""
    t = t.detach()
    return t.to_dense() if isinstance(t, sten.SparseTensor) or t.layout != torch.strided else t


def copied(a: Any) -> Any:
    return plain(a).clone() if isinstance(a, Tensor) else a


def mask_of(a: Any) -> Tensor | None:
    return a.mask() if isinstance(a, sten.SparseTensor) else None


def same(want: Tensor, got: Tensor) -> bool:
    """Equal shapes, dtypes and numbers, up to rounding."""
    want, got = plain(want), plain(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if want.is_quantized:
        want, got = want.dequantize(), got.dequantize()
    if not (want.is_floating_point() or want.is_complex()):
        return bool((want == got).all())
    tolerance = 2e-4 if want.dtype not in (torch.float16, torch.bfloat16) else 3e-2
    return torch.allclose(want, got, rtol=tolerance, atol=tolerance, equal_nan=True)


def unequal(want: Tensor, got: Tensor) -> str:
    """One line that says how two tensors differ."""
    want, got = plain(want), plain(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
    if not want.is_floating_point():
        return f"{int((want != got).sum())} of {want.numel()} numbers differ"
    gap = (want.double() - got.double()).abs()
    largest = float(gap.nan_to_num(torch.inf).max())
    return f"{int((~(gap < 1e-4)).sum())} of {want.numel()} numbers differ, by {largest:.2g}"


def line(error: BaseException) -> str:
    """The first line of an exception."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
