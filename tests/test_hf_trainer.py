"""SparsityCallback: one line in a Trainer script, resumed bit for bit; logs, refusals, and the trial of a new user."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import SMALL
from training_methods import METHODS, SUPPORTED

import sten

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sten.integrations.transformers import SparsityCallback  # noqa: E402
from sten.training.engine import engines_of  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
TRAINED = [m for m in METHODS if m.optimizer is None]  # CAST needs an optimizer of sten's, passed by optimizers=
ALL = [
    (m, x)
    for m in [sten.Magnitude(), *TRAINED]
    for x in SMALL
    if SUPPORTED.get((type(m).__name__, type(x).__name__), "yes") == "yes"
]
SAMPLE = SMALL if os.environ.get("STEN_ALL") else SMALL[::3]
CELLS = ALL if os.environ.get("STEN_ALL") else ALL[::9]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer_of(folder, callback, model=None, **more):
    args = transformers.TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=2, save_steps=5, save_strategy="steps", logging_steps=5,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **{"learning_rate": 1e-2, **more},
    )  # fmt: skip
    model = llama() if model is None else model
    sets = {"train_dataset": Data(), "eval_dataset": Data()}
    return transformers.Trainer(model=model, args=args, callbacks=[callback], **sets)


def test_a_calibrated_method(tmp_path):
    """A method that reads activations chooses the pattern, which is trained."""
    batches, want = [{"input_ids": torch.randint(0, 32, (4, 6))} for _ in range(3)], llama()
    sten.sparsify(want, sten.NM(2, 4), sten.SparseGPT(), calibration=batches)
    with pytest.raises(ValueError, match="Expected calibration= for SparseGPT"):
        trainer_of(tmp_path, SparsityCallback(sten.NM(2, 4), sten.SparseGPT()))
    with pytest.raises(ValueError, match=r"Expected a method for SparsityCallback\(calibration=\.\.\.\)"):
        SparsityCallback(calibration=batches)
    trainer = trainer_of(tmp_path, SparsityCallback(sten.NM(2, 4), sten.SparseGPT(), calibration=batches))
    trainer.train()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        ours, theirs = (m.get_submodule(f"model.layers.0.{name}").weight for m in (trainer.model, want))
        assert torch.equal(ours.mask(), theirs.mask()) and not torch.equal(ours.to_dense(), theirs.to_dense())


def form_of(method):
    return "dense weight" if isinstance(method, sten.extend.DenseWeightMethod) else "trainable"


def parameters(*cells):
    names = [f"{type(m).__name__}-{x}-{form_of(m)}" for m, x in cells]
    return pytest.mark.parametrize(("method", "layout", "form"), [(m, x, form_of(m)) for m, x in cells], ids=names)


@pytest.mark.cell("Trainer resume")
@parameters(*CELLS)
def test_a_run_resumes_bit_for_bit(method, layout, form, tmp_path):
    """From the checkpoint in the middle of a run, in another Trainer over a new dense model."""
    callback = SparsityCallback(sten.Recipe(layout, method, None if layout.rate else 0.5))
    straight = trainer_of(tmp_path / "a", callback)
    straight.train()
    resumed = trainer_of(tmp_path / "b", SparsityCallback(callback.recipe))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    want, got = straight.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    for name, t in want.items():
        assert torch.equal(got[name], t), name
    for a, b in zip(engines_of(straight.model), engines_of(resumed.model), strict=True):
        assert method.stateless or (a.step, a.updates) == (b.step, b.updates) == (10, b.updates)


LAYOUTS_AND_FORMS = [(m, x) for m in (sten.Magnitude(), sten.SRSTE()) for x in SAMPLE]


@pytest.mark.cell("Trainer")
@parameters(*LAYOUTS_AND_FORMS)
def test_training_and_saving(method, layout, form, tmp_path):
    """from_pretrained reads the trained weights, as what they compute with, in the layout."""
    trainer = trainer_of(tmp_path, SparsityCallback(layout, method, None if layout.rate else 0.5))
    before = trainer.model.model.layers[0].mlp.up_proj.weight.to_dense().detach().clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    w = read.model.layers[0].mlp.up_proj.weight
    x = torch.arange(5)[None]
    assert w.sparse_layout == layout and not torch.equal(w.to_dense(), before)
    sten.finalize(trainer.model)
    torch.testing.assert_close(read(x).logits, trainer.model.eval()(x).logits)


@pytest.mark.cell("Trainer")
@pytest.mark.parametrize("form", ["finalized"])
@pytest.mark.parametrize("layout", SAMPLE, ids=str)
def test_a_model_that_is_sparse_already(layout, form, tmp_path):
    """Without arguments: the pattern stays, the numbers train, like those of a masked dense model."""
    model = sten.sparsify(llama(), layout, sparsity=None if layout.rate else 0.5)
    masks = {n: p.mask() for n, p in model.named_parameters() if hasattr(p, "mask")}
    dense = sten.densify(sten.sparsify(llama(), layout, sparsity=None if layout.rate else 0.5))
    for name, p in dense.named_parameters():
        if name in masks:
            p.register_hook(lambda grad, mask=masks[name]: grad * mask)
    trainer_of(tmp_path / "sparse", SparsityCallback(), model, weight_decay=0.1, max_grad_norm=0.1).train()
    args = {"weight_decay": 0.1, "max_grad_norm": 0.1}
    trainer_of(tmp_path / "dense", transformers.TrainerCallback(), dense, **args).train()
    trainer = trainer_of(tmp_path / "end", transformers.TrainerCallback(), sten.finalize(model))
    trainer.save_model(str(tmp_path / "end"))
    read = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end").named_parameters())
    for name, p in dense.named_parameters():
        assert (name in masks) == isinstance(read[name], sten.SparseTensor)
        torch.testing.assert_close(read[name].to_dense(), p.to_dense(), rtol=1e-4, atol=1e-5)


def test_logs(tmp_path):
    trainer = trainer_of(tmp_path, SparsityCallback(sten.CSR(), sten.Gradual(1, 8, 2), 0.75))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["mask_updates"] for entry in logs] == [3, 5]  # of the steps 1, 3, 5, 7 and 8
    assert logs[0]["density"] > logs[1]["density"] == pytest.approx(0.25)


@pytest.mark.parametrize("method", [sten.SET(20, every=2), sten.Gradual(1, 8, 2)], ids=["SET", "Gradual"])
def test_the_best_model_is_loaded_at_the_end(method, tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # so that it is the first one
    trainer = trainer_of(tmp_path, SparsityCallback(sten.CSR(), method, 0.5), **best)
    trainer.train()
    saved = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    x = torch.arange(5)[None]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    torch.testing.assert_close(trainer.model.eval()(x).logits, saved(x).logits)
    assert engines_of(trainer.model)[0].step == 5


def test_train_again_and_in_a_second_trainer(tmp_path):
    callback = SparsityCallback(sten.CSR(), sten.SET(40, every=2), 0.5)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    second = trainer_of(tmp_path / "second", callback, trainer.model)
    assert torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight.to_dense(), weight.to_dense())  # once
    second.train()
    assert engines_of(second.model)[0].step == 20


def test_an_optimizer_of_ones_own(tmp_path):
    """CAST needs AdamS: refused under the Trainer's own before the first step, trained under one that is passed."""
    callback = SparsityCallback(sten.NM(2, 4), sten.CAST(20, 1e-2, 3))
    trainer = trainer_of(tmp_path, callback)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    with pytest.raises(TypeError, match=r"Expected sten\.optim\.AdamS for CAST, got AdamW"):
        trainer.train()
    assert all(torch.equal(t, before[name]) for name, t in trainer.model.state_dict().items())
    model = llama()
    optimizer = sten.optim.AdamS(model.parameters(), lr=1e-2)
    own = transformers.Trainer(
        model=model, args=trainer.args, train_dataset=Data(), callbacks=[callback], optimizers=(optimizer, None)
    )
    own.train()
    assert engines_of(model)[0].step == 10


@pytest.mark.parametrize("optim", ["adafactor"])
def test_optimizers_that_cannot(optim, tmp_path):
    trainer = trainer_of(tmp_path, SparsityCallback(sten.CSR(), sten.SET(20, every=2), 0.5), optim=optim)
    with pytest.raises(TypeError, match=r"Expected another optimizer for sparse weights, got Adafactor"):
        trainer.train()


def test_model_init(tmp_path):
    callback = SparsityCallback(sten.Masked(), sparsity=0.5)
    args = trainer_of(tmp_path, callback).args
    trainer = transformers.Trainer(model_init=llama, args=args, train_dataset=Data(), callbacks=[callback])
    trainer.train()
    assert trainer.model.model.layers[0].mlp.up_proj.weight.density == 0.5
    with pytest.raises(ValueError, match=r"Expected Trainer\(model=\.\.\.\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_dense_model_without_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"Expected a sparse model, or arguments"):
        trainer_of(tmp_path, SparsityCallback())


def test_examples_of_the_docstrings():
    import doctest

    from sten.integrations import transformers as module

    assert doctest.testmod(module).attempted >= 5 and doctest.testmod(module).failed == 0


PAGE = (Path(__file__).parent.parent / "docs" / "huggingface.md").read_text()


def test_the_trial_of_a_new_user(tmp_path, monkeypatch):
    """Prune, fine-tune, save; reload and generate in a fresh process: less than 15 lines together."""
    trial, reload = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len([line for line in (trial + reload).splitlines() if line]) < 15
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("dense")
    names = {"data": Data()}
    exec(trial, names)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", reload], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    want = names["model"].eval().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert done.stdout.splitlines()[-1] == str(want.tolist())
    for code in re.findall(r"```python no-run\n(.*?)```", PAGE, re.S):
        compile(code, "huggingface.md", "exec")
