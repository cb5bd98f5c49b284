"""torch.compile of every form, layout and method: whole graphs, equal to eager, compiled once."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch._dynamo.testing
import transformers
from forms import dense_of, every_form, sparse
from small import batch, every_layout, mlp, rate
from training_methods import METHODS, SUPPORTED

import sten
from sten.layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM

EVERYTHING = "STEN_ALL" in os.environ  # otherwise a sample
LAYOUTS = [Masked(), CSR(), BSR((4, 4)), NM(2, 4), VectorNM(1, 4, 4), GroupedNM(2, 4, 1), FanIn()]
pytestmark = pytest.mark.filterwarnings("ignore:sten. the masks leave rows empty", "ignore:.*lr_scheduler.step")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, run, x):
    """The output, the gradient of x and those of the parameters, dense."""
    x = x.clone().requires_grad_()
    out = run(x)
    every = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
    return [t.to_dense() if isinstance(t, sten.SparseTensor) else t for t in (out.detach(), *every)]


def expect_equal(got, want, tolerance=1e-4):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.cell("compile")
@every_layout
@every_form
def test_static_shapes(layout, form):
    model, count = sparse(layout, form), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, fullgraph=True, backend=count, dynamic=False)
    for step in range(3):
        expect_equal(gradients(model, run, batch(step)), gradients(model, model, batch(step)))
        with torch.no_grad():
            model[0]._parameters["weight"].mul_(1.5)
    assert count.frame_count == 1
    with torch.no_grad():
        torch.testing.assert_close(run(batch(9)), dense_of(model)(batch(9)), rtol=1e-4, atol=1e-4)


@pytest.mark.cell("dynamic compile")
@every_layout
@every_form
def test_dynamic_shapes(layout, form):
    model, count = sparse(layout, form), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for tokens in (3, 5, 9):
        x = torch.randn(tokens, 12)
        expect_equal(gradients(model, run, x), gradients(model, model, x))
    assert count.frame_count == 1
    with torch.no_grad():
        for shape in ((2, 12), (2, 3, 12), (4, 5, 12)):
            x = torch.randn(shape)
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.cell("compile")
@pytest.mark.cell("dynamic compile")
@every_form
@pytest.mark.parametrize("layout", LAYOUTS if EVERYTHING else [CSR(), NM(2, 4)], ids=str)
def test_inductor(layout, form):
    model = sparse(layout, form)
    run = torch.compile(model, fullgraph=True)
    for tokens in (6, 4, 7):  # the second is another graph, with a dynamic size
        x = torch.randn(tokens, 12)
        expect_equal(gradients(model, run, x), gradients(model, model, x))


PAIRS = [
    (method, layout)
    for method in METHODS
    for layout in LAYOUTS
    if SUPPORTED[type(method).__name__, type(layout).__name__].startswith("yes")
]


@pytest.mark.parametrize("pair", PAIRS if EVERYTHING else PAIRS[::5], ids=lambda p: f"{type(p[0]).__name__}-{p[1]}")
def test_methods_step_as_without_compiling(pair):
    method, layout = pair
    runs = []
    for compiled in (False, True):
        model = mlp()
        kind = sten.optim.AdamS if isinstance(method, sten.CAST) else torch.optim.SGD
        optimizer = kind(model.parameters(), 1e-2)
        sten.sparsify(model, layout, copy.deepcopy(method), rate(layout), optimizer=optimizer)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(6):
            optimizer.zero_grad()
            (run(batch(step)) - 1).square().mean().backward()
            optimizer.step()
        runs.append([p.detach() for p in model.parameters()])
    expect_equal(*runs)


HF = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig, {}),
}
CALL = {"llama": {"use_cache": False}, "bert": {}}


@pytest.mark.parametrize("layout", LAYOUTS if EVERYTHING else LAYOUTS[1::3], ids=str)
@pytest.mark.parametrize("name", HF)
def test_a_hugging_face_model_is_one_graph(name, layout):
    kind, config, more = HF[name]
    torch.manual_seed(0)
    model = kind(
        config(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, **more)
    ).eval()
    sten.sparsify(model, layout, sparsity=rate(layout))
    ids = torch.randint(0, 40, (2, 7))
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 5):
            got, want = (call(ids[:, :length], **CALL[name]).logits for call in (run, model))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
