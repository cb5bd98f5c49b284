"""sten.distill and its losses: right values come from dense PyTorch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from hf_models import bert, gpt2, llama
from small import batch, every_layout, mlp, rate
from torch import nn
from torch.nn import functional as F
from weights import one_sentence

import sten
from sten.training import distill as losses

IDS = torch.randint(32, (3, 8), generator=torch.Generator().manual_seed(0))
PADDED = torch.arange(8) < torch.tensor([[8], [5], [3]])


def pruned(model: nn.Module, layout=None, **more) -> nn.Module:
    return sten.sparsify(copy.deepcopy(model), layout or sten.NM(1, 4), **more)


def dense_numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in sten.densify(copy.deepcopy(model)).named_parameters()}


def is_finalized(model: nn.Module) -> bool:
    return isinstance(model[0]._parameters["weight"], sten.SparseTensor)


def divergence(student, teacher, known, temperature=1.0):
    """T^2 KL(teacher || student) over the known positions, by its formula."""
    p, q = ((t[known].double() / temperature).softmax(-1) for t in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


# ---- losses


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_in_chunks_is_its_formula(monkeypatch, chunk, temperature):
    monkeypatch.setattr(losses, "CHUNK", chunk * 11)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 11)
    known = torch.rand(2, 5) < 0.7
    teacher[~known] = torch.nan  # what padding may hold
    got = losses.kl_divergence(student, teacher, known, temperature)
    want = divergence(student, teacher, known, temperature)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_distill_loss_takes_a_temperature():
    logits, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    target = torch.tensor([0, -100, 2, 4])
    want = 0.4 * divergence(logits, teacher, target != -100, 3.0) + 0.6 * F.cross_entropy(logits, target)
    torch.testing.assert_close(sten.distill_loss(logits, target, teacher, 0.4, temperature=3.0), want)


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_padding_and_ignored_labels_do_not_count(make):
    """The label of a position of a language model is that of the next one; of a masked one, its own."""
    teacher = make().double()
    student = pruned(teacher)
    labels = IDS.masked_fill(~PADDED, -100)
    labels[0, :4] = -100
    inputs = {"input_ids": IDS, "attention_mask": PADDED.long(), "labels": labels}
    got = sten.Distillation(student, teacher, temperature=2.0)(inputs)
    known = labels != -100
    if make is not bert:
        known = torch.cat([known[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], 1) & PADDED
    with torch.no_grad():
        ours, theirs = (model(IDS, attention_mask=PADDED.long()).logits for model in (student, teacher))
    torch.testing.assert_close(got.detach(), divergence(ours, theirs, known, 2.0))


def test_the_padding_of_an_encoder_is_not_that_of_its_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    teacher = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, dropout_rate=0.0, **sizes)).double().eval()
    student, labels = pruned(teacher), IDS.roll(1, 0).masked_fill(IDS < 4, -100)
    inputs = {"input_ids": IDS, "attention_mask": PADDED.long(), "labels": labels}
    got = sten.Distillation(student, teacher)(inputs)
    with torch.no_grad():
        ours, theirs = (model(**inputs).logits for model in (student, teacher))
    torch.testing.assert_close(got.detach(), divergence(ours, theirs, labels != -100))


def test_the_terms_of_an_encoder():
    """Embedding and features, by their formulas on the hidden states that the model itself returns."""
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    teacher = BertModel(BertConfig(num_attention_heads=2, max_position_embeddings=16, **sizes)).double().eval()
    student = pruned(teacher)
    inputs = {"input_ids": IDS, "attention_mask": PADDED.long()}
    got = sten.Distillation(student, teacher, embedding=0.5, features=0.25)(inputs).detach()
    with torch.no_grad():
        ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    errors = [((y - z).square().sum(-1) / z.square().sum(-1))[PADDED].mean() for y, z in zip(ours, theirs, strict=True)]
    weight = PADDED[..., None].double()
    y, z = ((t[-1] * weight).sum(1) / weight.sum(1) for t in (ours, theirs))
    cosine = (F.normalize(y, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()
    torch.testing.assert_close(got, 0.5 * (errors[-1] + 1 - cosine) + 0.25 * sum(errors) / 3)


def test_a_wrapped_student_has_the_same_loss(tmp_path):
    teacher = llama(num_hidden_layers=2)
    student = sten.trainable(pruned(teacher))
    inputs = {"input_ids": IDS, "labels": IDS.masked_fill(IDS < 9, -100)}
    want = sten.Distillation(student, teacher, features=1.0)(inputs)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(student)
        assert torch.equal(sten.Distillation(wrapped, teacher, features=1.0)(inputs), want)
    finally:
        dist.destroy_process_group()


def test_the_teacher_runs_without_dropout_and_the_student_as_it_is():
    teacher = nn.Sequential(mlp(), nn.Dropout(0.5)).train()
    student = pruned(teacher)
    loss = sten.Distillation(student, teacher)
    assert not torch.equal(loss(batch(0)), loss(batch(0))) and student.training
    student.eval()
    assert torch.equal(loss(batch(0)), loss(batch(0)))


def test_task_is_the_loss_of_the_student():
    teacher = llama()
    student = pruned(teacher)
    got = sten.Distillation(student, teacher, kl=0, task=2.0)({"input_ids": IDS, "labels": IDS})
    torch.testing.assert_close(got, 2 * student(IDS, labels=IDS).loss)


# ---- training


def reference(student: nn.Module, teacher: nn.Module, steps: int, lr: float) -> dict[str, torch.Tensor]:
    """The same training of dense weights by hand: AdamW, gradients masked, gradients clipped to 1."""
    masks = {name: p.mask() for name, p in student.named_parameters() if isinstance(p, sten.SparseTensor)}
    model = sten.densify(copy.deepcopy(student))
    optimizer, rise = torch.optim.AdamW(model.parameters(), lr, weight_decay=0), max(1, steps // 10)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / rise, (steps - step) / (steps - rise + 1))
        x = batch(step % 2).double()
        optimizer.zero_grad()
        logits, taught = model(x), teacher(x).detach()
        divergence(logits, taught, torch.ones(len(x), dtype=torch.bool), 2.0).backward()
        for name, p in model.named_parameters():
            p.grad.mul_(masks.get(name, 1))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    return dict(model.named_parameters())


@every_layout
def test_distill_is_training_by_hand_in_float64(layout):
    teacher = mlp().double()
    student = pruned(teacher, layout, sparsity=rate(layout))
    masks = {name: student.get_parameter(name).mask() for name in ("0.weight", "2.weight")}
    want = reference(student, teacher, 12, 1e-2)
    batches = [batch(0).double(), batch(1).double()]
    given = sten.distill(student, teacher, batches, steps=12, lr=1e-2, temperature=2.0, max_grad_norm=0.01)
    assert given is student and is_finalized(student)
    for name, mask in masks.items():
        assert torch.equal(student.get_parameter(name).mask(), mask)
    for name, got in dense_numbers(student).items():
        torch.testing.assert_close(got, want[name].detach(), rtol=1e-9, atol=1e-9)


@every_layout
def test_it_trains_in_half_precision(layout):
    """Steps that are smaller than what bfloat16 can add to a weight are not lost."""
    teacher = mlp().bfloat16()
    student, seen = pruned(teacher, layout, sparsity=rate(layout)), []
    batches = [batch(0).bfloat16()]
    sten.distill(student, teacher, batches, steps=60, lr=5e-4, callback=lambda step, loss: seen.append(loss))
    assert [len(seen), student[0].weight.dtype] == [60, torch.bfloat16]
    assert seen[-1] < 0.9 * seen[0]


def test_frozen_parameters_stay():
    teacher = llama(num_hidden_layers=2)
    student = pruned(teacher)
    for name, p in student.named_parameters():
        p.requires_grad_("mlp" in name and "layers.1" in name)
    before = dense_numbers(student)
    sten.distill(student, teacher, [IDS], steps=3)
    for name, after in dense_numbers(student).items():
        moved = "mlp" in name and "layers.1" in name
        assert torch.equal(after, before[name]) != moved, name


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_the_loss_of_models_of_transformers_falls(make):
    teacher = make()
    student = pruned(teacher)
    loss = sten.Distillation(student, teacher)
    inputs = {"input_ids": IDS, "attention_mask": PADDED.long()}
    before = float(loss(inputs).detach())
    sten.distill(student, teacher, [inputs], steps=25, lr=3e-3)
    assert float(loss(inputs).detach()) < 0.5 * before


def test_weights_in_training_stay_in_training():
    teacher = mlp()
    student = sten.trainable(pruned(teacher))
    sten.distill(student, teacher, [batch(0)])
    assert student[0]._parameters["weight"].shape == (20, 3) and "weight_pattern.index" in student[0].state_dict()


def test_a_method_goes_on_under_its_own_optimizer():
    teacher, student = mlp(), mlp()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    sten.sparsify(student, sten.CSR(), sten.RigL(total_steps=20, every=2), 0.5, optimizer=optimizer)
    pattern = student[0].weight.mask().clone()
    with pytest.raises(ValueError, match=r"Expected optimizer= for a student that RigL\(.* trains, got None") as error:
        sten.distill(student, teacher, [batch(0)])
    assert one_sentence(error) and torch.equal(student[0].weight.mask(), pattern)
    sten.distill(student, teacher, [batch(0)], optimizer, steps=8)
    assert student[0].weight_pattern.engine.step == 8 and not torch.equal(student[0].weight.mask(), pattern)


def test_an_optimizer_that_is_given_goes_on():
    """Made from finalized parameters: two calls are one, its state follows the weights there and back."""
    teacher, runs = mlp(), []
    for calls in ([6], [2, 4]):
        student, done = pruned(teacher), 0
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        for steps in calls:
            sten.distill(student, teacher, [batch(done + i) for i in range(steps)], optimizer)
            assert is_finalized(student)
            done += steps
        runs.append(dense_numbers(student))
    for name, whole in runs[0].items():
        torch.testing.assert_close(runs[1][name], whole, rtol=1e-6, atol=1e-7)


def test_frozen_weights_come_back_finalized_under_an_optimizer_of_ones_own():
    teacher, student = mlp(), pruned(mlp())
    student[2].weight.requires_grad_(False)
    before = dense_numbers(student)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], 0.1)
    sten.distill(student, teacher, [batch(0) + 1], optimizer, steps=2)
    assert all(isinstance(student[i]._parameters["weight"], sten.SparseTensor) for i in (0, 2))
    assert torch.equal(dense_numbers(student)["2.weight"], before["2.weight"])
    assert not torch.equal(dense_numbers(student)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("method", [sten.STE(), sten.SRigL(20, every=2), sten.Gradual(1, 6, every=2)], ids=str)
def test_with_methods_of_each_kind(method):
    """Without state, with parameters that change their shape, with a dense weight."""
    teacher, student, seen = mlp(), mlp(), []
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    layout, sparsity = {"STE": (sten.NM(2, 4), None), "SRigL": (sten.FanIn(), 0.5)}.get(
        type(method).__name__, (sten.CSR(), 0.5)
    )
    sten.sparsify(student, layout, method, sparsity, optimizer=optimizer)
    with torch.no_grad():
        student[2].bias.normal_()
    note = lambda step, loss: seen.append(loss)  # noqa: E731
    sten.distill(student, teacher, [batch(0), batch(1)], optimizer, steps=12, callback=note)
    assert seen[-1] < seen[0] and "weight_pattern" in student[0]._modules


def test_recurrent_layers_train_as_they_are():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    teacher = Tagger()
    student, x, seen = pruned(teacher, sten.CSR(), sparsity=0.5, weights=["*weight*"]), torch.randn(3, 5, 8), []
    masks = {name: p.mask() for name, p in student.named_parameters() if isinstance(p, sten.SparseTensor)}
    sten.distill(student, teacher, [x], steps=10, lr=1e-2, callback=lambda step, loss: seen.append(loss))
    assert len(masks) == 3 and seen[-1] < 0.9 * seen[0]
    assert all(torch.equal(student.get_parameter(name).mask(), mask) for name, mask in masks.items())


def test_a_loop_of_ones_own_resumes(tmp_path):
    teacher, results = mlp(), []
    for killed in (False, True):
        student = sten.trainable(pruned(teacher))
        optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
        for step in range(6):
            if killed and step == 3:
                sten.save_run(student, tmp_path / "run.pt", optimizer, step=step)
                student = sten.trainable(pruned(teacher))
                optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
                assert sten.load_run(student, tmp_path / "run.pt", optimizer) == {"step": 3}
            optimizer.zero_grad()
            sten.Distillation(student, teacher)(batch(step)).backward()
            optimizer.step()
        results.append(dense_numbers(student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_an_interrupted_run_leaves_a_finalized_model():
    def interrupt(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    teacher = mlp()
    student = pruned(teacher)
    before = dense_numbers(student)
    with pytest.raises(KeyboardInterrupt):
        sten.distill(student, teacher, [batch(0)], steps=9, callback=interrupt)
    assert is_finalized(student) and not torch.equal(dense_numbers(student)["0.weight"], before["0.weight"])


# ---- what is refused

BATCHES = [torch.randn(4, 12)]
REFUSED = {
    "one model": (lambda s, t: sten.distill(s, s, BATCHES), r"a teacher beside the student"),
    "a dense student": (lambda s, t: sten.distill(t, s, BATCHES), r"a student with sparse weights, got none"),
    "no batches": (lambda s, t: sten.distill(s, t, []), r"batches to train with, got none"),
    "a tensor": (lambda s, t: sten.distill(s, t, BATCHES[0]), r"batches in a list, .* got Tensor"),
    "no steps": (lambda s, t: sten.distill(s, t, BATCHES, steps=0), r"a positive number of steps or None, got 0"),
    "no term": (lambda s, t: sten.distill(s, t, BATCHES, kl=0, embedding=0), r"weights of terms >= 0, not all 0"),
    "temperature": (lambda s, t: sten.distill(s, t, BATCHES, temperature=0), r"a positive temperature, got"),
    "no blocks": (lambda s, t: sten.distill(s, t, BATCHES, features=1), r"equally many blocks .* got 0 and 0"),
    "a function": (lambda s, t: sten.distill(s, t.forward, BATCHES, features=1), r"a teacher that is an nn\.Module"),
    "another shape": (lambda s, t: sten.distill(s, t[:2], BATCHES), r"of shape \(4, 8\), the student's, got \(4, 20\)"),
    "outputs": (lambda s, t: sten.distill(s, lambda x: (x,), BATCHES), r"logits or last_hidden_state, got Tensor of"),
    "no loss": (lambda s, t: sten.distill(s, t, BATCHES, task=1), r"outputs to have a loss for task=, got none"),
    "frozen": (lambda s, t: sten.distill(s.requires_grad_(False), t, BATCHES), r"parameters that require a gradient"),
    "not finite": (lambda s, t: sten.distill(s, t, [BATCHES[0] * torch.nan]), r"finite gradients, got a norm of nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_with_nothing_changed(case):
    call, words = REFUSED[case]
    teacher = mlp()
    student = pruned(teacher)
    before = dense_numbers(student)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^Expected .*{words}") as error:
        call(student, teacher)
    assert one_sentence(error) and is_finalized(student)
    assert all(torch.equal(t, before[name]) for name, t in dense_numbers(student).items())


def test_batches_that_end_too_early():
    teacher = mlp()
    with pytest.raises(ValueError, match=r"^Expected batches for 5 steps, got 2 from what can be read only once"):
        sten.distill(pruned(teacher), teacher, (batch(i) for i in range(2)), steps=5)


def test_a_teacher_that_is_a_function():
    teacher, student = mlp(), pruned(mlp())
    runs = [sten.distill(copy.deepcopy(student), how, [batch(0)], steps=3) for how in (teacher, lambda x: teacher(x))]
    assert all(torch.equal(a, b) for a, b in zip(*(dense_numbers(m).values() for m in runs), strict=True))


def test_a_teacher_that_the_student_would_train_is_refused():
    """A shallow copy shares every parameter that stays dense; frozen ones may be shared."""
    teacher = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    student = sten.sparsify(
        nn.Sequential(copy.deepcopy(teacher[0]), teacher[1], teacher[2]), sten.NM(2, 4), weights="0"
    )
    with pytest.raises(ValueError, match=r"parameters of its own, got 2\.weight, which the student trains"):
        sten.distill(student, teacher, [torch.randn(16, 8)])
    teacher[2].requires_grad_(False)
    before = teacher[2].weight.clone()
    sten.distill(student, teacher, [torch.randn(16, 8)], steps=3, lr=1e-2)
    assert torch.equal(teacher[2].weight, before)
