"""EMA and cumulative layers against nn.BatchNorm2d: alone, and in a training step."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

import bnstats
from benchmarks.peers import import_torchvision
from benchmarks.report import rows, write
from benchmarks.timing import compare

LAYERS = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "EMABatchNorm2d": bnstats.EMABatchNorm2d,
    "CumulativeBatchNorm2d": bnstats.CumulativeBatchNorm2d,
}
SHAPES = [(2, 256, 28, 28), (2, 64, 56, 56), (8, 32, 8, 8)]


def forward_backward(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """Return a forward and backward of a layer alone."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    return lambda: layer(x).backward(grad)


def training_step(norm_layer: type[nn.Module]) -> Callable[[], object]:
    """Return a step of ResNet-18 on a batch of 16, 64x64."""
    torch.manual_seed(0)
    model = import_torchvision().models.resnet18(norm_layer=norm_layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(16, 3, 64, 64), torch.randint(1000, (16,))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def main(quick: bool = False) -> None:
    """Measure the layers alone and the training step."""
    rounds, lines = (5 if quick else 60), []
    for shape in SHAPES:
        functions = {name: forward_backward(cls(shape[1]), shape) for name, cls in LAYERS.items()}
        timings = compare(functions, rounds=rounds, calls=10)
        lines += rows(f"forward and backward, {shape}", timings, "nn.BatchNorm2d")
    functions = {name: training_step(cls) for name, cls in LAYERS.items()}
    timings = compare(functions, rounds=3 if quick else 30, calls=1)
    lines += rows("ResNet-18 training step, (16, 3, 64, 64)", timings, "nn.BatchNorm2d")
    write("bench_layers", lines, quick=quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
