"""sten.explain and sten.compare: what they report against dense PyTorch and sten.which, and that nothing changes."""

from __future__ import annotations

import copy
import html.parser
import re
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small import batch, every_layout, mlp, rate
from torch import nn

import sten
from sten.conversion.select import all_weights
from sten.explanation.advice import advise
from sten.explanation.layers import layers_of
from sten.explanation.measure import Alternative, Measurement
from sten.explanation.timing import Spread, take_turns
from sten.kernel_table import KERNELS
from sten.layouts import CSR, NM, VectorNM

FAST = {"seconds": 0.002}


class Recorded(nn.Linear):
    """Notes what it computed, and with which kind of weight."""

    def __init__(self, *sizes) -> None:
        super().__init__(*sizes)
        self.seen: list[tuple[type, torch.Tensor]] = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append((type(self.weight), y))
        return y


def state(model: nn.Module) -> dict:
    """All that must not change: objects, versions, modes, hooks."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (type(module), module.training, dict(module._forward_pre_hooks), set(vars(module)))
        for key, p in module._parameters.items():
            parts = p.parts.values() if isinstance(p, sten.SparseTensor) else () if p is None else (p,)
            found[f"{name}.{key}"] = (id(p), [(id(part), part._version) for part in parts])
    return found


@every_layout
@pytest.mark.parametrize("form", ["finalized", "trainable", "dense weight"])
def test_both_sides_compute_what_dense_pytorch_does_and_nothing_changes(layout, form):
    model = nn.Sequential(Recorded(12, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 8)).train()
    method = sten.SRSTE() if form == "dense weight" else sten.Magnitude()
    optimizer = None if form == "finalized" else torch.optim.SGD(model.parameters(), 0.1)
    sten.sparsify(model, layout, method, rate(layout), weights="0.weight", optimizer=optimizer)
    before = state(model)
    found = sten.explain(model, batch(0), candidates=[NM(2, 4)], **FAST)
    assert state(model) == before
    kinds = {kind for kind, _ in model[0].seen}
    assert kinds >= {nn.Parameter, type(model[0].weight)}
    weight = model[0].weight.to_dense() if isinstance(model[0].weight, sten.SparseTensor) else model[0].weight
    expected = F.linear(batch(0), weight, model[0].bias).detach()
    now = [y for kind, y in model[0].seen if kind is not sten.SparseTensor or form == "finalized"]
    others = [y for y in now if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5)]
    assert len(others) < len(now)
    for y in others:  # all of the candidate, which has other numbers
        assert torch.allclose(y, others[0], rtol=1e-4, atol=1e-5)
    first, second = found.rows
    assert (first.name, first.calls, first.input, first.weights) == ("0", 1, (6, 12), ("0.weight",))
    assert first.layout == str(layout) and first.speedup is not None and first.dense_bytes == 960
    assert (second.name, second.layout, second.speedup) == ("3", "dense", None)
    if form != "dense weight":
        assert first.kernel == sten.which("linear", batch(0), model[0].weight).kernel or first.kernel.endswith("]")
        assert first.density == pytest.approx(model[0].weight.density)


def test_layers_that_are_tied_not_called_called_twice_or_inside_of_others():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.twice, self.unused = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids, *, scale):
            x = self.twice(self.twice(self.embed(ids)))
            return self.head(self.attention(x, x, x)[0]) * scale

    model = sten.sparsify(Model(), CSR(), sparsity=0.5, weights="*")
    found = sten.explain(model, torch.arange(6)[None], scale=2.0, **FAST)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["embed", "twice", "attention", "head", "unused.weight"]
    assert rows["twice"].calls == 2 and rows["embed"].calls == rows["head"].calls == 1
    assert rows["attention"].weights == ("attention.in_proj_weight", "attention.out_proj.weight")
    assert rows["unused.weight"].advice == "not called with these inputs" and rows["unused.weight"].speedup is None
    one = {id(p): p for p in model.parameters() if p.dim() > 1}.values()
    assert found.sizes == (sum(p.stored_bytes for p in one), sum(p.numel() * 4 for p in one))  # a tie counts once


def test_under_autocast_and_compiled():
    model = sten.sparsify(mlp(), CSR(), sparsity=0.5).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        kernels = [row.kernel for row in sten.explain(model, batch(0), **FAST).rows]
    w = model[0].weight.to(torch.bfloat16)
    assert all(kernel.startswith(sten.which("linear", (6, 12), w).kernel) for kernel in kernels)
    found = sten.explain(torch.compile(model), batch(0), **FAST)
    assert [row.name for row in found.rows] == ["_orig_mod.0", "_orig_mod.2"] and found.dense_model > 0


def test_a_recurrent_layer_is_timed_with_dense_weights():
    model = sten.sparsify(nn.LSTM(8, 8), {"weight_ih_l0": CSR()}, sparsity=0.5)
    seen = []
    inner = model.forward
    model.forward = lambda x: (inner(x), seen.append(type(model._flat_weights[0])))[0]
    (row,) = sten.explain(model, torch.randn(3, 2, 8), **FAST).rows
    assert row.weights == ("weight_ih_l0", "weight_hh_l0") and row.layout == "CSR(), dense" and row.speedup is not None
    assert set(seen) == {sten.SparseTensor, nn.Parameter} and model._flat_weights[0] is model.weight_ih_l0


def test_fused_modules_are_layers_and_stay_fused():
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval().requires_grad_(False)
    sten.fuse(sten.sparsify(model, CSR(), sparsity=0.5))
    found = sten.explain(model, torch.randn(3, 16), **FAST)
    assert [(row.name, row.weights) for row in found.rows] == [("", ("0.weight",)), ("2", ("2.weight",))]
    assert "forward" in vars(model) and model.forward.operands(torch.randn(3, 16)) is not None


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    sten.sparsify(model, NM(2, 4))
    ids = {"input_ids": torch.arange(7)[None]}
    by_keyword = [row.name for row in sten.explain(model, **ids, **FAST).rows]
    assert by_keyword == [row.name for row in sten.explain(model, ids, **FAST).rows] and len(by_keyword) == 16
    assert model.config.use_cache
    sten.fuse(model)
    layers, idle = layers_of(all_weights(model), lambda: model(**ids))
    names = [layer.name for layer in layers]
    assert not idle and "model.layers.1.mlp" in names and "model.layers.0.self_attn" in names
    assert "model.layers.0.self_attn.q_proj" not in names and "model.layers.0.self_attn.o_proj" in names
    assert model.model.layers[0].self_attn.q_proj.forward.shared.taken


@dataclass(frozen=True)
class Slow(CSR):
    """A layout whose kernel waits."""


@pytest.fixture
def slow(registry):
    def linear(x, weight, bias, *, layout, shape):
        """waits on purpose"""
        time.sleep(0.004)
        return F.linear(x, layout.unpack(weight, shape), bias)

    sten.kernel("linear", weight=Slow, device="cpu")(linear)
    yield Slow()
    del KERNELS["linear", "cpu", Slow]


def test_keep_faster_makes_dense_what_is_slower(slow):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 64)).requires_grad_(False)
    sten.sparsify(model, {"0": CSR(), "2": slow}, sparsity=0.99)
    x = torch.randn(256, 1024)
    expected = model(x)
    found = sten.explain(model, x, candidates=(), seconds=0.05)
    assert [row.verdict for row in found.rows] == ["keep", "dense"] and isinstance(model[2].weight, sten.SparseTensor)
    assert "waits on purpose" in found.rows[1].advice and found.rows[0].speedup.median > 1 > found.rows[1].speedup.high
    with torch.inference_mode():
        again = sten.explain(model, x, candidates=(), seconds=0.05, keep_faster=True)
    assert again.densified == ["2.weight"] and "made dense: 2.weight" in again.plain()
    assert type(model[2].weight) is nn.Parameter and not model[2].weight.is_inference()
    assert isinstance(model[0].weight, sten.SparseTensor)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_another_layout_is_found_for_a_slow_one(slow):
    model = sten.sparsify(nn.Linear(256, 256), slow, sparsity=0.75).requires_grad_(False)
    (row,) = sten.explain(model, torch.randn(2, 256), seconds=0.02).rows
    titles = [one.layout for one in row.alternatives]
    assert "VectorNM(n=1, m=4, v=64)" in titles and "CSR() at 0.75" in titles
    same = next(one for one in row.alternatives if one.layout == "CSR() at 0.75")
    assert same.energy == pytest.approx(1.0) and same.stored_bytes == row.stored_bytes  # it keeps all that there is
    other = next(one for one in row.alternatives if one.layout == "VectorNM(n=1, m=4, v=64)")
    w = model.weight.to_dense()
    mask = VectorNM(1, 4, 64).mask(w.abs())
    assert other.energy == pytest.approx(float(w[mask].abs().sum() / w.abs().sum()), rel=1e-5)


def test_weights_in_training_are_not_made_dense():
    model = sten.trainable(sten.sparsify(mlp(), NM(2, 4)))
    with pytest.raises(ValueError, match=r"Expected finalized weights for keep_faster=True, got 0.weight"):
        sten.explain(model, batch(0), keep_faster=True)


@pytest.mark.parametrize(
    ("speedup", "dense", "verdict", "words"),
    [
        ((1.5, 2.0, 2.5), 100, "keep", "2.00 times as fast as dense, in 0.50 of its bytes"),
        ((0.9, 1.0, 1.1), 100, "keep", "no clear difference from dense"),
        ((0.9, 1.0, 1.1), 50, "dense", "in 1.00 of its bytes"),
        ((0.4, 0.5, 0.6), 100, "dense", "takes 2.00 times as long as dense: because"),
    ],
)
def test_advice(speedup, dense, verdict, words):
    layer = SimpleNamespace(targets=[SimpleNamespace(weight=None)], plans=[SimpleNamespace(reason="because")])
    times = {"seconds": Spread(1, 1, 1), "dense": Spread(0.5, 0.5, 0.5), "speedup": Spread(*speedup)}
    got, text = advise(layer, Measurement(**times), 10.0, (50, dense))
    assert got == verdict and words in text
    small = advise(layer, Measurement(**times), 1000.0, (50, 100))
    assert small[0] == "keep"  # a loss of a thousandth of the model's time is worth the bytes
    other = Alternative("NM(n=2, m=4)", Spread(3, 3, 3), 0.8, 25)
    got, text = advise(layer, Measurement(**times, alternatives=(other,)), 10.0, (50, dense))
    assert got == ("keep" if 0.9 in speedup and dense == 100 else "dense" if 0.9 in speedup else "layout")
    assert got != "layout" or "NM(n=2, m=4) would be 3.00 times as fast as dense, with 80% of the energy" in text


def test_spread_and_turns():
    samples = torch.rand(7).tolist()
    expected = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert (*vars(Spread.of(samples)).values(),) == pytest.approx(expected.tolist())
    calls: list[str] = []

    class Around:
        def __enter__(self):
            calls.append("(")

        def __exit__(self, *_):
            calls.append(")")

    def first():
        calls.append("a")
        time.sleep(0.001)

    def second():
        calls.append("b")
        time.sleep(0.002)

    a, b = take_turns([(Around, first), (Around, second)], torch.device("cpu"), 0.001)
    assert len(a) == len(b) == 5 and min(a) >= 0.001 and min(b) >= 0.002
    assert re.fullmatch(r"\(aaa\)\(bbb\)(\(a+\)\(b+\)){5}", "".join(calls))
    assert calls.count("a") > calls.count("b")  # samples of one length


class Reader(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_one_page_without_other_files(tmp_path):
    model = nn.ModuleDict({"<b>": nn.Linear(16, 16), "dense": nn.Linear(16, 16)})
    model.forward = lambda x: model["dense"](model["<b>"](x))
    sten.sparsify(model, {"<b>*": NM(2, 4)})
    found = sten.explain(model, torch.randn(4, 16), **FAST)
    found.save(tmp_path / "page.html")
    reader = Reader()
    reader.feed((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert reader.links and all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert reader.tags.count("svg") == 2 and "b" not in reader.tags and "<b>" in reader.text
    assert any("NM(n=2, m=4)" in text for text in reader.text)


def test_frames_have_numbers():
    pandas = pytest.importorskip("pandas")
    model = sten.sparsify(mlp(), {"0": NM(2, 4)})
    found = sten.explain(model, batch(0), **FAST)
    frame = found.to_pandas()
    assert list(frame["name"]) == ["0", "2"] and frame["density"].tolist() == [0.5, 1.0]
    assert frame["speedup"][0] == found.rows[0].speedup.median and pandas.isna(frame["speedup"][1])
    summary = sten.summary(model)
    assert summary.to_pandas()["stored_bytes"].tolist() == [row.stored_bytes for row in summary.rows]


def test_the_summary_has_kernels_and_times():
    model = sten.sparsify(mlp(), {"0": CSR()}, sparsity=0.5).requires_grad_(False)
    assert sten.summary(model).header()[-2:] == ["energy kept (at sparsify)", "note"]
    model(batch(0))
    assert sten.summary(model).rows[0].kernel.startswith(sten.which("linear", batch(0), model[0].weight).kernel)
    found = sten.explain(model, batch(0), **FAST)
    row = sten.summary(model).rows[0]
    assert (row.seconds, row.dense_seconds) == (found.rows[0].seconds.median, found.rows[0].dense_seconds.median)
    assert sten.summary(model).header()[-4:-1] == ["kernel", "time", "dense"]
    model[0].weight.cache.invalidate()
    assert sten.summary(model).rows[0].seconds is None  # a new pattern has not been timed


def test_compare():
    dense = mlp()
    sparse = sten.sparsify(copy.deepcopy(dense), {"0": NM(2, 4)})
    x = batch(0)
    found = sten.compare(dense, sparse, x, seconds=0.01)
    a, b = dense(x).detach(), sparse(x).detach()
    (one,) = found.outputs
    assert one.relative == pytest.approx(float((a - b).norm() / a.norm()))
    assert one.largest == pytest.approx(float((a - b).abs().max()))
    assert one.agree == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    stored = sum(p.stored_bytes if isinstance(p, sten.SparseTensor) else p.numel() * 4 for p in sparse.parameters())
    assert found.bytes == (sum(p.numel() * 4 for p in dense.parameters()), stored)
    assert found.densities == (1.0, pytest.approx((120 + 160) / 400)) and "relative error" in str(found)
    assert sten.compare(dense, dense, x, seconds=0.001).outputs[0].relative == 0.0
    with pytest.raises(ValueError, match="Expected outputs of the same shapes"):
        sten.compare(dense, nn.Linear(12, 3), x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sten.explain(mlp()), TypeError, "Expected inputs for sten.explain, got none"),
        (lambda: sten.explain("model", batch(0)), TypeError, "Expected an nn.Module, got str"),
        (lambda: sten.explain(nn.ReLU(), batch(0)), ValueError, "Expected a model with parameters"),
        (lambda: sten.explain(mlp().to("meta"), batch(0)), ValueError, "on the meta device"),
        (lambda: sten.explain(mlp(), batch(0), candidates=[CSR()]), ValueError, "Expected a sparsity"),
        (lambda: sten.compare(mlp(), mlp()), TypeError, "Expected inputs for sten.compare, got none"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_an_error_of_the_model_leaves_no_hooks():
    model = sten.sparsify(mlp(), NM(2, 4)).train()
    before = state(model)
    with pytest.raises(RuntimeError):
        sten.explain(model, torch.randn(2, 5))
    assert state(model) == before
