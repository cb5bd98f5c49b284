"""The torch.library operators of the kernels: schema, fake kernel, intercepted calls, invalid tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from triton_cases import DEVICE, bsr_parts, close, nm_parts, random, vector_nm_parts

import sten
from sten.kernels import bsr, csr, grouped_nm, nm, tiles, vector_nm
from sten.kernels.backend import backend

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
    slots = [grouped.parts["values"], grouped.parts["index"], grouped.sparse_layout.rows(DEVICE).int()]
    return {
        "gpu_vector_nm_linear": (
            lambda x, b: vector_nm.linear(x, values, index, b, n=1, m=4, v=16, out_features=O),
            lambda b, gate=None: (values, index, 1, 4, 16, O, b, gate, None, None, None, "relu"),
            dense,
        ),
        "gpu_bsr_linear": (
            lambda x, b: bsr.linear(x, *blocks, b, out_features=O),
            lambda b, gate=None: (*blocks, O, b, gate, None, None, None, None, "relu"),
            dense_bsr,
        ),
        "gpu_nm_linear": (
            lambda x, b: nm.linear(x, values_nm, index_nm, b, n=1, m=8, out_features=O),
            lambda b, gate=None: (values_nm, index_nm, 1, 8, O, b, gate, "relu", False),
            dense_nm,
        ),
        "gpu_csr_linear": (
            lambda x, b: csr.linear(x, *entries, b, out_features=O),
            lambda b, gate=None: (*entries, O, b, gate, "relu"),
            sparse.to_dense(),
        ),
        "gpu_grouped_nm_linear": (
            lambda x, b: grouped_nm.linear(x, *slots, b, m=4, out_features=O),
            lambda b, gate=None: (*slots, 4, O, b, gate, "relu", True),
            grouped.to_dense(),
        ),
    }


OPERATORS = list(weights())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_operator(name, tokens):
    """opcheck passes: schema and fake kernel are right; and the call by name is the same product."""
    call, rest, dense = weights()[name]
    x, bias = random(tokens, I), random(O)
    overload = getattr(torch.ops.sten, name).default
    torch.library.opcheck(overload, (x, *rest(bias)), test_utils=("test_schema", "test_faketensor"))
    close(call(x, bias), x @ dense.T + bias)
    close(overload(x, *rest(bias)), (x @ dense.T + bias).relu())


@pytest.mark.parametrize("name", OPERATORS)
def test_an_intercepted_call_shows_the_operator(name):
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
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, bias) + 1, fullgraph=True, backend="aot_eager")
    close(compiled(x), call(x, bias) + 1)
    traced = torch.jit.trace(lambda x: call(x, bias), x, check_trace=False)
    assert name in str(traced.graph)


class Doubled(torch.Tensor):
    """A subclass that means twice its numbers, which only torch's dispatcher applies."""

    @staticmethod
    def __new__(cls, plain):
        return torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)

    def __init__(self, plain):
        self.plain = plain

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[a.plain * 2 if isinstance(a, cls) else a for a in args], **(kwargs or {}))


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATORS)
def test_tensors_that_are_more_than_their_numbers(name):
    """A lazy negation, a subclass in any position; and a mode that sees functions rather than operators."""
    call, _, dense = weights()[name]
    for tokens in (1, 3):
        x, bias = random(tokens, I), random(O)
        expected = x @ dense.T + bias
        close(call(torch._neg_view(-x), torch._neg_view(-bias)), expected)
        close(call(torch.complex(x, -x).conj().imag, bias), expected)
        close(call(Doubled(x / 2), bias), expected)
        close(call(x, Doubled(bias / 2)), expected)
    with Seen() as seen:
        call(x, bias)
    assert any(name in function for function in seen.names)
    assert name in make_fx(lambda x: call(x, bias), pre_dispatch=True)(x).code
    with torch.inference_mode():
        close(call(x * 1, bias * 1), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_bias(name):
    """Any stride: a row of a larger tensor, or one expanded element."""
    call, _, dense = weights()[name]
    x = random(5, I)
    for bias in (random(O, 3)[:, 1], random(1).expand(O)):
        close(call(x, bias), x @ dense.T + bias)


@pytest.mark.parametrize("name", OPERATORS)
def test_invalid_tensors_raise(name):
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


def test_wide_reads_the_offset_of_the_last_element():
    """Not the number of elements: a slice of a fused projection has few elements, far apart."""
    assert tiles.wide(torch.empty_strided((3, 64), (2**30, 1), device="meta"))
    assert not tiles.wide(torch.empty(2**20, 2**10, device="meta"), None)
    assert tiles.wide(torch.empty(2**20, 2**11 + 1, device="meta"))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 5), (5, 0), (2, 3, 4), torch.Size((2, 1, 7))])
def test_empty_is_what_new_empty_makes(shape):
    like = random(2, 2, dtype=torch.float16)
    new, usual = backend.empty(like, *shape), like.new_empty(shape)
    made = new()
    assert (made.shape, made.stride(), made.dtype, made.device) == (
        usual.shape, usual.stride(), usual.dtype, usual.device,
    )  # fmt: skip
    assert new() is not made
    with torch.inference_mode():
        assert new().is_inference()


def test_empty_memory_is_poisoned_in_deterministic_mode(poisoned):
    assert backend.empty(random(2), 3, 4)().isnan().all()
