"""Trainings on photographs: with which batch norm, and what recalibration makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
from benchmarks.photographs import synthetic_photos
from benchmarks.tuned_networks import FROM_SCRATCH, NETWORKS, PRETRAINED, SYNTHETIC
from bnstats.cli.photos import Photos, accuracy, fine_tune

RECALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Cell:
    """What is trained, but for the seed."""

    network: str
    variant: str
    batch: int
    steps: int


@dataclass(frozen=True)
class Training:
    """A training that is done: accuracies on ``held_out`` pictures.

    ``curve`` has, after each epoch, the steps done and the accuracies with running averages and
    with population statistics; the first seed alone keeps one.
    """

    cell: Cell
    seed: int
    running: float
    pooled: float
    layerwise: float
    held_out: int
    curve: tuple[tuple[int, float, float], ...] = ()


Method: TypeAlias = Literal["pooled", "layerwise"]

Task: TypeAlias = tuple[Cell, int]
"""A cell and a seed."""

Prepare: TypeAlias = Callable[[nn.Module, Cell, int], None]
"""Changes a model before it is trained in a cell, with gradients of this many pictures."""


def _ema(model: nn.Module, *_: object) -> None:
    bnstats.convert_batchnorm(model, "ema", momentum=0.1)


def _renorm(model: nn.Module, *_: object) -> None:
    # Without a warm-up: the running statistics that come with the weights are no start.
    bnstats.convert_batchnorm(model, "renorm", momentum=0.1, warmup=0, ramp=0)


def _frozen(model: nn.Module, *_: object) -> None:
    bnstats.freeze_statistics(model)


def _moving_average(center: bool, model: nn.Module, cell: Cell, gradient_batch: int) -> None:
    forwards = cell.steps * gradient_batch // cell.batch
    with warnings.catch_warnings():
        # A pretrained network has means, which this layer drops: that is what is measured.
        warnings.simplefilter("ignore", bnstats.BnstatsWarning)
        bnstats.convert_batchnorm(
            model,
            "moving_average",
            center=center,
            momentum=0.02,
            window=max(32 // cell.batch, 1),
            warmup=min(forwards // 10, 100),
        )


def _as_it_is(*_: object) -> None: ...


PLAIN = "BatchNorm, momentum 0.01"
PLAIN_DEFAULT = "BatchNorm, momentum 0.1"
FROZEN = "BatchNorm, frozen statistics"
EMA = "EMABatchNorm, momentum 0.1"
RENORM = "RenormBatchNorm, momentum 0.1"
MABN = "MovingAverageBatchNorm, weights as they are"
CENTERED = "MovingAverageBatchNorm, weights centered"

VARIANTS: dict[str, Prepare] = {
    PLAIN: _as_it_is,
    PLAIN_DEFAULT: _as_it_is,
    FROZEN: _frozen,
    EMA: _ema,
    RENORM: _renorm,
    MABN: partial(_moving_average, False),
    CENTERED: partial(_moving_average, True),
}
"""What a network's layers are made for a training."""

MOMENTA = {PLAIN: 0.01, PLAIN_DEFAULT: 0.1}
"""Batch norm trains alike with any momentum: one training serves both. 0.01 is the checkpoint's."""


def plan() -> list[Task]:
    """Return cells and seeds, the most telling first, and all such cells of one seed together.

    Frozen statistics normalize any batch alike: one batch stands for all.
    """
    far = {steps: _fine_tunings((16, 2), steps) for steps in (16, 60, 300)}
    between = {steps: _fine_tunings((4,), steps) for steps in (16, 60, 300)}
    scratch = [
        Cell(FROM_SCRATCH, variant, batch, 400)
        for batch, variant in product((32, 2), (PLAIN_DEFAULT, CENTERED))
    ]
    order = [
        *((far[60], range(3)), (scratch, range(1)), (far[60], range(3, 5))),
        *((between[60], range(5)), (far[16] + between[16], range(5))),
        *((far[300], range(1)), (scratch, range(1, 3)), (between[300], range(1))),
        *((far[300] + between[300], range(1, 5)), (scratch, range(3, 5))),
    ]
    return [(cell, seed) for cells, seeds in order for seed in seeds for cell in cells]


def _fine_tunings(batches: tuple[int, ...], steps: int) -> list[Cell]:
    return [
        Cell(PRETRAINED, variant, batch, steps)
        for batch, variant in product(batches, VARIANTS)
        if variant != FROZEN or batch == 16
    ]


def together(tasks: Iterable[Task]) -> list[tuple[list[Cell], int]]:
    """Return the cells of each training, and its seed: those that differ by the momentum share one.

    Each training has the place of its first cell.
    """
    trainings: dict[Task, list[Cell]] = {}
    for cell, seed in tasks:
        shared = replace(cell, variant=PLAIN) if cell.variant in MOMENTA else cell
        trainings.setdefault((shared, seed), []).append(cell)
    return [(cells, seed) for (_, seed), cells in trainings.items()]


def quick_plan(network: str) -> list[Task]:
    """Return a few steps of every variant."""
    return [(Cell(network, variant, 2, 2), 0) for variant in VARIANTS]


@cache
def _photos(folder: Path | None, size: int) -> Photos:
    return Photos.load(folder, size)


class _RunningAverages:
    """Keeps running averages with several momenta during one training."""

    def __init__(self, model: nn.Module, momenta: Iterable[float]) -> None:
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._buffers = [x for layer in layers for x in (layer.running_mean, layer.running_var)]
        self._averages = {momentum: [x.clone() for x in self._buffers] for momentum in momenta}
        for layer in layers:
            layer.momentum = 1.0  # the buffers are then the statistics of the last batch
        model.register_forward_hook(self._add)

    def _add(self, model: nn.Module, *_: object) -> None:
        if model.training:
            for momentum, averages in self._averages.items():
                torch._foreach_lerp_(averages, self._buffers, momentum)

    def use(self, momentum: float) -> None:
        """Write the averages to the buffers, until the next training forward."""
        torch._foreach_copy_(self._buffers, self._averages[momentum])


def train(cells: Sequence[Cell], seed: int, folder: Path | None) -> list[Training]:
    """Train cells on one thread, together; look at them before and after recalibration."""
    torch.set_num_threads(1)
    cell = cells[0]
    network = NETWORKS[cell.network]
    synthetic = cell.network == SYNTHETIC
    photos = synthetic_photos(network.size) if synthetic else _photos(folder, network.size)
    torch.manual_seed(seed)
    model = network.make(len(photos.classes))
    VARIANTS[cell.variant](model, cell, network.gradient_batch)
    momenta = [MOMENTA[cell.variant] for cell in cells if cell.variant in MOMENTA]
    averages = _RunningAverages(model, momenta) if momenta else None
    curves: list[list[tuple[int, float, float]]] = [[] for _ in cells]

    def accuracies(*methods: Method) -> list[list[float]]:
        """Return each cell's accuracies: with running averages, then recalibrated."""
        running = []
        for index in range(len(cells)):
            if averages is not None:
                averages.use(momenta[index])
            running.append(accuracy(model, photos.test))
        recalibrated = _recalibrated(model, photos, methods)
        return [[round(share, 4) for share in (first, *recalibrated)] for first in running]

    def look(steps: int) -> None:
        if seed == 0:
            for curve, (running, pooled) in zip(curves, accuracies("pooled"), strict=True):
                curve.append((steps, running, pooled))
            if cell.variant == FROZEN:
                _frozen(model)

    fine_tune(
        model,
        photos.train,
        steps=cell.steps,
        seed=seed,
        normalization_batch=cell.batch,
        gradient_batch=network.gradient_batch,
        learning_rate=network.learning_rate,
        after_epoch=look,
    )
    return [
        Training(cell, seed, *shares, len(photos.test), tuple(curve))
        for cell, shares, curve in zip(
            cells, accuracies("pooled", "layerwise"), curves, strict=True
        )
    ]


def _recalibrated(model: nn.Module, photos: Photos, methods: Iterable[Method]) -> list[float]:
    """Return the accuracy recalibrated by each of the methods."""
    bnstats.thaw_statistics(model)  # a frozen layer is left alone
    batches = photos.train.tensors[0].split(RECALIBRATION_BATCH)
    shares = []
    for method in methods:
        result = bnstats.recompute_population_stats(model, batches, method=method)
        shares.append(accuracy(model, photos.test))
        result.undo()
    return shares
