"""Threads that run one forward each and can be held inside of it."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

import torch

from bnstats.interrupts import Interrupts
from bnstats.recomputation.thread_settings import ThreadSettings

_PATIENCE = 0.1
"""Seconds of waiting for forwards after which signals are handled, while the forwards run on."""


class _Cancelled(BaseException):
    """Unwinds a forward that is cancelled; never leaves its thread."""


class ForwardThread(threading.Thread):
    """A thread that runs one forward.

    Attributes:
        index: its position among all that were started.
        waiting_with: what it passed to ``wait``; None while it does not wait there.
        error: what the forward raised.
        cancelled: its forward is to end where it waits.
        go: released to let it run on.
    """

    def __init__(self, index: int, run: Callable[[ForwardThread], None]) -> None:
        # The caller's context variables are the forward's too.
        context = contextvars.copy_context()
        super().__init__(target=context.run, args=(run, self), name=f"bnstats-{index}")
        self.index = index
        self.waiting_with: Any = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.go = threading.Semaphore(0)


class ForwardThreads:
    """Forwards in threads, of which a few at a time compute and all others wait.

    A thread that begins to wait, or ends, lets the next released one run. The thread that made
    this object decides what happens when none can run any more. Which of them run side by side
    depends on the machine; where each waits then does not.

    Args:
        max_running: how many compute at the same time.
        devices: where the forwards compute.
        interrupts: no signal is raised while this object changes, as a lock would stay taken.
    """

    def __init__(
        self, max_running: int, devices: Collection[torch.device], interrupts: Interrupts
    ) -> None:
        self._interrupts = interrupts
        self._max_running = self._num_sharing = max_running
        self._threads: list[ForwardThread] = []
        self._state = threading.Condition()  # guards the two below
        self._num_running = 0
        self._released: deque[ForwardThread] = deque()
        self._settings = ThreadSettings(devices)
        self._failed = self._closed = False

    @property
    def waiting(self) -> list[ForwardThread]:
        """The threads that wait, in the order in which they were started."""
        return [thread for thread in self._threads if thread.waiting_with is not None]

    @property
    def current(self) -> ForwardThread | None:
        """The one of these threads that calls."""
        thread = threading.current_thread()
        return thread if isinstance(thread, ForwardThread) else None

    def share_cores(self, num_threads: int) -> None:
        """Divide torch's intra-op threads among this many, if they are fewer than may run.

        The thread that calls keeps one: a team of more, once it has computed, spins on cores
        that the forwards need. Where one forward runs at a time, it keeps all.
        """
        self._num_sharing = max(1, min(num_threads, self._max_running))
        self._settings.begin(1 if self._max_running > 1 else None)

    def start(self, forward: Callable[[], Any]) -> None:
        """Start a forward, as soon as one less than ``max_running`` runs.

        Raises:
            BaseException: what an earlier forward raised.
            RuntimeError: there can be no more threads.
        """
        self._wait_until(lambda: self._num_running < self._max_running)
        if self._failed:
            self.run()
        with self._state:
            self._num_running += 1
        thread = ForwardThread(len(self._threads), lambda thread: self._run(thread, forward))
        self._threads.append(thread)
        try:
            thread.start()
        except RuntimeError as error:
            raise RuntimeError(
                f"batch {thread.index} (counted from 0) got no thread of its own, and those before "
                'it hold theirs until they end: use method="sweeps", which needs none, or fewer '
                "batches (max_batches)"
            ) from error

    def wait(self, payload: Any) -> None:
        """Wait, in the thread of a forward, until it is released."""
        thread = self.current
        assert thread is not None
        thread.waiting_with = payload
        self._stop_running()
        thread.go.acquire()
        if self._closed:
            thread.cancelled = True
        if thread.cancelled:
            raise _Cancelled

    def fail(self, error: BaseException) -> NoReturn:
        """End the forward of this thread with an error that the model cannot catch."""
        assert self.current is not None
        self.current.error = error
        self._failed = True
        raise _Cancelled

    def release(self, threads: Iterable[ForwardThread]) -> None:
        """Let waiting threads go on in the next ``run``."""
        for thread in threads:
            thread.waiting_with = None
            self._released.append(thread)

    def cancel(self, threads: Iterable[ForwardThread]) -> None:
        """End the forwards of waiting threads where they are."""
        for thread in threads:
            thread.cancelled = True
            self.release([thread])

    def run(self) -> None:
        """Let all that were released run, until every thread waits or has ended.

        Raises:
            BaseException: what a forward raised, of several the one started first; what a
                signal's handler raises.
        """
        while True:
            with self._state:
                while self._can_release() and self._num_running < self._max_running:
                    self._num_running += 1
                    self._released.popleft().go.release()
            self._wait_until(lambda: self._num_running == 0)
            if self._failed:
                raise self._first_error()
            self._interrupts.check()
            if not self._released:
                return

    def close(self) -> None:
        """End every thread, wherever its forward waits."""
        self._end()
        self._settings.restore()

    def _end(self) -> None:
        self._closed = True
        for thread in self._threads:
            thread.go.release()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for the forwards that run.

        They may wait themselves, for a lock that one which is held at a layer has taken. Only
        when that one is ended does it give the lock back: after a failure all are, and a signal
        is handled now and then, so that it can end them.
        """
        while True:
            with self._state:
                if self._state.wait_for(lambda: self._closed or ready(), timeout=_PATIENCE):
                    return
            if self._failed:
                self._end()
            else:
                self._interrupts.check()

    def _first_error(self) -> BaseException:
        """Return what the forward raised that was started first; what unwinding raised is last."""
        failed = [thread for thread in self._threads if thread.error is not None]
        error = min(failed, key=lambda thread: thread.cancelled).error
        assert error is not None
        return error

    def _stop_running(self) -> None:
        """Let the next released thread run in place of this one."""
        with self._state:
            if self._can_release():
                self._released.popleft().go.release()
            else:
                self._num_running -= 1
                self._state.notify()

    def _can_release(self) -> bool:
        """Whether another thread may run on; after a failure or a signal none does."""
        return bool(self._released) and not self._failed and not self._interrupts.pending

    def _run(self, thread: ForwardThread, forward: Callable[[], Any]) -> None:
        try:
            if not self._closed:
                with self._settings.entered(self._num_sharing):
                    forward()
        except _Cancelled:
            pass
        except BaseException as error:  # raised in the thread that made this object
            thread.error = error
            self._failed = True
        finally:
            thread.waiting_with = None
            self._stop_running()
