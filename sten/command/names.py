"""What users type, as objects: layouts, shapes, dtypes, devices. What cannot be meant raises ArgumentTypeError."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from pathlib import Path

import torch

from ..conversion.sensitivity import Candidate
from ..layouts.registry import REGISTERED
from ..sparsifiers.allocation import Uniform

SPARSITY = 0.9  # of a layout without a rate, where none is typed
SHAPE = re.compile(r"(\d+)x(\d+)")
NAME = re.compile(r"\s*(?P<name>\w+)\s*(?P<fields>\(.*\))?\s*(?P<sparsity>[\d.]+%?)?\s*")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def layout(text: str) -> Candidate:
    """A layout with its fields and, where it fixes no rate, a sparsity: "NM(2, 4)", "CSR 0.9", "BSR((64, 64)) 90%"."""
    found = NAME.fullmatch(text)
    usable = {n: cls for n, cls in REGISTERED.items() if cls.__module__.startswith("sten.layouts.") and n != "DualMask"}
    usable |= {n: cls for n, cls in REGISTERED.items() if not cls.__module__.startswith("sten.")}
    cls = usable.get(found["name"]) if found else None
    if cls is None:
        known = ", ".join(sorted(usable))
        raise argparse.ArgumentTypeError(f"Expected a layout ({known}) such as 'NM(2, 4)' or 'CSR 0.9', got {text!r}")
    try:
        call = ast.parse(f"layout{found['fields'] or '()'}", mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("no fields in one pair of parentheses")
        values = [ast.literal_eval(value) for value in call.args]
        named = {one.arg: ast.literal_eval(one.value) for one in call.keywords if one.arg is not None}
        if len(dataclasses.fields(cls)) == 1 and len(values) == 2:
            values = [tuple(values)]  # BSR(64, 64) means BSR((64, 64))
        made = cls(*values, **named)
        sparsity = _sparsity(found["sparsity"])
    except (ValueError, TypeError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"Expected a layout such as 'NM(2, 4)', got {text!r}: {error}") from None
    if made.rate is not None and sparsity is not None:
        raise argparse.ArgumentTypeError(f"Expected no sparsity with {made}, which fixes its rate, got {text!r}")
    return made, (SPARSITY if sparsity is None and made.rate is None else sparsity)


def _sparsity(text: str | None) -> float | None:
    if text is None:
        return None
    return Uniform(float(text[:-1]) / 100 if text.endswith("%") else float(text)).sparsity


def title(candidate: Candidate) -> str:
    """The text of `layout` for a candidate."""
    made, sparsity = candidate
    return f"{made}" if sparsity is None else f"{made} {sparsity:g}"


def shape(text: str) -> tuple[int, int]:
    """Features in and out: "768x3072"."""
    found = SHAPE.fullmatch(text)
    if found is None or not all(int(size) for size in found.groups()):
        raise argparse.ArgumentTypeError(f"Expected a shape such as 768x3072 (in x out), got {text!r}")
    return int(found[1]), int(found[2])


def dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"Expected one of {', '.join(DTYPES)}, got {text!r}")
    return getattr(torch, text)


def device(text: str) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):  # torch's own words name its build options
        raise argparse.ArgumentTypeError(f"Expected a device that is there, such as cpu, got {text!r}") from None
    if found.type == "meta":
        raise argparse.ArgumentTypeError("Expected a device with numbers, got 'meta'")
    return found


def new_file(text: str) -> Path:
    """A file that can be written, before anything is measured."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"Expected a file in a folder that is there, got {text!r}")
    return path


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"Expected a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"Expected seconds above 0, got {text!r}")
    return value


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16
