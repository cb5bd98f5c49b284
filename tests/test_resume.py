"""Runs that go on: under a trainer of Hugging Face, from earlier checkpoints, and from dense ones, pruned or not."""

import copy

import pytest
import torch
from torch import nn
from training_models import OPTIMIZERS, dense_weights, engine_of, loss_of, masks, mlp, sparse, train

import sten
from sten.layouts import BSR, CSR, NM, Masked

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = [
    (sten.Gradual(2, 11, 3), CSR()), (sten.Gradual(2, 11, 3), BSR((4, 4))),
    (sten.BlockPruneGrow(2, 11, 3), BSR((4, 4))),
    (sten.Transposable(refresh=3), NM(2, 4)), (sten.BiMask(refresh=3), NM(2, 4)), (sten.SRSTE(), NM(2, 4)),
    (sten.RigL(24, every=3), CSR()), (sten.SET(24, every=3), NM(2, 4)),
]  # fmt: skip
every_method = pytest.mark.parametrize("case", METHODS, ids=lambda c: f"{type(c[0]).__name__}-{type(c[1]).__name__}")


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        x = torch.randn(16, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x[:8].argmax()}


class WithLoss(nn.Module):
    """What transformers.Trainer trains: a module that returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels):
        out = self.net(x)
        return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


@every_method
@pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
def test_a_trainer_resumes_a_run(case, tmp_path):
    """A run that is stopped at its checkpoint equals one that is not; the trainer knows nothing of sten's state."""
    transformers = pytest.importorskip("transformers")

    class Attach(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            sten.attach(model, getattr(optimizer, "optimizer", optimizer))

    def go(folder, steps, **resume):
        method, layout = case
        model = sten.sparsify(WithLoss(), layout, method, None if layout.rate else 0.75)
        args = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=8, save_steps=5, save_strategy="steps",
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=1e-2, seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=args, train_dataset=Data(), callbacks=[Attach()])
        trainer.train(**resume)
        return model

    straight = go(tmp_path / "a", 12)
    go(tmp_path / "b", 5)
    resumed = go(tmp_path / "b", 12, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert engine_of(resumed).step == 12 and engine_of(resumed).updates == engine_of(straight).updates
    assert all(map(torch.equal, masks(resumed.net), masks(straight.net)))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@every_method
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
def test_an_earlier_checkpoint_brings_its_mask_and_its_step(case, assign):
    method, layout = case
    model, optimizer, engine = sparse(method, layout, 0.75, "adamw")
    train(model, optimizer, 4)
    saved, want = copy.deepcopy((model.state_dict(), optimizer.state_dict())), loss_of(model, 99).detach()
    train(model, optimizer, 10, first=4)
    end = dense_weights(model)
    model.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
    assert engine.step == 4 and torch.equal(loss_of(model, 99), want)
    if not assign:  # which replaces Parameters, so that torch's own optimizers train the old ones
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, 10, first=4)
        assert all(map(torch.equal, end, dense_weights(model)))


@every_method
@pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
def test_a_state_without_the_run_starts_it_afresh(case):
    """As the warning says: steps, counts, random numbers and, of a dense weight, the mask are those of a new run."""
    method, layout = case
    model, optimizer, engine = sparse(method, layout, 0.75, "sgd")
    other = copy.deepcopy(model)
    start = {name: t for name, t in copy.deepcopy(model.state_dict()).items() if "run_" not in name}
    train(model, optimizer, 9)
    kept = {name: t for name, t in start.items() if not name.endswith("_pattern.mask") and "method_" not in name}
    with pytest.warns(UserWarning, match="its schedule starts afresh"):
        model.load_state_dict(kept, strict=False)
    assert engine.step == engine.updates == 0
    second = OPTIMIZERS["sgd"](other.parameters())
    sten.attach(other, second)
    for a, o in ((model, optimizer), (other, second)):
        train(a, o, 9)
    assert all(map(torch.equal, dense_weights(model), dense_weights(other)))


PRUNED = [CSR(), Masked(), BSR((4, 4))]


@pytest.mark.parametrize("layout", PRUNED, ids=str)
@pytest.mark.parametrize("order", ["load", "sparsify"])
def test_the_zeros_of_a_pruned_checkpoint_stay(layout, order):
    """Under gradual pruning to less than the checkpoint's sparsity, or to more."""
    for sparsity in (0.5, 0.95):
        pruned = mlp()
        with torch.no_grad():
            for i in (0, 2):
                pruned[i].weight.mul_(layout.mask(pruned[i].weight.abs(), 0.75))
        zeros = [pruned[i].weight.detach() == 0 for i in (0, 2)]
        model = mlp() if order == "load" else copy.deepcopy(pruned)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        sten.sparsify(model, layout, sten.Gradual(2, 8, 3), sparsity, optimizer=optimizer)
        if order == "load":
            with pytest.warns(UserWarning, match="its schedule starts afresh"):
                model.load_state_dict(pruned.state_dict(), strict=False)
        torch.testing.assert_close(loss_of(model, 0), loss_of(pruned, 0))
        for step in range(10):
            train(model, optimizer, 1, first=step)
            for w, zero in zip(dense_weights(model), zeros, strict=True):
                assert not w[zero].any()
        density = max(float((w != 0).float().mean()) for w in dense_weights(model))
        assert density <= max(1 - sparsity, 0.25) + 0.01


@pytest.mark.parametrize("order", ["load", "sparsify"])
def test_weights_that_begin_at_zero_are_not_pruned(order):
    """A layer that is initialized with zeros trains."""
    zero = mlp()
    nn.init.zeros_(zero[2].weight)
    model = mlp() if order == "load" else copy.deepcopy(zero)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    sten.sparsify(model, CSR(), sten.Gradual(20, 80, 3), 0.5, optimizer=optimizer)
    if order == "load":
        with pytest.warns(UserWarning, match="its schedule starts afresh"):
            model.load_state_dict(zero.state_dict(), strict=False)
    train(model, optimizer, 3)
    assert dense_weights(model)[1].ne(0).float().mean() > 0.9
