"""Models of transformers: what `save_pretrained` writes, whatever form their weights are in.

A sparse weight `fc.weight` is two or more tensors, so that a reader that does not know sten fails by their shapes:

    fc.weight                         the values as a matrix, as in trainable form
    fc.weight_pattern.<part>          the pattern
    fc.weight_pattern.run_step, ...   only of a weight that a method trains: what `model.state_dict()` has of the run
    fc.weight_pattern.dense_weight    the same, of a dense weight, whose effective weight is the above; and dense_mask
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from ..tensor import SparseTensor
from ..training.attribute import SUFFIX, trained_of
from ..training.dense_weight import DenseWeight
from ..training.pattern_weight import as_matrix
from ..training.trained_weight import is_of_run

# Loaded by its name, as an entry point would be: it stands above this module, and only models of transformers need it.
FILES = "sten.integrations.pretrained"
KEY = "sten.pretrained"  # the description of the sparse weights, in the metadata of a file
DENSE, MASK = "dense_weight", "dense_mask"  # a part of a pattern may be called mask, too


def note_pretrained(module: nn.Module, has_sparse: bool) -> None:
    """Let `save_pretrained` of a model of transformers write sparse weights and sites, as long as it has some."""
    kinds = {(cls.__name__, cls.__module__.partition(".")[0]) for cls in type(module).__mro__}
    if ("PreTrainedModel", "transformers") in kinds and (has_sparse or "hf_quantizer" in vars(module)):
        importlib.import_module(FILES).note(module, has_sparse)


def pretrained_state(model: nn.Module, finalized: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(plain tensors, {name: SparseTensor}) of a model, given its state as finalized."""
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, SparseTensor] = {}
    seen: set[int] = set()
    runs = _runs(model)
    for name, value in finalized.items():
        if not isinstance(value, SparseTensor):
            tensors[name] = value
            continue
        tied, run = id(value) in seen, runs.get(name, {})
        seen.add(id(value))
        if tied and not run:
            continue  # the model ties it again; a run's state is read under each name
        parts = {f"{name}{SUFFIX}.{part}": t for part, t in value.parts.items() if part != "values"}
        own = {name: as_matrix(value.parts["values"]), **parts, **run}
        tensors.update({key: t.detach().clone() if tied else t.detach() for key, t in own.items()})
        sparse[name] = value.detach()
    return tensors, sparse


def _runs(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By weight, the tensors that a run needs beside what is finalized."""
    runs: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, weight in trained_of(module):
            full = f"{path}.{name}" if path else name
            state = weight.state_dict()
            run = {key: t for key, t in state.items() if is_of_run(key)}
            if isinstance(weight, DenseWeight):
                run[DENSE] = module._parameters[name]
                run |= {MASK: run.pop("mask")} if "mask" in run else {}
            runs[full] = {f"{full}{SUFFIX}.{key}": t for key, t in run.items()}
    return runs


def take_run(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Of a state from `save_pretrained`, give dense weights in training their own numbers, and drop the patterns."""
    if not any(key.endswith(f"{SUFFIX}.{DENSE}") for key in state_dict):
        return
    for path, module in root.named_modules(remove_duplicate=False):
        for name, weight in trained_of(module):
            beside = prefix + (f"{path}.{name}" if path else name) + SUFFIX + "."
            if beside + DENSE not in state_dict or not isinstance(weight, DenseWeight):
                continue
            own = {key.removeprefix(beside): state_dict.pop(key) for key in list(state_dict) if key.startswith(beside)}
            state_dict[beside.removesuffix(SUFFIX + ".")] = own[DENSE]
            others = own.keys() - {DENSE, MASK, *weight.layout.pattern}
            state_dict.update({beside + last: own[last] for last in own if last in others})
            if MASK in own:
                state_dict[beside + "mask"] = own[MASK]
