"""How a kernel is called: at once, or as an operator where somebody watches, and never on tensors that do not fit."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import DEVICE, bsr_parts, close, nm_parts, random, vector_nm_parts

import sten
from sten.kernels import bsr, csr, grouped_nm, nm, vector_nm

O, I = 20, 48


def weights():
    """{operator: (call on x and a bias, the operator's arguments after x with that bias, dense weight)}."""
    values, index, dense = vector_nm_parts(O, I, 1, 4, 16)
    parts, dense_bsr = bsr_parts(O, I, 8, 8)
    blocks = [parts[name] for name in ("values", "crow", "col")]
    values_nm, index_nm, dense_nm, *_ = nm_parts(O, I, 1, 8)
    sparse = sten.from_dense(random(O, I), sten.CSR(), random(O, I, seed=1) > 0.5)
    grouped = sten.from_dense(random(O, I), sten.GroupedNM(2, 4, 1))
    entries = [sparse.parts[name] for name in ("values", "crow", "col")]
    slots = [grouped.parts["values"], grouped.parts["index"], grouped.spec.rows(DEVICE).int()]
    return {
        "gpu_vector_nm_linear": (
            lambda x, b: vector_nm.linear(x, values, index, b, n=1, m=4, v=16, out_features=O),
            lambda b, gate=None: (values, index, b, gate, 1, 4, 16, O, "relu"),
            dense,
        ),
        "gpu_bsr_linear": (
            lambda x, b: bsr.linear(x, *blocks, b, out_features=O),
            lambda b, gate=None: (*blocks, b, gate, O, "relu"),
            dense_bsr,
        ),
        "gpu_nm_linear": (
            lambda x, b: nm.linear(x, values_nm, index_nm, b, n=1, m=8, out_features=O),
            lambda b, gate=None: (values_nm, index_nm, b, gate, 1, 8, O, "relu", False),
            dense_nm,
        ),
        "gpu_csr_linear": (
            lambda x, b: csr.linear(x, *entries, b, out_features=O),
            lambda b, gate=None: (*entries, b, gate, O, "relu"),
            sparse.to_dense(),
        ),
        "gpu_grouped_nm_linear": (
            lambda x, b: grouped_nm.linear(x, *slots, b, m=4, out_features=O),
            lambda b, gate=None: (*slots, b, gate, 4, O, "relu", True),
            grouped.to_dense(),
        ),
    }


OPERATORS = list(weights())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_operator(name, tokens):
    """The schema says what it writes, the fake has the output's shape, and the direct call is the same product."""
    call, rest, dense = weights()[name]
    x, bias = random(tokens, I), random(O)
    overload = getattr(torch.ops.sten, name).default
    torch.library.opcheck(overload, (x, *rest(bias)), test_utils=("test_schema", "test_faketensor"))
    close(call(x, bias), x @ dense.T + bias)
    close(overload(x, *rest(bias)), (x @ dense.T + bias).relu())


@pytest.mark.parametrize("name", OPERATORS)
def test_who_watches_sees_the_operator(name):
    call, _, _ = weights()[name]
    x, bias = random(3, I), random(O)
    call(x, bias)  # what is computed once is not traced
    graph = make_fx(lambda x: call(x, bias))(x)
    assert name in graph.code
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x, bias)
    assert f"sten::{name}" in [event.key for event in profile.key_averages()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(torch.empty(7, I, device=DEVICE), bias).shape == (7, O)
    traced = torch.jit.trace(lambda x: call(x, bias), x, check_trace=False)
    assert name in str(traced.graph)


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_bias(name):
    """Any stride: a row of a larger tensor, or one number for all."""
    call, _, dense = weights()[name]
    x = random(5, I)
    for bias in (random(O, 3)[:, 1], random(1).expand(O)):
        close(call(x, bias), x @ dense.T + bias)


@pytest.mark.parametrize("name", OPERATORS)
def test_refused(name):
    call, rest, _ = weights()[name]
    x, overload = random(5, I), getattr(torch.ops.sten, name).default
    for short in (random(O - 1), random(1), random(1, O)):
        with pytest.raises(ValueError, match="bias"):
            call(x, short)
    values, *others = rest(None)
    strided = torch.stack([values, values], -1)[..., 0]
    with pytest.raises(ValueError, match="contiguous"):
        overload(x, strided, *others)
    with pytest.raises(ValueError, match="gate"):
        overload(x, *rest(None, random(5, O - 1)))
