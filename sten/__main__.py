"""Sparse weights on this machine.

python -m sten info            versions, devices, and which kernel each layout has
python -m sten bench           linear layers in each layout against dense
python -m sten explain MODEL   what runs in each layer of a model, and whether it pays
python -m sten inspect FILE    what a file of sten.save holds
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from .command import bench, explain, info, inspect, names


class Parser(argparse.ArgumentParser):
    """One sentence for wrong arguments, without the list of all."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message.rstrip('.')}; see {self.prog} --help.\n")


def parser() -> Parser:
    top = Parser(prog="python -m sten", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="versions, devices, and which kernel each layout has")
    one = commands.add_parser("inspect", help="what a file of sten.save holds")
    one.add_argument("file")
    _add_bench(commands.add_parser("bench", help="linear layers in each layout against dense"))
    _add_explain(commands.add_parser("explain", help="what runs in each layer of a model, and whether it pays"))
    return top


def _add_bench(one: argparse.ArgumentParser) -> None:
    shapes = one.add_argument("--shapes", type=names.shape, nargs="+", metavar="INxOUT", help="default: 768x3072")
    shapes.default = [(768, 3072)]
    one.add_argument("--tokens", type=names.count, nargs="+", default=[1, 16, 1024], help="default: 1 16 1024")
    one.add_argument("--dtypes", type=names.dtype, nargs="+", help="default: float32 on the CPU, else bfloat16")
    one.add_argument("--layouts", type=names.layout, nargs="+", help=f"such as {', '.join(map(repr, bench.DEFAULT))}")
    _add_common(one, 0.2, "each cell")
    one.add_argument("--picture", type=names.new_file, metavar="FILE.svg", help="write the speed-ups as bars")


def _add_explain(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", help="a file of sten.save, or a folder or name of a model of transformers")
    one.add_argument("--tokens", type=names.count, default=64, help="of the random input; default: 64")
    one.add_argument("--dtype", type=names.dtype, help="default: that of the model")
    one.add_argument("--layout", type=names.layout, help="make a dense model sparse first, by magnitude: 'NM(2, 4)'")
    _add_common(one, 0.2, "each layer")
    one.add_argument("--html", type=names.new_file, metavar="FILE", help="write a page with pictures")


def _add_common(one: argparse.ArgumentParser, seconds: float, each: str) -> None:
    one.add_argument("--device", type=names.device, help="default: cuda where there is a GPU, else cpu")
    one.add_argument("--seconds", type=names.seconds, default=seconds, help=f"to time {each}; default: {seconds}")
    one.add_argument("--json", type=names.new_file, metavar="FILE", help="write what was measured")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without one, print the help."""
    top = parser()
    args = top.parse_args(arguments)
    try:
        _run(top, args)
    except (ValueError, OSError) as error:  # sentences for users, FormatError among them
        raise SystemExit(str(error).strip().splitlines()[0]) from None


def _run(top: Parser, args: argparse.Namespace) -> None:
    device = getattr(args, "device", None) or names.default_device()
    if args.command == "info":
        info.info()
    elif args.command == "inspect":
        inspect.inspect(args.file)
    elif args.command == "bench":
        dtypes = args.dtypes or [names.default_dtype(device)]
        layouts = args.layouts or [names.layout(text) for text in bench.DEFAULT]
        bench.bench(args.shapes, dtypes, layouts, args.tokens, device, args.seconds, args.json, args.picture)
    elif args.command == "explain":
        given = (args.dtype, args.layout, args.seconds, args.html, args.json)
        explain.run(args.model, args.tokens, device, *given)
    else:
        top.print_help()


if __name__ == "__main__":
    main()
