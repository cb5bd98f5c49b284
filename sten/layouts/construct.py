"""Constructor, the metaclass of layouts, methods and allocations: an error for wrong arguments shows the right ones."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABCMeta
from typing import Any

NUMBERS = {"int": "a whole number", "float": "a number"}
NUMBERS |= {f"{kind} | None": f"{number}, or None," for kind, number in NUMBERS.items()}


class Constructor(ABCMeta):
    """Calls the class; where the arguments do not fit, the error shows those that do.

    Example:
        >>> import sten
        >>> sten.CSR(0.9)
        Traceback (most recent call last):
        TypeError: Expected CSR(), got CSR(0.9); the fraction to drop is sparsity= of sten.sparsify.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, bool) for value in (*args, *kwargs.values())):
            cls._expect_numbers(args, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except TypeError:
            try:
                cls.__signature__.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(_sentence(cls, args, kwargs, error)) from None
            raise

    def _expect_numbers(cls, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise TypeError for True or False where a size, a count or another number belongs: Python takes it for 1."""
        signature = cls.__signature__
        with contextlib.suppress(TypeError):  # wrong arguments get their own sentence
            kwargs = signature.bind(*args, **kwargs).arguments
        for name, value in kwargs.items():
            kind = getattr(signature.parameters.get(name), "annotation", None)
            if isinstance(value, bool) and (number := NUMBERS.get(getattr(kind, "__name__", kind))):
                raise TypeError(f"Expected {number} for {name} of {cls.__name__}, got {value}.")

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
