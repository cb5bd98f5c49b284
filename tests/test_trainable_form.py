"""The trainable form: the trained tensor under the dense weight's name and place, and what users do to it there."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from masked import state
from small import batch, every_layout, loss_of, mlp, rate, train
from torch import nn

import sten
from sten.layouts import BSR, CSR, NM, GroupedNM, Masked

FILES = Path(__file__).parent / "files"


def trainable(layout=None, **kwargs):
    layout = layout or CSR()
    return sten.trainable(sten.sparsify(mlp(), layout=layout, sparsity=rate(layout), **kwargs))


# names, places and shapes


@every_layout
def test_names_and_order_are_those_of_the_dense_model(layout):
    model, dense = trainable(layout), mlp()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in dense.named_parameters()]
    keys = list(model.state_dict())
    assert [k for k in keys if "_pattern." not in k] == list(dense.state_dict())
    assert {k for k in keys if k.startswith("0.weight_pattern.")} == {
        f"0.weight_pattern.{part}" for part in layout.pattern
    }
    assert all(p.dim() == q.dim() for p, q in zip(model.parameters(), dense.parameters(), strict=True))
    assert model[0].weight.shape == dense[0].weight.shape and isinstance(model[0].weight, sten.SparseTensor)


@every_layout
@pytest.mark.parametrize("way", ["sparsify", "attach", "finalize", "densify"])
def test_the_state_of_an_optimizer_finds_its_parameters(layout, way):
    """An optimizer that is made from the model after the change loads the state that was saved before it."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if way == "attach":
        sten.attach(sten.sparsify(model, layout, sparsity=rate(layout)), optimizer)
    else:
        sten.sparsify(model, layout, sparsity=rate(layout), optimizer=optimizer)
    train(model, optimizer, range(3))
    if way in ("finalize", "densify"):
        getattr(sten, way)(model)
    other = torch.optim.AdamW(model.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = copy.deepcopy(model)
    second = torch.optim.AdamW(twin.parameters(), 1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [p.shape for p in model.parameters()] == [other.state[p]["exp_avg"].shape for p in model.parameters()]
    train(model, optimizer, range(3, 6), clip=None)
    train(twin, second, range(3, 6), clip=None)
    assert all(torch.equal(a, state(twin)[name]) for name, a in state(model).items())


def test_convolutions_are_matrices_too():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU())
    for layout in (CSR(), BSR((4, 4)), NM(2, 4), Masked()):
        one = sten.trainable(sten.sparsify(copy.deepcopy(model), layout, sparsity=rate(layout), weights="*"))
        assert one[0]._parameters["weight"].dim() == 2
        x = torch.randn(2, 4, 6, 6)
        want = one(x)
        one = one.to(memory_format=torch.channels_last)  # refuses parameters of three dimensions
        torch.testing.assert_close(one(x), want)


def test_a_dense_model_refuses_the_file():
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        mlp().load_state_dict(trainable().state_dict(), strict=False)


@every_layout
def test_meta_and_to_empty(layout):
    model = trainable(layout)
    hollow = copy.deepcopy(model).to("meta")
    for assign in (False, True):
        full = copy.deepcopy(hollow) if assign else copy.deepcopy(hollow).to_empty(device="cpu")
        full.load_state_dict(model.state_dict(), assign=assign)
        torch.testing.assert_close(full(batch(0)), model(batch(0)))
        loss_of(full, 0).backward()


# what a user's assignment means


@every_layout
@pytest.mark.parametrize("how", ["attribute", "register_parameter", "sparse"])
def test_assignment_copies(layout, how):
    model = trainable(layout)
    param, mask = model[0]._parameters["weight"], model[0].weight.mask()
    new = torch.randn(20, 12) * mask
    if how == "attribute":
        model[0].weight = nn.Parameter(new)
    elif how == "register_parameter":
        model[0].register_parameter("weight", nn.Parameter(new))
    else:
        model[0].weight = sten.from_dense(new, layout, mask)
    assert model[0]._parameters["weight"] is param
    assert torch.equal(model[0].weight.to_dense(), new)


def test_an_assignment_off_the_pattern_is_refused_and_changes_nothing():
    model = trainable()
    before = model[0].weight.to_dense().detach()
    with pytest.raises(ValueError, match="non-zeros off the pattern"):
        model[0].weight = nn.Parameter(torch.ones(20, 12))
    with pytest.raises(TypeError, match="Expected a tensor for weight, got None"):
        model[0].weight = None
    with pytest.raises(ValueError, match=r"Expected a tensor of shape \(20, 12\)"):
        model[0].weight = nn.Parameter(torch.ones(3, 5))
    assert torch.equal(model[0].weight.to_dense(), before)


def test_an_assignment_to_a_dense_weight_is_trained():
    model = mlp()
    sten.sparsify(model, NM(2, 4), sten.SRSTE(), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    param, new = model[0]._parameters["weight"], torch.randn(20, 12)
    model[0].weight = nn.Parameter(new)
    assert model[0]._parameters["weight"] is param and torch.equal(param, new)


def test_what_the_read_weight_says_of_the_trained_parameter():
    model = trainable()
    loss_of(model, 0).backward()
    w, param = model[0].weight, model[0]._parameters["weight"]
    assert isinstance(w.grad, sten.SparseTensor) and w.grad.same_pattern(w)
    assert torch.equal(w.grad.parts["values"].view(param.shape), param.grad)
    w.requires_grad_(False)
    assert not param.requires_grad and not model[0].weight.requires_grad
    model[0].weight.requires_grad_(True)
    assert param.requires_grad
    with pytest.raises(RuntimeError, match=r'_parameters\["weight"\]'):
        model[0].weight.register_hook(lambda grad: None)
    model[0].weight.data = model[0].weight.to_dense().detach() * 2
    assert torch.equal(model[0].weight.to_dense(), 2 * w.to_dense() / 2)


# the state of a run


METHODS = [
    (sten.SET(24, every=4), CSR()), (sten.RigL(24, every=4), BSR((4, 4))), (sten.DSTEE(24, every=4), CSR()),
    (sten.SparseMomentum(24, every=4), CSR()), (sten.Gradual(2, 12, 3), CSR()), (sten.SRSTE(), NM(2, 4)),
    (sten.BiMask(refresh=3), NM(2, 4)),
]  # fmt: skip
every_method = pytest.mark.parametrize("case", METHODS, ids=lambda c: type(c[0]).__name__)


def run(case, steps=0):
    method, layout = case
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
    train(model, optimizer, range(steps))
    return model, optimizer


@every_method
@pytest.mark.parametrize("order", ["attach first", "load first"])
def test_two_state_dicts_resume_a_run(case, order):
    """As a trainer does it: model.state_dict() and optimizer.state_dict(), through a file."""
    straight, _ = run(case, 12)
    model, first = run(case, 6)
    file = io.BytesIO()
    torch.save([model.state_dict(), first.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    if order == "attach first":
        again, second = run(case)
        again.load_state_dict(saved[0])
    else:
        again = sten.sparsify(mlp(), case[1], case[0], None if case[1].rate else 0.5)
        again.load_state_dict(saved[0])
        second = torch.optim.AdamW(again.parameters(), 1e-2)
        sten.attach(again, second)
    second.load_state_dict(saved[1])
    train(again, second, range(6, 12))
    for name, want in state(straight).items():
        assert torch.equal(state(again)[name], want), name


@every_method
def test_the_state_of_another_method_is_refused(case):
    model, _ = run(case, 6)
    other, _ = run((sten.SET(99, every=7), CSR()) if case[1].rate is None else (sten.SRSTE(0.5), NM(2, 4)))
    if type(other[0].weight_pattern) is not type(model[0].weight_pattern):
        return
    with pytest.raises(RuntimeError, match=r"Expected the state of .* got that of"):
        other.load_state_dict(model.state_dict(), strict=False)


@every_method
def test_a_state_without_the_run_starts_afresh_and_says_so(case):
    model, _ = run(case, 6)
    state = {k: v for k, v in model.state_dict().items() if "run_" not in k and "method_" not in k}
    other, _ = run(case)
    with pytest.warns(UserWarning, match=f"no state of {type(case[0]).__name__}, so its schedule starts afresh"):
        other.load_state_dict({k: v for k, v in state.items() if not k.endswith("_pattern.mask")})


@pytest.mark.parametrize("name", ["momentum", "gradual", "dstee", "cast"])
def test_runs_of_earlier_files_go_on(name):
    """Files of the form before: `weight.values`, and the state of the run beside the model's."""
    method, layout = {
        "momentum": (sten.SparseMomentum(24, every=4), CSR()),
        "gradual": (sten.Gradual(2, 12, 3), CSR()),
        "dstee": (sten.DSTEE(24, every=4), BSR((4, 4))),
        "cast": (sten.CAST(24, refresh=3), NM(2, 4)),
    }[name]
    model = mlp()
    kind = sten.optim.AdamS if name == "cast" else torch.optim.AdamW
    optimizer = kind(model.parameters(), 1e-2)
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
    assert sten.load_run(model, FILES / f"run-0-{name}.pt", optimizer) == {"epoch": 1}
    train(model, optimizer, range(7, 12), clip=None)
    end = torch.load(FILES / f"end-0-{name}.pt", weights_only=True)
    for key, want in state(sten.finalize(model)).items():
        torch.testing.assert_close(want, end[key])


def test_a_state_dict_of_the_form_before_loads():
    model = trainable(GroupedNM(1, 4, 4), sparsifier=sten.Random())
    model.load_state_dict(torch.load(FILES / "trainable-0.pt", weights_only=True))
    dense = torch.load(FILES / "trainable-0-dense.pt", weights_only=True)
    for key, want in dense.items():
        torch.testing.assert_close(state(model)[key], want)


def test_parts_of_16_bits_are_one_tensor_in_every_state():
    """DDP sees bytes; caches see one tensor, whatever was done to the module."""
    layer = sten.trainable(sten.sparsify(torch.nn.Linear(8, 12), sten.GroupedNM(2, 4, 1)))
    x = torch.randn(3, 8)
    want, index = layer(x), layer.weight.parts["index"]
    assert index.dtype == torch.int16 and layer.state_dict()["weight_pattern.index"].dtype == torch.int16
    assert dict(layer.named_buffers())["weight_pattern.index"].dtype == torch.uint8
    assert layer.weight.parts["index"] is index
    other = sten.trainable(sten.sparsify(torch.nn.Linear(8, 12), sten.GroupedNM(2, 4, 1)))
    other.load_state_dict(layer.state_dict())
    copies = [other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()]
    for each in copies:
        torch.testing.assert_close(each(x), want)
        assert torch.equal(each.weight.parts["index"], index)
        assert each.weight.parts["index"] is each.weight.parts["index"]
        sten.finalize(each)
        torch.testing.assert_close(each(x), want)
