"""torch's settings of one thread, for threads that work in its place."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch

_at_work: set[object] = set()
"""Those that have changed the number of intra-op threads and not yet put it back."""

_number_before = 0
"""The number before the first of them: that of threads which begin later."""

_lock = threading.Lock()


class ThreadSettings:
    """torch's settings per thread, taken from the thread that creates this object.

    Args:
        devices: where the forwards compute. No other device is touched: reading the stream
            of an accelerator creates a context on it.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._num_threads = torch.get_num_threads()
        self._inference = torch.is_inference_mode_enabled()
        self._default_device = torch.empty(0).device  # as in moments
        with_streams = [device for device in sorted(devices, key=str) if _has_streams(device)]
        self._streams = [torch.accelerator.current_stream(device) for device in with_streams]
        self._device_index = torch.accelerator.current_device_index() if with_streams else None
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", *(device.type for device in devices)} - {"meta"})
            if torch.is_autocast_enabled(kind)
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def entered(self, num_sharing: int) -> Iterator[None]:
        """Apply the settings to this thread, one of several, and switch gradients off."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if self._inference else torch.no_grad())
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            for stream in self._streams:
                torch.accelerator.set_stream(stream)  # and its device
            if self._device_index is not None:
                torch.accelerator.set_device_index(self._device_index)
            torch.set_num_threads(max(1, self._num_threads // num_sharing))
            yield

    def begin(self, num_threads: int | None) -> None:
        """Set how many intra-op threads the calling thread has until ``restore``, or leave it."""
        global _number_before
        with _lock:
            if not _at_work:
                _number_before = self._num_threads
            _at_work.add(self)
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def restore(self) -> None:
        """Put the number of threads back, of the calling thread and of those that begin later.

        What one thread sets is also what later threads begin with. While others are at work
        they set it too, so that the last to end puts back what was before the first.
        """
        with _lock:
            if self not in _at_work:
                return
            _at_work.remove(self)
            torch.set_num_threads(self._num_threads)
            if not _at_work and _number_before != self._num_threads:
                # In a thread of its own: this one keeps its number.
                thread = threading.Thread(target=torch.set_num_threads, args=(_number_before,))
                with suppress(RuntimeError):  # there can be no more threads
                    thread.start()
                    thread.join()


def _has_streams(device: torch.device) -> bool:
    if device.type in ("cpu", "meta", "mps"):  # always in the same order
        return False
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type
