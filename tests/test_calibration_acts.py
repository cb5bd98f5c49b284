"""Calibration: what users do with it, in every form of a weight, and where it runs."""

from __future__ import annotations

import copy

import pytest
import ranks
import torch
from calibration_cases import Blocks, Noted, as_before, blocks, check, dense, same, statistics, vectors
from hf_models import gpt2, llama
from torch import nn
from torch.nn.utils import prune

import sten
from sten.extend import Edit, View

LAYOUTS = [
    sten.Masked(), sten.CSR(), sten.BSR((4, 4)), sten.NM(2, 4), sten.VectorNM(2, 4, 4), sten.GroupedNM(2, 4, 1),
    sten.FanIn(),
]  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def tail() -> nn.Module:
    """With a weight after the blocks."""
    model = blocks()
    model.forward = lambda x: model.last(Blocks.forward(model, x))
    model.last = nn.Linear(8, 8)
    return model


def test_padding_of_torchs_encoder():
    """As without the padding, which its fast path would remove by nested tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2)
    x, mask = torch.randn(6, 5, 16), torch.arange(5).expand(6, 5) < 3
    padded, short = copy.deepcopy(dense), copy.deepcopy(dense)
    forward = padded.forward
    padded.forward = lambda x, attention_mask: forward(x, src_key_padding_mask=~attention_mask)
    sten.sparsify(padded, sten.NM(2, 4), sten.SparseGPT(), calibration=[{"x": x, "attention_mask": mask}])
    sten.sparsify(short, sten.NM(2, 4), sten.SparseGPT(), calibration=[x[:, :3]])
    assert torch.backends.mha.get_fastpath_enabled()
    for a, b in zip(padded.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense(), rtol=1e-4, atol=1e-5)


class Lengths(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(Scaled() for _ in range(3))

    def forward(self, x):
        for i, block in enumerate(self):
            x = block(x, x.shape[1] * (i + 1))
        return x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x, count):
        return x + self.up(x) / count


def test_numbers_that_follow_from_the_batch():
    """Each block gets those of every batch, not the first one's."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 1, 8), torch.randn(4, 30, 8)]
    order = check(nn.Sequential(Lengths()), batches, lambda name: name.split(".")[1])
    assert order == [f"0.{i}.up.weight" for i in range(3)]


# ---- forms


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("method", [sten.Wanda(), sten.SparseGPT()], ids=["wanda", "sparsegpt"])
def test_layouts(layout, method):
    """A calibrated weight is stored as the method decides with the statistics of plain PyTorch."""
    sparsity = None if layout.rate else 0.5
    model, x = blocks(), torch.cat(vectors()) * torch.logspace(-1, 1, 8)
    dense = model.layers[0].up.weight.detach().clone()
    sten.sparsify(model, layout, method, sparsity, calibration=x.split(8))
    stats = {k: v if k == "tokens" else v.float() for k, v in statistics(x.flatten(0, 1)).items()}
    edit = method.update(View("up", dense, layout, sparsity, stats=stats))
    want = (dense if edit.value is None else edit.value) * edit.mask
    got = model.layers[0].up.weight
    assert got.sparse_layout == layout and torch.equal(got.mask(), edit.mask)
    torch.testing.assert_close(got.to_dense(), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_under_an_optimizer(layout):
    """The trainable form of the same numbers, and training moves them in the same pattern."""
    sparsity = None if layout.rate else 0.5
    model, want = blocks(), blocks()
    sten.sparsify(want, layout, sten.SparseGPT(), sparsity, calibration=vectors())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout, sten.SparseGPT(), sparsity, optimizer=optimizer, calibration=vectors())
    before = [block.up.weight.mask() for block in model.layers]
    for block, other in zip(model.layers, want.layers, strict=True):
        assert torch.equal(block.up.weight.to_dense(), other.up.weight.to_dense())
    model(vectors()[0]).square().mean().backward()
    optimizer.step()
    for block, other, mask in zip(model.layers, want.layers, before, strict=True):
        assert torch.equal(block.up.weight.mask(), mask)
        assert not torch.equal(block.up.weight.to_dense(), other.up.weight.to_dense())


def pruned_by_torch(model):
    for block in model.layers:
        prune.l1_unstructured(block.up, "weight", 0.25)
    return model


def in_training(model):
    return sten.sparsify(model, sten.CSR(), sparsity=0.25, optimizer=torch.optim.SGD(model.parameters(), 0.1))


def by_dense_weight(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return sten.sparsify(model, sten.NM(2, 4), sten.SRSTE(), optimizer=optimizer)


@pytest.mark.parametrize("form", [
    lambda m: sten.sparsify(m, sten.CSR(), sparsity=0.25), in_training, by_dense_weight, pruned_by_torch,
], ids=["finalized", "pattern", "dense weight", "torch.nn.utils.prune"])  # fmt: skip
def test_weights_that_are_sparse_already(form):
    """Other forms give what a plain dense weight with the same effective numbers gives."""
    model = form(blocks())
    plain = blocks()
    with torch.no_grad():
        for block, other in zip(plain.layers, model.layers, strict=True):
            for name in ("up", "down"):
                getattr(block, name).weight.copy_(getattr(other, name).weight.to_dense())
    ours, theirs = Noted(), Noted()
    with torch.no_grad():
        torch.testing.assert_close(model(vectors()[0]), plain(vectors()[0]))
    sten.sparsify(model, sten.NM(1, 4), ours, calibration=vectors())
    sten.sparsify(plain, sten.NM(1, 4), theirs, calibration=vectors())
    for name, stats in theirs.seen.items():
        torch.testing.assert_close(ours.seen[name]["x_gram"], stats["x_gram"], rtol=1e-4, atol=1e-5)
    for block, other in zip(model.layers, plain.layers, strict=True):
        torch.testing.assert_close(block.up.weight.to_dense(), other.up.weight.to_dense())


def test_conv1d_is_transposed_and_tied_weights_see_all_their_inputs():
    model, method = gpt2(), Noted()
    sten.sparsify(model, sten.NM(2, 4), method, calibration=[torch.arange(12).view(2, 6)])
    assert method.seen["transformer.h.0.mlp.c_fc.weight"]["x_norm"].shape == (16,)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    x, method = torch.cat(vectors()).flatten(0, 1), Noted()
    with torch.no_grad():
        want = statistics(torch.cat([x, tied[1](tied[0](x))]))
    sten.sparsify(tied, sten.NM(2, 4), method, calibration=vectors())
    torch.testing.assert_close(method.seen["0.weight"]["x_norm"].double(), want["x_norm"], rtol=1e-4, atol=1e-5)


def test_recipe_and_plan():
    recipe = sten.Recipe(sten.NM(2, 4), sten.chain(sten.Wanda(), sten.ADMM(iterations=5)), weights="*.up.weight")
    assert sten.Recipe.from_json(recipe.to_json()) == recipe
    model, before = blocks(), blocks()
    plan = sten.plan(model, recipe, calibration=vectors())
    assert as_before(model, before)
    sten.sparsify(model, recipe, calibration=vectors())
    assert [r for r in plan.rows if not r.why] == [r for r in sten.summary(model).rows if not r.why]


def test_energy_is_of_the_weight_as_it_was():
    model, before = blocks(), blocks()
    sten.sparsify(model, sten.NM(2, 4), sten.SparseGPT(), calibration=vectors())
    w, mask = before.layers[0].up.weight.detach().abs(), model.layers[0].up.weight.mask()
    row = next(row for row in sten.summary(model).rows if row.name == "layers.0.up.weight")
    assert row.energy == pytest.approx(float(w[mask].sum() / w.sum())) and row.energy < 1


@pytest.mark.parametrize("allocation", [sten.ERK(0.7), sten.Global(0.7)], ids=str)
def test_allocations(allocation):
    """Counts of the whole model; Global compares scores in the dense model."""
    model, names = blocks(), {}
    sten.sparsify(model, sten.Masked(), sten.Wanda(), allocation, calibration=vectors())
    with torch.no_grad():
        x, scores = torch.cat(vectors()).flatten(0, 1), {}
        for i, block in enumerate(blocks().layers):
            scores[f"layers.{i}.up.weight"] = block.up.weight.abs() * x.square().mean(0).sqrt()
            h = torch.tanh(block.up(x))
            scores[f"layers.{i}.down.weight"] = block.down.weight.abs() * h.square().mean(0).sqrt()
            x = x + block.down(h)
    names = allocation.assign({name: tuple(s.shape) for name, s in scores.items()}, scores.get)
    for name, count in names.items():
        assert int(model.get_parameter(name).mask().sum()) == count, name


METHODS = (sten.SparseGPT(), sten.SparseSwaps(), sten.ADMM(), sten.LeastSquares(), sten.DSnoT(), sten.Reconstruct())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_global_with_every_method(method):
    """Scores of all weights are compared by the norms of inputs: Gram matrices of all would not fit together."""
    expected, model = blocks(), blocks()
    sten.sparsify(expected, sten.CSR(), sten.Wanda(), sten.Global(0.6), calibration=vectors())
    sten.sparsify(model, sten.CSR(), method, sten.Global(0.6), calibration=vectors())
    for name, w in model.named_parameters():
        if name.endswith("weight"):
            count = expected.get_parameter(name).parts["values"].numel()
            assert w.parts["values"].numel() == pytest.approx(count, abs=9), name


def test_bfloat16():
    model = blocks().bfloat16()
    method = Noted()
    sten.sparsify(model, sten.NM(2, 4), method, calibration=[x.bfloat16() for x in vectors()])
    assert model.layers[0].up.weight.dtype == torch.bfloat16
    want = statistics(torch.cat(vectors()).bfloat16().flatten(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        again = Noted()
        sten.sparsify(blocks(), sten.NM(2, 4), again, calibration=[x.bfloat16().float() for x in vectors()])
    for seen in (method.seen, again.seen):  # autocast would round the products of a Gram matrix
        torch.testing.assert_close(seen["layers.0.up.weight"]["x_gram"].double(), want["x_gram"], rtol=1e-5, atol=1e-5)


@pytest.fixture
def fast_products():
    """Products of float32 in bfloat16 on the CPU, and in TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_float32_under_faster_switches(device, fast_products):
    """Statistics are exact (few CPUs have faster products, GPUs do), and the switches are as they were."""
    model, method = nn.Linear(256, 8).to(device), Noted()
    x = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [switch.fp32_precision for switch in switches]
    sten.sparsify(model, sten.NM(2, 4), method, calibration=[x])
    gram = method.seen["weight"]["x_gram"].double().cpu()
    torch.testing.assert_close(gram, statistics(x)["x_gram"], rtol=1e-5, atol=1e-5)
    assert [switch.fp32_precision for switch in switches] == before == ["tf32", "bf16"]
    assert torch.get_float32_matmul_precision() == "medium"


# ---- experts


class Experts(nn.Module):
    """Two of four experts are called, with the tokens that are for them; without padding in mind."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        for i in (0, 1):
            chosen = (flat[:, 0] > 0) == bool(i)
            out[chosen] = self.experts[i](flat[chosen])
        return out.view_as(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Experts()

    def forward(self, x, mask=None):
        return x + self.mlp(x)


def test_experts():
    """Padding is no token of an expert; those that saw none are named, and decided by magnitude."""
    torch.manual_seed(0)
    model, method = Blocks(), Noted()
    model.layers = nn.ModuleList(Routed() for _ in range(2))
    before = copy.deepcopy(model)
    batches = [{"x": x, "attention_mask": torch.tensor([1, 1, 0, 1]).expand(8, 4)} for x in vectors()]
    with pytest.warns(UserWarning, match=r"few tokens .* layers\.0\.mlp\.experts\.2\.weight \(0\)"):
        sten.sparsify(model, sten.NM(2, 4), method, calibration=batches)
    rows = torch.cat([x[:, [0, 1, 3]] for x in vectors()]).flatten(0, 1)
    for i in (0, 1):
        want = statistics(rows[(rows[:, 0] > 0) == bool(i)])
        for key, value in want.items():
            got = method.seen[f"layers.0.mlp.experts.{i}.weight"][key]
            torch.testing.assert_close(got.double(), value.double(), rtol=1e-4, atol=1e-5)
    weight = before.layers[1].mlp.experts[3].weight.detach()
    mask = sten.NM(2, 4).mask(weight.abs(), None)
    assert torch.equal(model.layers[1].mlp.experts[3].weight.to_dense(), weight * mask)


# ---- whole blocks


class Doubled(Noted):
    """Doubles the remaining weights of each block, after it has compared what it was given."""

    def reconstruct(self, block):
        dense = blocks().layers[int(block.name[-1])]
        self.seen.setdefault("inputs", []).append([args[0] for args, _ in block.inputs])
        for (args, kwargs), target, mask in zip(block.inputs, block.targets, block.token_masks, strict=True):
            assert torch.equal(dense(*args, **kwargs), target) and mask.tolist() == [[True, True, False, True]] * 8
        for name, edit in block.edits.items():
            w = block.module.get_parameter(block.parameters[name])
            assert torch.equal(w, block.views[name].weight * edit.mask)
        return {name: Edit(mask=e.mask, value=2 * block.views[name].weight) for name, e in block.edits.items()}


@pytest.mark.parametrize("true_sequential", [False, True])
def test_reconstruct(true_sequential, tmp_path):
    """A method that changes blocks gets them decided, with the outputs of the dense block on the same inputs; the next
    block gets what the changed one computes."""
    batches = [{"x": x, "attention_mask": torch.tensor([1, 1, 0, 1]).expand(8, 4)} for x in vectors()]
    calibration = sten.Calibration(batches, true_sequential=true_sequential, folder=tmp_path)
    model, method, before = blocks(), Doubled(), blocks()
    sten.sparsify(model, sten.NM(2, 4), method, calibration=calibration)
    inputs = [batch["x"] for batch in batches]
    for block, old, seen in zip(model.layers, before.layers, method.seen["inputs"], strict=True):
        for x, y in zip(inputs, seen, strict=True):
            torch.testing.assert_close(x, y)
        w = block.up.weight
        torch.testing.assert_close(w.to_dense(), 2 * old.up.weight.detach() * w.mask())
        with torch.no_grad():
            inputs = [block(x) for x in inputs]
    again = Doubled()
    assert same(dense(sten.sparsify(blocks(), sten.NM(2, 4), again, calibration=calibration)), dense(model))
    assert not again.seen  # all is in files


# ---- where it runs


def test_offload(tmp_path):
    whole = blocks()
    sten.sparsify(whole, sten.NM(2, 4), Noted(), calibration=vectors())
    for offload in ("cpu", tmp_path):
        model = blocks()
        sten.sparsify(model, sten.NM(2, 4), Noted(), calibration=sten.Calibration(vectors(), offload=offload))
        assert same(dense(model), dense(whole)) and not list(tmp_path.iterdir())


def test_training_mode_and_caches_come_back():
    model = llama(num_hidden_layers=2, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    a = sten.sparsify(copy.deepcopy(model), sten.NM(2, 4), sten.Wanda(), calibration=[torch.arange(12).view(2, 6)])
    b = sten.sparsify(copy.deepcopy(model), sten.NM(2, 4), sten.Wanda(), calibration=[torch.arange(12).view(2, 6)])
    assert [m.training for m in a.modules()] == modes and a.config.use_cache and same(dense(a), dense(b))


def test_compiled_models():
    """Compiled graphs would not see the hooks that measure."""
    whole = dense(sten.sparsify(blocks(), sten.NM(2, 4), sten.Wanda(), calibration=vectors()))
    model = torch.compile(blocks(), backend="eager")
    model(vectors()[0])
    sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=vectors())
    assert same(dense(model._orig_mod), whole)


def test_progress(capfd):
    pytest.importorskip("tqdm")
    sten.sparsify(blocks(), sten.NM(2, 4), sten.Wanda(), calibration=sten.Calibration(vectors(), progress=True))
    assert "3/3" in capfd.readouterr().err
    sten.sparsify(blocks(), sten.NM(2, 4), sten.Wanda(), calibration=vectors())
    assert not capfd.readouterr().err


def test_device_map():
    """Under accelerate's hooks, which move inputs and replace forward."""
    accelerate = pytest.importorskip("accelerate")
    whole = sten.sparsify(
        llama(num_hidden_layers=2), sten.NM(2, 4), sten.Wanda(), calibration=[torch.arange(12).view(2, 6)]
    )
    model = accelerate.dispatch_model(llama(num_hidden_layers=2), {"": "cpu"}, force_hooks=True)
    sten.sparsify(model, sten.NM(2, 4), sten.Wanda(), calibration=[torch.arange(12).view(2, 6)])
    assert same(dense(model), dense(whole))


def _rank(rank: int, folder: str):
    model, method = blocks(), Noted()
    calibration = sten.Calibration(vectors()[: 1 + 2 * rank][-1 - rank :], folder=folder)
    sten.sparsify(model, sten.NM(2, 4), method, calibration=calibration)
    again = Noted()
    assert same(dense(sten.sparsify(blocks(), sten.NM(2, 4), again, calibration=calibration)), dense(model))
    assert not again.seen  # all is in files, of each rank
    stats = {name: {k: v.numpy() for k, v in found.items()} for name, found in method.seen.items()}
    return stats, {name: w.numpy() for name, w in dense(model).items()}


def test_ranks(tmp_path):
    """Statistics are those of all ranks' batches together, and all ranks decide the same."""
    found = ranks.results(_rank, tmp_path, str(tmp_path / "decided"))
    model, method = blocks(), Noted()
    sten.sparsify(model, sten.NM(2, 4), method, calibration=vectors()[:3])
    for stats, weights in found:
        for name, want in method.seen.items():
            for key, value in want.items():
                torch.testing.assert_close(torch.tensor(stats[name][key]), value, rtol=1e-4, atol=1e-5)
        assert same({k: torch.tensor(v) for k, v in weights.items()}, dense(model))


@pytest.mark.parametrize("device", ["cpu:0", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("make", [blocks, lambda: llama(num_hidden_layers=2), tail], ids=["blocks", "llama", "tail"])
def test_device(make, device):
    """Each block runs on copies on the device; the model stays where it is."""
    batches = vectors() if isinstance(make(), Blocks) else [torch.arange(12).view(2, 6)]
    model, whole, ours, theirs = make(), make(), Noted(), Noted()
    pointers = [p.data_ptr() for p in model.parameters()]
    devices = []
    block = model.layers[1] if isinstance(model, Blocks) else model.model.layers[1]
    block.register_forward_hook(lambda m, args, output: devices.append(next(m.parameters()).device))
    sten.plan(model, sten.NM(2, 4), ours, calibration=sten.Calibration(batches, device=device))
    sten.sparsify(whole, sten.NM(2, 4), theirs, calibration=batches)
    assert [p.data_ptr() for p in model.parameters()] == pointers and {p.device.type for p in model.parameters()} == {
        "cpu"
    }
    assert {d.type for d in devices} == {torch.device(device).type}
    for name, stats in theirs.seen.items():
        for key, value in stats.items():
            got = ours.seen[name][key].cpu()
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-4 * value.abs().max().item())
