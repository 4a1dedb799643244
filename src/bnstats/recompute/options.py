"""Checks of the arguments of the public functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from bnstats.distributed import Peers
from bnstats.errors import InvalidTypeError, InvalidValueError

METHODS = ("pooled", "batch_average", "ema", "layerwise", "sweeps")


def check_options(
    *,
    method: str,
    max_batches: int | None,
    tolerance: float | None,
    correction: int,
    on_nonfinite: str,
    memory_limit: int | None,
    **functions: object,
) -> None:
    """Refuse what is not in the documentation."""
    if method not in METHODS:
        raise InvalidValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    _check_positive_int("max_batches", max_batches)
    _check_positive_int("memory_limit", memory_limit)
    if memory_limit is not None and method != "layerwise":
        raise InvalidValueError(
            f'memory_limit: only method="layerwise" holds activations, got it for "{method}"'
        )
    _check_tolerance(tolerance)
    if correction not in (0, 1):
        raise InvalidValueError(
            f"correction: expected 1 (unbiased variance) or 0 (biased), got {correction!r}"
        )
    if on_nonfinite not in ("raise", "skip"):
        raise InvalidValueError(f'on_nonfinite: expected "raise" or "skip", got {on_nonfinite!r}')
    for argument, function in functions.items():
        if function is not None and not callable(function):
            raise InvalidTypeError(
                f"{argument}: expected a callable or None, got {type(function).__name__}"
            )


def check_loader(loader: object, method: str) -> None:
    """Refuse what is no iterable of batches, or cannot be read as often as the method needs."""
    # DataLoader and Dataset may be iterable by __getitem__ alone.
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (Tensor, Mapping, str)):
        raise InvalidTypeError(
            "loader: expected an iterable of batches, a DataLoader or a list say, got "
            f"{type(loader).__name__}; one batch by itself goes in as [batch]"
        )
    if method == "sweeps" and isinstance(loader, Iterator):
        raise InvalidValueError(
            'loader: method="sweeps" reads it again and again, and an iterator '
            f"({type(loader).__name__}) can be read once; pass a DataLoader or a list, or "
            'method="layerwise"'
        )


def check_mergeable(method: str, peers: Peers) -> None:
    """Refuse to merge what has no merge."""
    if peers.size > 1 and method == "ema":
        raise InvalidValueError(
            'sync: moving averages of several processes do not merge; method="pooled" and '
            '"batch_average" do, and sync=False keeps to this process'
        )


def _check_positive_int(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if value < 1:
        raise InvalidValueError(f"{name}: expected 1 or more, got {value}")


def _check_tolerance(tolerance: Any) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise InvalidTypeError(
            f"tolerance: expected a number or None, got {type(tolerance).__name__}"
        )
    if not 0 < tolerance < math.inf:
        raise InvalidValueError(
            "tolerance: expected a positive number, the largest standard error that will do "
            f"(in standard deviations, and relative for variances), got {tolerance}"
        )
