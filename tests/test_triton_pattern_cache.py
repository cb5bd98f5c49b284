"""The pattern cache: entries last as long as their sources, at one address, and are made again by ``invalidate``."""

import gc
import sys
import threading
import time

import pytest
import torch
from triton_cases import bsr_parts, random

import sten
from sten.kernels import bsr, pattern_cache
from sten.kernels.backend import Backend
from sten.kernels.pattern_cache import Derived, invalidate


def doubled(source):
    return source * 2


def look_up(tag, make, *sources, values=False):
    """As a launch does at its first call with these tensors."""
    return Derived(tag, make, values)(*sources)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(pattern_cache, "_entries", {})


@pytest.fixture
def capture(monkeypatch):
    """Turns "a CUDA graph is captured" on and off."""
    return lambda on: monkeypatch.setattr(Backend, "capturing", lambda self, t: on)


def test_cached_until_its_source_is_freed():
    source = torch.arange(4)
    first, ready = look_up("tag", doubled, source)
    assert ready and look_up("tag", doubled, source)[0] is first
    assert look_up("another", doubled, source)[0] is not first
    assert look_up("tag", doubled, source[:3])[0].tolist() == [0, 2, 4]
    del source
    gc.collect()
    look_up("tag", doubled, torch.arange(5))
    assert len(pattern_cache._entries) == 1


@pytest.mark.parametrize("freed", [0, 1])
def test_dropped_with_any_of_its_sources(freed):
    sources = [torch.arange(4), torch.arange(4)]
    look_up("sum", torch.add, *sources)
    (entry,) = pattern_cache._entries.values()
    assert entry.valid()
    del sources[freed]
    gc.collect()
    assert not entry.valid()


def test_a_launch_remembers_only_its_last_tensors():
    """It is shared by weights of one shape, and holds no reference to them."""
    derived, a, b = Derived("tag", doubled), torch.arange(4), torch.arange(4) + 1
    for source in (a, b, a, a, b):
        assert torch.equal(derived(source)[0], source * 2)
    assert derived(b)[0] is look_up("tag", doubled, b)[0]
    again = torch.arange(4) + 2
    del a, b, source
    gc.collect()
    assert torch.equal(derived(again)[0], again * 2) and len(pattern_cache._entries) == 1


def test_invalidate_makes_entries_again_in_place():
    a, b, c = torch.arange(4), torch.arange(4), torch.arange(4)
    cached = [look_up("sum", torch.add, *pair)[0] for pair in ((a, b), (a, c))]
    own, _ = look_up("own", doubled, a, values=True)
    a.add_(10)
    invalidate(b, a)
    assert torch.equal(cached[0], a + b)
    assert not torch.equal(cached[1], a + c)  # c was not passed
    assert not torch.equal(own, a * 2)
    again, ready = look_up("sum", torch.add, a, b)
    assert again is cached[0] and ready


def test_versions_of_values_are_checked_and_of_patterns_not():
    """Code that writes a pattern calls `invalidate`; values have versions."""
    a = torch.arange(4)
    cached, of_values = look_up("tag", doubled, a)[0], look_up("values", doubled, a, values=True)[0]
    a.add_(10)
    assert look_up("tag", doubled, a)[0].tolist() == [0, 2, 4, 6]
    again, ready = look_up("values", doubled, a, values=True)
    assert again is of_values and not ready and torch.equal(again, a * 2)
    invalidate(a)
    assert torch.equal(cached, a * 2)


def test_another_shape_gets_another_tensor():
    sizes = iter([3, 5])
    source = torch.arange(4)
    derived = Derived("tag", lambda source: source.new_ones(next(sizes)))
    assert len(derived(source)[0]) == 3
    invalidate(source)
    assert len(derived(source)[0]) == 5


def test_another_storage_at_the_address_of_an_emptied_one():
    """As when a sharded model frees its weights: the first tensor still exists, but another owns its memory."""
    memory = torch.arange(8)
    again = torch.from_numpy(memory.numpy())  # one address, two storages
    assert memory.data_ptr() == again.data_ptr()
    derived = Derived("tag", doubled)
    derived(memory)
    memory.numpy()[:] = 5  # without a new version
    assert torch.equal(derived(again)[0], again * 2)


def test_made_in_inference_mode_and_written_outside():
    with torch.inference_mode():
        source = torch.arange(4)
        cached, _ = look_up("tag", doubled, source)
        source.add_(1)
    invalidate(source)
    assert look_up("tag", doubled, source)[0] is cached and torch.equal(cached, source * 2)


def test_a_capture_makes_its_own_form_of_trained_values(capture):
    weight = torch.nn.Parameter(torch.ones(4))
    cached = [look_up("tag", doubled, w, values=True)[0] for w in (weight, weight.detach())]
    pattern = look_up("pattern", doubled, weight)[0]
    assert cached[0] is cached[1]
    capture(True)
    assert look_up("tag", doubled, weight, values=True)[0] is not cached[0]
    assert look_up("tag", doubled, weight.detach(), values=True)[0] is cached[0]
    assert look_up("pattern", doubled, weight)[0] is pattern  # code that writes it calls `invalidate`


def test_in_a_capture(capture):
    a, b, c = torch.arange(4), torch.arange(4), torch.arange(4)
    cached = [look_up("tag", doubled, a)[0], look_up("tag", doubled, b, values=True)[0]]
    capture(True)
    made, ready = look_up("tag", doubled, c)  # first used in a capture
    assert not ready and look_up("tag", doubled, c)[0] is not made and torch.equal(made, c * 2)
    assert look_up("tag", doubled, a) == (cached[0], True)
    assert look_up("tag", doubled, b, values=True)[0] is cached[1]
    b.add_(1)
    made, ready = look_up("tag", doubled, b, values=True)
    assert made is not cached[1] and not ready and torch.equal(made, b * 2)
    capture(False)
    assert look_up("tag", doubled, b, values=True)[0] is cached[1]
    capture(True)
    assert not look_up("tag", doubled, b, values=True)[1]  # it changed once, and may again


def test_a_pattern_that_a_capture_writes(capture):
    """The graph makes the table again at each replay, and a call outside makes the cached one again."""
    a = torch.arange(4)
    derived = Derived("tag", doubled)
    cached, _ = derived(a)
    capture(True)
    a.add_(1)
    invalidate(a)
    made, ready = derived(a)
    assert made is not cached and not ready and torch.equal(made, a * 2)
    capture(False)
    again, ready = derived(a)
    assert again is cached and ready and torch.equal(cached, a * 2)


def test_a_constant_is_made_once_except_in_a_trace_or_a_capture(monkeypatch):
    monkeypatch.setattr(pattern_cache, "_constants", {})
    device, make = torch.device("cpu"), lambda: torch.arange(3)
    monkeypatch.setattr(pattern_cache, "dispatch_modes", lambda: 1)
    assert pattern_cache.constant((1,), device, make) is not pattern_cache.constant((1,), device, make)
    monkeypatch.setattr(pattern_cache, "dispatch_modes", lambda: 0)
    first = pattern_cache.constant((1,), device, make)
    assert pattern_cache.constant((1,), device, make) is first is not pattern_cache.constant((2,), device, make)


def test_many_threads():
    failed, derived = [], Derived("tag", doubled)

    def work(seed):
        try:
            for number in range(300):
                source = torch.full((3,), seed * 1000 + number)
                assert torch.equal(derived(source)[0], source * 2)
        except Exception as problem:
            failed.append(problem)

    threads, interval = [threading.Thread(target=work, args=(seed,)) for seed in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        [t.start() for t in threads], [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_two_threads_make_one():
    """Both get the cached tensor."""
    source, both, made = torch.arange(4), threading.Barrier(2), []

    def slowly(source):
        time.sleep(0.05)
        return source * 2

    def work():
        both.wait()
        made.append(look_up("tag", slowly, source)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert made[0] is made[1]


def test_a_mask_update_makes_the_tables_again(monkeypatch):
    """A graph recorded before a mask update reads the table at its old address."""
    cache = type(sten.from_dense(torch.eye(4), sten.CSR()).cache)
    plain = cache.invalidate
    monkeypatch.setattr(cache, "invalidate", lambda self, *pattern: (plain(self, *pattern), invalidate(*pattern)))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sten.RigL(100, every=2, stop=1.0)
    sten.sparsify(model[0], sten.BSR((8, 8)), method, sparsity=0.5, optimizer=optimizer)
    parts = model[0].weight.parts
    weight = parts["crow"], parts["col"]
    x, cached = random(3, 64), []
    for table in (bsr._schedule, lambda *weight: bsr._shares(40, 2, 16, 8, *weight)):
        cached.append((table, look_up(str(table), table, *weight)[0]))
    before = [parts["col"].clone(), *(table.clone() for _, table in cached)]
    for _ in range(3):
        optimizer.zero_grad()
        model(x.cpu()).square().sum().backward()
        optimizer.step()
    now = model[0].weight.parts
    assert now["col"].data_ptr() == weight[1].data_ptr() and not torch.equal(before[0], now["col"])
    for (table, mine), old in zip(cached, before[1:], strict=True):
        assert torch.equal(mine, table(now["crow"], now["col"])) and not torch.equal(mine, old)


def test_tables_are_derived_from_the_parts_of_bsr():
    parts, _ = bsr_parts(64, 80, 16, 16)
    bsr.linear(random(3, 80), parts["values"], parts["crow"], parts["col"], out_features=64)
    assert any(key[0].startswith("bsr shares") for key in pattern_cache._entries)
