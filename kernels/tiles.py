"""Where a program works, the order of the output tiles; and when it begins.

GROUP row tiles walk the columns together, so that programs running at once share both operands in L2.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of program ``pid``."""
    first = pid // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def begin(PDL: tl.constexpr):
    """With PDL (programmatic dependent launch), this program was started while the kernel before it still ran.

    It waits until that one has ended and its writes are seen; every program must, so that the next kernel, which may
    start as soon as all have passed here, waits for all before it. What a kernel may have written is read after it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
