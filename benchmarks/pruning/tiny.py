"""Small random models and random tokens under the names of a pack: the benchmarks' own test."""

from __future__ import annotations

import torch
from models import Pack


class Tiny(Pack):
    def __init__(self) -> None:
        self.about = {"texts": "random"}
        generator = torch.Generator().manual_seed(0)
        self.tokens = {}
        for domain in ("python", "manuals"):
            for kind in ("calibration", "evaluation"):
                shape = (4096,) if kind == "calibration" else (2, 32)
                self.tokens[f"smollm2.{domain}.{kind}"] = torch.randint(3, 128, shape, generator=generator)
                rows = torch.randint(3, 128, (64, 16), generator=generator)
                rows[::2, 10:] = 0
                self.tokens[f"minilm.{domain}.{kind}"] = rows

    def windows(self, domain, count, length=32, seed=0):
        return super().windows(domain, count, length, seed)

    def language_model(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "use_cache": False, "initializer_range": 0.1}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)).eval()

    def sentence_model(self):
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        return BertModel(BertConfig(**sizes, vocab_size=128, initializer_range=0.1), add_pooling_layer=False).eval()
