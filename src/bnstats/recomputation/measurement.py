"""One measurement: agreed on by all processes, alone with the model, and undone if it fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bnstats.distributed import Peers
from bnstats.interrupts import Interrupts
from bnstats.recomputation.exclusive import exclusively
from bnstats.recomputation.methods import method_of
from bnstats.recomputation.options import Options
from bnstats.recomputation.own_tensors import buffers_kept_on_failure
from bnstats.recomputation.population import PopulationStats
from bnstats.recomputation.preparation import prepare
from bnstats.recomputation.task import Task
from bnstats.traversal import first_names, no_batchnorm


def prepared(
    model: nn.Module, loader: Iterable[Any], options: Options, interrupts: Interrupts
) -> Task:
    """Return the task, on which all processes agree."""
    peers = Peers.of(options.sync)
    with peers.agreement() as agreement:
        method = method_of(options)
        task = interrupts.call(prepare, model, loader, method, options, peers, interrupts)
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
