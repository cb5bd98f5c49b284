"""The operators of op_db and the foreach ones: function, method, in place, out=, alias, backward, writes to a view."""

from __future__ import annotations

import functools
import random as python_random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .classify import Verdict, copied, difference, judge, judge_gradients, played
from .database import LARGEST, dtype_of, foreach_db, operator_db, samples
from .forms import ALL, FEW, Form

UNINITIALIZED = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted"}
CHOSEN = 3  # samples of an operator: the first in every form, the others in two


class Attempt(NamedTuple):
    """One row: what it is called, and what plays it."""

    operator: str
    kind: str
    case: str
    form: str
    play: Callable[[], Verdict]


class Call(NamedTuple):
    """A function and the tree of its arguments, whose leaves are given as a list."""

    function: Callable
    tree: Any

    def __call__(self, leaves: list) -> Any:
        args, kwargs = tree_unflatten(leaves[: self.tree.num_leaves], self.tree)
        return self.function(*args, **kwargs)

    def into(self, leaves: list) -> Any:
        """With the leaves behind the arguments as out=."""
        args, kwargs = tree_unflatten(leaves[: self.tree.num_leaves], self.tree)
        out = leaves[self.tree.num_leaves :]
        return self.function(*args, **kwargs, out=out[0] if len(out) == 1 else tuple(out))

    def and_write(self, leaves: list) -> None:
        """Write through the views that are returned."""
        for result in tree_flatten(self(leaves))[0]:
            if isinstance(result, Tensor) and result.is_floating_point():
                result.mul_(3)


def name_of(info: Any) -> str:
    return info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")


def operator_units() -> dict[str, Callable[[], Iterator[Attempt]]]:
    """The attempts of every operator, by its name."""
    return {name_of(info): functools.partial(attempts, info) for info in operator_db if dtype_of(info) is not None}


def foreach_units() -> dict[str, Callable[[], Iterator[Attempt]]]:
    return {info.name: functools.partial(foreach_attempts, info) for info in foreach_db}


def can_be_sparse(leaf: Any) -> bool:
    return (
        isinstance(leaf, Tensor)
        and leaf.layout == torch.strided
        and leaf.dtype in (torch.float32, torch.float64)
        and leaf.dim() >= 2
        and 0 < leaf.numel() <= LARGEST
    )


def chosen_samples(info: Any) -> list[tuple]:
    """Samples that can have a sparse argument and differ in more than their numbers, the one that says most first."""
    chosen: dict[str, tuple] = {}
    for args, kwargs in samples(info, dtype_of(info)):
        leaves, tree = tree_flatten((args, kwargs))
        if any(isinstance(a, Tensor) and a.numel() > LARGEST for a in leaves):
            continue
        able = [a for a in leaves if can_be_sparse(a)]
        if able:
            kinds = [a.dim() if isinstance(a, Tensor) else type(a).__name__ for a in leaves]
            one_shape = len({tuple(a.shape) for a in able}) == 1
            value = (able[0].dim() == 2) + one_shape + (len(able) > 1) + (min(able[0].shape) > 1)
            chosen.setdefault(f"{tree}{kinds}{one_shape}", (-value, len(chosen), args, kwargs))
        if len(chosen) == 3 * CHOSEN:
            break
    return [sample[2:] for sample in sorted(chosen.values(), key=lambda sample: sample[:2])[:CHOSEN]]


def attempts(info: Any) -> Iterator[Attempt]:
    for number, (args, kwargs) in enumerate(chosen_samples(info)):
        leaves, tree = tree_flatten((args, kwargs))
        yield from sample_attempts(info, number, leaves, tree)


class Act(NamedTuple):
    """One way to call an operator."""

    kind: str
    alias: str
    call: Callable
    writes: bool


def acts_of(info: Any, function: Call, leaves: list) -> list[Act]:
    """The ways to call an operator without out=: function, method, in place, aliases, and writes to what it returns."""
    tree = function.tree
    acts = [Act("function", "", function, info.name.endswith("_"))]
    for kind, variant in (("method", info.method_variant), ("inplace", info.inplace_variant)):
        if variant is not None and not (kind == "method" and variant is info.op):
            acts.append(Act(kind, "", Call(variant, tree), kind == "inplace"))
    for alias in info.aliases:
        acts += [Act("alias", alias.name, Call(v, tree), False) for v in (alias.op, alias.method_variant) if v]
        if alias.inplace_variant:
            acts.append(Act("alias", alias.name + "_", Call(alias.inplace_variant, tree), True))
    if returns_view(function, leaves):
        acts.append(Act("view", "", Call(function.and_write, tree_of_leaves(leaves)), True))
    return acts


def sample_attempts(info: Any, number: int, leaves: list, tree: Any) -> Iterator[Attempt]:
    """Every act of an operator on one sample, in every form."""
    name, function = name_of(info), Call(info.op, tree)
    is_random = name in UNINITIALIZED or differs_by_seed(function, leaves)
    acts = acts_of(info, function, leaves)
    numbers_alone = not any(isinstance(a, Tensor) and a.dim() and a is not leaves[0] for a in leaves)
    for label, positions, salts in choices(leaves):
        for form in forms_of(number, name, label, [leaves[p] for p in positions]):
            for kind, alias, call, writes in acts:
                scalar = writes and kind != "view" and numbers_alone
                case = "/".join(filter(None, (f"sample {number}", label, alias)))
                play = functools.partial(act, call, leaves, positions, salts, form, writes, scalar, is_random)
                yield Attempt(name, kind, case, str(form), play)
            if info.supports_autograd:
                play = functools.partial(backward, function, leaves, positions, salts, form, is_random)
                yield Attempt(name, "backward", f"sample {number}/{label}", str(form), play)
    if info.supports_out:
        yield from out_attempts(name, number, function, leaves, is_random)


def tree_of_leaves(leaves: list) -> Any:
    """The tree under which a Call hands the list of its leaves on."""
    return tree_flatten(((leaves,), {}))[1]


def choices(leaves: list) -> Iterator[tuple[str, list[int], list[int]]]:
    """Which arguments are sparse: each alone, all with one pattern for each shape, all with patterns of their own."""
    able = [i for i, leaf in enumerate(leaves) if can_be_sparse(leaf)][:4]
    for i in able:
        yield f"argument {i}", [i], [0]
    if len(able) > 1:
        yield "all, one pattern", able, [0] * len(able)
        yield "all, other patterns", able, list(range(len(able)))


def forms_of(number: int, name: str, label: str, weights: list[Tensor]) -> list[Form]:
    """The forms that can store these tensors: all for one sparse argument of the first sample, two for later ones."""
    forms = [
        form
        for form in (ALL if number == 0 and len(weights) == 1 else FEW)
        if all(form.fits(tuple(w.shape)) for w in weights)
    ]
    return forms if number == 0 else python_random.Random(name + label).sample(forms, min(2, len(forms)))


def twins(leaves: list, positions: list[int], salts: list[int], form: Form) -> tuple[list, list]:
    """The arguments, dense and with the sparse ones, of equal numbers."""
    sparse = [copied(a) for a in leaves]
    for position, salt in zip(positions, salts, strict=True):
        sparse[position] = form.store(leaves[position], salt)
    return [copied(a) for a in sparse], sparse


def act(call, leaves, positions, salts, form, writes, scalar, is_random) -> Verdict:
    with torch.no_grad():
        return judge(call, *twins(leaves, positions, salts, form), writes, scalar, is_random)


def backward(call, leaves, positions, salts, form, is_random) -> Verdict:
    return judge_gradients(call, *twins(leaves, positions, salts, form), random=is_random)


def out_attempts(name: str, number: int, call: Call, leaves: list, is_random: bool) -> Iterator[Attempt]:
    """out=: a sparse argument into a dense tensor, a dense one into a sparse tensor, a sparse one into a sparse one."""
    try:
        results = tree_flatten(played(call, [copied(a) for a in leaves]))[0]
    except Exception:
        return
    if not results or not all(isinstance(r, Tensor) and r.layout == torch.strided for r in results):
        return
    torch.manual_seed(2)
    outs = [torch.rand(r.shape).to(r.dtype) for r in results]
    inputs = [i for i, leaf in enumerate(leaves) if can_be_sparse(leaf)][:1]
    targets = [len(leaves) + i for i, out in enumerate(outs) if can_be_sparse(out)]
    for label, positions in (("into dense", inputs), ("of dense", targets), ("of sparse", inputs + targets)):
        if not positions or (label != "into dense" and not targets):
            continue
        whole = [*leaves, *outs]
        for form in forms_of(number, name, label, [whole[p] for p in positions]):
            play = functools.partial(
                act, call.into, whole, positions, [0] * len(positions), form, True, False, is_random
            )
            yield Attempt(name, "out", f"sample {number}/{label}", str(form), play)


def differs_by_seed(call: Call, leaves: list) -> bool:
    """Whether the result depends on the state of the random number generator."""
    seed, results = torch.manual_seed, []
    with mock.patch.object(torch, "manual_seed"):  # some samples call with a seed of their own
        for number in (0, 1):
            seed(number)
            try:
                results.append(call([copied(a) for a in leaves]))
            except Exception:
                return False
    return bool(difference(*results, [], False))


def returns_view(call: Call, leaves: list) -> bool:
    """Whether the dense operator returns another tensor over the memory of an argument."""
    copies = [copied(a) for a in leaves]
    try:
        results = tree_flatten(played(call, copies))[0]
        memory = {a.untyped_storage().data_ptr() for a in copies if isinstance(a, Tensor) and a.numel()}
        return any(
            isinstance(r, Tensor) and not any(r is a for a in copies) and r.untyped_storage().data_ptr() in memory
            for r in results
        )
    except Exception:
        return False


# lists of tensors


def foreach_attempts(info: Any) -> Iterator[Attempt]:
    """A foreach operator on four matrices; its function, in place, and its gradients."""
    torch.manual_seed(0)
    python_random.seed(0)
    seen: set[str] = set()
    options = {"noncontiguous": False, "same_size": True, "num_input_tensors": [4], "enable_zero_size": False}
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=False, **options):
        kwargs = {k: v for k, v in sample.kwargs.items() if k != "disable_fastpath"}
        leaves, tree = tree_flatten(((sample.input, *sample.args), kwargs))
        kinds = [a.dim() if isinstance(a, Tensor) else type(a).__name__ for a in leaves]
        if f"{tree}{kinds}" in seen or not any(can_be_sparse(a) for a in leaves):
            continue
        seen.add(f"{tree}{kinds}")
        yield from foreach_sample(info, len(seen) - 1, leaves, tree)


def foreach_sample(info: Any, number: int, leaves: list, tree: Any) -> Iterator[Attempt]:
    able = [i for i, leaf in enumerate(leaves) if can_be_sparse(leaf)]
    places = {"first": able[:1], "first list": able[:4], "all": able, "last": able[-1:]}
    chosen = {tuple(positions): label for label, positions in reversed(places.items())}
    for positions, label in chosen.items():
        for form in forms_of(number, info.name, label, [leaves[p] for p in positions]):
            common = ([*leaves], list(positions), [0] * len(positions), form)
            scalar = len(able) <= 4
            for kind, function in (("function", info.method_variant), ("inplace", info.inplace_variant)):
                if function is not None:
                    play = functools.partial(
                        act, Call(function, tree), *common, kind == "inplace", scalar and kind == "inplace", False
                    )
                    yield Attempt(info.name, kind, f"sample {number}/{label}", str(form), play)
            if info.supports_autograd and info.method_variant is not None:
                play = functools.partial(backward, Call(info.method_variant, tree), *common, False)
                yield Attempt(info.name, "backward", f"sample {number}/{label}", str(form), play)
