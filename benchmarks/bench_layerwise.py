"""The exact methods against the bare evaluation forward, and what standard errors cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

from torch import Tensor, nn

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import (
    COPY_INPUTS,
    Work,
    batches,
    copy_of_inputs,
    forward,
    torchvision_model,
)
from bnstats.recomputation import estimators

BARE = "bare forward, evaluation mode"
POOLED = 'method="pooled"'
LAYERWISE = 'method="layerwise"'
RECALIBRATION = 'method="layerwise", recompute_population_stats'
"""Without the spread between samples, which measuring takes along."""
SWEEPS = 'method="sweeps"'
MODELS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}
AT_MOST = 1.4
RESNET50 = {(4, 8, 3, 96, 96), (16, 8, 3, 96, 96), (16, 16, 3, 96, 96), (4, 4, 3, 224, 224)}
"""Number and shape of ResNet-50's batches."""
RESNET50_AT_MOST = 1.3


def measure(run: Run) -> list[Row]:
    """Measure ResNet-18 and ResNet-50; on ResNet-18 also sweeps and standard errors."""
    measured = []
    for shape in [(2, 2, 3, 32, 32)] if run.quick else sorted(RESNET50):
        data = batches(*shape)
        case = (_work(data), MODELS["resnet50"])
        measured += _layerwise(torchvision_model("resnet50"), data, case, RESNET50_AT_MOST, run)
    data = batches(2, 2, 3, 32, 32) if run.quick else batches(16, 16, 3, 96, 96)
    model, work = torchvision_model("resnet18"), _work(data)
    measured += _layerwise(model, data, (work, MODELS["resnet18"]), AT_MOST, run)
    return measured + _sweeps(model, data, work, run) + _standard_errors(model, data, work, run)


def _work(data: list[Tensor]) -> str:
    return f"measurement, {len(data)} batches of {tuple(data[0].shape)}"


def _layerwise(
    model: nn.Module, data: list[Tensor], case: tuple[str, str], at_most: float, run: Run
) -> list[Row]:
    functions = {
        BARE: forward(model, data, training=False),
        POOLED: _method("pooled", model, data),
        LAYERWISE: _method("layerwise", model, data),
        RECALIBRATION: partial(bnstats.recompute_population_stats, model, data, method="layerwise"),
        COPY_INPUTS: copy_of_inputs(model, data),
    }
    timings = compare(functions, rounds=1 if run.quick else 9)
    # the forward of every batch, and one more reading of what each layer gets
    limit = timings[BARE].median + timings[COPY_INPUTS].median / 2
    limits = dict.fromkeys((POOLED, LAYERWISE, RECALIBRATION), limit)
    goals = dict.fromkeys((LAYERWISE, RECALIBRATION), at_most)
    return rows(*case, timings, BARE, at_most=goals, limits=limits)


def _sweeps(model: nn.Module, data: list[Tensor], work: str, run: Run) -> list[Row]:
    """Measure sweeps, and count their multiplications: their cost where everything else is free."""
    functions = {
        BARE: forward(model, data, training=False),
        SWEEPS: _method("sweeps", model, data),
    }
    timings = compare(functions, rounds=1 if run.quick else 3)
    one, all_sweeps = (_multiplications(model, function) for function in functions.values())
    size = "ResNet-18, its 20 layers swept"
    return [
        *rows(work, size, timings, BARE),
        Row(work, size, f"{SWEEPS}, multiplications", all_sweeps / one, unit="forwards"),
    ]


def _standard_errors(model: nn.Module, data: list[Tensor], work: str, run: Run) -> list[Row]:
    without = f"{POOLED}, without standard errors"
    functions = {
        without: partial(_without_errors, model, data),
        POOLED: _method("pooled", model, data),
    }
    return rows(work, "ResNet-18", compare(functions, rounds=1 if run.quick else 21), without)


def _method(name: str, model: nn.Module, data: list[Tensor]) -> Work:
    return partial(bnstats.measure_population_stats, model, data, method=name)


class _NoSpread(estimators.Spread):
    """Keeps nothing of the spread between batches."""

    def offset(self, batch: bnstats.Moments) -> Tensor:
        """Return something of the right shape."""
        return batch.mean

    def add(self, *_: Tensor) -> None:
        """Do nothing."""

    def about(self, mean: Tensor, _: Tensor) -> Tensor:
        """Return something of the right shape."""
        return mean.expand(3, 3, -1)


def _without_errors(model: nn.Module, data: list[Tensor]) -> None:
    """Measure with the spread between batches neither kept nor read."""
    with mock.patch.object(estimators, "Spread", _NoSpread):
        bnstats.measure_population_stats(model, data)


def _multiplications(model: nn.Module, function: Callable[[], object]) -> int:
    """Count the multiplications of the convolutions that run."""
    counts: list[int] = []

    def count(conv: nn.Conv2d, _: object, output: Tensor) -> None:
        counts.append(output.numel() * conv.weight[0].numel())

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    function()
    for hook in hooks:
        hook.remove()
    return sum(counts)


if __name__ == "__main__":
    command.main("layerwise")
