"""activation(x @ W_gate.T) * (x @ W_up.T) for any layout; whether it takes one launch or two is autotuned.

A product takes (x, *gate weight, gate, *up weight, y), where each weight ends with its bias. Without an up weight these
are None, and the product is a single one, multiplied by ``gate`` unless that is None.
"""

from . import autotune

TWO_LAUNCHES = {"LAUNCHES": 2}


def pick(layout: str, kind: str, key: tuple, configs: list[dict], prepare, tensors: tuple, single, activation: str):
    """``autotune.pick`` whose candidates for a gated product include two launches. ``single(*tensors, activation=)``
    prepares a product without an up weight."""
    if tensors[2 + (len(tensors) - 2) // 2] is None:
        return autotune.pick(f"{layout}_{kind}", key, configs, prepare, tensors)

    def either(config):
        return _in_two_launches(single, tensors, activation) if config == TWO_LAUNCHES else prepare(config)

    return autotune.pick(f"{layout}_gated_{kind}", key, [*configs, TWO_LAUNCHES], either, tensors)


def _in_two_launches(single, tensors, activation):
    """Two launches: the first stores the up product in y, the second reads it there as its gate, tile by tile.

    The up product is rounded to y's dtype in between, as in the one-launch kernels for many tokens.
    """
    halves = _halves(*tensors)
    first, second = single(*halves[0], activation="none"), single(*halves[1], activation=activation)

    def call(*tensors):
        halves = _halves(*tensors)
        first(*halves[0])
        second(*halves[1])

    return call


def _halves(x, *parts):
    *parts, y = parts
    count = len(parts) // 2
    absent = (None,) * count
    return (x, *parts[count + 1 :], None, *absent, y), (x, *parts[:count], y, *absent, y)
