"""From the estimates of all layers to the statistics that are returned."""

from __future__ import annotations

from collections.abc import Collection

import torch

from bnstats.errors import (
    InvalidValueError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from bnstats.recomputation.batches import BatchCounts
from bnstats.recomputation.estimators import Estimate
from bnstats.recomputation.layer_stats import LayerStats
from bnstats.recomputation.observer import ObservedLayer
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.task import Task


def population_stats(
    task: Task,
    counts: BatchCounts,
    estimate: Estimate,
    reached_before: Collection[ObservedLayer] = (),
) -> PopulationStats:
    """Return the statistics of every layer that saw values; a warning tells of the others.

    Args:
        task: what was measured.
        counts: how many batches there were.
        estimate: of all layers of the task, their channels laid end to end.
        reached_before: layers that an earlier reading has reached, of which nothing is known if
            the one that was to measure them did not.
    """
    check_counts(counts)
    channels = [layer.num_features for layer in task.layers]
    # (On a device without float64 they come in float32.)
    columns = zip(*(part.cpu().double().split(channels) for part in estimate), strict=True)
    stats: dict[str, LayerStats] = {}
    unseen = []
    for layer, column in zip(task.layers, columns, strict=True):
        part = Estimate(*(values.clone() for values in column))
        if int(part.num_values[0]) == 0:
            unseen.append(layer)
        else:
            stats[layer.name] = layer_stats(layer, part, task.correction_of(layer))
    if missed := [layer for layer in unseen if layer in reached_before]:
        task.warnings.append(_about_missed(missed))
    if unseen := [layer for layer in unseen if layer not in reached_before]:
        task.warnings.append(_about_unseen(task, unseen))
    if task.own_forward is not None and not task.options.writes:  # to write them is an error
        for layer in task.layers:
            if layer.name in stats:
                task.warnings.extend(_about_overflow(layer, stats[layer.name]))
    if task.prior is not None:
        task.warnings.extend(task.prior.about_one_kind())
    return PopulationStats(
        stats,
        method=task.method.name,
        num_skipped=int(counts.num_skipped),
        frozen=task.frozen,
    )


def _about_missed(missed: list[ObservedLayer]) -> str:
    names = ", ".join(repr(layer.name) for layer in missed)
    return (
        "batches reached these layers when the loader was read first, and none did when it was "
        f'read again to measure them; they keep their statistics: {names}; method="layerwise" '
        "reads once"
    )


def _about_unseen(task: Task, unseen: list[ObservedLayer]) -> str:
    """Return which layers have no statistics, and why where that is known."""
    names = ", ".join(repr(layer.name) for layer in unseen)
    message = f"no batch reached these layers, which keep their statistics: {names}"
    if len(unseen) == len(task.layers) and task.own_forward is not None and task.own_forward.unrun:
        message += f"; the forward returned {task.own_forward.unrun}(...)"
    for layer in unseen:
        if layer.unread:
            kind = type(layer.module).__name__
            return (
                f"{message}; '{layer.name}' ({kind}) ran on inputs of shape "
                f"{tuple(layer.unread[0])}, and {layer.num_features} channels are expected in axis "
                "1: move the axis outside of the layer"
            )
    return message


def _about_overflow(layer: ObservedLayer, stats: LayerStats) -> list[str]:
    """Tell of a variance beyond the layer's half buffer: what it normalized with was infinite."""
    largest = torch.finfo(layer.running_var.dtype).max
    if not (stats.var > largest).any():
        return []
    return [
        f"layer '{layer.name}' has a variance of {float(stats.var.max()):.3g}, and its "
        f"running_var holds up to {largest:g}: its output was 0, and the layers behind it were "
        "measured on that; measure model.float(), under autocast where that is wanted"
    ]


def check_counts(counts: BatchCounts) -> None:
    """Refuse a measurement without a batch that counts."""
    if not counts.num_read:
        raise InvalidValueError(
            "loader: expected at least one batch, got none; an iterator can be read only once"
        )
    if counts.num_skipped == counts.num_read:
        raise NonFiniteStatisticsError(
            f"all {int(counts.num_read)} batches had non-finite statistics and were skipped"
        )


def layer_stats(layer: ObservedLayer, estimate: Estimate, correction: int) -> LayerStats:
    """Return one layer's statistics, of tensors of shape (C,)."""
    count = int(estimate.num_values[0])
    check_enough_values(layer, count, correction)
    if estimate.var.isnan().any():
        raise TooFewValuesError(
            f"layer '{layer.name}' saw 1 value per channel in each of its batches: an average of "
            'unbiased batch variances needs a batch of two; use method="pooled", which needs no '
            "batch variance, or correction=0"
        )
    return LayerStats(
        count=count,
        num_batches=int(estimate.num_batches[0]),
        mean=estimate.mean,
        var=estimate.var,
        mean_stderr=estimate.mean_stderr,
        var_stderr=estimate.var_stderr,
        correction=correction,
        eps=layer.module.eps,
        mean_var_cov=estimate.mean_var_cov,
        spread=estimate.spread,
        num_samples=int(estimate.num_samples[0]),
        sample_spread=estimate.sample_spread,
        mean_weight=float(estimate.mean_weight[0]),
        var_weight=float(estimate.var_weight[0]),
    )


def check_enough_values(layer: ObservedLayer, count: int, correction: int) -> None:
    """Refuse too few values for a variance."""
    if count <= correction:
        raise TooFewValuesError(
            f"layer '{layer.name}' saw {count} value per channel: its unbiased variance "
            "needs two; give more data, or correction=0"
        )
