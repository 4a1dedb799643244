"""Timing by interleaved medians: what runs beside the measurement falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


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
    always runs behind the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds + 1):
        for name in order:
            seconds[name].append(_seconds(functions[name], calls))
        order.reverse()
    return {name: summary(values[1:]) for name, values in seconds.items()}


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
