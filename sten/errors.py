"""FormatError: what a file, a state dict or a pickle that is not what it should be raises."""

from __future__ import annotations


class FormatError(ValueError, RuntimeError):
    """A file, state dict or pickle is damaged, hostile, or of another model; nothing was changed.

    Raised by `sten.load`, `sten.load_run`, `sten.inspect`, `load_state_dict` of models with sparse weights, and
    `torch.load` and `pickle.load` of sparse tensors. It is a ValueError; and a RuntimeError, because that is what
    PyTorch's own `load_state_dict` raises.

    Example:
        >>> import torch, sten
        >>> layer = sten.sparsify(torch.nn.Linear(8, 4), sten.CSR(), sparsity=0.75)
        >>> parts = {"weight." + name: part.clone() for name, part in layer.weight.parts.items()}
        >>> parts["weight.col"][0] = 99
        >>> try:
        ...     layer.load_state_dict({**parts, "bias": layer.bias})
        ... except sten.FormatError as error:
        ...     print(error)
        weight: Expected numbers from 0 to 7 in part 'col' of CSR(), got 99.
    """
