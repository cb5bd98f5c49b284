"""The private parts of Triton that launches use: its C launcher, and its encoder of TMA descriptors.

Both are used only with the versions in ``TESTED``; with any other, every launch goes through Triton's front end, which
costs tens of microseconds more host time and is always correct. ``NAMES`` lists the private names.
"""

import importlib

import triton

TESTED = ("3.6.0",)
NAMES = (
    "backends.nvidia.driver.CudaLauncher",
    "backends.nvidia.driver.TMA_DTYPE_DEVICE_TO_HOST",
    "backends.nvidia.driver.make_tensordesc_arg",
)


def fetch(name: str):
    """One of ``NAMES``, or None."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(f"triton.{module}"), attribute, None)
    except ImportError:
        return None


def usable() -> bool:
    """Whether kernels may be started without Triton's front end."""
    return triton.__version__.partition("+")[0] in TESTED and None not in map(fetch, NAMES)


def direct_start(compiled):
    """(start, args) of a compiled kernel, or None where each call has to go through the front end.

    ``start(x, y, z, stream, *args, *arguments, *constants)`` launches it on a grid (x, y, z); descriptors among the
    arguments must be encoded, see ``descriptor``.
    """
    if not usable():
        return None
    launcher = compiled.run
    start = launcher.launch
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if hasattr(start, "__code__"):  # a wrapper that encodes descriptors at each call, around the C launcher
        cells = dict(zip(start.__code__.co_freevars, start.__closure__ or (), strict=True))
        if "launcher" not in cells:
            return None
        start = cells["launcher"].cell_contents
    settings = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
    return start, (compiled.function, *settings, compiled.packed_metadata, None, None, None)


def descriptor(compiled, number: int, shape, strides):
    """(fill, fixed, rest) of the kernel's descriptor of this number: ``[fill(address, *fixed), *rest]`` stands for it
    in a call of ``start``. None where the front end has to encode it."""
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    if not metas or metas[number]["fp4_padded"]:
        return None
    meta, shape, strides = metas[number], tuple(shape), tuple(strides)
    kind = fetch("backends.nvidia.driver.TMA_DTYPE_DEVICE_TO_HOST")[meta["elem_type"]]
    fixed = (meta["swizzle"], meta["elem_size"], kind, meta["block_size"], shape, strides, 0)
    return triton.runtime.driver.active.utils.fill_tma_descriptor, fixed, (*shape, *strides)
