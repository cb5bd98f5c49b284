"""sten: sparsity for PyTorch: layouts x operators x sparsifiers, on any nn.Module, in training and in inference.

What users call stands here; `sten.extend` has what authors of layouts, kernels and methods need, `sten.testing` the
checks for what they bring. Every other module is private.
"""

from . import backends as _backends  # noqa: F401 - registers the kernels
from . import extend, testing
from .calibration import Calibration
from .conversion import (
    Recipe,
    Sensitivity,
    attach,
    densify,
    finalize,
    fuse,
    parallelize_module,
    permute,
    plan,
    sensitivity,
    sparse_op,
    sparsify,
    summary,
    trainable,
    unfuse,
)
from .dispatch import DensifyError, kernel, strict
from .errors import FormatError
from .explanation import compare, explain
from .interchange import (
    from_compressed_tensors,
    from_scipy,
    from_torch,
    load_masks,
    save_masks,
    to_compressed_tensors,
    to_scipy,
    to_torch,
)
from .io import inspect, load, save
from .layouts import BSR, CSR, NM, FanIn, GroupedNM, Masked, VectorNM
from .layouts.base import Layout
from .ops.which import which
from .recovery import Distillation, adapter_state_dict, add_adapters, distill, merge_adapters
from .sparsifiers import (
    ADMM,
    BDWP,
    CAST,
    DSTEE,
    MVUE24,
    SET,
    SRSTE,
    STE,
    BatchTopK,
    BiMask,
    BlockPruneGrow,
    DecayingMask,
    DecayingStructure,
    DSnoT,
    Gradual,
    JumpReLU,
    LeastSquares,
    Magnitude,
    Random,
    RandomFraction,
    Rewind,
    RigL,
    SparseGPT,
    SparseMomentum,
    SparseSwaps,
    Sparsifier,
    SRigL,
    Static,
    Threshold,
    TopK,
    Transposable,
    Wanda,
    chain,
    schedule,
    scores,
)
from .sparsifiers.allocation import ERK, Allocation, Global, Uniform
from .sparsifiers.per_weight import PerWeight
from .sparsifiers.reconstruct import Reconstruct
from .tensor import SparseTensor, from_dense
from .training import optim
from .training.average import follow
from .training.checkpoint import load_run, save_run
from .training.distill import distill_loss

__version__ = "0.1.0"

__all__ = [
    "ADMM", "BDWP", "BSR", "CAST", "CSR", "DSTEE", "ERK", "MVUE24", "NM", "SET", "SRSTE", "STE", "Allocation",
    "BatchTopK", "BiMask", "BlockPruneGrow", "Calibration", "DSnoT", "DecayingMask", "DecayingStructure",
    "DensifyError", "Distillation", "FanIn", "FormatError", "Global", "Gradual", "GroupedNM", "JumpReLU", "Layout",
    "LeastSquares", "Magnitude", "Masked", "PerWeight", "Random", "RandomFraction", "Recipe", "Reconstruct", "Rewind",
    "RigL", "SRigL", "Sensitivity", "SparseGPT", "SparseMomentum", "SparseSwaps", "SparseTensor", "Sparsifier",
    "Static", "Threshold", "TopK", "Transposable", "Uniform", "VectorNM", "Wanda", "adapter_state_dict", "add_adapters",
    "attach", "chain", "compare", "densify", "distill", "distill_loss", "explain", "extend", "finalize", "follow",
    "from_compressed_tensors", "from_dense", "from_scipy", "from_torch", "fuse", "inspect", "kernel", "load",
    "load_masks", "load_run", "merge_adapters", "optim", "parallelize_module", "permute", "plan", "save", "save_masks",
    "save_run", "schedule", "scores", "sensitivity", "sparse_op", "sparsify", "strict", "summary", "testing",
    "to_compressed_tensors", "to_scipy", "to_torch", "trainable", "unfuse", "which",
]  # fmt: skip

# Python makes every imported submodule an attribute; the private ones are taken off again, so that what is reachable as
# `sten.x` is the list above (`from sten.tensor import ...` works as ever).
for _name in [name for name in globals() if not name.startswith("_") and name not in __all__]:
    del globals()[_name]


def __getattr__(name: str):
    """What sten does not have: where another library's word for it is known, sten's."""
    words = {
        "prune": "sten.sparsify(model, sparsity=0.9) makes its weights sparse",
        "compress": "sten.sparsify(model, sparsity=0.9) makes its weights sparse",
        "state_dict": "model.state_dict() has all state, sparse weights included",
        "load_state_dict": "model.load_state_dict(state) takes sparse weights",
        "to_dense": "sten.densify(model) makes its weights dense",
    }
    hint = words.get(name, "help(sten) lists all")
    raise AttributeError(f"Expected a name of sten, got {name!r}; {hint}.", name=name)
