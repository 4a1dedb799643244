"""MovingAverageBatchNorm2d against nn.BatchNorm2d and the paper's formulas as written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import rows, write
from benchmarks.timing import compare
from bnstats import MovingAverageBatchNorm2d

SHAPES = [(2, 64, 56, 56), (2, 256, 28, 28), (2, 2048, 7, 7), (32, 64, 32, 32)]
OPTIONS = {"window": 16, "warmup": 20, "renorm_warmup": 30}


class _Formulas(torch.autograd.Function):
    """The forward and backward of the paper, one operator for every operation in them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: DirectTranscription
    ) -> Tensor:
        layer.t += 1
        slot = layer.t % layer.window
        chi = (x * x).mean((0, 2, 3), keepdim=True)
        layer.chi[slot] = chi[0]
        warm = layer.t > layer.window and layer.t >= layer.warmup
        var = layer.chi.mean(0, keepdim=True) if warm else chi
        r = torch.ones_like(var)
        if layer.t > max(layer.renorm_warmup, layer.warmup):
            r = (var + layer.eps).sqrt() / (layer.running_var + layer.eps).sqrt()
            r = r.clamp(1 / layer.max_ratio, layer.max_ratio)
        layer.running_var.mul_(1 - layer.momentum).add_(var, alpha=layer.momentum)
        z = x / (var + layer.eps).sqrt()
        y = r * z
        ctx.save_for_backward(z, y, var, r, weight)
        ctx.layer, ctx.slot, ctx.warm = layer, slot, warm
        return weight * y + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, y, var, r, weight = ctx.saved_tensors
        layer = ctx.layer
        g = grad * weight * r
        psi = (g * z).mean((0, 2, 3), keepdim=True)
        layer.psi[ctx.slot] = psi[0]
        mean = layer.psi.mean(0, keepdim=True) if ctx.warm else psi
        grad_x = (g - z * mean) / (var + layer.eps).sqrt()
        grad_weight = (grad * y).sum((0, 2, 3), keepdim=True)
        return grad_x, grad_weight, grad.sum((0, 2, 3), keepdim=True), None


class DirectTranscription(nn.Module):
    """What one gets by writing the paper's formulas down."""

    def __init__(self, channels: int, *, window: int, warmup: int, renorm_warmup: int) -> None:
        super().__init__()
        self.window, self.warmup, self.renorm_warmup = window, warmup, renorm_warmup
        self.eps, self.momentum, self.max_ratio, self.t = 1e-5, 0.02, 5.0, 0
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))
        self.register_buffer("chi", torch.zeros(window, channels, 1, 1))
        self.register_buffer("psi", torch.zeros(window, channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the formulas."""
        return _Formulas.apply(input, self.weight, self.bias, self)


def step(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """Return a forward and backward of a layer whose windows are warm."""
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def run() -> None:
        x.grad = None
        layer(x).backward(grad)

    for _ in range(OPTIONS["renorm_warmup"] + 1):
        run()
    return run


def main(quick: bool = False) -> None:
    """Measure the three layers at every shape."""
    lines = []
    for shape in SHAPES:
        layers = {
            "nn.BatchNorm2d": nn.BatchNorm2d(shape[1]),
            "MovingAverageBatchNorm2d": MovingAverageBatchNorm2d(shape[1], **OPTIONS),
            "direct transcription": DirectTranscription(shape[1], **OPTIONS),
        }
        functions = {name: step(layer, shape) for name, layer in layers.items()}
        timings = compare(functions, rounds=5 if quick else 60, calls=10)
        lines += rows(f"forward and backward, {shape}", timings, "nn.BatchNorm2d")
    write("bench_moving_average", lines, quick=quick)


if __name__ == "__main__":
    main("--quick" in sys.argv)
