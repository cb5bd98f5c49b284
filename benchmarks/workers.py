"""Two source trees measured in turn, each by a process of its own, so that slow minutes of a machine affect both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class Worker:
    """`script --worker` with `tree` first on its path; `call` sends it a request and returns its reply."""

    def __init__(self, script: str, tree: Path, arguments: list[str]):
        environment = {**os.environ, "PYTHONPATH": str(tree), "STEN_TREE": str(tree)}
        command = [sys.executable, script, *arguments, "--worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def call(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        reply = self.process.stdout.readline()
        if not reply:
            sys.exit(f"Expected a reply of the worker, got its end with status {self.process.wait()}.")
        return json.loads(reply)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def pair(script: str, against: str, arguments: list[str]) -> tuple[Worker, Worker]:
    """Workers for the tree of `script` and for the other one."""
    trees = Path(script).resolve().parent.parent, Path(against).resolve()
    return tuple(Worker(script, tree, arguments) for tree in trees)


def in_turn(workers: tuple[Worker, Worker], request, first: int) -> list:
    """The replies of both to one request, one after the other; number `first` goes first."""
    replies = {number: workers[number].call(request) for number in (first % 2, 1 - first % 2)}
    return [replies[0], replies[1]]


def serve(reply) -> None:
    """Reply to each request on stdin by `reply(request)`; other output goes to stderr."""
    import sten

    expected, imported = Path(os.environ["STEN_TREE"]), Path(sten.__file__).resolve().parent.parent
    if imported != expected:
        sys.exit(f"Expected sten of {expected}, got that of {imported}.")
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(reply(json.loads(line))), file=out, flush=True)
