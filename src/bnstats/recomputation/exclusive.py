"""One use of a model at a time: one measurement, and no forward of the loader's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

from torch import nn

from bnstats.errors import InvalidValueError

_reading: ContextVar[bool] = ContextVar("reading", default=False)


@contextmanager
def reading() -> Iterator[None]:
    """Mark that this thread takes a batch from the loader."""
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


def check_not_of_loader(name: str) -> None:
    """Refuse a forward that the loader runs: it is no data, and would see other statistics."""
    if _reading.get():
        raise InvalidValueError(
            f"layer '{name}': the loader runs the model that is being measured: make the batches "
            "before, list(loader), or let the loader run a copy.deepcopy of the model"
        )


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
