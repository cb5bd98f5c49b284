"""Sites in recipes, plans, files and explanations: a model that is read has its sites and thresholds again."""

import json
import warnings

import hf_models
import pytest
import torch
from torch import nn

import sten
from sten.layouts import CSR, NM, FanIn
from sten.sparsifiers.activation import ActivationMethod

pytestmark = pytest.mark.usefixtures("one_thread")
CALIBRATED = sten.Threshold(sparsity=0.5)
RECIPES = [
    sten.Recipe(FanIn(), sten.TopK(0.5, straight_through=True), site="input", modules=["0", "re:2"]),
    sten.Recipe(NM(2, 4), sten.TopK(2, block=4), site="output", modules=nn.Linear),
    sten.Recipe(None, sten.JumpReLU(0.3, 0.5), site="output"),
    sten.Recipe(None, sten.MVUE24(dim=0), site="grad_output"),
    sten.Recipe(CSR(), sten.Threshold(0.1, signed=True), site="grad_input", modules="2"),
    sten.Recipe(None, sten.RandomFraction(0.5), site="grad_weight"),
    sten.Recipe(None, sten.BatchTopK(3, momentum=0.1), site="output", modules="2"),
]


def mlp(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def with_sites(model=None):
    """Thresholds that were calibrated, learned and counted, an n:m weight, and a gradient."""
    model = mlp() if model is None else model
    sten.sparsify(model, NM(2, 4), weights="0")
    sten.sparsify(model, CSR(), CALIBRATED, site="input", modules="2", calibration=[torch.randn(64, 16)])
    sten.sparsify(model, site="output", sparsifier=sten.JumpReLU(0.2, 0.5), modules="0")
    sten.sparsify(model, site="output", sparsifier=sten.BatchTopK(3), modules="2")
    sten.sparsify(model, site="grad_weight", sparsifier=sten.TopK(2), modules="2")
    with torch.no_grad():
        model[0].sparse_output_log_threshold += torch.rand(32)
        model(torch.randn(6, 16))
    return model


def sites(model):
    return sorted(map(str, sten.summary(model).sites))


def expect_same(model, other):
    x = torch.randn(2, 3, 16)
    assert sites(other) == sites(model)
    assert list(other.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model.eval()(x), rtol=0, atol=0)
    grads = []
    for each in (model, other):
        each.zero_grad()
        each(x).square().sum().backward()
        grads.append(each[2].weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert int((grads[1] != 0).sum(-1).max()) <= 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.site} {r.sparsifier}")
def test_recipes(recipe, tmp_path):
    """Through JSON; the same model as the keywords; the plan lists what will be, and changes nothing."""
    assert sten.Recipe.from_json(recipe.to_json()) == recipe
    keywords = {"site": recipe.site, "modules": recipe.modules}
    model, other = mlp(), sten.sparsify(mlp(), recipe.layout, recipe.sparsifier, **keywords)
    plan, keys = sten.plan(model, recipe), list(model.state_dict())
    assert sites(model) == [] and list(model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    sten.sparsify(model, recipe)
    assert sites(model) == sites(other) == sorted(map(str, plan.sites)) != []
    assert json.loads(recipe.to_json()) in model._sten_recipes
    assert f"{recipe.site} of " in str(plan) and recipe._repr_html_()


def test_recipes_that_cannot_be_written_or_read():
    with pytest.raises(ValueError, match="Expected names, globs or types in weights=, modules= and layout= for JSON"):
        sten.Recipe(None, sten.TopK(3), site="input", modules=lambda name, module: True).to_json()
    text = RECIPES[0].to_json()
    for old, new in (
        ('"TopK"', '"Magnitude"'),
        ('"TopK"', '"Other"'),
        ('"input"', '"inputs"'),
        ('"k": 0.5', '"k": -1'),
    ):
        with pytest.raises(sten.FormatError, match="Expected a Recipe that can be made"):
            sten.Recipe.from_json(text.replace(old, new))
    with pytest.raises(sten.FormatError, match="Expected a Recipe of version 2"):
        sten.Recipe.from_json(text.replace('"version": 2', '"version": 1'))
    old = sten.Recipe.from_json('{"version": 1, "layout": null, "sparsifier": null, "sparsity": null, "weights": null}')
    assert old == sten.Recipe(sparsifier=None)


REFUSED = [
    (TypeError, {"site": "input"}, "which is for weights"),
    (TypeError, {"sparsifier": sten.TopK(3), "sparsity": 0.5}, "which is for activations; pass site="),
    (TypeError, {"sparsity": 0.5, "modules": "0"}, "Expected weights= for site='weight'"),
    (TypeError, {"sparsifier": sten.TopK(3), "site": "input", "weights": "0"}, "modules= chooses modules"),
    (ValueError, {"sparsifier": sten.JumpReLU(), "site": "grad_output"}, "Expected a method without state"),
    (TypeError, {"sparsifier": sten.TopK(3), "site": "input", "modules": lambda name: True}, "Expected a function of"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), REFUSED, ids=[case[2] for case in REFUSED])
def test_recipes_that_are_refused(error, arguments, message):
    for call in (sten.Recipe, lambda **kw: sten.sparsify(mlp(), **kw), lambda **kw: sten.plan(mlp(), **kw)):
        with pytest.raises(error, match=message):
            call(**arguments)


def test_a_recipe_and_its_arguments_or_an_optimizer():
    for given in ({"site": "input"}, {"modules": "0"}):
        with pytest.raises(TypeError, match=f"got a Recipe and {next(iter(given))}="):
            sten.sparsify(mlp(), RECIPES[0], **given)
    model = mlp()
    with pytest.raises(TypeError, match="make the optimizer afterwards"):
        sten.sparsify(model, RECIPES[0], optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert sites(model) == []


def test_a_plan_knows_calibration_and_removal():
    model = with_sites()
    assert sten.plan(model, CSR(), sparsity=0.5, weights="0").sites == sten.summary(model).sites
    left = sten.plan(model, site="output", sparsifier=None, modules="0").sites
    assert [str(site) for site in left] == [text for text in map(str, sten.summary(model).sites) if "Jump" not in text]
    with pytest.raises(ValueError, match="Expected one method on a site"):
        sten.plan(model, RECIPES[2])


# files of sten.save


@pytest.mark.parametrize("into", ["dense", "the same sites", "other sites", "meta", "float64"])
def test_save_and_load(into, tmp_path):
    model, path = with_sites(), tmp_path / "model.safetensors"
    sten.save(model, path)
    assert [entry["site"] for entry in sten.inspect(path)["sites"]] == ["output", "input", "output", "grad_weight"]
    if into == "meta":
        with torch.device("meta"):
            other = mlp()
        sten.load(other, path, assign=True)
    else:
        other = mlp(2)
        if into == "the same sites":
            with_sites(other)
            kept = other[0].sparse_output_log_threshold
        elif into == "other sites":
            sten.sparsify(other, FanIn(), sten.TopK(3), site="input")
            sten.sparsify(other, site="output", sparsifier=sten.JumpReLU(0.9), modules="2")
        other = other.double() if into == "float64" else other
        sten.load(other, path)
        if into == "the same sites":
            assert other[0].sparse_output_log_threshold is kept, "an optimizer may have it"
    if into == "float64":
        assert sites(other) == sites(model) and other[0].weight.dtype == torch.float64
        return
    expect_same(model, other)
    names = [name for name, _ in other.named_parameters()]
    assert "0.sparse_output_log_threshold" in names and "2.sparse_input_threshold" not in names


def test_a_file_without_sites_takes_them_off_and_an_old_one_does_not(tmp_path):
    sten.save(mlp(), tmp_path / "dense")
    model = sten.load(with_sites(), tmp_path / "dense")
    assert sites(model) == [] and list(model.state_dict()) == list(mlp().state_dict())
    rewrite(tmp_path / "dense", lambda header: header.pop("sites"))
    model = sten.sparsify(mlp(), RECIPES[0])
    assert sites(sten.load(model, tmp_path / "dense")) == sites(sten.sparsify(mlp(), RECIPES[0]))


def rewrite(path, change):
    """A file with another header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    whole = json.loads(data[8 : 8 + size])
    header = json.loads(whole["__metadata__"]["sten"])
    change(header)
    whole["__metadata__"]["sten"] = json.dumps(header)
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


HOSTILE = {
    "no list": (lambda h: h.update(sites=3), "Expected sites with"),
    "no entry": (lambda h: h.update(sites=[3]), "Expected sites with"),
    "a missing key": (lambda h: h["sites"][0].pop("layout"), "Expected sites with"),
    "a weight": (lambda h: h["sites"][0].update(site="weight"), "Expected sites with"),
    "a site": (lambda h: h["sites"][0].update(site="inputs"), "Expected sites with"),
    "a module": (lambda h: h["sites"][0].update(module="9"), "Expected a module for each site of the file, got none"),
    "two": (lambda h: h["sites"].append(h["sites"][0]), "got a second entry for output of 0"),
    "a method": (lambda h: h["sites"][0]["method"].update(name="Magnitude"), "Expected one imported ActivationMethod"),
    "fields": (lambda h: h["sites"][0]["method"]["fields"].update(threshold=-1), "positive threshold"),
    "a text": (lambda h: h["sites"][1]["method"]["fields"].update(value="a", sparsity=None), "Expected a number"),
    "a layout": (lambda h: h["sites"][1]["layout"].update(name="Secret"), "Expected a registered layout"),
    "a layout that cannot": (
        lambda h: h["sites"][0].update(
            method={"name": "TopK", "fields": {"k": 1}}, layout={"name": "NM", "fields": {}}
        ),
        "output of 0: ",
    ),
    "no site for a threshold": (lambda h: h["sites"].pop(0), "'0.sparse_output_log_threshold'] too many"),
    "no numbers for a site": (
        lambda h: h["sites"].append({**h["sites"][1], "module": "0"}),
        r"Expected shape \(\) for 0.sparse_input_threshold in the file, got none",
    ),
    "a gradient of a sparse weight": (
        lambda h: h["sites"].append({**h["sites"][3], "module": "0"}),
        "grad_weight of 0: Expected a dense weight in the file",
    ),
    "a module without it": (lambda h: h["sites"][3].update(module="1"), "Expected a module with a Parameter `weight`"),
}


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_damaged_descriptions(case, tmp_path):
    """FormatError, and the model as it was."""
    change, message = HOSTILE[case]
    sten.save(with_sites(), tmp_path / "model")
    rewrite(tmp_path / "model", change)
    model = sten.sparsify(mlp(), RECIPES[0])
    before, x = sites(model), torch.randn(3, 16)
    y = model(x)
    with pytest.raises(sten.FormatError, match=message):
        sten.load(model, tmp_path / "model")
    assert sites(model) == before and torch.equal(model(x), y) and type(model[0].weight) is nn.Parameter


def test_methods_of_ones_own(tmp_path):
    """A dataclass of numbers is written; what JSON cannot hold is refused, and there is no file."""

    class Secret(ActivationMethod):
        kind = "streaming"

        def __init__(self, function):
            self.function = function

        def mask(self, x, state, training):
            return self.function(x)

    model = sten.sparsify(mlp(), site="input", sparsifier=Secret(lambda x: x > 0))
    with pytest.raises(ValueError, match=r"Expected dataclasses of numbers and text for JSON, got .*Secret"):
        sten.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# runs


def test_runs(tmp_path):
    """The sites of a run must be there; its thresholds come back, and training goes on bit for bit."""
    recipes = (RECIPES[0], RECIPES[2], RECIPES[5])

    def run():
        model = mlp()
        for recipe in recipes:
            sten.sparsify(model, recipe)
        return model, torch.optim.Adam(model.parameters(), 0.1)

    def steps(model, optimizer, count):
        for seed in range(count):
            torch.manual_seed(seed)
            model(torch.randn(5, 16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = run()
    steps(model, optimizer, 2)
    sten.save_run(model, tmp_path / "run", optimizer, step=2)
    steps(model, optimizer, 2)
    other, again = run()
    assert sten.load_run(other, tmp_path / "run", again) == {"step": 2}
    steps(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for lacking in (0, 2):  # neither has tensors
        less = mlp()
        for recipe in recipes[:lacking] + recipes[lacking + 1 :]:
            sten.sparsify(less, recipe)
        before = {name: t.clone() for name, t in less.state_dict().items()}
        with pytest.raises(
            sten.FormatError, match=rf"Expected the sites of the run, got others \({recipes[lacking].site}"
        ):
            sten.load_run(less, tmp_path / "run", torch.optim.Adam(less.parameters(), 0.1))
        assert all(torch.equal(t, before[name]) for name, t in less.state_dict().items())


# programs


EXPORTED = {
    "input": ("input", FanIn(), sten.TopK(4)),
    "calibrated": ("input", CSR(), sten.Threshold(sparsity=0.5)),
    "learned": ("output", None, sten.JumpReLU(0.3, 0.5)),
    "of a batch": ("output", CSR(), sten.BatchTopK(3)),
    "gradients": ("grad_output", CSR(), sten.TopK(4)),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", EXPORTED)
def test_exported(case, strict):
    """The program computes what the model does, for other numbers of tokens; thresholds are among its state."""
    (site, layout, method), x = EXPORTED[case], torch.randn(6, 16)
    calibration = [torch.randn(64, 16)] if case == "calibrated" else None
    model = sten.sparsify(mlp(), layout, method, site=site, calibration=calibration)
    model(x)  # what a batch counts
    model.eval()
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},), strict=strict
    )
    for tokens in (6, 11):
        x = torch.randn(tokens, 16)
        y = model(x)
        torch.testing.assert_close(program.module()(x), y.to_dense() if isinstance(y, sten.SparseTensor) else y)
    assert {name for name in model.state_dict() if "sparse_" in name} <= set(program.state_dict)


# explanations


def test_explain_times_sparse_inputs_and_lists_sites():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    sten.sparsify(model, FanIn(), sten.TopK(0.1), site="input", modules="2")
    keys, x = list(model.state_dict()), torch.randn(1, 64)
    y = model(x)
    found = sten.explain(model, x, seconds=0.01)
    first, second = found.rows
    assert first.speedup is None and second.layout == "dense" and second.speedup is not None
    assert second.kernel == str(sten.which("linear", sten.sparse_op(nn.Identity(), out=(sten.TopK(13), FanIn()))(
        torch.randn(1, 128)), model[2].weight).kernel) + " [codes]"  # fmt: skip
    assert "input of 2: TopK(k=0.1), FanIn()" in str(found) and "input of 2: TopK(k=0.1)" in found.to_html()
    sten.explain(model, x, seconds=0.01, keep_faster=True)
    assert list(model.state_dict()) == keys and torch.equal(model(x), y) and len(sites(model)) == 1


# transformers


def llama():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return hf_models.llama(num_hidden_layers=2, intermediate_size=32, num_key_value_heads=2)


IDS = torch.arange(12).view(2, 6)


def llama_with_sites(sparse):
    model = llama()
    if sparse:
        sten.sparsify(model, NM(2, 4), weights="*.q_proj*")
    calibration = [{"input_ids": IDS}]
    sten.sparsify(model, CSR(), CALIBRATED, site="input", modules="*.down_proj", calibration=calibration)
    sten.sparsify(model, site="output", sparsifier=sten.JumpReLU(0.01, 0.5), modules="*.up_proj")
    sten.sparsify(model, site="input", sparsifier=sten.TopK(0.5), modules="*.o_proj")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.sparse_output_log_threshold += torch.rand(32)
    return model


@pytest.mark.parametrize("sparse", [False, True], ids=["dense weights", "sparse weights"])
@pytest.mark.filterwarnings("ignore")
def test_save_pretrained(sparse, tmp_path):
    model = llama_with_sites(sparse)
    model.save_pretrained(tmp_path / "whole")
    other = type(model).from_pretrained(tmp_path / "whole")
    assert sites(other) == sites(model) and len(sites(model)) == 6
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    name = "model.layers.1.mlp.up_proj.sparse_output_log_threshold"
    assert torch.equal(other.get_parameter(name), model.get_parameter(name))
    base = type(model.model).from_pretrained(tmp_path / "whole")  # other names
    torch.testing.assert_close(base(IDS)[0], model.model(IDS)[0], rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    torch.testing.assert_close(again.model(IDS)[0], base(IDS)[0], rtol=0, atol=0)
    sten.densify(other).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_folders_that_lack_a_threshold(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    model = llama_with_sites(False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with pytest.importorskip("safetensors").safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = files.load_file(path)
    tensors.pop("model.layers.0.mlp.down_proj.sparse_input_threshold")
    files.save_file(tensors, path, metadata)
    with pytest.raises(sten.FormatError, match=r"Expected .*sparse_input_threshold, which a site has learned, in the"):
        type(model).from_pretrained(tmp_path)


def test_no_warning_of_a_site_that_is_read(tmp_path):
    """A calibrated method that is loaded keeps nothing by mistake, so that nothing is said of calibration."""
    sten.save(with_sites(), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sten.load(mlp(), tmp_path / "model")
