"""What sparse weights accept in `load_state_dict`: any form of the same weight, checked; never a silent dense one.

entry of `fc.weight`                                       from
`weight` (a SparseTensor)                                  a finalized model
`weight` (2-D values), `weight_pattern.<part>`             a model in trainable form
`weight.values`, `weight.<part>`                           sten.save's files; the trainable form before sten 0.1
`weight` (dense)                                           any model: it must be zero off the present pattern
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn, strided

from ..checked import checked, expect_parts_of
from ..errors import FormatError
from ..layouts.registry import fields
from ..ops.attributes import entries_of
from ..ops.padding import dense_to_values
from ..tensor import SparseTensor
from ..training.attribute import SUFFIX, installed, trained_of
from ..training.distributed import sharded, whole
from ..training.pattern_weight import PatternWeight, as_matrix
from ..training.run_problems import expect_one_run, problem_of
from ..training.trained_weight import TrainedWeight, is_of_run
from .dense_entries import expect_fit
from .pretrained import note_pretrained, take_run
from .sites import has_sites


class Checked(NamedTuple):
    """What `_prepare` puts in the place of an entry: the weight, checked, and whether it is another one."""

    weight: SparseTensor
    changed: bool


def accept_every_form(model: nn.Module) -> None:
    """Let `load_state_dict` of a model, and of each module that has sparse weights below it, take every form."""
    above: set[str] = set()
    above_sites: set[str] = set()
    for path, module in model.named_modules():
        has_sparse = any(True for _ in _sparse_weights(module)) or bool(installed(module))
        mark_for_script(module, has_sparse)
        steps = path.split(".")
        around = {".".join(steps[:depth]) for depth in range(len(steps) + 1)}
        above |= around if has_sparse else set()
        above_sites |= around if has_sites(module) else set()
    for path, module in model.named_modules():
        note_pretrained(module, path in above or path in above_sites)
    for path in above:
        module = model.get_submodule(path)
        if not any(getattr(hook, "hook", None) is _fit_state for hook in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(_fit_state)


def mark_for_script(module: nn.Module, has_sparse: bool) -> None:
    """Let torch.jit.script, which asks for this method, refuse a module as long as it has sparse weights."""
    if has_sparse:
        module.__prepare_scriptable__ = refuse_script
    else:
        vars(module).pop("__prepare_scriptable__", None)


def refuse_script() -> None:
    """Raise: a TorchScript file has the storage of every Parameter, and that of a SparseTensor is empty."""
    raise RuntimeError(
        "Expected a model without sparse weights for torch.jit.script, got one with some; use torch.export, or script "
        "a dense copy, sten.densify(copy.deepcopy(model))."
    )


def _fit_state(module: nn.Module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Check the entries of all modules below before one is written; then write those of this module's sparse weights,
    in the form that they have now."""
    assign = metadata.get("assign_to_params_buffers", False)
    for path, below in module.named_modules(remove_duplicate=False):
        if hasattr(below, "slice_state"):  # a ParallelLinear, of which this rank has a part
            below.slice_state(state_dict, prefix + path + "." if path else prefix)
    take_run(module, state_dict, prefix)
    expect_fit(module, state_dict, prefix, assign, _fit_state)
    _prepare(module, state_dict, prefix, assign)
    for name, weight in _sparse_weights(module):
        key = prefix + name
        entry = state_dict.get(key)
        if not isinstance(entry, Checked):
            continue
        if weight is None:
            state_dict[key] = entry.weight
            beside = key + SUFFIX + "."  # what only a run that goes on needs
            for other in [k for k in state_dict if k.startswith(beside) and is_of_run(k.removeprefix(beside))]:
                del state_dict[other]
        else:
            if entry.changed:
                weight.load(entry.weight.parts, assign)
            state_dict[key] = module._parameters[name]


def _sparse_weights(module: nn.Module) -> Iterator[tuple[str, PatternWeight | None]]:
    """(name, PatternWeight; None where it is finalized) of the module's own sparse weights."""
    for name, param in module._parameters.items():
        if isinstance(param, SparseTensor):
            yield name, None
    for name, weight in trained_of(module):
        if isinstance(weight, PatternWeight):
            yield name, weight


def _prepare(root: nn.Module, state_dict, prefix: str, assign: bool) -> None:
    """Put a `Checked` in the place of each sparse weight's entries, of all modules from `root` on.

    FormatError, before anything is written, where an entry cannot be loaded.
    """
    modules = [(prefix + path + "." if path else prefix, m) for path, m in root.named_modules(remove_duplicate=False)]
    runs: dict[str, tuple[TrainedWeight, dict[str, Tensor]]] = {}
    for below, module in modules:
        for name, weight in trained_of(module):
            beside = below + name + SUFFIX + "."
            state = {key.removeprefix(beside): value for key, value in state_dict.items() if key.startswith(beside)}
            runs[below + name] = weight, state
            run = {name: state[name] for name in weight.run_names() if name in state}
            averages = {name: value for name, value in state.items() if name.startswith("momentum_")}
            if run and (problem := problem_of(weight, run, averages)):
                raise FormatError(f"{below + name}: {problem}.")
    expect_one_run(runs)
    for below, module in modules:
        for name, weight in _sparse_weights(module):
            key, param = below + name, module._parameters[name]
            if isinstance(state_dict.get(key), Checked):
                continue
            present = (param if weight is None else weight.tensor(param)).detach()
            entry = _named(key, entry_of, state_dict, key, present, weight)
            if entry is not None:
                _expect_numbers(key, entry, present, assign)
                state_dict[key] = Checked(entry, entry is not present)


def _named(key: str, check: Callable[..., Any], *args: Any) -> Any:
    """The result of a check, whose error then begins with the weight's name."""
    try:
        return check(*args)
    except (ValueError, TypeError) as error:
        raise FormatError(f"{key}: {error}") from error


def _expect_numbers(key: str, entry: SparseTensor, present: SparseTensor, assign: bool) -> None:
    if entry.parts["values"].is_meta and not present.parts["values"].is_meta and not assign:
        raise FormatError(f"{key}: Expected parts with numbers, got parts on the meta device; pass assign=True.")


def entry_of(state_dict, key: str, present: SparseTensor, weight: PatternWeight | None) -> SparseTensor | None:
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
        expect_parts_of(entry.sparse_layout, entry.parts, entry.stored_shape)
        return entry
    return entries_of(entry, present)


def _parts(state_dict, key: str, present: SparseTensor) -> dict[str, Tensor]:
    """The parts of the weight that the state dict holds one by one, in either spelling; they leave it."""
    pattern = [name for name in present.parts if name != "values"]
    beside = {name: f"{key}{SUFFIX}.{name}" for name in pattern}
    given = [name for name, full in beside.items() if full in state_dict]
    if given:
        twice = [full for full in state_dict if full.startswith(key + ".")]
        missing = [full for full in (key, *beside.values()) if full not in state_dict]
        if twice:
            raise ValueError(f"Expected one spelling of the weight's parts, got {beside[given[0]]!r} and {twice[0]!r}.")
        if missing:
            raise ValueError(f"Expected all parts of the weight, got {beside[given[0]]!r} without {missing[0]!r}.")
        values = state_dict.pop(key)
        parts = {name: state_dict.pop(full) for name, full in beside.items()}
        return {"values": _unflattened(values, present), **parts}
    return {k.removeprefix(key + "."): state_dict.pop(k) for k in list(state_dict) if k.startswith(key + ".")}


def _unflattened(values: Tensor, present: SparseTensor) -> Tensor:
    """The trained 2-D values as the layout has them."""
    like = present.parts["values"]
    width = None if like.dim() == 2 else as_matrix(like).shape[1]
    matrix = isinstance(values, Tensor) and not isinstance(values, SparseTensor) and values.dim() == 2
    matrix = matrix and values.layout is strided
    if not matrix or width not in (None, values.shape[1]):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"Expected the trained values as a matrix of {tuple(as_matrix(like).shape)}, got {shape}.")
    values = whole(values.detach())
    return values.view(len(values), *(like.shape[1:] if like.dim() != 2 else values.shape[1:]))


def expect_undivided(model: nn.Module) -> None:
    """Raise TypeError if this rank has only a part of the model: what is copied into gathered tensors would be lost."""
    parts = any(hasattr(module, "whole_weight") for module in model.modules())
    if parts or any(sharded(p) for p in model.parameters()):
        raise TypeError(
            "Expected a model that is not divided among ranks for sten.load, got one that is; load before "
            "sten.parallelize_module or fully_shard, or call model.load_state_dict."
        )


def finalized_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the names it has when finalized: sparse weights of either form as SparseTensors.

    A tied weight is the same object under each of its names. DTensors are gathered, so that all ranks have to call it.
    """
    state = model.state_dict(keep_vars=True)
    full = {id(value): whole(value) for value in state.values() if isinstance(value, Tensor)}
    state = {key: full.get(id(value), value) for key, value in state.items()}
    made: dict[int, SparseTensor] = {}
    for prefix, module in model.named_modules():
        for name, weight in trained_of(module):
            full = f"{prefix}.{name}" if prefix else name
            state = {key: value for key, value in state.items() if not key.startswith(f"{full}{SUFFIX}.")}
            if id(weight) not in made:
                divided = hasattr(module, "whole_weight")  # a ParallelLinear
                made[id(weight)] = module.whole_weight() if divided else weight.tensor(module._parameters[name])
            state[full] = made[id(weight)]
    return state
