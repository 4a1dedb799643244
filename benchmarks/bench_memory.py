"""The peak memory of a pooled recalibration against the bare training-mode forward's.

Model and batches are made inside what is measured: nothing is subtracted. On CPU every
allocation is counted, so that one run is exact; on CUDA they are those of torch's allocator.
"""

from __future__ import annotations

import bnstats
from benchmarks import command
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row, Run
from benchmarks.workloads import batches, forward, torchvision_model

BARE = "bare forward, training mode"
MODELS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNetV2"}
AT_MOST = 1.01


def measure(run: Run) -> list[Row]:
    """Measure the peak of each model's pass over a few batches."""
    size = (2, 3, 32, 32) if run.quick else (32, 3, 224, 224)
    count = 2
    work = f"peak memory of a recalibration, {count} batches of {size}"

    def bare(model: str) -> None:
        forward(torchvision_model(model), batches(count, *size), training=True)()

    def recalibration(model: str) -> None:
        bnstats.recompute_population_stats(torchvision_model(model), batches(count, *size))

    measured = []
    for model, name in MODELS.items():
        # the first convolution of a process keeps workspaces that later ones find there
        bare(model)
        base = peak_bytes(lambda model=model: bare(model))
        ours = peak_bytes(lambda model=model: recalibration(model))
        measured += [
            Row(work, name, BARE, base, unit="bytes"),
            Row(
                *(work, name, "recompute_population_stats", ours),
                unit="bytes",
                against=BARE,
                base=base,
                at_most=AT_MOST,
            ),
        ]
    return measured


if __name__ == "__main__":
    command.main("memory")
