"""What brings back quality after pruning, in the fixed pattern: distillation and adapters."""

from .adapters import adapter_state_dict, add_adapters, merge_adapters
from .distill import distill
from .distillation import Distillation

__all__ = ["Distillation", "adapter_state_dict", "add_adapters", "distill", "merge_adapters"]
