"""Which tile is taken: the likelier of two about as fast, none that does not fit, and the same one the next time."""

import json

import pytest
import torch
import triton
from triton_cases import DEVICE  # noqa: F401

from sten.kernels import autotune

CONFIGS = [{"BO": 64, "C": None}, {"BO": 32, "C": 2}, {"BO": 16, "C": None}]


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """(pick for given milliseconds a tile, list of the tiles that were timed); a cache file of its own."""
    monkeypatch.setattr(autotune, "INTERPRET", False)
    monkeypatch.setattr(autotune, "_ENABLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setenv("STEN_CACHE_DIR", str(tmp_path / "cache"))
    timed = []

    def pick(*milliseconds, key=("key", 1)):
        monkeypatch.setattr(autotune, "_chosen", {})  # another process
        monkeypatch.setattr(autotune, "_disk", None)
        spent = dict(zip(map(str, CONFIGS), milliseconds, strict=True))

        def prepare(config):
            def call(x):
                if spent[str(config)] is None:
                    raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
                return spent[str(config)]

            call.config = config
            return call

        def once(call, chain, flush):
            timed.append((call.config, len(chain)))
            late = timed.count(timed[-1]) % 3 == 0
            return call(*chain[0]) * (5 if late else 1)  # now and then something else ran

        monkeypatch.setattr(autotune, "_once", once)
        return autotune.pick("kernel", key, CONFIGS, prepare, (torch.zeros(1),)).config

    return pick, timed, tmp_path / "cache" / "triton.json"


@pytest.mark.parametrize(
    "milliseconds, expected",
    [
        ((1.0, 0.5, 0.9), 1),
        ((1.01, 1.0, 1.0), 0),
        ((1.1, 1.01, 1.0), 1),
        ((None, 2.0, 1.0), 2),
        ((None, None, None), 0),
    ],
)
def test_choice(tuned, milliseconds, expected):
    assert tuned[0](*milliseconds) == CONFIGS[expected]


@pytest.mark.parametrize(
    "fastest, alone, in_a_row", [(0.01, 3, autotune.SHORT_REPEATS), (0.5, 3 + autotune.REPEATS, 0)]
)
def test_short_calls_are_looked_at_more_often(tuned, fastest, alone, in_a_row):
    """All tiles in one way, whatever disturbs a single look: times alone and in a row do not compare."""
    pick, timed, _ = tuned
    pick(2.0, fastest, 0.6)
    counts = [[timed.count((config, calls)) for calls in (1, autotune.CHAIN)] for config in CONFIGS]
    assert counts == [[alone, in_a_row]] * 3


def test_each_call_in_a_row_has_its_own_weight():
    x, weight, missing = torch.zeros(2, 3), torch.zeros(8, 8), None
    view = torch.zeros(8, 16)[:, ::2]
    chain = autotune._chain((x, weight, missing, view))
    assert len(chain) == autotune.CHAIN and chain[0][1] is weight
    assert len({given[1].data_ptr() for given in chain}) == len(chain)
    assert all(given[0] is x and given[2] is None and given[3] is view for given in chain)
    assert len(autotune._chain((torch.zeros(autotune.CHAIN_BYTES // 8),))) == 2


def test_no_room_for_copies(monkeypatch):
    def full(tensor):
        raise torch.OutOfMemoryError

    given = (torch.zeros(8, 8),)
    monkeypatch.setattr(torch.Tensor, "clone", full)
    assert autotune._chain(given) == [given]


def test_remembered(tuned):
    pick, timed, file = tuned
    assert pick(1.0, 0.5, 0.9) == CONFIGS[1]
    timed.clear()
    assert pick(0.1, 0.5, 0.9) == CONFIGS[1] and not timed
    assert pick(0.1, 0.5, 0.9, key=("another",)) == CONFIGS[0] and timed
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[1, 2", "[1, 2]", "null", '{"kernel": {"BO": 1}}'])
def test_spoilt_memory_is_timed_again(tuned, content):
    pick, timed, file = tuned
    pick(1.0, 0.5, 0.9)
    file.write_text(content)
    timed.clear()
    assert pick(0.1, 0.5, 0.9) == CONFIGS[0] and timed


def test_a_tile_no_longer_offered_is_not_taken(tuned):
    pick, timed, file = tuned
    pick(1.0, 0.5, 0.9)
    entries = {name: {"BO": 1 << 20, "C": None} for name in json.loads(file.read_text())}
    file.write_text(json.dumps(entries))
    timed.clear()
    assert pick(0.1, 0.5, 0.9) == CONFIGS[0] and timed
