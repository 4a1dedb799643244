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

from bnstats.errors import InvalidValueError, warn
from bnstats.recompute.collector import Collector
from bnstats.recompute.estimators import Estimate
from bnstats.recompute.onepass import collect
from bnstats.recompute.population import PopulationStats
from bnstats.recompute.results import check_enough_values, check_tally, population_stats
from bnstats.recompute.stage import StagedLayer, Visitor, staged
from bnstats.recompute.survey import Stage, Survey
from bnstats.recompute.task import Tally, Task

_STANDSTILL = 1e-6
"""Movement between two sweeps, in standard deviations and relative, that is float32's rounding."""

_MOST_REPETITIONS = 100
"""Sweeps after which layers that depend on each other are taken as they are, with a warning."""


def sweeps(task: Task) -> PopulationStats:
    """Measure with ``"sweeps"``."""
    return _Sweeper(task).run()


class _Enough(BaseException):
    """Ends a forward in which there is nothing more to be seen; never leaves this module."""


class _Sweeper:
    """Completes layer after layer, those that do not depend on each other in one sweep."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._visit: Visitor
        self._estimates: dict[StagedLayer, Estimate] = {}
        self._used: dict[StagedLayer, tuple[Tensor, Tensor]] = {}

    def run(self) -> PopulationStats:
        """Survey the model in a whole sweep, and then sweep stage by stage."""
        task = self._task
        bar = tqdm(total=len(task.layers), desc="layers complete", disable=not task.progress)
        with staged(task.model, task.layers, lambda *call: self._visit(*call)), bar:
            collector = Collector(task, task.layers)
            survey = Survey(task, collector)
            self._visit = survey.visit
            tally, estimate = collect(task, collector, survey.forward)
            check_tally(tally)
            self._settle(task.layers, estimate)
            for number, stage in enumerate(survey.stages()):
                # What depends on no layer, the survey has seen as it is.
                if number > 0 or stage.circular:
                    tally = self._complete(stage, tally)
                bar.update(len(stage.layers))
        columns = zip(*(self._estimates[layer] for layer in task.layers), strict=True)
        return population_stats(task, tally, Estimate(*map(torch.cat, columns)))

    def _complete(self, stage: Stage, tally: Tally) -> Tally:
        """Sweep until the statistics of a stage's layers stand."""
        step, moved = 1.0, math.inf
        for _ in range(_MOST_REPETITIONS if stage.circular else 1):
            swept, estimate = self._sweep(stage.layers)
            if not swept.num_read:
                raise InvalidValueError(
                    f"loader: gave {int(tally.num_read)} batches when it was read first, and none "
                    'when read again; method="sweeps" needs one that can be, "layerwise" does not'
                )
            if swept.num_skipped > tally.num_skipped:
                tally = swept
            last, moved = moved, self._settle(stage.layers, estimate, step)
            if moved <= _STANDSTILL:
                return tally
            if moved > last:  # from one side of the rest to the other: half the way is nearer
                step = 0.5
        if stage.circular:
            names = ", ".join(repr(layer.name) for layer in stage.layers)
            warn(
                f"the statistics of layers that depend on each other still moved by {moved:.1g} "
                f"standard deviations after {_MOST_REPETITIONS} sweeps: {names}"
            )
        return tally

    def _sweep(self, layers: Mapping[StagedLayer, int]) -> tuple[Tally, Estimate]:
        """Read the loader once and take the moments of these layers, stopping after the last."""
        collector = Collector(self._task, list(layers))
        missing: Counter[StagedLayer] = Counter()

        def visit(layer: StagedLayer, input: Tensor) -> None:
            if layer in layers:
                collector.take(layer, layer.observe(input))
                missing[layer] -= 1
                if not +missing:  # nothing above zero
                    raise _Enough

        def forward(batch: Any) -> None:
            missing.update(layers)
            with suppress(_Enough):
                self._task.forward(batch)
            missing.clear()

        self._visit = visit
        return collect(self._task, collector, forward)

    def _settle(
        self, layers: Collection[StagedLayer], estimate: Estimate, step: float = 1
    ) -> float:
        """Let the layers go on to an estimate, or a part of the way, and return how far it is."""
        channels = [layer.num_features for layer in layers]
        columns = zip(*(part.split(channels) for part in estimate), strict=True)
        moved = 0.0
        for layer, column in zip(layers, columns, strict=True):
            new = self._estimates[layer] = Estimate(*column)
            mean, var, count = new.mean, new.var, int(new.num_values[0])
            if not count:
                continue
            check_enough_values(layer, count, self._task.correction_of(layer))
            if layer in self._used:
                last_mean, last_var = self._used[layer]
                moved = max(moved, _movement(last_mean, last_var, new))
                mean, var = last_mean.lerp(mean, step), last_var.lerp(var, step)
            self._used[layer] = mean, var
            layer.normalize_with(mean, var)
        return moved


def _movement(last_mean: Tensor, last_var: Tensor, new: Estimate) -> float:
    """Return the largest movement: of a mean in standard deviations, of a variance relative."""
    of_mean = (new.mean - last_mean).abs() / new.var.sqrt()
    of_var = (new.var / last_var - 1).abs()
    # A channel of no variance that stays where it is moves by 0 / 0.
    return float(torch.stack([of_mean, of_var]).nan_to_num(nan=0).max())
