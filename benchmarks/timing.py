"""Timing by interleaved medians: what runs beside the measurement falls on all alike."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Timing(NamedTuple):
    """Seconds per call: the median of the rounds, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


def compare(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, calls: int = 1
) -> dict[str, Timing]:
    """Time functions in turns, ``A B B A A B ...``, each ``calls`` times in every round.

    One round before the first is the warm-up. The turns change their direction, so that none
    always runs behind the same other. Where several calls are timed, one comes before them that
    is not: what another has left in the caches is not what is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds + 1):
        for name in order:
            if calls > 1:
                functions[name]()
            seconds[name].append(_seconds(functions[name], calls))
        order.reverse()
    return {name: summary(values[1:]) for name, values in seconds.items()}


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed, and not to hand it back to the system.

    Else a layer that is run alone faults its pages in again in every call, or not, by the
    accident of what else lies on the heap: at 1.6 MB that is up to a third of its time, and
    says nothing of the layer. There is no way back in a process. Whole models are measured with
    the allocator as it is.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(parameter, 2**31 - 1)


def summary(values: Sequence[float]) -> Timing:
    """Return the median and the middle half."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def _seconds(function: Callable[[], object], calls: int) -> float:
    """Return the seconds of one call, by CUDA's own clock where there is a device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(calls):
        function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls
