"""Calibration: statistics against whole forward passes of plain PyTorch, for models of every structure."""

from __future__ import annotations

import copy
import gc
import re

import pytest
import torch
from calibration_cases import Noted, check
from torch import nn

import sten
from sten.calibration.sites import patches


def in_block(name: str) -> str:
    """The stage of a weight in `layers.<number>`, `h.<number>`, ...: its block; outside it is alone."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found.group(1) if found else name


def ids(count: int = 3, batch: int = 2, length: int = 9, vocabulary: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (batch, length), generator=generator) for _ in range(count)]


def padded(count: int = 3, left: bool = False) -> list[dict[str, torch.Tensor]]:
    batches = []
    for i, x in enumerate(ids(count)):
        mask = torch.ones_like(x)
        mask[0, : 3 + i] = 0
        batches.append({"input_ids": x, "attention_mask": mask if left else mask.flip(1)})
    return batches


def transformer(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 0, "bos_token_id": 1}
    heads |= {"eos_token_id": 2}
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads, **grouped))
    if kind == "gemma3":  # two masks and two rotary embeddings, of sliding and full attention
        layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
        config = transformers.Gemma3TextConfig(**common, **heads, **grouped, **layers)
        return transformers.Gemma3ForCausalLM(config)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**common, **heads))
    if kind == "albert":  # one layer, called three times
        return transformers.AlbertModel(transformers.AlbertConfig(**common, **heads, embedding_size=8))
    if kind == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 20}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "bert", "albert"])
def test_models(kind):
    model = transformer(kind)
    stage = in_block if kind != "albert" else lambda name: re.sub("query|key|value", "qkv", name)
    order = check(model, padded(), stage)
    assert len(order) == {"llama": 21, "gemma3": 21, "gpt2": 12, "bert": 19, "albert": 8}[kind]


def test_left_padding_and_no_mask():
    check(transformer("llama"), padded(left=True), in_block)
    check(transformer("llama"), ids(), in_block)


class Wrapped(nn.Module):
    """Takes one dictionary, as modules of sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = transformer("bert")

    def forward(self, features):
        return self.inner(**features)


def test_a_mask_in_an_argument():
    ours, theirs = Noted(), Noted()
    sten.sparsify(Wrapped(), sten.NM(2, 4), ours, calibration=[(batch,) for batch in padded()])
    sten.sparsify(transformer("bert"), sten.NM(2, 4), theirs, calibration=padded())
    for name, stats in theirs.seen.items():
        assert all(torch.equal(ours.seen["inner." + name][key], value) for key, value in stats.items())


def test_masks_by_position_and_of_torch():
    """Padding is left out whatever way forward gets its mask."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer("bert")

        def forward(self, tokens, src_key_padding_mask):
            return self.inner(tokens, ~src_key_padding_mask)

    given, prefix = [tuple(batch.values()) for batch in padded()], "inner."
    ways = [(transformer("bert"), given, ""), (Masked(), [(x, mask == 0) for x, mask in given], prefix)]
    theirs = Noted()
    sten.sparsify(transformer("bert"), sten.NM(2, 4), theirs, calibration=padded())
    for model, batches, prefix in ways:
        ours = Noted()
        sten.sparsify(model, sten.NM(2, 4), ours, calibration=batches)
        for name, stats in theirs.seen.items():
            assert all(torch.equal(ours.seen[prefix + name][key], value) for key, value in stats.items()), name
    whole = {"input_ids": given[0][0], "attention_mask": torch.ones(2, 1, 9, 9)}
    with pytest.raises(ValueError, match=r"Expected attention_mask of shape \(batch, tokens\) in calibration="):
        sten.sparsify(transformer("bert"), sten.NM(2, 4), Noted(), calibration=[whole])


def test_encoder_decoder():
    """Two lists of blocks; padding of each side; a relative position bias that the first block gives to the others."""
    batches = []
    for b in padded():
        labels = b["input_ids"][:, :5]
        mask = torch.ones_like(labels)
        mask[1, 3:] = 0
        batches.append({**b, "decoder_input_ids": labels, "decoder_attention_mask": mask})

    model = transformer("t5")
    order = check(model, batches, in_block)
    assert len(order) == 2 * 6 + 2 * 10 and order[0].startswith("encoder.") and order[-1].startswith("decoder.")


def test_a_decoder_without_padding():
    """The encoder's mask is not the decoder's, even if it has its shape: then the two cannot be told apart."""
    short = [{**b, "labels": b["input_ids"][:, :5].contiguous()} for b in padded()]
    assert len(check(transformer("t5"), short, in_block)) == 32
    batches = [{**b, "labels": b["input_ids"]} for b in padded()]
    with pytest.raises(ValueError, match=r"encoder and decoder lengths differ, .* got \(2, 9\) twice"):
        sten.sparsify(transformer("t5"), sten.NM(2, 4), Noted(), calibration=batches)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.tanh(self.up(x)))


class Chained(nn.Module):
    """Blocks with something between them, which gives each a tensor of its own."""

    def __init__(self, between) -> None:
        super().__init__()
        self.layers, self.between = nn.ModuleList(Block() for _ in range(3)), between

    def forward(self, x):
        for layer in self.layers:
            x = self.between(layer(x))
        return x


class Twice(Chained):
    def forward(self, x):
        return super().forward(super().forward(x))


class InPlace(Chained):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 1
        return x


def vectors(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(5, *shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("make", [
    lambda: Chained(lambda x: x),
    lambda: Chained(lambda x: 2 * x),
    lambda: InPlace(None),
    lambda: nn.Sequential(Block(), Block(), Block()),
], ids=["linked", "captured anew", "written in place", "a Sequential"])  # fmt: skip
def test_blocks(make):
    torch.manual_seed(0)
    check(make(), vectors(8), lambda name: re.split(r"\.up|\.down", name)[0])


def test_models_without_blocks():
    """Weights outside of blocks: one group at a time, from passes of the whole model."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    assert check(mlp, vectors(8), lambda name: name) == ["0.weight", "2.weight", "4.weight"]
    check(nn.Linear(8, 4), vectors(8), lambda name: name)
    check(Twice(lambda x: x), vectors(8), lambda name: name)  # blocks that are called more than once


def test_weights_before_and_after_the_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 4))
    order = check(model, vectors(8), lambda name: name[:3] if name.startswith("1.") else name)
    assert order[0] == "0.weight" and order[-1] == "2.weight"


def test_blocks_by_name():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(8, 8), Block())
    for blocks in (["0", "2"], [model[0], "2"], "[02]"):
        model = nn.Sequential(Block(), nn.Linear(8, 8), Block())
        blocks = [model[0] if isinstance(b, nn.Module) else b for b in blocks] if isinstance(blocks, list) else blocks
        calibration = sten.Calibration(vectors(8), blocks=blocks)
        check(model, calibration, lambda name: name if name.startswith("1") else name[0])
    llama = transformer("llama")
    check(llama, sten.Calibration(ids(), blocks="model.layers.*"), in_block)
    check(transformer("llama"), sten.Calibration(ids(), blocks="model.layers"), in_block)


def test_true_sequential():
    """Statistics anew for each group of weights on one input."""
    groups = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}

    def stage(name):
        return in_block(name) + groups.get(name.split(".")[-2], name)

    order = check(transformer("llama"), sten.Calibration(padded(), true_sequential=True), stage)
    assert [name.split(".")[-2] for name in order[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip


def test_convolutions():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2)
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, (1, 3)))
    order = check(model, vectors(3, 11, 12), lambda name: name, sten.Masked(), weights=[nn.Conv2d])
    assert order == ["0.weight", "2.weight"]


@pytest.mark.parametrize("conv, shape", [
    (nn.Conv1d(2, 3, 4, stride=2, padding=3, padding_mode="circular"), (2, 9)),
    (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (2, 7, 9)),
    (nn.Conv3d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 3, 4, 5)),
], ids=["1", "2", "3"])  # fmt: skip
def test_patches_are_what_the_weight_is_multiplied_with(conv, shape):
    x = torch.randn(3, *shape)
    y = conv(x)
    got = patches(x, conv) @ conv.weight.flatten(1).t() + conv.bias
    torch.testing.assert_close(got, y.flatten(2).transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first):
    """Its output layer is not called as a module, and its projections are one weight."""
    torch.manual_seed(0)
    encoder, method = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), Noted()
    x, attention = torch.randn(4, 6, 8), copy.deepcopy(encoder.self_attn).eval()
    sten.sparsify(encoder, sten.NM(2, 4), method, calibration=[x])
    torch.testing.assert_close(method.seen["self_attn.in_proj_weight"]["x_norm"], x.square().mean((0, 1)).sqrt())
    with torch.no_grad():  # its inputs, from the outputs of the pruned projections: W x + b, W inverted
        attention.in_proj_weight.copy_(encoder.self_attn.in_proj_weight.to_dense())
        y = (attention(x, x, x)[0] - attention.out_proj.bias) @ torch.linalg.inv(attention.out_proj.weight).t()
    got = method.seen["self_attn.out_proj.weight"]["x_norm"]
    torch.testing.assert_close(got, y.square().mean((0, 1)).sqrt(), rtol=1e-3, atol=1e-5)


def test_statistics_are_shared():
    """q, k and v (gate and up) have the same tensors."""
    shared = {}

    class Pointers(Noted):
        def update(self, view):
            shared[view.name.split(".", 3)[-1]] = view.stats["x_gram"].data_ptr()
            return sten.Magnitude().update(view)

    sten.sparsify(transformer("llama"), sten.NM(2, 4), Pointers(), calibration=ids())
    assert shared["self_attn.q_proj.weight"] == shared["self_attn.v_proj.weight"] != shared["mlp.up_proj.weight"]
    assert shared["mlp.gate_proj.weight"] == shared["mlp.up_proj.weight"]


def test_one_block_has_statistics():
    """At most those of one block are alive while its weights are decided, and none of another block's."""
    alive = []

    class Counting(Noted):
        def update(self, view):
            if view.name.endswith("up.weight"):
                alive.append(sum(type(o) is torch.Tensor and o.shape == (16, 16) for o in gc.get_objects()))
            return sten.Magnitude().update(view)

    sten.sparsify(Chained(lambda x: x), sten.NM(2, 4), Counting(), calibration=vectors(8))
    assert alive == [1, 1, 1]  # the Gram matrix of down


@pytest.mark.parametrize("sizes", [[1] * 6, [4, 2]], ids=str)
def test_batch_size_changes_nothing(sizes):
    x = torch.cat(ids())
    a, b = transformer("llama"), transformer("llama")
    first, second = Noted(), Noted()
    sten.sparsify(a, sten.NM(2, 4), first, calibration=[x])
    sten.sparsify(b, sten.NM(2, 4), second, calibration=x.split(sizes))
    for name, stats in first.seen.items():
        for key, value in stats.items():
            torch.testing.assert_close(second.seen[name][key], value, rtol=1e-4, atol=1e-6)
