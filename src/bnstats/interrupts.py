"""Delaying signals until a model is restored."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """A context in which signals such as Ctrl-C raise in the caller's code alone.

    Python runs a signal's handler in the main thread, between any two of its instructions: also
    in a ``finally`` that restores a model, or in a lock that other threads wait for. No
    ``except`` can guard every place. In this context a handler that is written in Python runs
    at once only inside of :meth:`call`, else at the next :meth:`check`, or when the context
    ends and everything is restored.

    In threads other than the main one it does nothing: handlers run in the main thread.

    Attributes:
        pending: signals whose handlers have yet to run, as (number, frame).
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.pending: list[tuple[int, FrameType | None]] = []
        self._deferring = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in signal.valid_signals():
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        signal.signal(number, self._receive)
            except BaseException:
                self._restore()
                raise
        self._deferring = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._restore()
        finally:
            self._deferring = False
            self.check()

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of the caller's, in the main thread; a signal may end it.

        Raises:
            BaseException: what the function or a signal's handler raises.
        """
        self.check()
        before = self._deferring
        self._deferring = False
        try:
            return function(*args)
        finally:
            # An assignment: no handler runs before it.
            self._deferring = before

    def check(self) -> None:
        """Run the handlers of the signals that have come since.

        Raises:
            BaseException: what a handler raises.
        """
        if self.pending:
            number, frame = self.pending.pop(0)
            try:
                self._handlers[number](number, frame)
            finally:
                self.check()  # all run, even if one raises

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._deferring:
            self.pending.append((number, frame))
        else:
            self._handlers[number](number, frame)

    def _restore(self) -> None:
        """Put every handler back, even if one of them raises."""
        raised: BaseException | None = None
        for number, handler in self._handlers.items():
            restored = False
            while not restored:
                try:
                    # Unless the caller's code has set another one in the meantime.
                    if signal.getsignal(number) == self._receive:
                        signal.signal(number, handler)
                    restored = True
                except BaseException as error:
                    raised = error
        if raised is not None:
            raise raised
