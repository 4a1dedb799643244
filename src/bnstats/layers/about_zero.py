"""Normalization about zero with a given variance, and the backward of moving averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.accumulators.window import Step
from bnstats.errors import InvalidTypeError, InvalidValueError
from bnstats.layers.windows import Scale, Schedule, Windows, add_gradient

HALF = (torch.float16, torch.bfloat16)
"""What torch normalizes with float32 statistics too."""

_SMALLEST_FACTOR = 1e-20
"""What stands for a smaller factor where one is divided by: far below rounding."""

_NEAR_ZERO = 1e-3
"""Mean, in standard deviations, that a layer without a mean need not mention."""


def far_from_zero(mean: Tensor, var: Tensor, eps: float) -> bool:
    """Whether a layer without a mean evaluates differently from one with these statistics."""
    return not mean.is_meta and bool((mean.square() > _NEAR_ZERO**2 * (var + eps)).any())


def check_dtype(x: Tensor, wide: torch.dtype) -> None:
    """Refuse an input that torch does not normalize with statistics of the wide dtype."""
    if x.dtype == wide:
        return
    fitting = (wide, *HALF) if wide == torch.float32 else (wide,)
    if x.dtype not in fitting:
        expected = " or ".join(map(str, fitting))
        raise InvalidTypeError(f"MovingAverageBatchNorm: input: expected {expected}, got {x.dtype}")


def about_zero(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Scale,
    windows: Windows,
    schedule: Schedule,
) -> Tensor:
    """Normalize x about zero; in the backward let the window stand in for the batch's average.

    With the scale's ``var`` and ``ratio`` as r, and n values per channel::

        z = x / sqrt(var + eps);  output = weight r z + bias
        g = weight r grad;  psi = sum(g z) / n;  Psi = mean of psi over the backward window
        grad_x = (g - z Psi) / sqrt(var + eps)

    Only x and vectors of one number per channel are kept for the backward.
    """
    # One by one: torch 2.6 compiles no tuples of tensors here where a shape is dynamic.
    buffers = (windows.gradients, windows.gradient_steps)
    var, ratio, step, _ = scale
    output: Tensor = _AboutZero.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, var, ratio, step, *buffers, schedule.eps, schedule.warmup
    )
    return output


class _AboutZero(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        var: Tensor,
        ratio: Tensor | None,
        step: Step,
        gradients: Tensor,
        gradient_steps: Tensor,
        eps: float,
        warmup: int,
    ) -> Tensor:
        # A step that is a tensor is one of autograd's, so that torch.compile passes it on.
        steps = (step,) if isinstance(step, Tensor) else ()
        factor = _product(weight, ratio)
        ctx.save_for_backward(x, factor, var, ratio, *steps)
        ctx.step = None if steps else step
        # Not saved but held: other forwards may write to them before this backward does.
        ctx.gradients, ctx.gradient_steps = gradients, gradient_steps
        ctx.eps, ctx.warmup = eps, warmup
        return F.batch_norm(x, torch.zeros_like(var), var, factor, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise InvalidValueError(
                "MovingAverageBatchNorm: create_graph: expected False, got True: its gradient "
                "is no derivative of its output, and has none itself; use evaluation mode or "
                "nn.BatchNorm for second derivatives"
            )
        x, factor, var, ratio, *steps = ctx.saved_tensors
        step = steps[0] if steps else ctx.step
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # The compiler has no rule for SyncBatchNorm's operators, and fuses on its own.
        fused = _on_cuda if x.is_cuda and not torch.compiler.is_compiling() else _anywhere
        grad_z, grad_bias, input_gradient = fused(grad, x, factor, var, ctx.eps)

        count = x.numel() // x.shape[1]
        buffers = (ctx.gradients, ctx.gradient_steps)
        mean = add_gradient(*buffers, step, grad_z, factor, count, ctx.warmup)
        grad_x = input_gradient(mean) if needs_x else None
        grad_weight = _product(grad_z, ratio) if needs_weight else None
        return grad_x, grad_weight, grad_bias if needs_bias else None, *[None] * 7


Fused: TypeAlias = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Per channel ``sum(grad z)`` and ``sum(grad)``, and the function from Psi to grad_x."""


def _anywhere(grad: Tensor, x: Tensor, factor: Tensor | None, var: Tensor, eps: float) -> Fused:
    """Use the backward of evaluation-mode batch norm: the sums and ``g / sqrt(var + eps)``."""
    zeros = torch.zeros_like(var)
    partial, grad_z, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, factor, zeros, var, None, None, False, eps, [True, True, True]
    )

    def input_gradient(mean: Tensor) -> Tensor:
        factor_z = (mean / (var + eps)).view(-1, *[1] * (x.dim() - 2))
        result: Tensor = partial.addcmul_(x, factor_z, value=-1)
        return result

    return grad_z, grad_bias, input_gradient


def _on_cuda(grad: Tensor, x: Tensor, factor: Tensor | None, var: Tensor, eps: float) -> Fused:
    """Use SyncBatchNorm's operators, which take any statistics: two passes, as one BatchNorm."""
    grad, x = _same_layout(grad, x)
    zeros, inverse = torch.zeros_like(var), (var + eps).rsqrt()
    grad_bias, grad_xz, _, _ = torch.batch_norm_backward_reduce(
        grad, x, zeros, inverse, factor, True, False, False
    )

    def input_gradient(mean: Tensor) -> Tensor:
        # The operator computes ``(grad - x inverse^2 total / count) inverse factor``. A factor
        # of 0, a weight's start in many a residual branch, would leave Psi out.
        safe = torch.ones_like(var) if factor is None else factor
        safe = torch.where(safe.abs() < _SMALLEST_FACTOR, _SMALLEST_FACTOR, safe)
        count = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(
            grad, x, zeros, inverse, safe, zeros, mean / (inverse * safe), count
        )

    return grad_xz * inverse, grad_bias, input_gradient


def _same_layout(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both contiguous, or both channels_last."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout):
            return grad.contiguous(memory_format=layout), x
    return grad.contiguous(), x.contiguous()


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Multiply; None is 1."""
    if a is None or b is None:
        return b if a is None else a
    return a * b
