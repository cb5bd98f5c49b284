"""The engine: hooks, mask updates, edits, masks; what every method relies on."""

import copy
import warnings

import pytest
import torch
import torch._dynamo.testing
from cases import SMALL
from torch import nn
from training_models import OPTIMIZERS, batch, dense_weights, engine_of, loss_of, masks, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, Masked
from sten.training.trained_weight import optimizer_slots

pytestmark = pytest.mark.usefixtures("one_thread")

every_layout = pytest.mark.parametrize("layout", [layout for layout in SMALL if layout.independent_units], ids=str)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def rigl_by_hand(model, start, optimizer, method, steps):
    """RigL on dense tensors: masked weights, masked gradients, masked slots; a transcription of the paper."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, mask in zip(layers, start, strict=True):
            layer.weight.mul_(mask)
    now = [mask.clone() for mask in start]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, step - 1).backward()
        if method.schedule.due(step):
            for i, layer in enumerate(layers):
                n = int(now[i].sum())
                k = int(method.schedule.value(step) * n)
                size = torch.where(now[i], layer.weight.detach().abs(), -1.0).flatten()
                keep = torch.zeros_like(now[i].flatten())
                keep[size.topk(n - k).indices] = True
                growth = torch.where(keep, -1.0, layer.weight.grad.abs().flatten())
                new = keep.clone()
                new[growth.topk(k).indices] = True
                new = new.view_as(now[i])
                with torch.no_grad():
                    layer.weight[new & ~now[i]] = 0
                    layer.weight.mul_(new)
                    for slot in optimizer.state[layer.weight].values():
                        if slot.dim():
                            slot.mul_(new & now[i])
                now[i] = new
            continue
        for layer, mask in zip(layers, now, strict=True):
            layer.weight.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for layer, mask in zip(layers, now, strict=True):
                layer.weight.mul_(mask)
    return now


@every_optimizer
def test_rigl_is_the_paper_on_dense_tensors(name):
    method = sten.RigL(total_steps=24, every=4, drop_fraction=0.5)
    model, optimizer, engine = sparse(method, optimizer=name)
    twin = mlp()
    expected = rigl_by_hand(twin, masks(model), OPTIMIZERS[name](twin.parameters()), method, 20)
    train(model, optimizer, 20)
    assert engine.updates == 4 and engine.step == 20
    for have, want in zip(masks(model), expected, strict=True):
        assert torch.equal(have, want)
    for have, want in zip(dense_weights(model), (twin[0].weight, twin[2].weight), strict=True):
        torch.testing.assert_close(have, want.detach(), rtol=2e-4, atol=2e-5)


def test_rigl_on_four_by_four_computed_by_hand():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    w = torch.tensor([[5.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 3, 0], [1, 0, 0, 2]])
    with torch.no_grad():
        model[0].weight.copy_(w)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    sten.sparsify(model, CSR(), sten.RigL(4, drop_fraction=1.0, every=2, stop=1.0), 1 - 5 / 16, optimizer=optimizer)
    weight = engine_of(model).weights[0]
    weight.change(sten.extend.Edit(mask=w != 0, value=w), optimizer)()  # from the pattern of w
    engine_of(model).step = 1  # the next step is a mask update; alpha = 1/2 * (1 + cos(pi / 2)) = 1/2, k = int(2.5) = 2
    engine_of(model).prepare_next()
    # the gradient of sum_o y_o * c_o at x is c_o * x_i
    x, c = torch.tensor([1.0, 2, 4, 8]), torch.tensor([1.0, 0, 0.5, 0])
    (model(x) * c).sum().backward()
    optimizer.step()
    # dropped: 1 and 2 (the smallest); grown: the largest |g| outside what is kept: g[0, 3] = 8, and g[0, 2] of two 4s
    expected = torch.tensor([[5.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]])
    grown = torch.zeros(4, 4, dtype=torch.bool)
    grown[0, 2] = grown[0, 3] = True
    assert torch.equal(model[0].weight.to_dense(), expected)
    assert torch.equal(masks(model)[0], (expected != 0) | grown)


def snapshot(engine, optimizer):
    """Dense (weight, mask, slots) of every weight."""
    out = []
    for weight in engine.weights:
        slots = {k: weight.dense(t).clone() for k, t in optimizer_slots(weight.param, optimizer).items()}
        out.append((weight.dense(weight.param).clone(), weight.active().clone(), slots))
    return out


@every_layout
@every_optimizer
def test_a_mask_update_leaves_active_entries_as_they_are_and_zeroes_new_ones(layout, name):
    model, optimizer, engine = sparse(sten.RigL(40, every=5, drop_fraction=0.5), layout, optimizer=name)
    train(model, optimizer, 4)
    before = snapshot(engine, optimizer)
    train(model, optimizer, 1, first=4)
    assert engine.updates == 1
    moved = False
    for (w, mask, slots), (new_w, new_mask, new_slots) in zip(before, snapshot(engine, optimizer), strict=True):
        assert int(mask.sum()) == int(new_mask.sum())
        both, grown = mask & new_mask, new_mask & ~mask
        moved |= bool(grown.any())
        assert torch.equal(w[both], new_w[both]) and not new_w[~both].any()
        for key, slot in new_slots.items():
            assert torch.equal(slot[both], slots[key][both]) and not slot[grown].any(), key
    assert moved
    for weight in engine.weights:
        weight.layout.validate(weight.parts(weight.param.detach()), weight.shape)


@every_layout
@pytest.mark.parametrize(
    "method", [sten.SET(60, every=5), sten.RigL(60, every=5), sten.DSTEE(60, every=5)], ids=lambda m: type(m).__name__
)
def test_the_count_is_exact_after_every_mask_update(layout, method):
    model, optimizer, engine = sparse(method, layout, optimizer="adamw")
    counts = [int(mask.sum()) for mask in masks(model)]
    first = masks(model)
    for step in range(20):
        train(model, optimizer, 1, first=step)
        assert [int(mask.sum()) for mask in masks(model)] == counts
        for weight in engine.weights:
            assert weight.param.grad is None or weight.param.grad.shape == weight.param.shape
    assert not torch.equal(first[0], masks(model)[0])
    sten.finalize(model)
    assert [int(w.weight.mask().sum()) for w in (model[0], model[2])] == counts


@pytest.mark.parametrize("method", [sten.RigL(24, every=4), sten.SRSTE(decay=0.1)], ids=lambda m: type(m).__name__)
@every_optimizer
def test_microbatches_equal_one_batch(method, name):
    layout = CSR() if isinstance(method, sten.RigL) else NM(2, 4)
    whole, optimizer, _ = sparse(method, layout, optimizer=name, dtype=torch.float64)
    parts, other, engine = sparse(method, layout, optimizer=name, dtype=torch.float64)
    train(whole, optimizer, 12, dtype=torch.float64)
    train(parts, other, 12, microbatches=4, dtype=torch.float64)
    assert engine.step == 12
    for have, want in zip(dense_weights(parts), dense_weights(whole), strict=True):
        torch.testing.assert_close(have, want)


@every_optimizer
def test_pruned_entries_stay_zero_for_a_thousand_steps_of_momentum(name):
    model, optimizer, engine = sparse(sten.Gradual(start=5, stop=20, every=5), optimizer=name)
    train(model, optimizer, 21)
    pruned = [weight == 0 for weight in dense_weights(model)]
    assert [int((~zero).sum()) for zero in pruned] == [128, 64]
    for step in range(1000 if name == "momentum" else 50):
        train(model, optimizer, 1, first=step % 7)
        assert not any(bool(weight.param[zero].any()) for weight, zero in zip(engine.weights, pruned, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "method",
    [sten.SRSTE(decay=0.1), sten.RigL(24, every=4), sten.DSTEE(24, every=4, c=0.1), sten.SparseMomentum(24, every=4)],
    ids=lambda m: type(m).__name__,
)
def test_grad_scaler_changes_nothing(method, fused):
    layout = NM(2, 4) if isinstance(method, sten.SRSTE) else CSR()
    runs = []
    for scale in (None, 2.0**10):
        model = mlp(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
        sten.sparsify(model, layout, method, 0.75 if layout == CSR() else None, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=5, enabled=scale is not None)
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step, dtype=torch.float64)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append(dense_weights(model))
    for have, want in zip(*runs, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", [sten.RigL, sten.DSTEE])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_infinities_neither_updates_masks_nor_counts(fused, method, set_to_none):
    runs = []
    for broken in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)
        sten.sparsify(model, CSR(), method(24, every=4), 0.75, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        for step in range(10):
            if broken and step in (2, 3):  # step 4 is a mask update
                optimizer.zero_grad(set_to_none)
                scaler.scale(loss_of(model, step) * torch.inf).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none)
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert (engine_of(model).step, engine_of(model).updates) == (10, 2)
        runs.append((masks(model), dense_weights(model)))
    for have, want in zip(runs[1][0] + runs[1][1], runs[0][0] + runs[0][1], strict=True):
        assert torch.equal(have, want)


def test_nan_gradients_skip_the_mask_update_and_say_so():
    model, optimizer, engine = sparse(sten.RigL(24, every=4))
    train(model, optimizer, 3)
    before = masks(model)
    optimizer.zero_grad()
    (loss_of(model, 3) * torch.nan).backward()
    with pytest.warns(UserWarning, match="not finite: the mask update of step 4 is skipped"):
        optimizer.step()
    assert engine.updates == 0 and all(map(torch.equal, before, masks(model)))


@pytest.mark.parametrize("method", [sten.SRSTE(decay=0.1), sten.RigL(24, every=4)], ids=lambda m: type(m).__name__)
def test_closures(method):
    layout = CSR() if isinstance(method, sten.RigL) else NM(2, 4)
    plain, first, _ = sparse(method, layout)
    train(plain, first, 9)
    model, optimizer, engine = sparse(method, layout)
    for step in range(9):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert torch.is_tensor(optimizer.step(closure))
    assert engine.step == 9 and all(map(torch.equal, dense_weights(plain), dense_weights(model)))


def test_groups_clipping_and_several_models():
    models = []
    for seed in (0, 1):
        model = mlp(seed)
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        sten.sparsify(model, CSR(), sten.RigL(24, every=4 + seed), 0.75, optimizer=optimizer)
        models.append((model, optimizer))
    for step in range(10):
        for model, optimizer in models:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert [(engine_of(m).step, engine_of(m).updates) for m, _ in models] == [(10, 2), (10, 2)]
    alone = mlp(1)
    optimizer = torch.optim.AdamW(
        [{"params": alone[0].parameters(), "lr": 0.01}, {"params": alone[2].parameters(), "weight_decay": 0.1}], lr=0.02
    )
    sten.sparsify(alone, CSR(), sten.RigL(24, every=5), 0.75, optimizer=optimizer)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(alone, step).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        optimizer.step()
    assert all(map(torch.equal, dense_weights(alone), dense_weights(models[1][0])))


def test_two_optimizers():
    model = mlp()
    optimizers = [
        torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9),
        torch.optim.AdamW(model[2].parameters(), 1e-2),
    ]
    sten.sparsify(model, CSR(), sten.RigL(24, every=4), 0.75, optimizer=optimizers)
    before = masks(model)
    for step in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(not torch.equal(a, b) and a.sum() == b.sum() for a, b in zip(before, masks(model), strict=True))


def test_nothing_dense_between_mask_updates_and_one_dense_gradient_at_a_time_on_them():
    model, optimizer, engine = sparse(sten.RigL(24, every=4))
    train(model, optimizer, 2)
    assert not engine.gradients.collectors
    for weight in engine.weights:
        param = weight.param
        sizes = [param.numel(), param.grad.numel(), *(t.numel() for t in optimizer_slots(param, optimizer).values())]
        assert sizes == [int(weight.active().sum())] * 3
    train(model, optimizer, 1, first=2)  # the next step is a mask update
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    assert all(c.at_once is not None and c.total is None and c.count == 1 for c in engine.gradients.collectors.values())
    optimizer.step()
    assert engine.updates == 1


def test_the_mask_of_a_weight_used_twice_is_updated_a_step_later():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.head(self.layer(self.layer(x).relu()))

    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, CSR(), sten.RigL(24, every=4), 0.75, optimizer=optimizer)
    engine = engine_of(model)
    train(model, optimizer, 4)
    assert engine.updates == 0 and engine.deferred_update_step == 5
    train(model, optimizer, 1, first=4)
    assert engine.updates == 1 and engine.deferred_update_step is None


def test_an_error_of_a_method_changes_nothing():
    class Broken(sten.SET):
        def update(self, view):
            if view.mask is not None and view.last:
                raise RuntimeError("no")
            return super().update(view)

    model, optimizer, _ = sparse(Broken(24, every=2))
    train(model, optimizer, 1)
    before = masks(model)
    with pytest.raises(RuntimeError, match="no"):
        train(model, optimizer, 1)
    assert all(map(torch.equal, before, masks(model)))


def test_masks_must_be_bool():
    class Ints(sten.SET):
        def update(self, view):
            return super().update(view) if view.mask is None else sten.extend.Edit(mask=view.mask.int())

    model, optimizer, _ = sparse(Ints(24, every=2))
    with pytest.raises(TypeError, match=r"Expected a bool tensor for Edit\.mask"):
        train(model, optimizer, 2)


def test_attach_after_sparsify_equals_sparsify_with_the_optimizer():
    plain, first, _ = sparse(sten.RigL(24, every=4))
    train(plain, first, 9)
    model = sten.sparsify(mlp(), CSR(), sten.RigL(24, every=4), 0.75)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    sten.attach(model, optimizer)
    train(model, optimizer, 9)
    assert all(map(torch.equal, dense_weights(plain), dense_weights(model)))
    with pytest.raises(ValueError, match="is attached to this optimizer"):
        sten.attach(model, optimizer)


def test_finalize_ends_the_engine():
    model, optimizer, engine = sparse(sten.RigL(24, every=4))
    train(model, optimizer, 5)
    want = dense_weights(model)
    sten.finalize(model)
    assert not engine.weights and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert all(map(torch.equal, want, dense_weights(model)))


def test_a_dense_weight_has_its_old_key_and_a_dense_checkpoint_fits():
    model, optimizer, _ = sparse(sten.Gradual(2, 8, 2))
    names = list(mlp().state_dict())
    assert [n for n, _ in model.named_parameters()] == names
    assert [n for n in model.state_dict() if "_pattern" not in n] == names
    with pytest.warns(UserWarning, match="no state of Gradual, so its schedule starts afresh"):
        model.load_state_dict(mlp(3).state_dict())
    train(model, optimizer, 9)
    twin = copy.deepcopy(model)
    assert all(map(torch.equal, dense_weights(twin), dense_weights(model)))
    sten.finalize(twin)
    assert twin[0].weight.sparse_layout == CSR() and twin[0].weight.density == 0.25
    assert torch.equal(twin(batch(0)[0]), sten.finalize(model)(batch(0)[0]))


@pytest.mark.parametrize("method", [sten.SET(24, every=4), sten.Gradual(2, 8, 2)], ids=lambda m: type(m).__name__)
def test_masks_of_transposed_weights_are_updated_in_the_orientation_of_the_layout(method):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(32, 16), nn.ReLU(), Conv1D(8, 32))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sten.sparsify(model, CSR(), method, 0.75, optimizer=optimizer)
    train(model, optimizer, 10)
    assert engine_of(model).updates >= 2
    sten.finalize(model)
    assert model[0].weight.shape == (16, 32) and model[0].weight.transposed and model[0].weight.density == 0.25


BAD = {
    "no lbfgs": (lambda m: torch.optim.LBFGS(m.parameters()), CSR(), sten.SET(9, every=2), 0.5, "LBFGS"),
    "not in optimizer": (
        lambda m: torch.optim.SGD([m[0].bias], 0.1),
        CSR(),
        sten.SET(9, every=2),
        0.5,
        "not in the optimizer",
    ),
    "rate": (lambda m: torch.optim.SGD(m.parameters(), 0.1), NM(2, 4), sten.Gradual(0, 9), None, "without a rate"),
    "grouped": (
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        sten.GroupedNM(2, 4, 1),
        sten.SET(9, every=2),
        None,
        "can move one by one",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(case):
    make, layout, method, sparsity, match = BAD[case]
    model = mlp()
    optimizer = make(model)
    with pytest.raises((ValueError, TypeError), match=match) as error:
        sten.sparsify(model, layout, method, sparsity, optimizer=optimizer)
    assert str(error.value).count("\n") == 0
    assert type(model[0]) is nn.Linear and not optimizer._optimizer_step_pre_hooks


def test_fixed_patterns_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, _ = sparse(sten.SET(24, every=4), Masked())
        train(model, optimizer, 5)


COMPILED = [
    (sten.RigL(24, every=4), CSR(), 2), (sten.SET(24, every=4), BSR((4, 4)), 1), (sten.SparseMomentum(24, every=4),
    CSR(), 1), (sten.SRSTE(0.1), NM(2, 4), 1), (sten.DecayingMask(20, rate=0.2), NM(1, 4), 1), (sten.Gradual(2, 8, 3),
    CSR(), 1), (sten.BDWP(), NM(2, 4), 1),
]  # fmt: skip


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: type(c[0]).__name__)
def test_compiled_models_update_masks_and_do_not_recompile(case):
    method, layout, graphs = case
    plain, first, _ = sparse(method, layout, optimizer="adam")
    train(plain, first, 13)
    model, optimizer, engine = sparse(method, layout, optimizer="adam")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    train(torch.compile(model, fullgraph=True, backend=counter), optimizer, 13)
    assert engine.step == 13
    assert counter.frame_count <= graphs  # the second graph: a step whose dense gradient the method reads
    for have, want in zip(dense_weights(model), dense_weights(plain), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_a_schedule_that_ends_after_training_is_named():
    model, optimizer, _ = sparse(sten.Gradual(2, 50, 3))
    train(model, optimizer, 8)
    with pytest.warns(UserWarning, match="Gradual ends at step 50, but training ended at 8"):
        sten.finalize(model)
    assert 0.25 < model[0].weight.density < 1
