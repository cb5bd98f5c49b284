"""Optimizers that wrap others, that compute with matrices, or that store their state in another form."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from training_models import dense_weights, engine_of, loss_of, masks, mlp, train

import sten
from sten.layouts import CSR, NM, FanIn, Masked

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:sten. the masks leave rows")]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization, as its reference implementation is written: two passes, one step of the base."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * 0.05 / (norm + 1e-12))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Every k steps the slow weights, kept in `state`, go a part of the way to the fast ones, and are taken over."""

    def __init__(self, optimizer, k=3, alpha=0.5):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.param_groups = optimizer.param_groups
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        self.count += 1
        for group in self.param_groups if self.count % self.k == 0 else ():
            for p in group["params"]:
                slow = self.state[p]["slow"]
                slow.add_(p - slow, alpha=self.alpha)
                p.copy_(slow)


class HidesTensors(Lookahead):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.state.clear()
        self.slow_weights = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9)


def sam(params):
    return SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)


def sam_step(model, optimizer, step):
    def closure():
        loss_of(model, step).backward()

    optimizer.zero_grad()
    closure()
    optimizer.step(closure)


def masked_twin_of(model):
    """The dense model with the same numbers, whose weights, gradients and slots are masked by hand."""
    twin = mlp()
    for mine, layer in zip((twin[0], twin[2]), (model[0], model[2]), strict=True):
        mask = layer.weight.mask()
        with torch.no_grad():
            mine.weight.copy_(layer.weight.to_dense())
            mine.bias.copy_(layer.bias)
        mine.weight.register_hook(lambda grad, mask=mask: grad * mask)
    return twin


@pytest.mark.parametrize("layout", [CSR(), Masked(), NM(2, 4), FanIn()], ids=str)
def test_sam_on_a_fixed_pattern_is_sam_on_the_masked_dense_model(layout):
    model = mlp()
    optimizer = sam(model.parameters())
    sten.sparsify(model, layout, sten.Static(), 0.75 if layout.rate is None else None, optimizer=optimizer)
    twin = masked_twin_of(model)
    other = sam(twin.parameters())
    for step in range(6):
        sam_step(model, optimizer, step)
        sam_step(twin, other, step)
    for have, want in zip(dense_weights(model), (twin[0].weight, twin[2].weight), strict=True):
        torch.testing.assert_close(have, want.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", [sten.RigL(40, every=4), sten.SET(40, every=4), sten.SRigL(40, every=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("make", [sam, lambda p: Lookahead(sgd(p))], ids=["SAM", "Lookahead"])
def test_mask_updates_move_the_state_of_a_wrapper(method, make):
    layout = FanIn() if isinstance(method, sten.SRigL) else CSR()
    model = mlp()
    optimizer = make(model.parameters())
    sten.sparsify(model, layout, method, 0.75, optimizer=optimizer)
    engine, first = engine_of(model), masks(model)
    for step in range(14):
        before = [weight.active() for weight in engine.weights]
        slow = [weight.dense(optimizer.state[weight.param].get("slow", weight.param)) for weight in engine.weights]
        if isinstance(optimizer, SAM):
            sam_step(model, optimizer, step)
        else:
            train(model, optimizer, 1, first=step)
        for weight, mask, old in zip(engine.weights, before, slow, strict=True):
            for slot in optimizer.state[weight.param].values():
                assert slot.shape == weight.param.shape
            if isinstance(optimizer, Lookahead) and optimizer.count % 3:
                now, new = weight.dense(optimizer.state[weight.param]["slow"]), weight.active()
                assert torch.equal(now[mask & new], old[mask & new]) and not now[new & ~mask].any()
    assert engine.step == 14 and engine.updates >= 3
    assert not all(map(torch.equal, first, masks(model)))
    sten.finalize(model)
    slots = [s for state in optimizer.state.values() for s in state.values() if s.dim() > 1]
    assert slots and all(isinstance(slot, sten.SparseTensor) for slot in slots)


def test_lookahead_on_a_dense_weight_method():
    model = mlp()
    optimizer = Lookahead(sgd(model.parameters()))
    sten.sparsify(model, CSR(), sten.Gradual(2, 8, 2), 0.75, optimizer=optimizer)
    train(model, optimizer, 10)
    sten.finalize(model)
    assert [w.weight.density for w in (model[0], model[2])] == [0.25, 0.25]


def test_a_wrapper_that_hides_tensors_is_refused_and_changes_nothing():
    model = mlp()
    optimizer = HidesTensors(sgd(model.parameters()))
    with pytest.raises(TypeError, match=r"keeps its tensors in `state`.* HidesTensors with tensors in 'slow_weights'"):
        sten.sparsify(model, CSR(), sten.SET(24, every=4), 0.75, optimizer=optimizer)
    assert type(model[0]) is nn.Linear and not optimizer.optimizer._optimizer_step_pre_hooks


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    runs = []
    for wrap in (False, True):
        model = mlp()
        optimizer = sgd(model.parameters())
        given = accelerator.prepare(optimizer) if wrap else optimizer
        assert wrap == (given is not optimizer)
        sten.sparsify(model, CSR(), sten.RigL(40, every=4), 0.75, optimizer=given)
        train(model, given, 10)
        assert engine_of(model).updates == 2
        runs.append(dense_weights(model))
        sten.finalize(model)
        assert isinstance(optimizer.state[model[0].weight]["momentum_buffer"], sten.SparseTensor)
    assert all(map(torch.equal, *runs))


# optimizers that compute with whole matrices

MATRIX = [torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS]


class Adafactor(torch.optim.SGD):
    """As another package's would be called."""


def matrices_of(kind, model):
    return kind([p for p in model.parameters() if p.dim() == 2], lr=1e-3)


@pytest.mark.parametrize("kind", [*MATRIX, Adafactor], ids=lambda k: f"{k.__module__}.{k.__name__}")
@pytest.mark.parametrize("how", ["sparsify", "attach", "attach finalized", "trainable", "static", "STE", "wrapped"])
def test_optimizers_by_matrix_are_refused_wherever_they_come_from(kind, how):
    model = mlp()

    def act():
        if how in ("sparsify", "wrapped"):
            optimizer = matrices_of(kind, model)
            optimizer = Lookahead(optimizer) if how == "wrapped" else optimizer
            sten.sparsify(model, CSR(), sparsity=0.75, optimizer=optimizer)
        elif how == "attach":
            sten.sparsify(model, CSR(), sten.SET(24, every=4), 0.75)
            sten.attach(model, matrices_of(kind, model))
        elif how == "attach finalized":
            sten.sparsify(model, CSR(), sparsity=0.75)
            sten.attach(model, matrices_of(kind, model))
        else:
            if how == "trainable":
                sten.trainable(sten.sparsify(model, CSR(), sparsity=0.75))
            elif how == "static":
                sten.sparsify(model, CSR(), sten.Static(), 0.75, optimizer=sgd(model.parameters()))
            else:
                sten.sparsify(model, NM(2, 4), sten.STE())
            optimizer = matrices_of(kind, model)
            loss_of(model, 0).backward()
            before.extend(copy.deepcopy(p.detach()) for p in model.parameters())
            optimizer.step(lambda: loss_of(model, 0))

    before: list[Tensor] = []
    with pytest.raises(TypeError, match=f"Expected another optimizer .* got .*{kind.__name__}.*matrices; use"):
        act()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_matrix_optimizer_of_other_layers_is_welcome():
    """Muon for the hidden layers that stay dense, AdamW for the rest, as its users do it."""
    model = mlp()
    muon, adamw = torch.optim.Muon([model[0].weight]), torch.optim.AdamW([model[0].bias, *model[2].parameters()])
    sten.sparsify(model, CSR(), sten.RigL(24, every=4), 0.75, weights="2.weight", optimizer=[muon, adamw])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            for optimizer in (muon, adamw):
                optimizer.zero_grad()
            loss_of(model, step).backward()
            for optimizer in (muon, adamw):
                optimizer.step()
    assert engine_of(model).updates == 1


# state in another form


class Int8(Tensor):
    """A quantized tensor as torchao writes them: a subclass with codes and scales, which dequantizes itself."""

    @staticmethod
    def __new__(cls, codes, scale):
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def of(cls, t):
        scale = t.abs().amax().clamp(min=1e-12) / 127
        return cls((t / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            new = Int8.of(args[1].dequantize() if isinstance(args[1], Int8) else args[1])
            args[0].codes.copy_(new.codes)
            args[0].scale.copy_(new.scale)
            return args[0]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Int8(args[0].codes.clone(), args[0].scale.clone())
        plain = tree_map(lambda t: t.dequantize() if isinstance(t, Int8) else t, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class SGD8(torch.optim.Optimizer):
    """Momentum in 8 bits: as a subclass, or (`blocks`) as bitsandbytes keeps it, codes beside the scales of blocks."""

    def __init__(self, params, lr=0.1, blocks=False):
        super().__init__(params, {"lr": lr})
        self.blocks = blocks

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, self.state[p], group["lr"])

    def update(self, p, state, lr):
        if self.blocks and p.dim() > 1:
            old = state["state1"].float() * state["absmax1"].repeat(p.numel())[: p.numel()].view_as(p) if state else 0
            momentum = p.grad + 0.9 * old
            scale = momentum.abs().amax().clamp(min=1e-12) / 127
            state["state1"], state["absmax1"] = (momentum / scale).round().to(torch.int8), scale.view(1)
        else:
            momentum = p.grad + 0.9 * (state["exp_avg"].dequantize() if state else 0)
            if "exp_avg" in state:
                state["exp_avg"].copy_(momentum)
            else:
                state["exp_avg"] = Int8.of(momentum)
        p.sub_(momentum, alpha=lr)


@pytest.mark.parametrize(
    "method", [sten.RigL(40, every=3), sten.SRigL(40, every=3), sten.Gradual(1, 9, 2)], ids=lambda m: type(m).__name__
)
def test_quantized_state_that_dequantizes_itself_follows_mask_updates(method):
    model = mlp()
    optimizer = SGD8(model.parameters())
    layout = FanIn() if isinstance(method, sten.SRigL) else CSR()
    sten.sparsify(model, layout, method, 0.75, optimizer=optimizer)
    engine = engine_of(model)
    for step in range(10):
        before = [(w.active(), w.dense(s["exp_avg"].dequantize()) if s else None) for w, s in states(engine, optimizer)]
        updates = engine.updates
        train(model, optimizer, 1, first=step)
        for (weight, state), (mask, old) in zip(states(engine, optimizer), before, strict=True):
            now, both = weight.dense(state["exp_avg"].dequantize()), weight.active() & mask
            if engine.updates > updates and method.replaces_step:
                torch.testing.assert_close(now[both], old[both], rtol=0, atol=float(old.abs().max()) / 60)
                assert not now[weight.active() & ~mask].any()
    assert engine.updates >= 3
    sten.finalize(model)
    assert isinstance(optimizer.state[model[0].weight]["exp_avg"], sten.SparseTensor)


def states(engine, optimizer):
    return [(weight, optimizer.state.get(weight.param, {})) for weight in engine.weights]


@pytest.mark.parametrize("method", [sten.SET(24, every=4), sten.Gradual(2, 8, 2)], ids=lambda m: type(m).__name__)
def test_codes_beside_their_scales_are_refused_at_the_first_step(method):
    model = mlp()
    optimizer = SGD8(model.parameters(), blocks=True)
    sten.sparsify(model, CSR(), method, 0.75, optimizer=optimizer)
    match = r"one number for each entry of 0\.weight, got 'state1' of SGD8, torch\.int8 .* use torch\.optim\.SGD, AdamW"
    with pytest.raises(ValueError, match=match):
        train(model, optimizer, 1)
    assert engine_of(model).updates == 0


def test_codes_are_fine_where_nothing_moves_them_and_refused_where_the_form_changes():
    model = mlp()
    optimizer = SGD8(model.parameters(), blocks=True)
    sten.sparsify(model, CSR(), sten.Static(), 0.75, optimizer=optimizer)
    twin = masked_twin_of(model)
    other = SGD8(twin.parameters(), blocks=True)
    train(model, optimizer, 4)
    train(twin, other, 4)
    for have, want in zip(dense_weights(model), (twin[0].weight, twin[2].weight), strict=True):
        torch.testing.assert_close(have, want.detach(), rtol=1e-4, atol=1e-5)
    before = dense_weights(model)
    with pytest.raises(ValueError, match=r"0\.weight, got 'state1' of SGD8.*or clear optimizer\.state first"):
        sten.finalize(model)
    assert all(map(torch.equal, before, dense_weights(model))) and hasattr(model[0], "weight_pattern")
    optimizer.state.clear()
    sten.finalize(model)
    assert all(map(torch.equal, before, dense_weights(model))) and isinstance(model[0].weight, sten.SparseTensor)


# files of a run


def test_a_run_of_several_optimizers(tmp_path):
    runs = []
    for stop in (None, 5):
        model, optimizers = pair()
        steps = 10 if stop is None else stop
        together(model, optimizers, range(steps))
        if stop is not None:
            sten.save_run(model, tmp_path / "run.pt", optimizers, epoch=1)
            model, optimizers = pair()
            assert sten.load_run(model, tmp_path / "run.pt", optimizers) == {"epoch": 1}
            together(model, optimizers, range(stop, 10))
        runs.append(dense_weights(model))
    assert all(map(torch.equal, *runs))


def test_another_number_of_optimizers_is_refused_before_anything_is_loaded(tmp_path):
    model, optimizers = pair()
    sten.save_run(model, tmp_path / "run.pt", optimizers)
    together(model, optimizers, range(3))
    before = dense_weights(model)
    for given, text in ((optimizers[0], "got one"), (optimizers[:1], "got a list of 1")):
        with pytest.raises(ValueError, match=f"Expected optimizer= as it was saved, a list of 2, {text}"):
            sten.load_run(model, tmp_path / "run.pt", given)
    assert all(map(torch.equal, before, dense_weights(model)))


def pair():
    model = mlp()
    optimizers = [torch.optim.AdamW(model[0].parameters(), 1e-2), torch.optim.SGD(model[2].parameters(), 0.1, 0.9)]
    sten.sparsify(model, CSR(), sten.RigL(40, every=3), 0.75, optimizer=optimizers)
    return model, optimizers


def together(model, optimizers, steps):
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
