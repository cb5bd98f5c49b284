"""Recipe: equal to the keywords, through JSON and back; a record in files, of which nothing is made."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from cases import COPIES, LAYOUTS
from small import every_layout, mlp, rate
from torch import nn
from training_methods import METHODS

import sten
from sten.layouts import DualMask

pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows")


class Middle(sten.extend.PatternMethod):
    """A stranger's method, without fields."""

    def score(self, view):
        return -view.weight.abs()


@dataclasses.dataclass(frozen=True)
class Power(sten.extend.PatternMethod):
    """A stranger's method with a field."""

    power: float = 1.0

    def score(self, view):
        return view.weight.abs() ** self.power


def there_and_back(recipe):
    return sten.Recipe.from_json(recipe.to_json())


def parts(model):
    return {f"{n}.{k}": t for n, w in model.named_parameters() if hasattr(w, "parts") for k, t in w.parts.items()}


@every_layout
def test_the_same_model_as_the_keywords(layout):
    one = sten.sparsify(mlp(), layout, sten.Random(seed=3), rate(layout), "0")
    other = sten.sparsify(mlp(), there_and_back(sten.Recipe(layout, sten.Random(seed=3), rate(layout), "0")))
    want, got = parts(one), parts(other)
    assert want and want.keys() == got.keys()
    for name, part in want.items():
        torch.testing.assert_close(got[name], part, rtol=0, atol=0)


def test_with_an_optimizer():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = sten.Recipe(sten.CSR(), sten.RigL(20, every=2), 0.5)
    sten.sparsify(model, recipe, optimizer=optimizer)
    assert model[0].weight_pattern.method == recipe.sparsifier and model[0].weight_pattern.engine is not None
    assert str(sten.plan(mlp(), recipe)) == str(sten.plan(mlp(), sten.CSR(), recipe.sparsifier, 0.5))


@pytest.mark.parametrize("layout", [one for one in LAYOUTS + COPIES if not isinstance(one, DualMask)], ids=str)
def test_layouts_through_json(layout):
    recipe = sten.Recipe(layout, sparsity=rate(layout))
    assert there_and_back(recipe) == recipe


@pytest.mark.parametrize(
    "method", [*METHODS, Middle(), Power(2.0), sten.Random(7), None], ids=lambda m: type(m).__name__
)
def test_methods_through_json(method):
    back = there_and_back(sten.Recipe(sten.CSR(), method))
    assert type(back.sparsifier) is type(method)
    if dataclasses.is_dataclass(method):
        assert back.sparsifier == method and repr(back.sparsifier) == repr(method)


@pytest.mark.parametrize("schedule", [sten.schedule.Cosine(0.3, 0.0, 2, 10, 2), sten.schedule.Exponential(1.0, 0.0)])
def test_a_schedule_of_ones_own_through_json(schedule):
    recipe = sten.Recipe(sten.CSR(), sten.SET(24, every=4, schedule=schedule), sten.Global(0.9, floor=0.01))
    assert there_and_back(recipe) == recipe


def test_patterns_through_json():
    layouts = {nn.Linear: sten.NM(2, 4), "re:.*head.*": None, "*": sten.CSR()}
    recipe = sten.Recipe(layouts, sparsity=sten.ERK(0.8), weights=["*.mlp.*", nn.Conv2d])
    back = there_and_back(recipe)
    assert back == recipe and list(back.layout) == list(layouts)  # the first match wins: the order counts


@pytest.mark.parametrize(
    "recipe",
    [
        sten.Recipe(sparsity=0.5, weights=lambda name, module, attribute: True),
        sten.Recipe(sparsity=0.5, weights=[nn.Linear(2, 2)]),
        sten.Recipe({nn.Linear(2, 2): sten.CSR()}, sparsity=0.5),
    ],
    ids=["function", "module", "module of a layout"],
)
def test_what_json_cannot_hold(recipe):
    with pytest.raises(ValueError, match=r"Expected names, globs or types .* got "):
        recipe.to_json()
    assert "not_json" in json.dumps(recipe.record())


def test_both_spellings_are_an_error():
    model, recipe = mlp(), sten.Recipe(sparsity=0.5)
    for given in ({"sparsity": 0.5}, {"weights": "0"}, {"sparsifier": sten.Magnitude()}, {"sparsifier": None}):
        with pytest.raises(TypeError, match=f"got a Recipe and {next(iter(given))}=; use dataclasses.replace"):
            sten.sparsify(model, recipe, **given)
    assert all(type(p) is nn.Parameter for p in model.parameters())


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({}, "Expected sparsity= or layout=, got neither"),
        ({"layout": "CSR"}, r"write sten.CSR\(\)"),
        ({"sparsity": 90}, "write 0.9"),
        ({"sparsity": 0.5, "weights": 3}, "Expected for weights="),
        ({"sparsifier": sten.RigL, "sparsity": 0.5}, r"write sten.RigL\(total_steps\)"),
    ],
)
def test_wrong_arguments_as_in_sparsify(args, error):
    for call in (lambda: sten.Recipe(**args), lambda: sten.sparsify(mlp(), **args)):
        with pytest.raises((ValueError, TypeError), match=error):
            call()


GOOD = json.loads(sten.Recipe(sten.NM(2, 4), sten.RigL(10, every=2)).to_json())


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "3", "{" * 100_000, json.dumps({**GOOD, "version": 2}), json.dumps({**GOOD, "more": 1}),
        json.dumps({**GOOD, "layout": {"name": "NoLayout", "fields": {}}}),
        json.dumps({**GOOD, "layout": {"name": "NM", "fields": {"n": 9, "m": 4}}}),
        json.dumps({**GOOD, "layout": {"name": ["NM"], "fields": {"n": 2, "m": 4}}}),
        json.dumps({**GOOD, "sparsifier": {"name": "os.system", "fields": {}}}),
        json.dumps({**GOOD, "sparsifier": {"name": "RigL", "fields": {"steps": 3}}}),
        json.dumps({**GOOD, "sparsifier": 5}), json.dumps({**GOOD, "sparsity": "0.5"}),
        json.dumps({**GOOD, "weights": {"type": "antigravity.fly"}}), json.dumps({**GOOD, "weights": 3}),
        json.dumps({**GOOD, "weights": {"not_json": "<function>"}}), json.dumps({**GOOD, "layout": [1, 2]}),
    ],
)  # fmt: skip
def test_hostile_json(text):
    with pytest.raises(sten.FormatError):
        sten.Recipe.from_json(text)
    with pytest.raises(sten.FormatError):
        sten.Recipe.from_json(None)


def test_the_record_in_a_file(tmp_path):
    model = sten.sparsify(mlp(), sten.NM(2, 4), weights="0")
    sten.sparsify(model, sten.CSR(), Power(3.0), 0.5, weights=lambda name, module, attribute: name.startswith("2"))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sten.save(one, tmp_path / "file")
        first, second = sten.inspect(tmp_path / "file")["recipes"]
        assert sten.Recipe.from_json(json.dumps(first)) == sten.Recipe(sten.NM(2, 4), weights="0")
        assert second["sparsifier"] == {"name": "Power", "fields": {"power": 3.0}} and "not_json" in second["weights"]
    loaded = sten.load(mlp(), tmp_path / "file")
    sten.save(loaded, tmp_path / "again")
    assert sten.inspect(tmp_path / "again")["recipes"] == [first, second]
    sten.save(sten.densify(loaded), tmp_path / "again")
    assert sten.inspect(tmp_path / "again")["recipes"] == []


def test_nothing_is_made_of_a_record(tmp_path):
    """A file whose record names what does not exist loads as any other."""
    model = sten.sparsify(mlp(), sten.CSR(), sparsity=0.5)
    vars(model)["_sten_recipes"] = [{"sparsifier": {"name": "NoSuch", "fields": {}}}, 3]
    sten.save(model, tmp_path / "file")
    loaded = sten.load(mlp(), tmp_path / "file")
    torch.testing.assert_close(loaded[0].weight.to_dense(), model[0].weight.to_dense(), rtol=0, atol=0)
    assert sten.inspect(tmp_path / "file")["recipes"][1] == 3
