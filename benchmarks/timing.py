"""Timing by interleaved medians: what runs beside the measurement falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds per call: the median of the rounds, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


def compare(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 30, calls: int = 5
) -> dict[str, Timing]:
    """Time functions in turns, ``A B A B ...``, each ``calls`` times in every round."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            _synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
