"""One measurement of a model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

from bnstats.errors import InvalidValueError

_measured: set[nn.Module] = set()
_lock = Lock()


@contextmanager
def exclusively(model: nn.Module) -> Iterator[None]:
    """Refuse a model of which a part is being measured: each would put back the other's state."""
    modules = set(model.modules())
    with _lock:
        if modules & _measured:
            raise InvalidValueError(
                f"model: {type(model).__name__}, or a part of it, is being measured already, in "
                "another thread or by a measurement that runs this one in its forward: measure one "
                "after the other, or a copy.deepcopy of the model"
            )
        _measured.update(modules)
    try:
        yield
    finally:
        with _lock:
            _measured.difference_update(modules)
