"""sten: sparsity for PyTorch: layouts x operators x sparsifiers, on any nn.Module, in training and in inference."""

from . import ops as ops
from .dispatch import OPERATORS as OPERATORS
from .dispatch import Choice as Choice
from .dispatch import DensifyError as DensifyError
from .dispatch import kernel as kernel
from .dispatch import operator as operator
from .dispatch import strict as strict
from .layout import Layout as Layout
from .tensor import SparseTensor as SparseTensor
from .tensor import from_dense as from_dense
