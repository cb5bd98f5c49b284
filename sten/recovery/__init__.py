"""What brings back quality after pruning, in the fixed pattern: distillation."""

from .distill import distill
from .distillation import Distillation

__all__ = ["Distillation", "distill"]
