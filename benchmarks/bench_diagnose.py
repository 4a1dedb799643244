"""What recording batch statistics costs a training step."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import rows, write
from benchmarks.timing import compare


def training_step(*, record: bool) -> Callable[[], object]:
    """Return a step of ResNet-18 on a batch of 16, 64x64, with all its layers recorded or none."""
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18()
    x, y = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))

    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    def recorded() -> None:
        with bnstats.record_batch_stats(model):
            step()

    return recorded if record else step


def main(quick: bool = False) -> None:
    """Measure a step with and without."""
    functions = {
        "training step": training_step(record=False),
        "the same, recorded": training_step(record=True),
    }
    timings = compare(functions, rounds=3 if quick else 30, calls=1)
    write(
        "bench_diagnose", rows("ResNet-18, (16, 3, 64, 64)", timings, "training step"), quick=quick
    )


if __name__ == "__main__":
    main("--quick" in sys.argv)
