"""The methods of measurement, and what one measurement is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from torch import nn

from bnstats.distributed import Peers
from bnstats.errors import InvalidValueError
from bnstats.interrupts import Interrupts
from bnstats.recomputation.collector import one_pass
from bnstats.recomputation.estimators import Pooled, averaged, moving_average
from bnstats.recomputation.exclusive import exclusively
from bnstats.recomputation.layerwise import layerwise
from bnstats.recomputation.options import Options
from bnstats.recomputation.own_tensors import buffers_kept_on_failure
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.preparation import prepare
from bnstats.recomputation.sweeps import sweeps
from bnstats.recomputation.task import Method, Task
from bnstats.traversal import first_names, no_batchnorm

MethodName: TypeAlias = Literal["pooled", "batch_average", "ema", "layerwise", "sweeps"]
OnNonfinite: TypeAlias = Literal["raise", "skip"]

METHODS = {
    method.name: method
    for method in (
        Method("pooled", one_pass, Pooled, samples=True),
        Method("batch_average", one_pass, averaged),
        Method("ema", one_pass, moving_average, merges=False),
        Method("layerwise", layerwise, Pooled, holds_inputs=True, samples=True, in_order=True),
        Method("sweeps", sweeps, Pooled, rereads=True, samples=True, in_order=True),
    )
}
"""The one table of methods."""


def method_name(method: str | None, prior: PopulationStats | None) -> str:
    """Return the method, or that which is the default."""
    if method is None:
        return "pooled" if prior is None else "layerwise"
    return method


def prepared(
    model: nn.Module, loader: Iterable[Any], options: Options, interrupts: Interrupts
) -> Task:
    """Return the task, on which all processes agree."""
    peers, method = Peers.of(options.sync), options.method
    with peers.agreement() as agreement:
        if not isinstance(method, str) or method not in METHODS:
            raise InvalidValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        task = interrupts.call(prepare, model, loader, METHODS[method], options, peers, interrupts)
        agreement.send(task.description)
    return task


@contextmanager
def transaction(task: Task) -> Iterator[None]:
    """Let nothing else measure the model meanwhile, and keep its own buffers if anything fails."""
    with exclusively(task.model), buffers_kept_on_failure(task.model, task.layers):
        yield


def measured(task: Task) -> PopulationStats:
    """Return the statistics of the task's layers."""
    if task.layers:
        return task.method.measure(task)
    if task.frozen:
        task.warnings.append(
            f"all {len(task.frozen)} BatchNorm layers are frozen, or in evaluation mode while "
            f"the model trains, and are left alone: {first_names(task.frozen)}"
        )
    else:
        task.warnings.append(no_batchnorm(task.model, task.options.include))
    return PopulationStats({}, method=task.method.name, frozen=task.frozen)
