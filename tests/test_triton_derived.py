"""What is kept of a stored tensor: as long as it lives, at one address, and never older than the tensor."""

import gc
import sys
import threading
import time

import pytest
import torch
from triton_cases import bsr_parts, random

import sten
from sten.kernels import bsr, derived


def doubled(source):
    return source * 2


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(derived, "_kept", {})


def test_kept_while_it_lives():
    source = torch.arange(4)
    first, settled = derived.derived("tag", doubled, source)
    assert settled and derived.derived("tag", doubled, source)[0] is first
    assert derived.derived("another", doubled, source)[0] is not first
    assert derived.derived("tag", doubled, source[:3])[0].tolist() == [0, 2, 4]
    del source
    gc.collect()
    derived.derived("tag", doubled, torch.arange(5))
    assert len(derived._kept) == 1


@pytest.mark.parametrize("dies", [0, 1])
def test_dies_with_any_of_its_sources(dies):
    sources = [torch.arange(4), torch.arange(4)]
    derived.derived("sum", torch.add, *sources)
    (entry,) = derived._kept.values()
    assert entry.alive()
    del sources[dies]
    gc.collect()
    assert not entry.alive()


def test_follows_what_is_written_at_one_address():
    a, b = torch.arange(4), torch.arange(4)
    total, _ = derived.derived("sum", torch.add, a, b)
    for written in (a, b):
        written.add_(10)
        again, settled = derived.derived("sum", torch.add, a, b)
        assert again is total and settled and torch.equal(total, a + b)


def test_another_storage_at_the_address_of_an_emptied_one():
    """As when a sharded model frees its weights: the first tensor lives, and its memory is another's."""
    memory = torch.arange(8)
    again = torch.from_numpy(memory.numpy())  # one address, two storages
    assert memory.data_ptr() == again.data_ptr()
    derived.derived("tag", doubled, memory)
    memory.numpy()[:] = 5  # unseen by either
    assert torch.equal(derived.derived("tag", doubled, again)[0], again * 2)


def test_made_in_inference_mode_and_changed_outside():
    source = torch.arange(4)
    with torch.inference_mode():
        kept, _ = derived.derived("tag", doubled, source)
    source.add_(1)
    assert derived.derived("tag", doubled, source)[0] is kept and torch.equal(kept, source * 2)


def test_renewed_where_no_call_follows():
    a, b, c = torch.arange(4), torch.arange(4), torch.arange(4)
    kept = [derived.derived("sum", torch.add, *pair)[0] for pair in ((a, b), (a, c))]
    own, _ = derived.derived("own", doubled, a, renewed=False)
    a.add_(10)
    derived.renew(b, a)
    assert torch.equal(kept[0], a + b)
    assert not torch.equal(kept[1], a + c)  # nothing was said of c
    assert not torch.equal(own, a * 2)


def test_renewed_where_versions_say_nothing():
    with torch.inference_mode():
        source = torch.arange(4)
        kept, _ = derived.derived("tag", doubled, source)
        source.add_(10)
        assert derived.derived("tag", doubled, source)[0].tolist() == [0, 2, 4, 6]  # nobody said so
        derived.renew(source)
    assert torch.equal(kept, source * 2) and derived.derived("tag", doubled, source)[0] is kept


def test_a_capture_makes_its_own_form_of_what_is_trained(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(4))
    kept = [derived.derived("tag", doubled, w, renewed=False)[0] for w in (weight, weight.detach())]
    assert kept[0] is kept[1]
    monkeypatch.setattr(derived, "capturing", lambda t: True)
    assert derived.derived("tag", doubled, weight, renewed=False)[0] is not kept[0]
    assert derived.derived("tag", doubled, weight.detach(), renewed=False)[0] is kept[0]
    assert derived.derived("tag", doubled, weight)[0] is kept[0]  # whoever writes it says so


def test_in_a_capture(monkeypatch):
    a, b = torch.arange(4), torch.arange(4)
    kept = [derived.derived("tag", doubled, a)[0], derived.derived("tag", doubled, b, renewed=False)[0]]
    monkeypatch.setattr(derived, "capturing", lambda t: True)
    for source, old, renewed in ((a, kept[0], True), (b, kept[1], False)):
        assert derived.derived("tag", doubled, source, renewed=renewed)[0] is old
        source.add_(1)
        made, settled = derived.derived("tag", doubled, source, renewed=renewed)
        assert made is not old and not settled and torch.equal(made, source * 2)
    monkeypatch.setattr(derived, "capturing", lambda t: False)
    assert derived.derived("tag", doubled, a)[0] is kept[0]
    assert derived.derived("tag", doubled, b, renewed=False)[0] is kept[1]
    monkeypatch.setattr(derived, "capturing", lambda t: True)
    assert derived.derived("tag", doubled, a)[1]
    assert not derived.derived("tag", doubled, b, renewed=False)[1]  # it was seen to change, and may again


def test_many_threads():
    failed = []

    def work(seed):
        try:
            for number in range(300):
                source = torch.full((3,), seed * 1000 + number)
                assert torch.equal(derived.derived("tag", doubled, source)[0], source * 2)
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
    """The address that either gets is the one that is kept."""
    source, both, made = torch.arange(4), threading.Barrier(2), []

    def slowly(source):
        time.sleep(0.05)
        return source * 2

    def work():
        both.wait()
        made.append(derived.derived("tag", slowly, source)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert made[0] is made[1]


def test_a_tick_renews_the_tables(monkeypatch):
    """A graph recorded before a tick reads the table where it was."""
    monkeypatch.setattr(sten.dispatch, "WRITTEN", [derived.renew])  # which sten.native does for tensors on a GPU
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sten.RigL(100, every=2, stop=1.0)
    sten.sparsify(model[0], sten.BSR((8, 8)), method, sparsity=0.5, optimizer=optimizer)
    parts = model[0].weight.parts
    weight = parts["crow"], parts["col"]
    x, kept = random(3, 64), []
    for table in (bsr._scheduled, lambda *weight: bsr._shares(40, 2, 16, 8, *weight)):
        kept.append((table, derived.derived(str(table), table, *weight)[0]))
    before = [parts["col"].clone(), *(table.clone() for _, table in kept)]
    for _ in range(3):
        optimizer.zero_grad()
        model(x.cpu()).square().sum().backward()
        optimizer.step()
    now = model[0].weight.parts
    assert now["col"].data_ptr() == weight[1].data_ptr() and not torch.equal(before[0], now["col"])
    for (table, mine), old in zip(kept, before[1:], strict=True):
        assert torch.equal(mine, table(now["crow"], now["col"])) and not torch.equal(mine, old)


def test_bsr_parts_are_what_the_tables_follow():
    parts, _ = bsr_parts(64, 80, 16, 16)
    bsr.linear(random(3, 80), parts["values"], parts["crow"], parts["col"], out_features=64)
    assert any(key[0].startswith("bsr shares") for key in derived._kept)
