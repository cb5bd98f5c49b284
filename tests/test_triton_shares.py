"""Few-token products whose kernels torch.compile launches: the same numbers as the operators, and what a trace sees."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from triton_cases import DEVICE, random

import sten
from sten.kernels import bsr, nm, several, vector_nm, vector_nm_mlp

O, I = 40, 96
WEIGHTS = {
    "NM": (nm, sten.NM(2, 4), None), "NM of 16": (nm, sten.NM(2, 16), None),
    "VectorNM": (vector_nm, sten.VectorNM(1, 4, 8), None), "VectorNM of 32": (vector_nm, sten.VectorNM(2, 4, 32), None),
    "BSR": (bsr, sten.BSR((16, 16)), 0.6), "odd BSR": (bsr, sten.BSR((12, 5)), 0.5),
}  # fmt: skip
DTYPES = {torch.float32: 1e-4, torch.float16: 5e-3}  # the interpreter multiplies the bits of bfloat16
if DEVICE == "cuda":
    DTYPES[torch.bfloat16] = 4e-2


def numbers_of(layout):
    return {name: getattr(layout, name) for name in ("n", "m", "v") if hasattr(layout, name)}


def stored(layout, sparsity, dtype, outputs=O, inputs=I, seed=0):
    dense = random(outputs, inputs, dtype=dtype, seed=seed)
    mask = layout.mask(dense.abs(), sparsity)
    parts = layout.pack(dense, mask)
    names = ("values", "crow", "col") if isinstance(layout, sten.BSR) else ("values", "index")
    return tuple(parts[name] for name in names), (dense * mask).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 16, 50))
@pytest.mark.parametrize("name", WEIGHTS)
def test_same_numbers(name, tokens, dtype):
    module, layout, sparsity = WEIGHTS[name]
    if dtype == torch.float32 and isinstance(layout, sten.NM):
        pytest.skip("float32 without TF32 is expanded")
    if name == "NM" and tokens > 1 and DEVICE == "cpu":
        pytest.skip("the interpreter runs no inline assembly")
    parts, dense = stored(layout, sparsity, dtype)
    x, bias, gate = random(2, tokens, I, dtype=dtype)[1], random(O, dtype=dtype), random(tokens, O, dtype=dtype)
    known = {
        "out_features": O,
        **{n: module.linear.defaults[n] for n in ("save_memory",) if n in module.linear.numbers},
    }
    absent = (None,) * (len(module.linear.tensors) - 1 - len(parts) - 2)
    y = module.linear.traced(x, *parts, bias, gate, *absent, activation="silu", **known, **numbers_of(layout))
    expected = torch.nn.functional.silu(x.double() @ dense.T + bias.double()) * gate.double()
    assert y.dtype == dtype and y.shape == (tokens, O)
    torch.testing.assert_close(y.double(), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype] * 10)


@pytest.mark.parametrize("tokens", (1, 20))
@pytest.mark.parametrize("name", [n for n, (module, *_) in WEIGHTS.items() if module.linear.dual])
def test_two_weights_at_once(name, tokens):
    module, layout, sparsity = WEIGHTS[name]
    (gate, w), (up, w2) = (stored(layout, sparsity, torch.float32, seed=seed) for seed in (1, 2))
    x, bias, up_bias = random(1, tokens, I), random(O), random(O, seed=1)
    arguments = (x, *gate, bias, None, *up, up_bias)
    y = module.linear.traced(*arguments, activation="relu", out_features=O, **numbers_of(layout))
    expected = torch.relu(x.double() @ w.T + bias) * (x.double() @ w2.T + up_bias)
    assert y.shape == (1, tokens, O)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_several_and_an_mlp():
    layout = sten.VectorNM(1, 4, 8)
    weights = [stored(layout, None, torch.float32, seed=seed) for seed in (1, 2)]
    down, w3 = stored(layout, None, torch.float32, outputs=I, inputs=O, seed=3)
    x, bias = random(3, I), random(O)
    (first, w1), (second, w2) = weights
    both = (x, *first, bias, *second, None, None, None, None)
    y = several.vector_nm_several.traced(*both, out_features=2 * O, n=1, m=4, v=8)
    expected = torch.cat([x.double() @ w1.T + bias, x.double() @ w2.T], 1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    rates = {f"{prefix}{name}": number for prefix in ("", "down_") for name, number in numbers_of(layout).items()}
    mlp = (x, *first, bias, *second, None, *down, None)
    y = vector_nm_mlp.gated_mlp.traced(*mlp, inner=O, out_features=I, activation="silu", **rates)
    inner = torch.nn.functional.silu(x.double() @ w1.T + bias) * (x.double() @ w2.T)
    torch.testing.assert_close(y.double(), inner @ w3.T, rtol=1e-4, atol=1e-4)


def test_sizes_are_checked():
    """The kernels trust them."""
    parts, _ = stored(sten.VectorNM(1, 4, 8), None, torch.float32)
    known, absent = {"activation": "none", "n": 1, "m": 4, "v": 8}, (None,) * 4
    for x, bias, outputs in (
        (random(2, I), random(O - 1), O),
        (random(2, I + 4), None, O),
        (random(2, I), None, O + 8),
    ):
        with pytest.raises(ValueError, match="Expected"):
            vector_nm.linear.traced(x, *parts, bias, *absent, out_features=outputs, **known)


def test_operators_stay_whole_where_they_must():
    """Many tokens, no tokens, other dtypes."""
    parts, _ = stored(sten.VectorNM(1, 4, 8), None, torch.bfloat16)
    known = {"out_features": O, "activation": "none", "n": 1, "m": 4, "v": 8}
    for x in (random(65, I), random(0, I)):
        absent = (None,) * 5
        assert vector_nm.linear.traced(x.bfloat16(), *parts, *absent, **known) is None
        assert vector_nm.linear.traced(x, *parts, *absent, **known) is None


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    script = pathlib.Path(__file__).with_name("triton_trace.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = str(tmp_path_factory.mktemp("triton"))
    environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors stand for a GPU that is not there")
def test_traces(traces):
    """Few tokens: launches that write nothing but their shares, or their result. Others, and dynamic counts: whole
    operators, one graph for all sizes."""
    assert len(traces) == 40
    for name, found in traces.items():
        started = name.endswith((" 1", " 9")) if name.startswith("bitmap") else name == "steps of CSR finalized 1"
        launched = name.endswith((" 1", " 9")) and name.startswith(("NM", "VectorNM", "BSR"))
        assert found["graphs"] == 1, name
        assert found["launches"] == (2 if launched else 0), name
        assert found["written"] == ["y_ptr"] * found["launches"], name
        assert len(found["started"]) == (2 if started else 0), name
        assert all(operator.endswith("_launch.default") for operator in found["started"]), name
        assert len(found["operators"]) == (0 if launched or started else 2), name
