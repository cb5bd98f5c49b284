"""info: versions, devices, and which kernel each layout has on each device."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .. import markup
from ..backends import cpp
from ..layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM
from ..ops.which import which
from ..tensor import from_dense
from .names import default_dtype

LAYOUTS = (Masked(), CSR(), BSR((64, 64)), NM(2, 4), GroupedNM(1, 10, 8), VectorNM(1, 4, 64), FanIn())
SIZE, SPARSITY = 512, 0.9
COLUMNS = (("linear, 1 token", "linear", 1), ("1024 tokens", "linear", 1024)) + tuple(
    (title, operator, 1024)
    for title, operator in (("gradient of x", "linear_grad_input"), ("gradient of w", "linear_grad_weight"))
)


class Matrix(markup.Tabular):
    """Layouts by operators, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.reasons: dict[str, str] = {}
        dense = torch.randn(SIZE, SIZE, device=device, dtype=default_dtype(device))
        self.rows = []
        for layout in LAYOUTS:
            mask = layout.mask(dense.abs(), SPARSITY if layout.rate is None else None)
            w = from_dense(dense, layout, mask)
            cells = [self._cell(which(operator, (tokens, SIZE), w)) for _, operator, tokens in COLUMNS]
            self.rows.append([str(layout) + (f" {SPARSITY}" if layout.rate is None else ""), *cells])

    def _cell(self, plan) -> str:
        if plan.kernel.endswith("_expand") or plan.kernel == "reference" or plan.variant == "expand":
            number = self.reasons.setdefault(plan.reason, str(len(self.reasons) + 1))
            return f"dense ({number})"
        return f"{plan.kernel} [{plan.variant}]" if plan.variant else plan.kernel

    def header(self) -> list[str]:
        return ["layout", *(title for title, _, _ in COLUMNS)]

    def cells(self) -> list[list[str]]:
        return self.rows

    def notes(self) -> list[str]:
        return [f"({number}) {reason}" for reason, number in self.reasons.items()]


def info() -> None:
    """Print versions, devices, instruction sets, and for each device the kernel of each layout."""
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"sten-torch {_version()}, torch {torch.__version__}, {machine}")
    features = cpp.features()
    kinds = "not built"
    if features["available"]:
        kinds = f"{features['instruction_set']} (of {', '.join(features['instruction_sets'])})"
    elif cpp.load_error() is not None:
        kinds = f"not loaded: {cpp.load_error()}"
    print(f"CPU: {torch.get_num_threads()} threads; C++ kernels: {kinds}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
        devices[1:] = [torch.device("cuda", 0)]
    if len(devices) == 1:
        print("GPU: none that torch can use")
    for device in devices:
        dtype = str(default_dtype(device)).removeprefix("torch.")
        print(f"\nWhat runs on {device.type}, for weights of {SIZE} x {SIZE} in {dtype}:\n")
        print(Matrix(device))
    print("\nFor your own shapes: sten.which(operator, x, weight). Embeddings, 1x1 convolutions and more: the README.")


def _version() -> str:
    try:
        return metadata.version("sten-torch")
    except metadata.PackageNotFoundError:
        return "(not installed)"
