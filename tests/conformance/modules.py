"""The modules of module_db with every weight sparse: forward, backward, state dict, copies; finalized and trainable."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import sten

from .classify import Verdict, difference, is_refusal, line, wrong_gradient
from .database import module_db
from .forms import ALL, FEW, Form
from .operators import Attempt, can_be_sparse

CHOSEN = 2  # constructor calls of a module: the first in every form, the second in few


def module_units() -> dict[str, Callable[[], Iterator[Attempt]]]:
    """The attempts of every module that can be made of float32 weights, by its name."""
    return {info.name: functools.partial(attempts, info) for info in module_db if not info.is_lazy}


def attempts(info: Any) -> Iterator[Attempt]:
    """A module's samples in every form. Modules without a matrix among their parameters have none."""
    torch.manual_seed(0)
    samples = info.module_inputs_func(info, "cpu", torch.float32, False, True)
    usable = [s for s in samples if weights_of(make(info, s)) and s.forward_input is not None]
    for number, sample in enumerate(usable[:CHOSEN]):
        shapes = [tuple(w.shape) for _, _, w in weights_of(make(info, sample))]
        for form in ALL if number == 0 else FEW:
            if not all(form.fits(shape) for shape in shapes):
                continue
            for kind, act in ACTS.items():
                for trainable in (False, True) if not form.transposed else (False,):
                    play = functools.partial(judge, info, sample, form, trainable, act)
                    name = f"sample {number}/{'trainable' if trainable else 'finalized'}"
                    yield Attempt(info.name, kind, name, str(form), play)


def make(info: Any, sample: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = sample.constructor_input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return info.module_cls(*arguments.args, **arguments.kwargs)


def weights_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(module, name, parameter) of each parameter that can be sparse, once for each name."""
    return [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if can_be_sparse(p)]


def judge(info: Any, sample: Any, form: Form, trainable: bool, act: Callable) -> Verdict:
    """The act on the module with sparse weights and on its dense twin."""
    dense = make(info, sample)
    sparse = copy.deepcopy(dense)
    masks = {}
    for (owner, name, w), (twin, _, _) in zip(weights_of(sparse), weights_of(dense), strict=True):
        weight = form.store(w)
        masks[next(n for n, p in dense.named_parameters() if p is getattr(twin, name))] = weight.mask()
        getattr(twin, name).data.copy_(weight.to_dense())
        setattr(owner, name, nn.Parameter(weight))
    inputs = (sample.forward_input.args, sample.forward_input.kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = act(dense, inputs, None)
        except Exception as error:
            return Verdict("skipped", line(error))
        try:
            got = act(sten.trainable(sparse) if trainable else sparse, inputs, masks)
        except Exception as error:
            return Verdict("refused" if is_refusal(error) else "crash", line(error))
    if isinstance(want, dict):
        return compare_gradients(want, got, masks)
    problem = difference(want, got, [], False)
    return Verdict("wrong", problem) if problem else Verdict("right")


def compare_gradients(want: dict, got: dict, masks: dict[str, Tensor]) -> Verdict:
    for name, grad in want.items():
        problem = wrong_gradient(grad, got.get(name), masks.get(name), False)
        if problem:
            return Verdict("wrong", f"gradient of {name}: {problem}")
    return Verdict("right")


# acts: (module, (args, kwargs), masks where it is sparse) -> what is compared


def forward(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    args, kwargs = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, inputs)
    torch.manual_seed(0)
    return module(*args, **kwargs)


def backward(module: nn.Module, inputs: tuple, masks: Any) -> dict:
    results = [r for r in tree_flatten(forward(module, inputs, masks))[0] if isinstance(r, Tensor) and r.requires_grad]
    torch.manual_seed(1)
    torch.autograd.backward(results, [torch.randn(r.shape, dtype=r.dtype) for r in results])
    names = masks if masks is not None else [n for n, _ in module.named_parameters()]
    gradients = {n: p.grad for n, p in module.named_parameters()}
    return {**gradients, **{n: attribute(module, n).grad for n in names}}


def attribute(module: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    return getattr(module.get_submodule(".".join(path)), last)


def forward_eval(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    with torch.no_grad():
        return forward(module.eval(), inputs, masks)


def deepcopied(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    return forward(copy.deepcopy(module), inputs, masks)


def pickled(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    return forward(pickle.loads(pickle.dumps(module)), inputs, masks)


def loaded(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    """Load a module's own state into a copy of it whose stored numbers are others."""
    state = {n: t.detach().clone() for n, t in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    module.load_state_dict(state)
    return forward(module, inputs, masks)


def cast(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    """Cast to float64 and back."""
    return forward(module.double().float(), inputs, masks)


def functional(module: nn.Module, inputs: tuple, masks: Any) -> Any:
    torch.manual_seed(0)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return torch.func.functional_call(module, state, *inputs)


ACTS = {
    "forward": forward,
    "backward": backward,
    "eval": forward_eval,
    "deepcopy": deepcopied,
    "pickle": pickled,
    "load_state_dict": loaded,
    "cast": cast,
    "functional_call": functional,
}
