"""Compiles every configuration that the tuner may try, for a GPU that need not be present.

    python triton_compile.py 80

A launch is compiled and not run. Prints JSON: {tuning key: [(bytes of shared memory, bytes of stack that registers
spilled to), or the compiler's error]}.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sten.kernels import above, autotune, bsr, codes, csr, grouped_nm, launch, nm, pattern_cache, vector_nm
from sten.kernels.backend import Backend

ARCH = int(sys.argv[1])
O, I, HALF = 4096, 4096, torch.bfloat16
results: dict[str, list] = {}
tuning_keys: list[str] = []  # the tuning key whose configurations are being compiled


def compile_only(launch, args):
    """Stands for ``TritonKernel.__call__``: the same specialization as Triton's front end, and no launch."""
    names, signature, constants, attributes = launch.kernel.arg_names, {}, {}, {}
    for position, name in enumerate(names):
        argument = args[position] if position < len(args) else launch.constants[name]
        kind = _kind(launch, position, argument) if position < len(args) else "constexpr"
        signature[name] = kind
        if kind == "constexpr":
            constants[(position,)] = argument
        elif kind.startswith("*") or (kind == "i32" and argument % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.constants.items() if name not in names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options)
        outcome = compiled.metadata.shared, stack(compiled.asm["cubin"])
    except Exception as problem:  # the compiler's error is the result
        outcome = f"{launch.constants}: {type(problem).__name__}: {problem}"
    results.setdefault(tuning_keys[-1] if tuning_keys else launch.kernel.fn.__name__, []).append(outcome)


def stack(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def _kind(launch, position, argument):
    if argument is None or (isinstance(argument, int) and argument == 1):
        return "constexpr"
    if isinstance(argument, int):
        return "i32"
    kind = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}.get(argument.dtype)
    kind = kind or str(argument.dtype).removeprefix("torch.int").join(("i", ""))
    if position in launch.tma_arguments:
        return f"tensordesc<{kind}[{','.join(map(str, launch.tma_arguments[position][0]))}]>"
    return "*" + kind


def every_config(kernel, key, configs, prepare, tensors):
    tuning_keys.append(f"{kernel} {key}")
    calls = [prepare(config) for config in configs]
    for call in calls:
        call(*tensors)
    if kernel.partition("_")[0] in ("bsr", "grouped"):  # also as in a capture, where tables are not ready
        look_up = pattern_cache.Derived.__call__
        pattern_cache.Derived.__call__ = lambda self, *sources: (self.make(*sources), False)
        for call in calls:
            call(*tensors)
        pattern_cache.Derived.__call__ = look_up
    tuning_keys.pop()
    return calls[0]


def prepare(tokens, v, block, dtype=HALF):
    """Prepares the products and gradients of every layout, as the first call on a GPU would."""
    x, grad = torch.randn(tokens, I, dtype=dtype), torch.randn(tokens, O, dtype=dtype)
    values, index = torch.empty(O, I // 4, dtype=dtype), torch.zeros(O // v, I // 4, dtype=torch.int32)
    few, none, rate = tokens <= vector_nm.FEW, (None,) * 4, {"n": 1, "m": 4, "v": v, "out_features": O}
    gather = {"variant": "few" if few else "gather", **rate}  # also where expanding would be chosen
    blocks_of = {"variant": "few" if few else "blocks", "out_features": O, "activation": "none"}
    vector_nm.linear.prepare(x, values, index, None, *none, activation="none", **gather)
    if v == 128 and dtype == HALF:
        vector_nm.linear.prepare(x, values, index, None, None, values, index, None, activation="silu", **gather)
    crow = torch.arange(O // block + 1, dtype=torch.int32) * (I // block // 16)
    col = torch.zeros(int(crow[-1]), dtype=torch.int32)
    blocks = torch.empty(len(col), block, block, dtype=dtype)
    bsr.linear.prepare(x, blocks, crow, col, None, *none, None, **blocks_of)
    if tokens > vector_nm.FEW:
        vector_nm.grad_values.prepare(grad, x, index, n=1, m=4, v=v, feature_major=False)
        bsr.linear_grad_values.prepare(grad, x, col, col, col, bh=block, bw=block)
        return
    fixed = {"out_features": O, "activation": "none", "save_memory": True}
    for n in (1, 2):
        fine = torch.empty(O, n * I // 4, dtype=HALF), torch.zeros(O, n * I // 16, dtype=torch.uint8)
        nm.linear.prepare(x, *fine, None, None, n=n, m=4, **fixed)
    if tokens == 16:
        bitmap = torch.empty(O, I // 2, dtype=HALF), torch.zeros(O, I // 32, 4, dtype=torch.uint8)
        nm.linear.prepare(x, *bitmap, None, None, n=16, m=32, **fixed)
    entries = (torch.empty(40 * O, dtype=HALF), torch.arange(O + 1, dtype=torch.int32) * 40)
    col = torch.zeros(40 * O, dtype=torch.int32)
    csr.linear.prepare(x, *entries, col, None, None, out_features=O, activation="none")
    index, activation = torch.zeros(tokens, 32, dtype=torch.int32), torch.empty(tokens, 32, dtype=HALF)
    codes.linear.prepare(activation, None, index, torch.empty(I, O, dtype=HALF), None, tokens=tokens)
    codes.grad_values.prepare(grad, None, index, torch.empty(I, O, dtype=HALF))
    if tokens == 1:
        above.above.prepare(x, None, number=0.5, signed=False, relu=False)(x, None)
    if tokens == 16:
        starts, order = torch.zeros(I + 1, dtype=torch.int32), torch.zeros(tokens * 32, dtype=torch.int64)
        codes.grad_weight.prepare(activation, starts, order, None, grad)
        shared, crow = torch.empty(32, tokens, 1, dtype=HALF), torch.tensor([0, 32], dtype=torch.int32)
        codes.linear.prepare(shared, crow, index[0], torch.empty(I, O, dtype=HALF), None, tokens=tokens)
    for n, m, g in ((1, 16, 16), (2, 4, 8), (1, 200, 2)):
        rows = torch.tensor(list(itertools.combinations(range(m), n)), dtype=torch.int32)
        index = torch.zeros(-(-I // (g * len(rows))), -(-O // m), len(rows), g, dtype=torch.int16)
        slots = torch.empty(*index.shape, n, dtype=HALF), index, rows
        grouped_nm.linear.prepare(x, *slots, None, None, m=m, **fixed)
        grouped_nm.expand.prepare(*slots, m=m, out_features=O, in_features=I)(*slots)


launch.TritonKernel.__call__ = compile_only
Backend.capability = lambda self, device: divmod(ARCH, 10)
autotune.pick = every_config
for case in ((1, 128, 128), (16, 128, 128), (64, 64, 64), (2048, 128, 128), (2048, 16, 16)):
    prepare(*case)
prepare(2048, 128, 128, torch.float32)
prepare(2048, 16, 16, torch.float32)
print(json.dumps(results))
