"""Timing on a GPU such that the number means something: CUDA graphs, rotating weights larger than L2, a check first.

Shared by the gpu_* benchmarks. Times are microseconds a call, the median of several replays.
"""

import json
import pathlib
import statistics
import time

import torch
import triton

ROTATE_BYTES = 200 << 20  # several times the L2 of any GPU
RESULTS = pathlib.Path(__file__).parent / "results"


def copies(stored_bytes: float) -> int:
    """How many weights to rotate among, so that none is in L2."""
    return max(2, min(128, int(ROTATE_BYTES // stored_bytes) + 1))


def graph_time(call, weights, calls: int = 24, replays: int = 7) -> float:
    """Microseconds of one ``call(weight)``, captured ``calls`` times over rotating ``weights``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for weight in weights:
            call(weight)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), max(calls, len(weights))
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(weights[i % len(weights)])
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times)


def eager_time(call, weights, calls: int = 48, repeats: int = 7) -> float:
    """Microseconds of one eager ``call(weight)`` over rotating ``weights``: the host's time, where it is the longer."""
    calls, times = max(calls, len(weights)), []
    for _ in range(repeats + 1):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for i in range(calls):
            call(weights[i % len(weights)])
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / calls)
    return statistics.median(times[1:])


class Clock:
    """Microseconds between two points of the device's stream, or of the host's clock on a CPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, call, repeats: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats * 1e6
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / repeats


def in_turns(calls: dict, clock: Clock, rounds: int, repeats: int, before=None) -> dict[str, dict]:
    """{plan: times and the paired ratio to "dense"}; `before()` runs before each block of calls, not timed."""
    names = list(calls)
    spent: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if before is not None:
                before()
            calls[name]()  # not timed: what the plans before it left in the caches, and in Dynamo's order of entries
            spent[name].append(clock(calls[name], repeats))
    result = {}
    for name, times in spent.items():
        ratios = sorted(dense / mine for dense, mine in zip(spent.get("dense", times), times, strict=True))
        quarter = len(ratios) // 4
        result[name] = {"us": statistics.median(times), "ratio": statistics.median(ratios)}
        result[name]["quartiles"] = [ratios[quarter], ratios[-1 - quarter]]
    return result


def captured(call, before=None):
    """A function that replays a CUDA graph of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    if before is not None:
        before()
    return graph.replay


def check(got: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = 1e-2) -> None:
    """Refuses to go on where the result is wrong; NaN is wrong."""
    error = ((got.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < tolerance:
        raise SystemExit(f"{what}: relative error {error:.3g}; a wrong result is not timed")


def geometric_mean(numbers) -> float:
    return statistics.geometric_mean(list(numbers))


def describe() -> dict[str, str | None]:
    """The device and the versions, for the head of a file."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}


def write(name: str, content: dict, directory=None) -> None:
    content = {**describe(), **content}
    path = pathlib.Path(directory or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1))
    print(f"wrote {path.name}")
