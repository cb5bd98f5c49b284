"""Autotuning: of two nearly equal configurations the likelier, none that does not fit, the same one the next time.

With concurrent threads and processes, and with invalid files.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from triton_cases import DEVICE
from tuning import CONFIGS, KEYS, Costs, choose

from sten.kernels import autotune
from sten.kernels.autotune import Timer, Tuner

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """A cache file of the test's own, and timing switched on."""
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("STEN_AUTOTUNE", raising=False)
    return tmp_path / "cache" / "triton.json"


@pytest.mark.parametrize(
    "milliseconds, expected",
    [
        ((1.0, 0.5, 0.9), 1),
        ((1.01, 1.0, 1.0), 0),
        ((1.1, 1.01, 1.0), 1),
        ((0.011, 0.01, 0.0101), 1),
        ((None, 2.0, 1.0), 2),
        ((None, None, None), 0),
    ],
)
def test_the_fastest_or_the_likelier_of_two_about_as_fast(milliseconds, expected):
    tuner = Tuner(Costs(*milliseconds))
    assert choose(tuner) == CONFIGS[expected]
    timings = len(tuner.timer.timings)
    assert choose(tuner) == CONFIGS[expected] and len(tuner.timer.timings) == timings


@pytest.mark.parametrize(
    "fastest, alone, in_a_row", [(0.01, 3, autotune.SHORT_REPEATS), (0.5, 3 + autotune.REPEATS, 0)]
)
def test_short_calls_are_timed_more_often(fastest, alone, in_a_row):
    """All configurations in one way, whatever disturbs a single look: times alone and in a row do not compare."""
    costs = Costs(2.0, fastest, 0.6)
    choose(Tuner(costs))
    counts = [[costs.timings.count((number, calls)) for calls in (1, autotune.CHAIN)] for number in range(3)]
    assert counts == [[alone, in_a_row]] * 3


def test_each_call_in_a_row_has_its_own_weight():
    x, weight, missing = torch.zeros(2, 3), torch.zeros(8, 8), None
    view = torch.zeros(8, 16)[:, ::2]
    chain = autotune._chain((x, weight, missing, view))
    assert len(chain) == autotune.CHAIN and chain[0][1] is weight
    assert len({tensors[1].data_ptr() for tensors in chain}) == len(chain)
    assert all(tensors[0] is x and tensors[2] is None and tensors[3] is view for tensors in chain)
    assert len(autotune._chain((torch.zeros(autotune.CHAIN_BYTES // 8),))) == 2


def test_no_memory_for_copies(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError

    tensors = (torch.zeros(8, 8),)
    monkeypatch.setattr(torch.Tensor, "clone", full)
    assert autotune._chain(tensors) == [tensors]
    tuner = Tuner(Costs(1.0, 0.5, 0.9))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        assert choose(tuner) == CONFIGS[0]
    assert choose(tuner) == CONFIGS[1]


def test_one_configuration_and_the_interpreter_are_not_timed(file):
    single, interpreted = Tuner(Costs(1.0, 0.5, 0.9)), Tuner(Costs(1.0, 0.5, 0.9), interpreted=True)
    assert choose(single, configs=CONFIGS[2:] * 2) == CONFIGS[2]
    assert choose(interpreted) == CONFIGS[0]
    assert not single.timer.timings and not interpreted.timer.timings and not file.exists()


def test_switched_off(monkeypatch, file):
    tuner = Tuner(Costs(1.0, 0.5, 0.9))
    monkeypatch.setenv("STEN_AUTOTUNE", "0")
    assert choose(tuner) == CONFIGS[0] and not tuner.timer.timings and not file.exists()
    monkeypatch.setenv("STEN_AUTOTUNE", "1")
    assert choose(tuner, ("another",)) == CONFIGS[1]


def test_nothing_is_timed_in_a_capture(file):
    tuner = Tuner(Costs(1.0, 0.5, 0.9))
    tuner.timer.capturing = True
    assert choose(tuner) == CONFIGS[0] and not tuner.timer.timings and not file.exists()
    tuner.timer.capturing = False
    assert choose(tuner) == CONFIGS[1]
    other = Tuner(Costs(0.1, 0.5, 0.9))
    other.timer.capturing = True
    assert choose(other) == CONFIGS[1]  # the file may be read


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu():
    """The real timer, with additions for kernels; in a capture, the first."""
    x, tuner = torch.zeros(1 << 20, device=DEVICE), Tuner(Timer())

    def prepare(config):
        def call(x):
            for _ in range(config["times"]):
                x.add_(1)

        call.config = config
        return call

    def pick(*key):
        return tuner.pick("additions", key, [{"times": 50}, {"times": 1}], prepare, (x,)).config["times"]

    assert pick("eager") == 1
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert pick("eager") == 1 and pick("captured") == 50
        x.add_(1)
    assert pick("captured") == 1


def test_the_next_process_does_not_time(file):
    assert choose(Tuner(Costs(1.0, 0.5, 0.9))) == CONFIGS[1]
    later = Tuner(Costs(0.1, 0.5, 0.9))
    assert choose(later) == CONFIGS[1] and not later.timer.timings
    assert choose(later, ("another",)) == CONFIGS[0] and later.timer.timings
    assert len(json.loads(file.read_text())) == 2


def spoilt_entry(value):
    """The content of a file whose one entry, under the right name, is `value`."""
    return lambda text: json.dumps(dict.fromkeys(json.loads(text), value))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: "[1, 2",
        lambda text: "[1, 2]",
        lambda text: "null",
        lambda text: '{"kernel": {"BO": 1}}',
        lambda text: "[" * 200_000,
        lambda text: "9" * 10_000,
        lambda text: text[:-2],
        lambda text: b"\xff\xfe\x00" + text.encode(),
        lambda text: text + " " * autotune.FILE_BYTES,
        spoilt_entry(None),
        spoilt_entry(1),
        spoilt_entry("BO"),
        spoilt_entry([64, None]),
        spoilt_entry({}),
        spoilt_entry({"BO": [64], "C": None}),
        spoilt_entry({"BO": 1 << 20, "C": None}),  # a configuration that is no longer offered
        spoilt_entry({"BO": 32, "C": 2, "more": 1}),
    ],
    ids=range(18),
)
def test_a_spoilt_file_is_ignored_and_rewritten(file, spoil):
    choose(Tuner(Costs(1.0, 0.5, 0.9)))
    content = spoil(file.read_text())
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tuner = Tuner(Costs(0.1, 0.5, 0.9))
    assert choose(tuner) == CONFIGS[0] and tuner.timer.timings
    assert CONFIGS[0] in json.loads(file.read_text()).values()


def test_one_spoilt_entry_costs_no_other(file):
    tuner = Tuner(Costs(1.0, 0.5, 0.9))
    choose(tuner, ("good",)), choose(tuner, ("bad",))
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({name: 5 if "bad" in name else config for name, config in entries.items()}))
    later = Tuner(Costs(0.1, 0.5, 0.9))
    assert choose(later, ("good",)) == CONFIGS[1] and not later.timer.timings
    assert choose(later, ("bad",)) == CONFIGS[0]


def test_numbers_of_the_file_do_not_reach_a_kernel(file):
    choose(Tuner(Costs(1.0, 0.5, 0.9)))
    file.write_text(spoilt_entry({"BO": 32.0, "C": 2.0})(file.read_text()))
    assert all(type(value) is int for value in choose(Tuner(Costs(0.1, 0.5, 0.9))).values())


@pytest.mark.parametrize("home", ["/dev/null/home", "/proc/home", "a folder"])
def test_no_place_to_write(home, monkeypatch, tmp_path):
    monkeypatch.delenv("STEN_CACHE_DIR")
    if home == "a folder":  # where the file should be
        home = tmp_path
        (tmp_path / ".cache" / "sten" / "triton.json" / "x").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for _ in range(2):
        tuner = Tuner(Costs(1.0, 0.5, 0.9))
        assert choose(tuner) == CONFIGS[1] and tuner.timer.timings
    assert not list(tmp_path.rglob("triton.json?*"))


def test_a_process_that_never_unlocks(file, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(autotune, "LOCK_SECONDS", 0.05)
    file.parent.mkdir()
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert choose(Tuner(Costs(1.0, 0.5, 0.9))) == CONFIGS[1]
        assert not file.exists()
    choose(Tuner(Costs(1.0, 0.5, 0.9)))
    assert file.exists()


def test_nothing_is_left_beside_the_file(file):
    tuner = Tuner(Costs(1.0, 0.5, 0.9))
    choose(tuner), choose(tuner, ("another",))
    assert {path.name for path in file.parent.iterdir()} <= {"triton.json", "triton.lock"}


def in_threads(count, function):
    """The results of function(0), function(1), ..., begun at the same time."""
    results, together = [None] * count, threading.Barrier(count)

    def run(number):
        together.wait()
        results[number] = function(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


class SlowCosts(Costs):
    """Gives other threads the time to meet a timing half done."""

    def milliseconds(self, call, chain, flush):
        time.sleep(1e-3)
        return super().milliseconds(call, chain, flush)


def test_threads_time_a_key_once():
    alone, together = Tuner(Costs(1.0, 0.5, 0.9)), Tuner(SlowCosts(1.0, 0.5, 0.9))
    choose(alone, ("another",))
    assert in_threads(8, lambda number: choose(together)) == [CONFIGS[1]] * 8
    assert len(together.timer.timings) == len(alone.timer.timings)


def test_threads_read_and_write_the_file_at_once(file):
    """Each thread is a process as far as the tuner can tell: they share the file alone."""

    def work(number):
        tuner = Tuner(Costs(1.0, 0.5, 0.9))
        return [choose(tuner, (name, n)) for n in range(10) for name in ("shared", number)]

    assert in_threads(4, work) == [[CONFIGS[1]] * 20] * 4
    assert len(json.loads(file.read_text())) == 5 * 10


def test_prepare_may_pick(file):
    """One launch inside another: the lock is reentrant."""
    tuner = Tuner(Costs(1.0, 0.5, 0.9))

    def prepare(config):
        assert choose(tuner, ("inner",)) == CONFIGS[1]
        return tuner.timer.prepare(config)

    assert tuner.pick("outer", (), CONFIGS, prepare, (torch.zeros(1),)).config == CONFIGS[1]


def test_two_processes_at_once(file, tmp_path):
    """Neither loses the other's entries, and they agree on the keys of both, though their timings differ."""
    go, running = tmp_path / "go", {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for own in "ab":
        command = [sys.executable, str(ROOT / "tests" / "tuning.py"), own, str(tmp_path / own), str(go)]
        running[own] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not all((tmp_path / own).exists() for own in "ab") and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    results = {}
    for own, process in running.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
        results[own] = json.loads(out)["chosen"]
    shared = [{key: config for key, config in chosen.items() if "shared" in key} for chosen in results.values()]
    assert shared[0] == shared[1] and len(shared[0]) == KEYS
    assert all(results["a"][f"a {n}"] == CONFIGS[2] and results["b"][f"b {n}"] == CONFIGS[1] for n in range(KEYS))
    assert len(json.loads(file.read_text())) == 3 * KEYS
    later = Tuner(Costs(0.1, 0.5, 0.9))
    assert [choose(later, ("a", n)) for n in range(KEYS)] == [CONFIGS[2]] * KEYS and not later.timer.timings
