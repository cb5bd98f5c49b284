"""Sites under Hugging Face's Trainer, in DDP, and in the methods that are built of them."""

import copy

import hf_models
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
    sten.sparsify(model, sten.CSR(), sten.TopK(5), site="grad_output", modules="2")
    sten.sparsify(model, site="grad_weight", sparsifier=sten.TopK(3))
    return model


def batch_of(rank):
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(rank))


def gradients(rank):
    """Of two calls, under DDP, and under FSDP2 of the whole model and of each layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, found = init_device_mesh("cpu", (2,)), {}
    for kind in ("ddp", "fsdp", "fsdp of layers"):
        model = model_of_ranks()
        for layer in (model[0], model[2]) if kind == "fsdp of layers" else ():
            fully_shard(layer, mesh=mesh)
        wrapped = DistributedDataParallel(model) if kind == "ddp" else fully_shard(model, mesh=mesh)
        for step in range(2):
            wrapped(batch_of(rank + 2 * step)).square().sum().backward()
        grads = [p.grad if kind == "ddp" else p.grad.full_tensor() for p in model.parameters()]
        found[kind] = [g.numpy() for g in grads]
    return found


def test_under_ddp_and_fsdp(tmp_path):
    """Each rank sparsifies what it computes; the mean of the gradients is that of the ranks, one after another."""
    found = results(gradients, tmp_path)
    each = []
    for rank in range(2):
        model = model_of_ranks()
        for step in range(2):
            model(batch_of(rank + 2 * step)).square().sum().backward()
        each.append([p.grad for p in model.parameters()])
    for kind in found[0]:
        for a, b, *own in zip(found[0][kind], found[1][kind], *each, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), (own[0] + own[1]) / 2)
            torch.testing.assert_close(torch.from_numpy(b), torch.from_numpy(a))


def llama():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return hf_models.llama(intermediate_size=32, num_key_value_heads=2).train()


def test_under_trainer(tmp_path):
    """The losses of a loop of one's own; learned thresholds train, and are in the checkpoint."""
    transformers, model = pytest.importorskip("transformers"), llama()
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


LEARNED = sten.Recipe(None, sten.JumpReLU(0.05, 0.5), site="output", modules="*.up_proj")
RUNS = {
    "sites of the model": (None, sten.Recipe(sten.FanIn(), sten.TopK(0.5, straight_through=True), site="input")),
    "sites and a method for weights": (sten.Recipe(sten.Masked(), sten.RigL(8, every=2), 0.5), LEARNED),
    "a recipe for sites": (LEARNED, sten.Recipe(None, sten.MVUE24(dim=0), site="grad_output")),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", RUNS)
def test_a_trainer_resumes_bit_for_bit(case, tmp_path):
    """From the checkpoint in the middle of a run, by another Trainer over a new model with the same sites."""
    transformers, (recipe, first) = pytest.importorskip("transformers"), RUNS[case]
    from sten.integrations.transformers import SparsityCallback

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (16, 6))]

    def trainer():
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, per_device_train_batch_size=2, save_steps=3, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, seed=0,
        )  # fmt: skip
        model = sten.sparsify(llama(), first)
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=data, callbacks=[SparsityCallback(recipe)] if recipe else []
        )

    one, other = trainer(), trainer()
    one.train()
    want = {name: t.clone() for name, t in one.model.state_dict().items()}
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert list(map(str, sten.summary(one.model).sites)) == list(map(str, sten.summary(other.model).sites))
    assert len(sten.summary(one.model).sites) == {"sites of the model": 7, "a recipe for sites": 8}.get(case, 1)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    folder = type(one.model).from_pretrained(tmp_path / "checkpoint-6")
    ids = data[0]["input_ids"][None]
    torch.testing.assert_close(folder.eval()(ids).logits, one.model.eval()(ids).logits, rtol=1e-6, atol=1e-6)


def test_save_state_of_accelerate(tmp_path):
    """Model, thresholds and optimizer, saved and loaded by accelerate; training goes on bit for bit."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = model_of_ranks()
    sten.sparsify(model, site="output", sparsifier=sten.BatchTopK(3), modules="2")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))

    def step():
        accelerator.backward(model(batch_of(3)).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(str(tmp_path))
    step()
    want = {name: t.clone() for name, t in model.state_dict().items()}
    assert {"0.sparse_output_log_threshold", "2.sparse_output_threshold"} <= want.keys()
    step()
    accelerator.load_state(str(tmp_path))
    step()
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())
    accelerator.free_memory()


# beside what else sten does to a model


@pytest.mark.parametrize("layout", [sten.FanIn(), sten.CSR()], ids=str)
def test_calibrated_pruning_sees_what_a_site_leaves(layout):
    """Wanda and SparseGPT of a model with sparse inputs choose as with zeros in dense ones, without a warning."""
    batches = [torch.randn(20, 16)]
    for method in (sten.Wanda(), sten.SparseGPT()):
        made = []
        for each in (layout, None):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
            sten.sparsify(model, each, sten.TopK(4), site="output", modules="1")
            sten.sparsify(model, each, sten.TopK(3), site="input")
            sten.sparsify(model, sten.NM(2, 4), method, calibration=batches)
            made.append(model)
        for i in (0, 2):
            torch.testing.assert_close(made[0][i].weight.to_dense(), made[1][i].weight.to_dense())
    dense = [torch.relu(made[1][0](by_hand(batches[0], 3)))]
    sten.densify(made[0])
    sten.sparsify(made[0], layout, sten.TopK(3), site="input", modules="0")
    sten.sparsify(made[0], layout, sten.TopK(32), site="output", modules="1")
    sten.sparsify(made[0], site="input", sparsifier=sten.Threshold(sparsity=0.75), modules="2", calibration=batches)
    assert float((dense[0].abs() <= made[0][2].sparse_input_threshold).float().mean()) == pytest.approx(0.75, abs=0.01)


def test_what_sites_do_not_go_with():
    import torch.distributed as dist
    from torch.distributed.tensor.parallel import ColwiseParallel

    model = sten.sparsify(model_of_ranks()[:1], site="output", sparsifier=None, modules="0")
    sten.sparsify(model, site="grad_weight", sparsifier=None)
    sten.sparsify(model, sten.NM(2, 4))
    keys = list(model.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="Expected modules without sites to be divided, got 0 with some"):
            sten.parallelize_module(model, dist.init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    finally:
        dist.destroy_process_group()
    assert isinstance(model[0].weight, sten.SparseTensor) and list(model.state_dict()) == keys
    with pytest.raises(ValueError, match=r"Expected a Recipe for weights for sten\.permute, got one for site='output'"):
        sten.permute(model_of_ranks(), LEARNED)
    with pytest.raises(ValueError, match=r"Expected a model without sites, got one with .*; call sten\.permute before"):
        sten.permute(model_of_ranks(), sten.NM(2, 4))
