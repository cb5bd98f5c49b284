"""Several: x times two or three weights of one layout that lie one behind the other in memory, as one product.

Letters: O1, O2, O3 the outputs of the weights. A weight whose rows follow another's in every stored tensor is its
continuation, so that one launch of the layout's linear kernel reads them all. Whether they do lie so is asked at each
call, from their addresses: weights that were moved or copied since are multiplied one by one.
"""

import torch

from . import nm, vector_nm
from .backend import backend
from .linear import Linear
from .operators import Operator

MOST = 3  # weights


def continued(tensors) -> torch.Tensor | None:
    """The tensor whose rows are those of all ``tensors``, contiguous and of one width, or None if they are apart."""
    first = tensors[0]
    address, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t.data_ptr() != address or t.untyped_storage().data_ptr() != storage:
            return None
        address += t.nbytes
    rows = sum(len(t) for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


class Several(Operator):
    """x (*, I) -> [x @ W.T + bias for each weight], side by side: (*, O1 + O2 [+ O3]).

    Each weight is (*stored, bias), the third may be None; the numbers are those of the layout's ``Linear``, with
    ``out_features`` of all of them together. Rows of one weight need not be a multiple of anything for a layout whose
    rows are stored one by one; for one that stores them in groups, the caller asks only for weights of whole groups.
    """

    def __init__(self, product: Linear):
        self.product, self.count = product, product.count
        names, weights, last = product.tensors[1 : 1 + self.count], [], MOST - 1
        for number in range(last):
            weights += [f"Tensor {name}_{number}" for name in names] + [f"Tensor? bias_{number}"]
        ends = [f"Tensor? {name}_{last}=None" for name in (*names, "bias")]
        numbers = f"{product.layout_numbers}int out_features"
        schema = f"{product.prefix}_several(Tensor x, {', '.join(weights)}, {numbers}, {', '.join(ends)}) -> Tensor"
        super().__init__(schema, self._shape, self._make)

    def _shape(self, x, *arguments):
        return *x.shape[:-1], arguments[len(self.tensors) - 1 + self.numbers.index("out_features")]

    def _weights(self, parts):
        """The (stored tensors, bias) of each weight."""
        size = self.count + 1
        weights = [parts[i : i + size] for i in range(0, len(parts), size)]
        return [(weight[:-1], weight[-1]) for weight in weights if weight[0] is not None]

    def _joined(self, weights):
        """(stored tensors, bias) of all weights as one, or None."""
        stored = [continued(each) for each in zip(*(stored for stored, _ in weights), strict=True)]
        if any(each is None for each in stored):
            return None
        biases = [bias for _, bias in weights]
        if all(bias is None for bias in biases):
            return stored, None
        rows = [len(kept[0]) for kept, _ in weights]
        known = next(bias for bias in biases if bias is not None)
        biases = [known.new_zeros(n) if bias is None else bias for n, bias in zip(rows, biases, strict=True)]
        bias = continued(biases)
        return stored, torch.cat(biases) if bias is None else bias

    def _make(self, x, *parts, **numbers):
        product, together, apart = self.product, None, None
        numbers = {name: product.defaults.get(name) for name in product.numbers} | numbers

        def call(x, *parts):
            nonlocal together, apart
            weights = self._weights(parts)
            joined = self._joined(weights)
            if joined is not None:
                stored, bias = joined
                tensors = (x, *stored, bias, *product.absent)
                run = together or product.prepare(*tensors, **numbers)
                if together is None and not backend.capturing(x):  # what is prepared in a capture was not timed
                    together = run
                return run(*tensors)
            tensors = [(x, *stored, bias, *product.absent) for stored, bias in weights]
            sizes = [{**numbers, "out_features": len(stored[0])} for stored, _ in weights]
            runs = apart or [product.prepare(*t, **each) for t, each in zip(tensors, sizes, strict=True)]
            if apart is None and not backend.capturing(x):
                apart = runs
            return torch.cat([run(*t) for run, t in zip(runs, tensors, strict=True)], -1)

        return call


nm_several, vector_nm_several = Several(nm.linear), Several(vector_nm.linear)
