"""What a user would reach for instead of a sparse product on a GPU: dense weights in fewer bits, and where they win.

One H100, `docs/performance/gpu.md`: 4-bit weights by tinygemm (`torch._convert_weight_to_int4pack`), fp8 products by
`torch._scaled_mm`, whose activations are rounded too. Ratios are to a dense product in bfloat16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

REACHED = 0.85  # of what its bytes allow, by the best sparse kernels here


class Rival(NamedTuple):
    """A dense product in fewer bits; `ratio` was measured from `least` to `most` tokens, of `share` of the bytes."""

    name: str
    least: int
    most: float
    ratio: float
    share: float


RIVALS = (Rival("int4 (tinygemm)", 1, 1, 2.2, 0.27), Rival("fp8 (torch._scaled_mm)", 1024, math.inf, 1.8, 0.5))


def faster(tokens: int, share: float, expands: bool) -> str:
    """The rivals of a product that reads this share of the dense bytes, or expands, as the end of a reason, or ""."""
    reached = 1.0 if expands else REACHED / max(share, 1e-9)
    return "".join(
        f"; dense {r.name} reads {r.share} of the bytes and was {r.ratio} times as fast as dense: it would be faster"
        for r in RIVALS
        if r.least <= tokens <= r.most and reached < r.ratio and r.share <= share
    )


__all__ = ["RIVALS", "Rival", "faster"]
