"""A gated MLP of VectorNM weights: (activation(x @ gate.T + b) * (x @ up.T + b)) @ down.T + b.

Letters: T tokens, I inputs, H inner features, O outputs. Over 64 tokens it is a feature-major chain: x is transposed
once, (I, T); the gated product is (H, T), which is what the last product reads; that one writes (T, O).
"""

from . import transpose
from .linear import FEW
from .operators import Operator
from .vector_nm import FeatureMajor, VectorNMLinear, _feature_major, linear

GATHER = "gather"
WEIGHTS = ("", "up_", "down_")


class GatedMLP(Operator):
    """x (*, I) -> (*, O); each weight is (values, index, bias), its rate and v (n, m, v) of its own."""

    def __init__(self, rows: VectorNMLinear, columns: FeatureMajor):
        self.rows, self.columns = rows, columns
        tensors = ", ".join(f"Tensor {w}values, Tensor {w}index, Tensor? {w}bias" for w in WEIGHTS)
        numbers = "int n, int m, int v, int down_n, int down_m, int down_v, int inner, int out_features, str activation"
        schema = f"gpu_vector_nm_gated_mlp(Tensor x, {tensors}, {numbers}) -> Tensor"
        super().__init__(schema, lambda x, *rest: (*x.shape[:-1], rest[-2]), self._make, choose=self.choose)

    def choose(self, tokens, outputs, inner, inputs, dtype, rate, down) -> tuple[str, str]:
        """``chain``, feature-major, or ``two products``."""
        first, reason = self.rows.choose(tokens, inner, inputs, dtype, **rate)
        second, _ = self.rows.choose(tokens, outputs, inner, dtype, **down)
        if first == second == GATHER:
            return "chain", "gate and up in one launch; feature-major between the products: one transpose in all"
        return "two products", f"gate and up in one launch, then down; gate and up: {reason}"

    def _make(self, x, *parts, inner, out_features, activation, variant=None, **numbers):
        rate = {name: numbers[name] for name in ("n", "m", "v")}
        down = {name: numbers["down_" + name] for name in ("n", "m", "v")}
        tokens = x.shape[:-1].numel()
        if variant is None:
            variant, _ = self.choose(tokens, out_features, inner, x.shape[-1], x.dtype, rate, down)
        if variant == "chain":
            return self._chain(x, parts, tokens, inner, out_features, activation, rate, down)
        absent = self.rows.absent
        pair = self.rows.prepare(x, *_pair(parts), out_features=inner, activation=activation, **rate)
        middle = pair(x, *_pair(parts))
        last = self.rows.prepare(middle, *parts[6:], *absent, out_features=out_features, activation="none", **down)
        return lambda x, *parts: last(pair(x, *_pair(parts)), *parts[6:], *absent)

    def traced(self, x, *parts, inner, out_features, activation, **numbers):
        if x.shape[:-1].numel() > FEW:
            return None
        rate, down = ({name: numbers[which + name] for name in ("n", "m", "v")} for which in ("", "down_"))
        middle = self.rows.gated(x, parts[3:6], parts[:3], activation=activation, out_features=inner, **rate)
        return self.rows(middle, *parts[6:], out_features=out_features, **down)

    def _chain(self, x, parts, tokens, inner, outputs, activation, rate, down):
        absent, shape = self.columns.absent, (*x.shape[:-1], outputs)
        turn = transpose.prepared(x, transpose.padded(tokens))
        turned = turn(x)
        known = {"tokens": tokens, "out_features": inner, "activation": activation, "row_major": False, **rate}
        pair = self.columns.prepare(turned, *_pair(parts), **known)
        middle = pair(turned, *_pair(parts))
        known = {"tokens": tokens, "out_features": outputs, "activation": "none", "row_major": True, **down}
        last = self.columns.prepare(middle, *parts[6:], *absent, **known)
        return lambda x, *parts: last(pair(turn(x), *_pair(parts)), *parts[6:], *absent).view(shape)


def _pair(parts):
    """(values, index, bias, gate, up_values, up_index, up_bias) as the gated product takes them."""
    return (*parts[:3], None, *parts[3:6])


gated_mlp = GatedMLP(linear, _feature_major)
