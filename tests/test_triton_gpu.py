"""Tests that need a GPU: graphs, streams, sizes over 2^31 elements, compiled code."""

import pytest
import torch
from triton_cases import DEVICE, bsr_parts, close, nm_parts, random, vector_nm_parts

import sten
from sten.kernels import bsr, grouped_nm, nm, pattern_cache, split_k, transpose, vector_nm

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
HALF = torch.bfloat16


def calls(tokens):
    """(call on x, dense) for one weight of each kind that splits its reduction."""
    values, index, dense = vector_nm_parts(256, 2048, 1, 4, 128, HALF)
    yield lambda x: vector_nm.linear(x, values, index, n=1, m=4, v=128, out_features=256), dense
    parts, dense_bsr = bsr_parts(256, 2048, 64, 64, dtype=HALF)
    yield lambda x: bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=256), dense_bsr
    values_nm, index_nm, dense_nm, n, m = nm_parts(256, 2048, 2, 4, HALF)
    yield lambda x: nm.linear(x, values_nm, index_nm, n=n, m=m, out_features=256), dense_nm


def gated_calls():
    """(call on x, both dense weights) for the gated products, which are one launch where that is faster."""
    up, gate = (vector_nm_parts(256, 2048, 1, 4, 128, HALF, seed=seed) for seed in (0, 1))
    options = {"n": 1, "m": 4, "v": 128, "out_features": 256}
    yield lambda x: vector_nm.gated_linear(x, up[:2], gate[:2], **options), (up[2], gate[2])
    (up_bsr, dense_up), (gate_bsr, dense_gate) = (bsr_parts(256, 2048, 64, 64, dtype=HALF, seed=s) for s in (0, 1))
    halves = [tuple(parts[name] for name in ("values", "crow", "col")) for parts in (up_bsr, gate_bsr)]
    yield lambda x: bsr.gated_linear(x, *halves, out_features=256), (dense_up, dense_gate)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_gated_capture_and_replay(tokens):
    for call, (up, gate) in gated_calls():
        x = random(tokens, 2048, dtype=HALF)
        call(x), call(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x)
        for seed in range(3):
            x.copy_(random(tokens, 2048, dtype=HALF, seed=seed))
            graph.replay()
            halves = (x.double() @ weight.double().T for weight in (up, gate))
            close(out, next(halves) * torch.nn.functional.silu(next(halves)), HALF)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_graph_capture_and_replay(tokens):
    for call, dense in calls(tokens):
        x = random(tokens, 2048, dtype=HALF)
        call(x), call(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first, second = call(x), call(x)
        for seed in range(3):
            x.copy_(random(tokens, 2048, dtype=HALF, seed=seed))
            graph.replay()
            expected = x.double() @ dense.double().T
            close(first, expected, HALF)
            assert torch.equal(first, second)


def test_two_streams_at_once():
    """Concurrent split reductions must not share counters."""
    for call, dense in calls(16):
        x = random(16, 2048, dtype=HALF)
        expected = x.double() @ dense.double().T
        call(x)
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in range(3)], []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(call(x))
        torch.cuda.synchronize()
        for result in results:
            close(result, expected, HALF)


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("captured", [False, True])
def test_back_to_back(tokens, captured):
    """A kernel that starts before the previous one has ended (PDL) reads what that one wrote, weights included."""
    layers = [make(seed) for seed, make in enumerate([vector_layer, feature_major_layer, blocks_layer, fine_layer] * 3)]
    x, buffer = random(tokens, 2048, dtype=HALF), torch.empty(tokens, 2048, dtype=HALF, device=DEVICE)

    def forward():
        y = buffer.copy_(x)
        for call, target, source in layers:
            for mine, new in zip(target, source, strict=True):
                mine.copy_(new)  # the weight is written just before it is used
            pattern_cache.invalidate(*target[1:])
            y = call(y)
        return y

    expected = forward().clone()
    torch.cuda.synchronize()
    run = forward
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
        run = lambda: graph.replay() or out  # noqa: E731
    for _ in range(30):
        for _, (values, *pattern), _ in layers:
            values.fill_(float("nan"))
            for part in pattern:
                part.zero_()  # another pattern, within bounds
        assert torch.equal(run(), expected)


def written_late(call, *parts):
    """(call on x, empty tensors of the weight that it reads, their contents)."""
    mine = [torch.zeros_like(part) for part in parts]
    return (lambda x: call(x, *mine)), mine, parts


def vector_layer(seed):
    values, index, _ = vector_nm_parts(2048, 2048, 1, 4, 128, HALF, seed=seed)
    options = {"n": 1, "m": 4, "v": 128, "out_features": 2048}
    return written_late(lambda x, *weight: vector_nm.linear(x, *weight, **options), values / 23, index)


def feature_major_layer(seed):
    """The end of a feature-major chain, after a transpose by torch."""
    values, index, _ = vector_nm_parts(2048, 2048, 1, 4, 128, HALF, seed=seed)
    options = {"n": 1, "m": 4, "v": 128, "row_major": True}
    return written_late(
        lambda x, *weight: vector_nm.linear_feature_major(x.T.contiguous(), *weight, **options), values / 23, index
    )


def blocks_layer(seed):
    """The table of shares is derived from the pattern: it is made again, in a capture at each replay."""
    parts, _ = bsr_parts(2048, 2048, 64, 64, dtype=HALF, seed=seed)
    weight = parts["values"] / 23, parts["crow"], parts["col"]
    return written_late(lambda x, *weight: bsr.linear(x, *weight, out_features=2048), *weight)


def fine_layer(seed):
    values, index, *_ = nm_parts(2048, 2048, 2, 4, HALF, seed=seed)
    return written_late(lambda x, *weight: nm.linear(x, *weight, n=2, m=4, out_features=2048), values / 23, index)


def blocks():
    """(call on x and parts, three patterns with their dense weights) of BSR."""
    keep = torch.rand(32, 32, generator=torch.Generator().manual_seed(3)) < 0.2
    made = [bsr_parts(2048, 2048, 64, 64, keep=keep.roll(n, 0), dtype=HALF, seed=n) for n in range(3)]
    patterns = [([parts[name] for name in ("values", "crow", "col")], dense) for parts, dense in made]
    return lambda x, parts: bsr.linear(x, *parts, out_features=2048), patterns


def slots():
    """The same of GroupedNM."""
    layout, patterns = sten.GroupedNM(1, 4, 16), []
    for seed in range(3):
        weight = random(2048, 2048, dtype=HALF, seed=seed)
        parts = layout.pack(weight, layout.mask(weight.abs()))
        patterns.append(([parts["values"], parts["index"]], layout.unpack(parts, (2048, 2048))))
    rows = layout.rows(DEVICE).int()
    return lambda x, parts: grouped_nm.linear(x, *parts, rows, m=4, out_features=2048), patterns


@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("kind", [blocks, slots], ids=["bsr", "grouped_nm"])
def test_a_recorded_graph_reads_new_tables_after_invalidate(kind, tokens):
    """A mask update writes the pattern in place and invalidates it; the graph reads the tables at the old addresses."""
    (call, patterns), x = kind(), random(tokens, 2048, dtype=HALF)
    mine = [part.clone() for part in patterns[0][0]]
    for _ in range(2):
        call(x, mine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(x, mine)
    for number, (parts, dense) in enumerate(patterns * 2):
        for own, part in zip(mine, parts, strict=True):
            own.copy_(part)
        pattern_cache.invalidate(*mine[1:])
        if number % 2:  # an eager call between changes nothing for the graph
            call(x, mine)
        graph.replay()
        close(out, x.double() @ dense.double().T, HALF)


def test_captures_use_up_the_counters(monkeypatch):
    """A capture without counters left zeroes its own in the graph; the next call outside allocates more."""
    monkeypatch.setattr(split_k.Workspace, "BLOCK", 1 << 14)
    fresh = split_k.Workspace()
    monkeypatch.setattr(nm, "workspace", fresh)
    values, index, dense = nm_parts(256, 2048, 2, 4, HALF)[:3]
    x = random(16, 2048, dtype=HALF)
    expected, recorded = x.double() @ dense.double().T, []
    for launches in (200, 2000, 20):
        nm.linear(x, values, index, n=2, m=4, out_features=256)
        assert fresh._used[0] <= (1 << 13) + 4096
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [nm.linear(x, values, index, n=2, m=4, out_features=256) for _ in range(launches)]
        recorded.append((graph, results[0], results[-1]))
    for _ in range(2):
        for graph, *results in recorded:
            for result in results:
                result.fill_(float("nan"))
            graph.replay()
            for result in results:
                close(result, expected, HALF)
    assert len(fresh._blocks[0]) > 1


def test_compiled_by_inductor():
    for call, dense in calls(16):
        x = random(16, 2048, dtype=HALF)
        close(
            torch.compile(lambda x, call=call: call(x) * 2, fullgraph=True)(x), x.double() @ dense.double().T * 2, HALF
        )


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.mem_get_info()[0] < 30e9, reason="needs 30 GB of free GPU memory")
def test_offsets_over_31_bits():
    tokens, inputs = 2**31 // 2048 + 700, 2048
    x = torch.randn(tokens, inputs, dtype=HALF, device=DEVICE)
    tail = x[-300:].double()
    assert torch.equal(transpose.transpose(x)[:, -300:], x[-300:].T)
    values, index, dense = vector_nm_parts(128, inputs, 1, 4, 128, HALF)
    y = vector_nm.linear(x, values, index, n=1, m=4, v=128, out_features=128)
    close(y[-300:], tail @ dense.double().T, HALF)
    parts, dense = bsr_parts(128, inputs, 64, 64, dtype=HALF)
    y = bsr.linear(x, parts["values"], parts["crow"], parts["col"], out_features=128)
    close(y[-300:], tail @ dense.double().T, HALF)
    grad = torch.zeros(tokens, 128, dtype=HALF, device=DEVICE)
    grad[-300:] = random(300, 128, dtype=HALF)
    got = bsr.linear_grad_values(grad, x, parts["col"], parts["t_row"], parts["t_block"], bh=64, bw=64)
    full = (grad[-300:].double().T @ tail).unflatten(0, (-1, 64)).unflatten(2, (-1, 64)).transpose(1, 2)
    rows = torch.repeat_interleave(torch.arange(2, device=DEVICE), parts["crow"].diff())
    close(got, full[rows, parts["col"].long()], HALF)


@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_compiled_into_graphs(tokens):
    """Inductor records its own graphs, each in a pool of its own, after a warm-up whose memory is freed."""
    torch._dynamo.reset()
    for call, dense in calls(tokens):
        compiled = torch.compile(lambda x, call=call: call(torch.relu(x)) * 2, mode="reduce-overhead", fullgraph=True)
        for seed in range(4):  # two warm the graph up, one records it, the last is a replay
            x = random(tokens, 2048, dtype=HALF, seed=seed)
            expected = torch.relu(x).double() @ dense.double().T * 2
            torch.compiler.cudagraph_mark_step_begin()
            close(compiled(x), expected, HALF)
        close(call(x), x.double() @ dense.double().T, HALF)  # what was cached meanwhile serves other calls
