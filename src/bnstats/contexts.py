"""Contexts that may be entered again, and that decorate functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar, cast

from bnstats.errors import InvalidTypeError

_Options = ParamSpec("_Options")
_Value = TypeVar("_Value")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_RUNS_LATER = (
    inspect.isgeneratorfunction,
    inspect.iscoroutinefunction,
    inspect.isasyncgenfunction,
)


class Context(Generic[_Value]):
    """A context manager that starts anew each time it is entered; also a decorator.

    Args:
        name: of the function that made it, for messages.
        make: makes what is entered once.
    """

    def __init__(self, name: str, make: Callable[[], AbstractContextManager[_Value]]) -> None:
        self._name, self._make = name, make
        self._entered: list[AbstractContextManager[_Value]] = []

    def __enter__(self) -> _Value:
        context = self._make()
        value = context.__enter__()
        self._entered.append(context)
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return self._entered.pop().__exit__(kind, error, traceback)

    def __call__(self, function: _Function) -> _Function:
        """Return the function that runs in this context.

        Raises:
            InvalidTypeError: what it would run is run after the call, outside of the context.
        """
        if not callable(function):
            raise InvalidTypeError(
                f"{self._name}: expected a function to decorate, got {type(function).__name__}"
            )
        own = getattr(function, "__call__", None)  # noqa: B004  (an object's may be a coroutine)
        if any(later(function) or later(own) for later in _RUNS_LATER):
            named = getattr(function, "__name__", type(function).__name__)
            raise InvalidTypeError(
                f"{self._name}: expected a function to decorate, got a generator or a coroutine "
                f"function, {named}, whose body runs after the call, outside of the context: use "
                f"`with {self._name}(...):` inside of it"
            )

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self._make():  # not self: several threads may call it at the same time
                return function(*args, **kwargs)

        return cast("_Function", inside)


def reusable(
    function: Callable[_Options, Iterator[_Value]],
) -> Callable[_Options, Context[_Value]]:
    """Make contexts of a function that yields once, as ``contextmanager`` does."""
    once = contextmanager(function)

    @wraps(function)
    def make(*args: _Options.args, **kwargs: _Options.kwargs) -> Context[_Value]:
        return Context(function.__name__, partial(once, *args, **kwargs))

    return make
