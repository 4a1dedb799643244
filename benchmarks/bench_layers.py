"""EMA and cumulative layers against nn.BatchNorm2d: alone, and in a training step."""

from __future__ import annotations

from torch import nn

import bnstats
from benchmarks import command
from benchmarks.machine import device
from benchmarks.rows import Row, Run, rows
from benchmarks.timing import compare
from benchmarks.workloads import (
    EVALUATION_PASSES,
    TRAINING_PASSES,
    Shape,
    compare_layers,
    evaluation_forward,
    forward_backward,
    torchvision_model,
    training_step,
)

TORCH = "nn.BatchNorm2d"
LAYERS = {
    TORCH: nn.BatchNorm2d,
    "EMABatchNorm2d": bnstats.EMABatchNorm2d,
    "CumulativeBatchNorm2d": bnstats.CumulativeBatchNorm2d,
}
TRAINING: dict[Shape, float] = {(2, 256, 28, 28): 1.05, (2, 64, 56, 56): 1.05, (8, 32, 8, 8): 1.2}
LARGE_ON_CPU: dict[Shape, float] = {(32, 64, 32, 32): 0.75, (32, 64, 56, 56): 0.75}
FAR_MEAN = 1.0
EVALUATION = 1.01
TRAINING_STEP = 1.02


def measure(run: Run) -> list[Row]:
    """Measure ResNet-18 with each, and the layers alone."""
    measured = _training_step(run)
    for shape, at_most in {**TRAINING, **LARGE_ON_CPU}.items():
        promised = shape in TRAINING or device().type == "cpu"
        measured += _alone(run, shape, at_most=_ours(at_most) if promised else {})
    for shape in LARGE_ON_CPU:  # where plain sums cancel
        promised = device().type == "cpu"
        measured += _alone(run, shape, mean=10.0, at_most=_ours(FAR_MEAN) if promised else {})
    for shape in TRAINING:
        shape = run.shape(shape)
        measured += compare_layers(
            "evaluation forward",
            shape,
            {name: evaluation_forward(layer(shape[1]), shape) for name, layer in LAYERS.items()},
            TORCH,
            passes=EVALUATION_PASSES,
            at_most=_ours(EVALUATION),
            rounds=3 if run.quick else 200,
            calls=10,
        )
    return measured


def _training_step(run: Run) -> list[Row]:
    size = (2, 3, 32, 32) if run.quick else (16, 3, 64, 64)
    steps = {
        name: training_step(torchvision_model("resnet18", norm_layer=layer), size)
        for name, layer in LAYERS.items()
    }
    timings = compare(steps, rounds=1 if run.quick else 200)
    return rows("ResNet-18 training step", str(size), timings, TORCH, at_most=_ours(TRAINING_STEP))


def _alone(run: Run, shape: Shape, *, mean: float = 0.0, at_most: dict[str, float]) -> list[Row]:
    shape = run.shape(shape)
    return compare_layers(
        "forward and backward" + (f", mean {mean:g} deviations" if mean else ""),
        shape,
        {
            name: forward_backward(layer(shape[1]), shape, mean=mean)
            for name, layer in LAYERS.items()
        },
        TORCH,
        passes=TRAINING_PASSES,
        at_most=at_most,
        rounds=3 if run.quick else 200,
        calls=1 if run.quick else 10,
    )


def _ours(at_most: float) -> dict[str, float]:
    return {name: at_most for name in LAYERS if name != TORCH}


if __name__ == "__main__":
    command.main("layers")
