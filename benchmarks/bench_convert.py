"""Converting a ResNet-152 and reverting it."""

from __future__ import annotations

import statistics
import sys
import time

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import machine


def main(quick: bool = False) -> None:
    """Print the milliseconds that each direction takes."""
    model = import_torchvision().models.resnet152()
    print(f"`python -m benchmarks.bench_convert` on {machine()}.\n")
    print("| ResNet-152 | median, ms |\n| --- | --- |")
    for to in ("ema", "cumulative", "moving_average"):
        there, back = [], []
        for _ in range(1 if quick else 5):
            start = time.perf_counter()
            bnstats.convert_batchnorm(model, to)
            there.append(time.perf_counter() - start)
            start = time.perf_counter()
            bnstats.revert_batchnorm(model)
            back.append(time.perf_counter() - start)
        print(f"| to {to} | {1e3 * statistics.median(there):.0f} |")
        print(f"| back | {1e3 * statistics.median(back):.0f} |")


if __name__ == "__main__":
    main("--quick" in sys.argv)
