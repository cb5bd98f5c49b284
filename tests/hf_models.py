"""Tiny models of transformers, in the three forms of their weights. A helper of the tests, not a test."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from cases import SMALL
from torch import nn

import sten

IDS = torch.arange(7)[None]
every_layout = pytest.mark.parametrize("layout", SMALL, ids=str)
sampled = pytest.mark.parametrize("layout", SMALL if os.environ.get("STEN_ALL") else SMALL[::3], ids=str)


def llama(**more) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **more})).eval()


def gpt2() -> nn.Module:
    """Of Conv1D layers, whose weights are stored transposed, and a tied output layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(num_attention_heads=2, max_position_embeddings=16, **sizes)).eval()


def in_form(model: nn.Module, layout, form: str, weights=None) -> nn.Module:
    """The model with sparse weights in this form; in training it has made three steps."""
    method = sten.SRSTE() if form == "dense weight" else sten.Magnitude()
    sparsity = None if layout.rate else 0.5
    if form == "finalized":
        return sten.sparsify(model, layout, method, sparsity, weights)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sten.sparsify(model, layout, method, sparsity, weights, optimizer=optimizer)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def finalized(model: nn.Module) -> nn.Module:
    return sten.finalize(copy.deepcopy(model))
