"""RenormBatchNorm: its cost beside EMABatchNorm's, and digits at small normalization batches.

The gradient batch is 32 for all, normalized in parts as in :mod:`benchmarks.bench_small_batch`.
The warm-up is the first tenth of a training's forwards, the ramp the next three tenths.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

import bnstats
from benchmarks import command, report
from benchmarks.bench_layers import LARGE_ON_CPU, TRAINING
from benchmarks.bench_small_batch import GRADIENT_BATCH, Setting, moving_average, train
from benchmarks.rows import Row, Run
from benchmarks.workloads import TRAINING_PASSES, Shape, compare_layers, forward_backward
from bnstats.cli.digits import Digits, multilayer_perceptron

EMA, RENORM = "EMABatchNorm2d", "RenormBatchNorm2d"
AT_MOST = 1.05
STEPS = 400
BATCHES = (32, 8, 4, 2)
OF_FEW_CLASSES = (8, 4)
"""Batches that are also made of few classes: a gradient's samples, sorted, in parts."""
NOTE = "Test error in %, median and range of the seeds. "
COLUMNS = {
    "BatchNorm": "BatchNorm",
    "RenormBatchNorm": "RenormBatchNorm",
    "moving average": "MovingAverageBatchNorm",
}
"""The columns of the README's table, by what its rows begin with."""


def measure(run: Run) -> list[Row]:
    """Time the layer after its warm-up, and train with it."""
    measured = []
    for shape in (*TRAINING, *LARGE_ON_CPU):
        measured += _timed(run, shape)
    trained = _trained(run)
    report.write_table(run.folder / "renorm_table.md", "renorm", table(trained), NOTE)
    return measured + trained


def table(trained: Sequence[Row]) -> list[list[str]]:
    """Return the lines of the README's table: a column a layer, a row a batch."""
    found: dict[str, dict[str, str]] = {}
    for row in trained:
        layer, *_, batch = row.what.split(", ")
        size = batch.removeprefix("batch ") + ", by class" * ("by class" in row.what)
        figure = f"{row.median:.1f} ({row.low:.1f} to {row.high:.1f})"
        found.setdefault(size, {})[layer] = figure
    header = ["normalized over", *(f"`{name}`" for name in COLUMNS.values())]
    return [header, *([size, *(of.get(x, "") for x in COLUMNS)] for size, of in found.items())]


def _timed(run: Run, shape: Shape) -> list[Row]:
    shape = run.shape(shape)
    layers = {
        EMA: bnstats.EMABatchNorm2d(shape[1]),
        RENORM: bnstats.RenormBatchNorm2d(shape[1], warmup=0, ramp=0),
    }
    return compare_layers(
        "forward and backward",
        shape,
        {name: forward_backward(layer, shape) for name, layer in layers.items()},
        EMA,
        passes=TRAINING_PASSES,
        at_most={RENORM: AT_MOST},
        rounds=3 if run.quick else 200,
        calls=1 if run.quick else 10,
    )


def _settings(steps: int) -> list[Setting]:
    plain = partial(multilayer_perceptron, nn.BatchNorm1d, nn.Linear)
    settings = [Setting("BatchNorm", batch, plain) for batch in BATCHES]
    for batch in BATCHES:
        forwards = steps * GRADIENT_BATCH // batch
        options = {"warmup": forwards // 10, "ramp": 3 * forwards // 10}
        norm = partial(bnstats.RenormBatchNorm1d, **options)
        make = partial(multilayer_perceptron, norm, nn.Linear)
        settings.append(Setting("RenormBatchNorm", batch, make))
    windows = {32: 1, 8: 4, 4: 8, 2: 16}
    settings += [moving_average("mlp", batch, window=windows[batch]) for batch in BATCHES]
    few = [x for x in settings if x.batch in OF_FEW_CLASSES]
    return settings + [replace(x, name=f"{x.name}, by class", by_class=True) for x in few]


def _trained(run: Run) -> list[Row]:
    seeds, steps = (1, 2) if run.quick else (5, STEPS)
    work, measured = f"test error on digits, {steps} steps, {seeds} seeds", []
    digits = [Digits.load(seed) for seed in range(seeds)]
    for setting in _settings(steps):
        errors = [
            train(setting, data, steps=steps, seed=seed).error for seed, data in enumerate(digits)
        ]
        what = f"{setting.name}, batch {setting.batch}"
        summary = (statistics.median(errors), min(errors), max(errors))
        measured.append(Row(work, "perceptron", what, *summary, unit="%"))
    return measured


if __name__ == "__main__":
    command.main("renorm")
