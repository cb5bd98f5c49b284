"""The kernels under any setting of OpenMP, beside other processes, in several threads and in forked workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sten.backends import cpp

if not cpp.available():
    pytest.skip("the extension sten._C is not built", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "more threads than cores": {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "passive"},
    "fewer threads than asked for": {"OMP_NUM_THREADS": "5", "OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "3"},
    "nested": {"OMP_NESTED": "true", "OMP_MAX_ACTIVE_LEVELS": "3", "OMP_PROC_BIND": "true"},
}
SAMPLE = ["two threads", "fewer threads than asked for"]  # the others with STEN_ALL=1


def run(env, *threads):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | env
    path = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "threads.py"), *map(str, threads)]
    done = subprocess.run(command, env=env | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]


@pytest.mark.parametrize("name", SETTINGS if os.environ.get("STEN_ALL") else SAMPLE)
def test_any_setting(name):
    run(SETTINGS[name], 2, 5)


def test_beside_busy_processes():
    # Here calls wait for threads that do not run, and then compute alone for a while: with the same result.
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        run({}, 2)
    finally:
        for process in busy:
            process.kill()
            process.wait()
