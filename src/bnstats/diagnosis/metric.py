"""A metric of a model under several sets of statistics, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.diagnosis.verdict import Measured
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.recomputation import RunningStats
from bnstats.recomputation.batches import move_to

Metric = Callable[[nn.Module, Any], Any]
"""From a model and a batch to a number for each sample; the larger the better."""

Statistics = Mapping[str, RunningStats]
"""What each layer is to normalize with."""


def measure_metric(
    metric: Metric,
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    batches: Iterable[Any],
    statistics: Mapping[str, Statistics],
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """Return the metric of every sample under every set of statistics, float64 of shape (N,).

    Each batch is evaluated with all of them, so that differences are between the same samples. The
    model is in evaluation mode; its own running statistics are restored at the end. A sample may
    overflow with some statistics: with one at least it is finite.
    """
    before = {name: RunningStats.of(layer) for name, layer in layers.items()}
    values: dict[str, list[Tensor]] = {name: [] for name in statistics}
    try:
        with torch.no_grad():
            for batch in batches:
                moved = move_to(batch, device)
                for name, chosen in statistics.items():
                    for layer, running in chosen.items():
                        running.write_to(layers[layer])
                    values[name].append(_values(metric(model, moved)))
    finally:
        for name, running in before.items():
            running.write_to(layers[name])
    if not all(values.values()):
        raise InvalidValueError("metric: expected at least one batch to take it of, got none")
    found = {name: torch.cat(parts) for name, parts in values.items()}
    if not torch.stack([x.isfinite() for x in found.values()]).any(0).all():
        raise InvalidValueError("metric: expected finite numbers, got NaN or infinity")
    return found


def _values(result: object) -> Tensor:
    if not isinstance(result, (Tensor, bool, int, float)):
        raise InvalidTypeError(
            "metric: expected metric(model, batch) to return a tensor with a number for each "
            f"sample, the larger the better, or one number, got {type(result).__name__}"
        )
    return torch.as_tensor(result, device="cpu").detach().double().flatten()


def summarize(values: Tensor) -> Measured:
    """Return the mean of values and its standard error; NaN for too few."""
    count = len(values)
    spread = float(values.std()) if count > 1 else float("nan")
    return Measured(float(values.mean()), spread / max(count, 1) ** 0.5, count)
