"""The compiled CPU kernels, if they are built: `csr_linear`, `grouped_nm_*`, `band_*`, `nm_*` and `codes_*`.

They are operators of `torch.ops.sten`.

Importing this module loads the library `sten._C` if it exists and registers the fake kernels of its operators; without
the library the import still succeeds.

    >>> from sten.backends import cpp
    >>> cpp.features()["available"] == cpp.available()
    True
"""

import importlib
import importlib.util
import zlib
from collections.abc import Callable

import torch

__all__ = ["available", "crc32", "features", "load_error", "operator", "set_instruction_set"]

_library = None
_load_error = None


def available():
    """Return whether the compiled kernels are loaded."""
    return _library is not None


def load_error():
    """Return the exception if the library exists but could not be loaded, or None."""
    return _load_error


def features():
    """Describe the compiled kernels.

    Returns:
        A dict: `available` (bool), `instruction_sets` (list of str, what this processor can run, fastest first),
        `instruction_set` (str, the one in use, or None; `STEN_CPU=amx|avx512|avx2|portable` in the environment chooses)
        and `bfloat16` (bool, whether it multiplies bfloat16).
    """
    if not available():
        return {"available": False, "instruction_sets": [], "instruction_set": None, "bfloat16": False}
    return {
        "available": True,
        "instruction_sets": _library.cpu_features(),
        "instruction_set": _library.instruction_set(),
        "bfloat16": _library.bfloat16(),
    }


def set_instruction_set(name):
    """Set the instruction set of the kernels: "amx", "avx512", "avx2", "portable", or "auto" for the fastest.

    "amx" is "avx512" with products of bfloat16 in AMX's tiles.

    Raises:
        ValueError: the name is unknown, or this processor cannot run it.
        RuntimeError: the compiled kernels are not loaded.
    """
    if not available():
        raise RuntimeError("Expected compiled kernels, got none; build them: `python setup.py build_ext --inplace`.")
    _library.set_instruction_set(name)


def crc32():
    """Return zlib.crc32, or the compiled one, which is four times as fast, where this processor runs it."""
    compiled = available() and hasattr(_library, "crc32") and _library.has_crc32()  # or the build is an old one
    return _library.crc32 if compiled else zlib.crc32


def operator(name: str, intercepted: bool) -> Callable[..., torch.Tensor]:
    """Return the operator `sten::<name>` as a Plan calls it, without `trusted`.

    It checks the bounds of the pattern among its arguments. Where no call is intercepted, it is called from C++, 2 us
    faster, and remembers what it checked: not again while the parts and versions are those of its last call. Tensors
    made in inference mode have no version: these are checked at every call.
    """
    return getattr(torch.ops.sten, name).default if intercepted else _library.direct(name)


def _fake(x, *arguments, trusted=False, table=None, activation=0):
    """Return an empty `(*, out_features)` tensor for x `(*, in)`; `out_features` is the last argument."""
    return x.new_empty((*x.shape[:-1], arguments[-1]))


def _fake_bits(crow, col, columns, rows):
    """Return empty bits: (rows, bytes of whole words of 32 columns)."""
    return col.new_empty((rows, -(-columns // 32) * 4), dtype=torch.uint8)


def _fake_windows(crow, col, columns, rows):
    """Return an empty table of as many groups as the pattern has."""
    groups = torch.library.get_ctx().new_dynamic_size()
    return col.new_empty(rows + 1 + 9 * groups)


def _fake_values(grad, x, crow, col, height, width, columns, *, trusted=False):
    """Return empty values: (out_features, entries) or, with crow, (entries, height, width), (entries,) for width 0."""
    if crow is None:
        return x.new_empty((grad.shape[-1], col.shape[1]))
    return x.new_empty((len(col), height, width) if width else (len(col),))


def _fake_grouped_values(grad, x, index, n, m, g, *, trusted=False):
    """Return empty values: shaped as index, with n for each of its columns."""
    return x.new_empty((*index.shape, n))


def _fake_collect(dense, index, n, m):
    """Return empty values, (out_features, slots)."""
    return dense.new_empty((len(dense), -(-dense.shape[1] // m) * n))


def _fake_conv(x, *arguments, trusted=False):
    """Return an empty (images, out_channels, rows, columns) tensor; the geometry and the outputs are the last."""
    *_, geometry, out = arguments
    kernel, stride, padding, dilation = (geometry[i : i + 2] for i in range(0, 8, 2))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = zip(x.shape[2:], reach, stride, padding, strict=True)
    return x.new_empty((x.shape[0], out, *((n + 2 * p - r) // s + 1 for n, r, s, p in sizes)))


def _fake_codes(values, crow, index, matrix, *numbers):
    """Return an empty (rows, out_features) tensor; the number of rows is the last argument."""
    return matrix.new_empty((numbers[-1], matrix.shape[1]))


def _fake_codes_values(grad, crow, index, weight, height, blocks):
    """Return empty values: shaped as index, or (entries, height, 1) for blocks."""
    return grad.new_empty((len(index), height, 1) if blocks else index.shape)


def _load():
    """Load the library; the error of an unusable one (built for another torch, say) is stored, not raised."""
    global _library, _load_error
    if importlib.util.find_spec("sten._C") is None:
        return
    try:
        _library = importlib.import_module("sten._C")
    except ImportError as error:
        _load_error = error
        return
    for name in ("csr", "grouped_nm", "band", "nm"):
        torch.library.register_fake(f"sten::{name}_linear", _fake)
    for name in ("grouped_nm_grad_input", "band_grad_input"):
        torch.library.register_fake(f"sten::{name}", _fake)
    torch.library.register_fake("sten::band_grad_values", _fake_values)
    torch.library.register_fake("sten::pattern_bits", _fake_bits)
    torch.library.register_fake("sten::pattern_windows", _fake_windows)
    torch.library.register_fake("sten::grouped_nm_grad_values", _fake_grouped_values)
    torch.library.register_fake("sten::nm_expand", lambda values, *sizes: values.new_empty((len(values), sizes[-1])))
    torch.library.register_fake("sten::nm_collect", _fake_collect)
    for name in ("band_conv2d", "grouped_nm_conv2d"):
        torch.library.register_fake(f"sten::{name}", _fake_conv)
    for name in ("codes_linear", "codes_grad_weight"):
        torch.library.register_fake(f"sten::{name}", _fake_codes)
    torch.library.register_fake("sten::codes_grad_values", _fake_codes_values)
    torch.library.register_fake("sten::codes_topk", lambda x, count: x.new_empty((len(x), count), dtype=torch.int32))


_load()
