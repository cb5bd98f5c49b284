"""What bad input gets: one exception, one sentence that says what was wrong and what would work; nothing changed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from masked import sparse_weights
from small import loss_of, mlp, train
from torch import nn
from torch.nn.utils import prune

import sten
from sten.layouts import CSR, NM, GroupedNM


def look(model: nn.Module) -> dict:
    """Everything of a model that a failed call might have changed."""
    modules = dict(model.named_modules())
    return {
        "types": {n: type(m) for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
        "hooks": {
            n: [len(v) for k, v in sorted(vars(m).items()) if "hooks" in k and v is not None]
            for n, m in modules.items()
        },
        "parameters": [(n, id(p), type(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
    }


@contextlib.contextmanager
def refused(model, match: str, error=ValueError):
    """One exception, one sentence, and the model as it was."""
    module = isinstance(model, nn.Module)
    before = (look(model), copy.deepcopy(model.state_dict())) if module else None
    with pytest.raises(error, match=match) as caught:
        yield
    assert type(caught.value) is error
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    if module:
        assert look(model) == before[0]
        after = model.state_dict()
        assert list(after) == list(before[1]) and all(torch.equal(before[1][k], after[k]) for k in after)


MODEL = {
    "sparsity above 1": ({"layout": CSR(), "sparsity": 1.5}, "from 0 to 1, .* got 1.5"),
    "negative sparsity": ({"layout": CSR(), "sparsity": -0.1}, "from 0 to 1, .* got -0.1"),
    "NaN": ({"layout": CSR(), "sparsity": float("nan")}, "from 0 to 1"),
    "regular expression": ({"layout": NM(2, 4), "weights": "re:("}, "Expected a regular expression after 're:'"),
    "no sparsity": ({"layout": CSR()}, r"Expected sparsity= for CSR\(\), got None"),
    "no sparsity for one of two layouts": ({"layout": {"0.*": NM(2, 4), "2.*": CSR()}}, "pass the fraction to drop"),
    "sparsity against n:m": ({"layout": NM(2, 4), "sparsity": 0.9}, "fixes it at 0.5, got 0.9: leave it out"),
    "sparsity with None": ({"layout": CSR(), "sparsifier": None, "sparsity": 0.5}, "leave sparsity= out"),
    "a pattern without a match": (
        {"layout": NM(2, 4), "weights": "head.*"},
        r"'head\.\*' to match a weight.*there are 0\.weight, 2\.weight",
    ),
    "one of two without a match": (
        {"layout": NM(2, 4), "weights": ["0.weight", "9.weight"]},
        r"'9\.weight' to match a weight",
    ),
    "a bias": ({"layout": NM(2, 4), "weights": "0.bias"}, "to match a weight of two or more dimensions, got none"),
    "a layout pattern without a match": ({"layout": {"nothing": NM(2, 4)}}, "'nothing' to match a weight"),
    "all layouts None": ({"layout": {"*": None}}, "left to make sparse.*is None"),
    "nothing chosen": ({"layout": NM(2, 4), "weights": lambda *_: False}, "left to make sparse"),
    "calibration not read": (
        {"layout": NM(2, 4), "calibration": [1]},
        r"Magnitude\(\) reads no activations: leave calibration= out",
    ),
}
TYPES = {
    "not a layout": ({"layout": "2:4"}, r"a layout such as sten\.NM\(2, 4\), or .* for layout=, got '2:4'"),
    "a layout class": ({"layout": CSR}, r"got the class CSR; write sten\.CSR\(\)"),
    "a layout dict of classes": ({"layout": {"*": CSR}}, r"got the class CSR; write sten\.CSR\(\)"),
    "a sparsifier class": ({"sparsifier": sten.Magnitude}, r"such as sten\.Magnitude\(\) \(an instance\)"),
    "a string": ({"sparsifier": "magnitude"}, r"got 'magnitude'; write sten\.Magnitude\(\)"),
    "sparsity as text": ({"layout": CSR(), "sparsity": "90%"}, "a number from 0 to 1"),
    "sparsity as a bool": ({"layout": CSR(), "sparsity": True}, "a number from 0 to 1"),
    "numbers as weights": ({"layout": NM(2, 4), "weights": [0, 2]}, "Expected for weights= a name or glob"),
    "not an optimizer": (
        {"layout": NM(2, 4), "optimizer": "adam"},
        r"Expected for optimizer= a torch\.optim\.Optimizer",
    ),
    "no optimizer": ({"layout": NM(2, 4), "optimizer": []}, r"Expected for optimizer= a torch\.optim\.Optimizer"),
}


@pytest.mark.parametrize("call", [sten.sparsify, sten.plan], ids=["sparsify", "plan"])
@pytest.mark.parametrize("kwargs, match", MODEL.values(), ids=MODEL)
def test_values(call, kwargs, match):
    model = mlp()
    with refused(model, match):
        call(model, **kwargs)


@pytest.mark.parametrize("call", [sten.sparsify, sten.plan], ids=["sparsify", "plan"])
@pytest.mark.parametrize("kwargs, match", TYPES.values(), ids=TYPES)
def test_types(call, kwargs, match):
    model = mlp()
    with refused(model, match, TypeError):
        call(model, **kwargs)


def test_layouts_that_cannot_be():
    for make, match in (
        (lambda: NM(5, 4), "n from 1 to 4 for NM, got 5"),
        (lambda: NM(0, 4), "n from 1 to 4 for NM, got 0"),
        (lambda: GroupedNM(9, 8, 1), "n from 1 to"),
        (lambda: sten.VectorNM(5, 4, 8), "n from 1 to"),
        (lambda: sten.BSR((0, 4)), "BSR"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(TypeError, match="whole number"):
        NM(2.0, 4)


TRUE = {
    "SparseGPT": lambda: sten.SparseGPT(block=True), "DSnoT": lambda: sten.DSnoT(True), "ADMM": lambda: sten.ADMM(True),
    "SparseSwaps": lambda: sten.SparseSwaps(sweeps=True), "Reconstruct": lambda: sten.Reconstruct(steps=True),
    "RigL": lambda: sten.RigL(100, every=True), "DecayingMask": lambda: sten.DecayingMask(True),
    "NM": lambda: NM(True, 4), "VectorNM": lambda: sten.VectorNM(2, 4, True), "BSR": lambda: sten.BSR((4, True)),
    "Uniform": lambda: sten.Uniform(True), "Global": lambda: sten.Global(0.5, floor=False),
    "PerWeight": lambda: sten.PerWeight({"0.weight": True}), "SRSTE": lambda: sten.SRSTE(decay=True),
    "ERK": lambda: sten.ERK(True), "Random": lambda: sten.Random(seed=True), "Gradual": lambda: sten.Gradual(0, True),
}  # fmt: skip


@pytest.mark.parametrize("make", TRUE.values(), ids=TRUE)
def test_true_is_no_number(make):
    with pytest.raises(TypeError, match=r"Expected .*number.*, got .*(True|False)"):
        make()


def test_wrong_arguments_with_true_among_them_get_their_own_sentence():
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'blok'"):
        sten.SparseGPT(blok=True)


def test_layouts_that_are_something_else():
    for layout, words in (({"0": {"*": NM(2, 4)}}, "full names or a glob"), (mlp(), "got a model, Sequential")):
        model = mlp()
        with refused(model, words, TypeError):
            sten.sparsify(model, layout)


class Strict(sten.Layout):
    """Refuses what does not divide, as a layout may."""

    def check(self, shape):
        super().check(shape)
        if shape[0] % 16:
            raise ValueError(f"Strict() stores weights whose rows are a multiple of 16; got shape {tuple(shape)}.")

    def mask(self, score, sparsity=None):
        return torch.ones_like(score, dtype=torch.bool)

    def pack(self, dense, mask):
        return {"values": dense * mask}

    def unpack(self, parts, shape):
        return parts["values"]

    def validate(self, parts, shape):
        self.check(shape)


def test_a_layout_that_cannot_hold_the_shape():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12))
    with refused(model, r"1\.weight: Strict\(\) stores weights whose rows are a multiple of 16"):
        sten.sparsify(model, layout=Strict())


def test_an_integer_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with refused(model, r"1\.weight holds torch\.int8: only floating-point weights can be sparse", TypeError):
        sten.sparsify(model, layout=sten.NM(2, 4))
    with pytest.raises(TypeError, match="floating-point"):
        sten.from_dense(torch.ones(4, 4, dtype=torch.int64), CSR())


def test_a_model_without_numbers():
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="meta device"):
        sten.sparsify(model, layout=sten.NM(2, 4))


def test_models_without_weights():
    for model in (nn.ReLU(), nn.Sequential(), nn.LayerNorm(4)):
        with refused(model, "no parameter of two or more dimensions"):
            sten.sparsify(model, layout=sten.NM(2, 4))
    with refused(nn.Embedding(4, 4), "Embedding has no linear weight"):
        sten.sparsify(nn.Embedding(4, 4), layout=sten.NM(2, 4))
    for call in (sten.sparsify, sten.plan, sten.trainable, sten.finalize, sten.densify):
        with pytest.raises(TypeError, match=r"Expected an nn\.Module, got dict; pass the model itself"):
            call({"weight": torch.ones(4, 4)})


def test_ties():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    with refused(model, r"1\.weight is tied to 0\.weight, which is not chosen: name both, or untie them"):
        sten.sparsify(model, layout=sten.NM(2, 4), weights=["1.weight"])
    with refused(model, "one tied weight: give both the same layout"):
        sten.sparsify(model, weights="*", layout={"0.weight": NM(2, 4), "*": NM(1, 4)})


def test_another_parametrization():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    sten.plan(model, layout=sten.NM(2, 4))
    with refused(model, "parametrized by _WeightNorm: remove that first"):
        sten.sparsify(model, layout=sten.NM(2, 4), weights=["0.weight"])


def test_pruning_that_does_not_fit():
    model = nn.Linear(8, 4)
    prune.custom_from_mask(model, "weight", torch.ones(4, 8))
    with refused(model, r"weight: Expected non-zeros that fit NM\(n=2, m=4\), got others; pass a sparsifier"):
        sten.sparsify(model, layout=NM(2, 4), sparsifier=None)


# optimizers


def test_optimizers():
    model = mlp()
    for other in (torch.optim.SGD(mlp().parameters(), 0.1), torch.optim.SGD(model[2].parameters(), 0.1)):
        with refused(model, r"0\.weight is not in the optimizer"):
            sten.sparsify(model, layout=sten.NM(2, 4), optimizer=other)
    with refused(model, "got LBFGS, which computes with whole matrices", TypeError):
        sten.sparsify(model, layout=sten.NM(2, 4), optimizer=torch.optim.LBFGS(model.parameters()))
    sten.sparsify(model, layout=sten.NM(2, 4))
    with refused(model, "is not in the optimizer"):
        sten.attach(model, torch.optim.SGD(mlp().parameters(), 0.1))
    with refused(mlp(), "no sparse weights"):
        sten.attach(mlp(), torch.optim.SGD(model.parameters(), 0.1))
    with refused(model, "Expected an optimizer for sten.attach, got None", TypeError):
        sten.attach(model, None)


def test_slots_without_a_sparse_form():
    """An optimizer that keeps its own statistics of rows and columns."""

    class Rows(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["rows"] = p.detach().flatten(1).sum(1) if p.dim() > 1 else p.detach().clone()

    model = mlp()
    opt = Rows(model.parameters(), 0.1)
    train(model, opt, range(1))
    with refused(model, r"one number for each entry of 0\.weight, got 'rows' of Rows, .* of shape \(20,\)"):
        sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)


def test_a_late_failure_changes_nothing():
    """The second weight fails when the first is done: nothing is written before all is made."""
    model = mlp()
    opt = torch.optim.AdamW(model.parameters())
    train(model, opt, range(1))
    slots = [s.clone() for own in opt.state.values() for s in own.values()]
    with refused(model, "pass the fraction to drop"):
        sten.sparsify(model, layout={"0.weight": NM(2, 4), "2.weight": CSR()}, optimizer=opt)
    assert all(
        torch.equal(a, b) for a, b in zip(slots, (s for own in opt.state.values() for s in own.values()), strict=True)
    )
    model = sten.sparsify(mlp(), layout={"0.weight": NM(2, 4), "2.weight": CSR()}, sparsity=0.2)
    with refused(model, r"[02]\.weight: Expected a mask with at most 1 of 2 inputs for NM\(n=1, m=2\)"):
        sten.finalize(model, layout=NM(1, 2))
    with refused(model, r"takes a layout such as sten\.CSR\(\)", TypeError):
        sten.finalize(model, layout=CSR)


# wrapped models, for real


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    """A process group of one."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sparsify(model):
    return sten.sparsify(model, NM(2, 4))


def plan(model):
    return sten.plan(model, NM(2, 4))


CALLS = (sparsify, plan, sten.trainable, sten.finalize, sten.densify)


def test_ddp_is_refused(gloo):
    model = nn.parallel.DistributedDataParallel(mlp())
    for call in CALLS:
        for wrapped in (model, nn.Sequential(model)):
            with refused(wrapped, "in DistributedDataParallel already: call sten on the inner model", TypeError):
                call(wrapped)
    assert isinstance(sten.sparsify(model.module, layout=sten.NM(2, 4))[0].weight, sten.SparseTensor)


def test_fsdp_is_refused(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for call in CALLS:
        with pytest.raises(TypeError, match="wrapped in fully_shard already"):
            call(model)


def test_data_parallel_is_refused():
    with pytest.raises(TypeError, match="wrapped in DataParallel already"):
        sten.sparsify(nn.DataParallel(mlp()), layout=sten.NM(2, 4))


def test_wrap_after_works(gloo):
    """The order that the message names."""
    model = mlp()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout=sten.NM(2, 4), optimizer=opt)
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss_of(wrapped, 0).backward()
    opt.step()
    assert sorted(sparse_weights(sten.finalize(wrapped.module))) == ["0.weight", "2.weight"]


# state_dicts


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_corrupted_state_dicts(form):
    """An index out of range, missing parts, another shape: load_state_dict says which weight; the weight stays."""

    def build():
        model = sten.sparsify(mlp(), layout=CSR(), sparsity=0.5)
        return sten.trainable(model) if form == "trainable" else model

    source = sten.trainable(sten.sparsify(mlp(), layout=CSR(), sparsity=0.5)).state_dict()
    lies = {
        r"0\.weight: Expected numbers from 0 to 11 in part 'col'": {
            "0.weight_pattern.col": source["0.weight_pattern.col"] + 12
        },
        r"0\.weight: .*crow": {"0.weight_pattern.crow": source["0.weight_pattern.crow"] + 1},
        r"Unexpected key.*0\.weight_pattern\.extra": {"0.weight_pattern.extra": torch.ones(1)},
        r"0\.weight: .*(equally long|same length|must have)": {"0.weight": torch.ones(3, 1)},
    }
    for match, lie in lies.items():
        model = build()
        want = sparse_weights(model)["0.weight"].to_dense().clone()
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict({**source, **lie})
        assert torch.equal(sparse_weights(model)["0.weight"].to_dense(), want)
    model = build()
    with pytest.raises(RuntimeError, match=r"0\.weight: the entry must be a tensor of shape \(20, 12\); got \(3, 3\)"):
        model.load_state_dict({**mlp().state_dict(), "0.weight": torch.ones(3, 3)})


def test_weights_that_diverged():
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="weight: Expected numbers, got NaN"):
        sten.sparsify(model, NM(2, 4))
    assert type(model.weight) is nn.Parameter
