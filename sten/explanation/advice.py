"""What to do with a layer, from what was measured: keep it, go dense, or take another layout, and why."""

from __future__ import annotations

from ..training.dense_weight import DenseWeight
from .layers import Layer
from .measure import Alternative, Measurement

DENSE = "dense"  # the advice for a dense layer, of which nothing else is known
SMALL = 0.01  # of the model's time: a loss below it may be worth the bytes


def advise(layer: Layer, of: Measurement, model: float, sizes: tuple[int, int]) -> tuple[str, str]:
    """("keep", "dense" or "layout", the reason in words).

    Args:
        layer, of: what was measured of all calls.
        model: seconds that the whole model takes.
        sizes: bytes stored, and of the dense weights.
    """
    best = _best(of)
    if of.speedup is None:
        return ("layout", _other(best, "its present entries")) if best is not None else ("keep", DENSE)
    if any(isinstance(target.weight, DenseWeight) for target in layer.targets):
        return "keep", "in training: its method computes the weight at each use; call sten.finalize for other times"
    stored, dense = sizes
    ratio = f"{stored / dense:.2f} of its bytes" if dense else "no bytes"
    if of.speedup.low > 1:
        text = f"{of.speedup.median:.2f} times as fast as dense, in {ratio}"
        if best is not None and best.speedup.low > of.speedup.high:
            return "layout", f"{text}; {_other(best, 'its entries')}"
        return "keep", text
    if of.speedup.high >= 1:
        same = f"no clear difference from dense ({of.speedup.low:.2f}-{of.speedup.high:.2f} times as fast), in {ratio}"
        return ("keep" if stored < dense else "dense"), same
    slower = f"takes {1 / of.speedup.median:.2f} times as long as dense"
    why = next((plan.reason for plan in layer.plans), "it runs on a dense copy of the weight")
    if best is not None:
        return "layout", f"{slower}; {_other(best, 'its entries')}"
    lost = of.seconds.median - (of.dense or of.seconds).median
    if stored < dense and lost < SMALL * model:
        share = f"{max(lost / model, 0.001):.1%}"
        return "keep", f"{slower}, but that is at most {share} of the model's time, and it takes {ratio}"
    return "dense", f"{slower}: {why}"


def _best(of: Measurement) -> Alternative | None:
    """The fastest alternative that is faster than dense."""
    faster = [one for one in of.alternatives if one.speedup.low > 1]
    return max(faster, key=lambda one: one.speedup.median, default=None)


def _other(best: Alternative, entries: str) -> str:
    kept = f"with {best.energy:.0%} of the energy of {entries}"
    return f"{best.layout} would be {best.speedup.median:.2f} times as fast as dense, {kept}"
