"""Faults in the middle of a step or a mask update: weights, masks and optimizer stay consistent."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading

import pytest
import torch
from small import batch, loss_of, mlp, train
from torch import nn
from training_methods import METHODS, SUPPORTED

import sten
from sten.training.engine import engines_of, trained_weights

LAYOUTS = {"CSR": sten.CSR(), "NM": sten.NM(2, 4), "FanIn": sten.FanIn(), "BSR": sten.BSR((4, 4))}
CELLS = [
    (method, next(LAYOUTS[name] for name in LAYOUTS if SUPPORTED[type(method).__name__, name] == "yes"))
    for method in METHODS
    if method.schedule is not None
]
every_method = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: type(cell[0]).__name__)


def build(cell):
    method, layout = cell
    model = mlp()
    kind = sten.optim.AdamS if method.optimizer else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2)
    sten.sparsify(model, layout, method, sparsity=None if layout.rate else 0.5, optimizer=optimizer)
    return model, optimizer


def failing(method, error: type[BaseException], at: int):
    """The same method, whose update raises at the `at`-th weight of this process, once."""
    kind = type(method)

    class Failing(kind):
        calls = 0

        def update(self, view):
            edit = super().update(view)
            Failing.calls += view.step > 0  # 0: the first mask
            if Failing.calls == at:
                Failing.calls += 1
                raise error("in the middle of an update")
            return edit

    Failing.__name__ = kind.__name__
    new = copy.copy(method)
    object.__setattr__(new, "__class__", Failing)
    return new


def expect_consistent(model, optimizer) -> None:
    """Values, gradients and optimizer state have one shape, and the pattern is valid."""
    for weight in trained_weights(model):
        param = weight.param
        if hasattr(weight, "part_names"):
            weight.layout.validate(weight.parts(param.detach()), weight.shape)
        assert param.grad is None or param.grad.shape == param.shape
        for slot in optimizer.state.get(param, {}).values():
            assert not isinstance(slot, torch.Tensor) or slot.dim() == 0 or slot.shape == param.shape
        assert any(param is p for group in optimizer.param_groups for p in group["params"])
    assert torch.isfinite(model(batch(0))).all()


def steps(model, optimizer, first: int, last: int, catch=()) -> int:
    """Own loop; returns how many steps raised. A step that raised before it was counted is done again."""
    raised = 0
    for i in range(first, last):
        for _ in range(2):
            done = engines_of(model)[0].step
            optimizer.zero_grad()
            try:
                loss_of(model, i).backward()
                optimizer.step()
            except catch:
                raised += 1
                expect_consistent(model, optimizer)
            if engines_of(model)[0].step > done:
                break
    return raised


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
@every_method
def test_a_failed_update_is_tried_again(cell, at, error):
    """At the first or the second of two weights; the update happens at the next step, and is counted once."""
    torch.manual_seed(0)
    reference, optimizer = build(cell)
    steps(reference, optimizer, 0, 12)
    updates = engines_of(reference)[0].updates
    model, optimizer = build((failing(cell[0], error, at), cell[1]))
    engine = engines_of(model)[0]
    raised = steps(model, optimizer, 0, 12, error)
    assert raised == 1 and engine.step == 12
    assert engine.updates == updates or engine.updates == updates - 1  # two that fall on one step are one
    expect_consistent(model, optimizer)
    density = [w.active().float().mean() for w in trained_weights(model)]
    want = [w.active().float().mean() for w in trained_weights(reference)]
    assert all(abs(a - b) < 0.1 for a, b in zip(density, want, strict=True))
    sten.finalize(model)


@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_update_uses_up_no_random_numbers(at):
    """The update that is tried again draws what the failed one drew."""
    model, optimizer = build((failing(sten.SET(24, every=4), ValueError, at), sten.CSR()))
    generator = engines_of(model)[0].generator
    before = generator.get_state()
    assert steps(model, optimizer, 0, 4, ValueError) == 1 and torch.equal(generator.get_state(), before)
    steps(model, optimizer, 4, 5)
    assert engines_of(model)[0].updates == 1 and not torch.equal(generator.get_state(), before)


@every_method
def test_an_error_leaves_a_step_as_it_was(cell):
    """In forward, and in backward: what a step has not written yet is not written."""
    model, optimizer = build(cell)
    train(model, optimizer, range(3))
    before = copy.deepcopy(model.state_dict())
    handle = model[2].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 3)
    handle.remove()
    loss = loss_of(model, 3)
    y = model[0](batch(3))
    y.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    del loss, y
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "momentum" not in key)
    train(model, optimizer, range(3, 14))
    expect_consistent(model, optimizer)


@every_method
def test_ctrl_c_at_any_time(cell):
    """SIGINT from another thread, in every part of a step: each state that it leaves is consistent, and goes on."""
    model, optimizer = build(cell)
    train(model, optimizer, range(1))  # torch's Adam makes its state entry by entry, and may be interrupted there
    random = torch.Generator().manual_seed(0)
    engine, interrupted = engines_of(model)[0], 0
    for i in range(1, 13):
        delay = float(torch.rand((), generator=random)) * 0.004
        timer = threading.Timer(delay, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        optimizer.zero_grad()
        try:
            timer.start()
            loss_of(model, i).backward()
            optimizer.step()
            timer.join()
            threading.Event().wait(0.05)  # where it was late
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        expect_consistent(model, optimizer)
    assert interrupted >= 10 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    steps(model, optimizer, 20, 30)
    assert engine.step >= 10
    sten.finalize(model)


@every_method
def test_nan_in_a_gradient(cell):
    """A gradient that is not finite moves no mask of a method that reads it; with a clean optimizer step it goes on."""
    model, optimizer = build(cell)
    train(model, optimizer, range(3))
    masks = [weight.active().clone() for weight in trained_weights(model)]
    updates = engines_of(model)[0].updates
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="not finite") if reads_gradients(cell[0]) else contextlib.nullcontext():
        (loss_of(model, 3) * float("nan")).backward()
        optimizer.step()
        if not cell[0].replaces_step:  # then NaN are in the weights, as in any dense model
            return
    assert engines_of(model)[0].updates == updates
    assert all(torch.equal(a, w.active()) for a, w in zip(masks, trained_weights(model), strict=True))


def reads_gradients(method) -> bool:
    return "grad" in method.needs and method.schedule.due(4)


def test_threads_on_one_model():
    """Calls of one model from several threads at once, the first calls included."""
    for layout in (sten.CSR(), sten.GroupedNM(1, 4, 4), sten.NM(2, 4)):
        model = sten.sparsify(
            nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)),
            layout,
            sparsity=None if layout.rate else 0.8,
        )
        inputs = [torch.randn(1 + i, 64) for i in range(8)]
        want = [model(x).detach() for x in inputs]
        for layer in (model[0], model[2]):
            layer.weight.cache.invalidate()
        failures = []

        def call(model=model, inputs=inputs, want=want, failures=failures):
            for _ in range(20):
                for x, y in zip(inputs, want, strict=True):
                    if not torch.allclose(model(x), y, rtol=1e-5, atol=1e-5):
                        failures.append(len(x))

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


def test_fork_after_load(tmp_path):
    """A process that loaded a model and used it forks: the child can use it (DataLoader workers, pre-forking servers).

    With one thread: after a parallel region of OpenMP a forked child hangs in torch itself, in dense models too.
    """
    sten.save(sten.sparsify(nn.Linear(64, 32), sten.CSR(), sparsity=0.8), tmp_path / "m")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = sten.load(nn.Linear(64, 32), tmp_path / "m")
        x = torch.randn(4, 64)
        want = model(x).detach()
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            again = sten.load(nn.Linear(64, 32), tmp_path / "m")
            os._exit(0 if torch.equal(model(x), want) and torch.equal(again(x), want) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
