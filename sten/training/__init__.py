"""Weights that train, and what acts on them around the steps of an optimizer."""

from .trained_weight import TrainedWeight

__all__ = ["TrainedWeight"]
