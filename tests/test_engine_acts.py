"""Random sequences of what users do in training, against the masked dense model that torch trains.

The twin is an ordinary dense model. It takes only its masks from sten (what a method decides is tested elsewhere); its
numbers, gradients and optimizer state come from torch, masked by hand. After every act both must agree in the weights
that they compute with, in every slot of the optimizer, in their outputs, and in which weights are frozen.
"""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sten
from sten.layouts import BSR, CSR, NM, FanIn, Masked, VectorNM
from sten.training.engine import engines_of
from sten.training.weights import trained_weights

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

DECAY = 0.05
CASES = [
    (method, layout)
    for method, layouts in [
        (sten.SET(10**4, every=3), [Masked(), CSR(), BSR((4, 4)), FanIn(), VectorNM(1, 4, 4)]),
        (sten.RigL(10**4, 0.5, every=3), [CSR(), BSR((4, 4)), NM(2, 4), FanIn()]),
        (sten.DSTEE(10**4, 0.5, every=3), [CSR()]),
        (sten.SRigL(10**4, 0.5, every=3), [FanIn()]),
        (sten.SparseMomentum(10**4, every=3), [CSR(), Masked()]),
        (sten.Gradual(1, 24, every=3), [CSR(), BSR((4, 4)), FanIn()]),
        (sten.BlockPruneGrow(1, 40, every=3, drop_fraction=0.5), [BSR((4, 4))]),
        (sten.SRSTE(DECAY), [NM(2, 4), BSR((4, 4)), CSR()]),
        (sten.STE(), [VectorNM(1, 4, 4)]),
        (sten.Static(), [NM(2, 4), sten.GroupedNM(2, 4, 1)]),
    ]
    for layout in layouts
]
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}

layer = st.sampled_from([0, 2])
train = st.tuples(st.just("train"), st.integers(1, 5))
acts = st.one_of(
    st.tuples(st.just("microbatches"), st.integers(1, 3)),
    st.tuples(st.just("assign"), layer),
    st.tuples(st.just("assign off the pattern"), layer),
    st.tuples(st.just("freeze"), layer),
    st.tuples(st.just("unfreeze"), layer),
    st.tuples(st.just("cast"), st.sampled_from([torch.float32, torch.float64])),
    st.tuples(st.sampled_from(["copy", "save", "load", "resume"]), st.none()),
)
PHASES = [hypothesis.Phase.generate]  # the sequences are short, and shrinking takes minutes
PAIRS = st.lists(st.tuples(acts, train), min_size=2, max_size=6)  # every act is followed by steps


class StraightThrough(torch.autograd.Function):
    """w * mask, with a gradient for every entry: the straight-through estimator."""

    @staticmethod
    def forward(ctx, w, mask):
        return w * mask

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)).to(dtype)


class Run:
    """A sparse model and its twin, which every act changes alike."""

    def __init__(self, method, layout, optimizer):
        self.method, self.layout, self.make = method, layout, OPTIMIZERS[optimizer]
        self.sparsity = None if layout.rate is not None else 0.5
        self.dense_weight = isinstance(method, sten.extend.DenseWeightMethod)
        self.saved, self.steps, self.dtype = None, 0, torch.float64
        self.model, self.optimizer = self.sparse()
        self.twin = mlp()
        self.other = self.make(self.twin.parameters())
        self.masks = self.present_masks()
        if not self.dense_weight:
            self.take_masks(self.masks)

    def sparse(self):
        model = mlp()
        optimizer = self.make(model.parameters())
        sten.sparsify(model, self.layout, self.method, self.sparsity, optimizer=optimizer)
        return model, optimizer

    @property
    def engine(self):
        return next(iter(engines_of(self.model)), None)

    @property
    def layers(self):
        return [(self.model[i], self.twin[i]) for i in (0, 2)]

    def present_masks(self):
        """Of a dense weight with no mask of its own (STE): of the present numbers."""
        weights = trained_weights(self.model)
        if self.dense_weight and not self.method.zero_pruned:
            return [self.layout.mask(w.dense(w.param).abs(), w.sparsity) for w in weights]
        return [weight.active().clone() for weight in weights]

    @torch.no_grad()
    def take_masks(self, masks):
        """What a mask update means: entries that stay keep everything, new ones are zero, in every slot, too."""
        for (_, mine), old, new in zip(self.layers, self.masks, masks, strict=True):
            mine.weight.mul_(new)
            mine.weight[new & ~old] = 0
            for slot in self.other.state.get(mine.weight, {}).values():
                if slot.dim() and not self.dense_weight:
                    slot.mul_(new & old)
                elif slot.dim():
                    slot[new & ~old] = 0
        self.masks = masks

    def effective(self, mine, mask):
        if self.dense_weight and not self.method.zero_pruned:
            return StraightThrough.apply(mine.weight, self.layout.mask(mine.weight.detach().abs(), self.sparsity))
        if isinstance(self.method, sten.BlockPruneGrow):
            return StraightThrough.apply(mine.weight, mask)
        return mine.weight * mask

    def output(self, x):
        (_, first), (_, second) = self.layers
        hidden = torch.tanh(F.linear(x, self.effective(first, self.masks[0]), first.bias))
        return F.linear(hidden, self.effective(second, self.masks[1]), second.bias)

    # acts

    def train(self, steps, microbatches=1):
        for _ in range(steps):
            random = torch.Generator().manual_seed(self.steps)
            x = torch.randn(16, 16, generator=random, dtype=torch.float64).to(self.dtype)
            y = x[:, :8].argmax(1)
            self.steps += 1
            updates = self.engine.updates if self.engine else 0
            self.optimizer.zero_grad()
            self.other.zero_grad()
            for xs, ys in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
                (F.cross_entropy(self.model(xs), ys) / microbatches).backward()
                (F.cross_entropy(self.output(xs), ys) / microbatches).backward()
            self.expect_gradients()
            if isinstance(self.method, sten.SRSTE):
                for _, mine in self.layers:
                    if mine.weight.grad is not None:
                        w = mine.weight.detach()
                        mine.weight.grad += DECAY * w * ~self.layout.mask(w.abs(), self.sparsity)
            self.optimizer.step()
            moved = self.engine is not None and self.engine.updates > updates
            if not (moved and self.method.replaces_step):
                self.other.step()
            new = self.present_masks()
            if self.dense_weight and not self.method.zero_pruned:
                self.masks = new
                continue
            for (mine, _), old, mask in zip(self.layers, self.masks, new, strict=True):
                if not moved or not mine._parameters["weight"].requires_grad:
                    assert torch.equal(old, mask), "a mask moved without a mask update, or of a frozen weight"
            self.take_masks(new)

    def expect_gradients(self):
        for (layer, mine), weight in zip(self.layers, trained_weights(self.model), strict=True):
            grad = layer._parameters["weight"].grad
            assert (grad is None) == (mine.weight.grad is None)
            if grad is not None:
                self.close(weight.dense(grad), mine.weight.grad)
            self.close(layer.bias.grad, mine.bias.grad)

    def microbatches(self, steps):
        self.train(steps, microbatches=4)

    @torch.no_grad()
    def assign(self, i):
        layer, mine = self.model[i], self.twin[i]
        value = torch.randn(mine.weight.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        value = value.to(self.dtype)
        if not self.dense_weight:
            value = value * self.masks[i // 2]
        layer.weight = nn.Parameter(value)
        mine.weight.requires_grad_().copy_(value)  # a Parameter that trains, in the place of one that may be frozen

    @torch.no_grad()
    def assign_off_the_pattern(self, i):
        if self.dense_weight:
            return  # every number has a place
        layer, mask = self.model[i], self.masks[i // 2]
        before = layer.weight.to_dense().clone()
        with pytest.raises(ValueError, match="zero"):
            layer.weight = nn.Parameter(torch.ones_like(before))
        assert bool(mask.all()) or torch.equal(layer.weight.to_dense(), before)

    def freeze(self, i):
        self.model[i]._parameters["weight"].requires_grad_(False)
        self.twin[i].weight.requires_grad_(False)

    def unfreeze(self, i):
        self.model[i]._parameters["weight"].requires_grad_()
        self.twin[i].weight.requires_grad_()

    def cast(self, dtype):
        for model, optimizer in ((self.model, self.optimizer), (self.twin, self.other)):
            model.to(dtype)
            optimizer.load_state_dict(optimizer.state_dict())  # torch's way to cast the state, too
        self.dtype = dtype

    def copy(self, _):
        """A deep copy of the model under a new optimizer with the state of the old one."""
        model = copy.deepcopy(self.model)
        optimizer = self.make(model.parameters())
        optimizer.load_state_dict(self.optimizer.state_dict())
        sten.attach(model, optimizer)
        self.model, self.optimizer = model, optimizer

    def save(self, _):
        pair = (self.model, self.optimizer), (self.twin, self.other)
        states = [(m.state_dict(), o.state_dict()) for m, o in pair]
        self.saved = copy.deepcopy((states, self.masks, self.steps))

    def load(self, _):
        if self.saved is not None:
            states, self.masks, self.steps = copy.deepcopy(self.saved)
            for (model, optimizer), state in zip(
                ((self.model, self.optimizer), (self.twin, self.other)), states, strict=True
            ):
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])

    def resume(self, _):
        """A new process: everything is made in the same way, and what was saved is loaded."""
        if self.saved is not None:
            self.model, self.optimizer = self.sparse()
            self.twin, self.dtype = mlp(), torch.float64
            self.other = self.make(self.twin.parameters())
            self.load(None)

    def finalize(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a schedule that is not at its end
            sten.finalize(self.model)
        for (layer, mine), mask in zip(self.layers, self.masks, strict=True):
            assert isinstance(layer.weight, sten.SparseTensor) and layer.weight.sparse_layout == self.layout
            self.close(layer.weight.to_dense(), self.effective(mine, mask))
            assert bool((layer.weight.mask() >= (self.effective(mine, mask) != 0)).all())
            for key, slot in self.other.state.get(mine.weight, {}).items():
                if slot.dim():
                    have = self.optimizer.state[layer.weight][key]
                    self.close(have.to_dense(), slot * layer.weight.mask())

    # the comparison

    def close(self, have: Tensor, want: Tensor):
        rough = self.rough or self.dtype == torch.float32
        self.rough = rough
        torch.testing.assert_close(have, want, rtol=2e-3 if rough else 1e-9, atol=2e-4 if rough else 1e-9)

    rough = False

    def check(self):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(self.dtype)
        self.close(self.model(x), self.output(x))
        for (layer, mine), weight, mask in zip(self.layers, trained_weights(self.model), self.masks, strict=True):
            param = layer._parameters["weight"]
            assert param.requires_grad == mine.weight.requires_grad and param.dtype == self.dtype
            self.close(layer.weight.to_dense(), self.effective(mine, mask))
            self.close(weight.dense(param), mine.weight)
            slots, others = self.optimizer.state.get(param, {}), self.other.state.get(mine.weight, {})
            assert slots.keys() == others.keys()
            for key, slot in slots.items():
                self.close(weight.dense(slot) if slot.dim() else slot, others[key])
        if self.engine is not None and not self.method.stateless:
            assert self.engine.step == self.steps


@pytest.mark.filterwarnings("ignore:sten. the masks leave rows")
@pytest.mark.parametrize(("method", "layout"), CASES, ids=[f"{type(m).__name__}-{x}" for m, x in CASES])
def test_acts(method, layout):
    @hypothesis.settings(max_examples=8, derandomize=True, deadline=None, database=None, phases=PHASES)
    @hypothesis.given(st.sampled_from(list(OPTIMIZERS)), PAIRS)
    def play(optimizer, pairs):
        run = Run(method, layout, optimizer)
        run.check()
        for name, argument in (act for pair in pairs for act in pair):
            getattr(run, name.replace(" ", "_"))(argument)
            run.check()
        run.finalize()

    play()
