"""MovingAverageBatchNorm2d against nn.BatchNorm2d and the paper's formulas as written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.rows import Row, Run
from benchmarks.workloads import TRAINING_PASSES, Shape, Work, compare_layers, forward_backward
from bnstats import MovingAverageBatchNorm2d

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


TORCH = "nn.BatchNorm2d"
OURS = "MovingAverageBatchNorm2d"
TRANSCRIPTION = "direct transcription"
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    TORCH: nn.BatchNorm2d,
    OURS: partial(MovingAverageBatchNorm2d, **OPTIONS),
    TRANSCRIPTION: partial(DirectTranscription, **OPTIONS),
}
SHAPES: dict[Shape, float] = {
    (2, 64, 56, 56): 1.0,
    (2, 256, 28, 28): 1.1,
    (2, 2048, 7, 7): 1.25,
    (32, 64, 32, 32): 0.8,
}
COMPILED: dict[Shape, float] = dict.fromkeys(SHAPES, 1.15) | {(2, 2048, 7, 7): 1.3}


def measure(run: Run) -> list[Row]:
    """Measure the layer at every shape, again compiled, and the transcription beside it."""
    measured = []
    for shape, at_most in SHAPES.items():
        measured += _compare(run, "forward and backward", shape, (TORCH, OURS), at_most)
    for shape in list(SHAPES)[: 1 if run.quick else None]:
        torch.compiler.reset()  # every shape is compiled by itself
        work = "compiled forward and backward"
        measured += _compare(
            run, work, shape, (TORCH, OURS), COMPILED[shape], change=_compiled(run)
        )
    # Last and by itself: its many temporaries scatter what the others get from the allocator.
    for shape in SHAPES:
        pair = _compare(run, "forward and backward", shape, (OURS, TRANSCRIPTION))
        measured += [row for row in pair if row.what == TRANSCRIPTION]
    return measured


def _compare(
    run: Run,
    work: str,
    shape: Shape,
    names: tuple[str, str],
    at_most: float | None = None,
    *,
    change: Callable[[nn.Module], nn.Module] = lambda layer: layer,
) -> list[Row]:
    """Measure the second of two layers against the first."""
    shape = run.shape(shape)
    return compare_layers(
        work,
        shape,
        {name: _warm(change(LAYERS[name](shape[1])), shape) for name in names},
        names[0],
        passes=TRAINING_PASSES,
        at_most={} if at_most is None else {names[1]: at_most},
        rounds=3 if run.quick else 200,
        calls=1 if run.quick else 10,
    )


def _compiled(run: Run) -> Callable[[nn.Module], nn.Module]:
    """Return what compiles; at a glance no C++, which takes as long as all other benchmarks."""
    backend = "aot_eager" if run.quick else "inductor"
    return partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)


def _warm(layer: nn.Module, shape: Shape) -> Work:
    """Return a forward and backward of a layer whose windows are full."""
    work = forward_backward(layer, shape)
    for _ in range(OPTIONS["renorm_warmup"] + 1):
        work()
    return work


if __name__ == "__main__":
    command.main("moving_average")
