"""Every method: what it must do, by hand or against its equations; resume; the table method x layout x optimizer."""

import copy
import dataclasses
import math
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_models import batch, engine_of, loss_of, masks, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, FanIn, VectorNM
from sten.sparsifiers import bidirectional, check_needs

pytestmark = pytest.mark.usefixtures("one_thread")


def cast():
    model = mlp()
    optimizer = sten.optim.AdamS(model.parameters(), lr=1e-2)
    sten.sparsify(model, NM(2, 4), sten.CAST(total_steps=20, decay=1e-2, refresh=3), optimizer=optimizer)
    return model, optimizer


def test_a_damaged_run_is_refused(tmp_path):
    model, optimizer, _ = sparse(sten.RigL(24, every=4), optimizer="adamw")
    train(model, optimizer, 5)
    sten.save_run(model, tmp_path / "run.pt", optimizer)
    data = (tmp_path / "run.pt").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(ValueError, match="Expected a complete file"):
            sten.load_run(model, tmp_path / "cut.pt", optimizer)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []
    state = model.state_dict()
    other, _, _ = sparse(sten.SET(24, every=4), optimizer="adamw")
    with pytest.raises(RuntimeError, match=r"Expected the state of SET\(.*got that of RigL\("):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        mlp().load_state_dict(state)


def test_a_killed_save_leaves_the_old_file(tmp_path):
    code = (
        "import os, sys, torch, sten\n"
        "model = torch.nn.Linear(8, 8); opt = torch.optim.SGD(model.parameters(), .1)\n"
        "sten.save_run(model, sys.argv[1], opt, epoch=1)\n"
        "os.replace = lambda *a: os._exit(9)\n"
        "sten.save_run(model, sys.argv[1], opt, epoch=2)\n"
    )
    path = str(tmp_path / "run.pt")
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code, path], check=False).returncode == 9
    model = nn.Linear(8, 8)
    assert sten.load_run(model, path, torch.optim.SGD(model.parameters(), 0.1)) == {"epoch": 1}


# what all methods share


SCHEDULED = [
    sten.SET(1000), sten.RigL(1000), sten.DSTEE(1000), sten.SRigL(1000), sten.SparseMomentum(1000), sten.Gradual(1, 9),
    sten.BlockPruneGrow(1, 9), sten.DecayingStructure(9), sten.Transposable(), sten.BiMask(), sten.CAST(9),
]  # fmt: skip


@pytest.mark.parametrize("method", SCHEDULED, ids=lambda m: type(m).__name__)
def test_a_schedule_is_made_once_or_taken_as_given(method):
    assert method.schedule is method.schedule and "schedule" not in repr(method)
    own = sten.schedule.Constant(0.25, start=3, stop=7, every=2)
    other = dataclasses.replace(method, schedule=own)
    assert other.schedule is own and "schedule=Constant(" in repr(other) and other != method
    assert dataclasses.replace(other, schedule=None) == method
    same = dataclasses.replace(method, schedule=dataclasses.replace(method.schedule))
    assert same == method and hash(same) == hash(method) and repr(same) == repr(method)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
    assert repr(copy.deepcopy(method)) == repr(method)


def test_the_default_schedule_follows_the_fields():
    method = sten.RigL(1000)
    assert dataclasses.replace(method, seed=3).schedule == method.schedule
    with pytest.raises(ValueError, match="pass schedule=None"):
        dataclasses.replace(method, every=50)
    assert dataclasses.replace(method, every=50, schedule=None) == sten.RigL(1000, every=50)
    assert sten.SET(1000, schedule=method.schedule).schedule == method.schedule
    sten.RigL(50, schedule=sten.schedule.Constant(0.3, every=5))  # the check of every is about the default
    with pytest.raises(ValueError, match="Expected a mask update"):
        sten.RigL(50)


def test_a_given_schedule_is_what_training_follows():
    method = sten.RigL(1000, schedule=sten.schedule.Constant(0.3, start=3, stop=9, every=3))
    model, optimizer, engine = sparse(method)
    moved = []
    for step in range(12):
        before = masks(model)
        train(model, optimizer, 1, first=step)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, masks(model), strict=True)))
    assert [step + 1 for step, yes in enumerate(moved) if yes] == [3, 6, 9] and engine.updates == 3


@dataclasses.dataclass(frozen=True)
class Forgets(sten.extend.PatternMethod):
    schedule: sten.schedule.Schedule | None = None

    def __post_init__(self):
        pass

    def default_schedule(self):
        return sten.schedule.Constant(0.3, every=5)


def test_a_method_without_its_schedule_is_refused():
    with pytest.raises(TypeError, match=r"Forgets.__post_init__ to call super\(\)"):
        sten.sparsify(mlp(), CSR(), Forgets(), sparsity=0.5)


def test_needs_that_no_engine_provides():
    class Wanda(sten.Magnitude):
        needs = frozenset({"x_norm"})

    class Typo(sten.Magnitude):
        needs = frozenset({"gradient", "momentum"})

    with pytest.raises(ValueError, match=r"Expected calibration= for .*Wanda\(\), which reads x_norm"):
        sten.sparsify(mlp(), layout=sten.NM(2, 4), sparsifier=Wanda())
    with pytest.raises(ValueError, match=r"Expected Typo.needs to name some of .* got \['gradient'\]"):
        sten.sparsify(mlp(), layout=sten.NM(2, 4), sparsifier=Typo())
    check_needs(sten.RigL(1000))
    with pytest.raises(NotImplementedError, match="Both to define score or update") as error:
        type("Both", (sten.extend.PatternMethod,), {"needs": frozenset({"grad", "momentum"})})().score(None)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="abstract"):
        sten.Sparsifier()


class Rounded(sten.extend.PatternMethod):
    """Keeps the positive entries of each group and rounds them: a one-shot method that changes values."""

    def update(self, view):
        assert view.mask is None and view.step == 0 and view.state == {}
        return sten.extend.Edit(mask=view.layout.mask(view.weight, view.sparsity), value=view.weight.round(decimals=1))


def test_a_one_shot_method_decides_values_too():
    dense, model = mlp(), sten.sparsify(mlp(), NM(2, 4), Rounded())
    for i in (0, 2):
        w = dense[i].weight.detach()
        assert torch.equal(model[i].weight.to_dense(), w.round(decimals=1) * NM(2, 4).mask(w))


def test_entries_of_an_earlier_pruning_come_before_all_scores():
    allowed = torch.zeros(4, 8, dtype=torch.bool)
    allowed[:, 1] = True
    view = sten.extend.View("w", torch.arange(32.0).view(4, 8), CSR(), 0.75, allowed=allowed)
    mask = sten.Magnitude().update(view).mask
    assert mask.sum() == 8 and mask[:, 1].all()


# STE, SR-STE, decaying masks


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_srste_is_its_equation(decay):
    """w <- w - lr * (g + decay * (1 - M) w + weight_decay * w), with momentum behind the sum."""
    model, optimizer, _ = sparse(sten.SRSTE(decay) if decay else sten.STE(), NM(2, 4), optimizer="momentum")
    w, buffers, twin = [p.detach().clone() for p in (model[0].weight, model[2].weight)], {}, mlp()
    w = [twin[0].weight.detach().clone(), twin[2].weight.detach().clone()]
    for step in range(8):
        leaves = [x.clone().requires_grad_() for x in w]
        chosen = [NM(2, 4).mask(x.abs()) for x in w]
        effective = [x * m for x, m in zip(leaves, chosen, strict=True)]
        for e in effective:
            e.retain_grad()
        x, y = batch(step)
        hidden = F.linear(x, effective[0], model[0].bias.detach()).relu()
        F.cross_entropy(F.linear(hidden, effective[1], model[2].bias.detach()), y).backward()
        for i, e in enumerate(effective):
            g = e.grad + decay * (~chosen[i]) * w[i] + 1e-3 * w[i]
            buffers[i] = g if i not in buffers else 0.9 * buffers[i] + g
            w[i] = w[i] - 0.1 * buffers[i]
        train(model, optimizer, 1, first=step)
    for layer, want in zip((model[0], model[2]), w, strict=True):
        torch.testing.assert_close(layer._parameters["weight"].detach(), want, rtol=1e-4, atol=1e-6)


def test_srste_under_a_scaled_fused_step_is_not_divided_by_the_scale():
    moved = []
    for scale in (1.0, 2.0**16):
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(1.0, 65).view(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), 0.5, fused=True)
        sten.sparsify(model, NM(2, 4), sten.SRSTE(decay=0.1), optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale((model(torch.zeros(1, 8)) * 0).sum()).backward()
        scaler.step(optimizer)
        moved.append(model[0]._parameters["weight"].detach().clone())
    assert torch.equal(*moved)
    w = torch.arange(1.0, 65).view(8, 8)
    torch.testing.assert_close(moved[0], torch.where(NM(2, 4).mask(w), w, 0.95 * w))


def test_decaying_mask_from_dense_to_masked():
    model, optimizer, _ = sparse(sten.DecayingMask(20, rate=0.1, dense=0.2), NM(1, 4), optimizer="sgd")
    for step in range(20):
        w = model[0]._parameters["weight"].detach()
        beta = 1.0 if step < 4 else 0.0 if step >= 18 else math.exp(-0.1 * (step - 4))
        torch.testing.assert_close(model[0].weight, torch.where(NM(1, 4).mask(w.abs()), w, beta * w))
        train(model, optimizer, 1, first=step)


def test_decaying_structure_goes_through_its_frames():
    model, optimizer, _ = sparse(sten.DecayingStructure(20, fine_tune=0.2), NM(1, 8), optimizer="sgd")
    seen = []
    for step in range(20):
        seen.append(int((model[0].weight[0] != 0).sum()) // 2)
        train(model, optimizer, 1, first=step)
    assert seen == [7] * 4 + [4] * 4 + [2] * 4 + [1] * 8


def test_cubic_at_both_ends_and_global():
    model, optimizer, _ = sparse(sten.Gradual(start=2, stop=9, every=3), sparsity=sten.Global(0.8))
    counts = []
    for step in range(12):
        train(model, optimizer, 1, first=step)
        counts.append(sum(int(m.sum()) for m in masks(model)))
    expected = [round(768 * (1 - 0.8 * (1 - (1 - p) ** 3))) for p in (0, 3 / 7, 6 / 7, 1)]
    assert counts == [768] + expected[:1] * 3 + expected[1:2] * 3 + expected[2:3] + expected[3:] * 4


# two-way masks


def test_all_ninety_transposable_patterns_and_the_best_of_them():
    patterns = bidirectional.square_patterns(2, 4)
    assert patterns.shape == (90, 4, 4) and (patterns.sum(1) == 2).all() and (patterns.sum(2) == 2).all()
    score = torch.rand(8, 12)
    mask = bidirectional.transposable(NM(2, 4), score)
    for i in range(0, 8, 4):
        for j in range(0, 12, 4):
            block = (slice(i, i + 4), slice(j, j + 4))
            assert (score[block] * mask[block]).sum() == pytest.approx(
                float((score[block] * patterns).sum((1, 2)).max())
            )
    greedy = bidirectional.transposable(NM(4, 8), torch.rand(16, 16))
    assert (greedy.view(16, 2, 8).sum(2) <= 4).all() and (greedy.view(2, 8, 16).sum(1) <= 4).all()


@pytest.mark.parametrize("method", [sten.BDWP(), sten.BiMask(refresh=2, tries=4)], ids=lambda m: type(m).__name__)
def test_forward_and_input_gradient_have_different_masks(method):
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, NM(2, 4), method, optimizer=optimizer)
    w = model[0]._parameters["weight"].detach()
    x = torch.randn(5, 16, requires_grad=True)
    y = model(x)
    g = torch.randn(5, 8)
    y.backward(g)
    forward = NM(2, 4).mask(w.abs())
    torch.testing.assert_close(y, x @ (w * forward).t())
    torch.testing.assert_close(model[0]._parameters["weight"].grad, g.t() @ x.detach())
    backward = torch.linalg.lstsq(g, x.grad).solution != 0 if False else model[0].weight.parts["backward_mask"]
    torch.testing.assert_close(x.grad, g @ (w * backward))
    assert not torch.equal(forward, backward)
    if isinstance(method, sten.BDWP):
        assert (backward.view(2, 4, 16).sum(1) == 2).all()
    else:
        assert (backward & ~forward).sum() == 0


# SRigL, sparse momentum


@pytest.mark.parametrize("ablate", [0.3, 2.0])
def test_srigl_has_constant_fan_in_and_spares_the_classifier(ablate):
    model, optimizer, engine = sparse(sten.SRigL(60, every=3, ablate=ablate), FanIn(), sparsity=0.8)
    ablated = 0
    for step in range(40):
        train(model, optimizer, 1, first=step)
        first, last = (mask.sum(1) for mask in masks(model))
        assert len(first[first > 0].unique()) == 1 and len(last.unique()) == 1 and bool((last > 0).all())
        assert int(first.sum()) <= round(0.2 * 512) and int(first.max()) == round(0.2 * 512) // int((first > 0).sum())
        ablated = max(ablated, int((first == 0).sum()))
        assert model[0]._parameters["weight"].shape == (int((first > 0).sum()), int(first.max()))
    assert ablated > 0 if ablate > 1 else ablated < 8
    assert engine.updates >= 13
    assert torch.isfinite(loss_of(sten.finalize(model), 0))


def test_srigl_by_hand():
    w = torch.tensor([[4.0, 3, 0, 0], [0, 1, 2, 0], [0.5, 0, 0, 0.4]])
    g = torch.tensor([[0.0, 0, 9, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    view = sten.extend.View("w", w, FanIn(), 0.5, w != 0, step=30, grad=g)
    method = sten.SRigL(40, drop_fraction=0.7, every=10, stop=1.0, ablate=0.99)
    # alpha = .35 * (1 + cos(3 pi / 4)) = .1025, no growth: survivors are all six; every neuron has two
    assert torch.equal(method.update(view).mask, w != 0)
    # alpha = .35 at half time: k = 2, K = 4: salient 4, 3, 2, 1 and g = 9, 8; neuron 2 has none: two with fan-in 3
    view = sten.extend.View("w", w, FanIn(), 0.5, w != 0, step=20, grad=g)
    expected = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(method.update(view).mask, expected)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_sparse_momentum_computes_the_optimizers_momentum(name):
    model, optimizer, engine = sparse(sten.SparseMomentum(60, every=20), optimizer=name)
    slots = [int(weight.param.numel()) for weight in engine.weights]
    total = sum(int(m.sum()) for m in masks(model))
    train(model, optimizer, 19)
    for weight in engine.weights:
        u, mask = engine.gradients.momentum(weight, optimizer), weight.active()
        state = optimizer.state[weight.param]
        own = state["momentum_buffer"] if name == "momentum" else state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
        wd = 0.0 if name == "adam" else 0.02  # the optimizer's buffer holds weight decay as well
        torch.testing.assert_close(u[mask], weight.dense(own)[mask], rtol=1e-3, atol=1e-4 + wd)
    train(model, optimizer, 25, first=19)
    assert engine.updates == 2 and sum(int(m.sum()) for m in masks(model)) == total
    assert [int(weight.param.numel()) for weight in engine.weights] == slots
    assert [int(m.sum()) for m in masks(model)] != [128, 64]


# CAST


def adams_by_hand(w, m, v, g, kept, t, total, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    alpha = t / total
    m = beta1 * m + (1 - beta1) * g
    sign = (w > 0) - (w < 0)
    u = m if kept else (1 - alpha) * m + alpha * decay * sign
    v = beta2 * v + (1 - beta2) * u**2
    return w - lr * (u / (1 - beta1 ** (t + 1))) / (math.sqrt(v / (1 - beta2 ** (t + 1))) + eps), m, v


def test_adams_is_its_equations_scalar_by_scalar():
    w = torch.tensor([0.5, -0.3, 0.2, -0.7], dtype=torch.float64)
    param = nn.Parameter(w.clone())
    mask = torch.tensor([True, False, False, True])
    optimizer = sten.optim.AdamS([param], lr=1e-2)
    state = [(x, 0.0, 0.0) for x in w.tolist()]
    for t in range(30):
        g = torch.sin(torch.arange(4, dtype=torch.float64) + t)
        param.grad = g.clone()
        optimizer.steer({param: mask}, 0.05, t / 30)
        optimizer.step()
        state = [
            adams_by_hand(*s, gi, k, t, 30, 1e-2, 0.05)
            for s, gi, k in zip(state, g.tolist(), mask.tolist(), strict=True)
        ]
    torch.testing.assert_close(param.detach(), torch.tensor([s[0] for s in state], dtype=torch.float64))
    with pytest.raises(TypeError, match="bool"):
        optimizer.steer({param: mask.int()}, 0.0, 0.0)


def test_a_copy_of_adams_steps_without_masks():
    param = nn.Parameter(torch.ones(2))
    optimizer = sten.optim.AdamS([param], lr=0.1)
    optimizer.steer({param: torch.tensor([True, False])}, 0.1, 0.5)
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    copied.grad = torch.ones(2)
    other.step()
    assert other.masks == {} and copied[0] == copied[1] and optimizer.masks


def test_adams_without_masks_is_adam():
    one, two = mlp(), mlp()
    train(one, torch.optim.Adam(one.parameters(), 1e-2), 5)
    train(two, sten.optim.AdamS(two.parameters(), 1e-2), 5)
    for have, want in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(have, want)


def test_cast_gets_masks_decay_and_ramp_and_folds_its_scales():
    model, optimizer = cast()
    assert any(p is model[0].weight_pattern.method_scale for g in optimizer.param_groups for p in g["params"])
    before = [layer._parameters["weight"].detach().clone() for layer in (model[0], model[2])]
    train(model, optimizer, 20)
    assert (optimizer.decay, optimizer.ramp) == (1e-2, 19 / 20) and len(optimizer.masks) == 2
    w, scale = model[0]._parameters["weight"].detach(), model[0].weight_pattern.method_scale.detach()
    dropped = ~NM(2, 4).mask(w.abs())
    assert float(w[dropped].abs().mean()) < 0.5 * float(before[0][~NM(2, 4).mask(before[0].abs())].abs().mean())
    torch.testing.assert_close(model[0].weight, w * scale.repeat_interleave(8, 1))
    want = w * scale.repeat_interleave(8, 1) * ~dropped
    sten.finalize(model)
    torch.testing.assert_close(model[0].weight.to_dense(), want)


def test_cast_leaves_existing_schedulers_alone():
    model = mlp()
    optimizer = sten.optim.AdamS(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    sten.sparsify(model, NM(2, 4), sten.CAST(total_steps=20, decay=1e-2), optimizer=optimizer)
    train(model, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3]


def test_cast_refuses_other_optimizers():
    model = mlp()
    with pytest.raises(TypeError, match=r"Expected sten\.optim\.AdamS for CAST, got AdamW"):
        sten.sparsify(model, NM(2, 4), sten.CAST(20), optimizer=torch.optim.AdamW(model.parameters()))
    assert type(model[0]) is nn.Linear


def test_distill_loss_is_its_equation():
    logits, teacher = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    target = torch.tensor([[0, 4, -100], [2, -100, 1]])
    p, q = teacher.softmax(-1), logits.softmax(-1)
    known = target != -100
    kl = (p * (p / q).log()).sum(-1)[known].mean()
    want = 0.25 * kl + 0.75 * F.cross_entropy(logits.flatten(0, 1), target.flatten())
    torch.testing.assert_close(sten.distill_loss(logits, target, teacher, eta=0.25), want)


def test_rewind_returns_to_the_start_in_the_mask():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    rewind = sten.Rewind(model, 0.875, rounds=3)
    assert list(rewind) == pytest.approx([0.5, 0.75, 0.875])
    train(model, torch.optim.SGD(model.parameters(), 0.1), 3)
    mask = CSR().mask(model[0].weight.detach().abs(), 0.5)
    rewind.apply({"0.weight": mask})
    assert torch.equal(model[0].weight, start["0.weight"] * mask) and torch.equal(model[2].weight, start["2.weight"])


def test_the_engine_of_a_models_weights():
    model, _, engine = sparse(sten.SET(24, every=4))
    assert engine_of(model) is engine


# the kit


KIT = [
    (sten.RigL(12, every=3), None), (sten.SET(12, every=3), BSR((4, 4))), (sten.DSTEE(12, every=3), VectorNM(1, 4, 4)),
    (sten.SRigL(12, every=3), FanIn()), (sten.SparseMomentum(12, every=4), None), (sten.Gradual(2, 8, 3), None),
    (sten.BlockPruneGrow(2, 8, 3), BSR((4, 4))), (sten.STE(), NM(2, 4)), (sten.SRSTE(0.1), NM(2, 4)), (sten.Static(),
    None), (sten.DecayingMask(12, rate=0.3), NM(1, 4)), (sten.DecayingStructure(12), NM(1, 8)), (sten.BDWP(), NM(2, 4)),
    (sten.Transposable(refresh=3), NM(2, 4)), (sten.BiMask(refresh=3), NM(2, 4)), (sten.CAST(12, 1e-2, 3), NM(2, 4)),
    (sten.Magnitude(), None), (sten.Random(), None),
]  # fmt: skip


@pytest.mark.parametrize("case", KIT, ids=lambda c: type(c[0]).__name__)
def test_every_method_passes_check_sparsifier(case):
    sten.testing.check_sparsifier(*case)


def test_the_example_passes_check_sparsifier_and_is_short():
    path = Path(__file__).parent.parent / "examples" / "new_sparsifier.py"
    assert len(path.read_text().splitlines()) < 40
    method = runpy.run_path(str(path))["FewestFirst"]
    for layout in (CSR(), BSR((4, 4)), NM(1, 4)):
        sten.testing.check_sparsifier(method(total_steps=12, every=3), layout)


class Leaks(sten.RigL):
    """Keeps state outside of init."""

    seen = 0

    def growth(self, view):
        Leaks.seen += 1
        return view.grad.abs() * (1 + torch.sin(torch.arange(view.grad.numel()) * Leaks.seen).view_as(view.grad))


class Drifts(sten.SET):
    def update(self, view):
        if view.mask is None:
            return super().update(view)
        return sten.extend.Edit(mask=view.mask & (view.weight.abs() > view.weight.abs().max() / 10))


class PerBackward(sten.STE):
    """Adds its decay in the backward pass, as the reference code of SR-STE does."""

    def apply(self, w, view):
        if w.requires_grad:
            w.register_hook(lambda g: g + 0.1 * w.detach())
        return w * self.present_mask(view)


BROKEN = [(Leaks(12, every=3), "bit by bit|must"), (Drifts(12, every=3), "count"), (PerBackward(), "one batch")]


@pytest.mark.parametrize("case", BROKEN, ids=lambda c: type(c[0]).__name__)
def test_check_sparsifier_refuses_broken_methods(case):
    with pytest.raises(AssertionError, match=case[1]):
        sten.testing.check_sparsifier(case[0], NM(2, 4) if isinstance(case[0], sten.STE) else CSR())
