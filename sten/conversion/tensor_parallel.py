"""parallelize_module: tensor parallelism of linear layers, each rank with its own slice of a sparse weight.

DTensor divides dense tensors. A sparse weight is divided here, before it is used: each rank packs the rows
(`ColwiseParallel`) or the columns (`RowwiseParallel`) that it computes with. Activations are exchanged by DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layouts.checks import expect_held
from ..tensor import SparseTensor, from_dense
from ..training.attribute import SUFFIX, install, read_finalized, remove
from ..training.inference_mode import ordinary_tensors
from ..training.pattern_weight import PatternWeight, as_matrix
from .record import known_optimizers
from .select import Target, sparse_weights
from .sites import has_sites
from .state_dict_hooks import accept_every_form, entry_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

Model = TypeVar("Model", bound=nn.Module)


class ParallelLinear(nn.Linear):
    """A linear layer of which this rank has a slice; its state dict is that of the whole layer.

    Attributes:
        mesh: the one-dimensional DeviceMesh of the ranks that have the other slices.
        style: the `ColwiseParallel` or `RowwiseParallel`, which says how inputs and outputs are divided.
        dim: of the dense weight, the dimension that is divided: 0 (outputs) or 1 (inputs).
    """

    mesh: DeviceMesh
    style: Any
    dim: int

    def forward(self, input: Tensor) -> Tensor:
        from torch.distributed.tensor import Partial, Replicate, Shard

        columns = (Shard(input.dim() - 1),)
        # where each rank computes with the whole input, the gradients of the ranks are parts of a sum
        needs, grads = ((Replicate(),), (Partial(),)) if self.dim == 0 else (columns, columns)
        x = self._distributed(input, self.style.input_layouts).redistribute(placements=needs)
        y = F.linear(x.to_local(grad_placements=grads), self.weight, self.bias if self.dim == 0 else None)
        y = self._distributed(y, columns if self.dim == 0 else (Partial(),))
        y = y.redistribute(placements=self.style.output_layouts)
        if self.dim == 1 and self.bias is not None:  # once, to the sum
            y = y + self._distributed(self.bias, (Replicate(),))
        return y.to_local() if self.style.use_local_output else y

    def _distributed(self, t: Tensor, placements: tuple) -> Any:
        from torch.distributed.tensor import DTensor

        return t if isinstance(t, DTensor) else DTensor.from_local(t, self.mesh, placements, run_check=False)

    def slice_of(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's part of a dense tensor."""
        return whole.chunk(self.mesh.size(), dim)[self.mesh.get_local_rank()].contiguous()

    def slice_of_weight(self, whole: SparseTensor) -> SparseTensor:
        """This rank's part of a weight; ValueError if the layout cannot hold it."""
        dense, mask = (self.slice_of(t, self.dim) for t in (whole.to_dense(), whole.mask()))
        return from_dense(dense, whole.sparse_layout, mask)

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """The tensor of which every rank has a part; a collective."""
        from torch.distributed.tensor import Shard

        return self._distributed(part.contiguous(), (Shard(dim),)).full_tensor()

    @torch.no_grad()
    def whole_weight(self) -> Tensor:
        """The weight of which every rank has a slice; a collective."""
        w = self.weight.detach()
        if not isinstance(w, SparseTensor):  # after sten.densify
            return self.whole(w, self.dim)
        dense, mask = (self.whole(t, self.dim) for t in (w.to_dense(), w.mask().to(torch.uint8)))
        return from_dense(dense, w.sparse_layout, mask.bool())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """That of the whole layer, gathered from all ranks: every one of them has to call it."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        w = self.whole_weight()
        if isinstance(w, SparseTensor) and not isinstance(self._parameters["weight"], SparseTensor):  # in training
            state[prefix + "weight"] = as_matrix(w.parts["values"])
            for name in w.sparse_layout.pattern:
                state[f"{prefix}weight{SUFFIX}.{name}"] = w.parts[name]
        else:
            state[prefix + "weight"] = w
        if self.bias is not None and self.dim == 0:
            state[prefix + "bias"] = self.whole(self.bias.detach(), 0)
        return state

    def slice_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put this rank's slices in the place of the whole layer's entries, before `load_state_dict` checks them."""
        size, w = self.mesh.size(), self.weight
        shape = [*w.shape]
        shape[self.dim] *= size
        key, bias = prefix + "weight", state_dict.get(prefix + "bias")
        entry = state_dict.get(key)
        sparse = isinstance(w, SparseTensor)
        beside = sparse and any(f"{key}{SUFFIX}.{name}" in state_dict for name in w.sparse_layout.pattern)
        if sparse and (isinstance(entry, SparseTensor) or beside):
            like = from_dense(w.parts["values"].new_zeros(shape), w.sparse_layout)
            state_dict[key] = self.slice_of_weight(entry_of(state_dict, key, like, None))
        elif isinstance(entry, Tensor) and [*entry.shape] == shape:
            state_dict[key] = self.slice_of(entry, self.dim)
        if self.dim == 0 and isinstance(bias, Tensor) and len(bias) == shape[0]:
            state_dict[prefix + "bias"] = self.slice_of(bias, 0)


@ordinary_tensors
def parallelize_module(
    model: Model, device_mesh: DeviceMesh, parallelize_plan: ParallelStyle | Mapping[str, ParallelStyle]
) -> Model:
    """`torch.distributed.tensor.parallel.parallelize_module` for a model with sparse linear layers, in place.

    Every rank starts with the whole model, finalized or with static patterns in training, and keeps the slice of each
    layer of the plan that it computes with: of the outputs (`ColwiseParallel`) or of the inputs (`RowwiseParallel`).
    What the plan has for modules without sparse weights is left to torch. Make optimizers afterwards.

    The state dict of the result is that of the whole model: all ranks have to call `state_dict`, `sten.save` and
    `load_state_dict`. State of optimizers belongs to the slices: save it for each rank.

    Args:
        model: with sparse weights; not wrapped yet.
        device_mesh: of one dimension.
        parallelize_plan: {name of a module, with wildcards: style}, or one style for the model itself.

    Raises:
        ValueError, TypeError: a layer that cannot be divided; the model is left as it was.

    Example:
        >>> import torch, sten
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = sten.sparsify(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)), sten.NM(2, 4))
        >>> model = sten.parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        >>> model(torch.ones(1, 8)).shape
        torch.Size([1, 8])
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor.parallel import parallelize_module as parallelize_dense

    if device_mesh.ndim != 1:
        raise ValueError(f"Expected a mesh of one dimension, got {device_mesh.ndim}; take one of them, mesh['tp'].")
    plan = _by_name(model, parallelize_plan)
    modules = {name: model.get_submodule(name) for name in plan}
    for name, module in modules.items():
        if has_sites(module):
            raise ValueError(
                f"Expected modules without sites to be divided, got {name} with some, whose methods would see a part "
                "of each token; take them off by sparsifier=None."
            )
    targets = [target for target in sparse_weights(model) if any(m in modules.values() for m, _ in target.owners)]
    slices = {target.name: _divided(target, device_mesh, modules, plan) for target in targets}
    sparse = {module for target in targets for module, _ in target.owners}
    parallelize_dense(model, device_mesh, {name: plan[name] for name in plan if modules[name] not in sparse})
    for target in targets:
        _install(target, *slices[target.name], device_mesh)
    accept_every_form(model)
    return model


def _by_name(model: nn.Module, plan: Any) -> dict[str, Any]:
    """The style of each module; wildcards stand for a part of the path between dots, as torch has it."""
    if not isinstance(plan, Mapping):
        return {"": plan}
    paths, found = [path for path, _ in model.named_modules(remove_duplicate=False)], {}
    for pattern, style in plan.items():
        steps = pattern.split(".")
        named = [p for p in paths if len(p.split(".")) == len(steps) and all(map(fnmatchcase, p.split("."), steps))]
        if not named:
            raise ValueError(f"Expected {pattern!r} to match a module of {type(model).__name__}, got none.")
        found.update(dict.fromkeys(named, style))
    return found


def _divided(target: Target, mesh: DeviceMesh, modules: dict[str, nn.Module], plan: dict[str, Any]):
    """(style, dimension, this rank's slice of the weight); ValueError on every rank if one cannot have its slice."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    owners = [module for module, _ in target.owners]
    styles = [plan[name] for name, module in modules.items() if any(module is owner for owner in owners)]
    style, weight, size = styles[0], target.weight, mesh.size()
    if len(owners) > 1:
        raise ValueError(f"Expected {target.name} in one module for tensor parallelism, got a tied weight; untie it.")
    plain = getattr(type(owners[0]), "plain_class", type(owners[0]))
    if plain is not nn.Linear or not isinstance(style, (ColwiseParallel, RowwiseParallel)):
        raise TypeError(
            f"Expected ColwiseParallel or RowwiseParallel of an nn.Linear for {target.name}, got "
            f"{type(style).__name__} of {plain.__name__}; leave it out of the plan, or sten.densify it."
        )
    if weight is not None and weight.method is not None:
        raise ValueError(
            f"Expected {target.name} finalized or with a static pattern, got it in training with {weight.method}; call "
            "sten.finalize(model) first, and sten.trainable(model) to train its values."
        )
    if target.tensor.grad is not None or known_optimizers(*target.owners[0]):
        raise ValueError(
            f"Expected {target.name} without gradient and optimizer, got one; make the optimizer after this call."
        )
    dim, stored = 0 if isinstance(style, ColwiseParallel) else 1, target.stored
    if stored.shape[dim] % size:
        kind = ("outputs", "inputs")[dim]
        raise ValueError(f"Expected {target.name} with {kind} divisible by {size} ranks, got {stored.shape[dim]}.")
    dense, masks = stored.to_dense().chunk(size, dim), stored.mask().chunk(size, dim)
    try:
        for mask in masks:  # of every rank, so that all raise
            stored.sparse_layout.check(tuple(mask.shape))
            expect_held(stored.sparse_layout, mask.contiguous())
    except ValueError as error:
        raise ValueError(
            f"Expected {size} slices of {target.name} that {stored.sparse_layout} can store, got one that it cannot; "
            f"make it {'Rowwise' if dim == 0 else 'Colwise'}Parallel, or call sten.finalize(model, sten.CSR()) first."
        ) from error
    rank = mesh.get_local_rank()
    return style, dim, from_dense(dense[rank].contiguous(), stored.sparse_layout, masks[rank].contiguous())


def _install(target: Target, style: Any, dim: int, w: SparseTensor, mesh: DeviceMesh) -> None:
    """Give the module its slice, in the form that the weight has."""
    ((module, name),) = target.owners
    trains, requires_grad = target.weight is not None, target.tensor.requires_grad
    if trains:
        remove(module, name, target.tensor)
    module.__class__ = ParallelLinear
    module.mesh, module.style, module.dim = mesh, style, dim
    module.out_features, module.in_features = w.shape
    if dim == 0 and module.bias is not None:
        module.bias = nn.Parameter(module.slice_of(module.bias.detach(), 0), module.bias.requires_grad)
    if trains:
        param = nn.Parameter(as_matrix(w.parts["values"]), requires_grad)
        install(module, name, param, PatternWeight(target.name, w.requires_grad_(requires_grad)))
    else:
        module._parameters["weight"] = nn.Parameter(w, requires_grad)
        read_finalized(module, name, sparse=True)
