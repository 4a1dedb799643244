"""The exact fixed point in constant memory, reading the loader again and again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bnstats.distributed import communicates
from bnstats.errors import InvalidValueError
from bnstats.private import has_forward_hooks
from bnstats.recomputation.batches import BatchCounts
from bnstats.recomputation.collector import Collector, collect
from bnstats.recomputation.dependencies import DependencyLevel, DependencySurvey
from bnstats.recomputation.estimators import Estimate
from bnstats.recomputation.observer import ObservedLayer, OnInput, observed
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.results import check_counts, check_enough_values, population_stats
from bnstats.recomputation.task import Task

_NEGLIGIBLE_MOVEMENT = 1e-6
"""Largest change between two sweeps that counts as float32 rounding: sd, or relative."""

_MAX_REPETITIONS = 100
"""Sweeps after which layers that depend on each other are accepted, with a warning."""


def sweeps(task: Task) -> PopulationStats:
    """Measure with ``"sweeps"``."""
    return _Sweeps(task).run()


class _NothingMore(BaseException):
    """Ends a forward in which nothing is left to measure; never leaves this module."""


def _may_end_early(task: Task) -> bool:
    """Whether a forward may end at a layer: nothing has to be undone behind a module around it.

    Sharded modules gather their parameters before a forward and give them back after it, by hooks
    or in a forward of their own; offloaded ones load theirs. None notices that it was cut short.
    """
    layers = {layer.module for layer in task.layers}
    around = (module for module in task.model.modules() if not layers.isdisjoint(module.modules()))
    return not communicates(task.model) and not any(map(has_forward_hooks, around))


class _Sweeps:
    """Completes layer after layer, those that do not depend on each other in one sweep."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._on_input: OnInput
        self._estimates: dict[ObservedLayer, Estimate] = {}
        self._used: dict[ObservedLayer, tuple[Tensor, Tensor]] = {}
        self._ends_early = _may_end_early(task)

    def run(self) -> PopulationStats:
        """Survey the model in a whole sweep, and then sweep level by level."""
        task = self._task
        bar = tqdm(
            total=len(task.layers), desc="layers complete", disable=not task.options.progress
        )
        with observed(task.model, task.layers, lambda *call: self._on_input(*call)), bar:
            collector = Collector(task, task.layers)
            survey = DependencySurvey(task, collector)
            self._on_input = survey.on_input
            counts, estimate = collect(task, collector, survey.forward)
            check_counts(counts)
            self._update(task.layers, estimate)
            levels = survey.levels()
            for number, level in enumerate(levels):
                # The survey has measured the layers that depend on no other.
                if number > 0 or level.circular:
                    counts = self._complete(level, counts)
                bar.update(len(level.layers))
        columns = zip(*(self._estimates[layer] for layer in task.layers), strict=True)
        surveyed = {layer for level in levels for layer in level.layers}
        return population_stats(task, counts, Estimate(*map(torch.cat, columns)), surveyed)

    def _complete(self, level: DependencyLevel, counts: BatchCounts) -> BatchCounts:
        """Sweep until the statistics of a level's layers no longer change."""
        step, moved = 1.0, math.inf
        for _ in range(_MAX_REPETITIONS if level.circular else 1):
            swept, estimate = self._sweep(level.layers)
            if not swept.num_read:
                raise InvalidValueError(
                    f"loader: gave {int(counts.num_read)} batches when it was read first, and none "
                    'when read again; method="sweeps" needs one that can be, "layerwise" does not'
                )
            if swept.num_skipped > counts.num_skipped:
                counts = swept
            last, moved = moved, self._update(level.layers, estimate, step)
            if moved <= _NEGLIGIBLE_MOVEMENT:
                return counts
            if moved > last:  # it overshoots the fixed point: half a step comes closer
                step = 0.5
        if level.circular:
            names = ", ".join(repr(layer.name) for layer in level.layers)
            self._task.warnings.append(
                f"the statistics of layers that depend on each other still changed by {moved:.1g} "
                f"standard deviations after {_MAX_REPETITIONS} sweeps: {names}"
            )
        return counts

    def _sweep(self, layers: Mapping[ObservedLayer, int]) -> tuple[BatchCounts, Estimate]:
        """Read the loader once and take the moments of these layers, stopping after the last."""
        collector = Collector(self._task, list(layers))
        missing: Counter[ObservedLayer] = Counter()

        def on_input(layer: ObservedLayer, input: Tensor) -> None:
            nothing_more = self._ends_early and not +missing  # none above zero
            if layer in layers and not nothing_more:
                collector.add(layer, layer.moments_of(input))
                missing[layer] -= 1
                nothing_more = self._ends_early and not +missing
            if nothing_more:  # again, if the model has caught it and goes on
                raise _NothingMore

        def forward(batch: Any) -> None:
            missing.update(layers)
            with suppress(_NothingMore):
                self._task.forward(batch)
            missing.clear()

        self._on_input = on_input
        return collect(self._task, collector, forward, prepare=self._apply)

    def _update(
        self, layers: Collection[ObservedLayer], estimate: Estimate, step: float = 1
    ) -> float:
        """Update layers to an estimate, or a part of the way, and return how far it is."""
        channels = [layer.num_features for layer in layers]
        columns = zip(*(part.split(channels) for part in estimate), strict=True)
        moved = 0.0
        for layer, column in zip(layers, columns, strict=True):
            new = self._estimates[layer] = Estimate(*column)
            count = int(new.num_values[0])
            if not count:
                continue
            check_enough_values(layer, count, self._task.correction_of(layer))
            if self._task.prior is not None:
                new = self._estimates[layer] = self._task.prior.combine(layer, new)
            mean, var = new.mean, new.var
            if layer in self._used:
                last_mean, last_var = self._used[layer]
                moved = max(moved, _movement(last_mean, last_var, new))
                mean, var = last_mean.lerp(mean, step), last_var.lerp(var, step)
            self._used[layer] = mean, var
        return moved

    def _apply(self) -> None:
        """Let the layers normalize with their current estimates."""
        for layer, statistics in self._used.items():
            layer.normalize_with(*statistics)


def _movement(last_mean: Tensor, last_var: Tensor, new: Estimate) -> float:
    """Return the largest change: of a mean in standard deviations, of a variance relative."""
    of_mean = (new.mean - last_mean).abs() / new.var.sqrt()
    of_var = (new.var / last_var - 1).abs()
    # A channel without variance that does not change gives 0 / 0.
    return float(torch.stack([of_mean, of_var]).nan_to_num(nan=0).max())
