"""What a model's layers cost and what runs in them: `sten.explain` and `sten.compare`."""

from .compare import compare
from .explain import explain

__all__ = ["compare", "explain"]
