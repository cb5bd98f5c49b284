"""Several: x times two or three weights of one layout that lie one behind the other in memory, as one product.

Letters: O1, O2, O3 the outputs of the weights. A weight whose rows follow another's in every stored tensor is its
continuation, so that one launch of the layout's linear kernel reads them all. Whether they do lie so is asked at each
call, from their addresses: weights that were moved or copied since are multiplied one by one.
"""

import torch

from . import nm, vector_nm
from .backend import backend
from .linear import FEW, Linear
from .operators import Operator

MOST = 3  # weights


class Continued:
    """A function of tensors of these shapes: the tensor whose rows are those of all, or None if they are apart."""

    def __init__(self, tensors):
        first, size = tensors[0], 0
        self.offsets = []
        for t in tensors:
            self.offsets.append(size)
            size += t.nbytes
        self.size, self.itemsize, self.strides = size, first.element_size(), first.stride()
        self.shape = (sum(len(t) for t in tensors), *first.shape[1:])

    def __call__(self, tensors):
        first = tensors[0]
        address = first.data_ptr()
        for t, offset in zip(tensors, self.offsets, strict=True):
            if t.data_ptr() != address + offset:
                return None
        # in one storage: addresses of two allocations may follow each other, too
        if first.untyped_storage().nbytes() - first.storage_offset() * self.itemsize < self.size:
            return None
        return first.as_strided(self.shape, self.strides)


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

    def _make(self, x, *parts, **numbers):
        product, together, apart = self.product, None, None
        numbers = {name: product.defaults.get(name) for name in product.numbers} | numbers
        weights = self._weights(parts)
        stored_together = [Continued(each) for each in zip(*(stored for stored, _ in weights), strict=True)]
        biases = _Biases(weights)

        def call(x, *parts):
            nonlocal together, apart
            weights = self._weights(parts)
            joined = [join(each) for join, each in zip(stored_together, zip(*(w for w, _ in weights)))]  # noqa: B905
            if all(each is not None for each in joined):
                tensors = (x, *joined, biases([bias for _, bias in weights]), *product.absent)
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

    def traced(self, x, *parts, out_features, **numbers):
        if x.shape[:-1].numel() > FEW:
            return None
        weights = [(stored, bias, len(stored[0])) for stored, bias in self._weights(parts)]
        return torch.cat([self.product(x, *w, bias, out_features=rows, **numbers) for w, bias, rows in weights], -1)


class _Biases:
    """A function of the biases of such weights: that of all together, or None if none has one."""

    def __init__(self, weights):
        biases = [bias for _, bias in weights]
        known = next((bias for bias in biases if bias is not None), None)
        self.zeros = [
            known.new_zeros(len(stored[0])) if bias is None and known is not None else None for stored, bias in weights
        ]
        self.join = Continued(biases) if all(bias is not None for bias in biases) else None

    def __call__(self, biases):
        joined = None if self.join is None else self.join(biases)
        if joined is not None or all(bias is None for bias in biases):
            return joined
        return torch.cat([zero if bias is None else bias for bias, zero in zip(biases, self.zeros, strict=True)])


nm_several, vector_nm_several = Several(nm.linear), Several(vector_nm.linear)
