"""The options of a measurement, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from bnstats.arguments import check_function
from bnstats.distributed import Sync
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.masks import Downsample, check_downsample
from bnstats.recomputation.forwards import Forward
from bnstats.recomputation.population import PopulationStats
from bnstats.traversal import Include


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of :func:`bnstats.recompute_population_stats`, as the caller gave them.

    ``writes`` is whether the layers get the statistics; what is only measured is to be a prior too.
    """

    method: str = "pooled"
    forward: Forward | None = None
    device: torch.device | str | None = None
    max_batches: int | None = None
    tolerance: float | None = None
    include: Include | None = None
    correction: int = 1
    on_nonfinite: str = "raise"
    sync: Sync = None
    progress: bool = False
    memory_limit: int | None = None
    mask: Callable[[Any], Tensor] | None = None
    downsample: Downsample = None
    prior: PopulationStats | None = None
    writes: bool = True


def check_options(options: Options) -> None:
    """Refuse values that are not documented."""
    check_positive_int("max_batches", options.max_batches)
    check_positive_int("memory_limit", options.memory_limit)
    _check_tolerance(options.tolerance)
    if not isinstance(options.correction, Integral) or options.correction not in (0, 1):
        raise InvalidValueError(
            f"correction: expected 1 (unbiased variance) or 0 (biased), got {options.correction!r}"
        )
    if options.on_nonfinite not in ("raise", "skip"):
        raise InvalidValueError(
            f'on_nonfinite: expected "raise" or "skip", got {options.on_nonfinite!r}'
        )
    check_function("forward", options.forward, "model, batch")
    check_function("mask", options.mask, "batch")
    check_function("include", options.include, "name, module")
    check_downsample(options.downsample)
    if options.downsample is not None and options.mask is None:
        raise InvalidValueError(
            "downsample: expected None without a mask, which it would be for, got "
            f"{options.downsample!r}: pass mask, a function mask(batch), too"
        )
    _check_device(options.device)


def _check_device(device: Any) -> None:
    try:
        _ = None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidValueError(
            f'device: expected a torch.device or its name, "cpu" or "cuda:0" for example, got '
            f"{device!r}"
        ) from error


def check_positive_int(name: str, value: Any) -> None:
    """Refuse what is neither a positive integer nor None; ``name`` is the argument's."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        remedy = f", pass int({value:g})" if isinstance(value, float) else ""
        raise InvalidTypeError(
            f"{name}: expected an int or None, got {type(value).__name__}{remedy}"
        )
    if value < 1:
        raise InvalidValueError(f"{name}: expected 1 or more, got {value}")


def _check_tolerance(tolerance: Any) -> None:
    if tolerance is None:
        return
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise InvalidTypeError(
            f"tolerance: expected a number or None, got {type(tolerance).__name__}"
        )
    if not 0 < float(tolerance) < math.inf:
        raise InvalidValueError(
            "tolerance: expected a positive number, the largest standard error accepted "
            f"(in standard deviations, and relative for variances), got {tolerance}"
        )
