"""How large and how deep sten is: Python frames of its calls, files, imports, state at module level.

    python benchmarks/structure.py [--json structure.json] [--tree PATH]

`--tree` measures another checkout, an older commit for instance, by this script. Frames are the `call` events of
`sys.setprofile`: every entry into a Python function, a generator that goes on and (before Python 3.12) a comprehension
included, functions of C not. "frames" counts all below the call itself, torch's too; "sten" those whose code lies in
sten or kernels, and "files" the files that these lie in. Each call has been made before, so that what is done once is
not counted; backward runs in the calling thread. "hops", on a GPU, are the frames on the stack where Triton's launcher
is called.

- linear: `F.linear(x, w, b)` of a finalized 64 x 64 weight, no_grad; trainable: `F.linear(x, layer.weight, layer.bias)`
  of a layer in trainable form, and `backward` of its sum.
- sparsify: `sten.sparsify(layer, layout)` of a new `Linear(64, 64)`.
- update: a training step (forward, backward, SGD) in which the method moves the mask, and one in which it does not.
- rooms are the files and folders directly below sten; an arrow is a room that imports another; the depth is the number
  of rooms on the longest way down.
- state: objects at module level that functions write (`source_tree.module_state`); memoized: functions with a cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import source_tree  # noqa: E402

SIZE = 64
METHODS = {"RigL": "RigL", "SET": "SET"}


class Count:
    """The frames that are entered while it is active, and where Triton launches."""

    def __init__(self, root: Path):
        self.folders = tuple(os.path.realpath(root / name) + os.sep for name in ("sten", "kernels"))
        self.frames: list[str] = []
        self.hops: int | None = None

    def __enter__(self):
        self.base = sys._getframe(1)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _see(self, frame, event, argument):
        if event == "call" and frame.f_code is not Count.__exit__.__code__:
            self.frames.append(frame.f_code.co_filename)
        elif event == "c_call" and "triton_launcher" in str(getattr(argument, "__self__", None)):
            depth = 0
            while frame is not self.base and frame is not None:
                frame, depth = frame.f_back, depth + 1
            self.hops = max(depth, self.hops or 0)

    def report(self) -> dict[str, int]:
        own = [name for name in map(os.path.realpath, self.frames) if name.startswith(self.folders)]
        return {"frames": len(self.frames), "sten": len(own), "files": len(set(own))}


def compiled() -> bool:
    """Whether the C++ kernels of the tree are there, wherever it keeps them."""
    for name in ("sten.backends.cpp", "sten.cpp"):
        try:
            return importlib.import_module(name).available()
        except ModuleNotFoundError:
            continue
    return False


def layouts(sten):
    return {"NM(2, 4)": (sten.NM(2, 4), None), "CSR": (sten.CSR(), 0.9), "GroupedNM": (sten.GroupedNM(1, 4, 4), None)}


def calls_on_the_cpu(sten, torch, root: Path) -> dict:
    """Frames of F.linear on finalized weights and in trainable form."""
    from torch.nn.functional import linear

    found, x = {}, torch.randn(4, SIZE)
    for name, (layout, sparsity) in layouts(sten).items():
        layer = sten.sparsify(torch.nn.Linear(SIZE, SIZE), layout, sparsity=sparsity)
        w, b = layer.weight, layer.bias
        with torch.no_grad():
            for _ in range(3):
                with Count(root) as count:
                    linear(x, w, b)
        found[f"linear, {name}"] = count.report()
        sten.trainable(layer)
        for _ in range(3):
            with Count(root) as forward:
                y = linear(x, layer.weight, layer.bias)
            above = torch.ones_like(y)
            with Count(root) as backward:
                y.backward(above)
        found[f"trainable forward, {name}"], found[f"trainable backward, {name}"] = forward.report(), backward.report()
    return found


def calls_on_a_gpu(sten, torch, root: Path) -> dict:
    """The same of finalized weights in bfloat16, and how deep the launch lies."""
    found = {}
    cases = {"BSR(64)": (sten.BSR((64, 64)), 0.9), "CSR": (sten.CSR(), 0.9), "NM(2, 4)": (sten.NM(2, 4), None)}
    cases |= {"VectorNM(1, 4, 128)": (sten.VectorNM(1, 4, 128), None), "GroupedNM": (sten.GroupedNM(1, 4, 16), None)}
    for name, (layout, sparsity) in cases.items():
        layer = torch.nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16)
        sten.sparsify(layer, layout, sparsity=sparsity)
        w, b = layer.weight, layer.bias
        for tokens in (1, 16, 2048):
            x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                for _ in range(4):  # uncounted: Triton compiles in the first
                    torch.nn.functional.linear(x, w, b)
                with Count(root) as count:
                    torch.nn.functional.linear(x, w, b)
            found[f"linear, {name}, {tokens} tokens"] = {**count.report(), "hops": count.hops}
    return found


def sparsify(sten, torch, root: Path) -> dict:
    found = {}
    for name, (layout, sparsity) in layouts(sten).items():
        for _ in range(2):
            layer = torch.nn.Linear(SIZE, SIZE)
            with Count(root) as count:
                sten.sparsify(layer, layout, sparsity=sparsity)
        found[name] = count.report()
    return found


def updates(sten, torch, root: Path) -> dict:
    """A training step with a mask update and one without, of the same model."""
    found = {}
    for name in METHODS:
        model = torch.nn.Linear(SIZE, SIZE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = getattr(sten, name)(100, every=3)
        sten.sparsify(model, sten.CSR(), method, 0.8, optimizer=optimizer)
        x = torch.randn(16, SIZE)
        for _ in range(12):
            before = model.weight.mask()
            with Count(root) as count:
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
            moved = not torch.equal(before, model.weight.mask())
            found[f"{name}, step {'with' if moved else 'without'} a mask update"] = count.report()
    return found


def sources(root: Path) -> dict:
    """Lines, rooms, arrows and the state at module level."""
    files, rooms, modules = source_tree.files(root), source_tree.room_arrows(root), source_tree.file_arrows(root)
    lines = {str(path.relative_to(root)): path.read_text().count("\n") for path in files}
    state = source_tree.module_state(root)
    return {
        "lines": {
            folder: sum(n for name, n in lines.items() if name.startswith(folder)) for folder in ("sten", "kernels")
        },
        "files": len(files),
        "longest files": dict(sorted(lines.items(), key=lambda pair: -pair[1])[:5]),
        "rooms": len(rooms),
        "arrows": sum(map(len, rooms.values())),
        "arrows between files": sum(map(len, modules.values())),
        "depth": 1 + max(source_tree.depths(rooms).values()),
        "cycle of rooms": source_tree.cycle(rooms),
        "cycle of files": source_tree.cycle(modules),
        "state": state,
        "memoized": source_tree.memoized(root),
        "private names": sum(len(source_tree.private_names(path)) for path in files),
        "files with private names": sum(bool(source_tree.private_names(path)) for path in files),
        "caches of the GPU path": caches(root),
    }


def caches(root: Path) -> list[str] | None:
    """The first column of the table of caches in docs/performance/host_path.md; None where there is no such page."""
    page = root / "docs" / "performance" / "host_path.md"
    if not page.exists():
        return None
    table = re.search(r"^\|[^\n]*\bcache[^\n]*\|\n\|[-| :]+\|\n((?:\|[^\n]*\|\n?)+)", page.read_text(), re.M | re.I)
    return [row.strip("| ").split("|")[0].strip(" `") for row in table[1].splitlines()] if table else None


def attempt(function, *arguments) -> dict:
    """Its result; where this tree has another API, what it says."""
    try:
        return function(*arguments)
    except Exception as problem:  # whatever an older or a half changed tree raises is the finding
        return {"not measured": f"{type(problem).__name__}: {problem}"}


def measure(root: Path) -> dict:
    import torch

    import sten

    if Path(sten.__file__).resolve().parent.parent != root:
        sys.exit(f"sten comes from {sten.__file__}, not from {root}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.autograd.set_multithreading_enabled(False)
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "C++ kernels": compiled(),
        "frames": {
            "cpu": attempt(calls_on_the_cpu, sten, torch, root),
            "gpu": attempt(calls_on_a_gpu, sten, torch, root) if gpu else None,
            "sparsify": attempt(sparsify, sten, torch, root),
            "update": attempt(updates, sten, torch, root),
        },
        "sources": attempt(sources, root),
    }


def show(value, indent: int = 0) -> None:
    """Nested dictionaries as an indented list; a dictionary of plain values on one line."""
    for name, item in value.items():
        if isinstance(item, dict) and any(isinstance(inner, dict) for inner in item.values()):
            print(f"{' ' * indent}{name}")
            show(item, indent + 2)
        else:
            item = ", ".join(f"{k} {v}" for k, v in item.items()) if isinstance(item, dict) else item
            print(f"{' ' * indent}{name}: {item}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the numbers to this file")
    parser.add_argument("--tree", type=Path, default=HERE.parent, help="the checkout to measure")
    arguments = parser.parse_args()
    root = arguments.tree.resolve()
    sys.path.insert(0, str(root))
    warnings.simplefilter("ignore")
    try:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"  # so that every module can be imported
    except ImportError:
        sys.exit("structure.py needs torch")
    found = measure(root)
    show(found)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
