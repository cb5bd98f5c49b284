"""activation(x @ W_gate.T) * (x @ W_up.T) for any layout: one launch, or the two it replaces, is tuned like a tile.

A planner of gated products gets (x, *gate weight, gate, *up weight, y), each weight ending with its bias; without an up
weight its parts are None and it plans a lone product, whose result is multiplied by ``gate`` unless that is None.
"""

TWO_LAUNCHES = {"LAUNCHES": 2}


def in_two_launches(make, given, activation):
    """The up product is stored in y, where the second launch finds it as its gate: each tile reads and writes its own.

    ``make(*given, activation=...)`` is the planner. One rounding to y's dtype lies between the launches, as it does
    between the halves of a tile in the one-launch kernels for many tokens.
    """
    halves = _halves(*given)
    first, second = make(*halves[0], activation="none"), make(*halves[1], activation=activation)

    def call(*given):
        halves = _halves(*given)
        first(*halves[0])
        second(*halves[1])

    return call


def _halves(x, *parts):
    *parts, y = parts
    count = len(parts) // 2
    absent = (None,) * count
    return (x, *parts[count + 1 :], None, *absent, y), (x, *parts[:count], y, *absent, y)
