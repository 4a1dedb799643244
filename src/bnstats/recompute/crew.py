"""Threads that run one forward each and can be held inside of it."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


class _Dismissed(BaseException):
    """Unwinds the forward of a runner that shall not go on; never leaves its thread."""


class Runner:
    """One forward, in a thread of its own.

    Attributes:
        index: its position among all that were started.
        held: what it gave when it was held last; None while it runs.
        done: its forward has ended, in whatever way.
        error: what the forward raised.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.held: Any = None
        self.done = False
        self.error: BaseException | None = None
        self.dismissed = False
        self.go: queue.SimpleQueue[None] = queue.SimpleQueue()  # cheaper than a semaphore
        self.thread: threading.Thread | None = None


class Crew:
    """Runners, of which a few at a time compute and all others are held or wait for their turn.

    The thread that makes the crew is the only one that decides: a runner computes from when it
    is let go until it calls :meth:`hold` or ends. Who runs together with whom depends on the
    machine; where each is held once all are does not.

    Args:
        workers: how many compute at the same time; on CPU they share torch's threads.
        on_held: called in the owner's thread for each runner that has come to be held.
    """

    def __init__(self, workers: int, on_held: Callable[[Runner], None]) -> None:
        self.workers = workers
        self._on_held = on_held
        self._runners: list[Runner] = []
        self._ready: list[Runner] = []
        self._num_running = 0
        self._events: queue.SimpleQueue[Runner] = queue.SimpleQueue()
        self._local = threading.local()
        self._settings = _ThreadSettings()
        self._closed = False

    @property
    def held(self) -> list[Runner]:
        """The runners that are held, in the order in which they were started."""
        return [runner for runner in self._runners if runner.held is not None]

    def start(self, job: Callable[[], Any]) -> None:
        """Let a new runner begin with the job; wait first until it can have a place."""
        while self._num_running >= self.workers:
            self._take_event()
        runner = Runner(len(self._runners))
        context = contextvars.copy_context()
        runner.thread = threading.Thread(
            target=context.run, args=(self._run, runner, job), name=f"bnstats-{runner.index}"
        )
        runner.thread.start()
        self._runners.append(runner)
        self._let_go(runner)

    def current(self) -> Runner | None:
        """Return the runner whose thread this is."""
        return getattr(self._local, "runner", None)

    def hold(self, gives: Any) -> None:
        """Hold this runner, called in its own thread, until it is released."""
        runner: Runner = self._local.runner
        runner.held = gives
        self._events.put(runner)
        runner.go.get()
        if self._closed or runner.dismissed:
            raise _Dismissed

    def release(self, runners: Iterable[Runner]) -> None:
        """Let held runners go on, as soon as there is a place for them."""
        for runner in runners:
            runner.held = None
            self._ready.append(runner)

    def dismiss(self, runners: Iterable[Runner]) -> None:
        """End the forwards of held runners where they are."""
        for runner in runners:
            runner.dismissed = True
            self.release([runner])

    def settle(self) -> None:
        """Wait until every runner is held or done.

        Raises:
            BaseException: what a forward raised; of several, the one started first.
        """
        self._ready.reverse()
        while self._ready or self._num_running:
            while self._ready and self._num_running < self.workers:
                self._let_go(self._ready.pop())
            self._take_event()

    def close(self) -> None:
        """End every thread, wherever its forward is held."""
        self._closed = True
        for runner in self._runners:
            runner.go.put(None)
        for runner in self._runners:
            assert runner.thread is not None
            runner.thread.join()
        self._settings.restore()

    def _let_go(self, runner: Runner) -> None:
        self._num_running += 1
        runner.go.put(None)

    def _take_event(self) -> None:
        runner = self._events.get()
        self._num_running -= 1
        if runner.error is not None:
            # Those beside it may have failed too: the first of them speaks, in every run.
            while self._num_running:
                self._events.get()
                self._num_running -= 1
            raise next(r.error for r in self._runners if r.error is not None)
        if runner.held is not None:
            self._on_held(runner)

    def _run(self, runner: Runner, job: Callable[[], Any]) -> None:
        self._local.runner = runner
        runner.go.get()
        try:
            if not self._closed:
                with self._settings.entered(self.workers):
                    job()
        except _Dismissed:
            pass
        except BaseException as error:  # raised in the owner's thread
            runner.error = error
        finally:
            runner.held = None
            runner.done = True
            self._events.put(runner)


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
    def entered(self, workers: int) -> Iterator[None]:
        """Have the same settings in this thread, of so many, and no gradients."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self._inference else torch.no_grad())
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            if self._stream is not None:
                torch.accelerator.set_stream(self._stream)  # and its device
            if workers > 1:
                torch.set_num_threads(max(1, self._num_threads // workers))
            yield

    def restore(self) -> None:
        """Put the number of threads back: one thread's own is also that of later threads."""
        torch.set_num_threads(self._num_threads)
