"""The errors and the warning of bnstats: every error is also the builtin that fits it."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from types import FrameType

from torch import __file__ as _torch_file

_OWN = tuple(os.path.dirname(file) + os.sep for file in (__file__, _torch_file))
"""Files that no warning points to: this package's, and torch's where it calls it."""


class BnstatsError(Exception):
    """Base of all errors that bnstats raises itself."""


class InvalidValueError(BnstatsError, ValueError):
    """An argument or a batch has the right type, but an invalid value."""


class InvalidTypeError(BnstatsError, TypeError):
    """An argument or a batch has an invalid type."""


class NonFiniteStatisticsError(BnstatsError, ArithmeticError):
    """A batch's statistics are NaN or infinite."""


class TooFewValuesError(BnstatsError, ValueError):
    """There are fewer values than the statistic needs."""


class LayerMismatchError(BnstatsError, ValueError):
    """Statistics and model do not have the same layers, or not the same channels."""


class RepeatedLayerError(BnstatsError, RuntimeError):
    """A layer runs more than once in a forward, where the method allows one call."""


class MemoryLimitError(BnstatsError, MemoryError):
    """The activations that have to be held are larger than the limit that the caller gave."""


class PeerError(BnstatsError, RuntimeError):
    """Another process of the group failed, so this one stops too."""


class UnknownLayerError(InvalidValueError, KeyError):
    """There is no layer of this name.

    Args:
        name: the name that was requested.
        names: the names that exist.
    """

    def __init__(self, name: object, names: Iterable[str]) -> None:
        super().__init__(name, tuple(names))

    def __str__(self) -> str:
        """Return a message with the nearest name; computed only when it is shown."""
        name, names = self.args
        if not names:
            return f"there is no BatchNorm layer {name!r}, nor any other"
        return f"there is no BatchNorm layer {name!r}; the nearest name is {nearest(name, names)!r}"


class StatsFileError(BnstatsError, ValueError):
    """A file is not a readable bnstats statistics file."""


class BnstatsWarning(UserWarning):
    """bnstats did what was requested, which is rarely what was wanted."""


def nearest(name: object, names: Iterable[str]) -> str:
    """Return which of the names is the nearest by edit distance, the first of several."""
    return min(names, key=lambda other: _edit_distance(str(name), other))


def _edit_distance(a: str, b: str) -> int:
    """Return the least number of insertions, deletions and substitutions from a to b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def warn(message: str) -> None:
    """Warn with a BnstatsWarning that points to the first caller outside of bnstats and torch."""
    # Python 3.12 has this as warnings.warn(skip_file_prefixes=...).
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
        level += 1
    warnings.warn(message, BnstatsWarning, stacklevel=level)
