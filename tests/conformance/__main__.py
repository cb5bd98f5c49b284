"""python -m tests.conformance: play the databases, print the counts and the faults, write every row as JSON."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import known, report, semantics
from .acts import act_units
from .modules import module_units
from .operators import foreach_units, operator_units
from .optimizers import optimizer_units
from .runner import rows_of, run

SUITES = {
    "operators": operator_units,
    "foreach": foreach_units,
    "modules": module_units,
    "optimizers": optimizer_units,
    "acts": act_units,
}


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 1 while there is a fault that `known.json` does not list."""
    options = parsed(arguments)
    if not options.resume:
        options.file.unlink(missing_ok=True)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    suites = {suite: SUITES[suite]() for suite in options.suites}
    if options.only:
        suites = {suite: {n: unit for n, unit in units.items() if n in options.only} for suite, units in suites.items()}
    complete = run(suites, options.file, options.sample, options.seconds)
    rows = rows_of(options.file)
    print(report.text(rows, every=options.every))
    if not complete:
        print(f"not complete; go on with: python -m tests.conformance --resume --file {options.file}")
    if options.json:
        options.json.write_text(report.as_json(rows))
    if options.write_known:
        known.write(rows, grow=options.grow)
    if options.semantics:
        options.semantics.write_text(semantics.page(rows))
    new = known.new_faults(rows)
    print("".join(f"not in known.json: {' / '.join(fault)}\n" for fault in new), end="")
    return bool(new)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--only", nargs="+", help="operators, modules or optimizers by name")
    parser.add_argument("--sample", action="store_true", help="only the rows that make test runs")
    parser.add_argument("--every", action="store_true", help="print every kind of fault of an operator, with its text")
    parser.add_argument("--file", type=Path, default=Path("build/conformance/rows.jsonl"), help="rows as they come")
    parser.add_argument("--resume", action="store_true", help="go on behind the units that --file has")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop between two units after so long")
    parser.add_argument("--json", type=Path, default=Path("build/conformance/results.json"))
    parser.add_argument("--semantics", type=Path, help="write the table of what each act does, as a page")
    parser.add_argument("--write-known", action="store_true", help="take what is mended off known.json")
    parser.add_argument("--grow", action="store_true", help="with --write-known: let the list take new faults")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
