"""Normalization by moments that come from the input itself, which its gradient knows.

With n values per channel, those of some positions and of some processes, and sums over all
positions and processes::

    z = (x - mean) / sqrt(var + eps);  output = weight z + bias
    g = weight grad;  grad_x = (g - valid (sum(g) + z sum(g z)) / n) / sqrt(var + eps)

Every position is normalized and has a gradient of its own; the moments depend on valid ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnstats.errors import InvalidValueError
from bnstats.layers.batch import Batch
from bnstats.layers.replicas import Replicas
from bnstats.masked_reduction import count_positions
from bnstats.private import on_host
from bnstats.reduction import along_channels, other_axes


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    batch: Batch | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Normalize x, of shape (N, C, ...), by its own mean and biased variance.

    A batch of other positions or processes than x's own comes with its number of values.
    """
    mask, replicas = (None, None) if batch is None else (batch.mask, batch.replicas)
    arguments = (x, weight, bias, mean, var, eps, mask, count, replicas)
    output: Tensor = _Normalize.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def by_definition(
    x: Tensor, eps: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | int, Tensor, Tensor]:
    """Compute z by torch's operators alone, for what transforms or differentiates each of them.

    Returns:
        x - mean and 1 / sqrt(var + eps), whose product is z; number, mean and biased variance of
        the valid values.
    """
    axes = other_axes(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count: Tensor | int
    if mask is None:
        count = x.numel() // x.shape[1]
        mean = wide.mean(axes, keepdim=True)
        centered = wide - mean
        var = centered.square().mean(axes, keepdim=True)
    else:
        count = count_positions(mask, x)
        divisor = count.clamp(min=1)
        mean = torch.where(mask, wide, 0).sum(axes, keepdim=True) / divisor
        # Gradients of 0 times padding that is not finite would be NaN.
        centered = torch.where(mask | wide.isfinite(), wide, 0) - mean
        m2 = torch.where(mask, centered, 0).square().sum(axes, keepdim=True)
        var = torch.where(count > 0, m2 / divisor, 1)
    return centered, (var + eps).rsqrt(), count, mean.flatten(), var.flatten()


def scale_and_shift(
    centered: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return ``weight z + bias`` along the channels, z being ``centered inverse``."""
    if weight is not None:
        inverse = inverse * along_channels(weight, centered)
    z = centered * inverse
    return z if bias is None else z + along_channels(bias, z)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        mask: Tensor | None,
        count: Tensor | None,
        replicas: Replicas | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, mask, count)
        ctx.eps, ctx.replicas = eps, replicas
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, mask, count = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if count is None:
            # The kernel of nn.BatchNorm, which has a derivative of its own.
            inverse = (var + ctx.eps).rsqrt_()
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, inverse, True, ctx.eps, needed
            )
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(ctx, grad, x, weight, mask)
        else:
            grads = _gradients(ctx, grad, x, weight, mean, var, mask, count)
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 6


def _gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    mask: Tensor | None,
    count: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    factor = torch.ones_like(mean) if weight is None else weight
    inverse = (var + ctx.eps).rsqrt_()
    if x.numel():
        x, (_, grad_weight, grad_bias) = with_finite_padding(
            # CUDA's kernel takes mean and inverse in place of the statistics for some layouts of x.
            lambda x: torch.ops.aten.native_batch_norm_backward(
                grad, x, factor, mean, var, mean, inverse, False, ctx.eps, [False, True, True]
            ),
            x,
            grad,
            mask,
        )
    else:
        grad_weight, grad_bias = torch.zeros_like(mean), torch.zeros_like(mean)
    sums = torch.stack((grad_bias, grad_weight))
    if ctx.replicas is not None:
        sums = ctx.replicas.sum(sums)
    scale = factor * inverse
    average, slope = sums * (-scale / count.clamp(min=1))
    # One pass: ``slope z + average``.
    grad_x = F.batch_norm(x.to(mean.dtype), mean, var, slope, average, False, 0.0, ctx.eps)
    if mask is not None:
        grad_x = _zero_padding(grad_x, mask)
    grad_x = grad_x.addcmul_(grad.to(mean.dtype), along_channels(scale, grad))
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Return x with padding set to 0, also where it is NaN or infinite; x may be written to."""
    if on_host(x):
        # A product takes a part of the time of torch.where; what is not finite spoils it.
        x = x.mul_(mask.to(x.dtype))
        if math.isfinite(x.sum()):
            return x
    return torch.where(mask, x, 0)


def with_finite_padding(
    kernel: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, grad: Tensor, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a kernel of the backward on x, whose padding may be NaN or infinite.

    Padding that has no gradient has no part in sums over the gradient, but 0 times NaN is NaN.
    What is not finite and counts is in the mean, or the variance.

    Returns:
        x, where padding is finite if it matters, and the kernel's results, whose second is a
        sum over the gradient times x.
    """
    if mask is None:
        return x, kernel(x)
    asks = on_host(x) and on_host(grad)
    if not asks:
        x = x.nan_to_num(0.0, 0.0, 0.0)
    results = kernel(x)
    if asks and not math.isfinite(results[1].sum()):
        x = x.nan_to_num(0.0, 0.0, 0.0)
        results = kernel(x)
    return x, results


def _differentiable_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return gradients that have gradients themselves: create_graph asks for that."""
    if ctx.replicas is not None:
        raise InvalidValueError(
            "create_graph: expected False for a synchronized layer, got True: the collective in "
            "its gradient has no derivative; use sync=None for second derivatives"
        )
    centered, inverse, *_ = by_definition(x, ctx.eps, mask)
    output = scale_and_shift(centered, inverse, weight, None).to(x.dtype)
    inputs = [v for v in (x, weight) if v is not None and v.requires_grad]
    found = torch.autograd.grad(output, inputs, grad, create_graph=True) if inputs else ()
    grads = iter(found)
    grad_x, grad_weight = (
        next(grads) if v is not None and v.requires_grad else None for v in (x, weight)
    )
    axes = other_axes(x)
    return grad_x, grad_weight, grad.sum(axes)
