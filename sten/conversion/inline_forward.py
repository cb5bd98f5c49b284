"""The forward of a linear layer with a method at its output: the product is sparsified inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .._torch_private import PLAIN_TENSORS, global_hooks, is_compiling
from ..ops.inline_linear import inline_linear, runs_inline, tile_tokens
from ..ops.sparsified import is_seen, records

if TYPE_CHECKING:
    from .sites import Site


class InlineForward:
    """A `forward` in a module's instance: that of its class, with the output site `site` in the epilogue.

    The site's hook, which runs after the forward, finds the mark of such an output and leaves it as it is. Where
    another hook would see the output before it, or the operands are not those of a plain product, the module's own
    forward runs, and the hook does the rest.
    """

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.module, self.site = module, site

    def __call__(self, input: Tensor) -> Tensor:
        module, site = self.module, self.site
        if is_compiling() or global_hooks() or not self.comes_first():
            return type(module).forward(module, input)
        if site.layout is not None:
            weight, bias = module.weight, module.bias
            if not runs_inline(input, weight, bias, site.layout):
                return type(module).forward(module, input)
            y = inline_linear(input, weight, bias, site.epilogue(module))
        else:
            y = type(module).forward(module, input)
            if is_seen(y) or records(y) or y.numel() == 0:
                return y
            y = site.epilogue(module).finish(y, own=True)
        vars(y)["finished_by"] = site
        return y

    def comes_first(self) -> bool:
        """Whether the site's hook is the first that sees the output."""
        return next(iter(self.module._forward_hooks), None) == self.site.handles[0].id

    def describe(self) -> str:
        """For `sten.which` and `sten.summary`: what happens to the product."""
        weight, site = self.module.weight, self.site
        inside = site.layout is not None and type(weight) in PLAIN_TENSORS and self.comes_first()
        z = weight.new_empty(2, weight.shape[0])  # tokens: one alone may have a kernel of its own
        return site.epilogue(self.module).describe(z, tile_tokens(len(weight), weight.device) if inside else None)


def can_be_inline(module: nn.Module, site: Site) -> bool:
    """Whether a linear layer may sparsify its output inside the product."""
    method = site.method
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return plain and method.kind != "materializing" and not method.full_gradient


def finished_by(output: Any, site: Site) -> bool:
    """Whether `InlineForward` has made this output; the mark is taken off."""
    if is_compiling() or not isinstance(output, Tensor):
        return False
    return vars(output).pop("finished_by", None) is site
