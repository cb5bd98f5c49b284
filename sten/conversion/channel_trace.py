"""Which channels of a model can change places without changing what it computes: found by running it once.

Each channel that a layer makes (a row of its weight) gets a number. While the model runs on an example, a tensor has a
second one of its shape, the *labels*: the number of the channel that each element belongs to, -1 for none.

- view, transpose, expand, cat, ...: the same operator is applied to the labels.
- Element by element: numbers that meet become one channel, such as a gate and what it multiplies. A tensor without
  labels tells channels apart along the dimensions that it varies in; an operator on some channels, these from others.
- A product with a matrix without labels, or attention's values: the labels stay, if the sum runs within a channel;
  channels of different heads are told apart.
- Pooling, and norms: the labels stay.
- A layer: its columns have the labels of its input, since they must move with those channels.
- Anything else, and the model's outputs: the channels stay where they are, with the reason.

What is not understood is left in place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch_private import storage_of, tree_leaves, tree_map
from .channels import Channels
from .defaults import is_conv1d

SAME = {"clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh"}
RESHAPING = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
MOVING = {
    "t", "transpose", "permute", "expand", "slice", "select", "squeeze", "unsqueeze", "split", "split_with_sizes",
    "unbind", "repeat", "cat", "stack", "index", "index_select", "narrow", "flip",
}  # fmt: skip
POOLING = (
    "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool", "upsample_", "_upsample_",
)  # fmt: skip
UNTAGGED = {"hardswish"}
REDUCING = {"mean", "sum", "amax", "amin"}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
CHANNELWISE = ("weight", "bias", "running_mean", "running_var")

SCORES = "it is summed over, as queries and keys are in attention scores"


def follow(model: nn.Module, call: Callable[[], Any]) -> tuple[Channels, Any]:
    """The channels of a model, and the outputs of `call`, which runs it in `inference`."""
    trace = _Trace(model)
    with torch.no_grad(), trace.hooks(), trace:
        out = call()
    trace.finish(out)
    return trace.channels, out


class _Trace(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.channels, self.inside = model, Channels(), 0
        self.labelled: dict[int, tuple[Tensor, Tensor]] = {}  # the tensors are kept, so that an id stays theirs
        self.stored = {storage_of(p) for p in model.parameters()}
        self.reached: set[int | None] = set()  # those of parameters that the example used
        self.outside: set[int | None] = set()  # storages of parameters that are used outside their layers

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Layers that have a rule are followed as a whole."""
        with contextlib.ExitStack() as stack:
            for module in self.model.modules():
                rule = self._rule(module)
                if rule is None:
                    continue

                def leave(module: nn.Module, args: tuple, kwargs: dict, out: Tensor, rule=rule) -> None:
                    self.inside -= 1
                    (x,) = (*args, *kwargs.values())
                    rule(module, x, self._labels(x), out)

                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            yield

    def finish(self, out: Any) -> None:
        """What the outputs keep in place, weights that are used elsewhere, too, and layers that were not called."""
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.channels.freeze(self._labels(t), "it is an output of the model")
        for use in self.channels.uses.values():
            if storage_of(getattr(use.module, use.attribute)) in self.outside:
                self.channels.freeze(use.labels, "its weight is used outside its layer, too")
        self._leave_to_others()

    def _leave_to_others(self) -> None:
        """Parameters that the example did not use, in another branch of a forward, may read channels that lie in the
        same module: these stay."""
        paths: dict[int, str] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths[id(module)] = "" if id(module) in paths else path
        unused = [name for name, p in self.model.named_parameters() if storage_of(p) not in self.reached]
        for space in self.channels.spaces() if unused else ():
            around = _common_prefix(paths[id(member.module)] for member in space.members)
            name = next((name for name in unused if name.startswith(around)), None)
            for member in space.members if name is not None else ():
                labels = self.channels.uses[id(member.tensor), member.dim].labels
                self.channels.freeze(labels[member.at.flatten()], f"the example did not use {name}, which may read it")

    def _rule(self, module: nn.Module) -> Callable | None:
        forward = type(module).forward
        if is_conv1d(module) or forward is nn.Linear.forward:
            return self._linear
        if any(forward is kind.forward for kind in CONVOLUTIONS):
            return self._conv
        norm = any(forward is kind.forward for kind in NORMS)
        return self._channelwise if norm and len(getattr(module, "normalized_shape", (1,))) == 1 else None

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.inside += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        used = {s for t in tensors if (s := storage_of(t)) in self.stored}
        self.reached |= used
        if self.inside:
            return out
        self.outside |= used
        if any(id(t) in self.labelled for t in tensors):
            self._follow(func, args, tensors, out)
        return out

    def _labels(self, t: Tensor) -> Tensor | None:
        return self.labelled[id(t)][1] if id(t) in self.labelled else None

    def _set(self, t: Tensor, labels: Tensor | None) -> None:
        if labels is not None and labels.shape == t.shape:
            self.labelled[id(t)] = (t, labels)
        elif labels is not None:
            self.channels.freeze(labels, "its shape is not understood")

    # ---- layers

    def _linear(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor) -> None:
        rows, columns = (1, 0) if is_conv1d(layer) else (0, 1)
        self.channels.use(layer, "weight", columns, labels, -1, reads=True)
        self._set(out, self.channels.made(layer, rows).expand(out.shape))

    def _conv(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor) -> None:
        channel = -layer.weight.dim() + 1  # counted from the end: with or without a batch
        if layer.groups == 1:
            self.channels.use(layer, "weight", 1, labels, channel, reads=True)
            made = self.channels.made(layer, 0)
            self._set(out, made.view(-1, *[1] * (-channel - 1)).expand(out.shape))
        elif layer.groups == layer.in_channels == layer.out_channels:
            self._channelwise(layer, x, labels, out, channel)
        elif labels is not None:
            self.channels.freeze(labels, "it is read by a convolution in groups")

    def _channelwise(self, layer: nn.Module, x: Tensor, labels: Tensor | None, out: Tensor, channel=None) -> None:
        """A layer with one number (or filter) for each channel, which leaves the channels where they are."""
        if channel is None:
            channel = -1 if hasattr(layer, "normalized_shape") else 1
        for name in CHANNELWISE:
            if getattr(layer, name, None) is not None:
                self.channels.use(layer, name, 0, labels, channel)
        if labels is not None:
            first = labels.movedim(channel, -1)[(0,) * (x.dim() - 1)]  # all are the same, or frozen by now
            shape = [1] * x.dim()
            shape[channel] = -1
            self._set(out, first.view(shape).expand(out.shape))

    # ---- operators

    def _follow(self, func, args: tuple, tensors: list[Tensor], out: Any) -> None:
        name = func.overloadpacket.__name__
        plain = name.rstrip("_")
        x = self._labels(args[0]) if isinstance(args[0], Tensor) else None
        if plain in SAME and x is not None:
            self._set(out, x)
        elif plain in RESHAPING and x is not None:
            self._set(out, x.reshape(args[1]))
        elif plain in MOVING and (x is not None or not isinstance(args[0], Tensor)):
            moved = func(*tree_map(self._relabelled, args))
            for t, labels in zip(tree_leaves(out), tree_leaves(moved), strict=True):
                self._set(t, labels)
        elif _is_pointwise(plain) and (x is not None or plain == name):
            self._pointwise(tensors, out)
        elif plain.startswith(POOLING) and x is not None:
            first = out[0] if isinstance(out, tuple) else out
            kept = x[(..., *[slice(0, 1)] * (x.dim() - 2))]
            self._summed(x, kept, kept.expand(first.shape), first)
        elif plain in REDUCING and x is not None and len(args) > 1:
            dims = [args[1]] if isinstance(args[1], int) else list(args[1] or range(x.dim()))
            kept = x.amax(dims, keepdim=True)
            self._summed(x, kept, kept.reshape(out.shape), out)
        elif plain in ("mm", "bmm") or plain.startswith("_scaled_dot_product"):
            self._product(args, out[0] if isinstance(out, tuple) else out)
        else:
            for t in tensors:
                self.channels.freeze(self._labels(t), f"it goes through torch's {plain}")

    def _relabelled(self, value: Any) -> Any:
        """The labels of a tensor; of one without, where it is no index, -1."""
        if not isinstance(value, Tensor):
            return value
        labels = self._labels(value)
        if labels is not None or not value.is_floating_point():
            return value.cpu() if labels is None else labels
        return torch.full(value.shape, -1)

    def _pointwise(self, tensors: list[Tensor], out: Tensor) -> None:
        labels = [x.expand(out.shape) for t in tensors if (x := self._labels(t)) is not None]
        met = self.channels.meet(labels)
        self.channels.mark(met)
        for t in tensors:
            if self._labels(t) is None and t.dim():
                shape = [1] * (out.dim() - t.dim()) + list(t.shape)
                self.channels.tell_apart(met, [i for i, size in enumerate(shape) if size > 1])
        self._set(out, met)

    def _summed(self, labels: Tensor, kept: Tensor, after: Tensor, out: Tensor) -> None:
        """A reduction, whose result has the labels `after` if it runs within channels."""
        if bool((labels != kept).any()):
            self.channels.freeze(labels, "it is summed over")
        else:
            self.channels.mark(labels)
            self._set(out, after)

    def _product(self, args: tuple, out: Tensor) -> None:
        """out = a @ b, or attention of (query, key, value): the labels of one factor, if the other has none."""
        *others, values = args[:2] if len(args) < 3 or not isinstance(args[2], Tensor) else args[:3]
        left, right = self._labels(others[0]), self._labels(values)
        if len(others) == 1 and right is None:  # a's rows, summed along its last dimension
            right, left, dim = left, None, -1
        else:
            dim = -2
        for t in others if left is not None or len(others) == 2 else ():
            self.channels.freeze(self._labels(t), SCORES)
        if right is None:
            return
        kept = right.narrow(dim, 0, 1)
        if bool((right != kept).any()) or (left is not None and len(others) == 1):
            return self.channels.freeze(right, SCORES)
        if out.dim() == 4 and kept.shape[1] != out.shape[1]:  # grouped queries: several heads of them read one
            kept = kept.repeat_interleave(out.shape[1] // kept.shape[1], 1)
        after = kept.expand(out.shape)
        self.channels.tell_apart(after, list(range(out.dim() - 2)))
        return self._set(out, after)


def _common_prefix(paths: Iterable[str]) -> str:
    """That of the names of all that lies in the innermost module around these."""
    levels = zip(*(path.split(".") if path else [] for path in paths), strict=False)
    return ".".join([*(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)), ""])


def _is_pointwise(name: str) -> bool:
    """Whether an operator works element by element: torch's tag, which not all overloads have."""
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return name in UNTAGGED or any(torch.Tag.pointwise in overload.tags for overload in overloads)
