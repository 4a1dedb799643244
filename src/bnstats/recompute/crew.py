"""Threads that run one forward each and can be held inside of it."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import torch


class _Dismissed(BaseException):
    """Unwinds the forward of a runner that shall not go on; never leaves its thread."""


class Runner:
    """One forward, in a thread of its own.

    Attributes:
        index: its position among all that were started.
        held: what it gave when it was held last; None while it runs, and after that.
        error: what the forward raised.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.held: Any = None
        self.error: BaseException | None = None
        self.dismissed = False
        self.go: queue.SimpleQueue[None] = queue.SimpleQueue()  # cheaper than a semaphore
        self.thread: threading.Thread | None = None


class Crew:
    """Runners, of which a few at a time compute and all others are held or wait for their turn.

    There are so many places to compute. A runner that comes to be held, or ends, gives its
    place to the next that is ready, or back; the thread that made the crew decides what happens
    when all places are back. Who computes beside whom depends on the machine; where each is
    held then does not.

    Args:
        places: how many compute at the same time.
    """

    def __init__(self, places: int) -> None:
        self._num_places = places
        self._sharing = places
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(places):
            self._places.put(None)
        self._ready: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        self._runners: list[Runner] = []
        self._local = threading.local()
        self._settings = _ThreadSettings()
        self._failed = self._closed = False

    @property
    def held(self) -> list[Runner]:
        """The runners that are held, in the order in which they were started."""
        return [runner for runner in self._runners if runner.held is not None]

    @property
    def current(self) -> Runner | None:
        """The runner whose thread this is."""
        return getattr(self._local, "runner", None)

    def share_threads(self, runners: int) -> None:
        """Divide torch's threads among no more than so many runners, instead of all places."""
        self._sharing = max(1, min(runners, self._num_places))

    def start(self, job: Callable[[], Any]) -> None:
        """Let a new runner begin with the job, as soon as there is a place.

        Raises:
            BaseException: what an earlier one raised.
        """
        self._places.get()
        if self._failed:
            self._leave_place()
            self.settle()
        runner = Runner(len(self._runners))
        context = contextvars.copy_context()
        runner.thread = threading.Thread(
            target=context.run, args=(self._run, runner, job), name=f"bnstats-{runner.index}"
        )
        self._runners.append(runner)
        runner.thread.start()
        runner.go.put(None)

    def hold(self, gives: Any) -> None:
        """Hold the current runner, in its own thread, until it is released."""
        runner: Runner = self._local.runner
        runner.held = gives
        self._leave_place()
        runner.go.get()
        if self._closed or runner.dismissed:
            raise _Dismissed

    def fail(self, error: BaseException) -> NoReturn:
        """End the current runner with an error, whatever its forward would make of one."""
        self._local.runner.error = error
        self._failed = True
        raise _Dismissed

    def release(self, runners: Iterable[Runner]) -> None:
        """Let held runners go on when the crew settles next."""
        for runner in runners:
            runner.held = None
            self._ready.put(runner)

    def dismiss(self, runners: Iterable[Runner]) -> None:
        """End the forwards of held runners where they are."""
        for runner in runners:
            runner.dismissed = True
            self.release([runner])

    def settle(self) -> None:
        """Let all that are ready compute, until every runner is held or done.

        Raises:
            BaseException: what a forward raised; of several, the one started first.
        """
        for _ in range(2):  # hand the places out, and wait until all are back
            for _ in range(self._num_places):
                self._places.get()
            for _ in range(self._num_places):
                self._leave_place()
        if self._failed:
            raise next(runner.error for runner in self._runners if runner.error is not None)

    def close(self) -> None:
        """End every thread, wherever its forward is held."""
        self._closed = True
        for runner in self._runners:
            runner.go.put(None)
        for runner in self._runners:
            if runner.thread is not None and runner.thread.is_alive():
                runner.thread.join()
        self._settings.restore()

    def _leave_place(self) -> None:
        """Give a place to the next that is ready, or back."""
        next_ready = None
        if not self._failed:
            with suppress(queue.Empty):
                next_ready = self._ready.get_nowait()
        (self._places if next_ready is None else next_ready.go).put(None)

    def _run(self, runner: Runner, job: Callable[[], Any]) -> None:
        self._local.runner = runner
        runner.go.get()
        try:
            if not self._closed:
                with self._settings.entered(self._sharing):
                    job()
        except _Dismissed:
            pass
        except BaseException as error:  # raised in the owner's thread
            runner.error = error
            self._failed = True
        finally:
            runner.held = None
            self._leave_place()


class _ThreadSettings:
    """What torch keeps for each thread, as it is in the thread that makes this."""

    def __init__(self) -> None:
        self._num_threads = torch.get_num_threads()
        self._inference = torch.is_inference_mode_enabled()
        self._stream: torch.Stream | None = None
        types = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
            types.append(kind)
            if kind != "mps":  # which has one stream
                self._stream = torch.accelerator.current_stream()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in types
            if torch.is_autocast_enabled(kind)
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self, sharing: int) -> Iterator[None]:
        """Have the same settings in this thread, one of so many, and no gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self._inference else torch.no_grad())
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            if self._stream is not None:
                torch.accelerator.set_stream(self._stream)  # and its device
            if sharing > 1:
                torch.set_num_threads(max(1, self._num_threads // sharing))
            yield

    def restore(self) -> None:
        """Put the number of threads back: one thread's own is also that of later threads."""
        torch.set_num_threads(self._num_threads)
