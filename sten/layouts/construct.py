"""Constructor, the metaclass of layouts, methods and allocations: an error for wrong arguments shows the right ones."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from typing import Any


class Constructor(ABCMeta):
    """Calls the class; where the arguments do not fit, the error shows those that do.

    Example:
        >>> import sten
        >>> sten.CSR(0.9)
        Traceback (most recent call last):
        TypeError: Expected CSR(), got CSR(0.9); the fraction to drop is sparsity= of sten.sparsify.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            try:
                cls.__signature__.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(_sentence(cls, args, kwargs, error)) from None
            raise

    @property
    def __signature__(cls) -> inspect.Signature:
        """The parameters of `__init__`, for `help` and `inspect.signature`, which would show those of `__call__`."""
        init = inspect.signature(cls.__init__)
        return init.replace(parameters=list(init.parameters.values())[1:], return_annotation=inspect.Signature.empty)


def _sentence(cls: type, args: tuple, kwargs: dict[str, Any], error: TypeError) -> str:
    parameters = cls.__signature__.parameters.values()  # type: ignore[attr-defined]
    usual = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
    given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    fraction = any(isinstance(value, float) for value in args) or "sparsity" in kwargs
    hint = "the fraction to drop is sparsity= of sten.sparsify" if fraction else str(error)
    return f"Expected {cls.__name__}({usual}), got {cls.__name__}({given}); {hint}."
