"""Recalibration against the bare training-mode forward, torch's and fvcore's."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import rows, write
from benchmarks.timing import compare

BARE = "bare forward, training mode"


def contestants(model: nn.Module, data: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return what is compared: each does one pass over the data."""

    def forward(training: bool) -> None:
        model.train(training)
        with torch.no_grad():
            for x in data:
                model(x)

    def fvcore() -> None:
        model.train()
        with torch.no_grad():
            update_bn_stats(model, data, len(data))

    return {
        BARE: lambda: forward(True),
        "bare forward, evaluation mode": lambda: forward(False),
        "bnstats.recompute_population_stats": lambda: bnstats.recompute_population_stats(
            model, data
        ),
        "torch.optim.swa_utils.update_bn": lambda: update_bn(data, model),
        "fvcore update_bn_stats": fvcore,
    }


def main(quick: bool = False) -> None:
    """Measure ResNet-50, ResNet-18 and MobileNetV2, batch 8, 96x96."""
    models = import_torchvision().models
    names = ["resnet18"] if quick else ["resnet50", "resnet18", "mobilenet_v2"]
    lines = []
    for name in names:
        torch.manual_seed(0)
        data = [torch.randn(8, 3, 96, 96) for _ in range(2 if quick else 24)]
        timings = compare(
            contestants(getattr(models, name)(), data), rounds=3 if quick else 9, calls=1
        )
        lines += rows(f"{name}, {len(data)} batches of (8, 3, 96, 96)", timings, BARE)
    write("bench_recompute", lines, quick=quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
