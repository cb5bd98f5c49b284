"""The one way by which a pattern comes in from outside, a file, a pickle or a state dict: checked before it is used.

what                                   when
name and fields of the layout          before anything is made
shape                                  before anything is made
names, kind, contiguity of the parts   before a number is read: a part has the bytes that its shape promises, so
                                       that no check asks for more memory than the file has
overlap of parts in memory             the same; a write to the values would rewrite the index
form of the parts                      `Layout.upgrade`, from that of an earlier version to the present one
shapes, dtypes, devices                `Layout.validate`, also of parts on the meta device
numbers                                `Layout.validate`, in chunks; not on meta, which has none
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError
from .layouts.base import Layout, Parts
from .layouts.registry import layout_from

PLAIN = (int, float, bool, str)  # what the fields of a layout are made of; tuples and lists of them, too


def checked(name: str, fields: dict, parts: Parts, shape: Any, transposed: Any = False) -> tuple:
    """The (layout, parts, shape, transposed) of a file, validated; FormatError if they are invalid."""
    try:
        layout = layout_of_file(name, fields)
        shape = _shape(layout, shape, transposed)
        _expect_plain(layout, parts)
        parts = layout.upgrade(parts, shape)
        expect_parts_of(layout, parts, shape)
    except FormatError:
        raise
    except (ValueError, TypeError) as error:  # of the layout's own checks
        raise FormatError(str(error)) from error
    return layout, parts, shape, bool(transposed)


def layout_of_file(name: Any, fields: Any) -> Layout:
    """The layout that a file describes; FormatError if there is none."""
    if not isinstance(name, str) or not isinstance(fields, dict):
        raise FormatError(
            f"Expected the name and the fields of a layout, got {type(name).__name__} and {type(fields).__name__}."
        )
    for key, value in fields.items():
        values = value if isinstance(value, (list, tuple)) else (value,)
        if not isinstance(key, str) or len(values) > 64 or not all(type(v) in PLAIN for v in values):
            raise FormatError(f"Expected numbers or text in the fields of layout {name!r}, got others.")
    try:
        return layout_from(name, fields)
    except ValueError as error:
        raise FormatError(str(error)) from error


def _shape(layout: Layout, shape: Any, transposed: Any) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)) or not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(f"Expected a shape of non-negative sizes for {layout}, got {str(shape)[:200]}.")
    if math.prod(shape) >= 2**62:
        raise FormatError(f"Expected fewer than 2**62 entries for {layout}, got shape {tuple(shape)}.")
    if type(transposed) is not bool or (transposed and len(shape) != 2):
        raise FormatError(
            f"Expected a flag for a transposed tensor of two dimensions, got {str(transposed)[:40]} for shape "
            f"{tuple(shape)}."
        )
    layout.check(tuple(shape))
    return tuple(shape)


def expect_parts_of(layout: Layout, parts: Parts, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless these parts store a weight of this shape in this layout."""
    _expect_plain(layout, parts)
    try:
        layout.validate(parts, shape)
    except (ValueError, TypeError) as error:
        raise FormatError(str(error)) from error
    except Exception as error:  # of a layout from elsewhere, which met what its author did not expect
        if isinstance(error, RuntimeError) and all(part.is_meta for part in parts.values()):
            return  # it has checked names and shapes, and went on to numbers, which parts on meta do not have
        raise FormatError(
            f"Expected parts that {layout} can check, got {type(error).__name__} from its validate: {error}."
        ) from error


def _expect_plain(layout: Layout, parts: Parts) -> None:
    """Raise FormatError unless the parts are the layout's, by their names, and plain tensors that share no memory."""
    if not isinstance(parts, dict):
        raise FormatError(f"Expected a dictionary of tensors as the parts of {layout}, got {type(parts).__name__}.")
    if set(parts) != {"values", *layout.pattern}:
        have = sorted(map(str, parts))
        raise FormatError(f"Expected the parts {sorted(['values', *layout.pattern])} for {layout}, got {have}.")
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.layout is not torch.strided or part.is_quantized:
            kind = f"a tensor of {part.layout}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            raise FormatError(f"Expected a plain dense tensor for part {name!r} of {layout}, got {kind}.")
        if hasattr(part, "sparse_layout") or part.is_conj() or part.is_neg() or not part.is_contiguous():
            raise FormatError(
                f"Expected a contiguous dense tensor for part {name!r} of {layout}, got strides {part.stride()}; call "
                ".contiguous() on it."
            )
    _expect_disjoint(layout, parts)


def _expect_disjoint(layout: Layout, parts: Parts) -> None:
    """Raise FormatError if two parts share memory: the first step of training would rewrite the pattern."""
    if any(type(part) not in (Tensor, torch.nn.Parameter) for part in parts.values()):
        return  # fake tensors and the like have no memory
    spans = []
    for name, part in parts.items():
        if part.numel() and not part.is_meta:
            start = part.data_ptr()
            spans.append((start, start + part.numel() * part.element_size(), name, part.device))
    spans.sort(key=lambda span: (str(span[3]), span[0]))
    for (_, end, name, device), (start, _, other, same) in itertools.pairwise(spans):
        if device == same and start < end:
            raise FormatError(
                f"Expected parts of {layout} that share no memory, got {name!r} and {other!r} over one storage; clone "
                "one of them."
            )
