"""permute: the same outputs, never less kept, and reasons for what stays."""

from __future__ import annotations

import copy
import itertools
import signal

import pytest
import ranks
import torch
from cases import SMALL
from permuted import hugging_face, mlp, resnet, uneven
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sten
from sten._torch_private import tree_leaves

MODELS = {"mlp": mlp, "resnet": resnet}
LAYOUTS = [sten.VectorNM(2, 4, 8), sten.BSR((4, 4)), sten.GroupedNM(2, 4, 1), sten.NM(2, 4)]
# what must have moved: at least these, by the end of the name, with rows and columns
MOVED = {
    "llama": ("gate_proj rows", "up_proj rows", "down_proj columns", "v_proj rows", "o_proj columns"),
    "qwen2": ("gate_proj rows", "up_proj rows", "down_proj columns", "v_proj rows", "o_proj columns"),
    "gpt2": ("mlp.c_fc rows", "mlp.c_proj columns", "attn.c_attn rows", "attn.c_proj columns"),
    "bert": ("intermediate.dense rows", "output.dense columns", "value rows"),
    "vit": ("fc1 rows", "fc2 columns", "v_proj rows", "o_proj columns"),
    "mlp": ("0 rows", "3 columns", "3 rows", "5 columns"),
    "resnet": ("block.0 rows", "block.6 columns", "stem rows", "last rows", "head columns"),
}


def model_and_example(kind):
    if kind not in MODELS:
        pytest.importorskip("transformers")
        return hugging_face(kind)
    return MODELS[kind]()


def outputs(model, example):
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def settings(layout, kind):
    weights = ["stem", "block.0", "block.6", "last", "head"] if kind == "resnet" else None
    return {"layout": layout, "sparsity": None if layout.rate else 0.5, "weights": weights}


class Squares(sten.extend.PatternMethod):
    def score(self, view):
        return view.weight.square()


def kept(model, layout, **more):
    """Of each weight, the share of w^2 that sparsify keeps."""
    sparse = sten.sparsify(copy.deepcopy(model), layout, Squares(), **more).requires_grad_(False)
    dense = {name: p.detach() for name, p in model.named_parameters()}
    return {
        name: float((w.to_dense().double() ** 2).sum() / (dense[name].double() ** 2).sum())
        for name, w in sparse.named_parameters()
        if isinstance(w, sten.SparseTensor)
    }


@pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty")
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", MOVED)
def test_the_same_outputs_and_more_kept(kind, layout):
    model, example = model_and_example(kind)
    before, dense = outputs(model, example), copy.deepcopy(model.state_dict())
    old = kept(model, **settings(layout, kind))
    report = sten.permute(model, example=example, **settings(layout, kind))
    for a, b in zip(before, outputs(model, example), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    new = kept(model, **settings(layout, kind))
    assert all(row.kept_after >= row.kept_before for row in report.rows)
    assert sum(row.kept_after - row.kept_before for row in report.rows) > 0 and sum(new.values()) > sum(old.values())
    for row in report.rows:
        if layout.rate or row.rows.startswith("stay"):  # others are weighted: tests/test_permute_worth.py
            assert (row.kept_before, row.kept_after) == pytest.approx((old[row.name], new[row.name]), abs=1e-5)
    assert any(not torch.equal(dense[name], p) for name, p in model.state_dict().items())
    if layout == LAYOUTS[1]:  # blocks: rows and columns alike matter
        moved = [f"{row.name.removesuffix('.weight')} {d}" for row in report.rows for d in ("rows", "columns")
                 if getattr(row, d) == "permuted"]  # fmt: skip
        assert all(any(name.endswith(expected) for name in moved) for expected in MOVED[kind]), moved


@pytest.mark.parametrize("layout", SMALL, ids=str)
def test_every_layout_keeps_no_less(layout):
    model, x = mlp()
    y = model(x).detach()
    report = sten.permute(model, layout, None if layout.rate else 0.5)
    torch.testing.assert_close(model(x), y)
    assert all(row.kept_after >= row.kept_before for row in report.rows)
    if layout.unstructured:
        assert {row.columns for row in report.rows[1:]} == {"no better order"}


def test_exchanges_find_the_best_order():
    """4 columns in 2 groups of 2, of which each keeps the larger entry: by exhaustion the pairs (0, 2) and (1, 3)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[9.0, 8, 1, 2], [7, 9, 2, 1]]))
    report = sten.permute(model, sten.NM(1, 2), weights="2")
    [row] = report.rows
    scores = torch.tensor([[81.0, 64, 1, 4], [49, 81, 4, 1]])
    best = max(scores[:, list(order)].view(2, 2, 2).amax(-1).sum() for order in itertools.permutations(range(4)))
    assert row.kept_after == pytest.approx(float(best / scores.sum())) and row.kept_after > row.kept_before


def test_calibration():
    """Scores count inputs, and the errors of outputs are those of the layer, by hand."""
    model, _ = mlp()
    batches = [torch.randn(40, 12) * torch.linspace(0, 3, 12) for _ in range(3)]
    before = model[3].weight.detach().clone()
    report = sten.permute(model, sten.VectorNM(1, 4, 4), calibration=batches, weights="3")
    [row] = report.rows
    assert row.error_after < row.error_before and row.kept_after > row.kept_before
    all_x = mlp()[0][:3](torch.cat(batches)).detach()
    score = before.square() * all_x.square().mean(0)
    mask = sten.VectorNM(1, 4, 4).mask(score)
    assert row.kept_before == pytest.approx(float(score[mask].sum() / score.sum()), rel=1e-4)
    error = float((all_x @ (before * ~mask).T).norm() / (all_x @ before.T).norm())
    assert row.error_before == pytest.approx(error, rel=1e-3)


def test_reasons():
    pytest.importorskip("transformers")
    model, example = hugging_face("llama")
    rows = {row.name: row for row in sten.permute(model, sten.BSR((4, 4)), 0.5, example=example).rows}
    layer = "layers.0.self_attn."
    assert "attention scores" in rows[layer + "q_proj.weight"].rows
    assert "residual" in rows[layer + "o_proj.weight"].rows and "residual" in rows[layer + "q_proj.weight"].columns


class Reversed(nn.Module):
    """What it reads it reads twice, once in another order."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.a(x)
        return self.b((h * h.flip(-1)).cumsum(-1))


class Shared(nn.Module):
    def __init__(self, outside=False):
        super().__init__()
        self.a, self.b, self.c, self.outside = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4), outside

    def forward(self, x):
        h = self.b(self.b(self.a(x)).relu()).relu()
        return self.c(h) + (self.c.weight.sum(0) * x.sum() * torch.arange(16)).sum() * self.outside


@pytest.mark.parametrize("module", [Reversed(), Shared(), Shared(outside=True)], ids=["flip", "shared", "outside"])
def test_what_is_not_free_stays_exact(module):
    model, x = uneven(module).eval(), torch.randn(4, 8)
    y = model(x).detach()
    sten.permute(model, sten.NM(2, 4), example=x)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_refusals_change_nothing():
    model, x = mlp()
    state = copy.deepcopy(model.state_dict())
    for bad, words in (
        ({"calibration": []}, "batches"),
        ({"example": torch.ones(2, 3)}, "example="),
        ({"calibration": [torch.full((2, 12), float("nan"))]}, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            sten.permute(model, sten.NM(2, 4), **bad)
    random = nn.Sequential(*copy.deepcopy(model), Noise())
    with pytest.raises(ValueError, match="not deterministic"):
        sten.permute(random, sten.NM(2, 4), example=x)
    for (name, a), b in zip(state.items(), random.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="dense model"):
        sten.permute(sten.sparsify(model, sten.NM(2, 4)), sten.NM(2, 4))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(x.shape)


def test_modes_dtypes_and_no_weight_left():
    model, x = mlp()
    model.train().bfloat16()
    y = model(x.bfloat16()).detach()
    sten.permute(model, sten.VectorNM(2, 4, 4))
    assert model.training and all(module.training for module in model.modules())
    torch.testing.assert_close(model(x.bfloat16()), y, rtol=0.05, atol=0.05 * float(y.abs().max()))
    assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.requires_grad


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_an_example_is_found(kind):
    pytest.importorskip("transformers")
    model, example = hugging_face(kind)
    before = outputs(model, example)
    report = sten.permute(model, sten.NM(2, 4))
    for a, b in zip(before, outputs(model, example), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    assert "permuted" in str(report) and len(str(report).splitlines()) == len(report.rows) + 1


def test_gradients_move_along():
    model, x = mlp()
    model(x).square().mean().backward()
    sten.permute(model, sten.NM(2, 4))
    moved = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for p, grad in zip(model.parameters(), moved, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)


def test_adapters_move_along():
    """LoRA's B has rows of the layer that it is beside, its A columns; neither is pruned."""
    peft = pytest.importorskip("peft")
    model, example = hugging_face("llama")
    config = peft.LoraConfig(target_modules=["v_proj", "o_proj", "up_proj", "down_proj"], init_lora_weights=False, r=2)
    model = peft.get_peft_model(model, config).eval()
    before, old = outputs(model, example), copy.deepcopy(model.state_dict())
    sten.permute(model, sten.VectorNM(2, 4, 8), example=example)
    for a, b in zip(before, outputs(model, example), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))
    moved = [name for name, p in model.state_dict().items() if not torch.equal(p, old[name])]
    assert any("up_proj.lora_B" in name for name in moved) and any("down_proj.lora_A" in name for name in moved)


def test_torch_transformer():
    """The MLP of nn.TransformerEncoderLayer, which in inference may run in one operator."""
    torch.manual_seed(0)
    model = uneven(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    y = model(x).detach()
    report = sten.permute(model, sten.BSR((4, 4)), 0.5, ["linear1", "linear2"], example=x)
    assert report.rows[0].rows == "permuted" == report.rows[1].columns
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


OTHERS = {  # fused layers, other implementations of attention, an encoder and a decoder, experts
    "llama": {"attn_implementation": "eager"},
    "phi3": {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
    "gpt_neox": {},
    "t5": {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}


class PartlyActivated(nn.Module):
    """The first 16 hidden channels are computed with in another way than the others."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.up, self.down, self.inplace = nn.Linear(16, 32), nn.Linear(32, 16), inplace

    def forward(self, x):
        x = self.up(x)
        if self.inplace:
            x[..., :16].mul_(2)
        else:
            x = torch.cat([x[..., :16].relu(), x[..., 16:]], -1)
        return self.down(x)


@pytest.mark.parametrize("inplace", [False, True])
def test_channels_that_are_computed_with_differently(inplace):
    """They exchange places among each other only."""
    torch.manual_seed(0)
    model, x = uneven(PartlyActivated(inplace)).eval(), torch.randn(5, 16)
    before, w = model(x).detach(), model.up.weight.detach().clone()
    assert sten.permute(model, sten.VectorNM(2, 4, 4), example=x).rows[1].columns == "permuted"
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    same = (model.up.weight[:, None] == w).all(2)
    assert same[:16, :16].sum() == same[16:, 16:].sum() == 16


@pytest.mark.parametrize("kind", OTHERS)
def test_other_families(kind):
    pytest.importorskip("transformers")
    model, example = hugging_face(kind, **OTHERS[kind])
    if kind == "t5":
        example["decoder_input_ids"] = example["input_ids"]
    before = outputs(model, example)
    report = sten.permute(model, sten.BSR((4, 4)), 0.5, example=example)
    for a, b in zip(before, outputs(model, example), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
    moved = {row.name for row in report.rows if "permuted" in (row.rows, row.columns)}
    attention = ("v_proj", "qkv_proj", "query_key_value", ".v.weight")
    assert any(part in name for name in moved for part in attention)
    assert kind == "mixtral" or any(part in name for name in moved for part in ("mlp", "DenseReluDense"))


def test_arguments_of_sparsify():
    """A Recipe, layouts by name, an allocation: the rows are those of the plan."""
    recipe = sten.Recipe({"0": sten.BSR((4, 4)), "3": sten.NM(2, 4), "5": None}, sparsity=sten.ERK(0.5))
    rows = sten.permute(mlp()[0], recipe).rows
    assert [(row.name, row.layout) for row in rows] == [("0.weight", "BSR(block=(4, 4))"), ("3.weight", "NM(n=2, m=4)")]
    model, _ = mlp()
    sten.permute(model, sten.BSR((2, 2)), sten.PerWeight({"0.weight": 0.9, "3.weight": 0.1}), ["0", "3"])
    with pytest.raises(ValueError, match=r"3\.weight in sten\.PerWeight"):
        sten.permute(model, sten.BSR((2, 2)), sten.PerWeight({"0.weight": 0.9}), ["0", "3"])
    with pytest.raises(TypeError, match=r"nn\.Module"):
        sten.permute("model", sten.NM(2, 4))


class At(TorchDispatchMode):
    """Does something at the n-th call of an operator; None: counts."""

    def __init__(self, operator, number: int | None, act=None) -> None:
        super().__init__()
        self.operator, self.number, self.act, self.count = operator, number, act, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is self.operator:
            self.count += 1
            if self.count == self.number:
                self.act()
        return out


def fail() -> None:
    raise RuntimeError("out of memory")


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("operator", "act", "error"),
    [(torch.ops.aten.index_select, fail, RuntimeError), (torch.ops.aten.copy_, interrupt, KeyboardInterrupt)],
    ids=["error", "ctrl-c"],
)
def test_stopped_in_the_middle(operator, act, error):
    """An error or Ctrl-C between any two operators: all weights are as they were."""
    before, _ = mlp()
    arguments = {"layout": sten.VectorNM(2, 4, 8), "example": torch.randn(5, 12)}
    with At(operator, None) as counted:
        sten.permute(copy.deepcopy(before), **arguments)
    assert counted.count > 6
    for number in range(max(1, counted.count - 30), counted.count + 1):
        model = copy.deepcopy(before)
        with At(operator, number, act) as stopped:
            try:
                sten.permute(model, **arguments)
            except error:
                pass
            else:  # torch itself may copy once less in a later call
                assert number > stopped.count
                continue
        for a, b in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b), number


def test_calibration_under_autocast():
    """The layers' output errors are computed in float32."""
    model, x = mlp()
    reports = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            reports.append(sten.permute(copy.deepcopy(model), sten.NM(2, 4), weights="0", calibration=[x]))
    assert [r.error_before for r in reports[0].rows] == [r.error_before for r in reports[1].rows]


def _rank(rank: int):
    model, _ = mlp()
    batch = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0))[rank] * torch.linspace(0, 3, 12) ** rank
    table = sten.sensitivity(model, [sten.NM(2, 4), None], [batch], tokens=4)
    sten.permute(model, sten.VectorNM(2, 4, 8), calibration=[batch])
    return [p.detach().numpy() for p in model.parameters()], [(row.effect, row.seconds) for row in table.rows]


def test_ranks_permute_and_choose_alike(tmp_path):
    """Each has a batch of its own: the permutation is that of both in one process."""
    found = ranks.results(_rank, tmp_path)
    model, _ = mlp()
    x = torch.randn(2, 64, 12, generator=torch.Generator().manual_seed(0))
    sten.permute(model, sten.VectorNM(2, 4, 8), calibration=[x[0], x[1] * torch.linspace(0, 3, 12)])
    for params, table in found:
        assert table == found[0][1]
        assert all((p.detach().numpy() == q).all() for p, q in zip(model.parameters(), params, strict=True))
