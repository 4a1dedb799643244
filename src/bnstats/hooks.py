"""Hooks of one module, which its copies do not have; and what a forward hook is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Hook:
    """Calls a function; a copy of it, or one that is unpickled, does nothing.

    Copying or pickling a module copies its hooks, and all that they refer to. A copy is no part of
    what was hooked: a teacher made of a model that is observed is not observed.

    Args:
        function: gets what a hook gets.
    """

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        return None if self._function is None else self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def given_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the input that a layer is called with; None where it is called without."""
    # torch's layers name it "input", many subclasses "x".
    return args[0] if args else kwargs.get("input", kwargs.get("x"))
