"""Trainings on photographs: with which batch norm, and what recalibration makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.photographs import synthetic_photos
from bnstats.cli.photos import Photos, accuracy, efficientnet_lite0, fine_tune

PRETRAINED, FROM_SCRATCH = "EfficientNet-Lite0", "ResNet-18 of half width"
SYNTHETIC = "a small network"
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
    """A training that is done: accuracies on so many held-out pictures.

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


@dataclass(frozen=True)
class Network:
    """A network, and how it is trained."""

    make: Callable[[int], nn.Module]
    size: int
    gradient_batch: int
    learning_rate: float


Prepare: TypeAlias = Callable[[nn.Module, Cell, int], None]
"""Changes a model before it is trained in a cell, with gradients of so many pictures."""


def _momentum(value: float, model: nn.Module, *_: object) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = value


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
    PLAIN_DEFAULT: partial(_momentum, 0.1),
    FROZEN: _frozen,
    EMA: _ema,
    RENORM: _renorm,
    MABN: partial(_moving_average, False),
    CENTERED: partial(_moving_average, True),
}
"""What a network's layers are made for a training. The momentum of 0.01 is the checkpoint's own."""


def half_resnet18(num_classes: int) -> nn.Sequential:
    """Return a ResNet-18 with half as many channels, its weights drawn anew."""
    block = import_torchvision().models.resnet.BasicBlock
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 32
    for outputs, stride in ((32, 1), (64, 2), (128, 2), (256, 2)):
        shortcut = None
        if stride > 1:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        layers += [block(inputs, outputs, stride, shortcut), block(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes)
    )


def _small_network(num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def self_padding_efficientnet(num_classes: int) -> nn.Module:
    """Return EfficientNet-Lite0; where convolutions can pad by themselves, no layer copies first.

    It pads as TensorFlow does; with a stride of 1 that is the same on all sides.
    """
    model = efficientnet_lite0(num_classes)
    for module in model.modules():
        padding = getattr(module, "static_padding", None)
        if isinstance(padding, nn.ZeroPad2d) and len(set(padding.padding)) == 1:
            module.padding = padding.padding[:2]
            module.static_padding = nn.Identity()
    return model


NETWORKS = {
    PRETRAINED: Network(self_padding_efficientnet, 96, 16, 0.02),
    FROM_SCRATCH: Network(half_resnet18, 64, 32, 0.05),
    SYNTHETIC: Network(_small_network, 16, 16, 0.02),
}


def plan() -> list[tuple[Cell, int]]:
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


def quick_plan(network: str) -> list[tuple[Cell, int]]:
    """Return a few steps of every variant."""
    return [(Cell(network, variant, 2, 2), 0) for variant in VARIANTS]


@cache
def _photos(folder: Path | None, size: int) -> Photos:
    return Photos.load(folder, size)


def train(cell: Cell, seed: int, folder: Path | None) -> Training:
    """Train a cell on one thread; look at it before and after recalibration."""
    torch.set_num_threads(1)
    network = NETWORKS[cell.network]
    synthetic = cell.network == SYNTHETIC
    photos = synthetic_photos(network.size) if synthetic else _photos(folder, network.size)
    torch.manual_seed(seed)
    model = network.make(len(photos.classes))
    VARIANTS[cell.variant](model, cell, network.gradient_batch)
    curve: list[tuple[int, float, float]] = []

    def look(steps: int) -> None:
        if seed == 0:
            curve.append((steps, *_accuracies(model, photos, ["pooled"])))
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
    accuracies = _accuracies(model, photos, ["pooled", "layerwise"])
    return Training(cell, seed, *accuracies, len(photos.test), tuple(curve))


def _accuracies(model: nn.Module, photos: Photos, methods: list[str]) -> list[float]:
    """Return the accuracy with running averages, and recalibrated by each of the methods."""
    accuracies = [accuracy(model, photos.test)]  # leaves every layer in evaluation mode
    bnstats.thaw_statistics(model)  # a frozen layer is left alone
    batches = photos.train.tensors[0].split(RECALIBRATION_BATCH)
    for method in methods:
        result = bnstats.recompute_population_stats(model, batches, method=method)
        accuracies.append(accuracy(model, photos.test))
        result.undo()
    return [round(share, 4) for share in accuracies]
