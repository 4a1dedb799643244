"""What is timed: layers alone, training steps, passes over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.machine import device
from benchmarks.memory import copies
from benchmarks.peers import import_torchvision
from benchmarks.rows import Row, rows
from benchmarks.timing import compare, keep_freed_memory

Work: TypeAlias = Callable[[], object]
Shape: TypeAlias = tuple[int, ...]

COPY = "copy of x"
COPY_INPUTS = "copy of every BatchNorm input"

EVALUATION_PASSES = 2
"""Passes over x that evaluation cannot do without: x is read, y is written. 8 bytes for each
element in float32."""

TRAINING_PASSES = 8
"""The same for a forward and backward, with nothing kept between them but x: x is read for its
statistics; x is read and y written; x and the gradient are read for their two sums; x and the
gradient are read and the gradient of x is written. 32 bytes for each element."""


def compare_layers(
    work: str,
    shape: Shape,
    functions: dict[str, Work],
    against: str,
    *,
    passes: int,
    at_most: dict[str, float],
    rounds: int,
    calls: int,
) -> list[Row]:
    """Measure layers on one shape beside the copy that gives their limit."""
    keep_freed_memory()
    timings = compare({**functions, COPY: copies([shape])}, rounds=rounds, calls=calls)
    one_pass = 4 * torch.Size(shape).numel()
    return rows(
        work,
        str(shape),
        timings,
        against,
        at_most=at_most,
        moved={COPY: 2 * one_pass, **dict.fromkeys(functions, passes * one_pass)},
        limits=dict.fromkeys(functions, passes / 2 * timings[COPY].median),
    )


def forward_backward(layer: nn.Module, shape: Shape, *, mean: float = 0.0) -> Work:
    """Return a forward and backward of a layer alone, on values of a standard deviation of 1."""
    layer.to(device())
    x = (torch.randn(shape, device=device()) + mean).requires_grad_()
    grad, inputs = torch.randn_like(x), (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), inputs, grad)


def evaluation_forward(layer: nn.Module, shape: Shape) -> Work:
    """Return a forward of a layer alone, in evaluation mode."""
    layer.to(device()).eval()
    x = torch.randn(shape, device=device())

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def training_step(model: nn.Module, size: Shape = (16, 3, 64, 64)) -> Work:
    """Return an optimizer's step on one batch, of any model of images."""
    model.to(device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(size, device=device())
    y = torch.randint(10, (size[0],), device=device())

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def forward(model: nn.Module, data: Iterable[Tensor], *, training: bool) -> Work:
    """Return the bare forward of every batch."""

    def run() -> None:
        model.train(training)
        with torch.no_grad():
            for x in data:
                model(x)

    return run


def torchvision_model(name: str, **options: object) -> nn.Module:
    """Return a model of torchvision's, always with the same weights."""
    torch.manual_seed(0)
    return getattr(import_torchvision().models, name)(**options).to(device())


def batches(count: int, *shape: int) -> list[Tensor]:
    """Return batches of growing scale."""
    return [torch.randn(shape, device=device()) * (1 + i / 10) for i in range(count)]


def copy_of_inputs(model: nn.Module, data: list[Tensor]) -> Work:
    """Return a copy of what every BatchNorm layer gets in a pass over batches of one shape."""
    shapes: list[Shape] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
    ]
    forward(model, data[:1], training=False)()
    for hook in hooks:
        hook.remove()
    return copies(shapes, times=len(data))
