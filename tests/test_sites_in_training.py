"""Sites under Hugging Face's Trainer, in DDP, and in the methods that are built of them."""

import copy

import pytest
import torch
from ranks import results
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sten

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(x, k):
    return x * torch.zeros_like(x).scatter(-1, x.abs().topk(k).indices, 1.0)


def model_of_ranks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    sten.sparsify(model, sten.FanIn(), sten.TopK(4, straight_through=True), site="input")
    sten.sparsify(model, site="output", sparsifier=sten.JumpReLU(0.2, 0.5), modules="0")
    sten.sparsify(model, site="grad_weight", sparsifier=sten.TopK(3))
    return model


def batch_of(rank):
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(rank))


def gradients(rank):
    model = model_of_ranks()
    wrapped = DistributedDataParallel(model)
    wrapped(batch_of(rank)).square().sum().backward()
    return [p.grad.numpy() for p in model.parameters()]


def test_under_ddp(tmp_path):
    """Each rank sparsifies what it computes; the mean of the gradients is that of the ranks, one after another."""
    found = results(gradients, tmp_path)
    each = []
    for rank in range(2):
        model = model_of_ranks()
        model(batch_of(rank)).square().sum().backward()
        each.append([p.grad for p in model.parameters()])
    for a, b, *own in zip(*found, *each, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), (own[0] + own[1]) / 2)
        torch.testing.assert_close(torch.from_numpy(b), torch.from_numpy(a))


def test_under_trainer(tmp_path):
    """The losses of a loop of one's own; learned thresholds train, and are in the checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    sten.sparsify(model, sten.FanIn(), sten.TopK(0.5, straight_through=True), site="input")
    sten.sparsify(model, site="output", sparsifier=sten.JumpReLU(0.05, 0.5), modules="*.up_proj")
    assert len(sten.summary(model).sites) == 7 + 1  # not the output layer
    twin = copy.deepcopy(model)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (8, 6))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, save_steps=4, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    order = [batch["input_ids"] for batch in trainer.get_train_dataloader()]
    trainer.train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for ids in order:
        loss = twin(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    name = "model.layers.0.mlp.up_proj.sparse_output_log_threshold"
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=2e-3)
    load_file = pytest.importorskip("safetensors.torch").load_file
    state = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    torch.testing.assert_close(state[name], model.get_parameter(name).detach())
    assert bool((state[name] != torch.tensor(0.05).log()).any())
