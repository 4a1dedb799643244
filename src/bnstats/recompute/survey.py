"""A first look at a model: which layer's input depends on which layers, and how often each runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnstats.recompute.collector import Collector
from bnstats.recompute.dataflow import Dataflow
from bnstats.recompute.stage import StagedLayer
from bnstats.recompute.task import Task


class Stage(NamedTuple):
    """Layers whose statistics can be completed in the same sweeps.

    Attributes:
        layers: how often each runs in a forward, at most.
        circular: some depend on each other or on themselves: sweeps must be repeated.
    """

    layers: Mapping[StagedLayer, int]
    circular: bool


class Survey:
    """Watches the forwards of all batches, while a collector takes the layers' moments."""

    def __init__(self, task: Task, collector: Collector) -> None:
        self._task = task
        self._collector = collector
        self._flow = Dataflow()
        self._running: Counter[StagedLayer] = Counter()
        self._position = {layer: i for i, layer in enumerate(task.layers)}
        size = len(task.layers)
        self._depends = torch.zeros(size, size, dtype=torch.float64)
        self._calls = torch.zeros(size, dtype=torch.float64)

    def forward(self, batch: Any) -> None:
        """Run one forward and watch it."""
        self._running.clear()
        self._flow = Dataflow()
        with self._flow:
            self._task.forward(batch)
        for layer, calls in self._running.items():
            position = self._position[layer]
            self._calls[position] = max(float(self._calls[position]), calls)

    def visit(self, layer: StagedLayer, input: Tensor) -> None:
        """Note what the layer's input depends on; the layer normalizes with its batch's own."""
        sources = self._flow.sources(input)
        self._depends[self._position[layer], [self._position[s] for s in sources]] = 1
        self._running[layer] += 1
        self._collector.visit(layer, input)
        # Its output depends on what it normalizes with, and so on what that was taken from.
        for statistic in (layer.module.running_mean, layer.module.running_var):
            assert statistic is not None
            self._flow.mark(statistic, sources | {layer})

    def stages(self) -> list[Stage]:
        """Return the layers that were reached, each after all that its input depends on."""
        table = torch.cat([self._depends, self._calls[:, None]], dim=1).to(self._task.like)
        # Over all processes: a batch elsewhere may have gone another way.
        table = self._task.peers.gather(lambda: table, like=table).amax(0).cpu()
        depends, calls = table[:, :-1] > 0, table[:, -1]
        for through in range(len(depends)):
            depends |= depends[:, through, None] & depends[through]
        together = depends & depends.T
        remaining = calls > 0
        stages = []
        while remaining.any():
            ready = remaining & ~(depends & ~together & remaining).any(1)
            layers = {self._task.layers[i]: int(calls[i]) for i in ready.nonzero().flatten()}
            stages.append(Stage(layers, circular=bool(together[ready].any())))
            remaining &= ~ready
        return stages
