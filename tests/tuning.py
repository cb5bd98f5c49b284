"""A tuner whose costs are known, for the tests of the autotuner; as a script, a process that tunes alongside another.

    python tests/tuning.py OWN READY GO

writes the file READY, waits for the file GO, then tunes the keys (OWN, n) and ("shared", n); prints what was chosen.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import triton

from sten.kernels import autotune

CONFIGS = [{"BO": 64, "C": None}, {"BO": 32, "C": 2}, {"BO": 16, "C": None}]
KEYS = 20


class Costs(autotune.Timer):
    """Stands for a GPU: a call of configuration number i takes ``milliseconds[i]``; None does not fit."""

    def __init__(self, *milliseconds: float | None):
        self.milliseconds_of = list(milliseconds)
        self.capturing, self.timings = False, []  # timings: (number of the configuration, calls in a row)

    def device_name(self, device) -> str:
        return "a GPU"

    def usable(self, x) -> bool:
        return not self.capturing

    def prepare(self, config):
        number = CONFIGS.index(config)

        def call(x):
            if self.milliseconds_of[number] is None:
                raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
            return self.milliseconds_of[number]

        call.number, call.config = number, config
        return call

    def milliseconds(self, call, chain, flush) -> float:
        self.timings.append((call.number, len(chain)))
        late = self.timings.count(self.timings[-1]) % 3 == 0
        return call(*chain[0]) * (5 if late else 1)  # some timings are disturbed


def choose(tuner: autotune.Tuner, key: tuple = ("key", 1), configs=CONFIGS) -> dict:
    """The configuration that ``tuner``, with `Costs`, takes."""
    return tuner.pick("kernel", key, configs, tuner.timer.prepare, (torch.zeros(1),)).config


def main(own: str, ready: str, go: str) -> None:
    tuner = autotune.Tuner(Costs(3.0, 2.0, 1.0) if own == "a" else Costs(3.0, 1.0, 2.0))
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.001)
    chosen = {f"{name} {n}": choose(tuner, (name, n)) for n in range(KEYS) for name in ("shared", own)}
    print(json.dumps({"chosen": chosen, "timings": len(tuner.timer.timings)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
