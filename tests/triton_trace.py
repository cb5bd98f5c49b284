"""Compiles models of sparse weights for a GPU that need not be present, from fake CUDA tensors, up to their graphs.

    python triton_trace.py

Prints JSON: {"layout form tokens": {"launches": traced Triton kernels, "written": tensors that they write, "started":
traced launches of CUDA C++, "operators": sten's operators that stayed whole, "graphs": how many graphs calls of two
sizes made}}.
"""

import json
import os

import torch
import triton
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

os.environ["STEN_AUTOTUNE"] = "0"  # nothing can be timed here

import sten
from sten.kernels import csr_few, nvrtc
from sten.kernels.backend import Backend
from sten.tensor import SparseTensor

I, H, O = 256, 512, 128
LAYOUTS = {
    "NM": (sten.NM(2, 4), None), "NM of 16": (sten.NM(2, 16), None), "VectorNM": (sten.VectorNM(1, 4, 32), None),
    "BSR": (sten.BSR((64, 64)), 0.5), "CSR": (sten.CSR(), 0.8), "GroupedNM": (sten.GroupedNM(1, 4, 8), None),
    "bitmap": (sten.NM(16, 32), None), "steps of CSR": (sten.CSR(), 0.8),
}  # fmt: skip
TOKENS = {"1": (1,), "9": (9,), "512": (512,), "dynamic": (5, 9)}


class NoDriver:
    """As much of Triton's driver as tracing a kernel asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers as fake tensors on a GPU; in place."""

    def fake(t):
        if isinstance(t, SparseTensor):
            parts = {name: fake(part) for name, part in t.parts.items()}
            return nn.Parameter(SparseTensor(t.sparse_layout, parts, t.stored_shape, t.transposed), t.requires_grad)
        new = torch.empty(t.shape, dtype=t.dtype, device="cuda")
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(t) for name, t in tensors.items() if t is not None})
    return model


def make(layout, sparsity, form: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(I, H), nn.SiLU(), nn.Linear(H, O)).bfloat16()
    sten.sparsify(model, layout, sparsity=sparsity)
    model = sten.trainable(model) if form == "trainable" else model
    return model.requires_grad_(False)  # autograd needs a device that is there


def trace(model: nn.Module, sizes: tuple[int, ...]) -> dict:
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    for size in sizes:
        x = torch.empty(size, I, dtype=torch.bfloat16, device="cuda")
        if len(sizes) > 1:
            torch._dynamo.mark_dynamic(x, 0)
        assert compiled(x).shape == (size, O)
    result = {"launches": 0, "written": [], "started": [], "operators": [], "graphs": len(graphs)}
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if "triton_kernel_wrapper" in str(node.target):
            result["launches"] += 1
            result["written"] += node.kwargs["tensors_to_clone"]
        elif "auto_functionalized" in str(node.target):
            result["started"].append(str(node.args[0]))
        elif "sten." in str(node.target):
            result["operators"].append(str(node.target))
    return result


def main():
    triton.runtime.driver.set_active(NoDriver())
    Backend.multiprocessors = lambda self, x: 132
    Backend.capability = lambda self, device: (9, 0)
    results = {}
    csr_few.LEAST_ROWS = O
    for name, (layout, sparsity) in LAYOUTS.items():
        nvrtc.available = lambda shared=0, name=name: name in ("bitmap", "steps of CSR")
        for tokens, sizes in TOKENS.items():
            for form in ("finalized", "trainable") if tokens == "dynamic" else ("finalized",):
                model = make(layout, sparsity, form)
                with FakeTensorMode():
                    results[f"{name} {form} {tokens}"] = trace(on_fake_gpu(model), sizes)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
