"""From distances and a metric to one verdict with its evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from bnstats.diagnosis import verdict
from bnstats.diagnosis.causes import Case, Finding, about_dropout, find_cause
from bnstats.diagnosis.drifted import MATERIAL, Distance, distance
from bnstats.diagnosis.metric import summarize
from bnstats.diagnosis.verdict import Measured
from bnstats.formatting import counted
from bnstats.recomputation import Drift, PopulationStats, RunningStats
from bnstats.recomputation.drift import compare

_SURE = 3.0
"""Standard errors from which on a difference of the metric is no chance."""

_FEWEST_SAMPLES = 30
"""Samples from which on a metric's standard error is worth something."""


def weigh(
    cases: Mapping[str, Case],
    values: Mapping[str, Tensor],
    population: PopulationStats,
    of_target: PopulationStats | None,
    expected: float | None,
) -> tuple[str, list[str]]:
    """Return the verdict and the evidence."""
    about_metric = [_about_metric(values)] if values else []
    if of_dropout := about_dropout(cases):
        about_metric.insert(0, of_dropout)
    finding = find_cause(cases)
    if finding is None and of_target is not None:
        finding = _other_data(population, of_target, values)
    if finding is None and values and _gain(values, "population") > _SURE:
        finding = (
            verdict.AVERAGES_LAG,
            f"population statistics improve the metric; {_worst(cases)}",
        )
    if finding is not None:
        found, why = finding
        of_averages = found not in (verdict.BATCH_TOO_SMALL, verdict.OTHER_DATA)
        if of_averages and values and _gain(values, "population") < -_SURE:
            return verdict.CANNOT_TELL, [why, *about_metric, _WORSE]
        return found, [why, *about_metric]
    if expected is not None and (short := _shortfall(values, expected)):
        return verdict.NOT_BATCH_NORM, [_worst(cases), *about_metric, short]
    if of_dropout and not values:
        about_metric.append("only a metric can tell whether that does harm")
        return verdict.CANNOT_TELL, about_metric
    if any(x.distance.may_be_material and not x.is_of_dropout for x in cases.values()):
        few = f"{_worst(cases)}: the loader has too few samples to distinguish that from chance"
        return verdict.CANNOT_TELL, [few, *about_metric]
    if values and (count := len(values["running"])) < _FEWEST_SAMPLES:
        few = f"the metric has {count} samples, too few for a standard error"
        return verdict.CANNOT_TELL, [_worst(cases), *about_metric, few]
    if values and expected is None:
        about_metric.append("if the metric should be better, it is not the batch norm")
    return verdict.HEALTHY, [_worst(cases), *about_metric]


def _other_data(
    population: PopulationStats, target: PopulationStats, values: Mapping[str, Tensor]
) -> Finding | None:
    """Return how far the target's statistics are from the loader's, where that does harm."""
    shared = [name for name in population if name in target]
    pairs = {name: RunningStats(target[name].mean, target[name].var) for name in shared}
    drift: Mapping[str, Drift] = compare(pairs, population)
    distances = {name: distance(drift[name], population[name], target[name]) for name in shared}
    off = [name for name, far in distances.items() if far.is_material and far.size > 2 * MATERIAL]
    if not off or (values and _gain(values, "target") <= _SURE):
        return None
    worst = max(off, key=lambda name: distances[name].size)
    return verdict.OTHER_DATA, (
        f"{len(off)} of {len(shared)} layers see other values on the target than on the loader, "
        f"first '{off[0]}' ({distances[off[0]]}), most '{worst}' ({distances[worst]})"
    )


def _worst(cases: Mapping[str, Case]) -> str:
    far: dict[str, Distance] = {name: case.distance for name, case in cases.items()}
    worst = max(far, key=lambda name: far[name].size)
    return (
        f"{counted(len(cases), 'BatchNorm layer')}: '{worst}', the farthest, is "
        f"{far[worst]} from the loader's population"
    )


_WORSE = (
    "population statistics make the metric worse: the loader may be of other data than the model "
    "was trained on, or the metric larger where the model is worse"
)


def _gain(values: Mapping[str, Tensor], name: str) -> float:
    """Return what other statistics make of the metric, in standard errors of the difference.

    What is less than the metric's own standard error nobody sees: 0.
    """
    own = values["running"]
    cured = _num_overflows(own) - _num_overflows(values[name])
    if cured and len(own) >= _FEWEST_SAMPLES:
        return math.copysign(math.inf, cured)
    gained = summarize(_differences(values, name))
    seen = abs(gained.mean) > summarize(own[own.isfinite()]).stderr
    if gained.num_samples < _FEWEST_SAMPLES or not seen:
        return 0.0
    return gained.mean / gained.stderr if gained.stderr else math.copysign(math.inf, gained.mean)


def _differences(values: Mapping[str, Tensor], name: str) -> Tensor:
    """Return what other statistics change, of samples that are finite with both."""
    differences = values[name] - values["running"]
    return differences[differences.isfinite()]


def _num_overflows(values: Tensor) -> int:
    return int((~values.isfinite()).sum())


def _about_metric(values: Mapping[str, Tensor]) -> str:
    own = values["running"]
    parts = [f"the metric is {summarize(own[own.isfinite()])} with running statistics"]
    for name in values:
        if name != "running":
            gained: Measured = summarize(_differences(values, name))
            parts.append(f"changes by {gained} with {_WHOSE[name]}")
    text = ", ".join(parts) + f" ({len(own)} samples)"
    for name, x in values.items():
        if num := _num_overflows(x):
            text += f"; it is NaN or infinite for {num} of them with {_WHOSE[name]}"
    return text


_WHOSE = {
    "running": "running statistics",
    "population": "those of the loader's population",
    "target": "those of the target",
}


def _shortfall(values: Mapping[str, Tensor], expected: float) -> str:
    """Return a message if the metric is below what was expected with any statistics, else ""."""
    finite = [x for x in values.values() if not _num_overflows(x)]
    best = max((summarize(x) for x in finite), key=lambda measured: measured.mean, default=None)
    if best is None or not expected - best.mean > _SURE * best.stderr:
        return ""
    return f"{expected:.4g} was expected, and with no statistics it is more than {best}"
