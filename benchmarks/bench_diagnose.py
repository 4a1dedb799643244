"""What recording batch statistics costs a training step."""

from __future__ import annotations

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import torchvision_model, training_step


def measure(run: Run) -> list[Row]:
    """Measure a step of ResNet-18 with all its layers recorded, and with none."""
    size = (16, 3, 64, 64)
    model = torchvision_model("resnet18")
    recorded_step = training_step(model, size)

    def recorded() -> None:
        with bnstats.record_batch_stats(model):
            recorded_step()

    functions = {
        "training step": training_step(torchvision_model("resnet18"), size),
        "the same, recorded": recorded,
    }
    timings = compare(functions, rounds=1 if run.quick else 30)
    return rows("ResNet-18 training step", str(size), timings, "training step")


if __name__ == "__main__":
    command.main("diagnose")
