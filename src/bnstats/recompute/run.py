"""The public functions: measure population statistics, and write them into the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bnstats.errors import (
    BnstatsWarning,
    InvalidTypeError,
    InvalidValueError,
)
from bnstats.recompute.batches import (
    Forward,
    check_loader,
    default_device,
    default_forward,
    read_batches,
)
from bnstats.recompute.collector import Collector
from bnstats.recompute.drift import Recalibration, RunningStats
from bnstats.recompute.estimators import ESTIMATORS
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.stage import StagedLayer, staged
from bnstats.traversal import Include, named_batchnorms, unwrap

METHODS = ("pooled", "batch_average", "ema", "layerwise", "sweeps")


def recompute_population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: str = "pooled",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    tolerance: float | None = None,
    include: Include | None = None,
    correction: int = 1,
    on_nonfinite: str = "raise",
    sync: Any = None,
    progress: bool = False,
) -> Recalibration:
    """Replace running statistics by the population statistics of the loader's data.

    One pass over the data with the weights fixed. It is a transaction: if anything fails, the
    model is bit for bit as it was; the running statistics are written at the end, in place.
    Only the chosen BatchNorm layers use batch statistics meanwhile; everything else is in
    evaluation mode (no dropout), without gradients. Counters and momentum stay as they are.

    What each layer normalizes with while its statistics are taken is the method's choice:

    - ``"pooled"``: each batch by itself, as in training; the statistics are the exact mean and
      variance over every value, uneven batches included.
    - ``"batch_average"``: the same, but the plain average of batch means and unbiased batch
      variances (Algorithm 2 of the BatchNorm paper); the variance between batches is missing.
    - ``"ema"``: the same with a debiased moving average of momentum 0.1: what ``nn.BatchNorm``
      would end with on this data.

    Args:
        model: any Module; DistributedDataParallel, DataParallel and torch.compile are seen
            through. Layers are every BatchNorm with running statistics.
        loader: an iterable of batches: a tensor; a tuple or list, of which the first element
            goes in; a mapping of keyword arguments. Tensors at any depth move to the device.
        method: see above.
        forward: ``forward(model, batch)`` for everything else, for example under autocast.
        device: where batches go; by default where the model's first parameter is.
        max_batches: stop after so many.
        tolerance: not available yet.
        include: ``include(name, module) -> bool`` chooses layers; the others normalize as in
            evaluation.
        correction: 1 for unbiased variances, 0 for biased ones.
        on_nonfinite: ``"raise"`` an error for a batch whose statistics are not finite in some
            layer, or ``"skip"`` it for all layers.
        sync: False for this process's data alone; merging over processes is not available yet.
        progress: show a progress bar.

    Returns:
        What was before and is after, how far it moved, and ``undo()``. Printed, it is a table.

    Raises:
        InvalidValueError: an unknown method or option, an empty loader.
        InvalidTypeError: not a Module, not a loader, a batch that needs ``forward``, a lazy
            layer not yet materialized.
        NonFiniteStatisticsError: a batch with NaN or infinity, unless skipped.
        TooFewValuesError: fewer values than the variance needs.
        NotImplementedError: an option that is not available yet.

    Warns:
        BnstatsWarning: no BatchNorm layers, or some that no batch reached; those keep theirs.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> loader = torch.randn(100, 4).split(32)
        >>> result = bnstats.recompute_population_stats(model, loader)
        >>> result.after["1"].count
        100
        >>> result.undo()

    References:
        Ioffe and Szegedy (2015), "Batch Normalization", arXiv:1502.03167, Algorithm 2; Wu and
        Johnson (2021), "Rethinking Batch in BatchNorm", arXiv:2105.07576, section 3.
    """
    after = measure_population_stats(
        model,
        loader,
        method=method,
        forward=forward,
        device=device,
        max_batches=max_batches,
        tolerance=tolerance,
        include=include,
        correction=correction,
        on_nonfinite=on_nonfinite,
        sync=sync,
        progress=progress,
    )
    layers = named_batchnorms(model)
    layers = {name: layers[name] for name in after}
    before = {name: RunningStats.of(layer) for name, layer in layers.items()}
    drift = after.drift_from(model)
    after.apply_to(model)
    return Recalibration(before, after, drift, layers)


def measure_population_stats(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: str = "pooled",
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    tolerance: float | None = None,
    include: Include | None = None,
    correction: int = 1,
    on_nonfinite: str = "raise",
    sync: Any = None,
    progress: bool = False,
) -> PopulationStats:
    """Measure the population statistics of the loader's data, and write nothing.

    Arguments, warnings and errors are those of :func:`recompute_population_stats`.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        >>> stats = bnstats.measure_population_stats(model, torch.randn(64, 3).split(16))
        >>> drift = stats.drift_from(model)["0"]
        >>> bool(drift.mean_shift.abs().max() < 1)
        True
    """
    inner = unwrap(model)
    _check_options(method, max_batches, correction, on_nonfinite, include=include, forward=forward)
    _check_available(method, tolerance, sync)
    check_loader(loader)
    layers = named_batchnorms(inner, include)
    if not layers:
        warnings.warn(
            f"{type(inner).__name__} has no BatchNorm layer with running statistics"
            + ("" if include is None else " that include chooses"),
            BnstatsWarning,
            stacklevel=2,
        )
        return PopulationStats({}, method=method)
    stage = [StagedLayer.of(i, name, module) for i, (name, module) in enumerate(layers.items())]
    collector = Collector(
        stage,
        ESTIMATORS[method],
        correction=correction,
        skip_nonfinite=on_nonfinite == "skip",
    )
    run = forward or default_forward
    batches = read_batches(
        loader,
        max_batches=max_batches,
        progress=progress,
        device=device if device is not None else default_device(inner),
    )
    with staged(inner, stage, collector.visit):
        for batch in batches:
            run(inner, batch)
            collector.close_batch()
    return PopulationStats(collector.finish(), method=method, num_skipped=collector.num_skipped)


def _check_options(
    method: str,
    max_batches: int | None,
    correction: int,
    on_nonfinite: str,
    **functions: object,
) -> None:
    if method not in METHODS:
        raise InvalidValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if max_batches is not None:
        if isinstance(max_batches, bool) or not isinstance(max_batches, int):
            raise InvalidTypeError(
                f"max_batches: expected an int or None, got {type(max_batches).__name__}"
            )
        if max_batches < 1:
            raise InvalidValueError(f"max_batches: expected 1 or more, got {max_batches}")
    if correction not in (0, 1):
        raise InvalidValueError(
            f"correction: expected 1 (unbiased variance) or 0 (biased), got {correction!r}"
        )
    if on_nonfinite not in ("raise", "skip"):
        raise InvalidValueError(f'on_nonfinite: expected "raise" or "skip", got {on_nonfinite!r}')
    for argument, function in functions.items():
        if function is not None and not callable(function):
            raise InvalidTypeError(
                f"{argument}: expected a callable or None, got {type(function).__name__}"
            )


def _check_available(method: str, tolerance: float | None, sync: Any) -> None:
    if method not in ESTIMATORS:
        raise NotImplementedError(f'method="{method}" is not available yet; "pooled" is')
    if tolerance is not None:
        raise NotImplementedError("tolerance is not available yet; max_batches is")
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if sync or (sync is None and several):
        raise NotImplementedError(
            "merging over processes is not available yet; sync=False takes the statistics of "
            "this process's data alone"
        )
