"""Precision of fp32 products: tf32 on tensor cores, or ieee, as ``torch.backends.cuda.matmul`` says."""

import torch


def exact(dtype: torch.dtype) -> bool:
    """Whether products are made without tensor cores: fp32, unless torch's switch allows tf32."""
    if dtype != torch.float32:
        return False
    try:
        return not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer switch was set, and torch refuses to mix the two
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def precision(dtype: torch.dtype) -> str:
    """How a product of operands of this dtype rounds them, as Triton names it."""
    return "tf32" if dtype == torch.float32 and not exact(dtype) else "ieee"
