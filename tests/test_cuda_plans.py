"""Plans of the CUDA kernels, prepared without a GPU and without tensors."""

import pytest
import torch

import sten
from sten import dispatch, kernels

if not kernels.available():
    pytest.skip("the Triton kernels need triton", allow_module_level=True)

LAYOUTS = [sten.CSR(), sten.BSR((64, 64)), sten.NM(2, 4), sten.GroupedNM(1, 4, 4), sten.VectorNM(1, 4, 128)]


def prepared(operator, layout, shape, dtype, entries):
    """The Plan for shape = (tokens, outputs, inputs) on a GPU."""
    flags = dispatch.Flags(shape[0], entries, torch.device("cuda"))
    return dispatch.prepare(operator, layout, shape[1:], dtype, flags)


@pytest.mark.parametrize("operator", ["linear", "linear_grad_input", "linear_grad_weight"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dtypes(layout, operator):
    for dtype, known in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, True), (torch.float64, False)):
        plan = prepared(operator, layout, (16, 256, 256), dtype, 4096)
        assert (plan.kernel != "reference") == known and plan.reason and plan.device == "cuda"


@pytest.mark.parametrize("operator", ["linear", "linear_grad_input", "linear_grad_weight"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_symbolic_size(layout, operator):
    """The number of tokens is unknown in an intercepted call; the Plan runs an operator that decides later."""
    flags = dispatch.Flags(None, None, torch.device("cuda"))
    plan = dispatch.prepare(operator, layout, (256, 256), torch.bfloat16, flags)
    assert plan.run is not None and plan.reason


@pytest.fixture
def switch():
    """Sets torch's switch for tf32, and back."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    "operator, layout, density, with_tf32, exactly",
    [
        ("linear", sten.BSR((32, 32)), 0.3, "expand", "blocks"),
        ("linear", sten.BSR((64, 64)), 0.6, "expand", "expand"),
        ("linear", sten.BSR((64, 64)), 0.3, "blocks", "blocks"),
        ("linear", sten.BSR((64, 64)), 0.2, "blocks", "blocks"),
        ("linear", sten.VectorNM(1, 4, 32), None, "expand", "gather"),
        ("linear", sten.NM(1, 4), None, "expand", "expand"),
        ("linear_grad_weight", sten.VectorNM(1, 4, 64), None, "gather", "reference"),
        ("linear_grad_weight", sten.VectorNM(1, 8, 64), None, "gather", "gather"),
    ],
    ids=str,
)
def test_tf32_decides(operator, layout, density, with_tf32, exactly, switch):
    """Tensor cores run fp32 only if torch's switch allows tf32; each setting has its own best variant."""
    entries = int(1024 * 1024 * (density or 0.25))
    for allowed, expected in ((True, with_tf32), (False, exactly)):
        switch(allowed)
        plan = prepared(operator, layout, (512, 1024, 1024), torch.float32, entries)
        assert (plan.variant or plan.kernel) == expected


def test_blocks_below_tensor_cores_expand_their_gradients():
    plan = prepared("linear_grad_weight", sten.BSR((4, 8)), (16, 256, 256), torch.bfloat16, 4096)
    assert plan.kernel == "reference" and "below the 16" in plan.reason
