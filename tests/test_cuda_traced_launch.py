"""Traced launches of the CUDA C++ kernels: a compiled graph starts them, and finds them again on the disk."""

import pytest
import torch
from cuda_cases import F, emulated, in_place_of_the_driver, needs_compiler, on_cpu
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from triton_cases import close, nm_parts, random

from sten.kernels import csr, csr_few, launch_cache, nm, nm_bitmap, pattern_cache

DTYPE, OUTPUTS, INPUTS = torch.bfloat16, 70, 256
KNOWN = {"BF16": 1, "ACTIVATION": 4}


def bitmap(folder, monkeypatch):
    tokens = 3
    kernel, macros = nm_bitmap.kernel_for(tokens)
    driver = emulated(folder, kernel, N=16, **nm_bitmap.few_configs(tokens)[0], **KNOWN, **macros)
    in_place_of_the_driver(monkeypatch, **{kernel: driver})
    values, index, dense, n, m = nm_parts(OUTPUTS, INPUTS, 8, 16, DTYPE)
    return nm.linear, tokens, (values, index), dense, {"n": n, "m": m, "save_memory": False}


def bitmap_of_more_tokens(folder, monkeypatch):
    tokens, config = 9, {"WARPS": 2, "CTAS": 1, "STAGES": 2}
    monkeypatch.setattr(nm_bitmap, "many_configs", lambda *sizes: [config])
    kernel, macros = nm_bitmap.kernel_for(tokens)
    folders = folder / "order", folder / "many"
    for part in folders:
        part.mkdir()
    order = emulated(folders[0], "order", SEGMENTS=1, WARPS=8, **KNOWN, **macros)
    many = emulated(folders[1], kernel, N=16, **config, **KNOWN, **macros)
    in_place_of_the_driver(monkeypatch, order=order, **{kernel: many})
    values, index, dense, n, m = nm_parts(OUTPUTS, INPUTS, 16, 32, DTYPE)
    return nm.linear, tokens, (values, index), dense, {"n": n, "m": m, "save_memory": False}


def steps(folder, monkeypatch):
    tokens, config = 2, csr_few.configs(INPUTS, 2, 51, 227 << 10)[0]
    driver = emulated(folder, "csr_few", TOKENS=2, **config, **KNOWN)
    in_place_of_the_driver(monkeypatch, csr_few=driver)
    monkeypatch.setattr(csr_few, "LEAST_ROWS", OUTPUTS)
    dense = random(OUTPUTS, INPUTS, dtype=DTYPE)
    dense[random(OUTPUTS, INPUTS, seed=1) < 0.8] = 0
    return csr.linear, tokens, parts_of(dense), dense, {}


def parts_of(dense):
    crow = F.pad((dense != 0).sum(1).cumsum(0), (1, 0)).int()
    return dense[dense != 0], crow, dense.nonzero()[:, 1].int()


@needs_compiler
@on_cpu
@pytest.mark.parametrize("make", [bitmap, bitmap_of_more_tokens, steps])
def test_a_compiled_graph_starts_the_kernel(make, tmp_path, monkeypatch):
    """Two weights in one graph, each with bias and gate, whose results other kernels read. A second compilation reads
    the graph from the disk, and prepares its launches from their signatures, as another process does."""
    linear, tokens, stored, dense, numbers = make(tmp_path, monkeypatch)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    x, gate = random(2, tokens, 259, dtype=DTYPE)[:, :, 1:257], random(2, tokens, OUTPUTS, dtype=DTYPE, seed=3)
    bias, count = random(OUTPUTS, dtype=DTYPE), len(linear.tensors) - 1 - len(stored) - 2
    others = stored[0] * 2, *stored[1:]

    def product(x, stored, bias, gate):
        absent = (None,) * count
        known = {"out_features": OUTPUTS, "activation": "silu", **numbers}
        return linear.traced(x, *stored, bias, gate, *absent, **known)

    def both(x, stored, others, bias, gate):
        return torch.relu(product(x[0], stored, bias, gate[0])) - product(x[1], others, bias, gate[1])

    def want(dense):
        first, second = (
            F.silu(x[i].double() @ dense.double().T * (1 + i) + bias.double()) * gate[i].double() for i in (0, 1)
        )
        return torch.relu(first) - second

    given = x, stored, others, bias, gate
    graph = make_fx(both, tracing_mode="fake")(*given)
    launches = [node.args[-1] for node in graph.graph.nodes if "_launch" in str(node.target)]
    assert len(launches) == 2 and len({*launches}) == 1  # weights of one kind share what is prepared
    for hits in (0, 1):
        torch.compiler.reset()
        launch_cache.clear()
        counters.clear()
        compiled = torch.compile(graph)
        for _ in range(2):
            close(compiled(*given), want(dense), DTYPE)
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
    shifted = torch.cat([stored[0].new_zeros(1), stored[0].flatten()])[1:].view_as(stored[0])
    close(compiled(x, (shifted, *stored[1:]), *given[2:]), want(dense), DTYPE)
    stored[0].mul_(2), others[0].mul_(2)  # values are read where they are
    close(compiled(*given), want(dense * 2), DTYPE)
    if linear is csr.linear:  # and so is a new pattern
        other = dense.flip(0)
        for part, new in zip(stored, parts_of(other), strict=True):
            part.copy_(new)
        others[0].copy_(stored[0] * 2)
        pattern_cache.invalidate(*stored[1:])
        close(compiled(*given), want(other), DTYPE)


@on_cpu
def test_parts_that_are_not_aligned_keep_the_operator(monkeypatch):
    """In the storage; an input whose address is not is copied when the graph runs."""
    in_place_of_the_driver(monkeypatch)
    values, index, _, n, m = nm_parts(OUTPUTS, INPUTS, 16, 32, DTYPE)
    x, known = random(1, INPUTS, dtype=DTYPE), {"out_features": OUTPUTS, "activation": "none", "save_memory": False}
    shifted = torch.cat([values.new_zeros(1), values.flatten()])[1:].view_as(values)
    absent = (None,) * (len(nm.linear.tensors) - 3)
    assert nm.linear.traced(x, shifted, index, *absent, n=n, m=m, **known) is None
