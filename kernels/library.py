"""The one door to ``torch.library``: a launcher becomes the operator ``sten::<name>`` with a fake.

``Library.define`` and ``impl`` are used rather than ``custom_op`` because a call through them costs the host a few
microseconds less, and the gradients belong to the framework's ``autograd.Function``, not to the operators.
"""

import functools
import math
import os
import threading

import torch
import triton
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

try:
    from triton.backends.nvidia.driver import make_tensordesc_arg
except ImportError:  # another version of Triton: its own front end encodes the descriptors
    make_tensordesc_arg = None

LIB = torch.library.Library("sten", "FRAGMENT")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEFAULT_STREAM = 0
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
SETTINGS = frozenset((type(None), int, float, str, bool))  # a symbolic size is none of them: a trace is on its way
dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
transforms_active, tracing_state = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
profiler_enabled = torch._C._autograd._profiler_enabled
deterministic = torch._C._get_deterministic_algorithms  # when torch may have to fill what is empty
ALLOCATE = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def operator(schema: str, fake):
    """Registers the decorated launcher under ``schema``; returns the function that calls it.

    ``fake`` gets the same arguments and returns an empty output of the right shape. The launcher runs with the device
    of its first argument current, as Triton launches where the current device is. Where nobody watches, it is called
    at once: torch's dispatcher takes 7 us of host time, more than a launch.
    """

    def register(launch):
        def on_gpu(first, *args):
            if first.get_device() == torch._C._cuda_getDevice():
                return launch(first, *args)
            with torch.cuda.device(first.device):
                return launch(first, *args)

        def on_cpu(first, *args):
            if not INTERPRET:
                raise RuntimeError(f"sten::{name} needs a GPU, or TRITON_INTERPRET=1 set before triton is imported")
            return launch(first, *args)

        def call(first, *args):
            if watched((first, *args)):
                return overload(first, *args)
            launcher = on_gpu if first.is_cuda else on_cpu if first.is_cpu else overload
            return launcher(first, *args)

        name = schema.partition("(")[0]
        LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(name, on_gpu, "CUDA")
        LIB.impl(name, on_cpu, "CPU")
        torch.library.register_fake(f"sten::{name}", fake, lib=LIB)
        overload = getattr(torch.ops.sten, name).default
        return functools.wraps(launch)(call)

    return register


def watched(arguments) -> bool:
    """Whether anybody has to see the operator itself: a compiler, a mode, torch.func, a profiler, autograd of either
    mode, or a tensor that is more than its numbers (a subclass, a lazy negation). Written for speed: it comes before
    every launch."""
    if (
        torch.compiler.is_compiling()
        or dispatch_modes()
        or function_modes()
        or transforms_active()
        or tracing_state() is not None
        or profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return True
    recording = torch.is_grad_enabled()
    for a in arguments:
        kind = type(a)
        if kind in PLAIN:
            if a.is_neg() or a._is_zerotensor() or (recording and a.requires_grad):
                return True
        elif kind not in SETTINGS:
            return True
    return False


def exact(dtype: torch.dtype) -> bool:
    """Whether products are made without tensor cores: fp32, unless torch's own switch allows tf32."""
    if dtype != torch.float32:
        return False
    try:
        return not torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the newer switch was set, and torch refuses to mix the two
        return torch.backends.cuda.matmul.fp32_precision != "tf32"


def precision(x: torch.Tensor) -> str:
    """How a product of ``x`` rounds its operands."""
    return "tf32" if x.dtype == torch.float32 and not exact(x.dtype) else "ieee"


def capturing(x: torch.Tensor) -> bool:
    """Whether the current stream of ``x`` records a CUDA graph, when nothing may be timed or synchronized."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def on_default_stream(x: torch.Tensor) -> bool:
    """Whether launches on the GPU of ``x`` go to its default stream now: no capture is on it, no pool of a graph."""
    return torch._C._cuda_getCurrentRawStream(x.get_device()) == DEFAULT_STREAM


def describable(matrix: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of ``matrix``: Hopper, and rows that start at multiples of 16 bytes."""
    if INTERPRET or matrix.numel() == 0 or matrix.data_ptr() % 16 or matrix.stride(0) * matrix.element_size() % 16:
        return False
    return matrix.stride(1) == 1 and _capability(matrix.device)[0] >= 9


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(x: torch.Tensor) -> int:
    """How many programs run at once at least; the interpreter gets a small number so that work is still split."""
    return _multiprocessors(x.device) if x.is_cuda else 4


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """The constants of a launch that may begin while the kernel before it ends, if a GPU can: see ``tiles.begin``."""
    if INTERPRET or _capability(x.device)[0] < 9:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def as_rows(x: torch.Tensor):
    """The function that makes tensors of this shape (*, features) a matrix: a call less for what is one already."""
    if x.dim() == 2:
        return lambda x: x
    rows, features = x.numel() // x.shape[-1], x.shape[-1]
    return lambda x: x.reshape(rows, features)


def contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def rows_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    """Its rows without gaps; ``contiguous`` would leave one column as it is, whatever its stride."""
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)


def wide(*tensors) -> bool:
    """Whether any offset into ``tensors`` needs 64 bits."""
    return any(
        t is not None and sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
    )


def power_of_two(size: int, low: int, high: int) -> int:
    """The power of two that holds ``size``, within ``low`` and ``high``."""
    return min(high, max(low, triton.next_power_of_2(max(size, 1))))


def splits(tiles: int, wanted: int, length: int, least: int, most: int = 16) -> int:
    """In how many parts each of ``tiles`` reductions of ``length`` is split, a power of two up to ``most``: so that
    there are as many parts as ``wanted``, where each may still have ``least``."""
    split = 1
    while tiles * split < wanted and split < most and length // (2 * split) >= least:
        split *= 2
    return split


class Launch:
    """One kernel with its grid and compile-time constants settled.

    ``described`` names arguments that the copy engine fetches, {position: (block, shape, strides)}: they are given as
    tensors, and their descriptors are kept by address. The first call goes through Triton's front end, which takes
    tens of microseconds to find the compiled kernel; later ones call its launcher directly, so everything the front end
    specializes on (dtypes, alignment, which integers are 1 or divisible by 16, the device) has to stay as it was.
    ``plan`` sees to that.
    """

    def __init__(self, kernel, grid, described=None, **constants):
        self.kernel, self.grid, self.constants, self.described = kernel, grid, constants, described or {}
        self.start, self.encoded = None, {}

    def __call__(self, *args):
        if self.start is None:
            self._first(args)
            return
        if self.described:
            args = self._with_descriptors(args)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        self.start(*self.grid, stream, *self.fixed, *args, *self.tail)

    def _first(self, args):
        told = [
            TensorDescriptor(a, *self.described[i][1:], self.described[i][0]) if i in self.described else a
            for i, a in enumerate(args)
        ]
        compiled = self.kernel[self.grid](*told, **self.constants)
        if INTERPRET:
            return
        launcher = compiled.run
        start, self.metas = _raw(launcher.launch), getattr(compiled.metadata, "tensordesc_meta", None)
        if start is None or launcher.global_scratch_size or launcher.profile_scratch_size:
            return  # a Triton that launches differently: the front end serves every call
        self.device, self.grid = torch.cuda.current_device(), (*self.grid, 1, 1)[:3]
        self.tail = tuple(self.constants[name] for name in self.kernel.arg_names[len(args) :])
        settings = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
        self.fixed = (compiled.function, *settings, compiled.packed_metadata, None, None, None)
        self.start = start

    def _with_descriptors(self, args):
        told, at = [], 0
        for number, place in enumerate(self.described):
            address = (number, args[place].data_ptr())
            found = self.encoded.get(address)
            if found is None:
                if len(self.encoded) > 64:
                    self.encoded.clear()
                block, shape, strides = self.described[place]
                made = TensorDescriptor(args[place], shape, strides, block)
                found = self.encoded[address] = make_tensordesc_arg(made, self.metas[number] if self.metas else None)
                if not self.metas:  # then the list holds the tensor itself, which must not be kept alive
                    del self.encoded[address]
            told += args[at:place]
            told += found
            at = place + 1
        return told + list(args[at:])


def for_tables(kernel, grid, described=None, **constants) -> tuple[Launch, ...]:
    """One launch for a table that may still be on its way, and one for a settled table: see ``derived``."""
    return tuple(Launch(kernel, grid, described, SETTLED=settled, **constants) for settled in (False, True))


def blank(like: torch.Tensor, *shape: int):
    """The function that makes an empty tensor of this shape, as ``like.new_empty`` would; to be called where a launcher
    is, with the device of ``like`` current. torch's own front door to its allocator costs half a launch."""
    strides = tuple(math.prod(max(size, 1) for size in shape[place + 1 :]) for place in range(len(shape)))
    dtype, device = like.dtype, like.device

    def slowly():
        return torch.empty(shape, dtype=dtype, device=device)

    if ALLOCATE is None or not like.is_cuda:
        return slowly
    return lambda: slowly() if deterministic() else ALLOCATE(shape, strides, dtype)


def filled(launch, like: torch.Tensor, shape: tuple[int, ...], *integers: int, arrange=lambda first: first):
    """The function from tensors to a new one of this shape, beside ``like``, that ``launch(arrange(first), *rest, new,
    *integers)`` fills; nothing is launched for an empty one."""
    size, new = math.prod(shape), blank(like, *shape)

    def call(first, *rest):
        out = new()
        if size:
            launch(arrange(first), *rest, out, *integers)
        return out

    return call


def _raw(launch):
    """Triton's C launcher, under the wrapper that encodes descriptors at each call."""
    if not hasattr(launch, "__code__"):
        return launch
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    return cells["launcher"].cell_contents if "launcher" in cells and make_tensordesc_arg else None


def _refuse(tensors, strided):
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors on one device; got {', '.join(sorted(devices))}.")
    for place, t in enumerate(tensors):
        if t is not None and place != strided and not t.is_contiguous():
            raise ValueError(f"A stored tensor of shape {tuple(t.shape)} has strides {t.stride()}: make it contiguous.")


_plans: dict[tuple, object] = {}


class _Asked(threading.local):
    """Whether the next ``plan`` of this thread is to be told, not run."""

    now = False


_asked = _Asked()


def appearance(t: torch.Tensor | None) -> tuple | None:
    """All of a tensor that the decisions of a launch hang on."""
    return t if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)


def plan(key: tuple, tensors: tuple, make, strided: int | None = 0):
    """The callable that ``make()`` returned for this key: the launch decisions of earlier, equal calls.

    ``tensors`` may include None; their layout and alignment are part of the key. They lie on one device, and all but
    the one at ``strided``, the activations, are contiguous: a kernel that was told otherwise would read beside them.
    """
    asked, _asked.now = _asked.now, False  # at once: what is planned on the way to this plan is run
    found = _planned((*key, *map(appearance, tensors)), tensors, make, strided)
    return functools.partial(_told, found) if asked else found


def _told(found, *tensors):
    """In the place of a plan that ``decision`` asks for."""
    return found, tensors


def _planned(key, tensors, make, strided):
    found = _plans.get(key)
    if found is None:
        _refuse(tensors, strided)
        if capturing(tensors[0]):  # nothing can be timed now, so that nothing is settled
            return make()
        if len(_plans) > 4096:
            _plans.clear()
        found = _plans[key] = make()
    return found


def decision(product, *args) -> tuple | None:
    """(call, tensors), where ``product(*args)``, an operator whose launcher ends in ``plan(...)(*tensors)``, would have
    returned ``call(*tensors)``; None where it planned nothing. Nobody may be watching: torch's dispatcher would not
    hand it on."""
    _asked.now = True
    try:
        told = product(*args)
    finally:
        planned, _asked.now = not _asked.now, False
    return told if planned else None
