"""activation(x @ W_gate.T) * (x @ W_up.T) for any layout: one launch, or the two it replaces, is tuned like a tile.

A product gets (x, *gate weight, gate, *up weight, y), each weight ending with its bias; without an up weight its parts
are None and it is a lone product, whose result is multiplied by ``gate`` unless that is None.
"""

from . import autotune

TWO_LAUNCHES = {"LAUNCHES": 2}


def pick(layout: str, kind: str, key: tuple, configs: list[dict], prepare, given: tuple, lone, activation: str):
    """``autotune.pick``, which of a gated product may also take two launches. ``lone(*given, activation=)`` prepares
    one that has no up weight."""
    if given[2 + (len(given) - 2) // 2] is None:
        return autotune.pick(f"{layout}_{kind}", key, configs, prepare, given)

    def either(config):
        return _in_two_launches(lone, given, activation) if config == TWO_LAUNCHES else prepare(config)

    return autotune.pick(f"{layout}_gated_{kind}", key, [*configs, TWO_LAUNCHES], either, given)


def _in_two_launches(lone, given, activation):
    """The up product is stored in y, where the second launch finds it as its gate: each tile reads and writes its own.

    One rounding to y's dtype lies between the launches, as it does between the halves of a tile in the one-launch
    kernels for many tokens.
    """
    halves = _halves(*given)
    first, second = lone(*halves[0], activation="none"), lone(*halves[1], activation=activation)

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
