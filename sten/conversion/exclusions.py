"""What keeps a chosen weight from becoming sparse, whatever its layout.

Hooks that recompute it, ties, no gradient, another library that stores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .select import Target

# hooks of torch.nn.utils: the suffix of the parameter that they compute the weight from, and their function
RECOMPUTING = {"WeightNorm": ("_v", "weight_norm"), "SpectralNorm": ("_orig", "spectral_norm")}


def recomputed(module: nn.Module) -> dict[str, tuple[str, str]]:
    """{parameter: (attribute, why it stays dense)} of weights that a hook computes anew before each forward pass.

    A second parameter of the same weight (the norms of weight_norm) has an empty reason.
    """
    found = {}
    for hook in module._forward_pre_hooks.values():
        kind = type(hook).__name__
        if kind in RECOMPUTING and type(hook).__module__.startswith("torch.nn.utils"):
            name = hook.name
            suffix, function = RECOMPUTING[kind]
            found[name + "_g"] = (name, "")
            found[name + suffix] = (name, f"torch.nn.utils.{function} computes it: remove that first")
    return found


def expect_one_mask(members: list[Target]) -> None:
    """Raise ValueError if the owners of one tied weight have pruned it differently: each computes with its own mask."""
    first = members[0].mask
    for other in members[1:]:
        mask = other.mask
        if (mask is None) != (first is None) or (mask is not None and not bool((mask == first).all())):
            raise ValueError(
                f"Expected one pruning mask for {members[0].name} and {other.name}, which are one tied weight, got "
                "several; prune both with one mask (torch.nn.utils.prune.custom_from_mask), or untie them."
            )


def without_gradient(target: Target, kind: str, named: bool) -> str:
    """Why a dynamic method leaves a weight dense that does not train; empty if it trains, an error if it was named."""
    if target.tensor.requires_grad:
        return ""
    if named:
        raise ValueError(
            f"Expected a weight that requires a gradient for {kind}, which acts during training, got {target.name}, "
            "which is frozen; call requires_grad_() on it, or use sten.Magnitude."
        )
    return f"it is frozen, and {kind} acts during training"


def stored_by_others(tensor: Tensor) -> str:
    """Why a weight stays that another library has quantized (torchao, bitsandbytes); empty for others."""
    kind = type(tensor)
    own = kind.__module__.partition(".")[0] in ("torch", "sten")
    if own or (type(tensor.data) is Tensor and tensor.is_floating_point()):
        return ""
    return f"it is stored as a {kind.__name__} of {kind.__module__.partition('.')[0]}"
