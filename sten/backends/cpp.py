"""The compiled CPU kernels, when they are built: `torch.ops.sten.csr_linear` and `torch.ops.sten.grouped_nm_linear`.

Importing this module loads the library `sten._C` if it is there and tells torch.compile the shapes of its operators; it
never fails for want of it. Floor F0: plain tensors in, plain tensors out, and nothing of sten but the library.

    >>> from sten.backends import cpp
    >>> cpp.features()["available"] == cpp.available()
    True
"""

import importlib
import importlib.util

import torch

__all__ = ["available", "features", "load_error", "set_instruction_set"]

_library = None
_load_error = None


def available():
    """Say whether the compiled kernels are loaded."""
    return _library is not None


def load_error():
    """Return why a library that is there could not be loaded, or None."""
    return _load_error


def features():
    """Describe the compiled kernels.

    Returns:
        A dict: `available` (bool), `instruction_sets` (list of str, what this processor can run, fastest first) and
        `instruction_set` (str, the one in use, or None). `STEN_CPU=avx512|avx2|portable` in the environment chooses it.
    """
    if not available():
        return {"available": False, "instruction_sets": [], "instruction_set": None}
    return {
        "available": True,
        "instruction_sets": _library.cpu_features(),
        "instruction_set": _library.instruction_set(),
    }


def set_instruction_set(name):
    """Use the kernels for `name` ("avx512", "avx2", "portable", or "auto" for the fastest) from now on.

    Raises:
        ValueError: the name is unknown, or this processor cannot run it.
        RuntimeError: the compiled kernels are not there.
    """
    if not available():
        raise RuntimeError("sten's C++ kernels are not built; `python setup.py build_ext --inplace` builds them")
    _library.set_instruction_set(name)


def _fake_csr_linear(x, values, crow, col, bias, out_features):
    """Return an empty `(*, out_features)` tensor for x `(*, in)`."""
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_grouped_nm_linear(x, values, index, bias, n, m, g, out_features):
    """Return an empty `(*, out_features)` tensor for x `(*, in)`."""
    return x.new_empty((*x.shape[:-1], out_features))


def _load():
    """Load the library; an unusable one (built for another torch, say) is remembered instead of raised."""
    global _library, _load_error
    if importlib.util.find_spec("sten._C") is None:
        return
    try:
        _library = importlib.import_module("sten._C")
    except ImportError as error:
        _load_error = error
        return
    torch.library.register_fake("sten::csr_linear", _fake_csr_linear)
    torch.library.register_fake("sten::grouped_nm_linear", _fake_grouped_nm_linear)


_load()
