"""The public function: is it the batch norm?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnstats.arguments import check_function, check_has_values, check_module
from bnstats.diagnosis import verdict
from bnstats.diagnosis.causes import Case, Finding, find_cause, why_frozen
from bnstats.diagnosis.drifted import distance, explain, not_finite
from bnstats.diagnosis.dropout import on_as_in_training, random_modules
from bnstats.diagnosis.metric import Metric, measure_metric, summarize
from bnstats.diagnosis.verdict import REMEDIES, Diagnosis
from bnstats.diagnosis.weighing import weigh
from bnstats.errors import (
    InvalidValueError,
    NonFiniteStatisticsError,
    TooFewValuesError,
)
from bnstats.recomputation import (
    Drift,
    PopulationStats,
    RunningStats,
    measure_population_stats,
)
from bnstats.recomputation.batches import default_device
from bnstats.recomputation.forwards import Forward
from bnstats.recomputation.loaders import check_loader
from bnstats.traversal import first_names, modes_kept, named_batchnorms, no_batchnorm, unwrap


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    metric: Metric | None = None,
    target: Iterable[Any] | None = None,
    expected: float | None = None,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
) -> Diagnosis:
    """Find out whether a model evaluates badly because of its batch norm, and how to fix it.

    The running statistics are compared with the population statistics of the loader, and each
    layer's distance with its standard error and with what its momentum, its number of updates and
    the spread between batches explain. A distance is in standard deviations of the layer's output,
    and large from 0.1 on. The model is left as it was.

    Args:
        model: any Module; wrappers are seen through. It may be in training or evaluation mode; a
            layer in evaluation mode in a model that trains counts as frozen.
        loader: batches of the training data, shuffled and as large as in training. Arguments about
            it are those of :func:`recompute_population_stats`. It is read once; with a metric and
            no target, twice; where averages seem to lag in a model with dropout, once more. What
            then cannot be measured, or not of a target, is said in the evidence.
        metric: ``metric(model, batch)`` returns a number for each sample, the larger the better:
            ``model(batch[0]).argmax(1) == batch[1]``, or minus a loss. It is compared sample by
            sample with running and with population statistics, on the target if there is one.
            Where it is worse with population statistics, no verdict recommends these.
        target: batches of the data that the model is evaluated on, where these may be others.
        expected: what the metric should be. If it is less, and statistics do not improve it,
            the fault is not the batch norm's. Only the user knows what is normal for a model.
        forward: ``forward(model, batch)`` where batches do not go in by themselves.
        device: where batches go; by default where the model's first parameter is.
        max_batches: the most batches to read of each loader.

    Returns:
        One verdict, its evidence, and the line that fixes it; ``print`` shows all.

    Raises:
        InvalidValueError: an empty loader, an iterator where it is read twice, a metric that is not
            finite with any statistics, ``expected`` without a metric.
        InvalidTypeError: not a Module, not a loader, a metric that returns something else.

    Example:
        >>> import torch, bnstats
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> loader = torch.randn(640, 4).split(64)
        >>> _ = bnstats.recompute_population_stats(model, loader)
        >>> bnstats.diagnose(model, loader).verdict
        'healthy'
    """
    check_module(model, loader, "model, loader")
    inner = unwrap(model)
    _check(loader, metric, target, expected)
    layers = named_batchnorms(inner, None)
    if not layers:
        return _diagnosis(verdict.NOT_BATCH_NORM, no_batchnorm(inner, None))
    check_has_values(layers)
    if bad := not_finite(layers):
        return _diagnosis(
            verdict.NOT_FINITE,
            f"{len(bad)} of {len(layers)} BatchNorm layers have running statistics that are NaN, "
            f"infinite or negative variances: {first_names(bad)}, in {sum(bad.values())} channels; "
            "one batch that is not finite, or overflows a half buffer, stays in nn.BatchNorm's "
            "average",
        )
    frozen = {name: why_frozen(name, layers, inner) for name in layers}
    options: dict[str, Any] = {
        "forward": forward,
        "device": default_device(inner) if device is None else device,
        "max_batches": max_batches,
    }
    with _evaluating(inner):
        return _Examination(inner, layers, frozen, options).run(loader, metric, target, expected)


def _check(loader: object, metric: object, target: object, expected: float | None) -> None:
    check_function("metric", metric, "model, batch")
    if metric is None and expected is not None:
        raise InvalidValueError("expected: there is no metric that it could be compared with")
    for name, batches in (("loader", loader), ("target", target)):
        if batches is None:
            continue
        check_loader(batches, "pooled", rereads=False, argument=name)
        again = metric is not None and (name == "target" or target is None)
        if again and isinstance(batches, Iterator):
            raise InvalidValueError(
                f"{name}: it is read again for the metric, and an iterator "
                f"({type(batches).__name__}) can be read once; pass a DataLoader or a list"
            )


def _diagnosis(name: str, *evidence: str, **more: Any) -> Diagnosis:
    return Diagnosis(name, tuple(evidence), REMEDIES[name], **more)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode: no layer of it counts as frozen, and metrics evaluate."""
    with modes_kept(model):
        for module in model.modules():
            module.training = False
        yield


_NOT_MEASURED = (NonFiniteStatisticsError, TooFewValuesError)
"""What a loader's data may lead to, and is an answer."""


def _why_not(error: Exception) -> Finding:
    """Return the verdict on a model that cannot be measured."""
    if isinstance(error, TooFewValuesError):
        return verdict.CANNOT_TELL, str(error)
    return verdict.NOT_BATCH_NORM, (
        f"{error}: weights, or data, are NaN or overflow before any statistics are used"
    )


class _Examination:
    """One examination of a model in evaluation mode."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, _BatchNorm],
        frozen: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._layers = layers
        self._frozen = frozen
        self._options = options

    def run(
        self,
        loader: Iterable[Any],
        metric: Metric | None,
        target: Iterable[Any] | None,
        expected: float | None,
    ) -> Diagnosis:
        """Measure, and weigh what was found."""
        try:
            population = self._measure(loader)
        except _NOT_MEASURED as error:
            return _diagnosis(*_why_not(error))
        if not population:
            why = "no BatchNorm layer could be measured"
            if not (left := population.frozen):
                return _diagnosis(verdict.CANNOT_TELL, why)
            thaw = "bnstats.thaw_statistics(model.eval())"
            why += f": {len(left)} are frozen ({first_names(left)}); {thaw} lets them be measured"
            return Diagnosis(verdict.CANNOT_TELL, (why,), f"{thaw}, and diagnose again")
        drift = population.drift_from(self._model)
        cases = self._cases(population, drift)
        aside = self._under_dropout(cases, loader)
        of_target = None
        if target is not None:
            try:
                of_target = self._measure(target)
            except _NOT_MEASURED as error:
                found, why = _why_not(error)
                aside.append(f"the target could not be measured: {why}")
                if find_cause(cases) is None:
                    return _diagnosis(found, *aside, drift=drift)
                metric = expected = None  # of the target they would be
        batches = loader if target is None else target
        values = {} if metric is None else self._metric(metric, batches, population, of_target)
        metrics = {name: summarize(x) for name, x in values.items()}
        found, evidence = weigh(cases, values, population, of_target, expected)
        if left := population.frozen:
            evidence.append(f"{len(left)} frozen layers were left out: {first_names(left)}")
        return _diagnosis(found, *evidence, *aside, drift=drift, metrics=metrics)

    def _cases(self, population: PopulationStats, drift: Mapping[str, Drift]) -> dict[str, Case]:
        return {
            name: Case(
                self._layers[name],
                distance(drift[name], population[name]),
                explain(self._layers[name], population[name]),
                self._frozen[name],
            )
            for name in population
        }

    def _measure(self, loader: Iterable[Any]) -> PopulationStats:
        return measure_population_stats(
            self._model, loader, on_nonfinite="skip", sync=False, **self._options
        )

    def _under_dropout(self, cases: dict[str, Case], loader: Iterable[Any]) -> list[str]:
        """Where averages seem to lag, measure with dropout as in training: does that explain it?

        The cases get what it finds. Models and loaders may fail here that are good in evaluation,
        for a training forward may take other inputs: that is returned as evidence.
        """
        finding = find_cause(cases)
        modules = random_modules(self._model)
        if finding is None or finding[0] != verdict.AVERAGES_LAG or not modules:
            return []
        if isinstance(loader, Iterator):  # which was read
            return []
        try:
            with on_as_in_training(modules, self._options["device"]):
                population = self._measure(loader)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            return [f"with dropout as in training it could not be measured: {why}"]
        drift = population.drift_from(self._model)
        for name in population.keys() & cases.keys():  # layers may run in evaluation alone
            under = distance(drift[name], population[name])
            cases[name] = cases[name]._replace(under_dropout=under)
        return []

    def _metric(
        self,
        metric: Metric,
        loader: Iterable[Any],
        population: PopulationStats,
        of_target: PopulationStats | None,
    ) -> dict[str, Tensor]:
        """Return each sample's metric with running, population and the target's statistics."""
        running = {name: RunningStats.of(self._layers[name]) for name in population}
        statistics = {"running": running, "population": _as_running(population)}
        if of_target is not None:
            statistics["target"] = {**running, **_as_running(of_target)}
        batches = islice(loader, self._options["max_batches"])
        device = self._options["device"]
        return measure_metric(metric, self._model, self._layers, batches, statistics, device)


def _as_running(stats: PopulationStats) -> dict[str, RunningStats]:
    return {name: RunningStats(layer.mean, layer.var) for name, layer in stats.items()}
