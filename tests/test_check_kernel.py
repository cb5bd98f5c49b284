"""check_kernel: its report, and the faults that it detects in plain and prepared kernels."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import sten
from sten import dispatch
from sten.layouts import CSR


@dataclasses.dataclass(frozen=True)
class Tried(CSR):
    """CSR under another name, whose kernels the tests register."""


def check(function, prepare=False, operator="linear", **more):
    sten.kernel(operator, weight=Tried, device="cpu", prepare=prepare)(function)
    try:
        return sten.testing.check_kernel(operator, Tried(), shapes=[(6, 9)], sparsity=(0.5,), **more)
    finally:
        del dispatch.KERNELS[(operator, "cpu", Tried)]


def plain(x, weight, bias, *, layout, shape):
    return F.linear(x, layout.unpack(weight, shape), bias)


def test_a_plain_kernel():
    checked = check(plain, dtypes=[torch.float32, torch.float64])
    assert (checked.operator, checked.layout, checked.device) == ("linear", Tried(), "cpu")
    assert checked.dtypes == (torch.float32, torch.float64) and checked.shapes == ((6, 9),)
    assert checked.variants == {"plain"} and checked.calls > 30


def prepared(layout, shape, dtype, flags):
    if dtype is not torch.float32:
        return None
    if flags.tokens is not None and flags.tokens < 2:
        return sten.extend.Plan.of("reference", "few tokens", None)
    variant = "later" if flags.tokens is None else "few" if flags.tokens < 16 else "many"
    return sten.extend.Plan.of(variant, "by tokens", lambda *operands: plain(*operands, layout=layout, shape=shape))


def test_a_prepared_kernel():
    assert check(prepared, prepare=True).variants == {"reference", "few", "many", "later"}
    assert check(prepared, prepare=True, dtypes=[torch.float64]).variants == {"reference"}


def of(run):
    """The prepare function of one variant, made of `run(state, product, x)`; the state is the Plan's own."""

    def prepare(layout, shape, dtype, flags):
        state = {}
        return sten.extend.Plan.of(
            "one",
            "always",
            lambda x, weight, bias: run(state, lambda: plain(x, weight, bias, layout=layout, shape=shape), x),
        )

    return prepare


def wrong_the_second_time(state, product, x):
    state["calls"] = state.get("calls", 0) + 1
    return product() * (2 if state["calls"] > 1 else 1)


def keeps_its_first_result(state, product, x):
    state.setdefault("first", product())
    state["first"].mul_(state.setdefault("scale", 1.0))
    state["scale"] = 2.0
    return state["first"]


def leaves_a_gap(state, product, x):
    y = torch.empty_like(product())
    y[..., :-1] = product()[..., :-1]
    return y


def writes_into_its_input(state, product, x):
    y = product()
    x.add_(1)
    return y


@pytest.mark.parametrize(
    "run, message",
    [
        (wrong_the_second_time, "second call: relative error"),
        (keeps_its_first_result, "second call"),
        (leaves_a_gap, "relative error"),
        (writes_into_its_input, "changed|relative error"),
        (lambda state, product, x: product().double(), "the result is torch.float64"),
        (lambda state, product, x: product()[..., :-1], "the result has shape"),
        (lambda state, product, x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_faults_are_detected(run, message):
    with pytest.raises(AssertionError, match=message):
        check(of(run), prepare=True)


def test_a_convolution_in_both_memory_formats():
    seen = set()

    def prepare(layout, shape, dtype, flags):
        seen.add((flags.memory_format, flags.geometry["stride"]))
        return None

    sten.kernel("conv2d", weight=Tried, device="cpu", prepare=True)(prepare)
    try:
        sten.testing.check_kernel("conv2d", Tried())
    finally:
        del dispatch.KERNELS[("conv2d", "cpu", Tried)]
    forms = (torch.contiguous_format, torch.channels_last)
    assert seen >= {(form, stride) for form in forms for stride in ((1, 1), (2, 1))}


def test_nothing_registered():
    with pytest.raises(AssertionError, match="No kernel is registered"):
        sten.testing.check_kernel("linear", Tried())
