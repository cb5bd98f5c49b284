"""`python -m sten info`: versions, devices, kernels. `python -m sten bench`: sparse linear layers against dense.
`python -m sten inspect FILE`: what a file of `sten.save` holds.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch
import torch.nn.functional as F

import sten
from sten import dispatch
from sten.backends import cpp

LAYOUTS = {
    "GroupedNM(1, 10, 8)": (sten.GroupedNM(1, 10, 8), None),
    "GroupedNM(1, 4, 16)": (sten.GroupedNM(1, 4, 16), None),
    "CSR 75 %": (sten.CSR(), 0.75),
    "CSR 90 %": (sten.CSR(), 0.9),
    "CSR 95 %": (sten.CSR(), 0.95),
    "BSR 64, 90 %": (sten.BSR((64, 64)), 0.9),
    "NM(2, 4)": (sten.NM(2, 4), None),
    "VectorNM(1, 4, 64)": (sten.VectorNM(1, 4, 64), None),
}


def info() -> None:
    """Print versions, devices, instruction sets and registered kernels."""
    machine = f"Python {platform.python_version()}, {platform.machine()}"
    print(f"sten-torch {_version()}, torch {torch.__version__}, {machine}")
    features = cpp.features()
    kinds = "not built"
    if features["available"]:
        kinds = f"{features['instruction_set']} (of {', '.join(features['instruction_sets'])})"
    print(f"CPU: {torch.get_num_threads()} threads; C++ kernels: {kinds}")
    for i in range(torch.cuda.device_count()):
        print(f"GPU {i}: {torch.cuda.get_device_name(i)}")
    print("\nkernels registered (operator, device, layouts):")
    for key, entry in sorted(dispatch.KERNELS.items(), key=str):
        name, device, *layouts = key
        if not entry.function.__name__.endswith("_expand"):
            titles = ", ".join("dense" if cls is None else cls.__name__ for cls in layouts)
            print(f"  {name:20} {device:5} {titles:12} {entry.function.__name__}")
    print("All other built-in combinations expand to dense: see sten.which(operator, x, weight).")


def inspect(path: str) -> None:
    """Print what a file of `sten.save` holds, from its header."""
    about = sten.inspect(path)
    print(f"{path}: format version {about['version']}")
    for name, weight in about["sparse"].items():
        fields = ", ".join(f"{key}={value}" for key, value in weight["fields"].items())
        parts = ", ".join(f"{key} {part['dtype']} {tuple(part['shape'])}" for key, part in weight["parts"].items())
        transposed = ", transposed" if weight["transposed"] else ""
        print(f"  {name}: {weight['layout']}({fields}), shape {tuple(weight['shape'])}{transposed}, density ", end="")
        print(f"{weight['density']:.3g}, {weight['bytes']:,} bytes: {parts}")
    for name, tensor in about["tensors"].items():
        print(f"  {name}: {tensor['dtype']} {tuple(tensor['shape'])}, {tensor['bytes']:,} bytes")
    for name, other in about["ties"].items():
        print(f"  {name}: tied to {other}")


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("sten-torch")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _medians(runs, repeats: int, synchronize) -> list[float]:
    """Median milliseconds of several calls, made in turn, so that other load affects all of them."""
    times = [[] for _ in runs]
    for i in range(repeats + 2):
        for run, own in zip(runs, times, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if i >= 2:
                own.append(time.perf_counter() - start)
    return [sorted(own)[repeats // 2] * 1e3 for own in times]


@torch.inference_mode()
def bench(out: int, inputs: int, tokens: list[int], device: str, dtype: torch.dtype, repeats: int) -> None:
    """Print the speed-up of one linear layer in each layout over dense; a wrong result ends the program."""
    torch.manual_seed(0)
    dense = torch.randn(out, inputs, device=device, dtype=dtype)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    print(f"linear {inputs} -> {out}, {dtype}, {device}: speed-up over dense (dense in ms); below 1 is a loss")
    print(f"{'layout':22}" + "".join(f"{t:>10} tokens" for t in tokens) + "  kernel at the most tokens")
    inputs_of = {t: torch.randn(t, inputs, device=device, dtype=dtype) for t in tokens}
    base = [_medians([lambda x=x: F.linear(x, dense)], repeats, synchronize)[0] for x in inputs_of.values()]
    print(f"{'dense':22}" + "".join(f"{ms:>14.3f} ms" for ms in base))
    for title, (layout, sparsity) in LAYOUTS.items():
        w = sten.from_dense(dense, layout, layout.mask(dense.abs(), sparsity))
        cells = []
        for t, x in inputs_of.items():
            exact = F.linear(x, w.to_dense())
            error = (F.linear(x, w) - exact).norm() / exact.norm().clamp(min=1e-30)
            if not error < 2e-2:
                raise SystemExit(
                    f"Expected the dense result of {title} at {t} tokens, got a relative error of {float(error):.2g}."
                )
            slow, fast = _medians([lambda x=x, w=w: F.linear(x, w) for w in (dense, w)], repeats, synchronize)
            cells.append(slow / fast)
        plan = sten.which("linear", inputs_of[tokens[-1]], w)
        print(f"{title:22}" + "".join(f"{c:>16.2f}x" for c in cells) + f"  {plan.kernel}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sten", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, kernels")
    commands.add_parser("inspect", help="what a file of sten.save holds").add_argument("file")
    b = commands.add_parser("bench", help="a linear layer in each layout against dense")
    b.add_argument("--out", type=int, default=3072)
    b.add_argument("--in", dest="inputs", type=int, default=768)
    b.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 1024])
    b.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    b.add_argument("--dtype", default=None, help="default: bfloat16 on cuda, float32 on cpu")
    b.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.command == "info":
        info()
    elif args.command == "inspect":
        try:
            inspect(args.file)
        except (sten.FormatError, OSError) as error:
            raise SystemExit(str(error)) from None
    else:
        dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
        bench(args.out, args.inputs, args.tokens, args.device, dtype, args.repeats)


if __name__ == "__main__":
    main()
