"""Speed of MovingAverageBatchNorm2d against nn.BatchNorm2d and the paper's formulas as written.

Run with ``python -m benchmarks.bench_moving_average [--quick]``.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from bnstats import MovingAverageBatchNorm2d
from benchmarks.timing import Timing, compare

SHAPES = [(2, 64, 56, 56), (2, 256, 28, 28), (2, 2048, 7, 7), (32, 64, 32, 32)]
OPTIONS = {"window": 16, "warmup": 20, "renorm_warmup": 30}


class _Formulas(torch.autograd.Function):
    """The forward and backward of the paper, one operator for every operation in them."""

    @staticmethod
    def forward(ctx, x, weight, bias, layer):
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
    def backward(ctx, grad):
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


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run one forward and backward."""
    x.grad = None
    layer(x).backward(grad)


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Timing]:
    """Time the three layers at a shape, all windows warm."""
    x = torch.randn(shape).requires_grad_()
    grad = torch.randn(shape)
    layers = {
        "nn.BatchNorm2d": nn.BatchNorm2d(shape[1]),
        "MovingAverageBatchNorm2d": MovingAverageBatchNorm2d(shape[1], **OPTIONS),
        "direct transcription": DirectTranscription(shape[1], **OPTIONS),
    }
    for layer in layers.values():
        for _ in range(OPTIONS["renorm_warmup"] + 1):
            step(layer, x, grad)
    steps = {name: lambda layer=layer: step(layer, x, grad) for name, layer in layers.items()}
    return compare(steps, rounds=rounds)


def main(quick: bool = False) -> dict[tuple[int, ...], dict[str, Timing]]:
    """Print a table of microseconds, and return the timings."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, forward and backward")
    print(
        "| shape | nn.BatchNorm2d, us | MovingAverageBatchNorm2d, us | direct, us | to nn | direct to it |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    results = {}
    for shape in SHAPES:
        results[shape] = timings = measure(shape, rounds=5 if quick else 60)
        plain, ours, direct = timings.values()
        cells = [
            f"{t.median * 1e6:.0f} ({t.low * 1e6:.0f} to {t.high * 1e6:.0f})"
            for t in timings.values()
        ]
        ratios = f"{ours.median / plain.median:.2f} | {direct.median / ours.median:.2f}"
        print(f"| {shape} | {' | '.join(cells)} | {ratios} |")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    main(parser.parse_args().quick)
