"""The exact methods against the bare evaluation forward, and what standard errors cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import rows, write
from benchmarks.timing import compare
from bnstats.recompute import estimators

BARE = "bare forward, evaluation mode"
POOLED = 'method="pooled"'


def forward(model: nn.Module, data: list[Tensor]) -> None:
    """Run the bare forward in evaluation mode."""
    model.eval()
    with torch.no_grad():
        for x in data:
            model(x)


def contestants(
    model: nn.Module, data: list[Tensor], methods: list[str]
) -> dict[str, Callable[[], object]]:
    """Return what is compared: each measures the data once."""
    measure = partial(bnstats.measure_population_stats, model, data)
    measures = {f'method="{name}"': partial(measure, method=name) for name in methods}
    return {BARE: partial(forward, model, data), **measures}


class NoSpread(estimators.Spread):
    """Keeps nothing of the spread between batches."""

    def offset(self, batch: bnstats.Moments) -> Tensor:
        """Return something of the right shape."""
        return batch.mean

    def add(self, *_: Tensor) -> None:
        """Do nothing."""

    def sum_of_squares(self, constant: Tensor, *_: Tensor) -> Tensor:
        """Return something of the right shape."""
        return constant


def without_errors(model: nn.Module, data: list[Tensor]) -> None:
    """Measure with the spread between batches neither kept nor read."""
    with mock.patch.object(estimators, "Spread", NoSpread):
        bnstats.measure_population_stats(model, data)


def multiplications(model: nn.Module, run: Callable[[], object]) -> int:
    """Count the multiplications of the convolutions that run."""
    counts: list[int] = []

    def count(conv: nn.Conv2d, _: object, output: Tensor) -> None:
        counts.append(output.numel() * conv.weight[0].numel())

    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(count) for conv in convs]
    run()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def main(quick: bool = False) -> None:
    """Measure ResNet-18 and ResNet-50 on 16 batches of 16, 96x96."""
    models = import_torchvision().models
    rounds, lines = (2 if quick else 7), []
    data = [torch.randn(16, 3, 96, 96) * (1 + i / 10) for i in range(4 if quick else 16)]
    case = f"{len(data)} batches of (16, 3, 96, 96)"
    for name in ["resnet18"] if quick else ["resnet18", "resnet50"]:
        torch.manual_seed(0)
        functions = contestants(getattr(models, name)(), data, ["pooled", "layerwise"])
        timings = compare(functions, rounds=rounds, calls=1)
        lines += rows(f"{name}, {case}", timings, BARE)
    model = models.resnet18()
    functions = contestants(model, data, ["sweeps"])
    timings = compare(functions, rounds=2 if quick else 3, calls=1)
    lines += rows(f"resnet18 (20 layers), {case}", timings, BARE)
    one, all_sweeps = (multiplications(model, run) for run in functions.values())
    lines.append(f"| the same | its multiplications, in forwards | | | {all_sweeps / one:.3f} |")
    functions = contestants(model, data, ["pooled"])
    functions.pop(BARE)
    functions["the same without standard errors"] = partial(without_errors, model, data)
    timings = compare(functions, rounds=3 * rounds, calls=1)
    lines += rows(f"resnet18, {case}", timings, "the same without standard errors")
    write("bench_layerwise", lines, quick=quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
