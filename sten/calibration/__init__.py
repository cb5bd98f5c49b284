"""Calibration: what a few batches say about the inputs of each weight, block by block, for methods that read it.

batches (data.py) -> the blocks of the model and the weights in them (blocks.py, trace.py) -> `Walk` (walk.py): block by
block, the inputs that the pruned blocks before it give (inputs.py), statistics of them (sites.py, statistics.py), the
decisions of the caller, put into place for a forward pass (substitute.py). The model is never written.
"""

from .data import Calibration
from .walk import BlockView, Stage, Walk, Weight

__all__ = ["BlockView", "Calibration", "Stage", "Walk", "Weight"]
