"""Whole models: which weights become sparse, that kernels run and nothing densifies, and masked dense training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from masked import calls, expect_close, grads, masked_twin, sparse_weights, state
from torch import nn

import sten
from sten import dispatch
from sten.dispatch import observe
from sten.layouts import BSR, CSR, NM, GroupedNM, VectorNM

RATES = {CSR: 0.7, BSR: 0.5}


@dataclass
class Case:
    """A model, what it is called with, and what must become sparse.

    Attributes:
        build: makes the model, dropout 0.
        run: model -> a tensor to compare; makes the same inputs each time.
        sparse: exactly these parameters become sparse.
        weights: the argument of sparsify.
        forward: how often the kernels of a weight run in a forward pass, where it is not once.
    """

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], torch.Tensor]
    sparse: list[str]
    weights: object = None
    forward: dict[str, int] = field(default_factory=dict)
    layouts: tuple = (CSR(), NM(2, 4), GroupedNM(1, 4, 4))


def inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, high: int = 50) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 24, bias=False), nn.Tanh(), nn.Linear(24, 10))


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, 1, 1)
    return nn.Sequential(
        stem, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


def encoder(**kwargs) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor="batch_first" in kwargs and "norm_first" not in kwargs)


ENCODER_LAYER = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
ENCODER = [f"layers.{i}.{name}" for i in (0, 1) for name in ENCODER_LAYER]
DECODER = [*ENCODER_LAYER, "multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight"]
PROJECTIONS = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(torch.relu(self.embed(x)))[0])


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=16, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


def language(model: nn.Module) -> torch.Tensor:
    return model(tokens(2, 8)).logits


BERT_LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
BERT = [f"bert.encoder.layer.{i}.{n}.weight" for i in (0, 1) for n in BERT_LAYER] + [
    "cls.predictions.transform.dense.weight"
]
GPT2 = [
    f"transformer.h.{i}.{n}.weight" for i in (0, 1) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
ATTENTION = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "qkvo"]
LLAMA = ATTENTION + [f"model.layers.{i}.mlp.{n}_proj.weight" for i in (0, 1) for n in ("gate", "up", "down")]
EMBEDDED = BERT + ["bert.embeddings.word_embeddings.weight"]

CASES = {
    "mlp": Case(
        mlp, lambda m: m(inputs(5, 20)), ["0.weight", "2.weight", "4.weight"],
        layouts=(CSR(), NM(2, 4), GroupedNM(1, 4, 4), VectorNM(1, 4, 8), BSR((8, 8))),
    ),
    "resnet": Case(
        resnet, lambda m: m(inputs(4, 3, 8, 8)),
        [f"{i}.{n}.weight" for i in (1, 2) for n in ("conv1", "conv2", "shortcut")] + ["5.weight"],
        weights=["[12].*.weight", "5.weight"], layouts=(CSR(), NM(2, 4), GroupedNM(1, 4, 4), VectorNM(1, 4, 8)),
    ),
    "encoder": Case(encoder, lambda m: m(inputs(6, 3, 16)), ENCODER),
    "encoder_norm_first": Case(
        lambda: encoder(norm_first=True, batch_first=True, activation="gelu"), lambda m: m(inputs(3, 6, 16)), ENCODER,
        layouts=(GroupedNM(1, 4, 4),),
    ),
    "encoder_padding": Case(
        lambda: encoder(batch_first=True),
        lambda m: m(inputs(3, 6, 16), src_key_padding_mask=PADDING)[~PADDING], ENCODER, layouts=(CSR(), NM(2, 4)),
    ),
    "decoder": Case(
        lambda: nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0),
        lambda m: m(inputs(5, 3, 16), inputs(7, 3, 16, seed=2)), DECODER,
        forward={"multihead_attn.in_proj_weight": 2},
    ),
    "attention_packed": Case(
        lambda: nn.MultiheadAttention(16, 4, bias=False), lambda m: m(*[inputs(6, 3, 16)] * 3, need_weights=True)[0],
        ["in_proj_weight", "out_proj.weight"],
    ),
    "attention_kdim": Case(
        lambda: nn.MultiheadAttention(16, 4, kdim=12, vdim=20, batch_first=True, add_bias_kv=True),
        lambda m: m(inputs(3, 5, 16), inputs(3, 7, 12), inputs(3, 7, 20))[0], PROJECTIONS,
    ),
    "lstm": Case(Recurrent, lambda m: m(inputs(3, 6, 8)), ["embed.weight", "head.weight"]),
    "bert": Case(bert, language, BERT),
    "bert_tied": Case(
        bert, language, EMBEDDED, weights=[*EMBEDDED, "cls.predictions.decoder.weight"],
        forward={"bert.embeddings.word_embeddings.weight": 2}, layouts=(CSR(), VectorNM(1, 4, 8)),
    ),
    "gpt2": Case(gpt2, language, GPT2),
    "llama": Case(llama, language, LLAMA),
    "mixtral": Case(
        mixtral, language, [*ATTENTION, "lm_head.weight"], weights=[*ATTENTION, "lm_head"]
    ),
}  # fmt: skip
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 3 + [True] * 3])

each = pytest.mark.parametrize(
    "case, layout",
    [pytest.param(case, layout, id=f"{n}-{layout}") for n, case in CASES.items() for layout in case.layouts],
)


def sparsified(case: Case, layout, **kwargs) -> tuple[nn.Module, nn.Module]:
    """The sparse model and its masked dense twin."""
    torch.manual_seed(0)
    dense = case.build()
    model = sten.sparsify(
        copy.deepcopy(dense), layout=layout, sparsity=RATES.get(type(layout)), weights=case.weights, **kwargs
    )
    return model, masked_twin(dense, model)


@each
def test_finalized_form_equals_masked_dense(case, layout):
    """Forward (train and eval), the kernels that run, backward and one step of AdamW on SparseTensor Parameters."""
    model, twin = sparsified(case, layout)
    assert sorted(sparse_weights(model)) == sorted(case.sparse)
    assert all(w.sparse_layout == layout for w in sparse_weights(model).values())
    with sten.strict(), observe() as seen:
        got = case.run(model)
        assert {n: len(c) for n, c in calls(model, seen).items()} == {n: case.forward.get(n, 1) for n in case.sparse}
        step(model, got, optimizer(model.parameters()), seen)
    want = case.run(twin)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    step(twin, want, optimizer(twin.parameters()))
    expect_close(grads(model), grads(twin), what="gradient of")
    expect_close(state(model), state(twin), what="after a step")
    with torch.no_grad(), sten.strict():
        torch.testing.assert_close(case.run(model.eval()), case.run(twin.eval()), rtol=1e-4, atol=1e-5)


@each
def test_trainable_form_equals_masked_dense(case, layout):
    """Two steps with an optimizer that was made before sparsify; then finalize gives the same numbers."""
    torch.manual_seed(0)
    dense = case.build()
    model = copy.deepcopy(dense)
    opt = optimizer(model.parameters())
    sten.sparsify(model, layout=layout, sparsity=RATES.get(type(layout)), weights=case.weights, optimizer=opt)
    twin = masked_twin(dense, model)
    other = optimizer(twin.parameters())
    assert sorted(sparse_weights(model)) == sorted(case.sparse)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    for _ in range(2):
        with sten.strict(), observe() as seen:
            got = case.run(model)
            assert {n: len(c) for n, c in calls(model, seen).items()} == {
                n: case.forward.get(n, 1) for n in case.sparse
            }
            step(model, got, opt, seen)
        want = case.run(twin)
        step(twin, want, other)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        expect_close(grads(model), grads(twin), what="gradient of")
        expect_close(state(model), state(twin), what="after a step")
    sten.finalize(model)
    expect_close(state(model), state(twin), what="finalized")
    with torch.no_grad(), sten.strict():
        torch.testing.assert_close(case.run(model.eval()), case.run(twin.eval()), rtol=1e-4, atol=1e-5)


def optimizer(params):
    """AdamW with an epsilon so large that gradients that are zero but for rounding stay so."""
    return torch.optim.AdamW(params, lr=1e-2, eps=1e-2)


def step(model, out, opt, seen=None):
    """Backward of a loss and one step; every sparse weight must have got its gradient from a kernel."""
    opt.zero_grad()
    (out * inputs(*out.shape, seed=3)).mean().backward()
    if seen is not None:
        ran = calls(model, seen)
        assert all(any("grad_weight" in op for op in ran[name]) for name in sparse_weights(model))
    opt.step()


# the fused fast path of torch's encoder, which cannot take sparse weights


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("form", ["finalized", "trainable"])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_steps_around_the_fused_path(norm_first, form, padded):
    """In eval mode without gradients the dense twin takes torch's fused path; the sparse model must not, and agrees."""
    torch.manual_seed(0)
    dense = encoder(norm_first=norm_first, batch_first=True)
    model = sten.sparsify(copy.deepcopy(dense), layout=NM(2, 4))
    twin = masked_twin(dense, model).eval()
    model = (sten.trainable(model) if form == "trainable" else model).eval()
    x, mask = inputs(3, 6, 16), PADDING if padded else None
    valid = ~PADDING if padded else slice(None)
    with sten.strict(), torch.no_grad(), observe() as seen:
        got = model(x, src_key_padding_mask=mask)
        assert calls(model, seen) == {name: ["linear"] for name in ENCODER}
        layer = model.layers[0](x, src_key_padding_mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(got[valid], twin(x, src_key_padding_mask=mask)[valid])
        torch.testing.assert_close(layer[valid], twin.layers[0](x, src_key_padding_mask=mask)[valid])


COMPILED = {
    "encoder_norm_first": NM(2, 4),
    "encoder_padding": GroupedNM(1, 4, 4),
    "attention_packed": CSR(),
    "mlp": CSR(),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_eval_equals_masked_dense(name):
    case, layout = CASES[name], COMPILED[name]
    model, twin = sparsified(case, layout)
    for form in (model, sten.trainable(copy.deepcopy(model))):
        torch._dynamo.reset()
        compiled = torch.compile(form.eval(), backend="aot_eager")
        with sten.strict(), torch.no_grad():
            got = case.run(compiled)
        with torch.no_grad():
            torch.testing.assert_close(got, case.run(twin.eval()), rtol=1e-4, atol=1e-5)


# what stays dense


def why(model: nn.Module) -> dict[str, str]:
    return {row.name: row.why for row in sten.summary(model).rows if row.why}


def test_tied_decoder_is_skipped_and_listed():
    model = sten.sparsify(bert(), layout=sten.NM(2, 4))
    assert "tied to" in why(model)["bert.embeddings.word_embeddings.weight"]
    model = sten.sparsify(llama(), layout=sten.NM(2, 4))
    assert "tied to" in why(model)["model.embed_tokens.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_experts_are_skipped_and_listed():
    model = sten.sparsify(mixtral(), layout=sten.NM(2, 4))
    skipped = why(model)
    experts = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert len(experts) == 4 and all("3-D" in skipped[n] for n in experts)


def test_recurrent_weights_run_dense_with_a_warning():
    """A fused recurrent layer has no sparse form: its weights can be stored sparse; strict refuses to run them."""
    torch.manual_seed(0)
    dense = Recurrent()
    model = sten.sparsify(copy.deepcopy(dense), layout=CSR(), sparsity=0.5, weights="*weight*")
    twin = masked_twin(dense, model)
    names = ["embed.weight", "head.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"]
    assert sorted(sparse_weights(model)) == names
    x = inputs(3, 6, 8)
    with sten.strict(), pytest.raises(sten.DensifyError, match="lstm"):
        model(x)
    dispatch._warned.clear()
    with pytest.warns(UserWarning, match="'lstm'.*dense copy"):
        got = model(x)
    want = twin(x)
    torch.testing.assert_close(got, want)
    for one, out in ((model, got), (twin, want)):
        step(one, out, optimizer(one.parameters()))
    expect_close(grads(model), grads(twin))
    expect_close(state(model), state(twin))


def test_recurrent_weights_do_not_train_sparse():
    model = Recurrent()
    with pytest.raises(TypeError, match="recurrent"):
        sten.sparsify(model, layout=sten.NM(2, 4), weights="lstm.*", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert not sparse_weights(model)
