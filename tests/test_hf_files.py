"""Folders of transformers: every layout and form, saved and loaded; damaged and hostile ones; other writers."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from forms import every_form
from hf_models import IDS, bert, every_layout, finalized, gpt2, in_form, llama, sampled

import sten

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file, save_model  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


def same(a, b):
    """The same weights, sparse ones in the same layout and pattern, and the same function."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name, w in left.items():
        assert type(w) is type(right[name]), name
        if isinstance(w, sten.SparseTensor):
            assert w.sparse_layout == right[name].sparse_layout and w.same_pattern(right[name])
            w, right[name] = w.to_dense(), right[name].to_dense()
        assert torch.equal(w, right[name]), name
    with torch.no_grad():
        assert torch.equal(a(IDS)[0], b(IDS)[0])


@pytest.mark.cell("save_pretrained")
@every_form
@every_layout
def test_there_and_back(layout, form, tmp_path):
    model = in_form(llama(), layout, form)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(isinstance(p, sten.SparseTensor) for p in read.parameters()) == 7
    assert sum(len(getattr(type(m), "finalized_names", ())) for m in read.modules()) == 7  # compilers see the parts
    same(read, finalized(model).eval())
    assert {p.requires_grad for p in read.parameters()} == {True}


@pytest.mark.cell("save_pretrained")
@every_form
@sampled
def test_transposed_and_tied_weights(layout, form, tmp_path):
    """GPT-2's Conv1D, and an embedding that is sparse and tied to the output layer."""
    model = in_form(gpt2(), layout, form, ["*.mlp.*", "*.wte", "lm_head"])
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.lm_head.weight is read.transformer.wte.weight and read.lm_head.weight.sparse_layout == layout
    assert read.transformer.h[0].mlp.c_fc.weight.transposed
    same(read, finalized(model).eval())


@every_form
def test_shards_device_map_and_dtype(form, tmp_path):
    model = in_form(llama(), sten.NM(2, 4), form)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    want = finalized(model).eval()
    for device_map in ("cpu", "auto", {"": "cpu"}, None):
        same(AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map), want)
    same(AutoModelForCausalLM.from_pretrained(tmp_path, disable_mmap=True), want)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, w), p in zip(half.named_parameters(), want.to(torch.bfloat16).parameters(), strict=True):
        assert torch.equal(w.to_dense(), p.to_dense()), name  # buffers of no file keep their own precision
    half.save_pretrained(tmp_path / "half")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "half"), half)
    with pytest.raises(ValueError, match="Expected a device_map without 'disk'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"})


def test_a_model_in_another(tmp_path):
    """The base model of a file with a head, and the model with a head of a file of the base model."""
    model = in_form(llama(), sten.CSR(), "finalized")
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    same(base, model.model)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    same(again.model, model.model)
    same(bert_from(tmp_path, in_form(bert(), sten.CSR(), "finalized")), bert_from(tmp_path, None))


def bert_from(folder, model):
    if model is not None:
        model.save_pretrained(folder / "bert")
    return transformers.BertForMaskedLM.from_pretrained(folder / "bert")


@every_form
def test_saved_again_trained_and_dense_again(form, tmp_path):
    in_form(llama(), sten.CSR(), form).save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.save_pretrained(tmp_path / "b")
        same(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), model)
    recipes = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["recipes"]
    assert recipes[0]["layout"] == {"name": "CSR", "fields": {}}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.attach(model, optimizer)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "c")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "c"), finalized(model))
    copy.deepcopy(model).half().float()  # what transformers refuses of a quantized model
    sten.densify(model).save_pretrained(tmp_path / "d")
    assert "quantization_config" not in (tmp_path / "d" / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "d")(IDS)[0], model.eval()(IDS)[0])


@every_form
def test_a_part_of_a_model_was_made_sparse(form, tmp_path):
    """The model around it writes what is refused, until sten has seen all of it."""
    model = llama()
    in_form(model, sten.NM(2, 4), form)
    sten.densify(copy.deepcopy(model).model)  # has a configuration of its own
    del model.hf_quantizer  # as if `sten.sparsify(model.model)` had been called
    if form == "finalized":
        with pytest.raises(TypeError, match=r"write files with sten\.save"):
            model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
        with pytest.raises(sten.FormatError, match=r"call sten\.finalize on the whole model before save_pretrained"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    sten.finalize(model).save_pretrained(tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), model.eval())


def test_a_dense_model_of_the_configuration_of_a_sparse_one(tmp_path):
    dense = type(llama())(in_form(llama(), sten.CSR(), "finalized").config).eval()
    dense.save_pretrained(tmp_path)
    same(AutoModelForCausalLM.from_pretrained(tmp_path), dense)


def test_a_file_of_sten_in_a_model_of_transformers(tmp_path):
    """sten.load and sten.save know nothing of folders, and a model of theirs can be written to one."""
    sten.save(in_form(llama(), sten.CSR(), "finalized"), tmp_path / "file")
    model = sten.load(llama(), tmp_path / "file")
    model.save_pretrained(tmp_path / "folder")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), model)
    with pytest.raises(sten.FormatError, match=r"of save_pretrained; load it by from_pretrained\."):
        sten.load(llama(), tmp_path / "folder" / "model.safetensors")


@every_form
@sampled
def test_the_state_of_a_run(layout, form, tmp_path):
    """A folder that is written in training has all of `model.state_dict()`, which Trainer reads when it resumes."""
    model = in_form(llama(), layout, form)
    model.save_pretrained(tmp_path)
    other = in_form(llama(), layout, form) if form != "finalized" else sten.trainable(copy.deepcopy(model))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    if form == "finalized":
        same(sten.finalize(other), model)
        return
    want, got = model.state_dict(), other.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(t, got[name]) for name, t in want.items())


def edited(folder, change, metadata=lambda text: text):
    """Change the tensors and the description in a folder's file."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    change(tensors)
    about["sten.pretrained"] = metadata(about["sten.pretrained"])
    save_file(tensors, path, about)


NAME = "model.layers.0.mlp.up_proj.weight"


def without(part):
    return lambda tensors: tensors.pop(NAME + part)


def outside(tensors):
    tensors[NAME + "_pattern.col"][-1] = 10**6


def described(**entry):
    def change(text):
        data = json.loads(text)
        data["sparse"][NAME].update(entry)
        return json.dumps(data)

    return change


HOSTILE = {
    "an index out of range": (outside, {}, "Expected numbers from 0 to 15 in part 'col'"),
    "a part is missing": (without("_pattern.col"), {}, r"Expected the parts .* for CSR\(\)"),
    "the values are missing": (without(""), {}, "Expected values of shape"),
    "all parts are missing": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith(NAME)], {}, f"Expected {NAME} in the files",
    ),
    "values of another number": (lambda t: t.update({NAME: torch.zeros(3, 1)}), {}, "Expected values of shape"),
    "another layout": (lambda t: None, {"layout": "NoLayout"}, "Expected a registered layout"),
    "another shape": (lambda t: None, {"shape": [24, 17]}, NAME),
    "no shape of the values": (lambda t: None, {"values": None}, "Expected 'shape'"),
    "a huge shape": (lambda t: None, {"shape": [2**40, 2**40]}, "Expected fewer than"),
    "fields that import": (lambda t: None, {"fields": {"__import__": "os"}}, r"Expected the fields \[\] for"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind, tmp_path):
    change, entry, error = HOSTILE[kind]
    in_form(llama(), sten.CSR(), "finalized").save_pretrained(tmp_path)
    edited(tmp_path, change, described(**entry))
    with pytest.raises(sten.FormatError, match=error):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 99}, "Expected version 1 of sten's entry"),
        ({"recipes": "x"}, "Expected a list of recipes"),
        ({"device": "x"}, r"got \['device'\]"),
    ],
)
def test_hostile_configurations(change, error, tmp_path):
    in_form(llama(), sten.CSR(), "finalized").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(sten.FormatError, match=error):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_without_a_description(tmp_path):
    in_form(llama(), sten.CSR(), "finalized").save_pretrained(tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(sten.FormatError, match="with a description of its sparse weights, got 0"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dense_files_with_the_configuration(tmp_path):
    from sten.integrations.transformers import SparseConfig

    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Expected a folder with sparse weights .* call sten\.sparsify"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SparseConfig())


def test_a_process_without_sten_fails(tmp_path):
    """It does not go on with random, or with other weights."""
    in_form(llama(), sten.NM(2, 4), "dense weight").save_pretrained(tmp_path)
    program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "Unknown quantization type, got sten" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("RuntimeError")


# other writers of safetensors


@pytest.mark.cell("safetensors")
@pytest.mark.parametrize("form", ["trainable", "dense weight"])
@every_layout
def test_save_model_of_safetensors(layout, form, tmp_path):
    model = in_form(llama(), layout, form)
    save_model(model, str(tmp_path / "file"))
    other = in_form(llama(), layout, form)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    other.load_state_dict(load_file(tmp_path / "file"), strict=False)  # without duplicates of tied weights
    assert torch.equal(other(IDS).logits, model(IDS).logits)


@pytest.mark.cell("safetensors", refused="a SparseTensor has no storage: sten.save, or sten.trainable before")
@pytest.mark.parametrize("form", ["finalized"])
@every_layout
def test_safetensors_refuses_finalized_models(layout, form, tmp_path):
    model = in_form(llama(), layout, form)
    with pytest.raises(TypeError, match=r"write files with sten\.save or torch\.save"):
        save_model(model, str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()


@pytest.mark.cell("accelerate")
@pytest.mark.parametrize("form", ["trainable", "dense weight"])
@sampled
def test_save_state_of_accelerate(layout, form, tmp_path):
    """Model, optimizer and run, saved and loaded by accelerate; training goes on bit for bit."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    method = sten.SRSTE() if form == "dense weight" else sten.Magnitude()
    sten.sparsify(model, layout, method, None if layout.rate else 0.5, optimizer=optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step():
        accelerator.backward(model(IDS, labels=IDS).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(str(tmp_path))
    step()
    want = copy.deepcopy(model.state_dict())
    step()
    accelerator.load_state(str(tmp_path))
    step()
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())
    accelerator.free_memory()


@pytest.mark.cell("accelerate", refused="a SparseTensor has no storage: sten.save, or sten.trainable before")
@pytest.mark.parametrize("form", ["finalized"])
@every_layout
def test_accelerate_refuses_finalized_models(layout, form, tmp_path):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(in_form(llama(), layout, form))
    for save in (accelerator.save_state, lambda folder: accelerator.save_model(model, folder)):
        with pytest.raises(TypeError, match=r"write files with sten\.save or torch\.save"):
            save(str(tmp_path))
    accelerator.free_memory()
