"""Hostile files, pickles and state dicts: FormatError, nothing changed, and nothing out of bounds reaches a kernel."""

from __future__ import annotations

import collections
import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from cases import COPIES, LAYOUTS, sparsity_of
from small import every_layout, mlp, rate
from torch import nn
from torch.nn import functional as F

import sten
from sten.layouts.registry import fields
from sten.tensor import _load

every_class = pytest.mark.parametrize(
    "layout", list({type(layout): layout for layout in LAYOUTS + COPIES}.values()), ids=str
)


class Pickled:
    """Pickles as a call of what `torch.load(weights_only=True)` may call."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce_ex__(self, protocol):
        return self.reduced


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def weight(layout, shape=(24, 36)) -> sten.SparseTensor:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return sten.from_dense(dense, layout, layout.mask(dense.abs(), sparsity_of(layout)))


def call_of(w, parts=None, **changes):
    """The call that pickles `w`, with other arguments."""
    names = ("name", "values", "parts", "shape", "transposed", "requires_grad", "is_param")
    given = (
        type(w.sparse_layout).__name__,
        fields(w.sparse_layout),
        dict(w.parts),
        tuple(w.shape),
        False,
        False,
        False,
    )
    arguments = dict(zip(names, given, strict=True)) | changes
    return Pickled(_load, tuple((arguments | ({} if parts is None else {"parts": parts})).values()))


def hostile_parts(w):
    """(what, parts) that no kernel may see."""
    parts = {name: part.clone() for name, part in w.parts.items()}
    for name, part in parts.items():
        bits = torch.zeros(1, dtype=part.dtype)
        yield f"{name} with strides of 0", {**parts, name: bits.as_strided(part.shape, [0] * part.dim())}
        yield f"{name} on meta", {**parts, name: part.to("meta")}
        yield f"without {name}", {other: p for other, p in parts.items() if other != name}
        yield f"{name} is no tensor", {**parts, name: [1, 2]}
        yield f"{name} is sparse", {**parts, name: part.reshape(len(part), -1).to_sparse()}
        longer = torch.cat([part, part[:1]])
        yield f"{name} too long", {**parts, name: longer}
        yield f"{name} too long, on meta", {k: p.to("meta") for k, p in {**parts, name: longer}.items()}
        yield f"{name} of another dtype, on meta", {**{k: p.to("meta") for k, p in parts.items()}, name: part.cfloat()}
        if name != "values" and part.dtype != torch.bool and part.numel():
            for number in (-1, torch.iinfo(part.dtype).max):
                beyond = part.clone()
                beyond.view(-1)[-1] = number
                yield f"{name} ends with {number}", {**parts, name: beyond}
    yield "another part", {**parts, "extra": torch.ones(1)}
    yield "a meta part that is not its own", {**parts, "extra": torch.empty(1, device="meta")}
    for name, part in parts.items():
        if name != "values" and part.dtype.itemsize == 4 and part.numel() == parts["values"].numel():
            values = part.view(torch.float32).view(parts["values"].shape)
            yield f"values over the storage of {name}", {**parts, "values": values}


@every_class
def test_parts_of_a_pickle(layout):
    w = weight(layout)
    assert torch.equal(through_a_file(call_of(w)).to_dense(), w.to_dense())
    for what, parts in hostile_parts(w):
        with pytest.raises(sten.FormatError) as error:
            through_a_file(call_of(w, shared(parts)))
        assert "\n" not in str(error.value), what


class SameStorage:
    """A tensor that pickles over the storage that another tensor of the file has."""

    def __init__(self, t):
        self.t = t

    def __reduce_ex__(self, protocol):
        t = self.t
        place = t.untyped_storage(), t.storage_offset(), tuple(t.shape), t.stride(), False, collections.OrderedDict()
        return torch._utils._rebuild_tensor_v3, (*place, t.dtype)


def shared(parts):
    """torch.save refuses two dtypes over one storage, which a hostile file can have."""
    plain = {name: isinstance(part, torch.Tensor) and part.layout == torch.strided for name, part in parts.items()}
    plain = {name: ok and not parts[name].is_meta for name, ok in plain.items()}
    return {name: SameStorage(part) if plain[name] else part for name, part in parts.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Evil"}, {"name": 3}, {"values": 3}, {"values": {"x": 1}}, {"values": {1: 1}}, {"values": {"x": {}}},
        {"parts": 3}, {"parts": {}}, {"shape": 3}, {"shape": (-1, 3)}, {"shape": (2**40, 2**40)}, {"shape": (1.0, 2)},
        {"shape": (3, 3)}, {"shape": ()}, {"transposed": 1}, {"transposed": None},
        {"transposed": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_a_pickle(change):
    with pytest.raises(sten.FormatError):
        through_a_file(call_of(weight(sten.CSR()), **change))


STATES = ("parts", "part_col", "sparse_layout", "stored_shape", "transposed", "cache", "trained", "__dict__")


@pytest.mark.parametrize("name", STATES)
def test_state_set_after_the_check(name):
    """The calls of torch's own that set attributes of a tensor; three ways to write them."""
    w = weight(sten.CSR())
    bad = {key: part.clone() for key, part in w.parts.items()}
    bad["col"] += 2**30
    value = {"parts": bad, "part_col": bad["col"], "__dict__": {"parts": bad}}.get(name, {})
    function, arguments = w.__reduce_ex__(2)
    for reduced in (
        (torch._tensor._rebuild_from_type_v2, (function, sten.SparseTensor, arguments, {name: value})),
        (torch._utils._rebuild_parameter_with_state, (w, False, collections.OrderedDict(), {name: value})),
        (function, arguments, {name: value}),
    ):
        with pytest.raises(sten.FormatError):
            through_a_file(Pickled(*reduced))


def test_a_tensor_without_parts():
    """What `_rebuild_wrapper_subclass` makes has none; whoever reads them gets FormatError."""
    about = torch.float32, torch.Size((8, 8)), (8, 1), 0, torch.strided, torch.device("cpu"), False
    w = through_a_file(Pickled(torch._utils._rebuild_wrapper_subclass, (sten.SparseTensor, *about)))
    for use in (lambda: F.linear(torch.ones(1, 8), w), lambda: repr(w), lambda: w.to_dense(), lambda: w.density):
        with pytest.raises(sten.FormatError, match="Expected a SparseTensor with parts"):
            use()
    model = sten.sparsify(nn.Linear(8, 8), sten.CSR(), sparsity=0.5)
    with pytest.raises(sten.FormatError):
        model.load_state_dict({"weight": w, "bias": torch.zeros(8)})


@every_class
def test_training_what_was_loaded_does_not_write_the_pattern(layout):
    """Another tensor of the file, over the storage of a pattern part, is trained: the pattern is a copy."""
    w = weight(layout)
    parts = {name: part.clone() for name, part in w.parts.items()}
    for name in layout.pattern:
        bias = SameStorage(parts[name].view(-1).view(torch.uint8)[:4].view(torch.float32))
        state = through_a_file([call_of(w, shared(parts)), bias])
        state[1].fill_(-1e30)
        assert torch.equal(state[0].to_dense(), w.to_dense()), name


def test_an_edited_pattern_is_checked_again():
    """The last line: the C++ kernels check each version of a pattern once."""
    x = torch.randn(3, 36)
    for layout, name in ((sten.CSR(), "col"), (sten.CSR(), "crow"), (sten.GroupedNM(2, 4, 1), "index")):
        w = weight(layout)
        want = F.linear(x, w)
        part = w.parts[name]
        for number in (-1, 2000, torch.iinfo(part.dtype).max):
            right = part.clone()
            part.view(-1)[3] = number
            for _ in range(2):
                with pytest.raises((ValueError, RuntimeError), match=r"make the parts with pack|sten::"):
                    F.linear(x, w)
            part.copy_(right)
            assert torch.equal(F.linear(x, w), want)


# load_state_dict


def in_form(layout, form) -> nn.Module:
    model = sten.sparsify(mlp(), layout, sten.Random(), sparsity=rate(layout))
    return sten.trainable(model) if form == "trainable" else model


def unchanged(model: nn.Module, before: dict) -> bool:
    after = model.state_dict()
    for key, have in after.items():
        want = before[key]
        if isinstance(have, sten.SparseTensor):
            if not all(torch.equal(have.parts[n], want.parts[n]) for n in want.parts):
                return False
        elif not torch.equal(have, want):
            return False
    return list(after) == list(before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("form", ["finalized", "trainable"])
@every_layout
def test_parts_of_a_state_dict(layout, form, assign, strict):
    """In the second weight, when the first has been looked at: nothing at all is written."""
    source = sten.sparsify(mlp(), layout, sparsity=rate(layout))
    whole = {f"0.weight.{name}": part for name, part in source[0].weight.parts.items()}
    dense = {"0.bias": torch.full((20,), 7.0), "2.bias": torch.full((8,), 7.0)}
    before = copy.deepcopy(in_form(layout, form).state_dict())
    for what, parts in hostile_parts(source[2].weight.detach()):
        model = in_form(layout, form)
        state = {**whole, **dense, **{f"2.weight.{name}": part for name, part in parts.items()}}
        if what.startswith("values over") and not assign:
            continue  # the numbers are copied, so it does not matter where they were
        with pytest.raises(sten.FormatError, match=r"^2\.weight: Expected") as error:
            model.load_state_dict(state, strict=strict, assign=assign)
        assert "\n" not in str(error.value) and unchanged(model, before), what


@pytest.mark.parametrize("strict", [True, False])
def test_names_inside_of_a_trained_weight(strict):
    model = in_form(sten.CSR(), "trainable")
    before = copy.deepcopy(model.state_dict())
    for far in (200, 2**30):
        col = before["0.weight_pattern.col"] + far
        for state in ({"0.weight_pattern.col": col}, {**before, "0.weight_pattern.col": col}):
            with pytest.raises(sten.FormatError, match=r"^0\.weight"):
                model.load_state_dict(state, strict=strict)
            assert unchanged(model, before)


@pytest.mark.parametrize("form", ["finalized", "trainable"])
def test_a_dense_entry_of_another_shape_changes_nothing(form):
    model = in_form(sten.CSR(), form)
    before, state = copy.deepcopy(model.state_dict()), sten.sparsify(mlp(), sten.CSR(), sparsity=0.7).state_dict()
    for wrong in (torch.ones(3), torch.ones(8, device="meta"), None, "x"):
        with pytest.raises(sten.FormatError, match=r"2\.bias"):
            model.load_state_dict({**state, "2.bias": wrong})
        assert unchanged(model, before)


def test_a_part_of_a_model_is_checked_as_a_whole():
    """`model.encoder.load_state_dict`: all modules above a sparse weight check before they write."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    sten.sparsify(model, sten.CSR(), sparsity=0.5)
    state = copy.deepcopy(model[0].state_dict())
    before = copy.deepcopy(state)
    state["0.bias"].fill_(3)
    state["1.weight"] = torch.ones(8, 8)
    with pytest.raises(sten.FormatError, match=r"^1\.weight: Expected no non-zeros off the pattern"):
        model[0].load_state_dict(state)
    assert unchanged(model[0], before)


# layouts of installed packages


def test_a_layout_that_an_installed_package_declares(tmp_path):
    """The file names the layout; the installed distribution says what is imported. No other module is."""
    package = tmp_path / "site"
    (package / "stranger-1.0.dist-info").mkdir(parents=True)
    (package / "stranger-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n"
    )
    (package / "stranger-1.0.dist-info" / "entry_points.txt").write_text(
        "[sten.layouts]\nStrangersCSR = stranger_layouts:StrangersCSR\nMissing = no_such_module:Missing\n"
    )
    (package / "stranger_layouts.py").write_text(
        "from dataclasses import dataclass\nimport sten\n\n@dataclass(frozen=True)\nclass StrangersCSR(sten.CSR):\n"
        "    pass\n"
    )
    program = """
import sys, torch, sten
make, path = sys.argv[1:]
if make == "save":
    import stranger_layouts
    sten.save(sten.sparsify(torch.nn.Linear(8, 4), stranger_layouts.StrangersCSR(), sparsity=0.5), path)
    sys.exit()
assert "stranger_layouts" not in sys.modules and sten.inspect(path)["sparse"]["weight"]["layout"] == "StrangersCSR"
print(sten.load(torch.nn.Linear(8, 4), path).weight.sparse_layout)
for name in ("Missing", "os", "stranger_layouts"):
    from sten.checked import checked
    try:
        checked(name, {}, {}, (4, 8))
    except sten.FormatError as error:
        print(error)
"""
    path = os.pathsep.join((os.getcwd(), str(package)))
    for act in ("save", "load"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, act, str(tmp_path / "m")],
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "StrangersCSR()" and len(lines) == 4 and "no_such_module" in lines[1]
    assert all("Expected a registered layout" in line for line in lines[2:])
