"""One Llama-8B-shaped transformer block, dense against sparse: prefill, decode and a training step, memory included.

    python benchmarks/gpu_block.py [--output DIR]

Sparse: attention projections NM(2, 4), MLP VectorNM(1, 4, v=128). In prefill the MLP is a feature-major chain: one
transpose before it, none after. The training step is forward and both gradients, without an optimizer. Results are
checked against the same block on the expanded weights before anything is timed.
"""

import argparse

import torch
from gpu_timing import check, graph_time, write
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from sten.kernels import nm, vector_nm

HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 8, 128
QKV = (HEADS + 2 * KV_HEADS) * HEAD
CONTEXT = 1024  # tokens already in the cache when one is decoded
DTYPE, DEVICE = torch.bfloat16, "cuda"
PATTERN = {"n": 1, "m": 4, "v": 128}


def _random(*shape):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) / shape[-1] ** 0.5


class Dense:
    """A linear layer and its gradients, as torch has them."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return linear(x, self.weight)

    def trained(self):
        return [self.weight]


class _TwoFour(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, index):
        ctx.save_for_backward(x, values, index)
        return nm.linear(x, values, index, n=2, m=4, out_features=len(values))

    @staticmethod
    def backward(ctx, grad):
        x, values, index = ctx.saved_tensors
        grad_x = nm.linear_grad_input(grad, values, index, n=2, m=4, in_features=x.shape[-1])
        return grad_x, nm.linear_grad_values(grad, x, index, n=2, m=4), None


class TwoFour:
    def __init__(self, out, inputs):
        order = torch.rand(out, inputs // 4, 4, device=DEVICE).argsort(-1)[..., :2].sort(-1).values.reshape(out, -1, 4)
        self.index = (order << (2 * torch.arange(4, device=DEVICE))).sum(-1).to(torch.uint8)
        self.values = _random(out, inputs // 2)

    def __call__(self, x):
        return _TwoFour.apply(x, self.values, self.index)

    def expand(self):
        return nm.expand(self.values, self.index, n=2, m=4, in_features=self.values.shape[1] * 2)

    def trained(self):
        return [self.values]

    def bytes(self):
        return self.values.nbytes + self.index.nbytes


class _Vector(torch.autograd.Function):
    """Saves the feature-major activations of the forward pass: the gradient of the values gathers from them."""

    @staticmethod
    def forward(ctx, x, values, index):
        tokens = x.shape[0]
        turned = vector_nm.feature_major(x)
        ctx.save_for_backward(turned, values, index)
        return vector_nm.linear_feature_major(turned, values, index, tokens=tokens, row_major=True, **PATTERN)

    @staticmethod
    def backward(ctx, grad):
        turned, values, index = ctx.saved_tensors
        grad_x = vector_nm.linear_grad_input(grad, values, index, in_features=turned.shape[0], **PATTERN)
        return grad_x, vector_nm.linear_grad_values(grad, turned, index, feature_major=True, **PATTERN), None


class Vector:
    def __init__(self, out, inputs):
        order = torch.rand(out // 128, inputs // 4, 4, device=DEVICE).argsort(-1)[..., :1]
        self.index = (order + torch.arange(inputs // 4, device=DEVICE)[:, None] * 4).reshape(out // 128, -1).int()
        self.values = _random(out, inputs // 4)

    def __call__(self, x):
        if x.requires_grad:
            return _Vector.apply(x, self.values, self.index)
        return vector_nm.linear(x, self.values, self.index, out_features=len(self.values), **PATTERN)

    def expand(self):
        return vector_nm.expand(self.values, self.index, in_features=self.values.shape[1] * 4, **PATTERN)

    def trained(self):
        return [self.values]

    def bytes(self):
        return self.values.nbytes + self.index.nbytes


class Block:
    def __init__(self, qkv, out, gate, up, down):
        self.qkv, self.out, self.gate, self.up, self.down = qkv, out, gate, up, down
        self.tables = {}
        self.norms = [torch.ones(HIDDEN, device=DEVICE, dtype=DTYPE) for _ in range(2)]

    def layers(self):
        return [self.qkv, self.out, self.gate, self.up, self.down]

    def attention(self, x, cache):
        """x (batch, tokens, HIDDEN); with a cache, each sequence puts one token at the end of its CONTEXT."""
        batch, tokens, _ = x.shape
        heads = (
            self.qkv(rms_norm(x, (HIDDEN,), self.norms[0]).view(-1, HIDDEN))
            .view(batch, tokens, -1, HEAD)
            .transpose(1, 2)
        )
        turned, v = heads.split([HEADS + KV_HEADS, KV_HEADS], 1)
        cos, sin = self.angles(tokens)
        q, k = torch.addcmul(turned * cos, turned.roll(HEAD // 2, -1), sin).split([HEADS, KV_HEADS], 1)
        if cache is not None:
            cache[0][:, :, -1:], cache[1][:, :, -1:] = k, v
            k, v = cache
        mixed = scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        return x + self.out(mixed.transpose(1, 2).reshape(-1, HIDDEN)).view_as(x)

    def angles(self, tokens):
        """Rotary tables, the sine with the sign of the half that it is rolled into; made once."""
        if tokens not in self.tables:
            angle = torch.arange(tokens, device=DEVICE)[:, None] * torch.ones(HEAD // 2, device=DEVICE) * 1e-3
            self.tables[tokens] = (
                angle.cos().repeat(1, 2).to(DTYPE),
                torch.cat([-angle.sin(), angle.sin()], 1).to(DTYPE),
            )
        return self.tables[tokens]

    def mlp(self, x):
        y = rms_norm(x, (HIDDEN,), self.norms[1]).view(-1, HIDDEN)
        if isinstance(self.gate, Vector) and not y.requires_grad:
            return x + self.chain(y).view_as(x)
        return x + self.down(silu(self.gate(y)) * self.up(y)).view_as(x)

    def chain(self, y):
        tokens = y.shape[0]
        up, gate = ((layer.values, layer.index) for layer in (self.up, self.gate))
        if tokens == 1:
            return self.down(vector_nm.gated_linear(y, up, gate, out_features=INNER, **PATTERN))
        turned = vector_nm.feature_major(y)
        middle = vector_nm.gated_linear_feature_major(turned, up, gate, tokens=tokens, **PATTERN)
        return vector_nm.linear_feature_major(middle, self.down.values, self.down.index, row_major=True, **PATTERN)

    def __call__(self, x, cache=None):
        return self.mlp(self.attention(x, cache))


def training_step(block, x):
    """Forward and every gradient; returns the gradients so that nothing is optimized away."""
    parameters = [t for layer in block.layers() for t in layer.trained()]
    return torch.autograd.grad(block(x).float().square().mean(), [x, *parameters])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sparse = Block(
        TwoFour(QKV, HIDDEN),
        TwoFour(HIDDEN, HIDDEN),
        Vector(INNER, HIDDEN),
        Vector(INNER, HIDDEN),
        Vector(HIDDEN, INNER),
    )
    dense = Block(*(Dense(layer.expand()) for layer in sparse.layers()))
    results = {"weights_MB": {"dense": sum(layer.weight.nbytes for layer in dense.layers()) / 1e6}}
    results["weights_MB"]["sparse"] = sum(layer.bytes() for layer in sparse.layers()) / 1e6

    with torch.no_grad():
        for name, batch, tokens in (("prefill 4096", 1, 4096), ("decode 1", 1, 1), ("decode 16", 16, 1)):
            x, cache = _random(batch, tokens, HIDDEN) * 30, None
            if tokens == 1:
                cache = [_random(batch, KV_HEADS, CONTEXT, HEAD) * 10 for _ in range(2)]
            check(sparse(x, cache), dense(x, cache), name)
            check(sparse(x, cache) - x, dense(x, cache) - x, name + ", without the residual", 3e-2)
            times = {
                kind: graph_time(lambda b, x=x, c=cache: b(x, c), [block], calls=6)
                for kind, block in (("dense", dense), ("sparse", sparse))
            }
            results[name] = {**times, "ratio": times["dense"] / times["sparse"]}
            print(name, results[name])

    x = (_random(1, 4096, HIDDEN) * 30).requires_grad_()
    for layer in (*dense.layers(), *sparse.layers()):
        for parameter in layer.trained():
            parameter.requires_grad_()
    check(training_step(sparse, x)[0], training_step(dense, x)[0], "training step, gradient of the input", 3e-2)
    times, peaks = {}, {}
    for kind, block in (("dense", dense), ("sparse", sparse)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        training_step(block, x)
        peaks[kind] = (torch.cuda.max_memory_allocated() - before) / 1e6
        times[kind] = graph_time(lambda b: training_step(b, x), [block], calls=2, replays=5)
    results["training step 4096"] = {**times, "ratio": times["dense"] / times["sparse"], "peak_MB_over_weights": peaks}
    print("training step", results["training step 4096"], results["weights_MB"])
    write("gpu_block", results, arguments.output)


if __name__ == "__main__":
    main()
