"""NM(n, m): n of every m inputs of a row are stored, with packed positions of 2, 4 or 8 bits, or a bitmap.

Letters: T tokens, I inputs, O outputs, G groups a row, K = G * n slots; BITS a position (1: a bitmap), BYTES of
positions a row. BM output rows, BT tokens, BK columns a tile; S splits of the reduction.
"""

import math

import torch
import triton

from . import autotune, cusparselt, epilogue, nm24, nm_bitmap, nvrtc
from .backend import INTERPRET, backend
from .launch import triton_launch
from .linear import Linear
from .nm_few import few_tokens, few_tokens_24, one_token_24
from .nm_gradient import begin_at_words, bits, has_words, index_shape
from .nm_gradient import collect as collect
from .nm_gradient import expand as expand
from .operators import CollectedProduct, ExpandedProduct
from .pdl import overlap
from .precision import exact, precision
from .shares import FewTokens, begins_aligned
from .split_k import workspace
from .tiles import matrix_of, power_of_two, splits, wide

FEW = 64  # tokens up to which reading the weight decides


def _configs(variant: str, tokens: int, rows: int, columns: int, programs: int, itemsize: int) -> list[dict]:
    if INTERPRET:
        inside = {"BW": 2} if variant in ("word", "few") else {"BK": 16}
        return [dict(BM=16, S=2, **inside, **({} if variant == "word" else {"BT": 16}))]
    if variant == "word":
        return [
            {"BM": a, "BW": b, "S": 1, "num_warps": c}
            for a, b, c in ((4, 256, 4), (8, 128, 4), (4, 512, 4), (4, 128, 2))
        ]
    width, configs = power_of_two(tokens, 16, 64), []
    tiles = ((64, 64, 4, 2, 2), (32, 64, 4, 2, 2))
    if variant == "few":
        tiles = ((64, 128, 4, 3, 2), (64, 128, 4, 3, 1), (64, 64, 4, 3, 2))
        if tokens <= 16:
            tiles = ((32, 128, 4, 3, 3), (32, 128, 4, 3, 2), (32, 128, 2, 3, 2), (32, 128, 4, 4, 2))
    for height, depth, warps, stages, waves in tiles:
        split = splits(-(-rows // height), waves * programs, columns, 2 * depth, most=8)
        inside = {"BW": depth // 8} if variant == "few" else {"BK": depth // (itemsize // 2)}
        configs.append(dict(BM=height, BT=width, S=split, num_warps=warps, num_stages=stages, **inside))
    return configs


class NMLinear(Linear):
    """x (*, I) -> activation(x @ W.T + bias) * gate, (*, O). ``save_memory`` avoids a dense weight, and is slow."""

    prefix, stored, layout_numbers, expand = "gpu_nm_linear", "Tensor values, Tensor index", "int n, int m, ", expand
    options, cuda = 'str activation="none", bool save_memory=False', ("bitmap", "sparse_mma")

    def choose(self, tokens, outputs, inputs, dtype, *, n, m, save_memory=False):
        """``empty``, ``word`` and ``few`` (2:4 by words), ``bitmap`` and ``sparse_mma`` (CUDA C++), ``tiles``,
        ``cusparselt`` or ``expand`` (then cuBLAS)."""
        if tokens == 0 or outputs == 0:
            return "empty", "nothing to compute"
        words, exactly = has_words(n, m, dtype, inputs), exact(dtype)
        if tokens == 1 and words:
            return "word", "one token of 2:4: 0.5625 of the dense bytes are read, a position is a shift"
        if nm24.fits(tokens, inputs, dtype, n, m) and nvrtc.available():
            return "sparse_mma", f"{tokens} tokens of 2:4: 0.5625 of the dense bytes are read, by sparse tensor cores"
        if nm_bitmap.fits(tokens, inputs, dtype, n, m) and nvrtc.available():
            read = f"{n / m + 1 / 16:.4g} of the dense bytes are read"
            how = "each value finds its input by a bit" if tokens <= nm_bitmap.FEW else "tensor cores multiply"
            return "bitmap", f"{tokens} tokens of {n}:{m}: {read}, {how}"
        if tokens <= FEW and not exactly:
            if words:
                return "few", f"{tokens} tokens of 2:4: 0.5625 of the dense bytes are read and expanded in registers"
            return "tiles", f"{tokens} tokens: the weight is read compressed, its tiles are expanded in registers"
        if words and inputs % 64 == 0 and outputs % 64 == 0 and cusparselt.available():
            return "cusparselt", "2:4 on sparse tensor cores, with a cached plan and a searched algorithm"
        if save_memory:
            return "tiles", "tiles are expanded on the fly: saves the dense weight's memory, and no time"
        if exactly:
            return "expand", "fp32 without tf32: expanding tiles in the kernel is slower than cuBLAS on a dense weight"
        return "expand", f"tensor cores cannot skip {n}:{m} at {tokens} tokens; expanded, cuBLAS runs"

    def check(self, x, weight, outputs, inputs, n, m, save_memory):
        values, index = weight
        groups = -(-inputs // m)
        if index.dtype != torch.uint8:
            raise TypeError(f"Expected an index of uint8, got {index.dtype}.")
        shapes = (outputs, groups * n), index_shape(outputs, groups, n, m)
        if (values.shape, index.shape) != shapes:
            got = f"{tuple(values.shape)} and {tuple(index.shape)}"
            expected = f"values {shapes[0]} and index {shapes[1]} for {n}:{m} of {inputs} inputs"
            raise ValueError(f"Expected {expected}, got {got}.")

    def arrange(self, x, variant, **numbers):
        return matrix_of(x, aligned=True, packed=variant in self.cuda)

    def launch(self, variant, x, values, index, bias, gate, y, activation, n, m, save_memory):
        if variant == "bitmap":
            return nm_bitmap.launch(x, values, index, bias, gate, y, activation, n, m)
        if variant == "sparse_mma":
            return nm24.launch(x, values, index, bias, gate, y, activation)
        few = self._described(variant, x, values, index, n, m)
        copied = None if variant == "tiles" else begin_at_words(values)
        copied_index = begin_at_words(index, m // 8) if bits(n, m) == 1 else None

        def prepare(config):
            grid, width = few.grid(config), config.get("BT", 1)
            tiles, shares, size = grid[0] * grid[2], math.prod(grid), config["BM"] * width
            # beyond 16 tokens programs compute more than they wait: programs of the next launch that start early would
            # then be spread unevenly over the multiprocessors (49 us became 60)
            early = overlap(x) if width <= 16 else {"PDL": False}
            launch = triton_launch(few.kernel, grid, ACTIVATION=activation, **few.constants(config), **early)

            def call(x, values, index, bias, gate, y):
                partial = workspace.take(y, tiles, shares, size)
                if copied_index is not None:
                    index = copied_index(index)
                launch(x, values if copied is None else copied(values), index, bias, gate, y, *partial, *few.integers)

            return call

        return autotune.pick(few.name, few.key, few.configs, prepare, (x, values, index, bias, gate, y))

    def _described(self, variant, x, values, index, n, m) -> FewTokens:
        (tokens, inputs), (outputs, slots), words = x.shape, values.shape, x.shape[1] // 8
        constants = {"WIDE": wide(x, values)}
        if variant == "word":
            kernel, integers = one_token_24, (tokens, outputs, words)
        elif variant == "few":
            kernel, integers = few_tokens_24, (tokens, outputs, words, x.stride(0))
        else:
            kernel, integers = few_tokens, (tokens, inputs, outputs, slots, index.shape[1], x.stride(0))
            constants |= {"N": n, "M": m, "BITS": bits(n, m), "PRECISION": precision(x.dtype)}
        return FewTokens(
            kernel,
            "nm",
            (variant, x.dtype, outputs, inputs, n, m, power_of_two(tokens, 1, 1 << 20)),
            _configs(variant, tokens, outputs, inputs, backend.multiprocessors(x), x.element_size()),
            lambda c: (triton.cdiv(outputs, c["BM"]), c["S"], triton.cdiv(tokens, c.get("BT", 1))),
            lambda c: {**constants, **c},
            integers,
        )

    def shares(self, variant, x, stored, up, outputs, n, m, save_memory):
        if variant not in ("word", "few", "tiles") or not begins_aligned(stored[0]):
            return None
        few = self._described(variant, x, *stored, n, m)
        return few.shares((x, *stored, None, None), 1, len(x), outputs)

    def library(self, variant, x, values, index, bias, gate, shape, activation, n, m, save_memory):
        if variant != "cusparselt":
            return None
        product = cusparselt.prepare(x, values, bias)
        if product is None:
            return "expand"
        dense = expand.prepare(values, index, n=n, m=m, in_features=x.shape[-1])
        if activation == "none" and gate is None:
            return lambda x, values, index, bias, gate: product(x, values, bias, lambda: dense(values, index))

        def call(x, values, index, bias, gate):
            return epilogue.apply(product(x, values, bias, lambda: dense(values, index)), activation, gate)

        return call


linear = NMLinear()
choose = linear.choose
linear_grad_input = ExpandedProduct(
    expand, "2:4 runs along the inputs, so that its transpose is dense to the hardware; expanded, cuBLAS runs"
)
linear_grad_values = CollectedProduct(collect)
