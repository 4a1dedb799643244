"""Compiled parts of a model that are to run as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock

import torch

_stance = ExitStack()
"""Holds the compiler's stance while a context wants it."""

_wanting: list[object] = []
_lock = Lock()


@contextmanager
def eager() -> Iterator[None]:
    """Let compiled parts run as written: compiled code need not notice new hooks.

    Contexts may end in any order.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    context = object()
    with _lock:
        if not _wanting:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _wanting.append(context)
    try:
        yield
    finally:
        with _lock:
            _wanting.remove(context)
            if not _wanting:
                _stance.close()
