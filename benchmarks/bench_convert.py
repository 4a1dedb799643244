"""Converting a ResNet-152 and reverting it."""

from __future__ import annotations

import time
from collections.abc import Callable

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run
from benchmarks.timing import summary
from benchmarks.workloads import torchvision_model


def measure(run: Run) -> list[Row]:
    """Measure each direction, there and back again."""
    model = torchvision_model("resnet152")
    measured = []
    for to in ("ema", "cumulative", "moving_average"):
        there, back = [], []
        for _ in range(1 if run.quick else 9):
            there.append(_seconds(lambda to=to: bnstats.convert_batchnorm(model, to)))
            back.append(_seconds(lambda: bnstats.revert_batchnorm(model)))
        measured += [
            Row("conversion", "ResNet-152", f"to {to}", *summary(there)),
            Row("conversion", "ResNet-152", f"back from {to}", *summary(back)),
        ]
    return measured


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    command.main("convert")
