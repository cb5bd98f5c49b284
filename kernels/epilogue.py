"""What happens to a finished fp32 tile before it is stored: bias, activation, gate; and the split-K hand-over.

Letters: y the output tile, S the number of splits of the reduction.
"""

import torch
import triton
import triton.language as tl

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activation_name(activation: str | None) -> str:
    """The name the operators take; refuses one that no kernel knows."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
    return name


def apply(y: torch.Tensor, activation: str, gate: torch.Tensor | None) -> torch.Tensor:
    """The same epilogue in torch, for variants that end in cuBLAS."""
    if activation == "gelu_tanh":
        y = torch.nn.functional.gelu(y, approximate="tanh")
    elif activation != "none":
        y = getattr(torch.nn.functional, activation)(y)
    return y if gate is None else y * gate


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # a maximum would turn NaN into 0
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        y = y / (1.0 + tl.exp(-2.0 * inner))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def last_to_arrive(count_ptr, S: tl.constexpr):
    """Counts this program in; true for the last of S. The counter is 0 again for the next launch."""
    tl.debug_barrier()  # every thread's partial sums are written before the one thread below releases them
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == S - 1
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def add_up(own_ptr, inside, S: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The S partial tiles, in a fixed order, so that the sum does not depend on who came last."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(S):
        acc += tl.load(own_ptr + s * (ROWS * COLUMNS) + inside, cache_modifier=".cg")
    return acc


class Counters:
    """Zeroed int32 counters, each launch in flight with its own, without a kernel that zeroes them.

    Launches of one stream follow each other and share; every launch recorded in a CUDA graph keeps its own, since the
    graph may be replayed beside anything. When the slab is used up, a recorded launch zeroes its own counters.
    """

    SLAB = 1 << 20

    def __init__(self):
        self._slabs, self._used, self._by_stream = {}, {}, {}

    def take(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if not x.is_cuda:
            return torch.zeros(size, dtype=torch.int32)
        device = x.device.index
        if torch._C._cuda_isCurrentStreamCapturing():
            return self._cut(device, size) if device in self._slabs else self._zeros(device, size)
        place = (device, torch._C._cuda_getCurrentRawStream(device))
        held = self._by_stream.get(place)
        if held is None or held.numel() < size:
            if device not in self._slabs:
                self._slabs[device], self._used[device] = self._zeros(device, self.SLAB), 0
                torch.cuda.synchronize(device)  # once: other streams use the slab as well
            held = self._by_stream[place] = self._cut(device, max(size, 4096))
        return held

    def _cut(self, device, size):
        start = self._used[device]
        if start + size > self.SLAB:
            return self._zeros(device, size)
        self._used[device] = start + -(-size // 4) * 4  # every slice as aligned as the first, which a launch relies on
        return self._slabs[device][start : start + size]

    @staticmethod
    def _zeros(device, size):
        return torch.zeros(size, dtype=torch.int32, device=device)


counters = Counters()
