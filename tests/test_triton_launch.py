"""States of a launch, the launch cache and the backend, with stand-ins for a GPU."""

import ctypes
import sys
import types

import pytest
import torch
import triton
from triton_cases import DEVICE, bsr_parts, close, random  # noqa: F401

from sten.kernels import _torch_private, _triton_private, bsr, cusparselt, launch, launch_cache, pdl, tiles, transpose
from sten.kernels.backend import Backend, backend


@pytest.mark.parametrize("name", _torch_private.NAMES)
def test_private_names_of_torch(name):
    """A build of torch without CUDA lacks those of streams; kernels then use the public functions."""
    value = torch
    for part in name.split("."):
        value = getattr(value, part, None)
    assert value is not None or (name.startswith("_C._cuda") and not torch.backends.cuda.is_built())


@pytest.mark.parametrize("name", _triton_private.NAMES)
def test_private_names_of_triton(name):
    if triton.__version__ in _triton_private.TESTED:
        assert _triton_private.fetch(name) is not None


def test_fallbacks_of_torch():
    assert _torch_private._fetch("_C._no_such_name", 7) == 7
    assert _torch_private._AlwaysExpired(None).expired()


def compiled(meta=None, scratch=0, wrapped=False):
    """The attributes that are read of what Triton's front end returns, and the arguments of its launcher."""
    calls = []
    launcher = calls.append

    def start(*arguments):
        launcher(arguments)

    runner = types.SimpleNamespace(
        launch=start if wrapped else (lambda *a: calls.append(a)).__call__, global_scratch_size=scratch,
        profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=True,
    )  # fmt: skip
    made = types.SimpleNamespace(
        run=runner, function=77, packed_metadata=(4, 1, 0), metadata=types.SimpleNamespace(tensordesc_meta=meta)
    )
    return made, calls


@pytest.fixture
def usable(monkeypatch):
    monkeypatch.setattr(_triton_private, "usable", lambda: True)


def test_only_tested_versions_are_launched_directly(monkeypatch):
    assert _triton_private.usable() == (triton.__version__.partition("+")[0] in _triton_private.TESTED)
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    assert not _triton_private.usable() and _triton_private.direct_start(None) is None


def test_direct_start(usable):
    made, calls = compiled()
    start, args = _triton_private.direct_start(made)
    assert args == (77, False, True, None, None, (4, 1, 0), None, None, None)
    start(1, 2)
    assert calls == [(1, 2)]
    made, calls = compiled(wrapped=True)  # a function that encodes descriptors wraps the C launcher
    assert _triton_private.direct_start(made)[0] == calls.append
    assert _triton_private.direct_start(compiled(scratch=8)[0]) is None


def test_states_of_a_launch(monkeypatch):
    """New, then direct: the second call compiles nothing."""
    started, compiled_for = [], []
    monkeypatch.setattr(launch, "current_stream", lambda device: 5)
    monkeypatch.setattr(backend, "device", lambda: 0)

    def compile(arguments):
        compiled_for.append(arguments)
        return (lambda *a: started.append(a)), ("args",), ("constants",), {}

    ready = launch.Launch(compile, (3,))
    assert ready.start is None
    ready("x", 1)
    assert compiled_for == [("x", 1)] and not started
    ready("y", 1)
    assert started == [(3, 1, 1, 5, "args", "y", 1, "constants")] and len(compiled_for) == 1


def test_a_kernel_that_cannot_be_launched_directly():
    compiled_for = []
    ready = launch.Launch(compiled_for.append, (3,))  # append returns None
    for number in range(3):
        ready(number)
    assert compiled_for == [(0,), (1,), (2,)] and ready.start is None


def test_descriptors_are_encoded_at_each_call(monkeypatch, usable):
    fill = lambda address, *fixed: ("map", address, *fixed)  # noqa: E731
    utils = types.SimpleNamespace(utils=types.SimpleNamespace(fill_tma_descriptor=fill))
    monkeypatch.setattr(triton.runtime, "driver", types.SimpleNamespace(active=utils))
    monkeypatch.setattr(_triton_private, "fetch", lambda name: {1: 11})
    monkeypatch.setattr(launch, "current_stream", lambda device: 0)
    monkeypatch.setattr(backend, "device", lambda: 0)
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [16, 64], "fp4_padded": False}
    made, _ = compiled(meta=[meta])
    encoder = _triton_private.descriptor(made, 0, (8, 64), (64, 1))
    started = []
    ready = launch.Launch(lambda arguments: (lambda *a: started.append(a), (), (), {1: encoder}), (1,))
    matrix, other = torch.zeros(8, 64), torch.zeros(8, 64)
    for t in (matrix, matrix, other):
        ready("x", t, 9)
    for arguments, t in zip(started, (matrix, other), strict=True):
        address = t.data_ptr()
        expected = ("map", address, 3, 2, 11, [16, 64], (8, 64), (64, 1), 0)
        assert arguments[4:] == ("x", expected, 8, 64, 64, 1, 9)
    assert _triton_private.descriptor(compiled()[0], 0, (8, 64), (64, 1)) is None


def test_the_launch_cache(monkeypatch):
    launch_cache.clear()
    monkeypatch.setattr(launch_cache, "LIMIT", 3)
    x, made = torch.zeros(2), []

    def make():
        made.append(len(made))
        return made[-1]

    assert [launch_cache.cached((key,), x, make) for key in (1, 2, 1, 2)] == [0, 1, 0, 1]
    for key in range(10):
        launch_cache.cached(("more", key), x, make)
        assert len(launch_cache._launches) <= 3
    launch_cache.clear()
    monkeypatch.setattr(Backend, "capturing", lambda self, x: True)
    assert launch_cache.cached((1,), x, make) != launch_cache.cached((1,), x, make)
    assert not launch_cache._launches


def test_one_launch_for_tensors_of_one_signature():
    """Another alignment gets another launch, since kernels are compiled for alignment."""
    parts, dense = bsr_parts(32, 64, 16, 16)
    weight = [parts[name] for name in ("values", "crow", "col")]
    aligned, shifted = random(3, 64), random(3 * 64 + 1)[1:].view(3, 64)
    launch_cache.clear()
    for x in (aligned, random(3, 64, seed=1), shifted, aligned):
        close(bsr.linear(x, *weight, out_features=32), x @ dense.T)
    assert sum(key[0] == "gpu_bsr_linear" for key in launch_cache._launches) == 2
    assert launch_cache.signature(aligned) != launch_cache.signature(shifted)


def test_an_amd_gpu_has_no_tma(monkeypatch):
    """It reports 9.4, which has another meaning than NVIDIA's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    fresh, x = Backend(), types.SimpleNamespace(device=torch.device("cuda", 3))
    monkeypatch.setattr(sys.modules[Backend.__module__], "INTERPRET", False)
    assert fresh.capability(torch.device("cuda", 2)) == (9, 4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert fresh.capability(x.device) == (0, 0) == fresh.capability(torch.device("cpu"))
    monkeypatch.setattr(pdl, "backend", fresh)
    monkeypatch.setattr(tiles, "backend", fresh)
    assert pdl.overlap(x) == {"PDL": False} and not tiles.tma_can_load(random(16, 16))


@pytest.mark.parametrize(
    "version, served", [((0, 8), True), ((0, 6), True), ((0, 3), False), ((1, 0), False), (None, False)]
)
def test_versions_of_cusparselt(version, served):
    """A major version that was not tested is not used."""

    def get_property(which, number):
        if version is None:
            return 1
        ctypes.cast(number, ctypes.POINTER(ctypes.c_int))[0] = version[which]
        return 0

    library = types.SimpleNamespace(cusparseLtSpMMACompress2=None, cusparseLtGetProperty=get_property)
    assert cusparselt.known(library) == served
    assert not cusparselt.known(types.SimpleNamespace(cusparseLtGetProperty=get_property))


def test_errors_of_cusparselt_have_names():
    with pytest.raises(RuntimeError, match=r"cusparseLtMatmul failed with status 7 \(CUSPARSE_STATUS_INTERNAL_ERROR\)"):
        cusparselt._raise("cusparseLtMatmul", 7)
    with pytest.raises(RuntimeError, match="unknown"):
        cusparselt._raise("cusparseLtMatmul", 99)
    cusparselt._raise("cusparseLtMatmul", 0)


def test_rows_of_any_shape():
    for x in (random(2, 3, 8), random(8, 6).T, random(4, 16)[:, ::2], random(1, 9)[:, 1:], random(3, 1)[:, :1]):
        for options in ({}, {"aligned": True}, {"packed": True}):
            arrange = tiles.matrix_of(x, **options)
            flat = x if arrange is None else arrange(x)
            assert torch.equal(flat, x.reshape(-1, x.shape[-1])) and flat.stride(1) == 1
            assert "packed" not in options or flat.is_contiguous()
            assert "aligned" not in options or flat.data_ptr() % 16 == 0
    assert torch.equal(transpose.feature_major_rows(random(1, 1, 8), 16)(random(1, 1, 8)), random(1, 1, 8).view(1, 8))
