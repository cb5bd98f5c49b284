"""Where a program works: the order of the output tiles.

GROUP row tiles walk the columns together, so that programs running at once share both operands in L2.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of program ``pid``."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height
