"""From ``module:callable``, as a user types it, to the callable."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from bnstats.arguments import mismatch_of
from bnstats.errors import InvalidValueError


def find(where: str, what: str, *arguments: str) -> Callable[..., Any]:
    """Import what ``module:callable`` names.

    Args:
        where: as typed.
        what: the argument's name, for messages.
        arguments: names of what it will be called with.

    Raises:
        InvalidValueError: there is no such module, or no such callable in it, or it cannot be
            called so.
        ImportError: the module is there, and what it imports is not.
    """
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise InvalidValueError(f"{what}: expected module:callable, got {where!r}")
    here = os.getcwd()
    if here not in sys.path:  # as python -m has it, and the console script not
        sys.path.insert(0, here)
    module = _import(module_name, what, here)
    found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        there = f"({getattr(module, '__file__', None) or 'built in'})"
        kind = (
            f"has no {name!r}" if found is None else f"has {name!r} of type {type(found).__name__}"
        )
        near = _nearest(name, (key for key, value in vars(module).items() if callable(value)))
        raise InvalidValueError(
            f"{what}: expected a callable, but module {module_name!r} {there} {kind}{near}"
        )
    if mismatch := mismatch_of(found, arguments):
        raise InvalidValueError(
            f"{what}: expected a callable that is called with ({', '.join(arguments)}), got "
            f"{where}{mismatch}"
        )
    return found


def _import(name: str, what: str, here: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ImportError(f"{what}: importing module {name!r} failed: {error}") from error
        near = _nearest(name, (path.stem for path in Path(here).glob("*.py")))
        raise InvalidValueError(
            f"{what}: there is no module {error.name!r}, looked for in {here} and where Python "
            f"looks for installed packages{near}"
        ) from error
    except ImportError as error:
        raise ImportError(f"{what}: importing module {name!r} failed: {error}") from error


def _nearest(name: str, names: Iterable[str]) -> str:
    found = get_close_matches(name, list(names), n=1)
    return f"; the nearest name is {found[0]!r}" if found else ""
