"""Plays rows in a process of their own, so that the end of that process is a row, too, and a run can be resumed.

The process appends the rows of each unit (one operator, module or optimizer) to a file when the unit is done. What it
is playing stands in memory that both processes see; if the process dies or hangs, that row is a crash, and a new
process goes on behind it.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .classify import Verdict, line
from .operators import Attempt

Units = dict[str, Callable[[], Iterator[Attempt]]]
HANGS = 60.0  # seconds in one row
SAMPLED_UNITS, SAMPLED_ROWS = 4, 12  # one unit in so many belongs to the sample, and of its rows one in so many


class Board:
    """The number of the row that the process plays, and how many rows it has begun."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 16)

    def set(self, row: int, count: int) -> None:
        self.memory[:] = row.to_bytes(8, "little") + count.to_bytes(8, "little")

    def get(self) -> tuple[int, int]:
        return int.from_bytes(self.memory[:8], "little"), int.from_bytes(self.memory[8:], "little")


def in_sample(suite: str, attempt: Attempt) -> bool:
    """Whether a row belongs to the sample: a fixed choice over operators, kinds and forms."""
    key = "/".join((suite, attempt.operator, attempt.kind, attempt.case, attempt.form))
    return unit_in_sample(suite, attempt.operator) and zlib.crc32(key.encode()) % SAMPLED_ROWS == 0


def unit_in_sample(suite: str, unit: str) -> bool:
    return zlib.crc32(f"{suite}/{unit}".encode()) % SAMPLED_UNITS == 0


def run(suites: dict[str, Units], file: Path, sample: bool = False, seconds: float = 1e9) -> bool:
    """Play every unit that is not in the file yet; whether all are done when the time is over."""
    ends, board, crashes = time.monotonic() + seconds, Board(), {}
    while True:
        before = done(file)
        units = [(suite, unit) for suite, named in suites.items() for unit in named]
        rest = [u for u in units if u not in before and (unit_in_sample(*u) or not sample)]
        if not rest or time.monotonic() > ends:
            return not rest
        board.set(0, 0)
        process = os.fork()
        if process == 0:
            try:
                play_all(suites, rest, file, sample, board, crashes, ends)
            except BaseException:
                traceback.print_exc()
                os._exit(3)
            os._exit(0)
        why = wait(process, board)
        if why == "status 3":
            raise RuntimeError("the process that plays rows failed itself; its traceback stands above")
        if why:
            now = done(file)
            suite, unit = next(unit for unit in rest if unit not in now)
            crashes.setdefault((suite, unit), {})[board.get()[0]] = why


def wait(process: int, board: Board) -> str:
    """How the process ended, empty if well: it is ended itself where one row takes too long."""
    count, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return "" if code == 0 else f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        if board.get()[1] != count:
            count, since = board.get()[1], time.monotonic()
        elif time.monotonic() - since > HANGS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "no end"
        time.sleep(0.02)


def play_all(suites, rest, file: Path, sample: bool, board: Board, crashes: dict, ends: float) -> None:
    """In the process of its own: the rows of each unit, appended to the file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.disable()  # the end of this process is a row
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    count = 0
    with open(file, "a") as stream:
        for suite, unit in rest:
            rows, known = [], crashes.get((suite, unit), {})
            for number, attempt in enumerate(suites[suite][unit]()):
                count += 1
                if sample and not in_sample(suite, attempt):
                    continue
                board.set(number, count)
                verdict = Verdict("crash", known[number]) if number in known else played(attempt)
                rows.append([suite, *attempt[:4], *verdict, in_sample(suite, attempt)])
            stream.write(json.dumps({"unit": [suite, unit], "rows": rows}) + "\n")
            stream.flush()
            if time.monotonic() > ends:
                return


def played(attempt: Attempt) -> Verdict:
    """Its verdict; a tensor that can no longer be looked at is a crash, too."""
    try:
        return attempt.play()
    except Exception as error:
        return Verdict("crash", "looking at the tensor: " + line(error))


def done(file: Path) -> set[tuple[str, str]]:
    """The units that a file has the rows of."""
    return {tuple(entry["unit"]) for entry in entries(file)}


def entries(file: Path) -> list[dict]:
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def rows_of(file: Path) -> list[list]:
    """Every row: suite, operator, kind, case, form, outcome, detail, whether the sample has it."""
    return [row for entry in entries(file) for row in entry["rows"]]
