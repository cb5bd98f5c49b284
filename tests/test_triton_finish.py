"""The Triton kernel of epilogues against PyTorch's operators, in the interpreter or on a GPU."""

import pytest
import torch
from triton_cases import ACTIVATIONS, DEVICE, close, random

import sten
from sten.kernels import finish
from sten.ops import epilogue

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
METHODS = [sten.Threshold(0.3), sten.Threshold(0.3, signed=True), sten.TopK(2, block=4), sten.TopK(3, block=8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_finish(method, dtype):
    """Threshold, and n:m of adjacent outputs with ties and NaN, after each activation."""
    for activation, function in {**ACTIVATIONS, "relu2": lambda x: x.relu().square()}.items():
        x = random(5, 3, 40, dtype=dtype)
        x[0, 0, :8], x[1, 1, 3] = 0.5, torch.nan
        kept = method.kept(x, {}, False)
        y = epilogue.finished_on_gpu(x, kept, activation or "none")
        full = function(x.float()).to(dtype).flatten(0, 1)
        want = torch.where(method.mask(full, {}, False), full, 0).view(x.shape)
        close(y.nan_to_num(7.0), want.nan_to_num(7.0), dtype)
        assert torch.equal(y == 0, want == 0)


def test_a_calibrated_threshold_is_a_tensor():
    x, state = random(4, 40), {"threshold": torch.tensor(0.7, device=DEVICE)}
    method = sten.Threshold(sparsity=0.5)
    y = epilogue.finished_on_gpu(x, method.kept(x, state, False), "none")
    close(y, x * (x.abs() > 0.7))


def test_refused():
    x = random(4, 40)
    for keep, count, block, message in (
        ("row", 1, 0, "keep of all"), ("blocks", 2, 3, "blocks of 2"), ("blocks", 5, 4, "a count in it"),
        ("blocks", 2, 16, "whole blocks"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            finish.finish(x, None, activation="none", keep=keep, count=count, block=block, number=0.0)
    with pytest.raises(ValueError, match="an edge for a threshold only"):
        finish.finish(x, x[0, 0], activation="none", keep="all", count=0, block=0, number=0.0)
    assert finish.finish(x[:0], None, activation="relu", keep="all", count=0, block=0, number=0.0).shape == (0, 40)
