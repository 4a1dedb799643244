"""How many operators a training step issues on a device: each is a launch on a GPU.

Counted on the tests' substitute device, which has no kernels of its own and none of a GPU's
speed. A copy from tensor to tensor of the device counts as one, a view as none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import bnstats
from benchmarks import command
from benchmarks.rows import Row, Run

TESTS = Path(__file__).parent.parent / "tests"
SHAPE = (4, 8, 5, 5)
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "nn.BatchNorm2d": nn.BatchNorm2d,
    "EMABatchNorm2d": bnstats.EMABatchNorm2d,
    "CumulativeBatchNorm2d": bnstats.CumulativeBatchNorm2d,
    "MovingAverageBatchNorm2d": partial(
        bnstats.MovingAverageBatchNorm2d, window=4, warmup=5, renorm_warmup=6
    ),
}
FORWARD = {"EMABatchNorm2d": 10, "CumulativeBatchNorm2d": 12, "MovingAverageBatchNorm2d": 14}
BACKWARD = {"MovingAverageBatchNorm2d": 12}
STEPS_BEFORE = 10
"""After which windows are full and running variances take part."""


class Counts(NamedTuple):
    """Operators of one training step, and what the host waited for or copied in it."""

    forward: int
    backward: int
    waits: int
    copies: int


def measure(run: Run) -> list[Row]:  # noqa: ARG001
    """Count in a process of its own: a device is registered for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        counts = fresh.submit(count_all).result()
    if isinstance(counts, str):
        print(f"left out: the substitute device needs {counts};", end=" ")
        return []
    size = str(SHAPE)
    rows = []
    for name, count in counts.items():
        for work, number, promised in (
            ("operators of a training forward", count.forward, FORWARD),
            ("operators of its backward", count.backward, BACKWARD),
        ):
            at_most = promised.get(name)
            rows.append(Row(work, size, name, number, unit="operators", at_most=at_most))
    return rows


def count_all() -> dict[str, Counts] | str:
    """Count the operators of every layer, or return what this machine lacks for that."""
    sys.path.insert(0, str(TESTS))
    from substitute import substitute

    if (lacking := substitute.missing()) is not None:
        return str(lacking)
    substitute.register()
    return {name: count(make(SHAPE[1]), substitute.counting) for name, make in LAYERS.items()}


def count(layer: nn.Module, counting: Callable[[], object]) -> Counts:
    """Count the operators of one step of a layer that has trained."""
    device = torch.device("substitute:0")
    layer.to(device)
    x = torch.randn(SHAPE).to(device).requires_grad_()
    grad = torch.randn(SHAPE).to(device)
    inputs = (x, *layer.parameters())
    for _ in range(STEPS_BEFORE):
        torch.autograd.grad(layer(x), inputs, grad)
    with counting() as forward:  # type: ignore[attr-defined]
        output = layer(x)
    with counting() as backward:  # type: ignore[attr-defined]
        torch.autograd.grad(output, inputs, grad)
    waits, copies = (
        sum(sum(getattr(counts, kind).values()) for counts in (forward, backward))
        for kind in ("waits", "copies")
    )
    return Counts(forward.launches, backward.launches, waits, copies)


if __name__ == "__main__":
    command.main("operators")
