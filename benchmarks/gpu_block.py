"""One Llama-8B-shaped transformer block, dense against sparse: prefill, decode and a training step, memory included.

    python benchmarks/gpu_block.py [--output DIR]

Sparse: attention projections NM(2, 4), MLP VectorNM(1, 4, v=128). A block is an nn.Module of nn.Linear layers: *sparse*
is that module after `sten.sparsify`, *fused* after `sten.fuse`, too (in prefill its MLP is a feature-major chain: one
transpose before it, none after), and *launches* calls the kernels by themselves, without sten's tensors. The training
step is forward and both gradients, without an optimizer. Results are checked against the block after `sten.densify`,
before anything is timed.
"""

import argparse
import copy

import torch
from gpu_timing import check, graph_time, write
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import sten
from sten.kernels import nm, vector_nm

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
CONTEXT = 1024  # tokens already in the cache when one is decoded
DTYPE, DEVICE = torch.bfloat16, "cuda"
N, M, V = 1, 4, 128


def _random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) / shape[-1] ** 0.5


def layer(inputs, outputs):
    made = nn.Linear(inputs, outputs, bias=False, device=DEVICE, dtype=DTYPE)
    made.weight.data = _random(outputs, inputs)
    return made


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = layer(HIDDEN, INNER), layer(HIDDEN, INNER), layer(INNER, HIDDEN)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = layer(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD), layer(HEADS * HEAD, HIDDEN)
        self.mlp, self.tables = MLP(), {}
        self.norms = nn.ParameterList(torch.ones(HIDDEN, device=DEVICE, dtype=DTYPE) for _ in range(2))

    def attention(self, x, cache):
        """x (batch, tokens, HIDDEN); with a cache, each sequence puts one token at the end of its CONTEXT."""
        batch, tokens, _ = x.shape
        heads = self.qkv(rms_norm(x, (HIDDEN,), self.norms[0])).view(batch, tokens, -1, HEAD).transpose(1, 2)
        turned, v = heads.split([HEADS + KV_HEADS, KV_HEADS], 1)
        cos, sin = self.angles(tokens)
        q, k = torch.addcmul(turned * cos, turned.roll(HEAD // 2, -1), sin).split([HEADS, KV_HEADS], 1)
        if cache is not None:
            cache[0][:, :, -1:], cache[1][:, :, -1:] = k, v
            k, v = cache
        mixed = scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def angles(self, tokens):
        """Rotary tables, the sine with the sign of the half that it is rolled into; made once."""
        if tokens not in self.tables:
            angle = torch.arange(tokens, device=DEVICE)[:, None] * torch.ones(HEAD // 2, device=DEVICE) * 1e-3
            self.tables[tokens] = (
                angle.cos().repeat(1, 2).to(DTYPE),
                torch.cat([-angle.sin(), angle.sin()], 1).to(DTYPE),
            )
        return self.tables[tokens]

    def forward(self, x, cache=None):
        x = self.attention(x, cache)
        return x + self.mlp(rms_norm(x, (HIDDEN,), self.norms[1]))


def sparsified(block):
    vector = sten.VectorNM(N, M, V)
    return sten.sparsify(block, {"qkv": sten.NM(2, 4), "out": sten.NM(2, 4), "mlp": vector}).eval()


class Launches(nn.Module):
    """A layer of a sparse block by its kernel: that of the layout, on the parts of the weight."""

    def __init__(self, *layers):
        super().__init__()
        self.parts = [tuple(each.weight.parts[name] for name in ("values", "index")) for each in layers]
        self.outputs = [each.out_features for each in layers]

    def forward(self, x):
        if len(self.parts) == 1:
            return nm.linear(x, *self.parts[0], n=2, m=4, out_features=self.outputs[0])
        (gate, up, down), rate, tokens = self.parts, {"n": N, "m": M, "v": V}, x.shape[:-1].numel()
        if tokens <= vector_nm.FEW:
            middle = vector_nm.gated_linear(x, up, gate, out_features=self.outputs[0], **rate)
            return vector_nm.linear(middle, *down, out_features=self.outputs[2], **rate)
        turned = vector_nm.feature_major(x.view(tokens, -1))
        middle = vector_nm.gated_linear_feature_major(turned, up, gate, tokens=tokens, **rate)
        return vector_nm.linear_feature_major(middle, *down, row_major=True, **rate).view(x.shape)


def by_launches(block):
    made = copy.copy(block)
    made._modules = dict(block._modules)
    made.qkv, made.out = Launches(block.qkv), Launches(block.out)
    made.mlp = Launches(block.mlp.gate, block.mlp.up, block.mlp.down)
    return made


def training_step(block, x):
    """Forward and every gradient; returns the gradients so that nothing is optimized away."""
    parameters = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad(block(x).float().square().mean(), [x, *parameters])


def inference(blocks, results):
    for name, batch, tokens in (("prefill 4096", 1, 4096), ("decode 1", 1, 1), ("decode 16", 16, 1)):
        x, cache = _random(batch, tokens, HIDDEN) * 30, None
        if tokens == 1:
            cache = [_random(batch, KV_HEADS, CONTEXT, HEAD) * 10 for _ in range(2)]
        expected = blocks["dense"](x, cache)
        for kind, block in blocks.items():
            check(block(x, cache), expected, f"{name}, {kind}")
            check(block(x, cache) - x, expected - x, f"{name}, {kind}, without the residual", 3e-2)
        times = {kind: graph_time(lambda b, x=x, c=cache: b(x, c), [block], calls=6) for kind, block in blocks.items()}
        results[name] = {**times, "ratio": {kind: times["dense"] / spent for kind, spent in times.items()}}
        print(name, results[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sparse = sparsified(Block())
    dense, fused = sten.densify(copy.deepcopy(sparse)), copy.deepcopy(sparse)
    print(sten.fuse(fused))
    blocks = {"dense": dense, "sparse": sparse, "fused": fused, "launches": by_launches(sparse)}
    results = {"weights_MB": {"dense": sum(p.nbytes for p in dense.parameters()) / 1e6}}
    results["weights_MB"]["sparse"] = sum(getattr(p, "stored_bytes", p.nbytes) for p in sparse.parameters()) / 1e6
    with torch.no_grad():
        inference(blocks, results)

    x = (_random(1, 4096, HIDDEN) * 30).requires_grad_()
    blocks = {"dense": dense, "sparse": sparse, "trainable": sten.trainable(copy.deepcopy(sparse))}
    expected, times, peaks = training_step(dense, x)[0], {}, {}
    for kind, block in blocks.items():
        check(training_step(block, x)[0], expected, f"training step, {kind}, gradient of the input", 3e-2)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(block, x)
        peaks[kind] = (torch.cuda.max_memory_allocated() - before) / 1e6
        times[kind] = graph_time(lambda b: training_step(b, x), [block], calls=2, replays=5)
    ratio = {kind: times["dense"] / spent for kind, spent in times.items()}
    results["training step 4096"] = {**times, "ratio": ratio, "peak_MB_over_weights": peaks}
    print("training step", results["training step 4096"], results["weights_MB"])
    write("gpu_block", results, arguments.output)


if __name__ == "__main__":
    main()
