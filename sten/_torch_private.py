"""The private names of torch that sten uses, and `is_intercepted` and `facts`, which most of them are for.

Each name is fetched with a fallback that is slower and safe: where torch no longer has one that `is_intercepted` reads,
every call counts as intercepted (a Plan is prepared each time), and nothing else changes. `PATHS` lists them.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PATHS: dict[str, str] = {}  # name here -> its path below torch


def _fetch(name: str, path: str, fallback: Any) -> Any:
    """The object at a dotted path below `torch`, noted in PATHS, or the fallback."""
    PATHS[name], value = path, torch
    for step in path.split("."):
        value = getattr(value, step, None)
        if value is None:
            return fallback
    return value


def _one() -> int:
    return 1


def _yes(t: Tensor) -> bool:
    return True


def _minus_one() -> int:
    return -1


def _without_alias(func: Callable, args: tuple, kwargs: dict, out: Any) -> Any:
    return out


is_compiling = torch.compiler.is_compiling  # public; Dynamo takes a call of it for the constant True
PATHS["exporting"] = "compiler._is_exporting_flag"


def exports() -> bool:
    """Whether torch.export traces. (The Dynamo of torch 2.11 takes `torch.compiler.is_exporting()` for True always.)"""
    return getattr(torch.compiler, "_is_exporting_flag", True)


# each of these tells that the operators of a call are intercepted; if one is missing, every call is
dispatch_modes = _fetch("dispatch_modes", "_C._len_torch_dispatch_stack", _one)
function_modes = _fetch("function_modes", "_C._len_torch_function_stack", _one)
transforms_active = _fetch("transforms_active", "_C._are_functorch_transforms_active", _one)
tracing_state = _fetch("tracing_state", "_C._get_tracing_state", _one)
global_hooks = _fetch("global_hooks", "nn.modules.module._has_any_global_hook", _one)  # of all modules
is_zero_tensor = _fetch("is_zero_tensor", "Tensor._is_zerotensor", _yes)
level = forward_ad if hasattr(forward_ad, "_current_level") else types.SimpleNamespace(_current_level=0)
PATHS["_current_level"] = "autograd.forward_ad._current_level"

profiler_enabled = _fetch("profiler_enabled", "_C._autograd._profiler_enabled", _one)  # then calls are named in it
no_function = torch._C.DisableTorchFunctionSubclass  # documented, in "Extending PyTorch"
autocast_somewhere = _fetch("autocast_somewhere", "_C._is_any_autocast_enabled", _one)  # then read for the device
backward_pass = _fetch("backward_pass", "_C._current_graph_task_id", _minus_one)  # -1 outside: dense writes are refused
correct_aliasing = _fetch("correct_aliasing", "utils._python_dispatch.return_and_correct_aliasing", _without_alias)
fused_recurrent = _fetch("fused_recurrent", "_VF", torch)
fused_attention = (
    _fetch("encoder_layer", "_transformer_encoder_layer_fwd", None),
    _fetch("native_attention", "_native_multi_head_attention", None),
)
fake_mode = _fetch("fake_mode", "_subclasses.FakeTensorMode", contextlib.nullcontext)  # a run finds less without it
unscale = _fetch("unscale", "_amp_foreach_non_finite_check_and_unscale_", None)
is_view = _fetch("is_view", "Tensor._is_view", _yes)
refuse_data_pointer = _fetch("refuse_data_pointer", "_C._set_throw_on_mutable_data_ptr", lambda t: None)
as_no_view = _fetch("as_no_view", "ops.aten._unsafe_view.default", lambda t, shape: t.clone())
OpOverload = type(torch.ops.aten.mm.default)
HigherOrderOperator = _fetch("HigherOrderOperator", "_ops.HigherOrderOperator", OpOverload)
BELOW_FUNCTIONS = (OpOverload, type(torch.ops.aten.mm), HigherOrderOperator)  # operators that autograd sees first

PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def refuse_tracing() -> None:
    """Raise if torch.jit.trace records: a TorchScript file has the storage of every Parameter, and theirs is empty.

    Nor can such a file have the autograd functions of methods that train a dense weight.
    """
    if tracing_state() is not None:
        raise RuntimeError(
            "Expected a use of a sparse weight outside of TorchScript, got one in torch.jit.trace; use torch.export, "
            "or trace a dense copy, sten.densify(copy.deepcopy(model))."
        )


def is_intercepted() -> bool:
    """Whether a compiler, a mode, torch.func, a tracer or forward AD has to see the operators of a call.

    If so, no Plan is looked up or stored, and operators go through torch's dispatcher. It runs before every call, so it
    is written for speed. Reverse-mode autograd does not count, nor does the profiler, which is to see what runs
    without it. Operands that are more than their numbers intercept a call, too: `facts`.
    """
    return bool(
        is_compiling()  # first, so that Dynamo traces no further
        or dispatch_modes()
        or function_modes()
        or transforms_active()
        or (tracing_state() is not None and refuse_tracing())
        or level._current_level >= 0
    )


def facts_in_python(*operands: Any) -> Any:
    """What a Plan depends on of the operands of a call, as a key: shape, strides, dtype, device and alignment.

    Returns:
        None if one of them is more than its numbers (a subclass such as a fake tensor, a lazy negation): the call is
        intercepted. None and parts, among the operands, count by their position.
    """
    key: list[Any] = []
    for a in operands:
        kind = type(a)
        if a is None or kind is dict:
            key.append(None)
            continue
        if a.is_neg() or is_zero_tensor(a) if kind in PLAIN_TENSORS else isinstance(a, Tensor):
            return None
        key += (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
    return tuple(key)


try:
    from ._C import facts
except ImportError:  # not built; `sten.backends.cpp` says so
    facts = facts_in_python


def exports_to_onnx() -> bool:
    """Whether torch.onnx.export runs; asked only once its exporter is loaded, which takes seconds."""
    return "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()


def must_apply() -> bool:
    """Whether `autograd.Function.apply` has to see every call: compilers, dispatch modes, torch.func, forward AD."""
    return is_compiling() or bool(dispatch_modes() or transforms_active()) or level._current_level >= 0


def has_tangents() -> bool:
    """Whether a tensor may have a tangent, or a wrapper of torch.func that has one."""
    return is_compiling() or bool(transforms_active()) or level._current_level >= 0


def differentiates() -> bool:
    """Whether torch.func, forward AD or torch.jit.trace has to see the functions of a call, not only its operators."""
    return transforms_active() or level._current_level >= 0 or tracing_state() is not None


def apply_of(rule: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`rule.apply` for calls where neither torch.compile nor torch.func is active: it does not read the signature of
    `forward`, which takes longer than a small product."""
    return getattr(super(torch.autograd.Function, rule), "apply", rule.apply)


def storage_of(t: Tensor) -> int | None:
    """A number that two tensors have in common if they share memory; None where a tensor has no storage."""
    if t.layout != torch.strided:
        return None
    storage = t.untyped_storage()
    return getattr(storage, "_cdata", None) or storage.data_ptr()  # meta tensors have no pointer


def allows_tf32() -> bool:
    """Whether torch may round fp32 products to tf32."""
    try:
        return torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer switch was set, and torch refuses to mix the two
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tree_map(change: Callable[[Any], Any], tree: Any) -> Any:
    """The arguments of an operator with `change` applied to each leaf of their lists, tuples and dictionaries."""
    if isinstance(tree, (list, tuple)):
        branches = [tree_map(change, branch) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    if isinstance(tree, dict):
        return {name: tree_map(change, branch) for name, branch in tree.items()}
    return change(tree)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of the arguments of an operator."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for branch in tree for leaf in tree_leaves(branch)]
    return [tree]
