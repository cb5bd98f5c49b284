"""What sparse weights accept in `load_state_dict`: any form of the same weight, checked; never a silent dense one.

entry of `fc.weight`                                       from
`weight` (a SparseTensor)                                  a finalized model
`weight` (2-D values), `weight_pattern.<part>`             a model in trainable form
`weight.values`, `weight.<part>`                           sten.save's files; the trainable form before sten 0.1
`weight` (dense)                                           any model: it must be zero off the present pattern
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layouts.registry import fields
from ..ops.attributes import entries_of
from ..ops.padding import dense_to_values
from ..tensor import SparseTensor, checked
from ..training.attribute import SUFFIX, trained_of
from ..training.distributed import whole
from ..training.pattern_weight import PatternWeight, as_matrix
from ..training.trained_weight import is_of_run


def accept_every_form(module: nn.Module) -> None:
    """Let `load_state_dict` of a module with sparse weights take dense, sparse and part-wise entries.

    As long as it has sparse weights, torch.jit.script refuses it.
    """
    if any(isinstance(p, SparseTensor) for p in module._parameters.values()) or any(trained_of(module)):
        module.__prepare_scriptable__ = refuse_script  # asked for by torch.jit.script
    else:
        vars(module).pop("__prepare_scriptable__", None)
    for hook in module._load_state_dict_pre_hooks.values():
        if getattr(hook, "hook", None) is _fit_state:
            return
    module.register_load_state_dict_pre_hook(_fit_state)


def refuse_script() -> None:
    """Raise: a TorchScript file has the storage of every Parameter, and that of a SparseTensor is empty."""
    raise RuntimeError(
        "Expected a model without sparse weights for torch.jit.script, got one with some; use torch.export, or script "
        "a dense copy, sten.densify(copy.deepcopy(model))."
    )


def _fit_state(module: nn.Module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Rewrite the entries of sparse weights to the form that the module has now; a dense weight takes dense ones."""
    trained = {name: weight for name, weight in trained_of(module) if isinstance(weight, PatternWeight)}
    sparse = {name: p for name, p in module._parameters.items() if isinstance(p, SparseTensor)}
    for name in [*sparse, *trained]:
        weight = trained.get(name)
        present = sparse[name].detach() if weight is None else weight.tensor(module._parameters[name]).detach()
        try:
            entry = _entry(state_dict, prefix + name, present, weight)
        except (ValueError, TypeError) as error:
            errors.append(f"{prefix + name}: {error}")
            entry = present  # so that the weight is not reported as missing, too
        if entry is None:
            continue
        if weight is None:
            state_dict[prefix + name] = entry
            beside = prefix + name + SUFFIX + "."  # what only a run that goes on needs
            for key in [k for k in state_dict if k.startswith(beside) and is_of_run(k.removeprefix(beside))]:
                del state_dict[key]
        else:
            if entry is not present:
                weight.load(entry.parts, metadata.get("assign_to_params_buffers", False))
            state_dict[prefix + name] = module._parameters[name]


def _entry(state_dict, key: str, present: SparseTensor, weight: PatternWeight | None) -> SparseTensor | None:
    """The weight that a state dict holds under this name, in the layout of `present`; it leaves the dict.

    A sparse entry brings its own pattern; a dense one must be zero off the present pattern.
    """
    parts = _parts(state_dict, key, present)
    entry = state_dict.pop(key, None)
    if parts:
        layout = type(present.sparse_layout).__name__, fields(present.sparse_layout)
        return SparseTensor(*checked(*layout, parts, present.stored_shape, present.transposed))
    if entry is None:
        return None
    if not isinstance(entry, Tensor) or entry.shape != present.shape:
        shape = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
        raise ValueError(f"the entry must be a tensor of shape {tuple(present.shape)}; got {shape}.")
    entry = whole(entry.detach())
    if not isinstance(entry, SparseTensor):
        if weight is not None and weight.lacks_numbers:
            raise ValueError(
                "Expected a sparse entry after to_empty, got a dense one; load a sparse model's state dict."
            )
        return present.with_values(dense_to_values(present, entry.to(present.device), "load_state_dict"))
    if entry.sparse_layout == present.sparse_layout and entry.transposed == present.transposed:
        entry.sparse_layout.validate(entry.parts, entry.stored_shape)
        return entry
    return entries_of(entry, present)


def _parts(state_dict, key: str, present: SparseTensor) -> dict[str, Tensor]:
    """The parts of the weight that the state dict holds one by one, in either spelling; they leave it."""
    pattern = [name for name in present.parts if name != "values"]
    beside = {name: f"{key}{SUFFIX}.{name}" for name in pattern}
    if key in state_dict and pattern and all(name in state_dict for name in beside.values()):
        values = state_dict.pop(key)
        parts = {name: state_dict.pop(full) for name, full in beside.items()}
        return {"values": _unflattened(values, present), **parts}
    return {k.removeprefix(key + "."): state_dict.pop(k) for k in list(state_dict) if k.startswith(key + ".")}


def _unflattened(values: Tensor, present: SparseTensor) -> Tensor:
    """The trained 2-D values as the layout has them."""
    like = present.parts["values"]
    width = None if like.dim() == 2 else as_matrix(like).shape[1]
    if not isinstance(values, Tensor) or values.dim() != 2 or width not in (None, values.shape[1]):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"Expected the trained values as a matrix of {tuple(as_matrix(like).shape)}, got {shape}.")
    values = whole(values.detach())
    return values.view(len(values), *(like.shape[1:] if like.dim() != 2 else values.shape[1:]))


def finalized_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names it has when finalized: sparse weights of either form as SparseTensors.

    A tied weight is the same object under each of its names.
    """
    state = dict(model.state_dict(keep_vars=True))
    made: dict[int, SparseTensor] = {}
    for prefix, module in model.named_modules():
        for name, weight in trained_of(module):
            full = f"{prefix}.{name}" if prefix else name
            state = {key: value for key, value in state.items() if not key.startswith(f"{full}{SUFFIX}.")}
            if id(weight) not in made:
                made[id(weight)] = weight.tensor(module._parameters[name])
            state[full] = made[id(weight)]
    return state
