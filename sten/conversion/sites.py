"""Sites: the input, the output and the gradients of a module, which a method makes sparse at each call.

site            what                                          how it is reached
input           the first floating-point tensor of the call   a forward pre-hook
output          what forward returns, or its first tensor     a forward hook
grad_output     the gradient of that                          an autograd function in the same hook
grad_input      the gradient of the first                     the same
grad_weight     the gradient of the Parameter `weight`        a hook of the Parameter

A method sees a matrix (tokens, features): leading dimensions are flattened, and come back afterwards. What it learns is
a parameter or buffer of the module, `sparse_<site>_<name>`. Hooks, and what they hold, are copied and pickled with the
module. Each site of a module is a `Site`; they stand in `module._sten_sites`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts.base import Layout
from ..ops.epilogue import Epilogue, Kept
from ..ops.sparsified import is_seen, records, stored, stores, with_gradient
from ..sparsifiers.activation import ActivationMethod
from ..tensor import SparseTensor
from ..training.attribute import SITES
from .inline_forward import InlineForward, can_be_inline, finished_by


def sites_of(model: nn.Module) -> list[Site]:
    """All sites of a model, in the order of its modules."""
    return [site for module in model.modules() for site in vars(module).get(SITES, {}).values()]


@dataclass(eq=False)
class Site:
    """One site of one module.

    Attributes:
        name: of the module, as it was called when the site was made.
        kind: of `arguments.KINDS`.
        method, layout: what is kept, and how it is stored; None: dense, with zeros.
        linear: whether the module acts on the last dimension only, so that it may get a matrix of all tokens.
        state: names of the method's tensors.
        handles: what removes the hooks.
        param, hook: of grad_weight, the Parameter that is hooked, and what removes that.
        frozen: whether it is not hooked, since it does not train; compilers read this, not the hook.
        plans: the Plans of operators that read its activations, whose patterns are new at each call.
        inline: of the output of a linear layer, the forward that sparsifies it inside the product.
    """

    name: str
    kind: str
    method: ActivationMethod
    layout: Layout | None
    linear: bool
    state: tuple[str, ...] = ()
    handles: list[Any] = field(default_factory=list, repr=False)
    param: nn.Parameter | None = field(default=None, repr=False)
    hook: Any = field(default=None, repr=False)
    frozen: bool = False
    plans: dict = field(default_factory=dict, repr=False)
    inline: InlineForward | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.where}: {self.method}, {'dense with zeros' if self.layout is None else self.layout}"

    @property
    def where(self) -> str:
        """In messages."""
        return f"{self.kind} of {self.name or 'the model'}"

    def described(self) -> str:
        """As `str`, and what runs inside the product."""
        return str(self) if self.inline is None else f"{self.where}: {self.inline.describe()}"

    def keep(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Give the module the method's tensors."""
        self.state = tuple(state)
        for name, tensor in state.items():
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(self.full(name), tensor)
            else:
                module.register_buffer(self.full(name), tensor)

    def install(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Hook a module, and give it the method's tensors."""
        self.keep(module, state)
        before, after = module.register_forward_pre_hook, module.register_forward_hook
        if self.kind == "input":
            self.handles.append(before(self.sparsify_input, with_kwargs=True))
            if self.layout is not None and self.linear:
                self.handles.append(after(self.restore_tokens, prepend=True))
        elif self.kind == "grad_input":  # first, so that it changes the gradient last
            self.handles.append(before(self.change_grad_input, with_kwargs=True, prepend=True))
        elif self.kind == "output":
            self.handles.append(after(self.sparsify_output))
            if can_be_inline(module, self):
                module.__dict__["forward"] = self.inline = InlineForward(module, self)
        elif self.kind == "grad_output":
            self.handles.append(after(self.change_grad_output, prepend=True))
        else:
            self.handles.append(before(self.follow_weight))
            self.follow_weight(module)
        vars(module).setdefault(SITES, {})[self.kind] = self

    def remove(self, module: nn.Module) -> None:
        """Take everything off again."""
        for handle in self.handles:
            handle.remove()
        if self.hook is not None:
            self.hook.remove()
        if self.inline is not None and vars(module).get("forward") is self.inline:
            del module.__dict__["forward"]
        for name in self.state:
            delattr(module, self.full(name))
        del vars(module)[SITES][self.kind]

    def full(self, name: str) -> str:
        """The name that a tensor of the method has in the module."""
        return f"sparse_{self.kind}_{name}"

    # what the hooks do

    def sparsify_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return change_first(args, kwargs, functools.partial(self.sparsified, module), self.where)

    def sparsify_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if finished_by(output, self):
            return output
        return change_output(output, functools.partial(self.sparsified, module), self.where)

    def change_grad_input(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return change_first(args, kwargs, self.with_gradient, self.where)

    def change_grad_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return change_output(output, self.with_gradient, self.where)

    def restore_tokens(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Give the output the leading dimensions that the input had before it became a matrix."""
        leading = next((a.leading for a in args if isinstance(a, SparseTensor) and hasattr(a, "leading")), None)
        return output if leading is None else output.reshape(*leading, output.shape[-1])

    def follow_weight(self, module: nn.Module, args: tuple = ()) -> None:
        """Hook the Parameter that `weight` is now, if it is another one."""
        if self.param is not module._parameters["weight"] or (self.frozen and self.param.requires_grad):
            if self.hook is not None:
                self.hook.remove()
            self.param = module._parameters["weight"]
            self._hook_weight()

    def _hook_weight(self) -> None:
        self.frozen = not self.param.requires_grad
        self.hook = None if self.frozen else self.param.register_hook(self.gradient)

    def with_gradient(self, x: Tensor) -> Tensor:
        return with_gradient(x, self.gradient)

    def sparsified(self, module: nn.Module, x: Tensor) -> Tensor:
        """An activation as the method leaves it, in the layout."""
        x = x.to_dense() if isinstance(x, SparseTensor) else x
        matrix = x.reshape(-1, x.shape[-1])
        self.expect(matrix.shape[1])
        epilogue = self.epilogue(module)
        if self.layout is None and not (is_seen(x) or records(x)):
            return epilogue.finish(x, own=False)
        if not stores(x, self.layout):
            return self.method.apply(matrix, epilogue.state, module.training)[0].view(x.shape)
        kept, columns = epilogue.rule(matrix), None
        if kept is not None and kept.rule != "random":  # which changes numbers, too
            y, where = matrix, kept
        elif (columns := self.method.columns(matrix.detach())) is not None:
            y, where = matrix, columns
        else:
            y, where = self.method.apply(matrix, epilogue.state, module.training)
        y = self.store(y, where, x.shape, self.kind == "input" and self.linear)
        if x.dim() != 2:
            y.leading = x.shape[:-1]
        return y

    def epilogue(self, module: nn.Module, activation: str | None = None) -> Epilogue:
        """What happens to an activation at the site, for the operator that computes it."""
        state = {name: getattr(module, self.full(name)) for name in self.state}
        return Epilogue(self.method, state, module.training, self.layout, activation or "none", self.plans)

    def gradient(self, grad: Tensor) -> Tensor:
        """A gradient as the method leaves it, in the layout."""
        dense = grad.to_dense() if isinstance(grad, SparseTensor) else grad
        matrix = dense.flatten(1) if self.kind == "grad_weight" else dense.reshape(-1, dense.shape[-1])
        self.expect(matrix.shape[1])
        y, mask = self.method.apply(matrix, {}, True)
        return self.store(y, mask, dense.shape) if stores(dense, self.layout) else y.view(dense.shape)

    def expect(self, features: int) -> None:
        """Raise ValueError if the method cannot take rows of this width."""
        try:
            self.method.check(features)
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    def store(self, y: Tensor, where: Tensor | Kept, shape: torch.Size, as_matrix: bool = False) -> Tensor:
        """In the layout; `shape` is that of the tensor, which has two dimensions unless the module takes a matrix."""
        if len(shape) != 2 and not as_matrix:
            raise ValueError(
                f"{self.where}: Expected a matrix (tokens, features) for {self.layout}, got shape {tuple(shape)}; "
                "flatten the tokens first, or leave layout= out, which gives the same numbers."
            )
        try:
            y = stored(y, where, self.layout, self.method.full_gradient)
            y.cache.plans = self.plans
            return y
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from None

    # copies: a Parameter's own hooks are not copied with it

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "hook": None, "plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.param is not None:
            self._hook_weight()


def change_first(args: tuple, kwargs: dict, change, where: str) -> tuple[tuple, dict]:
    """The arguments with their first floating-point tensor changed."""
    for i, a in enumerate(args):
        if isinstance(a, Tensor) and a.is_floating_point():
            return (*args[:i], change(a), *args[i + 1 :]), kwargs
    for name, a in kwargs.items():
        if isinstance(a, Tensor) and a.is_floating_point():
            return args, {**kwargs, name: change(a)}
    raise TypeError(f"{where}: Expected a floating-point tensor among the arguments, got none.")


def change_output(output: Any, change, where: str) -> Any:
    """The output, or the first floating-point tensor in a tuple, changed."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return change(output)
    if type(output) in (tuple, list):
        for i, a in enumerate(output):
            if isinstance(a, Tensor) and a.is_floating_point():
                return type(output)((*output[:i], change(a), *output[i + 1 :]))
    kind = type(output).__name__
    raise TypeError(f"{where}: Expected a floating-point tensor, or a tuple with one, as the output, got {kind}.")


def expect_no_gradient_site(targets: Iterable[Any]) -> None:
    """Raise ValueError if the gradient of a weight that is to become sparse, a `Target`, has a site."""
    for target in targets:
        for module, _ in target.owners:
            if (site := vars(module).get(SITES, {}).get("grad_weight")) is not None:
                raise ValueError(
                    f"{target.name}: Expected a weight without a site at its gradient, got {site.method}; take it off "
                    'by sten.sparsify(model, site="grad_weight", sparsifier=None).'
                )


def has_sites(module: nn.Module) -> bool:
    """Whether a module, not those in it, has a site."""
    return bool(vars(module).get(SITES))


def remove_sites(model: nn.Module) -> None:
    """Take all sites of a model off."""
    for module in model.modules():
        for site in list(vars(module).get(SITES, {}).values()):
            site.remove(module)
        vars(module).pop(SITES, None)


def checked_on_sample(site: Site, state: dict[str, Tensor], features: int | None) -> None:
    """Raise ValueError if the site could not take three tokens of its width: of an odd number, for the layout."""
    if features is None:
        return
    site.expect(features)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.randn(3, features)
        for rows in (x, x[:1].expand(3, features)):  # equal tokens keep equal columns
            own = {name: tensor.detach().clone() for name, tensor in state.items()}
            y, mask = site.method.apply(rows, own, True)
            if site.layout is not None:
                site.store(y, mask, rows.shape)
