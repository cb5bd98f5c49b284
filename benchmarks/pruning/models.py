"""The models and texts of a folder that pack.py wrote, and how good a model is.

Needs torch, transformers and numpy; no tokenizer, no GGUF reader, no network.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDER = Path(__file__).parent / "pack"
PAD = 0  # of MiniLM's ids


def unpacked(rows: np.ndarray, kind: str) -> Tensor:
    """Rows of a GGUF file as float32; blocks of 32 numbers with a float16 scale (and minimum)."""
    if kind == "f32":
        return torch.from_numpy(rows.astype(np.float32))
    size = {"q4_1": 20, "q8_0": 34}[kind]
    blocks = np.ascontiguousarray(rows).reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == "q8_0":
        numbers = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], 1).astype(np.float32)
        numbers = scale * codes + least
    return torch.from_numpy(numbers.reshape(len(rows), -1))


class Pack:
    """A folder of pack.py."""

    def __init__(self, folder: Path = FOLDER) -> None:
        if not (folder / "about.json").exists():
            raise SystemExit(f"Expected {folder} to be a folder of benchmarks/pruning/pack.py; run that first.")
        self.folder, self.about = folder, json.loads((folder / "about.json").read_text())
        with np.load(folder / "tokens.npz") as tokens:
            self.tokens = {name: torch.from_numpy(tokens[name]).long() for name in tokens.files}

    def _tensors(self, model: str) -> dict[str, Tensor]:
        result = {}
        for path in sorted(self.folder.glob(f"{model}-*.npz")):
            with np.load(path) as part:
                for key in part.files:
                    name, _, kind = key.partition(":")
                    result[name] = unpacked(part[key], kind or "f32")
        return result

    def language_model(self) -> nn.Module:
        """SmolLM2-135M-Instruct, float32, eval mode, without a cache of keys and values."""
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**self.about["configs"]["smollm2"], use_cache=False))
        return self._filled(model, self._tensors("smollm2"), {"lm_head.weight"})  # which is tied to the embedding

    def sentence_model(self) -> nn.Module:
        """all-MiniLM-L6-v2, float32, eval mode, without BERT's pooler: sentences are means over tokens."""
        from transformers import BertConfig, BertModel

        model = BertModel(BertConfig(**self.about["configs"]["minilm"]), add_pooling_layer=False)
        tensors = {name: t for name, t in self._tensors("minilm").items() if not name.startswith("pooler.")}
        return self._filled(model, tensors, set())

    @staticmethod
    def _filled(model: nn.Module, tensors: dict[str, Tensor], tied: set[str]) -> nn.Module:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - tied:
            raise SystemExit(f"Expected all parts of the pack, got none for {missing[:3]}, too many {unexpected[:3]}.")
        return model.eval()

    def model(self, name: str) -> nn.Module:
        return self.language_model() if name == "smollm2" else self.sentence_model()

    # ---- text

    def windows(self, domain: str, count: int, length: int = 1024, seed: int = 0) -> Tensor:
        """(count, length) ids for calibration: pieces of the text in a row where they fit, else at random places."""
        ids = self.tokens[f"smollm2.{domain}.calibration"]
        generator = torch.Generator().manual_seed(seed)
        if count * length <= len(ids):
            pieces = ids[: len(ids) // length * length].view(-1, length)
            return pieces[torch.randperm(len(pieces), generator=generator)[:count]]
        starts = torch.randint(len(ids) - length, (count,), generator=generator)
        return ids[starts.unsqueeze(1) + torch.arange(length)]

    def passages(self, domain: str, count: int, seed: int = 0) -> Tensor:
        """(count, 128) ids of passages for calibration, again from the first where the text ends."""
        ids = self.tokens[f"minilm.{domain}.calibration"]
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        return ids[order.repeat(-(-count // len(ids)))[:count]]

    def held_out(self, model: str, domain: str) -> Tensor:
        return self.tokens[f"{model}.{domain}.evaluation"]


def masked(ids: Tensor) -> dict[str, Tensor]:
    """A batch of passages, cut to the longest of them."""
    ids = ids[:, : int((ids != PAD).sum(1).max())]
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


# ---- how good a model is


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch: int = 2) -> float:
    """exp of the mean loss over all tokens but the first of each window."""
    device, total = next(model.parameters()).device, 0.0
    for ids in windows.split(batch):
        ids = ids.to(device)
        for row, logits in zip(ids, model(input_ids=ids).logits.float(), strict=True):
            total += float(F.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    return math.exp(total / (windows.numel() - len(windows)))


@torch.inference_mode()
def embeddings(model: nn.Module, passages: Tensor, batch: int = 64) -> Tensor:
    """Means over the tokens of each passage, of length 1."""
    device, rows = next(model.parameters()).device, []
    order = (passages != PAD).sum(1).argsort(stable=True)  # little padding in a batch
    for ids in passages[order].split(batch):
        inputs = {name: t.to(device) for name, t in masked(ids).items()}
        rows.append(pooled(model(**inputs).last_hidden_state.float(), inputs["attention_mask"]).cpu())
    return torch.cat(rows)[order.argsort()]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    mask = mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def cosine(got: Tensor, expected: Tensor) -> float:
    """The mean over passages between a model's embeddings and the dense model's."""
    return float((got * expected).sum(-1).mean())


def rank_correlation(got: Tensor, expected: Tensor) -> float:
    """Spearman's, of the similarities of all pairs of passages."""
    upper = torch.triu_indices(len(got), len(got), 1)
    ranks = [(e @ e.T)[upper[0], upper[1]].argsort().argsort().double() for e in (got, expected)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
