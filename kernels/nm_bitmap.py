"""NM as a bitmap for a few tokens, in CUDA C++: ``cuda/bitmap_few.cu`` to four tokens, ``cuda/bitmap_many.cu`` to 64.

Letters as in ``nm``: T tokens, I inputs, O outputs.
"""

import torch

from . import autotune, fragments, nvrtc
from .backend import backend
from .epilogue import ACTIVATIONS
from .nm_gradient import begin_at_words, bits
from .split_k import workspace
from .tiles import power_of_two

FEW, MOST = 4, fragments.MOST  # tokens: values multiplied one by one, and by tensor cores
BLOCK, ROWS, PIECE = 128, 32, 16  # columns and rows of a warp's block; bytes of a copy
MOST_GROUPS = 4  # of rows that a CTA of up to FEW tokens has, but for one at each end


def _configs(names: str, *numbers: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(names.split(), config, strict=True)) for config in numbers]


# warps of a CTA, CTAs of a multiprocessor, blocks on their way for each warp; warps that take the same columns of x
CONFIGS = _configs("WARPS CTAS STAGES", (16, 1, 1), (8, 2, 1), (16, 1, 2), (8, 3, 1), (4, 2, 1))
MANY_CONFIGS = _configs(
    "WARPS CTAS STAGES GROUPS", (8, 2, 2, 2), (8, 2, 2, 1), (8, 1, 2, 4), (4, 3, 2, 1), (4, 1, 2, 2)
)


def fits(tokens: int, inputs: int, dtype: torch.dtype, n: int, m: int) -> bool:
    """Whether a kernel takes such a product: rows of whole blocks, whose values are whole pieces."""
    half = dtype in (torch.float16, torch.bfloat16)
    return 1 <= tokens <= MOST and half and bits(n, m) == 1 and inputs % BLOCK == 0 and n * 32 // m % 2 == 0


def kernel_for(tokens: int) -> tuple[str, dict[str, int]]:
    """The kernel, and its macro for so many tokens."""
    if tokens <= FEW:
        return "bitmap_few", {"TOKENS": power_of_two(tokens, 1, FEW)}
    return "bitmap_many", {"TILES": fragments.tiles(tokens)}


def shared_bytes(count: int, tokens: int, touched: int, WARPS: int, STAGES: int, GROUPS: int = 1, CTAS: int = 1) -> int:
    """The shared memory of a CTA: ``count`` values of each 32 columns, blocks of ``touched`` groups of rows."""
    stages = STAGES * ROWS * ((count // 2 | 1) + 1) * PIECE
    if tokens > FEW:
        sums = WARPS // GROUPS * fragments.TILE * fragments.tiles(tokens) * (GROUPS * ROWS + 1)
        return WARPS * stages + 4 * sums
    x, sums = (2 if tokens > 2 else 1) * 4 * BLOCK, power_of_two(tokens, 1, FEW) * 4 * ROWS
    return WARPS * (stages + x + touched * sums)


def most_touched(groups: int, blocks: int, ctas: int) -> int:
    """The groups of rows of which a CTA may have blocks, where ``ctas`` divide the blocks of all groups evenly."""
    return (-(-groups * blocks // ctas) - 2) // blocks + 2


def launch(x, values, index, bias, gate, y, activation: str, n: int, m: int):
    """A function of such tensors that writes y (T, O).

    The CTAs, as many as run at once, divide the blocks of the weight evenly. Those that share rows leave their sums in
    the workspace, and the last of them adds up.
    """
    (tokens, inputs), outputs, count = x.shape, len(values), n * 32 // m
    tensors = x, values, index, bias, gate, y
    copies = tuple(begin_at_words(t, PIECE) for t in (values, index))
    kernel, macros = kernel_for(tokens)
    known = {"N": count, "BF16": int(x.dtype == torch.bfloat16), "ACTIVATION": ACTIVATIONS.index(activation), **macros}
    blocks, multiprocessors, most = inputs // BLOCK, backend.multiprocessors(x), backend.shared_memory(x.device)
    arrange = fragments.ordered(x, True) if tokens > FEW else None

    def sizes(config):
        """Groups of rows, CTAs and the memory of each: more than one wave where each would touch too many groups."""
        groups, a_wave = -(-outputs // (ROWS * config.get("GROUPS", 1))), config["CTAS"] * multiprocessors
        waves = 1 if tokens > FEW else -(-groups // (a_wave * MOST_GROUPS))
        ctas = min(waves * a_wave, groups * blocks)
        return groups, ctas, shared_bytes(count, tokens, most_touched(groups, blocks, ctas), **config)

    def prepare(config):
        groups, ctas, shared = sizes(config)
        start = nvrtc.cuda_launch(kernel, (ctas,), 32 * config["WARPS"], shared, **known, **config)
        rows = ROWS * config.get("GROUPS", 1)
        partial_size = 2 * ctas * rows * (tokens if tokens > FEW else macros["TOKENS"])

        def call(x, values, index, bias, gate, y):
            values, index = (t if copy is None else copy(t) for t, copy in zip((values, index), copies, strict=True))
            partial, counters = workspace.partial_sums(x, partial_size), workspace.counters(x, groups)
            x = x if arrange is None else arrange(x)
            start(x, values, index, bias, gate, y, partial, counters, tokens, outputs, inputs, ctas)

        return call

    all_configs = MANY_CONFIGS if tokens > FEW else CONFIGS
    configs = [config for config in all_configs if config["CTAS"] * sizes(config)[2] <= most]
    key = (kernel, x.dtype, outputs, inputs, count, *macros.values())
    return autotune.pick("nm_bitmap", key, configs, prepare, tensors)
